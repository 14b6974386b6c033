//! `perigee demo`: a cluster on this machine, a conversation and questions about a shared document, and a table of where
//! every request ran and what it reused.

use std::io::Write;

use node::ApiKey;
use proto::v1;

use crate::arguments::{DemoArgs, SettingFlags, UpArgs};
use crate::chat::message;
use crate::generate::{self, Generated};
use crate::output::{self, Format, View};
use crate::reach::Router;
use crate::up::Cluster;

/// The opening of "Around the World in Eighty Days" (public domain).
const DOCUMENT: &str = include_str!("demo/document.txt");
const SYSTEM: &str = "You are a helpful assistant. Answer in one or two short sentences.";
const CONVERSATION: [&str; 3] = [
    "What is the boiling point of water in Celsius?",
    "And at which temperature does it freeze?",
    "What is the difference between the two, in degrees?",
];
const QUESTIONS: [&str; 3] = [
    "Of which club is Phileas Fogg a member?",
    "In which street does he live?",
    "Who recommended him for the club?",
];
const ANSWER_TOKENS_MAX: u64 = 64;

/// Starts the cluster, runs the requests, prints, and ends the cluster, also where a request failed.
pub(crate) async fn run(arguments: DemoArgs, key: Option<&ApiKey>, format: Format) -> anyhow::Result<()> {
    format.without_names()?;
    // A decode node would prefill the short turns by itself, which is quicker on one machine and shows less.
    let disaggregate = "router.local_prefill_tokens_max=0".to_owned();
    let up = UpArgs {
        settings: SettingFlags {
            model: Some(arguments.model),
            transport: arguments.transport,
            set: vec![disaggregate],
            ..SettingFlags::default()
        },
        prefill: arguments.prefill,
        decode: arguments.decode,
        store: 0,
        http_port: 0,
        grpc_port: 0,
        registry: None,
    };
    eprintln!(
        "starting a router, {} prefill and {} decode nodes",
        up.prefill, up.decode
    );
    let mut cluster = Cluster::start(up, key, true).await?;
    let router = cluster.router().clone();
    let result = tokio::select! {
        result = requests(&router, format) => result,
        error = cluster.failed() => Err(error),
        interrupted = tokio::signal::ctrl_c() => Err(interrupted.map_or_else(Into::into, |()| anyhow::anyhow!("interrupted"))),
    };
    cluster.stop().await?;
    let served = result?;
    format.print(&view(&served))
}

fn view(served: &[Served]) -> View {
    let document = served.iter().map(Served::to_json).collect();
    View::new(document, |_| table(served))
}

/// A request that was served, with its name in the table.
struct Served {
    name: String,
    generated: Generated,
}

impl Served {
    fn to_json(&self) -> serde_json::Value {
        let mut value = self.generated.to_json();
        value["request"] = self.name.clone().into();
        value
    }
}

async fn requests(router: &Router, format: Format) -> anyhow::Result<Vec<Served>> {
    let mut served = Vec::new();
    let mut messages = vec![message("system", SYSTEM)];
    heading(format, "A conversation of three turns");
    for (turn, question) in CONVERSATION.iter().enumerate() {
        messages.push(message("user", question));
        let generated = ask(router, format, question, &messages).await?;
        messages.push(message("assistant", &generated.text));
        served.push(Served {
            name: format!("turn {}", turn + 1),
            generated,
        });
    }
    heading(format, "Questions about one document");
    for (index, question) in QUESTIONS.iter().enumerate() {
        let content = format!("{DOCUMENT}\n{question}");
        let messages = [message("system", SYSTEM), message("user", &content)];
        let generated = ask(router, format, question, &messages).await?;
        served.push(Served {
            name: format!("question {}", index + 1),
            generated,
        });
    }
    Ok(served)
}

fn heading(format: Format, text: &str) {
    if format.streams_text() {
        println!("\n== {text} ==");
    }
}

async fn ask(
    router: &Router,
    format: Format,
    question: &str,
    messages: &[v1::ChatMessage],
) -> anyhow::Result<Generated> {
    let request = v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Chat(v1::ChatMessages {
            messages: messages.to_vec(),
        })),
        sampling: Some(v1::Sampling {
            max_tokens: Some(ANSWER_TOKENS_MAX),
            ..v1::Sampling::default()
        }),
        ..v1::GenerateRequest::default()
    };
    let mut out = std::io::stdout();
    if format.streams_text() {
        write!(out, "\n> {question}\n")?;
    }
    let generated = generate::stream(router, request, |text| {
        if format.streams_text() {
            write!(out, "{text}")?;
            out.flush()?;
        }
        Ok(())
    })
    .await?;
    if format.streams_text() {
        writeln!(out)?;
    }
    Ok(generated)
}

fn table(served: &[Served]) -> String {
    let mut table = output::table(&[
        "REQUEST",
        "PROMPT",
        "CACHED",
        "PREFILLED ON",
        "DECODED ON",
        "KV MOVED",
        "VIA",
        "TTFT",
        "MEAN TBT",
    ]);
    for Served { name, generated } in served {
        let usage = &generated.usage;
        let report = &generated.report;
        table.add_row([
            name.clone(),
            usage.prompt_tokens.to_string(),
            usage.cached_tokens.to_string(),
            report.prefill_node.clone(),
            report.decode_node.clone(),
            output::bytes(report.fetched_bytes + report.handoff_bytes),
            report.transport.clone(),
            format!("{:.0} ms", report.ttft_ms),
            format!("{:.1} ms", report.tbt_mean_ms),
        ]);
    }
    format!("\n{}", output::table_text(&table))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::tests::generated;
    use crate::output::golden;

    #[test]
    fn each_request_is_a_row_with_where_it_ran() {
        let served = Served {
            name: "turn 1".into(),
            generated: generated(),
        };
        golden::check("demo", &view(&[served]));
    }
}
