//! Losses, optimizers, dropout and copies against the textbook; see `tests`.

use super::tests::{Data, U, bits, check, everywhere};
use super::*;
use crate::dtype::{DType, Slice, SliceMut};
use crate::memory::Buffer;
use crate::random::Stream;

const FLOATS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];
const IGNORED: u32 = u32::MAX;

/// (losses, max, sum, dlogits, dlogits in place) of a vocabulary in `shards` pieces.
fn sharded_loss(
    logits: &Data,
    labels: &[u32],
    c: usize,
    valid: usize,
    shards: usize,
    scale: &[f32],
) -> (Vec<f32>, Vec<Data>) {
    let r = labels.len();
    let dtype = logits.get().dtype();
    let all: Vec<f32> = logits.f64().iter().map(|&x| x as f32).collect();
    let width = c / shards;
    let piece = |k: usize| {
        let rows = (0..r).flat_map(|i| all[i * c + k * width..i * c + (k + 1) * width].to_vec());
        let shard = Shard {
            first: k * width,
            valid,
        };
        (Data::new(dtype, rows.collect()), shard)
    };
    let pieces: Vec<_> = (0..shards).map(piece).collect();
    let mut max = vec![f32::NEG_INFINITY; r];
    for (x, shard) in &pieces {
        let mut m = vec![f32::NAN; r];
        row_max(x.get(), *shard, &mut m);
        max.iter_mut().zip(m).for_each(|(a, b)| *a = a.max(b));
    }
    let (mut sum, mut target) = (vec![0.0; r], vec![0.0; r]);
    for (x, shard) in &pieces {
        let (mut s, mut t) = (vec![f32::NAN; r], vec![f32::NAN; r]);
        row_exp_sum(x.get(), *shard, &max, labels, &mut s, &mut t);
        sum.iter_mut().zip(s).for_each(|(a, b)| *a += b);
        target.iter_mut().zip(t).for_each(|(a, b)| *a += b);
    }
    let mut losses = vec![f32::NAN; r];
    cross_entropy_losses(&max, &sum, &target, labels, IGNORED, &mut losses);
    let gradients = pieces
        .into_iter()
        .map(|(mut x, shard)| {
            let mut dx = Data::unwritten(dtype, r * width);
            let out = dx.get_mut();
            cross_entropy_gradient(x.get(), shard, &max, &sum, labels, IGNORED, scale, out);
            cross_entropy_gradient_in_place(x.get_mut(), shard, &max, &sum, labels, IGNORED, scale);
            assert_eq!(x, dx);
            dx
        })
        .collect();
    (losses, gradients)
}

#[test]
fn cross_entropy_matches_the_textbook_whole_and_in_shards() {
    for dtype in FLOATS {
        for (r, c, valid, shards) in [
            (1, 1, 1, 1),
            (3, 2, 2, 2),
            (5, 66, 65, 1),
            (5, 66, 65, 2),
            (4, 99, 60, 3),
            (3, 2054, 2053, 2),
            (40, 1031, 1031, 1),
        ] {
            let mut logits = Data::random(dtype, "logits", r * c, 8.0);
            // What stands in columns that do not exist must not matter.
            if let Data::F32(x) = &mut logits {
                (0..r).for_each(|i| x[i * c + valid..(i + 1) * c].fill(f32::NAN));
            }
            let mut labels: Vec<u32> = (0..r).map(|i| (i * 37 % valid) as u32).collect();
            if r > 2 {
                labels[1] = IGNORED;
            }
            let scales: Vec<f32> = (0..r).map(|i| 0.5 + i as f32).collect();
            let (losses, gradients) = everywhere(
                || sharded_loss(&logits, &labels, c, valid, shards, &scales),
                |(l, g)| {
                    let g = g.iter().flat_map(|g| g.f64()).map(|x| x as f32);
                    [bits(l), bits(&g.collect::<Vec<_>>())].concat()
                },
            );
            let x = logits.f64();
            let width = c / shards;
            // Lanes, tree, blocks and shards; and each exponential: its own ulp and the rounding of an argument below 16.
            let gamma = ((width.min(4096) / 32) as f64 + 5.0 + 3.0 + 3.0 + 18.0) * U;
            for i in 0..r {
                let row = &x[i * c..i * c + valid];
                let max = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
                let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
                let ignored = labels[i] == IGNORED;
                let want = if ignored {
                    0.0
                } else {
                    max + sum.ln() - row[labels[i] as usize]
                };
                let error = (losses[i] as f64 - want).abs();
                assert!(
                    error <= gamma + 3.0 * U * (16.0 + sum.ln()),
                    "{} {want}",
                    losses[i]
                );
                for (k, dx) in gradients.iter().enumerate() {
                    let part = parallel::part(dx.get(), i * width..(i + 1) * width);
                    let part = match part {
                        Slice::F32(x) => Data::F32(x.to_vec()),
                        Slice::Bf16(x) => Data::Bf16(x.to_vec()),
                        Slice::F16(x) => Data::F16(x.to_vec()),
                        Slice::U32(_) => unreachable!(),
                    };
                    let scale = scales[i] as f64;
                    let want = |j: usize| {
                        let j = k * width + j;
                        let hit = (j == labels[i] as usize) as u8 as f64;
                        match ignored || j >= valid {
                            true => 0.0,
                            false => scale * ((row[j] - max).exp() / sum - hit),
                        }
                    };
                    check(&part, want, |_| if ignored { 0.0 } else { scale * gamma });
                }
            }
            if shards == 1 {
                let (mut l, mut max, mut sum) = (vec![f32::NAN; r], vec![0.0; r], vec![0.0; r]);
                cross_entropy(
                    logits.get(),
                    &labels,
                    IGNORED,
                    valid,
                    &mut l,
                    &mut max,
                    &mut sum,
                );
                assert_eq!(bits(&l), bits(&losses));
            }
        }
    }
}

