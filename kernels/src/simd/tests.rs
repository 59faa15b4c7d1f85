//! Every instruction set against plain Rust, bit for bit, over numbers that include every special one.

use super::*;
use crate::dtype::{DType, Float};
use half::{bf16, f16};
use std::any::type_name;

fn numbers() -> Vec<f32> {
    let mut x = vec![
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -f32::NAN,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        f32::from_bits(0x007f_ffff),
        65504.0,
        65520.0,
        5.96e-8,
        2.98e-8,
        0.5,
        1.5,
        2.5,
        -2.5,
        8388609.0,
        1.0 + f32::EPSILON,
    ];
    // Ties of both narrow types, odd and even.
    x.extend(
        [
            0x3f80_8000u32,
            0x3f81_8000,
            0x3f80_1000,
            0x3f80_3000,
            0x7f7f_8000,
        ]
        .map(f32::from_bits),
    );
    let mut state = 1u32;
    x.extend((0..2017).map(|i| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if i % 2 == 0 {
            f32::from_bits(state)
        } else {
            (state >> 8) as f32 / 65536.0 - 128.0
        }
    }));
    x
}

/// NaN has one value but many patterns, and only its being NaN is promised.
fn bits(x: f32) -> u32 {
    if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() }
}

struct Operations<'a>(&'a [f32]);

impl Kernel for Operations<'_> {
    type Output = Vec<Vec<u32>>;
    #[inline(always)]
    fn call<S: Simd>(self, s: S) -> Self::Output {
        let n = self.0.len() / 32 * 32;
        let mut out: Vec<Vec<u32>> = vec![Vec::new(); 18];
        for i in (0..n).step_by(S::LANES) {
            let a = s.load(&self.0[i..]);
            // Another order of the same numbers; 7 and 13 lanes on are the same numbers for all widths.
            let shifted: Vec<f32> = (0..2 * S::LANES)
                .map(|j| self.0[(i + j % S::LANES + 7 + j / S::LANES * 6) % n])
                .collect();
            let (b, c) = (s.load(&shifted), s.load(&shifted[S::LANES..]));
            let whole = s.round(clamp_to(s, b));
            let results = [
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.fma(a, b, c),
                s.neg_fma(a, b, c),
                s.max(a, b),
                s.min(a, b),
                s.max_nan(a, b),
                s.sqrt(a),
                s.abs(a),
                s.copysign(a, s.select(s.eq(b, b), b, s.splat(1.0))),
                s.round(a),
                s.scale2(
                    s.select(s.le(s.splat(2f32.powi(-100)), s.abs(a)), a, s.zero()),
                    whole,
                ),
                s.shift(
                    s.splat(1.25),
                    s.add(
                        s.min(s.splat(127.0), s.max(s.splat(-126.0), whole)),
                        s.splat(POWER),
                    ),
                ),
                s.select(s.lt(a, b), a, c),
                s.select(s.le(a, b), a, c),
                s.select(s.mask_and(s.lt(a, b), s.lt(b, c)), b, c),
            ];
            for (list, v) in out.iter_mut().zip(results) {
                let mut lanes = [0f32; 32];
                s.store(&mut lanes, v);
                list.extend(lanes[..S::LANES].iter().map(|&x| bits(x)));
            }
        }
        out
    }
}

#[inline(always)]
fn clamp_to<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.select(s.eq(x, x), x, s.zero());
    s.min(s.splat(250.0), s.max(s.splat(-250.0), x))
}

#[test]
fn operations_agree_with_plain_rust() {
    let x = numbers();
    let want = dispatch(Isa::Portable, Operations(&x));
    for isa in Isa::available() {
        let got = dispatch(isa, Operations(&x));
        for (op, (got, want)) in got.iter().zip(&want).enumerate() {
            for (i, (g, w)) in got.iter().zip(want).enumerate() {
                assert_eq!(g, w, "operation {op}, element {i} on {isa:?}");
            }
        }
    }
}

struct Split<'a>(&'a [f32]);

impl Kernel for Split<'_> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        for &x in self.0.iter().filter(|x| x.is_normal()) {
            let (m, e) = s.split(s.splat(x.abs()));
            let (mut ms, mut es) = ([0f32; 32], [0f32; 32]);
            s.store(&mut ms, m);
            s.store(&mut es, e);
            let (m, e) = (ms[0] as f64, es[0] as f64);
            assert!(
                (0.666_666..1.333_334).contains(&m) && e == e.round(),
                "{x}: {m} {e}"
            );
            assert_eq!(m * e.exp2(), x.abs() as f64);
        }
    }
}

