//! `perigee key`: keys of a router's callers.
//!
//! A key is shown once, here, and is kept nowhere: the router's file (`router.api_keys_file`) holds what it hashes to.

use std::time::{self, SystemTime};

use clap::{Args, Subcommand};
use node::config::Duration;
use router::access::keys::{self, KeyRole, Keys};
use serde_json::json;
use types::Error;

use crate::output::{Format, View};

/// Nobody guesses one of 2^256, so that a fast hash of it is as good as a slow one.
const SECRET_BYTES: usize = 32;
/// What keys begin with, so that programs which look for secrets know one.
const PREFIX: &str = "perigee-";

/// Longer is for good.
const EXPIRES_IN_MAX: time::Duration = time::Duration::from_secs(100 * 365 * 24 * 3600);

/// `perigee key`.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a key, and the line of router.api_keys_file that lets it in
    New(NewArgs),
}

/// Flags of `key new`.
#[derive(Debug, Clone, Args)]
pub(crate) struct NewArgs {
    /// Tenant whose requests its holder sends.
    #[arg(long, required_unless_present = "admin", conflicts_with = "admin")]
    pub(crate) tenant: Option<String>,
    /// Make an administrator's key, which may do everything as any tenant.
    #[arg(long)]
    pub(crate) admin: bool,
    /// How long it counts, such as 90d; for good unless given.
    #[arg(long, value_name = "TIME")]
    pub(crate) expires_in: Option<Duration>,
}

/// Runs one of the commands.
pub(crate) fn run(command: KeyCommand, format: Format) -> anyhow::Result<()> {
    match command {
        KeyCommand::New(flags) => new(&flags, format),
    }
}

fn new(flags: &NewArgs, format: Format) -> anyhow::Result<()> {
    let mut secret = [0; SECRET_BYTES];
    getrandom::fill(&mut secret)
        .map_err(|error| Error::internal(format!("the system gives no random numbers: {error}")))?;
    format.without_names()?;
    let made = make(&secret, flags, SystemTime::now())?;
    format.print(&view(&made))?;
    if format.streams_text() {
        eprintln!(
            "perigee: the first line is the key, which is shown this once; the second goes into router.api_keys_file"
        );
    }
    Ok(())
}

fn view(made: &Made) -> View {
    let document = json!({ "key": made.key, "line": made.line });
    View::line(document, format!("{}\n{}", made.key, made.line))
}

#[derive(Debug)]
struct Made {
    key: String,
    line: String,
}

fn make(secret: &[u8; SECRET_BYTES], flags: &NewArgs, now: SystemTime) -> Result<Made, Error> {
    let digits: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let key = format!("{PREFIX}{digits}");
    let role = match flags.admin {
        true => KeyRole::Admin,
        false => KeyRole::Client,
    };
    let expires = match flags.expires_in {
        None => None,
        Some(time) => {
            let end = now
                .checked_add(time.get())
                .filter(|_| time.get() <= EXPIRES_IN_MAX);
            let end = end.ok_or_else(|| {
                let message = format!("--expires-in is {time}, but must be at most 100 years");
                Error::invalid("expires_in", message)
            })?;
            Some(humantime::format_rfc3339_seconds(end).to_string())
        }
    };
    let tenant = flags.tenant.as_deref().unwrap_or_default();
    let line = keys::line(&keys::digest(&key), tenant, role, expires.as_deref());
    // What the router would refuse must not be handed out.
    Keys::parse(&line).map_err(|error| Error::invalid("tenant", error.message))?;
    Ok(Made { key, line })
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::output::golden;

    fn flags(tenant: Option<&str>, expires_in: Option<Duration>) -> NewArgs {
        NewArgs {
            tenant: tenant.map(str::to_owned),
            admin: tenant.is_none(),
            expires_in,
        }
    }

    #[test]
    fn a_key_is_let_in_by_its_line_until_it_expires() {
        let day = Duration::from_secs(86_400);
        let made = make(&[7; SECRET_BYTES], &flags(Some("a \"b\""), Some(day)), UNIX_EPOCH).expect("made");
        assert_eq!(made.key, format!("perigee-{}", "07".repeat(32)));
        assert!(
            made.line.ends_with("expires = 1970-01-02T00:00:00Z }"),
            "{}",
            made.line
        );
        assert!(!made.line.contains(&made.key));
        let keys = Keys::parse(&made.line).expect("a line of the file");
        let entry = keys.find(&made.key).expect("known");
        assert_eq!(
            (entry.tenant.as_str(), entry.role, entry.expires_unix_s),
            ("a \"b\"", KeyRole::Client, Some(86_400))
        );
    }

    #[test]
    fn an_administrators_key_is_of_no_tenant() {
        let made = make(&[9; SECRET_BYTES], &flags(None, None), UNIX_EPOCH).expect("made");
        let keys = Keys::parse(&made.line).expect("a line of the file");
        let entry = keys.find(&made.key).expect("known");
        assert_eq!((entry.tenant.as_str(), entry.role), ("", KeyRole::Admin));
        golden::check("key-new", &view(&made));
    }

    #[test]
    fn a_tenant_that_no_request_could_name_gets_no_key() {
        let error = make(
            &[1; SECRET_BYTES],
            &flags(Some(&"a".repeat(257)), None),
            UNIX_EPOCH,
        )
        .expect_err("too long");
        assert!(error.message.contains("256 bytes"), "{error}");
    }
}
