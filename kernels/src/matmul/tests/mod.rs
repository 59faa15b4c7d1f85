//! Against the textbook in f64 within gamma(k) |A| |B|, and bit for bit across everything that must not matter.

mod case;

use super::super::simd::{Isa, with_isa};
use super::*;
use crate::dtype::Element;
use case::{Case, Data, case};

const EDGES: [usize; 18] = [
    0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 15, 16, 17, 31, 32, 33, 61,
];

#[test]
fn every_edge_of_a_tile_in_every_layout() {
    for m in EDGES {
        for n in EDGES {
            for (k, gap) in [(0, 0), (1, 2), (5, 0), (17, 1)] {
                let layout = m + n + k;
                Case {
                    transposed: [layout % 2 == 1, layout / 2 % 2 == 1],
                    gap,
                    ..case(m, n, k)
                }
                .check();
            }
        }
    }
}

#[test]
fn blocks_of_k_m_and_n() {
    for (m, n, k) in [
        (5, 33, 255),
        (7, 40, 256),
        (13, 70, 257),
        (3, 1100, 513),
        (260, 37, 300),
        (30, 2100, 5),
    ] {
        for transposed in [[false, false], [true, false], [false, true], [true, true]] {
            Case {
                transposed,
                ..case(m, n, k)
            }
            .check();
        }
    }
}

#[test]
fn every_combination_of_types() {
    let types = [DType::F32, DType::Bf16, DType::F16];
    for a in types {
        for b in types {
            for c in types {
                for (m, n, k) in [(2, 37, 300), (9, 21, 300), (27, 35, 31)] {
                    for accum in [Accum::Replace, Accum::Add] {
                        let transposed = [m == 9, n == 35];
                        let types = [a, b, c];
                        Case {
                            types,
                            accum,
                            transposed,
                            gap: 1,
                            ..case(m, n, k)
                        }
                        .check();
                    }
                }
            }
        }
    }
}

#[test]
fn batches_with_their_own_and_with_shared_operands() {
    for m in [1, 3, 20] {
        for shared_b in [false, true] {
            for gap in [0, 2] {
                Case {
                    batch: 3,
                    shared_b,
                    gap,
                    ..case(m, 19, 23)
                }
                .check();
            }
        }
    }
}

