//! Walks one rank's list of steps over the wire: every collective runs through this one function.
//!
//! Sums are made of all contributions at once, in the fixed binary tree over ranks, in f32, and rounded once.

use super::exchange::{Channel, Header, Lane, Payload, Sent, Stopped};
use crate::collective::{Buffer as Room, Place, Reduce, Schedule, Step, tree};
use crate::cpu::memory::{Buffer, Pool};
use crate::dtype::{DType, Float, Slice, SliceMut};
use crate::mesh::Group;
use crate::tensor::Tensor;
use half::{bf16, f16};
use std::ops::Range;
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

/// Elements that are added up at a time: all sources of a block stay in the first-level cache.
const BLOCK: usize = 512;

impl Call {
    /// Runs the list; returns when every message was received on the other side.
    pub(super) fn run(&self, input: &Tensor, output: &mut Tensor) -> Result<(), Stopped> {
        let bytes = self.schedule.scratch * self.dtype.size();
        let mut rooms = Rooms {
            input,
            output,
            scratch: self.stage(bytes),
            dtype: self.dtype,
        };
        let mut sent = Vec::new();
        for step in &self.schedule.steps {
            match step {
                Step::Round { sends, receives } => {
                    for transfer in sends {
                        sent.push(self.send(&rooms, transfer.peer, &transfer.place)?);
                    }
                    for transfer in receives {
                        self.receive(&mut rooms, transfer.peer, &transfer.place)?;
                    }
                }
                Step::Reduce { sources, into } => rooms.combine(sources, into, self.reduce),
                Step::Copy { from, into } => rooms.copy(from, into),
            }
        }
        sent.into_iter()
            .try_for_each(|s: Sent| self.lane.wait_sent(s).map(drop))
    }

    fn stage(&self, bytes: usize) -> Buffer {
        self.staging
            .take(bytes)
            .unwrap_or_else(|_| unreachable!("the staging pool has no budget"))
    }

    fn send(&self, rooms: &Rooms, peer: usize, place: &Place) -> Result<Sent, Stopped> {
        let range = rooms.range(place);
        let payload = match place.buffer {
            Room::Input => Payload::Shared(rooms.input.clone(), range),
            // A later step may write there while the peer reads: the message takes a copy along.
            Room::Output | Room::Scratch => {
                let mut copy = self.stage(range.len());
                copy.as_bytes_mut()[..range.len()].copy_from_slice(rooms.bytes(place));
                Payload::Staged(copy, range.len())
            }
        };
        let to = self.group.rank(peer);
        let channel = Channel {
            from: self.lane.rank,
            to,
            call: self.call,
        };
        self.lane.start_send(channel, &self.header, payload)
    }

    fn receive(&self, rooms: &mut Rooms, peer: usize, place: &Place) -> Result<(), Stopped> {
        let from = self.group.rank(peer);
        let channel = Channel {
            from,
            to: self.lane.rank,
            call: self.call,
        };
        self.lane.receive(channel, &self.header, |bytes| {
            let into = rooms.bytes_mut(place);
            if bytes.len() != into.len() {
                return Err(format!(
                    "a message of {} bytes came where {} were expected",
                    bytes.len(),
                    into.len()
                ));
            }
            into.copy_from_slice(bytes);
            Ok(())
        })
    }
}

/// The three rooms that a schedule's places lie in.
struct Rooms<'a> {
    input: &'a Tensor,
    output: &'a mut Tensor,
    scratch: Buffer,
    dtype: DType,
}

impl Rooms<'_> {
    fn range(&self, place: &Place) -> Range<usize> {
        let size = self.dtype.size();
        place.start * size..(place.start + place.len) * size
    }

    fn bytes(&self, place: &Place) -> &[u8] {
        let range = self.range(place);
        match place.buffer {
            Room::Input => &self.input.bytes()[range],
            Room::Output => &self.output.bytes()[range],
            Room::Scratch => &self.scratch.as_bytes()[range],
        }
    }

    fn bytes_mut(&mut self, place: &Place) -> &mut [u8] {
        let range = self.range(place);
        match place.buffer {
            Room::Input => unreachable!("a schedule never writes its input"),
            Room::Output => &mut self.output.bytes_mut()[range],
            Room::Scratch => &mut self.scratch.as_bytes_mut()[range],
        }
    }

    fn copy(&mut self, from: &Place, into: &Place) {
        match (from.buffer, into.buffer) {
            (Room::Input, Room::Output) => {
                let (a, b) = (self.range(from), self.range(into));
                self.output.bytes_mut()[b].copy_from_slice(&self.input.bytes()[a]);
            }
            _ => {
                let copy = self.bytes(from).to_vec();
                self.bytes_mut(into).copy_from_slice(&copy);
            }
        }
    }

    fn combine(&mut self, sources: &[Place], into: &Place, reduce: Reduce) {
        match self.dtype {
            DType::F32 => self.combine_as::<f32>(sources, into, reduce),
            DType::Bf16 => self.combine_as::<bf16>(sources, into, reduce),
            DType::F16 => self.combine_as::<f16>(sources, into, reduce),
            DType::U32 => unreachable!("a collective over indices was refused before it began"),
        }
    }

    fn combine_as<T: Float>(&mut self, sources: &[Place], into: &Place, reduce: Reduce) {
        match reduce {
            Reduce::Sum => self.combine_by::<T>(sources, into, |a, b| a + b),
            // NaN wins over any number, on either side.
            Reduce::Max => {
                self.combine_by::<T>(
                    sources,
                    into,
                    |a, b| if a > b || a.is_nan() { a } else { b },
                )
            }
        }
    }

    // A closure for each reduction: a pointer to a function would be called for every element.
    fn combine_by<T: Float>(
        &mut self,
        sources: &[Place],
        into: &Place,
        op: impl Fn(f32, f32) -> f32,
    ) {
        if sources.is_empty() {
            return;
        }
        let mut blocks = vec![0f32; sources.len() * BLOCK];
        for begin in (0..into.len).step_by(BLOCK) {
            let len = BLOCK.min(into.len - begin);
            let part = |p: &Place| Place {
                start: p.start + begin,
                len,
                buffer: p.buffer,
            };
            for (source, block) in sources.iter().zip(blocks.chunks_exact_mut(BLOCK)) {
                let from = Slice::of_bytes(self.bytes(&part(source)), T::DTYPE).typed::<T>();
                let pairs = block.iter_mut().zip(from);
                pairs.for_each(|(x, y)| *x = y.to_f32());
            }
            for (left, right) in tree(sources.len()) {
                let (before, behind) = blocks.split_at_mut(right * BLOCK);
                let sum = &mut before[left * BLOCK..][..len];
                let pairs = sum.iter_mut().zip(&behind[..len]);
                pairs.for_each(|(x, y)| *x = op(*x, *y));
            }
            let to = SliceMut::of_bytes(self.bytes_mut(&part(into)), T::DTYPE).typed::<T>();
            let pairs = to.iter_mut().zip(&blocks[..len]);
            pairs.for_each(|(x, y)| *x = T::from_f32(*y));
        }
    }
}
