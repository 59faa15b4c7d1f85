//! AMX: eight tiles of 16 rows of 64 bytes, and `tdpbf16ps`, which multiplies bf16 tiles into f32: sixteen times the work
//! of an f32 multiply-add of AVX-512.
//!
//! Its order of sums is its own ([`sum_in_the_units_order`]): k in absolute blocks of 32; in a block one chain over the
//! even k and one over the odd; then even + odd, then C + that. Each operation rounds to nearest and takes and gives 0 for
//! subnormal numbers. So its bits differ from those of a single chain, and equal themselves on any number of threads, with
//! any tile and any batch.
//!
//! How to use it: [`Amx::new`] gives the token; pack with [`pack_left`] and [`pack_right`]; [`Amx::with_tiles`] configures
//! the calling thread's tiles, and [`Tiles::multiply`] multiplies a panel of each into 32 x 32 f32. With `SIDE` = `DEPTH` = 32
//! a panel's block of 32 k is 1024 elements of bf16, blocks follow one another, and missing rows, columns and k are 0:
//!
//! | | element of a block |
//! |---|---|
//! | A (i, p) | 512 (i / 16) + 32 (i % 16) + p |
//! | B (p, j) | 512 (j / 16) + 32 (p / 2) + 2 (j % 16) + p % 2 |
//!
//! The instructions are not stable in Rust yet and stand here as assembly. The compiler keeps nothing in tiles, so between
//! two blocks of assembly they stay as they are. Linux lends the tiles to a process that asks for them; elsewhere there is no
//! token. B comes from the second cache while A stays in the first; asking for its blocks ahead, as is done, won nothing
//! that could be seen.

mod pack;
#[cfg(test)]
mod tests;

use super::units::Wanted;
use super::{Avx512, Avx512Bf16};
use core::arch::asm;
use core::arch::x86_64::*;
use core::marker::PhantomData;
use half::bf16;
use std::sync::OnceLock;

pub(crate) use pack::{Lines, pack_left, pack_right};

/// Rows of a panel of A, columns of a panel of B.
pub(crate) const SIDE: usize = 32;
/// k of a block of a panel: those that the unit sums apart.
pub(crate) const DEPTH: usize = 32;
/// Elements of one block of a panel of either side.
pub(crate) const BLOCK: usize = SIDE * DEPTH;
/// Rows, and 32-bit columns, of a tile.
const TILE: usize = 16;

/// Proof that this CPU has AMX-BF16, AVX-512 and AVX512-BF16, that the system lends its tiles, and that they sum as is said here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx(Avx512Bf16);

impl Amx {
    /// The token, on a machine that has the unit, unless `SUPERNODE_MATRIX_UNITS` leaves it out. The first call tries it.
    pub(crate) fn new() -> Option<Self> {
        static UNIT: OnceLock<Option<Amx>> = OnceLock::new();
        *UNIT.get_or_init(|| (Wanted::get() == Wanted::On).then(Self::tried).flatten())
    }

    /// The instruction for pairs, and that which narrows.
    pub(crate) fn pairs(self) -> Avx512Bf16 {
        self.0
    }

