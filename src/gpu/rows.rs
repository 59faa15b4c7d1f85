//! Sums, norms and losses over rows and columns.

use super::elementwise::fill;
use super::launch::{Launch, Operand, map};
use super::library as k;

/// Rows that one invocation sums on its way down a column; more rows are summed in parts, and the parts again.
const PART: usize = 256;

/// out[j] (+)= sum over rows of x[i, j], in parts of [`PART`] rows, and the parts in order.
pub(crate) fn column_sum(x: Operand, out: Operand, add: bool) {
    let width = out.elements;
    let rows = x.elements.checked_div(width).unwrap_or(0);
    let one = |x: Operand, rows: usize, length: usize, parts: Operand, add: bool| {
        let (launch, n) = map(&k::COLUMN_SUM, parts);
        launch
            .operand("x", x)
            .number("width", width.max(1))
            .number("rows", rows)
            .number("length", length)
            .constant("ADD", add as u32)
            .run(n);
    };
    if rows <= PART {
        return one(x, rows, rows, out, add);
    }
    let parts = x.scratch(rows.div_ceil(PART) * width);
    one(x, rows, PART, parts.clone(), false);
    column_sum(parts, out, add);
}

/// What a norm keeps of its forward.
#[derive(Clone)]
pub(crate) struct NormStatistics {
    pub(crate) mean: Option<Operand>,
    pub(crate) rstd: Operand,
}

pub(crate) fn norm(
    x: Operand,
    weight: Option<Operand>,
    bias: Option<Operand>,
    eps: f32,
    y: Operand,
    statistics: NormStatistics,
) {
    let rows = statistics.rstd.elements;
    let width = x.elements.checked_div(rows).unwrap_or(0);
    Launch::new(&k::NORM)
        .constant("MEAN", statistics.mean.is_some() as u32)
        .operand("x", x)
        .optional("weight", weight)
        .optional("bias", bias)
        .operand("y", y)
        .optional("mean", statistics.mean)
        .operand("rstd", statistics.rstd)
        .number("width", width)
        .number("eps", eps)
        .run(rows);
}

pub(crate) fn norm_dx(
    x: Operand,
    dy: Operand,
    weight: Option<Operand>,
    statistics: NormStatistics,
    dx: Operand,
) {
    let rows = statistics.rstd.elements;
    let width = x.elements.checked_div(rows).unwrap_or(0);
    Launch::new(&k::NORM_BACKWARD)
        .operand("x", x)
        .operand("dy", dy)
        .optional("weight", weight)
        .optional("mean", statistics.mean)
        .operand("rstd", statistics.rstd)
        .operand("dx", dx)
        .number("width", width)
        .run(rows);
}

/// dweight (+)= column sums of dy h.
pub(crate) fn norm_dweight(
    x: Operand,
    dy: Operand,
    statistics: NormStatistics,
    dweight: Operand,
    add: bool,
) {
    let width = dweight.elements;
    let rows = statistics.rstd.elements;
    let parts = x.scratch(rows.div_ceil(PART) * width);
    let (launch, n) = map(&k::NORM_WEIGHT, parts.clone());
    launch
        .operand("x", x)
        .operand("dy", dy)
        .optional("mean", statistics.mean)
        .operand("rstd", statistics.rstd)
        .number("width", width.max(1))
        .number("rows", rows)
        .number("length", PART)
        .run(n);
    column_sum(parts, dweight, add);
}

pub(crate) fn softmax(x: Operand, width: usize, y: Operand) {
    let rows = x.elements.checked_div(width).unwrap_or(0);
    let launch = Launch::new(&k::SOFTMAX).operand("x", x).operand("y", y);
    launch.number("width", width).run(rows);
}

pub(crate) fn softmax_backward(y: Operand, dy: Operand, width: usize, dx: Operand) {
    let rows = y.elements.checked_div(width).unwrap_or(0);
    Launch::new(&k::SOFTMAX_BACKWARD)
        .operand("y", y)
        .operand("dy", dy)
        .operand("dx", dx)
        .number("width", width)
        .run(rows);
}

/// A chip's columns of logits: how many a row has, where they begin in the vocabulary, and how many of that exist.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    pub(crate) width: usize,
    pub(crate) first: usize,
    pub(crate) valid: usize,
}

impl Columns {
    fn visible(self) -> usize {
        self.valid.saturating_sub(self.first).min(self.width)
    }
}

pub(crate) fn row_max(x: Operand, columns: Columns, max: Operand) {
    let rows = max.elements;
    let launch = Launch::new(&k::ROW_MAX).operand("x", x).operand("max", max);
    launch
        .number("width", columns.width)
        .number("visible", columns.visible())
        .run(rows);
}

pub(crate) fn row_exp_sum(
    x: Operand,
    columns: Columns,
    max: Operand,
    labels: Operand,
    sum: Operand,
    target: Operand,
) {
    let rows = max.elements;
    Launch::new(&k::ROW_EXP_SUM)
        .operand("x", x)
        .operand("max", max)
        .operand("labels", labels)
        .operand("sum", sum)
        .operand("target_logit", target)
        .number("width", columns.width)
        .number("visible", columns.visible())
        .number("first", columns.first)
        .run(rows);
}

pub(crate) fn losses(
    max: Operand,
    sum: Operand,
    target: Operand,
    labels: Operand,
    ignored: u32,
    loss: Operand,
) {
    let (launch, n) = map(&k::LOSSES, loss);
    launch
        .operand("max", max)
        .operand("sum", sum)
        .operand("target_logit", target)
        .operand("labels", labels)
        .number("ignored", ignored)
        .run(n);
}

/// What the gradient of logits is computed from, besides them.
pub(crate) struct RowStatistics {
    pub(crate) max: Operand,
    pub(crate) sum: Operand,
    pub(crate) labels: Operand,
    pub(crate) ignored: u32,
    /// Gradients of the losses.
    pub(crate) scale: Operand,
}

/// dx = scale (softmax - onehot); x may be dx itself.
pub(crate) fn cross_entropy_gradient(
    x: Operand,
    columns: Columns,
    rows: RowStatistics,
    dx: Operand,
) {
    let (launch, n) = map(&k::CROSS_ENTROPY_GRADIENT, dx);
    launch
        .operand("x", x)
        .operand("max", rows.max)
        .operand("sum", rows.sum)
        .operand("labels", rows.labels)
        .operand("scale", rows.scale)
        .number("width", columns.width.max(1))
        .number("visible", columns.visible())
        .number("first", columns.first)
        .number("ignored", rows.ignored)
        .run(n);
}

/// y = sum of x, or of its squares: blocks of 4096 elements, then blocks of their sums, until one is left.
pub(crate) fn sum(x: Operand, squares: bool, y: Operand) {
    let n = x.elements;
    if n == 0 {
        return fill(0.0, None, y);
    }
    let blocks = n.div_ceil(4096);
    let parts = if blocks == 1 {
        y.clone()
    } else {
        x.scratch(blocks)
    };
    Launch::new(&k::SUM)
        .operand("x", x)
        .operand("parts", parts.clone())
        .number("elements", n)
        .constant("SQUARES", squares as u32)
        .run(blocks);
    if blocks > 1 {
        sum(parts, false, y);
    }
}

pub(crate) fn count_labels(labels: Operand, ignored: u32, y: Operand) {
    let ones = labels.scratch(labels.elements);
    let (launch, n) = map(&k::COUNT_LABELS, ones.clone());
    launch
        .operand("labels", labels)
        .number("ignored", ignored)
        .run(n);
    sum(ones, false, y);
}
