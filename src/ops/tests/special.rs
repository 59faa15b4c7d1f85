//! Numbers at the ends of f32: infinities, NaN, huge and tiny numbers, constant rows; the same table on every device.

use super::harness::{Array, Case};
use crate::cpu::Activation;
use crate::dtype::DType;
use crate::ops::{Activate, LayerNorm, Op, RmsNorm, Softmax};

fn f32s(shape: &[usize], values: &[f64]) -> Array {
    Array::rounded(shape, DType::F32, values.to_vec())
}

fn run(op: &dyn Op, x: Array) -> Vec<Array> {
    Case::new(op, vec![x]).run()
}

#[test]
pub(super) fn activations_have_their_limits() {
    let inf = f64::INFINITY;
    let x = [
        -inf,
        -3e38,
        -1e30,
        -2e4,
        -0.0,
        0.0,
        2e4,
        1e18,
        inf,
        f64::NAN,
    ];
    for activation in [
        Activation::GeluErf,
        Activation::GeluTanh,
        Activation::Silu,
        Activation::Relu2,
    ] {
        let y = &run(&Activate { activation }, f32s(&[10], &x))[0].values;
        for (x, y) in x.iter().zip(y) {
            let squared = f64::from((*x as f32) * (*x as f32));
            match activation {
                _ if x.is_nan() => assert!(y.is_nan(), "{activation:?} of NaN: {y}"),
                Activation::Relu2 if *x > 0.0 => assert_eq!(*y, squared),
                _ if *x > 0.0 => assert_eq!(*y, f64::from(*x as f32)),
                _ => assert_eq!(*y, 0.0, "{activation:?} of {x}"),
            }
        }
    }
}

#[test]
pub(super) fn norms_cover_the_whole_range() {
    let c = 768;
    let (layer, rms) = (
        LayerNorm {
            eps: 0.0,
            weight: false,
            bias: false,
        },
        RmsNorm {
            eps: 0.0,
            ..RmsNorm::default()
        },
    );
    for size in [3e38, 1e30, 1e18, 1.0, 1e-15, 1e-30] {
        let x: Vec<f64> = (0..c)
            .map(|i| if i % 2 == 0 { size } else { -size })
            .collect();
        for (name, y) in [
            ("layer_norm", run(&layer, f32s(&[1, c], &x))),
            ("rms_norm", run_rms(&rms, f32s(&[1, c], &x))),
        ] {
            for (i, y) in y[0].values.iter().enumerate() {
                let want = if i % 2 == 0 { 1.0 } else { -1.0 };
                assert!((y - want).abs() <= 1e-5, "{name} of {size}: {y}");
            }
        }
    }
    let layer = LayerNorm { eps: 1e-5, ..layer };
    for x in [1_000_000.3, 0.1, -3e30, 12345.678] {
        let y = run(&layer, f32s(&[1, c], &vec![x; c]));
        assert!(
            y[0].values.iter().all(|y| *y == 0.0),
            "{c} times {x}: {}",
            y[0].values[0]
        );
    }
    let mut x = vec![1.0; 2 * c];
    x[40] = f64::NAN;
    let y = run(&layer, f32s(&[2, c], &x));
    assert!(y[0].values[..c].iter().all(|y| y.is_nan()));
    assert!(y[0].values[c..].iter().all(|y| *y == 0.0));
}

fn run_rms(op: &RmsNorm, x: Array) -> Vec<Array> {
    let c = x.ty.last();
    Case::new(op, vec![x, f32s(&[c], &vec![1.0; c])]).run()
}

#[test]
pub(super) fn softmax_of_ends() {
    let inf = f64::INFINITY;
    for (x, want) in [
        ([1e30, 1e30, -inf], [0.5, 0.5, 0.0]),
        ([-3e38, 3e38, 0.0], [0.0, 1.0, 0.0]),
        ([-1e30, -1e30, -1e30], [1.0 / 3.0; 3]),
    ] {
        let y = &run(&Softmax, f32s(&[1, 3], &x))[0].values;
        for (y, want) in y.iter().zip(want) {
            assert!((y - want).abs() <= 1e-6, "softmax of {x:?}: {y}");
        }
    }
}
