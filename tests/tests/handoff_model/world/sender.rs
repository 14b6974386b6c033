//! The prefill node's session, its engine, and its writes on their way.

use prefill_node::handoff as sending;

use super::{Content, Message, Mutation, Owner, Rules, Session, Step, Violation, Why, World, Write};

impl World {
    pub(super) fn engine_goes_on(&mut self, rules: &Rules) -> Result<(), Violation> {
        let sender = &mut self.sender;
        if !sender.started {
            sender.started = true;
            sender.machine.start(rules.held_blocks);
            self.say(Message::Started);
            return Ok(());
        }
        let done = sender.computed;
        sender.computed += 1;
        if done == rules.pushed() * rules.layers {
            sender.machine.computed();
        } else {
            let block = rules.held_blocks + done / rules.layers;
            sender.machine.written(done % rules.layers, block + 1);
        }
        self.pump(rules);
        Ok(())
    }

    /// What the session does after whatever it heard: begin writes, and tell when all have landed.
    pub(super) fn pump(&mut self, rules: &Rules) {
        if self.sender.session != Session::Active {
            return;
        }
        while let Some(write) = self.sender.machine.next_write() {
            let pieces = write.pieces.iter().flat_map(|piece| {
                let layers = piece.layers.clone();
                let blocks = piece.blocks.clone();
                blocks.flat_map(move |block| layers.clone().map(move |layer| (block, layer)))
            });
            self.writes.push(Write {
                id: write.id,
                pieces: pieces
                    .map(|(block, layer)| (block - rules.held_blocks, layer))
                    .collect(),
                landed: 0,
                touching: false,
                late: false,
                epoch: 0,
                generation: 0,
            });
        }
        if self.sender.machine.phase() == sending::Phase::Flushed {
            self.sender.machine.land();
            self.say(Message::Landed);
            self.sender_is_over();
        }
    }

    /// The session ends early: it lets its writes end, and then says how it went.
    pub(super) fn stop(&mut self, why: Why) -> Result<(), Violation> {
        self.sender.machine.stop();
        self.sender.session = Session::Settling(why);
        self.stream.commands.clear();
        self.settle()
    }

    pub(super) fn settle(&mut self) -> Result<(), Violation> {
        let (Session::Settling(why), sending::Phase::Stopped { quiesced }) =
            (self.sender.session, self.sender.machine.phase())
        else {
            return Ok(());
        };
        let quiet = why == Why::Aborted && quiesced;
        if quiet && !self.writes.is_empty() {
            return Err("quiesced while a write is under way");
        }
        self.say(if quiet {
            Message::Quiesced
        } else {
            Message::Failure
        });
        self.sender_is_over();
        Ok(())
    }

    /// Nobody waits for its writes any more, and nobody reads what it is told.
    pub(super) fn sender_is_over(&mut self) {
        self.sender.session = Session::Over;
        self.stream.commands.clear();
        for write in &mut self.writes {
            write.late = true;
        }
    }

    pub(super) fn say(&mut self, message: Message) {
        if !self.stream.broken && self.receiver.end.is_none() {
            self.stream.events.push_back(message);
        }
    }

    pub(super) fn write_goes_on(&mut self, rules: &Rules, step: Step) -> Result<(), Violation> {
        match step {
            Step::PieceBegins(index) => self.writes[index].touching = true,
            Step::PieceEnds(index) => {
                let write = &mut self.writes[index];
                let (block, layer) = write.pieces[write.landed];
                write.landed += 1;
                write.touching = false;
                let generation = write.generation;
                let block = &mut self.memory[block];
                if block.owner != Owner::Granted || block.generation != generation {
                    return Err("a write lands in memory that belongs to somebody else");
                }
                block.layers[layer] = Content::Right;
            }
            Step::LandsAgain(index) => self.writes[index].landed -= 1,
            Step::Vanishes(index) => drop(self.writes.remove(index)),
            Step::Acknowledged(index) => {
                let write = self.writes.remove(index);
                self.sender.machine.acknowledged(write.id);
                self.pump(rules);
                self.settle()?;
            }
            Step::Refused(index) => {
                let write = self.writes.remove(index);
                self.write_failed(write.id, false)?;
            }
            Step::Lost(index) => {
                let write = &mut self.writes[index];
                write.late = true;
                let id = write.id;
                self.write_failed(id, rules.mutation != Mutation::LostIsSettled)?;
            }
            other => unreachable!("{other:?} is no step of a write"),
        }
        Ok(())
    }

    pub(super) fn write_failed(
        &mut self,
        id: sending::WriteId,
        may_still_land: bool,
    ) -> Result<(), Violation> {
        self.sender.machine.write_failed(id, may_still_land);
        match self.sender.session {
            Session::Active => self.stop(Why::Failed),
            Session::Settling(_) => self.settle(),
            Session::Over => Ok(()),
        }
    }
}
