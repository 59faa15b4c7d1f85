//! Matrix products.

use super::harness::{Array, Bounded, Case, FLOATS, U};
use crate::dtype::DType;
use crate::ops::{Activation, Axes, Linear, Matmul, Op};
use crate::reference::{self, gamma, matmul, transposed};
use crate::tensor::TensorType;

const ACTIVATIONS: [(Activation, reference::Activation); 4] = [
    (Activation::GeluTanh, reference::Activation::GeluTanh),
    (Activation::GeluErf, reference::Activation::GeluErf),
    (Activation::Relu2, reference::Activation::Relu2),
    (Activation::Silu, reference::Activation::Silu),
];

fn textbook(f: Option<Activation>) -> Option<reference::Activation> {
    f.map(|f| ACTIVATIONS.iter().find(|a| a.0 == f).expect("listed").1)
}

fn size(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| x.abs()).collect()
}

/// `n` matrices stored as [r, c], each transposed if asked.
fn each(n: usize, x: &[f64], [r, c]: [usize; 2], swap: bool) -> Vec<Vec<f64>> {
    (0..n)
        .map(|i| &x[i * r * c..][..r * c])
        .map(|m| {
            if swap {
                transposed([r, c], m)
            } else {
                m.to_vec()
            }
        })
        .collect()
}

/// Checks `op` on a batch of [m, k] by [k, n]; b is shared by the batch if `shared`, `lead` are its leading axes.
fn check(
    op: &Matmul,
    lead: &[usize],
    [m, n, k]: [usize; 3],
    shared: bool,
    types: [DType; 3],
    gradient: Option<DType>,
) {
    let (ta, tb) = (op.transpose_a, op.transpose_b);
    let shape = |lead: &[usize], r, c, swap| {
        let mut shape = lead.to_vec();
        shape.extend(if swap { [c, r] } else { [r, c] });
        shape
    };
    let b_lead = if shared { &[][..] } else { lead };
    let mut inputs = vec![
        Array::normal("a", &shape(lead, m, k, ta), types[0]),
        Array::normal("b", &shape(b_lead, k, n, tb), types[1]),
    ];
    if op.bias {
        inputs.push(Array::normal("bias", &[n], types[2]));
    }
    let batch: usize = lead.iter().product();
    let f = textbook(op.activation);
    // A shared b multiplies the batch as rows.
    let (batch, m) = if shared { (1, batch * m) } else { (batch, m) };
    let operands = |x: &[Array]| {
        let stored = |r, c, swap| if swap { [c, r] } else { [r, c] };
        let a = each(batch, &x[0].values, stored(m, k, ta), ta);
        let b = each(batch, &x[1].values, stored(k, n, tb), tb);
        (a, b)
    };
    // What one product may be off by before it is stored.
    let off = |mm, nn, kk, a: &[f64], b: &[f64]| -> Vec<f64> {
        let sizes = matmul([mm, nn, kk], &size(a), &size(b));
        sizes.iter().map(|s| gamma(kk + 2, U) * s).collect()
    };
    let mut case = Case::new(op, inputs);
    case.gradient_type = gradient;
    case.check(
        |x| {
            let (a, b) = operands(x);
            let (mut y, mut z): (Bounded, Bounded) = Default::default();
            for i in 0..batch {
                let bias = op.bias.then(|| &x[2].values[..]);
                let (yi, zi) = reference::linear([m, n, k], &a[i], &b[i], bias, f);
                let mut bound = off(m, n, k, &a[i], &b[i]);
                for (j, bound) in bound.iter_mut().enumerate() {
                    *bound += U * (zi[j].abs() + bias.map_or(0.0, |b| b[j % n].abs()));
                }
                for j in 0..m * n {
                    // f is no steeper than 2 (1 + |z|); its own error is a few roundings of z's size.
                    let steep = f.map_or(1.0, |_| 2.0 * (1.0 + zi[j].abs()));
                    let own = f.map_or(0.0, |_| 16.0 * U * (yi[j].abs() + zi[j].abs()));
                    y.1.push(steep * bound[j] + own);
                }
                y.0.extend(yi);
                z.0.extend(zi);
                z.1.extend(bound);
            }
            if f.is_some() { vec![y, z] } else { vec![y] }
        },
        |x, outputs, dy| {
            let (a, b) = operands(x);
            // Backward starts from the stored preactivation, and stores dz in its type.
            let (dz, dz_off): (Vec<f64>, Vec<f64>) = match f {
                None => (dy.to_vec(), vec![0.0; dy.len()]),
                Some(f) => {
                    let z = &outputs[1];
                    let dz = reference::activation_backward(f, &z.values, dy);
                    let off = (0..dy.len())
                        .map(|j| {
                            let own = 32.0 * U * dy[j].abs() * (1.0 + z.values[j].abs());
                            own + reference::rounding(z.ty.dtype, dz[j].abs() + own)
                        })
                        .collect();
                    (dz, off)
                }
            };
            let (mut da, mut db): (Bounded, Bounded) = Default::default();
            for i in 0..batch {
                let part = i * m * n..(i + 1) * m * n;
                let (dz, dz_off) = (&dz[part.clone()], &dz_off[part]);
                let [dai, dbi] = reference::matmul_backward([m, n, k], &a[i], &b[i], dz);
                let (at, bt) = (transposed([m, k], &a[i]), transposed([k, n], &b[i]));
                let add = |mut bound: Vec<f64>, moved: Vec<f64>| {
                    bound.iter_mut().zip(moved).for_each(|(b, m)| *b += 1.1 * m);
                    bound
                };
                let da_off = add(off(m, k, n, dz, &bt), matmul([m, k, n], dz_off, &size(&bt)));
                let db_off = add(off(k, n, m, &at, dz), matmul([k, n, m], &size(&at), dz_off));
                let put = |to: &mut Bounded,
                           x: Vec<f64>,
                           bound: Vec<f64>,
                           [r, c]: [usize; 2],
                           swap: bool| {
                    let turn = |x: Vec<f64>| if swap { transposed([r, c], &x) } else { x };
                    to.0.extend(turn(x));
                    to.1.extend(turn(bound));
                };
                put(&mut da, dai, da_off, [m, k], ta);
                put(&mut db, dbi, db_off, [k, n], tb);
            }
            let rows = batch * m;
            let dbias = reference::column_sum([rows, n], &dz);
            let chain = reference::column_sum([rows, n], &size(&dz));
            let moved = reference::column_sum([rows, n], &dz_off);
            let dbias_off = (0..n)
                .map(|j| gamma(rows + 1, U) * chain[j] + 1.1 * moved[j])
                .collect();
            let mut gradients = vec![Some(da), Some(db)];
            if op.bias {
                gradients.push(Some((dbias, dbias_off)));
            }
            gradients
        },
    );
}

