//! Products of matrices of any float types, in f32 inside.
//!
//! An element of C is one chain of fused multiply-adds over k in ascending order, so that the bits depend neither on
//! tiles and blocks nor on threads, batch or instruction set. bf16 by bf16 takes of k and k + 1, k even, the odd one first, as the
//! instruction does that multiplies pairs of them (`vdpbf16ps`), which is used where it is fast; `Accum::Add` then equals one
//! longer sum where it resumes at an even k. (That instruction takes subnormal numbers for 0; other bits are those of f32.)
//!
//! There is one exception: bf16 by bf16 on a machine with a matrix unit (AMX) is summed in that unit's order, which is as fixed,
//! but another (`simd::amx` states it), because the unit is many times faster than any chain; there `Accum::Add` equals one
//! longer sum where it resumes at a multiple of 32 of k. `SUPERNODE_MATRIX_UNITS=off` or `pairs` gives the chain's bits there too.
//! From outside in (after K. Goto and R. van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008):
//!
//! | file | what |
//! |---|---|
//! | this one | arguments, checks, the cut into regions of C for the threads (m, n and batch, never k) |
//! | `region` | blocks that fit the caches (sizes: `blocks`), and which operands are packed |
//! | `pack`, `pack_pairs` | copies in the microkernel's order, widened or in pairs: dtype ends here |
//! | `stream` | few rows: B streams by once |
//! | `microkernel` | the tile in registers, and its way to memory: bias, activation, narrowing |
//! | `unit`, `unit_stream` | bf16 on the matrix unit: its own blocks and packed format; few rows in its order |

#![allow(unsafe_code)]

mod blocks;
mod microkernel;
mod pack;
mod pack_pairs;
mod region;
mod stream;
mod strip;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod unit;
#[cfg(target_arch = "x86_64")]
mod unit_stream;
mod wanted;

use super::simd::{Isa, PairUnit, isa};
use super::{Accum, Activation};
use crate::dtype::{DType, Slice, SliceMut};
use pack::Terms;
use rayon::prelude::*;
use region::Region;
use std::ops::Range;

/// One matrix or a batch of equal ones: element (b, i, j) at b `batch_stride` + i `row_stride` + j `col_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// All elements.
    pub data: Slice<'a>,
    /// Rows of each matrix.
    pub rows: usize,
    /// Columns of each matrix.
    pub cols: usize,
    /// Distance of rows, in elements.
    pub row_stride: usize,
    /// Distance of columns, in elements.
    pub col_stride: usize,
    /// 0 repeats one matrix.
    pub batch_stride: usize,
}

/// The product's place: as [`Matrix`], with rows that are contiguous and elements that do not overlap.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    /// All elements.
    pub data: SliceMut<'a>,
    /// Rows of each matrix.
    pub rows: usize,
    /// Columns of each matrix.
    pub cols: usize,
    /// Distance of rows, in elements.
    pub row_stride: usize,
    /// Distance of matrices, in elements.
    pub batch_stride: usize,
}

/// What follows the sum, element by element, before it is narrowed.
#[derive(Debug, Default)]
pub struct Epilogue<'a> {
    /// \[n\], added to every row.
    pub bias: Option<Slice<'a>>,
    /// Applied after the bias.
    pub activation: Option<Activation>,
    /// \[batch, m, n\], contiguous: receives the value before the activation.
    pub preactivation: Option<SliceMut<'a>>,
}

/// c\[b, i, j\] (+)= sum over p of a\[b, i, p\] b\[b, p, j\], then bias and activation.
///
/// One chain of fused multiply-adds over ascending p, in f32 (bf16 by bf16: of each two p the odd one first, or in a matrix unit's
/// order), narrowed once; with [`Accum::Add`] the chain begins at the old c, with [`Accum::Replace`] at 0 and c is not read. k = 0 leaves the beginning of the chain.
///
/// # Panics
/// If shapes disagree, a slice is too short, elements of c overlap, or a type is no float.
pub fn matmul(batch: usize, a: Matrix, b: Matrix, c: MatrixMut, accum: Accum, epilogue: Epilogue) {
    let Some(product) = Product::new(batch, a, b, c, accum, epilogue) else {
        return;
    };
    let engine = Engine::choose(&product);
    let work = product.batch * product.c.rows * product.c.cols * product.k.max(1);
    let threads = if work < engine.serial() {
        1
    } else {
        rayon::current_num_threads()
    };
    let grid = Grid::new(&product, threads, engine.grain());
    let run = |task: usize| engine.run(&product, grid.region(task));
    if grid.tasks() == 1 {
        run(0);
    } else {
        (0..grid.tasks())
            .into_par_iter()
            .with_max_len(1)
            .for_each(run);
    }
}

