//! One token of each sequence.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Cost, Op, Site, misfit};
#[cfg(feature = "gpu")]
use crate::dtype::DType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};
use std::sync::Arc;

/// `y[b, 0] = x[b, tokens[b]]`: one token of each sequence of x [b, t, c], as [b, 1, c]. Any element type.
///
/// Decoding has logits of nothing but the last token of each sequence. Letters: `bTc->bUc`; no backward.
#[derive(Clone, Debug)]
pub struct PickToken {
    /// Which token of each sequence of the whole tensor, \[b\].
    pub tokens: Arc<[usize]>,
}

impl Op for PickToken {
    fn name(&self) -> &'static str {
        "pick token"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = inputs else {
            return Err(misfit("pick token", "one operand [b, t, c]", inputs));
        };
        let fits = x.rank() == 3
            && x.shape[0] == self.tokens.len()
            && self.tokens.iter().all(|&t| t < x.shape[1]);
        if !fits {
            let wants = format!("[b, t, c] of which tokens {:?} are taken", self.tokens);
            return Err(misfit("pick token", wants, inputs));
        }
        let shape = [x.shape[0], 1, x.shape[2]];
        Ok(vec![TensorType::new(shape, x.dtype)])
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("bTc->bUc")
    }

    fn cost(&self, _: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost {
            flops: 0,
            bytes: 2 * outputs[0].bytes(),
            scratch: 0,
        }
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let x = inputs[0];
        let row = x.ty().last() * x.dtype().size();
        let (tokens, first) = (x.shape()[1], site.inputs[0].start[0]);
        let from = x.bytes();
        let to = outputs[0].bytes_mut().chunks_exact_mut(row.max(1));
        for (b, to) in to.enumerate() {
            let at = (b * tokens + self.tokens[first + b]) * row;
            to.copy_from_slice(&from[at..at + row]);
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let (b, t) = (inputs[0].shape()[0], inputs[0].shape()[1]);
        let first = site.inputs[0].start[0];
        let mine = self.tokens[first..first + b].iter().enumerate();
        // The rows among all tokens of all sequences, of which a tensor has fewer than 2^32.
        let rows: Vec<u32> = mine.map(|(b, token)| (b * t + token) as u32).collect();
        let (x, y) = (read(inputs[0]), write(&mut outputs[0]));
        let rows = gpu::table(&y.chip, DType::U32, &rows);
        gpu::embedding(x, rows, 0, inputs[0].ty().last(), y);
    }
}