#[test]
pub(super) fn products_of_every_type() {
    for a in FLOATS {
        for b in FLOATS {
            for gradient in [None, Some(DType::F32)] {
                check(
                    &Matmul::default(),
                    &[2],
                    [5, 7, 9],
                    true,
                    [a, b, a],
                    gradient,
                );
            }
        }
    }
}

#[test]
pub(super) fn products_at_the_edges_of_tiles() {
    for sizes in [
        [0, 3, 2],
        [3, 0, 2],
        [3, 2, 0],
        [1, 1, 1],
        [1, 37, 16],
        [13, 1, 5],
        [16, 32, 8],
        [17, 31, 64],
        [61, 67, 71],
    ] {
        check(&Matmul::default(), &[], sizes, true, [DType::F32; 3], None);
    }
}

/// Sizes that are read four elements at a time, and of which some cross the largest tile of any device.
#[test]
pub(super) fn products_by_fours_across_tiles() {
    for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
        let op = Matmul {
            transpose_a,
            transpose_b,
            ..Default::default()
        };
        check(&op, &[], [36, 68, 20], true, [DType::F32; 3], None);
        check(&op, &[2], [40, 12, 24], false, [DType::F16; 3], None);
    }
    let op = Matmul {
        bias: true,
        activation: Some(Activation::GeluTanh),
        ..Default::default()
    };
    check(&op, &[], [132, 140, 44], true, [DType::F32; 3], None);
}

/// A product of each layout, by fours and not.
#[test]
pub(super) fn every_layout_once() {
    for (transpose_a, transpose_b) in [(false, false), (true, true)] {
        let op = Matmul {
            transpose_a,
            transpose_b,
            ..Default::default()
        };
        check(&op, &[], [36, 68, 20], true, [DType::F32; 3], None);
        check(&op, &[2], [35, 37, 21], false, [DType::Bf16; 3], None);
    }
}

/// So few results that a device splits k.
#[test]
pub(super) fn long_sums() {
    check(
        &Matmul::default(),
        &[],
        [3, 8, 2053],
        true,
        [DType::F32; 3],
        None,
    );
    let op = Matmul {
        bias: true,
        activation: Some(Activation::Silu),
        ..Default::default()
    };
    check(
        &op,
        &[],
        [4, 4, 1028],
        true,
        [DType::Bf16; 3],
        Some(DType::F32),
    );
}

