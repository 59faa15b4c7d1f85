//! Heads joined with what all heads share: multi-head latent attention's keys.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::slice::Blocks;
use super::{Accum, Axes, Backward, Cost, Linear, Op, Site, misfit};
use crate::cpu::memory::with_scratch;
use crate::cpu::rows;
use crate::cpu::rows::parallel::{part, part_mut};
use crate::dtype::{Slice, SliceMut};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y[b, t, h] = x[b, t, h], shared[b, t]`: each head's own elements, then those that all heads share.
///
/// x [b, t, h, n], shared [b, t, r] of one type; y [b, t, h, n + r]. Letters: `bthN,btR->bthD`: heads may be split while what
/// they share is whole. Backward: `dx` is its part of dy, `dshared[b, t] = sum over heads` of theirs, in ascending order.
#[derive(Clone, Debug, Default)]
pub struct JoinHeads;

/// Tokens, heads, the heads' own elements, the shared ones.
fn sizes(x: &[usize], shared: &[usize]) -> [usize; 4] {
    [x[0] * x[1], x[2], x[3], shared[2]]
}

/// The strided pieces of y that come from the shared elements: (strides of y, strides of shared, shape).
type Strided = ([usize; 3], [usize; 3], [usize; 3]);

fn strided([tokens, heads, n, r]: [usize; 4]) -> Strided {
    let d = n + r;
    ([heads * d, d, 1], [r, 0, 1], [tokens, heads, r])
}

impl Op for JoinHeads {
    fn name(&self) -> &'static str {
        "join_heads"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x, shared]
                if x.rank() == 4
                    && shared.rank() == 3
                    && x.dtype.is_float()
                    && shared.dtype == x.dtype
                    && shared.shape[..2] == x.shape[..2] =>
            {
                let mut shape = x.shape.clone();
                shape[3] += shared.shape[2];
                Ok(vec![TensorType::new(shape, x.dtype)])
            }
            _ => Err(misfit(
                "join_heads",
                "floats x [b, t, h, n] and shared [b, t, r] of one type",
                inputs,
            )),
        }
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("bthN,btR->bthD").linear(Linear::Jointly)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let (x, shared) = (inputs[0], inputs[1]);
        let n = sizes(x.shape(), shared.shape());
        let y = &mut outputs[0];
        Blocks::new(y.shape(), 3, 0..n[2]).put(x.slice(), y.slice_mut());
        if shared.elements() * n[1] > 0 {
            let (to, from, shape) = strided(n);
            let mut all = y.slice_mut();
            let len = all.len();
            let behind = part_mut(&mut all, n[2]..len);
            rows::copy_strided(shared.slice(), &from, behind, &to, &shape);
        }
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        Cost {
            flops: (inputs[1].elements() * inputs[0].shape[2]) as u64,
            bytes: outputs[0].bytes() + inputs[0].bytes() + inputs[1].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, site: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let n = sizes(&site.inputs[0].ty.shape, &site.inputs[1].ty.shape);
        if let Some(dx) = backward.want(0) {
            let blocks = Blocks::new(dy.shape(), 3, 0..n[2]);
            blocks.take(dy.slice(), dx.tensor.slice_mut());
        }
        if let Some(dshared) = backward.want(1) {
            dshared.in_f32(|out, accum| {
                if accum == Accum::Replace {
                    out.fill(0.0);
                }
                sum_over_heads(dy.slice(), n, out);
            });
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let n = sizes(inputs[0].shape(), inputs[1].shape());
        let (x, shared) = (read(inputs[0]), read(inputs[1]));
        gpu::join_heads(n, x, shared, write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let n = sizes(&site.inputs[0].ty.shape, &site.inputs[1].ty.shape);
        if let Some(dx) = backward.want(0) {
            let piece = Blocks::new(dy.shape(), 3, 0..n[2]).piece();
            piece.take(read(dy), dx.operand().0, false);
        }
        if let Some(dshared) = backward.want(1) {
            gpu::sum_shared(n, read(dy), dshared.operand().0);
        }
    }
}

/// Adds each head's shared elements of dy to `out` [tokens, r], head after head.
fn sum_over_heads(dy: Slice, [tokens, heads, n, r]: [usize; 4], out: &mut [f32]) {
    let d = n + r;
    if tokens * r == 0 {
        return;
    }
    with_scratch(tokens * r * dy.dtype().size(), |bytes| {
        for head in 0..heads {
            let mut piece = SliceMut::of_bytes(bytes, dy.dtype());
            let from = part(dy, head * d + n..dy.len());
            rows::copy_strided(
                from,
                &[heads * d, 1],
                piece.reborrow(),
                &[r, 1],
                &[tokens, r],
            );
            rows::add_assign(SliceMut::F32(out), rows::parallel::shared(&piece));
        }
    });
}
