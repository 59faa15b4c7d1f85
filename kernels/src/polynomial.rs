//! exp, 2^x, ln, tanh, sigmoid and the activations with their slopes, generic over [`Simd`].
//!
//! One fixed sequence of correctly rounded operations each, so that every instruction set gives the same bits. The
//! coefficients are minimax fits of this project (Lawson's iteration on Chebyshev nodes in 50 digits, each coefficient
//! rounded to f32 before the next ones are fitted). The tests state each function's error; no branch depends on data.

use super::Activation;
use super::simd::{POWER, Simd};
use std::f32::consts::LOG2_E;

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

/// 2^x between -1/2 and 1/2, within 2^-23.3 before rounding; exactly 1 at 0.
// Close to ln 2, and not it: a fitted coefficient.
#[allow(clippy::approx_constant)]
const EXP2: [f32; 6] = [
    1.0,
    0.693_147,
    0.240_222_47,
    0.055_507_11,
    0.009_671_292,
    0.001_326_953_8,
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

/// 2^x for x <= 127, 0 below -126, where subnormal numbers would begin; NaN stays. Within 2 ulp.
#[inline(always)]
pub(crate) fn exp2_normal<S: Simd>(s: S, x: S::V) -> S::V {
    let t = s.add(x, s.splat(POWER));
    let f = s.sub(x, s.sub(t, s.splat(POWER)));
    let y = s.shift(horner(s, f, EXP2), t);
    s.select(s.lt(x, s.splat(-126.0)), s.zero(), y)
}

/// 2^(x log2(e) - offset) for an integral offset and shift = [`POWER`] - offset, with log2(e) rounded to f32, where that
/// lies between -126 and 127 and |x| <= 2^20; NaN stays. Within 2 ulp.
///
/// The product's fraction is exact, because only an integer is taken from it.
#[inline(always)]
pub(crate) fn exp2_offset<S: Simd>(s: S, x: S::V, shift: S::V) -> S::V {
    let t = s.fma(x, s.splat(LOG2_E), shift);
    let f = s.fma(x, s.splat(LOG2_E), s.sub(shift, t));
    s.shift(horner(s, f, EXP2), t)
}

/// 2^x for |x| <= 1/2. Within 2 ulp.
#[inline(always)]
pub(crate) fn exp2_of<S: Simd>(s: S, x: S::V) -> S::V {
    horner(s, x, EXP2)
}

/// 2^(x - base) for an integral base, |base| <= 2^20 and x <= base + 127: within 2 ulp, within 2^-126 where that is below
/// 2^-126, and 0 from base - 127 down; NaN stays. [`exp2_normal`] of a difference would be two operations more.
#[inline(always)]
pub(crate) fn exp2_above<S: Simd>(s: S, x: S::V, base: S::V) -> S::V {
    // 2^0 is exactly 1, whose exponent -127 takes to 0.
    let x = s.max(s.sub(base, s.splat(127.0)), x);
    let shift = s.sub(s.splat(POWER), base);
    let t = s.add(x, shift);
    let f = s.sub(x, s.sub(t, shift));
    s.shift(horner(s, f, EXP2), t)
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

/// An odd function that tends to 1/2: x p(x^2) / q(x^2) up to `limit`, beyond which x counts as the limit; NaN stays.
///
/// The limit is a number at which the quotient, rounded, is exactly 1/2, so that two operations serve where a comparison, a
/// sign and a choice would take five.
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
        let x = clamp(s, x, -self.limit, self.limit);
        let square = s.mul(x, x);
        let p = s.mul(x, horner(s, square, self.p));
        s.div(p, horner(s, square, self.q))
    }
}

/// erf(x / sqrt 2) / 2. Within 2^-22.9.
const GELU_ERF: OddRational<6, 6> = OddRational {
    limit: 5.544_605,
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
    limit: 5.912_372,
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
    limit: 5.070_042,
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
    limit: 5.364_694,
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
    /// The function's value, lane by lane. Called in a loop, the choice is made outside it by the compiler. The GELUs are within
    /// 2^-22 |x| and the rounding of the result: far below 0, where they tend to 0, that is an absolute error, not a relative one.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        // The limit at minus infinity is 0, not 0 times infinity: the least finite number stands for it. A NaN stays.
        let above = s.max(s.splat(-f32::MAX), x);
        let half = s.mul(above, s.splat(0.5));
        match self {
            Activation::GeluTanh => s.fma(above, GELU_TANH.at(s, x), half),
            Activation::GeluErf => s.fma(above, GELU_ERF.at(s, x), half),
            Activation::Relu2 => {
                let positive = s.max(s.zero(), x);
                s.mul(positive, positive)
            }
            Activation::Silu => s.mul(above, sigmoid(s, x)),
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
                // The limits at both infinities are 0 and 1, which the largest finite numbers have.
                let p = sigmoid(s, x);
                let x = clamp(s, x, -f32::MAX, f32::MAX);
                s.fma(s.mul(x, p), s.sub(s.splat(1.0), p), p)
            }
        }
    }
}

#[cfg(test)]
mod tests;
