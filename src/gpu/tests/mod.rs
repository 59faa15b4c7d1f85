//! Sources are valid on every device, with no device at hand.

mod sources;
