//! Attention, forward and backward, of queries, keys and values that lie by tokens.
//!
//! The textbook costs as much as all pairs of tokens, in f64 and by hand: it checks some queries (with all their keys) and,
//! of backward, some keys (with all their queries). Backward is held to what follows from the results that it was given.

use super::measure::{Demand, Measured, measure};
use super::operands::{Call, U, normal, numbers, some_of, stored, unwritten};
use serde::Deserialize;
use std::fmt;
use std::num::NonZeroUsize;
use std::time::Duration;
use supernode::DType;
use supernode::ops::{Accum, Attention, Backward, Gradient, Op};
use supernode::reference::{self, assert_within, gamma};
use supernode::spmd::Chip;
use supernode::tensor::{Tensor, TensorType};

/// Which half is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Pass {
    Forward,
    Backward,
}

/// Sizes of an attention of as many queries as keys.
#[derive(Debug, Deserialize)]
pub(super) struct Heads {
    batch: NonZeroUsize,
    heads: NonZeroUsize,
    kv_heads: Option<NonZeroUsize>,
    tokens: NonZeroUsize,
    head_dim: NonZeroUsize,
    causal: bool,
    pass: Pass,
}

impl fmt::Display for Heads {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let n = self.sizes();
        write!(f, "B{} H{}", n.b, n.h)?;
        if n.g != n.h {
            write!(f, "/{}", n.g)?;
        }
        let causal = if self.causal { " causal" } else { "" };
        let pass = match self.pass {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
        };
        write!(f, " S{} D{}{causal} {pass}", n.t, n.d)
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    t: usize,
    h: usize,
    g: usize,
    d: usize,
}

impl Heads {
    fn sizes(&self) -> Sizes {
        Sizes {
            b: self.batch.get(),
            t: self.tokens.get(),
            h: self.heads.get(),
            g: self.kv_heads.unwrap_or(self.heads).get(),
            d: self.head_dim.get(),
        }
    }

    /// A sentence if the case cannot be run.
    pub(super) fn check(&self) -> Result<(), String> {
        let Sizes { b, t, h, g, d } = self.sizes();
        if !h.is_multiple_of(g) {
            return Err(format!("{g} key heads do not divide {h} query heads"));
        }
        if d > 256 {
            return Err(format!(
                "head_dim {d} is above 256, the most that is supported"
            ));
        }
        let elements = [t, h, d].iter().try_fold(b, |all, &x| all.checked_mul(x));
        match elements.is_some_and(|e| e <= isize::MAX as usize / 8) {
            true => Ok(()),
            false => Err(format!("{self} is too large for this machine's addresses")),
        }
    }

    pub(super) fn run(&self, chip: &Chip, dtype: DType) -> Measured {
        let Sizes { b, t, h, g, d } = self.sizes();
        let op = Attention {
            causal: self.causal,
            ..Attention::default()
        };
        let [q, k, v] = [("q", h), ("k", g), ("v", g)]
            .map(|(name, heads)| normal(chip, name, &[b, t, heads, d], dtype));
        let mut call = Call::new(chip, &op, vec![&q, &k, &v]);
        call.forward();
        let textbook = Textbook {
            n: self.sizes(),
            causal: self.causal,
            dtype,
            q: &q,
            k: &k,
            v: &v,
            o: call.outputs[0].clone(),
            lse: call.outputs[1].clone(),
        };
        textbook.verify_forward();
        let [reads, writes] = call.bytes();
        let all = 4.0 * [b, h, t, t, d].map(|x| x as f64).iter().product::<f64>();
        let mut demand = Demand {
            flops: if self.causal { all / 2.0 } else { all },
            reads,
            writes,
            dtype,
            budget: Duration::from_secs(1),
        };
        match self.pass {
            Pass::Forward => {
                drop(textbook);
                measure(chip, &demand, || call.forward())
            }
            Pass::Backward => {
                let dout = normal(chip, "dout", &[b, t, h, d], dtype);
                let mut backward = BackwardCall::new(chip, &call, dout);
                backward.run(&call);
                textbook.verify_backward(&backward);
                demand.flops *= 2.5;
                // q, k, v, o, its gradient and the log-sum-exp are read; the gradients of q, k and v are written.
                demand.writes = reads;
                demand.reads = reads + writes + q.ty().bytes();
                measure(chip, &demand, || backward.run(&call))
            }
        }
    }
}

