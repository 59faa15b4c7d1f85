//! Mixtures of experts: routing with a static capacity, dispatch, combine, the balance loss, and a whole layer.
//!
//! Letters beside those of the room: `e` experts, `k` experts of a token, `s` slots of an expert in one sequence (its
//! capacity). A slot's number is `expert * capacity + place`, and [`NONE`] says that there is none.

use super::swiglu;
use supernode_kernels::reference::dot;

/// No slot, or nothing in it.
pub const NONE: u32 = u32::MAX;

/// `y = 1 / (1 + e^-x)`.
pub fn sigmoid(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect()
}

/// `dx = dy y (1 - y)` of [`sigmoid`] from its y.
pub fn sigmoid_backward(y: &[f64], dy: &[f64]) -> Vec<f64> {
    y.iter().zip(dy).map(|(y, dy)| dy * y * (1.0 - y)).collect()
}

/// How gates become weights.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Experts of each token.
    pub k: usize,
    /// Whether a token's weights are divided by their sum.
    pub normalize: bool,
    /// What weights are multiplied by at last.
    pub scale: f64,
}

/// The k experts with the largest `scores + bias` of each row, the lower number first on a tie, and their weights, from the
/// scores alone: scores `[r, e]`, bias `[e]`; weights and experts `[r, k]`.
pub fn route(rule: Route, e: usize, scores: &[f64], bias: Option<&[f64]>) -> (Vec<f64>, Vec<u32>) {
    let (mut weights, mut experts) = (Vec::new(), Vec::new());
    for row in scores.chunks_exact(e) {
        let key = |i: usize| row[i] + bias.map_or(0.0, |b| b[i]);
        let mut order: Vec<usize> = (0..e).collect();
        order.sort_by(|&i, &j| key(j).total_cmp(&key(i)).then(i.cmp(&j)));
        let chosen = &order[..rule.k];
        let sum: f64 = chosen.iter().map(|&i| row[i]).sum();
        let divisor = if rule.normalize { sum + 1e-20 } else { 1.0 };
        weights.extend(chosen.iter().map(|&i| rule.scale * row[i] / divisor));
        experts.extend(chosen.iter().map(|&i| i as u32));
    }
    (weights, experts)
}

/// `dscores` of [`route`], whose choice is a constant.
pub fn route_backward(
    rule: Route,
    e: usize,
    scores: &[f64],
    experts: &[u32],
    dweights: &[f64],
) -> Vec<f64> {
    let k = rule.k;
    let mut dscores = vec![0.0; scores.len()];
    for r in 0..scores.len() / e {
        let at = |j: usize| r * e + experts[r * k + j] as usize;
        let sum: f64 = (0..k).map(|j| scores[at(j)]).sum::<f64>() + 1e-20;
        // weight[j] = scale score[j] / sum
        let mean: f64 = (0..k)
            .map(|j| dweights[r * k + j] * scores[at(j)] / sum)
            .sum();
        for j in 0..k {
            let dw = dweights[r * k + j];
            dscores[at(j)] = match rule.normalize {
                true => rule.scale * (dw - mean) / sum,
                false => rule.scale * dw,
            };
        }
    }
    dscores
}

/// Places in the experts' buffers, given out in the order of tokens, then of a token's choices: experts `[b, t, k]` of `e`
/// experts with `s` slots each in every sequence.
///
/// Gives each assignment's slot `[b, t, k]`, [`NONE`] if its expert was full; each slot's assignment `t k + j` as
/// `[e, b, s]`; and how many assignments each expert was asked to take and did not take, `[2, e]`.
pub fn slots(
    [b, t, k]: [usize; 3],
    [e, s]: [usize; 2],
    experts: &[u32],
) -> (Vec<u32>, Vec<u32>, Vec<f64>) {
    assert_eq!(
        experts.len(),
        b * t * k,
        "slots: experts are [{b}, {t}, {k}]"
    );
    let mut slots = vec![NONE; b * t * k];
    let mut origin = vec![NONE; e * b * s];
    let mut load = vec![0.0; 2 * e];
    for i in 0..b {
        let mut taken = vec![0; e];
        for j in 0..t * k {
            let expert = experts[i * t * k + j] as usize;
            load[expert] += 1.0;
            if taken[expert] == s {
                load[e + expert] += 1.0;
                continue;
            }
            slots[i * t * k + j] = (expert * s + taken[expert]) as u32;
            origin[(expert * b + i) * s + taken[expert]] = j as u32;
            taken[expert] += 1;
        }
    }
    (slots, origin, load)
}

