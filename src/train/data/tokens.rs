//! All tokens of a text or of a file of token numbers, in memory.
//!
//! Tokens stay as wide as they came (1, 2 or 4 bytes) and are widened to u32 where a batch is filled: a file takes
//! its own size, and so does a text by bytes. Every token is checked once, on opening, so that no kernel meets
//! an index outside the embedding.

use super::batches::IGNORED;
use super::vocabulary::Vocabulary;
use crate::error::{Error, ErrorKind, Result};
use crate::files;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// What one token of a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Alphabet {
    /// A byte: 256 tokens, any file.
    Bytes,
    /// A character: as many tokens as the text has different ones; the text must be UTF-8.
    Characters,
}

/// How many bytes hold a token number, little endian, in a file of token numbers. Files do not say it themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Width {
    /// One byte.
    U8,
    /// Two bytes: nanoGPT's files, and others with at most 65,536 tokens in the vocabulary.
    #[default]
    U16,
    /// Four bytes.
    U32,
}

impl Width {
    /// Bytes per token.
    pub const fn bytes(self) -> usize {
        match self {
            Width::U8 => 1,
            Width::U16 => 2,
            Width::U32 => 4,
        }
    }
}

impl fmt::Display for Width {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Width::U8 => "u8",
            Width::U16 => "u16",
            Width::U32 => "u32",
        })
    }
}

impl FromStr for Width {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        [Width::U8, Width::U16, Width::U32]
            .into_iter()
            .find(|w| w.to_string() == s)
            .ok_or_else(|| format!("'{s}' is no token width; choose u8, u16 or u32"))
    }
}

/// The tokens of a text, all below the length of its vocabulary.
pub struct Tokens {
    origin: String,
    vocabulary: Vocabulary,
    width: Width,
    bytes: Vec<u8>,
    fingerprint: u32,
}

impl Tokens {
    /// The tokens of `text`. An error if it is empty or, by characters, no UTF-8. `origin` names it in messages.
    pub fn from_text(text: &[u8], alphabet: Alphabet, origin: &str) -> Result<Self> {
        if text.is_empty() {
            return Err(empty(origin));
        }
        let (vocabulary, width, bytes) = match alphabet {
            Alphabet::Bytes => (Vocabulary::Bytes, Width::U8, text.to_vec()),
            Alphabet::Characters => {
                let text = std::str::from_utf8(text).map_err(|e| {
                    let offset = e.valid_up_to();
                    input(format!(
                        "{origin} is no UTF-8 text: the byte {:#04x} at offset {offset} belongs to no character; convert it to UTF-8, or train by bytes instead of characters",
                        text[offset]
                    ))
                })?;
                let vocabulary = Vocabulary::characters(text);
                let (width, bytes) = number_characters(text, &vocabulary);
                (vocabulary, width, bytes)
            }
        };
        Ok(Tokens {
            origin: origin.to_owned(),
            vocabulary,
            width,
            bytes,
            fingerprint: crc32fast::hash(text),
        })
    }

    /// The tokens of the text in the file at `path`, which is read whole.
    pub fn read_text(path: &Path, alphabet: Alphabet) -> Result<Self> {
        let text = files::read(path, u64::MAX).map_err(|e| unreadable(path, e))?;
        Tokens::from_text(&text, alphabet, &path.display().to_string())
    }

    /// The token numbers in the file at `path`, little endian, each `width` wide (nanoGPT's are [`Width::U16`]), read
    /// whole.
    ///
    /// `vocabulary` is the number of tokens of the tokenizer; without it, the largest number in the file plus one. Every
    /// number is checked against it. An error if the file is missing, empty, no whole number of tokens, holds a number
    /// outside the vocabulary, or looks like a file of a greater width.
    pub fn read_binary(path: &Path, width: Width, vocabulary: Option<usize>) -> Result<Self> {
        let origin = path.display().to_string();
        let file = std::fs::metadata(path).map_err(|e| unreadable(path, e))?;
        if file.is_file() && file.len() == 0 {
            return Err(empty(&origin));
        }
        let bytes = files::read(path, u64::MAX).map_err(|e| unreadable(path, e))?;
        if bytes.len() % width.bytes() != 0 {
            return Err(input(format!(
                "{origin} holds {} bytes, which is no multiple of the {} bytes of a {width} token; it is cut short or of another width",
                bytes.len(),
                width.bytes()
            )));
        }
        let largest = check_numbers(&bytes, width, vocabulary, &origin)?;
        let size = vocabulary.unwrap_or(largest as usize + 1);
        Ok(Tokens {
            origin,
            vocabulary: Vocabulary::Numbers { size },
            width,
            fingerprint: crc32fast::hash(&bytes),
            bytes,
        })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.width.bytes()
    }

