//! One handoff: both real state machines, and a model of all that lies between them.
//!
//! What is modelled is what the shells, the stream, the transport and the memory may do according to their contracts, and
//! no more kindly than those say: a stream is ordered and may break anywhere, with what was under way delivered or lost; a
//! write lands piece by piece, or late, or again, or never; a revocation takes effect at any time before it returns; an
//! event of the outside comes at any moment.
//!
//! Invariants, of which [`World::take`] reports the first that breaks:
//! - a piece lands only in the block that was granted for it, never in what that memory has become since;
//! - blocks are adopted only if every byte is right;
//! - after `Quiesced` none of the sender's writes is under way.

mod receiver;
mod sender;

use std::collections::VecDeque;

use decode_node::handoff as receiving;
use prefill_node::handoff as sending;
use types::{Error, ErrorCode, TransferId};

const TRANSFER: TransferId = TransferId(1);

/// What is wrong with a model that must be caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// Nothing.
    None,
    /// The shell answers `Fenced` when the revocation begins.
    FencedTooEarly,
    /// The shell frees the blocks of a fence that is slow.
    SlowFenceFrees,
    /// The transport takes a write for the process that it meets, whichever incarnation it was meant for.
    EpochIgnored,
    /// The shell believes `Landed`.
    Unverified,
    /// The sender takes every write that failed for one that cannot land any more.
    LostIsSettled,
}

/// The shape of the handoff, and what may go wrong in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) blocks: usize,
    pub(crate) held_blocks: usize,
    pub(crate) layers: usize,
    pub(crate) writes_max: usize,
    pub(crate) faults_max: u8,
    pub(crate) mutation: Mutation,
}

/// Something that happens. Writes are named by their place in [`World::writes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The engine starts, writes the next layer of the next block, or is done.
    EngineGoesOn,
    CommandArrives,
    EventArrives,
    SenderHearsTheEnd,
    ReceiverHearsTheEnd,
    BlocksGranted,
    FenceCloses,
    VerificationEnds,
    PieceBegins(usize),
    PieceEnds(usize),
    Refused(usize),
    Acknowledged(usize),
    Vanishes(usize),
    SenderDeadline,
    ReceiverDeadline,
    // What follows needs something to go wrong.
    NoBlocks,
    AllocationFails,
    OthersNeedBlocks,
    FenceIsSlow,
    VerificationFails,
    ClientLeaves,
    SenderSeemsStalled,
    EngineFails,
    QuiescingTakesTooLong,
    Lost(usize),
    LandsAgain(usize),
    BitFlips(usize),
    StreamBreaks,
    EventRepeats,
    CommandRepeats,
    LandedIsALie,
    Partition,
    ReceiverRestarts,
    SenderDies,
}

/// Which of the properties does not hold.
pub(crate) type Violation = &'static str;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Offer,
    Abort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Message {
    Started,
    Landed,
    Failure,
    Quiesced,
}

/// What the receiver's shell is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Allocate,
    Fence,
    Verify,
}

/// Why the sender's session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Aborted,
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    Active,
    /// It waits for its writes.
    Settling(Why),
    Over,
}

/// What the transport at the receiver lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    NotMade,
    Open,
    /// The revocation has begun. It may take effect as late as when it returns.
    Closing,
    Closed,
    /// The process was restarted, and gave a grant of the same name to somebody else.
    Foreign,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Free,
    Granted,
    Adopted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Empty,
    Right,
    Wrong,
}

#[derive(Debug, Clone)]
struct Block {
    owner: Owner,
    /// Grows whenever the memory gets another owner.
    generation: u8,
    layers: Vec<Content>,
}

#[derive(Debug, Clone)]
struct Write {
    id: sending::WriteId,
    /// Block and layer.
    pieces: Vec<(usize, usize)>,
    landed: usize,
    /// The next piece is being written by the receiver's transport.
    touching: bool,
    /// The sender has given up waiting for it.
    late: bool,
    /// The receiver's incarnation that it is meant for.
    epoch: u8,
    /// Of the blocks when they were granted.
    generation: u8,
}

#[derive(Debug, Clone)]
struct Receiver {
    machine: receiving::Handoff,
    work: Option<Work>,
    /// The label of its end; `died` for a process that did.
    end: Option<&'static str>,
    /// A slow fence goes on in the background.
    background: bool,
    /// The deadline passed or the client left: the shell looks for one of them.
    interrupted: bool,
    told_stalled: bool,
    told_closed: bool,
}

#[derive(Debug, Clone)]
struct Sender {
    machine: sending::Handoff,
    session: Session,
    /// Whether the engine has taken the prompt.
    started: bool,
    /// (block, layer) pairs that the engine has written.
    computed: usize,
}

#[derive(Debug, Clone, Default)]
struct Stream {
    commands: VecDeque<Command>,
    events: VecDeque<Message>,
    broken: bool,
    receiver_gone: bool,
}

/// Everything.
#[derive(Debug, Clone)]
pub(crate) struct World {
    receiver: Receiver,
    sender: Sender,
    stream: Stream,
    gate: Gate,
    epoch: u8,
    memory: Vec<Block>,
    writes: Vec<Write>,
    faults_left: u8,
    partitioned: bool,
    restarted: bool,
}

