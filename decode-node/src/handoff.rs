//! The life of one handoff on the side that receives: when memory is offered to a prefill node, and when it may be
//! used again.
//!
//! ```text
//! Requested ─Started─> Allocating ─Allocated─> Offered ─Landed─> Fencing ─Fenced─> Verifying ─> Adopted
//!     │                    │                      │ anything else    │ Fenced           │ wrong bytes
//!     └────────────────────┴──> Aborted           └─────────────> Fencing ──> Aborted <──┘
//! ```
//!
//! A fence that does not close in time ends the handoff as well (`Fencing ─FenceSlow─> Aborted`): then the memory stays
//! with the grant, which the shell keeps until its fence has closed.
//!
//! Invariant: memory that was offered is freed or adopted only behind the fence of our own transport. What the
//! prefill node says (`Landed`, `Quiesced`, its failure) decides how the handoff ends, but is never taken as proof
//! that it writes no more.
//!
//! A pure state machine. Every event gives one [`Action`], whose result is the next event. Events of the stream, the
//! deadline and the client arrive at any time, more than once and late; those that change nothing give
//! [`Action::Wait`]. After an [`Action::End`] there is nothing left to do.
//! Elsewhere: the stream, the memory and the clock (`receive.rs`).

use types::{Error, ErrorCode, TransferId};

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prefill node takes the prompt and wants this many blocks.
    Started {
        /// Blocks that the offer must hold.
        blocks: u64,
    },
    /// [`Action::Allocate`] succeeded, and write access is granted.
    Allocated,
    /// [`Action::Allocate`] found no memory in time, or others need what the request holds while it waits.
    Short,
    /// [`Action::Allocate`] failed otherwise.
    AllocationFailed(Error),
    /// The prefill node says that all is written.
    Landed {
        /// The offer it is about.
        transfer: TransferId,
        /// How many checksums it gives.
        checksums: usize,
    },
    /// The prefill node gave up.
    Failed(Error),
    /// The prefill node answers an abort that we did not send.
    Quiesced,
    /// The stream ended or broke.
    Closed(Error),
    /// The handoff took too long.
    DeadlinePassed,
    /// The prefill node says nothing any more, although its connection is open.
    Stalled(Error),
    /// Nobody wants the result any more.
    Cancelled,
    /// [`Action::Fence`] is done.
    Fenced,
    /// [`Action::Fence`] takes too long to be waited for. It goes on, and the memory is free once it is done.
    FenceSlow(Error),
    /// [`Action::Verify`] found every byte right; full blocks are in the store.
    Verified,
    /// [`Action::Verify`] found wrong bytes.
    Corrupt(Error),
    /// [`Action::Verify`] could not be done.
    Unverified(Error),
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Nothing: the next event will come from outside.
    Wait,
    /// Find blocks and grant write access to them. Answer with `Allocated`, `Short` or `AllocationFailed`.
    Allocate,
    /// Send the offer.
    Offer,
    /// Tell the prefill node to stop, if `abort`, and close the fence. Answer with `Fenced` or `FenceSlow`.
    Fence {
        /// Whether the prefill node may not know yet that it is over.
        abort: bool,
    },
    /// Compare the checksums and adopt what is right. Answer with `Verified`, `Corrupt` or `Unverified`.
    Verify,
    /// It is over, in the way of the outcome. Whatever memory is not adopted is free again, or will be once a fence that
    /// was slow has closed.
    End(Outcome),
}

/// How a handoff ends.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The blocks are ours, and right.
    Adopted,
    /// There was no memory for it. The request can wait for some in the batch's queue.
    Short,
    /// Nobody wanted it any more.
    Cancelled,
    /// The deadline passed.
    TimedOut,
    /// The bytes were wrong.
    Corrupt(Error),
    /// The prefill node, the way to it, or the protocol failed.
    Failed(Error),
}

impl Outcome {
    /// The label of the metric that counts handoffs.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Adopted => "adopted",
            Self::Short => "short",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
            Self::Corrupt(_) => "corrupt",
            Self::Failed(_) => "failed",
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    /// `Start` is sent. No memory is involved.
    Requested,
    /// The shell looks for blocks.
    Allocating,
    /// The prefill node may write.
    Offered,
    /// The fence closes. `next` is what follows; `None` is the good way.
    Fencing(Option<Outcome>),
    /// Behind the fence, bytes are compared. The result may not be wanted any more.
    Verifying(Option<Outcome>),
    /// The outcome was given.
    Ended,
}