#[test]
fn split_is_exact() {
    for isa in Isa::available() {
        dispatch(isa, Split(&numbers()));
    }
}

struct LoadStore<'a, T>(&'a [T], &'a [f32]);

impl<T: Float> Kernel for LoadStore<'_, T> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let LoadStore(narrow, wide) = self;
        for n in 0..=S::LANES {
            let (x, w) = (&narrow[n..], &wide[n..]);
            // Memory beyond the n lanes must neither be read into lanes nor written.
            let mut lanes = [9f32; 33];
            s.store(&mut lanes[1..], s.load_first(&x[..n]));
            for (lane, value) in lanes[1..=S::LANES].iter().enumerate() {
                let want = if lane < n { x[lane].to_f32() } else { 0.0 };
                assert_eq!(
                    bits(*value),
                    bits(want),
                    "lane {lane} of {n} on {}",
                    type_name::<S>()
                );
            }
            assert_eq!((lanes[0], lanes[1 + S::LANES]), (9.0, 9.0));
            let guard = T::from_f32(9.0);
            let mut out = [guard; 34];
            s.store_first(&mut out[1..1 + n], s.load(w));
            for (lane, value) in out[1..].iter().enumerate() {
                let want = if lane < n {
                    T::from_f32(w[lane])
                } else {
                    guard
                };
                assert_eq!(
                    bits(value.to_f32()),
                    bits(want.to_f32()),
                    "{}",
                    type_name::<S>()
                );
            }
            assert_eq!(out[0], guard);
        }
        for (x, w) in narrow
            .chunks_exact(S::LANES)
            .zip(wide.chunks_exact(S::LANES))
        {
            let (mut lanes, mut out) = ([0f32; 32], [T::from_f32(0.0); 32]);
            s.store(&mut lanes, s.load(x));
            s.store(&mut out, s.load(w));
            for i in 0..S::LANES {
                assert_eq!(bits(lanes[i]), bits(x[i].to_f32()));
                let want = T::from_f32(w[i]).to_f32();
                assert_eq!(
                    bits(out[i].to_f32()),
                    bits(want),
                    "{} to {}",
                    w[i],
                    T::DTYPE
                );
            }
        }
    }
}

fn load_store<T: Float>() {
    let wide = numbers();
    let narrow: Vec<T> = if T::DTYPE == DType::F32 {
        wide.iter().map(|&x| T::from_f32(x)).collect()
    } else {
        // Every pattern of the narrow type.
        (0..=u16::MAX)
            .map(|b| bytemuck::pod_read_unaligned(&b.to_ne_bytes()))
            .collect()
    };
    let wide: Vec<f32> = wide
        .iter()
        .copied()
        .cycle()
        .take(narrow.len().max(2048))
        .collect();
    for isa in Isa::available() {
        dispatch(isa, LoadStore(&narrow, &wide));
    }
}

#[test]
fn loads_widen_and_stores_round_to_nearest_even() {
    load_store::<f32>();
    load_store::<bf16>();
    load_store::<f16>();
}

#[test]
fn masks_count_lanes() {
    struct First;
    impl Kernel for First {
        type Output = ();
        #[inline(always)]
        fn call<S: Simd>(self, s: S) {
            for n in 0..=S::LANES + 1 {
                let m = s.mask_first(n);
                let mut lanes = [0f32; 32];
                s.store(&mut lanes, s.select(m, s.splat(1.0), s.splat(2.0)));
                let ones = lanes.iter().filter(|&&x| x == 1.0).count();
                assert_eq!(ones, n.min(S::LANES));
            }
        }
    }
    for isa in Isa::available() {
        dispatch(isa, First);
    }
}

#[test]
fn transposing_moves_lane_j_of_vector_i() {
    struct Transpose;
    impl Kernel for Transpose {
        type Output = ();
        #[inline(always)]
        fn call<S: Simd>(self, s: S) {
            let numbers: Vec<f32> = (0..S::LANES * S::LANES).map(|i| i as f32).collect();
            let mut x: Vec<S::V> = numbers.chunks(S::LANES).map(|row| s.load(row)).collect();
            s.transpose(&mut x);
            for (j, v) in x.into_iter().enumerate() {
                let mut lanes = [0f32; 32];
                s.store(&mut lanes, v);
                for (i, &lane) in lanes[..S::LANES].iter().enumerate() {
                    assert_eq!(lane, (i * S::LANES + j) as f32, "{}", type_name::<S>());
                }
            }
        }
    }
    for isa in Isa::available() {
        dispatch(isa, Transpose);
    }
}

