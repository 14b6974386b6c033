//! Walks through the states of a [`World`]: all of them, or at random.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hash, Hasher};

use tests::cases::Random;

use crate::world::{Rules, Step, Violation, World};

/// A shape with more states than this is too large to be explored in a test.
const STATES_MAX: usize = 4_000_000;
/// A walk of more steps does not end.
const WALK_STEPS_MAX: usize = 2_000;

/// What an exploration saw.
#[derive(Debug, Default)]
pub(crate) struct Explored {
    pub(crate) states: usize,
    pub(crate) steps: usize,
    /// How often each end of the receiver's side was reached.
    pub(crate) outcomes: BTreeMap<&'static str, usize>,
    /// The kinds of steps that were taken.
    pub(crate) kinds: BTreeSet<String>,
}

/// A property that does not hold, and how it came to that.
#[derive(Debug)]
pub(crate) struct Counterexample {
    pub(crate) violation: Violation,
    pub(crate) steps: Vec<Step>,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, after:", self.violation)?;
        for step in &self.steps {
            writeln!(f, "  {step:?}")?;
        }
        Ok(())
    }
}

/// Takes every step in every state, breadth first, so that a counterexample is as short as can be.
///
/// Every execution ends: no state is reached from itself, and a state without a fair step is a good end.
pub(crate) fn explore(rules: &Rules) -> Result<Explored, Counterexample> {
    let mut graph = Graph::default();
    let mut explored = Explored::default();
    let first = World::new(rules);
    graph.add(&first, None);
    let mut frontier = VecDeque::from([(first, 0_usize)]);
    while let Some((world, from)) = frontier.pop_front() {
        let fair = world.fair_steps(rules);
        if fair.is_empty() {
            world
                .check_end()
                .map_err(|violation| graph.trace(violation, from, None))?;
            let outcome = world.outcome().unwrap_or("none");
            *explored.outcomes.entry(outcome).or_default() += 1;
        }
        for step in fair.into_iter().chain(world.faults(rules)) {
            let mut next = world.clone();
            next.take(rules, step)
                .map_err(|violation| graph.trace(violation, from, Some(step)))?;
            explored.steps += 1;
            explored.kinds.insert(kind(step));
            let (to, new) = graph.add(&next, Some((from, step)));
            graph.edges.push((from, to));
            if new {
                assert!(graph.origins.len() <= STATES_MAX, "{rules:?} has too many states");
                frontier.push_back((next, to));
            }
        }
    }
    explored.states = graph.origins.len();
    match graph.on_a_cycle() {
        Some(state) => Err(graph.trace("an execution need not end", state, None)),
        None => Ok(explored),
    }
}

/// One random execution to its end. About one step in `fault_odds` is a fault, as long as there are some left.
pub(crate) fn walk(
    rules: &Rules,
    random: &mut Random,
    fault_odds: u64,
) -> Result<&'static str, Counterexample> {
    let mut world = World::new(rules);
    let mut steps = Vec::new();
    let fail = |violation, steps: &[Step]| Counterexample {
        violation,
        steps: steps.to_vec(),
    };
    while steps.len() < WALK_STEPS_MAX {
        let fair = world.fair_steps(rules);
        if fair.is_empty() {
            return match world.check_end() {
                Ok(()) => Ok(world.outcome().unwrap_or("none")),
                Err(violation) => Err(fail(violation, &steps)),
            };
        }
        let faults = world.faults(rules);
        let goes_wrong = !faults.is_empty() && random.one_in(fault_odds);
        let step = *random.choose(if goes_wrong { &faults } else { &fair });
        steps.push(step);
        world
            .take(rules, step)
            .map_err(|violation| fail(violation, &steps))?;
    }
    Err(fail("an execution need not end", &steps))
}

/// The step without what it is about.
fn kind(step: Step) -> String {
    let name = format!("{step:?}");
    name.split('(').next().unwrap_or_default().to_owned()
}

/// The states that were seen, by number.
#[derive(Default)]
struct Graph {
    /// Two hashes of 64 bits stand for a state: that both agree for two of millions is out of the question.
    numbers: HashMap<(u64, u64), usize>,
    /// For the text of a state.
    scratch: String,
    /// The step by which a state was reached first.
    origins: Vec<Option<(usize, Step)>>,
    edges: Vec<(usize, usize)>,
}

impl Graph {
    /// The state's number, and whether it is new.
    fn add(&mut self, world: &World, origin: Option<(usize, Step)>) -> (usize, bool) {
        let next = self.origins.len();
        let number = *self
            .numbers
            .entry(fingerprint(world, &mut self.scratch))
            .or_insert(next);
        let new = number == next;
        if new {
            self.origins.push(origin);
        }
        (number, new)
    }

    fn trace(&self, violation: Violation, mut state: usize, last: Option<Step>) -> Counterexample {
        let mut steps: Vec<Step> = last.into_iter().collect();
        while let Some((before, step)) = self.origins[state] {
            steps.push(step);
            state = before;
        }
        steps.reverse();
        Counterexample { violation, steps }
    }

    /// A state from which an execution can go on for ever: one that is left when, again and again, all states are removed
    /// that only removed ones lead to.
    fn on_a_cycle(&self) -> Option<usize> {
        let states = self.origins.len();
        let mut incoming = vec![0_u32; states];
        let mut outgoing = vec![Vec::new(); states];
        for (from, to) in &self.edges {
            incoming[*to] += 1;
            outgoing[*from].push(*to);
        }
        let mut removable: Vec<usize> = (0..states).filter(|state| incoming[*state] == 0).collect();
        let mut removed = 0;
        while let Some(state) = removable.pop() {
            removed += 1;
            for to in &outgoing[state] {
                incoming[*to] -= 1;
                if incoming[*to] == 0 {
                    removable.push(*to);
                }
            }
        }
        if removed == states {
            return None;
        }
        incoming.iter().position(|count| *count > 0)
    }
}

fn fingerprint(world: &World, text: &mut String) -> (u64, u64) {
    text.clear();
    write!(text, "{world:?}").expect("a string takes everything");
    let hash = |of: (u8, &str)| {
        let mut hasher = DefaultHasher::new();
        of.hash(&mut hasher);
        hasher.finish()
    };
    (hash((0, text)), hash((1, text)))
}
