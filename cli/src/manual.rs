//! `perigee completions` and `perigee man`: what the command line says of itself, for shells, `man` and `docs/cli.md`.

mod markdown;

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;

use crate::arguments::Arguments;

/// Flags of `completions`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell; source what is printed, or put it where the shell looks for completions.
    shell: Shell,
}

/// Flags of `man`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ManArgs {
    /// Write the pages of all commands into this folder instead, one file each.
    #[arg(long, value_name = "DIR", conflicts_with = "markdown")]
    dir: Option<PathBuf>,
    /// Print docs/cli.md instead.
    #[arg(long)]
    markdown: bool,
}

/// Prints a shell's completions.
pub(crate) fn completions(flags: &CompletionsArgs) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(flags.shell, &mut command(), "perigee", &mut text);
    Ok(std::io::stdout().lock().write_all(&text)?)
}

/// Prints or writes the manual.
pub(crate) fn run(flags: &ManArgs) -> anyhow::Result<()> {
    if flags.markdown {
        print!("{}", markdown::page(&command()));
        return Ok(());
    }
    if let Some(folder) = &flags.dir {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        return clap_mangen::generate_to(command(), folder)
            .with_context(|| format!("write pages into {}", folder.display()));
    }
    Ok(clap_mangen::Man::new(command()).render(&mut std::io::stdout().lock())?)
}

/// The whole command line, with its global flags where they count.
fn command() -> Command {
    let mut command = Arguments::command();
    command.build();
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_in_docs_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md");
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            page == markdown::page(&command()),
            "run: target/release/perigee man --markdown > docs/cli.md"
        );
    }

    #[test]
    fn every_command_has_a_page_and_says_what_it_does() {
        let folder = tempfile::tempdir().expect("a folder");
        let flags = ManArgs {
            dir: Some(folder.path().join("man1")),
            markdown: false,
        };
        run(&flags).expect("written");
        let written = |name: &str| folder.path().join("man1").join(name).is_file();
        for name in ["perigee.1", "perigee-node-list.1", "perigee-config-diff.1"] {
            assert!(written(name), "{name}");
        }
        let mut seen = 0;
        markdown::each(&command(), &mut |path, command| {
            seen += 1;
            assert!(
                command.get_about().is_some(),
                "{path:?} does not say what it does"
            );
        });
        assert!(seen > 40, "{seen}");
    }

    #[test]
    fn each_shell_gets_completions_of_the_commands() {
        for shell in [
            Shell::Bash,
            Shell::Zsh,
            Shell::Fish,
            Shell::PowerShell,
            Shell::Elvish,
        ] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command(), "perigee", &mut text);
            let text = String::from_utf8(text).expect("text");
            assert!(text.contains("log-level"), "{shell}");
        }
    }
}
