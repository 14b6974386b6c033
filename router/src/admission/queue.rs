//! Requests that wait, in the order in which they are to be served.
//!
//! More important requests come first. Within one priority, tenants share by their weights: start-time fair queueing (Goyal, Vin and
//! Cheng, SIGCOMM 1996) over prompt tokens. A request starts, in virtual time, when the one before it of its tenant ends, and takes
//! its tokens over its tenant's weight; the least start is served first. So a tenant that asks for much waits behind itself,
//! and one that asks for little is served as if the others asked for no more than their parts.
//!
//! Invariant: what a queue holds is what its bounds allow, and who would be served last is who gives way. Pure.

use std::collections::{BTreeMap, HashMap};

use types::Priority;

use super::{Arrival, Ticket};

/// Tenants whose virtual times are remembered. Beyond so many, those with nothing that waits are forgotten: they lose what they owe,
/// which is one request at most.
const TENANTS_MAX: usize = 4_096;

/// A place in the queue; the least one is served next.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Place {
    priority: Priority,
    /// Virtual time at which the request starts.
    start: f64,
    /// Between equals, who came first.
    order: u64,
}

impl Eq for Place {}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let important = other.priority.cmp(&self.priority);
        let early = || self.start.total_cmp(&other.start);
        important
            .then_with(early)
            .then_with(|| self.order.cmp(&other.order))
    }
}

/// A request that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) ticket: Ticket,
    pub(super) prompt_tokens: u64,
    tenant: String,
}

/// How much may wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) requests: usize,
    pub(super) prompt_tokens: u64,
}

/// What became of a request that was to wait.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    /// It waits, and these, who would have been served after it, do no more.
    Waits(Vec<Ticket>),
    /// Everybody who waits is to be served before it, and there is no room behind them.
    Full,
}

/// Those who wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    places: BTreeMap<Place, Waiting>,
    of_ticket: HashMap<Ticket, Place>,
    /// Virtual time at which the last request of a tenant ends, by priority.
    ends: HashMap<(Priority, String), f64>,
    /// Virtual time: the start of the request that was served last, by priority.
    now: [f64; Priority::ALL.len()],
    prompt_tokens: u64,
    order: u64,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whoever is served next.
    pub(super) fn first(&self) -> Option<&Waiting> {
        self.places.first_key_value().map(|(_, waiting)| waiting)
    }

    /// How many would be served before such a request.
    pub(super) fn ahead_of(&self, arrival: &Arrival<'_>) -> usize {
        let place = self.place(arrival);
        self.places.range(..place).count()
    }

    /// Whether such a request would be taken in.
    pub(super) fn takes(&self, arrival: &Arrival<'_>, bounds: Bounds) -> bool {
        let place = self.place(arrival);
        self.leaving(place, arrival.prompt_tokens, bounds).is_some()
    }

    /// Takes a request in, at the cost of those behind it where there is no room otherwise.
    pub(super) fn push(&mut self, arrival: &Arrival<'_>, bounds: Bounds) -> Pushed {
        let place = self.place(arrival);
        let Some(leaving) = self.leaving(place, arrival.prompt_tokens, bounds) else {
            return Pushed::Full;
        };
        for ticket in &leaving {
            self.remove(*ticket);
        }
        self.order += 1;
        self.remember(place, arrival);
        self.of_ticket.insert(arrival.ticket, place);
        self.prompt_tokens += arrival.prompt_tokens;
        self.places.insert(
            place,
            Waiting {
                ticket: arrival.ticket,
                prompt_tokens: arrival.prompt_tokens,
                tenant: arrival.tenant.to_owned(),
            },
        );
        Pushed::Waits(leaving)
    }

    /// Takes out whoever is served next.
    pub(super) fn pop(&mut self) -> Option<Waiting> {
        let (place, waiting) = self.places.pop_first()?;
        self.of_ticket.remove(&waiting.ticket);
        self.prompt_tokens -= waiting.prompt_tokens;
        let now = &mut self.now[place.priority as usize];
        *now = now.max(place.start);
        self.rest();
        Some(waiting)
    }

    /// A request waits no more. Whether it did.
    pub(super) fn remove(&mut self, ticket: Ticket) -> bool {
        let Some(place) = self.of_ticket.remove(&ticket) else {
            return false;
        };
        if let Some(waiting) = self.places.remove(&place) {
            self.prompt_tokens -= waiting.prompt_tokens;
        }
        self.rest();
        true
    }

    pub(super) fn contains(&self, ticket: Ticket) -> bool {
        self.of_ticket.contains_key(&ticket)
    }

    pub(super) fn check_integrity(&self, bounds: Bounds) {
        let tokens: u64 = self.places.values().map(|waiting| waiting.prompt_tokens).sum();
        assert_eq!(tokens, self.prompt_tokens);
        assert_eq!(self.places.len(), self.of_ticket.len());
        assert!(self.places.len() <= bounds.requests && tokens <= bounds.prompt_tokens);
        assert!(self.ends.len() <= TENANTS_MAX.max(self.places.len()));
        for (place, waiting) in &self.places {
            assert_eq!(self.of_ticket.get(&waiting.ticket), Some(place));
        }
    }

    fn place(&self, arrival: &Arrival<'_>) -> Place {
        let priority = arrival.priority;
        let key = (priority, arrival.tenant.to_owned());
        let ends = self.ends.get(&key).copied().unwrap_or(0.0);
        Place {
            priority,
            start: ends.max(self.now[priority as usize]),
            order: self.order,
        }
    }

    /// Those who have to leave, last ones first, so that a request fits; `None` if that takes somebody who is served before it.
    fn leaving(&self, place: Place, prompt_tokens: u64, bounds: Bounds) -> Option<Vec<Ticket>> {
        let (mut requests, mut tokens) = (self.len() + 1, self.prompt_tokens + prompt_tokens);
        let mut leaving = Vec::new();
        let mut behind = self.places.range(place..).rev();
        while requests > bounds.requests || tokens > bounds.prompt_tokens {
            let (_, last) = behind.next()?;
            requests -= 1;
            tokens -= last.prompt_tokens;
            leaving.push(last.ticket);
        }
        Some(leaving)
    }

    fn remember(&mut self, place: Place, arrival: &Arrival<'_>) {
        if self.ends.len() >= TENANTS_MAX {
            let waits = |tenant: &str| self.places.values().any(|waiting| waiting.tenant == tenant);
            let now = self.now;
            self.ends
                .retain(|(priority, tenant), end| *end > now[*priority as usize] && waits(tenant));
        }
        let takes = arrival.prompt_tokens.max(1) as f64 / f64::from(arrival.weight.get());
        let key = (arrival.priority, arrival.tenant.to_owned());
        self.ends.insert(key, place.start + takes);
    }

    /// When nobody waits, nobody owes anything.
    fn rest(&mut self) {
        if self.places.is_empty() {
            self.ends.clear();
            self.now = [0.0; Priority::ALL.len()];
        }
    }
}
