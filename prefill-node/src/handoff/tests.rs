use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Something that may happen next, in any order.
#[derive(Debug, Clone, Copy)]
enum Event {
    Start,
    Offer,
    /// The engine goes on by one layer of one chunk.
    Compute,
    BeginWrite,
    /// Ends one of the writes in flight.
    Acknowledge(usize),
    Fail(usize, bool),
    Stop,
    Land,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        2 => Just(Event::Start),
        2 => Just(Event::Offer),
        12 => Just(Event::Compute),
        12 => Just(Event::BeginWrite),
        12 => any::<usize>().prop_map(Event::Acknowledge),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(pick, lands)| Event::Fail(pick, lands)),
        1 => Just(Event::Stop),
        3 => Just(Event::Land),
    ]
}

fn gentle_event() -> impl Strategy<Value = Event> {
    event().prop_filter("never ends early", |event| {
        !matches!(event, Event::Fail(..) | Event::Stop)
    })
}

/// The naive model: sets of (block, layer).
struct Model {
    handoff: Handoff,
    shape: Shape,
    cached_blocks: usize,
    chunk_blocks: usize,
    /// Where the engine is: first block of the chunk, layer.
    cursor: (usize, usize),
    ours: BTreeSet<(usize, usize)>,
    begun: BTreeSet<(usize, usize)>,
    theirs: BTreeSet<(usize, usize)>,
    in_flight: Vec<Write>,
    started: bool,
    offered: bool,
    computed: bool,
    ended: bool,
    unsettled: bool,
}

impl Model {
    fn new(shape: Shape, limits: Limits, cached_blocks: usize, chunk_blocks: usize) -> Self {
        Self {
            handoff: Handoff::new(shape, limits),
            shape,
            cached_blocks,
            chunk_blocks,
            cursor: (cached_blocks, 0),
            ours: BTreeSet::new(),
            begun: BTreeSet::new(),
            theirs: BTreeSet::new(),
            in_flight: Vec::new(),
            started: false,
            offered: false,
            computed: false,
            ended: false,
            unsettled: false,
        }
    }

    fn units(piece: &Piece) -> impl Iterator<Item = (usize, usize)> {
        let layers = piece.layers.clone();
        piece
            .blocks
            .clone()
            .flat_map(move |block| layers.clone().map(move |layer| (block, layer)))
    }

    fn all(&self) -> usize {
        (self.shape.blocks - self.shape.held_blocks) * self.shape.layers
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Start if !self.started => {
                self.handoff.start(self.cached_blocks);
                self.started = true;
                for block in 0..self.cached_blocks {
                    self.ours
                        .extend((0..self.shape.layers).map(|layer| (block, layer)));
                }
            }
            Event::Offer if self.started && !self.offered => {
                self.handoff
                    .offer(self.shape.blocks - self.shape.held_blocks)
                    .expect("first and fitting");
                self.offered = true;
            }
            Event::Offer => {
                let early = !self.started;
                let error = self.handoff.offer(0).expect_err("early or repeated");
                assert_eq!(
                    error,
                    if early {
                        OfferError::Early
                    } else {
                        OfferError::Repeated
                    }
                );
            }
            Event::Compute if self.started && !self.computed => self.compute(),
            Event::BeginWrite => self.begin_write(),
            Event::Acknowledge(pick) if !self.in_flight.is_empty() => {
                let write = self.in_flight.swap_remove(pick % self.in_flight.len());
                self.theirs.extend(write.pieces.iter().flat_map(Self::units));
                self.handoff.acknowledged(write.id);
            }
            Event::Fail(pick, lands) if !self.in_flight.is_empty() => {
                let write = self.in_flight.swap_remove(pick % self.in_flight.len());
                self.handoff.write_failed(write.id, lands);
                self.unsettled |= lands;
                self.ended = true;
            }
            Event::Stop => {
                if self.handoff.phase() != Phase::Landed {
                    self.ended = true;
                }
                self.handoff.stop();
            }
            Event::Land if self.handoff.phase() == Phase::Flushed => self.handoff.land(),
            Event::Start | Event::Compute | Event::Acknowledge(_) | Event::Fail(..) | Event::Land => {}
        }
        self.check();
    }

    fn compute(&mut self) {
        let (first, layer) = self.cursor;
        let end = (first + self.chunk_blocks).min(self.shape.blocks);
        if first < end {
            self.ours.extend((first..end).map(|block| (block, layer)));
            self.handoff.written(layer, end);
            self.cursor = if layer + 1 == self.shape.layers {
                (end, 0)
            } else {
                (first, layer + 1)
            };
        }
        if self.cursor.0 >= self.shape.blocks {
            self.handoff.computed();
            self.computed = true;
        }
    }

    fn begin_write(&mut self) {
        let Some(write) = self.handoff.next_write() else {
            return;
        };
        assert!(
            self.offered && !self.ended,
            "writes need an offer and end with the handoff"
        );
        for unit in write.pieces.iter().flat_map(Self::units) {
            assert!(
                self.ours.contains(&unit),
                "{unit:?} is sent before it is computed"
            );
            assert!(unit.0 >= self.shape.held_blocks, "the peer holds {unit:?}");
            assert!(self.begun.insert(unit), "{unit:?} is sent twice");
        }
        self.in_flight.push(write);
    }

    fn check(&self) {
        self.handoff.check_integrity();
        let everything_there = self.theirs.len() == self.all();
        match self.handoff.phase() {
            Phase::Landed | Phase::Flushed => assert!(self.computed && everything_there && !self.ended),
            Phase::Stopped { quiesced } => {
                assert!(self.ended && self.in_flight.is_empty());
                assert_eq!(quiesced, !self.unsettled);
            }
            Phase::Stopping => assert!(self.ended && !self.in_flight.is_empty()),
            Phase::Queued => assert!(!self.started && !self.ended),
            Phase::Running => assert!(self.started && !self.offered && !self.ended),
            Phase::Pushing => assert!(self.offered && !self.ended && !(self.computed && everything_there)),
        }
    }
}

