//! Which keys a query sees, and which blocks of keys need not be looked at.

use super::Geometry;
use super::tile::{BAND, LINE, pitch};
use crate::simd::Simd;
use std::ops::Range;

/// Rows of a tile of queries, and keys of a block. Part of the op, not of the machine: results follow the key block.
pub(super) const SIDE: usize = 64;

/// Distance between rows of a tile of scores [keys, query rows].
pub(super) const SCORES: usize = pitch(SIDE);

/// A tile of query rows: the rows of all query heads that share a key head, token by token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    pub(super) batch: usize,
    pub(super) kv_head: usize,
    /// First row; row r is token r / group of head kv_head group + r % group.
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// What a tile sees of a block of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    Nothing,
    Some,
    All,
}

impl Geometry<'_> {
    /// Query heads of a key head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Query rows of a key head.
    pub(super) fn rows(&self) -> usize {
        self.queries * self.group()
    }

    /// Keys that query t sees by position; both ends grow with t.
    pub(super) fn visible(&self, t: usize) -> Range<usize> {
        let position = self.offset + t;
        let end = match (self.causal, self.window) {
            (true, _) => position + 1,
            (false, Some(w)) => position.saturating_add(w),
            (false, None) => self.keys,
        };
        let start = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        start.min(self.keys)..end.min(self.keys)
    }
}

impl Tile {
    /// Token and head of row r of the tile.
    #[inline(always)]
    pub(super) fn token(&self, g: &Geometry, r: usize) -> (usize, usize) {
        let (row, group) = (self.first + r, g.group());
        (row / group, self.kv_head * group + row % group)
    }

    fn tokens(&self, g: &Geometry) -> (usize, usize) {
        let group = g.group();
        (self.first / group, (self.first + self.rows - 1) / group)
    }

    /// Blocks of keys of which some query of the tile sees something by position.
    pub(super) fn blocks(&self, g: &Geometry) -> Range<usize> {
        let (first, last) = self.tokens(g);
        let (start, end) = (g.visible(first).start, g.visible(last).end);
        if start >= end {
            return 0..0;
        }
        start / SIDE..end.div_ceil(SIDE)
    }

    /// For each band of rows the end of the keys that its last row sees by position, counted from the block's first, in
    /// whole bands: a band of keys is computed for all of a band of rows or for none.
    pub(super) fn ends(&self, g: &Geometry, keys: &Range<usize>) -> [usize; SIDE / BAND] {
        std::array::from_fn(|band| {
            let last = (band * BAND + BAND - 1).min(self.rows - 1);
            let end = g.visible(self.token(g, last).0).end;
            let seen = end.clamp(keys.start, keys.end) - keys.start;
            seen.next_multiple_of(BAND).min(keys.len())
        })
    }

    /// What the tile sees of `keys`.
    pub(super) fn sight(&self, g: &Geometry, keys: &Range<usize>) -> Sight {
        let (first, last) = self.tokens(g);
        let (early, late) = (g.visible(first), g.visible(last));
        if keys.end <= early.start || keys.start >= late.end {
            return Sight::Nothing;
        }
        let mut all = late.start <= keys.start && early.end >= keys.end;
        if let Some((queries, ids)) = g.documents {
            let q = &queries[self.batch * g.queries..][first..=last];
            let k = &ids[self.batch * g.keys..][keys.clone()];
            let bounds = |x: &[u32]| {
                x.iter()
                    .fold((u32::MAX, 0), |(lo, hi), &x| (lo.min(x), hi.max(x)))
            };
            let ((q_low, q_high), (k_low, k_high)) = (bounds(q), bounds(k));
            if q_high < k_low || k_high < q_low {
                return Sight::Nothing;
            }
            all &= q_low == q_high && k_low == k_high;
        }
        if all { Sight::All } else { Sight::Some }
    }

    /// Whether row r sees a key.
    pub(super) fn sees(&self, g: &Geometry, r: usize, key: usize) -> bool {
        let t = self.token(g, r).0;
        let same = |(queries, keys): (&[u32], &[u32])| {
            queries[self.batch * g.queries + t] == keys[self.batch * g.keys + key]
        };
        g.visible(t).contains(&key) && g.documents.is_none_or(same)
    }

    /// Writes minus infinity to the scores [keys, rows] of hidden pairs.
    #[inline(always)]
    pub(super) fn hide<S: Simd>(
        &self,
        s: S,
        g: &Geometry,
        keys: &Range<usize>,
        scores: &mut [f32],
    ) {
        // First and end of each row's keys, counted from the block's first: small, hence exact in f32.
        let (mut from, mut to) = ([0f32; SIDE], [0f32; SIDE]);
        let mut document = [0u32; SIDE];
        for r in 0..self.rows {
            let t = self.token(g, r).0;
            let v = g.visible(t);
            from[r] = v.start.clamp(keys.start, keys.end) as f32 - keys.start as f32;
            to[r] = v.end.clamp(keys.start, keys.end) as f32 - keys.start as f32;
            if let Some((queries, _)) = g.documents {
                document[r] = queries[self.batch * g.queries + t];
            }
        }
        let hidden = s.splat(f32::NEG_INFINITY);
        for j in 0..keys.len() {
            let row = &mut scores[j * SCORES..][..SIDE];
            let key = s.splat(j as f32);
            for at in (0..self.rows.next_multiple_of(LINE)).step_by(S::LANES) {
                let seen = s.mask_and(s.le(s.load(&from[at..]), key), s.lt(key, s.load(&to[at..])));
                let x = s.select(seen, s.load(&row[at..]), hidden);
                s.store(&mut row[at..], x);
            }
            if let Some((_, ids)) = g.documents {
                let id = ids[self.batch * g.keys + keys.start + j];
                for (x, &d) in row.iter_mut().zip(&document) {
                    *x = if d == id { *x } else { f32::NEG_INFINITY };
                }
            }
        }
    }
}
