//! Against chains written out, on every instruction set.

use super::*;
use crate::attention::mask::SCORES;
use crate::simd::{Isa, dispatch};

#[test]
fn a_product_is_a_chain_for_every_shape_and_touches_nothing_else() {
    for isa in Isa::available() {
        for (m, n, k) in [
            (0, 16, 3),
            (1, 16, 0),
            (1, 16, 1),
            (5, 32, 7),
            (12, 48, 2),
            (23, 64, 3),
        ] {
            for transposed in [false, true] {
                for start in 0..3 {
                    case(isa, m, n, k, transposed, start);
                }
            }
        }
    }
}

fn numbers(len: usize, salt: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 37 + salt * 11) % 101) as f32 / 17.0 - 2.5;
    (0..len).map(value).collect()
}

/// The bits of the product, then of the powers, one after the other.
#[test]
fn powers_are_those_of_the_products_elements() {
    struct One(f32, f32);
    impl Kernel for One {
        type Output = f32;
        #[inline(always)]
        fn call<S: Simd>(self, s: S) -> f32 {
            let mut x = [0.0; 16];
            let power = exp2_above(s, s.splat(self.0), s.splat(self.1));
            s.store(&mut x, power);
            x[0]
        }
    }
    for isa in Isa::available() {
        for (m, n, k) in [(1, 16, 3), (7, 32, 20), (37, 48, 8), (64, 64, 33)] {
            let (a, b) = (numbers(m * k, 1), numbers(k * SCORES, 2));
            let ends = [m; 4];
            let product = |c| Product {
                m,
                n,
                k,
                a: Left {
                    data: &a,
                    pitch: k,
                    transposed: false,
                },
                b: &b,
                b_pitch: SCORES,
                c,
                c_pitch: SCORES,
                start: Start::Zero,
                part: Part::Scores(&ends),
            };
            let [mut x, mut c] = [(); 2].map(|()| vec![0.0; m * SCORES]);
            dispatch(isa, product(&mut x));
            let base: Vec<f32> = (0..n).map(|j| (j % 5) as f32 - 2.0).collect();
            let (mut sum, mut most) = (vec![1.0; n], vec![f32::NEG_INFINITY; n]);
            let columns = Columns {
                base: &base,
                sum: &mut sum,
                most: &mut most,
            };
            let product = product(&mut c);
            dispatch(isa, Powers { product, columns });
            for j in 0..n {
                let (mut want, mut greatest) = (1.0, f32::NEG_INFINITY);
                for i in 0..m {
                    let x = x[i * SCORES + j];
                    let power = dispatch(isa, One(x, base[j]));
                    assert_eq!(c[i * SCORES + j], power, "{isa:?} ({i}, {j}) of {m} x {n}");
                    (want, greatest) = (want + power, greatest.max(x));
                }
                assert_eq!([sum[j], most[j]], [want, greatest], "{isa:?}, column {j}");
            }
        }
    }
}

fn case(isa: Isa, m: usize, n: usize, k: usize, transposed: bool, start: usize) {
    let value = |i: usize, salt: usize| ((i * 37 + salt * 11) % 101) as f32 / 17.0 - 2.5;
    let (b_pitch, c_pitch) = (n + 3, n + 5);
    let a: Vec<f32> = (0..m * k).map(|i| value(i, 1)).collect();
    let b: Vec<f32> = (0..k * b_pitch).map(|i| value(i, 2)).collect();
    let factors: Vec<f32> = (0..m).map(|i| value(i, 3)).collect();
    let old: Vec<f32> = (0..m * c_pitch).map(|i| value(i, 4)).collect();
    let pitch = if transposed { m } else { k };
    let mut c = old.clone();
    let start_kind = [Start::Zero, Start::Resume, Start::Scaled(&factors)][start];
    let a_left = Left {
        data: &a,
        pitch,
        transposed,
    };
    let product = Product {
        m,
        n,
        k,
        a: a_left,
        b: &b,
        b_pitch,
        c: &mut c,
        c_pitch,
        start: start_kind,
        part: Part::Keys(&[k; 2]),
    };
    dispatch(isa, product);
    for (at, &got) in c.iter().enumerate() {
        let (i, j) = (at / c_pitch, at % c_pitch);
        let mut want = old[at];
        if j < n {
            want = [0.0, want, want * factors[i]][start];
            for p in 0..k {
                let x = a[if transposed {
                    p * pitch + i
                } else {
                    i * pitch + p
                }];
                want = x.mul_add(b[p * b_pitch + j], want);
            }
        }
        assert!(got == want, "{isa:?} ({i}, {j}): {got}, not {want}");
    }
}
