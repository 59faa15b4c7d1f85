//! Elements that go to other places: pieces of an axis, axes in another order, rows by their number.

use super::elementwise::fill;
use super::launch::{Launch, Operand, map, table};
use super::library as k;
use crate::dtype::DType;
use std::ops::Range;

/// Where a piece lies in a whole that is cut along an axis: blocks of `inner` elements, of which the piece has `width` from
/// `start` on.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) inner: usize,
    pub(crate) start: usize,
    pub(crate) width: usize,
}

impl Piece {
    fn of(self, launch: Launch) -> Launch {
        launch
            .number("width", self.width)
            .number("inner", self.inner)
            .number("start", self.start)
    }

    /// The piece out of the whole, or added to what is there.
    pub(crate) fn take(self, whole: Operand, piece: Operand, add: bool) {
        let (launch, n) = map(&k::TAKE, piece);
        let launch = launch.operand("x", whole).constant("ADD", add as u32);
        self.of(launch).run(n);
    }

    /// The whole from the piece, 0 elsewhere; or the piece added to the whole.
    pub(crate) fn put(self, piece: Operand, whole: Operand, add: bool) {
        let (launch, n) = map(&k::PUT, whole);
        let launch = launch.operand("x", piece).constant("ADD", add as u32);
        self.of(launch).run(n);
    }

    /// The piece into the whole, of which the rest is left as it is.
    pub(crate) fn place(self, piece: Operand, whole: Operand) {
        let n = piece.elements;
        let launch = Launch::new(&k::PLACE);
        let launch = launch.operand("x", piece).operand("y", whole);
        self.of(launch).run(n);
    }
}

/// Runs of memory that are copied one by one; a software adapter divides slowly, and more runs are many commands for a card.
const RUNS: usize = 256;

/// y = pieces `ranges` of the middle dimension of x, one behind the other: one of them, or all.
pub(crate) fn pieces(
    x: Operand,
    [outer, len, inner]: [usize; 3],
    ranges: &[Range<usize>],
    y: Operand,
) {
    let in_words = |elements: usize| (elements * x.dtype.size()).is_multiple_of(4);
    let aligned = |r: &Range<usize>| in_words(r.start * inner) && in_words(r.len() * inner);
    if outer * ranges.len() <= RUNS && in_words(len * inner) && ranges.iter().all(aligned) {
        return copy_pieces(&x, [outer, len, inner], ranges, &y);
    }
    if let [range] = ranges {
        let piece = Piece {
            inner: len * inner,
            start: range.start * inner,
            width: range.len() * inner,
        };
        return piece.take(x, y, false);
    }
    // As many bits as every other index of a shader has; the launch refuses more.
    let starts = ranges.iter().map(|r| r.start as u32);
    let starts: Vec<u32> = starts.chain([len as u32]).collect();
    let starts = table(&y.chip, DType::U32, &starts);
    let (launch, n) = map(&k::PACK, y);
    launch
        .operand("x", x)
        .operand("starts", starts)
        .number("each", outer * inner)
        .number("len", len)
        .number("inner", inner)
        .run(n);
}

fn copy_pieces(x: &Operand, [outer, len, inner]: [usize; 3], ranges: &[Range<usize>], y: &Operand) {
    let bytes = |elements: usize| (elements * x.dtype.size()) as u64;
    y.chip.note("pieces");
    y.chip.record(|encoder, _| {
        let mut at = 0;
        for range in ranges.iter().filter(|r| r.len() * inner > 0) {
            let run = bytes(range.len() * inner);
            for o in 0..outer {
                let from = bytes((o * len + range.start) * inner);
                let (x, y) = (x.buffer.seen(), y.buffer.seen());
                encoder.copy_buffer_to_buffer(x, from, y, at, run);
                at += run;
            }
        }
    });
}

/// y = operands of 32-bit elements, one behind the other.
///
/// # Panics
/// If elements are narrower: copies count in words.
pub(crate) fn in_a_row(parts: &[Operand], y: Operand) {
    let chip = y.chip.clone();
    let mut at = 0;
    for part in parts {
        assert_eq!((part.dtype.size(), y.dtype.size()), (4, 4), "{part:?}");
        let bytes = 4 * part.elements as u64;
        chip.copy(&part.buffer, &y.buffer, at, bytes);
        at += bytes;
    }
}

/// y of `shape` = x with strides `from`, in elements.
///
/// # Panics
/// For more than six axes.
pub(crate) fn transpose(x: Operand, from: &[usize], y: Operand, shape: &[usize]) {
    assert!(
        shape.len() <= 6,
        "a GPU transposes up to six axes, got {shape:?}; reshape neighbours into one"
    );
    let missing = 6 - shape.len();
    let (mut launch, n) = map(&k::TRANSPOSE, y);
    for axis in 0..6usize {
        let (size, stride) = match axis.checked_sub(missing) {
            Some(i) => (shape[i], from[i]),
            None => (1, 0),
        };
        if axis > 0 {
            launch = launch.number(&format!("s{axis}"), size);
        }
        launch = launch.number(&format!("f{axis}"), stride);
    }
    launch.operand("x", x).run(n);
}

pub(crate) fn embedding(table: Operand, ids: Operand, first: usize, width: usize, y: Operand) {
    let rows = table.elements.checked_div(width).unwrap_or(0);
    let (launch, n) = map(&k::EMBEDDING, y);
    launch
        .operand("table", table)
        .operand("ids", ids)
        .number("width", width)
        .number("first", first)
        .number("rows", rows)
        .run(n);
}

/// dtable (+)= rows of dy by id. The tokens of each row are listed on the host, which has the ids: no row searches them all,
/// and none needs an atomic sum.
pub(crate) fn embedding_backward(
    dy: Operand,
    ids: &[u32],
    first: usize,
    dtable: Operand,
    add: bool,
) {
    let width = dy.elements.checked_div(ids.len()).unwrap_or(0);
    let rows = dtable.elements.checked_div(width).unwrap_or(0);
    if rows == 0 {
        if !add {
            fill(0.0, None, dtable);
        }
        return;
    }
    let row = |id: u32| (id as usize).checked_sub(first).filter(|&r| r < rows);
    let mut begin = vec![0u32; rows + 1];
    ids.iter()
        .filter_map(|&id| row(id))
        .for_each(|r| begin[r + 1] += 1);
    for r in 0..rows {
        begin[r + 1] += begin[r];
    }
    let mut next = begin.clone();
    let mut order = vec![0u32; (begin[rows] as usize).max(1)];
    for (token, &id) in ids.iter().enumerate() {
        if let Some(r) = row(id) {
            order[next[r] as usize] = token as u32;
            next[r] += 1;
        }
    }
    let order = table(&dy.chip, DType::U32, &order);
    let begin = table(&dy.chip, DType::U32, &begin);
    let (launch, n) = map(&k::EMBEDDING_BACKWARD, dtable);
    launch
        .operand("dy", dy)
        .operand("order", order)
        .operand("begin", begin)
        .number("width", width)
        .constant("ADD", add as u32)
        .run(n);
}
