//! One integration binary, one line per module.
