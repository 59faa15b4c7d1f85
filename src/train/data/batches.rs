//! The rows of training batches and the windows of validation, filled by whichever chip they belong to.

use super::tokens::Tokens;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Documents;
use crate::random::Stream;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// The label of a position that has none: it adds nothing to the loss and gets no gradient.
pub const IGNORED: u32 = u32::MAX;

/// The share of a text that trains unless the user says otherwise: the first nine tenths, as in nanoGPT.
pub const TRAIN_SHARE: f64 = 0.9;

/// Which tokens train and which validate: the first ones and the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// Tokens that batches are drawn from.
    pub train: Range<usize>,
    /// Tokens that the validation loss is the mean over; empty for none.
    pub validation: Range<usize>,
}

impl Split {
    /// The first `floor(train_share * tokens)` of `tokens` train, the others validate. An error if the share does not lie
    /// above 0 and up to 1.
    pub fn new(tokens: usize, train_share: f64) -> Result<Self> {
        if !(train_share > 0.0 && train_share <= 1.0) {
            return Err(Error::new(
                ErrorKind::Input,
                format!(
                    "the share of the text that trains is {train_share}; it must lie above 0 and up to 1 (usual: {TRAIN_SHARE})"
                ),
            ));
        }
        let train = (train_share * tokens as f64) as usize;
        Ok(Split {
            train: 0..train,
            validation: train..tokens,
        })
    }
}

/// Tokens of a step at most.
const MOST_TOKENS: usize = 1 << 40;

/// Rows of `context` tokens, b of them per step, and the windows that cover the validation split.
///
/// Row `r` of step `s` starts at a token drawn uniformly from the training split, from the seed's stream "batch" at index
/// `s b + r`. Label `i` of a row is the token after token `i`. With [`Batches::with_separator`] a row holds several documents.
#[derive(Clone, Debug)]
pub struct Batches {
    tokens: Arc<Tokens>,
    split: Split,
    context: usize,
    rows: usize,
    stream: Stream,
    /// The token that ends a document.
    separator: Option<u32>,
    /// Labels in the validation split.
    validation_labels: usize,
}

impl Batches {
    /// Batches of `rows` sequences (over the whole mesh) of `context` tokens.
    ///
    /// An error if either is 0, or if a split is shorter than one context and its last label (an empty validation split is
    /// none). Panics if the split reaches beyond the tokens.
    pub fn new(
        tokens: Arc<Tokens>,
        split: Split,
        context: usize,
        rows: usize,
        seed: u64,
    ) -> Result<Self> {
        let input = |sentence: String| Err(Error::new(ErrorKind::Input, sentence));
        assert!(
            split.train.end <= tokens.len() && split.validation.end <= tokens.len(),
            "{split:?} reaches beyond the {} tokens of {}",
            tokens.len(),
            tokens.origin()
        );
        if context == 0 || rows == 0 {
            return input(format!(
                "a batch of {rows} rows of {context} tokens has nothing to learn; both must be at least 1"
            ));
        }
        if rows.checked_mul(context).is_none_or(|n| n > MOST_TOKENS) {
            return input(format!(
                "a batch of {rows} rows of {context} tokens is more than the {MOST_TOKENS} tokens that a step may have"
            ));
        }
        let need = context + 1;
        let short = |name: &str, len: usize, remedy: &str| {
            input(format!(
                "the {name} split of {} holds {len} tokens, fewer than the {need} of one context of {context} and its last label; take a longer text, a context of at most {}, or {remedy}",
                tokens.origin(),
                len.saturating_sub(1)
            ))
        };
        if split.train.len() < need {
            return short("training", split.train.len(), "a larger training share");
        }
        if !split.validation.is_empty() && split.validation.len() < need {
            return short(
                "validation",
                split.validation.len(),
                "a smaller training share",
            );
        }
        Ok(Batches {
            validation_labels: split.validation.len().saturating_sub(1),
            separator: None,
            tokens,
            split,
            context,
            rows,
            stream: Stream::new(seed, "batch"),
        })
    }

