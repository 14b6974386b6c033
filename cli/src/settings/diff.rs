//! `perigee config diff`: where settings differ from the defaults, or from another file. Pure, but for reading the files.

use std::path::Path;

use node::config::Loaded;
use serde_json::{Value, json};

use super::{Settings, load_for_command, warn_of_unknown};
use crate::arguments::SettingFlags;
use crate::output::{Columns, Format, View};

/// Prints what differs, which is no failure.
pub(super) fn run(flags: &SettingFlags, other: Option<&Path>, format: Format) -> anyhow::Result<()> {
    let ours = load_for_command(flags)?;
    warn_of_unknown(&ours);
    let theirs = match other {
        Some(path) => of_file(path)?,
        None => Settings::default(),
    };
    format.print(&view(&theirs, &ours, other.is_some())?)
}

/// The settings of a file over the defaults, without those of this environment.
fn of_file(path: &Path) -> anyhow::Result<Settings> {
    let name = path.display().to_string();
    let text = node::config::read(path)?;
    let loaded = node::config::layer(&node::config::Layers {
        file: Some((&name, &text)),
        ..node::config::Layers::default()
    })?;
    warn_of_unknown(&loaded);
    Ok(loaded.value)
}

struct Difference {
    key: String,
    theirs: Option<Value>,
    ours: Option<Value>,
}

fn view(theirs: &Settings, ours: &Loaded<Settings>, is_file: bool) -> anyhow::Result<View> {
    let differences = differences(
        &serde_json::to_value(theirs)?,
        &serde_json::to_value(&ours.value)?,
    );
    let source = |key: &str| match ours.sources.get(key) {
        Some(source) => source.to_string(),
        None => "default".to_owned(),
    };
    let documents = differences.iter().map(|difference| {
        json!({
            "key": difference.key,
            "theirs": difference.theirs,
            "ours": difference.ours,
            "source": source(&difference.key),
        })
    });
    let document = json!({ "differences": documents.collect::<Vec<_>>() });
    let view = View::new(document, |wide| {
        let theirs = if is_file { "OTHER" } else { "DEFAULT" };
        let columns = [
            ("SETTING", false),
            (theirs, false),
            ("HERE", false),
            ("FROM", true),
        ];
        let mut table = Columns::new(wide, &columns);
        for difference in &differences {
            table.row([
                difference.key.clone(),
                shown(difference.theirs.as_ref()),
                shown(difference.ours.as_ref()),
                source(&difference.key),
            ]);
        }
        table.text()
    });
    Ok(view.named(differences.iter().map(|difference| &difference.key)))
}

fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "-".to_owned(), Value::to_string)
}

/// By dotted key, in the order of the reference; what only one of both has comes last.
fn differences(theirs: &Value, ours: &Value) -> Vec<Difference> {
    let (mut before, mut now) = (Vec::new(), Vec::new());
    flatten("", theirs, &mut before);
    flatten("", ours, &mut now);
    let of = |all: &[(String, Value)], key: &str| {
        let found = all.iter().find(|(known, _)| known == key);
        found.map(|(_, value)| value.clone())
    };
    let added = before.iter().filter(|(key, _)| of(&now, key).is_none());
    let keys = now.iter().chain(added).map(|(key, _)| key);
    let all = keys.map(|key| Difference {
        key: key.clone(),
        theirs: of(&before, key),
        ours: of(&now, key),
    });
    all.filter(|difference| difference.theirs != difference.ours)
        .collect()
}

/// Settings as dotted keys. Secrets in addresses are left out: settings name files of secrets, and hold none themselves.
fn flatten(prefix: &str, value: &Value, found: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(section) => {
            for (key, value) in section {
                let key = match prefix {
                    "" => key.clone(),
                    prefix => format!("{prefix}.{key}"),
                };
                flatten(&key, value, found);
            }
        }
        Value::String(text) => found.push((prefix.to_owned(), redact(text).into())),
        value => found.push((prefix.to_owned(), value.clone())),
    }
}

/// An address without the user and the password that may stand before its host.
pub(crate) fn redact(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.to_owned();
    };
    let host_end = rest.find('/').unwrap_or(rest.len());
    match rest[..host_end].rfind('@') {
        Some(at) => format!("{scheme}://…{}", &rest[at..]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::golden;

    fn loaded(set: &[(&str, &str)]) -> Loaded<Settings> {
        let flags = set
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        node::config::layer(&node::config::Layers {
            flags: flags.collect(),
            ..node::config::Layers::default()
        })
        .expect("settings")
    }

    #[test]
    fn what_differs_is_shown_by_its_key_with_where_it_comes_from() {
        let ours = loaded(&[
            ("kv.block_tokens", "64"),
            ("registry.url", "etcd://me:secret@10.0.0.1:2379"),
            ("store.tenants.acme.weight", "3"),
        ]);
        let view = view(&Settings::default(), &ours, false).expect("settings");
        golden::check("config-diff", &view);
        assert!(!view.documents()[0].to_string().contains("secret"));
    }

    #[test]
    fn what_is_alike_is_no_difference() {
        let ours = loaded(&[("kv.block_tokens", "64")]);
        let view = view(&ours.value, &ours, true).expect("settings");
        assert_eq!(view.documents()[0], json!({ "differences": [] }));
    }

    #[test]
    fn addresses_lose_what_stands_before_their_host() {
        for (text, redacted) in [
            ("etcd://10.0.0.1:2379", "etcd://10.0.0.1:2379"),
            ("http://me:secret@host:1/a@b", "http://…@host:1/a@b"),
            ("s3://bucket/a@b", "s3://bucket/a@b"),
            ("me@host", "me@host"),
        ] {
            assert_eq!(redact(text), redacted);
        }
    }
}