fn repeat_first<T: Copy>(queue: &mut VecDeque<T>) {
    if let Some(first) = queue.front().copied() {
        queue.push_front(first);
    }
}

fn error() -> Error {
    Error::new(ErrorCode::Unavailable, "scripted")
}

impl Rules {
    fn pushed(&self) -> usize {
        self.blocks - self.held_blocks
    }
}

impl World {
    /// `Start` was sent, and nothing else happened yet.
    pub(crate) fn new(rules: &Rules) -> Self {
        let shape = sending::Shape {
            layers: rules.layers,
            held_blocks: rules.held_blocks,
            blocks: rules.blocks,
        };
        let limits = sending::Limits {
            writes_in_flight_max: rules.writes_max,
            write_slices_max: 2,
            write_units_max: 2,
        };
        let block = Block {
            owner: Owner::Free,
            generation: 0,
            layers: vec![Content::Empty; rules.layers],
        };
        Self {
            receiver: Receiver {
                machine: receiving::Handoff::new(TRANSFER, rules.pushed()),
                work: None,
                end: None,
                background: false,
                interrupted: false,
                told_stalled: false,
                told_closed: false,
            },
            sender: Sender {
                machine: sending::Handoff::new(shape, limits),
                session: Session::Active,
                started: false,
                computed: 0,
            },
            stream: Stream::default(),
            gate: Gate::NotMade,
            epoch: 0,
            memory: vec![block; rules.pushed()],
            writes: Vec::new(),
            faults_left: rules.faults_max,
            partitioned: false,
            restarted: false,
        }
    }

