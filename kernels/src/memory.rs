//! Memory that kernels read and write: 64-byte aligned buffers, a pool with a budget, and scratch.
//!
//! A training step asks for the same sizes in every step. The pool keeps what is given back, so that after its first
//! steps a loop asks the system for nothing. It counts tensors by their rounded size, whatever block holds them: that
//! number does not depend on history, and a ghost predicts it. Blocks are cache lines, always initialised, which keeps
//! everything but one `Pod` line safe; large ones lie on large pages.

#![allow(unsafe_code)]

use memmap2::MmapMut;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a cache line: alignment of every buffer and grain of every count.
pub(crate) const LINE: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

// SAFETY: all bit patterns are valid, zero among them; 64 bytes at 64-byte alignment leave no padding.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above, and Line is Copy without pointers.
unsafe impl bytemuck::Pod for Line {}

/// Cache lines, always initialised.
enum Block {
    /// From the allocator.
    Heap(Vec<Line>),
    /// From the system, which is asked for large pages: a page of 4 KiB costs a fault when it is first written and a walk
    /// through the page tables for every row of a tall matrix.
    Mapped(MmapMut),
}

/// Bytes from which a block is mapped: one large page of x86-64 and of most ARM systems.
const LARGE_PAGE: usize = 2 << 20;

impl Block {
    const fn empty() -> Self {
        Block::Heap(Vec::new())
    }

    /// Number of lines.
    fn len(&self) -> usize {
        match self {
            Block::Heap(lines) => lines.len(),
            Block::Mapped(map) => map.len() / LINE,
        }
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl std::ops::Deref for Block {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        match self {
            Block::Heap(lines) => lines,
            Block::Mapped(map) => bytemuck::cast_slice(map),
        }
    }
}

impl std::ops::DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [Line] {
        match self {
            Block::Heap(lines) => lines,
            Block::Mapped(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

fn fresh_block(lines: usize) -> Block {
    let mut block = mapped(lines).unwrap_or_else(|| Block::Heap(bytemuck::zeroed_vec(lines)));
    poison(&mut block);
    block
}

/// A large block on large pages, where the system has them. Without them, or without its consent, the allocator serves.
fn mapped(lines: usize) -> Option<Block> {
    let bytes = lines * LINE;
    if bytes < LARGE_PAGE || cfg!(not(target_os = "linux")) {
        return None;
    }
    let map = MmapMut::map_anon(bytes).ok()?;
    #[cfg(target_os = "linux")]
    {
        // Advice: a system built without large pages refuses it and loses nothing.
        let _ = map.advise(memmap2::Advice::HugePage);
    }
    Some(Block::Mapped(map))
}

static POISONED: AtomicBool = AtomicBool::new(cfg!(any(test, debug_assertions)));

/// From now on memory is filled with NaN of every float type before it is handed out, so that reading before writing shows:
/// always so in debug builds and in this crate's tests.
pub fn poison_memory() {
    POISONED.store(true, Ordering::Relaxed);
}

fn poison(block: &mut [Line]) {
    if POISONED.load(Ordering::Relaxed) {
        block.fill(Line([0xff; LINE]));
    }
}

/// `len` bytes at a 64-byte boundary; goes back to its pool when dropped.
pub struct Buffer {
    block: Block,
    len: usize,
    pool: Option<Arc<Shared>>,
}

impl Buffer {
    /// A buffer of no pool, with unspecified contents.
    pub fn new(len: usize) -> Self {
        Buffer {
            block: fresh_block(len.div_ceil(LINE)),
            len,
            pool: None,
        }
    }

    /// The length asked for, in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The contents.
    pub fn as_bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.block[..])[..self.len]
    }

    /// The contents, for writing.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.block[..])[..self.len]
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            let lines = self.len.div_ceil(LINE);
            let block = std::mem::replace(&mut self.block, Block::empty());
            pool.lock().give(block, lines);
        }
    }
}

/// A request that the budget does not allow; all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// The request, rounded.
    pub asked: u64,
    /// Live at the time.
    pub live: u64,
    /// What may be live at once.
    pub budget: u64,
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes more than the {} in use exceed the budget of {} bytes",
            self.asked, self.live, self.budget
        )
    }
}

impl std::error::Error for Exceeded {}

/// Gives out buffers and takes them back; clones share everything, and threads may share a pool.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

impl Pool {
    /// A pool of which at most `budget` bytes may be live at once.
    pub fn new(budget: Option<u64>) -> Self {
        Pool(Arc::new(Shared {
            budget,
            state: Mutex::default(),
        }))
    }

    /// `bytes` bytes with unspecified contents: a freed block of the same rounded size, else the smallest freed one of
    /// up to 1.25 times the size, else fresh memory.
    pub fn take(&self, bytes: usize) -> Result<Buffer, Exceeded> {
        let lines = bytes.div_ceil(LINE);
        let reused = self.0.lock().reserve(lines, self.0.budget)?;
        let block = match reused {
            Some(mut block) => {
                poison(&mut block);
                block
            }
            // Allocated outside the lock: the system may take its time over large blocks.
            None => fresh_block(lines),
        };
        Ok(Buffer {
            block,
            len: bytes,
            pool: Some(self.0.clone()),
        })
    }

