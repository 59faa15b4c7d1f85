//! Softmax cross-entropy over a vocabulary that is split over chips (Shoeybi et al. 2019): three ops, two reductions of
//! one number per row between them, and no gathered logits.
//!
//! ```text
//! max          = RowMax(logits)                        all-reduce by maximum
//! sum, target  = RowExpSum(logits, max, labels)        all-reduce by sum
//! losses       = CrossEntropyFromStatistics(logits, labels, max, sum, target)
//! ```
//! On a vocabulary that is not split the same three ops give the bits of [`CrossEntropy`](super::CrossEntropy).

#[cfg(feature = "gpu")]
use super::cross_entropy::gradient_gpu;
use super::cross_entropy::{Statistics, check_labels, infer_rows, row_letters};
#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Op, Saved, Site, traffic};
use crate::cpu::rows::{self, Shard};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// Where this chip's columns lie in the whole vocabulary.
fn columns(site: &Site, valid: Option<usize>) -> Shard {
    let logits = &site.inputs[0];
    let last = logits.ty.rank() - 1;
    let whole = logits.global[last];
    Shard {
        first: logits.start[last],
        valid: valid.unwrap_or(whole).min(whole),
    }
}

#[cfg(feature = "gpu")]
fn columns_gpu(site: &Site, valid: Option<usize>) -> gpu::Columns {
    let shard = columns(site, valid);
    gpu::Columns {
        width: site.inputs[0].ty.last(),
        first: shard.first,
        valid: shard.valid,
    }
}

/// `max[i] = max over j of x[i,j]`: logits [.., v], max f32 [..]; -inf where a chip holds only padding.
///
/// Letters: `abv->ab`. Over a split v the result is a share of a **maximum**, not of a sum: reduce it by Max before any use.
/// No gradient: the loss does not depend on which number is subtracted.
#[derive(Clone, Debug, Default)]
pub struct RowMax {
    /// How many columns of the whole vocabulary exist; all if none.
    pub valid: Option<usize>,
}

impl Op for RowMax {
    fn name(&self) -> &'static str {
        "row_max"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let row = infer_rows("row_max", "float logits [.., v]", None, 1, inputs)?;
        Ok(vec![row])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let l = row_letters(&inputs[0]);
        Axes::new(&format!("{l}v->{l}"))
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0).with_flops(&inputs[0], 1)
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let shard = columns(site, self.valid);
        let max = outputs[0].slice_mut().typed();
        rows::row_max(inputs[0].slice(), shard, max);
    }

    fn differentiable(&self, _: usize) -> bool {
        false
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let columns = columns_gpu(site, self.valid);
        gpu::row_max(read(inputs[0]), columns, write(&mut outputs[0]));
    }
}

/// `sum[i] = sum over j of e^(x[i,j] - max[i])` and `target[i] = x[i, labels[i]]`, 0 where another chip holds that column:
/// logits [.., v], max f32 [..] (reduced over the chips), labels [..] in u32; results sum and target f32 [..].
///
/// Letters: `abv,ab,ab->ab,ab`: over a split v both results are partial sums. No gradient of its own: it comes with
/// [`CrossEntropyFromStatistics`].
#[derive(Clone, Debug, Default)]
pub struct RowExpSum {
    /// How many columns of the whole vocabulary exist; all if none.
    pub valid: Option<usize>,
}

impl Op for RowExpSum {
    fn name(&self) -> &'static str {
        "row_exp_sum"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let wants = "float logits [.., v], max f32 [..] and labels [..] in u32";
        let row = infer_rows("row_exp_sum", wants, Some(2), 3, inputs)?;
        Ok(vec![row.clone(), row])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let l = row_letters(&inputs[0]);
        Axes::new(&format!("{l}v,{l},{l}->{l},{l}"))
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0).with_flops(&inputs[0], 3)
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [sum, target] = outputs else {
            unreachable!("infer gives two results")
        };
        rows::row_exp_sum(
            inputs[0].slice(),
            columns(site, self.valid),
            inputs[1].slice().typed(),
            inputs[2].slice().typed(),
            sum.slice_mut().typed(),
            target.slice_mut().typed(),
        );
    }

    fn differentiable(&self, _: usize) -> bool {
        false
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [sum, target] = outputs else {
            unreachable!("infer gives two results")
        };
        let (x, max, labels) = (read(inputs[0]), read(inputs[1]), read(inputs[2]));
        let columns = columns_gpu(site, self.valid);
        gpu::row_exp_sum(x, columns, max, labels, write(sum), write(target));
    }
}

