//! Matrix products and attention on a chip.

use super::launch::{Launch, Operand};
use super::library as k;

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

/// What follows a product.
#[derive(Default)]
pub(crate) struct After {
    pub(crate) bias: Option<Operand>,
    /// f by its number in the prelude.
    pub(crate) activation: Option<u32>,
    pub(crate) preactivation: Option<Operand>,
}

/// c (+)= f(a b + bias) for `batch` products of [m, k] by [k, n]; c is [batch, m, n].
pub(crate) fn matmul(
    batch: usize,
    [m, n, k]: [usize; 3],
    a: Matrix,
    b: Matrix,
    c: Operand,
    add: bool,
    after: After,
) {
    let shape = Shape::of(&c);
    let tile = [
        (shape.group[0] * shape.each[0]) as usize,
        (shape.group[1] * shape.each[1]) as usize,
    ];
    Launch::new(&k::MATMUL)
        .operand("a", a.data)
        .operand("b", b.data)
        .optional("bias", after.bias)
        .operand("c", c)
        .optional("z", after.preactivation)
        .number("m", m)
        .number("n", n)
        .number("k", k)
        .number("a_row", a.row)
        .number("a_column", a.column)
        .number("a_batch", a.batch)
        .number("b_row", b.row)
        .number("b_column", b.column)
        .number("b_batch", b.batch)
        .constant("ADD", add as u32)
        .constant("FUNCTION", after.activation.unwrap_or(IDENTITY))
        .constant("ROWS", shape.each[0])
        .constant("COLUMNS", shape.each[1])
        .constant("WG_Y", shape.group[0])
        .constant("WG_X", shape.group[1])
        .run_tiles(
            shape.group[0] * shape.group[1],
            [n.div_ceil(tile[1]), m.div_ceil(tile[0]), batch],
        );
}

/// How a product is cut up: rows and columns of invocations in a group, and of sums in an invocation.
struct Shape {
    group: [u32; 2],
    each: [u32; 2],
}

impl Shape {
    fn of(_: &Operand) -> Self {
        Shape {
            group: [8, 8],
            each: [4, 4],
        }
    }
}

/// What attends to what; see the CPU's.
#[derive(Clone)]
pub(crate) struct Heads {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    pub(crate) soft_cap: Option<f32>,
    pub(crate) causal: bool,
    pub(crate) window: Option<usize>,
    pub(crate) offset: usize,
    /// Documents of queries and keys.
    pub(crate) documents: Option<[Operand; 2]>,
}

impl Heads {
    fn of(&self, launch: Launch) -> Launch {
        // Positions are 32-bit in WGSL; a window beyond every position hides nothing that its ends do not.
        let window = self.window.map(|w| w.min(1 << 30));
        let [of_queries, of_keys] = match &self.documents {
            Some([q, k]) => [Some(q.clone()), Some(k.clone())],
            None => [None, None],
        };
        launch
            .optional("of_queries", of_queries)
            .optional("of_keys", of_keys)
            .number("heads", self.heads)
            .number("kv_heads", self.kv_heads)
            .number("queries", self.queries)
            .number("keys", self.keys)
            .number("offset", self.offset.min(1 << 30))
            .number("window", window.unwrap_or(0))
            .number("scale", self.scale)
            .number("cap", self.soft_cap.unwrap_or(0.0))
            .constant("D", self.head_dim as u32)
            .constant("CAUSAL", self.causal as u32)
            .constant("WINDOW", window.is_some() as u32)
            .constant("CAP", self.soft_cap.is_some() as u32)
    }
}

pub(crate) fn attention(g: &Heads, [q, k, v]: [Operand; 3], o: Operand, lse: Operand) {
    let rows = g.batch * g.heads * g.queries;
    let launch = Launch::new(&k::ATTENTION).operand("q", q).operand("k", k);
    let launch = launch.operand("v", v).operand("o", o).operand("lse", lse);
    g.of(launch).run(rows);
}

/// The wanted gradients of [`attention`], from its o and lse.
pub(crate) fn attention_backward(
    g: &Heads,
    [q, k, v]: [Operand; 3],
    [o, dout, lse]: [Operand; 3],
    [dq, dk, dv]: [Option<Operand>; 3],
) {
    let rows = g.batch * g.heads * g.queries;
    let delta = q.scratch(rows);
    Launch::new(&k::ATTENTION_DELTA)
        .operand("delta", delta.clone())
        .operand("o", o)
        .operand("dout", dout.clone())
        .number("heads", g.heads)
        .number("queries", g.queries)
        .number("head_dim", g.head_dim)
        .run(rows);
    let read = |kernel: &super::Kernel| {
        Launch::new(kernel)
            .operand("q", q.clone())
            .operand("k", k.clone())
            .operand("v", v.clone())
            .operand("dout", dout.clone())
            .operand("lse", lse.clone())
            .operand("delta", delta.clone())
    };
    if let Some(dq) = dq {
        g.of(read(&k::ATTENTION_DQ).operand("dq", dq)).run(rows);
    }
    if dk.is_some() || dv.is_some() {
        let launch = read(&k::ATTENTION_DKV)
            .optional("dk", dk)
            .optional("dv", dv);
        g.of(launch).run(g.batch * g.kv_heads * g.keys);
    }
}
