//! exp, exp2, ln, tanh, erf, sigmoid and the activations, generic over [`Simd`].
//!
//! One fixed sequence of correctly rounded operations each, so that every instruction set gives the same bits. The
//! coefficients are minimax fits of this project (Lawson's iteration on Chebyshev nodes in 50 digits, each coefficient
//! rounded to f32 before the next ones are fitted). The tests state each function's error; no branch depends on data.

use super::Activation;
use super::simd::Simd;
use std::f32::consts::{FRAC_1_SQRT_2, LN_2, LOG2_E};

/// c\[0\] + c\[1\] x + c\[2\] x^2 + ..., by Horner's rule.
#[inline(always)]
fn horner<S: Simd, const N: usize>(s: S, x: S::V, c: [f32; N]) -> S::V {
    let mut y = s.splat(c[N - 1]);
    for i in (0..N - 1).rev() {
        y = s.fma(y, x, s.splat(c[i]));
    }
    y
}

/// x held to lo..=hi; NaN stays.
#[inline(always)]
fn clamp<S: Simd>(s: S, x: S::V, lo: f32, hi: f32) -> S::V {
    s.min(s.splat(hi), s.max(s.splat(lo), x))
}

/// 2^x; subnormal results too, 0 below, infinity above. Within 1 ulp.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    let x = clamp(s, x, -152.0, 130.0);
    let n = s.round(x);
    let f = s.sub(x, n);
    const C: [f32; 7] = [
        1.0,
        LN_2,
        0.240_226_48,
        0.055_503_596,
        0.009_618_5,
        0.001_339_097_2,
        0.000_153_289_25,
    ];
    s.scale2(horner(s, f, C), n)
}

/// e^x; subnormal results too, 0 below, infinity above. Within 1 ulp.
///
/// Reduction after W. J. Cody and W. Waite, Software Manual for the Elementary Functions (1980).
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let x = clamp(s, x, -105.0, 90.0);
    let n = s.round(s.mul(x, s.splat(LOG2_E)));
    // ln 2 = LN_2_HIGH + LN_2_LOW.
    let r = s.neg_fma(n, s.splat(LN_2_HIGH), x);
    let r = s.neg_fma(n, s.splat(LN_2_LOW), r);
    const C: [f32; 5] = [
        0.499_999_94,
        0.166_665_21,
        0.041_668_26,
        0.008_368_669,
        0.001_382_136,
    ];
    let y = s.fma(horner(s, r, C), s.mul(r, r), r);
    s.scale2(s.add(y, s.splat(1.0)), n)
}

const LN_2_HIGH: f32 = 0.693_115_23;
const LN_2_LOW: f32 = 3.194_618_3e-5;

/// Natural logarithm; -infinity at 0, NaN below, subnormal arguments too. Within 2 ulp.
#[inline(always)]
pub(crate) fn ln<S: Simd>(s: S, x: S::V) -> S::V {
    let subnormal = s.lt(x, s.splat(f32::MIN_POSITIVE));
    let (m, e) = s.split(s.select(subnormal, s.mul(x, s.splat(16_777_216.0)), x));
    let e = s.select(subnormal, s.sub(e, s.splat(24.0)), e);
    let f = s.sub(m, s.splat(1.0));
    const C: [f32; 9] = [
        0.333_333_34,
        -0.249_998_23,
        0.199_996_93,
        -0.166_794_8,
        0.143_022_54,
        -0.121_970_25,
        0.107_752_89,
        -0.128_399_76,
        0.119_356_506,
    ];
    let square = s.mul(f, f);
    let y = s.fma(
        s.mul(horner(s, f, C), f),
        square,
        s.mul(e, s.splat(LN_2_LOW)),
    );
    let y = s.neg_fma(s.splat(0.5), square, y);
    let y = s.add(s.fma(e, s.splat(LN_2_HIGH), f), y);
    let zero = s.zero();
    let y = s.select(s.lt(zero, x), y, s.splat(f32::NAN));
    let y = s.select(s.eq(x, zero), s.splat(f32::NEG_INFINITY), y);
    let infinity = s.splat(f32::INFINITY);
    s.select(s.eq(x, infinity), infinity, y)
}

