//! `perigee check`: what is wrong with the cluster, or with this machine, and what to do about it.
//!
//! Findings are grouped in the order in which one thing rests on the other. A failure is what keeps the cluster from
//! working as it was set up; a warning is what could be better; each says what to do. The judgement is pure
//! (`cluster.rs`, `host.rs`, `certificates.rs`, and of a request `chat.rs`); this file asks, prints, and gives the exit code.
//! `perigee doctor` (`doctor.rs`, `machine.rs`) looks into settings, machine and cluster together.

mod certificates;
mod chat;
mod cluster;
mod doctor;
mod host;
mod machine;

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Instant, SystemTime};

use client::TransferMover;
use futures::{StreamExt, stream};
use node::config::Loaded;
use node::{Tls, task, tls};
use serde::Serialize;
use serde_json::json;
use transfer::{TcpTransport, Transport};
use types::{Epoch, Error, HostFacts, NodeRecord};

use crate::arguments::{CheckArgs, SettingFlags};
use crate::context::Target;
use crate::door::Door;
use crate::nodes::{self, Answered};
use crate::output::{Format, Tone, View, paint};
use crate::reach::Router;
use crate::settings::{self, Settings};

pub(crate) use chat::ChatFlags;
pub(crate) use doctor::{DoctorArgs, run as examine};

/// The exit code where something is wrong; the codes of failing commands start at 64.
pub(crate) const UNHEALTHY_EXIT: u8 = 10;
/// Subjects that are named before the rest is counted.
const SUBJECTS_SHOWN_MAX: usize = 6;

/// Something is wrong.
#[derive(Debug)]
pub(crate) struct Unhealthy {
    failed: usize,
    total: usize,
}

impl fmt::Display for Unhealthy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} checks failed", self.failed, self.total)
    }
}

impl std::error::Error for Unhealthy {}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    Passed,
    Warning,
    Failed,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    group: &'static str,
    level: Level,
    /// What it is about: nodes, or pairs of them. Empty for the cluster as a whole.
    subjects: Vec<String>,
    message: String,
    /// What to do about it. Empty where nothing is to be done.
    hint: String,
}

impl Finding {
    fn passed(group: &'static str, subject: &str, message: impl Into<String>) -> Self {
        Self {
            group,
            level: Level::Passed,
            subjects: (!subject.is_empty())
                .then(|| subject.to_owned())
                .into_iter()
                .collect(),
            message: message.into(),
            hint: String::new(),
        }
    }

    fn warning(
        group: &'static str,
        subject: &str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Warning,
            hint: hint.into(),
            ..Self::passed(group, subject, message)
        }
    }

    fn failed(
        group: &'static str,
        subject: &str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Failed,
            ..Self::warning(group, subject, message, hint)
        }
    }
}

/// Puts together what was found alike of several subjects, where the first of them stood.
fn merge(findings: Vec<Finding>) -> Vec<Finding> {
    let mut merged: Vec<Finding> = Vec::new();
    for finding in findings {
        let alike = |known: &&mut Finding| {
            !finding.subjects.is_empty()
                && (known.group, known.level, &known.message, &known.hint)
                    == (finding.group, finding.level, &finding.message, &finding.hint)
        };
        match merged.iter_mut().find(alike) {
            Some(known) => known.subjects.extend(finding.subjects),
            None => merged.push(finding),
        }
    }
    merged
}

/// Checks, prints, and fails with [`Unhealthy`] where something is wrong.
pub(crate) async fn run(
    arguments: CheckArgs,
    target: impl Fn() -> anyhow::Result<Target>,
    format: Format,
) -> anyhow::Result<()> {
    format.without_names()?;
    let findings = if arguments.pre {
        before(&arguments).await?
    } else {
        of_cluster(&arguments, &target()?).await?
    };
    conclude(findings, format)
}

/// Prints what was found, and fails with [`Unhealthy`] where something is wrong.
fn conclude(findings: Vec<Finding>, format: Format) -> anyhow::Result<()> {
    let findings = merge(findings);
    format.print(&view(&findings))?;
    match count(&findings, Level::Failed) {
        0 => Ok(()),
        failed => Err(Unhealthy {
            failed,
            total: findings.len(),
        }
        .into()),
    }
}

/// What is to be said of the cluster, with the settings of this environment.
pub(crate) async fn look(target: &Target, settings: &SettingFlags) -> anyhow::Result<View> {
    let arguments = CheckArgs {
        pre: false,
        chat: ChatFlags::default(),
        settings: settings.clone(),
    };
    Ok(view(&merge(of_cluster(&arguments, target).await?)))
}

