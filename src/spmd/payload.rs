//! Parts of tensors, and the contents of a message between threads: what the sender still holds, or a copy.

use crate::cpu::memory::Buffer;
use crate::tensor::Tensor;
use std::ops::Range;
use std::sync::Arc;

/// Some consecutive elements of a tensor.
#[derive(Clone)]
pub(super) struct Piece {
    pub tensor: Tensor,
    pub range: Range<usize>,
}

impl Piece {
    /// All of a tensor.
    pub(super) fn whole(tensor: &Tensor) -> Self {
        Piece {
            tensor: tensor.clone(),
            range: 0..tensor.elements(),
        }
    }

    /// Elements `range` of the piece.
    pub(super) fn part(&self, range: Range<usize>) -> Self {
        let start = self.range.start;
        Piece {
            tensor: self.tensor.clone(),
            range: start + range.start..start + range.end,
        }
    }

    /// The contents.
    pub(super) fn bytes(&self) -> &[u8] {
        let size = self.tensor.dtype().size();
        &self.tensor.bytes()[self.range.start * size..self.range.end * size]
    }
}

/// What travels.
pub(super) enum Payload {
    /// Parts of tensors that nobody writes while they travel, one behind the other.
    Shared(Vec<Piece>),
    /// A copy, which several messages may take along.
    Staged(Arc<Buffer>, usize),
}

impl Payload {
    /// How many parts there are.
    pub(super) fn parts(&self) -> usize {
        match self {
            Payload::Shared(parts) => parts.len(),
            Payload::Staged(..) => 1,
        }
    }

    /// The bytes of a part.
    pub(super) fn part(&self, number: usize) -> &[u8] {
        match self {
            Payload::Shared(parts) => parts[number].bytes(),
            Payload::Staged(buffer, len) => &buffer.as_bytes()[..*len],
        }
    }

    /// How many bytes a part has.
    pub(super) fn part_len(&self, number: usize) -> usize {
        match self {
            Payload::Shared(parts) => {
                let part = &parts[number];
                part.range.len() * part.tensor.dtype().size()
            }
            Payload::Staged(_, len) => *len,
        }
    }

    /// How many bytes it has in all.
    pub(super) fn len(&self) -> usize {
        (0..self.parts()).map(|number| self.part_len(number)).sum()
    }
}
