//! Kernels in which an element of the result depends on few of the operands, at the same place or one beside it.

use super::launch::{Operand, map, table};
use super::library as k;
use crate::dtype::DType;
use crate::random::Stream;

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
