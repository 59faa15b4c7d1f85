//! The loss that keeps experts' loads even, and how it takes part in a backward.

#[cfg(feature = "gpu")]
use super::super::device::{read, write};
use super::super::{Axes, Backward, Cost, Op, Saved, Site, letters_besides, misfit, traffic};
use crate::cpu::rows;
use crate::cpu::rows::parallel::{Out, for_rows};
use crate::dtype::{DType, SliceMut};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `loss[b] = e sum over experts i of f[b, i] p[b, i]`: f the share of the sequence's t k assignments that went to expert i,
/// p the mean over its tokens of the expert's score (Fedus et al. 2021, equations 4 to 6; for k above 1 as Lepikhin et al.
/// 2020). Perfect balance gives 1.
///
/// - scores [b, t, e] in f32; experts [b, t, k] in u32, from [`Route`](super::Route); loss `[b]` in f32;
/// - with `normalize`, a token's scores are divided by their sum first, as a sigmoid's need (arXiv:2412.19437, equation 18).
///
/// A sequence is a group of its own, so that the loss does not depend on the mesh or on micro-batches.
/// Letters: `bTE,bTK->b`. Backward, f being a constant: `dscore = g`, or `(g - sum over i of g[i] score[i] / sum) / sum` with
/// `normalize`, where `g[i] = dloss e f[i] / t`.
#[derive(Clone, Debug, Default)]
pub struct BalanceLoss {
    /// Whether scores are divided by their sum.
    pub normalize: bool,
}

/// What each score of a sequence adds to the loss, before the division of `normalize`: `e f / t` by expert.
fn slopes(experts: &[u32], e: usize, t: usize, to: &mut [f32]) {
    to.fill(0.0);
    experts.iter().for_each(|&i| to[i as usize] += 1.0);
    let factor = e as f32 / (experts.len() * t) as f32;
    to.iter_mut().for_each(|x| *x *= factor);
}

fn sizes(inputs: &[TensorType]) -> [usize; 4] {
    let (scores, experts) = (&inputs[0].shape, &inputs[1].shape);
    [scores[0], scores[1], scores[2], experts[2]]
}

fn sum(row: &[f32]) -> f32 {
    row.iter().fold(0.0, |a, b| a + b)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b)
}

