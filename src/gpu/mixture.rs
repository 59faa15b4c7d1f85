//! Mixtures of experts: choice, slots, rows mixed from other rows, the balance loss; and heads joined with what they share.

use super::elementwise::fill;
use super::launch::{Launch, Operand};
use super::launch::{map, table};
use super::library as k;
use super::rows::sum;
use crate::dtype::DType;

pub(crate) fn sigmoid(x: Operand, y: Operand) {
    let (launch, n) = map(&k::SIGMOID, y);
    launch.operand("x", x).run(n);
}

pub(crate) fn sigmoid_backward(y: Operand, dy: Operand, dx: Operand) {
    let (launch, n) = map(&k::SIGMOID_BACKWARD, dx);
    launch.operand("y", y).operand("dy", dy).run(n);
}

/// A router's rule.
#[derive(Clone, Copy)]
pub(crate) struct Routing {
    pub(crate) experts: usize,
    pub(crate) k: usize,
    pub(crate) normalize: bool,
    pub(crate) scale: f32,
    pub(crate) least: f32,
    pub(crate) close: f32,
}

impl Routing {
    fn of(self, launch: Launch) -> Launch {
        launch
            .number("experts", self.experts)
            .number("k", self.k)
            .number("scale", self.scale)
            .number("least", self.least)
            .constant("NORMALIZE", self.normalize as u32)
    }
}

pub(crate) fn route(
    rule: Routing,
    scores: Operand,
    bias: Option<Operand>,
    [weights, experts, close]: [Operand; 3],
) {
    let rows = scores.elements / rule.experts;
    let of_row = scores.scratch(rows.max(1));
    let launch = Launch::new(&k::ROUTE)
        .operand("scores", scores)
        .optional("bias", bias)
        .operand("weights", weights)
        .operand("chosen", experts)
        .operand("close", of_row.clone())
        .number("margin", rule.close);
    rule.of(launch).run(rows);
    match rows {
        0 => fill(0.0, None, close),
        _ => sum(of_row, false, close),
    }
}

pub(crate) fn route_backward(
    rule: Routing,
    scores: Operand,
    experts: Operand,
    dweights: Operand,
    dscores: Operand,
) {
    let (launch, n) = map(&k::ROUTE_BACKWARD, dscores);
    let launch = launch
        .operand("scores", scores)
        .operand("chosen", experts)
        .operand("dweights", dweights);
    rule.of(launch).run(n);
}

/// Places of the assignments of b sequences of t tokens with k choices among e experts of `capacity` slots, filled in `order`.
pub(crate) fn slots(
    [b, t, choices, experts, capacity]: [usize; 5],
    order: Option<&[u32]>,
    chosen: Operand,
    slots: Operand,
    origin: Operand,
    load: Operand,
) {
    let order = order.map(|order| table(&chosen.chip, DType::U32, order));
    let sizes = |launch: Launch| {
        launch
            .number("sequences", b)
            .number("tokens", t)
            .number("k", choices)
            .number("experts", experts)
            .number("capacity", capacity)
    };
    let launch = Launch::new(&k::SLOTS)
        .operand("chosen", chosen.clone())
        .optional("order", order)
        .operand("slots", slots)
        .operand("origin", origin);
    sizes(launch).run(b * experts);
    let (launch, n) = map(&k::EXPERT_LOAD, load);
    sizes(launch.operand("chosen", chosen)).run(n);
}

/// The part of the experts' buffers that a chip holds.
#[derive(Clone, Copy)]
pub(crate) struct Buffers {
    pub(crate) width: usize,
    pub(crate) b: usize,
    pub(crate) k: usize,
    pub(crate) assignments: usize,
    pub(crate) first_expert: usize,
    pub(crate) experts: usize,
    pub(crate) capacity: usize,
    pub(crate) first_slot: usize,
    pub(crate) slots: usize,
}

impl Buffers {
    fn by_slot(self, launch: Launch) -> Launch {
        launch
            .number("width", self.width)
            .number("b", self.b)
            .number("k", self.k)
            .number("assignments", self.assignments)
            .number("first_expert", self.first_expert)
            .number("experts", self.experts)
            .number("capacity", self.capacity)
            .number("first_slot", self.first_slot)
            .number("places", self.slots)
    }
}

