//! A chip's tensors: a shape, an element type, and storage that is real or a ghost.
//!
//! Tensors are row-major and contiguous. Storage is shared: cloning and reshaping a tensor costs nothing, writing wants
//! the only reference. Every allocation is rounded up to 64 bytes and counted by the chip's [`Memory`], in the same
//! program order whether the storage is real or a ghost, so that the peak of a ghost run is the peak of a real one.

mod copies;
mod memory;
#[cfg(feature = "gpu")]
mod mirrored;
mod shadow;

use crate::cpu::memory::Buffer;
pub use crate::dtype::TensorType;
use crate::dtype::{DType, Element, Slice, SliceMut};
pub(crate) use copies::Copied;
use memory::Charge;
pub use memory::{Memory, MemoryCount};
#[cfg(feature = "gpu")]
use mirrored::Mirrored;
use ndarray::{ArrayD, ArrayViewD, IxDyn};
use shadow::Shadow;
use std::fmt;
use std::sync::Arc;

struct Block {
    buffer: Buffer,
    charge: Charge,
}

/// Where contents are. A closed set: no type parameter runs through the crate for it.
#[derive(Clone)]
enum Storage {
    Cpu(Arc<Block>),
    #[cfg(feature = "gpu")]
    Gpu(Arc<Mirrored>),
    Ghost(Arc<Shadow>),
}

/// A contiguous row-major tensor on one chip. Clones share storage.
#[derive(Clone)]
pub struct Tensor {
    ty: TensorType,
    storage: Storage,
}

impl Tensor {
    /// Shape and element type.
    pub fn ty(&self) -> &TensorType {
        &self.ty
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.ty.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.ty.dtype
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.ty.elements()
    }

    /// True without contents.
    pub fn is_ghost(&self) -> bool {
        matches!(self.storage, Storage::Ghost(_))
    }

    /// True if no other tensor shares the storage.
    pub fn is_unique(&self) -> bool {
        match &self.storage {
            Storage::Cpu(block) => Arc::strong_count(block) == 1,
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => Arc::strong_count(block) == 1,
            Storage::Ghost(shadow) => Arc::strong_count(shadow) == 1,
        }
    }