    /// True without any token; never so for tokens that were read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the numbers mean.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// The file's path, or the name that the text was given.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// CRC-32 of the text or file as it was read: tells in a checkpoint whether a run goes on with the same data.
    pub fn fingerprint(&self) -> u32 {
        self.fingerprint
    }

    /// Copies tokens `start .. start + into.len()` into `into`. Panics if they reach beyond the last token.
    pub fn copy(&self, start: usize, into: &mut [u32]) {
        let end = start + into.len();
        assert!(
            end <= self.len(),
            "tokens {start}..{end} reach beyond the {} tokens of {}",
            self.len(),
            self.origin
        );
        let width = self.width.bytes();
        let bytes = &self.bytes[start * width..end * width];
        for (token, from) in into.iter_mut().zip(numbers(bytes, self.width)) {
            *token = from;
        }
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, v) = (self.len(), self.vocabulary.len());
        write!(f, "Tokens({}: {n} of {v}, {})", self.origin, self.width)
    }
}

/// The token numbers in `bytes`.
fn numbers(bytes: &[u8], width: Width) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(width.bytes()).map(move |b| match width {
        Width::U8 => b[0] as u32,
        Width::U16 => u16::from_le_bytes([b[0], b[1]]) as u32,
        Width::U32 => u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
    })
}

/// The characters of `text` as little-endian numbers, in two bytes if the vocabulary allows it, else four.
fn number_characters(text: &str, vocabulary: &Vocabulary) -> (Width, Vec<u8>) {
    let Vocabulary::Characters(known) = vocabulary else {
        unreachable!("asked for a vocabulary of characters")
    };
    let mut number = vec![0u32; char::MAX as usize + 1];
    for (i, &c) in known.iter().enumerate() {
        number[c as usize] = i as u32;
    }
    let numbers = text.chars().map(|c| number[c as usize]);
    if known.len() <= 1 << 16 {
        let bytes = numbers.flat_map(|t| (t as u16).to_le_bytes()).collect();
        (Width::U16, bytes)
    } else {
        (Width::U32, numbers.flat_map(u32::to_le_bytes).collect())
    }
}

/// The largest token number, after checking all of them.
fn check_numbers(
    bytes: &[u8],
    width: Width,
    vocabulary: Option<usize>,
    origin: &str,
) -> Result<u32> {
    let (mut largest, mut odd) = (0, 0);
    // Whole chunks first, without a branch per token; the index is looked for only when something is wrong.
    for chunk in bytes.chunks(1 << 16) {
        for (i, token) in numbers(chunk, width).enumerate() {
            largest = largest.max(token);
            odd = if i % 2 == 1 { token.max(odd) } else { odd };
        }
    }
    // A token that is IGNORED as a label would silently not be learned.
    let limit = vocabulary.unwrap_or(IGNORED as usize);
    if largest as usize >= limit || largest == IGNORED {
        let wrong = |&t: &u32| t as usize >= limit || t == IGNORED;
        let index = numbers(bytes, width).position(|t| wrong(&t));
        let index = index.expect("the largest token is one of them");
        let token = numbers(&bytes[index * width.bytes()..], width).next();
        return Err(input(format!(
            "token {} at index {index} of {origin} (read as {width}) does not lie below the vocabulary's {limit}; give the vocabulary of its tokenizer, or the width that it was written with",
            token.expect("an index found above"),
        )));
    }
    // Read at half its width, a file's every second number is its upper half: 0, or 1 and 2 too up to a vocabulary of 196,608. It
    // would train, on nonsense.
    const TELLING: usize = 64;
    let upper = if width == Width::U16 { 2 } else { 0 };
    if odd <= upper
        && largest > upper
        && width != Width::U32
        && bytes.len() / width.bytes() >= TELLING
    {
        let wider = match width {
            Width::U8 => Width::U16,
            Width::U16 | Width::U32 => Width::U32,
        };
        return Err(input(format!(
            "every second token of {origin}, read as {width}, is at most {odd}: it looks like a file of {wider} tokens; read it as {wider}"
        )));
    }
    Ok(largest)
}

