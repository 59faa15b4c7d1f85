//! Attention: every mask, grouped queries, offset, soft cap, and the log-sum-exp.

use super::matmul::dot;

/// Sizes and rules of one attention. Queries q and output o are `[b, h, t, d]`, keys k and values v `[b, hk, s, d]`, the
/// log-sum-exp `[b, h, t]`.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// b.
    pub batch: usize,
    /// h, query heads.
    pub heads: usize,
    /// hk divides h; query head h reads key head `h / (heads / kv_heads)` (Ainslie et al. 2023, "GQA").
    pub kv_heads: usize,
    /// t, queries per row of the batch.
    pub queries: usize,
    /// s, keys per row of the batch.
    pub keys: usize,
    /// d.
    pub head_dim: usize,
    /// Multiplies `q . k`; usually `1 / sqrt(d)`.
    pub scale: f64,
    /// `cap`: a logit l becomes `cap tanh(l / cap)` before masking (Gemma 2, 2024).
    pub soft_cap: Option<f64>,
    /// Key s is hidden if it stands after the query.
    pub causal: bool,
    /// Key s is hidden if it stands `window` or more places away.
    pub window: Option<usize>,
    /// Query t stands at position `offset + t`; key s at position s.
    pub offset: usize,
    /// Document numbers of queries `[b, t]` and keys `[b, s]`: only pairs within one document see each other.
    pub documents: Option<(&'a [u32], &'a [u32])>,
}

impl<'a> Attention<'a> {
    /// Every query sees every key: one key head per query head, `scale = 1 / sqrt(d)`, offset 0, no cap.
    pub fn full(batch: usize, heads: usize, queries: usize, keys: usize, head_dim: usize) -> Self {
        Attention {
            batch,
            heads,
            kv_heads: heads,
            queries,
            keys,
            head_dim,
            scale: 1.0 / (head_dim as f64).sqrt(),
            soft_cap: None,
            causal: false,
            window: None,
            offset: 0,
            documents: None,
        }
    }

    /// Whether query t of batch row b sees key s.
    pub fn sees(&self, b: usize, t: usize, s: usize) -> bool {
        let position = self.offset + t;
        let past = !self.causal || s <= position;
        let near = self.window.is_none_or(|w| s.abs_diff(position) < w);
        let together = self
            .documents
            .is_none_or(|(q, k)| q[b * self.queries + t] == k[b * self.keys + s]);
        past && near && together
    }

    /// The place of query t in the log-sum-exp.
    fn row(&self, b: usize, h: usize, t: usize) -> usize {
        (b * self.heads + h) * self.queries + t
    }

    /// Where the row of query t begins in q and o.
    fn query(&self, b: usize, h: usize, t: usize) -> usize {
        self.row(b, h, t) * self.head_dim
    }

    /// Where the row of key s begins in k and v, as query head h reads them.
    fn key(&self, b: usize, h: usize, s: usize) -> usize {
        let group = self.heads / self.kv_heads;
        ((b * self.kv_heads + h / group) * self.keys + s) * self.head_dim
    }

    /// All (b, h, t).
    fn rows(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (bs, hs, ts) = (self.batch, self.heads, self.queries);
        (0..bs).flat_map(move |b| (0..hs).flat_map(move |h| (0..ts).map(move |t| (b, h, t))))
    }

    /// The logit of query t and key s: `scale q . k`, capped; minus infinity where hidden.
    fn logit(&self, q: &[f64], k: &[f64], [b, h, t, s]: [usize; 4]) -> f64 {
        if !self.sees(b, t, s) {
            return f64::NEG_INFINITY;
        }
        let d = self.head_dim;
        let l = self.scale * dot(&q[self.query(b, h, t)..][..d], &k[self.key(b, h, s)..][..d]);
        self.soft_cap.map_or(l, |cap| cap * (l / cap).tanh())
    }

