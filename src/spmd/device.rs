//! What chips compute on: slices of this machine's processor, or its graphics processors.

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Memory;
use std::fmt;

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
    /// `gpu:0,gpu:1`.
    ///
    /// # Errors
    /// For any other name, with the names there are, and for a mixture of both kinds: between a processor and a graphics
    /// processor division and square root differ in the last bit, so replicated parameters would drift apart.
    pub fn parse(names: &str) -> Result<Self> {
        let kinds: Vec<Kind> = names.split(',').map(one).collect::<Result<_>>()?;
        let device = Device { kinds };
        if device.is_cpu() != device.kinds.contains(&Kind::Cpu) {
            return Err(Error::new(
                ErrorKind::Input,
                format!(
                    "device '{names}' mixes processors and graphics processors, whose results differ in the last bit: \
                     parameters that both hold would drift apart; choose one kind"
                ),
            ));
        }
        Ok(device)
    }

    /// True if every chip is a slice of the processor.
    pub fn is_cpu(&self) -> bool {
        self.kinds.iter().all(|k| *k == Kind::Cpu)
    }

    /// The memory of the chip of this rank.
    pub(super) fn memory(&self, rank: usize, budget: Option<u64>) -> Result<Memory> {
        match self.kinds[rank % self.kinds.len()] {
            Kind::Cpu => Ok(Memory::cpu(budget)),
            #[cfg(feature = "gpu")]
            Kind::Gpu(index) => Ok(Memory::gpu(crate::gpu::Chip::open(index)?, budget)),
        }
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
        let why = Device::parse("cpu,gpu").unwrap_err().to_string();
        assert!(why.contains("last bit"), "{why}");
        let why = Device::gpu(99).check(None).unwrap_err();
        assert_eq!(why.kind(), ErrorKind::Device);
        assert!(why.to_string().contains("there is no gpu:99"), "{why}");
    }
}
