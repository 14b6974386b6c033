//! `perigee sim`: clusters in virtual time.

mod flags;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, thread};

use anyhow::Context;
use comfy_table::Table;
use sim::plot::Plot;
use sim::profile::Profile;
use sim::report::Report;
use sim::scenario::Scenario;
use sim::sweep::{self, Sustained, Sweep};
use sim::trace::{self, Request};
use types::Error;

use crate::output::{self, Format, View};

pub(crate) use flags::SimCommand;
use flags::{PlotOf, RunArgs, ScenarioArgs, SweepArgs};

/// Simulations at a time. One takes a core, and some hundred MiB for a trace.
const THREADS_MAX: usize = 2;

/// Most values of `--vary`.
const VARIANTS_MAX: usize = 64;

/// `perigee sim …`.
pub(crate) fn run(command: SimCommand, format: Format) -> anyhow::Result<()> {
    match command {
        SimCommand::Run(flags) => simulate(&flags, format),
        SimCommand::Sweep(flags) => search(&flags, format),
    }
}

/// A scenario with everything that it names.
struct Loaded {
    scenario: Scenario,
    profile: Profile,
    trace: Option<Vec<Request>>,
}

fn simulate(flags: &RunArgs, format: Format) -> anyhow::Result<()> {
    format.without_names()?;
    let variants = match &flags.vary {
        Some(vary) => variants(vary)?,
        None => vec![None],
    };
    let loaded = load(&flags.scenario, variants[0].as_deref())?;
    let scenario = |variant: &Option<String>| -> anyhow::Result<Scenario> {
        let scenario = read_scenario(&flags.scenario, variant.as_deref())?;
        scenario.validate(&loaded.profile).map_err(invalid)?;
        Ok(scenario)
    };
    let scenarios: Vec<Scenario> = variants.iter().map(scenario).collect::<anyhow::Result<_>>()?;
    let mut reports = in_parallel("simulate", &scenarios, |scenario| {
        sweep::report(scenario, &loaded.profile, loaded.trace.as_deref())
    });
    let names: Vec<String> = variants
        .iter()
        .zip(&reports)
        .map(|(variant, report)| variant.clone().unwrap_or_else(|| report.policy.clone()))
        .collect();
    if let Some(path) = &flags.scenario.svg {
        write(path, &plot(flags.plot, &loaded.scenario.name, &names, &reports))?;
    }
    if !flags.samples {
        reports.iter_mut().for_each(|report| report.samples.clear());
    }
    format.print(&run_view(&names, &reports)?)
}

fn run_view(names: &[String], reports: &[Report]) -> anyhow::Result<View> {
    Ok(View::new(serde_json::to_value(reports)?, |_| {
        let mut text = output::table_text(&summary(names, reports));
        if let [report] = reports {
            text += &format!("\n{}", output::table_text(&nodes(report)));
        }
        text
    }))
}

fn search(flags: &SweepArgs, format: Format) -> anyhow::Result<()> {
    format.without_names()?;
    let loaded = load(&flags.scenario, None)?;
    let shape = &loaded.scenario.cluster;
    let nodes = flags.nodes.unwrap_or(shape.prefill_nodes + shape.decode_nodes);
    if !(2..=sim::scenario::NODES_MAX).contains(&nodes) {
        let message = format!("a sweep of {nodes} nodes has no cluster with both roles");
        return Err(Error::invalid("nodes", message).into());
    }
    if !(flags.attainment > 0.0 && flags.attainment <= 1.0) {
        let message = format!(
            "attainment is {}, but must be above 0 and at most 1",
            flags.attainment
        );
        return Err(Error::invalid("attainment", message).into());
    }
    let sweep = Sweep {
        nodes,
        pool_tokens: match &flags.pool_tokens[..] {
            [] => vec![shape.prefill_pool_tokens],
            given => given.to_vec(),
        },
        attainment: flags.attainment,
    };
    let points = sweep.points();
    for point in &points {
        point
            .applied_to(&loaded.scenario)
            .validate(&loaded.profile)
            .map_err(invalid)?;
    }
    let Loaded {
        scenario,
        profile,
        trace,
    } = &loaded;
    let found = in_parallel("sweep", &points, |point| {
        sweep::sustained(scenario, profile, trace.as_deref(), *point, sweep.attainment)
    });
    if let Some(path) = &flags.scenario.svg {
        write(path, &sweep_plot(&scenario.name, &sweep, &found))?;
    }
    format.print(&sweep_view(&found)?)
}

