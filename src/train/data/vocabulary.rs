//! What the token numbers mean.

use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// What the token numbers below [`len`](Vocabulary::len) mean.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vocabulary {
    /// Token `i` is the byte `i`: 256 tokens for any file.
    Bytes,
    /// Token `i` is the `i`-th of these characters, which ascend by code point without repetition (as nanoGPT numbers them).
    Characters(Vec<char>),
    /// Tokens of another program's tokenizer: numbers that only it can turn into text.
    Numbers {
        /// Token numbers lie below this.
        size: usize,
    },
}

impl Vocabulary {
    /// The characters of `text`, in ascending order.
    pub fn characters(text: &str) -> Self {
        let mut seen = vec![false; char::MAX as usize + 1];
        text.chars().for_each(|c| seen[c as usize] = true);
        Vocabulary::Characters(
            ('\0'..=char::MAX)
                .filter(|&c| seen[c as usize])
                .collect::<Vec<_>>(),
        )
    }

    /// Number of tokens: v.
    pub fn len(&self) -> usize {
        match self {
            Vocabulary::Bytes => 256,
            Vocabulary::Characters(characters) => characters.len(),
            Vocabulary::Numbers { size } => *size,
        }
    }

    /// True without any token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens of `text`: its bytes, its characters, or the numbers written in it with white space between.
    ///
    /// An unknown character, or a word that is no number below the size, is an error that names it and its place.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Vocabulary::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Vocabulary::Characters(known) => {
                debug_assert!(
                    known.is_sorted_by(|a, b| a < b),
                    "characters must ascend without repetition"
                );
                let token = |(place, c): (usize, char)| {
                    known.binary_search(&c).map(|i| i as u32).map_err(|_| {
                        Error::new(
                            ErrorKind::Input,
                            format!(
                                "character {c:?} (U+{:04X}), number {place} of the text counted from 0, is not among the {} characters of the vocabulary; leave it out",
                                c as u32,
                                known.len()
                            ),
                        )
                    })
                };
                text.chars().enumerate().map(token).collect()
            }
            Vocabulary::Numbers { size } => {
                let token = |(place, word): (usize, &str)| {
                    word.parse()
                        .ok()
                        .filter(|&t: &u32| (t as usize) < *size)
                        .ok_or_else(|| {
                            Error::new(
                                ErrorKind::Input,
                                format!(
                                    "{word:?}, word {place} of the text counted from 0, is no token number below the vocabulary's {size}; the text of a tokenised vocabulary is numbers with spaces between"
                                ),
                            )
                        })
                };
                text.split_whitespace().enumerate().map(token).collect()
            }
        }
    }

    /// The text of `tokens`. Bytes that form no UTF-8, and tokens outside the vocabulary, become U+FFFD; numbers are
    /// written with spaces between.
    pub fn decode(&self, tokens: &[u32]) -> String {
        match self {
            Vocabulary::Bytes => {
                // 0xff occurs in no UTF-8, so it stands for what is no byte.
                let byte = |&t| u8::try_from(t).unwrap_or(0xff);
                let bytes: Vec<u8> = tokens.iter().map(byte).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Vocabulary::Characters(known) => {
                let character = |&t: &u32| *known.get(t as usize).unwrap_or(&'\u{fffd}');
                tokens.iter().map(character).collect()
            }
            Vocabulary::Numbers { .. } => {
                let words: Vec<String> = tokens.iter().map(u32::to_string).collect();
                words.join(" ")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_ascend_by_code_point_and_round_trip() {
        let v = Vocabulary::characters("hello, wörld 🚀\n");
        let Vocabulary::Characters(known) = &v else {
            panic!("{v:?}")
        };
        assert_eq!(
            known.iter().collect::<String>(),
            "\n ,dehlorwö🚀",
            "{known:?}"
        );
        assert_eq!(v.len(), 12);
        assert_eq!(v.encode("\n h🚀").unwrap(), [0, 1, 5, 11]);
        assert_eq!(v.decode(&v.encode("hello 🚀").unwrap()), "hello 🚀");
        assert_eq!(v.decode(&[5, 99]), "h\u{fffd}");
    }

    #[test]
    fn an_unknown_character_is_named_with_its_place() {
        let error = Vocabulary::characters("abc").encode("ab€").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Input);
        let sentence = error.to_string();
        assert!(
            sentence.contains("'€' (U+20AC), number 2 ") && sentence.contains("the 3 characters"),
            "{sentence}"
        );
    }

    #[test]
    fn bytes_decode_what_is_no_text() {
        let v = Vocabulary::Bytes;
        assert_eq!(v.len(), 256);
        assert_eq!(v.encode("é").unwrap(), [0xc3, 0xa9]);
        assert_eq!(
            v.decode(&[104, 0xc3, 0xa9, 0xc3, 105, 300]),
            "hé\u{fffd}i\u{fffd}"
        );
    }

    #[test]
    fn numbers_are_written_as_words() {
        let v = Vocabulary::Numbers { size: 50257 };
        assert_eq!(v.encode(" 15496\n995 ").unwrap(), [15496, 995]);
        assert_eq!(v.decode(&[15496, 995]), "15496 995");
        for (text, word) in [
            ("1 50257", "\"50257\", word 1 "),
            ("x", "\"x\", word 0 "),
            ("-1", "\"-1\""),
        ] {
            let sentence = v.encode(text).unwrap_err().to_string();
            assert!(
                sentence.contains(word) && sentence.contains("50257"),
                "{sentence}"
            );
        }
    }

    #[test]
    fn json_round_trip() {
        for v in [
            Vocabulary::Bytes,
            Vocabulary::characters("a\n\"é"),
            Vocabulary::Numbers { size: 7 },
        ] {
            let text = serde_json::to_string(&v).unwrap();
            assert_eq!(serde_json::from_str::<Vocabulary>(&text).unwrap(), v);
        }
    }
}
