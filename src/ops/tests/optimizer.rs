//! Updates in place, and the factor that clips.

use super::harness::{Array, Case, FLOATS, U, memory};
use crate::dtype::DType;
use crate::ops::{AdamW, ClipFactor, Sgd};
use crate::reference::{self, assert_within};
use crate::tensor::{Memory, Tensor};

struct State {
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
}

fn state(memory: &Memory, n: usize, gradient: DType) -> State {
    let f32 = |name| Array::normal(name, &[n], DType::F32).tensor(memory);
    let v: Vec<f64> = reference::normals("v", n).iter().map(|x| x * x).collect();
    State {
        p: f32("p"),
        m: f32("m"),
        v: Array::rounded(&[n], DType::F32, v).tensor(memory),
        g: Array::normal("g", &[n], gradient).tensor(memory),
    }
}

fn values(x: &Tensor) -> Vec<f64> {
    Array::of(x).values
}

fn within(what: &str, got: &Tensor, want: &[f64], size: &[f64]) {
    let bound: Vec<f64> = size.iter().map(|s| 32.0 * U * s + 1e-43).collect();
    assert_within(what, &values(got), want, &bound);
}

#[test]
pub(super) fn adamw_follows_the_textbook() {
    let memory = memory();
    for n in [0, 1, 37, 5000] {
        for gradient in FLOATS {
            for (step, clip) in [(1, None), (7, Some(0.25)), (1000, Some(1.0))] {
                let mut s = state(&memory, n, gradient);
                let rule = AdamW {
                    lr: 0.01,
                    weight_decay: 0.1,
                    step,
                    ..Default::default()
                };
                let in_f64 = reference::AdamW {
                    lr: rule.lr.into(),
                    beta1: rule.beta1.into(),
                    beta2: rule.beta2.into(),
                    eps: rule.eps.into(),
                    weight_decay: rule.weight_decay.into(),
                    step: step as u32,
                };
                let before = [values(&s.p), values(&s.m), values(&s.v), values(&s.g)];
                let [p, m, v, g] = &before;
                let (wp, wm, wv) = reference::adamw(&in_f64, p, [m, v], g, clip.unwrap_or(1.0));
                let factor =
                    clip.map(|c| Array::rounded(&[1], DType::F32, vec![c]).tensor(&memory));
                rule.update(&mut s.p, &mut s.m, &mut s.v, &s.g, factor.as_ref());
                let sum = |a: &[f64], b: &[f64]| -> Vec<f64> {
                    a.iter().zip(b).map(|(a, b)| a.abs() + b.abs()).collect()
                };
                within("m", &s.m, &wm, &sum(m, g));
                within("v", &s.v, &wv, &wv);
                // m may be what is left of a difference: the step is off by m's error over the root.
                let root =
                    |i: usize| (wv[i] / (1.0 - in_f64.beta2.powi(step as i32))).sqrt() + in_f64.eps;
                let rate = in_f64.lr / (1.0 - in_f64.beta1.powi(step as i32));
                let size: Vec<f64> = (0..n)
                    .map(|i| p[i].abs() + rate * (m[i].abs() + g[i].abs()) / root(i))
                    .collect();
                within("p", &s.p, &wp, &size);
            }
        }
    }
}

#[test]
pub(super) fn sgd_follows_the_textbook() {
    let memory = memory();
    for n in [0, 1, 37, 5000] {
        for gradient in FLOATS {
            for momentum in [None, Some(0.9f32)] {
                let mut s = state(&memory, n, gradient);
                let rule = Sgd {
                    lr: 0.01,
                    momentum: momentum.unwrap_or(0.0),
                    weight_decay: 0.1,
                };
                let in_f64 = reference::Sgd {
                    lr: rule.lr.into(),
                    momentum: rule.momentum.into(),
                    weight_decay: rule.weight_decay.into(),
                };
                let [p, m, g] = [values(&s.p), values(&s.m), values(&s.g)];
                let (wp, wm) = reference::sgd(&in_f64, &p, &m, &g, 0.5);
                let factor = Array::rounded(&[1], DType::F32, vec![0.5]).tensor(&memory);
                rule.update(&mut s.p, momentum.map(|_| &mut s.m), &s.g, Some(&factor));
                let size: Vec<f64> = (0..n)
                    .map(|i| p[i].abs() + m[i].abs() + g[i].abs())
                    .collect();
                within("p", &s.p, &wp, &size);
                if momentum.is_some() {
                    within("momentum", &s.m, &wm, &size);
                }
            }
        }
    }
}

#[test]
pub(super) fn a_factor_that_is_not_finite_changes_nothing() {
    let memory = memory();
    for factor in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let factor = Array::rounded(&[1], DType::F32, vec![factor]).tensor(&memory);
        let mut s = state(&memory, 100, DType::F32);
        let before = [values(&s.p), values(&s.m), values(&s.v)];
        AdamW::default().update(&mut s.p, &mut s.m, &mut s.v, &s.g, Some(&factor));
        let sgd = Sgd {
            lr: 1.0,
            momentum: 0.5,
            weight_decay: 0.0,
        };
        sgd.update(&mut s.p, Some(&mut s.m), &s.g, Some(&factor));
        assert_eq!(before, [values(&s.p), values(&s.m), values(&s.v)]);
    }
}

#[test]
#[should_panic(expected = "adamw: the parameter is f32[3], g is f32[4]")]
fn shapes_that_differ_are_refused() {
    let memory = memory();
    let (mut a, b) = (state(&memory, 3, DType::F32), state(&memory, 4, DType::F32));
    AdamW::default().update(&mut a.p, &mut a.m, &mut a.v, &b.g, None);
}

#[test]
pub(super) fn clipping() {
    for (square, max, factor, norm) in [
        (0.0, 1.0, 1.0, 0.0),
        (0.25, 1.0, 1.0, 0.5),
        (16.0, 1.0, 1.0 / (4.0 + 1e-6), 4.0),
        (16.0, f64::INFINITY, 1.0, 4.0),
    ] {
        assert_eq!(reference::clip(norm, max), factor);
        let op = ClipFactor {
            max_norm: max as f32,
        };
        let s = Array::rounded(&[1], DType::F32, vec![square]);
        Case::new(&op, vec![s]).check(
            |_| {
                vec![
                    (vec![factor], vec![4.0 * U * factor]),
                    (vec![norm], vec![0.0]),
                ]
            },
            |_, _, _| vec![None],
        );
    }
    for square in [f64::NAN, f64::INFINITY] {
        let op = ClipFactor { max_norm: 1.0 };
        let out = Case::new(&op, vec![Array::rounded(&[1], DType::F32, vec![square])]).run();
        assert!(out[0].values[0].is_nan() && !out[1].values[0].is_finite());
    }
}
