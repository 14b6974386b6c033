//! How results reach the user: data on stdout in one of the forms of `-o`, everything else on stderr.
//!
//! A command makes a [`View`] of what it was told, which is pure, and hands it to [`Format::print`] or [`Watch::show`]. No command
//! looks at the format itself, but for those that stream text while it comes ([`Format::streams_text`]).

#[cfg(test)]
pub(crate) mod golden;
mod tone;
mod watch;

use std::io::Write;

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use types::Error;

pub(crate) use tone::{Tone, paint};
pub(crate) use watch::Watch;

/// `-o`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    #[value(alias = "table")]
    Text,
    /// For people with wide terminals: tables have all their columns.
    Wide,
    /// For programs: one JSON document, or one per line where results stream.
    Json,
    /// The document of `json` as YAML; where results stream, each one begins with `---`.
    Yaml,
    /// For scripts: the name of each thing that is listed, as other commands take it, one per line.
    Name,
}

/// A result in each of the forms in which it may be printed.
#[derive(Debug)]
pub(crate) struct View {
    /// One, unless several results are printed together.
    documents: Vec<Value>,
    text: String,
    wide: String,
    /// `None` where the result has nothing with a name.
    names: Option<Vec<String>>,
}

impl View {
    /// A result with this document for programs, and what `text` gives for people; its argument says whether all columns are wanted.
    pub(crate) fn new(document: Value, text: impl Fn(bool) -> String) -> Self {
        Self {
            documents: vec![document],
            text: text(false),
            wide: text(true),
            names: None,
        }
    }

    /// What a command did, in one line.
    pub(crate) fn line(document: Value, line: impl Into<String>) -> Self {
        let line = line.into() + "\n";
        Self::new(document, |_| line.clone())
    }

    /// What is named in the result.
    #[must_use]
    pub(crate) fn named<T: ToString>(self, names: impl IntoIterator<Item = T>) -> Self {
        let names = names.into_iter().map(|name| name.to_string());
        Self {
            names: Some(names.collect()),
            ..self
        }
    }

    /// Several results below each other, each with a document of its own.
    pub(crate) fn several(views: Vec<Self>) -> Self {
        let join = |of: fn(&Self) -> &str| views.iter().map(of).collect::<Vec<_>>().join("\n");
        let (text, wide) = (join(|view| &view.text), join(|view| &view.wide));
        let names = views.iter().map(|view| view.names.clone());
        let names: Option<Vec<Vec<String>>> = names.collect();
        Self {
            text,
            wide,
            names: names.map(|names| names.concat()),
            documents: views.into_iter().flat_map(|view| view.documents).collect(),
        }
    }

    /// The documents for programs.
    pub(crate) fn documents(&self) -> &[Value] {
        &self.documents
    }

    /// What is printed, without colours unless `colours` says so.
    ///
    /// # Errors
    ///
    /// The result has no names, and those are wanted.
    fn render(&self, format: Format, colours: bool) -> anyhow::Result<String> {
        Ok(match format {
            Format::Text => tone::resolve(&self.text, colours),
            Format::Wide => tone::resolve(&self.wide, colours),
            Format::Json => self
                .each(|document| Ok(serde_json::to_string(document)? + "\n"))?
                .concat(),
            Format::Yaml => self
                .each(|document| Ok(yaml_serde::to_string(document)?))?
                .join("---\n"),
            Format::Name => {
                let names = self.names.as_ref().ok_or_else(nameless)?;
                names.iter().flat_map(|name| [name, "\n"]).collect()
            }
        })
    }

    fn each(&self, write: impl Fn(&Value) -> anyhow::Result<String>) -> anyhow::Result<Vec<String>> {
        self.documents.iter().map(write).collect()
    }
}

fn nameless() -> Error {
    Error::invalid(
        "output",
        "-o name is for commands that list what has a name, and this one does not",
    )
}

impl Format {
    /// Prints a result.
    pub(crate) fn print(self, view: &View) -> anyhow::Result<()> {
        write(&view.render(self, tone::on_stdout())?)
    }

    /// Prints one of several results, which programs can tell apart.
    pub(crate) fn print_next(self, view: &View) -> anyhow::Result<()> {
        write(&self.next(view, tone::on_stdout())?)
    }

    /// Refuses what a command without names could only refuse after it has done something.
    pub(crate) fn without_names(self) -> Result<(), Error> {
        match self {
            Self::Name => Err(nameless()),
            Self::Text | Self::Wide | Self::Json | Self::Yaml => Ok(()),
        }
    }

    /// Whether text is printed while it comes, and not as part of a document at its end.
    pub(crate) fn streams_text(self) -> bool {
        match self {
            Self::Text | Self::Wide => true,
            Self::Json | Self::Yaml | Self::Name => false,
        }
    }

    fn next(self, view: &View, colours: bool) -> anyhow::Result<String> {
        let text = view.render(self, colours)?;
        Ok(match self {
            Self::Yaml => format!("---\n{text}"),
            Self::Text | Self::Wide | Self::Json | Self::Name => text,
        })
    }
}

fn write(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// A table without frames, as wide as its content.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    table
}

/// A table, some columns of which are for wide terminals only.
pub(crate) struct Columns {
    shown: Vec<bool>,
    table: Table,
}

impl Columns {
    /// Columns by name; those that come with `true` are left out unless `wide`.
    pub(crate) fn new(wide: bool, columns: &[(&str, bool)]) -> Self {
        let shown: Vec<bool> = columns.iter().map(|(_, wide_only)| wide || !wide_only).collect();
        let header = columns.iter().zip(&shown).filter(|(_, shown)| **shown);
        let header: Vec<&str> = header.map(|((name, _), _)| *name).collect();
        Self {
            table: table(&header),
            shown,
        }
    }

    /// Adds a row with a cell for each column, also those that are not shown.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter().zip(&self.shown);
        let cells = cells.filter(|(_, shown)| **shown).map(|(cell, _)| cell);
        self.table.add_row(cells.collect::<Vec<_>>());
    }

    /// The table as it is printed.
    pub(crate) fn text(&self) -> String {
        table_text(&self.table)
    }
}

/// A table as it is printed.
pub(crate) fn table_text(table: &Table) -> String {
    let lines = table.lines().map(|line| format!("{}\n", line.trim_end()));
    lines.collect()
}

/// `text`, or a dash for nothing.
pub(crate) fn or_dash(text: &str) -> String {
    match text {
        "" => "-".to_owned(),
        text => text.to_owned(),
    }
}

/// A bar over bytes on stderr, hidden where stderr is no terminal.
pub(crate) fn byte_bar(what: &str, total: Option<u64>) -> ProgressBar {
    let bar = match total {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::new_spinner(),
    };
    let template = match total {
        Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        None => "{msg} {spinner} {bytes} {bytes_per_sec}",
    };
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar
}

/// A bar over steps on stderr, hidden where stderr is no terminal.
pub(crate) fn step_bar(what: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar
}

/// `1.5 MiB`.
pub(crate) fn bytes(value: u64) -> String {
    let mut value = value as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" {
                format!("{value} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests;