/// `loss[i] = max[i] + ln(sum[i]) - target[i]`, 0 for an ignored label: logits [.., v], labels [..] in u32, and max, sum,
/// target f32 [..], reduced over the chips; losses f32 [..].
///
/// Letters: `abv,ab,ab,ab,ab->ab`. The losses are whole although v is split: they are computed from reduced numbers, on
/// every chip alike. Backward goes to the logits alone and needs no communication:
/// `dx[j] = dloss (e^(x[j] - max) / sum - [j = label])` for this chip's columns, in place of the logits where nothing else
/// needs them.
///
/// # Panics
/// If a label is neither ignored nor below `valid`.
#[derive(Clone, Debug)]
pub struct CrossEntropyFromStatistics {
    /// The label of rows that do not count.
    pub ignored: u32,
    /// How many columns of the whole vocabulary exist; all if none.
    pub valid: Option<usize>,
}

impl Default for CrossEntropyFromStatistics {
    fn default() -> Self {
        CrossEntropyFromStatistics {
            ignored: u32::MAX,
            valid: None,
        }
    }
}

impl Op for CrossEntropyFromStatistics {
    fn name(&self) -> &'static str {
        "cross_entropy_from_statistics"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let wants = "float logits [.., v], labels [..] in u32, and max, sum and target f32 [..]";
        let row = infer_rows(self.name(), wants, Some(1), 5, inputs)?;
        Ok(vec![row])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let l = row_letters(&inputs[0]);
        Axes::new(&format!("{l}v,{l},{l},{l},{l}->{l}")).whole_without("v")
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        // The logits are not read.
        Cost::elementwise(&inputs[1..], outputs, 3)
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let valid = columns(site, self.valid).valid;
        let labels = inputs[1].slice().typed();
        check_labels(self.name(), labels, self.ignored, valid);
        rows::cross_entropy_losses(
            inputs[2].slice().typed(),
            inputs[3].slice().typed(),
            inputs[4].slice().typed(),
            labels,
            self.ignored,
            outputs[0].slice_mut().typed(),
        );
    }

    fn saves(&self) -> Saved {
        Saved::some_inputs(&[0, 1, 2, 3])
    }

    fn differentiable(&self, i: usize) -> bool {
        i == 0
    }

    fn reuses(&self) -> Option<usize> {
        Some(0)
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        Cost {
            flops: 4 * inputs[0].elements() as u64,
            bytes: traffic(&inputs[..4]) + traffic(outputs) + inputs[0].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, site: &Site, backward: &mut Backward) {
        let dlosses = backward.gradient(0).slice().typed();
        let statistics = Statistics {
            shard: columns(site, self.valid),
            max: backward.input(2).slice().typed(),
            sum: backward.input(3).slice().typed(),
            labels: backward.input(1).slice().typed(),
            ignored: self.ignored,
        };
        let logits = backward.inputs[0].as_ref();
        if let Some(dx) = backward.want(0) {
            statistics.gradient(dlosses, logits, dx);
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let valid = columns(site, self.valid).valid;
        let labels = inputs[1].slice().typed();
        check_labels(self.name(), labels, self.ignored, valid);
        let [labels, max, sum, target] = [1, 2, 3, 4].map(|i| read(inputs[i]));
        gpu::losses(
            max,
            sum,
            target,
            labels,
            self.ignored,
            write(&mut outputs[0]),
        );
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let rows = gpu::RowStatistics {
            max: read(backward.input(2)),
            sum: read(backward.input(3)),
            labels: read(backward.input(1)),
            ignored: self.ignored,
            scale: read(backward.gradient(0)),
        };
        let logits = backward.inputs[0].as_ref();
        if let Some(dx) = backward.want(0) {
            gradient_gpu(logits, columns_gpu(site, self.valid), rows, dx);
        }
    }
}
