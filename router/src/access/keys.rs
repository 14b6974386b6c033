//! The keys of a router's callers, as its file lists them: one line of TOML for each key.
//!
//! ```toml
//! # The laptop of the evaluation team.
//! 5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8 = { tenant = "evaluation", expires = 2027-01-31 }
//! 8d969eef6ecad3c29a3a629280e686cf0c3f5d5a86aff3ca12020c923adc6c92 = { role = "admin" }
//! ```
//!
//! Invariant: the file holds no key, only what a key hashes to, and no message shows what stands in place of a hash.

use std::collections::BTreeMap;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use types::{Error, ErrorCode};

use crate::request::TENANT_BYTES_MAX;

/// Most keys of a router: a request is compared with every one of them, which takes some 10 µs for these.
pub const KEYS_MAX: usize = 4096;
const DIGEST_BYTES: usize = 32;

/// What a key hashes to.
pub type KeyDigest = [u8; DIGEST_BYTES];

/// What its holder may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyRole {
    /// Use the model as one tenant.
    #[default]
    Client,
    /// Everything, as any tenant.
    Admin,
}

/// A key that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    digest: KeyDigest,
    /// Whose requests its holder sends; empty for an administrator's.
    pub tenant: String,
    /// What its holder may do.
    pub role: KeyRole,
    /// From when on it counts no more.
    pub expires_unix_s: Option<u64>,
}

/// The keys that count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keys {
    entries: Vec<Entry>,
}

/// A line as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    tenant: Option<String>,
    #[serde(default)]
    role: KeyRole,
    expires: Option<toml::value::Datetime>,
}

/// What a key hashes to.
pub fn digest(key: &str) -> KeyDigest {
    Sha256::digest(key.as_bytes()).into()
}

/// The line of a key in the file. `expires` is an RFC 3339 time, or a date. A string of JSON is one of TOML.
pub fn line(digest: &KeyDigest, tenant: &str, role: KeyRole, expires: Option<&str>) -> String {
    let mut fields = Vec::new();
    if !tenant.is_empty() || role == KeyRole::Client {
        fields.push(format!("tenant = {}", serde_json::Value::from(tenant)));
    }
    if role == KeyRole::Admin {
        fields.push("role = \"admin\"".to_owned());
    }
    fields.extend(expires.map(|expires| format!("expires = {expires}")));
    format!("{} = {{ {} }}", hex(digest), fields.join(", "))
}

fn hex(digest: &KeyDigest) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Keys {
    /// Reads the file's text.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Invalid`] with the line at fault.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let lines: BTreeMap<String, Line> = toml::from_str(text).map_err(|error| {
            let before = error.span().map_or(0, |span| span.start);
            let number = 1 + text.bytes().take(before).filter(|byte| *byte == b'\n').count();
            refuse(number, error.message())
        })?;
        if lines.len() > KEYS_MAX {
            return Err(Error::new(
                ErrorCode::Invalid,
                format!("there are {} keys, but at most {KEYS_MAX} may be", lines.len()),
            ));
        }
        let entries = lines.iter().map(|(name, line)| {
            let number = text.lines().position(|line| {
                line.trim_start()
                    .trim_start_matches(['"', '\''])
                    .starts_with(name.as_str())
            });
            entry(name, line).map_err(|message| refuse(number.map_or(1, |number| number + 1), &message))
        });
        Ok(Self {
            entries: entries.collect::<Result<_, _>>()?,
        })
    }

    /// The entry of a key. Takes the same time whichever it is, and whether it is there.
    pub fn find(&self, key: &str) -> Option<&Entry> {
        let digest = digest(key);
        let mut found = u32::MAX;
        for (index, entry) in (0..).zip(&self.entries) {
            let same: Choice = entry.digest.ct_eq(&digest);
            found.conditional_assign(&index, same);
        }
        self.entries.get(found as usize)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none, so that nobody may call.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

fn refuse(line: usize, message: &str) -> Error {
    Error::new(
        ErrorCode::Invalid,
        format!("line {line}: {}", message.trim().replace('\n', ", ")),
    )
}

fn entry(name: &str, line: &Line) -> Result<Entry, String> {
    let digest = read_hex(name)
        .ok_or("what stands before = is no SHA-256 in 64 hexadecimal digits (perigee key new makes lines)")?;
    let tenant = match (&line.tenant, line.role) {
        (Some(tenant), _) if tenant.len() > TENANT_BYTES_MAX => {
            return Err(format!(
                "the tenant's name has more than {TENANT_BYTES_MAX} bytes"
            ));
        }
        (Some(_), KeyRole::Admin) => {
            return Err("an administrator's key is of no tenant, since it may act for any".to_owned());
        }
        (Some(tenant), KeyRole::Client) => tenant.clone(),
        (None, KeyRole::Admin) => String::new(),
        (None, KeyRole::Client) => return Err("tenant = \"NAME\" is missing".to_owned()),
    };
    let expires_unix_s = match &line.expires {
        None => None,
        Some(expires) => {
            Some(unix_s(expires).ok_or("expires is no date, such as 2027-01-31 or 2027-01-31T12:00:00Z")?)
        }
    };
    Ok(Entry {
        digest,
        tenant,
        role: line.role,
        expires_unix_s,
    })
}

fn read_hex(text: &str) -> Option<KeyDigest> {
    let mut digest = [0; DIGEST_BYTES];
    if text.len() != 2 * DIGEST_BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(digest)
}

/// A date begins at 00:00; a time without a zone is one of UTC.
fn unix_s(time: &toml::value::Datetime) -> Option<u64> {
    let date = time.date?;
    let (mut seconds, offset_minutes) = match (time.time, time.offset) {
        (None, _) => (0, 0),
        (Some(time), offset) => {
            let minutes = match offset {
                Some(toml::value::Offset::Custom { minutes }) => i64::from(minutes),
                Some(toml::value::Offset::Z) | None => 0,
            };
            let of_day = i64::from(time.hour) * 3600 + i64::from(time.minute) * 60;
            (of_day + i64::from(time.second.unwrap_or(0)), minutes)
        }
    };
    seconds += days_since_1970(i64::from(date.year), i64::from(date.month), i64::from(date.day)) * 86_400;
    u64::try_from(seconds - offset_minutes * 60).ok()
}

/// By years that begin in March, so that a leap day is the last of its year.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    // 719468 days lie between 0000-03-01 and 1970-01-01.
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests;
