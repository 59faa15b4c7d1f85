//! One chip on a graphics processor, through wgpu: Vulkan, Metal or DirectX 12, of any vendor.
//!
//! | file | what it holds |
//! |---|---|
//! | `adapter`, `device` | what this machine has; pipelines; failures |
//! | `chip` | memory, and the commands recorded until somebody asks for a value |
//! | `shader`, `library` | WGSL sources by element type; this crate's own |
//! | `launch` | running a kernel, a user's own too |
//! | `rows`, `products`, `mixture` | what ops call |
//!
//! Kernels use no atomic sums and no order that chance decides: two runs on one adapter give the same bits. Another
//! adapter may round otherwise, and so does a processor.

mod adapter;
mod chip;
mod device;
mod launch;
mod library;
mod mixture;
mod products;
mod rows;
mod shader;
#[cfg(test)]
mod tests;

pub use adapter::{Adapter, adapters, advice};
pub use chip::Chip;
pub(crate) use chip::{Block, fail};
pub use launch::{Launch, Number, Operand};
pub(crate) use mixture::*;
pub(crate) use products::*;
pub(crate) use rows::*;
pub use shader::Kernel;
