//! A chip's tensors: a shape, an element type, and storage that is real or a ghost.
//!
//! Tensors are row-major and contiguous. Storage is shared: cloning and reshaping a tensor costs nothing, writing wants
//! the only reference. Every allocation is rounded up to 64 bytes and counted by the chip's [`Memory`], in the same
//! program order whether the storage is real or a ghost, so that the peak of a ghost run is the peak of a real one.

#[cfg(feature = "gpu")]
mod mirrored;

use crate::cpu::memory::{Buffer, Pool};
pub use crate::dtype::TensorType;
use crate::dtype::{DType, Element, Slice, SliceMut};
use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "gpu")]
use mirrored::Mirrored;
use ndarray::{ArrayD, ArrayViewD, IxDyn};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What one chip's tensors live in, with their count in bytes. Cloning shares it.
#[derive(Clone)]
pub struct Memory(Arc<MemoryInner>);

struct MemoryInner {
    place: Place,
    allocated: AtomicU64,
    freed: AtomicU64,
    peak: AtomicU64,
    recent_peak: AtomicU64,
    to_host: AtomicU64,
    to_device: AtomicU64,
}

enum Place {
    Cpu(Pool),
    #[cfg(feature = "gpu")]
    Gpu {
        chip: crate::gpu::Chip,
        /// Copies of contents on the host.
        mirrors: Pool,
        budget: Option<u64>,
    },
    Ghost {
        budget: Option<u64>,
    },
}

/// Bytes of tensors since the memory was made, and their highest sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryCount {
    /// Bytes allocated so far.
    pub allocated: u64,
    /// Bytes freed so far.
    pub freed: u64,
    /// Highest difference between the two.
    pub peak: u64,
}

impl Memory {
    /// Memory of this machine, pooled; at most `budget` bytes of tensors at once.
    pub fn cpu(budget: Option<u64>) -> Self {
        Self::new(Place::Cpu(Pool::new(budget)))
    }

    /// Memory of a chip on a graphics processor; at most `budget` bytes of tensors at once.
    #[cfg(feature = "gpu")]
    pub fn gpu(chip: crate::gpu::Chip, budget: Option<u64>) -> Self {
        Self::new(Place::Gpu {
            chip,
            mirrors: Pool::new(None),
            budget,
        })
    }

    /// The graphics processor's chip that tensors live on; none elsewhere.
    #[cfg(feature = "gpu")]
    pub fn gpu_chip(&self) -> Option<&crate::gpu::Chip> {
        match &self.0.place {
            Place::Gpu { chip, .. } => Some(chip),
            _ => None,
        }
    }

    /// Memory that counts and holds nothing.
    pub fn ghost(budget: Option<u64>) -> Self {
        Self::new(Place::Ghost { budget })
    }

    fn new(place: Place) -> Self {
        Memory(Arc::new(MemoryInner {
            place,
            allocated: AtomicU64::new(0),
            freed: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            recent_peak: AtomicU64::new(0),
            to_host: AtomicU64::new(0),
            to_device: AtomicU64::new(0),
        }))
    }

    /// True if tensors made here have no contents.
    pub fn is_ghost(&self) -> bool {
        matches!(self.0.place, Place::Ghost { .. })
    }

    /// Bytes allocated, freed, and their peak.
    pub fn count(&self) -> MemoryCount {
        MemoryCount {
            allocated: self.0.allocated.load(Relaxed),
            freed: self.0.freed.load(Relaxed),
            peak: self.0.peak.load(Relaxed),
        }
    }

    /// Highest number of live bytes since the last call of this function.
    pub(crate) fn take_recent_peak(&self) -> u64 {
        let count = self.count();
        self.0
            .recent_peak
            .swap(count.allocated - count.freed, Relaxed)
    }

    /// Bytes copied to the host and to the device for transfers between chips, since the last call of this function.
    pub(crate) fn take_copies(&self) -> [u64; 2] {
        [&self.0.to_host, &self.0.to_device].map(|count| count.swap(0, Relaxed))
    }

    /// The pool's own count of its peak, in bytes; none for a ghost.
    pub fn pool_peak(&self) -> Option<u64> {
        match &self.0.place {
            Place::Cpu(pool) => Some(pool.peak()),
            #[cfg(feature = "gpu")]
            Place::Gpu { chip, .. } => Some(chip.peak()),
            Place::Ghost { .. } => None,
        }
    }

    /// How many blocks the pool asked of the system so far; none for a ghost.
    pub fn fresh_allocations(&self) -> Option<u64> {
        match &self.0.place {
            Place::Cpu(pool) => Some(pool.fresh()),
            #[cfg(feature = "gpu")]
            Place::Gpu { chip, .. } => Some(chip.fresh()),
            Place::Ghost { .. } => None,
        }
    }

