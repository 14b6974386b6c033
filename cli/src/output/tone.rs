//! Colours of states, for terminals alone.
//!
//! A painted text carries marks that no terminal shows and that have no width, so that tables are laid out as without them. What is
//! printed has escape sequences in their place on a terminal, and nothing elsewhere.

use std::io::IsTerminal;

/// What a state means for whoever looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As it should be.
    Good,
    /// On its way, or worth a look.
    Warning,
    /// Broken.
    Bad,
}

/// Marks (invisible operators of mathematics), with what they stand for: green, yellow, red, and the end of each.
const MARKS: [(char, &str); 4] = [
    ('\u{2061}', "\x1b[32m"),
    ('\u{2062}', "\x1b[33m"),
    ('\u{2063}', "\x1b[31m"),
    ('\u{2064}', "\x1b[0m"),
];

/// `text` in the colour of `tone`, where there are colours.
pub(crate) fn paint(tone: Tone, text: &str) -> String {
    let (begin, _) = MARKS[match tone {
        Tone::Good => 0,
        Tone::Warning => 1,
        Tone::Bad => 2,
    }];
    let (end, _) = MARKS[3];
    format!("{begin}{text}{end}")
}

/// Whether stdout shows colours and nobody asked for none (<https://no-color.org>).
pub(super) fn on_stdout() -> bool {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let dumb = set("TERM").is_some_and(|terminal| terminal == "dumb");
    set("NO_COLOR").is_none() && !dumb && std::io::stdout().is_terminal()
}

/// Puts what they stand for in place of the marks, or nothing.
pub(super) fn resolve(text: &str, colours: bool) -> String {
    let mut resolved = String::with_capacity(text.len());
    for letter in text.chars() {
        match MARKS.iter().find(|(mark, _)| *mark == letter) {
            Some((_, sequence)) if colours => resolved.push_str(sequence),
            Some(_) => {}
            None => resolved.push(letter),
        }
    }
    resolved
}
