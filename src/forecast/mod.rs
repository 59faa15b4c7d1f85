//! What a program costs on a described machine, before anyone rents it.
//!
//! ```text
//!   trace of a ghost ----+
//!                        +--> work --> kernel prices  --+
//!   program (generated) -+         \-> network prices --+--> pipeline replayed --> seconds, memory
//! ```
//!
//! Two sources give the work of a step: the trace of a ghost, for every split that the program runs ([`price_trace`]), and lists
//! generated from a model's sizes ([`Setting`]), for machines and models beyond what it runs. Both are priced by the same
//! functions from numbers that stand in [`crate::cluster`] with their sources; pipelines are the lists of [`crate::pipeline`], which
//! the training loop runs too. Nothing is fitted to a published training run.
//!
//! | file | what it holds |
//! |---|---|
//! | `architecture`, `models` | a transformer by its sizes: dense, mixtures, latent attention; by name or `config.json` |
//! | `program` | a layer's forward, backward and recomputation, and its forward over a cache, as work |
//! | `kernel`, `network`, `measured` | seconds of kernels, of transfers, and of what a calibrated machine timed |
//! | `step`, `memory`, `schedule` | a training step: stages, pipeline, gradients, optimizer; bytes by cause |
//! | `inference` | prompts and decoding |
//! | `interval` | where 80 % of real steps lie |
//! | `search` | the best of all splits |

mod architecture;
mod expert;
mod goodput;
mod inference;
mod interval;
mod kernel;
mod measured;
mod memory;
mod models;
mod network;
mod program;
mod schedule;
mod search;
mod step;
mod timeline;
mod traced;
mod work;

pub use architecture::{Architecture, Block, Latent, Mixture, Window};
pub use expert::Exchange;
pub use goodput::{Failures, Goodput};
pub use inference::{Phase, Served};
pub use interval::{Class, Slower};
pub use kernel::{Rates, element_bytes};
pub use measured::{account as measured_account, curves as measured_curves, gap as measured_gap};
pub use memory::Memory;
pub use models::{named as model_named, names as model_names};
pub use network::{Network, closed_form, walk};
pub use program::{Activations, Again, Beside, ContextParallel, Recompute, Shape, Stored, Task};
pub use schedule::{Pipeline, makespan};
pub use search::{Found, Search, choices};
pub use step::{AXES, Forecast, Setting};
pub use traced::{ClassPrice, TracePrice, price_trace};
pub use work::{Rows, Work};

#[cfg(test)]
mod tests;
