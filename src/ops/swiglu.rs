//! The gated unit of Llama's feed-forward.

use super::activation::two_floats;
#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Op, Saved, Site};
use crate::cpu::memory::with_scratch;
use crate::cpu::rows;
use crate::dtype::SliceMut;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y = silu(gate) up = gate / (1 + e^-gate) up`, all of one shape, y in the type of gate (Shazeer 2020).
///
/// Backward, with `s = 1 / (1 + e^-gate)`: `dgate = dy up s (1 + gate (1 - s))`, `dup = dy gate s`.
#[derive(Clone, Debug, Default)]
pub struct SwiGlu;

impl Op for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        two_floats("swiglu", inputs)
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        // Linear in `up` alone, which the rule has no word for: Each would let a partial gate through.
        Axes::elementwise(2, &inputs[0])
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 5)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        rows::swiglu(inputs[0].slice(), inputs[1].slice(), outputs[0].slice_mut());
    }

    fn saves(&self) -> Saved {
        Saved::INPUTS
    }

    fn backward_cost(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        wanted: &[bool],
    ) -> Cost {
        let (gate, up, y) = (&inputs[0], &inputs[1], &outputs[0]);
        let unwanted = wanted.iter().take(2).zip(inputs).filter(|(w, _)| !**w);
        Cost {
            flops: 11 * y.elements() as u64,
            bytes: 2 * (gate.bytes() + up.bytes()) + y.bytes(),
            scratch: unwanted.map(|(_, t)| t.allocated_bytes()).sum(),
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (gate, up, dy) = (backward.input(0), backward.input(1), backward.gradient(0));
        let run = |dgate: SliceMut, dup: SliceMut| {
            rows::swiglu_backward(gate.slice(), up.slice(), dy.slice(), dgate, dup);
        };
        // The kernel writes both; what nobody wants goes to scratch.
        match backward.wanted {
            [Some(dgate), Some(dup)] => run(dgate.tensor.slice_mut(), dup.tensor.slice_mut()),
            [Some(dgate), None] => with_scratch(up.ty().bytes() as usize, |b| {
                run(dgate.tensor.slice_mut(), SliceMut::of_bytes(b, up.dtype()));
            }),
            [None, Some(dup)] => with_scratch(gate.ty().bytes() as usize, |b| {
                run(SliceMut::of_bytes(b, gate.dtype()), dup.tensor.slice_mut());
            }),
            _ => {}
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::swiglu(read(inputs[0]), read(inputs[1]), write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let (gate, up) = (read(backward.input(0)), read(backward.input(1)));
        let dy = read(backward.gradient(0));
        if let Some(dgate) = backward.want(0) {
            gpu::swiglu_dgate(gate.clone(), up, dy.clone(), dgate.operand().0);
        }
        if let Some(dup) = backward.want(1) {
            gpu::swiglu_dup(gate, dy, dup.operand().0);
        }
    }
}
