//! Places in the experts' buffers.

#[cfg(feature = "gpu")]
use super::super::device::{read, write};
use super::super::{Axes, Cost, Op, Site, misfit, traffic};
use super::NONE;
use crate::dtype::DType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};
use std::sync::Arc;

/// A place for each assignment: an expert has `capacity` slots in every sequence, filled in the order of tokens and, within a
/// token, of its choices; what finds its expert full is dropped (the capacity of Lepikhin et al. 2020, per sequence).
///
/// - experts [b, t, k] in u32, numbers below `experts`; a token names an expert once;
/// - result 0: each assignment's slot [b, t, k] in u32, `expert capacity + place`, or [`NONE`];
/// - result 1: each slot's assignment [e, b, s] in u32, `t k + j`, or [`NONE`];
/// - result 2: [2, e] in f32: how many assignments asked for each expert, and how many of them were dropped.
///
/// Letters: `bTK->bTK,EbS,XE`: counts over a split batch are partial sums. So what a sequence loses depends on it alone, not
/// on the mesh. No gradient.
///
/// # Panics
/// If a number is not below `experts`.
#[derive(Clone, Debug)]
pub struct Slots {
    /// Experts, e.
    pub experts: usize,
    /// Slots of each in one sequence, s.
    pub capacity: usize,
    /// Where the tensor keeps the token of each position of the text; none if they are kept in the order of the text. Slots
    /// are filled in that of the text.
    pub order: Option<Arc<[u32]>>,
}

impl Slots {
    fn place(&self, experts: &[u32], [b, t, k]: [usize; 3], outputs: &mut [Tensor]) {
        let [slots, origin, load] = outputs else {
            unreachable!("infer gives three results")
        };
        let slots = slots.slice_mut().typed::<u32>();
        let origin = origin.slice_mut().typed::<u32>();
        let load = load.slice_mut().typed::<f32>();
        origin.fill(NONE);
        load.fill(0.0);
        let (asked, dropped) = load.split_at_mut(self.experts);
        let mut taken = vec![0; self.experts];
        for sequence in 0..b {
            taken.fill(0);
            for nth in 0..t * k {
                let token = self.order.as_ref().map_or(nth / k, |o| o[nth / k] as usize);
                let at = token * k + nth % k;
                let i = sequence * t * k + at;
                let expert = experts[i] as usize;
                assert!(
                    expert < self.experts,
                    "slots: assignment {i} names expert {expert} of {}",
                    self.experts
                );
                asked[expert] += 1.0;
                let place = taken[expert];
                if place == self.capacity {
                    dropped[expert] += 1.0;
                    slots[i] = NONE;
                    continue;
                }
                taken[expert] += 1;
                slots[i] = (expert * self.capacity + place) as u32;
                origin[(expert * b + sequence) * self.capacity + place] = at as u32;
            }
        }
    }
}

impl Op for Slots {
    fn name(&self) -> &'static str {
        "slots"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let numbered = (self.experts as u64 * self.capacity as u64) < u64::from(NONE);
        match inputs {
            [x] if x.rank() == 3
                && x.dtype == DType::U32
                && self.capacity > 0
                && numbered
                && self.order.as_ref().is_none_or(|o| o.len() == x.shape[1]) =>
            {
                let buffers = [self.experts, x.shape[0], self.capacity];
                Ok(vec![
                    x.clone(),
                    TensorType::new(buffers, DType::U32),
                    TensorType::new([2, self.experts], DType::F32),
                ])
            }
            _ => {
                let wants = format!(
                    "experts [b, t, k] in u32 and at least one slot, fewer than 2^32 in all, not {} experts of {} slots",
                    self.experts, self.capacity
                );
                Err(misfit("slots", wants, inputs))
            }
        }
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("bTK->bTK,EbS,XE")
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost {
            flops: inputs[0].elements() as u64,
            bytes: traffic(inputs) + traffic(outputs),
            scratch: 0,
        }
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [b, t, k] = inputs[0].shape()[..] else {
            unreachable!("infer wants three axes")
        };
        self.place(inputs[0].slice().typed::<u32>(), [b, t, k], outputs);
    }

    fn differentiable(&self, _: usize) -> bool {
        false
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [b, t, k] = inputs[0].shape()[..] else {
            unreachable!("infer wants three axes")
        };
        let [slots, origin, load] = outputs else {
            unreachable!("infer gives three results")
        };
        gpu::slots(
            [b, t, k, self.experts, self.capacity],
            self.order.as_deref(),
            read(inputs[0]),
            write(slots),
            write(origin),
            write(load),
        );
    }
}
