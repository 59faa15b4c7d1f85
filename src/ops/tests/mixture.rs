//! Mixtures of experts: scores, choice, slots, dispatch, combine, the balance loss; and heads joined with what they share.

use super::harness::{Array, Case, FLOATS, U, exact, rounded};
use crate::dtype::DType;
use crate::ops::*;
use crate::reference::{self, Slotted, gamma};
use crate::tensor::TensorType;

fn sizes(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| x.abs()).collect()
}

/// Scores between 0 and 1, no two of a row alike.
fn scores(shape: &[usize]) -> Array {
    let n = shape.iter().product();
    let values = reference::sigmoid(&reference::normals("scores", n));
    Array::rounded(shape, DType::F32, values)
}

/// A router's choice on random scores: [b, t, k] of e.
fn chosen([b, t, k, e]: [usize; 4]) -> Array {
    let rule = reference::Route {
        k,
        normalize: false,
        scale: 1.0,
    };
    let (_, experts) = reference::route(rule, e, &scores(&[b, t, e]).values, None);
    Array::indices(&[b, t, k], &experts)
}

#[test]
pub(super) fn sigmoids() {
    for shape in [&[0][..], &[1], &[3, 37], &[4, 1031]] {
        for dtype in FLOATS {
            let x = vec![Array::normal("x", shape, dtype)];
            Case::new(&Sigmoid, x).check(
                |x| vec![rounded(reference::sigmoid(&x[0].values), 8)],
                |_, y, dy| {
                    let want = reference::sigmoid_backward(&y[0].values, dy);
                    let bound = y[0].values.iter().zip(dy);
                    let bound = bound.map(|(y, dy)| gamma(4, U) * (y * dy).abs() + 1e-43);
                    vec![Some((want, bound.collect()))]
                },
            );
        }
    }
}

/// How many rows hang on less than the op's margin.
fn close_choices(k: usize, e: usize, scores: &[f64], bias: Option<&[f64]>) -> f64 {
    let close = |row: &[f64]| {
        let mut keys: Vec<f64> = (0..e)
            .map(|i| row[i] + bias.map_or(0.0, |b| b[i]))
            .collect();
        keys.sort_by(|a, b| b.total_cmp(a));
        k < e && keys[k - 1] - keys[k] < f64::from(Route::CLOSE)
    };
    scores.chunks_exact(e).filter(|row| close(row)).count() as f64
}

#[test]
fn a_choice_that_rounding_could_turn_is_counted() {
    let op = Route {
        k: 1,
        bias: false,
        normalize: false,
        scale: 1.0,
    };
    let rows = vec![0.5, 0.5, 0.5, 0.4, 0.5, 0.49995];
    let results = Case::new(&op, vec![Array::rounded(&[3, 2], DType::F32, rows)]).run();
    assert_eq!(results[2].values, [2.0]);
}

#[test]
pub(super) fn routes() {
    for (k, shape) in [
        (1, &[3, 5, 4][..]),
        (2, &[2, 9, 7]),
        (4, &[6, 4]),
        (1, &[3, 1]),
    ] {
        for (normalize, bias) in [(false, false), (true, false), (true, true)] {
            let e = shape[shape.len() - 1];
            let op = Route {
                k,
                bias,
                normalize,
                scale: 2.5,
            };
            let rule = reference::Route {
                k,
                normalize,
                scale: 2.5,
            };
            let mut inputs = vec![scores(shape)];
            if bias {
                inputs.push(Array::normal("bias", &[e], DType::F32));
            }
            Case::new(&op, inputs).check(
                |x| {
                    let bias = x.get(1).map(|b| &b.values[..]);
                    let (weights, experts) = reference::route(rule, e, &x[0].values, bias);
                    let experts = experts.into_iter().map(f64::from).collect();
                    let close = close_choices(k, e, &x[0].values, bias);
                    vec![rounded(weights, k + 4), exact(experts), exact(vec![close])]
                },
                |x, y, dy| {
                    let experts = y[1].labels();
                    let s = &x[0].values;
                    let want = reference::route_backward(rule, e, s, &experts, dy);
                    let bound = (0..s.len()).map(|i| {
                        let r = i / e;
                        let of = |v: &[f64]| v[r * k..(r + 1) * k].iter().map(|x| x.abs()).sum();
                        let all: f64 = of(dy);
                        let sum: f64 = experts[r * k..(r + 1) * k]
                            .iter()
                            .map(|&j| s[r * e + j as usize])
                            .sum();
                        let divisor = if normalize { sum } else { 1.0 };
                        gamma(3 * k + 8, U) * 2.5 * 2.0 * all / divisor
                    });
                    let bound = bound.collect();
                    let mut gradients = vec![Some((want, bound))];
                    gradients.extend(bias.then_some(None));
                    gradients
                },
            );
        }
    }
}

