//! Rows of a table, picked by number.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Linear, Op, Saved, Site, letters_besides, misfit};
use crate::cpu::rows;
use crate::dtype::DType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y[i] = table[ids[i]]`: table [v, c], ids [..] in u32, y [.., c].
///
/// Letters: `vc,ab->abc`. A chip that holds rows `first..` of the table gives zero rows for the ids of others, so a
/// vocabulary split over chips gives a partial sum (Shoeybi et al. 2019). Backward: `dtable[ids[i]] += dy[i]` in ascending
/// order of i, in f32.
///
/// # Panics
/// If an id is not below v, the size of the whole table.
#[derive(Clone, Debug, Default)]
pub struct Embedding {
    /// Element type of y; that of the table if none.
    pub output: Option<DType>,
}

/// Panics on an id that names no row.
fn check_ids(ids: &[u32], v: usize) {
    if let Some(i) = ids.iter().position(|&id| id as usize >= v) {
        panic!(
            "embedding: id {} at position {i} is not below the vocabulary's {v}",
            ids[i]
        );
    }
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [table, ids]
                if table.rank() == 2 && table.dtype.is_float() && ids.dtype == DType::U32 =>
            {
                let mut shape = ids.shape.clone();
                shape.push(table.last());
                let dtype = self.output.unwrap_or(table.dtype);
                Ok(vec![TensorType::new(shape, dtype)])
            }
            _ => Err(misfit(
                "embedding",
                "a float table [v, c] and ids [..] in u32",
                inputs,
            )),
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let lead = letters_besides(inputs[1].rank(), "cv");
        Axes::new(&format!("vc,{lead}->{lead}c")).linear(Linear::Each)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        let y = &outputs[0];
        let read = (y.elements() * inputs[0].dtype.size()) as u64;
        Cost {
            flops: 0,
            bytes: read + inputs[1].bytes() + y.bytes(),
            scratch: 0,
        }
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let ids = inputs[1].slice().typed::<u32>();
        let (v, first) = (site.inputs[0].global[0], site.inputs[0].start[0]);
        check_ids(ids, v);
        rows::embedding(inputs[0].slice(), ids, first, outputs[0].slice_mut());
    }

    fn saves(&self) -> Saved {
        Saved::some_inputs(&[1])
    }

    fn differentiable(&self, i: usize) -> bool {
        i == 0
    }

    fn accumulates(&self, _: usize) -> bool {
        true
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        let dy = &outputs[0];
        Cost {
            flops: dy.elements() as u64,
            bytes: dy.bytes() + inputs[1].bytes() + 4 * inputs[0].elements() as u64,
            scratch: 0,
        }
    }

    fn backward(&self, site: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let ids = backward.input(1).slice().typed::<u32>();
        let first = site.inputs[0].start[0];
        if let Some(dtable) = backward.want(0) {
            dtable.in_f32(|out, accum| {
                rows::embedding_backward(dy.slice(), ids, first, out, accum);
            });
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let ids = inputs[1].slice().typed::<u32>();
        let (v, first) = (site.inputs[0].global[0], site.inputs[0].start[0]);
        check_ids(ids, v);
        let width = inputs[0].ty().last();
        let (table, ids) = (read(inputs[0]), read(inputs[1]));
        gpu::embedding(table, ids, first, width, write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        let ids = backward.input(1).slice().typed::<u32>();
        let first = site.inputs[0].start[0];
        if let Some(dtable) = backward.want(0) {
            let (dtable, add) = dtable.operand();
            gpu::embedding_backward(dy, ids, first, dtable, add);
        }
    }
}