    /// A tensor whose contents are not yet written.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] if the budget would be exceeded (says bytes asked, live, and the budget), or a graphics
    /// processor cannot hold the tensor.
    pub fn allocate(&self, ty: &TensorType) -> Result<Tensor> {
        let bytes = ty.allocated_bytes();
        let live = {
            let count = self.count();
            count.allocated - count.freed
        };
        let exceeded = |budget: u64| {
            Error::new(
                ErrorKind::Memory,
                format!(
                    "{ty} needs {bytes} bytes, {live} bytes of tensors are live and the budget is {budget} bytes; \
                     use a smaller micro-batch, recompute blocks, or split over more chips"
                ),
            )
        };
        let storage = match &self.0.place {
            Place::Cpu(pool) => {
                let buffer = pool.take(bytes as usize).map_err(|e| exceeded(e.budget))?;
                Storage::Cpu(Arc::new(Block {
                    buffer,
                    charge: Charge::new(self.clone(), bytes),
                }))
            }
            #[cfg(feature = "gpu")]
            Place::Gpu {
                chip,
                mirrors,
                budget,
            } => {
                if let Some(budget) = *budget
                    && live + bytes > budget
                {
                    return Err(exceeded(budget));
                }
                let block = chip.allocate(bytes)?;
                let charge = Charge::new(self.clone(), bytes);
                Storage::Gpu(Arc::new(Mirrored::new(block, chip, mirrors, charge)))
            }
            Place::Ghost { budget } => {
                if let Some(budget) = *budget
                    && live + bytes > budget
                {
                    return Err(exceeded(budget));
                }
                Storage::Ghost(Arc::new(Charge::new(self.clone(), bytes)))
            }
        };
        Ok(Tensor {
            ty: ty.clone(),
            storage,
        })
    }

    /// A tensor with the given contents, row-major; a ghost takes the shape only.
    ///
    /// # Panics
    /// If the number of elements is not the shape's.
    pub fn tensor<T: Element>(&self, shape: &[usize], contents: &[T]) -> Result<Tensor> {
        let ty = TensorType::new(shape, T::DTYPE);
        assert_eq!(
            ty.elements(),
            contents.len(),
            "{ty} holds {} elements, {} were given",
            ty.elements(),
            contents.len()
        );
        let mut tensor = self.allocate(&ty)?;
        if !self.is_ghost() {
            tensor.slice_mut().typed::<T>().copy_from_slice(contents);
        }
        Ok(tensor)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match &self.0.place {
            Place::Cpu(_) => "cpu",
            #[cfg(feature = "gpu")]
            Place::Gpu { .. } => "gpu",
            Place::Ghost { .. } => "ghost",
        };
        write!(f, "Memory({name}, {:?})", self.count())
    }
}

/// Bytes charged to a memory until dropped.
struct Charge {
    memory: Memory,
    bytes: u64,
}

impl Charge {
    fn new(memory: Memory, bytes: u64) -> Self {
        let m = &memory.0;
        let live = m.allocated.fetch_add(bytes, Relaxed) + bytes - m.freed.load(Relaxed);
        m.peak.fetch_max(live, Relaxed);
        m.recent_peak.fetch_max(live, Relaxed);
        Charge { memory, bytes }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.memory.0.freed.fetch_add(self.bytes, Relaxed);
    }
}

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
    Ghost(Arc<Charge>),
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
            Storage::Ghost(charge) => Arc::strong_count(charge) == 1,
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

    /// Starts to copy contents on a graphics processor to the host, behind what was recorded so far and ahead of what comes: for
    /// whoever sends them. Contents elsewhere are where they are read.
    pub(crate) fn start_download(&self) {
        #[cfg(feature = "gpu")]
        if let Storage::Gpu(block) = &self.storage
            && block.start_download()
        {
            block.count().to_host.fetch_add(self.ty.bytes(), Relaxed);
        }
    }

    /// Notes that the contents, which are on the host, came from another chip.
    pub(crate) fn has_arrived(&self) {
        #[cfg(feature = "gpu")]
        if let Storage::Gpu(block) = &self.storage {
            block.has_arrived(self.ty.bytes());
        }
    }

    /// The tensor as kernels on a graphics processor read it; none if it lives elsewhere.
    #[cfg(feature = "gpu")]
    pub fn operand(&self) -> Option<crate::gpu::Operand> {
        let Storage::Gpu(block) = &self.storage else {
            return None;
        };
        block.upload();
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
            Storage::Ghost(charge) => charge.bytes,
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ghost = if self.is_ghost() { " (ghost)" } else { "" };
        write!(f, "Tensor({}{ghost})", self.ty)
    }
}