/// Bytes of packing scratch that one thread of [`matmul`] uses at most, from shape and types alone.
pub fn scratch(batch: usize, m: usize, n: usize, k: usize, a: DType, b: DType, c: DType) -> usize {
    if batch == 0 || m == 0 || n == 0 {
        return 0;
    }
    let bytes = blocks::scratch_f32(m, n, k, c) * 4;
    let narrow = (a, b) == (DType::Bf16, DType::Bf16);
    // Also where there is no such unit: scratch does not depend on the machine.
    #[cfg(target_arch = "x86_64")]
    if narrow {
        return bytes.max(unit::scratch(m, n, k));
    }
    let _ = narrow;
    bytes
}

/// What computes a product. It decides the order of sums, so it is chosen by the operands' types and the machine alone.
#[derive(Clone, Copy, Debug)]
enum Engine {
    /// Chains of f32.
    Vectors(Isa),
    /// The matrix unit.
    #[cfg(target_arch = "x86_64")]
    Unit(super::simd::amx::Amx),
}

impl Engine {
    fn choose(product: &Product) -> Self {
        #[cfg(target_arch = "x86_64")]
        if (product.a.dtype, product.b.dtype) == (DType::Bf16, DType::Bf16)
            && let Some(unit) = super::simd::matrix_unit()
        {
            return Engine::Unit(unit);
        }
        let _ = product;
        Engine::Vectors(isa())
    }

    /// Multiply-adds below which waking a second thread costs more than it saves.
    fn serial(self) -> usize {
        match self {
            Engine::Vectors(_) => 1 << 20,
            #[cfg(target_arch = "x86_64")]
            Engine::Unit(_) => 1 << 23,
        }
    }

    /// Cuts fall on multiples of so many matrices, rows and columns, to keep tiles whole.
    fn grain(self) -> [usize; 3] {
        match self {
            Engine::Vectors(_) => [1, 12, 32],
            #[cfg(target_arch = "x86_64")]
            Engine::Unit(_) => [1, 32, 32],
        }
    }

    fn run(self, product: &Product, region: (Range<usize>, Range<usize>, Range<usize>)) {
        match self {
            Engine::Vectors(isa) => Region::run(product, isa, region),
            #[cfg(target_arch = "x86_64")]
            Engine::Unit(unit) => unit::run(product, unit, region),
        }
    }
}

/// A checked operand. The pointer stands for a slice that outlives the product.
#[derive(Clone, Copy)]
struct Operand {
    data: *const u8,
    dtype: DType,
    row_stride: usize,
    col_stride: usize,
    batch_stride: usize,
}

/// The checked output and its epilogue.
struct Output {
    data: *mut u8,
    dtype: DType,
    rows: usize,
    cols: usize,
    row_stride: usize,
    batch_stride: usize,
    bias: Option<(*const u8, DType)>,
    activation: Option<Activation>,
    preactivation: Option<(*mut u8, DType)>,
}

impl Output {
    /// The address of element (batch, i, j).
    fn at(&self, (batch, i, j): (usize, usize, usize)) -> *mut u8 {
        let element = batch * self.batch_stride + i * self.row_stride + j;
        self.data.wrapping_add(element * self.dtype.size())
    }

    /// Whether sums may be written to C as they are.
    fn is_plain(&self) -> bool {
        self.dtype == DType::F32 && self.is_bare()
    }

    fn is_bare(&self) -> bool {
        self.bias.is_none() && self.activation.is_none() && self.preactivation.is_none()
    }
}

/// All that the threads share.
struct Product {
    batch: usize,
    k: usize,
    a: Operand,
    b: Operand,
    c: Output,
    accum: Accum,
}

// SAFETY: the operands are only read; of the outputs each thread writes the elements of its own region, and regions are
// disjoint (Grid) as elements are (Product::new).
unsafe impl Sync for Product {}

