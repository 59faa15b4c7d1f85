//! What goes between stages, and when a sender may be sure that it has arrived.
//!
//! A message is received right before the piece that needs it and sent right behind the piece that made it. A send counts as
//! complete only when it was received, so no stage waits for its sends at once: it starts them, and waits for one where a later
//! message from the receiver proves that it was received. Such a wait never blocks, so no order of pieces that can run at all
//! can deadlock, and what was sent is kept no longer than it must be.

use super::{Piece, Plan, Work};
use std::collections::HashMap;

/// A value or gradient of one micro-batch on its way between neighbouring parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Message {
    /// True for a gradient, which goes to the part before; false for values, which go to the part behind.
    pub gradient: bool,
    /// The part that takes it.
    pub part: usize,
    /// The micro-batch.
    pub micro: usize,
    /// The stage that sends it.
    pub from: usize,
    /// The stage that receives it.
    pub to: usize,
}

/// One thing that a stage does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Receives a message.
    Receive(Message),
    /// Computes.
    Run(Piece),
    /// Starts to send.
    Send(Message),
    /// Waits until a message that it sent was received.
    Wait(Message),
}

impl Plan {
    /// What every stage does in a step, messages included.
    pub fn actions(&self) -> Vec<Vec<Action>> {
        self.with_messages(&self.lists())
    }

    /// What every stage does when values alone are wanted: the forwards, in the schedule's order.
    pub fn forward_actions(&self) -> Vec<Vec<Action>> {
        let mut lists = self.lists();
        for list in &mut lists {
            list.retain(|piece| piece.work == Work::Forward);
        }
        self.with_messages(&lists)
    }

    /// The message that a piece needs from another stage, if it does.
    fn needed(&self, stage: usize, piece: &Piece) -> Option<Message> {
        let part = self.part(stage, piece.chunk);
        let (gradient, from) = match piece.work {
            Work::Forward => (false, part.checked_sub(1)?),
            Work::Weights => return None,
            _ => (true, Some(part + 1).filter(|next| *next < self.parts())?),
        };
        self.message(gradient, from, part, piece.micro)
    }

    /// The message that a piece makes for another stage, if it does.
    fn made(&self, stage: usize, piece: &Piece) -> Option<Message> {
        let part = self.part(stage, piece.chunk);
        let (gradient, to) = match piece.work {
            Work::Forward => (false, Some(part + 1).filter(|next| *next < self.parts())?),
            Work::Weights => return None,
            _ => (true, part.checked_sub(1)?),
        };
        self.message(gradient, part, to, piece.micro)
    }

    fn message(&self, gradient: bool, from: usize, to: usize, micro: usize) -> Option<Message> {
        let message = Message {
            gradient,
            part: to,
            micro,
            from: self.place(from).0,
            to: self.place(to).0,
        };
        (message.from != message.to).then_some(message)
    }

    fn with_messages(&self, lists: &[Vec<Piece>]) -> Vec<Vec<Action>> {
        let proofs = self.proofs(lists);
        let one = |stage: usize| {
            let mut actions = Vec::new();
            // Waits that no message proves: at the end everything was received or is about to be.
            let mut open: Vec<Message> = Vec::new();
            for piece in &lists[stage] {
                if let Some(message) = self.needed(stage, piece) {
                    actions.push(Action::Receive(message));
                    let proven = |sent: &Message| proofs.get(sent) == Some(&message);
                    actions.extend(open.iter().copied().filter(proven).map(Action::Wait));
                    open.retain(|sent| !proven(sent));
                }
                actions.push(Action::Run(*piece));
                if let Some(message) = self.made(stage, piece) {
                    actions.push(Action::Send(message));
                    open.push(message);
                }
            }
            actions.extend(open.into_iter().map(Action::Wait));
            actions
        };
        (0..self.stages).map(one).collect()
    }

    /// For each message the first one that its receiver sends back after it has received it.
    fn proofs(&self, lists: &[Vec<Piece>]) -> HashMap<Message, Message> {
        let mut proofs = HashMap::new();
        for (stage, list) in lists.iter().enumerate() {
            // From the end, so that the next message to each stage is known.
            let mut next: HashMap<usize, Message> = HashMap::new();
            for piece in list.iter().rev() {
                if let Some(made) = self.made(stage, piece) {
                    next.insert(made.to, made);
                }
                if let Some(needed) = self.needed(stage, piece)
                    && let Some(answer) = next.get(&needed.from)
                {
                    proofs.insert(needed, *answer);
                }
            }
        }
        proofs
    }
}