/// `y[token] = sum over its choices of weight x[slot]`.
pub(crate) fn mix_by_slot(
    at: Buffers,
    x: Operand,
    slots: Operand,
    weights: Option<Operand>,
    y: Operand,
) {
    let (launch, n) = map(&k::MIX_BY_SLOT, y);
    let launch = launch
        .operand("x", x)
        .operand("slots", slots)
        .optional("weights", weights);
    at.by_slot(launch).run(n);
}

/// `y[slot] = weight x[token]`, 0 in empty slots.
pub(crate) fn mix_by_origin(
    at: Buffers,
    x: Operand,
    origin: Operand,
    weights: Option<Operand>,
    y: Operand,
) {
    let (launch, n) = map(&k::MIX_BY_ORIGIN, y);
    launch
        .operand("x", x)
        .operand("origin", origin)
        .optional("weights", weights)
        .number("width", at.width)
        .number("b", at.b)
        .number("k", at.k)
        .number("assignments", at.assignments)
        .number("places", at.slots)
        .run(n);
}

/// `y[token, choice] = a[token] . x[slot]`.
pub(crate) fn mix_dots(at: Buffers, a: Operand, x: Operand, slots: Operand, y: Operand) {
    let rows = y.elements;
    let launch = Launch::new(&k::MIX_DOTS)
        .operand("a", a)
        .operand("x", x)
        .operand("slots", slots)
        .operand("y", y);
    at.by_slot(launch).run(rows);
}

/// `e f / t` of each sequence's experts: what a score adds to its balance loss.
fn slopes([b, t, e, choices]: [usize; 4], chosen: Operand) -> Operand {
    let slopes = chosen.scratch((b * e).max(1));
    let (launch, _) = map(&k::BALANCE_SLOPES, slopes.clone());
    launch
        .operand("chosen", chosen)
        .number("tokens", t)
        .number("k", choices)
        .number("experts", e)
        .run(b * e);
    slopes
}

pub(crate) fn balance_loss(
    sizes: [usize; 4],
    normalize: bool,
    scores: Operand,
    chosen: Operand,
    loss: Operand,
) {
    let slopes = slopes(sizes, chosen);
    let (launch, n) = map(&k::BALANCE_LOSS, loss);
    launch
        .operand("scores", scores)
        .operand("slopes", slopes)
        .number("tokens", sizes[1])
        .number("experts", sizes[2])
        .constant("NORMALIZE", normalize as u32)
        .run(n);
}

pub(crate) fn balance_loss_backward(
    sizes: [usize; 4],
    normalize: bool,
    scores: Operand,
    chosen: Operand,
    dloss: Operand,
    dscores: Operand,
) {
    let slopes = slopes(sizes, chosen);
    let (launch, n) = map(&k::BALANCE_LOSS_BACKWARD, dscores);
    launch
        .operand("scores", scores)
        .operand("slopes", slopes)
        .operand("dloss", dloss)
        .number("tokens", sizes[1])
        .number("experts", sizes[2])
        .constant("NORMALIZE", normalize as u32)
        .run(n);
}

/// bias += rate sign(mean - load).
pub(crate) fn balance_bias(bias: Operand, load: Operand, rate: f32, mean: f32) {
    let n = bias.elements;
    Launch::new(&k::BALANCE_BIAS)
        .operand("bias", bias)
        .operand("load", load)
        .number("rate", rate)
        .number("mean", mean)
        .run(n);
}

/// y[token, head] = x[token, head], shared[token]; sizes are tokens, heads, the heads' own elements, the shared ones.
pub(crate) fn join_heads(
    [_, heads, own, shared_width]: [usize; 4],
    x: Operand,
    shared: Operand,
    y: Operand,
) {
    let (launch, n) = map(&k::JOIN_HEADS, y);
    launch
        .operand("x", x)
        .operand("shared", shared)
        .number("heads", heads)
        .number("own", own)
        .number("rest", shared_width)
        .run(n);
}

/// dshared[token] = sum over heads of the shared part of dy.
pub(crate) fn sum_shared([_, heads, own, shared_width]: [usize; 4], dy: Operand, dshared: Operand) {
    let (launch, n) = map(&k::SUM_SHARED, dshared);
    launch
        .operand("dy", dy)
        .number("heads", heads)
        .number("own", own)
        .number("rest", shared_width)
        .run(n);
}
