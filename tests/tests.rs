//! One integration binary, one line per module.

mod parity {
    mod ops;
}
