//! Training: text, batches, the optimizer, checkpoints, and the loop around the step.
//!
//! | file | what it holds |
//! |---|---|
//! | `data` | vocabularies, tokens, batches that do not depend on the mesh, sampling |
//! | `schedule` | learning rates |
//! | `optimizer` | AdamW and clipping over sharded parameters |
//! | `checkpoint` | files of which nothing is lost |
//! | `layout` | what lives where and what moves when, as a table |
//! | `stages` | a step over the stages of a pipeline |
//! | `trainer` | the loop, with `evaluate`, `persist` and `generate` |

mod balance;
mod batch;
pub mod checkpoint;
pub mod data;
mod evaluate;
mod generate;
mod layout;
mod mapped;
mod optimizer;
mod persist;
pub mod schedule;
mod stages;
mod trainer;

pub use balance::ExpertLoads;
pub use generate::{Generate, Generated, Trained};
pub use layout::{Layout, Move, Row};
pub use optimizer::{AdamW, Optimizer};
pub use trainer::{Finished, Options, Report, Training};