fn count(findings: &[Finding], level: Level) -> usize {
    findings.iter().filter(|finding| finding.level == level).count()
}

fn view(findings: &[Finding]) -> View {
    let healthy = count(findings, Level::Failed) == 0;
    let document = json!({ "healthy": healthy, "findings": findings });
    View::new(document, |_| text(findings))
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    let mut push = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    let mut group = "";
    for finding in findings {
        if finding.group != group {
            group = finding.group;
            push(group);
        }
        let mark = match finding.level {
            Level::Passed => paint(Tone::Good, "√"),
            Level::Warning => paint(Tone::Warning, "‼"),
            Level::Failed => paint(Tone::Bad, "×"),
        };
        push(&format!(
            "{mark} {}{}",
            subjects(&finding.subjects),
            finding.message
        ));
        if !finding.hint.is_empty() {
            push(&format!("    hint: {}", finding.hint));
        }
    }
    push(&format!(
        "\n{} failed, {} warnings, {} passed",
        count(findings, Level::Failed),
        count(findings, Level::Warning),
        count(findings, Level::Passed)
    ));
    text
}

/// `a, b: `, or nothing.
fn subjects(subjects: &[String]) -> String {
    let rest = subjects.len().saturating_sub(SUBJECTS_SHOWN_MAX);
    let shown = &subjects[..subjects.len() - rest];
    match (shown.is_empty(), rest) {
        (true, _) => String::new(),
        (false, 0) => format!("{}: ", shown.join(", ")),
        (false, rest) => format!("{} and {rest} more: ", shown.join(", ")),
    }
}

/// Checks the cluster, by what this machine needs to reach it first.
async fn of_cluster(arguments: &CheckArgs, target: &Target) -> anyhow::Result<Vec<Finding>> {
    let settings = target.tls_or(settings::load_for_command(&arguments.settings)?.value.tls);
    let (tls, mut findings) = own_certificate(&settings);
    if tls.is_none() && settings.is_on() {
        return Ok(findings);
    }
    let router = Router::with_tls(&target.address, tls, target.key.as_ref());
    findings.extend(of_members(&router).await?.0);
    findings.extend(of_chat(&arguments.chat, settings, &router).await?);
    Ok(findings)
}

/// Asks the router and its nodes; also gives the nodes.
async fn of_members(router: &Router) -> anyhow::Result<(Vec<Finding>, Vec<NodeRecord>)> {
    let answers = ask(router).await?;
    let mut findings = match router.tls() {
        Some(tls) => certificates_of(tls, &answers.nodes).await,
        None => Vec::new(),
    };
    findings.extend(cluster::judge(&answers));
    let members = answers.nodes.into_iter().map(|node| node.record).collect();
    Ok((findings, members))
}

/// Sends a chat request, if one is wanted.
async fn of_chat(
    flags: &ChatFlags,
    settings: tls::Config,
    router: &Router,
) -> anyhow::Result<Option<Finding>> {
    let Some(url) = &flags.chat else {
        return Ok(None);
    };
    let (asked, tokens) = (url.clone(), flags.chat_tokens);
    let door = Door::new(settings, router.key());
    let answer = task::blocking("chat", move || chat::ask(&asked, &door, tokens)).await?;
    Ok(Some(chat::judge(url, &answer)))
}

/// What this machine connects with, and what there is to say of it.
fn own_certificate(settings: &tls::Config) -> (Option<Tls>, Vec<Finding>) {
    if !settings.is_on() {
        return (None, Vec::new());
    }
    let loaded = Tls::load(settings);
    let read = loaded.as_ref().map(Tls::expires).map_err(Clone::clone);
    let certificate = &settings.certificate;
    // A client without one has nothing to be judged but whether its authority can be read.
    let finding = if certificate.is_empty() && read.is_ok() {
        Vec::new()
    } else {
        vec![certificates::judge_own(certificate, &read, SystemTime::now())]
    };
    (loaded.ok(), finding)
}

/// Connects to every node once more, for what it shows.
async fn certificates_of(tls: &Tls, nodes: &[Answered]) -> Vec<Finding> {
    let shown = stream::iter(nodes).map(|node| async move {
        let record = &node.record;
        let expires = tls.peer_expires(&record.grpc_endpoint).await;
        certificates::judge_peer(record.id.as_str(), &expires, SystemTime::now())
    });
    shown.buffered(nodes::ASKED_MAX).collect().await
}

