//! What is no matrix product: the kernels behind the ops on rows, columns and single elements.

use super::chip::{Chip, fail};
use super::launch::{Launch, Operand};
use super::library as k;
use crate::dtype::DType;
use crate::random::Stream;

/// Rows that one invocation sums on its way down a column; more rows are summed in parts, and the parts again.
const PART: usize = 256;

impl Operand {
    /// f32 working memory on the same chip.
    pub(crate) fn scratch(&self, elements: usize) -> Operand {
        self.scratch_of(DType::F32, elements)
    }

    /// Working memory of any type on the same chip.
    pub(crate) fn scratch_of(&self, dtype: DType, elements: usize) -> Operand {
        let bytes = (elements * dtype.size()) as u64;
        let block = self.chip.allocate(bytes).unwrap_or_else(|e| fail(e));
        Operand::holding(&self.chip, block, dtype, elements)
    }
}

/// A table of this crate's numbers on the chip.
pub(crate) fn table<T: bytemuck::Pod>(chip: &Chip, dtype: DType, contents: &[T]) -> Operand {
    let bytes: &[u8] = bytemuck::cast_slice(contents);
    let block = chip
        .allocate(bytes.len() as u64)
        .unwrap_or_else(|e| fail(e));
    chip.write(&block, bytes);
    Operand::holding(chip, block, dtype, contents.len())
}

pub(super) fn map(kernel: &super::Kernel, y: Operand) -> (Launch, usize) {
    let n = y.elements;
    let name = super::shader::interface(kernel).slots[0].name.clone();
    (Launch::new(kernel).operand(&name, y), n)
}

pub(crate) fn add(a: Operand, b: Operand, y: Operand) {
    let (launch, n) = map(&k::ADD, y);
    launch.operand("a", a).operand("b", b).run(n);
}

/// y += x.
pub(crate) fn add_assign(y: Operand, x: Operand) {
    add(y.clone(), x, y);
}

pub(crate) fn multiply(a: Operand, b: Operand, y: Operand) {
    let (launch, n) = map(&k::MULTIPLY, y);
    launch.operand("a", a).operand("b", b).run(n);
}

/// y = factor s x.
pub(crate) fn scale(x: Operand, factor: f32, s: Option<Operand>, y: Operand) {
    let (launch, n) = map(&k::SCALE, y);
    let launch = launch.operand("x", x).optional("s", s);
    launch.number("factor", factor).run(n);
}

/// y = value, or the number s.
pub(crate) fn fill(value: f32, s: Option<Operand>, y: Operand) {
    let (launch, n) = map(&k::FILL, y);
    launch.optional("s", s).number("value", value).run(n);
}

pub(crate) fn cast(x: Operand, y: Operand) {
    let (launch, n) = map(&k::CAST, y);
    launch.operand("x", x).run(n);
}

/// Copies x to the elements of y from `at` on, both of 4 bytes an element.
pub(crate) fn place(x: Operand, y: Operand, at: usize) {
    let bytes = 4 * x.elements as u64;
    if bytes > 0 {
        let (from, to) = (x.buffer.seen(), y.buffer.seen());
        x.chip.copy_to(from, to, 4 * at as u64, bytes);
    }
}

pub(crate) fn add_bias(x: Operand, bias: Operand, y: Operand) {
    let (launch, n) = map(&k::ADD_BIAS, y);
    let width = bias.elements;
    let launch = launch.operand("x", x).operand("bias", bias);
    launch.number("width", width).run(n);
}

/// y = f(x), f by its number in the prelude.
pub(crate) fn activation(f: u32, x: Operand, y: Operand) {
    let (launch, n) = map(&k::ACTIVATION, y);
    launch.operand("x", x).constant("FUNCTION", f).run(n);
}

pub(crate) fn activation_backward(f: u32, x: Operand, dy: Operand, dx: Operand) {
    let (launch, n) = map(&k::ACTIVATION_BACKWARD, dx);
    let launch = launch.operand("x", x).operand("dy", dy);
    launch.constant("FUNCTION", f).run(n);
}

pub(crate) fn swiglu(gate: Operand, up: Operand, y: Operand) {
    let (launch, n) = map(&k::SWIGLU, y);
    launch.operand("gate", gate).operand("up", up).run(n);
}

