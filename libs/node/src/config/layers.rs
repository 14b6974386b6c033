//! Merging of layers, and the search for keys that nothing reads.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{ConfigError, ENVIRONMENT_PREFIX, Layers, Loaded, Source};

/// A known key this many edits away is still taken for what was meant.
const HINT_EDITS_MAX: usize = 3;

pub(super) fn layer<T: Default + Serialize + DeserializeOwned>(
    layers: &Layers<'_>,
) -> Result<Loaded<T>, ConfigError> {
    let defaults = Table::try_from(T::default()).map_err(|error| ConfigError::Defaults(error.to_string()))?;
    let mut merged = Table::new();
    let mut sources = BTreeMap::new();
    if let Some((name, text)) = layers.file {
        merged = read_file::<T>(name, text)?;
        note(&merged, "", &Source::File(name.to_owned()), &mut sources);
    }
    let environment = layers.environment.iter().filter_map(|(name, value)| {
        let key = environment_key(name)?;
        Some((key, value, Source::Environment(name.clone())))
    });
    let flags = layers
        .flags
        .iter()
        .map(|(key, value)| (key.clone(), value, Source::Flag));
    for (key, text, source) in environment.chain(flags) {
        set::<T>(&mut merged, &defaults, &key, text, &source)?;
        // What a lower layer said below or above this key is replaced with it.
        sources.retain(|known: &String, _| !covers(&key, known));
        sources.insert(key, source);
    }
    let value: T = parse(&merged).map_err(|error| ConfigError::Defaults(error.message().to_owned()))?;
    let known = Table::try_from(&value).map_err(|error| ConfigError::Defaults(error.to_string()))?;
    let mut unknown_keys = Vec::new();
    find_unknown(&merged, &known, &defaults, "", &sources, &mut unknown_keys);
    Ok(Loaded {
        value,
        unknown_keys,
        sources,
    })
}

/// Reads the file by itself first, because only then an error knows its line.
fn read_file<T: DeserializeOwned>(name: &str, text: &str) -> Result<Table, ConfigError> {
    let refuse = |error: &toml::de::Error| ConfigError::File {
        name: name.to_owned(),
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        message: error.message().trim().replace('\n', ", "),
    };
    let table: Table = text.parse().map_err(|error| refuse(&error))?;
    toml::from_str::<T>(text).map_err(|error| refuse(&error))?;
    Ok(table)
}

fn line_of(text: &str, byte: usize) -> usize {
    1 + text.bytes().take(byte).filter(|byte| *byte == b'\n').count()
}

fn parse<T: DeserializeOwned>(table: &Table) -> Result<T, toml::de::Error> {
    Value::Table(table.clone()).try_into()
}

fn environment_key(name: &str) -> Option<String> {
    let path = name.strip_prefix(ENVIRONMENT_PREFIX)?;
    let parts: Vec<_> = path.split("__").map(str::to_ascii_lowercase).collect();
    let is_key = parts.len() > 1 && parts.iter().all(|part| !part.is_empty());
    is_key.then(|| parts.join("."))
}

/// Sets `key` to what `text` means there. The environment and the command line carry text only, so the default's
/// type decides; where there is none, whatever the field takes.
fn set<T: DeserializeOwned>(
    merged: &mut Table,
    defaults: &Table,
    key: &str,
    text: &str,
    source: &Source,
) -> Result<(), ConfigError> {
    let path: Vec<_> = key.split('.').collect();
    let mut failure = None;
    for value in meanings(text, lookup(defaults, &path)) {
        let mut candidate = merged.clone();
        match place(&mut candidate, &path, value) {
            Ok(()) => match parse::<T>(&candidate) {
                Ok(_) => {
                    *merged = candidate;
                    return Ok(());
                }
                Err(error) => failure = Some(error.message().trim().replace('\n', ", ")),
            },
            Err(message) => failure = Some(message),
        }
    }
    Err(ConfigError::Value {
        origin: source.clone(),
        key: key.to_owned(),
        value: text.to_owned(),
        message: failure.unwrap_or_else(|| "has no meaning there".to_owned()),
    })
}