    /// The same rows as documents that each end in token `separator`: attention stays inside of each, positions begin at 0 in each, and
    /// the last token of a document has no label.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] if it is not a token of the vocabulary, or if no token of a split has a label then.
    pub fn with_separator(self, separator: u32) -> Result<Self> {
        let refuse = |why: String| Err(Error::new(ErrorKind::Input, why));
        let (origin, len) = (self.tokens.origin(), self.tokens.vocabulary().len());
        if separator as usize >= len {
            return refuse(format!(
                "documents of {origin} cannot end in token {separator}: its vocabulary has {len}; take one below"
            ));
        }
        let labels = |split: &Range<usize>| {
            let mut tokens = vec![0; split.len().saturating_sub(1)];
            self.tokens.copy(split.start, &mut tokens);
            tokens.iter().filter(|t| **t != separator).count()
        };
        let (train, validation) = (labels(&self.split.train), labels(&self.split.validation));
        for (name, split, labels) in [
            ("training", &self.split.train, train),
            ("validation", &self.split.validation, validation),
        ] {
            if labels == 0 && !split.is_empty() {
                return refuse(format!(
                    "every document in the {} tokens of the {name} split of {origin} is token {separator} by itself, which has no \
                     label; name another end",
                    split.len()
                ));
            }
        }
        Ok(Batches {
            separator: Some(separator),
            validation_labels: validation,
            ..self
        })
    }

    /// The token that ends a document, if rows hold several.
    pub fn separator(&self) -> Option<u32> {
        self.separator
    }

    /// The documents of rows of these tokens; none if a row is one.
    pub fn documents(&self, tokens: &[u32]) -> Option<Documents> {
        let separator = self.separator?;
        let ends: Vec<bool> = tokens.iter().map(|t| *t == separator).collect();
        Some(Documents::ending_at(self.context, &ends))
    }

    /// Labels in the batch of `step`, over which its loss is a mean; 1 if there are none, whose sum is 0.
    pub fn labels(&self, step: u64) -> usize {
        let all = self.rows * self.context;
        if self.separator.is_none() {
            return all;
        }
        let (mut tokens, mut labels) = (vec![0; all], vec![0; all]);
        self.fill(step, 0..self.rows, &mut tokens, &mut labels);
        labels.iter().filter(|l| **l != IGNORED).count().max(1)
    }

    /// The same text in steps of another number of rows, at least 1.
    pub(crate) fn with_rows(&self, rows: usize) -> Self {
        assert!(rows > 0, "a batch has rows");
        Batches {
            rows,
            ..self.clone()
        }
    }

    /// Tokens per row: t.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Rows per step, over the whole mesh: b.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The tokens that the rows are cut from.
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Which tokens train and which validate.
    pub fn split(&self) -> &Split {
        &self.split
    }

    /// The index of the first token of `row` in `step`. Panics if the step has no such row.
    pub fn start(&self, step: u64, row: usize) -> usize {
        assert!(row < self.rows, "no row {row} in a batch of {}", self.rows);
        // The last start leaves one token beyond the context, the last label.
        let starts = self.split.train.len() - self.context;
        let index = step.wrapping_mul(self.rows as u64).wrapping_add(row as u64);
        self.split.train.start + self.stream.below(index, starts as u64) as usize
    }

    /// Fills the `rows` of `step`: `tokens` and `labels` are [rows, t]. Panics if they are not, or beyond the batch.
    pub fn fill(&self, step: u64, rows: Range<usize>, tokens: &mut [u32], labels: &mut [u32]) {
        self.check_lengths(&rows, tokens, labels);
        let outputs = tokens
            .chunks_exact_mut(self.context)
            .zip(labels.chunks_exact_mut(self.context));
        for (row, (tokens, labels)) in rows.zip(outputs) {
            let start = self.start(step, row);
            self.tokens.copy(start, tokens);
            self.tokens.copy(start + 1, labels);
            self.ignore_ends(tokens, labels);
        }
    }

