//! What chips compute on: slices of this machine's processor, or its graphics processors.

use crate::cpu::simd::check_units;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Memory;
use std::fmt;
use std::sync::Arc;

/// What the chips of a mesh compute on. Several chips may share one adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// One for every chip in turn.
    kinds: Vec<Kind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Cpu,
    #[cfg(feature = "gpu")]
    Gpu(usize),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Cpu => f.write_str("cpu"),
            #[cfg(feature = "gpu")]
            Kind::Gpu(index) => write!(f, "gpu:{index}"),
        }
    }
}

impl Device {
    /// A slice of this machine's processor.
    pub fn cpu() -> Self {
        Device {
            kinds: vec![Kind::Cpu],
        }
    }

    /// Graphics processor `index`, as `supernode devices` lists them; chips share it.
    #[cfg(feature = "gpu")]
    pub fn gpu(index: usize) -> Self {
        Device {
            kinds: vec![Kind::Gpu(index)],
        }
    }

    /// Reads devices by name, separated by commas, which chips take in turn: `cpu`, `gpu` (the first one), `gpu:1`, or
    /// `cpu,gpu:0`. Chips of several kinds that hold the same parameter take it from the first of them after each update,
    /// because division and square root differ between kinds in the last bit.
    ///
    /// # Errors
    /// For any other name, with the names there are.
    pub fn parse(names: &str) -> Result<Self> {
        let kinds = names.split(',').map(one).collect::<Result<_>>()?;
        Ok(Device { kinds })
    }

    /// True if every chip is a slice of the processor.
    pub fn is_cpu(&self) -> bool {
        self.kinds.iter().all(|k| *k == Kind::Cpu)
    }

    /// The kind of each of `chips` chips as a number, alike for chips that compute the same bits.
    pub(super) fn kinds(&self, chips: usize) -> Arc<[usize]> {
        let kind = |rank: usize| match self.kinds[rank % self.kinds.len()] {
            Kind::Cpu => 0,
            #[cfg(feature = "gpu")]
            Kind::Gpu(index) => 1 + first_alike(index),
        };
        (0..chips).map(kind).collect()
    }

    /// The memory of the chip of this rank.
    pub(super) fn memory(&self, rank: usize, budget: Option<u64>) -> Result<Memory> {
        match self.kinds[rank % self.kinds.len()] {
            Kind::Cpu => {
                check_units().map_err(|why| Error::new(ErrorKind::Input, why))?;
                Ok(Memory::cpu(budget))
            }
            #[cfg(feature = "gpu")]
            Kind::Gpu(index) => Ok(Memory::gpu(crate::gpu::Chip::open(index)?, budget)),
        }
    }

    /// The memory of a ghost in place of the chip of this rank.
    pub(super) fn ghost_memory(&self, rank: usize, budget: Option<u64>) -> Memory {
        match self.kinds[rank % self.kinds.len()] {
            Kind::Cpu => Memory::ghost(budget),
            #[cfg(feature = "gpu")]
            Kind::Gpu(_) => Memory::ghost_of_gpu(budget),
        }
    }

    /// How many names chips take in turn.
    pub(super) fn kind_count(&self) -> usize {
        self.kinds.len()
    }

    /// Opens what the chips will need, so that a missing one is an error before anything runs.
    pub(super) fn check(&self, budget: Option<u64>) -> Result<()> {
        (0..self.kinds.len()).try_for_each(|rank| self.memory(rank, budget).map(drop))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.kinds.iter().map(Kind::to_string).collect();
        f.write_str(&names.join(","))
    }
}

/// The first adapter with the name and driver of this one.
#[cfg(feature = "gpu")]
fn first_alike(index: usize) -> usize {
    let all = crate::gpu::adapters();
    let alike = |a: &crate::gpu::Adapter| {
        all.get(index)
            .is_some_and(|b| (&a.name, &a.driver, &a.backend) == (&b.name, &b.driver, &b.backend))
    };
    all.iter().position(alike).unwrap_or(index)
}

fn one(name: &str) -> Result<Kind> {
    #[cfg(feature = "gpu")]
    {
        let index = match name {
            "gpu" => Some(0),
            _ => name.strip_prefix("gpu:").and_then(|n| n.parse().ok()),
        };
        if let Some(index) = index {
            return Ok(Kind::Gpu(index));
        }
    }
    if name == "cpu" {
        return Ok(Kind::Cpu);
    }
    let known = if cfg!(feature = "gpu") {
        "choose cpu, gpu, gpu:1, or a list of such"
    } else {
        "choose cpu (this build has no feature gpu)"
    };
    Err(Error::new(
        ErrorKind::Input,
        format!("device '{name}' is not known; {known}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_mistakes_told() {
        assert_eq!(Device::parse("cpu").unwrap(), Device::cpu());
        for wrong in ["", "gpu:", "gpu:x", "tpu", "cpu,"] {
            let why = Device::parse(wrong).expect_err(wrong).to_string();
            assert!(why.contains("choose cpu"), "{why}");
        }
    }

    #[cfg(feature = "gpu")]
    #[test]
    fn chips_take_devices_in_turn() {
        assert_eq!(Device::parse("gpu").unwrap(), Device::gpu(0));
        let two = Device::parse("gpu:0,gpu:3").unwrap();
        assert_eq!(two.to_string(), "gpu:0,gpu:3");
        assert!(!two.is_cpu());
        let mixed = Device::parse("cpu,gpu").unwrap();
        assert_eq!(
            (mixed.to_string().as_str(), mixed.is_cpu()),
            ("cpu,gpu:0", false)
        );
        assert_eq!(mixed.kinds(4)[..], [0, 1, 0, 1]);
        assert_eq!(Device::cpu().kinds(2)[..], [0, 0]);
        let why = Device::gpu(99).check(None).unwrap_err();
        assert_eq!(why.kind(), ErrorKind::Device);
        assert!(why.to_string().contains("there is no gpu:99"), "{why}");
    }
}