#[test]
fn a_chosen_instruction_set_holds_inside_only() {
    let best = isa();
    assert_eq!(with_isa(Isa::Portable, isa), Isa::Portable);
    let panicked = std::panic::catch_unwind(|| with_isa(Isa::Portable, || panic!("on purpose")));
    assert!(panicked.is_err());
    assert_eq!(isa(), best);
    assert_eq!(Isa::available().last(), Some(&Isa::Portable));
}

struct Shape;

impl Kernel for Shape {
    type Output = [usize; 3];
    #[inline(always)]
    fn call<S: Simd>(self, s: S) -> Self::Output {
        s.tiled(self)
    }
}

impl TileKernel for Shape {
    type Output = [usize; 3];
    #[inline(always)]
    fn call<S: Simd, const ROWS: usize, const VECTORS: usize>(self, _: S) -> Self::Output {
        [S::LANES, ROWS, VECTORS]
    }
}

/// What the emulated sets are there for: code that this machine's registers would not let run.
#[test]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn arrays_take_the_shape_of_the_sets_that_they_stand_for() {
    let here = Isa::available();
    #[cfg(target_arch = "x86_64")]
    if !here.contains(&Isa::Avx2) {
        return;
    }
    assert_eq!(dispatch(Isa::Emulated16, Shape), [16, 14, 2]);
    assert_eq!(dispatch(Isa::Portable, Shape), [4, 6, 4]);
    for isa in here {
        let shape = dispatch(isa, Shape);
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Avx512 => assert_eq!(shape, dispatch(Isa::Emulated16, Shape)),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => assert_eq!(shape, dispatch(Isa::Portable, Shape)),
            _ => assert!(shape[1] <= 14 && 32 % (shape[0] * shape[2]) == 0),
        }
    }
}

/// Two stretches of memory of which the second may not be touched.
#[cfg(target_os = "linux")]
struct Guarded(*mut u8);

#[cfg(target_os = "linux")]
impl Guarded {
    /// No page is larger, on any CPU that runs Linux.
    const BYTES: usize = 1 << 16;

    fn new() -> Self {
        use std::ffi::{c_int, c_long, c_void};
        unsafe extern "C" {
            fn mmap(
                at: *mut c_void,
                bytes: usize,
                access: c_int,
                flags: c_int,
                file: c_int,
                offset: c_long,
            ) -> *mut c_void;
            fn mprotect(at: *mut c_void, bytes: usize, access: c_int) -> c_int;
        }
        // Read and write; private and anonymous; no access.
        // SAFETY: new memory, at a place of the system's choice; it lives until the process ends.
        unsafe {
            let data = mmap(std::ptr::null_mut(), 2 * Self::BYTES, 3, 0x22, -1, 0);
            assert_ne!(data as isize, -1, "no memory");
            assert_eq!(mprotect(data.byte_add(Self::BYTES), Self::BYTES, 0), 0);
            Guarded(data.cast())
        }
    }
}

#[cfg(target_os = "linux")]
struct AtTheEnd<'a, T>(&'a Guarded, std::marker::PhantomData<T>);

#[cfg(target_os = "linux")]
impl<T: Float> Kernel for AtTheEnd<'_, T> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        for n in 1..=S::LANES {
            let at = Guarded::BYTES - n * T::DTYPE.size();
            // SAFETY: n elements end where the readable memory does.
            let x: &mut [T] = unsafe {
                let data = self.0.0.add(at).cast();
                std::slice::from_raw_parts_mut(data, n)
            };
            s.store_first(x, s.splat(n as f32));
            assert!(x.iter().all(|x| x.to_f32() == n as f32));
            let mut lanes = [0f32; 32];
            s.store(&mut lanes, s.load_first(x));
            assert_eq!(lanes.iter().sum::<f32>(), (n * n) as f32);
        }
    }
}

/// A lane beyond the end may lie on a page that does not exist.
#[cfg(target_os = "linux")]
#[test]
fn partial_vectors_touch_nothing_beyond_the_end() {
    use std::marker::PhantomData;
    let memory = Guarded::new();
    for isa in Isa::available() {
        dispatch(isa, AtTheEnd::<f32>(&memory, PhantomData));
        dispatch(isa, AtTheEnd::<bf16>(&memory, PhantomData));
        dispatch(isa, AtTheEnd::<f16>(&memory, PhantomData));
    }
}
