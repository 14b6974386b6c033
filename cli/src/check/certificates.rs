//! What this machine's certificate and those of the nodes mean for connections: what has expired or will, and what does not fit. Pure.

use std::time::{Duration, SystemTime};

use node::tls::{Flaw, TlsError};
use types::Error;

use super::Finding;

pub(super) const GROUP: &str = "certificates";
/// Renewal takes a person who has to be there, where nothing renews by itself.
const SOON: Duration = Duration::from_secs(14 * 24 * 3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Judges this machine's own certificate, by what reading it gave: when it expires, if it does.
pub(super) fn judge_own(file: &str, read: &Result<Option<SystemTime>, TlsError>, now: SystemTime) -> Finding {
    match read {
        Ok(expires) => judge_time("", &format!("the certificate {file}"), *expires, now),
        Err(TlsError::Certificate { flaw, .. }) => {
            let message = format!("the certificate {file} {flaw}");
            Finding::failed(GROUP, "", message, hint(flaw))
        }
        Err(other) => Finding::failed(
            GROUP,
            "",
            other.to_string(),
            "tls.certificate, tls.key and tls.authority name PEM files that this user can read: docs/security.md",
        ),
    }
}

/// Judges what a node shows.
pub(super) fn judge_peer(id: &str, shown: &Result<Option<SystemTime>, Error>, now: SystemTime) -> Finding {
    match shown {
        Ok(expires) => judge_time(id, "its certificate", *expires, now),
        Err(error) => Finding::failed(
            GROUP,
            id,
            error.message.clone(),
            "perigee check --pre says on its machine, with its settings, what is wrong with its files",
        ),
    }
}

fn judge_time(subject: &str, what: &str, expires: Option<SystemTime>, now: SystemTime) -> Finding {
    let Some(expires) = expires else {
        return Finding::passed(GROUP, subject, format!("{what} does not say when it expires"));
    };
    let left = expires.duration_since(now).unwrap_or_default();
    let days = left.as_secs() / DAY.as_secs();
    if left < SOON {
        return Finding::warning(
            GROUP,
            subject,
            format!("{what} expires in {days} days"),
            "renew it, and put it in place of the old one: running processes take it within seconds",
        );
    }
    Finding::passed(GROUP, subject, format!("{what} is good for {days} days"))
}

fn hint(flaw: &Flaw) -> &'static str {
    match flaw {
        Flaw::OtherKey(_) => "tls.certificate and tls.key are made together: replace both at a time",
        Flaw::Expired { .. } => {
            "renew it, and put it in place of the old one: running processes take it within seconds"
        }
        Flaw::NotYetValid => "let something set the clocks of all machines, such as chrony",
        Flaw::UnknownAuthority => {
            "have it signed by the authority of the cluster, or add the one that signed it to tls.authority on all members"
        }
        Flaw::OtherName(_) => "have it issued with tls.name among its alternative names, or correct tls.name",
        Flaw::Purpose => "have it issued for both: a node serves and calls",
        Flaw::Other(_) => "docs/security.md says how to make one",
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::check::Level;

    fn after(days: u32) -> SystemTime {
        UNIX_EPOCH + DAY * days
    }

    #[test]
    fn a_certificate_that_expires_soon_is_a_warning() {
        for (expires, level, says) in [
            (Some(after(115)), Level::Passed, "good for 15 days"),
            (Some(after(114)), Level::Passed, "good for 14 days"),
            (Some(after(113)), Level::Warning, "expires in 13 days"),
            (Some(after(100)), Level::Warning, "expires in 0 days"),
            (None, Level::Passed, "does not say"),
        ] {
            for finding in [
                judge_own("own.pem", &Ok(expires), after(100)),
                judge_peer("decode-0", &Ok(expires), after(100)),
            ] {
                assert_eq!(finding.level, level, "{finding:?}");
                assert!(finding.message.contains(says), "{finding:?}");
                assert_eq!(finding.hint.is_empty(), level == Level::Passed);
            }
        }
    }

    #[test]
    fn each_flaw_is_named_with_its_own_hint() {
        let flaws = [
            Flaw::OtherKey("own.key".to_owned()),
            Flaw::Expired { since_s: 3600 },
            Flaw::NotYetValid,
            Flaw::UnknownAuthority,
            Flaw::OtherName("perigee".to_owned()),
            Flaw::Purpose,
        ];
        let mut hints = std::collections::BTreeSet::new();
        for flaw in flaws {
            let error = TlsError::Certificate {
                file: "own.pem".to_owned(),
                flaw: flaw.clone(),
            };
            let finding = judge_own("own.pem", &Err(error), after(1));
            assert_eq!(finding.level, Level::Failed);
            assert!(finding.message.contains(&flaw.to_string()), "{finding:?}");
            assert!(hints.insert(finding.hint), "{flaw} has another one's hint");
        }
    }

    #[test]
    fn a_node_whose_certificate_is_refused_fails_with_the_reason() {
        let refused = Err(Error::unavailable(
            "the certificate of 10.0.0.1:50051 has expired",
        ));
        let finding = judge_peer("decode-0", &refused, after(1));
        assert_eq!(finding.level, Level::Failed);
        assert!(finding.message.contains("has expired"));
    }
}
