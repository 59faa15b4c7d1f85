//! One integration binary, one line per module.

#[cfg(feature = "cli")]
mod bench_command;
#[cfg(feature = "cli")]
mod command;
mod examples;
#[cfg(feature = "cli")]
mod forecast_command;
#[cfg(feature = "cli")]
mod forecast_refusals;
#[cfg(feature = "cli")]
mod generate_command;
#[cfg(feature = "gpu")]
mod gpu;
mod house;
#[cfg(feature = "cli")]
mod machines_command;
#[cfg(feature = "cli")]
mod manners;
#[cfg(feature = "cli")]
mod shares_command;
mod tiny;
mod watchdog;

mod parity {
    pub(crate) mod low;
    pub(crate) mod models;
    mod ops;
}

mod spmd {
    mod classes;
    mod collective_matmul;
    mod counts;
    mod diagnosis;
    mod experts;
    mod faults;
    pub(crate) mod ghost;
    mod grid;
    mod own_op;
    mod placements;
    pub(crate) mod ring;
    mod ring_mistakes;
    mod started;
    mod transposes;
    mod zero;
}

mod train {
    pub(crate) mod absorbed;
    mod buckets;
    pub(crate) mod collective_matmul;
    mod context;
    pub(crate) mod documents;
    pub(crate) mod generate;
    mod gradients;
    mod latent;
    pub(crate) mod meshes;
    mod mixtures;
    pub(crate) mod overlap;
    mod pipeline;
    mod resume;
    mod separate;
    mod shares;
    pub(crate) mod splits;
}