    /// The last token of a document has no label.
    fn ignore_ends(&self, tokens: &[u32], labels: &mut [u32]) {
        let ends = |(token, _): &(&u32, &mut u32)| Some(**token) == self.separator;
        let last = tokens.iter().zip(labels).filter(ends);
        last.for_each(|(_, label)| *label = IGNORED);
    }

    /// Number of labels in the validation split: each of its tokens but the first of a document. The validation loss is the sum of
    /// the losses of all windows divided by this.
    pub fn validation_labels(&self) -> usize {
        self.validation_labels
    }

    /// Tokens of the validation split that have another one behind them.
    fn followed(&self) -> usize {
        self.split.validation.len().saturating_sub(1)
    }

    /// Number of windows that cover the validation split: one for each t of its tokens but the last, rounded up.
    pub fn validation_windows(&self) -> usize {
        self.followed().div_ceil(self.context)
    }

    /// Fills validation `windows`: `tokens` and `labels` are [windows, t].
    ///
    /// Window `w` starts at token `w t` of the split. Where a label would lie beyond the split, the token is 0 and the label
    /// [`IGNORED`]: at the end of the last window, and everywhere in windows from [`Self::validation_windows`] on, so that
    /// every batch can be full. Panics if the slices are of other lengths.
    pub fn fill_validation(&self, windows: Range<usize>, tokens: &mut [u32], labels: &mut [u32]) {
        self.check_lengths(&windows, tokens, labels);
        let outputs = tokens
            .chunks_exact_mut(self.context)
            .zip(labels.chunks_exact_mut(self.context));
        for (window, (tokens, labels)) in windows.zip(outputs) {
            let first = window.saturating_mul(self.context).min(self.followed());
            let there = (self.followed() - first).min(self.context);
            let start = self.split.validation.start + first;
            // Nothing is copied past the last window, where an empty split has no token after its start.
            if there > 0 {
                self.tokens.copy(start, &mut tokens[..there]);
                self.tokens.copy(start + 1, &mut labels[..there]);
                self.ignore_ends(&tokens[..there], &mut labels[..there]);
            }
            tokens[there..].fill(0);
            labels[there..].fill(IGNORED);
        }
    }

