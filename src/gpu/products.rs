//! Matrix products on a chip.
//!
//! What was measured (llvmpipe of Mesa 22.3, vectors of 8 lanes, two cores, 1024^3 in f32): a load or a store runs as a loop over
//! lanes and costs about 20 cycles for one element a lane and 60 for four, whatever they are; registers are spilled and cost
//! little beside that. So strips of 32 x 64 sums with broadcasts across a subgroup reach 45 GFLOP/s, 32 x 32 36, 8 x 32 22; a
//! tile of 16 x 16 in each invocation's own registers 31, of 4 x 4 11; textures, whose loads are gathered, 37 with 16 x 32 sums
//! but need a copy of each operand. Leaving out bounds checks changed nothing there.

use super::launch::{Launch, Operand};
use super::library as k;
use super::matrices;
use super::tiles::{Plan, Shape};
use crate::dtype::DType;

/// f in the prelude's numbering: none.
pub(crate) const IDENTITY: u32 = 4;

/// A matrix in memory: element (i, j) of matrix z is at z batch + i row + j column.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    pub(crate) data: Operand,
    pub(crate) row: usize,
    pub(crate) column: usize,
    pub(crate) batch: usize,
}

impl Matrix {
    /// True if four elements along the axis of stride 1 always begin at a multiple of four.
    fn is_by_fours(&self, line: usize) -> bool {
        let other = if self.column == 1 {
            self.row
        } else {
            self.column
        };
        [other, self.batch, line]
            .iter()
            .all(|n| n.is_multiple_of(4))
    }

    /// Elements that are seen, at least: one behind the last.
    fn end(&self, batch: usize, [rows, columns]: [usize; 2]) -> usize {
        let last = |n: usize| n.saturating_sub(1);
        1 + last(batch) * self.batch + last(rows) * self.row + last(columns) * self.column
    }
}

/// What follows a product.
#[derive(Default)]
pub(crate) struct After {
    pub(crate) bias: Option<Operand>,
    /// f by its number in the prelude.
    pub(crate) activation: Option<u32>,
    pub(crate) preactivation: Option<Operand>,
}

/// c (+)= f(a b + bias) for `batch` products of [m, k] by [k, n]; c is [batch, m, n].
///
/// # Panics
/// If an operand is smaller than its sizes and strides say.
pub(crate) fn matmul(
    batch: usize,
    [m, n, k]: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: Operand,
    add: bool,
    after: After,
) {
    if batch * m * n == 0 {
        return;
    }
    let chip = c.chip.clone();
    let mut forms = matrices::FORMS.iter();
    let usable = forms.find_map(|form| {
        let fits = form.fits([m, n, k], &a, &b);
        let subgroup = fits.then(|| chip.device().matrices(form)).flatten();
        subgroup.map(|subgroup| (*form, subgroup))
    });
    if let Some((form, subgroup)) = usable {
        chip.chose(batch, [m, n, k], form.described(), 1);
        return by_matrices((form, subgroup), batch, [m, n, k], [a, b], c, add, after);
    }
    let shapes = chip.tiles().shapes(chip.device());
    let plan = chip.tiles().plan(&shapes, batch, [m, n, k]);
    chip.chose(batch, [m, n, k], plan.shape.to_string(), plan.parts);
    matmul_as(plan, batch, [m, n, k], a, b, c, add, after);
}

/// [`matmul`] cut up as `plan` says.
#[allow(clippy::too_many_arguments)]
pub(super) fn matmul_as(
    plan: Plan,
    batch: usize,
    [m, n, k]: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: Operand,
    add: bool,
    after: After,
) {
    let product = Product {
        batch,
        sizes: [m, n, k],
        a,
        b,
        plan,
    };
    product.check(&c);
    if plan.parts == 1 {
        return product.run(c, add, after);
    }
    // Parts of k first, then their sum in order.
    let parts = c.scratch(plan.parts * batch * m * n);
    product.run(parts.clone(), false, After::default());
    merge(parts, plan.parts, n, c, add, after);
}

/// c (+)= f(sum of the parts + bias).
fn merge(parts: Operand, count: usize, n: usize, c: Operand, add: bool, after: After) {
    let elements = c.elements;
    Launch::new(&k::MATMUL_MERGE)
        .operand("c", c)
        .operand("parts", parts)
        .optional("bias", after.bias)
        .optional("z", after.preactivation)
        .number("n", n)
        .number("parts_count", count)
        .number("part", elements)
        .constant("ADD", add as u32)
        .constant("FUNCTION", after.activation.unwrap_or(IDENTITY))
        .run(elements);
}

