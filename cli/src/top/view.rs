//! How a snapshot is looked at: what keys change. Pure.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::snapshot::{NodeRow, RequestRow, Snapshot};

/// Columns of the nodes.
pub(super) const NODE_COLUMNS: [&str; 7] = ["NODE", "ROLE", "STATE", "RUN", "QUEUE", "KV", "TOKENS/S"];
/// Columns of the requests.
pub(super) const REQUEST_COLUMNS: [&str; 7] =
    ["REQUEST", "STATE", "AGE", "PROMPT", "CACHED", "OUTPUT", "NODES"];

/// What keys act on.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Panel {
    #[default]
    Nodes,
    Requests,
}

/// The state of the screen.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct View {
    pub(super) panel: Panel,
    /// The columns that rows are sorted by. 0 keeps the router's order.
    pub(super) node_sort: usize,
    pub(super) request_sort: usize,
    /// Rows that are scrolled past.
    pub(super) scrolled: usize,
    pub(super) paused: bool,
    /// Why there is nothing newer to show.
    pub(super) trouble: Option<String>,
}

/// What a key asks for beside a change of the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Stay,
    Quit,
}

impl View {
    /// Does what a key says.
    pub(super) fn key(&mut self, key: KeyEvent) -> Wish {
        let (columns, sort) = match self.panel {
            Panel::Nodes => (NODE_COLUMNS.len(), &mut self.node_sort),
            Panel::Requests => (REQUEST_COLUMNS.len(), &mut self.request_sort),
        };
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Wish::Quit,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Wish::Quit,
            KeyCode::Char('p') => self.paused = !self.paused,
            KeyCode::Right => *sort = (*sort + 1) % columns,
            KeyCode::Left => *sort = (*sort + columns - 1) % columns,
            KeyCode::Down => self.scrolled = self.scrolled.saturating_add(1),
            KeyCode::Up => self.scrolled = self.scrolled.saturating_sub(1),
            KeyCode::Tab | KeyCode::BackTab => {
                self.scrolled = 0;
                self.panel = match self.panel {
                    Panel::Nodes => Panel::Requests,
                    Panel::Requests => Panel::Nodes,
                };
            }
            _ => {}
        }
        Wish::Stay
    }

    /// The nodes in their order: numbers fall, names rise.
    pub(super) fn nodes<'a>(&self, snapshot: &'a Snapshot) -> Vec<&'a NodeRow> {
        let mut nodes: Vec<&NodeRow> = snapshot.nodes.iter().collect();
        match self.node_sort {
            1 => nodes.sort_by_key(|node| node.role),
            2 => nodes.sort_by_key(|node| node.state),
            3 => nodes.sort_by_key(|node| std::cmp::Reverse(node.running)),
            4 => nodes.sort_by_key(|node| std::cmp::Reverse(node.queued)),
            5 => nodes.sort_by(|one, other| other.kv_used.total_cmp(&one.kv_used)),
            6 => nodes.sort_by(|one, other| other.tokens_per_s.total_cmp(&one.tokens_per_s)),
            _ => {}
        }
        self.past(Panel::Nodes, nodes)
    }

    /// The requests in their order.
    pub(super) fn requests<'a>(&self, snapshot: &'a Snapshot) -> Vec<&'a RequestRow> {
        let mut requests: Vec<&RequestRow> = snapshot.requests.iter().collect();
        match self.request_sort {
            1 => requests.sort_by(|one, other| one.state.cmp(&other.state)),
            2 => requests.sort_by(|one, other| other.age_ms.total_cmp(&one.age_ms)),
            3 => requests.sort_by_key(|request| std::cmp::Reverse(request.prompt_tokens)),
            4 => requests.sort_by_key(|request| std::cmp::Reverse(request.cached_tokens)),
            5 => requests.sort_by_key(|request| std::cmp::Reverse(request.output_tokens)),
            6 => requests.sort_by(|one, other| one.nodes.cmp(&other.nodes)),
            _ => {}
        }
        self.past(Panel::Requests, requests)
    }

    /// The rows after those that are scrolled past; at least one stays.
    fn past<T>(&self, panel: Panel, mut rows: Vec<T>) -> Vec<T> {
        if self.panel == panel {
            rows.drain(..self.scrolled.min(rows.len().saturating_sub(1)));
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::snapshot::tests::snapshot;

    fn press(view: &mut View, codes: &[KeyCode]) -> Wish {
        let wishes = codes
            .iter()
            .map(|code| view.key(KeyEvent::new(*code, KeyModifiers::NONE)));
        wishes.last().expect("a key")
    }

    #[test]
    fn keys_sort_scroll_switch_and_pause() {
        let snapshot = snapshot();
        let mut view = View::default();
        let ids = |view: &View| {
            view.nodes(&snapshot)
                .iter()
                .map(|node| node.id.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(&view)[0], "prefill-0");
        assert_eq!(press(&mut view, &[KeyCode::Right; 5]), Wish::Stay);
        assert_eq!(
            ids(&view)[..2],
            ["decode-0", "prefill-0"],
            "the fullest pool comes first"
        );
        press(&mut view, &[KeyCode::Down; 9]);
        assert_eq!(ids(&view).len(), 1);
        press(
            &mut view,
            &[
                KeyCode::Tab,
                KeyCode::Left,
                KeyCode::Left,
                KeyCode::Left,
                KeyCode::Left,
                KeyCode::Left,
            ],
        );
        assert_eq!(
            (view.panel, view.request_sort, view.scrolled),
            (Panel::Requests, 2, 0)
        );
        assert!(
            view.requests(&snapshot)[0].age_ms > 2000.0,
            "the oldest comes first"
        );
        press(&mut view, &[KeyCode::Char('p')]);
        assert!(view.paused);
    }

    #[test]
    fn q_escape_and_control_c_quit() {
        for code in [KeyCode::Char('q'), KeyCode::Esc] {
            assert_eq!(press(&mut View::default(), &[code]), Wish::Quit);
        }
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(View::default().key(interrupt), Wish::Quit);
        assert_eq!(press(&mut View::default(), &[KeyCode::Char('c')]), Wish::Stay);
    }
}
