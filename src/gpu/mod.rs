//! One chip on a graphics processor, through wgpu: Vulkan, Metal or DirectX 12, of any vendor.
//!
//! | file | what it holds |
//! |---|---|
//! | `adapter`, `device` | what this machine has; pipelines; failures |
//! | `chip` | memory, and the commands recorded until somebody asks for a value |
//! | `download`, `upload`, `clock` | copies to the host beside what the program does next, and back; when they ran |
//! | `shader`, `template`, `library`, `sources` | WGSL sources by element type; this crate's own; all of them, for tests |
//! | `launch`, `watch` | running a kernel, a user's own too; how long it took |
//! | `tiles`, `written`, `tune`, `choices` | how products are cut up, by kind of adapter, and how they were |
//! | `kept`, `trial` | compiled pipelines on disk; the first use of a kernel that a driver may not survive |
//! | `limits` | what a device could do at best |
//! | `elementwise`, `moves`, `rows`, `products`, `matrices`, `attention`, `mixture`, `optimizer` | what ops call |
//!
//! Kernels use no atomic sums and no order that chance decides: two runs on one adapter give the same bits. Another
//! adapter may round otherwise, and so does a processor.

mod adapter;
mod attention;
mod chip;
mod choices;
mod clock;
mod device;
mod download;
mod elementwise;
mod kept;
mod launch;
mod library;
mod limits;
mod matrices;
mod mixture;
mod moves;
mod optimizer;
mod products;
mod rows;
mod shader;
#[doc(hidden)]
pub mod sources;
mod template;
#[cfg(test)]
mod tests;
mod tiles;
mod trial;
mod tune;
mod upload;
mod watch;
mod written;

pub use adapter::{Adapter, adapters, advice};
pub(crate) use attention::*;
pub use chip::Chip;
pub(crate) use chip::{Block, fail};
pub(crate) use choices::Choice;
pub(crate) use clock::CopyTime;
pub(crate) use download::Download;
pub(crate) use elementwise::*;
pub(crate) use launch::table;
pub use launch::{Launch, Number, Operand};
pub(crate) use mixture::*;
pub(crate) use moves::*;
pub(crate) use optimizer::*;
pub(crate) use products::*;
pub(crate) use rows::*;
pub use shader::Kernel;
#[cfg(test)]
pub(crate) use tiles::Class;
pub use watch::Timed;
