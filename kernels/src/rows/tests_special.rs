//! Rows and elements at the ends of f32: infinities, NaN, subnormal and huge numbers, constant rows.

use super::tests::{Data, bits, everywhere};
use super::*;
use crate::Activation;
use crate::dtype::DType;

const INF: f32 = f32::INFINITY;

/// Activations and their slopes at x: what they tend to.
#[test]
fn activations_have_their_limits() {
    use Activation::*;
    for kind in [GeluErf, GeluTanh, Silu, Relu2] {
        let x = vec![
            -INF,
            -3e38,
            -1e30,
            -100.0,
            -0.0,
            0.0,
            100.0,
            1e18,
            INF,
            f32::NAN,
        ];
        let right = |x: f32| match kind {
            Relu2 if x > 0.0 => x * x,
            _ if x > 0.0 => x,
            _ => 0.0,
        };
        let slope = |x: f32| match kind {
            Relu2 => 2.0 * x.max(0.0),
            _ if x == 0.0 => 0.5,
            _ if x > 0.0 => 1.0,
            _ => 0.0,
        };
        let (y, dx) = everywhere(
            || {
                let x = Data::new(DType::F32, x.clone());
                let ones = Data::new(DType::F32, vec![1.0; 10]);
                let [mut y, mut dx] = [(); 2].map(|()| Data::unwritten(DType::F32, 10));
                activation(kind, x.get(), y.get_mut());
                activation_backward(kind, x.get(), ones.get(), dx.get_mut());
                (y.f32(), dx.f32())
            },
            |(y, dx)| [bits(&y[..9]), bits(&dx[..9])].concat(),
        );
        assert!(y[9].is_nan() && dx[9].is_nan(), "{kind:?} of NaN");
        for (i, &x) in x[..9].iter().enumerate() {
            assert_eq!(y[i], right(x), "{kind:?} of {x}");
            assert_eq!(dx[i], slope(x), "slope of {kind:?} at {x}");
        }
    }
}

/// y, mean, rstd of rows that are all x, and of x with both signs in turn.
fn norms(x: &[f32], c: usize, eps: f32) -> [Vec<f32>; 5] {
    let rows = x.len() / c;
    everywhere(
        || {
            let x = Data::new(DType::F32, x.to_vec());
            let [mut y, mut z] = [(); 2].map(|()| Data::unwritten(DType::F32, rows * c));
            let mut statistics = [(); 3].map(|()| vec![f32::NAN; rows]);
            let [mean, rstd, of_squares] = &mut statistics;
            layer_norm(x.get(), None, None, eps, y.get_mut(), mean, rstd);
            rms_norm(x.get(), None, eps, z.get_mut(), of_squares);
            let [mean, rstd, of_squares] = statistics;
            [y.f32(), mean, rstd, z.f32(), of_squares]
        },
        |all| all.iter().flat_map(|x| bits(x)).collect(),
    )
}

#[test]
fn norms_cover_the_whole_range() {
    for c in [7, 32, 768, 1000] {
        for size in [3e38, 1e30, 1e18, 1.0, 1e-15, 1e-30, 1e-38, 1e-44] {
            let signed = |i: usize| if i.is_multiple_of(2) { size } else { -size };
            let x: Vec<f32> = (0..c).map(signed).collect();
            let [y, mean, _, z, _] = norms(&x, c, 0.0);
            // Of an odd number of elements one sign outweighs the other.
            let m = if c.is_multiple_of(2) {
                0.0
            } else {
                1.0 / c as f64
            };
            let deviation = (1.0 - m * m).sqrt();
            let far = (f64::from(mean[0]) / f64::from(size) - m).abs();
            assert!(far <= 2e-6 || size < 1e-40, "mean {} of {size}", mean[0]);
            for i in 0..c {
                let sign = f64::from(signed(i).signum());
                let error = (f64::from(y[i]) - (sign - m) / deviation).abs();
                assert!(
                    error <= 1e-5 || size < 1e-40 && error <= 0.5,
                    "layer_norm of {size}: {}",
                    y[i]
                );
                let error = (f64::from(z[i]) - sign).abs();
                assert!(error <= 1e-6, "rms_norm of {size}: {}", z[i]);
            }
        }
    }
}

#[test]
fn constant_rows_have_no_deviation() {
    for c in [5, 64, 768, 4096] {
        for x in [1_000_000.3, 0.1, -3e30, 12345.678, 3e38, -1e-20] {
            let [y, mean, rstd, ..] = norms(&vec![x; c], c, 1e-5);
            assert_eq!(mean[0], x, "mean of {c} times {x}");
            assert!(y.iter().all(|y| *y == 0.0), "{c} times {x}: {}", y[0]);
            assert!(rstd[0].is_finite());
        }
    }
}

#[test]
fn a_nan_or_an_infinity_stays_in_its_row() {
    for (bad, in_mean) in [(f32::NAN, true), (INF, false)] {
        let mut x = vec![1.0; 96];
        x[40] = bad;
        let [y, _, _, z, of_squares] = norms(&x, 32, 1e-5);
        assert!(y[32..64].iter().all(|y| y.is_nan()));
        for row in [0..32, 64..96] {
            assert!(
                y[row.clone()].iter().all(|y| *y == 0.0) && z[row].iter().all(|z| z.is_finite())
            );
        }
        // The root of infinity: whatever is finite becomes 0.
        assert!(if in_mean {
            z[32].is_nan()
        } else {
            z[32] == 0.0 && of_squares[1] == 0.0
        });
    }
}

#[test]
fn softmax_of_ends() {
    for (x, want) in [
        ([1e30, 1e30, -INF], [0.5, 0.5, 0.0]),
        ([-3e38, 3e38, 0.0], [0.0, 1.0, 0.0]),
        ([-1e30, -1e30, -1e30], [1.0 / 3.0; 3]),
    ] {
        let y = everywhere(
            || {
                let x = Data::new(DType::F32, x.to_vec());
                let mut y = Data::unwritten(DType::F32, 3);
                softmax(x.get(), 3, y.get_mut());
                y.f32()
            },
            |y| bits(y),
        );
        for (y, want) in y.iter().zip(want) {
            assert!((y - want).abs() <= 1e-6, "{y} and not {want}");
        }
    }
}