    /// How the receiver's side ended.
    pub(crate) fn outcome(&self) -> Option<&'static str> {
        self.receiver.end
    }

    /// Steps that happen sooner or later if nothing else does.
    pub(crate) fn fair_steps(&self, rules: &Rules) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut may = |holds: bool, step: Step| {
            if holds {
                steps.push(step);
            }
        };
        let active = self.sender.session == Session::Active;
        let receiving = self.receiver.end.is_none();
        let connected = !self.partitioned;
        let computing = self.sender.computed <= rules.pushed() * rules.layers;
        may(active && computing, Step::EngineGoesOn);
        may(
            connected && active && !self.stream.commands.is_empty(),
            Step::CommandArrives,
        );
        may(
            connected && receiving && !self.stream.events.is_empty(),
            Step::EventArrives,
        );
        let cut = self.stream.broken || self.stream.receiver_gone;
        may(connected && active && cut, Step::SenderHearsTheEnd);
        let over = self.sender.session == Session::Over && self.stream.events.is_empty();
        let ends = self.stream.broken || over;
        may(
            connected && receiving && ends && !self.receiver.told_closed,
            Step::ReceiverHearsTheEnd,
        );
        may(self.receiver.work == Some(Work::Allocate), Step::BlocksGranted);
        let untouched = self.writes.iter().all(|write| !write.touching);
        may(self.gate == Gate::Closing && untouched, Step::FenceCloses);
        may(self.receiver.work == Some(Work::Verify), Step::VerificationEnds);
        // Where nothing passes any more, time ends what waits for it.
        may(self.partitioned && active, Step::SenderDeadline);
        may(
            self.partitioned && receiving && !self.receiver.interrupted,
            Step::ReceiverDeadline,
        );
        for (index, write) in self.writes.iter().enumerate() {
            let complete = write.landed == write.pieces.len();
            let idle = !write.touching;
            may(
                idle && !complete && self.admits(rules, write),
                Step::PieceBegins(index),
            );
            may(write.touching, Step::PieceEnds(index));
            may(
                connected && idle && !complete && !write.late && !self.admits(rules, write),
                Step::Refused(index),
            );
            may(
                connected && idle && complete && !write.late,
                Step::Acknowledged(index),
            );
            may(idle && write.late, Step::Vanishes(index));
            may(self.partitioned && !write.late, Step::Lost(index));
        }
        steps
    }

    /// Steps that need something to go wrong.
    pub(crate) fn faults(&self, rules: &Rules) -> Vec<Step> {
        if self.faults_left == 0 || self.fair_steps(rules).is_empty() {
            return Vec::new();
        }
        let mut steps = Vec::new();
        let mut may = |holds: bool, step: Step| {
            if holds {
                steps.push(step);
            }
        };
        let active = self.sender.session == Session::Active;
        let settling = matches!(self.sender.session, Session::Settling(_));
        let receiving = self.receiver.end.is_none();
        let work = self.receiver.work;
        may(work == Some(Work::Allocate), Step::NoBlocks);
        may(work == Some(Work::Allocate), Step::AllocationFails);
        may(
            receiving && self.receiver.machine.is_requested(),
            Step::OthersNeedBlocks,
        );
        may(work == Some(Work::Fence), Step::FenceIsSlow);
        may(work == Some(Work::Verify), Step::VerificationFails);
        may(receiving && !self.receiver.interrupted, Step::ClientLeaves);
        may(
            receiving && !self.receiver.interrupted && !self.partitioned,
            Step::ReceiverDeadline,
        );
        may(
            receiving && !self.receiver.told_stalled && !self.receiver.told_closed,
            Step::SenderSeemsStalled,
        );
        may(active && !self.partitioned, Step::SenderDeadline);
        may(active, Step::EngineFails);
        may(settling, Step::QuiescingTakesTooLong);
        may(!self.stream.broken, Step::StreamBreaks);
        may(receiving && !self.stream.events.is_empty(), Step::EventRepeats);
        may(active && !self.stream.commands.is_empty(), Step::CommandRepeats);
        may(receiving && active && !self.stream.broken, Step::LandedIsALie);
        may(!self.partitioned, Step::Partition);
        may(receiving && !self.restarted, Step::ReceiverRestarts);
        may(active || settling, Step::SenderDies);
        for (index, write) in self.writes.iter().enumerate() {
            may(!write.late && !self.partitioned, Step::Lost(index));
            may(!write.touching && write.landed > 0, Step::LandsAgain(index));
        }
        for (index, block) in self.memory.iter().enumerate() {
            let granted = block.owner == Owner::Granted && block.layers[0] == Content::Right;
            may(granted, Step::BitFlips(index));
        }
        steps
    }

    /// Whether the transport at the receiver writes a piece of this write now.
    fn admits(&self, rules: &Rules, write: &Write) -> bool {
        let ignored = rules.mutation == Mutation::EpochIgnored;
        match self.gate {
            Gate::Open | Gate::Closing => write.epoch == self.epoch,
            Gate::Foreign => write.epoch == self.epoch || ignored,
            Gate::NotMade | Gate::Closed => false,
        }
    }

    /// Lets one step happen. A step of [`World::faults`] costs one of the faults.
    pub(crate) fn take(&mut self, rules: &Rules, step: Step) -> Result<(), Violation> {
        if !self.fair_steps(rules).contains(&step) {
            self.faults_left -= 1;
        }
        match step {
            Step::EngineGoesOn => self.engine_goes_on(rules)?,
            Step::CommandArrives => match self.stream.commands.pop_front() {
                Some(Command::Offer) => match self.sender.machine.offer(rules.pushed()) {
                    Ok(()) => self.pump(rules),
                    Err(_) => self.stop(Why::Failed)?,
                },
                Some(Command::Abort) => self.stop(Why::Aborted)?,
                None => {}
            },
            Step::EventArrives => self.event_arrives(rules)?,
            Step::SenderHearsTheEnd => {
                self.sender.machine.stop();
                self.sender_is_over();
            }
            Step::ReceiverHearsTheEnd => {
                self.receiver.told_closed = true;
                self.stream.events.clear();
                self.receive(rules, receiving::Event::Closed(error()))?;
            }
            Step::SenderDeadline | Step::EngineFails => self.stop(Why::Failed)?,
            Step::QuiescingTakesTooLong => {
                self.say(Message::Failure);
                self.sender_is_over();
            }
            Step::SenderDies => {
                self.sender_is_over();
                self.stream.broken = true;
            }
            Step::StreamBreaks => self.stream.broken = true,
            Step::EventRepeats => repeat_first(&mut self.stream.events),
            Step::CommandRepeats => repeat_first(&mut self.stream.commands),
            Step::LandedIsALie => self.say(Message::Landed),
            Step::Partition => self.partitioned = true,
            Step::ReceiverRestarts => self.receiver_restarts(),
            Step::BitFlips(block) => self.memory[block].layers[0] = Content::Wrong,
            Step::PieceBegins(_)
            | Step::PieceEnds(_)
            | Step::Refused(_)
            | Step::Acknowledged(_)
            | Step::Vanishes(_)
            | Step::Lost(_)
            | Step::LandsAgain(_) => self.write_goes_on(rules, step)?,
            Step::BlocksGranted
            | Step::NoBlocks
            | Step::AllocationFails
            | Step::OthersNeedBlocks
            | Step::FenceCloses
            | Step::FenceIsSlow
            | Step::VerificationEnds
            | Step::VerificationFails
            | Step::ClientLeaves
            | Step::ReceiverDeadline
            | Step::SenderSeemsStalled => self.receiver_goes_on(rules, step)?,
        }
        self.sender.machine.check_integrity();
        Ok(())
    }

    /// What must hold when nothing is left to happen.
    pub(crate) fn check_end(&self) -> Result<(), Violation> {
        let adopted = self.receiver.end == Some("adopted");
        let owner = if adopted { Owner::Adopted } else { Owner::Free };
        let open = matches!(self.gate, Gate::Open | Gate::Closing);
        match () {
            () if self.receiver.end.is_none() => Err("the receiver never ends"),
            () if self.sender.session != Session::Over => Err("the sender never ends"),
            () if !self.writes.is_empty() => Err("a write is in flight for ever"),
            () if open || self.receiver.background => Err("a grant stays open"),
            () if self.memory.iter().any(|block| block.owner != owner) => Err("blocks leak"),
            () => Ok(()),
        }
    }
}