/// Asks the router, then every node.
async fn ask(router: &Router) -> anyhow::Result<cluster::Answers> {
    let asked = Instant::now();
    let status = router.inference()?.cluster_status().await;
    let records: Vec<_> = status
        .iter()
        .flat_map(|status| status.nodes.iter().map(|node| node.record.clone()))
        .collect();
    let took = asked.elapsed();
    let (nodes, transfers) = tokio::join!(nodes::ask(router, &records), nodes::describe(router, &records));
    Ok(cluster::Answers {
        router: router.to_string(),
        status,
        took,
        nodes,
        transfers,
    })
}

/// Checks this machine and the settings.
async fn before(arguments: &CheckArgs) -> anyhow::Result<Vec<Finding>> {
    let loaded = settings::load_for_command(&arguments.settings)?;
    let mut findings = judge_settings(&loaded, Level::Warning);
    let settings = loaded.value;
    findings.extend(own_certificate(&settings.tls).1);
    findings.extend(judge_keys(&settings));
    findings.extend(judge_host(&settings, &host_facts(&settings).await?).await);
    Ok(findings)
}

async fn host_facts(settings: &Settings) -> Result<HostFacts, Error> {
    let facts = task::blocking("host-facts", || node::host::read(Path::new("/"))).await?;
    Ok(HostFacts {
        gid_index: node::host::gid_index(&settings.transfer.ucx_config().settings),
        ..facts
    })
}

/// What the host means for a node with these settings.
async fn judge_host(settings: &Settings, facts: &HostFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let movers = match movers(settings).await {
        Ok(movers) => movers,
        Err(error) => {
            findings.push(Finding::failed(
                host::GROUP,
                "",
                error.to_string(),
                "install what is missing, or set transfer.transport to auto or tcp",
            ));
            Vec::new()
        }
    };
    findings.extend(host::judge("", facts, &movers, settings.kv.memory.0));
    findings
}

/// `unknown` is how bad a key is that nobody reads.
fn judge_settings(loaded: &Loaded<Settings>, unknown: Level) -> Vec<Finding> {
    const GROUP: &str = "settings";
    let settings = &loaded.value;
    let valid = settings
        .validate()
        .and_then(|()| settings.transfer.check_library());
    let mut findings = vec![match (valid, loaded.unknown_keys.as_slice()) {
        (Err(error), _) => Finding::failed(
            GROUP,
            "",
            error.message,
            "docs/configuration.md lists every setting",
        ),
        (Ok(()), []) => Finding::passed(GROUP, "", "the settings are valid"),
        (Ok(()), keys) => Finding {
            level: unknown,
            ..Finding::warning(
                GROUP,
                "",
                format!("nobody reads these settings: {}", keys.join(", ")),
                "correct or remove them; --check-config of a role refuses them",
            )
        },
    }];
    let model = &settings.model.path;
    if !model.is_empty() {
        findings.push(match Path::new(model).exists() {
            true => Finding::passed(GROUP, "", format!("model {model} is there")),
            false => Finding::failed(
                GROUP,
                "",
                format!("model {model} does not exist"),
                "perigee model pull gets one",
            ),
        });
    }
    findings
}

/// What the file of keys is worth.
fn judge_keys(settings: &Settings) -> Option<Finding> {
    const GROUP: &str = "keys";
    let file = &settings.router.api_keys_file;
    if file.is_empty() {
        return None;
    }
    let keys = router::Guard::new(&settings.router, settings.tls.is_on());
    Some(match (keys, settings.tls.is_on()) {
        (Err(error), _) => Finding::failed(
            GROUP,
            "",
            error.message,
            "perigee key new makes the lines of router.api_keys_file",
        ),
        (Ok(_), false) => Finding::warning(
            GROUP,
            "",
            "API keys travel in the clear, and the nodes' own ports ask nobody for one",
            "set up [tls], or let nobody but the routers reach the nodes: docs/security.md",
        ),
        (Ok(_), true) => Finding::passed(GROUP, "", format!("the keys in {file} can be read")),
    })
}

/// What a node with these settings could move bytes with here: it is tried, as a node does.
async fn movers(settings: &Settings) -> Result<Vec<TransferMover>, Error> {
    let config = transfer::tcp::Config {
        ucx: settings.transfer.ucx_config(),
        ..transfer::tcp::Config::default()
    };
    let transport = TcpTransport::bind(SocketAddr::from(([127, 0, 0, 1], 0)), Epoch(0), config).await?;
    let movers = transport.movers().into_iter().map(|mover| TransferMover {
        name: mover.name,
        usable: mover.usable,
        detail: mover.detail,
    });
    let movers = movers.collect();
    transport.close().await;
    Ok(movers)
}

#[cfg(test)]
mod tests;
