//! A batch's numbers in the order in which chips keep tokens.

use crate::dtype::DType;
use crate::dtype::TensorType;
use crate::ops::Local;
use crate::placement::TokenOrder;
use crate::spmd::Contents;
use crate::tensor::{Memory, Tensor};

/// Contents [b, t, ..] given in the order of the text, of which a chip takes the tokens that it keeps (see [`TokenOrder`]).
pub struct InOrder<'a, C: ?Sized>(pub &'a C, pub TokenOrder);

impl<C: Contents + ?Sized> Contents for InOrder<'_, C> {
    fn dtype(&self) -> DType {
        self.0.dtype()
    }

    fn copy_share(&self, local: &Local, to: &mut Tensor) -> Result<(), String> {
        let TokenOrder::ZigZag { .. } = self.1 else {
            return self.0.copy_share(local, to);
        };
        let held = local.ty.shape[1];
        let rest: usize = local.ty.shape[2..].iter().product();
        let line = rest * local.ty.dtype.size();
        // Of the host, and of nobody's budget: it lives for one copy.
        let memory = Memory::cpu(None);
        let mut first = 0;
        for run in self.1.runs(local.start[1]..local.start[1] + held) {
            let (mut shape, mut start) = (local.ty.shape.clone(), local.start.clone());
            (shape[1], start[1]) = (run.len, run.position);
            let part = Local {
                ty: TensorType::new(shape, local.ty.dtype),
                start,
                global: local.global.clone(),
            };
            let mut piece = memory.allocate(&part.ty).map_err(|e| e.to_string())?;
            self.0.copy_share(&part, &mut piece)?;
            let bytes = to.bytes_mut();
            for (b, row) in piece
                .bytes()
                .chunks_exact((run.len * line).max(1))
                .enumerate()
            {
                let at = (b * held + first) * line;
                bytes[at..at + row.len()].copy_from_slice(row);
            }
            first += run.len;
        }
        Ok(())
    }
}
