//! Which units for products of bf16 are used: what the processor has, what is fast there, and what the user asks for.
//!
//! `SUPERNODE_MATRIX_UNITS` is `on` (as if unset: the fastest), `off` (products in f32) or `pairs` (the instruction for pairs of bf16
//! in place of a matrix unit, also where it is slower).

use super::cache::is_intel;
#[cfg(target_arch = "x86_64")]
use super::{TileUnit, amx::Amx, isa};
use std::sync::OnceLock;

/// The token of the instruction that multiplies pairs of bf16.
#[cfg(target_arch = "x86_64")]
pub(crate) use super::Avx512Bf16 as PairUnit;

/// No such instruction is used on this architecture.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy, Debug)]
pub(crate) enum PairUnit {}

#[cfg(not(target_arch = "x86_64"))]
impl PairUnit {
    /// Never called.
    ///
    /// # Safety
    /// None is needed.
    pub(crate) unsafe fn tile_loop<const R: usize>(self, _: &super::TileLoop) {
        match self {}
    }

    /// Never called.
    ///
    /// # Safety
    /// None is needed.
    pub(crate) unsafe fn narrow(
        self,
        _: [usize; 2],
        _: (*const f32, usize),
        _: (*mut half::bf16, usize),
    ) {
        match self {}
    }
}

/// What the environment asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The fastest.
    On,
    /// None.
    Off,
    /// Pairs only.
    Pairs,
}

impl Wanted {
    /// # Panics
    /// If the variable has another value.
    pub(super) fn get() -> Self {
        static WANTED: OnceLock<Wanted> = OnceLock::new();
        *WANTED.get_or_init(|| {
            let Some(word) = std::env::var_os("SUPERNODE_MATRIX_UNITS") else {
                return Wanted::On;
            };
            match word.to_str() {
                Some("on") => Wanted::On,
                Some("off") => Wanted::Off,
                Some("pairs") => Wanted::Pairs,
                _ => panic!("SUPERNODE_MATRIX_UNITS is {word:?}; it may be on, off or pairs"),
            }
        })
    }
}

/// Whether products of bf16 use the instruction for pairs where there is one. On AMD's Zen 4 it does twice the work of a multiply-add
/// of f32 in the same time, on an Intel Xeon of 2024 half of it (115 against 240 GFLOP/s a core).
pub(super) fn pairs_are_wanted() -> bool {
    match Wanted::get() {
        Wanted::On => !is_intel(),
        Wanted::Off => false,
        Wanted::Pairs => true,
    }
}

/// The unit that multiplies tiles of bf16, where this machine has one and it is not turned off. A test's choice of an
/// instruction set ([`super::with_isa`]) is one without it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn matrix_unit() -> Option<Amx> {
    #[cfg(test)]
    if super::CHOSEN.get().is_some() {
        return None;
    }
    Amx::new()
}

/// [`matrix_unit`], or the instruction set's own for pairs, for kernels that put vectors between its products.
#[cfg(target_arch = "x86_64")]
pub(crate) fn tile_unit() -> Option<TileUnit> {
    let pairs = || isa().pair_unit().map(TileUnit::of_pairs);
    matrix_unit().and_then(TileUnit::of).or_else(pairs)
}
