//! Which units for products of bf16 are used: what the processor has, what is fast there, and what the user asks for.
//!
//! `SUPERNODE_MATRIX_UNITS` is `on` (as if unset: the fastest), `off` (products in f32) or `pairs` (the instruction for pairs of bf16
//! in place of a matrix unit, also where it is slower).

use super::cache::is_intel;
#[cfg(target_arch = "x86_64")]
use super::{TileUnit, amx::Amx, isa};
use std::ffi::OsStr;
use std::sync::OnceLock;

const VARIABLE: &str = "SUPERNODE_MATRIX_UNITS";

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
    /// What it asks for, read once.
    ///
    /// # Errors
    /// A sentence, if the variable has another value.
    fn read() -> Result<Self, String> {
        static WANTED: OnceLock<Result<Wanted, String>> = OnceLock::new();
        let wanted = WANTED.get_or_init(|| match std::env::var_os(VARIABLE) {
            None => Ok(Wanted::On),
            Some(word) => Self::named(&word),
        });
        wanted.clone()
    }

    fn named(word: &OsStr) -> Result<Self, String> {
        match word.to_str() {
            Some("on") => Ok(Wanted::On),
            Some("off") => Ok(Wanted::Off),
            Some("pairs") => Ok(Wanted::Pairs),
            _ => Err(format!(
                "the environment variable {VARIABLE} is {word:?}; set it to on, off or pairs, or unset it"
            )),
        }
    }

    /// # Panics
    /// If the variable has another value: kernels that are called by themselves return no [`Result`]. Chips have
    /// [checked](check_units) it before they run any.
    pub(super) fn get() -> Self {
        Self::read().unwrap_or_else(|e| panic!("{e}"))
    }
}

/// Looks whether the environment asks for units that there may be, before a chip computes.
///
/// # Errors
/// A sentence that says what may be asked for.
pub fn check_units() -> Result<(), String> {
    Wanted::read().map(drop)
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

/// Whether attention in bf16 runs on such a unit.
pub fn has_tile_unit() -> bool {
    #[cfg(target_arch = "x86_64")]
    return tile_unit().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_word_is_an_error_that_names_those_there_are() {
        for (word, wanted) in [
            ("on", Wanted::On),
            ("off", Wanted::Off),
            ("pairs", Wanted::Pairs),
        ] {
            assert_eq!(Wanted::named(OsStr::new(word)).unwrap(), wanted);
        }
        for wrong in ["", "foo", "ON", "on "] {
            let why = Wanted::named(OsStr::new(wrong)).expect_err(wrong);
            let told = format!("SUPERNODE_MATRIX_UNITS is {wrong:?}; set it to on, off or pairs");
            assert!(why.contains(&told), "{why}");
        }
    }
}
