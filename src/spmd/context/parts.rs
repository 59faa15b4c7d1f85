//! Which queries meet which keys in each step of the ring: a pure function of positions and mask.

use crate::ops::Attention;
use crate::ops::attention_part::AttentionPart;
use crate::placement::TokenRun;
use std::ops::Range;

/// What a run of queries sees of a run of keys.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sight {
    Nothing,
    All,
    /// Part of it, the first query standing so many positions behind the first key.
    Some(usize),
}

fn sight(op: &Attention, q: &TokenRun, k: &TokenRun) -> Sight {
    let (q, k) = (q.positions(), k.positions());
    let window = op.window.unwrap_or(usize::MAX);
    if k.start >= q.end || q.start.saturating_sub(k.end - 1) >= window {
        return Sight::Nothing;
    }
    if k.end <= q.start + 1 && q.end - 1 - k.start < window {
        return Sight::All;
    }
    // Runs of one sequence are equal or apart, and keys behind all queries were left out above.
    Sight::Some(q.start - k.start)
}

/// The parts in which the share with `queries` meets the share with `keys`; together they cover every pair that the mask shows
/// exactly once. Ranges count the tokens of each share. `own` says that both are one share.
pub(super) fn parts(
    op: &Attention,
    queries: &[TokenRun],
    keys: &[TokenRun],
    own: bool,
) -> Vec<AttentionPart> {
    let count = |runs: &[TokenRun]| runs.iter().map(|r| r.len).sum::<usize>();
    let (all_q, all_k) = (0..count(queries), 0..count(keys));
    if all_q.is_empty() || all_k.is_empty() {
        return vec![];
    }
    let plain = Attention {
        causal: false,
        window: None,
        offset: 0,
        ..op.clone()
    };
    let unmasked = |queries, keys| AttentionPart {
        op: plain.clone(),
        queries,
        keys,
    };
    if !op.causal {
        return vec![unmasked(all_q, all_k)];
    }
    // Positions ascend in a share, so that its own mask is that of its places.
    if own && op.window.is_none() {
        let op = Attention {
            offset: 0,
            ..op.clone()
        };
        return vec![AttentionPart {
            op,
            queries: all_q,
            keys: all_k,
        }];
    }
    let mut whole: Vec<(Range<usize>, Range<usize>)> = Vec::new();
    let mut masked = Vec::new();
    let mut first_q = 0;
    for q in queries {
        let here = first_q..first_q + q.len;
        let (mut first_k, mut seen) = (0, None::<Range<usize>>);
        for k in keys {
            let there = first_k..first_k + k.len;
            match sight(op, q, k) {
                Sight::Nothing => {}
                Sight::All => {
                    // What a query sees in full is consecutive: causal sight ends, a window's begins, once.
                    seen = Some(seen.map_or(there.clone(), |s| s.start..there.end));
                }
                Sight::Some(offset) => masked.push(AttentionPart {
                    op: Attention {
                        offset,
                        ..op.clone()
                    },
                    queries: here.clone(),
                    keys: there.clone(),
                }),
            }
            first_k = there.end;
        }
        first_q = here.end;
        let Some(seen) = seen else { continue };
        match whole.last_mut() {
            Some((queries, keys)) if *keys == seen && queries.end == here.start => {
                queries.end = here.end;
            }
            _ => whole.push((here, seen)),
        }
    }
    let whole = whole.into_iter().map(|(q, k)| unmasked(q, k));
    whole.chain(masked).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::{TokenOrder, split};

    /// How often a part's mask shows each pair of positions.
    fn cover(parts: &[AttentionPart], q: &[usize], k: &[usize], seen: &mut [Vec<u32>]) -> u64 {
        let mut pairs = 0;
        for part in parts {
            pairs += part.op.pairs(part.queries.len(), part.keys.len());
            for (i, t) in part.queries.clone().enumerate() {
                for (j, s) in part.keys.clone().enumerate() {
                    let (at, op) = (part.op.offset + i, &part.op);
                    let late = op.causal && j > at;
                    let far = op.window.is_some_and(|w| at.abs_diff(j) >= w);
                    seen[q[t]][k[s]] += u32::from(!late && !far);
                }
            }
        }
        pairs
    }

    #[test]
    fn every_visible_pair_is_met_exactly_once() {
        for chips in 1..6 {
            for tokens in [1, 3, 8, 16, 21, 30] {
                let zigzag = TokenOrder::ZigZag { tokens, chips };
                for order in [TokenOrder::Ascending, zigzag] {
                    for (causal, window) in [
                        (false, None),
                        (true, None),
                        (true, Some(1)),
                        (true, Some(4)),
                        (true, Some(11)),
                    ] {
                        let op = Attention {
                            causal,
                            window,
                            ..Default::default()
                        };
                        let mut seen = vec![vec![0; tokens]; tokens];
                        let mut pairs = 0;
                        for (a, b) in (0..chips * chips).map(|i| (i / chips, i % chips)) {
                            let (q, k) = (split(tokens, chips, a), split(tokens, chips, b));
                            let parts =
                                parts(&op, &order.runs(q.clone()), &order.runs(k.clone()), a == b);
                            assert!(parts.len() <= 4);
                            let [q, k] = [q, k].map(|held| order.positions(held));
                            pairs += cover(&parts, &q, &k, &mut seen);
                        }
                        let shown = |t: usize, s: usize| {
                            let near = window.is_none_or(|w| t.abs_diff(s) < w);
                            u32::from(!causal || s <= t && near)
                        };
                        for (t, row) in seen.iter().enumerate() {
                            let want: Vec<u32> = (0..tokens).map(|s| shown(t, s)).collect();
                            assert_eq!(*row, want, "{op:?} {order:?}, query {t}");
                        }
                        assert_eq!(pairs, op.pairs(tokens, tokens), "{op:?} {order:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn zigzag_gives_every_chip_the_same_work_in_every_step() {
        let (tokens, chips) = (64, 4);
        let order = TokenOrder::ZigZag { tokens, chips };
        let op = Attention {
            causal: true,
            ..Default::default()
        };
        for a in 0..chips {
            for b in 0..chips {
                let runs = |i| order.runs(split(tokens, chips, i));
                let parts = parts(&op, &runs(a), &runs(b), a == b);
                assert_eq!(parts.len(), 1);
                let pairs = op_pairs(&parts);
                assert_eq!(pairs, if a == b { 16 * 17 / 2 } else { 16 * 16 / 2 });
            }
        }
    }

    fn op_pairs(parts: &[AttentionPart]) -> u64 {
        let pairs = |p: &AttentionPart| p.op.pairs(p.queries.len(), p.keys.len());
        parts.iter().map(pairs).sum()
    }
}