/// What `text` can mean, likeliest last: the last failure is the one that is reported.
fn meanings(text: &str, default: Option<&Value>) -> Vec<Value> {
    let string = Value::String(text.to_owned());
    let literal = format!("value = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"));
    let list = || {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        Value::Array(parts.map(|part| Value::String(part.to_owned())).collect())
    };
    match (default, literal) {
        (Some(Value::String(_)), _) | (None, None) => vec![string],
        (Some(Value::Array(_)), Some(literal @ Value::Array(_))) => vec![literal],
        (Some(Value::Array(_)), _) => vec![list()],
        (Some(Value::Float(_)), Some(Value::Integer(whole))) => vec![Value::Float(whole as f64)],
        (_, Some(literal)) => vec![literal, string],
        (Some(_), None) => vec![string],
    }
}

fn lookup<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, sections) = path.split_last()?;
    let mut table = table;
    for section in sections {
        table = table.get(*section)?.as_table()?;
    }
    table.get(*last)
}

fn place(table: &mut Table, path: &[&str], value: Value) -> Result<(), String> {
    let Some((last, sections)) = path.split_last() else {
        return Err("the key is empty".to_owned());
    };
    let mut table = table;
    for section in sections {
        let entry = table
            .entry((*section).to_owned())
            .or_insert_with(|| Value::Table(Table::new()));
        table = entry
            .as_table_mut()
            .ok_or_else(|| format!("{section} is a value, not a section"))?;
    }
    table.insert((*last).to_owned(), value);
    Ok(())
}

fn note(table: &Table, prefix: &str, source: &Source, sources: &mut BTreeMap<String, Source>) {
    for (key, value) in table {
        let path = join(prefix, key);
        match value {
            Value::Table(section) => note(section, &path, source, sources),
            Value::String(_)
            | Value::Integer(_)
            | Value::Float(_)
            | Value::Boolean(_)
            | Value::Datetime(_)
            | Value::Array(_) => {
                sources.insert(path, source.clone());
            }
        }
    }
}

fn join(prefix: &str, key: &str) -> String {
    match prefix {
        "" => key.to_owned(),
        prefix => format!("{prefix}.{key}"),
    }
}

/// Whether `key` is `known` itself or a section around it.
fn covers(key: &str, known: &str) -> bool {
    known
        .strip_prefix(key)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Compares what was given with what the value gives back.
fn find_unknown(
    given: &Table,
    known: &Table,
    defaults: &Table,
    prefix: &str,
    sources: &BTreeMap<String, Source>,
    unknown: &mut Vec<String>,
) {
    let empty = Table::new();
    for (key, value) in given {
        let path = join(prefix, key);
        let Some(counterpart) = known.get(key) else {
            unknown.push(describe(&path, key, known, defaults, sources));
            continue;
        };
        if let (Value::Table(given), Value::Table(known)) = (value, counterpart) {
            let defaults = defaults.get(key).and_then(Value::as_table).unwrap_or(&empty);
            find_unknown(given, known, defaults, &path, sources, unknown);
        }
        if let (Value::Array(given), Value::Array(known)) = (value, counterpart) {
            for (index, pair) in given.iter().zip(known).enumerate() {
                if let (Value::Table(given), Value::Table(known)) = pair {
                    let path = format!("{path}[{index}]");
                    find_unknown(given, known, &empty, &path, sources, unknown);
                }
            }
        }
    }
}

fn describe(
    path: &str,
    key: &str,
    known: &Table,
    defaults: &Table,
    sources: &BTreeMap<String, Source>,
) -> String {
    let mut text = path.to_owned();
    if let Some((_, source)) = sources.iter().find(|(noted, _)| covers(path, noted)) {
        text.push_str(&format!(" ({source})"));
    }
    let nearest = known
        .keys()
        .chain(defaults.keys())
        .map(|candidate| (edits(key, candidate), candidate))
        .min();
    match nearest {
        Some((edits, candidate)) if edits <= HINT_EDITS_MAX.min(key.len() / 2) => {
            text.push_str(&format!(", did you mean {candidate}?"));
        }
        Some(_) | None => {}
    }
    text
}

/// Levenshtein's distance, by rows.
fn edits(left: &str, right: &str) -> usize {
    let right: Vec<_> = right.chars().collect();
    let mut row: Vec<_> = (0..=right.len()).collect();
    for (deleted, from) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = deleted + 1;
        for (index, to) in right.iter().enumerate() {
            let replace = diagonal + usize::from(from != *to);
            diagonal = row[index + 1];
            row[index + 1] = replace.min(row[index] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}