    /// Panics unless the lengths are what the sizes say.
    fn check(&self, q: &[f64], k: &[f64], v: &[f64]) {
        let (h, hk) = (self.heads, self.kv_heads);
        assert!(
            hk > 0 && h.is_multiple_of(hk),
            "attention: {hk} key heads do not divide {h} heads"
        );
        let [queries, keys] = [self.batch * self.queries, self.batch * self.keys];
        let want = [queries * h, keys * hk, keys * hk].map(|rows| rows * self.head_dim);
        assert_eq!(
            [q.len(), k.len(), v.len()],
            want,
            "attention: lengths of q, k, v"
        );
        if let Some((q, k)) = self.documents {
            let want = [queries, keys];
            assert_eq!([q.len(), k.len()], want, "attention: lengths of documents");
        }
    }
}

/// `o = sum over s of p[s] v[s]`, `p = softmax(scale q . k)` over the visible keys (Vaswani et al. 2017). Gives `(o, lse)`,
/// `lse = ln(sum over s of exp(logit))`. A query that sees no key gets `o = 0` and `lse = -infinity`.
pub fn attention(g: &Attention, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    g.check(q, k, v);
    let d = g.head_dim;
    let mut o = vec![0.0; q.len()];
    let mut lse = Vec::new();
    for (b, h, t) in g.rows() {
        let logits: Vec<f64> = (0..g.keys).map(|s| g.logit(q, k, [b, h, t, s])).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let visible = || (0..g.keys).filter(|&s| g.sees(b, t, s));
        let sum: f64 = visible().map(|s| (logits[s] - max).exp()).sum();
        // Nothing visible: max is minus infinity and the sum 0.
        lse.push(max + sum.ln());
        for s in visible() {
            let p = (logits[s] - max).exp() / sum;
            for i in 0..d {
                o[g.query(b, h, t) + i] += p * v[g.key(b, h, s) + i];
            }
        }
    }
    (o, lse)
}

