//! The ladder of tolerances, derived and not tuned: exact for small integers, `gamma(k) |A| |B|` per element for random
//! data, Freivalds' check for products too big to repeat. NaN never passes.

use crate::dtype::{DType, Float};
use crate::random::Stream;

/// `gamma(k, u) = k u / (1 - k u)`: the relative error of k roundings, each at most u (Higham 2002, lemma 3.1).
///
/// Panics if `k u >= 1`, where it says nothing.
pub fn gamma(k: usize, u: f64) -> f64 {
    let ku = k as f64 * u;
    assert!(ku < 1.0, "{k} roundings of {u:e} may lose everything");
    ku / (1.0 - ku)
}

/// How far x may move when it is stored as `dtype`: `u |x|`, or half of the smallest number where that is more.
pub fn rounding(dtype: DType, x: f64) -> f64 {
    let smallest = match dtype {
        DType::F32 => f64::from(f32::from_bits(1)),
        DType::Bf16 => half::bf16::from_bits(1).to_f64(),
        DType::F16 => half::f16::from_bits(1).to_f64(),
        DType::U32 => 0.0,
    };
    (dtype.roundoff() * x.abs()).max(smallest / 2.0)
}

/// The elements in f64: exact.
pub fn widen<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.to_f32().into()).collect()
}

/// Panics unless `|got[i] - want[i]| <= bound[i]` for every i; equal infinities pass, NaN on any side fails.
///
/// Gives the largest `error / bound`, which says how much of the bound is used.
pub fn assert_within(what: &str, got: &[f64], want: &[f64], bound: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    assert_eq!(bound.len(), want.len(), "{what}: one bound per element");
    let error = |i: usize| {
        if got[i] == want[i] {
            0.0
        } else {
            (got[i] - want[i]).abs()
        }
    };
    let fails = |i: &usize| error(*i).is_nan() || bound[*i].is_nan() || error(*i) > bound[*i];
    let failed: Vec<usize> = (0..want.len()).filter(fails).collect();
    assert!(
        failed.is_empty(),
        "{what}: {} of {} elements out of bounds, first [{}]: {:e}, want {:e}, off by {:e} > {:e}",
        failed.len(),
        want.len(),
        failed[0],
        got[failed[0]],
        want[failed[0]],
        error(failed[0]),
        bound[failed[0]]
    );
    (0..want.len())
        .filter(|&i| error(i) > 0.0)
        .map(|i| error(i) / bound[i])
        .fold(0.0, f64::max)
}

/// `gamma(k, u) (|a| |b|)[i,j]`, the bound of an element of a product summed with unit roundoff u in any order (Higham 2002,
/// section 3.5): a `[m, k]`, b `[k, n]`, the bounds `[m, n]`.
pub fn product_bound([m, n, k]: [usize; 3], a: &[f64], b: &[f64], u: f64) -> Vec<f64> {
    let size = |x: &[f64]| x.iter().map(|x| x.abs()).collect::<Vec<_>>();
    let sizes = super::matmul([m, n, k], &size(a), &size(b));
    sizes.iter().map(|s| gamma(k, u) * s).collect()
}

/// Panics unless `c = a b` within what rounding with unit roundoff u allows, in `O(m n + m k + n k)`: with a random vector x,
/// `c x` must be `a (b x)` (Freivalds 1977). a `[m, k]`, b `[k, n]`, c `[m, n]`.
///
/// `u = 0` demands equality. Fill a and b with integers of at most 3 bits then, so that this check is exact too: x holds
/// integers of 15 bits and a sign, and one wrong element, or any wrong row, hides with probability at most 2^-16. With
/// u > 0 the bound of a row is the sum of its elements' bounds, which shows wrong blocks but may hide a wrong element.
pub fn assert_product<A: Float, B: Float, C: Float>(
    [m, n, k]: [usize; 3],
    a: &[A],
    b: &[B],
    c: &[C],
    u: f64,
    stream: &Stream,
) {
    assert_eq!(
        [a.len(), b.len(), c.len()],
        [m * k, k * n, m * n],
        "lengths of a, b, c"
    );
    let x: Vec<f64> = (0..n as u64).map(|j| nonzero(stream.word(j))).collect();
    let (bx, bx_size) = times([k, n], b, &x, &x);
    let (abx, abx_size) = times([m, k], a, &bx, &bx_size);
    let (cx, cx_size) = times([m, n], c, &x, &x);
    // The f64 sums of this check round as well, unless all is integers.
    let (product, store) = if u == 0.0 {
        (0.0, 0.0)
    } else {
        let own = gamma(n + k, f64::EPSILON / 2.0);
        (gamma(k, u) + own, gamma(1, C::DTYPE.roundoff()) + own)
    };
    for i in 0..m {
        let (error, bound) = (
            (cx[i] - abx[i]).abs(),
            product * abx_size[i] + store * cx_size[i],
        );
        assert!(
            error <= bound,
            "row {i} of {m}x{n}x{k}: c x is off by {error:e} > {bound:e}"
        );
    }
}

