//! Softmax cross-entropy on one chip's whole vocabulary, fused with its gradient: probabilities are never stored.
//!
//! Logits are the largest tensor of a small model's step, so backward overwrites them with their own gradient.
//! [`vocabulary`](super::vocabulary) holds the same over a split vocabulary.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Gradient, Op, Saved, Site, letters_besides, misfit, traffic};
use crate::cpu::rows::{self, Shard};
use crate::dtype::DType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `loss = ln(sum over j of e^x[j]) - x[label]` for each row: logits [.., v], labels [..] in u32.
///
/// - results: losses [..], and the statistics `max` and `sum = sum over j of e^(x[j] - max)` [..], all f32; backward reads
///   the statistics;
/// - a row whose label is `ignored` has loss 0 and gradient 0;
/// - columns from `valid` on are padding: they take no part and their gradient is 0.
///
/// Letters: `abV,ab->ab,ab,ab`. Backward: `dx[j] = dloss (e^(x[j] - max) / sum - [j = label])`, in place of the logits
/// where nothing else needs them.
///
/// # Panics
/// If a label is neither ignored nor below `valid`.
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    /// The label of rows that do not count.
    pub ignored: u32,
    /// How many of the columns exist; all if none.
    pub valid: Option<usize>,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        CrossEntropy {
            ignored: u32::MAX,
            valid: None,
        }
    }
}

/// Checks logits [.., v] and `vectors` f32 operands [..] besides labels at position `labels`; gives the type of a result.
pub(crate) fn infer_rows(
    op: &str,
    wants: &str,
    labels: Option<usize>,
    operands: usize,
    inputs: &[TensorType],
) -> Result<TensorType, String> {
    let row = |x: &TensorType| TensorType::new(&x.shape[..x.rank() - 1], DType::F32);
    let fits = |x: &TensorType| {
        x.rank() > 0
            && x.dtype.is_float()
            && inputs.len() == operands
            && inputs.iter().enumerate().skip(1).all(|(i, t)| {
                let dtype = if labels == Some(i) {
                    DType::U32
                } else {
                    DType::F32
                };
                *t == super::with_dtype(&row(x), dtype)
            })
    };
    match inputs.first() {
        Some(x) if fits(x) => Ok(row(x)),
        _ => Err(misfit(op, wants, inputs)),
    }
}

/// Letters of rows without their columns.
pub(crate) fn row_letters(logits: &TensorType) -> String {
    letters_besides(logits.rank() - 1, "v")
}

/// Panics on a label that names no column.
pub(crate) fn check_labels(op: &str, labels: &[u32], ignored: u32, valid: usize) {
    let wrong = |&l: &u32| l != ignored && l as usize >= valid;
    if let Some(i) = labels.iter().position(wrong) {
        panic!(
            "{op}: label {} of row {i} is neither below the vocabulary's {valid} nor the ignored label {ignored}",
            labels[i]
        );
    }
}

/// What the gradient of logits is computed from.
pub(crate) struct Statistics<'a> {
    pub(crate) shard: Shard,
    pub(crate) max: &'a [f32],
    pub(crate) sum: &'a [f32],
    pub(crate) labels: &'a [u32],
    pub(crate) ignored: u32,
}

impl Statistics<'_> {
    /// `dx = dloss (softmax - onehot)`, in place if the gradient's storage is the logits' own.
    pub(crate) fn gradient(&self, dlosses: &[f32], logits: Option<&Tensor>, dx: &mut Gradient) {
        let Statistics {
            shard,
            max,
            sum,
            labels,
            ignored,
        } = *self;
        let out = dx.tensor.slice_mut();
        if dx.reused {
            rows::cross_entropy_gradient_in_place(out, shard, max, sum, labels, ignored, dlosses);
        } else {
            let x = logits
                .expect("logits are saved where the gradient does not replace them")
                .slice();
            rows::cross_entropy_gradient(x, shard, max, sum, labels, ignored, dlosses, out);
        }
    }
}

