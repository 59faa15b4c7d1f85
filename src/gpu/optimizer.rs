//! What follows the gradients: their norm's bound, and the steps of AdamW and of descent.

use super::launch::{Launch, Operand};
use super::library as k;

pub(crate) fn clip_factor(squares: Operand, max_norm: f32, factor: Operand, norm: Operand) {
    Launch::new(&k::CLIP_FACTOR)
        .operand("squares", squares)
        .operand("factor", factor)
        .operand("norm", norm)
        .number("max_norm", max_norm)
        .run(1);
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