fn sweep_view(found: &[Sustained]) -> anyhow::Result<View> {
    Ok(View::new(serde_json::to_value(found)?, |_| {
        let mut text = output::table_text(&sustained(found));
        let rate = |one: &&Sustained| one.speed.map_or(0.0, |_| one.report.goodput_per_node_per_s);
        let best = found.iter().max_by(|a, b| rate(a).total_cmp(&rate(b)));
        if let Some(best) = best.filter(|best| best.speed.is_some()) {
            let point = best.point;
            text += &format!(
                "\nbest: {} prefill and {} decode nodes with pools of {} tokens, {:.4} requests/s per node\n",
                point.prefill_nodes,
                point.decode_nodes,
                point.pool_tokens,
                best.report.goodput_per_node_per_s
            );
        }
        text
    }))
}

fn load(flags: &ScenarioArgs, variant: Option<&str>) -> anyhow::Result<Loaded> {
    let scenario = read_scenario(flags, variant)?;
    // Files that a scenario names lie beside it.
    let folder = flags.scenario.parent().unwrap_or(Path::new(""));
    let text = match Profile::built_in(&scenario.profile) {
        Some(text) => text.to_owned(),
        None => read(&folder.join(&scenario.profile)).map_err(|error| {
            let known: Vec<&str> = Profile::built_in_names().collect();
            error.context(format!("profile is none of {}, nor a file", known.join(", ")))
        })?,
    };
    let profile = Profile::parse(&text).map_err(invalid)?;
    scenario.validate(&profile).map_err(invalid)?;
    let trace = match (&flags.trace, &scenario.workload.trace) {
        (Some(path), _) => Some(path.clone()),
        (None, Some(name)) => Some(folder.join(name)),
        (None, None) => None,
    };
    let parse = |path: PathBuf| -> anyhow::Result<Vec<Request>> {
        let parsed = trace::parse(&read(&path)?, scenario.workload.block_tokens);
        parsed.map_err(|error| Error::invalid("trace", format!("{}: {error}", path.display())).into())
    };
    Ok(Loaded {
        trace: trace.map(parse).transpose()?,
        scenario,
        profile,
    })
}

/// The scenario's file with `--set` and `--vary` on top.
fn read_scenario(flags: &ScenarioArgs, variant: Option<&str>) -> anyhow::Result<Scenario> {
    let text = read(&flags.scenario)?;
    let mut table: toml::Table = text
        .parse()
        .map_err(|error| Error::invalid("scenario", format!("{}: {error}", flags.scenario.display())))?;
    for assignment in flags.set.iter().map(String::as_str).chain(variant) {
        let (key, value) = assignment
            .split_once('=')
            .ok_or_else(|| Error::invalid("set", format!("{assignment:?} is not of the form KEY=VALUE")))?;
        set(&mut table, key, value)?;
    }
    Scenario::parse(&table.to_string()).map_err(invalid)
}

fn set(table: &mut toml::Table, key: &str, value: &str) -> anyhow::Result<()> {
    // What is no TOML value is a text without its quotes.
    let parsed = format!("value = {value}").parse::<toml::Table>().ok();
    let value = parsed
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut path: Vec<&str> = key.split('.').collect();
    let last = path.pop().unwrap_or_default();
    let mut inner = table;
    for part in path {
        let entry = inner
            .entry(part)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()));
        inner = entry
            .as_table_mut()
            .ok_or_else(|| Error::invalid("set", format!("{part} of {key} is no section")))?;
    }
    inner.insert(last.to_owned(), value);
    Ok(())
}

fn variants(vary: &str) -> anyhow::Result<Vec<Option<String>>> {
    let (key, values) = vary
        .split_once('=')
        .ok_or_else(|| Error::invalid("vary", format!("{vary:?} is not of the form KEY=VALUE,VALUE")))?;
    let variants: Vec<_> = values
        .split(',')
        .map(|value| Some(format!("{key}={value}")))
        .collect();
    if variants.len() > VARIANTS_MAX {
        let message = format!("{} values, but at most {VARIANTS_MAX} are taken", variants.len());
        return Err(Error::invalid("vary", message).into());
    }
    Ok(variants)
}

/// What `work` makes of each job, in their order.
fn in_parallel<J: Sync, R: Send>(what: &str, jobs: &[J], work: impl Fn(&J) -> R + Sync) -> Vec<R> {
    let bar = output::step_bar(what);
    bar.set_length(jobs.len() as u64);
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(jobs.len())));
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    thread::scope(|scope| {
        for _ in 0..THREADS_MAX.min(cores).min(jobs.len()) {
            scope.spawn(|| {
                while let Some((index, job)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    jobs.get(index).map(|job| (index, job))
                } {
                    let result = work(job);
                    bar.inc(1);
                    done.lock()
                        .expect("a worker that panics ends the command")
                        .push((index, result));
                }
            });
        }
    });
    bar.finish_and_clear();
    let mut done = done.into_inner().expect("a worker that panics ends the command");
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