/// The same on a graphics processor.
#[cfg(feature = "gpu")]
pub(crate) fn gradient_gpu(
    logits: Option<&Tensor>,
    columns: gpu::Columns,
    rows: gpu::RowStatistics,
    dx: &mut Gradient,
) {
    let reused = dx.reused;
    let (out, _) = dx.operand();
    let x = if reused {
        out.clone()
    } else {
        read(logits.expect("logits are saved where the gradient does not replace them"))
    };
    gpu::cross_entropy_gradient(x, columns, rows, out);
}

impl CrossEntropy {
    fn valid(&self, logits: &TensorType) -> usize {
        self.valid.unwrap_or(logits.last())
    }
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let wants = "float logits [.., v] and labels [..] in u32";
        let row = infer_rows("cross_entropy", wants, Some(1), 2, inputs)?;
        if self.valid(&inputs[0]) > inputs[0].last() {
            let wants = format!("at least {} columns", self.valid(&inputs[0]));
            return Err(misfit("cross_entropy", wants, inputs));
        }
        Ok(vec![row.clone(), row.clone(), row])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let l = row_letters(&inputs[0]);
        Axes::new(&format!("{l}V,{l}->{l},{l},{l}"))
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        // max; then subtract, exp, add.
        Cost::elementwise(inputs, outputs, 0).with_flops(&inputs[0], 4)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let valid = self.valid(inputs[0].ty());
        let labels = inputs[1].slice().typed();
        check_labels("cross_entropy", labels, self.ignored, valid);
        let [losses, max, sum] = outputs else {
            unreachable!("infer gives three results")
        };
        rows::cross_entropy(
            inputs[0].slice(),
            labels,
            self.ignored,
            valid,
            losses.slice_mut().typed(),
            max.slice_mut().typed(),
            sum.slice_mut().typed(),
        );
    }

    fn saves(&self) -> Saved {
        let mut saved = Saved::INPUTS;
        saved.outputs = 1 << 1 | 1 << 2;
        saved
    }

    fn differentiable(&self, i: usize) -> bool {
        i == 0
    }

    fn reuses(&self) -> Option<usize> {
        Some(0)
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        // subtract, exp, two products, and the label's.
        Cost {
            flops: 4 * inputs[0].elements() as u64,
            bytes: traffic(inputs) + traffic(outputs) + inputs[0].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, site: &Site, backward: &mut Backward) {
        let dlosses = backward.only_gradient("cross_entropy").slice().typed();
        let statistics = Statistics {
            shard: Shard {
                first: 0,
                valid: self.valid(&site.inputs[0].ty),
            },
            max: backward.output(1).slice().typed(),
            sum: backward.output(2).slice().typed(),
            labels: backward.input(1).slice().typed(),
            ignored: self.ignored,
        };
        let logits = backward.inputs[0].as_ref();
        if let Some(dx) = backward.want(0) {
            statistics.gradient(dlosses, logits, dx);
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let columns = gpu::Columns {
            width: inputs[0].ty().last(),
            first: 0,
            valid: self.valid(inputs[0].ty()),
        };
        let labels = inputs[1].slice().typed();
        check_labels("cross_entropy", labels, self.ignored, columns.valid);
        let [losses, max, sum] = outputs else {
            unreachable!("infer gives three results")
        };
        let (x, labels) = (read(inputs[0]), read(inputs[1]));
        let (losses, max, sum) = (write(losses), write(max), write(sum));
        let target = max.scratch(labels.elements);
        gpu::row_max(x.clone(), columns, max.clone());
        gpu::row_exp_sum(
            x,
            columns,
            max.clone(),
            labels.clone(),
            sum.clone(),
            target.clone(),
        );
        gpu::losses(max, sum, target, labels, self.ignored, losses);
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let columns = gpu::Columns {
            width: site.inputs[0].ty.last(),
            first: 0,
            valid: self.valid(&site.inputs[0].ty),
        };
        let rows = gpu::RowStatistics {
            max: read(backward.output(1)),
            sum: read(backward.output(2)),
            labels: read(backward.input(1)),
            ignored: self.ignored,
            scale: read(backward.only_gradient("cross_entropy")),
        };
        let logits = backward.inputs[0].as_ref();
        if let Some(dx) = backward.want(0) {
            gradient_gpu(logits, columns, rows, dx);
        }
    }
}
