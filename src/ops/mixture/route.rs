//! The router's choice.

#[cfg(feature = "gpu")]
use super::super::device::{read, write};
use super::super::{Axes, Backward, Cost, Op, Saved, Site, letters_besides, misfit, traffic};
use crate::cpu::rows::parallel::{Out, for_rows};
use crate::dtype::DType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// The k experts of each token with the largest scores, and their weights (Shazeer et al. 2017; Fedus et al. 2021).
///
/// - scores [.., e] in f32, a softmax's or a sigmoid's results; with `bias`, a second operand \[e\] in f32 that is added for the
///   choice and is not part of any weight (DeepSeek-AI 2024, arXiv:2412.19437, equation 16);
/// - result 0: weights [.., k] in f32, largest score first: `scale score`, or `scale score / (sum of the k + 1e-20)` with
///   `normalize`;
/// - result 1: the experts' numbers [.., k] in u32. Of equal scores the lower number wins; NaN counts as the largest;
/// - result 2: \[1\] in f32: how many tokens' choices hang on less than [`Route::CLOSE`] between the last score taken and the
///   first left out. Rounding, and so another mesh, may turn these.
///
/// Letters: `btE,E->btK,btK,X`: a count over split tokens is a partial sum. Backward, of a choice that is a constant, to the scores that were chosen, 0 elsewhere:
/// `dscore[j] = scale dw[j]`, or with `normalize` `scale (dw[j] - sum over i of dw[i] score[i] / sum) / sum`.
#[derive(Clone, Debug)]
pub struct Route {
    /// Experts of each token.
    pub k: usize,
    /// Whether a second operand is added for the choice.
    pub bias: bool,
    /// Whether a token's weights are divided by their sum.
    pub normalize: bool,
    /// What weights are multiplied by.
    pub scale: f32,
}

impl Route {
    /// The margin below which a choice is close.
    pub const CLOSE: f32 = 1e-4;
}

/// Keeps a sum of scores from 0.
const LEAST: f32 = 1e-20;

/// Numbers the experts by falling `key`, equal keys by rising number: the first k into `chosen`. Gives how far the next one
/// lies behind; infinitely far if there is none.
fn choose(key: impl Fn(usize) -> f32, experts: usize, chosen: &mut [u32]) -> f32 {
    let (positive, negative) = (f32::INFINITY, f32::NEG_INFINITY);
    let key = |i: usize| if key(i).is_nan() { positive } else { key(i) };
    // A later choice is what comes behind the one before it in the order (key, number).
    let next = |before: Option<(f32, usize)>| {
        let mut best: Option<(f32, usize)> = None;
        for i in 0..experts {
            let x = key(i);
            let open = before.is_none_or(|(y, j)| x < y || (x == y && i > j));
            if open && best.is_none_or(|(y, _)| x > y) {
                best = Some((x, i));
            }
        }
        best
    };
    let mut before = None;
    for to in chosen {
        let found = next(before).unwrap_or((negative, experts - 1));
        *to = found.1 as u32;
        before = Some(found);
    }
    match (before, next(before)) {
        // Two infinite keys have no difference.
        (Some((last, _)), Some((behind, _))) if last == behind => 0.0,
        (Some((last, _)), Some((behind, _))) => last - behind,
        _ => positive,
    }
}

/// Rows of k elements to be cut for the threads.
fn rows_of(tensor: &mut Tensor, k: usize) -> Out<'_> {
    Out {
        data: tensor.slice_mut(),
        width: k,
    }
}

impl Route {
    fn sum(&self, row: &[f32], chosen: &[u32]) -> f32 {
        let sum = chosen.iter().map(|&e| row[e as usize]);
        sum.fold(0.0, |a, b| a + b) + LEAST
    }

    fn rows(&self, scores: &[f32], bias: Option<&[f32]>, e: usize, outputs: &mut [Tensor]) {
        let (rows, k) = (scores.len() / e, self.k);
        let [weights, experts, count] = outputs else {
            unreachable!("infer gives three results")
        };
        let close = AtomicU32::new(0);
        let both = (rows_of(weights, k), rows_of(experts, k));
        for_rows(rows, e * k, both, |range, (weights, experts)| {
            let weights = weights.data.typed::<f32>().chunks_exact_mut(k);
            let experts = experts.data.typed::<u32>().chunks_exact_mut(k);
            for (r, (w, chosen)) in range.zip(weights.zip(experts)) {
                let row = &scores[r * e..(r + 1) * e];
                let margin = choose(|i| row[i] + bias.map_or(0.0, |b| b[i]), e, chosen);
                if margin < Self::CLOSE {
                    close.fetch_add(1, Relaxed);
                }
                let factor = match self.normalize {
                    true => self.scale / self.sum(row, chosen),
                    false => self.scale,
                };
                for (w, &expert) in w.iter_mut().zip(chosen.iter()) {
                    *w = factor * row[expert as usize];
                }
            }
        });
        count.slice_mut().typed::<f32>()[0] = close.into_inner() as f32;
    }
}

