//! Moves between some chips of an axis: tokens for heads among neighbours (Jacobs et al. 2023, arXiv:2309.14509), and one
//! place around the ring.

use super::Shares;
use crate::collective::{Counts, Kind, Reduce};
use crate::dtype::{DType, TensorType};
use crate::mesh::Group;
use crate::placement::split;
use crate::spmd::Chip;
use crate::spmd::cut::Cut;
use crate::spmd::redistribute::Request;
use crate::spmd::started::Passing;
use crate::tensor::Tensor;
use std::ops::Range;

impl Shares {
    fn request(
        &self,
        chip: &Chip,
        group: Group,
        (kind, counts): (Kind, Counts),
        result: TensorType,
        packed: u64,
    ) -> Request {
        Request {
            kind,
            algorithm: chip.algorithm(),
            reduce: Reduce::Sum,
            axis: self.axis,
            group: Some(group),
            counts,
            result,
            before: self.placements.clone(),
            after: self.placements.clone(),
            packed,
            site: self.site,
        }
    }

    /// Tokens of the whole sequence that member `i` of the block of neighbours holds.
    fn tokens_of_neighbour(&self, i: usize) -> usize {
        let chips = self.across.size() * self.block.size();
        let first = self.across.index() * self.block.size();
        split(self.tokens, chips, first + i).len()
    }

    /// [b, n, h, d] of the chip's tokens as [b, N, h / u, d]: all tokens of the block's chips, some heads.
    pub(super) fn to_heads(&self, chip: &Chip, x: Tensor) -> Tensor {
        let u = self.block.size();
        if u == 1 {
            return x;
        }
        let [b, _, h, d] = x.shape()[..] else {
            unreachable!("attention checked that its operands have four axes")
        };
        let tokens: Vec<usize> = (0..u).map(|i| self.tokens_of_neighbour(i)).collect();
        let result = TensorType::new([b, tokens.iter().sum(), h / u, d], x.dtype());
        let counts = Counts::Product {
            rows: tokens.iter().map(|n| n * b * d).collect(),
            columns: vec![h / u; u],
        };
        self.all_to_all(chip, x, (2, &vec![h / u; u]), (1, &tokens), counts, result)
    }

    /// [b, N, h / u, d] as [b, n, h, d] again: the chip's tokens, all heads.
    pub(super) fn to_tokens(&self, chip: &Chip, x: Tensor) -> Tensor {
        let u = self.block.size();
        if u == 1 {
            return x;
        }
        let [b, _, h, d] = x.shape()[..] else {
            unreachable!("attention checked that its operands have four axes")
        };
        let tokens: Vec<usize> = (0..u).map(|i| self.tokens_of_neighbour(i)).collect();
        let result = TensorType::new([b, tokens[self.block.index()], h * u, d], x.dtype());
        let counts = Counts::Product {
            rows: vec![h * b * d; u],
            columns: tokens.clone(),
        };
        self.all_to_all(chip, x, (1, &tokens), (2, &vec![h; u]), counts, result)
    }

    fn all_to_all(
        &self,
        chip: &Chip,
        x: Tensor,
        (cut, pieces): (usize, &[usize]),
        (joined, parts): (usize, &[usize]),
        counts: Counts,
        result: TensorType,
    ) -> Tensor {
        let packed = if Cut::of(x.ty(), cut).outer() == 1 {
            x.clone()
        } else {
            let mut packed = chip.allocate(x.ty());
            Cut::of(x.ty(), cut).pack(&x, &ranges(pieces), &mut packed);
            packed
        };
        let moves = Cut::of(&result, joined).outer() > 1;
        let copied = |yes: bool| if yes { 2 * x.ty().bytes() } else { 0 };
        let bytes = copied(Cut::of(x.ty(), cut).outer() > 1) + copied(moves);
        drop(x);
        let what = (Kind::AllToAll, counts);
        let request = self.request(chip, self.block, what, result.clone(), bytes);
        let arrived = chip.collective(&packed, &request);
        drop(packed);
        self.join(chip, arrived, joined, parts, &result)
    }

    /// Document numbers [b, n] of the block's chips, as [b, N].
    pub(super) fn documents_of_block(&self, chip: &Chip, x: Tensor) -> Tensor {
        let u = self.block.size();
        if u == 1 {
            return x;
        }
        let tokens: Vec<usize> = (0..u).map(|i| self.tokens_of_neighbour(i)).collect();
        let b = x.shape()[0];
        let result = TensorType::new([b, tokens.iter().sum()], x.dtype());
        let counts = Counts::Each(tokens.iter().map(|n| n * b).collect());
        let bytes = if b > 1 { 2 * result.bytes() } else { 0 };
        let what = (Kind::AllGather, counts);
        let request = self.request(chip, self.block, what, result.clone(), bytes);
        let arrived = chip.collective(&x, &request);
        self.join(chip, arrived, 1, &tokens, &result)
    }

    /// Pieces that lie one behind the other as the tensor whose dimension `dim` they cut.
    fn join(
        &self,
        chip: &Chip,
        arrived: Tensor,
        dim: usize,
        parts: &[usize],
        result: &TensorType,
    ) -> Tensor {
        let cut = Cut::of(result, dim);
        if cut.outer() == 1 {
            return arrived;
        }
        let mut tensor = chip.allocate(result);
        cut.unpack(&arrived, &ranges(parts), &mut tensor);
        tensor
    }

    /// Starts to pass on what belongs to the keys of ring member `source`, of which this chip holds `x`: it gets what belongs
    /// to the member before.
    pub(super) fn pass_on(&self, chip: &Chip, x: Tensor, source: usize) -> Passing {
        let ring = self.across.size();
        // Where this chip has `source`, the chip `i` places further has the source `i` places further.
        let at = |chip: usize| (source + chip + ring - self.across.index()) % ring;
        let others = x.shape().iter().enumerate().filter(|&(dim, _)| dim != 1);
        let rest: usize = others.map(|(_, n)| n).product();
        let counts = (0..ring).map(|c| self.ring_tokens(at(c)).len() * rest);
        let mut shape = x.shape().to_vec();
        shape[1] = self.ring_tokens((source + ring - 1) % ring).len();
        let result = TensorType::new(shape, x.dtype());
        let what = (Kind::Shift, Counts::Each(counts.collect()));
        let request = self.request(chip, self.across, what, result, 0);
        chip.start_collective(x, request)
    }
}

/// Consecutive ranges of these lengths.
fn ranges(lengths: &[usize]) -> Vec<Range<usize>> {
    let consecutive = lengths.iter().scan(0, |end, len| {
        let start = *end;
        *end += len;
        Some(start..*end)
    });
    consecutive.collect()
}

impl Shares {
    /// The type in which gradients of the keys of ring member `source` add up, like keys `like`.
    pub(super) fn gradient_of(&self, like: &TensorType, source: usize) -> TensorType {
        let mut shape = like.shape.clone();
        shape[1] = self.ring_tokens(source).len();
        TensorType::new(shape, DType::F32)
    }
}