    /// `bytes` bytes, all zero.
    pub fn take_zeroed(&self, bytes: usize) -> Result<Buffer, Exceeded> {
        let mut buffer = self.take(bytes)?;
        buffer.as_bytes_mut().fill(0);
        Ok(buffer)
    }

    /// Bytes in buffers that live now, by rounded size.
    pub fn live(&self) -> u64 {
        self.0.lock().live
    }

    /// The most bytes that lived at once, since the start or [`Pool::reset_peak`].
    pub fn peak(&self) -> u64 {
        self.0.lock().peak
    }

    /// Lets the peak start again from what lives now.
    pub fn reset_peak(&self) {
        let mut state = self.0.lock();
        state.peak = state.live;
    }

    /// Bytes kept in freed blocks.
    pub fn held(&self) -> u64 {
        self.0.lock().held
    }

    /// How often the system was asked for memory.
    pub fn fresh(&self) -> u64 {
        self.0.lock().fresh
    }

    /// Bytes that may live at once.
    pub fn budget(&self) -> Option<u64> {
        self.0.budget
    }

    /// Returns the freed blocks to the system.
    pub fn release(&self) {
        let free = {
            let mut state = self.0.lock();
            state.held = 0;
            std::mem::take(&mut state.free)
        };
        drop(free);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0.lock();
        write!(
            f,
            "Pool({} bytes live, {} at peak, {} held, budget {:?})",
            s.live, s.peak, s.held, self.0.budget
        )
    }
}

struct Shared {
    budget: Option<u64>,
    state: Mutex<State>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the counters whole: each is updated in one go.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct State {
    /// Freed blocks by their number of lines; no list is empty.
    free: BTreeMap<usize, Vec<Block>>,
    live: u64,
    peak: u64,
    held: u64,
    fresh: u64,
}

const fn bytes_of(lines: usize) -> u64 {
    (lines * LINE) as u64
}

impl State {
    /// Counts `lines` as live and hands out a freed block, or None where a fresh one must be made.
    fn reserve(&mut self, lines: usize, budget: Option<u64>) -> Result<Option<Block>, Exceeded> {
        let asked = bytes_of(lines);
        if let Some(budget) = budget.filter(|&b| self.live.saturating_add(asked) > b) {
            let live = self.live;
            return Err(Exceeded {
                asked,
                live,
                budget,
            });
        }
        let reused = if lines == 0 {
            Some(Block::empty())
        } else {
            self.reuse(lines)
        };
        if reused.is_none() {
            self.fresh += 1;
            let room = budget.map_or(u64::MAX, |b| b - self.live - asked);
            while self.held > room {
                self.drop_largest();
            }
        }
        self.live += asked;
        self.peak = self.peak.max(self.live);
        Ok(reused)
    }

    fn reuse(&mut self, lines: usize) -> Option<Block> {
        let fits = lines..=lines + lines / 4;
        let size = *self.free.range(fits).next()?.0;
        Some(self.pop(size))
    }

    fn pop(&mut self, size: usize) -> Block {
        let list = self.free.get_mut(&size).expect("a listed size");
        let block = list.pop().expect("no list is empty");
        if list.is_empty() {
            self.free.remove(&size);
        }
        self.held -= bytes_of(block.len());
        block
    }

    fn drop_largest(&mut self) {
        let size = *self
            .free
            .last_key_value()
            .expect("held bytes are in a list")
            .0;
        drop(self.pop(size));
    }

