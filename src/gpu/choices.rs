//! Which shape each product took, kept where a trace is written: a run says how its sums were cut up.

use super::chip::Chip;
use super::tiles::Class;
use std::sync::PoisonError;

/// How one product was cut up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) batch: usize,
    /// m, n and k.
    pub(crate) sizes: [usize; 3],
    pub(crate) tile: String,
    /// Parts of k.
    pub(crate) parts: usize,
}

/// What choices follow from, beside the sizes of a product.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Choices {
    pub(crate) class: &'static str,
    pub(crate) table: String,
    /// Groups that keep the adapter busy.
    pub(crate) fill: usize,
    /// Least k of a part.
    pub(crate) part: usize,
    /// The shapes that the device can run.
    pub(crate) shapes: Vec<(String, f64)>,
}

impl Chip {
    /// From now on choices are kept for [`Chip::take_choices`]. Says what they follow from.
    pub(crate) fn keep_choices(&self) -> Choices {
        *self.choices() = Some(Vec::new());
        let tiles = self.tiles();
        let shapes = tiles.shapes(self.device());
        Choices {
            class: Class::of(self.adapter()).name(),
            table: self.inner().table.clone(),
            fill: tiles.fill,
            part: tiles.part,
            shapes: shapes.iter().map(|s| (s.to_string(), s.rate())).collect(),
        }
    }

    /// The choices since the last call, in the order of their products; none if they are not kept.
    pub(crate) fn take_choices(&self) -> Vec<Choice> {
        self.choices()
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// Keeps how a product is cut up: by a shape or by cooperative matrices, with k in so many parts.
    pub(super) fn chose(&self, batch: usize, sizes: [usize; 3], tile: String, parts: usize) {
        if let Some(kept) = self.choices().as_mut() {
            kept.push(Choice {
                batch,
                sizes,
                tile,
                parts,
            });
        }
    }

    fn choices(&self) -> std::sync::MutexGuard<'_, Option<Vec<Choice>>> {
        let kept = self.inner().choices.lock();
        kept.unwrap_or_else(PoisonError::into_inner)
    }
}
