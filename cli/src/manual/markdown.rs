//! The reference of all commands and flags, as Markdown.

use std::fmt::Write;

use clap::{Arg, Command};
use types::ErrorCode;

use crate::check::UNHEALTHY_EXIT;

/// What is not said by one flag or one command alone.
const INTRODUCTION: &str = "\
# Command line

Printed by `perigee man --markdown`. `perigee man` prints a manual page, `perigee man --dir DIR` writes those of all commands, and
`perigee completions SHELL` prints what completes them: `source <(perigee completions bash)`.

## Output

Data go to stdout, everything else to stderr. `-o json` and `-o yaml` give the same document, with more in it than tables have columns;
`-o wide` has more of them; `-o name` lists what other commands take, one per line, and is refused by commands that list nothing with a
name. What comes bit by bit (`chat`, `route explain --live`, `--watch`) is one JSON document per line, or one YAML document after each
`---`. Colours are for terminals, and for nobody where `NO_COLOR` is set. Commands that only look can be watched: `--watch` draws a
terminal again, and ends at Ctrl-C without a failure.

## Contexts

`perigee context set prod --router 10.0.0.1:50051 --api-key-file ~/prod.key --use` names a cluster and makes it the one that commands are
for; `--context NAME` or `PERIGEE_CONTEXT` chooses another one. What the command line says goes over the environment, that over the
context, and that over the default; `[tls]` of the settings goes over a context's certificates. A router that is named by `--router` or
`PERIGEE_ROUTER` without a context is another cluster than the current one, and is shown nothing of its context. Contexts are kept in
`$PERIGEE_CONTEXTS`, or else `$XDG_CONFIG_HOME/perigee/contexts.toml`, or else `~/.config/perigee/contexts.toml`: names of files of keys,
and never a key.

## Flags of every command

";

/// What each exit code means for whoever reads it in a script.
fn meaning(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::Invalid => "the command line, a file or a request is wrong: correct it",
        ErrorCode::NotFound => "what is named does not exist",
        ErrorCode::Unauthenticated => "no key was shown that is known",
        ErrorCode::Denied => "who asks may not do that",
        ErrorCode::Conflict => "it cannot be done in the state that things are in",
        ErrorCode::Overloaded => "there is no capacity now: try again later",
        ErrorCode::Unavailable => "nobody answers, and nothing was done",
        ErrorCode::Timeout => "no answer came in time, so that it may have been done or not",
        ErrorCode::Fenced => "it was overtaken by a newer incarnation of a node",
        ErrorCode::Corrupt => "data are not what their checksum says",
        ErrorCode::Internal => "a defect of Perigee",
    }
}

/// The whole page.
pub(super) fn page(command: &Command) -> String {
    let mut page = String::from(INTRODUCTION);
    rows(&mut page, command.get_arguments().filter(|arg| is_shown(arg)));
    page += "\n## Exit codes\n\nThe code says what kind of failure it was.\n\n\
        | code | kind | meaning |\n|---|---|---|\n| 0 | | it is done |\n";
    row(
        &mut page,
        &format!("| {UNHEALTHY_EXIT} | | `perigee check` found something wrong |"),
    );
    for code in ErrorCode::ALL {
        row(
            &mut page,
            &format!("| {} | `{code}` | {} |", code.exit(), meaning(code)),
        );
    }
    each(command, &mut |path, command| section(&mut page, path, command));
    page
}

/// Calls `what` with every command that does something or has others below it, but not with those that are hidden.
pub(super) fn each(command: &Command, what: &mut impl FnMut(&[&str], &Command)) {
    fn below<'a>(command: &'a Command, path: &mut Vec<&'a str>, what: &mut impl FnMut(&[&str], &Command)) {
        for command in command.get_subcommands() {
            if command.is_hide_set() || command.get_name() == "help" {
                continue;
            }
            path.push(command.get_name());
            what(path, command);
            below(command, path, what);
            path.pop();
        }
    }
    below(command, &mut vec![command.get_name()], what);
}

