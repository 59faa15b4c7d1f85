//! Every function of rows against the textbook in f64, on every instruction set of this machine, with one thread and two,
//! in all float types, at ragged sizes. u is the roundoff of f32, gamma(n) = n u bounds a chain of n roundings.

use super::*;
use crate::dtype::{DType, Slice, SliceMut};
use crate::random::Stream;
use crate::simd::{Isa, with_isa};
use crate::{Accum, Activation};
use half::{bf16, f16};

pub(crate) const U: f64 = 1.0 / (1 << 24) as f64;
const FLOATS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];
/// (rows, columns): none, one, around a group of lanes, primes, and enough for two threads.
const SHAPES: [(usize, usize); 9] = [
    (0, 5),
    (1, 1),
    (3, 2),
    (2, 31),
    (5, 32),
    (3, 33),
    (7, 97),
    (2, 2053),
    (401, 97),
];

/// Elements of a type chosen at run time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Data {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Data {
    pub(crate) fn new(dtype: DType, x: Vec<f32>) -> Self {
        match dtype {
            DType::F32 => Data::F32(x),
            DType::Bf16 => Data::Bf16(x.into_iter().map(bf16::from_f32).collect()),
            DType::F16 => Data::F16(x.into_iter().map(f16::from_f32).collect()),
            DType::U32 => unreachable!(),
        }
    }
    /// n values on -range..range.
    pub(crate) fn random(dtype: DType, name: &str, n: usize, range: f32) -> Self {
        let s = Stream::new(11, name);
        let x = (0..n as u64).map(|i| (2.0 * s.uniform(i) - 1.0) * range);
        Data::new(dtype, x.collect())
    }
    /// Outputs start as NaN, so that what is not written shows.
    pub(crate) fn unwritten(dtype: DType, n: usize) -> Self {
        Data::new(dtype, vec![f32::NAN; n])
    }
    pub(crate) fn get(&self) -> Slice<'_> {
        match self {
            Data::F32(x) => Slice::F32(x),
            Data::Bf16(x) => Slice::Bf16(x),
            Data::F16(x) => Slice::F16(x),
        }
    }
    pub(crate) fn get_mut(&mut self) -> SliceMut<'_> {
        match self {
            Data::F32(x) => SliceMut::F32(x),
            Data::Bf16(x) => SliceMut::Bf16(x),
            Data::F16(x) => SliceMut::F16(x),
        }
    }
    pub(crate) fn f64(&self) -> Vec<f64> {
        match self {
            Data::F32(x) => x.iter().map(|&x| x as f64).collect(),
            Data::Bf16(x) => x.iter().map(|x| x.to_f64()).collect(),
            Data::F16(x) => x.iter().map(|x| x.to_f64()).collect(),
        }
    }
    pub(crate) fn f32(&self) -> Vec<f32> {
        self.f64().iter().map(|&x| x as f32).collect()
    }
    fn roundoff(&self) -> f64 {
        match self.get().dtype() {
            DType::F32 => 0.0,
            narrow => narrow.roundoff(),
        }
    }
}

/// Bits of f32s, which compare NaNs too.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// f's result, which must be the same on every instruction set and on 1, 2, 3 and 8 threads.
pub(crate) fn everywhere<R: Send>(f: impl Fn() -> R + Sync, key: impl Fn(&R) -> Vec<u32>) -> R {
    everywhere_on(Isa::available().into_iter(), f, key)
}

/// As [`everywhere`], on these instruction sets only.
pub(crate) fn everywhere_on<R: Send>(
    sets: impl Iterator<Item = Isa> + Clone,
    f: impl Fn() -> R + Sync,
    key: impl Fn(&R) -> Vec<u32>,
) -> R {
    let mut first: Option<R> = None;
    for threads in [1, 2, 3, 8] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        for isa in sets.clone() {
            let result = pool.install(|| with_isa(isa, &f));
            match &first {
                Some(first) => assert!(
                    key(first) == key(&result),
                    "{isa:?} with {threads} threads gives other bits"
                ),
                None => first = Some(result),
            }
        }
    }
    first.unwrap()
}

