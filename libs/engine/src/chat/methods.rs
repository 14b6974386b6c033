//! The methods of Python's `str`, `dict` and `list` that chat templates call.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{ValueKind, from_args},
};

/// Runs `value.method(arguments)` for a method that the template engine itself does not have.
pub(super) fn call(
    _: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => of_string(text, method, arguments),
        (ValueKind::Map, _) => of_map(value, method, arguments),
        (ValueKind::Seq, _) => of_list(value, method, arguments),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn of_string(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    match method {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(arguments)?;
            let strips = |character: char| match characters {
                Some(characters) => characters.contains(character),
                None => character.is_whitespace(),
            };
            Ok(Value::from(match method {
                "strip" => text.trim_matches(strips),
                "lstrip" => text.trim_start_matches(strips),
                _ => text.trim_end_matches(strips),
            }))
        }
        "startswith" | "endswith" => {
            let (affix,): (&Value,) = from_args(arguments)?;
            let affixes: Vec<Value> = if affix.as_str().is_some() {
                vec![affix.clone()]
            } else {
                affix.try_iter()?.collect()
            };
            for affix in &affixes {
                let affix = affix
                    .as_str()
                    .ok_or_else(|| invalid(format!("{method} takes strings, not {affix}")))?;
                let found = if method == "startswith" {
                    text.starts_with(affix)
                } else {
                    text.ends_with(affix)
                };
                if found {
                    return Ok(true.into());
                }
            }
            Ok(false.into())
        }
        "split" | "rsplit" => {
            let (separator, limit): (Option<&str>, Option<i64>) = from_args(arguments)?;
            split(text, separator, limit, method == "rsplit").map(Value::from)
        }
        "splitlines" => {
            let () = from_args(arguments)?;
            Ok(text.lines().map(Value::from).collect())
        }
        "replace" => {
            let (old, new, limit): (&str, &str, Option<i64>) = from_args(arguments)?;
            Ok(Value::from(
                match limit.and_then(|limit| usize::try_from(limit).ok()) {
                    Some(limit) => text.replacen(old, new, limit),
                    None => text.replace(old, new),
                },
            ))
        }
        "find" | "rfind" => {
            let (part,): (&str,) = from_args(arguments)?;
            let at = if method == "find" {
                text.find(part)
            } else {
                text.rfind(part)
            };
            Ok(at.map_or(-1, |at| text[..at].chars().count() as i64).into())
        }
        "count" => {
            let (part,): (&str,) = from_args(arguments)?;
            Ok(Value::from(text.matches(part).count()))
        }
        "join" => {
            let (parts,): (&Value,) = from_args(arguments)?;
            let parts: Vec<String> = parts.try_iter()?.map(|part| part.to_string()).collect();
            Ok(Value::from(parts.join(text)))
        }
        _ => of_string_without_arguments(text, method, arguments),
    }
}

fn of_string_without_arguments(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let all = |wanted: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(wanted));
    let result = match method {
        "upper" => text.to_uppercase().into(),
        "lower" => text.to_lowercase().into(),
        "capitalize" => capitalise(text).into(),
        "title" => text
            .split_inclusive(|c: char| !c.is_alphabetic())
            .map(capitalise)
            .collect::<String>()
            .into(),
        "isdigit" | "isnumeric" => all(char::is_numeric),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isspace" => all(char::is_whitespace),
        "isupper" => {
            Value::from(text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase))
        }
        "islower" => {
            Value::from(text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase))
        }
        _ => return Err(ErrorKind::UnknownMethod.into()),
    };
    let () = from_args(arguments)?;
    Ok(result)
}

fn of_map(map: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    match method {
        "get" => {
            let (key, default): (&Value, Option<Value>) = from_args(arguments)?;
            let found = map.get_item(key)?;
            Ok(if found.is_undefined() {
                default.unwrap_or_else(|| ().into())
            } else {
                found
            })
        }
        "keys" => {
            let () = from_args(arguments)?;
            Ok(map.try_iter()?.collect())
        }
        "values" => {
            let () = from_args(arguments)?;
            map.try_iter()?.map(|key| map.get_item(&key)).collect()
        }
        "items" => {
            let () = from_args(arguments)?;
            map.try_iter()?
                .map(|key| Ok(Value::from(vec![key.clone(), map.get_item(&key)?])))
                .collect()
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn of_list(list: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    match method {
        "count" => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            Ok(Value::from(
                list.try_iter()?.filter(|item| item == wanted).count(),
            ))
        }
        "index" => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            let at = list.try_iter()?.position(|item| item == *wanted);
            at.map(Value::from)
                .ok_or_else(|| invalid(format!("{wanted} is not in the list")))
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// Python's `split` and `rsplit`. Without a separator, runs of whitespace separate and those at the ends are dropped.
fn split(
    text: &str,
    separator: Option<&str>,
    limit: Option<i64>,
    from_right: bool,
) -> Result<Vec<String>, Error> {
    let limit = limit
        .and_then(|limit| usize::try_from(limit).ok())
        .unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = Vec::new();
    let mut rest = text;
    if separator == Some("") {
        return Err(invalid("split takes no empty separator".into()));
    }
    loop {
        if separator.is_none() {
            rest = if from_right {
                rest.trim_end()
            } else {
                rest.trim_start()
            };
        }
        let cut = match (separator, from_right) {
            _ if parts.len() == limit => None,
            (Some(separator), false) => rest.split_once(separator),
            (Some(separator), true) => rest.rsplit_once(separator).map(|(rest, part)| (part, rest)),
            (None, false) => rest.split_once(char::is_whitespace),
            (None, true) => rest
                .rsplit_once(char::is_whitespace)
                .map(|(rest, part)| (part, rest)),
        };
        let Some((part, after)) = cut else { break };
        parts.push(part);
        rest = after;
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest);
    }
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(str::to_owned).collect())
}

fn capitalise(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(characters.as_str().to_lowercase().chars()).collect()
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
