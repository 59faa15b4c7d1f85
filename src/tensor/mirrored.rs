//! Contents on a graphics processor, with a copy on the host where somebody asked for one.

use super::copies::Copies;
use super::memory::Charge;
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
    /// Nothing has to be copied to the host any more: it is there, on its way, or not written by the device.
    on_host: AtomicBool,
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
            on_host: AtomicBool::new(true),
            stale: AtomicBool::new(false),
            arrived: AtomicU64::new(0),
            charge,
        }
    }

    /// Bytes charged.
    pub(super) fn bytes(&self) -> u64 {
        self.charge.bytes
    }

    /// The copies of the memory that this is in.
    pub(super) fn copies(&self) -> &Copies {
        &self.charge.memory.0.copies
    }

    /// The block as kernels see it.
    pub(super) fn operand(&self, dtype: DType, elements: usize) -> Operand {
        Operand::new(&self.chip, &self.block, dtype, elements)
    }

    /// So many bytes of the host's copy came from another chip.
    pub(super) fn has_arrived(&self, bytes: u64) {
        self.arrived.store(bytes, Relaxed);
    }

    pub(super) fn arrived(&self) -> u64 {
        self.arrived.load(Relaxed)
    }

    pub(super) fn is_on_host(&self) -> bool {
        self.on_host.load(Relaxed)
    }

    pub(super) fn is_stale(&self) -> bool {
        self.stale.load(Relaxed)
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
        self.on_host.store(true, Relaxed);
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

    /// The contents are to go to the host; true if they have to be copied.
    pub(super) fn download(&self) -> bool {
        !self.on_host.swap(true, Relaxed)
    }

    pub(super) fn host_mut(&mut self) -> &mut Buffer {
        self.host();
        self.stale = AtomicBool::new(true);
        self.host.get_mut().expect("the copy was just made")
    }

    /// The contents are to go to the device; how many of their bytes came from another chip, or none if they are there.
    pub(super) fn leaves_the_host(&self) -> Option<u64> {
        self.host.get()?;
        let stale = self.stale.swap(false, Relaxed);
        stale.then(|| self.arrived.swap(0, Relaxed))
    }

    /// The block, which has what the host has, is about to be written by the device.
    pub(super) fn overwrite(&mut self) {
        self.written = true;
        self.on_host = AtomicBool::new(false);
        self.host = OnceLock::new();
        self.arriving = Mutex::default();
    }
}

/// Starts to copy blocks of one chip to the host, as copy `number`.
pub(super) fn start_downloads<'a>(all: impl Iterator<Item = &'a Mirrored>, number: u64) {
    let all: Vec<&Mirrored> = all.collect();
    let Some(first) = all.first() else { return };
    let blocks: Vec<(&Block, u64)> = all.iter().map(|m| (&m.block, m.charge.bytes)).collect();
    let downloads = first.chip.start_reads(&blocks, Some(number));
    for (block, download) in all.iter().zip(downloads) {
        *block.arriving() = Some(download);
    }
}

/// Brings blocks of one chip up to the host's copies, as copy `number` if it counts.
pub(super) fn upload<'a>(all: impl Iterator<Item = &'a Mirrored>, number: Option<u64>) {
    let parts = all.filter_map(|m| Some((m, m.host.get()?)));
    let parts: Vec<(&Mirrored, &Buffer)> = parts.collect();
    let Some((first, _)) = parts.first() else {
        return;
    };
    let bytes: Vec<(&Block, &[u8])> = parts
        .iter()
        .map(|(m, host)| (&m.block, host.as_bytes()))
        .collect();
    first.chip.write_all(&bytes, number);
}