/// |got - want| <= bound + what rounding to the output's type costs, for every element.
#[track_caller]
pub(crate) fn check(got: &Data, want: impl Fn(usize) -> f64, bound: impl Fn(usize) -> f64) {
    let narrow = got.roundoff();
    for (i, got) in got.f64().into_iter().enumerate() {
        let (want, bound) = (want(i), bound(i));
        let error = (got - want).abs();
        // Subnormal results are rounded to a fixed step: 2^-25 is half of f16's.
        let tiny = if narrow > 0.0 { 2f64.powi(-25) } else { 1e-44 };
        let bound = bound * (1.0 + narrow) + narrow * want.abs() + tiny;
        assert!(
            error <= bound,
            "element {i}: {got}, not {want}: {error:e} > {bound:e}"
        );
    }
}

fn run1(dtype: DType, n: usize, f: impl Fn(SliceMut) + Sync) -> Data {
    everywhere(
        || {
            let mut y = Data::unwritten(dtype, n);
            f(y.get_mut());
            y
        },
        |y| bits(&y.f32()),
    )
}

fn max_abs(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(x.abs()))
}

#[test]
fn elementwise_functions_round_once() {
    for dtype in FLOATS {
        for n in [0, 1, 31, 32, 33, 511, 513, 70_001] {
            let (a, b) = (
                Data::random(dtype, "a", n, 3.0),
                Data::random(DType::Bf16, "b", n, 3.0),
            );
            let (av, bv) = (a.f64(), b.f64());
            let u = |want: f64| U * want.abs();
            let y = run1(dtype, n, |y| add(a.get(), b.get(), y));
            check(&y, |i| av[i] + bv[i], |i| u(av[i] + bv[i]));
            let y = run1(dtype, n, |y| multiply(a.get(), b.get(), y));
            check(&y, |i| av[i] * bv[i], |i| u(av[i] * bv[i]));
            let y = run1(dtype, n, |y| scale(a.get(), 0.3, y));
            check(&y, |i| av[i] * 0.3f32 as f64, |i| u(av[i]));
            let y = run1(dtype, n, |y| cast(a.get(), y));
            assert_eq!(y, a);
            let in_place = |f: fn(SliceMut, Slice)| {
                run1(dtype, n, |mut y| {
                    cast(a.get(), y.reborrow());
                    f(y, b.get());
                })
            };
            let y = in_place(add_assign);
            check(&y, |i| av[i] + bv[i], |i| u(av[i] + bv[i]));
        }
    }
}

