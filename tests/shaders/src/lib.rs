//! Nothing: the tests of this crate write every shader of `supernode` in each language that a driver takes.
