//! Every op against the textbook: forward, backward, accumulation, reuse, and every split that its letters allow.

mod attention;
mod elementwise;
#[cfg(feature = "gpu")]
mod gpu;
mod harness;
mod loss;
mod matmul;
mod mixture;
mod norms;
mod optimizer;
mod shapes;
mod special;