impl Op for Route {
    fn name(&self) -> &'static str {
        "route"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let f32s = inputs.iter().all(|x| x.dtype == DType::F32);
        let fits = match inputs {
            [scores] => !self.bias && scores.rank() > 0 && self.k <= scores.last(),
            [scores, bias] => {
                let e = scores.rank() > 0 && bias.shape == [scores.last()];
                self.bias && e && self.k <= scores.last()
            }
            _ => false,
        };
        if !fits || !f32s || self.k == 0 {
            let bias = if self.bias { " and a bias [e]" } else { "" };
            let wants = format!(
                "scores [.., e]{bias} in f32 with e of at least k = {}",
                self.k
            );
            return Err(misfit("route", wants, inputs));
        }
        let mut shape = inputs[0].shape.clone();
        *shape.last_mut().expect("scores have an axis") = self.k;
        Ok(vec![
            TensorType::new(shape.clone(), DType::F32),
            TensorType::new(shape, DType::U32),
            TensorType::new([1], DType::F32),
        ])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let lead = letters_besides(inputs[0].rank() - 1, "");
        let bias = if self.bias { ",E" } else { "" };
        Axes::new(&format!("{lead}E{bias}->{lead}K,{lead}K,X"))
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost {
            flops: (inputs[0].elements() * self.k) as u64,
            bytes: traffic(inputs) + traffic(outputs),
            scratch: 0,
        }
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let scores = inputs[0].slice().typed::<f32>();
        let bias = inputs.get(1).map(|b| b.slice().typed::<f32>());
        self.rows(scores, bias, inputs[0].ty().last(), outputs);
    }

    fn saves(&self) -> Saved {
        Saved {
            inputs: 1,
            outputs: 1 << 1,
        }
    }

    fn differentiable(&self, i: usize) -> bool {
        i == 0
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        Cost {
            flops: 5 * outputs[0].elements() as u64,
            bytes: 2 * inputs[0].bytes() + traffic(outputs),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (scores, experts) = (backward.input(0), backward.output(1));
        let (e, k) = (scores.ty().last(), self.k);
        let scores = scores.slice().typed::<f32>();
        let experts = experts.slice().typed::<u32>();
        let dw = backward.only_gradient("route").slice().typed::<f32>();
        let Some(dscores) = backward.want(0).filter(|_| !scores.is_empty()) else {
            return;
        };
        let out = Out {
            data: dscores.tensor.slice_mut(),
            width: e,
        };
        for_rows(scores.len() / e, e, out, |range, out| {
            let rows = out.data.typed::<f32>().chunks_exact_mut(e);
            for (r, to) in range.zip(rows) {
                let row = &scores[r * e..(r + 1) * e];
                let (chosen, dw) = (&experts[r * k..(r + 1) * k], &dw[r * k..(r + 1) * k]);
                let (mut mean, mut factor) = (0.0, self.scale);
                if self.normalize {
                    let sum = self.sum(row, chosen);
                    for (&expert, dw) in chosen.iter().zip(dw) {
                        mean += dw * (row[expert as usize] / sum);
                    }
                    factor = self.scale / sum;
                }
                to.fill(0.0);
                for (&expert, dw) in chosen.iter().zip(dw) {
                    to[expert as usize] = factor * (dw - mean);
                }
            }
        });
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let e = inputs[0].ty().last();
        let bias = inputs.get(1).map(|b| read(b));
        let [weights, experts, close] = outputs else {
            unreachable!("infer gives three results")
        };
        gpu::route(
            self.rule(e),
            read(inputs[0]),
            bias,
            [write(weights), write(experts), write(close)],
        );
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let (scores, experts) = (backward.input(0), read(backward.output(1)));
        let (e, dw) = (scores.ty().last(), read(backward.gradient(0)));
        if let Some(dscores) = backward.want(0) {
            gpu::route_backward(self.rule(e), read(scores), experts, dw, dscores.operand().0);
        }
    }
}

#[cfg(feature = "gpu")]
impl Route {
    fn rule(&self, experts: usize) -> gpu::Routing {
        gpu::Routing {
            experts,
            k: self.k,
            normalize: self.normalize,
            scale: self.scale,
            least: LEAST,
            close: Self::CLOSE,
        }
    }
}