    fn give(&mut self, block: Block, lines: usize) {
        self.live -= bytes_of(lines);
        if !block.is_empty() {
            self.held += bytes_of(block.len());
            self.free.entry(block.len()).or_default().push(block);
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<Block>> = const { RefCell::new(Vec::new()) };
}

/// Lines of a block of scratch that is to hold `lines`: whole large pages from an eighth of one on. Packed blocks are walked
/// through all the time, and with pages of 4 KiB a product loses 4 % to the page tables.
fn scratch_lines(lines: usize) -> usize {
    let page = LARGE_PAGE / LINE;
    if lines < page / 8 {
        lines
    } else {
        lines.next_multiple_of(page)
    }
}

/// Lends f `bytes` bytes at a 64-byte boundary, with unspecified contents, kept by this thread from call to call.
///
/// Calls nest, also when a waiting rayon worker runs another kernel inside f: each has its own memory.
pub fn with_scratch<R>(bytes: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
    let mut block = take_scratch(bytes);
    let result = f(&mut bytemuck::cast_slice_mut(&mut block[..])[..bytes]);
    keep_scratch(block);
    result
}

/// A block of this thread that holds `bytes` bytes.
#[inline(never)]
fn take_scratch(bytes: usize) -> Block {
    let lines = bytes.div_ceil(LINE);
    let mut block = SCRATCH.with_borrow_mut(|kept| {
        // The largest is last; a smaller sibling is left for nested calls.
        let fits = kept.iter().position(|b| b.len() >= lines);
        fits.map(|i| kept.remove(i)).or_else(|| kept.pop())
    });
    if block.as_ref().is_none_or(|b| b.len() < lines) {
        drop(block.take());
        block = Some(fresh_block(scratch_lines(lines)));
    }
    let mut block = block.expect("made above");
    poison(&mut block[..lines]);
    block
}

#[inline(never)]
fn keep_scratch(block: Block) {
    SCRATCH.with_borrow_mut(|kept| {
        let at = kept.partition_point(|b| b.len() < block.len());
        kept.insert(at, block);
    });
}

/// [`with_scratch`] for `len` f32.
pub fn with_scratch_f32<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    with_scratch(len * 4, |bytes| f(bytemuck::cast_slice_mut(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_exactly_as_long_as_asked() {
        let pool = Pool::new(None);
        for len in [0, 1, 63, 64, 65, 1000] {
            for mut b in [pool.take(len).unwrap(), Buffer::new(len)] {
                assert_eq!(b.as_bytes().len(), len);
                assert_eq!(b.as_bytes().as_ptr() as usize % LINE, 0);
                assert!(b.as_bytes_mut().iter().all(|&x| x == 0xff));
            }
            let b = pool.take_zeroed(len).unwrap();
            assert!(b.as_bytes().iter().all(|&x| x == 0));
        }
        assert_eq!(pool.live(), 0);
    }

    #[test]
    fn a_loop_stops_allocating_after_its_first_step() {
        let pool = Pool::new(None);
        let step = || {
            let _a = pool.take(1000).unwrap();
            let b = pool.take(5000).unwrap();
            drop(b);
            let _c = pool.take(5000).unwrap();
            let _d = pool.take(4900).unwrap();
        };
        step();
        let fresh = pool.fresh();
        assert_eq!(fresh, 3);
        assert_eq!(pool.peak(), (1024 + 5056 + 4928) as u64);
        for _ in 0..5 {
            step();
        }
        assert_eq!(pool.fresh(), fresh);
        assert_eq!((pool.live(), pool.held()), (0, 1024 + 5056 + 4928));
    }

    #[test]
    fn a_larger_block_serves_up_to_a_quarter_more_and_counts_as_asked() {
        let pool = Pool::new(None);
        drop(pool.take(64 * 125).unwrap());
        let fits = pool.take(64 * 100).unwrap();
        assert_eq!((pool.fresh(), pool.live(), pool.held()), (1, 6400, 0));
        drop(fits);
        assert_eq!(pool.held(), 8000);
        let _too_small = pool.take(64 * 99).unwrap();
        assert_eq!(pool.fresh(), 2);
    }

    #[test]
    fn the_budget_refuses_with_all_numbers_and_frees_what_it_holds_first() {
        let pool = Pool::new(Some(1024));
        let a = pool.take(600).unwrap();
        let refused = pool.take(500).unwrap_err();
        assert_eq!(
            refused,
            Exceeded {
                asked: 512,
                live: 640,
                budget: 1024
            }
        );
        assert_eq!(pool.live(), 640);
        drop(a);
        assert_eq!(pool.held(), 640);
        let b = pool.take(1000).unwrap();
        assert_eq!((pool.held(), pool.live()), (0, 1024));
        drop(b);
        pool.release();
        assert_eq!(pool.held(), 0);
    }

    #[test]
    fn threads_share_a_pool() {
        let pool = Pool::new(None);
        std::thread::scope(|s| {
            for t in 1..5usize {
                let pool = pool.clone();
                s.spawn(move || {
                    for i in 0..100 {
                        let mut b = pool.take(t * 100 + i).unwrap();
                        b.as_bytes_mut().fill(t as u8);
                        assert!(b.as_bytes().iter().all(|&x| x == t as u8));
                    }
                });
            }
        });
        assert_eq!(pool.live(), 0);
    }

    #[test]
    fn scratch_nests_and_is_kept() {
        let address = |s: &mut [u8]| s.as_ptr() as usize;
        with_scratch(1000, |a| {
            a.fill(1);
            let inner = with_scratch(1000, |b| {
                b.fill(2);
                address(b)
            });
            assert!(a.iter().all(|&x| x == 1));
            assert_ne!(address(a), inner);
        });
        let again = [with_scratch(900, address), with_scratch(1000, address)];
        assert!(again.iter().all(|&x| x % LINE == 0));
        assert_eq!(again[0], again[1]);
        with_scratch_f32(3, |x| assert!(x.len() == 3 && x.iter().all(|x| x.is_nan())));
    }
}