/// Hyperbolic tangent. Within 2 ulp.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let a = s.abs(x);
    let square = s.mul(x, x);
    const C: [f32; 5] = [
        -0.333_332_8,
        0.133_314_16,
        -0.053_737_94,
        0.020_634_118,
        -0.005_700_092,
    ];
    let small = s.fma(s.mul(square, horner(s, square, C)), x, x);
    let one = s.splat(1.0);
    let t = s.add(exp(s, s.add(a, a)), one);
    let large = s.sub(one, s.div(s.splat(2.0), t));
    // The sign is set last, since the sum for small arguments loses that of -0.
    s.copysign(s.select(s.lt(a, s.splat(0.625)), small, large), x)
}

/// Error function, 2/sqrt(pi) times the integral of e^(-t^2) from 0 to x. Within 2 ulp.
#[inline(always)]
pub(crate) fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    let a = s.abs(x);
    let square = s.mul(x, x);
    // The leading 2/sqrt(pi) is split into 1 + C[0], since f32 alone would round it too coarsely.
    const C: [f32; 6] = [
        0.128_379_17,
        -0.376_125_16,
        0.112_818_52,
        -0.026_764_775,
        0.004_987_887_6,
        -0.000_595_546_5,
    ];
    let small = s.fma(horner(s, square, C), x, x);
    // ln erfc on 0.9..4; from there on erf rounds to 1.
    const Q: [f32; 7] = [
        -0.000_166_243_57,
        -1.127_798_2,
        -0.636_974_3,
        -0.104_115_434,
        0.022_316_134,
        -0.003_065_737,
        0.000_198_246,
    ];
    let tail = exp(s, horner(s, s.min(s.splat(4.0), a), Q));
    let large = s.copysign(s.sub(s.splat(1.0), tail), x);
    s.select(s.lt(a, s.splat(0.92)), small, large)
}

/// 1 / (1 + e^-x). Within 3 ulp while e^-x is finite, 0 below.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.neg(x))))
}

impl Activation {
    /// The function's value, lane by lane. Called in a loop, the choice is made outside it by the compiler.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        match self {
            Activation::GeluTanh => {
                let inner = s.fma(
                    s.mul(s.mul(x, x), x),
                    s.splat(SQRT_2_OVER_PI * 0.044_715),
                    s.mul(x, s.splat(SQRT_2_OVER_PI)),
                );
                let half = s.mul(x, s.splat(0.5));
                s.fma(half, tanh(s, inner), half)
            }
            Activation::GeluErf => {
                let half = s.mul(x, s.splat(0.5));
                s.fma(half, erf(s, s.mul(x, s.splat(FRAC_1_SQRT_2))), half)
            }
            Activation::Relu2 => {
                let positive = s.max(s.zero(), x);
                s.mul(positive, positive)
            }
            Activation::Silu => s.mul(x, sigmoid(s, x)),
        }
    }
}

