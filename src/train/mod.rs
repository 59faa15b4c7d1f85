//! Training.
pub mod checkpoint;
pub mod data;
mod mapped;
pub mod schedule;