/// Blocks of a row whose logits lie about different heights: later maxima above all before, below all, out of reach of a
/// single pass, and minus infinity.
#[test]
fn a_vocabulary_of_many_blocks_may_rise_and_fall() {
    let hidden = f32::NEG_INFINITY;
    let c = 3 * 4096 + 17;
    for heights in [
        [-60.0, 90.0, 30.0, 0.0],
        [300.0, -300.0, 0.0, 299.0],
        [-9e5, 9e5, 0.0, 0.0],
        [-9e5, -9e5, -9e5, -9e5],
        [0.0, 0.0, 2e7, 0.0],
        [hidden, 1.0, 200.0, 2.0],
        [1.0, hidden, 2.0, hidden],
    ] {
        let noise = Data::random(DType::F32, "noise", c, 8.0).f64();
        let at = |j: usize| noise[j] as f32 + heights[j / 4096];
        let logits: Vec<f32> = (0..c).map(at).collect();
        let label = logits
            .iter()
            .position(|x| *x > hidden)
            .expect("some are seen") as u32
            + 7;
        let run = |shards: bool| {
            let (mut l, mut max, mut sum) = ([0.0], [0.0], [0.0]);
            let x = Slice::F32(&logits);
            if shards {
                let (shard, mut target) = (Shard { first: 0, valid: c }, [0.0]);
                row_max(x, shard, &mut max);
                row_exp_sum(x, shard, &max, &[label], &mut sum, &mut target);
                cross_entropy_losses(&max, &sum, &target, &[label], IGNORED, &mut l);
            } else {
                cross_entropy(x, &[label], IGNORED, c, &mut l, &mut max, &mut sum);
            }
            [l[0], max[0], sum[0]]
        };
        let got = everywhere(|| run(false), |x| bits(x));
        assert_eq!(bits(&got), bits(&run(true)), "{heights:?}");
        let max = logits.iter().fold(hidden, |m, &x| m.max(x)) as f64;
        let sum: f64 = logits.iter().map(|&x| (x as f64 - max).exp()).sum();
        assert_eq!(got[1] as f64, max);
        // Lanes, tree and blocks; each exponential and its argument, of which those far below the maximum do not count.
        let gamma = (128.0 + 5.0 + 4.0 + 20.0) * U;
        let error = (got[2] as f64 - sum).abs();
        assert!(error <= gamma * sum, "{heights:?}: {} {sum}", got[2]);
        let want = max + sum.ln() - logits[label as usize] as f64;
        let error = (got[0] as f64 - want).abs();
        assert!(
            error <= gamma + 3.0 * U * want.abs(),
            "{heights:?}: {} {want}",
            got[0]
        );
    }
}

#[test]
#[should_panic(expected = "label 70 is outside the vocabulary of 65")]
fn a_label_outside_the_vocabulary_panics() {
    let (mut l, mut max, mut sum) = ([0.0], [0.0], [0.0]);
    let logits = [0.0; 128];
    cross_entropy(
        Slice::F32(&logits),
        &[70],
        IGNORED,
        65,
        &mut l,
        &mut max,
        &mut sum,
    );
}

#[test]
fn a_nan_logit_reaches_the_loss() {
    for at in [0, 1, 40, 63, 64] {
        let mut logits = [0.5f32; 65];
        logits[at] = f32::NAN;
        let (mut l, mut max, mut sum) = ([0.0], [0.0], [0.0]);
        cross_entropy(
            Slice::F32(&logits),
            &[3],
            IGNORED,
            65,
            &mut l,
            &mut max,
            &mut sum,
        );
        assert!(l[0].is_nan() && max[0].is_nan(), "a NaN at {at} was lost");
    }
}

