//! The parts of a bundle, and the file that they become.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

use flate2::Compression;
use flate2::write::GzEncoder;
use indicatif::ProgressBar;
use serde_json::Value;
use types::Error;

use super::redact::Redactor;
use crate::cache::refused;
use crate::output::View;

/// The folder that the file unpacks to.
const FOLDER: &str = "perigee-debug";
/// What went wrong, a line each.
const ERRORS: &str = "errors.txt";

/// What a part says.
#[derive(Debug)]
pub(super) enum Content {
    /// Documents, of which there is one but for requests that were placed more than once.
    Json(Vec<Value>),
    Text(String),
}

impl From<View> for Content {
    fn from(view: View) -> Self {
        Self::Json(view.documents().to_vec())
    }
}

/// Parts by the names of their files.
#[derive(Debug)]
pub(super) struct Bundle {
    parts: Vec<(String, Content)>,
    errors: Vec<String>,
    bar: ProgressBar,
}

impl Bundle {
    pub(super) fn new(bar: ProgressBar) -> Self {
        Self {
            parts: Vec::new(),
            errors: Vec::new(),
            bar,
        }
    }

    /// Says that there are more parts to come than it was known.
    pub(super) fn expect(&self, parts: u64) {
        self.bar.inc_length(parts);
    }

    /// Takes a part.
    pub(super) fn add(&mut self, name: &str, content: Content) {
        self.bar.inc(1);
        self.parts.push((name.to_owned(), content));
    }

    /// Notes why a part is missing, or less than it should be.
    pub(super) fn fail(&mut self, name: &str, error: &anyhow::Error) {
        self.bar.inc(1);
        self.errors.push(format!("{name}: {error:#}"));
    }

    /// Ends the progress.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// Its documents.
    pub(super) fn documents(&self) -> impl Iterator<Item = &Value> {
        self.parts.iter().flat_map(|(_, content)| match content {
            Content::Json(documents) => documents.as_slice(),
            Content::Text(_) => &[],
        })
    }

    /// Parts that are there.
    pub(super) fn len(&self) -> usize {
        self.parts.len()
    }

    /// What went wrong.
    pub(super) fn failed(&self) -> usize {
        self.errors.len()
    }

    /// Takes out what is for nobody's eyes.
    pub(super) fn redact(&mut self, redactor: &Redactor) {
        for (_, content) in &mut self.parts {
            match content {
                Content::Json(documents) => {
                    documents.iter_mut().for_each(|document| redactor.value(document))
                }
                Content::Text(text) => *text = redactor.text(text),
            }
        }
        for error in &mut self.errors {
            *error = redactor.text(error);
        }
    }

    /// Writes the file.
    pub(super) fn write(self, file: File, now: SystemTime) -> anyhow::Result<()> {
        let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
        let seconds = node::clock::unix_s(now);
        let mut add = |name: &str, text: &str| {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(seconds);
            archive.append_data(&mut header, format!("{FOLDER}/{name}"), text.as_bytes())
        };
        for (name, content) in &self.parts {
            match content {
                Content::Json(documents) => {
                    let pages: Result<Vec<String>, _> =
                        documents.iter().map(serde_json::to_string_pretty).collect();
                    add(name, &(pages?.join("\n") + "\n"))?;
                }
                Content::Text(text) => add(name, text)?,
            }
        }
        if !self.errors.is_empty() {
            add(ERRORS, &(self.errors.join("\n") + "\n"))?;
        }
        let mut file = archive.into_inner()?.finish()?;
        file.flush()?;
        Ok(file.sync_all()?)
    }
}

/// The file, which only its owner may read until it is passed on.
pub(super) fn create(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|error| refused(path, &error))
}