#[test]
fn equal_scores_go_to_the_lower_number_and_nan_is_no_trap() {
    let op = Route {
        k: 3,
        bias: false,
        normalize: false,
        scale: 1.0,
    };
    let rows = vec![
        0.5,
        0.7,
        0.5,
        0.7,
        f64::NAN,
        0.1,
        0.2,
        0.3,
        f64::NAN,
        f64::NAN,
        f64::NAN,
        f64::NAN,
    ];
    let results = Case::new(&op, vec![Array::rounded(&[3, 4], DType::F32, rows)]).run();
    assert_eq!(results[1].labels(), [1, 3, 0, 0, 3, 2, 0, 1, 2]);
}

#[test]
pub(super) fn slots_within_a_capacity() {
    for ([b, t, k, e], capacity) in [
        ([2, 9, 2, 5], 3),
        ([3, 4, 1, 2], 4),
        ([2, 16, 3, 4], 1),
        ([0, 4, 2, 3], 2),
    ] {
        let op = Slots {
            experts: e,
            capacity,
            order: None,
        };
        let experts = chosen([b, t, k, e]);
        Case::new(&op, vec![experts]).check(
            |x| {
                let (slots, origin, load) =
                    reference::slots([b, t, k], [e, capacity], &x[0].labels());
                // A tensor reads as f32, where NONE is rounded.
                let wide =
                    |x: Vec<u32>| exact(x.into_iter().map(|x| f64::from(x as f32)).collect());
                vec![wide(slots), wide(origin), exact(load)]
            },
            |_, _, _| vec![None],
        );
    }
}

/// Tokens that are kept in another order than the text's lose the same assignments.
#[test]
pub(super) fn slots_are_filled_in_the_order_of_the_text() {
    let (t, k, e, capacity) = (6, 2, 3, 2);
    let order: [u32; 6] = [0, 1, 4, 5, 3, 2];
    let text = chosen([1, t, k, e]).labels();
    let kept = |text: &[u32]| {
        let mut kept = vec![0; t * k];
        for (position, &place) in order.iter().enumerate() {
            for j in 0..k {
                kept[place as usize * k + j] = text[position * k + j];
            }
        }
        kept
    };
    let op = Slots {
        experts: e,
        capacity,
        order: Some(order.into()),
    };
    let got = Case::new(&op, vec![Array::indices(&[1, t, k], &kept(&text))]).run();
    let (slots, _, load) = reference::slots([1, t, k], [e, capacity], &text);
    assert!(load[e..].iter().sum::<f64>() > 0.0, "some are dropped");
    let slots: Vec<f64> = kept(&slots).iter().map(|&x| f64::from(x as f32)).collect();
    assert_eq!(got[0].values, slots);
    assert_eq!(got[2].values, load);
}

#[test]
#[should_panic(expected = "slots: assignment 2 names expert 4 of 4")]
fn an_expert_that_is_not_there_is_refused() {
    let op = Slots {
        experts: 4,
        capacity: 2,
        order: None,
    };
    Case::new(&op, vec![Array::indices(&[1, 2, 2], &[0, 3, 4, 1])]).run();
}

/// Sizes of a mixture with its slots and origin, of which some assignments are dropped.
fn slotted(n: Slotted) -> (Array, Array) {
    let experts = chosen([n.b, n.t, n.k, n.e]);
    let sizes = ([n.b, n.t, n.k], [n.e, n.s]);
    let (slots, origin, load) = reference::slots(sizes.0, sizes.1, &experts.labels());
    assert!(load[n.e..].iter().sum::<f64>() > 0.0, "some are dropped");
    (
        Array::indices(&sizes.0, &slots),
        Array::indices(&[n.e, n.b, n.s], &origin),
    )
}

const MIXTURES: [Slotted; 3] = [
    Slotted {
        b: 2,
        t: 9,
        k: 2,
        e: 4,
        s: 3,
        c: 5,
    },
    Slotted {
        b: 3,
        t: 8,
        k: 1,
        e: 2,
        s: 2,
        c: 64,
    },
    Slotted {
        b: 2,
        t: 16,
        k: 3,
        e: 5,
        s: 6,
        c: 33,
    },
];

