//! From the experts' buffers back to tokens.

#[cfg(feature = "gpu")]
use super::super::device::{read, write};
use super::super::{Axes, Backward, Cost, Linear, Op, Saved, Site, misfit, traffic};
use super::Buffers;
use crate::cpu::rows;
use crate::dtype::DType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `out[b, t] = sum over j of weights[b, t, j] y[slot of (t, j)]`, in the order of j; an assignment that was dropped adds
/// nothing.
///
/// - y [e, b, s, c]; weights [b, t, k] in f32; slots [b, t, k] and origin [e, b, s] in u32, from [`Slots`](super::Slots);
/// - out [b, t, c] in the type of y, summed in f32.
///
/// Letters: `ebsc,bTK,bTK,ebs->bTc`: chips that hold part of the slots give partial sums. Backward:
/// `dy[slot of (t, j)] = weights[b, t, j] dout[b, t]`, 0 in empty slots; `dweights[b, t, j] = dout[b, t] . y[slot of (t, j)]`.
#[derive(Clone, Debug, Default)]
pub struct Combine;

impl Op for Combine {
    fn name(&self) -> &'static str {
        "combine"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [y, weights, slots, origin]
                if y.rank() == 4
                    && y.dtype.is_float()
                    && weights.rank() == 3
                    && weights.dtype == DType::F32
                    && slots.dtype == DType::U32
                    && slots.shape == weights.shape
                    && slots.shape[0] == y.shape[1]
                    && origin.dtype == DType::U32
                    && origin.shape == y.shape[..3] =>
            {
                let [b, t, _] = weights.shape[..] else {
                    unreachable!("weights have three axes")
                };
                Ok(vec![TensorType::new([b, t, y.last()], y.dtype)])
            }
            _ => Err(misfit(
                "combine",
                "floats y [e, b, s, c], weights [b, t, k] in f32, and slots [b, t, k] and origin [e, b, s] in u32",
                inputs,
            )),
        }
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("ebsc,bTK,bTK,ebs->bTc").linear(Linear::Each)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost {
            flops: 2 * (inputs[1].elements() * inputs[0].last()) as u64,
            bytes: traffic(&inputs[..3]) + outputs[0].bytes(),
            scratch: 0,
        }
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let buffers = Buffers::of(site, 0, 2);
        let weights = inputs[1].slice().typed::<f32>();
        let slots = inputs[2].slice().typed::<u32>();
        let pick = buffers.by_slot(slots, Some(weights));
        let c = inputs[0].ty().last();
        rows::mix(
            inputs[0].slice(),
            c,
            buffers.k,
            pick,
            outputs[0].slice_mut(),
        );
    }

    fn saves(&self) -> Saved {
        Saved::INPUTS
    }

    fn differentiable(&self, i: usize) -> bool {
        i < 2
    }

    fn backward_cost(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        wanted: &[bool],
    ) -> Cost {
        let picked = (inputs[1].elements() * inputs[0].last()) as u64;
        let (mut cost, dout) = (Cost::default(), outputs[0].bytes());
        if wanted[0] {
            cost.flops += inputs[0].elements() as u64;
            cost.bytes += dout + traffic(&inputs[1..]) + inputs[0].bytes();
        }
        if wanted[1] {
            cost.flops += 2 * picked;
            cost.bytes += dout + inputs[0].bytes() + 2 * inputs[1].bytes();
        }
        cost
    }

    fn backward(&self, site: &Site, backward: &mut Backward) {
        let buffers = Buffers::of(site, 0, 2);
        let [y, weights, slots, origin] = [0, 1, 2, 3].map(|i| backward.input(i));
        let (dout, c) = (backward.gradient(0), y.ty().last());
        if let Some(dy) = backward.want(0) {
            let weights = weights.slice().typed::<f32>();
            let pick = buffers.by_origin(origin.slice().typed::<u32>(), Some(weights));
            rows::mix(dout.slice(), c, 1, pick, dy.tensor.slice_mut());
        }
        if let Some(dweights) = backward.want(1) {
            let pick = buffers.by_slot(slots.slice().typed::<u32>(), None);
            let out = dweights.tensor.slice_mut().typed::<f32>();
            rows::mix_dots(dout.slice(), y.slice(), [c, buffers.k], pick, out);
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let buffers = Buffers::of(site, 0, 2).on_gpu(inputs[0].ty().last());
        let [y, weights, slots, _] = [0, 1, 2, 3].map(|i| read(inputs[i]));
        gpu::mix_by_slot(buffers, y, slots, Some(weights), write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let buffers = Buffers::of(site, 0, 2).on_gpu(backward.input(0).ty().last());
        let [y, weights, slots, origin] = [0, 1, 2, 3].map(|i| read(backward.input(i)));
        let dout = read(backward.gradient(0));
        if let Some(dy) = backward.want(0) {
            gpu::mix_by_origin(buffers, dout.clone(), origin, Some(weights), dy.operand().0);
        }
        if let Some(dweights) = backward.want(1) {
            gpu::mix_dots(buffers, dout, y, slots, dweights.operand().0);
        }
    }
}