/// Sizes of a mixture's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Slotted {
    /// Sequences.
    pub b: usize,
    /// Tokens of a sequence.
    pub t: usize,
    /// Experts of a token.
    pub k: usize,
    /// Experts.
    pub e: usize,
    /// Slots of an expert in one sequence.
    pub s: usize,
    /// Channels.
    pub c: usize,
}

impl Slotted {
    /// (assignment, its token's row, its slot's row) of every assignment that has a slot.
    fn pairs(self, slots: &[u32]) -> impl Iterator<Item = (usize, usize, usize)> {
        let Slotted { b, t, k, s, .. } = self;
        assert_eq!(slots.len(), b * t * k, "slots are [{b}, {t}, {k}]");
        let row = move |(at, &slot): (usize, &u32)| {
            let (expert, place) = (slot as usize / s, slot as usize % s);
            let sequence = at / (t * k);
            (slot != NONE).then_some((at, at / k, (expert * b + sequence) * s + place))
        };
        slots
            .iter()
            .enumerate()
            .filter_map(row)
            .collect::<Vec<_>>()
            .into_iter()
    }
}

/// `y[slot of (t, j)] = x[t]`, 0 in empty slots: x `[b, t, c]`, y `[e, b, s, c]`.
pub fn dispatch(n: Slotted, x: &[f64], slots: &[u32]) -> Vec<f64> {
    let mut y = vec![0.0; n.e * n.b * n.s * n.c];
    for (_, token, slot) in n.pairs(slots) {
        y[slot * n.c..][..n.c].copy_from_slice(&x[token * n.c..][..n.c]);
    }
    y
}

/// `dx` of [`dispatch`].
pub fn dispatch_backward(n: Slotted, slots: &[u32], dy: &[f64]) -> Vec<f64> {
    let mut dx = vec![0.0; n.b * n.t * n.c];
    for (_, token, slot) in n.pairs(slots) {
        for i in 0..n.c {
            // y[slot,i] = x[token,i]
            dx[token * n.c + i] += dy[slot * n.c + i];
        }
    }
    dx
}

/// `out[t] = sum over j of weights[t, j] y[slot of (t, j)]`: y `[e, b, s, c]`, weights `[b, t, k]`, out `[b, t, c]`. What
/// was dropped adds nothing.
pub fn combine(n: Slotted, y: &[f64], weights: &[f64], slots: &[u32]) -> Vec<f64> {
    let mut out = vec![0.0; n.b * n.t * n.c];
    for (at, token, slot) in n.pairs(slots) {
        for i in 0..n.c {
            out[token * n.c + i] += weights[at] * y[slot * n.c + i];
        }
    }
    out
}

/// `[dy, dweights]` of [`combine`].
pub fn combine_backward(
    n: Slotted,
    y: &[f64],
    weights: &[f64],
    slots: &[u32],
    dout: &[f64],
) -> [Vec<f64>; 2] {
    let (mut dy, mut dweights) = (vec![0.0; y.len()], vec![0.0; weights.len()]);
    for (at, token, slot) in n.pairs(slots) {
        for i in 0..n.c {
            // out[token,i] += weights[at] y[slot,i]
            dy[slot * n.c + i] = weights[at] * dout[token * n.c + i];
        }
        dweights[at] = dot(&y[slot * n.c..][..n.c], &dout[token * n.c..][..n.c]);
    }
    [dy, dweights]
}

/// `loss[b] = e sum over experts of f p` with f the share of the sequence's assignments that went to the expert and p the mean
/// of its scores over the sequence's tokens, which are divided by their sum first with `normalize`: scores `[b, t, e]`,
/// experts `[b, t, k]` (Fedus et al. 2021, equations 4 to 6; Lepikhin et al. 2020).
pub fn balance_loss(
    [b, t, e]: [usize; 3],
    k: usize,
    normalize: bool,
    scores: &[f64],
    experts: &[u32],
) -> Vec<f64> {
    let shares = shares([b, t, e], k, experts);
    let of_sequence = |i: usize| {
        let mut loss = 0.0;
        for row in scores[i * t * e..][..t * e].chunks_exact(e) {
            let sum: f64 = if normalize { row.iter().sum() } else { 1.0 };
            loss += dot(row, &shares[i * e..][..e]) / sum;
        }
        loss * e as f64 / t as f64
    };
    (0..b).map(of_sequence).collect()
}