    /// The token, if a product of the unit has the bits that it should have.
    fn tried() -> Option<Self> {
        let unit = Amx(Avx512Bf16::new().filter(|_| is_here() && is_lent())?);
        let (blocks, mut state) = (3, 1u32);
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Signs, significands and exponents of 2^-8 to 2^7: sums round in every way.
            bf16::from_bits(((state >> 16) & 0x80ff | (state >> 8) & 0x0700 | 0x3c00) as u16)
        };
        let a: Vec<bf16> = (0..blocks * BLOCK).map(|_| number()).collect();
        let b: Vec<bf16> = (0..blocks * BLOCK).map(|_| number()).collect();
        let mut c = vec![1.0f32; SIDE * SIDE];
        // SAFETY: whole panels and a whole square.
        unit.with_tiles(|tiles| unsafe {
            tiles.multiply(
                blocks,
                a.as_ptr(),
                b.as_ptr(),
                c.as_mut_ptr(),
                SIDE,
                [SIDE; 2],
                false,
            );
        });
        let right = (0..SIDE * SIDE).all(|at| {
            let (i, j) = (at / SIDE, at % SIDE);
            let want = sum_in_the_units_order(1.0, blocks * DEPTH, |p| {
                let block = p / DEPTH * BLOCK;
                let p = p % DEPTH;
                let right = 512 * (j / TILE) + 32 * (p / 2) + 2 * (j % TILE) + p % 2;
                (
                    a[block + 512 * (i / TILE) + 32 * (i % TILE) + p],
                    b[block + right],
                )
            });
            want.to_bits() == c[at].to_bits()
        });
        right.then_some(unit)
    }

    /// AVX-512, which every CPU with AMX has.
    pub(crate) fn vectors(self) -> Avx512 {
        self.0.vectors()
    }

    /// Configures this thread's tiles, runs f, and lets go of them, so that the system need not save them any more.
    ///
    /// Calls do not nest: an inner one would let go of the outer one's tiles.
    pub(crate) fn with_tiles<R>(self, f: impl FnOnce(Tiles) -> R) -> R {
        struct Release;
        impl Drop for Release {
            fn drop(&mut self) {
                // SAFETY: the tiles were configured below; nothing of theirs is wanted any more.
                unsafe {
                    asm!("tilerelease", options(nostack, nomem),
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
                }
            }
        }
        #[repr(C, align(64))]
        struct Configuration {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        configuration.row_bytes[..8].fill(64);
        configuration.rows[..8].fill(TILE as u8);
        // SAFETY: the token proves the instruction; the 64 bytes are a valid configuration of palette 1.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
        }
        let _release = Release;
        f(Tiles(PhantomData))
    }

    /// Floating-point operations of one step of [`Amx::chains`].
    pub(crate) const FLOPS_PER_STEP: u64 = 4 * (2 * TILE * TILE * DEPTH) as u64;

    /// Products of tiles that stay in registers, four sums in turn, `steps` times: element (0, 0) of the first sum. Each
    /// step adds 32 2^-20 to it.
    pub(crate) fn chains(self, steps: u64) -> f32 {
        let (one, small) = (
            [bf16::ONE; 512],
            [bf16::from_f32(1.0 / (1 << 20) as f32); 512],
        );
        let mut c = [0.0f32; 256];
        if steps == 0 {
            return 0.0;
        }
        self.with_tiles(|_| {
            // SAFETY: tiles of 1 KiB each are read and written; the tiles are configured.
            unsafe {
                asm!(
                    "tileloadd tmm4, [{a} + {row}*1]",
                    "tileloadd tmm5, [{b} + {row}*1]",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tdpbf16ps tmm0, tmm4, tmm5",
                    "tdpbf16ps tmm1, tmm4, tmm5",
                    "tdpbf16ps tmm2, tmm4, tmm5",
                    "tdpbf16ps tmm3, tmm4, tmm5",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {row}*1], tmm0",
                    a = in(reg) one.as_ptr(),
                    b = in(reg) small.as_ptr(),
                    c = in(reg) c.as_mut_ptr(),
                    row = in(reg) 64usize,
                    steps = inout(reg) steps => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _,
                    options(nostack),
                );
            }
        });
        c[0]
    }
}

/// Whether CPU and system have AMX-BF16.
fn is_here() -> bool {
    if !is_x86_feature_detected!("xsave") {
        return false;
    }
    // AMX-TILE and AMX-BF16; OSXSAVE; XTILECFG and XTILEDATA.
    const UNIT: u32 = 1 << 24 | 1 << 22;
    const READABLE: u32 = 1 << 27;
    const STATE: u64 = 0b11 << 17;
    // Unsafe only in older compilers.
    #[allow(unused_unsafe)]
    // SAFETY: every CPU with AVX-512, which is asked for first, has cpuid and its leaf 7.
    let has = unsafe { __cpuid_count(7, 0).edx & UNIT == UNIT && __cpuid(1).ecx & READABLE != 0 };
    if !has {
        return false;
    }
    let (low, high): (u32, u32);
    // SAFETY: OSXSAVE, which was just seen, lets programs read register 0.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nostack, nomem));
    }
    (u64::from(high) << 32 | u64::from(low)) & STATE == STATE
}

