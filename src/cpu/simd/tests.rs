//! Every instruction set against the portable one, bit for bit.
