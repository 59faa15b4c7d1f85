//! What transfers between chips copy through host memory: counted in one way where tensors are on a graphics processor and in a
//! ghost of one.

#[cfg(feature = "gpu")]
use super::mirrored;
use super::{Storage, Tensor};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A copy that began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copied {
    /// Which of the memory's copies it is, from 0 on.
    pub(crate) number: u64,
    /// To the host, or else to the device.
    pub(crate) to_host: bool,
    pub(crate) bytes: u64,
}

/// The copies of a memory.
#[derive(Default)]
pub(super) struct Copies(Mutex<(u64, Vec<Copied>)>);

impl Copies {
    fn lock(&self) -> MutexGuard<'_, (u64, Vec<Copied>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a copy, and gives its number.
    fn begin(&self, to_host: bool, bytes: u64) -> u64 {
        let (next, begun) = &mut *self.lock();
        begun.push(Copied {
            number: *next,
            to_host,
            bytes,
        });
        *next += 1;
        *next - 1
    }

    /// Those since the last call.
    pub(super) fn take(&self) -> Vec<Copied> {
        std::mem::take(&mut self.lock().1)
    }
}

impl Tensor {
    /// Starts to copy contents on a graphics processor to the host, behind what was recorded so far and ahead of what comes: for
    /// whoever sends them. Tensors are of one chip and go together, as one copy. Contents elsewhere are where they are read.
    pub(crate) fn start_downloads<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) {
        let wanted = tensors.into_iter().filter(|x| x.leaves_the_device());
        let wanted: Vec<&Tensor> = wanted.collect();
        let Some(copies) = wanted.first().and_then(|x| x.copies()) else {
            return;
        };
        let number = copies.begin(true, wanted.iter().map(|x| x.ty.bytes()).sum());
        #[cfg(feature = "gpu")]
        mirrored::start_downloads(wanted.iter().filter_map(|x| x.mirrored()), number);
        let _ = number;
    }

    /// Notes that the contents, which are on the host, came from another chip.
    pub(crate) fn has_arrived(&self) {
        match &self.storage {
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => block.has_arrived(self.ty.bytes()),
            Storage::Ghost(shadow) => shadow.has_arrived(self.ty.bytes()),
            Storage::Cpu(_) => {}
        }
    }

    /// Brings what a graphics processor is about to read to it, if it is on the host alone: tensors of one chip, as one copy.
    pub(crate) fn upload_all<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) {
        let behind = tensors
            .into_iter()
            .filter_map(|x| Some((x, x.leaves_the_host()?)));
        let (behind, arrived): (Vec<&Tensor>, Vec<u64>) = behind.unzip();
        let arrived: u64 = arrived.into_iter().sum();
        let copies = behind.first().and_then(|x| x.copies());
        let number = copies
            .filter(|_| arrived > 0)
            .map(|c| c.begin(false, arrived));
        #[cfg(feature = "gpu")]
        mirrored::upload(behind.iter().filter_map(|x| x.mirrored()), number);
        let _ = number;
    }

    /// Brings the contents to the graphics processor that is about to read them, if they are on the host alone.
    pub(crate) fn upload(&self) {
        Tensor::upload_all([self]);
    }

    /// True if the host has the contents of a graphics processor, or they are on their way to it; of contents that are nowhere else.
    pub(crate) fn is_on_host(&self) -> bool {
        match &self.storage {
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => block.is_on_host(),
            Storage::Ghost(shadow) => shadow.is_on_host(),
            Storage::Cpu(_) => true,
        }
    }

    /// True if the host has contents that a graphics processor lacks; of contents that are nowhere else.
    pub(crate) fn is_on_host_alone(&self) -> bool {
        match &self.storage {
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => block.is_stale(),
            Storage::Ghost(shadow) => shadow.is_stale(),
            Storage::Cpu(_) => true,
        }
    }

    /// True if some of the contents that the device lacks came from another chip.
    pub(crate) fn is_fresh_from_another(&self) -> bool {
        match &self.storage {
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => block.arrived() > 0,
            Storage::Ghost(shadow) => shadow.arrived() > 0,
            Storage::Cpu(_) => false,
        }
    }

    /// In a ghost: notes that a graphics processor writes the contents.
    pub(crate) fn overwrite(&self) {
        if let Storage::Ghost(shadow) = &self.storage {
            self.upload();
            shadow.overwrite();
        }
    }

    /// In a ghost: notes that the host reads the contents, with which they are there.
    pub(crate) fn read_on_host(&self) {
        if let Storage::Ghost(shadow) = &self.storage {
            shadow.download();
        }
    }

    /// True if the contents have to be copied to the host now.
    fn leaves_the_device(&self) -> bool {
        match &self.storage {
            _ if self.ty.elements() == 0 => false,
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => block.download(),
            Storage::Ghost(shadow) => shadow.download(),
            Storage::Cpu(_) => false,
        }
    }

    /// How many bytes of another chip's are among the contents, if these have to be copied to the device now.
    fn leaves_the_host(&self) -> Option<u64> {
        match &self.storage {
            _ if self.ty.elements() == 0 => None,
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => block.leaves_the_host(),
            Storage::Ghost(shadow) => shadow.leaves_the_host(),
            Storage::Cpu(_) => None,
        }
    }

    fn copies(&self) -> Option<&Copies> {
        match &self.storage {
            #[cfg(feature = "gpu")]
            Storage::Gpu(block) => Some(block.copies()),
            Storage::Ghost(shadow) => Some(shadow.copies()),
            Storage::Cpu(_) => None,
        }
    }

    #[cfg(feature = "gpu")]
    fn mirrored(&self) -> Option<&mirrored::Mirrored> {
        match &self.storage {
            Storage::Gpu(block) => Some(block),
            _ => None,
        }
    }
}