fn input(sentence: String) -> Error {
    Error::new(ErrorKind::Input, sentence)
}

fn empty(origin: &str) -> Error {
    input(format!("{origin} is empty: there is nothing to train on"))
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("cannot read {}: {error}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use tempfile::TempDir;

    fn file(contents: &[u8]) -> (TempDir, PathBuf) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("data.bin");
        std::fs::write(&path, contents).unwrap();
        (dir, path)
    }

    fn all(tokens: &Tokens) -> Vec<u32> {
        let mut into = vec![9; tokens.len()];
        tokens.copy(0, &mut into);
        into
    }

    fn u16s(numbers: &[u16]) -> Vec<u8> {
        numbers.iter().flat_map(|t| t.to_le_bytes()).collect()
    }

    fn u32s(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|t| t.to_le_bytes()).collect()
    }

    #[test]
    fn text_by_bytes_and_by_characters() {
        let (_dir, path) = file("bé\nb".as_bytes());
        let bytes = Tokens::read_text(&path, Alphabet::Bytes).unwrap();
        assert_eq!(all(&bytes), [98, 0xc3, 0xa9, 10, 98]);
        assert_eq!(bytes.vocabulary(), &Vocabulary::Bytes);
        let characters = Tokens::read_text(&path, Alphabet::Characters).unwrap();
        assert_eq!(all(&characters), [1, 2, 0, 1]);
        assert_eq!(characters.vocabulary().decode(&all(&characters)), "bé\nb");
        assert_eq!(characters.fingerprint(), bytes.fingerprint());
        let mut middle = [0; 2];
        characters.copy(1, &mut middle);
        assert_eq!(middle, [2, 0]);
    }

    #[test]
    fn more_than_65536_characters_take_four_bytes() {
        let text: String = ('\u{10000}'..).take(65_537).collect();
        let tokens = Tokens::from_text(text.as_bytes(), Alphabet::Characters, "text").unwrap();
        assert_eq!(tokens.width, Width::U32);
        assert!(all(&tokens).into_iter().eq(0..65_537));
    }

    #[test]
    fn binary_files_are_read_at_every_width() {
        let (_dir, path) = file(&u16s(&[5, 65_535, 0]));
        let tokens = Tokens::read_binary(&path, Width::default(), None).unwrap();
        assert_eq!(all(&tokens), [5, 65_535, 0]);
        assert_eq!(
            tokens.vocabulary(),
            &Vocabulary::Numbers { size: 65_536 },
            "the largest plus one"
        );
        let (_dir, path) = file(&u32s(&[70_000, 1]));
        let tokens = Tokens::read_binary(&path, Width::U32, Some(128_256)).unwrap();
        assert_eq!(all(&tokens), [70_000, 1]);
        assert_eq!(tokens.vocabulary().len(), 128_256);
        let (_dir, path) = file(&[3, 0, 255]);
        let tokens = Tokens::read_binary(&path, Width::U8, Some(256)).unwrap();
        assert_eq!(all(&tokens), [3, 0, 255]);
    }

    #[track_caller]
    fn refused(result: Result<Tokens>, kind: ErrorKind, words: &[&str]) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{error} lacks {word:?}");
        }
    }

    #[test]
    fn missing_and_empty_files_are_sentences_with_the_path() {
        let dir = TempDir::new().unwrap();
        let missing = dir.path().join("no.txt");
        let name = missing.to_str().unwrap();
        refused(
            Tokens::read_text(&missing, Alphabet::Bytes),
            ErrorKind::Io,
            &["cannot read", name],
        );
        refused(
            Tokens::read_binary(&missing, Width::U16, None),
            ErrorKind::Io,
            &["cannot read", name],
        );
        refused(
            Tokens::read_binary(dir.path(), Width::U16, None),
            ErrorKind::Io,
            &["cannot read", "no regular file"],
        );
        let (_dir, path) = file(b"");
        let name = path.to_str().unwrap();
        for alphabet in [Alphabet::Bytes, Alphabet::Characters] {
            refused(
                Tokens::read_text(&path, alphabet),
                ErrorKind::Input,
                &[name, "is empty"],
            );
        }
        refused(
            Tokens::read_binary(&path, Width::U16, None),
            ErrorKind::Input,
            &[name, "is empty"],
        );
    }

    #[test]
    fn what_is_no_utf8_is_named_with_its_offset() {
        let (_dir, path) = file(b"ab\xc3\xa9\xffz");
        refused(
            Tokens::read_text(&path, Alphabet::Characters),
            ErrorKind::Input,
            &[path.to_str().unwrap(), "0xff at offset 4"],
        );
        assert!(Tokens::read_text(&path, Alphabet::Bytes).is_ok());
        // A character cut short at the end of the file.
        refused(
            Tokens::from_text(b"a\xc3", Alphabet::Characters, "text"),
            ErrorKind::Input,
            &["0xc3 at offset 1"],
        );
    }

    #[test]
    fn a_length_that_is_no_whole_number_of_tokens() {
        let (_dir, path) = file(&[1, 2, 3, 4, 5, 6, 7]);
        let name = path.to_str().unwrap();
        refused(
            Tokens::read_binary(&path, Width::U16, None),
            ErrorKind::Input,
            &[name, "7 bytes", "2 bytes of a u16 token"],
        );
        refused(
            Tokens::read_binary(&path, Width::U32, None),
            ErrorKind::Input,
            &[name, "7 bytes", "4 bytes of a u32 token"],
        );
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_named_with_its_index() {
        let mut numbers = vec![1u16; 70_000];
        numbers[69_999] = 50_257;
        let (_dir, path) = file(&u16s(&numbers));
        refused(
            Tokens::read_binary(&path, Width::U16, Some(50_257)),
            ErrorKind::Input,
            &[
                "token 50257 at index 69999",
                path.to_str().unwrap(),
                "below the vocabulary's 50257",
            ],
        );
        assert!(Tokens::read_binary(&path, Width::U16, Some(50_258)).is_ok());
        let (_dir, path) = file(&u32s(&[3, IGNORED]));
        refused(
            Tokens::read_binary(&path, Width::U32, None),
            ErrorKind::Input,
            &["token 4294967295 at index 1"],
        );
        refused(
            Tokens::read_binary(&path, Width::U32, Some(1 << 40)),
            ErrorKind::Input,
            &["token 4294967295 at index 1"],
        );
    }

    #[test]
    fn a_file_of_another_width_is_noticed() {
        let numbers: Vec<u32> = (1..65).collect();
        let (_dir, path) = file(&u32s(&numbers));
        refused(
            Tokens::read_binary(&path, Width::U16, Some(50_257)),
            ErrorKind::Input,
            &["every second token", "read it as u32"],
        );
        assert!(Tokens::read_binary(&path, Width::U32, Some(50_257)).is_ok());
        // Of a larger vocabulary the upper halves are 0, 1 and 2.
        let numbers: Vec<u32> = (0..100).map(|i| i * 1_500 + 3).collect();
        let (_dir, path) = file(&u32s(&numbers));
        refused(
            Tokens::read_binary(&path, Width::U16, None),
            ErrorKind::Input,
            &["every second token", "at most 2", "read it as u32"],
        );
    }

    #[test]
    fn the_fingerprint_is_the_files_crc() {
        let (_dir, path) = file(b"123456789");
        // The check value of CRC-32/ISO-HDLC.
        let tokens = Tokens::read_text(&path, Alphabet::Bytes).unwrap();
        assert_eq!(tokens.fingerprint(), 0xcbf4_3926);
        let tokens = Tokens::read_binary(&path, Width::U8, None).unwrap();
        assert_eq!(tokens.fingerprint(), 0xcbf4_3926);
    }

    #[test]
    #[should_panic(expected = "tokens 2..6 reach beyond the 5 tokens of text")]
    fn copying_beyond_the_end_panics() {
        let tokens = Tokens::from_text(b"abcde", Alphabet::Bytes, "text").unwrap();
        tokens.copy(2, &mut [0; 4]);
    }

    #[test]
    fn widths_parse() {
        assert_eq!("u32".parse(), Ok(Width::U32));
        assert!("u64".parse::<Width>().unwrap_err().contains("'u64'"));
    }
}
