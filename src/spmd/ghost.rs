//! The world without contents: every chip's trace, traffic and peak memory, exactly, of a mesh of any size.
//!
//! Chips that do the same are one class. A program can tell chips apart only by asking for a coordinate, or by a tensor
//! that does not divide evenly; both are noted by axis. One chip is traced with all coordinates 0; if that run asked about
//! an axis, the class is cut into one class per coordinate of that axis, and so on until no class asks about an axis on
//! which its members differ.

use super::chip::{Remains, Setup};
use super::threads::failure;
use super::{Chip, Device, exchange::Stopped};
use crate::collective::Algorithm;
use crate::error::Result;
use crate::mesh::Mesh;
use crate::tensor::Memory;
use crate::trace::{Class, Trace};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

/// A mesh of chips without contents.
#[derive(Clone, Debug)]
pub struct Ghost {
    mesh: Arc<Mesh>,
    seed: u64,
    algorithm: Algorithm,
    budget: Option<u64>,
    device: Option<Device>,
}

impl Ghost {
    pub(super) fn new(mesh: &Mesh) -> Self {
        Ghost {
            mesh: Arc::new(mesh.clone()),
            seed: 0,
            algorithm: Algorithm::Tree,
            budget: None,
            device: None,
        }
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// How collectives are done; by default [`Algorithm::Tree`], whose sums follow the fixed binary tree over ranks. Another
    /// choice may change the last bits of sums: `collective::order` states its order.
    pub fn with_algorithm(mut self, algorithm: Algorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// The budget of each chip's tensors, in bytes: exceeding it is an error, as on a real chip.
    pub fn with_memory_budget(mut self, bytes: u64) -> Self {
        self.budget = Some(bytes);
        self
    }

    /// What the chips would compute on, in place of any device: bytes that transfers take through the host memory of graphics
    /// processors are counted as a run counts them, and in a mesh of several kinds one of them decides what all hold
    /// ([`Device::parse`]). Nothing is opened; the device need not be here.
    pub fn with_device(mut self, device: Device) -> Self {
        self.device = Some(device);
        self
    }

    /// Traces the program once per class of chips; what it returns is dropped.
    ///
    /// # Errors
    /// The budget's, or that of a panic in the program, with the chip's name.
    pub fn trace<T>(&self, program: impl Fn(&Chip) -> T) -> Result<Trace> {
        let axes = self.mesh.axes().len();
        let mut open = match self.kinds() {
            // Chips of several kinds differ by rank, which no program has to ask for.
            Some(_) => self.every_chip(),
            None => vec![vec![None; axes]],
        };
        let mut classes = Vec::new();
        while let Some(pattern) = open.pop() {
            let at: Vec<usize> = pattern
                .iter()
                .map(|c: &Option<usize>| c.unwrap_or(0))
                .collect();
            let remains = self.one(self.mesh.rank_at(&at), &program)?;
            let told_apart =
                |axis: &usize| pattern[*axis].is_none() && self.mesh.axes()[*axis].size() > 1;
            match remains.read_axes.iter().copied().find(told_apart) {
                None => classes.push(Class {
                    pattern,
                    chip: remains.trace,
                }),
                Some(axis) => {
                    let with = |c: usize| {
                        let mut cut = pattern.clone();
                        cut[axis] = Some(c);
                        cut
                    };
                    open.extend((0..self.mesh.axes()[axis].size()).rev().map(with));
                }
            }
        }
        Ok(Trace {
            world: "ghost".into(),
            mesh: (*self.mesh).clone(),
            classes,
        })
    }

    /// The kinds of the chips, if there are several.
    fn kinds(&self) -> Option<Arc<[usize]>> {
        let device = self.device.as_ref().filter(|d| d.kind_count() > 1)?;
        Some(device.kinds(self.mesh.chips()))
    }

    /// A class for each chip, the last one first.
    fn every_chip(&self) -> Vec<Vec<Option<usize>>> {
        let at = |rank| {
            let coordinates = self.mesh.coordinates(rank);
            coordinates.iter().copied().map(Some).collect()
        };
        (0..self.mesh.chips()).rev().map(at).collect()
    }

    fn one<T>(&self, rank: usize, program: impl Fn(&Chip) -> T) -> Result<Remains> {
        let run = || {
            let chip = Chip::new(Setup {
                mesh: self.mesh.clone(),
                rank,
                memory: match &self.device {
                    Some(device) => device.ghost_memory(rank, self.budget),
                    None => Memory::ghost(self.budget),
                },
                seed: self.seed,
                algorithm: self.algorithm,
                kinds: self.kinds().unwrap_or_default(),
                began: Instant::now(),
                lane: None,
            });
            drop(program(&chip));
            chip.finish()
        };
        catch_unwind(AssertUnwindSafe(run)).map_err(|payload| {
            let place = format!("rank {rank} ({})", self.mesh.coordinates(rank));
            debug_assert!(
                !payload.is::<Stopped>(),
                "a ghost has no peers that could stop it"
            );
            failure(payload).within(place)
        })
    }
}