impl Op for BalanceLoss {
    fn name(&self) -> &'static str {
        "balance_loss"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [scores, experts]
                if scores.rank() == 3
                    && scores.dtype == DType::F32
                    && experts.rank() == 3
                    && experts.dtype == DType::U32
                    && experts.shape[..2] == scores.shape[..2] =>
            {
                Ok(vec![TensorType::new([scores.shape[0]], DType::F32)])
            }
            _ => Err(misfit(
                "balance_loss",
                "scores [b, t, e] in f32 and experts [b, t, k] in u32",
                inputs,
            )),
        }
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("bTE,bTK->b")
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        let per = if self.normalize { 4 } else { 2 };
        Cost {
            flops: (per * inputs[0].elements() + inputs[1].elements()) as u64,
            bytes: traffic(inputs) + traffic(outputs),
            scratch: 0,
        }
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [b, t, e, k] = sizes(&[inputs[0].ty().clone(), inputs[1].ty().clone()]);
        let scores = inputs[0].slice().typed::<f32>();
        let experts = inputs[1].slice().typed::<u32>();
        let mut g = vec![0.0; e];
        let losses = outputs[0].slice_mut().typed::<f32>();
        for (i, loss) in losses.iter_mut().enumerate().take(b) {
            slopes(&experts[i * t * k..(i + 1) * t * k], e, t, &mut g);
            let rows = scores[i * t * e..(i + 1) * t * e].chunks_exact(e);
            let of = |row| dot(row, &g) / if self.normalize { sum(row) } else { 1.0 };
            *loss = rows.map(of).fold(0.0, |a, b| a + b);
        }
    }

    fn saves(&self) -> Saved {
        Saved::INPUTS
    }

    fn differentiable(&self, i: usize) -> bool {
        i == 0
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        let per = if self.normalize { 6 } else { 1 };
        Cost {
            flops: (per * inputs[0].elements() + inputs[1].elements()) as u64,
            bytes: traffic(inputs) + traffic(outputs) + inputs[0].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (scores, experts) = (backward.input(0), backward.input(1));
        let [_, t, e, k] = sizes(&[scores.ty().clone(), experts.ty().clone()]);
        let scores = scores.slice().typed::<f32>();
        let experts = experts.slice().typed::<u32>();
        let dloss = backward.gradient(0).slice().typed::<f32>();
        let Some(dscores) = backward.want(0) else {
            return;
        };
        let out = Out {
            data: dscores.tensor.slice_mut(),
            width: t * e,
        };
        for_rows(dloss.len(), t * e, out, |range, out| {
            let mut g = vec![0.0; e];
            let sequences = out.data.typed::<f32>().chunks_exact_mut((t * e).max(1));
            for (i, to) in range.zip(sequences) {
                slopes(&experts[i * t * k..(i + 1) * t * k], e, t, &mut g);
                g.iter_mut().for_each(|g| *g *= dloss[i]);
                let rows = scores[i * t * e..(i + 1) * t * e].chunks_exact(e);
                for (to, row) in to.chunks_exact_mut(e).zip(rows) {
                    if !self.normalize {
                        to.copy_from_slice(&g);
                        continue;
                    }
                    let sum = sum(row);
                    let mean = dot(row, &g) / sum;
                    to.iter_mut()
                        .zip(&g)
                        .for_each(|(to, g)| *to = (g - mean) / sum);
                }
            }
        });
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let sizes = sizes(&[inputs[0].ty().clone(), inputs[1].ty().clone()]);
        let (scores, experts) = (read(inputs[0]), read(inputs[1]));
        gpu::balance_loss(
            sizes,
            self.normalize,
            scores,
            experts,
            write(&mut outputs[0]),
        );
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let (scores, experts) = (backward.input(0), backward.input(1));
        let sizes = sizes(&[scores.ty().clone(), experts.ty().clone()]);
        let (scores, experts) = (read(scores), read(experts));
        let dloss = read(backward.gradient(0));
        if let Some(dscores) = backward.want(0) {
            let dscores = dscores.operand().0;
            gpu::balance_loss_backward(sizes, self.normalize, scores, experts, dloss, dscores);
        }
    }
}

/// `y = x`, and in the backward the loss of x's sequence counts `weight` times, whatever y's gradient is: `dx = dy`,
/// `dloss = weight`.
///
/// x [b, ..] in any float type, loss `[b]` in f32; y as x. So a loss of one block takes part in the gradient without being
/// carried through the blocks, and the pipeline's stages, behind it. Letters: `bt,b->bt`.
#[derive(Clone, Debug)]
pub struct JoinLoss {
    /// What the loss is multiplied by where the backward begins.
    pub weight: f32,
}

impl Op for JoinLoss {
    fn name(&self) -> &'static str {
        "join_loss"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x, loss]
                if x.rank() > 0
                    && x.dtype.is_float()
                    && loss.dtype == DType::F32
                    && loss.shape == x.shape[..1] =>
            {
                Ok(vec![x.clone()])
            }
            _ => Err(misfit(
                "join_loss",
                "floats x [b, ..] and a loss [b] in f32",
                inputs,
            )),
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let rest = letters_besides(inputs[0].rank() - 1, "b").to_uppercase();
        Axes::new(&format!("b{rest},b->b{rest}"))
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(&inputs[..1], outputs, 0)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        rows::cast(inputs[0].slice(), outputs[0].slice_mut());
    }

    fn backward_cost(&self, inputs: &[TensorType], _: &[TensorType], _: &[bool]) -> Cost {
        Cost {
            flops: 0,
            bytes: 2 * inputs[0].bytes() + inputs[1].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        if let Some(dx) = backward.want(0) {
            rows::cast(dy.slice(), dx.tensor.slice_mut());
        }
        if let Some(dloss) = backward.want(1) {
            match dloss.tensor.slice_mut() {
                SliceMut::F32(to) => to.fill(self.weight),
                _ => unreachable!("infer wants a loss in f32"),
            }
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::cast(read(inputs[0]), write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            gpu::cast(dy, dx.operand().0);
        }
        if let Some(dloss) = backward.want(1) {
            gpu::fill(self.weight, None, dloss.operand().0);
        }
    }
}