    fn check_lengths(&self, rows: &Range<usize>, tokens: &[u32], labels: &[u32]) {
        let n = rows.len() * self.context;
        assert!(
            tokens.len() == n && labels.len() == n,
            "rows {rows:?} of {} tokens need {n} tokens and labels, not {} and {}",
            self.context,
            tokens.len(),
            labels.len()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::Alphabet;

    /// A text whose token `i` is `i`.
    fn counting(len: usize) -> Arc<Tokens> {
        let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
        Arc::new(Tokens::from_text(&bytes, Alphabet::Bytes, "count").unwrap())
    }

    fn batches(len: usize, share: f64, context: usize, rows: usize) -> Result<Batches> {
        Batches::new(counting(len), Split::new(len, share)?, context, rows, 1)
    }

    #[test]
    fn the_split_is_nanogpts() {
        let split = Split::new(1_115_394, TRAIN_SHARE).unwrap();
        assert_eq!(split.train, 0..1_003_854);
        assert_eq!(split.validation, 1_003_854..1_115_394);
        assert!(Split::new(10, 1.0).unwrap().validation.is_empty());
        for share in [0.0, 1.1, -0.5, f64::NAN] {
            let sentence = Split::new(10, share).unwrap_err().to_string();
            assert!(sentence.contains(&share.to_string()), "{sentence}");
        }
    }

    #[test]
    fn starts_reach_both_ends_and_labels_stay_in_the_split() {
        let b = batches(20, 0.5, 4, 3).unwrap();
        let starts: Vec<usize> = (0..100)
            .flat_map(|s| (0..3).map(move |r| (s, r)))
            .map(|(s, r)| b.start(s, r))
            .collect();
        // Ten tokens train: the last start is 5, whose last label is token 9.
        assert!((0..=5).all(|i| starts.contains(&i)), "{starts:?}");
        assert!(starts.iter().all(|&s| s <= 5), "{starts:?}");
    }

    #[test]
    fn one_context_and_its_label_is_just_enough() {
        let b = batches(10, 0.5, 4, 1).unwrap();
        assert_eq!((b.start(0, 0), b.start(9, 0)), (0, 0));
        let (mut tokens, mut labels) = ([9; 4], [9; 4]);
        b.fill(3, 0..1, &mut tokens, &mut labels);
        assert_eq!((tokens, labels), ([0, 1, 2, 3], [1, 2, 3, 4]));
    }

    #[test]
    fn a_share_of_the_rows_is_that_share_of_the_batch() {
        let b = batches(200, 0.9, 5, 6).unwrap();
        let fill = |rows: Range<usize>| {
            let n = rows.len() * 5;
            let (mut tokens, mut labels) = (vec![0; n], vec![0; n]);
            b.fill(7, rows, &mut tokens, &mut labels);
            (tokens, labels)
        };
        let (tokens, labels) = fill(0..6);
        for (row, t) in tokens.chunks(5).enumerate() {
            assert_eq!(t[0] as usize, b.start(7, row));
            assert!(t.windows(2).all(|w| w[1] == w[0] + 1));
        }
        assert!(tokens.iter().zip(&labels).all(|(t, l)| *l == t + 1));
        for ranks in [2, 3, 6] {
            let share = 6 / ranks;
            let parts: Vec<_> = (0..ranks)
                .map(|r| fill(r * share..(r + 1) * share))
                .collect();
            let joined: Vec<u32> = parts.iter().flat_map(|p| p.0.clone()).collect();
            assert_eq!(joined, tokens);
            let joined: Vec<u32> = parts.iter().flat_map(|p| p.1.clone()).collect();
            assert_eq!(joined, labels);
        }
        assert_eq!(fill(2..2), (vec![], vec![]));
    }

    #[test]
    fn batches_are_fixed_for_ever() {
        // Frozen: a resumed run must see the rows that the interrupted one would have seen, in every later version.
        let b = batches(200, 0.9, 5, 3).unwrap();
        let starts: Vec<usize> = (0..3)
            .flat_map(|s| [b.start(s, 0), b.start(s, 2)])
            .collect();
        assert_eq!(starts, FROZEN);
    }
    const FROZEN: [usize; 6] = [104, 50, 85, 101, 44, 50];

    #[test]
    fn windows_cover_the_validation_split_once() {
        // 21 to 26 tokens validate: 20 to 25 labels in windows of 5, with the last one full or padded.
        for len in 21..=26 {
            let tokens = counting(100 + len);
            let split = Split {
                train: 0..100,
                validation: 100..100 + len,
            };
            let b = Batches::new(tokens, split, 5, 1, 0).unwrap();
            assert_eq!(b.validation_labels(), len - 1);
            assert_eq!(b.validation_windows(), (len - 1).div_ceil(5));
            // Two windows more than there are.
            let windows = b.validation_windows() + 2;
            let (mut t, mut l) = (vec![7; windows * 5], vec![7; windows * 5]);
            b.fill_validation(0..windows, &mut t, &mut l);
            let expected: Vec<u32> = (101..100 + len as u32).collect();
            assert_eq!(l[..len - 1], expected);
            assert!(t[..len - 1].iter().zip(&l).all(|(t, l)| t + 1 == *l));
            assert!(t[len - 1..].iter().all(|&t| t == 0));
            assert!(l[len - 1..].iter().all(|&l| l == IGNORED));
            // One at a time gives the same.
            for w in 0..windows {
                let (mut t1, mut l1) = ([3; 5], [3; 5]);
                b.fill_validation(w..w + 1, &mut t1, &mut l1);
                assert_eq!((&t1[..], &l1[..]), (&t[w * 5..][..5], &l[w * 5..][..5]));
            }
        }
    }

    #[test]
    fn without_a_validation_split_there_are_no_windows() {
        let b = batches(20, 1.0, 4, 2).unwrap();
        assert_eq!((b.validation_windows(), b.validation_labels()), (0, 0));
        let (mut t, mut l) = ([1; 4], [1; 4]);
        b.fill_validation(3..4, &mut t, &mut l);
        assert_eq!((t, l), ([0; 4], [IGNORED; 4]));
    }

    #[test]
    fn what_is_too_short_says_both_numbers_and_a_remedy() {
        let sentence = |len, share, context, rows| {
            let error = batches(len, share, context, rows).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Input);
            error.to_string()
        };
        let train = sentence(10, 0.5, 5, 1);
        assert!(
            train.contains("training split of count holds 5 tokens, fewer than the 6")
                && train.contains("context of at most 4"),
            "{train}"
        );
        let validation = sentence(100, 0.95, 5, 1);
        assert!(
            validation.contains("validation split of count holds 5 tokens, fewer than the 6")
                && validation.contains("smaller training share"),
            "{validation}"
        );
        assert!(sentence(100, 0.9, 0, 2).contains("2 rows of 0 tokens"));
        assert!(sentence(100, 0.9, 2, 0).contains("0 rows of 2 tokens"));
    }

    #[test]
    fn the_last_token_of_a_document_has_no_label() {
        // Token i of the text is i: documents end in 103, of which there is one.
        let tokens = counting(126);
        let split = Split {
            train: 0..100,
            validation: 100..126,
        };
        let plain = Batches::new(tokens, split, 5, 4, 3).unwrap();
        assert_eq!((plain.separator(), plain.labels(0)), (None, 20));
        assert!(plain.documents(&[0; 5]).is_none());
        let b = plain.clone().with_separator(103).unwrap();
        assert_eq!(b.separator(), Some(103));
        assert_eq!((b.validation_labels(), b.validation_windows()), (24, 5));
        let (mut t, mut l) = ([0; 5], [0; 5]);
        b.fill_validation(0..1, &mut t, &mut l);
        assert_eq!(
            (t, l),
            ([100, 101, 102, 103, 104], [101, 102, 103, IGNORED, 105])
        );
        let documents = b.documents(&t).unwrap();
        assert_eq!(documents.numbers(), [0, 0, 0, 0, 1]);
        assert_eq!(documents.positions(), [0, 1, 2, 3, 0]);
        let end = plain.start(0, 1) as u32 + 2;
        let b = plain.with_separator(end).unwrap();
        let (mut t, mut l) = ([0; 20], [0; 20]);
        b.fill(0, 0..4, &mut t, &mut l);
        assert_eq!((t[7], l[7]), (end, IGNORED));
        let there = l.iter().filter(|l| **l != IGNORED).count();
        assert_eq!(
            (b.labels(0), t.iter().filter(|t| **t != end).count()),
            (there, there)
        );
    }

    #[test]
    fn an_end_that_leaves_no_label_is_refused() {
        let all_alike = Tokens::from_text(&[7; 40], Alphabet::Bytes, "sevens").unwrap();
        let split = Split::new(40, 0.5).unwrap();
        let b = Batches::new(Arc::new(all_alike), split, 4, 1, 0).unwrap();
        let sentence = b.clone().with_separator(7).unwrap_err().to_string();
        assert!(
            sentence.contains("20 tokens of the training split of sevens is token 7 by itself"),
            "{sentence}"
        );
        let sentence = b.with_separator(256).unwrap_err().to_string();
        assert!(
            sentence.contains("sevens cannot end in token 256: its vocabulary has 256"),
            "{sentence}"
        );
    }

    #[test]
    #[should_panic(expected = "no row 2 in a batch of 2")]
    fn rows_beyond_the_batch_panic() {
        batches(100, 0.9, 4, 2).unwrap().start(0, 2);
    }
}
