//! What a chip's tensors live in, with their count in bytes.

use super::copies::{Copied, Copies};
#[cfg(feature = "gpu")]
use super::mirrored::Mirrored;
use super::shadow::Shadow;
use super::{Block, Storage, Tensor};
use crate::cpu::memory::{Exceeded, Pool};
use crate::dtype::{Element, TensorType};
use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

impl From<Exceeded> for Error {
    fn from(e: Exceeded) -> Self {
        Error::new(ErrorKind::Memory, e.to_string())
    }
}

/// What one chip's tensors live in, with their count in bytes. Cloning shares it.
#[derive(Clone)]
pub struct Memory(pub(super) Arc<MemoryInner>);

pub(super) struct MemoryInner {
    place: Place,
    allocated: AtomicU64,
    freed: AtomicU64,
    peak: AtomicU64,
    recent_peak: AtomicU64,
    /// Copies through host memory that transfers between chips took.
    pub(super) copies: Copies,
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
        /// It stands for a graphics processor, whose copies through host memory are counted.
        mirrored: bool,
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
        if cfg!(any(test, debug_assertions)) {
            crate::cpu::memory::poison_memory();
        }
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
        Self::new(Place::Ghost {
            budget,
            mirrored: false,
        })
    }

    /// The same in place of a graphics processor's: what its tensors' contents would have to be copied through host memory is
    /// counted too.
    pub fn ghost_of_gpu(budget: Option<u64>) -> Self {
        Self::new(Place::Ghost {
            budget,
            mirrored: true,
        })
    }

    fn new(place: Place) -> Self {
        Memory(Arc::new(MemoryInner {
            place,
            allocated: AtomicU64::new(0),
            freed: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            recent_peak: AtomicU64::new(0),
            copies: Copies::default(),
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

    /// Copies through host memory that transfers between chips began since the last call of this function; none where contents are
    /// on the host anyway.
    pub(crate) fn take_copies(&self) -> Option<Vec<Copied>> {
        let mirrored = match &self.0.place {
            #[cfg(feature = "gpu")]
            Place::Gpu { .. } => true,
            Place::Ghost { mirrored, .. } => *mirrored,
            Place::Cpu(_) => false,
        };
        mirrored.then(|| self.0.copies.take())
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
            Place::Ghost { budget, mirrored } => {
                if let Some(budget) = *budget
                    && live + bytes > budget
                {
                    return Err(exceeded(budget));
                }
                let charge = Charge::new(self.clone(), bytes);
                Storage::Ghost(Arc::new(Shadow::new(charge, *mirrored)))
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
pub(super) struct Charge {
    pub(super) memory: Memory,
    pub(super) bytes: u64,
}

impl Charge {
    pub(super) fn new(memory: Memory, bytes: u64) -> Self {
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
