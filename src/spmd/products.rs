//! What a chip's device chose for its products goes into its trace.

use crate::tensor::Memory;
use crate::trace::Recorder;

/// A recorder that says what products on this memory's device are cut up by, if it chooses.
#[cfg(feature = "gpu")]
pub(super) fn recorder(memory: &Memory) -> Recorder {
    let mut recorder = Recorder::new();
    if let Some(chip) = memory.gpu_chip() {
        let choices = chip.keep_choices();
        let shape = |(tile, rate)| crate::trace::Shape { tile, rate };
        recorder.cut_up_by(crate::trace::Tiles {
            adapter: chip.adapter().to_string(),
            class: choices.class.into(),
            table: choices.table,
            fill: choices.fill,
            part: choices.part,
            shapes: choices.shapes.into_iter().map(shape).collect(),
        });
    }
    recorder
}

/// Without graphics processors nothing is chosen.
#[cfg(not(feature = "gpu"))]
pub(super) fn recorder(_: &Memory) -> Recorder {
    Recorder::new()
}

/// The products since the event before, as indices of the trace's.
#[cfg(feature = "gpu")]
pub(super) fn since_the_event_before(memory: &Memory, recorder: &mut Recorder) -> Vec<u32> {
    let Some(chip) = memory.gpu_chip() else {
        return Vec::new();
    };
    let product = |choice: crate::gpu::Choice| {
        recorder.product(crate::trace::Product {
            batch: choice.batch,
            sizes: choice.sizes,
            tile: choice.tile,
            parts: choice.parts,
            calls: 1,
        })
    };
    chip.take_choices().into_iter().map(product).collect()
}

/// Without graphics processors there are none.
#[cfg(not(feature = "gpu"))]
pub(super) fn since_the_event_before(_: &Memory, _: &mut Recorder) -> Vec<u32> {
    Vec::new()
}
