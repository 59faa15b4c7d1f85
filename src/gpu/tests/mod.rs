//! Sources are valid on every device, with no device at hand; and what fails on one is told.

mod failures;
mod sources;
