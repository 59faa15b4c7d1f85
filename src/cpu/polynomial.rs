//! exp, 2^x, ln, tanh, sigmoid and the activations with their slopes, generic over [`Simd`].
//!
//! One fixed sequence of correctly rounded operations each, so that every instruction set gives the same bits. The
//! coefficients are minimax fits of this project (Lawson's iteration on Chebyshev nodes in 50 digits, each coefficient
//! rounded to f32 before the next ones are fitted). The tests state each function's error; no branch depends on data.

use super::Activation;
use super::simd::{POWER, Simd};
use std::f32::consts::{LN_2, LOG2_E};

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

/// 2^x between -1/2 and 1/2.
const EXP2: [f32; 7] = [
    1.0,
    LN_2,
    0.240_226_48,
    0.055_503_596,
    0.009_618_5,
    0.001_339_097_2,
    0.000_153_289_25,
];

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

/// e^x for x <= 88, 0 below -87, where [`exp`] goes through the subnormal numbers; NaN stays. Within 1 ulp.
///
/// What softmax needs, at half the cost: one sum rounds x log2(e) to an integer and leaves that in its lowest bits.
#[inline(always)]
pub(crate) fn exp_normal<S: Simd>(s: S, x: S::V) -> S::V {
    let t = s.fma(x, s.splat(LOG2_E), s.splat(POWER));
    let n = s.sub(t, s.splat(POWER));
    let r = s.neg_fma(n, s.splat(LN_2_HIGH), x);
    let r = s.neg_fma(n, s.splat(LN_2_LOW), r);
    const C: [f32; 7] = [
        1.0,
        1.0,
        0.499_999_94,
        0.166_665_21,
        0.041_668_26,
        0.008_368_669,
        0.001_382_136,
    ];
    let y = s.shift(horner(s, r, C), t);
    s.select(s.lt(x, s.splat(-87.0)), s.zero(), y)
}

/// 2^x for x <= 127, 0 below -126, where subnormal numbers would begin; NaN stays. Within 1 ulp.
#[inline(always)]
pub(crate) fn exp2_normal<S: Simd>(s: S, x: S::V) -> S::V {
    let t = s.add(x, s.splat(POWER));
    let f = s.sub(x, s.sub(t, s.splat(POWER)));
    let y = s.shift(horner(s, f, EXP2), t);
    s.select(s.lt(x, s.splat(-126.0)), s.zero(), y)
}

/// 2^x for x <= 127 within 2^-18 of itself, within 2^-126 below -126, and 0 from -127 down; NaN stays. For results that are rounded to bf16: shorter than [`exp2_normal`], and one operation instead of two ends it below.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[inline(always)]
pub(crate) fn exp2_coarse<S: Simd>(s: S, x: S::V) -> S::V {
    // 2^0 is exactly 1, whose exponent -127 takes to 0.
    const C: [f32; 5] = [1.0, 0.693_124_2, 0.240_240_93, 0.055_906_51, 0.009_583_105];
    let x = s.max(s.splat(-127.0), x);
    let t = s.add(x, s.splat(POWER));
    let f = s.sub(x, s.sub(t, s.splat(POWER)));
    s.shift(horner(s, f, C), t)
}

/// 1 / (1 + e^-x). Within 3 ulp down to -87, 0 below.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    // -|x|, so that nothing overflows: a NaN stays.
    let e = exp_normal(s, s.min(x, s.sub(s.zero(), x)));
    s.div(s.select(s.lt(x, s.zero()), e, one), s.add(one, e))
}

/// An odd function that tends to 1/2: x p(x^2) / q(x^2) up to `limit`, 1/2 with x's sign beyond; NaN stays.
///
/// Both GELUs are x (1/2 + such a function), and so are their slopes 1/2 + another one. One division costs less than the
/// exponential and the two ranges that erf and tanh need, and the error is absolute, as it is in their sum with 1/2.
struct OddRational<const P: usize, const Q: usize> {
    limit: f32,
    p: [f32; P],
    q: [f32; Q],
}

impl<const P: usize, const Q: usize> OddRational<P, Q> {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, x: S::V) -> S::V {
        let square = s.mul(x, x);
        let p = s.mul(x, horner(s, square, self.p));
        let inside = s.div(p, horner(s, square, self.q));
        let beyond = s.lt(s.splat(self.limit), s.abs(x));
        s.select(beyond, s.copysign(s.splat(0.5), x), inside)
    }
}

