//! What chips of this machine are given, as every command that runs on a mesh takes it.

use supernode::collective::Algorithm;
use supernode::mesh::Mesh;
use supernode::spmd::{Device, Ghost, Threads, World};
use supernode::{Error, ErrorKind, Result};

#[derive(Debug, clap::Args)]
pub(super) struct Chips {
    /// How collectives are done: tree, ring or recursive
    #[arg(long, default_value = "tree", value_name = "ALGORITHM")]
    collectives: Algorithm,
    /// Threads of each chip; by default the cores are shared out
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Most bytes of tensors per chip
    #[arg(long, value_name = "BYTES")]
    memory_budget: Option<u64>,
}

/// Of a chip; making more takes longer than any step.
const MOST_THREADS: usize = 1024;

impl Chips {
    /// The world of a mesh of such chips.
    pub(super) fn world(&self, mesh: &Mesh, device: Device, seed: u64) -> Result<Threads> {
        let mut world = World::threads(mesh, device)?
            .with_seed(seed)
            .with_algorithm(self.collectives);
        if let Some(threads) = self.threads {
            if threads == 0 {
                return Err(Error::new(
                    ErrorKind::Input,
                    "--threads 0: a chip needs at least one thread",
                ));
            }
            if threads > MOST_THREADS {
                let why = format!("--threads {threads}: a chip has at most {MOST_THREADS} threads");
                return Err(Error::new(ErrorKind::Input, why));
            }
            world = world.with_threads(threads);
        }
        Ok(match self.memory_budget {
            Some(bytes) => world.with_memory_budget(bytes),
            None => world,
        })
    }

    /// Its ghost. One of processors stands for any device.
    pub(super) fn ghost(&self, mesh: &Mesh, device: Device) -> Ghost {
        let mut ghost = World::ghost(mesh).with_algorithm(self.collectives);
        if !device.is_cpu() {
            ghost = ghost.with_device(device);
        }
        match self.memory_budget {
            Some(bytes) => ghost.with_memory_budget(bytes),
            None => ghost,
        }
    }
}