#[test]
fn epilogues_follow_the_sum() {
    use Activation::*;
    for (m, n, k) in [(1, 40, 300), (7, 37, 20), (14, 64, 300)] {
        for types in [
            [DType::F32; 3],
            [DType::Bf16; 3],
            [DType::F16, DType::F32, DType::Bf16],
        ] {
            for activation in [None, Some(GeluTanh), Some(Relu2), Some(Silu)] {
                for accum in [Accum::Replace, Accum::Add] {
                    let (bias, preactivation) = (true, activation.is_some());
                    Case {
                        types,
                        activation,
                        bias,
                        preactivation,
                        accum,
                        ..case(m, n, k)
                    }
                    .check();
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_instructions_or_threads() {
    let bf16 = [DType::Bf16; 3];
    for c in [
        case(1, 1200, 900),
        case(3, 1200, 300),
        case(16, 300, 260),
        case(130, 131, 67),
        Case {
            transposed: [true, true],
            ..case(121, 97, 300)
        },
        Case {
            types: bf16,
            accum: Accum::Add,
            ..case(121, 97, 300)
        },
        Case {
            types: bf16,
            transposed: [false, true],
            ..case(70, 520, 300)
        },
        // Columns whose sums wait in scratch between blocks of k, and rows read in place.
        Case {
            types: bf16,
            bias: true,
            ..case(60, 1400, 2100)
        },
        Case {
            types: bf16,
            transposed: [true, false],
            ..case(530, 70, 1201)
        },
        Case {
            batch: 5,
            gap: 1,
            ..case(50, 51, 90)
        },
        Case {
            bias: true,
            activation: Some(Activation::GeluErf),
            preactivation: true,
            ..case(128, 130, 64)
        },
    ] {
        c.same_everywhere();
    }
}

/// The chain itself, written out: every path must give these bits.
#[test]
fn an_element_is_one_chain_in_ascending_order() {
    for (m, n, k) in [
        (1, 9, 600),
        (4, 9, 300),
        (5, 40, 300),
        (30, 100, 310),
        (100, 101, 103),
    ] {
        let one = case(m, n, k);
        let [a, b, ..] = one.operands();
        let c = one.compute().c;
        for i in 0..m {
            for j in 0..n {
                let chain = (0..k).fold(0f32, |sum, p| {
                    a.get(i * k + p).mul_add(b.get(p * n + j), sum)
                });
                assert_eq!(
                    c.get(i * n + j).to_bits(),
                    chain.to_bits(),
                    "({i}, {j}) of {one:?}"
                );
            }
        }
    }
}

/// bf16 by bf16 where no matrix unit is used: of each two k the odd one first, on every instruction set and every path.
#[test]
fn a_chain_of_bf16_takes_the_odd_one_of_two_first() {
    for (m, n, k) in [
        (1, 9, 601),
        (2, 40, 64),
        (4, 33, 303),
        (5, 40, 7),
        (30, 100, 310),
        (60, 700, 1031),
    ] {
        for transposed in [[false, false], [true, false], [false, true], [true, true]] {
            let one = Case {
                types: [DType::Bf16, DType::Bf16, DType::F32],
                transposed,
                ..case(m, n, k)
            };
            let [a, b, ..] = one.operands();
            let left = |i, p| a.get(if transposed[0] { p * m + i } else { i * k + p });
            let right = |p, j| b.get(if transposed[1] { j * k + p } else { p * n + j });
            let odd_first = |p| if (p ^ 1) < k { p ^ 1 } else { p };
            let chain = |i, j| {
                (0..k)
                    .map(odd_first)
                    .fold(0f32, |sum, p| f32::mul_add(left(i, p), right(p, j), sum))
            };
            let want: Vec<u32> = (0..m * n).map(|e| chain(e / n, e % n).to_bits()).collect();
            for isa in Isa::available() {
                let c = with_isa(isa, || one.compute()).c;
                let got: Vec<u32> = (0..m * n).map(|e| c.get(e).to_bits()).collect();
                assert!(got == want, "{isa:?}: {one:?}");
            }
        }
    }
}

#[test]
fn pairs_at_every_edge_of_a_tile() {
    for isa in Isa::available() {
        for (i, m) in EDGES.into_iter().enumerate() {
            for (j, n) in EDGES.into_iter().enumerate() {
                let k = [0, 1, 2, 33][(i + 3 * j) % 4];
                let one = Case {
                    types: [
                        DType::Bf16,
                        DType::Bf16,
                        [DType::F32, DType::Bf16][(i + j) % 2],
                    ],
                    transposed: [i % 2 == 1, j % 2 == 1],
                    gap: i % 3,
                    accum: [Accum::Replace, Accum::Add][j % 2],
                    ..case(m, n, k)
                };
                with_isa(isa, || one.check());
            }
        }
    }
}

#[test]
fn adding_resumes_the_chain() {
    for (m, n, k, cut) in [(2, 33, 40, 13), (30, 40, 500, 100), (130, 70, 120, 60)] {
        let (a, b) = (
            Data::random(DType::F32, m * k, 1),
            Data::random(DType::F32, k * n, 2),
        );
        let product = |c: &mut Vec<f32>, from: usize, to: usize, accum| {
            let part = |x: &Data, skip: usize| {
                Slice::F32(match x {
                    Data::F32(x) => &x[skip..],
                    _ => unreachable!(),
                })
                .typed::<f32>()
                .to_vec()
            };
            let (a, b) = (part(&a, from), part(&b, from * n));
            let a = Matrix {
                data: Slice::F32(&a),
                rows: m,
                cols: to - from,
                row_stride: k,
                col_stride: 1,
                batch_stride: 0,
            };
            let b = Matrix {
                data: Slice::F32(&b),
                rows: to - from,
                cols: n,
                row_stride: n,
                col_stride: 1,
                batch_stride: 0,
            };
            let c = MatrixMut {
                data: SliceMut::F32(c),
                rows: m,
                cols: n,
                row_stride: n,
                batch_stride: 0,
            };
            matmul(1, a, b, c, accum, Epilogue::default());
        };
        let (mut once, mut twice) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
        product(&mut once, 0, k, Accum::Replace);
        product(&mut twice, 0, cut, Accum::Replace);
        product(&mut twice, cut, k, Accum::Add);
        assert!(
            once.iter()
                .zip(&twice)
                .all(|(x, y)| x.to_bits() == y.to_bits())
        );
    }
}

#[test]
fn rows_of_matrices_interleave() {
    // Heads side by side: c[t, h, d] with the heads as the batch.
    let (heads, m, n, k) = (3, 10, 5, 7);
    let (a, b) = (
        Data::random(DType::F32, heads * m * k, 1),
        Data::random(DType::F32, heads * k * n, 2),
    );
    let product = |c: &mut [f32], row_stride, batch_stride| {
        matmul(
            heads,
            Matrix {
                data: a.slice(),
                rows: m,
                cols: k,
                row_stride: k,
                col_stride: 1,
                batch_stride: m * k,
            },
            Matrix {
                data: b.slice(),
                rows: k,
                cols: n,
                row_stride: n,
                col_stride: 1,
                batch_stride: k * n,
            },
            MatrixMut {
                data: SliceMut::F32(c),
                rows: m,
                cols: n,
                row_stride,
                batch_stride,
            },
            Accum::Replace,
            Epilogue::default(),
        );
    };
    let (mut apart, mut woven) = (vec![f32::NAN; heads * m * n], vec![f32::NAN; heads * m * n]);
    product(&mut apart, n, m * n);
    product(&mut woven, heads * n, n);
    for (h, i, j) in
        (0..heads).flat_map(|h| (0..m).flat_map(move |i| (0..n).map(move |j| (h, i, j))))
    {
        assert_eq!(apart[(h * m + i) * n + j], woven[(i * heads + h) * n + j]);
    }
}

#[test]
fn mistakes_panic_with_both_sides() {
    let x = [0f32; 100];
    let ids = [0u32; 100];
    let matrix = |rows, cols| Matrix {
        data: Slice::F32(&x),
        rows,
        cols,
        row_stride: cols,
        col_stride: 1,
        batch_stride: 0,
    };
    let message = |a: Matrix, b: Matrix, rows: usize, row_stride: usize, bias: &[f32]| {
        let mut c = [0f32; 100];
        let c = MatrixMut {
            data: SliceMut::F32(&mut c),
            rows,
            cols: 4,
            row_stride,
            batch_stride: 0,
        };
        let epilogue = Epilogue {
            bias: Some(Slice::F32(bias)),
            ..Epilogue::default()
        };
        let run = std::panic::AssertUnwindSafe(|| matmul(1, a, b, c, Accum::Replace, epilogue));
        let panic = std::panic::catch_unwind(run).expect_err("must panic");
        panic
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_else(|| panic.downcast_ref::<&str>().unwrap().to_string())
    };
    let four = [0f32; 4];
    assert!(message(matrix(3, 5), matrix(6, 4), 3, 4, &four).contains("[3, 5] x [6, 4]"));
    assert!(message(matrix(30, 5), matrix(5, 4), 30, 4, &four).contains("100 elements"));
    assert!(message(matrix(3, 5), matrix(5, 4), 3, 3, &four).contains("overlap"));
    assert!(message(matrix(3, 5), matrix(5, 4), 3, 4, &x).contains("bias"));
    let indices = Matrix {
        data: Slice::U32(&ids),
        ..matrix(3, 5)
    };
    assert!(message(indices, matrix(5, 4), 3, 4, &four).contains("u32"));
}

#[test]
fn regions_cover_c_once() {
    for (m, n) in [(1, 1), (1, 4096), (100, 100), (37, 1000), (513, 7)] {
        for threads in [1, 2, 3, 4, 7] {
            for batch in [1, 3] {
                let (a, b) = (vec![0f32; m], vec![0f32; n]);
                let mut c = vec![0f32; batch * m * n];
                let a = Matrix {
                    data: Slice::F32(&a),
                    rows: m,
                    cols: 1,
                    row_stride: 1,
                    col_stride: 1,
                    batch_stride: 0,
                };
                let b = Matrix {
                    data: Slice::F32(&b),
                    rows: 1,
                    cols: n,
                    row_stride: n,
                    col_stride: 1,
                    batch_stride: 0,
                };
                let c = MatrixMut {
                    data: SliceMut::F32(&mut c),
                    rows: m,
                    cols: n,
                    row_stride: n,
                    batch_stride: m * n,
                };
                let product =
                    Product::new(batch, a, b, c, Accum::Replace, Epilogue::default()).unwrap();
                let grid = Grid::new(&product, threads, Engine::choose(&product).grain());
                let mut seen = vec![0; product.batch * product.c.rows * n];
                for task in 0..grid.tasks() {
                    let (batch, rows, cols) = grid.region(task);
                    for t in batch {
                        for i in rows.clone() {
                            for j in cols.clone() {
                                seen[(t * product.c.rows + i) * n + j] += 1;
                            }
                        }
                    }
                }
                assert!(seen.iter().all(|&x| x == 1), "{grid:?}");
            }
        }
    }
}

#[test]
fn scratch_follows_shape_and_type_only() {
    let of = |m, n, k, c| scratch(1, m, n, k, f32::DTYPE, f32::DTYPE, c);
    assert_eq!(of(0, 5, 5, DType::F32), 0);
    assert_eq!(
        of(4096, 4096, 4096, DType::F32),
        of(8192, 8192, 8192, DType::F32)
    );
    assert!(of(600, 600, 600, DType::Bf16) > of(600, 600, 600, DType::F32));
}

/// Element by element, whatever the shape, the layout, the rows beside it and the number of threads.
#[test]
#[cfg(target_arch = "x86_64")]
fn the_matrix_unit_sums_in_its_own_order() {
    use super::super::simd::amx::sum_in_the_units_order;
    if super::super::simd::matrix_unit().is_none() {
        eprintln!("ignored: no matrix unit here, or it is turned off");
        return;
    }
    let types = [DType::Bf16, DType::Bf16, DType::F32];
    for (m, n, k) in [
        (1, 70, 300),
        (4, 1100, 77),
        (3, 5, 0),
        (33, 40, 2100),
        (70, 1100, 33),
        (130, 97, 600),
    ] {
        for accum in [Accum::Replace, Accum::Add] {
            let transposed = [m % 2 == 0, n % 2 == 0];
            let one = Case {
                types,
                accum,
                transposed,
                ..case(m, n, k)
            };
            let [a, b, old, _] = one.operands();
            let bits = |x: &Data, at: usize| half::bf16::from_f32(x.get(at));
            let want = |i: usize, j: usize| {
                let begin = if accum == Accum::Add {
                    old.get(i * n + j)
                } else {
                    0.0
                };
                sum_in_the_units_order(begin, k, |p| {
                    let left = if transposed[0] { p * m + i } else { i * k + p };
                    let right = if transposed[1] { j * k + p } else { p * n + j };
                    (bits(&a, left), bits(&b, right))
                })
            };
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                let c = pool.install(|| one.compute()).c;
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let got = c.get(i * n + j);
                    assert_eq!(got.to_bits(), want(i, j).to_bits(), "({i}, {j}) of {one:?}");
                }
            }
        }
    }
}
