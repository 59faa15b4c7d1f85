//! Training.
pub mod checkpoint;
pub mod data;
