//! What the next tiles will read, asked for while the ones before them are computed.
//!
//! Rows of a block begin anew in memory every few hundred elements, too often for the hardware to follow. On a Zen 5 (a second
//! cache of 1 MiB) packing B took 5 % of 512x768x3072, most of it waiting. Asked for in small parts beside all tiles of the strip
//! before it, about four lines in a thousand cycles, products gain 1 to 3 % (in the last two fifths of that strip: as much). A, beside
//! the panel before it, gains up to 2 %.

use super::super::simd::Ask;
use super::blocks::PIECE;
use super::pack::Block;

/// A block of an operand, asked for in small parts: pieces of a line, or lines of a piece.
pub(super) struct Wanted {
    at: *const u8,
    /// How many, and bytes from one to the next.
    outer: (usize, usize),
    /// Of each of these.
    inner: (usize, usize),
    next: (usize, usize),
    /// How many at a time.
    part: usize,
}

impl Wanted {
    pub(super) const NOTHING: Wanted = Wanted {
        at: std::ptr::null(),
        outer: (0, 0),
        inner: (0, 0),
        next: (0, 0),
        part: 0,
    };

    /// Line after line, each at once; nothing of a block whose elements are scattered.
    pub(super) fn line_by_line(block: Block) -> Self {
        let size = block.dtype.size();
        let (lines, elements, stride) = if block.depth_stride == 1 {
            (block.lines, block.depth, block.line_stride)
        } else if block.line_stride == 1 {
            (block.depth, block.lines, block.depth_stride)
        } else {
            return Wanted::NOTHING;
        };
        let pieces = (elements * size).div_ceil(PIECE);
        Wanted {
            at: block.data,
            outer: (lines, stride * size),
            inner: (pieces, PIECE),
            next: (0, 0),
            part: pieces,
        }
    }

    /// The first piece of all lines, then their second ones, in about `times` parts: as parts of lines they would be short.
    pub(super) fn piece_by_piece(block: Block, times: usize) -> Self {
        let lines = Wanted::line_by_line(block);
        Wanted {
            outer: lines.inner,
            inner: lines.outer,
            part: (lines.outer.0 * lines.inner.0).div_ceil(times.max(1)),
            ..lines
        }
    }

    /// The next part.
    #[inline(always)]
    pub(super) fn part(&mut self) -> Ask {
        if self.next.1 >= self.inner.0 {
            self.next = (self.next.0 + 1, 0);
        }
        let (i, j) = self.next;
        if i >= self.outer.0 {
            return Ask::NOTHING;
        }
        let turns = self.part.min(self.inner.0 - j);
        self.next.1 += turns;
        Ask {
            at: self.at.wrapping_add(i * self.outer.1 + j * self.inner.1),
            step: self.inner.1,
            turns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn each_piece_is_asked_for_once() {
        // Lines of 600 bytes, 1 KiB apart: five pieces each.
        let block = Block {
            data: std::ptr::null(),
            dtype: DType::F32,
            lines: 7,
            depth: 150,
            line_stride: 256,
            depth_stride: 1,
        };
        let turned = Block {
            lines: 150,
            depth: 7,
            line_stride: 1,
            depth_stride: 256,
            ..block
        };
        let want: Vec<usize> = (0..7)
            .flat_map(|line| (0..5).map(move |piece| line * 1024 + piece * PIECE))
            .collect();
        let all = |mut wanted: Wanted, most: usize| {
            let mut got = Vec::new();
            loop {
                let ask = wanted.part();
                assert!(ask.turns <= most, "{ask:?}");
                got.extend((0..ask.turns).map(|turn| ask.at as usize + turn * ask.step));
                if ask.turns == 0 {
                    return got;
                }
            }
        };
        for block in [block, turned] {
            assert_eq!(all(Wanted::line_by_line(block), 5), want);
            for times in [1, 2, 12, 40] {
                let most = 35usize.div_ceil(times);
                let mut got = all(Wanted::piece_by_piece(block, times), most);
                got.sort();
                assert_eq!(got, want, "{times} times");
            }
        }
        let scattered = Block {
            depth_stride: 2,
            ..block
        };
        assert_eq!(Wanted::line_by_line(scattered).part().turns, 0);
    }
}
