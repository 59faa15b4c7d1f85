//! How long each kernel takes, by the device's own clock.

use super::chip::Chip;
use super::device::Device;
use crate::error::{Error, ErrorKind, Result};
use serde::Serialize;

/// Stamps of a query set: as many as every device allows.
const STAMPS: u32 = 4096;

/// What the launches of one kernel took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Timed {
    /// The kernel's name.
    pub kernel: &'static str,
    /// How often it ran.
    pub launches: u64,
    /// How long, in all.
    pub seconds: f64,
}

/// Stamps of launches that are being recorded.
#[derive(Default)]
pub(super) struct Watch {
    sets: Vec<wgpu::QuerySet>,
    names: Vec<&'static str>,
}

/// Where a launch leaves its two stamps.
pub(super) struct Stamps {
    pub(super) set: wgpu::QuerySet,
    pub(super) first: u32,
}

impl Watch {
    /// Room for the stamps of a launch of `kernel`.
    pub(super) fn next(&mut self, device: &Device, kernel: &'static str) -> Stamps {
        let first = (2 * self.names.len() as u32) % STAMPS;
        if first == 0 {
            let set = device.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("stamps"),
                ty: wgpu::QueryType::Timestamp,
                count: STAMPS,
            });
            self.sets.push(set);
        }
        self.names.push(kernel);
        let set = self.sets.last().expect("a set was just made").clone();
        Stamps { set, first }
    }

    /// Seconds of every launch, by kernel; the longest first.
    fn read(&self, chip: &Chip) -> Result<Vec<Timed>> {
        let mut stamps: Vec<u64> = Vec::new();
        for (i, set) in self.sets.iter().enumerate() {
            let left = 2 * self.names.len() as u32 - i as u32 * STAMPS;
            stamps.extend(chip.resolve(set, left.min(STAMPS))?);
        }
        let tick = f64::from(chip.device().queue.get_timestamp_period()) * 1e-9;
        let mut found: Vec<Timed> = Vec::new();
        for (&kernel, ends) in self.names.iter().zip(stamps.chunks_exact(2)) {
            let seconds = ends[1].saturating_sub(ends[0]) as f64 * tick;
            match found.iter_mut().find(|t| t.kernel == kernel) {
                Some(t) => (t.launches, t.seconds) = (t.launches + 1, t.seconds + seconds),
                None => found.push(Timed {
                    kernel,
                    launches: 1,
                    seconds,
                }),
            }
        }
        found.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(found)
    }
}

impl Chip {
    /// Runs `run`, waits for all that it started, and says how long each kernel took on the device.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the adapter has no timestamps; otherwise as [`Chip::finish`].
    pub fn timed<T>(&self, run: impl FnOnce() -> T) -> Result<(T, Vec<Timed>)> {
        if !self.adapter().timestamps {
            let what = format!(
                "{} has no timestamps: its kernels cannot be timed one by one",
                self.adapter()
            );
            return Err(Error::new(ErrorKind::Device, what));
        }
        self.finish()?;
        *self.watch() = Some(Watch::default());
        let result = run();
        let finished = self.finish();
        let watch = self.watch().take();
        finished?;
        let times = watch.map_or(Ok(Vec::new()), |w| w.read(self))?;
        Ok((result, times))
    }

    fn resolve(&self, set: &wgpu::QuerySet, count: u32) -> Result<Vec<u64>> {
        let bytes = u64::from(count) * 8;
        let device = &self.device().device;
        let resolved = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("stamps"),
            size: bytes,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        self.record(|encoder, _| encoder.resolve_query_set(set, 0..count, &resolved, 0));
        let mut stamps = vec![0u64; count as usize];
        self.download(&resolved, bytemuck::cast_slice_mut(&mut stamps))?;
        Ok(stamps)
    }

    /// Stamps for a launch, if launches are being timed.
    pub(super) fn stamps(&self, kernel: &'static str) -> Option<Stamps> {
        self.watch().as_mut().map(|w| w.next(self.device(), kernel))
    }
}
