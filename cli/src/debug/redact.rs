//! What is taken out of a bundle: keys, passwords in addresses, and, unless they are to be kept, the names of tenants.
//!
//! A name is replaced wherever it stands as a word of its own, since messages may hold it, by the same hash all over the bundle. The
//! hash is salted, so that nobody finds a name by trying, nor the same tenant in two bundles.

use std::collections::BTreeSet;

use node::ApiKey;
use serde_json::Value;
use sha2::{Digest, Sha256};
use types::Error;

use crate::settings;

/// In place of a secret.
const HIDDEN: &str = "(hidden)";
/// What keys of `perigee key new` begin with, and how many digits follow.
const KEY_PREFIX: &str = "perigee-";
const KEY_DIGITS: usize = 64;
/// Digits that tell the tenants of a cluster apart.
const HASH_BYTES: usize = 6;

/// Takes out of texts and documents what is for nobody's eyes.
#[derive(Debug)]
pub(super) struct Redactor {
    salt: [u8; 16],
    key: Option<String>,
    /// Names, longest first: one may be a part of another.
    tenants: Vec<(String, String)>,
}

impl Redactor {
    /// Hides this key, and whatever looks like one.
    pub(super) fn new(key: Option<&ApiKey>) -> Result<Self, Error> {
        let mut salt = [0; 16];
        getrandom::fill(&mut salt)
            .map_err(|error| Error::internal(format!("the system gives no random numbers: {error}")))?;
        Ok(Self {
            salt,
            key: key.map(|key| key.secret().to_owned()),
            tenants: Vec::new(),
        })
    }