/// Asks the system for the tiles, for all threads of the process.
fn is_lent() -> bool {
    if cfg!(not(target_os = "linux")) {
        return false;
    }
    // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
    let mut result: isize = 158;
    // SAFETY: the call takes two numbers, touches no memory of ours, and gives 0 or an error.
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") 0x1023, in("rsi") 18,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

/// C + sum over p < k of the products of `pair(p)`, in the unit's order and with its flushing: what it is checked against.
pub(crate) fn sum_in_the_units_order(
    c: f32,
    k: usize,
    pair: impl Fn(usize) -> (bf16, bf16),
) -> f32 {
    let flush = |x: f32| {
        if x.is_subnormal() {
            0.0f32.copysign(x)
        } else {
            x
        }
    };
    let mut c = c;
    for block in (0..k).step_by(DEPTH) {
        let mut sums = [0.0f32; 2];
        for p in block..(block + DEPTH).min(k) {
            let (a, b) = pair(p);
            let (a, b) = (flush(a.to_f32()), flush(b.to_f32()));
            sums[p % 2] = flush(a.mul_add(b, sums[p % 2]));
        }
        c = flush(flush(c) + flush(sums[0] + sums[1]));
    }
    c
}

/// This thread's tiles, configured. They do not go to another thread.
pub(crate) struct Tiles(PhantomData<*mut ()>);

impl Tiles {
    /// c\[i, j\] (+)= sum over `blocks` blocks of a panel of A and one of B, packed as the module says, for `SIDE` x `SIDE`
    /// f32 of which rows are `c_pitch` apart. `fresh` begins at 0 and does not read c. Of the 16 x 16 quarters only those
    /// that `[rows, cols]` reach are computed and touched.
    ///
    /// # Safety
    /// `blocks` x [`BLOCK`] elements are readable at a and b; c is writable, and readable unless fresh, where touched.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(crate) unsafe fn multiply(
        &self,
        blocks: usize,
        a: *const bf16,
        b: *const bf16,
        c: *mut f32,
        c_pitch: usize,
        [rows, cols]: [usize; 2],
        fresh: bool,
    ) {
        let (a, b, c) = (a.cast::<u8>(), b.cast::<u8>(), c.cast::<u8>());
        let (below, pitch) = (c.wrapping_add(TILE * 4 * c_pitch), 4 * c_pitch);
        // The tiles of C, the order of products, and where they go; tmm4 and 5 are A, 6 and 7 B.
        macro_rules! product {
            ($($zero:literal $load:literal $store:literal),*; $($step:literal),*) => {{
                if fresh {
                    asm!($($zero,)* options(nostack, nomem),
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _);
                } else {
                    asm!($($load,)* options(nostack, readonly),
                        c = in(reg) c, below = in(reg) below, pitch = in(reg) pitch,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _);
                }
                if blocks > 0 {
                    asm!(
                        "2:",
                        $($step,)*
                        "add {a}, 2048",
                        "add {b}, 2048",
                        "dec {blocks}",
                        "jnz 2b",
                        a = inout(reg) a => _,
                        b = inout(reg) b => _,
                        row = in(reg) 64usize,
                        blocks = inout(reg) blocks => _,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack, readonly),
                    );
                }
                asm!($($store,)* options(nostack),
                    c = in(reg) c, below = in(reg) below, pitch = in(reg) pitch,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _);
            }};
        }
        // SAFETY: a Tiles exists while tiles are configured; the caller vouches for the memory.
        unsafe {
            match (rows > TILE, cols > TILE) {
                (true, true) => product!(
                    "tilezero tmm0" "tileloadd tmm0, [{c} + {pitch}*1]" "tilestored [{c} + {pitch}*1], tmm0",
                    "tilezero tmm1" "tileloadd tmm1, [{c} + {pitch}*1 + 64]" "tilestored [{c} + {pitch}*1 + 64], tmm1",
                    "tilezero tmm2" "tileloadd tmm2, [{below} + {pitch}*1]" "tilestored [{below} + {pitch}*1], tmm2",
                    "tilezero tmm3" "tileloadd tmm3, [{below} + {pitch}*1 + 64]" "tilestored [{below} + {pitch}*1 + 64], tmm3";
                    "tileloadd tmm4, [{a} + {row}*1]",
                    "tileloadd tmm6, [{b} + {row}*1]",
                    "tileloadd tmm7, [{b} + {row}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "prefetcht0 [{b} + 4096]\nprefetcht0 [{b} + 4160]\nprefetcht0 [{b} + 4224]\nprefetcht0 [{b} + 4288]",
                    "prefetcht0 [{b} + 4352]\nprefetcht0 [{b} + 4416]\nprefetcht0 [{b} + 4480]\nprefetcht0 [{b} + 4544]",
                    "prefetcht0 [{b} + 4608]\nprefetcht0 [{b} + 4672]\nprefetcht0 [{b} + 4736]\nprefetcht0 [{b} + 4800]",
                    "prefetcht0 [{b} + 4864]\nprefetcht0 [{b} + 4928]\nprefetcht0 [{b} + 4992]\nprefetcht0 [{b} + 5056]",
                    "tileloadd tmm5, [{a} + {row}*1 + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "prefetcht0 [{b} + 5120]\nprefetcht0 [{b} + 5184]\nprefetcht0 [{b} + 5248]\nprefetcht0 [{b} + 5312]",
                    "prefetcht0 [{b} + 5376]\nprefetcht0 [{b} + 5440]\nprefetcht0 [{b} + 5504]\nprefetcht0 [{b} + 5568]",
                    "prefetcht0 [{b} + 5632]\nprefetcht0 [{b} + 5696]\nprefetcht0 [{b} + 5760]\nprefetcht0 [{b} + 5824]",
                    "prefetcht0 [{b} + 5888]\nprefetcht0 [{b} + 5952]\nprefetcht0 [{b} + 6016]\nprefetcht0 [{b} + 6080]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7"
                ),
                (false, true) => product!(
                    "tilezero tmm0" "tileloadd tmm0, [{c} + {pitch}*1]" "tilestored [{c} + {pitch}*1], tmm0",
                    "tilezero tmm1" "tileloadd tmm1, [{c} + {pitch}*1 + 64]" "tilestored [{c} + {pitch}*1 + 64], tmm1",
                    "" "/* {below} */" "/* {below} */";
                    "tileloadd tmm4, [{a} + {row}*1]",
                    "tileloadd tmm6, [{b} + {row}*1]",
                    "tileloadd tmm7, [{b} + {row}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7"
                ),
                (true, false) => product!(
                    "tilezero tmm0" "tileloadd tmm0, [{c} + {pitch}*1]" "tilestored [{c} + {pitch}*1], tmm0",
                    "tilezero tmm2" "tileloadd tmm2, [{below} + {pitch}*1]" "tilestored [{below} + {pitch}*1], tmm2";
                    "tileloadd tmm4, [{a} + {row}*1]",
                    "tileloadd tmm6, [{b} + {row}*1]",
                    "tileloadd tmm5, [{a} + {row}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm2, tmm5, tmm6"
                ),
                (false, false) => product!(
                    "tilezero tmm0" "tileloadd tmm0, [{c} + {pitch}*1] /* {below} */" "tilestored [{c} + {pitch}*1], tmm0 /* {below} */";
                    "tileloadd tmm4, [{a} + {row}*1]",
                    "tileloadd tmm6, [{b} + {row}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6"
                ),
            }
        }
    }
}
