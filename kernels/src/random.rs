//! Random numbers that belong to the global element, not to the chip that asks.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns (key, counter) into four
//! 32-bit words without state. The key is made of a seed and a tensor's name, the counter is the element's index in the
//! global tensor: initial weights, dropout and batches are the same on every mesh.

/// A sequence of random numbers with an address for each: element `i` depends on nothing but seed, name and `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    name: u64,
}

impl Stream {
    /// The stream of `name` under `seed`. Streams of different names or seeds are independent.
    pub fn new(seed: u64, name: &str) -> Self {
        Stream {
            key: [seed as u32, (seed >> 32) as u32],
            name: fnv1a(name),
        }
    }

    /// Key and name as words, for kernels that draw the same numbers elsewhere.
    #[doc(hidden)]
    pub fn address(&self) -> [u32; 4] {
        [
            self.key[0],
            self.key[1],
            self.name as u32,
            (self.name >> 32) as u32,
        ]
    }

    /// The four words at counter `c`.
    #[inline]
    pub fn words(&self, c: u64) -> [u32; 4] {
        philox(
            [
                c as u32,
                (c >> 32) as u32,
                self.name as u32,
                (self.name >> 32) as u32,
            ],
            self.key,
        )
    }

    /// The same words, many at a time.
    pub(crate) fn many(&self) -> Many {
        let mut key = self.key;
        let keys = [(); 10].map(|()| {
            let now = key.map(u64::from);
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
            now
        });
        Many {
            keys,
            name: self.name,
        }
    }

    /// The word of element `i`: word `i mod 4` at counter `i / 4`.
    #[inline]
    pub fn word(&self, i: u64) -> u32 {
        self.words(i / 4)[(i % 4) as usize]
    }

    /// Element `i`, uniform on [0, 1) in steps of 2^-24.
    #[inline]
    pub fn uniform(&self, i: u64) -> f32 {
        (self.word(i) >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// Element `i`, uniform on the integers below `n`. Panics if `n` is 0.
    ///
    /// Uses 64 bits of the counter's words, so that the bias is below n / 2^64.
    pub fn below(&self, i: u64, n: u64) -> u64 {
        assert!(n > 0, "no integer lies below 0");
        let w = self.words(i);
        let wide = (w[0] as u64) << 32 | w[1] as u64;
        ((wide as u128 * n as u128) >> 64) as u64
    }

    /// Elements `4c .. 4c + 4`, each normal with mean 0 and variance 1 (Box and Muller 1958, in f64).
    #[inline]
    pub fn normals(&self, c: u64) -> [f32; 4] {
        let w = self.words(c);
        let pair = |a: u32, b: u32| {
            let u = (a as f64 + 1.0) / 4294967296.0;
            let (sin, cos) = (b as f64 * (std::f64::consts::TAU / 4294967296.0)).sin_cos();
            let r = (-2.0 * u.ln()).sqrt();
            ((r * cos) as f32, (r * sin) as f32)
        };
        let ((a, b), (c, d)) = (pair(w[0], w[1]), pair(w[2], w[3]));
        [a, b, c, d]
    }

    /// Elements `first ..` of [`Stream::normal`], as many as `out` holds.
    pub fn fill_normal(&self, first: u64, out: &mut [f32]) {
        let (mut i, end) = (first, first + out.len() as u64);
        let mut rest = out;
        while i < end {
            let skip = (i % 4) as usize;
            let four = self.normals(i / 4);
            let take = (4 - skip).min(rest.len());
            let (now, later) = rest.split_at_mut(take);
            now.copy_from_slice(&four[skip..skip + take]);
            i += take as u64;
            rest = later;
        }
    }

    /// Element `i`, normal with mean 0 and variance 1.
    pub fn normal(&self, i: u64) -> f32 {
        self.normals(i / 4)[(i % 4) as usize]
    }
}

/// A [`Stream`] with the keys of all rounds.
pub(crate) struct Many {
    keys: [[u64; 2]; 10],
    name: u64,
}

impl Many {
    /// The four words at each of the next `COUNTERS` counters: [`Stream::words`] in loops over counters, which a compiler makes
    /// vectors of. Inlined, so that they are those of the caller's instruction set.
    ///
    /// A word lies in 64 bits, of which a multiplication reads the lower half: the upper one may hold anything, and a round
    /// is two multiplications, two shifts and two operations on bits, without a move between lanes.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    pub(crate) fn next(&self, counters: &mut Counters) -> Drawn {
        let mut x = [
            counters.0,
            Lines([0; COUNTERS]),
            Lines([self.name; COUNTERS]),
            Lines([self.name >> 32; COUNTERS]),
        ];
        for i in 0..COUNTERS {
            x[1].0[i] = x[0].0[i] >> 32;
            counters.0.0[i] = x[0].0[i].wrapping_add(COUNTERS as u64);
        }
        // Two at a time: one round's result is the next one's operand, in other registers.
        for [even, odd] in self.keys.as_chunks().0 {
            x = round(&round(&x, even), odd);
        }
        let mut words = Lines([[0; 4]; COUNTERS]);
        for (i, words) in words.0.iter_mut().enumerate() {
            *words = [0, 1, 2, 3].map(|word: usize| x[word].0[i] as u32);
        }
        words
    }
}

/// What fills whole lines of the cache. Where the stack began in the middle of one, every other vector lay in two: dropout took
/// 2.7 times a stream in one process and 1.6 in the next.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Lines<T>(T);

/// One word of each counter.
type Words = Lines<[u64; COUNTERS]>;

/// The four words of each counter.
type Drawn = Lines<[[u32; 4]; COUNTERS]>;

impl Drawn {
    /// The words in their order.
    #[inline(always)]
    pub(crate) fn flat(&self) -> &[u32] {
        self.0.as_flattened()
    }
}

/// Counters that follow one another; kept, because they are vectors from one call to the next.
pub(crate) struct Counters(Words);

impl Counters {
    /// Those from c on.
    #[inline(always)]
    pub(crate) fn from(c: u64) -> Self {
        Counters(Lines(std::array::from_fn(|i| c.wrapping_add(i as u64))))
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn round(x: &[Words; 4], key: &[u64; 2]) -> [Words; 4] {
    let mut next = [Lines([0; COUNTERS]); 4];
    for i in 0..COUNTERS {
        let p0 = x[0].0[i] as u32 as u64 * MULTIPLIERS[0];
        let p1 = x[2].0[i] as u32 as u64 * MULTIPLIERS[1];
        next[0].0[i] = (p1 >> 32) ^ x[1].0[i] ^ key[0];
        next[1].0[i] = p1;
        next[2].0[i] = (p0 >> 32) ^ x[3].0[i] ^ key[1];
        next[3].0[i] = p0;
    }
    next
}

/// The Fowler-Noll-Vo hash (1a, 64 bits): fixed for ever, unlike the standard library's hashers.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf29ce484222325, |h, b| {
        (h ^ b as u64).wrapping_mul(0x100000001b3)
    })
}

