//! What a program costs on a described machine, before anyone rents it.
//!
//! ```text
//!   trace of a ghost ----+
//!                        +--> work --> kernel prices  --+
//!   program (generated) -+         \-> network prices --+--> pipeline replayed --> seconds, memory
//! ```
//!
//! Two sources give the work of a step: the trace of a ghost, for every split that the program runs ([`price_trace`]), and lists
//! generated from a model's sizes ([`Setting`]), for pipelines and what else it does not run yet. Both are priced by the same
//! functions from numbers that stand in [`crate::cluster`] with their sources. Nothing is fitted to a published training run.

mod expert;
mod goodput;
mod kernel;
mod memory;
mod models;
mod network;
mod program;
mod search;
mod step;
mod timeline;
mod traced;
mod work;

pub use expert::Exchange;
pub use goodput::{Failures, Goodput};
pub use kernel::Rates;
pub use memory::Memory;
pub use models::{named as model_named, names as model_names};
pub use network::{Network, closed_form, walk};
pub use program::{Recompute, Shape, Task};
pub use search::{Found, Search};
pub use step::{Forecast, Setting};
pub use traced::{ClassPrice, TracePrice, price_trace};
pub use work::{Rows, Work};

#[cfg(test)]
mod tests;
