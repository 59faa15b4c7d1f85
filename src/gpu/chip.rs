//! One chip on an adapter: its memory, and the commands that it records until somebody asks for a value.
//!
//! Commands run in the order in which they were recorded, uploads among them: a queue's own `write_buffer` would run ahead of
//! dispatches that were recorded before it, and overwrite a pooled buffer that they still read. The one exception are the
//! numbers of dispatches, which have a buffer of their own that is written once, as a whole, before each submission.

use super::adapter::{self, Adapter};
use super::choices::Choice;
use super::clock::Clock;
use super::device::Device;
use super::tiles::{Chosen, Tiles};
use super::watch::Watch;
use crate::error::{Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes between the numbers of two dispatches: the largest alignment that a device may ask for.
pub(super) const SLOT: usize = 256;
/// Dispatches that are recorded before they are submitted: enough to hide the submission, few enough to start early.
const GATHERED: usize = 64;

/// A chip on an adapter. Clones are the same chip.
#[derive(Clone)]
pub struct Chip(Arc<dyn Hidden<Inner>>);

/// What lies behind a trait object. The compiler proves anew, wherever a tensor crosses threads, that all it holds may; in
/// wgpu's types that proof is deeper than it looks by default, here and in every program that uses this crate. It stops at a
/// trait object.
pub(super) trait Hidden<T>: Send + Sync {
    fn seen(&self) -> &T;
}

impl Hidden<Inner> for Inner {
    fn seen(&self) -> &Inner {
        self
    }
}

impl Hidden<wgpu::Buffer> for wgpu::Buffer {
    fn seen(&self) -> &wgpu::Buffer {
        self
    }
}

pub(super) struct Inner {
    pub(super) device: Arc<Device>,
    pub(super) numbers: wgpu::Buffer,
    recording: Mutex<Recording>,
    pool: Mutex<Pool>,
    watch: Mutex<Option<Watch>>,
    /// When copies through host memory ran, where somebody wants to know.
    clock: Mutex<Option<Clock>>,
    /// How products and attention are cut up here.
    tiles: Arc<Tiles>,
    /// Where that is written.
    pub(super) table: String,
    /// How products were cut up, where that is kept.
    pub(super) choices: Mutex<Option<Vec<Choice>>>,
    /// What happened, in order.
    #[cfg(test)]
    notes: Mutex<Vec<&'static str>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.device.keep_pipelines();
    }
}

#[derive(Default)]
pub(super) struct Recording {
    pub(super) encoder: Option<wgpu::CommandEncoder>,
    /// The numbers of dispatches that are recorded and not submitted, a slot each.
    pub(super) numbers: Vec<u8>,
    /// Room for uploads, which comes back when the device has read it.
    pub(super) belt: Option<wgpu::util::StagingBelt>,
    last: Option<wgpu::SubmissionIndex>,
}

/// Buffers that were given back, by size. A training step asks for the same sizes again and again.
#[derive(Default)]
struct Pool {
    free: BTreeMap<u64, Vec<Held>>,
    live: u64,
    peak: u64,
    fresh: u64,
}

/// A buffer on a chip; goes back to its pool when dropped.
pub(crate) struct Block {
    pub(super) buffer: Held,
    chip: Chip,
}

/// A buffer, as [`Hidden`] says.
pub(super) type Held = Arc<dyn Hidden<wgpu::Buffer>>;

impl Drop for Block {
    fn drop(&mut self) {
        // Commands that still use the buffer were recorded before any that the next owner records.
        let (mut pool, size) = (self.chip.pool(), self.buffer.seen().size());
        pool.live -= size;
        pool.free.entry(size).or_default().push(self.buffer.clone());
    }
}

impl std::fmt::Debug for Chip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.device().about)
    }
}

impl Chip {
    /// A chip on adapter `index`.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if there is no such adapter or it cannot be opened.
    pub fn open(index: usize) -> Result<Self> {
        let device = adapter::open(index)?;
        let tiles = Chosen::of(&device)?;
        Ok(Self::with_tiles(device, tiles))
    }

