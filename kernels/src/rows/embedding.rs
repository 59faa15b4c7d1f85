//! Rows picked out of a table, and added back into it; the table may be one shard of the vocabulary.

use super::lanes::{narrow_into, update, widen, widen_into};
use super::parallel::{Out, SMALL, for_columns, for_rows, part, part_mut};
use crate::Accum;
use crate::dtype::{Slice, SliceMut};
use crate::memory::with_scratch_f32;
use crate::simd::{Kernel, Simd, dispatch, isa};
use std::ops::Range;

/// `y[i] = table[ids[i] - first]` where the table has that row, else 0: shards of a vocabulary add up to the whole.
///
/// table: `[v, c]`, rows first..first + v of the vocabulary; ids: `[t]`; y: `[t, c]`. Panics on other lengths.
pub fn embedding(table: Slice, ids: &[u32], first: usize, y: SliceMut) {
    let c = y.len().checked_div(ids.len()).unwrap_or(0);
    assert_eq!(y.len(), ids.len() * c, "y is not [{}, c]", ids.len());
    if c == 0 {
        return;
    }
    assert_eq!(table.len() % c, 0, "the table is not [v, {c}]");
    let isa = isa();
    for_rows(ids.len(), c, Out { data: y, width: c }, |range, y| {
        with_scratch_f32(c, |scratch| {
            dispatch(
                isa,
                Pick {
                    c,
                    table,
                    ids: &ids[range],
                    first,
                    y: y.data,
                    scratch,
                },
            );
        });
    });
}

struct Pick<'a> {
    c: usize,
    table: Slice<'a>,
    ids: &'a [u32],
    first: usize,
    y: SliceMut<'a>,
    scratch: &'a mut [f32],
}

impl Kernel for Pick<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let c = self.c;
        let rows = self.table.len() / c;
        for (i, &id) in self.ids.iter().enumerate() {
            let to = part_mut(&mut self.y, i * c..(i + 1) * c);
            let row = (id as usize).wrapping_sub(self.first);
            let row = (row < rows).then(|| part(self.table, row * c..(row + 1) * c));
            match (row, to) {
                (Some(row), SliceMut::F32(to)) => widen_into(s, row, to),
                (Some(row), to) => {
                    let row = widen(s, row, 0..c, self.scratch);
                    narrow_into(s, row, to);
                }
                (None, SliceMut::F32(to)) => to.fill(0.0),
                (None, to) => {
                    self.scratch.fill(0.0);
                    narrow_into(s, self.scratch, to);
                }
            }
        }
    }
}

/// `dtable[ids[i] - first] (+)= dy[i]` where the table has that row: each row is one chain over its tokens, ascending.
///
/// dy: [t, c]; dtable: [v, c]; rows without a token become 0 under `Accum::Replace`. Panics on other lengths.
pub fn embedding_backward(dy: Slice, ids: &[u32], first: usize, dtable: &mut [f32], accum: Accum) {
    let c = dy.len().checked_div(ids.len()).unwrap_or(0);
    assert_eq!(dy.len(), ids.len() * c, "dy is not [{}, c]", ids.len());
    if c == 0 {
        if accum == Accum::Replace {
            dtable.fill(0.0);
        }
        return;
    }
    assert_eq!(dtable.len() % c, 0, "the table is not [v, {c}]");
    let isa = isa();
    let rows = dtable.len() / c;
    // Every task reads all ids and adds those of its own rows: ids are few bytes, and no row needs a lock.
    let tasks = if dy.len() + dtable.len() <= SMALL {
        1
    } else {
        4 * rayon::current_num_threads()
    };
    let out = Out {
        data: SliceMut::F32(dtable),
        width: c,
    };
    for_columns(rows, rows.div_ceil(tasks).max(1), out, |rows, out| {
        with_scratch_f32(c, |scratch| {
            dispatch(
                isa,
                Scatter {
                    c,
                    dy,
                    ids,
                    rows: first + rows.start..first + rows.end,
                    dtable: out.data.typed::<f32>(),
                    accum,
                    scratch,
                },
            );
        });
    });
}

struct Scatter<'a> {
    c: usize,
    dy: Slice<'a>,
    ids: &'a [u32],
    rows: Range<usize>,
    dtable: &'a mut [f32],
    accum: Accum,
    scratch: &'a mut [f32],
}

impl Kernel for Scatter<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let c = self.c;
        if self.accum == Accum::Replace {
            self.dtable.fill(0.0);
        }
        for (i, &id) in self.ids.iter().enumerate() {
            if self.rows.contains(&(id as usize)) {
                let row = id as usize - self.rows.start;
                let dy = widen(s, self.dy, i * c..(i + 1) * c, self.scratch);
                update(
                    s,
                    [dy],
                    &mut self.dtable[row * c..(row + 1) * c],
                    #[inline(always)]
                    |[x], y| s.add(y, x),
                );
            }
        }
    }
}
