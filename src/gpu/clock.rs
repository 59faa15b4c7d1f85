//! When copies through host memory ran, by the device's own clock.
//!
//! A copy is stamped before and behind where it is recorded. Stamps go to the host behind the next download, which somebody waits
//! for anyway, so that no program waits for them. The device's clock is set against the host's once, when a chip begins.

use super::chip::Chip;
use super::download::Flight;
use crate::error::Result;
use std::time::{Duration, Instant};

/// Copies between two downloads that have room for stamps; further ones get no times.
pub(super) const ROOM: usize = 64;
/// Bytes of the two stamps of a copy.
pub(super) const STAMPS: u64 = 16;

/// The number of a copy, and when it began and ended.
pub(crate) type CopyTime = (u64, [Duration; 2]);

/// Stamps of copies that are recorded, and times of those that are done.
pub(super) struct Clock {
    set: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    /// Numbers of copies whose stamps are in the set, a pair each.
    stamped: Vec<u64>,
    /// Nanoseconds of a tick.
    tick: f64,
    /// Ticks of the device and time of the host, from a moment on that was given, of one moment.
    set_at: (u64, Duration),
    done: Vec<CopyTime>,
}

impl Clock {
    /// Records a copy with stamps around it.
    fn stamp(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        number: u64,
        record: impl FnOnce(&mut wgpu::CommandEncoder),
    ) {
        let pair = 2 * self.stamped.len() as u32;
        if self.stamped.len() == ROOM {
            return record(encoder);
        }
        encoder.write_timestamp(&self.set, pair);
        record(encoder);
        encoder.write_timestamp(&self.set, pair + 1);
        self.stamped.push(number);
    }

    /// Records that the stamps so far go to `staging` from byte `at` on, and gives the numbers of their copies.
    pub(super) fn send(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        staging: &wgpu::Buffer,
        at: u64,
    ) -> Vec<u64> {
        let stamped = std::mem::take(&mut self.stamped);
        if !stamped.is_empty() {
            let pairs = 2 * stamped.len() as u32;
            encoder.resolve_query_set(&self.set, 0..pairs, &self.resolved, 0);
            let bytes = STAMPS * stamped.len() as u64;
            encoder.copy_buffer_to_buffer(&self.resolved, 0, staging, at, bytes);
        }
        stamped
    }

    /// Takes in stamps that are on the host.
    pub(super) fn arrived(&mut self, numbers: &[u64], stamps: &[u8]) {
        for (number, pair) in numbers.iter().zip(stamps.chunks_exact(STAMPS as usize)) {
            let ends = [0, 1].map(|i| {
                let ticks = u64::from_le_bytes(std::array::from_fn(|b| pair[8 * i + b]));
                self.since(ticks)
            });
            self.done.push((*number, ends));
        }
    }

    fn since(&self, ticks: u64) -> Duration {
        let (set, now) = self.set_at;
        // Copies are recorded after the clock was set.
        let nanoseconds = ticks.saturating_sub(set) as f64 * self.tick;
        now + Duration::from_nanos(nanoseconds as u64)
    }
}

impl Chip {
    /// True if the device has stamps between commands.
    pub(crate) fn stamps_copies(&self) -> bool {
        let features = self.device().device.features();
        features.contains(wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS)
    }

    /// Lets copies that have a number be timed from now on, as time since `began`; false where the device has no stamps between
    /// commands.
    ///
    /// # Errors
    /// As [`Chip::finish`].
    pub(crate) fn start_clock(&self, began: Instant) -> Result<bool> {
        if !self.stamps_copies() {
            return Ok(false);
        }
        let device = &self.device().device;
        let set = device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("stamps of copies"),
            ty: wgpu::QueryType::Timestamp,
            count: 2 * ROOM as u32,
        });
        let resolved = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("stamps of copies"),
            size: STAMPS * ROOM as u64,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        self.finish()?;
        self.record(|encoder, _| {
            encoder.write_timestamp(&set, 0);
            encoder.resolve_query_set(&set, 0..1, &resolved, 0);
        });
        self.finish()?;
        // The stamp was made between the submission and now; the device had nothing else to do.
        let now = began.elapsed();
        let mut ticks = [0; 8];
        self.download(&resolved, &mut ticks)?;
        let tick = f64::from(self.device().queue.get_timestamp_period());
        *self.clock() = Some(Clock {
            set,
            resolved,
            stamped: Vec::new(),
            tick,
            set_at: (u64::from_le_bytes(ticks), now),
            done: Vec::new(),
        });
        Ok(true)
    }

    /// Records a copy, with stamps around it if it has a number and there is a clock.
    pub(super) fn stamped(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        number: Option<u64>,
        record: impl FnOnce(&mut wgpu::CommandEncoder),
    ) {
        match (&mut *self.clock(), number) {
            (Some(clock), Some(number)) => clock.stamp(encoder, number, record),
            _ => record(encoder),
        }
    }

    /// When copies ran whose stamps have come since the last call: their numbers, begin and end.
    pub(crate) fn take_times(&self) -> Vec<CopyTime> {
        let mut clock = self.clock();
        clock
            .as_mut()
            .map_or_else(Vec::new, |c| std::mem::take(&mut c.done))
    }

    /// The same with all copies that were recorded, for which it waits.
    ///
    /// # Errors
    /// As [`Chip::finish`].
    pub(crate) fn stop_clock(&self) -> Result<Vec<CopyTime>> {
        let waiting = self.clock().as_ref().is_some_and(|c| !c.stamped.is_empty());
        if waiting {
            // A download of nothing but stamps.
            let flight = self.start_flight(0, |_, _| {});
            Flight::wait(&flight, self)?;
        }
        let times = self.take_times();
        *self.clock() = None;
        Ok(times)
    }
}