    /// The same with products and attention cut up as on another kind of adapter.
    #[cfg(test)]
    pub(crate) fn open_as(index: usize, class: super::tiles::Class) -> Result<Self> {
        Ok(Self::with_tiles(
            adapter::open(index)?,
            Chosen::built_in(class),
        ))
    }

    /// A chip on a device that nobody else has.
    pub(crate) fn open_alone(index: usize) -> Result<Self> {
        let device = adapter::open_anew(index)?;
        let tiles = Chosen::of(&device)?;
        Ok(Self::with_tiles(Arc::new(device), tiles))
    }

    /// Ends the device, as a driver does that resets it.
    #[cfg(test)]
    pub(crate) fn lose(&self) {
        self.device().device.destroy();
    }

    /// Notes that something happened, for tests of its order.
    pub(super) fn note(&self, what: &'static str) {
        #[cfg(test)]
        self.inner()
            .notes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(what);
        #[cfg(not(test))]
        let _ = what;
    }

    /// What happened since the last call, in order: kernels by name, copies to the host, submissions, and mappings.
    #[cfg(test)]
    pub(crate) fn take_notes(&self) -> Vec<&'static str> {
        let notes = self.inner().notes.lock();
        std::mem::take(&mut *notes.unwrap_or_else(PoisonError::into_inner))
    }

    fn with_tiles(device: Arc<Device>, chosen: Chosen) -> Self {
        let numbers = device.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("numbers"),
            size: (GATHERED * SLOT) as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Chip(Arc::new(Inner {
            device,
            numbers,
            recording: Mutex::default(),
            pool: Mutex::default(),
            watch: Mutex::default(),
            clock: Mutex::default(),
            tiles: chosen.tiles,
            table: chosen.table,
            choices: Mutex::default(),
            #[cfg(test)]
            notes: Mutex::default(),
        }))
    }

    /// Invocations of a subgroup, where kernels by lanes are the right ones.
    pub(super) fn lanes(&self) -> Option<u32> {
        self.device()
            .lanes()
            .filter(|_| !self.tiles().lanes.is_empty())
    }

    pub(super) fn tiles(&self) -> &Tiles {
        &self.inner().tiles
    }

    pub(super) fn watch(&self) -> MutexGuard<'_, Option<Watch>> {
        self.inner()
            .watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn clock(&self) -> MutexGuard<'_, Option<Clock>> {
        self.inner()
            .clock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The adapter that the chip is on.
    pub fn adapter(&self) -> &Adapter {
        &self.inner().device.about
    }

    pub(super) fn inner(&self) -> &Inner {
        self.0.seen()
    }

    /// True for clones of one chip.
    pub(super) fn is(&self, other: &Chip) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(super) fn device(&self) -> &Device {
        &self.inner().device
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.inner()
            .pool
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn recording(&self) -> MutexGuard<'_, Recording> {
        self.inner()
            .recording
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Highest number of bytes that were handed out at once, as the pool rounds them.
    pub(crate) fn peak(&self) -> u64 {
        self.pool().peak
    }

    /// How many buffers the pool asked the device for.
    pub(crate) fn fresh(&self) -> u64 {
        self.pool().fresh
    }

    /// Memory of at least `bytes`, with unspecified contents.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] if it is more than a shader may see, or the device has no more.
    pub(crate) fn allocate(&self, bytes: u64) -> Result<Block> {
        let most = self.inner().device.about.largest_tensor;
        if bytes > most {
            return Err(Error::new(
                ErrorKind::Memory,
                format!(
                    "a tensor of {bytes} bytes is larger than the {most} bytes that a shader on {} may see; \
                     split it over more chips or use a smaller micro-batch",
                    self.inner().device.about
                ),
            ));
        }
        let size = bytes.next_multiple_of(64).max(64);
        let mut pool = self.pool();
        pool.live += size;
        pool.peak = pool.peak.max(pool.live);
        let kept = pool.free.get_mut(&size).and_then(Vec::pop);
        let buffer = match kept {
            Some(buffer) => buffer,
            None => {
                pool.fresh += 1;
                drop(pool);
                self.buffer(size)
                    .inspect_err(|_| self.pool().live -= size)?
            }
        };
        let block = Block {
            buffer,
            chip: self.clone(),
        };
        if cfg!(test) {
            // NaN of every float type, so that reading before writing shows.
            self.write(&block, &vec![0xff; size as usize]);
        }
        Ok(block)
    }

    fn buffer(&self, size: u64) -> Result<Held> {
        let device = &self.inner().device.device;
        let scope = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        if pollster::block_on(scope.pop()).is_none() {
            return Ok(Arc::new(buffer));
        }
        let live = self.pool().live - size;
        Err(Error::new(
            ErrorKind::Memory,
            format!(
                "{} has no room for {size} bytes beside the {live} bytes of tensors that live there; \
                 use a smaller micro-batch, recompute blocks, or split over more chips",
                self.inner().device.about
            ),
        ))
    }

    /// Lets `record` add commands; submits when enough have gathered.
    pub(super) fn record<T>(
        &self,
        record: impl FnOnce(&mut wgpu::CommandEncoder, &mut Vec<u8>) -> T,
    ) -> T {
        let mut recording = self.recording();
        let Recording {
            encoder, numbers, ..
        } = &mut *recording;
        let encoder = encoder.get_or_insert_with(|| {
            let device = &self.inner().device.device;
            device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
        });
        let result = record(encoder, numbers);
        if recording.numbers.len() >= GATHERED * SLOT {
            self.submit(&mut recording);
        }
        result
    }

    fn submit(&self, recording: &mut Recording) {
        let Some(encoder) = recording.encoder.take() else {
            return;
        };
        let queue = &self.inner().device.queue;
        if !recording.numbers.is_empty() {
            queue.write_buffer(&self.inner().numbers, 0, &recording.numbers);
            recording.numbers.clear();
        }
        if let Some(belt) = &mut recording.belt {
            belt.finish();
        }
        recording.last = Some(queue.submit([encoder.finish()]));
        self.note("submit");
        if let Some(belt) = &mut recording.belt {
            belt.recall();
        }
    }

    /// Starts what is recorded, so that the device works while the program waits for something else. Gives the last submission.
    pub(crate) fn submit_recorded(&self) -> Option<wgpu::SubmissionIndex> {
        let mut recording = self.recording();
        self.submit(&mut recording);
        recording.last.clone()
    }

    /// Starts what is recorded, and waits until it is done.
    ///
    /// # Errors
    /// What went wrong on the device since it was opened: it was lost, has no memory, or refused a command.
    pub fn finish(&self) -> Result<()> {
        match self.submit_recorded() {
            Some(last) => self.inner().device.wait(last),
            None => self.inner().device.failure().map_or(Ok(()), Err),
        }
    }

    /// Copies the first `bytes` of a buffer to byte `at` and on of another, after what was recorded before.
    pub(super) fn copy(&self, from: &Held, to: &Held, at: u64, bytes: u64) {
        self.record(|encoder, _| {
            encoder.copy_buffer_to_buffer(from.seen(), 0, to.seen(), at, bytes);
        });
    }

    pub(super) fn refused(&self, what: &str, e: &dyn std::fmt::Display) -> Error {
        let about = &self.inner().device.about;
        let failed = self.inner().device.failure();
        failed.unwrap_or_else(|| {
            Error::new(ErrorKind::Device, format!("{about} refused {what}: {e}"))
        })
    }
}

/// Ends the chip's program with an error, as [`crate::error::Error`] says: the run returns it.
pub(crate) fn fail(error: Error) -> ! {
    std::panic::resume_unwind(Box::new(error))
}