fn section(page: &mut String, path: &[&str], command: &Command) {
    let name = path.join(" ");
    // Commands of one noun stand below it.
    let depth = "#".repeat(path.len());
    row(page, &format!("\n{depth} {name}\n"));
    let about = command.get_about().map(ToString::to_string);
    row(page, &format!("{}.", escaped(&about.unwrap_or_default())));
    if command.get_arguments().any(is_own) || !command.has_subcommands() {
        let mut command = command.clone();
        let usage = command.render_usage().to_string();
        let usage = usage.trim_start_matches("Usage: ");
        let lines: Vec<&str> = usage.lines().map(str::trim).collect();
        row(page, &format!("\n```text\n{}\n```", lines.join("\n")));
    }
    if command.get_arguments().any(is_own) {
        page.push('\n');
        rows(page, command.get_arguments().filter(|arg| is_own(arg)));
    }
}

fn is_shown(arg: &Arg) -> bool {
    !arg.is_hide_set() && !["help", "version"].contains(&arg.get_id().as_str())
}

/// Global flags are told once.
fn is_own(arg: &Arg) -> bool {
    is_shown(arg) && !arg.is_global_set()
}

fn rows<'a>(page: &mut String, arguments: impl Iterator<Item = &'a Arg>) {
    row(page, "| | |\n|---|---|");
    for arg in arguments {
        row(page, &format!("| `{}` | {} |", signature(arg), description(arg)));
    }
}

/// `-o, --output <OUTPUT>`, or the name of a positional.
fn signature(arg: &Arg) -> String {
    let names = arg.get_value_names().unwrap_or_default();
    let takes = arg.get_action().takes_values();
    let optional = arg.get_num_args().is_some_and(|count| count.min_values() == 0);
    let value: Vec<String> = names
        .iter()
        .map(|name| match optional {
            true => format!("[{name}]"),
            false => format!("<{name}>"),
        })
        .collect();
    let value = value.join(" ");
    if arg.is_positional() {
        return value;
    }
    let short = arg.get_short().map(|short| format!("-{short}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    let flags: Vec<String> = short.into_iter().chain(long).collect();
    let flags = flags.join(", ");
    match takes {
        true => format!("{flags} {value}"),
        false => flags,
    }
}

fn description(arg: &Arg) -> String {
    let mut text = escaped(&arg.get_help().map(ToString::to_string).unwrap_or_default());
    let takes = arg.get_action().takes_values();
    let values = arg.get_possible_values();
    let values: Vec<&clap::builder::PossibleValue> =
        values.iter().filter(|value| !value.is_hide_set()).collect();
    if takes && !values.is_empty() {
        let values = values.iter().map(|value| match value.get_help() {
            Some(help) => {
                let help = escaped(&help.to_string());
                format!("`{}` ({})", value.get_name(), help.trim_end_matches('.'))
            }
            None => format!("`{}`", value.get_name()),
        });
        let values: Vec<String> = values.collect();
        add(&mut text, &format!("One of: {}.", values.join(", ")));
    }
    let defaults: Vec<String> = arg
        .get_default_values()
        .iter()
        .map(|value| format!("`{}`", value.to_string_lossy()))
        .filter(|value| value != "``")
        .collect();
    if takes && !defaults.is_empty() {
        add(&mut text, &format!("Default: {}.", defaults.join(", ")));
    }
    if let Some(variable) = arg.get_env() {
        add(
            &mut text,
            &format!("Environment: `{}`.", variable.to_string_lossy()),
        );
    }
    text
}

fn add(text: &mut String, sentence: &str) {
    if !text.is_empty() && !text.ends_with(['.', '…', ']']) {
        text.push('.');
    }
    if !text.is_empty() {
        text.push(' ');
    }
    text.push_str(sentence);
}

/// Text that means nothing to Markdown, and stays in its cell.
fn escaped(text: &str) -> String {
    let text = text.replace('|', "\\|").replace('<', "&lt;");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn row(page: &mut String, line: &str) {
    writeln!(page, "{line}").expect("a string takes everything");
}