#[test]
fn softmax_matches_the_textbook() {
    for dtype in FLOATS {
        for (r, c) in [
            (0, 3),
            (1, 1),
            (3, 31),
            (5, 32),
            (4, 33),
            (2, 1031),
            (500, 97),
        ] {
            let x = Data::random(dtype, "x", r * c, 8.0);
            let y = everywhere(
                || {
                    let mut y = Data::unwritten(dtype, r * c);
                    softmax(x.get(), c, y.get_mut());
                    y
                },
                |y| bits(&y.f64().iter().map(|&x| x as f32).collect::<Vec<_>>()),
            );
            let xv = x.f64();
            let sums: Vec<f64> = xv
                .chunks(c)
                .map(|row| row.iter().map(|x| x.exp()).sum())
                .collect();
            let want = |i: usize| xv[i].exp() / sums[i / c];
            let gamma = (c as f64 / 32.0 + 5.0 + 4.0 + 36.0) * U;
            check(&y, want, |i| gamma * want(i));
        }
    }
}

#[test]
fn adamw_and_sgd_follow_their_formulas_and_skip_what_is_not_finite() {
    for n in [0, 1, 33, 40_009] {
        let g: Vec<Data> = (0..3)
            .map(|k| Data::random(FLOATS[k], &format!("g{k}"), n, 1.0))
            .collect();
        let start = Data::random(DType::F32, "p", n, 1.0).f64();
        let (lr, decay, factor) = (1e-2f32, 0.1f32, 0.5f32);
        let run = |momentum: bool, adam: bool| {
            everywhere(
                || {
                    let mut p: Vec<f32> = start.iter().map(|&x| x as f32).collect();
                    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
                    for (k, g) in g.iter().enumerate() {
                        for factor in [factor, f32::NAN, f32::INFINITY] {
                            if adam {
                                let step = k as u64 + 1;
                                let constants = AdamW {
                                    lr,
                                    beta1: 0.9,
                                    beta2: 0.99,
                                    eps: 1e-8,
                                    weight_decay: decay,
                                    step,
                                };
                                adamw(&mut p, &mut m, &mut v, g.get(), constants, factor);
                            } else {
                                let constants = Sgd {
                                    lr,
                                    momentum: 0.9,
                                    weight_decay: decay,
                                };
                                let m = momentum.then_some(&mut m[..]);
                                sgd(&mut p, m, g.get(), constants, factor);
                            }
                        }
                    }
                    p
                },
                |p| bits(p),
            )
        };
        let (adam, heavy, plain) = (run(false, true), run(true, false), run(false, false));
        let g: Vec<Vec<f64>> = g.iter().map(Data::f64).collect();
        let (lr, decay, factor) = (lr as f64, decay as f64, factor as f64);
        let (b1, b2) = (0.9f32 as f64, 0.99f32 as f64);
        for i in 0..n {
            let (mut a, mut m, mut v) = (start[i], 0.0, 0.0);
            let (mut h, mut hm, mut s) = (start[i], 0.0, start[i]);
            for k in 0..3 {
                let g = g[k][i] * factor;
                let t = k as i32 + 1;
                m = b1 * m + (1.0 - b1) * g;
                v = b2 * v + (1.0 - b2) * g * g;
                let (mh, vh) = (m / (1.0 - b1.powi(t)), v / (1.0 - b2.powi(t)));
                a = a * (1.0 - lr * decay) - lr * mh / (vh.sqrt() + 1e-8);
                hm = 0.9f32 as f64 * hm + g + decay * h;
                h -= lr * hm;
                s -= lr * (g + decay * s);
            }
            // Per step two roundings of p and some ten of an update of at most a few lr (of m's terms, before they cancel).
            let bound = 3.0 * (3.0 * U * (start[i].abs() + 0.1) + 64.0 * U * lr * 4.0);
            for (got, want) in [(adam[i], a), (heavy[i], h), (plain[i], s)] {
                let error = (got as f64 - want).abs();
                assert!(error <= bound, "{got} {want} {error:e} {bound:e}");
            }
        }
    }
}

