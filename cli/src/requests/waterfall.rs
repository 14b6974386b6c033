//! A request's way in the terminal: one line per part, with a bar where it lies.

use std::fmt::Write;

use client::{RequestTimeline, TimelineSpan};

use super::{against, time};
use crate::output;

/// Columns of the bars unless others are asked for: with the rest a line fits a terminal of 120.
pub(super) const COLUMNS: u16 = 60;

/// Eighths of a column, so that short parts show where they end.
const EIGHTHS: [char; 8] = ['█', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// The waterfall of `request`, with bars of `columns`.
pub(super) fn text(request: &RequestTimeline, columns: u16) -> String {
    let mut text = headline(request);
    let total_ms = request.age_ms.max(f64::MIN_POSITIVE);
    let names: Vec<String> = request.spans.iter().map(name).collect();
    let name_width = width(names.iter().map(String::as_str));
    let node_width = width(request.spans.iter().map(|span| span.node.as_str()));
    for (span, name) in request.spans.iter().zip(&names) {
        let bar = bar(span.start_ms, span.duration_ms, total_ms, columns);
        let line = format!(
            "{name:name_width$}  {node:node_width$}  {took:>8} {more} {bar} {notes}",
            node = span.node,
            took = time(span.duration_ms),
            more = if span.running { '…' } else { ' ' },
            notes = notes(span),
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn headline(request: &RequestTimeline) -> String {
    let mut text = format!(
        "request {} {} after {}",
        request.request_id,
        request.state,
        time(request.age_ms)
    );
    let mut add = |part: String| write!(text, "{part}").expect("a string takes everything");
    add(format!(
        ": {} + {} tokens ({} cached)",
        request.prompt_tokens, request.output_tokens, request.cached_tokens
    ));
    add(format!(
        ", first token {}",
        against(request.ttft_ms, request.ttft_slo_ms)
    ));
    add(format!(
        ", then {}",
        against(request.tbt_mean_ms, request.tbt_slo_ms)
    ));
    if !request.error.is_empty() {
        add(format!("\nerror: {}", request.error));
    }
    text.push('\n');
    text
}

/// Indented by how deep it lies.
fn name(span: &TimelineSpan) -> String {
    let indent = 2 * span.depth as usize;
    format!("{:indent$}{}", "", span.name)
}

fn width<'a>(texts: impl Iterator<Item = &'a str>) -> usize {
    texts.map(|text| text.chars().count()).max().unwrap_or(0)
}

fn notes(span: &TimelineSpan) -> String {
    let mut notes = Vec::new();
    if span.bytes > 0 {
        notes.push(output::bytes(span.bytes));
    }
    if !span.detail.is_empty() {
        notes.push(span.detail.clone());
    }
    notes.join(", ")
}

/// Where a part lies within `total_ms`, in `columns`. What is too short to be seen is a thin line.
fn bar(start_ms: f64, duration_ms: f64, total_ms: f64, columns: u16) -> String {
    let eighths_max = f64::from(columns) * 8.0;
    let at = |ms: f64| (ms / total_ms * eighths_max).clamp(0.0, eighths_max).round() as usize;
    // Bars begin with a column, since a column can only be filled from its left.
    let first = (at(start_ms) / 8).min(usize::from(columns) - 1);
    let filled = at(start_ms + duration_ms).saturating_sub(first * 8).max(1);
    let mut bar = " ".repeat(first);
    bar.extend(std::iter::repeat_n(EIGHTHS[0], filled / 8));
    if filled % 8 > 0 {
        bar.push(EIGHTHS[filled % 8]);
    }
    let used = first + filled.div_ceil(8);
    bar.extend(std::iter::repeat_n(
        ' ',
        usize::from(columns).saturating_sub(used),
    ));
    bar
}
