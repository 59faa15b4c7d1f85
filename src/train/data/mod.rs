//! Text as numbers: vocabularies, tokens, the batches that training and validation read, and sampling.
//!
//! Nothing here knows the mesh. A row of a batch is named by (step, row), a validation window by its number, and a chip
//! fills the rows that are its share: the same text, seed, batch and context give the same rows on every mesh.

mod batches;
mod sampler;
mod tokens;
mod vocabulary;

pub use batches::{Batches, IGNORED, Split, TRAIN_SHARE};
pub use sampler::Sampler;
pub use tokens::{Alphabet, Tokens, Width};
pub use vocabulary::Vocabulary;