/// `[dq, dk, dv]` of [`attention`], from its `o` and `lse` and from `d_o`, the derivative by o.
///
/// `D = d_o . o`, `dp = d_o . v`, `dl = p (dp - D)` (Dao et al. 2022, "FlashAttention", appendix B).
pub fn attention_backward(
    g: &Attention,
    [q, k, v]: [&[f64]; 3],
    o: &[f64],
    lse: &[f64],
    d_o: &[f64],
) -> [Vec<f64>; 3] {
    g.check(q, k, v);
    assert_eq!(
        [o.len(), d_o.len()],
        [q.len(); 2],
        "attention: lengths of o and d_o"
    );
    let d = g.head_dim;
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for (b, h, t) in g.rows() {
        let x = g.query(b, h, t);
        let delta = dot(&d_o[x..][..d], &o[x..][..d]);
        for s in (0..g.keys).filter(|&s| g.sees(b, t, s)) {
            let y = g.key(b, h, s);
            let l = g.logit(q, k, [b, h, t, s]);
            // p = exp(l - lse), o = sum of p v
            let p = (l - lse[g.row(b, h, t)]).exp();
            let dl = p * (dot(&d_o[x..][..d], &v[y..][..d]) - delta);
            // l = cap tanh(scale q . k / cap)
            let dl = g.soft_cap.map_or(dl, |cap| dl * (1.0 - (l / cap).powi(2)));
            for i in 0..d {
                dv[y + i] += p * d_o[x + i];
                dq[x + i] += dl * g.scale * k[y + i];
                dk[y + i] += dl * g.scale * q[x + i];
            }
        }
    }
    [dq, dk, dv]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{assert_gradient, normals};

    /// One geometry per rule, and all rules at once.
    fn cases() -> Vec<(&'static str, Attention<'static>)> {
        let full = Attention::full(2, 4, 5, 6, 3);
        let causal = Attention {
            causal: true,
            ..full
        };
        let q: &[u32] = &[0, 0, 1, 1, 1, 7, 7, 8, 8, 9];
        let k: &[u32] = &[0, 0, 1, 1, 1, 2, 7, 7, 7, 8, 8, 8];
        vec![
            ("full", full),
            ("causal", causal),
            (
                "window",
                Attention {
                    window: Some(2),
                    ..causal
                },
            ),
            (
                "two-sided window",
                Attention {
                    window: Some(2),
                    ..full
                },
            ),
            (
                "documents",
                Attention {
                    documents: Some((q, k)),
                    ..full
                },
            ),
            (
                "grouped",
                Attention {
                    kv_heads: 2,
                    ..causal
                },
            ),
            (
                "offset",
                Attention {
                    offset: 1,
                    ..causal
                },
            ),
            (
                "soft cap",
                Attention {
                    soft_cap: Some(0.7),
                    ..full
                },
            ),
            (
                "everything",
                Attention {
                    kv_heads: 1,
                    offset: 1,
                    window: Some(3),
                    soft_cap: Some(1.5),
                    documents: Some((q, k)),
                    ..causal
                },
            ),
        ]
    }

    #[test]
    fn attention_follows_its_gradient() {
        for (name, g) in cases() {
            let kv = g.batch * g.kv_heads * g.keys * g.head_dim;
            let q = normals("q", g.batch * g.heads * g.queries * g.head_dim);
            assert_gradient(
                name,
                &[q, normals("k", kv), normals("v", kv)],
                |x| attention(&g, &x[0], &x[1], &x[2]).0,
                |x, d_o| {
                    let (o, lse) = attention(&g, &x[0], &x[1], &x[2]);
                    attention_backward(&g, [&x[0], &x[1], &x[2]], &o, &lse, d_o).into()
                },
            );
        }
    }

    #[test]
    fn masks_show_what_they_say() {
        let seen = |g: &Attention, t| (0..g.keys).filter(|&s| g.sees(0, t, s)).collect::<Vec<_>>();
        let full = Attention::full(1, 1, 4, 6, 1);
        let causal = Attention {
            causal: true,
            offset: 2,
            ..full
        };
        assert_eq!(seen(&full, 0), [0, 1, 2, 3, 4, 5]);
        assert_eq!(seen(&causal, 1), [0, 1, 2, 3]);
        assert_eq!(
            seen(
                &Attention {
                    window: Some(2),
                    ..causal
                },
                1
            ),
            [2, 3]
        );
        assert_eq!(
            seen(
                &Attention {
                    window: Some(2),
                    offset: 2,
                    ..full
                },
                1
            ),
            [2, 3, 4]
        );
    }

    #[test]
    fn a_query_without_keys_is_zero() {
        let documents = Some((&[5u32][..], &[1u32, 2][..]));
        let g = Attention {
            documents,
            ..Attention::full(1, 1, 1, 2, 2)
        };
        let (q, k, v) = ([1.0, 2.0], [1.0; 4], [3.0; 4]);
        let (o, lse) = attention(&g, &q, &k, &v);
        assert_eq!(
            (&o[..], &lse[..]),
            (&[0.0, 0.0][..], &[f64::NEG_INFINITY][..])
        );
        let grads = attention_backward(&g, [&q, &k, &v], &o, &lse, &[1.0, 1.0]);
        assert!(grads.iter().flatten().all(|&g| g == 0.0));
        // With no keys at all, too.
        let g = Attention::full(1, 1, 1, 0, 2);
        assert_eq!(attention(&g, &q, &[], &[]).1, [f64::NEG_INFINITY]);
    }

    #[test]
    fn equal_keys_average_the_values_and_nan_shows() {
        let g = Attention::full(1, 1, 1, 2, 1);
        let (o, lse) = attention(&g, &[0.0], &[1.0, 2.0], &[3.0, 5.0]);
        assert_eq!(lse, [2f64.ln()]);
        assert!((o[0] - 4.0).abs() <= 1e-15);
        let (o, lse) = attention(&g, &[f64::NAN], &[1.0, 2.0], &[3.0, 5.0]);
        assert!(o[0].is_nan() && lse[0].is_nan());
    }
}
