//! `perigee bench`: loads a server with requests, and measures the answers at this end.
//!
//! What is sent (`plan.rs`, `prompts.rs`) and what the figures are (`report.rs`) are pure functions of flags, seed and samples;
//! `drive.rs` sends, over `http.rs` or `grpc.rs`.

mod drive;
mod flags;
mod grpc;
mod http;
mod plan;
mod prompts;
mod report;
mod sse;
mod target;

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use std::{fs, thread};

use anyhow::Context;
use serde_json::{Value, json};
use sim::trace::TRACE_BLOCK_TOKENS;
use types::{Error, ErrorCode, Role};

use crate::output::{self, Format, View};
use crate::reach::Router;

use drive::{Sample, drive};
pub(crate) use flags::BenchArgs;
use flags::{LoadArgs, PromptArgs};
use plan::{Content, Length, Pace, Plan, REQUESTS_MAX, TOKENS_MAX};
use report::{Limits, Report};
use target::{Shape, Target};

/// Where a router of `perigee up` serves HTTP.
const URL: &str = "http://127.0.0.1:8080";
/// Requests of a run that is not told how long to be.
const REQUESTS: u64 = 100;
/// Requests that may run at a time where their rate is given: a server that falls behind must not exhaust this machine.
const RUNNING_MAX: usize = 1024;
/// Tokens of answers, where nothing says how many.
const OUTPUT_TOKENS: u64 = 64;

/// Runs the load and prints the figures.
pub(crate) async fn run(arguments: BenchArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    format.without_names()?;
    let plan = plan_of(&arguments)?;
    let (target, url, served) = connect(&arguments, router).await?;
    let target = Arc::new(target);
    let shape = Arc::new(Shape {
        api: arguments.api,
        model: served,
        timeout: arguments.timeout.get(),
    });
    let load = &arguments.load;
    let open = load.rate.is_some() || load.trace.is_some();
    let running_max = load
        .concurrency
        .map_or(if open { RUNNING_MAX } else { 1 }, |count| count.get());
    let limits = drive::Limits {
        running_max,
        duration: load.duration.map(|duration| duration.get()),
    };
    warm_up(&arguments, &target, &shape, running_max).await?;
    let bar = output::step_bar("bench");
    if load.duration.is_none() || load.requests.is_some() {
        bar.set_length(plan.left());
    }
    let started = SystemTime::now();
    let samples = drive(&target, &shape, plan, limits, |_| bar.inc(1)).await;
    bar.finish_and_clear();
    let ms = |limit: Option<node::config::Duration>| limit.map(|limit| limit.get().as_secs_f64() * 1e3);
    let limits = Limits {
        ttft_ms: ms(arguments.ttft),
        tbt_ms: ms(arguments.tbt),
    };
    let report = Report::of(&samples, limits);
    if let Some(path) = &arguments.plot {
        let title = format!("perigee bench: {} of {url}", shape.model);
        fs::write(path, report::svg(&title, &samples))
            .with_context(|| format!("write {}", path.display()))?;
    }
    let run = json!({
        "url": url,
        "model": shape.model,
        "api": shape.api.as_str(),
        "seed": load.seed,
        "load": load_json(load, running_max),
        "started_unix_ms": node::clock::unix_ms(started),
        "machine": machine(),
    });
    let document = to_json(run, &report, arguments.samples.then_some(&samples[..]))?;
    let text = |_| format!("{}\n{}", report.lines(), output::table_text(&report.times()));
    format.print(&View::new(document, text))?;
    judge(&report, &samples, arguments.allow_failures)
}

/// Requests that do not count, of another seed, so that they leave nothing in a cache.
async fn warm_up(
    arguments: &BenchArgs,
    target: &Arc<Target>,
    shape: &Arc<Shape>,
    running_max: usize,
) -> anyhow::Result<()> {
    let count = arguments.load.warmup;
    if count == 0 {
        return Ok(());
    }
    let plan = Plan::new(content(arguments)?, Pace::Closed, !arguments.load.seed, count);
    let limits = drive::Limits {
        running_max,
        duration: None,
    };
    let bar = output::step_bar("warm up");
    bar.set_length(plan.left());
    // A trace's own times would make it as long as the run.
    let at_once = plan.map(|request| plan::Planned { at: None, ..request });
    let samples = drive(target, shape, at_once, limits, |_| bar.inc(1)).await;
    bar.finish_and_clear();
    judge(
        &Report::of(&samples, Limits::default()),
        &samples,
        arguments.allow_failures,
    )
    .context("warm up")
}

/// Fails with the first failure, unless failures are allowed, and where nothing at all was answered.
fn judge(report: &Report, samples: &[Sample], allow_failures: bool) -> anyhow::Result<()> {
    if allow_failures {
        return Ok(());
    }
    let rejected = |error: &&Error| error.code == ErrorCode::Overloaded;
    let mut errors = samples.iter().filter_map(|sample| sample.outcome.as_ref().err());
    let failure = match report.requests.ok {
        0 => errors.next(),
        _ => errors.find(|error| !rejected(error)),
    };
    let Some(failure) = failure else {
        return Ok(());
    };
    let counts = report.requests;
    Err(anyhow::Error::from(failure.clone()).context(format!(
        "{} of {} requests failed, {} were rejected",
        counts.failed, counts.sent, counts.rejected
    )))
}