#[test]
fn dropout_belongs_to_the_global_element() {
    let stream = Stream::new(5, "dropout");
    for dtype in FLOATS {
        // A shard of 7 columns out of 20, from column 9: every row is a run.
        let (r, c, first, run) = (301, 20usize, 9, 7usize);
        let x = Data::random(dtype, "x", r * c, 1.0);
        for p in [0.0, 0.3, 1.0] {
            let whole = everywhere(
                || {
                    let mut y = Data::unwritten(dtype, r * c);
                    dropout(x.get(), y.get_mut(), p, stream, r * c, |_| 0);
                    y
                },
                |y| bits(&y.f64().iter().map(|&x| x as f32).collect::<Vec<_>>()),
            );
            let xv = x.f64();
            let factor = if p < 1.0 { 1.0 / (1.0 - p as f64) } else { 0.0 };
            let kept = |i: usize| stream.uniform(i as u64) >= p;
            let want = |i: usize| if kept(i) { xv[i] * factor } else { 0.0 };
            check(&whole, want, |i| 4.0 * U * want(i).abs());
            let columns: Vec<f32> = (0..r * run)
                .map(|k| xv[k / run * c + first + k % run] as f32)
                .collect();
            let columns = Data::new(dtype, columns);
            let mut y = Data::unwritten(dtype, r * run);
            let start = |row: usize| (row * c + first) as u64;
            dropout(columns.get(), y.get_mut(), p, stream, run, start);
            let whole = whole.f64();
            for (k, y) in y.f64().into_iter().enumerate() {
                assert_eq!(y, whole[k / run * c + first + k % run]);
            }
        }
    }
}

#[test]
fn strided_copies_move_every_element_and_nothing_else() {
    // (shape, source strides, target strides)
    type Case = (Vec<usize>, Vec<usize>, Vec<usize>);
    let cases: [Case; 10] = [
        (vec![], vec![], vec![]),
        (vec![5], vec![1], vec![1]),
        (vec![4, 0], vec![1, 1], vec![1, 1]),
        (vec![37, 41], vec![1, 37], vec![41, 1]),
        (vec![37, 41], vec![41, 1], vec![1, 40]),
        (vec![3, 5, 7], vec![35, 7, 1], vec![50, 8, 1]),
        (vec![2, 3, 5, 7], vec![105, 7, 21, 1], vec![105, 35, 7, 1]),
        (
            vec![3, 33, 2, 34],
            vec![1, 3, 99, 198],
            vec![2244, 68, 34, 1],
        ),
        (
            vec![2, 2, 3, 2, 5],
            vec![60, 1, 2, 6, 12],
            vec![64, 30, 10, 5, 1],
        ),
        (vec![210, 211], vec![1, 210], vec![211, 1]),
    ];
    for (shape, sx, sy) in cases {
        let indices: usize = shape.iter().product();
        let reach = |s: &[usize]| {
            let last = shape.iter().zip(s).map(|(n, s)| n.saturating_sub(1) * s);
            last.sum::<usize>() + 3
        };
        let x: Vec<u32> = (0..reach(&sx) as u32).collect();
        let untouched = u32::MAX;
        let y = everywhere(
            || {
                let mut y = vec![untouched; reach(&sy)];
                copy_strided(Slice::U32(&x), &sx, SliceMut::U32(&mut y), &sy, &shape);
                y
            },
            |y| y.clone(),
        );
        let mut want = vec![untouched; reach(&sy)];
        for k in 0..indices {
            let (mut rest, mut i, mut j) = (k, 0, 0);
            for a in (0..shape.len()).rev() {
                i += rest % shape[a] * sx[a];
                j += rest % shape[a] * sy[a];
                rest /= shape[a];
            }
            want[j] = x[i];
        }
        assert_eq!(y, want, "{shape:?} from {sx:?} to {sy:?}");
    }
}

#[test]
fn a_large_transpose_goes_past_the_caches_and_is_whole() {
    // Edges that are no whole tiles; the target's rows begin with a cache line and end before the next one's.
    let (rows, columns, pitch) = (2053, 2059, 2064);
    let x: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
    everywhere(
        || {
            let mut y = Buffer::new(4 * rows * pitch);
            let to: &mut [f32] = bytemuck::cast_slice_mut(y.as_bytes_mut());
            to.fill(-1.0);
            let shape = [rows, columns];
            copy_strided(
                Slice::F32(&x),
                &[1, rows],
                SliceMut::F32(to),
                &[pitch, 1],
                &shape,
            );
            for (i, line) in to.chunks(pitch).enumerate() {
                for (j, y) in line.iter().enumerate() {
                    let want = if j < columns {
                        (j * rows + i) as f32
                    } else {
                        -1.0
                    };
                    assert_eq!(*y, want, "row {i}, column {j}");
                }
            }
        },
        |()| Vec::new(),
    );
}

#[test]
#[should_panic(expected = "share an element of the target")]
fn a_copy_to_overlapping_targets_panics() {
    let (x, mut y) = ([0.0; 6], [0.0; 6]);
    copy_strided(
        Slice::F32(&x),
        &[3, 1],
        SliceMut::F32(&mut y),
        &[2, 1],
        &[2, 3],
    );
}