/// `(a x, |a| |x|)` for a `[r, c]` and an `|x|` given apart, because it may bound a sum that x cancelled.
fn times<T: Float>([r, c]: [usize; 2], a: &[T], x: &[f64], size: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let row = |i: usize| {
        let (mut sum, mut sum_size) = (0.0, 0.0);
        for j in 0..c {
            let a = f64::from(a[i * c + j].to_f32());
            sum += a * x[j];
            sum_size += a.abs() * size[j].abs();
        }
        (sum, sum_size)
    };
    (0..r).map(row).unzip()
}

/// One of the 2^16 integers from -2^15 to 2^15 without 0.
fn nonzero(word: u32) -> f64 {
    let size = f64::from((word & 0x7fff) + 1);
    if word & 0x8000 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn gamma_grows_a_little_faster_than_k() {
        assert_eq!(gamma(0, 0.25), 0.0);
        assert_eq!(gamma(2, 0.25), 1.0);
        assert_eq!(gamma(5, 0.0), 0.0);
        assert!(gamma(1000, DType::F32.roundoff()) > 1000.0 * DType::F32.roundoff());
    }

    #[test]
    fn rounding_covers_every_stored_number() {
        for x in [1.0, 1.9999, 3.7e4, 1e-3, 5.1e-8, 1e-41] {
            let stored = [
                (DType::F32, f64::from(x as f32)),
                (DType::Bf16, bf16::from_f64(x).to_f64()),
                (DType::F16, f16::from_f64(x).to_f64()),
            ];
            for (dtype, y) in stored {
                assert!(
                    (x - y).abs() <= rounding(dtype, x),
                    "{x:e} as {dtype} is {y:e}"
                );
            }
        }
    }

    #[test]
    fn within_says_how_much_is_used() {
        let infinite = f64::NEG_INFINITY;
        let used = assert_within("x", &[1.5, infinite], &[1.0, infinite], &[2.0, 0.0]);
        assert_eq!(used, 0.25);
        assert_eq!(assert_within("nothing", &[], &[], &[]), 0.0);
    }

    #[test]
    fn within_refuses_errors_and_nan() {
        for (got, want, bound) in [
            (1.5, 1.0, 0.25),
            (f64::NAN, 1.0, 1.0),
            (1.0, f64::NAN, 1.0),
            (1.0, 2.0, f64::NAN),
            (f64::NAN, f64::NAN, f64::INFINITY),
            (f64::INFINITY, 1.0, 1e300),
        ] {
            let check = || assert_within("x", &[0.0, got], &[0.0, want], &[0.0, bound]);
            assert!(
                std::panic::catch_unwind(check).is_err(),
                "{got} {want} {bound}"
            );
        }
    }

    /// A product in f32, one chain per element, rounded to `C` once.
    fn chain<C: Float>([m, n, k]: [usize; 3], a: &[f32], b: &[f32]) -> Vec<C> {
        let element =
            |ij: usize| (0..k).fold(0.0, |c, p| a[ij / n * k + p].mul_add(b[p * n + ij % n], c));
        (0..m * n).map(|ij| C::from_f32(element(ij))).collect()
    }

    fn data(name: &str, n: usize, integers: bool) -> Vec<f32> {
        let s = Stream::new(2, name);
        let number = |i| {
            if integers {
                s.below(i, 15) as f32 - 7.0
            } else {
                s.normal(i)
            }
        };
        (0..n as u64).map(number).collect()
    }

    #[test]
    fn freivalds_is_exact_on_integers() {
        let sizes @ [m, n, k] = [9, 13, 31];
        let (a, b) = (data("a", m * k, true), data("b", k * n, true));
        let c: Vec<f32> = chain(sizes, &a, &b);
        let stream = Stream::new(3, "x");
        assert_product(sizes, &a, &b, &c, 0.0, &stream);
        for wrong in [1.0, f32::NAN, f32::INFINITY] {
            let mut c = c.clone();
            c[40] += wrong;
            let check = || assert_product(sizes, &a, &b, &c, 0.0, &stream);
            assert!(std::panic::catch_unwind(check).is_err(), "{wrong}");
        }
    }

    #[test]
    fn freivalds_allows_rounding() {
        let sizes @ [m, n, k] = [9, 13, 31];
        let (a, b) = (data("a", m * k, false), data("b", k * n, false));
        let (u, stream) = (DType::F32.roundoff(), Stream::new(3, "x"));
        assert_product(sizes, &a, &b, &chain::<f32>(sizes, &a, &b), u, &stream);
        assert_product(sizes, &a, &b, &chain::<bf16>(sizes, &a, &b), u, &stream);
        let mut c: Vec<f32> = chain(sizes, &a, &b);
        c[40] += 0.01;
        let check = || assert_product(sizes, &a, &b, &c, u, &stream);
        assert!(std::panic::catch_unwind(check).is_err());
    }

    #[test]
    fn a_chain_lies_within_the_product_bound() {
        let sizes @ [m, n, k] = [9, 13, 31];
        let (a, b) = (data("a", m * k, false), data("b", k * n, false));
        let (a64, b64) = (widen(&a), widen(&b));
        let want = crate::reference::matmul(sizes, &a64, &b64);
        let bound = product_bound(sizes, &a64, &b64, DType::F32.roundoff());
        let used = assert_within("chain", &widen(&chain::<f32>(sizes, &a, &b)), &want, &bound);
        assert!(used > 0.0 && used <= 1.0, "{used}");
    }
}
