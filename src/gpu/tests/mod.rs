//! What fails on a device is told.

mod failures;
mod matrices;
