//! What a chip copies through host memory goes into its trace, with the device's times as they come.

use super::Chip;
use super::redistribute::Request;
use crate::collective::Kind;
use crate::tensor::Tensor;
use crate::trace::HostCopy;
#[cfg(feature = "gpu")]
use crate::trace::Time;

impl Chip {
    /// Begins to count copies, where there are any, and to time them, where the device can.
    pub(super) fn begin_to_count_copies(&self) {
        if self.memory().take_copies().is_none() {
            return;
        }
        #[cfg(feature = "gpu")]
        let timed = self.memory().gpu_chip().is_some_and(|chip| {
            let started = chip.start_clock(self.inner().began);
            started.unwrap_or_else(|e| self.fail(e))
        });
        #[cfg(not(feature = "gpu"))]
        let timed = false;
        self.recorder().counts_copies(timed);
    }

    /// Starts to copy what a graphics processor has of a collective's input to the host, together, if this chip's input is read.
    pub(super) fn start_downloads<'a>(
        &self,
        input: impl IntoIterator<Item = &'a Tensor>,
        request: &Request,
    ) {
        let mut wanted = input.into_iter().filter(|x| !x.is_on_host()).peekable();
        if wanted.peek().is_none() {
            return;
        }
        let group = request.group.unwrap_or_else(|| self.group(request.axis));
        if matches!(request.kind, Kind::Broadcast { .. }) {
            // Chips of an axis do not copy the same: a ghost tells them apart.
            self.inner().read_axes.borrow_mut().insert(request.axis);
        }
        if request.kind.reads_input(group.index()) {
            Tensor::start_downloads(wanted);
        }
    }

    /// The copies since the event before.
    pub(super) fn copies_since_the_event_before(&self) -> Vec<HostCopy> {
        let begun = self.memory().take_copies().unwrap_or_default();
        let copy = |c: crate::tensor::Copied| HostCopy {
            number: c.number,
            to_host: c.to_host,
            bytes: c.bytes,
            time: None,
        };
        begun.into_iter().map(copy).collect()
    }

    /// Writes down when copies ran whose times have come.
    #[cfg(feature = "gpu")]
    pub(super) fn note_times_of_copies(&self) {
        if let Some(chip) = self.memory().gpu_chip() {
            self.write_times(chip.take_times());
        }
    }

    /// Without graphics processors there are none.
    #[cfg(not(feature = "gpu"))]
    pub(super) fn note_times_of_copies(&self) {}

    /// The same of all copies, at the end of a program.
    pub(super) fn end_of_copies(&self) {
        #[cfg(feature = "gpu")]
        if let Some(chip) = self.memory().gpu_chip() {
            let times = chip.stop_clock().unwrap_or_else(|e| self.fail(e));
            self.write_times(times);
        }
    }

    #[cfg(feature = "gpu")]
    fn write_times(&self, times: Vec<crate::gpu::CopyTime>) {
        let nanoseconds = |t: std::time::Duration| t.as_nanos() as u64;
        for (number, [begin, end]) in times {
            let time = Time {
                start_ns: nanoseconds(begin),
                duration_ns: nanoseconds(end.saturating_sub(begin)),
            };
            self.recorder().complete_copy(number, time);
        }
    }
}
