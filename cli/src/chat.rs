//! `perigee chat`: a conversation in the terminal.

use std::io::Write;

use proto::v1;
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};

use crate::arguments::ChatArgs;
use crate::generate::{self, Generated};
use crate::output::{Format, View};
use crate::reach::Router;

/// Reads messages and prints answers until the input ends.
pub(crate) async fn run(arguments: ChatArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    format.without_names()?;
    let mut editor: Editor<(), MemHistory> = Editor::with_history(Config::default(), MemHistory::new())?;
    let mut messages: Vec<v1::ChatMessage> = Vec::new();
    messages.extend(arguments.system.iter().map(|system| message("system", system)));
    eprintln!("Ctrl-D ends the conversation, /new starts another one.");
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match line.trim() {
            "" => continue,
            "/new" => {
                messages.retain(|message| message.role == "system");
                continue;
            }
            text => {
                editor.add_history_entry(text)?;
                messages.push(message("user", text));
            }
        }
        match answer(&arguments, router, format, &messages).await {
            Ok(generated) => messages.push(message("assistant", &generated.text)),
            // A conversation survives a failed turn: the user may try again.
            Err(error) => {
                eprintln!("perigee: {error:#}");
                messages.pop();
            }
        }
    }
}

async fn answer(
    arguments: &ChatArgs,
    router: &Router,
    format: Format,
    messages: &[v1::ChatMessage],
) -> anyhow::Result<Generated> {
    let request = v1::GenerateRequest {
        model: router.model_or_own(&arguments.model),
        input: Some(v1::generate_request::Input::Chat(v1::ChatMessages {
            messages: messages.to_vec(),
        })),
        sampling: Some(generate::sampling(&arguments.sampling)),
        ..v1::GenerateRequest::default()
    };
    let mut out = std::io::stdout();
    let generated = generate::stream(router, request, |text| {
        if format.streams_text() {
            write!(out, "{text}")?;
            out.flush()?;
        }
        Ok(())
    })
    .await?;
    let document = serde_json::json!({ "role": "assistant", "content": generated.text });
    format.print_next(&View::line(document, ""))?;
    let usage = &generated.usage;
    let report = &generated.report;
    eprintln!(
        "[{} prompt tokens, {} cached; first token {:.0} ms, then {:.1} ms each; {} -> {}]",
        usage.prompt_tokens,
        usage.cached_tokens,
        report.ttft_ms,
        report.tbt_mean_ms,
        report.prefill_node,
        report.decode_node
    );
    Ok(generated)
}

/// A chat message.
pub(crate) fn message(role: &str, content: &str) -> v1::ChatMessage {
    v1::ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
    }
}