/// sqrt(2/pi), in GELU's tanh form.
pub(crate) const SQRT_2_OVER_PI: f32 = 0.797_884_6;

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, Kernel, dispatch};
    use super::*;

    /// A function of this file, named so that a test can run it on any instruction set.
    #[derive(Clone, Copy, Debug)]
    enum Function {
        Exp2,
        Exp,
        Ln,
        Tanh,
        Erf,
        Sigmoid,
        Activate(Activation),
    }

    struct Evaluate<'a>(Function, &'a [f32]);

    impl Kernel for Evaluate<'_> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn call<S: Simd>(self, s: S) -> Vec<f32> {
            let mut y = vec![0.0; self.1.len()];
            for (x, y) in self.1.chunks(S::LANES).zip(y.chunks_mut(S::LANES)) {
                let x = s.load_first(x);
                let v = match self.0 {
                    Function::Exp2 => exp2(s, x),
                    Function::Exp => exp(s, x),
                    Function::Ln => ln(s, x),
                    Function::Tanh => tanh(s, x),
                    Function::Erf => erf(s, x),
                    Function::Sigmoid => sigmoid(s, x),
                    Function::Activate(a) => a.apply(s, x),
                };
                s.store_first(y, v);
            }
            y
        }
    }

    /// erf in f64: its series up to 3, Lentz's continued fraction of erfc beyond.
    fn erf64(x: f64) -> f64 {
        if x.abs() < 3.0 {
            let (mut term, mut sum) = (x, x);
            for n in 1..100 {
                term *= -x * x / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            return sum * std::f64::consts::FRAC_2_SQRT_PI;
        }
        let a = x.abs();
        let tail = (1..200).rev().fold(a, |t, k| a + k as f64 / 2.0 / t);
        (1.0 - (-a * a).exp() / tail / std::f64::consts::PI.sqrt()).copysign(x)
    }

    fn exact(f: Function, x: f64) -> f64 {
        match f {
            Function::Exp2 => x.exp2(),
            Function::Exp => x.exp(),
            Function::Ln => x.ln(),
            Function::Tanh => x.tanh(),
            Function::Erf => erf64(x),
            Function::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Function::Activate(a) => match a {
                Activation::GeluTanh => {
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                    x / 2.0 * (1.0 + inner.tanh())
                }
                Activation::GeluErf => x / 2.0 * (1.0 + erf64(x / 2f64.sqrt())),
                Activation::Relu2 => x.max(0.0).powi(2),
                Activation::Silu => x / (1.0 + (-x).exp()),
            },
        }
    }

    /// The distance between neighbouring f32 at x, that of the subnormals at least.
    fn ulp(x: f64) -> f64 {
        let e = (x.abs().max(f32::MIN_POSITIVE as f64)).log2().floor();
        (e - 23.0).exp2()
    }

    fn grid(lo: f32, hi: f32, n: usize) -> Vec<f32> {
        // An irrational step and both signs of tiny numbers, so that no pattern of bits is favoured.
        let mut x: Vec<f32> = (0..n)
            .map(|i| lo + (hi - lo) * ((i as f64 * 0.618_033_988_749_895).fract() as f32))
            .collect();
        x.extend([0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, lo, hi]);
        x.retain(|x| (lo..=hi).contains(x));
        x
    }

    fn worst(f: Function, lo: f32, hi: f32) -> (f64, f32) {
        let x = grid(lo, hi, 60_000);
        let y = dispatch(Isa::available()[0], Evaluate(f, &x));
        let mut worst = (0.0, 0.0);
        for (&x, y) in x.iter().zip(y) {
            let want = exact(f, x as f64);
            let error = (y as f64 - want).abs() / ulp(want);
            assert!(error.is_finite(), "{f:?}({x}) = {y}");
            if error > worst.0 {
                worst = (error, x);
            }
        }
        worst
    }

    #[test]
    fn errors_stay_within_the_stated_ulp() {
        for (f, lo, hi, bound) in [
            (Function::Exp2, -140.0, 127.9, 1.0),
            (Function::Exp, -100.0, 88.7, 1.0),
            (Function::Exp, -1.0, 1.0, 1.0),
            (Function::Ln, 1e-30, 4.0, 2.0),
            (Function::Ln, 0.5, 2.0, 2.0),
            (Function::Ln, 1.0, 3e38, 2.0),
            (Function::Tanh, -10.0, 10.0, 2.0),
            (Function::Tanh, -1.0, 1.0, 2.0),
            (Function::Erf, -5.0, 5.0, 2.0),
            (Function::Erf, -1.0, 1.0, 2.0),
            (Function::Sigmoid, -80.0, 80.0, 3.0),
        ] {
            let (error, at) = worst(f, lo, hi);
            println!("{f:?} on {lo}..{hi}: {error:.3} ulp at {at}");
            assert!(error <= bound, "{f:?}({at}): {error} ulp, allowed {bound}");
        }
    }

    #[test]
    fn activations_stay_close() {
        // 1 + tanh and 1 + erf cancel on the left, as in every f32 implementation: the bound is absolute, in |x|.
        use Activation::*;
        for a in [GeluTanh, GeluErf, Relu2, Silu] {
            let f = Function::Activate(a);
            let x = grid(-12.0, 12.0, 20_000);
            let y = dispatch(Isa::available()[0], Evaluate(f, &x));
            for (x, y) in x.iter().map(|&x| x as f64).zip(y) {
                let want = exact(f, x);
                let scale = if a == Relu2 { want } else { x.abs() };
                let error = (y as f64 - want).abs();
                assert!(
                    error <= 4.0 * scale * 2f64.powi(-24) + 1e-40,
                    "{a:?}({x}) = {y}, not {want}"
                );
            }
        }
    }

    #[test]
    fn special_arguments() {
        let inf = f32::INFINITY;
        for isa in Isa::available() {
            let at = |f, x: f32| dispatch(isa, Evaluate(f, &[x]))[0];
            for (f, x, want) in [
                (Function::Exp2, 10.0, 1024.0),
                (Function::Exp2, -149.0, f32::from_bits(1)),
                (Function::Exp2, 128.0, inf),
                (Function::Exp2, -inf, 0.0),
                (Function::Exp, 0.0, 1.0),
                (Function::Exp, inf, inf),
                (Function::Exp, -inf, 0.0),
                (Function::Exp, 1e30, inf),
                (Function::Ln, 0.0, -inf),
                (Function::Ln, 1.0, 0.0),
                (Function::Ln, inf, inf),
                (Function::Ln, f32::from_bits(1), -103.278_93),
                (Function::Tanh, inf, 1.0),
                (Function::Tanh, -inf, -1.0),
                (Function::Erf, inf, 1.0),
                (Function::Erf, -4.5, -1.0),
                (Function::Sigmoid, 0.0, 0.5),
                (Function::Sigmoid, -inf, 0.0),
                (Function::Sigmoid, inf, 1.0),
            ] {
                assert_eq!(at(f, x), want, "{f:?}({x}) on {isa:?}");
            }
            use Activation::*;
            for f in [
                Function::Exp2,
                Function::Exp,
                Function::Ln,
                Function::Tanh,
                Function::Erf,
            ]
            .into_iter()
            .chain([Function::Sigmoid])
            .chain([GeluTanh, GeluErf, Relu2, Silu].map(Function::Activate))
            {
                assert!(at(f, f32::NAN).is_nan(), "{f:?}(NaN) on {isa:?}");
            }
            assert!(at(Function::Ln, -1.0).is_nan());
            assert!(at(Function::Tanh, -0.0).is_sign_negative());
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        use Activation::*;
        let mut x = grid(-20.0, 20.0, 3000);
        x.extend(grid(-160.0, 140.0, 3000));
        x.extend(grid(0.0, 1e-38, 500));
        for f in [
            Function::Exp2,
            Function::Exp,
            Function::Ln,
            Function::Tanh,
            Function::Erf,
        ]
        .into_iter()
        .chain([Function::Sigmoid])
        .chain([GeluTanh, GeluErf, Relu2, Silu].map(Function::Activate))
        {
            let bits = |isa| -> Vec<u32> {
                let y = dispatch(isa, Evaluate(f, &x));
                // NaN (the logarithm of a negative number) has one value but many patterns.
                y.iter()
                    .map(|y| if y.is_nan() { f32::NAN } else { *y }.to_bits())
                    .collect()
            };
            let want = bits(Isa::Portable);
            for isa in Isa::available() {
                assert!(bits(isa) == want, "{f:?} differs on {isa:?}");
            }
        }
    }
}