/// erf(x / sqrt 2) / 2. Within 2^-22.9.
const GELU_ERF: OddRational<6, 6> = OddRational {
    limit: 5.5,
    p: [
        0.398_942_23,
        0.033_862_807,
        0.004_677_895_5,
        0.000_168_933_18,
        6.353_236e-6,
        2.274_333_6e-8,
    ],
    q: [
        1.0,
        0.251_547_37,
        0.028_651_73,
        0.001_885_039,
        7.368_434e-5,
        1.197_413_9e-6,
    ],
};

/// erf(x / sqrt 2) / 2 + x e^(-x^2/2) / sqrt(2 pi). Within 2^-22.
const GELU_ERF_SLOPE: OddRational<8, 7> = OddRational {
    limit: 5.8,
    p: [
        0.797_884_5,
        -0.022_087_902,
        0.013_729_752,
        0.000_212_577_7,
        3.200_369e-5,
        9.362_863e-7,
        1.194_678_7e-8,
        -2.872_309_2e-11,
    ],
    q: [
        1.0,
        0.305_649_82,
        0.044_092_186,
        0.003_943_256,
        0.000_240_727,
        9.859_073e-6,
        3.162_689_4e-7,
    ],
};

/// tanh(sqrt(2/pi) (x + 0.044715 x^3)) / 2. Within 2^-22.9.
const GELU_TANH: OddRational<6, 6> = OddRational {
    limit: 5.1,
    p: [
        0.398_942_32,
        0.030_419_433,
        0.003_628_190_6,
        0.000_133_183_87,
        6.985_691_5e-6,
        2.355_154_1e-8,
    ],
    q: [
        1.0,
        0.243_742_56,
        0.024_346_247,
        0.001_296_149_1,
        7.536_848e-5,
        1.296_912_5e-6,
    ],
};

/// The slope of x (1/2 + [`GELU_TANH`]), less 1/2. Within 2^-22.
const GELU_TANH_SLOPE: OddRational<8, 7> = OddRational {
    limit: 5.3,
    p: [
        0.797_884_6,
        -0.060_223_933,
        0.014_107_192,
        -0.000_462_945_55,
        3.281_414e-5,
        -3.111_905e-7,
        9.618_073e-9,
        -4.579_516_3e-11,
    ],
    q: [
        1.0,
        0.259_503_96,
        0.027_894_775,
        0.001_320_957_4,
        0.000_100_503_38,
        2.539_067_5e-6,
        7.216_216e-8,
    ],
};

