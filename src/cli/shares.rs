//! `--shares`: which part of the batch each chip along dp takes.

use super::train::Arguments;
use std::str::FromStr;
use supernode::mesh::Mesh;
use supernode::spmd::Device;
use supernode::train::{Speeds, Training, with_shares};
use supernode::{Error, ErrorKind, Result};

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// These.
    Each(Vec<usize>),
    /// Those that the chips' speeds give.
    Measured,
}

impl FromStr for Wish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "measured" {
            return Ok(Wish::Measured);
        }
        let shares: Result<_, _> = text.split(',').map(|n| n.trim().parse()).collect();
        shares.map(Wish::Each).map_err(|_| {
            format!("'{text}' are no shares; write one for each chip along dp, such as 3,1, or 'measured'")
        })
    }
}

/// The mesh that a run is on, and why.
pub(super) struct Chosen {
    pub mesh: Mesh,
    pub why: Why,
}

/// Where the shares over dp come from.
pub(super) enum Why {
    /// The mesh, or the wish.
    Given,
    /// The checkpoint that the run goes on from.
    Recorded(Vec<usize>),
    /// A short run.
    Measured(Speeds),
}

impl Arguments {
    /// The mesh with the shares that were asked for, or those of the run that goes on.
    pub(super) fn choose(
        &self,
        training: &Training,
        mesh: Mesh,
        device: &Device,
    ) -> Result<Chosen> {
        let given = |mesh| {
            let why = Why::Given;
            Ok(Chosen { mesh, why })
        };
        let chips = mesh.size_of("dp");
        let named = mesh.axis("dp").is_some_and(|a| a.shares().is_some());
        if let (Some(wish), true) = (&self.shares, named) {
            return Err(Error::new(
                ErrorKind::Input,
                format!(
                    "--shares {wish} and the shares of --mesh {mesh} are two wishes; leave out one"
                ),
            ));
        }
        if let Some(Wish::Each(shares)) = &self.shares {
            return given(with_shares(&mesh, shares)?);
        }
        let measure = self.shares == Some(Wish::Measured);
        if self.ghost && measure {
            return Err(Error::new(
                ErrorKind::Input,
                "--shares measured: a ghost computes nothing, so that nothing can be measured; name them, such as --shares 3,1",
            ));
        }
        if self.resume
            && !named
            && let Some(shares) = training.recorded_shares()?
            && shares.len() == chips
        {
            let mesh = with_shares(&mesh, &shares)?;
            let why = Why::Recorded(shares);
            return Ok(Chosen { mesh, why });
        }
        if !measure {
            return given(mesh);
        }
        let world = self.chips.world(&mesh, device.clone(), self.seed)?;
        let speeds = training.measure_shares(&world)?;
        Ok(Chosen {
            mesh: with_shares(&mesh, &speeds.shares)?,
            why: Why::Measured(speeds),
        })
    }
}

impl std::fmt::Display for Wish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Wish::Measured => f.write_str("measured"),
            Wish::Each(shares) => f.write_str(&with_commas(shares)),
        }
    }
}

/// `3,1`.
pub(super) fn with_commas(shares: &[usize]) -> String {
    let words: Vec<String> = shares.iter().map(usize::to_string).collect();
    words.join(",")
}