pub(crate) fn swiglu_dgate(gate: Operand, up: Operand, dy: Operand, dgate: Operand) {
    let (launch, n) = map(&k::SWIGLU_DGATE, dgate);
    let launch = launch.operand("gate", gate).operand("up", up);
    launch.operand("dy", dy).run(n);
}

pub(crate) fn swiglu_dup(gate: Operand, dy: Operand, dup: Operand) {
    let (launch, n) = map(&k::SWIGLU_DUP, dup);
    launch.operand("gate", gate).operand("dy", dy).run(n);
}

pub(crate) fn ratio(a: Operand, b: Operand, y: Operand) {
    let (launch, n) = map(&k::RATIO, y);
    launch.operand("a", a).operand("b", b).run(n);
}

pub(crate) fn clip_factor(squares: Operand, max_norm: f32, factor: Operand, norm: Operand) {
    Launch::new(&k::CLIP_FACTOR)
        .operand("squares", squares)
        .operand("factor", factor)
        .operand("norm", norm)
        .number("max_norm", max_norm)
        .run(1);
}

/// See the CPU's; `start(r)` is the index in the whole of the first element of run r.
pub(crate) fn dropout(
    x: Operand,
    y: Operand,
    p: f32,
    stream: Stream,
    run: usize,
    start: impl Fn(usize) -> u64,
) {
    let starts: Vec<u32> = (0..x.elements / run.max(1))
        .map(start)
        .flat_map(|s| [s as u32, (s >> 32) as u32])
        .collect();
    let starts = table(&y.chip, DType::U32, &starts);
    let [key0, key1, name0, name1] = stream.address();
    let (launch, n) = map(&k::DROPOUT, y);
    launch
        .operand("x", x)
        .operand("starts", starts)
        .number("p", p)
        .number("factor", if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 })
        .number("key0", key0)
        .number("key1", key1)
        .number("name0", name0)
        .number("name1", name1)
        .number("run", run.max(1))
        .run(n);
}

/// Where a piece lies in a whole that is cut along an axis: blocks of `inner` elements, of which the piece has `width` from
/// `start` on.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) inner: usize,
    pub(crate) start: usize,
    pub(crate) width: usize,
}

impl Piece {
    fn of(self, launch: Launch) -> Launch {
        launch
            .number("width", self.width)
            .number("inner", self.inner)
            .number("start", self.start)
    }

    /// The piece out of the whole, or added to what is there.
    pub(crate) fn take(self, whole: Operand, piece: Operand, add: bool) {
        let (launch, n) = map(&k::TAKE, piece);
        let launch = launch.operand("x", whole).constant("ADD", add as u32);
        self.of(launch).run(n);
    }

    /// The whole from the piece, 0 elsewhere; or the piece added to the whole.
    pub(crate) fn put(self, piece: Operand, whole: Operand, add: bool) {
        let (launch, n) = map(&k::PUT, whole);
        let launch = launch.operand("x", piece).constant("ADD", add as u32);
        self.of(launch).run(n);
    }

    /// The piece into the whole, of which the rest is left as it is.
    pub(crate) fn place(self, piece: Operand, whole: Operand) {
        let n = piece.elements;
        let launch = Launch::new(&k::PLACE);
        let launch = launch.operand("x", piece).operand("y", whole);
        self.of(launch).run(n);
    }
}

/// y of `shape` = x with strides `from`, in elements.
///
/// # Panics
/// For more than six axes.
pub(crate) fn transpose(x: Operand, from: &[usize], y: Operand, shape: &[usize]) {
    assert!(
        shape.len() <= 6,
        "a GPU transposes up to six axes, got {shape:?}; reshape neighbours into one"
    );
    let missing = 6 - shape.len();
    let (mut launch, n) = map(&k::TRANSPOSE, y);
    for axis in 0..6usize {
        let (size, stride) = match axis.checked_sub(missing) {
            Some(i) => (shape[i], from[i]),
            None => (1, 0),
        };
        if axis > 0 {
            launch = launch.number(&format!("s{axis}"), size);
        }
        launch = launch.number(&format!("f{axis}"), stride);
    }
    launch.operand("x", x).run(n);
}

/// A turn of heads: [tokens, heads, head_dim], the first 2 `half` elements of each head.
pub(crate) struct Turn {
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) half: usize,
    pub(crate) pairs: bool,
    pub(crate) inverse: bool,
}

