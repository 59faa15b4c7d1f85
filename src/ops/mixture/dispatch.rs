//! Tokens to the experts' buffers.

#[cfg(feature = "gpu")]
use super::super::device::{read, write};
use super::super::{Axes, Backward, Cost, Linear, Op, Saved, Site, misfit};
use super::Buffers;
use crate::cpu::rows;
use crate::dtype::DType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y[e, b, s] = x[b, t]` where slot s of expert e holds an assignment of token t, 0 where it holds none.
///
/// - x [b, t, c]; origin [e, b, s] and slots [b, t, k] in u32, from [`Slots`](super::Slots);
/// - y [e, b, s, c] in the type of x.
///
/// Letters: `bTc,ebs,bTK->ebsc`: a chip fills the slots that it holds. Backward: `dx[b, t] = sum over j of dy[slot of (t, j)]`
/// in the order of j, over the slots that the chip holds.
#[derive(Clone, Debug, Default)]
pub struct Dispatch;

impl Op for Dispatch {
    fn name(&self) -> &'static str {
        "dispatch"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x, origin, slots]
                if x.rank() == 3
                    && x.dtype.is_float()
                    && origin.rank() == 3
                    && origin.dtype == DType::U32
                    && origin.shape[1] == x.shape[0]
                    && slots.rank() == 3
                    && slots.dtype == DType::U32
                    && slots.shape[..2] == x.shape[..2] =>
            {
                let mut shape = origin.shape.clone();
                shape.push(x.last());
                Ok(vec![TensorType::new(shape, x.dtype)])
            }
            _ => Err(misfit(
                "dispatch",
                "floats x [b, t, c], and origin [e, b, s] and slots [b, t, k] in u32",
                inputs,
            )),
        }
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("bTc,ebs,bTK->ebsc").linear(Linear::Each)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost {
            flops: 0,
            bytes: 2 * outputs[0].bytes() + inputs[1].bytes(),
            scratch: 0,
        }
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let origin = inputs[1].slice().typed::<u32>();
        let pick = Buffers::of(site, 1, 2).by_origin(origin, None);
        let c = inputs[0].ty().last();
        rows::mix(inputs[0].slice(), c, 1, pick, outputs[0].slice_mut());
    }

    fn saves(&self) -> Saved {
        Saved::some_inputs(&[2])
    }

    fn differentiable(&self, i: usize) -> bool {
        i == 0
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        let picked = (inputs[2].elements() * inputs[0].last()) as u64;
        Cost {
            flops: picked,
            bytes: outputs[0].bytes() + inputs[2].bytes() + inputs[0].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, site: &Site, backward: &mut Backward) {
        let (slots, dy) = (backward.input(2), backward.gradient(0));
        let buffers = Buffers::of(site, 1, 2);
        if let Some(dx) = backward.want(0) {
            let pick = buffers.by_slot(slots.slice().typed::<u32>(), None);
            let c = dy.ty().last();
            rows::mix(dy.slice(), c, buffers.k, pick, dx.tensor.slice_mut());
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let buffers = Buffers::of(site, 1, 2).on_gpu(inputs[0].ty().last());
        let (x, origin) = (read(inputs[0]), read(inputs[1]));
        gpu::mix_by_origin(buffers, x, origin, None, write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let (slots, dy) = (read(backward.input(2)), backward.gradient(0));
        let buffers = Buffers::of(site, 1, 2).on_gpu(dy.ty().last());
        if let Some(dx) = backward.want(0) {
            gpu::mix_by_slot(buffers, read(dy), slots, None, dx.operand().0);
        }
    }
}
