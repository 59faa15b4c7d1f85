//! The text to train on, from the arguments.

use std::path::PathBuf;
use std::sync::Arc;
use supernode::train::data::{Alphabet, Tokens, Width};
use supernode::{Error, ErrorKind, Result};

/// Where the text comes from.
#[derive(Debug, clap::Args)]
pub(super) struct Source {
    /// Text to train on, by bytes unless --chars is given
    #[arg(long, value_name = "FILE", conflicts_with = "tokens")]
    text: Option<PathBuf>,
    /// Take the characters of the text as tokens instead of its bytes
    #[arg(long, requires = "text")]
    chars: bool,
    /// Already tokenised text: little-endian numbers without a header
    #[arg(long, value_name = "FILE.bin")]
    tokens: Option<PathBuf>,
    /// Width of the numbers in --tokens [default: u16]
    #[arg(long, value_name = "u16|u32", requires = "tokens")]
    token_width: Option<Width>,
}

impl Source {
    /// Reads the text. `vocab` bounds the numbers of tokenised text; `ghost` needs none, as it never looks at contents, and
    /// gets one of `context` blanks.
    pub(super) fn read(
        &self,
        vocab: Option<usize>,
        ghost: bool,
        context: usize,
    ) -> Result<Arc<Tokens>> {
        let tokens = match (&self.text, &self.tokens) {
            (Some(path), _) => {
                let alphabet = if self.chars {
                    Alphabet::Characters
                } else {
                    Alphabet::Bytes
                };
                Tokens::read_text(path, alphabet)?
            }
            (None, Some(path)) => {
                // Sixteen bits cannot hold such a vocabulary's numbers.
                let wide = vocab.filter(|v| *v > 1 << 16);
                if let (None, Some(vocab)) = (self.token_width, wide) {
                    let why = format!(
                        "--vocab {vocab} is more than the 65536 numbers of u16: give the width that {} was written with, --token-width u32 or u16",
                        path.display()
                    );
                    return Err(Error::new(ErrorKind::Input, why));
                }
                Tokens::read_binary(path, self.token_width.unwrap_or(Width::U16), vocab)?
            }
            (None, None) if ghost => {
                let blank = vec![b' '; 2 * context + 2];
                Tokens::from_text(&blank, Alphabet::Bytes, "blanks")?
            }
            (None, None) => {
                return Err(Error::new(
                    ErrorKind::Input,
                    "nothing to train on; name a text with --text FILE, or tokens with --tokens FILE.bin",
                ));
            }
        };
        Ok(Arc::new(tokens))
    }

    /// True if no file is named.
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_none() && self.tokens.is_none()
    }
}
