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
//! | `shares` | uneven shares of the batch, named or measured |
//! | `trainer` | the loop, with `check`, `evaluate`, `persist` and `generate` |

mod balance;
mod batch;
mod check;
pub mod checkpoint;
pub mod data;
mod evaluate;
mod generate;
mod layout;
mod optimizer;
mod persist;
pub mod schedule;
mod shares;
mod stages;
mod trainer;

pub use balance::ExpertLoads;
pub use generate::{Generate, Generated, Trained};
pub use layout::{Layout, Move, Row};
pub use optimizer::{AdamW, Optimizer};
pub use shares::{Speeds, with_shares};
pub use trainer::{Finished, Options, Report, Training};