fn erf(x: f64) -> f64 {
    // Abramowitz, Stegun 7.1.6: all terms positive, so no digits are lost.
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-18 * sum.abs() {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}

fn textbook(kind: Activation, x: f64) -> f64 {
    match kind {
        Activation::GeluTanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            0.5 * x * (1.0 + (c * (x + 0.044715 * x * x * x)).tanh())
        }
        Activation::GeluErf => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        Activation::Relu2 => x.max(0.0) * x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

/// Central differences of the textbook in f64: good to about 1e-10.
fn slope(kind: Activation, x: f64) -> f64 {
    let h = 1e-5;
    (textbook(kind, x + h) - textbook(kind, x - h)) / (2.0 * h)
}

#[test]
fn activations_and_their_gradients_match_the_textbook() {
    use Activation::*;
    for dtype in FLOATS {
        for n in [0, 1, 33, 601] {
            let x = Data::random(dtype, "x", n, 6.0);
            let dy = Data::random(dtype, "dy", n, 1.0);
            let up = Data::random(dtype, "up", n, 2.0);
            let (xv, dv, uv) = (x.f64(), dy.f64(), up.f64());
            // Some ten roundings, each relative to a factor of at most |x| (or 1 + x^2 in a slope, whose density is below 1).
            let near = |i: usize| 16.0 * U * xv[i].abs();
            let steep = |i: usize| (32.0 * U * (1.0 + xv[i].abs()) + 1e-9) * dv[i].abs();
            for kind in [GeluTanh, GeluErf, Relu2, Silu] {
                let y = run1(dtype, n, |y| activation(kind, x.get(), y));
                let square = |i: usize| {
                    if kind == Relu2 {
                        4.0 * U * xv[i] * xv[i]
                    } else {
                        0.0
                    }
                };
                check(&y, |i| textbook(kind, xv[i]), |i| near(i) + square(i));
                let dx = run1(dtype, n, |dx| {
                    activation_backward(kind, x.get(), dy.get(), dx)
                });
                check(&dx, |i| dv[i] * slope(kind, xv[i]), steep);
            }
            let silu = |i: usize| textbook(Silu, xv[i]);
            let y = run1(dtype, n, |y| swiglu(x.get(), up.get(), y));
            check(&y, |i| silu(i) * uv[i], |i| near(i) * uv[i].abs());
            let (dgate, dup) = everywhere(
                || {
                    let mut out = (Data::unwritten(dtype, n), Data::unwritten(dtype, n));
                    let (dgate, dup) = (out.0.get_mut(), out.1.get_mut());
                    swiglu_backward(x.get(), up.get(), dy.get(), dgate, dup);
                    out
                },
                |y| [bits(&y.0.f32()), bits(&y.1.f32())].concat(),
            );
            let want = |i: usize| dv[i] * uv[i] * slope(Silu, xv[i]);
            check(&dgate, want, |i| steep(i) * 2.0);
            check(&dup, |i| dv[i] * silu(i), |i| near(i) * dv[i].abs());
        }
    }
}

#[test]
fn layer_norm_and_rms_norm_match_the_textbook() {
    for dtype in FLOATS {
        for (r, c) in SHAPES {
            for (centered, affine) in [(true, true), (true, false), (false, true)] {
                norm_case(dtype, r, c, centered, affine);
            }
        }
    }
}

fn norm_case(dtype: DType, r: usize, c: usize, centered: bool, affine: bool) {
    let x = Data::random(dtype, "x", r * c, 2.0);
    let dy = Data::random(dtype, "dy", r * c, 1.0);
    let (w, b) = (
        Data::random(dtype, "w", c, 1.5),
        Data::random(DType::F32, "b", c, 1.0),
    );
    let weight = affine.then(|| w.get());
    let bias = (affine && centered).then(|| b.get());
    let eps = 1e-3f32;
    let (y, mean, rstd) = everywhere(
        || {
            let mut y = Data::unwritten(dtype, r * c);
            let (mut mean, mut rstd) = (vec![0.0; r], vec![f32::NAN; r]);
            if centered {
                layer_norm(
                    x.get(),
                    weight,
                    bias,
                    eps,
                    y.get_mut(),
                    &mut mean,
                    &mut rstd,
                );
            } else {
                rms_norm(x.get(), weight, eps, y.get_mut(), &mut rstd);
            }
            (y, mean, rstd)
        },
        |(y, mean, rstd)| [bits(&y.f32()), bits(mean), bits(rstd)].concat(),
    );
    let (xv, dv) = (x.f64(), dy.f64());
    let (wv, bv) = (w.f64(), b.f64());
    let (wf, bf) = (
        |j: usize| if affine { wv[j] } else { 1.0 },
        |j: usize| if affine && centered { bv[j] } else { 0.0 },
    );
    // A lane's chain and the tree of five, and the few roundings around them.
    let gamma = (c as f64 / 32.0 + 16.0) * U;
    let n = c as f64;
    for i in 0..r {
        let row = &xv[i * c..(i + 1) * c];
        let m = if centered {
            row.iter().sum::<f64>() / n
        } else {
            0.0
        };
        let v = row.iter().map(|x| (x - m).powi(2)).sum::<f64>() / n;
        let s = 1.0 / (v + eps as f64).sqrt();
        // Each difference from the mean errs by gamma max|x|; the root's relative error is that of the squares.
        let a = max_abs(row);
        assert!((mean[i] as f64 - m).abs() <= gamma * a);
        let relative = gamma * (1.0 + a * s);
        assert!(
            (rstd[i] as f64 - s).abs() <= relative * s,
            "{} {s}",
            rstd[i]
        );
    }
    // From here on the textbook starts from the kernel's own statistics, as the backward does.
    let stat = |i: usize| (mean[i / c] as f64, rstd[i / c] as f64);
    let h = |i: usize| (xv[i] - stat(i).0) * stat(i).1;
    let size = |i: usize| (h(i) * wf(i % c)).abs() + bf(i % c).abs();
    check(&y, |i| h(i) * wf(i % c) + bf(i % c), |i| 4.0 * U * size(i));

    let start = Data::random(DType::F32, "start", c, 1.0).f32();
    let (dx, dw, db) = everywhere(
        || {
            let mut dx = Data::unwritten(dtype, r * c);
            let (mut dw, mut db) = (start.clone(), vec![f32::NAN; c]);
            let (dwo, dxo) = (Some((&mut dw[..], Accum::Add)), Some(dx.get_mut()));
            if centered {
                let dbo = Some((&mut db[..], Accum::Replace));
                layer_norm_backward(dy.get(), x.get(), weight, &mean, &rstd, dxo, dwo, dbo);
            } else {
                rms_norm_backward(dy.get(), x.get(), weight, &rstd, dxo, dwo);
                column_sum(dy.get(), &mut db, Accum::Replace);
            }
            (dx, dw, db)
        },
        |(dx, dw, db)| [bits(&dx.f32()), bits(dw), bits(db)].concat(),
    );
    let g = |i: usize| dv[i] * wf(i % c);
    let row_mean = |i: usize, f: &dyn Fn(usize) -> f64| {
        let first = i / c * c;
        (first..first + c).map(f).sum::<f64>() / n
    };
    let means: Vec<[f64; 4]> = (0..r)
        .map(|row| {
            let i = row * c;
            [
                if centered { row_mean(i, &g) } else { 0.0 },
                row_mean(i, &|j| g(j) * h(j)),
                row_mean(i, &|j| g(j).abs()),
                row_mean(i, &|j| (g(j) * h(j)).abs()),
            ]
        })
        .collect();
    check(
        &dx,
        |i| stat(i).1 * (g(i) - means[i / c][0] - h(i) * means[i / c][1]),
        |i| gamma * stat(i).1 * (g(i).abs() + means[i / c][2] + h(i).abs() * means[i / c][3]),
    );
    let chain = (r as f64 + 4.0) * U;
    let over_rows = |f: &dyn Fn(usize) -> f64, j: usize| (0..r).map(|i| f(i * c + j)).sum::<f64>();
    check(
        &Data::F32(dw),
        |j| start[j] as f64 + over_rows(&|i| dv[i] * h(i), j),
        |j| chain * (start[j].abs() as f64 + over_rows(&|i| (dv[i] * h(i)).abs(), j)),
    );
    check(
        &Data::F32(db),
        |j| over_rows(&|i| dv[i], j),
        |j| chain * over_rows(&|i| dv[i].abs(), j),
    );
}

#[test]
fn sums_are_exact_on_integers_and_close_on_the_rest() {
    for dtype in FLOATS {
        for n in [0, 1, 31, 33, 4095, 4097, 40_961] {
            let x = Data::random(dtype, "x", n, 1.0);
            let (s, q) = everywhere(
                || (sum(x.get()), sum_of_squares(x.get())),
                |&(s, q)| bits(&[s, q]),
            );
            let xv = x.f64();
            let gamma = (4096.0 / 32.0 + 5.0 + 8.0) * U;
            let error = (s as f64 - xv.iter().sum::<f64>()).abs();
            assert!(error <= gamma * xv.iter().map(|x| x.abs()).sum::<f64>());
            let squares = xv.iter().map(|x| x * x).sum::<f64>();
            assert!((q as f64 - squares).abs() <= gamma * squares);
            let ones = Data::new(dtype, (0..n).map(|i| (i % 3) as f32).collect());
            assert_eq!(sum(ones.get()), (0..n).map(|i| (i % 3) as f32).sum::<f32>());
        }
        for (r, c) in SHAPES {
            let x = Data::random(dtype, "x", r * c, 1.0);
            let b = Data::random(dtype, "b", c, 1.0);
            let (xv, bv) = (x.f64(), b.f64());
            let y = run1(dtype, r * c, |y| add_bias(x.get(), b.get(), y));
            check(&y, |i| xv[i] + bv[i % c], |i| U * (xv[i] + bv[i % c]).abs());
            // Two halves, the second resumed, are the bits of the whole.
            let cut = r / 2 * c;
            let (whole, halves) = everywhere(
                || {
                    let (mut a, mut b) = (vec![f32::NAN; c], vec![f32::NAN; c]);
                    column_sum(x.get(), &mut a, Accum::Replace);
                    column_sum(parallel::part(x.get(), 0..cut), &mut b, Accum::Replace);
                    column_sum(parallel::part(x.get(), cut..r * c), &mut b, Accum::Add);
                    (a, b)
                },
                |(a, b)| [bits(a), bits(b)].concat(),
            );
            assert_eq!(whole, halves);
            let xs = x.f32();
            let column = |j: usize| (0..r).fold(0.0, |s, i| s + xs[i * c + j]);
            assert_eq!(whole, (0..c).map(column).collect::<Vec<f32>>());
        }
    }
}

#[test]
fn embedding_shards_add_up_and_the_gradient_counts_tokens() {
    let (v, c, t) = (13, 33, 29);
    let ids: Vec<u32> = (0..t as u32).map(|i| (i * i) % 13).collect();
    for dtype in FLOATS {
        let table = Data::random(dtype, "table", v * c, 1.0);
        let tv = table.f64();
        for (first, end) in [(0, v), (0, 6), (6, v), (13, v)] {
            let shard = parallel::part(table.get(), first * c..end * c);
            for out in FLOATS {
                let y = run1(out, t * c, |y| embedding(shard, &ids, first, y));
                let want = |i: usize| {
                    let id = ids[i / c] as usize;
                    if (first..end).contains(&id) {
                        tv[id * c + i % c]
                    } else {
                        0.0
                    }
                };
                check(&y, want, |_| 0.0);
            }
        }
    }
    // Small integers: sums are exact in any order.
    let (v, c, t) = (301, 67, 600);
    let ids: Vec<u32> = (0..t as u32).map(|i| (i * i) % 301).collect();
    let dy: Vec<f32> = (0..t * c).map(|i| (i % 7) as f32 - 3.0).collect();
    for (first, end) in [(0, v), (100, 200)] {
        for accum in [Accum::Replace, Accum::Add] {
            let got = everywhere(
                || {
                    let start = if accum == Accum::Add { 5.0 } else { f32::NAN };
                    let mut dtable = vec![start; (end - first) * c];
                    embedding_backward(Slice::F32(&dy), &ids, first, &mut dtable, accum);
                    dtable
                },
                |y| bits(y),
            );
            let mut want = vec![if accum == Accum::Add { 5.0 } else { 0.0 }; (end - first) * c];
            for (i, &id) in ids.iter().enumerate() {
                if (first..end).contains(&(id as usize)) {
                    for j in 0..c {
                        want[(id as usize - first) * c + j] += dy[i * c + j];
                    }
                }
            }
            assert_eq!(got, want);
        }
    }
}

#[test]
fn rotary_turns_pairs_and_back() {
    let (batch, tokens, heads) = (2, 5, 3);
    for dtype in FLOATS {
        for (d, rotary_dim) in [(2, 2), (7, 4), (64, 64), (80, 32), (1, 0)] {
            for style in [RotaryStyle::Halves, RotaryStyle::Pairs] {
                let half = rotary_dim / 2;
                let n = batch * tokens * heads * d;
                let x = Data::random(dtype, "x", n, 1.0);
                let angle = |t: usize, i: usize| t as f32 * 0.7f32.powi(i as i32);
                let table = |f: fn(f32) -> f32| -> Vec<f32> {
                    (0..tokens * half)
                        .map(|k| f(angle(k / half, k % half)))
                        .collect()
                };
                let (cos, sin) = (table(f32::cos), table(f32::sin));
                let xv = x.f64();
                for inverse in [false, true] {
                    let shape = Rotary {
                        batch,
                        tokens,
                        heads,
                        head_dim: d,
                        rotary_dim,
                        style,
                        inverse,
                    };
                    let y = run1(dtype, n, |y| rotary(x.get(), y, shape, &cos, &sin));
                    let pair = |i: usize| {
                        let (row, j) = (i / d * d, i % d);
                        match style {
                            _ if j >= rotary_dim => (xv[i], 0.0, 0),
                            RotaryStyle::Halves if j < half => (xv[i], -xv[row + j + half], j),
                            RotaryStyle::Halves => (xv[i], xv[row + j - half], j - half),
                            RotaryStyle::Pairs if j % 2 == 0 => (xv[i], -xv[i + 1], j / 2),
                            RotaryStyle::Pairs => (xv[i], xv[i - 1], j / 2),
                        }
                    };
                    let want = |i: usize| {
                        let (own, other, k) = pair(i);
                        if i % d >= rotary_dim {
                            return own;
                        }
                        let at = i / d / heads % tokens * half + k;
                        let sign = if inverse { -1.0 } else { 1.0 };
                        own * cos[at] as f64 + sign * other * sin[at] as f64
                    };
                    check(&y, want, |i| 3.0 * U * (pair(i).0.abs() + pair(i).1.abs()));
                }
            }
        }
    }
}
