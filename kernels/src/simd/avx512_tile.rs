//! The loop of a tile of up to 14 rows and two vectors, as assembly.
//!
//! The compiler's version adds to pointers as often as the multiply-adds leave room for, and where it is asked to unroll
//! it merges neighbouring loads and keeps the sums in memory (a third of the speed). Written out, two p at a time, the loop
//! does 97 % of the multiply-adds that the cycles of a Xeon of 2024 have room for; one p at a time gives 90 %, four 92 %. (The
//! clock is another matter: with real data it is up to 5 % lower than for a loop in registers.)
//!
//! An element of 4 bytes is an f32, or a pair of bf16 of neighbouring k (`PAIRS`): only the instruction that multiplies differs.
//!
//! While it runs it asks for the lines of C that the next tile begins from, or that this one will be narrowed to: 28 lines that
//! come one after another from the third cache would take as long as a tenth of a tile.

use super::{Ask, TileLoop};
use core::arch::asm;
use core::mem::offset_of;

/// `$one!` of a row, if the tile has it: its two sums' registers, where it lies in rows at a distance of rax, and in a packed
/// panel. (The first sum's register is also the row's number.)
#[rustfmt::skip]
macro_rules! row {
    ($one:ident($low:literal, $high:literal, $row:literal, $packed:literal)) => {
        concat!(".if {rows} > ", $low, "\n", $one!($low, $high, $row, $packed), ".endif\n")
    };
}

#[rustfmt::skip]
macro_rules! rows {
    ($one:ident) => {
        concat!(
            row!($one(0, 14, "r8", 0)),
            row!($one(1, 15, "r8 + rax", 4)),
            row!($one(2, 16, "r8 + 2*rax", 8)),
            row!($one(3, 17, "r9", 12)),
            row!($one(4, 18, "r9 + rax", 16)),
            row!($one(5, 19, "r9 + 2*rax", 20)),
            row!($one(6, 20, "r10", 24)),
            row!($one(7, 21, "r10 + rax", 28)),
            row!($one(8, 22, "r10 + 2*rax", 32)),
            row!($one(9, 23, "r11", 36)),
            row!($one(10, 24, "r11 + rax", 40)),
            row!($one(11, 25, "r11 + 2*rax", 44)),
            row!($one(12, 26, "r12", 48)),
            row!($one(13, 27, "r12 + rax", 52)),
        )
    };
}

#[rustfmt::skip]
macro_rules! zero {
    ($low:literal, $high:literal, $row:literal, $packed:literal) => {
        concat!(
            "vpxord zmm", $low, ", zmm", $low, ", zmm", $low, "\n",
            "vpxord zmm", $high, ", zmm", $high, ", zmm", $high, "\n",
        )
    };
}

#[rustfmt::skip]
macro_rules! load {
    ($low:literal, $high:literal, $row:literal, $packed:literal) => {
        concat!("vmovups zmm", $low, ", [rcx]\nvmovups zmm", $high, ", [rcx + 64]\nadd rcx, rdx\n")
    };
}

#[rustfmt::skip]
macro_rules! store {
    ($low:literal, $high:literal, $row:literal, $packed:literal) => {
        concat!("vmovups [rcx], zmm", $low, "\nvmovups [rcx + 64], zmm", $high, "\nadd rcx, rdx\n")
    };
}

#[rustfmt::skip]
macro_rules! narrow {
    ($low:literal, $high:literal, $row:literal, $packed:literal) => {
        concat!("vcvtne2ps2bf16 zmm", $low, ", zmm", $high, ", zmm", $low, "\nvmovups [rcx], zmm", $low, "\nadd rcx, rdx\n")
    };
}

/// A row's sums grow by a product, or by those of a pair; zmm28 and 29 hold a row of B.
#[rustfmt::skip]
macro_rules! grow {
    ($low:literal, $high:literal, $at:expr) => {
        concat!(
            "vbroadcastss zmm30, dword ptr [", $at, "]\n",
            ".if {pairs}\n",
            "vdpbf16ps zmm", $low, ", zmm30, zmm28\n",
            "vdpbf16ps zmm", $high, ", zmm30, zmm29\n",
            ".else\n",
            "vfmadd231ps zmm", $low, ", zmm30, zmm28\n",
            "vfmadd231ps zmm", $high, ", zmm30, zmm29\n",
            ".endif\n",
        )
    };
}

/// At p, and at p + 1, of rows that lie along k.
macro_rules! long {
    ($low:literal, $high:literal, $row:literal, $packed:literal) => {
        grow!($low, $high, $row)
    };
}
macro_rules! long_next {
    ($low:literal, $high:literal, $row:literal, $packed:literal) => {
        grow!($low, $high, concat!($row, " + 4"))
    };
}

/// At p, and at p + 1, of rows side by side; rax is the distance from p to p.
macro_rules! packed {
    ($low:literal, $high:literal, $row:literal, $packed:literal) => {
        grow!($low, $high, concat!("r8 + ", $packed))
    };
}
macro_rules! packed_next {
    ($low:literal, $high:literal, $row:literal, $packed:literal) => {
        grow!($low, $high, concat!("r8 + rax + ", $packed))
    };
}

