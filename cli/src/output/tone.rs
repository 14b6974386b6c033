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

/// Whether stdout shows colours and nobody asked for none.
pub(super) fn on_stdout() -> bool {
    let set = |name: &str| std::env::var(name).ok();
    let is_terminal = std::io::stdout().is_terminal();
    are_wanted(set("NO_COLOR").as_deref(), set("TERM").as_deref(), is_terminal)
}

/// As <https://no-color.org> has it: a variable that is empty says nothing.
fn are_wanted(no_color: Option<&str>, term: Option<&str>, is_terminal: bool) -> bool {
    no_color.unwrap_or_default().is_empty() && term != Some("dumb") && is_terminal
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_whose_users_want_them() {
        assert!(are_wanted(None, Some("xterm"), true));
        assert!(are_wanted(Some(""), None, true));
        assert!(!are_wanted(Some("1"), Some("xterm"), true));
        assert!(!are_wanted(None, Some("dumb"), true));
        assert!(!are_wanted(None, Some("xterm"), false));
    }
}