/// Counters of [`Many::next`]: enough for four vectors of AVX-512, as a round is a chain of five or six cycles.
pub(crate) const COUNTERS: usize = 32;

/// Philox4x32's factors.
const MULTIPLIERS: [u64; 2] = [0xD2511F53, 0xCD9E8D57];

/// What a round adds to the key: the golden ratio and the root of 3, less 1.
const WEYL: [u32; 2] = [0x9E3779B9, 0xBB67AE85];

/// Ten rounds of Philox4x32.
#[inline]
fn philox(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = c[0] as u64 * MULTIPLIERS[0];
        let p1 = c[2] as u64 * MULTIPLIERS[1];
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_counters_give_the_words_of_each() {
        let stream = Stream::new(7, "many");
        for c in [0, 5, u32::MAX as u64 - 3, u64::MAX - 2] {
            let many = stream.many();
            let mut counters = Counters::from(c);
            let all = [many.next(&mut counters), many.next(&mut counters)];
            let each = all.iter().flat_map(|words| words.flat().as_chunks().0);
            for (i, words) in each.enumerate() {
                assert_eq!(*words, stream.words(c.wrapping_add(i as u64)), "{c} + {i}");
            }
        }
    }

    #[test]
    fn philox_gives_the_papers_known_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
        );
        assert_eq!(
            philox([!0; 4], [!0; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
    }

    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let s = Stream::new(7, "w");
        let n = 40_000u64;
        let x: Vec<f64> = (0..n).map(|i| s.normal(i) as f64).collect();
        let mean = x.iter().sum::<f64>() / n as f64;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        // Five standard errors of each estimate.
        assert!(mean.abs() <= 5.0 / (n as f64).sqrt(), "mean {mean}");
        assert!(
            (variance - 1.0).abs() <= 5.0 * (2.0 / n as f64).sqrt(),
            "variance {variance}"
        );
    }

    #[test]
    fn filling_starts_anywhere() {
        let s = Stream::new(3, "w");
        for first in 0..6 {
            for len in 0..9 {
                let mut out = vec![f32::NAN; len];
                s.fill_normal(first, &mut out);
                let want: Vec<f32> = (0..len as u64).map(|i| s.normal(first + i)).collect();
                assert_eq!(out, want);
            }
        }
    }

    #[test]
    fn names_and_seeds_separate_streams() {
        let words = |seed, name: &str| {
            (0..4)
                .map(|i| Stream::new(seed, name).word(i))
                .collect::<Vec<_>>()
        };
        assert_ne!(words(1, "a"), words(1, "b"));
        assert_ne!(words(1, "a"), words(2, "a"));
        assert_eq!(words(1, "a"), words(1, "a"));
    }

    #[test]
    fn below_stays_below_and_reaches_both_ends() {
        let s = Stream::new(3, "batch");
        let hits: Vec<u64> = (0..200).map(|i| s.below(i, 7)).collect();
        assert!(hits.iter().all(|&h| h < 7) && (0..7).all(|v| hits.contains(&v)));
    }
}