fn pointer(data: Slice) -> *const u8 {
    match data {
        Slice::F32(x) => x.as_ptr().cast(),
        Slice::Bf16(x) => x.as_ptr().cast(),
        Slice::F16(x) => x.as_ptr().cast(),
        Slice::U32(_) => panic!("matmul: u32 is an index, not a number to multiply"),
    }
}

fn pointer_mut(data: SliceMut) -> *mut u8 {
    match data {
        SliceMut::F32(x) => x.as_mut_ptr().cast(),
        SliceMut::Bf16(x) => x.as_mut_ptr().cast(),
        SliceMut::F16(x) => x.as_mut_ptr().cast(),
        SliceMut::U32(_) => panic!("matmul: u32 is an index, not a place for a product"),
    }
}

/// One past the last element that (extent, stride) pairs reach; 0 if an extent is 0.
fn reach(axes: [(usize, usize); 3]) -> usize {
    if axes.iter().any(|&(extent, _)| extent == 0) {
        return 0;
    }
    axes.iter().fold(1usize, |sum, &(extent, stride)| {
        let far = (extent - 1).checked_mul(stride);
        far.and_then(|far| far.checked_add(sum))
            .expect("matmul: strides beyond the address space")
    })
}

impl Operand {
    fn new(name: &str, batch: usize, x: Matrix) -> Self {
        let needed = reach([
            (batch, x.batch_stride),
            (x.rows, x.row_stride),
            (x.cols, x.col_stride),
        ]);
        assert!(
            x.data.len() >= needed,
            "matmul: {name} has {} elements, its {batch} x [{}, {}] reach {needed}",
            x.data.len(),
            x.rows,
            x.cols
        );
        Operand {
            data: pointer(x.data),
            dtype: x.data.dtype(),
            row_stride: x.row_stride,
            col_stride: x.col_stride,
            batch_stride: x.batch_stride,
        }
    }

    /// The address of element (batch, i, j), which lies in the operand or just beyond.
    fn at(&self, batch: usize, i: usize, j: usize) -> *const u8 {
        let element = batch * self.batch_stride + i * self.row_stride + j * self.col_stride;
        self.data.wrapping_add(element * self.dtype.size())
    }
}

impl Product {
    /// Checks everything that the unsafe code below relies on. None if C has no elements.
    fn new(
        batch: usize,
        a: Matrix,
        b: Matrix,
        c: MatrixMut,
        accum: Accum,
        epilogue: Epilogue,
    ) -> Option<Self> {
        let (m, n, k) = (c.rows, c.cols, a.cols);
        assert!(
            a.rows == m && b.rows == k && b.cols == n,
            "matmul: [{}, {}] x [{}, {}] does not give [{m}, {n}]",
            a.rows,
            a.cols,
            b.rows,
            b.cols
        );
        let needed = reach([(batch, c.batch_stride), (m, c.row_stride), (n, 1)]);
        assert!(
            c.data.len() >= needed,
            "matmul: c has {} elements, its {batch} x [{m}, {n}] reach {needed}",
            c.data.len()
        );
        // Either matrices of rows, or rows of matrices (heads side by side).
        let nested = |(inner, near): (usize, usize), (outer, far): (usize, usize)| {
            (inner == 1 || near >= n)
                && (outer == 1 || far >= reach([(inner, near), (n, 1), (1, 0)]))
        };
        let (rows, matrices) = ((m, c.row_stride), (batch, c.batch_stride));
        assert!(
            needed == 0 || nested(rows, matrices) || nested(matrices, rows),
            "matmul: elements of c overlap: {batch} x [{m}, {n}] with strides {}, {}",
            c.batch_stride,
            c.row_stride
        );
        if let Some(bias) = &epilogue.bias {
            assert_eq!(bias.len(), n, "matmul: the bias needs one element a column");
        }
        if let Some(kept) = &epilogue.preactivation {
            assert_eq!(
                kept.len(),
                batch * m * n,
                "matmul: the preactivation has c's shape"
            );
        }
        let (a, b) = (Operand::new("a", batch, a), Operand::new("b", batch, b));
        let dtype = c.data.dtype();
        let product = Product {
            batch,
            k,
            a,
            b,
            c: Output {
                data: pointer_mut(c.data),
                dtype,
                rows: m,
                cols: n,
                row_stride: c.row_stride,
                batch_stride: c.batch_stride,
                bias: epilogue.bias.map(|x| (pointer(x), x.dtype())),
                activation: epilogue.activation,
                preactivation: epilogue.preactivation.map(|x| {
                    let dtype = x.dtype();
                    (pointer_mut(x), dtype)
                }),
            },
            accum,
        };
        (needed > 0).then(|| product.folded())
    }

