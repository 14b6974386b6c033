use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::*;
use crate::top::snapshot::tests::snapshot;

/// What a terminal of this size shows.
fn shown(width: u16, height: u16, view: &View) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    terminal
        .draw(|frame| draw(frame, &snapshot(), view))
        .expect("drawn");
    let rows = terminal.backend().buffer().content.chunks(usize::from(width));
    let lines = rows.map(|row| {
        row.iter()
            .map(|cell| cell.symbol())
            .collect::<String>()
            .trim_end()
            .to_owned()
            + "\n"
    });
    lines.collect()
}

#[test]
fn a_small_terminal_shows_all_of_a_small_cluster() {
    let expected = "
perigee top  127.0.0.1:50051
2 running, 1 waiting   0.03 requests/s   1.0 tokens/s   hits 25.0 %
TTFT p50 120 ms, p99 300 ms   TBT p50 8.00 ms, p99 12 ms   1 rejected, 1 failed

NODE             ROLE     STATE     RUN   QUEUE  KV                TOKENS/S
prefill-0        prefill  ready     0     3      █████░░░░░ 50 %   500
decode-0         decode   ready     2     0      ████████░░ 75 %   250
decode-1         decode   draining  0     0      ░░░░░░░░░░ 0 %    -
router-0         router   ready     0     0                        -


REQUEST  STATE      AGE      PROMPT  CACHED  OUTPUT    NODES
1a1a1a1a prefilling 500 ms   100     25      30/64     prefill-0 → decode-0
2b2b2b2b decoding   2.5 s    100     25      30/64     decode-0









q quit  tab panel  ←→ sort  ↑↓ scroll  p pause
";
    assert_eq!(format!("\n{}", shown(80, 24, &View::default())), expected);
}

#[test]
fn a_large_terminal_shows_it_sorted_and_paused() {
    let view = View {
        panel: Panel::Requests,
        node_sort: 5,
        request_sort: 2,
        paused: true,
        trouble: Some("router does not answer".to_owned()),
        ..View::default()
    };
    let head = "
perigee top  127.0.0.1:50051  paused  router does not answer
2 running, 1 waiting   0.03 requests/s   1.0 tokens/s   hits 25.0 %
TTFT p50 120 ms, p99 300 ms   TBT p50 8.00 ms, p99 12 ms   1 rejected, 1 failed

NODE             ROLE     STATE     RUN   QUEUE  KV↓               TOKENS/S
decode-0         decode   ready     2     0      ████████░░ 75 %   250
prefill-0        prefill  ready     0     3      █████░░░░░ 50 %   500
decode-1         decode   draining  0     0      ░░░░░░░░░░ 0 %    -
router-0         router   ready     0     0                        -


REQUEST  STATE      AGE↓     PROMPT  CACHED  OUTPUT    NODES
2b2b2b2b decoding   2.5 s    100     25      30/64     decode-0
1a1a1a1a prefilling 500 ms   100     25      30/64     prefill-0 → decode-0
";
    let empty = "\n".repeat(25);
    let expected = format!("{head}{empty}q quit  tab panel  ←→ sort  ↑↓ scroll  p pause\n");
    assert_eq!(format!("\n{}", shown(140, 40, &view)), expected);
}

#[test]
fn text_is_what_a_terminal_shows() {
    assert_eq!(text(&snapshot(), 80, 24), shown(80, 24, &View::default()));
}

#[test]
fn tiny_terminals_are_drawn_too() {
    for (width, height) in [(1, 1), (10, 3), (0, 0), (400, 2)] {
        let drawn = text(&snapshot(), width, height);
        assert!(drawn.lines().count() <= usize::from(height), "{drawn}");
    }
}

#[test]
fn bars_show_used_cached_and_free() {
    for (used, cached, expected) in [
        (0.0, 0.0, "░░░░░░░░░░ 0 %"),
        (0.3, 0.2, "███▒▒░░░░░ 30 %"),
        (1.0, 0.5, "██████████ 100 %"),
        (0.5, 0.5, "█████▒▒▒▒▒ 50 %"),
    ] {
        assert_eq!(bar(used, cached), expected);
    }
}