/// The backward of a call: what was saved of it, and its gradients.
struct BackwardCall {
    inputs: Vec<Option<Tensor>>,
    outputs: Vec<Option<Tensor>>,
    gradients: Vec<Option<Tensor>>,
    wanted: Vec<Option<Gradient>>,
}

impl BackwardCall {
    fn new(chip: &Chip, call: &Call<Attention>, dout: Tensor) -> Self {
        let wanted = |x: &&Tensor| {
            Some(Gradient {
                tensor: unwritten(chip, x.ty()),
                accum: Accum::Replace,
                reused: false,
            })
        };
        BackwardCall {
            inputs: call.inputs.iter().map(|x| Some((*x).clone())).collect(),
            outputs: call.outputs.iter().cloned().map(Some).collect(),
            gradients: vec![Some(dout), None],
            wanted: call.inputs.iter().map(wanted).collect(),
        }
    }

    fn run(&mut self, call: &Call<Attention>) {
        let mut backward = Backward {
            inputs: &self.inputs,
            outputs: &self.outputs,
            gradients: &self.gradients,
            wanted: &mut self.wanted,
        };
        #[cfg(feature = "gpu")]
        if call.outputs[0].is_on_gpu() {
            return call.op.backward_gpu(&call.site(), &mut backward);
        }
        call.op.backward(&call.site(), &mut backward);
    }

    fn dout(&self) -> &Tensor {
        self.gradients[0].as_ref().expect("made with one")
    }

    /// The gradient of operand i.
    fn gradient(&self, i: usize) -> &Tensor {
        &self.wanted[i].as_ref().expect("all are wanted").tensor
    }
}

/// The operands and results of a forward, and what they should be.
struct Textbook<'a> {
    n: Sizes,
    causal: bool,
    dtype: DType,
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    o: Tensor,
    lse: Tensor,
}

