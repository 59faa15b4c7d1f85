//! Checkpoints: a directory with the weights (safetensors) and what to resume them with (JSON), of which nothing is lost.
//!
//! ```text
//! DIR/step-00000250.safetensors    every tensor, as the safetensors format says
//! DIR/checkpoint.json              step, seed, model, data; name, length and CRC-32 of the weights; every tensor's shape
//! ```
//!
//! **Saving.** The weights are written under a temporary name, synced to the disk and renamed to a name that no file has;
//! then `checkpoint.json` is written likewise and renamed over the old one. That rename is the commit point: before it
//! the old checkpoint is whole, after it the new one is. The directory is synced after each rename (on Unix), and only then
//! is the old weights file deleted. A failure removes what it left and says that the old checkpoint is kept; what a
//! killed run left (`*.tmp`, weights that `checkpoint.json` does not name) is removed by the next save. So the directory
//! needs room for two checkpoints, and files named like ours in it are ours.
//!
//! Weights of the same step never overwrite each other (the second gets `step-00000250-1`): a crash between the two renames
//! would leave the old `checkpoint.json` with the new weights.
//!
//! **Loading.** `checkpoint.json` carries the CRC-32 of its own body, and the body that of the weights, so that any flipped
//! byte is found before anything is believed. CRC-32 finds accidents; it is no protection from someone who means harm, so
//! every length and offset is checked all the same.

mod load;
mod manifest;
mod save;
#[cfg(test)]
mod tests;

pub use load::{Loaded, load, peek};
pub use save::save;

use crate::dtype::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a run needs beside its tensors to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// The run's seed.
    pub seed: u64,
    /// The model's configuration.
    pub model: Value,
    /// What identifies the text and its vocabulary.
    pub data: Value,
    /// Anything else that the caller wants back.
    pub other: Value,
}

/// A tensor to save.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// Its name, once in a checkpoint.
    pub name: &'a str,
    /// The type of its elements.
    pub dtype: DType,
    /// Its global shape.
    pub shape: &'a [usize],
    /// Its elements, row-major and little endian.
    pub bytes: &'a [u8],
}
