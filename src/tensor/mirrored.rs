//! Contents on a graphics processor, with a copy on the host where somebody asked for one.

use super::{Charge, MemoryInner};
use crate::cpu::memory::{Buffer, Pool};
use crate::dtype::DType;
use crate::gpu::{Block, Chip, Download, Operand, fail};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// A block on a graphics processor, and a copy of its contents on the host where somebody asked for one. The two are the
/// same, or `stale` says that the block is behind; writing on the device drops the copy.
pub(super) struct Mirrored {
    block: Block,
    chip: Chip,
    mirrors: Pool,
    host: OnceLock<Buffer>,
    /// A copy to the host that was started and that nobody has read.
    arriving: Mutex<Option<Download>>,
    /// The device has written the block, or is about to.
    written: bool,
    /// The host's copy was written after the block.
    stale: AtomicBool,
    /// Bytes of the host's copy that came from another chip and that the block has not got.
    arrived: AtomicU64,
    charge: Charge,
}

impl Mirrored {
    pub(super) fn new(block: Block, chip: &Chip, mirrors: &Pool, charge: Charge) -> Self {
        Mirrored {
            block,
            chip: chip.clone(),
            mirrors: mirrors.clone(),
            host: OnceLock::new(),
            arriving: Mutex::default(),
            written: false,
            stale: AtomicBool::new(false),
            arrived: AtomicU64::new(0),
            charge,
        }
    }

    /// Bytes charged.
    pub(super) fn bytes(&self) -> u64 {
        self.charge.bytes
    }

    /// The counts of the memory that this is in.
    pub(super) fn count(&self) -> &MemoryInner {
        &self.charge.memory.0
    }

    /// The block as kernels see it.
    pub(super) fn operand(&self, dtype: DType, elements: usize) -> Operand {
        Operand::new(&self.chip, &self.block, dtype, elements)
    }

    /// So many bytes of the host's copy came from another chip.
    pub(super) fn has_arrived(&self, bytes: u64) {
        self.arrived.store(bytes, Relaxed);
    }

    fn mirror(&self) -> Buffer {
        let bytes = self.charge.bytes as usize;
        match self.mirrors.take(bytes) {
            Ok(buffer) => buffer,
            Err(_) => unreachable!("mirrors have no budget"),
        }
    }

    /// The contents on the host: waits for the device the first time.
    pub(super) fn host(&self) -> &Buffer {
        self.host.get_or_init(|| {
            let mut buffer = self.mirror();
            if !self.written {
                return buffer;
            }
            let bytes = buffer.as_bytes_mut();
            let started = self.arriving().take();
            let read = match started {
                Some(download) => self.chip.finish_read(download, bytes),
                None => self.chip.read(&self.block, bytes),
            };
            read.unwrap_or_else(|e| fail(e));
            buffer
        })
    }

    fn arriving(&self) -> MutexGuard<'_, Option<Download>> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to copy the contents to the host, unless they are there or on their way. True if it did.
    pub(super) fn start_download(&self) -> bool {
        let mut arriving = self.arriving();
        let starts = self.written && self.host.get().is_none() && arriving.is_none();
        if starts {
            *arriving = Some(self.chip.start_read(&self.block, self.charge.bytes));
        }
        starts
    }

    pub(super) fn host_mut(&mut self) -> &mut Buffer {
        self.host();
        self.stale = AtomicBool::new(true);
        self.host.get_mut().expect("the copy was just made")
    }

    /// Brings the block up to the host's copy.
    pub(super) fn upload(&self) {
        if let Some(host) = self.host.get()
            && self.stale.swap(false, Relaxed)
        {
            self.chip.write(&self.block, host.as_bytes());
            let count = &self.count().to_device;
            count.fetch_add(self.arrived.swap(0, Relaxed), Relaxed);
        }
    }

    /// The block is about to be written by the device.
    pub(super) fn overwrite(&mut self) {
        self.upload();
        self.written = true;
        self.host = OnceLock::new();
        self.arriving = Mutex::default();
    }
}
