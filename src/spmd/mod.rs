//! One program on every chip: the chip that a program sees, the worlds that run it, and sharded tensors.
//!
//! A program is a closure over a [`Chip`]. [`World::threads`] runs it for real, a thread pool per chip;
//! [`World::ghost`] runs it on tensors without contents and gives every chip's trace, traffic and peak memory.
//!
//! | file | what it holds |
//! |---|---|
//! | `chip` | rank, coordinates, parameters, inputs, scopes, steps |
//! | `sharded` | a tensor over the mesh and the ops on it |
//! | `apply`, `resolve` | one op on placed operands: shapes, placements, event |
//! | `gradient`, `recompute`, `segment` | backward: settling, adding, computing again, tapes apart |
//! | `count` | statistics that a program keeps for the loop around its steps |
//! | `zero`, `update` | what belongs to a parameter split over the batch's axis; changing parameters |
//! | `redistribute`, `cut` | moving between placements; collectives as events; pieces of a dimension in a row |
//! | `grid` | matmul on a grid of chips: 1-D, SUMMA, 2.5-D |
//! | `cache` | what a chip keeps between forwards of a text that grows |
//! | `context` | attention over a sequence that chips share: ring, USP |
//! | `started`, `message` | transfers beside the program; messages to one peer |
//! | `collective_matmul` | products beside the ring that gathers or scatters for them |
//! | `overlap` | parameters gathered a block ahead, gradients reduced a block behind |
//! | `bucket` | gradients of several small parameters in one all-reduce |
//! | `execute`, `rooms` | walks a collective's list of steps over a wire; where its elements lie |
//! | `exchange`, `payload` | the wire between threads: messages, waits, diagnosis |
//! | `device`, `products`, `copies` | what a chip computes on; how products were cut up there; what went through host memory |
//! | `threads`, `ghost` | the worlds |

mod apply;
mod bucket;
mod cache;
mod chip;
mod collective_matmul;
mod context;
mod copies;
mod count;
mod cut;
mod device;
mod exchange;
mod execute;
mod ghost;
mod gradient;
mod grid;
mod message;
mod mixed;
mod overlap;
mod parameter;
mod payload;
mod products;
mod recompute;
mod redistribute;
mod reshape;
mod resolve;
mod rooms;
mod segment;
mod sharded;
mod started;
#[cfg(all(test, feature = "gpu"))]
mod tests;
mod threads;
mod turns;
mod update;
mod zero;

pub use bucket::BUCKET_BYTES;
pub use chip::{Chip, Contents, FromIndex};
pub use context::{InOrder, Ring};
pub use device::Device;
pub use ghost::Ghost;
pub use grid::{Cut, Grid};
pub use message::Sending;
pub use overlap::Block;
pub use parameter::{Init, Parameter};
pub use segment::Segment;
pub use sharded::Sharded;
pub use started::Pending;
pub use threads::{Run, Threads};
pub use zero::Zero;

use crate::error::Result;
use crate::mesh::Mesh;

/// Where a program can run.
#[derive(Debug)]
pub enum World {}

impl World {
    /// Chips that are slices of this machine, a thread pool each, or its graphics processors.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Device`] if a graphics processor is asked for that is not there;
    /// [`crate::ErrorKind::Mesh`] if the mesh has more chips than this machine could start threads for.
    pub fn threads(mesh: &Mesh, device: Device) -> Result<Threads> {
        Threads::new(mesh, device)
    }

    /// Chips without contents: shapes, traffic and memory, exactly, of any mesh.
    pub fn ghost(mesh: &Mesh) -> Ghost {
        Ghost::new(mesh)
    }
}