    /// Hides the tenants that are named in the documents, too.
    pub(super) fn hide_tenants<'a>(&mut self, documents: impl Iterator<Item = &'a Value>) {
        let mut names = BTreeSet::new();
        documents.for_each(|document| find_tenants(document, &mut names));
        let mut names: Vec<String> = names.into_iter().collect();
        names.sort_by_key(|name| std::cmp::Reverse(name.len()));
        let hashed = names.into_iter().map(|name| {
            let hash = self.hash(&name);
            (name, hash)
        });
        self.tenants = hashed.collect();
    }

    fn hash(&self, name: &str) -> String {
        let digest = Sha256::new()
            .chain_update(self.salt)
            .chain_update(name)
            .finalize();
        let digits = digest.iter().take(HASH_BYTES).map(|byte| format!("{byte:02x}"));
        format!("tenant-{}", digits.collect::<String>())
    }

    /// The text without what is hidden.
    pub(super) fn text(&self, text: &str) -> String {
        let mut text = match &self.key {
            Some(key) => text.replace(key, HIDDEN),
            None => text.to_owned(),
        };
        text = without_keys(&text);
        for (name, hash) in &self.tenants {
            text = replace_word(&text, name, hash);
        }
        text
    }

    /// Replaces what is hidden in every text of the document, names of fields included.
    pub(super) fn value(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(&settings::redact(text)),
            Value::Array(items) => items.iter_mut().for_each(|item| self.value(item)),
            Value::Object(object) => {
                // The root of a tenant's blocks is a hash of its name, without a salt.
                if !self.tenants.is_empty() && object.contains_key("name") && object.contains_key("root") {
                    object.insert("root".to_owned(), Value::Null);
                }
                let fields = std::mem::take(object).into_iter().map(|(key, mut value)| {
                    let key = match value {
                        // Names of sections, as those of `[store.tenants.NAME]`, hold one; those of values are ours.
                        Value::Object(_) => self.text(&key),
                        _ => key,
                    };
                    self.value(&mut value);
                    (key, value)
                });
                *object = fields.collect();
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

/// Names of tenants: values of `tenant`, and what is named below `tenants`.
fn find_tenants(value: &Value, names: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| find_tenants(item, names)),
        Value::Object(object) => {
            let mut add = |name: &Value| names.extend(name.as_str().map(str::to_owned));
            if let Some(name) = object.get("tenant") {
                add(name);
            }
            match object.get("tenants") {
                Some(Value::Array(tenants)) => tenants.iter().for_each(|tenant| add(&tenant["name"])),
                Some(Value::Object(tenants)) => names.extend(tenants.keys().cloned()),
                _ => {}
            }
            object.values().for_each(|value| find_tenants(value, names));
            names.remove("");
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Whatever looks like a key of `perigee key new`, also one that nobody told us.
fn without_keys(text: &str) -> String {
    let mut pieces = text.split(KEY_PREFIX);
    let mut clean = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let digits = piece.bytes().take_while(u8::is_ascii_hexdigit).count();
        match digits >= KEY_DIGITS {
            true => clean += &format!("{HIDDEN}{}", &piece[digits..]),
            false => clean += &format!("{KEY_PREFIX}{piece}"),
        }
    }
    clean
}

/// Replaces `word` where it is no part of a longer one.
fn replace_word(text: &str, word: &str, with: &str) -> String {
    let is_inner =
        |letter: Option<char>| letter.is_some_and(|letter| letter.is_alphanumeric() || letter == '_');
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    let mut before = None;
    while let Some(at) = rest.find(word) {
        let (head, tail) = (&rest[..at], &rest[at + word.len()..]);
        replaced += head;
        let alone = !is_inner(head.chars().next_back().or(before)) && !is_inner(tail.chars().next());
        replaced += if alone { with } else { word };
        before = word.chars().next_back();
        rest = tail;
    }
    replaced + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn redactor(document: &Value) -> Redactor {
        let key = ApiKey::new("sk-in-the-clear").expect("a key");
        let mut redactor = Redactor::new(Some(&key)).expect("random numbers");
        redactor.hide_tenants([document].into_iter());
        redactor
    }

    #[test]
    fn keys_are_hidden_wherever_they_stand() {
        let redactor = redactor(&json!({}));
        let other = format!("perigee-{}", "0a".repeat(32));
        let text = format!("sk-in-the-clear, {other}; perigee-debug");
        assert_eq!(redactor.text(&text), "(hidden), (hidden); perigee-debug");
        let mut document = json!({ "a": [{ "b": other }], "url": "http://me:secret@host/" });
        redactor.value(&mut document);
        assert_eq!(
            document,
            json!({ "a": [{ "b": "(hidden)" }], "url": "http://…@host/" })
        );
    }

    #[test]
    fn a_tenant_has_one_hash_wherever_it_is_named() {
        let mut document = json!({
            "requests": [{ "tenant": "acme \"x\"", "error": "acme \"x\" has too much, acmes not" }, { "tenant": "" }],
            "tenants": [{ "name": "acme", "root": "00", "cached_blocks": 3 }],
            "store": { "tenants": { "acme": { "weight": 2 } } },
        });
        let redactor = redactor(&document);
        redactor.value(&mut document);
        let (plain, quoted) = (redactor.hash("acme"), redactor.hash("acme \"x\""));
        let expected = json!({
            "requests": [{ "tenant": quoted, "error": format!("{quoted} has too much, acmes not") }, { "tenant": "" }],
            "tenants": [{ "name": plain, "root": null, "cached_blocks": 3 }],
            "store": { "tenants": { &plain: { "weight": 2 } } },
        });
        assert_eq!(document, expected);
        assert_ne!(
            plain,
            Redactor::new(None).expect("random numbers").hash("acme"),
            "a salt of its own"
        );
    }

    #[test]
    fn a_word_is_replaced_alone_and_not_as_a_part() {
        for (text, replaced) in [
            ("a", "X"),
            ("aa a_a a-a", "aa a_a X-X"),
            ("a,b a.", "X,b X."),
            ("", ""),
            ("äa aä", "äa aä"),
        ] {
            assert_eq!(replace_word(text, "a", "X"), replaced, "{text}");
        }
    }
}
