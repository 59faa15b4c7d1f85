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
    Exp2Above,
    Exp2Offset,
    Sigmoid,
    Activate(Activation),
    Slope(Activation),
}

fn all() -> impl Iterator<Item = Function> {
    use Activation::*;
    let activations = [GeluTanh, GeluErf, Relu2, Silu];
    [
        Function::Exp2Normal,
        Function::Exp,
        Function::Ln,
        Function::Tanh,
        Function::ExpNormal,
        Function::Exp2Coarse,
        Function::Exp2Above,
        Function::Exp2Offset,
        Function::Sigmoid,
    ]
    .into_iter()
    .chain(activations.map(Function::Activate))
    .chain(activations.map(Function::Slope))
}

/// What the tests take away from an exponent.
const ABOVE: f32 = 5.0;

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
                Function::Exp2Above => exp2_above(s, x, s.splat(ABOVE)),
                Function::Exp2Offset => exp2_offset(s, x, s.splat(POWER - ABOVE)),
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
        Function::Exp2Above => (x - ABOVE as f64).exp2(),
        Function::Exp2Offset => (x * LOG2_E as f64 - ABOVE as f64).exp2(),
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
        (Function::Exp2Normal, -126.0, 127.0, 2.0),
        (Function::Exp2Normal, -1.0, 1.0, 2.0),
        (Function::Exp2Above, -121.0, 132.0, 2.0),
        (Function::Exp2Above, 4.0, 6.0, 2.0),
        (Function::Exp2Offset, -83.0, 91.0, 2.0),
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
    use Activation::*;
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
            (Function::Exp2Above, 5.0, 1.0),
            (Function::Exp2Above, -122.0, 0.0),
            (Function::Exp2Above, -inf, 0.0),
            (Function::Exp2Offset, 0.0, 1.0 / 32.0),
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
        for f in all() {
            assert!(at(f, f32::NAN).is_nan(), "{f:?}(NaN) on {isa:?}");
        }
        assert!(at(Function::Ln, -1.0).is_nan());
        assert!(at(Function::Tanh, -0.0).is_sign_negative());
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let mut x = grid(-20.0, 20.0, 3000);
    x.extend(grid(-160.0, 140.0, 3000));
    x.extend(grid(0.0, 1e-38, 500));
    for f in all() {
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