    /// The same storage under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Vec<usize>>) -> Tensor {
        let ty = TensorType::new(shape, self.ty.dtype);
        assert_eq!(
            ty.elements(),
            self.elements(),
            "cannot view {} as {ty}: {} elements against {}",
            self.ty,
            self.elements(),
            ty.elements()
        );
        Tensor {
            ty,
            storage: self.storage.clone(),
        }
    }

    /// True if the contents live on a graphics processor.
    #[cfg(feature = "gpu")]
    pub fn is_on_gpu(&self) -> bool {
        matches!(self.storage, Storage::Gpu(_))
    }

    /// The tensor as kernels on a graphics processor read it; none if it lives elsewhere.
    #[cfg(feature = "gpu")]
    pub fn operand(&self) -> Option<crate::gpu::Operand> {
        let Storage::Gpu(block) = &self.storage else {
            return None;
        };
        self.upload();
        let (dtype, n) = (self.ty.dtype, self.elements());
        Some(block.operand(dtype, n))
    }

    /// The tensor as kernels on a graphics processor write it; none if it lives elsewhere. What is there stays until they
    /// write.
    ///
    /// # Panics
    /// If another tensor shares the storage.
    #[cfg(feature = "gpu")]
    pub fn operand_mut(&mut self) -> Option<crate::gpu::Operand> {
        self.upload();
        let Tensor { ty, storage } = self;
        let Storage::Gpu(block) = storage else {
            return None;
        };
        let block = Arc::get_mut(block)
            .unwrap_or_else(|| panic!("{ty} is shared and cannot be written in place"));
        block.overwrite();
        let (dtype, n) = (ty.dtype, ty.elements());
        Some(block.operand(dtype, n))
    }

    /// The elements. Those on a graphics processor are copied to the host, once until the device writes them again.
    ///
    /// # Panics
    /// On a ghost, which has none.
    pub fn slice(&self) -> Slice<'_> {
        match &self.storage {
            Storage::Cpu(block) => Slice::of_bytes(
                &block.buffer.as_bytes()[..self.ty.bytes() as usize],
                self.ty.dtype,
            ),
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => Slice::of_bytes(
                &block.host().as_bytes()[..self.ty.bytes() as usize],
                self.ty.dtype,
            ),
            Storage::Ghost(_) => panic!("{} is a ghost and has no contents", self.ty),
        }
    }

    /// The elements for writing.
    ///
    /// # Panics
    /// On a ghost, or if another tensor shares the storage.
    pub fn slice_mut(&mut self) -> SliceMut<'_> {
        let Tensor { ty, storage } = self;
        match storage {
            Storage::Cpu(block) => {
                let block = Arc::get_mut(block)
                    .unwrap_or_else(|| panic!("{ty} is shared and cannot be written in place"));
                SliceMut::of_bytes(
                    &mut block.buffer.as_bytes_mut()[..ty.bytes() as usize],
                    ty.dtype,
                )
            }
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => {
                let block = Arc::get_mut(block)
                    .unwrap_or_else(|| panic!("{ty} is shared and cannot be written in place"));
                SliceMut::of_bytes(
                    &mut block.host_mut().as_bytes_mut()[..ty.bytes() as usize],
                    ty.dtype,
                )
            }
            Storage::Ghost(_) => panic!("{ty} is a ghost and has no contents"),
        }
    }

    /// The elements as bytes.
    pub fn bytes(&self) -> &[u8] {
        match self.slice() {
            Slice::F32(s) => bytemuck::cast_slice(s),
            Slice::Bf16(s) => bytemuck::cast_slice(s),
            Slice::F16(s) => bytemuck::cast_slice(s),
            Slice::U32(s) => bytemuck::cast_slice(s),
        }
    }

    /// The elements as bytes, for writing.
    ///
    /// # Panics
    /// As [`Tensor::slice_mut`].
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self.slice_mut() {
            SliceMut::F32(s) => bytemuck::cast_slice_mut(s),
            SliceMut::Bf16(s) => bytemuck::cast_slice_mut(s),
            SliceMut::F16(s) => bytemuck::cast_slice_mut(s),
            SliceMut::U32(s) => bytemuck::cast_slice_mut(s),
        }
    }

    /// The tensor as an ndarray view, without a copy.
    ///
    /// # Panics
    /// If `T` is not the element type, or on a ghost.
    pub fn view<T: Element>(&self) -> ArrayViewD<'_, T> {
        ArrayViewD::from_shape(IxDyn(&self.ty.shape), self.slice().typed::<T>())
            .expect("a contiguous tensor has as many elements as its shape says")
    }

    /// The contents widened to f32 (indices become numbers), as an owned array.
    pub fn to_array(&self) -> ArrayD<f32> {
        let values: Vec<f32> = match self.slice() {
            Slice::F32(s) => s.to_vec(),
            Slice::Bf16(s) => s.iter().map(|x| x.to_f32()).collect(),
            Slice::F16(s) => s.iter().map(|x| x.to_f32()).collect(),
            Slice::U32(s) => s.iter().map(|&x| x as f32).collect(),
        };
        ArrayD::from_shape_vec(IxDyn(&self.ty.shape), values)
            .expect("a contiguous tensor has as many elements as its shape says")
    }

    /// Bytes charged for the storage, which may be larger than this view of it.
    pub fn charged_bytes(&self) -> u64 {
        match &self.storage {
            Storage::Cpu(block) => block.charge.bytes,
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => block.bytes(),
            Storage::Ghost(shadow) => shadow.bytes(),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ghost = if self.is_ghost() { " (ghost)" } else { "" };
        write!(f, "Tensor({}{ghost})", self.ty)
    }
}
