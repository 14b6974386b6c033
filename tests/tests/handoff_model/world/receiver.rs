//! The decode node's shell, its transport and its memory.

use decode_node::handoff as receiving;

use super::{
    Block, Command, Content, Gate, Message, Mutation, Owner, Rules, Session, Step, TRANSFER, Violation, Work,
    World, error,
};

impl World {
    pub(super) fn event_arrives(&mut self, rules: &Rules) -> Result<(), Violation> {
        let event = match self.stream.events.pop_front() {
            Some(Message::Started) => receiving::Event::Started {
                blocks: rules.pushed() as u64,
            },
            Some(Message::Landed) => receiving::Event::Landed {
                transfer: TRANSFER,
                checksums: rules.pushed(),
            },
            Some(Message::Failure) => receiving::Event::Failed(error()),
            Some(Message::Quiesced) => receiving::Event::Quiesced,
            None => return Ok(()),
        };
        self.receive(rules, event)
    }

    /// One more event for the receiver's machine, and what it says is to be done.
    pub(super) fn receive(&mut self, rules: &Rules, event: receiving::Event) -> Result<(), Violation> {
        match self.receiver.machine.on(event) {
            receiving::Action::Wait => {}
            receiving::Action::Allocate => self.begin(Work::Allocate)?,
            receiving::Action::Offer => self.command(Command::Offer),
            receiving::Action::Fence { abort } => {
                if abort {
                    self.command(Command::Abort);
                }
                self.gate = Gate::Closing;
                self.begin(Work::Fence)?;
                if rules.mutation == Mutation::FencedTooEarly {
                    self.receiver.work = None;
                    self.receive(rules, receiving::Event::Fenced)?;
                }
            }
            receiving::Action::Verify => self.begin(Work::Verify)?,
            receiving::Action::End(outcome) => self.receiver_ends(rules, &outcome)?,
        }
        Ok(())
    }

    pub(super) fn begin(&mut self, work: Work) -> Result<(), Violation> {
        if self.receiver.work.replace(work).is_some() {
            return Err("the receiver's shell is to do two things at once");
        }
        Ok(())
    }

    pub(super) fn command(&mut self, command: Command) {
        if !self.stream.broken && self.sender.session == Session::Active {
            self.stream.commands.push_back(command);
        }
    }

    pub(super) fn receiver_ends(
        &mut self,
        rules: &Rules,
        outcome: &receiving::Outcome,
    ) -> Result<(), Violation> {
        if self.receiver.work.is_some() {
            return Err("the end overtakes what is being done");
        }
        self.receiver.end = Some(outcome.as_str());
        self.stream.receiver_gone = true;
        self.stream.events.clear();
        if *outcome == receiving::Outcome::Adopted {
            let right = |block: &Block| block.layers.iter().all(|layer| *layer == Content::Right);
            if !self.memory.iter().all(right) {
                return Err("wrong bytes are adopted");
            }
            if self.gate != Gate::Closed {
                return Err("blocks are adopted that a peer may still write");
            }
            self.give_memory_to(Owner::Adopted);
        } else if !self.receiver.background || rules.mutation == Mutation::SlowFenceFrees {
            self.give_memory_to(Owner::Free);
        }
        Ok(())
    }

    pub(super) fn give_memory_to(&mut self, owner: Owner) {
        for block in &mut self.memory {
            if block.owner == Owner::Granted {
                block.owner = owner;
                block.generation += 1;
                block.layers.fill(Content::Empty);
            }
        }
    }

    pub(super) fn receiver_goes_on(&mut self, rules: &Rules, step: Step) -> Result<(), Violation> {
        let event = match step {
            Step::BlocksGranted => {
                self.receiver.work = None;
                self.gate = Gate::Open;
                for block in &mut self.memory {
                    block.owner = Owner::Granted;
                }
                receiving::Event::Allocated
            }
            Step::NoBlocks => {
                self.receiver.work = None;
                receiving::Event::Short
            }
            Step::AllocationFails => {
                self.receiver.work = None;
                receiving::Event::AllocationFailed(error())
            }
            Step::OthersNeedBlocks => receiving::Event::Short,
            Step::FenceCloses => {
                self.gate = Gate::Closed;
                if self.receiver.background {
                    self.receiver.background = false;
                    self.give_memory_to(Owner::Free);
                    return Ok(());
                }
                if self.receiver.work != Some(Work::Fence) {
                    return Ok(());
                }
                self.receiver.work = None;
                receiving::Event::Fenced
            }
            Step::FenceIsSlow => {
                self.receiver.work = None;
                self.receiver.background = true;
                receiving::Event::FenceSlow(error())
            }
            Step::VerificationEnds => {
                self.receiver.work = None;
                let right = |block: &Block| block.layers.iter().all(|layer| *layer == Content::Right);
                if rules.mutation == Mutation::Unverified || self.memory.iter().all(right) {
                    receiving::Event::Verified
                } else {
                    receiving::Event::Corrupt(error())
                }
            }
            Step::VerificationFails => {
                self.receiver.work = None;
                receiving::Event::Unverified(error())
            }
            Step::ClientLeaves => {
                self.receiver.interrupted = true;
                receiving::Event::Cancelled
            }
            Step::ReceiverDeadline => {
                self.receiver.interrupted = true;
                receiving::Event::DeadlinePassed
            }
            _ => {
                self.receiver.told_stalled = true;
                receiving::Event::Stalled(error())
            }
        };
        self.receive(rules, event)
    }

    /// The process dies with everything in it; the next one has the same address, and gives the same memory to others.
    pub(super) fn receiver_restarts(&mut self) {
        self.restarted = true;
        self.epoch += 1;
        self.gate = Gate::Foreign;
        self.receiver.end = Some("died");
        self.receiver.work = None;
        self.receiver.background = false;
        self.stream.broken = true;
        self.stream.events.clear();
        for block in &mut self.memory {
            block.owner = Owner::Free;
            block.generation += 1;
            block.layers.fill(Content::Empty);
        }
        for write in &mut self.writes {
            write.touching = false;
        }
    }
}