/// Two p of all rows, and on.
macro_rules! two_steps {
    ($step:ident, $next:ident, $advance:expr) => {
        concat!(
            "vmovups zmm28, [rsi]\nvmovups zmm29, [rsi + 64]\n",
            rows!($step),
            "vmovups zmm28, [rsi + rdx]\nvmovups zmm29, [rsi + rdx + 64]\n",
            rows!($next),
            "lea rsi, [rsi + 2*rdx]\n",
            $advance,
        )
    };
}

/// The function for one way in which A lies: `$begin` sets its pointers, `$step` and `$next` are two p, `$advance` goes on.
macro_rules! tile_of {
    ($(#[$doc:meta])* $name:ident: $begin:expr, $step:ident, $next:ident, $advance:expr) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As [`super::Simd::tile_loop`]; the CPU has AVX-512 F, and AVX512-BF16 for `PAIRS`.
        #[target_feature(enable = "avx512f")]
        pub(super) unsafe fn $name<const ROWS: usize, const PAIRS: bool>(tile: &TileLoop) {
            // SAFETY: the caller vouches for what is read and written. Lines that are asked for need not exist.
            unsafe {
                asm!(
                    "mov rcx, [rdi + {from}]",
                    "mov rdx, [rdi + {from_row}]",
                    "test rcx, rcx",
                    "jz 2f",
                    rows!(load),
                    "jmp 3f",
                    "2:",
                    rows!(zero),
                    "3:",
                    "mov rsi, [rdi + {b}]",
                    "mov rdx, [rdi + {b_step}]",
                    $begin,
                    "mov rcx, [rdi + {k}]",
                    "shr rcx",
                    "push rdi",
                    "mov rdi, [rdi + {asks}]",
                    "3:",
                    "mov r15, [rdi + {turns}]",
                    "mov r13, [rdi + {at}]",
                    "mov r14, [rdi + {step}]",
                    "add rdi, {ask}",
                    "cmp r15, rcx",
                    "cmova r15, rcx",
                    "sub rcx, r15",
                    "test r15, r15",
                    "jz 5f",
                    ".p2align 6",
                    "4:",
                    "prefetcht1 [r13]",
                    "prefetcht1 [r13 + 64]",
                    "add r13, r14",
                    two_steps!($step, $next, $advance),
                    "dec r15",
                    "jnz 4b",
                    "jmp 3b",
                    "5:",
                    "pop rdi",
                    "test rcx, rcx",
                    "jz 7f",
                    ".p2align 6",
                    "6:",
                    two_steps!($step, $next, $advance),
                    "dec rcx",
                    "jnz 6b",
                    "7:",
                    "test qword ptr [rdi + {k}], 1",
                    "jz 8f",
                    "vmovups zmm28, [rsi]",
                    "vmovups zmm29, [rsi + 64]",
                    rows!($step),
                    "8:",
                    "mov rcx, [rdi + {to}]",
                    "mov rdx, [rdi + {to_row}]",
                    ".if {pairs}",
                    "cmp byte ptr [rdi + {narrow}], 0",
                    "jne 9f",
                    ".endif",
                    rows!(store),
                    ".if {pairs}",
                    "jmp 12f",
                    "9:",
                    rows!(narrow),
                    "12:",
                    ".endif",
                    rows = const ROWS,
                    pairs = const PAIRS as usize,
                    k = const offset_of!(TileLoop, k),
                    a = const offset_of!(TileLoop, a),
                    a_step = const offset_of!(TileLoop, a_step),
                    b = const offset_of!(TileLoop, b),
                    b_step = const offset_of!(TileLoop, b_step),
                    from = const offset_of!(TileLoop, from),
                    from_row = const offset_of!(TileLoop, from_row),
                    to = const offset_of!(TileLoop, to),
                    to_row = const offset_of!(TileLoop, to_row),
                    narrow = const offset_of!(TileLoop, narrow),
                    asks = const offset_of!(TileLoop, asks),
                    ask = const size_of::<Ask>(),
                    at = const offset_of!(Ask, at),
                    step = const offset_of!(Ask, step),
                    turns = const offset_of!(Ask, turns),
                    in("rdi") tile,
                    out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                    out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
                    out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
                    out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                    out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                    out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                    out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
                    out("zmm28") _, out("zmm29") _, out("zmm30") _,
                );
            }
        }
    };
}

tile_of! {
    /// Rows that lie along k, `a_step` bytes apart.
    long_rows:
    "mov rax, [rdi + {a_step}]
    mov r8, [rdi + {a}]
    lea r15, [rax + 2*rax]
    lea r9, [r8 + r15]
    lea r10, [r9 + r15]
    lea r11, [r10 + r15]
    lea r12, [r11 + r15]",
    long, long_next,
    "add r8, 8
    add r9, 8
    add r10, 8
    add r11, 8
    add r12, 8"
}

tile_of! {
    /// Rows side by side, `a_step` bytes from p to p.
    packed_rows:
    "mov rax, [rdi + {a_step}]
    mov r8, [rdi + {a}]",
    packed, packed_next,
    "lea r8, [r8 + 2*rax]"
}