fn summary(names: &[String], reports: &[Report]) -> Table {
    let mut table = output::table(&[
        "RUN",
        "TTFT MEAN",
        "P50",
        "P90",
        "P99",
        "TBT P50",
        "P99",
        "HIT",
        "FETCHED",
        "MET",
        "REJECTED",
        "FAILED",
        "GOODPUT/S",
        "BALANCE P",
        "D",
    ]);
    for (name, report) in names.iter().zip(reports) {
        let seconds = |ms: f64| format!("{:.2} s", ms / 1e3);
        let ttft = report.ttft_ms;
        table.add_row(vec![
            name.clone(),
            seconds(ttft.mean),
            seconds(ttft.p50),
            seconds(ttft.p90),
            seconds(ttft.p99),
            format!("{:.0} ms", report.tbt_ms.p50),
            format!("{:.0} ms", report.tbt_ms.p99),
            format!("{:.1} %", 100.0 * report.hit_ratio),
            format!("{:.1} %", 100.0 * report.fetched_ratio),
            format!("{:.1} %", 100.0 * report.attainment),
            report.rejected.to_string(),
            report.failed.to_string(),
            format!("{:.3}", report.goodput_per_s),
            format!("{:.2}", report.prefill_balance),
            format!("{:.2}", report.decode_balance),
        ]);
    }
    table
}

fn nodes(report: &Report) -> Table {
    let mut table = output::table(&["NODE", "PREFILLS", "COMPUTING", "DECODED TOKENS"]);
    for node in &report.nodes {
        table.add_row(vec![
            node.node.clone(),
            node.prefills.to_string(),
            format!("{:.1} s", node.prefill_s),
            node.decoded_tokens.to_string(),
        ]);
    }
    table
}

fn sustained(found: &[Sustained]) -> Table {
    let mut table = output::table(&[
        "PREFILL",
        "DECODE",
        "POOL TOKENS",
        "SPEED",
        "REQUESTS/S",
        "PER NODE",
        "TTFT P90",
        "TBT TAIL P90",
        "HIT",
    ]);
    for Sustained { point, speed, report } in found {
        let mut row = vec![
            point.prefill_nodes.to_string(),
            point.decode_nodes.to_string(),
            point.pool_tokens.to_string(),
        ];
        row.extend(match speed {
            None => vec!["none is sustained".to_owned()],
            Some(speed) => vec![
                format!("{speed:.2}"),
                format!("{:.3}", report.goodput_per_s),
                format!("{:.4}", report.goodput_per_node_per_s),
                format!("{:.2} s", report.ttft_ms.p90 / 1e3),
                format!("{:.0} ms", report.tbt_tail_ms.p90),
                format!("{:.1} %", 100.0 * report.hit_ratio),
            ],
        });
        table.add_row(row);
    }
    table
}

fn plot(of: PlotOf, title: &str, names: &[String], reports: &[Report]) -> String {
    let points = |report: &Report| -> Vec<(f64, f64)> {
        let samples = report.samples.iter();
        match of {
            PlotOf::Ttft => {
                let percentiles = report.ttft_percentiles_ms.iter().enumerate();
                percentiles
                    .map(|(index, ms)| (ms / 1e3, (index + 1) as f64))
                    .collect()
            }
            PlotOf::DecodeLoad => samples.map(|sample| (sample.at_s, sample.decode_load)).collect(),
            PlotOf::Queue => samples
                .map(|sample| (sample.at_s, sample.queued_prefill_tokens as f64 / 1e3))
                .collect(),
        }
    };
    let (x, y) = match of {
        PlotOf::Ttft => ("time to first token, s", "percent of requests"),
        PlotOf::DecodeLoad => ("s", "decode step / limit on gaps"),
        PlotOf::Queue => ("s", "queued prompt tokens, thousands"),
    };
    let lines = names.iter().zip(reports);
    let plot = Plot {
        title,
        x,
        y,
        logarithmic_x: of == PlotOf::Ttft,
        lines: lines
            .map(|(name, report)| (name.clone(), points(report)))
            .collect(),
    };
    plot.svg()
}

fn sweep_plot(title: &str, sweep: &Sweep, found: &[Sustained]) -> String {
    let line = |tokens: &u64| {
        let of_size = found.iter().filter(|one| one.point.pool_tokens == *tokens);
        let points = of_size.map(|one| {
            let rate = one.speed.map_or(0.0, |_| one.report.goodput_per_node_per_s);
            (one.point.prefill_nodes as f64, rate)
        });
        (format!("{:.1}M tokens", *tokens as f64 / 1e6), points.collect())
    };
    let x = format!("prefill nodes of {}", sweep.nodes);
    let plot = Plot {
        title,
        x: &x,
        y: "requests/s per node within limits",
        logarithmic_x: false,
        lines: sweep.pool_tokens.iter().map(line).collect(),
    };
    plot.svg()
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).map_err(|error| {
        let message = format!("{} cannot be read: {error}", path.display());
        Error::invalid("file", message).into()
    })
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn invalid(error: impl std::fmt::Display) -> anyhow::Error {
    Error::invalid("scenario", error.to_string()).into()
}

#[cfg(test)]
mod tests;