/// One handoff.
#[derive(Debug, Clone)]
pub struct Handoff {
    transfer: TransferId,
    /// Blocks that are to be filled.
    blocks: usize,
    state: State,
    /// What ended it while the shell was looking for blocks.
    interrupted: Option<Outcome>,
}

impl Handoff {
    /// A handoff whose `Start` is sent, and which fills `blocks` blocks.
    pub fn new(transfer: TransferId, blocks: usize) -> Self {
        Self {
            transfer,
            blocks,
            state: State::Requested,
            interrupted: None,
        }
    }

    /// Whether the prefill node has not started.
    pub fn is_requested(&self) -> bool {
        self.state == State::Requested
    }

    /// Whether the prefill node can be writing into our memory, as far as we know.
    pub fn exposed(&self) -> bool {
        matches!(self.state, State::Offered | State::Fencing(_))
    }

    /// Takes one event and says what to do.
    pub fn on(&mut self, event: Event) -> Action {
        match self.state {
            State::Requested => self.on_requested(event),
            State::Allocating => self.on_allocating(event),
            State::Offered => self.on_offered(event),
            State::Fencing(_) => self.on_fencing(event),
            State::Verifying(_) => self.on_verifying(event),
            State::Ended => Action::Wait,
        }
    }

    fn on_requested(&mut self, event: Event) -> Action {
        match event {
            Event::Started { blocks } if blocks == self.blocks as u64 => {
                self.state = State::Allocating;
                Action::Allocate
            }
            Event::Started { blocks } => {
                let expected = self.blocks;
                self.end(Outcome::Failed(Error::internal(format!(
                    "the prefill node asks for {blocks} blocks, but {expected} are missing here"
                ))))
            }
            Event::Landed { .. } => self.end(protocol("landed before an offer")),
            Event::Quiesced => self.end(protocol("quiesced without an abort")),
            Event::Failed(error) | Event::Closed(error) => self.end(Outcome::Failed(error)),
            Event::DeadlinePassed => self.end(Outcome::TimedOut),
            Event::Stalled(error) => self.end(Outcome::Failed(error)),
            Event::Cancelled => self.end(Outcome::Cancelled),
            Event::Short => self.end(Outcome::Short),
            Event::Allocated
            | Event::AllocationFailed(_)
            | Event::Fenced
            | Event::FenceSlow(_)
            | Event::Verified
            | Event::Corrupt(_)
            | Event::Unverified(_) => Action::Wait,
        }
    }

    /// The shell answers in bounded time, and only its answer says whether there is a grant to be closed; so what
    /// ends the handoff meanwhile is remembered until then.
    fn on_allocating(&mut self, event: Event) -> Action {
        match event {
            Event::Allocated => match self.interrupted.take() {
                None => {
                    self.state = State::Offered;
                    Action::Offer
                }
                Some(outcome) => self.fence(outcome),
            },
            Event::Short => {
                let outcome = self.interrupted.take().unwrap_or(Outcome::Short);
                self.end(outcome)
            }
            Event::AllocationFailed(error) => {
                let outcome = self.interrupted.take().unwrap_or(Outcome::Failed(error));
                self.end(outcome)
            }
            Event::Started { .. } => self.interrupt(protocol("started twice")),
            Event::Landed { .. } => self.interrupt(protocol("landed before an offer")),
            Event::Quiesced => self.interrupt(protocol("quiesced without an abort")),
            Event::Failed(error) | Event::Closed(error) => self.interrupt(Outcome::Failed(error)),
            Event::DeadlinePassed => self.interrupt(Outcome::TimedOut),
            Event::Stalled(error) => self.interrupt(Outcome::Failed(error)),
            Event::Cancelled => self.interrupt(Outcome::Cancelled),
            Event::Fenced
            | Event::FenceSlow(_)
            | Event::Verified
            | Event::Corrupt(_)
            | Event::Unverified(_) => Action::Wait,
        }
    }