/// Through cooperative matrices, whose sums are in f32: what follows them is a pass of its own.
fn by_matrices(
    (form, subgroup): (matrices::Form, u32),
    batch: usize,
    [m, n, k]: [usize; 3],
    [a, b]: [Matrix; 2],
    c: Operand,
    add: bool,
    after: After,
) {
    let plain = after.bias.is_none() && after.activation.is_none() && after.preactivation.is_none();
    if c.dtype == DType::F32 && !add && plain {
        return matrices::product(form, batch, [m, n, k], a, b, c, subgroup);
    }
    let sums = c.scratch(batch * m * n);
    matrices::product(form, batch, [m, n, k], a, b, sums.clone(), subgroup);
    merge(sums, 1, n, c, add, after);
}

/// Products in one shape.
struct Product {
    batch: usize,
    sizes: [usize; 3],
    a: Matrix,
    b: Matrix,
    plan: Plan,
}

impl Product {
    /// No kernel reads or writes beyond what these sizes and strides come to.
    fn check(&self, c: &Operand) {
        let [m, n, k] = self.sizes;
        let holds = |what: &str, has: usize, needs: usize| {
            assert!(
                k == 0 || has >= needs,
                "a product of {:?} reads {needs} elements of {what}, which has {has}",
                self.sizes
            );
        };
        holds("a", self.a.data.elements, self.a.end(self.batch, [m, k]));
        holds("b", self.b.data.elements, self.b.end(self.batch, [k, n]));
        assert!(
            c.elements >= self.batch * m * n,
            "a product of {:?} writes {} elements, its result has {}",
            self.sizes,
            self.batch * m * n,
            c.elements
        );
    }

    fn run(self, c: Operand, add: bool, after: After) {
        let [m, n, k] = self.sizes;
        let (a_along_k, b_along_n) = (self.a.column == 1, self.b.column == 1);
        let a_line = if a_along_k { k } else { m };
        let b_line = if b_along_n { n } else { k };
        let wide = n.is_multiple_of(4);
        let [by_a, by_b] = [self.a.is_by_fours(a_line), self.b.is_by_fours(b_line)];
        let chunk = k.div_ceil(self.plan.parts).next_multiple_of(4);
        let covers = self.plan.shape.covers();
        let groups = [
            n.div_ceil(covers[1]),
            m.div_ceil(covers[0]),
            self.batch * self.plan.parts,
        ];
        let software = c.chip.device().is_software();
        let narrow_ends = after.bias.is_some() || after.preactivation.is_some();
        let launch = Launch::new(match self.plan.shape {
            Shape::Tile(_) => &k::MATMUL,
            Shape::Strip(..) => &k::MATMUL_LANES,
        })
        .operand("a", self.a.data)
        .by_fours("a", by_a)
        .operand("b", self.b.data)
        .by_fours("b", by_b)
        .optional("bias", after.bias)
        .by_fours("bias", wide)
        .operand("c", c)
        .by_fours("c", wide)
        .optional("z", after.preactivation)
        .by_fours("z", wide)
        .number("m", m)
        .number("n", n)
        .number("k", k)
        .number("chunk", chunk)
        .number("batch", self.batch)
        .number("a_row", self.a.row)
        .number("a_column", self.a.column)
        .number("a_batch", self.a.batch)
        .number("b_row", self.b.row)
        .number("b_column", self.b.column)
        .number("b_batch", self.b.batch)
        .constant("ADD", add as u32)
        .constant("FUNCTION", after.activation.unwrap_or(IDENTITY))
        .constant("WIDE", wide as u32)
        .constant("B", !b_along_n as u32)
        // Fours that may reach over an operand's end are left to the driver's checks.
        .proven(by_a && by_b && wide && !narrow_ends);
        match self.plan.shape {
            Shape::Tile(t) => {
                // A processor's compiler takes seconds for what a card's unrolls in passing.
                let loose = software as u32;
                let blocks =
                    |i: usize| t.each[i] * t.group[i] * t.depth / 4 / (t.group[0] * t.group[1]);
                launch
                    .constant("ROWS", t.each[0])
                    .constant("COLUMNS", t.each[1])
                    .constant("WG_Y", t.group[0])
                    .constant("WG_X", t.group[1])
                    .constant("DEPTH", t.depth)
                    .constant("A_BLOCKS", blocks(0))
                    .constant("B_BLOCKS", blocks(1))
                    .constant("A", !a_along_k as u32)
                    .constant("LOOSE", loose)
                    .run_tiles(t.group[0] * t.group[1], groups)
            }
            Shape::Strip(s, lanes) => {
                // With one row a lane there are no four rows to take at a time.
                let a = match (a_along_k, s.down) {
                    (true, _) => 0,
                    (false, 4) => 1,
                    (false, _) => 2,
                };
                launch
                    .constant("LANES", lanes)
                    .constant("DOWN", s.down)
                    .constant("COLUMNS", s.across)
                    .constant("A", a)
                    .run_tiles(lanes, groups)
            }
        }
    }
}