/// What is measured, its address, and the model.
async fn connect(arguments: &BenchArgs, router: &Router) -> anyhow::Result<(Target, String, String)> {
    if arguments.grpc {
        let inference = router.inference()?;
        let model = match arguments.model.as_str() {
            "" => {
                let models = inference.list_models().await?;
                let none = || Error::new(ErrorCode::NotFound, format!("{router} serves no model"));
                models.into_iter().next().ok_or_else(none)?.name
            }
            model => model.to_owned(),
        };
        return Ok((
            Target::Grpc(grpc::Client::new(inference)),
            router.to_string(),
            model,
        ));
    }
    let url = match &arguments.url {
        Some(url) => url.clone(),
        None => url_of(router).await,
    };
    let client = http::Client::new(&url, router.key())?;
    let model = match arguments.model.as_str() {
        "" => client.model().await?,
        model => model.to_owned(),
    };
    Ok((Target::Http(client), url, model))
}

/// Where the cluster's router serves HTTP, if it says so.
async fn url_of(router: &Router) -> String {
    let asked = async { router.inference()?.cluster_status().await };
    let nodes = asked.await.map_or_else(|_| Vec::new(), |status| status.nodes);
    let scheme = if router.tls().is_some() { "https" } else { "http" };
    let found = nodes.into_iter().find(|node| node.record.role == Role::Router);
    found.map_or_else(
        || URL.to_owned(),
        |node| format!("{scheme}://{}", node.record.http_endpoint),
    )
}

fn plan_of(arguments: &BenchArgs) -> anyhow::Result<Plan> {
    let load = &arguments.load;
    if let Some(rate) = load.rate
        && !(rate.is_finite() && rate > 0.0)
    {
        return Err(Error::invalid("rate", format!("--rate is {rate}, but must be above 0")).into());
    }
    let pace = match (load.rate, load.constant) {
        (None, _) => Pace::Closed,
        (Some(rate), true) => Pace::Constant(rate),
        (Some(rate), false) => Pace::Poisson(rate),
    };
    let unsaid = match load.trace.is_some() || load.duration.is_some() {
        true => REQUESTS_MAX,
        false => REQUESTS,
    };
    let count = load.requests.unwrap_or(unsaid);
    Ok(Plan::new(content(arguments)?, pace, load.seed, count))
}

fn content(arguments: &BenchArgs) -> anyhow::Result<Content> {
    let PromptArgs {
        input_tokens,
        input_tokens_stddev,
        shared_prefix_tokens,
        output_tokens,
        output_tokens_stddev,
        trace_block_tokens,
    } = arguments.prompts;
    let output = |mean| {
        let length = Length {
            mean,
            deviation: output_tokens_stddev,
        };
        length.check("output-tokens")
    };
    let Some(path) = &arguments.load.trace else {
        let input = Length {
            mean: input_tokens,
            deviation: input_tokens_stddev,
        };
        return Ok(Content::Synthetic {
            input: input.check("input-tokens")?,
            output: output(output_tokens.unwrap_or(OUTPUT_TOKENS))?,
            shared_prefix_tokens: shared_prefix_tokens.min(TOKENS_MAX),
        });
    };
    let speed = arguments.load.speed;
    if !(speed.is_finite() && (1e-6..=1e6).contains(&speed)) {
        return Err(Error::invalid(
            "speed",
            format!("--speed is {speed}, but must be from 1e-6 to 1e6"),
        )
        .into());
    }
    Ok(Content::Trace {
        requests: trace(path)?,
        speed,
        block_tokens: trace_block_tokens.unwrap_or(TRACE_BLOCK_TOKENS),
        output: output_tokens.map(output).transpose()?,
    })
}

fn trace(path: &Path) -> anyhow::Result<Vec<plan::Traced>> {
    let invalid = |reason: String| Error::invalid("trace", format!("{}: {reason}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| invalid(error.to_string()))?;
    Ok(plan::read_trace(&text).map_err(|error| invalid(error.to_string()))?)
}

fn load_json(load: &LoadArgs, running_max: usize) -> Value {
    json!({
        "concurrency": running_max,
        "rate_per_s": load.rate,
        "arrivals": match (load.rate, &load.trace, load.constant) {
            (None, None, _) => "closed",
            (None, Some(_), _) => "trace",
            (Some(_), _, true) => "constant",
            (Some(_), _, false) => "poisson",
        },
        "trace": load.trace,
        "speed": load.trace.is_some().then_some(load.speed),
        "warmup": load.warmup,
    })
}

/// What the figures were taken on, which is half of what they say.
fn machine() -> Value {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name"));
    json!({
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cores": thread::available_parallelism().map_or(0, |cores| cores.get()),
        "cpu": name.map(|name| name.trim_start_matches([' ', '\t', ':'])),
    })
}

/// The run, with its figures beside what it was.
fn to_json(mut run: Value, report: &Report, samples: Option<&[Sample]>) -> anyhow::Result<Value> {
    if let (Value::Object(run), Value::Object(figures)) = (&mut run, serde_json::to_value(report)?) {
        run.extend(figures);
    }
    if let Some(samples) = samples {
        run["samples"] = samples.iter().map(report::sample_json).collect();
    }
    Ok(run)
}
