//! A frame: a function of a snapshot and how it is looked at. Pure.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table, Widget};

use super::snapshot::{NodeRow, RequestRow, Snapshot};
use super::view::{NODE_COLUMNS, Panel, REQUEST_COLUMNS, View};
use crate::output::Tone;
use crate::requests::time;
use crate::status;

/// Cells of the bar of a pool.
const BAR: usize = 10;
const KEYS: &str = "q quit  tab panel  ←→ sort  ↑↓ scroll  p pause";
/// Digits of a request's id that are shown.
const ID_SHOWN: usize = 8;

/// Draws a frame.
pub(super) fn draw(frame: &mut Frame<'_>, snapshot: &Snapshot, view: &View) {
    let area = frame.area();
    render(frame.buffer_mut(), area, snapshot, view);
}

/// The same as text, for who has no terminal.
pub(super) fn text(snapshot: &Snapshot, width: u16, height: u16) -> String {
    let area = Rect::new(0, 0, width, height);
    let mut buffer = Buffer::empty(area);
    render(&mut buffer, area, snapshot, &View::default());
    let rows = buffer.content.chunks(usize::from(width.max(1)));
    let lines = rows.map(|row| {
        let line: String = row.iter().map(|cell| cell.symbol()).collect();
        format!("{}\n", line.trim_end())
    });
    lines.collect()
}

fn render(buffer: &mut Buffer, area: Rect, snapshot: &Snapshot, view: &View) {
    // Title and columns, and as many nodes as leave requests half of the screen.
    let nodes = u16::try_from(snapshot.nodes.len()).unwrap_or(u16::MAX);
    let nodes = nodes.saturating_add(3).min(area.height / 2);
    let rows = Layout::vertical([
        Constraint::Length(4),
        Constraint::Length(nodes),
        Constraint::Min(0),
        Constraint::Length(1),
    ]);
    let [head, nodes, requests, keys] = rows.areas(area);
    Paragraph::new(header(snapshot, view)).render(head, buffer);
    node_table(snapshot, view).render(nodes, buffer);
    request_table(snapshot, view).render(requests, buffer);
    Line::from(KEYS).dim().render(keys, buffer);
}

fn header(snapshot: &Snapshot, view: &View) -> Vec<Line<'static>> {
    let figures = &snapshot.cluster;
    let mut first = vec![
        Span::from("perigee top").bold(),
        Span::from(format!("  {}", snapshot.router)),
    ];
    if view.paused {
        first.push(Span::from("  paused").fg(Color::Yellow));
    }
    if let Some(trouble) = &view.trouble {
        first.push(Span::from(format!("  {trouble}")).fg(Color::Red));
    }
    let span =
        |summary: &sim::report::Summary| format!("p50 {}, p99 {}", time(summary.p50), time(summary.p99));
    vec![
        Line::from(first),
        Line::from(format!(
            "{} running, {} waiting   {:.2} requests/s   {:.1} tokens/s   hits {:.1} %",
            figures.running,
            figures.waiting,
            figures.requests_per_s,
            figures.output_tokens_per_s,
            100.0 * figures.hit_ratio
        )),
        Line::from(format!(
            "TTFT {}   TBT {}   {} rejected, {} failed",
            span(&figures.ttft_ms),
            span(&figures.tbt_ms),
            figures.rejected,
            figures.failed
        )),
    ]
}

fn node_table(snapshot: &Snapshot, view: &View) -> Table<'static> {
    let rows: Vec<Row<'_>> = view.nodes(snapshot).into_iter().map(node_row).collect();
    let widths = [16, 8, 9, 5, 6, 17, 9];
    let focused = view.panel == Panel::Nodes;
    table(rows, &widths, &NODE_COLUMNS, view.node_sort, focused)
}

fn node_row(node: &NodeRow) -> Row<'static> {
    let colour = match status::tone(node.state) {
        Tone::Good => Color::Green,
        Tone::Warning => Color::Yellow,
        Tone::Bad => Color::Red,
    };
    let has_pool = node.role != "router";
    Row::new([
        Cell::from(node.id.clone()),
        Cell::from(node.role),
        Cell::from(node.state).fg(colour),
        Cell::from(node.running.to_string()),
        Cell::from(node.queued.to_string()),
        Cell::from(if has_pool {
            bar(node.kv_used, node.kv_cached)
        } else {
            String::new()
        }),
        Cell::from(match node.tokens_per_s {
            rate if rate > 0.0 => format!("{rate:.0}"),
            _ => "-".to_owned(),
        }),
    ])
}

/// What is used, then what is cached, then what is free: `███▒▒░░░░░ 30 %`.
fn bar(used: f64, cached: f64) -> String {
    let cells = |part: f64| ((part * BAR as f64).round() as usize).min(BAR);
    let used_cells = cells(used);
    let cached_cells = cells(used + cached).saturating_sub(used_cells);
    let free = BAR - used_cells - cached_cells;
    format!(
        "{}{}{} {:.0} %",
        "█".repeat(used_cells),
        "▒".repeat(cached_cells),
        "░".repeat(free),
        100.0 * used
    )
}

fn request_table(snapshot: &Snapshot, view: &View) -> Table<'static> {
    let rows: Vec<Row<'_>> = view.requests(snapshot).into_iter().map(request_row).collect();
    let widths = [8, 10, 8, 7, 7, 9, 25];
    let focused = view.panel == Panel::Requests;
    table(rows, &widths, &REQUEST_COLUMNS, view.request_sort, focused)
}

fn request_row(request: &RequestRow) -> Row<'static> {
    let id: String = request.id.chars().take(ID_SHOWN).collect();
    Row::new([
        id,
        request.state.clone(),
        time(request.age_ms),
        request.prompt_tokens.to_string(),
        request.cached_tokens.to_string(),
        format!("{}/{}", request.output_tokens, request.output_tokens_max),
        request.nodes.clone(),
    ])
}

/// The column that rows are sorted by is marked, and the panel that keys act on is bright.
fn table(
    rows: Vec<Row<'static>>,
    widths: &[u16],
    columns: &[&'static str],
    sort: usize,
    focused: bool,
) -> Table<'static> {
    let names = columns.iter().enumerate().map(|(index, name)| match index {
        0 => Cell::from(*name),
        index if index == sort => Cell::from(format!("{name}↓")),
        _ => Cell::from(*name),
    });
    let style = if focused {
        Style::new().bold()
    } else {
        Style::new().dim()
    };
    Table::new(rows, widths.iter().map(|width| Constraint::Length(*width)))
        .header(Row::new(names).style(style))
        .column_spacing(1)
}

#[cfg(test)]
mod tests;