prop_compose! {
    fn model()(
        layers in 1usize..5,
        blocks in 1usize..9,
        held in 0usize..9,
        cached in 0usize..9,
        chunk_blocks in 1usize..4,
        writes_in_flight_max in 1usize..4,
        write_slices_max in 1usize..6,
        write_units_max in 1usize..12,
    ) -> Model {
        let shape = Shape { layers, held_blocks: held.min(blocks), blocks };
        let limits = Limits { writes_in_flight_max, write_slices_max, write_units_max };
        Model::new(shape, limits, cached.min(blocks), chunk_blocks)
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} cached {} chunk {}",
            self.handoff, self.cached_blocks, self.chunk_blocks
        )
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_interleaving_keeps_the_promises(mut model in model(), events in prop::collection::vec(event(), 1..200)) {
        for event in events {
            model.apply(event);
        }
        // However it ends, it ends: the writes in flight end, and then it is stopped.
        model.apply(Event::Stop);
        while !model.in_flight.is_empty() {
            model.apply(Event::Acknowledge(0));
        }
        prop_assert!(model.handoff.next_write().is_none() || !model.ended);
        let ended = matches!(model.handoff.phase(), Phase::Stopped { .. } | Phase::Landed);
        prop_assert!(ended, "{:?}", model);
    }

    #[test]
    fn without_failures_everything_lands(
        mut model in model(),
        events in prop::collection::vec(gentle_event(), 0..100),
    ) {
        for event in events {
            model.apply(event);
        }
        model.apply(Event::Start);
        if !model.offered {
            model.apply(Event::Offer);
        }
        // Every turn computes, begins and acknowledges at least one unit, if any is left.
        for _ in 0..model.all() + model.shape.blocks * model.shape.layers + 1 {
            for event in [Event::Compute, Event::BeginWrite, Event::Acknowledge(0), Event::Land] {
                model.apply(event);
            }
        }
        prop_assert_eq!(model.handoff.phase(), Phase::Landed);
    }
}

const LIMITS: Limits = Limits {
    writes_in_flight_max: 4,
    write_slices_max: 64,
    write_units_max: 64,
};

#[test]
fn a_cached_prefix_travels_as_whole_blocks() {
    let shape = Shape {
        layers: 3,
        held_blocks: 1,
        blocks: 5,
    };
    let mut handoff = Handoff::new(shape, LIMITS);
    handoff.start(4);
    handoff.offer(4).expect("fits");
    let write = handoff.next_write().expect("the prefix is there");
    assert_eq!(
        write.pieces,
        [Piece {
            layers: 0..3,
            blocks: 1..4
        }]
    );
    handoff.written(0, 5);
    let write = handoff.next_write().expect("a layer is there");
    assert_eq!(
        write.pieces,
        [Piece {
            layers: 0..1,
            blocks: 4..5
        }]
    );
}

#[test]
fn a_peer_that_holds_everything_needs_no_offer() {
    let shape = Shape {
        layers: 2,
        held_blocks: 3,
        blocks: 3,
    };
    let mut handoff = Handoff::new(shape, LIMITS);
    handoff.start(3);
    handoff.computed();
    assert_eq!(handoff.phase(), Phase::Flushed);
}

#[test]
fn an_offer_of_another_size_is_refused() {
    let shape = Shape {
        layers: 2,
        held_blocks: 1,
        blocks: 3,
    };
    let mut handoff = Handoff::new(shape, LIMITS);
    handoff.start(0);
    assert_eq!(
        handoff.offer(3),
        Err(OfferError::Blocks {
            offered: 3,
            needed: 2
        })
    );
}
