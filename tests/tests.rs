//! One integration binary, one line per module.

mod parity {
    mod models;
    mod ops;
}