#[test]
pub(super) fn either_side_transposed_and_batched() {
    for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
        for dtype in FLOATS {
            let op = Matmul {
                transpose_a,
                transpose_b,
                ..Default::default()
            };
            check(&op, &[], [5, 6, 7], true, [dtype; 3], None);
            check(&op, &[2, 3], [5, 6, 7], false, [dtype; 3], None);
        }
    }
    let op = Matmul {
        transpose_b: true,
        ..Default::default()
    };
    check(
        &op,
        &[2, 3],
        [4, 6, 5],
        true,
        [DType::Bf16; 3],
        Some(DType::F32),
    );
}

#[test]
pub(super) fn bias_and_activation() {
    for dtype in FLOATS {
        for (bias, gradient) in [(true, None), (true, Some(DType::F32)), (false, None)] {
            for activation in [None].into_iter().chain(ACTIVATIONS.map(|a| Some(a.0))) {
                let op = Matmul {
                    bias,
                    activation,
                    ..Default::default()
                };
                check(&op, &[3], [5, 7, 6], true, [dtype; 3], gradient);
            }
        }
    }
}

#[test]
pub(super) fn the_result_has_the_type_that_is_asked_for() {
    let op = Matmul {
        output: Some(DType::F32),
        bias: true,
        ..Default::default()
    };
    check(
        &op,
        &[2],
        [5, 7, 9],
        true,
        [DType::Bf16, DType::Bf16, DType::F32],
        None,
    );
}

/// The rows of two leading axes belong to one b each: a mixture's experts.
#[test]
pub(super) fn some_leading_axes_are_rows() {
    for (transpose_b, activation) in [(false, None), (true, None), (false, Some(Activation::Silu))]
    {
        let op = Matmul {
            transpose_b,
            activation,
            ..Default::default()
        };
        let flat = |shape: &[usize]| Array::normal("a", shape, DType::F32);
        let b_shape = if transpose_b { [3, 7, 6] } else { [3, 6, 7] };
        let b = Array::normal("b", &b_shape, DType::F32);
        let whole = Case::new(&op, vec![flat(&[3, 2, 5, 6]), b.clone()]);
        let rows = Case::new(&op, vec![flat(&[3, 10, 6]), b]);
        let (whole, rows) = (whole.run(), rows.run());
        assert_eq!(whole[0].ty.shape, [3, 2, 5, 7]);
        assert_eq!(whole[0].values, rows[0].values);
    }
    let letters = Matmul::default().axes(&[
        TensorType::new([4, 2, 5, 6], DType::F32),
        TensorType::new([4, 6, 7], DType::F32),
    ]);
    assert_eq!(letters, Axes::new("abmk,akn->abmn").linear(Linear::Each));
}

#[test]
fn what_does_not_fit_is_said_with_both_sides() {
    let ty = |shape: &[usize]| TensorType::new(shape, DType::F32);
    let op = Matmul::default();
    let why = op.infer(&[ty(&[2, 3]), ty(&[4, 5])]).unwrap_err();
    assert!(
        why.contains("f32[2, 3]") && why.contains("f32[4, 5]"),
        "{why}"
    );
    for wrong in [
        vec![ty(&[2, 3])],
        vec![ty(&[3]), ty(&[3, 2])],
        vec![ty(&[2, 4, 3]), ty(&[5, 3, 2])],
        vec![ty(&[2, 3]), TensorType::new([3, 2], DType::U32)],
    ] {
        assert!(op.infer(&wrong).is_err(), "{wrong:?}");
    }
    let biased = Matmul {
        bias: true,
        ..Default::default()
    };
    assert!(biased.infer(&[ty(&[2, 3]), ty(&[3, 4]), ty(&[3])]).is_err());
}

#[test]
fn costs_are_exact() {
    let ty = |shape: &[usize]| TensorType::new(shape, DType::Bf16);
    let op = Matmul::default();
    let inputs = [ty(&[2, 8, 16]), ty(&[16, 32])];
    let outputs = op.infer(&inputs).unwrap();
    assert_eq!(outputs[0].shape, [2, 8, 32]);
    let cost = op.cost(&inputs, &outputs);
    assert_eq!(cost.flops, 2 * 16 * 32 * 16);
    assert_eq!(cost.bytes, 2 * (256 + 512 + 512));
    let backward = op.backward_cost(&inputs, &outputs, &[true, true]);
    assert_eq!(backward.flops, 2 * cost.flops);
    assert_eq!(
        op.backward_cost(&inputs, &outputs, &[true, false]).flops,
        cost.flops
    );
}