pub(crate) fn rotary(x: Operand, y: Operand, turn: Turn, cos: &[f32], sin: &[f32]) {
    let cos = table(&y.chip, DType::F32, cos);
    let sin = table(&y.chip, DType::F32, sin);
    let (launch, n) = map(&k::ROTARY, y);
    launch
        .operand("x", x)
        .operand("cos", cos)
        .operand("sin", sin)
        .number("tokens", turn.tokens)
        .number("heads", turn.heads)
        .number("head_dim", turn.head_dim)
        .number("half", turn.half.max(1))
        .number("sign", if turn.inverse { -1.0 } else { 1.0 })
        .constant("PAIRS", turn.pairs as u32)
        .run(if turn.half == 0 { 0 } else { n });
}

pub(crate) fn embedding(table: Operand, ids: Operand, first: usize, width: usize, y: Operand) {
    let rows = table.elements.checked_div(width).unwrap_or(0);
    let (launch, n) = map(&k::EMBEDDING, y);
    launch
        .operand("table", table)
        .operand("ids", ids)
        .number("width", width)
        .number("first", first)
        .number("rows", rows)
        .run(n);
}

/// dtable (+)= rows of dy by id. The tokens of each row are listed on the host, which has the ids: no row searches them all,
/// and none needs an atomic sum.
pub(crate) fn embedding_backward(
    dy: Operand,
    ids: &[u32],
    first: usize,
    dtable: Operand,
    add: bool,
) {
    let width = dy.elements.checked_div(ids.len()).unwrap_or(0);
    let rows = dtable.elements.checked_div(width).unwrap_or(0);
    if rows == 0 {
        if !add {
            fill(0.0, None, dtable);
        }
        return;
    }
    let row = |id: u32| (id as usize).checked_sub(first).filter(|&r| r < rows);
    let mut begin = vec![0u32; rows + 1];
    ids.iter()
        .filter_map(|&id| row(id))
        .for_each(|r| begin[r + 1] += 1);
    for r in 0..rows {
        begin[r + 1] += begin[r];
    }
    let mut next = begin.clone();
    let mut order = vec![0u32; (begin[rows] as usize).max(1)];
    for (token, &id) in ids.iter().enumerate() {
        if let Some(r) = row(id) {
            order[next[r] as usize] = token as u32;
            next[r] += 1;
        }
    }
    let order = table(&dy.chip, DType::U32, &order);
    let begin = table(&dy.chip, DType::U32, &begin);
    let (launch, n) = map(&k::EMBEDDING_BACKWARD, dtable);
    launch
        .operand("dy", dy)
        .operand("order", order)
        .operand("begin", begin)
        .number("width", width)
        .constant("ADD", add as u32)
        .run(n);
}

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

/// The constants of an AdamW step, as the kernel takes them.
pub(crate) struct AdamWStep {
    pub(crate) beta1: f32,
    pub(crate) beta2: f32,
    pub(crate) eps: f32,
    /// 1 - lr weight_decay.
    pub(crate) keep: f32,
    /// lr / (1 - beta1^step).
    pub(crate) rate: f32,
    /// 1 / (1 - beta2^step).
    pub(crate) root: f32,
}

pub(crate) fn adamw([p, m, v]: [Operand; 3], g: Operand, clip: Option<Operand>, step: AdamWStep) {
    let n = p.elements;
    Launch::new(&k::ADAMW)
        .operand("g", g)
        .optional("clip", clip)
        .operand("p", p)
        .operand("m", m)
        .operand("v", v)
        .number("beta1", step.beta1)
        .number("beta2", step.beta2)
        .number("eps", step.eps)
        .number("keep", step.keep)
        .number("rate", step.rate)
        .number("root", step.root)
        .run(n);
}

pub(crate) fn sgd(
    p: Operand,
    momentum: Option<Operand>,
    g: Operand,
    clip: Option<Operand>,
    [lr, decay, weight_decay]: [f32; 3],
) {
    let n = p.elements;
    Launch::new(&k::SGD)
        .operand("g", g)
        .optional("clip", clip)
        .operand("p", p)
        .optional("momentum", momentum)
        .number("lr", lr)
        .number("decay", decay)
        .number("weight_decay", weight_decay)
        .run(n);
}
