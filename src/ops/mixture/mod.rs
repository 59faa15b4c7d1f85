//! Mixtures of experts: which experts a token goes to, which place it gets there, and the way there and back.
//!
//! | op | from | to |
//! |---|---|---|
//! | [`Route`] | scores [b, t, e] | weights and numbers of each token's experts [b, t, k] |
//! | [`Slots`] | those numbers | a place in the experts' buffers for each assignment, within a static capacity |
//! | [`Dispatch`] | tokens [b, t, c] | the experts' buffers [e, b, s, c] |
//! | [`Combine`] | what the experts made of them [e, b, s, c] | tokens [b, t, c] |
//! | [`BalanceLoss`] | scores and numbers | how uneven each sequence's load is [b] |
//! | [`JoinLoss`] | any value and a loss [b] | the value; the loss takes part in the backward |
//! | [`BalanceBias`] | loads | what is added to scores for the choice, between steps |
//!
//! Letters: e experts, k experts of a token, s slots of an expert in one sequence. A slot is numbered `e s + place`, an
//! assignment `t k + j` within its sequence; [`NONE`] stands for no slot and for nothing in a slot.
//!
//! Between dispatch and combine the experts' products are one batched [`Matmul`](super::Matmul), [e, b, s, c] by [e, c, f].
//! An axis of the mesh that splits sequences becomes one that splits experts by an all-to-all of the buffers.

mod balance;
mod bias;
mod combine;
mod dispatch;
mod route;
mod slots;

pub use balance::{BalanceLoss, JoinLoss};
pub use bias::BalanceBias;
pub use combine::Combine;
pub use dispatch::Dispatch;
pub use route::Route;
pub use slots::Slots;

use super::Site;
use crate::cpu::rows::Picked;

/// No slot, or nothing in a slot.
pub const NONE: u32 = u32::MAX;

/// Which part of the experts' buffers [e, b, s, ..] a chip holds, and the sizes that number its slots.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers {
    /// Sequences on this chip.
    pub(crate) b: usize,
    /// Experts of each token.
    pub(crate) k: usize,
    /// Assignments of a sequence: tokens times k.
    pub(crate) assignments: usize,
    /// First expert on this chip.
    pub(crate) first_expert: usize,
    /// Experts on this chip.
    pub(crate) experts: usize,
    /// Slots of an expert in one sequence, over all chips.
    pub(crate) capacity: usize,
    /// First slot on this chip.
    pub(crate) first_slot: usize,
    /// Slots on this chip.
    pub(crate) slots: usize,
}

impl Buffers {
    /// Of the operands at these positions of a site: one that lies as the buffers do, and the slots [b, t, k].
    pub(crate) fn of(site: &Site, like_buffers: usize, slots: usize) -> Self {
        let (held, slots) = (&site.inputs[like_buffers], &site.inputs[slots]);
        let [b, t, k] = slots.ty.shape[..] else {
            unreachable!("infer wants slots of three axes")
        };
        Buffers {
            b,
            k,
            assignments: t * k,
            first_expert: held.start[0],
            experts: held.ty.shape[0],
            capacity: held.global[2],
            first_slot: held.start[2],
            slots: held.ty.shape[2],
        }
    }

    /// The row of the buffers, [e b s] on this chip, that holds choice `j` of the token in row `i` of [b t]; none if it was
    /// dropped or is on another chip.
    #[inline]
    pub(crate) fn row_of(&self, slots: &[u32], i: usize, j: usize) -> Option<usize> {
        let slot = slots[i * self.k + j];
        if slot == NONE {
            return None;
        }
        let (expert, place) = (slot as usize / self.capacity, slot as usize % self.capacity);
        let expert = expert.checked_sub(self.first_expert)?;
        let place = place.checked_sub(self.first_slot)?;
        let sequence = i * self.k / self.assignments;
        (expert < self.experts && place < self.slots)
            .then_some((expert * self.b + sequence) * self.slots + place)
    }

    /// The assignment in row `i` of the buffers, [e b s] on this chip, as its number over all sequences of the chip.
    #[inline]
    pub(crate) fn assignment_of(&self, origin: &[u32], i: usize) -> Option<usize> {
        let sequence = i / self.slots % self.b;
        (origin[i] != NONE).then(|| sequence * self.assignments + origin[i] as usize)
    }

    /// Picks for [`mix`](crate::cpu::rows::mix) of tokens from the buffers.
    pub(crate) fn by_slot<'a>(
        self,
        slots: &'a [u32],
        weights: Option<&'a [f32]>,
    ) -> impl Fn(usize, usize) -> Picked + Sync + 'a {
        move |i, j| {
            let factor = weights.map_or(1.0, |w| w[i * self.k + j]);
            self.row_of(slots, i, j).map(|row| (row, factor))
        }
    }

    /// Picks of the buffers' rows from tokens.
    pub(crate) fn by_origin<'a>(
        self,
        origin: &'a [u32],
        weights: Option<&'a [f32]>,
    ) -> impl Fn(usize, usize) -> Picked + Sync + 'a {
        move |i, _| {
            let at = self.assignment_of(origin, i)?;
            Some((at / self.k, weights.map_or(1.0, |w| w[at])))
        }
    }

    /// The same sizes for a graphics processor.
    #[cfg(feature = "gpu")]
    pub(crate) fn on_gpu(self, width: usize) -> crate::gpu::Buffers {
        crate::gpu::Buffers {
            width,
            b: self.b,
            k: self.k,
            assignments: self.assignments,
            first_expert: self.first_expert,
            experts: self.experts,
            capacity: self.capacity,
            first_slot: self.first_slot,
            slots: self.slots,
        }
    }
}