impl Activation {
    /// The function's value, lane by lane. Called in a loop, the choice is made outside it by the compiler.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        let half = s.mul(x, s.splat(0.5));
        match self {
            Activation::GeluTanh => s.fma(x, GELU_TANH.at(s, x), half),
            Activation::GeluErf => s.fma(x, GELU_ERF.at(s, x), half),
            Activation::Relu2 => {
                let positive = s.max(s.zero(), x);
                s.mul(positive, positive)
            }
            Activation::Silu => s.mul(x, sigmoid(s, x)),
        }
    }

    /// The function's slope at x, lane by lane.
    #[inline(always)]
    pub(crate) fn slope<S: Simd>(self, s: S, x: S::V) -> S::V {
        let half = s.splat(0.5);
        match self {
            Activation::GeluTanh => s.add(half, GELU_TANH_SLOPE.at(s, x)),
            Activation::GeluErf => s.add(half, GELU_ERF_SLOPE.at(s, x)),
            Activation::Relu2 => {
                let r = s.max_nan(x, s.zero());
                s.add(r, r)
            }
            Activation::Silu => {
                let p = sigmoid(s, x);
                s.fma(s.mul(x, p), s.sub(s.splat(1.0), p), p)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, Kernel, dispatch};
    use super::*;

    /// A function of this file, named so that a test can run it on any instruction set.
    #[derive(Clone, Copy, Debug)]
    enum Function {
        Exp2Normal,
        Exp,
        Ln,
        Tanh,
        ExpNormal,
        Exp2Coarse,
        Sigmoid,
        Activate(Activation),
        Slope(Activation),
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
                    Function::Exp2Normal => exp2_normal(s, x),
                    Function::Exp => exp(s, x),
                    Function::Ln => ln(s, x),
                    Function::Tanh => tanh(s, x),
                    Function::ExpNormal => exp_normal(s, x),
                    Function::Exp2Coarse => exp2_coarse(s, x),
                    Function::Sigmoid => sigmoid(s, x),
                    Function::Activate(a) => a.apply(s, x),
                    Function::Slope(a) => a.slope(s, x),
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
            Function::Exp2Normal | Function::Exp2Coarse => x.exp2(),
            Function::Exp => x.exp(),
            Function::Ln => x.ln(),
            Function::Tanh => x.tanh(),
            Function::ExpNormal => x.exp(),
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
            Function::Slope(a) => match a {
                Activation::GeluTanh => {
                    let c = (2.0 / std::f64::consts::PI).sqrt();
                    let t = (c * (x + 0.044715 * x * x * x)).tanh();
                    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * x * x)
                }
                Activation::GeluErf => {
                    let density = (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt();
                    0.5 * (1.0 + erf64(x / 2f64.sqrt())) + x * density
                }
                Activation::Relu2 => 2.0 * x.max(0.0),
                Activation::Silu => {
                    let p = 1.0 / (1.0 + (-x).exp());
                    p + x * p * (1.0 - p)
                }
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
            (Function::Exp2Normal, -126.0, 127.0, 1.0),
            (Function::Exp2Normal, -1.0, 1.0, 1.0),
            (Function::Exp, -100.0, 88.7, 1.0),
            (Function::Exp, -1.0, 1.0, 1.0),
            (Function::Ln, 1e-30, 4.0, 2.0),
            (Function::Ln, 0.5, 2.0, 2.0),
            (Function::Ln, 1.0, 3e38, 2.0),
            (Function::Tanh, -10.0, 10.0, 2.0),
            (Function::Tanh, -1.0, 1.0, 2.0),
            (Function::ExpNormal, -87.0, 88.0, 1.0),
            // 2^-18 is 32 to 64 units in the last place.
            (Function::Exp2Coarse, -126.0, 127.0, 64.0),
            (Function::Exp2Coarse, -1.0, 1.0, 64.0),
            (Function::ExpNormal, -1.0, 1.0, 1.0),
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
    fn slopes_stay_close() {
        use Activation::*;
        for a in [GeluTanh, GeluErf, Relu2, Silu] {
            let f = Function::Slope(a);
            let x = grid(-12.0, 12.0, 20_000);
            let y = dispatch(Isa::available()[0], Evaluate(f, &x));
            for (x, y) in x.iter().map(|&x| x as f64).zip(y) {
                let want = exact(f, x);
                // Slopes lie between -0.13 and 1.13, but for that of a square. SiLU's multiplies 1 - p, rounded, by x.
                let scale = if a == Silu {
                    1.0 + x.abs()
                } else {
                    want.abs().max(1.0)
                };
                let error = (y as f64 - want).abs();
                assert!(
                    error <= 4.0 * scale * 2f64.powi(-24),
                    "slope of {a:?}({x}) = {y}, not {want}"
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
                (Function::Exp2Normal, 10.0, 1024.0),
                (Function::Exp2Normal, -126.0, f32::MIN_POSITIVE),
                (Function::Exp2Normal, -126.5, 0.0),
                (Function::Exp2Normal, -inf, 0.0),
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
                (Function::ExpNormal, 0.0, 1.0),
                (Function::ExpNormal, -87.5, 0.0),
                (Function::ExpNormal, -inf, 0.0),
                (Function::Exp2Coarse, 3.0, 8.0),
                (Function::Exp2Coarse, -127.0, 0.0),
                (Function::Exp2Coarse, -inf, 0.0),
                (Function::Activate(GeluErf), -6.0, 0.0),
                (Function::Activate(GeluErf), 60.0, 60.0),
                (Function::Activate(GeluTanh), -6.0, 0.0),
                (Function::Slope(GeluErf), -6.0, 0.0),
                (Function::Slope(GeluTanh), 6.0, 1.0),
                (Function::Sigmoid, 0.0, 0.5),
                (Function::Sigmoid, -inf, 0.0),
                (Function::Sigmoid, inf, 1.0),
            ] {
                assert_eq!(at(f, x), want, "{f:?}({x}) on {isa:?}");
            }
            use Activation::*;
            for f in [
                Function::Exp2Normal,
                Function::Exp,
                Function::Ln,
                Function::Tanh,
                Function::ExpNormal,
                Function::Exp2Coarse,
            ]
            .into_iter()
            .chain([Function::Sigmoid])
            .chain([GeluTanh, GeluErf, Relu2, Silu].map(Function::Activate))
            .chain([GeluTanh, GeluErf, Relu2, Silu].map(Function::Slope))
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
            Function::Exp2Normal,
            Function::Exp,
            Function::Ln,
            Function::Tanh,
            Function::ExpNormal,
            Function::Exp2Coarse,
        ]
        .into_iter()
        .chain([Function::Sigmoid])
        .chain([GeluTanh, GeluErf, Relu2, Silu].map(Function::Activate))
        .chain([GeluTanh, GeluErf, Relu2, Silu].map(Function::Slope))
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
