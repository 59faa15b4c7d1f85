//! Transformer kernels split over many chips.
//!
//! A program says what each chip of a [`Mesh`] does. It is written once, as a closure over a
//! [`Chip`], and runs in one of two worlds:
//!
//! | [`World`] | chips | numbers |
//! |---|---|---|
//! | [`threads`](spmd::World::threads) | slices of this machine's CPU, or its GPUs | real |
//! | [`ghost`](spmd::World::ghost) | none: tensors have shapes and no contents | every chip's [`Trace`](trace::Trace), traffic and peak memory, exactly |
//!
//! ```
//! use supernode::mesh::Mesh;
//! use supernode::placement::Placement::{Replicate, Shard};
//! use supernode::spmd::{Chip, Device, FromIndex, Init, World};
//!
//! let program = |chip: &Chip| {
//!     let numbers = FromIndex(|i| i as f32);
//!     let x = chip.input("x", [4, 6], [Shard(0), Replicate], &numbers); // a placement per mesh axis
//!     let w = chip.parameter("w", [6, 8], [Replicate, Shard(1)], Init::ones());
//!     let y = x.matmul(&w); // [Shard(0), Shard(1)]: nothing sent
//!     let all = y.gather(); // an all-gather per axis, seen in the trace
//!     all.read() // this chip's numbers; a ghost has none
//! };
//!
//! let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
//! let run = World::threads(&mesh, Device::cpu())?.run(program)?;
//! let y = run.outputs()[0].as_ref().expect("real chips have contents");
//! assert_eq!((y.shape(), y[[0, 0]]), (&[4, 8][..], 15.0));
//!
//! let ghost = World::ghost(&mesh).trace(program)?;
//! assert_eq!(run.trace().difference(&ghost), None); // the same events, bytes and memory
//! # Ok::<(), supernode::Error>(())
//! ```
//!
//! # The rooms
//!
//! Arrows point one way, from what uses to what is used.
//!
//! ```text
//!   forecast       a trace or a model's sizes + a machine (cluster) = seconds, memory, goodput; search over splits
//!
//!   train          text, batches, AdamW, checkpoints, the loop
//!     |
//!     v
//!   model          the transformer, once, for every mesh
//!     |
//!     v
//!   spmd           a chip, sharded tensors, the worlds: threads and ghost
//!     |
//!     v
//!   ops            one op per file: shapes, placements, cost, forward, backward         kernels
//!     |                                                            straight on ndarray     |
//!     +---> tape   reverse mode                                                            |
//!     v                                                                                    |
//!   tensor         shape, element type, storage: on the processor, a GPU, or a ghost       |
//!     |                                                                                    |
//!     +---> gpu    one chip on a graphics processor: shaders, launches                     |
//!     v                                                                                    |
//!   cpu            private: SIMD, memory, matmul, attention, rows   <----------------------+
//!
//!   the floor, values and tables, used by all: mesh, placement, collective, pipeline, trace, random, dtype, files, error
//!   cluster        machines as data: chips, systems, stacks
//!   report         pages: timelines, bars and curves as HTML
//!   reference      the textbook in f64: the oracle of tests, to be read
//! ```
//!
//! # The letters
//!
//! | letter | meaning |
//! |---|---|
//! | `b t h d c v` | batch, tokens, heads, size of a head, channels (the model's width), vocabulary |
//! | `m n k` | a matrix product: [m, k] by [k, n] is [m, n] |
//! | `dp fsdp tp cp pp ep` | mesh axes: data, fully sharded data, tensor, context, pipeline, expert parallel |
//!
//! The training loop splits over `dp`, `fsdp`, `ep`, `cp`, `tp` and `pp`; a program of one's own may name its axes as it likes.
//!
//! # The order of sums
//!
//! It is part of the contract: an element of a matrix product is one chain of fused multiply-adds over ascending k, row sums
//! use 32 virtual lanes and a fixed tree, the gradients of a norm's parameters add the sums of 32 rows each (fewer where rows have more
//! than 2048 elements), sums over chips follow a fixed binary tree over ranks. So a run repeats bit for bit on any
//! number of threads and any instruction set.
//!
//! One exception: where the processor has a matrix unit (Intel's AMX), products of bf16 by bf16 run there and are summed
//! in that unit's order: two chains, over the even and the odd k of each block of 32, whose sum is added to the element, and
//! subnormal numbers are taken as 0. That order is as fixed, for any number of threads and any shape, but its bits are those of
//! machines with the unit. `SUPERNODE_MATRIX_UNITS=off` in the environment gives those of all others: a chain that takes of k and
//! k + 1, k even, the odd one first, as the instruction for pairs of bf16 does (`vdpbf16ps` of AVX512-BF16; used where it is fast,
//! or with `pairs` for the variable). Attention in bf16 follows such a unit where there is one ([`ops::Attention`]). Any other word is an
//! error of [`World::threads`], and a panic in a kernel that is called by itself.
//!
//! # Mistakes and failures
//!
//! Wrong shapes, placements and names panic with both sides in the message. What the program cannot help (a file, a
//! memory budget, a chip that failed) is an [`Error`]. A panic on one chip ends the whole run with one error that names it.
//!
//! # Features
//!
//! `cli` (on by default) is the `supernode` command; without it no command-line crates are pulled in. `gpu` (on by default)
//! is chips on graphics processors, through wgpu.

#![cfg_attr(docsrs, feature(doc_cfg))]
// Proofs that wgpu's types may cross threads are deep; they end at trait objects inside of `gpu`.
#![recursion_limit = "512"]

pub mod cluster;
pub mod collective;
pub mod error;
#[doc(hidden)]
pub mod files;
pub mod forecast;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod kernels;
pub mod mesh;
pub mod model;
pub mod ops;
pub mod pipeline;
pub mod placement;
pub mod reference;
pub mod report;
pub mod spmd;
pub mod tape;
pub mod tensor;
pub mod trace;
pub mod train;

pub(crate) use supernode_kernels::internal as cpu;
pub use supernode_kernels::{
    DType, Mask, attention, attention_at, bf16, dtype, f16, gelu, gelu_tanh, layer_norm, matmul,
    matmul_batched, random, rms_norm, silu, softmax,
};

pub use error::{Error, ErrorKind, Result};
pub use mesh::Mesh;
pub use placement::Placement;
pub use spmd::{Chip, Device, Init, Sharded, World};