#[test]
pub(super) fn tokens_go_to_experts() {
    for n in MIXTURES {
        for dtype in FLOATS {
            let (slots, origin) = slotted(n);
            let labels = slots.labels();
            let inputs = vec![Array::normal("x", &[n.b, n.t, n.c], dtype), origin, slots];
            Case::new(&Dispatch, inputs).check(
                |x| vec![exact(reference::dispatch(n, &x[0].values, &labels))],
                |_, _, dy| {
                    let want = reference::dispatch_backward(n, &labels, dy);
                    let size = reference::dispatch_backward(n, &labels, &sizes(dy));
                    let bound = size.iter().map(|s| gamma(n.k, U) * s).collect();
                    vec![Some((want, bound)), None, None]
                },
            );
        }
    }
}

#[test]
pub(super) fn and_come_back() {
    for n in MIXTURES {
        for dtype in FLOATS {
            let (slots, origin) = slotted(n);
            let labels = slots.labels();
            let inputs = vec![
                Array::normal("y", &[n.e, n.b, n.s, n.c], dtype),
                Array::normal("weights", &[n.b, n.t, n.k], DType::F32),
                slots,
                origin,
            ];
            Case::new(&Combine, inputs).check(
                |x| {
                    let [y, w] = [0, 1].map(|i| &x[i].values);
                    let size = reference::combine(n, &sizes(y), &sizes(w), &labels);
                    let bound = size.iter().map(|s| gamma(n.k + 1, U) * s).collect();
                    vec![(reference::combine(n, y, w, &labels), bound)]
                },
                |x, _, dy| {
                    let [y, w] = [0, 1].map(|i| &x[i].values);
                    let [want, dw] = reference::combine_backward(n, y, w, &labels, dy);
                    let [_, size] =
                        reference::combine_backward(n, &sizes(y), &sizes(w), &labels, &sizes(dy));
                    let bound = size.iter().map(|s| gamma(n.c, U) * s).collect();
                    vec![Some(rounded(want, 1)), Some((dw, bound)), None, None]
                },
            );
        }
    }
}

#[test]
pub(super) fn uneven_loads_cost() {
    for [b, t, k, e] in [[2, 9, 2, 5], [1, 4, 1, 2], [3, 32, 3, 8]] {
        for normalize in [false, true] {
            let op = BalanceLoss { normalize };
            let experts = chosen([b, t, k, e]);
            let labels = experts.labels();
            Case::new(&op, vec![scores(&[b, t, e]), experts]).check(
                |x| {
                    let want =
                        reference::balance_loss([b, t, e], k, normalize, &x[0].values, &labels);
                    vec![rounded(want, t + 2 * e + 8)]
                },
                |x, _, dy| {
                    let s = &x[0].values;
                    let of = |dy: &[f64]| {
                        reference::balance_loss_backward([b, t, e], k, normalize, s, &labels, dy)
                    };
                    let want = of(dy);
                    // The difference of two numbers that are both at most this.
                    let bound = (0..s.len()).map(|i| {
                        let row = &s[i / e * e..][..e];
                        let sum: f64 = if normalize { row.iter().sum() } else { 1.0 };
                        let most = e as f64 / t as f64 * dy[i / (t * e)].abs();
                        gamma(2 * e + 8, U) * 2.0 * most / sum
                    });
                    vec![Some((want, bound.collect())), None]
                },
            );
        }
    }
}

#[test]
pub(super) fn a_loss_joins_whatever_passes() {
    let op = JoinLoss { weight: 0.25 };
    for dtype in FLOATS {
        let inputs = vec![
            Array::normal("x", &[4, 3, 5], dtype),
            Array::normal("loss", &[4], DType::F32),
        ];
        Case::new(&op, inputs).check(
            |x| vec![exact(x[0].values.clone())],
            |_, _, dy| vec![Some(exact(dy.to_vec())), Some(exact(vec![0.25; 4]))],
        );
    }
}