impl Textbook<'_> {
    /// Some (b, t, h) with h below `heads`.
    fn samples(&self, heads: usize, name: &str) -> Vec<[usize; 3]> {
        let (t, h) = (self.n.t, heads);
        some_of(self.n.b * t * h, name)
            .into_iter()
            .map(|i| [i / h / t, i / h % t, i % h])
            .collect()
    }

    /// How far a weight of the kernel may be off, relatively, with logits that are off by `logit`: weights are operands of a
    /// product, which may take them in the type of the values.
    fn weight_off(&self, logit: f64) -> f64 {
        2.1 * logit + gamma(40, U) + self.narrow()
    }

    fn narrow(&self) -> f64 {
        match self.dtype {
            DType::F32 => 0.0,
            narrow => narrow.roundoff(),
        }
    }

    fn scale(&self) -> f64 {
        1.0 / (self.n.d as f64).sqrt()
    }

    /// How far a logit of these queries and keys may be off: a sum of d products, and what follows up to its exponential.
    fn logit_off(&self, q: &[f64], k: &[f64]) -> f64 {
        let square = |r: &[f64]| r.iter().map(|x| x * x).sum::<f64>();
        let norm = |x: &[f64]| x.chunks(self.n.d).map(square).fold(0.0, f64::max).sqrt();
        gamma(self.n.d + 24, U) * (self.scale() * norm(q) * norm(k) + 1.0)
    }

    fn verify_forward(&self) {
        let d = self.n.d;
        for at @ [b, t, h] in self.samples(self.n.h, "queries") {
            let (q, seen) = (row(self.q, at), self.seen_by(t));
            let [k, v] = [self.k, self.v].map(|x| rows(x, b, 0..seen, h / (self.n.h / self.n.g)));
            let g = reference::Attention::full(1, 1, 1, seen, d);
            let (o, lse) = reference::attention(&g, &q, &k, &v);
            let size: Vec<f64> = v.iter().map(|v| v.abs()).collect();
            let (size, _) = reference::attention(&g, &q, &k, &size);
            let logit = self.logit_off(&q, &k);
            let off = self.weight_off(logit) + gamma(seen + 24, U);
            let bound = size.iter().map(|s| off * s).collect();
            let what = format!("attention of query {t}, head {h}, sequence {b}");
            assert_within(&what, &row(&self.o, at), &o, &stored(self.dtype, &o, bound));
            let got = numbers(&self.lse, (b * self.n.h + h) * self.n.t + t, 1);
            // Powers of two that serve narrow weights are within a 64th of those.
            let powers = self.narrow() / 64.0;
            let bound = logit + gamma(seen + 24, U) + gamma(4, U) * lse[0].abs() + powers;
            assert_within(&format!("{what}, log-sum-exp"), &got, &lse, &[bound]);
        }
    }

    fn seen_by(&self, t: usize) -> usize {
        if self.causal { t + 1 } else { self.n.t }
    }

    fn verify_backward(&self, backward: &BackwardCall) {
        for at in self.samples(self.n.h, "queries") {
            self.verify_dq(backward, at);
        }
        for at in self.samples(self.n.g, "keys") {
            self.verify_dk_dv(backward, at);
        }
    }

    /// dq of one query, from the keys that it sees.
    fn verify_dq(&self, backward: &BackwardCall, at @ [b, t, h]: [usize; 3]) {
        let seen = self.seen_by(t);
        let [k, v] = [self.k, self.v].map(|x| rows(x, b, 0..seen, h / (self.n.h / self.n.g)));
        let one = Pairs {
            g: reference::Attention::full(1, 1, 1, seen, self.n.d),
            q: row(self.q, at),
            k,
            v,
            o: row(&self.o, at),
            lse: numbers(&self.lse, (b * self.n.h + h) * self.n.t + t, 1),
            dout: row(backward.dout(), at),
        };
        let what = format!("attention's dq of query {t}, head {h}, sequence {b}");
        let ([dq, ..], [off, ..]) = one.gradients(self);
        let bound = stored(self.dtype, &dq, off);
        assert_within(&what, &row(backward.gradient(0), at), &dq, &bound);
    }

    /// dk and dv of one key, from the queries of all its heads that see it.
    fn verify_dk_dv(&self, backward: &BackwardCall, at @ [b, s, g]: [usize; 3]) {
        let group = self.n.h / self.n.g;
        let first = if self.causal { s } else { 0 };
        let heads = g * group..(g + 1) * group;
        let of_queries = |x: &Tensor| -> Vec<f64> {
            heads
                .clone()
                .flat_map(|h| rows(x, b, first..self.n.t, h))
                .collect()
        };
        let lse = |h: usize| {
            let start = (b * self.n.h + h) * self.n.t + first;
            numbers(&self.lse, start, self.n.t - first)
        };
        let one = Pairs {
            g: reference::Attention {
                kv_heads: 1,
                ..reference::Attention::full(1, group, self.n.t - first, 1, self.n.d)
            },
            q: of_queries(self.q),
            k: row(self.k, at),
            v: row(self.v, at),
            o: of_queries(&self.o),
            lse: heads.clone().flat_map(lse).collect(),
            dout: of_queries(backward.dout()),
        };
        let ([_, dk, dv], [_, dk_off, dv_off]) = one.gradients(self);
        for (i, name, want, off) in [(1, "dk", dk, dk_off), (2, "dv", dv, dv_off)] {
            let what = format!("attention's {name} of key {s}, head {g}, sequence {b}");
            let bound = stored(self.dtype, &want, off);
            assert_within(&what, &row(backward.gradient(i), at), &want, &bound);
        }
    }
}

/// Queries and keys that all see each other, heads before tokens, with the results of the whole attention.
struct Pairs {
    g: reference::Attention<'static>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    o: Vec<f64>,
    lse: Vec<f64>,
    dout: Vec<f64>,
}

