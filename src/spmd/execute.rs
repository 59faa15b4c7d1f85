//! Walks one rank's list of steps over the wire: every collective runs through this one function.

use super::exchange::{Arrived, Channel, Header, Lane, Sent, Stopped};
use super::payload::{Payload, Piece};
use super::rooms::Rooms;
use crate::collective::{Place, Reduce, Schedule, Step, Transfer};
use crate::cpu::memory::{Buffer, Pool};
use crate::dtype::DType;
use crate::mesh::Group;
use crate::tensor::Tensor;
use std::sync::Arc;

/// One collective call of one rank.
pub(super) struct Call {
    pub lane: Lane,
    pub group: Group,
    /// Axis and number of the call, by which both sides of a message find each other.
    pub call: (usize, u64),
    pub header: Arc<Header>,
    pub schedule: Schedule,
    pub reduce: Reduce,
    pub dtype: DType,
    pub staging: Pool,
}

impl Call {
    /// Runs the list, over pieces that are one input and tensors that are one output when they lie one behind the other; returns
    /// when every message was received on the other side.
    pub(super) fn run(&self, input: &[Piece], output: &mut [Tensor]) -> Result<(), Stopped> {
        let needs = (self.dtype, self.schedule.scratch);
        let mut rooms = Rooms::new(input, output, needs, self.staging.clone());
        let mut sent = Vec::new();
        for (number, step) in self.schedule.steps.iter().enumerate() {
            match step {
                Step::Round { sends, receives } => {
                    self.send(&rooms, sends, &mut sent)?;
                    for transfer in receives {
                        let arrived = self.take(transfer)?;
                        let later = &self.schedule.steps[number + 1..];
                        let done = rooms.arrive(&transfer.place, arrived, later);
                        done.into_iter().for_each(|a| self.lane.acknowledge(a));
                    }
                }
                Step::Reduce { sources, into } => {
                    let done = rooms.sum(sources, into, self.reduce);
                    done.into_iter().for_each(|a| self.lane.acknowledge(a));
                }
                Step::Copy { from, into } => rooms.copy(from, into),
            }
        }
        sent.into_iter()
            .try_for_each(|s| self.lane.wait_sent(s).map(drop))
    }

    fn send(&self, rooms: &Rooms, sends: &[Transfer], sent: &mut Vec<Sent>) -> Result<(), Stopped> {
        // What goes to several peers is copied once.
        let mut copied: Option<(Place, Arc<Buffer>, usize)> = None;
        for Transfer { peer, place } in sends {
            let again = copied.as_ref().filter(|(at, ..)| at == place);
            let payload = match again {
                Some((_, buffer, len)) => Payload::Staged(buffer.clone(), *len),
                None => rooms.outgoing(place),
            };
            if let Payload::Staged(buffer, len) = &payload {
                copied = Some((*place, buffer.clone(), *len));
            }
            let channel = self.channel(self.lane.rank, self.group.rank(*peer));
            sent.push(self.lane.start_send(channel, &self.header, payload)?);
        }
        Ok(())
    }

    fn take(&self, transfer: &Transfer) -> Result<Arrived, Stopped> {
        let channel = self.channel(self.group.rank(transfer.peer), self.lane.rank);
        let bytes = transfer.place.len * self.dtype.size();
        self.lane.take(channel, &self.header, bytes)
    }

    fn channel(&self, from: usize, to: usize) -> Channel {
        Channel {
            from,
            to,
            call: self.call,
        }
    }
}

#[cfg(test)]
mod tests;
