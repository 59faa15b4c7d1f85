//! One integration binary, one line per module.

mod examples;

mod parity {
    mod models;
    mod ops;
}