/// `dscores` of [`balance_loss`]; shares of assignments are constants.
pub fn balance_loss_backward(
    [b, t, e]: [usize; 3],
    k: usize,
    normalize: bool,
    scores: &[f64],
    experts: &[u32],
    dloss: &[f64],
) -> Vec<f64> {
    let shares = shares([b, t, e], k, experts);
    let mut dscores = vec![0.0; scores.len()];
    for row in 0..b * t {
        let (i, at) = (row / t, row * e);
        let g: Vec<f64> = (0..e)
            .map(|j| dloss[i] * e as f64 / t as f64 * shares[i * e + j])
            .collect();
        let p = &scores[at..][..e];
        let sum: f64 = p.iter().sum();
        let mean = dot(&g, p) / sum;
        for j in 0..e {
            // loss += g[j] p[j] / sum
            dscores[at + j] = if normalize { (g[j] - mean) / sum } else { g[j] };
        }
    }
    dscores
}

/// The share of each sequence's assignments that each expert has: `[b, e]`.
fn shares([b, t, e]: [usize; 3], k: usize, experts: &[u32]) -> Vec<f64> {
    assert_eq!(experts.len(), b * t * k, "experts are [{b}, {t}, {k}]");
    let mut shares = vec![0.0; b * e];
    for (at, &expert) in experts.iter().enumerate() {
        shares[at / (t * k) * e + expert as usize] += 1.0 / (t * k) as f64;
    }
    shares
}

/// The weights of a mixture's experts, `[e, c, f]`, `[e, c, f]` and `[e, f, c]`.
#[derive(Clone, Copy, Debug)]
pub struct Experts<'a> {
    /// Width of an expert.
    pub f: usize,
    /// What SiLU is taken of.
    pub gate: &'a [f64],
    /// What that is multiplied by.
    pub up: &'a [f64],
    /// The way back.
    pub down: &'a [f64],
}