impl Pairs {
    /// dq, dk and dv, and how far a kernel's may be off before they are stored.
    fn gradients(&self, textbook: &Textbook) -> ([Vec<f64>; 3], [Vec<f64>; 3]) {
        let Pairs {
            g,
            q,
            k,
            v,
            o,
            lse,
            dout,
        } = self;
        let want = reference::attention_backward(g, [q, k, v], o, lse, dout);
        let d = g.head_dim;
        let weight = textbook.weight_off(textbook.logit_off(q, k));
        let (u, narrow) = (gamma(d + 24, U), textbook.narrow());
        // A chain over keys or over the queries of a group, in f32.
        let sum = gamma(g.keys + g.heads * g.queries + 8, U);
        let mut off = [q, k, v].map(|x| vec![0.0; x.len()]);
        let [dq, dk, dv] = &mut off;
        let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let size =
            |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum() };
        for (row, lse) in lse.iter().enumerate() {
            let x = row * d..(row + 1) * d;
            let (q, dout) = (&q[x.clone()], &dout[x.clone()]);
            let d_size = size(dout, &o[x.clone()]);
            for y in (0..g.keys).map(|s| s * d..(s + 1) * d) {
                let (k, v) = (&k[y.clone()], &v[y.clone()]);
                let p = (g.scale * dot(q, k) - lse).exp();
                // ds = scale p (dp - D), where dp and D are sums of d products; it is an operand of a product, too.
                let ds = g.scale * p * (size(dout, v) + d_size) * (weight + u + sum + narrow);
                for i in 0..d {
                    dq[x.start + i] += ds * k[i].abs();
                    dk[y.start + i] += ds * q[i].abs();
                    dv[y.start + i] += p * (weight + sum) * dout[i].abs();
                }
            }
        }
        (want, off)
    }
}

/// The d elements at (b, t, h) of [b, t, h, d].
fn row(x: &Tensor, [b, t, h]: [usize; 3]) -> Vec<f64> {
    let [_, tokens, heads, d] = axes(x.ty());
    numbers(x, ((b * tokens + t) * heads + h) * d, d)
}

/// Those of several tokens, [tokens, d].
fn rows(x: &Tensor, b: usize, tokens: std::ops::Range<usize>, h: usize) -> Vec<f64> {
    tokens.flat_map(|t| row(x, [b, t, h])).collect()
}

fn axes(ty: &TensorType) -> [usize; 4] {
    ty.shape[..].try_into().expect("four axes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use supernode::mesh::Mesh;
    use supernode::spmd::{Device, World};

    /// What verification says if the first element of result or gradient `which` (o, the log-sum-exp, dq, dk, dv) was
    /// changed by `wrong`. The first query and the first key are always among the samples.
    fn verdict(causal: bool, which: usize, wrong: f32) -> Result<(), String> {
        let n = Sizes {
            b: 2,
            t: 11,
            h: 4,
            g: 2,
            d: 6,
        };
        let op = Attention {
            causal,
            ..Attention::default()
        };
        let world = World::threads(&Mesh::single(), Device::cpu()).unwrap();
        let run = world.run(|chip| {
            let of = |name, heads| normal(chip, name, &[n.b, n.t, heads, n.d], DType::F32);
            let (q, k, v) = (of("q", n.h), of("k", n.g), of("v", n.g));
            let mut call = Call::new(chip, &op, vec![&q, &k, &v]);
            call.forward();
            let spoil = |x: &mut Tensor| x.slice_mut().typed::<f32>()[0] += wrong;
            if which < 2 {
                spoil(&mut call.outputs[which]);
            }
            let textbook = Textbook {
                n,
                causal,
                dtype: DType::F32,
                q: &q,
                k: &k,
                v: &v,
                o: call.outputs[0].clone(),
                lse: call.outputs[1].clone(),
            };
            textbook.verify_forward();
            let mut backward = BackwardCall::new(chip, &call, of("dout", n.h));
            backward.run(&call);
            if which >= 2 {
                let gradient = backward.wanted[which - 2].as_mut();
                spoil(&mut gradient.expect("wanted").tensor);
            }
            textbook.verify_backward(&backward);
        });
        run.map(drop).map_err(|e| e.to_string())
    }

    #[test]
    fn wrong_results_and_gradients_are_found() {
        for causal in [false, true] {
            let parts = ["", "log-sum-exp", "dq", "dk", "dv"];
            for (which, part) in parts.into_iter().enumerate() {
                assert_eq!(verdict(causal, which, 0.0), Ok(()), "{part}");
                for wrong in [1e-3, f32::NAN] {
                    let why = verdict(causal, which, wrong).unwrap_err();
                    assert!(
                        why.contains(part) && why.contains("off by"),
                        "{part}: {why}"
                    );
                }
            }
        }
    }
}