    /// The unit whose sums these are, if they need but be narrowed to bf16: it never gives subnormal numbers, so that its rounding,
    /// which takes them for 0, is the one of `finish`.
    fn narrowed_by(&self, unit: Option<PairUnit>) -> Option<PairUnit> {
        let bare = self.c.dtype == DType::Bf16 && self.c.is_bare();
        unit.filter(|_| bare && self.k > 0)
    }

    /// The terms of its chains on an instruction set.
    fn terms(&self, isa: Isa) -> Terms {
        if (self.a.dtype, self.b.dtype) != (DType::Bf16, DType::Bf16) {
            return Terms::Ascending;
        }
        isa.pair_unit().map_or(Terms::OddFirst, Terms::Pairs)
    }

    /// A batch that shares B and whose rows follow one another is one taller matrix.
    fn folded(mut self) -> Self {
        let (m, batch) = (self.c.rows, self.batch);
        let follows = |row: usize, matrix: usize| m == 1 || matrix == m * row;
        if batch > 1
            && self.b.batch_stride == 0
            && follows(self.a.row_stride, self.a.batch_stride)
            && follows(self.c.row_stride, self.c.batch_stride)
        {
            if m == 1 {
                self.a.row_stride = self.a.batch_stride;
                self.c.row_stride = self.c.batch_stride;
            }
            self.c.rows = m * batch;
            self.batch = 1;
        }
        self
    }
}

/// How C is cut for the threads: `batch` x `rows` x `cols` regions of nearly equal size.
#[derive(Clone, Copy, Debug)]
struct Grid {
    extents: [usize; 3],
    grain: [usize; 3],
    cuts: [usize; 3],
}

impl Grid {
    /// The cut with the least time by a rough count: tiles, and lines that each region packs for itself.
    fn new(product: &Product, threads: usize, grain: [usize; 3]) -> Self {
        let extents = [product.batch, product.c.rows, product.c.cols];
        let grains = |axis: usize| extents[axis].div_ceil(grain[axis]);
        let mut best = (
            usize::MAX,
            Grid {
                extents,
                grain,
                cuts: [1; 3],
            },
        );
        for b in divisions(grains(0), threads) {
            for m in divisions(grains(1), threads.div_ceil(b)) {
                for n in divisions(grains(2), threads.div_ceil(b * m)) {
                    let rows = grains(1).div_ceil(m) * grain[1];
                    let cols = grains(2).div_ceil(n) * grain[2];
                    let each = grains(0).div_ceil(b) * (rows * cols + PACKING * (rows + cols));
                    let cost = (b * m * n).div_ceil(threads) * each;
                    if cost < best.0 {
                        let cuts = [b, m, n];
                        let grid = Grid {
                            extents,
                            grain,
                            cuts,
                        };
                        best = (cost, grid);
                    }
                }
            }
        }
        best.1
    }

    fn tasks(&self) -> usize {
        self.cuts.iter().product()
    }

    /// Region number `task`.
    fn region(&self, task: usize) -> (Range<usize>, Range<usize>, Range<usize>) {
        let [_, m, n] = self.cuts;
        let at = [task / (m * n), task / n % m, task % n];
        let part = |axis: usize| {
            let grain = self.grain[axis];
            let grains = self.extents[axis].div_ceil(grain);
            let edge = |i: usize| (grains * i / self.cuts[axis] * grain).min(self.extents[axis]);
            edge(at[axis])..edge(at[axis] + 1)
        };
        (part(0), part(1), part(2))
    }
}

/// Multiply-adds in whose time one element is packed, roughly.
const PACKING: usize = 16;

/// Numbers of parts worth trying for `grains` indivisible pieces: 1 to `most`, or as many as there are pieces.
fn divisions(grains: usize, most: usize) -> impl Iterator<Item = usize> {
    1..=most.min(grains).max(1)
}