#[test]
pub(super) fn heads_join_what_they_share() {
    for [b, t, h, n, r] in [[2, 3, 4, 5, 2], [1, 2, 1, 3, 4], [2, 5, 8, 16, 8]] {
        for dtype in FLOATS {
            let inputs = vec![
                Array::normal("x", &[b, t, h, n], dtype),
                Array::normal("shared", &[b, t, r], dtype),
            ];
            let shapes = [[b, t, h, n], [b, t, h, r]];
            Case::new(&JoinHeads, inputs).check(
                |x| {
                    let tokens = x[1].values.chunks_exact(r);
                    let wide: Vec<f64> = tokens.flat_map(|row| row.repeat(h)).collect();
                    let parts = [
                        (&shapes[0][..], &x[0].values[..]),
                        (&shapes[1][..], &wide[..]),
                    ];
                    vec![exact(reference::concatenate(3, &parts))]
                },
                |_, _, dy| {
                    let whole = [b, t, h, n + r];
                    let over_heads = |dy: &[f64]| {
                        let part = reference::slice(&whole, 3, n..n + r, dy);
                        let of =
                            |i: usize| (0..h).map(|h_| part[(i / r * h + h_) * r + i % r]).sum();
                        (0..b * t * r).map(of).collect::<Vec<f64>>()
                    };
                    let bound = over_heads(&sizes(dy))
                        .iter()
                        .map(|s| gamma(h, U) * s)
                        .collect();
                    vec![
                        Some(exact(reference::slice(&whole, 3, 0..n, dy))),
                        Some((over_heads(dy), bound)),
                    ]
                },
            );
        }
    }
}

#[test]
pub(super) fn zeros_around() {
    for (shape, axis, before, after) in [
        (&[3, 4][..], 1, 0, 2),
        (&[2, 3, 5], 0, 1, 1),
        (&[2, 3, 5], 2, 2, 0),
    ] {
        for dtype in FLOATS {
            let op = Pad {
                axis,
                before,
                after,
            };
            let n = shape[axis];
            let mut whole = shape.to_vec();
            whole[axis] += before + after;
            let place = before..before + n;
            Case::new(&op, vec![Array::normal("x", shape, dtype)]).check(
                |x| {
                    vec![exact(reference::slice_backward(
                        &whole,
                        axis,
                        place.clone(),
                        &x[0].values,
                    ))]
                },
                |_, _, dy| {
                    vec![Some(exact(reference::slice(
                        &whole,
                        axis,
                        place.clone(),
                        dy,
                    )))]
                },
            );
        }
    }
}

#[test]
fn what_does_not_fit_a_mixture_is_said_with_both_sides() {
    let f32s = |shape: &[usize]| TensorType::new(shape, DType::F32);
    let u32s = |shape: &[usize]| TensorType::new(shape, DType::U32);
    let route = Route {
        k: 5,
        bias: false,
        normalize: true,
        scale: 1.0,
    };
    let why = route.infer(&[f32s(&[2, 3, 4])]).unwrap_err();
    assert!(
        why.contains("k = 5") && why.contains("f32[2, 3, 4]"),
        "{why}"
    );
    let dispatch = [
        vec![f32s(&[2, 3, 8]), u32s(&[4, 3, 2]), u32s(&[2, 3, 2])],
        vec![f32s(&[2, 3, 8]), u32s(&[4, 2, 2]), u32s(&[2, 4, 2])],
        vec![f32s(&[2, 3, 8]), f32s(&[4, 2, 2]), u32s(&[2, 3, 2])],
    ];
    for wrong in dispatch {
        let why = Dispatch.infer(&wrong).unwrap_err();
        assert!(why.contains(&wrong[1].to_string()), "{why}");
    }
    let y = f32s(&[4, 2, 2, 8]);
    let (w, s, o) = (f32s(&[2, 3, 2]), u32s(&[2, 3, 2]), u32s(&[4, 2, 2]));
    assert!(
        Combine
            .infer(&[y.clone(), w.clone(), s.clone(), o.clone()])
            .is_ok()
    );
    assert!(
        Combine
            .infer(&[y.clone(), w.clone(), s.clone(), u32s(&[4, 2, 3])])
            .is_err()
    );
    assert!(
        Combine
            .infer(&[y.clone(), w.clone(), u32s(&[2, 3, 1]), o.clone()])
            .is_err()
    );
    assert!(Combine.infer(&[f32s(&[4, 3, 2, 8]), w, s, o]).is_err());
    let slots = Slots {
        experts: 4,
        capacity: 0,
        order: None,
    };
    assert!(
        slots
            .infer(&[u32s(&[1, 2, 2])])
            .unwrap_err()
            .contains("4 experts of 0 slots")
    );
}