/// A whole layer, token by token: `out[t] = sum over j of weight[t, j] down_e (silu(gate_e x[t]) * up_e x[t])` with
/// `e = experts[t, j]`, over the assignments that find a slot: x `[b, t, c]`. No buffer and no batch of experts.
pub fn mixture(n: Slotted, x: &[f64], weights: &[f64], experts: &[u32], w: Experts) -> Vec<f64> {
    let (slots, ..) = slots([n.b, n.t, n.k], [n.e, n.s], experts);
    let (c, f) = (n.c, w.f);
    let mut out = vec![0.0; n.b * n.t * c];
    for (at, _) in slots.iter().enumerate().filter(|(_, slot)| **slot != NONE) {
        let (token, e) = (at / n.k, experts[at] as usize);
        let x = &x[token * c..][..c];
        let into =
            |w: &[f64], to: usize| -> f64 { (0..c).map(|i| x[i] * w[(e * c + i) * f + to]).sum() };
        let gate: Vec<f64> = (0..f).map(|j| into(w.gate, j)).collect();
        let up: Vec<f64> = (0..f).map(|j| into(w.up, j)).collect();
        let inner = swiglu(&gate, &up);
        for i in 0..c {
            let y: f64 = (0..f).map(|j| inner[j] * w.down[(e * f + j) * c + i]).sum();
            out[token * c + i] += weights[at] * y;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{assert_gradient, normals};

    const N: Slotted = Slotted {
        b: 2,
        t: 4,
        k: 2,
        e: 3,
        s: 2,
        c: 3,
    };
    /// Expert 0 is asked for more than its two slots in the first sequence.
    const EXPERTS: [u32; 16] = [0, 1, 2, 0, 0, 1, 1, 2, 2, 1, 0, 2, 1, 0, 2, 1];

    #[test]
    fn slots_by_hand() {
        let (slots, origin, load) = slots([1, 3, 2], [2, 2], &[1, 0, 1, 0, 1, 0]);
        assert_eq!(slots, [2, 0, 3, 1, NONE, NONE]);
        assert_eq!(origin, [1, 3, 0, 2]);
        assert_eq!(load, [3.0, 3.0, 1.0, 1.0]);
    }

    #[test]
    fn routes_by_hand() {
        let rule = Route {
            k: 2,
            normalize: true,
            scale: 2.0,
        };
        let (weights, experts) = route(rule, 3, &[0.1, 0.3, 0.1], None);
        assert_eq!(experts, [1, 0]);
        assert!((weights[0] - 1.5).abs() <= 1e-15 && (weights[1] - 0.5).abs() <= 1e-15);
        let (_, experts) = route(rule, 3, &[0.1, 0.3, 0.1], Some(&[0.0, -0.3, 0.0]));
        assert_eq!(experts, [0, 2], "the bias chooses");
    }

    #[test]
    fn routes_follow_their_gradient() {
        let scores = sigmoid(&normals("scores", 35));
        for normalize in [false, true] {
            let rule = Route {
                k: 2,
                normalize,
                scale: 1.5,
            };
            let (_, experts) = route(rule, 7, &scores, None);
            // The choice of the unmoved scores: what is held is the formula of the weights.
            let chosen = |s: &[f64]| {
                let mut out = Vec::new();
                for (r, row) in s.chunks_exact(7).enumerate() {
                    let of: Vec<f64> = (0..2).map(|j| row[experts[r * 2 + j] as usize]).collect();
                    let sum = if normalize {
                        of.iter().sum::<f64>() + 1e-20
                    } else {
                        1.0
                    };
                    out.extend(of.iter().map(|x| 1.5 * x / sum));
                }
                out
            };
            assert_eq!(chosen(&scores), route(rule, 7, &scores, None).0);
            assert_gradient(
                "route",
                std::slice::from_ref(&scores),
                |x| chosen(&x[0]),
                |x, dy| vec![route_backward(rule, 7, &x[0], &experts, dy)],
            );
        }
    }

    #[test]
    fn sigmoid_follows_its_gradient() {
        assert_gradient(
            "sigmoid",
            &[normals("x", 20)],
            |x| sigmoid(&x[0]),
            |x, dy| vec![sigmoid_backward(&sigmoid(&x[0]), dy)],
        );
    }

    #[test]
    fn dispatch_and_combine_follow_their_gradients() {
        let (slots, _, load) = slots([N.b, N.t, N.k], [N.e, N.s], &EXPERTS);
        assert!(load[N.e..].iter().sum::<f64>() > 0.0, "some are dropped");
        assert_gradient(
            "dispatch",
            &[normals("x", N.b * N.t * N.c)],
            |x| dispatch(N, &x[0], &slots),
            |_, dy| vec![dispatch_backward(N, &slots, dy)],
        );
        assert_gradient(
            "combine",
            &[
                normals("y", N.e * N.b * N.s * N.c),
                normals("w", N.b * N.t * N.k),
            ],
            |x| combine(N, &x[0], &x[1], &slots),
            |x, dy| combine_backward(N, &x[0], &x[1], &slots, dy).into(),
        );
    }

    #[test]
    fn balance_losses_follow_their_gradient() {
        let scores = sigmoid(&normals("scores", N.b * N.t * N.e));
        for normalize in [false, true] {
            assert_gradient(
                "balance loss",
                std::slice::from_ref(&scores),
                |x| balance_loss([N.b, N.t, N.e], N.k, normalize, &x[0], &EXPERTS),
                |x, dy| {
                    let sizes = [N.b, N.t, N.e];
                    vec![balance_loss_backward(
                        sizes, N.k, normalize, &x[0], &EXPERTS, dy,
                    )]
                },
            );
        }
        // Perfect balance costs 1.
        let even = balance_loss([1, 2, 2], 1, false, &[0.5; 4], &[0, 1]);
        assert_eq!(even, [1.0]);
    }

    #[test]
    fn a_mixture_is_its_parts() {
        let x = normals("x", N.b * N.t * N.c);
        let weights = normals("w", N.b * N.t * N.k);
        let f = 2;
        let size = N.e * N.c * f;
        let [gate, up, down] = ["gate", "up", "down"].map(|n| normals(n, size));
        let w = Experts {
            f,
            gate: &gate,
            up: &up,
            down: &down,
        };
        let whole = mixture(N, &x, &weights, &EXPERTS, w);
        let (slots, ..) = slots([N.b, N.t, N.k], [N.e, N.s], &EXPERTS);
        let sent = dispatch(N, &x, &slots);
        let rows = N.b * N.s;
        let mut back = Vec::new();
        for e in 0..N.e {
            let x = &sent[e * rows * N.c..][..rows * N.c];
            let by = |w: &[f64]| {
                crate::reference::matmul([rows, f, N.c], x, &w[e * N.c * f..][..N.c * f])
            };
            let inner = swiglu(&by(&gate), &by(&up));
            back.extend(crate::reference::matmul(
                [rows, N.c, f],
                &inner,
                &down[e * f * N.c..][..f * N.c],
            ));
        }
        let parts = combine(N, &back, &weights, &slots);
        for (a, b) in whole.iter().zip(&parts) {
            assert!((a - b).abs() <= 1e-12, "{a} and {b}");
        }
    }
}
