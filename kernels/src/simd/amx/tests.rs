//! Against the scalar sum in the unit's order, bit for bit.

use super::*;

fn unit() -> Option<Amx> {
    let unit = Amx::new();
    if unit.is_none() {
        eprintln!("ignored: no AMX-BF16 here, or SUPERNODE_MATRIX_UNITS leaves it out");
    }
    unit
}

fn numbers(len: usize, seed: u32) -> Vec<bf16> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[test]
fn the_unit_is_trusted_wherever_cpu_and_system_have_it() {
    let on = Wanted::get() == Wanted::On;
    assert_eq!(Amx::new().is_some(), is_here() && is_lent() && on);
}

#[test]
fn chains_are_computed_to_the_end() {
    let Some(unit) = unit() else { return };
    assert_eq!(unit.chains(0), 0.0);
    assert_eq!(unit.chains(1 << 10), 32.0 / 1024.0);
}

#[test]
fn packed_panels_multiply_in_the_units_order() {
    let Some(unit) = unit() else { return };
    for (m, n, k) in [
        (1, 1, 1),
        (16, 17, 31),
        (17, 16, 33),
        (32, 32, 96),
        (9, 30, 70),
    ] {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        for layout in 0..4 {
            let (a_strides, b_strides) =
                ([(k, 1), (1, m)][layout / 2], [(1, n), (k, 1)][layout % 2]);
            let lines = |data: &[bf16], lines, (line_stride, depth_stride)| Lines {
                data: data.as_ptr(),
                lines,
                depth: k,
                line_stride,
                depth_stride,
            };
            let blocks = k.div_ceil(DEPTH);
            let mut packed = [(); 2].map(|()| vec![bf16::NAN; blocks * BLOCK]);
            let mut c = vec![f32::NAN; SIDE * 40];
            // SAFETY: one panel each, and a whole square of C.
            unsafe {
                pack_left(unit, lines(&a, m, a_strides), packed[0].as_mut_ptr());
                pack_right(unit, lines(&b, n, b_strides), packed[1].as_mut_ptr());
                unit.with_tiles(|tiles| {
                    let [a, b] = [&packed[0], &packed[1]].map(|x| x.as_ptr());
                    tiles.multiply(blocks, a, b, c.as_mut_ptr(), 40, [m, n], true);
                });
            }
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let want = sum_in_the_units_order(0.0, k, |p| {
                    let at = |(line, depth), l: usize| l * line + p * depth;
                    (a[at(a_strides, i)], b[at(b_strides, j)])
                });
                let got = c[i * 40 + j];
                assert_eq!(
                    got.to_bits(),
                    want.to_bits(),
                    "({i}, {j}) of {m}x{n}x{k}, {layout}"
                );
            }
        }
    }
}

#[test]
fn subnormal_numbers_are_flushed_and_specials_pass() {
    let Some(unit) = unit() else { return };
    let tiny = bf16::from_bits(1);
    let least = bf16::from_f32(f32::MIN_POSITIVE);
    for (x, y) in [
        (tiny, bf16::from_f32(1e30)),
        (least, bf16::from_f32(0.5)),
        (bf16::INFINITY, bf16::ONE),
        (bf16::NEG_INFINITY, bf16::NEG_ONE),
        (bf16::NAN, bf16::ONE),
    ] {
        let (mut a, mut b) = (vec![bf16::ZERO; BLOCK], vec![bf16::ZERO; BLOCK]);
        (a[0], b[0]) = (x, y);
        let mut c = vec![0.0f32; SIDE * SIDE];
        // SAFETY: whole panels and a whole square.
        unit.with_tiles(|tiles| unsafe {
            tiles.multiply(
                1,
                a.as_ptr(),
                b.as_ptr(),
                c.as_mut_ptr(),
                SIDE,
                [SIDE; 2],
                false,
            );
        });
        let want = sum_in_the_units_order(0.0, 1, |_| (x, y));
        assert!(
            c[0].to_bits() == want.to_bits() || c[0].is_nan() && want.is_nan(),
            "{x} {y}: {} is not {want}",
            c[0]
        );
    }
}
