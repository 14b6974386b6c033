//! Files that are read again when they change: certificates that Kubernetes rotates, keys that an operator adds.
//!
//! They are looked at every [`RELOAD_INTERVAL`] and compared by what they hold: a secret that is mounted changes by a link being
//! turned, so names, sizes and times of the files themselves tell nothing that could be relied on.
//!
//! Invariant: whoever follows files has seen a state that once held, never an unread or half read one. A state that cannot be
//! read, or that the follower refuses, is said once in the log, and the one before it stays in force.

use std::convert::Infallible;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use types::{Error, ErrorCode};

use crate::task;

/// How often files are looked at: a revoked key is of use for no longer, and some small files cost nothing.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(2);
/// A certificate, key or list of keys beyond this is some other file.
pub const FILE_BYTES_MAX: u64 = 4 << 20;

/// What some files hold, in the order of their paths.
pub type Contents = Vec<Vec<u8>>;

/// Reads the files. Blocks.
///
/// # Errors
///
/// The first file that is not there, cannot be read, or is too large, by name.
pub fn read(paths: &[PathBuf]) -> Result<Contents, Error> {
    paths.iter().map(read_one).collect()
}

fn read_one(path: &PathBuf) -> Result<Vec<u8>, Error> {
    let name = path.display();
    let refuse = |error: std::io::Error| {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => ErrorCode::NotFound,
            _ => ErrorCode::Invalid,
        };
        Error::new(code, format!("cannot read {name}: {error}"))
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(refuse)?;
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(refuse)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let message = format!("{name} has more than {FILE_BYTES_MAX} bytes, so it is not what it should be");
        return Err(Error::new(ErrorCode::Invalid, message));
    }
    Ok(bytes)
}

/// Calls `apply` with what the files hold whenever that is no longer `known`, until `until`. `what` names it in the log.
///
/// # Errors
///
/// None: the result is that of a task.
pub async fn follow(
    what: &'static str,
    paths: Vec<PathBuf>,
    mut known: Contents,
    until: CancellationToken,
    mut apply: impl FnMut(&Contents) -> Result<(), Error>,
) -> Result<(), Infallible> {
    let mut complaint = None;
    let pause = || tokio::time::sleep(RELOAD_INTERVAL);
    while until.run_until_cancelled(pause()).await.is_some() {
        let asked = paths.clone();
        let read = task::blocking("reload", move || read(&asked)).await.flatten();
        let changed = match read {
            Ok(contents) if contents == known => Ok(None),
            // Files that do not fit together yet are written one after the other: the next look may find them whole.
            Ok(contents) => apply(&contents).map(|()| Some(contents)),
            Err(error) => Err(error),
        };
        match changed {
            Ok(None) => complaint = None,
            Ok(Some(contents)) => {
                tracing::info!(what, "read again");
                (known, complaint) = (contents, None);
            }
            Err(error) if complaint.as_ref() == Some(&error) => {}
            Err(error) => {
                tracing::error!(what, %error, "cannot be read again, so what was read last stays in force");
                complaint = Some(error);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
