//! One integration binary, one line per module.

#[cfg(feature = "cli")]
mod bench_command;
#[cfg(feature = "cli")]
mod command;
mod examples;

mod parity {
    mod models;
    mod ops;
}