    fn on_offered(&mut self, event: Event) -> Action {
        match event {
            Event::Landed { transfer, checksums } => {
                if transfer != self.transfer || checksums != self.blocks {
                    let (expected, blocks) = (self.transfer, self.blocks);
                    return self.fence(Outcome::Failed(Error::internal(format!(
                        "transfer {transfer} landed with {checksums} checksums, but {expected} is open with {blocks} \
                         blocks"
                    ))));
                }
                self.state = State::Fencing(None);
                Action::Fence { abort: false }
            }
            Event::Started { .. } => self.fence(protocol("started twice")),
            Event::Quiesced => self.fence(protocol("quiesced without an abort")),
            Event::Failed(error) | Event::Closed(error) => {
                self.state = State::Fencing(Some(Outcome::Failed(error)));
                Action::Fence { abort: false }
            }
            Event::DeadlinePassed => self.fence(Outcome::TimedOut),
            Event::Stalled(error) => self.fence(Outcome::Failed(error)),
            Event::Cancelled => self.fence(Outcome::Cancelled),
            Event::Allocated
            | Event::Short
            | Event::AllocationFailed(_)
            | Event::Fenced
            | Event::FenceSlow(_)
            | Event::Verified
            | Event::Corrupt(_)
            | Event::Unverified(_) => Action::Wait,
        }
    }

    fn on_fencing(&mut self, event: Event) -> Action {
        let State::Fencing(next) = &mut self.state else {
            return Action::Wait;
        };
        match event {
            Event::Fenced => match next.take() {
                None => {
                    self.state = State::Verifying(None);
                    Action::Verify
                }
                Some(outcome) => self.end(outcome),
            },
            // Nothing is known to be wrong with the bytes, but nobody waits for them; elsewhere it goes on at once.
            Event::FenceSlow(error) => {
                let outcome = next.take().unwrap_or(Outcome::Failed(error));
                self.end(outcome)
            }
            Event::Cancelled => {
                next.get_or_insert(Outcome::Cancelled);
                Action::Wait
            }
            Event::DeadlinePassed => {
                next.get_or_insert(Outcome::TimedOut);
                Action::Wait
            }
            // All that was to be learned from the stream is known: what comes late changes nothing.
            Event::Started { .. }
            | Event::Allocated
            | Event::Short
            | Event::AllocationFailed(_)
            | Event::Landed { .. }
            | Event::Failed(_)
            | Event::Quiesced
            | Event::Closed(_)
            | Event::Stalled(_)
            | Event::Verified
            | Event::Corrupt(_)
            | Event::Unverified(_) => Action::Wait,
        }
    }

    fn on_verifying(&mut self, event: Event) -> Action {
        let State::Verifying(interrupted) = &mut self.state else {
            return Action::Wait;
        };
        match event {
            Event::Verified => {
                let outcome = interrupted.take().unwrap_or(Outcome::Adopted);
                self.end(outcome)
            }
            Event::Corrupt(error) => self.end(Outcome::Corrupt(error)),
            Event::Unverified(error) => self.end(Outcome::Failed(error)),
            Event::Cancelled => {
                interrupted.get_or_insert(Outcome::Cancelled);
                Action::Wait
            }
            Event::DeadlinePassed => {
                interrupted.get_or_insert(Outcome::TimedOut);
                Action::Wait
            }
            Event::Started { .. }
            | Event::Allocated
            | Event::Short
            | Event::AllocationFailed(_)
            | Event::Landed { .. }
            | Event::Failed(_)
            | Event::Quiesced
            | Event::Closed(_)
            | Event::Stalled(_)
            | Event::Fenced
            | Event::FenceSlow(_) => Action::Wait,
        }
    }

    fn interrupt(&mut self, outcome: Outcome) -> Action {
        self.interrupted.get_or_insert(outcome);
        Action::Wait
    }

    fn fence(&mut self, outcome: Outcome) -> Action {
        self.state = State::Fencing(Some(outcome));
        Action::Fence { abort: true }
    }

    fn end(&mut self, outcome: Outcome) -> Action {
        self.state = State::Ended;
        Action::End(outcome)
    }
}

fn protocol(what: &str) -> Outcome {
    Outcome::Failed(Error::new(
        ErrorCode::Internal,
        format!("the prefill node broke the protocol: {what}"),
    ))
}

#[cfg(test)]
mod tests;
