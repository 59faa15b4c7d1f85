//! How large the second cache of this CPU is, what blocks of a product are cut by; and how far ahead of a loop that only reads
//! memory is asked for. Neither decides a bit.

use std::sync::OnceLock;

/// Bytes of a core's second cache; 512 KiB where the CPU does not say.
pub(crate) fn second_cache() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| found().unwrap_or(512 << 10))
}

/// Bytes ahead of its use for which a loop that only reads asks.
///
/// Farther than a page helps where its requests do not drive out one another: on a Zen 5 the sum of exponentials of 50k columns
/// takes 1.03 times a stream from memory with 8 KiB, 1.2 with 4, 1.4 with 2 and without; on a Xeon of 2024 2 KiB gave 1.0, 4 KiB
/// 1.2, without 1.1.
pub(crate) fn ahead_of_reads() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| if is_intel() { 2048 } else { 8192 })
}

/// From the leaf that Intel (4) or AMD (0x8000_001d) describes caches in, in one format (Intel's manual, volume 2A, CPUID).
// Miri runs no such instruction.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn found() -> Option<usize> {
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    // Unsafe only in older compilers.
    #[allow(unused_unsafe)]
    // SAFETY: every 64-bit x86 has cpuid, and its leaves 0 and 0x8000_0000 tell which others there are.
    let (standard, extended) = unsafe { (__cpuid(0).eax, __cpuid(0x8000_0000).eax) };
    let leaves = [(4, standard), (0x8000_001d, extended)];
    for leaf in leaves
        .into_iter()
        .filter_map(|(leaf, last)| (leaf <= last).then_some(leaf))
    {
        for cache in 0..8 {
            #[allow(unused_unsafe)]
            // SAFETY: as above; a cache that is not there has type 0.
            let x = unsafe { __cpuid_count(leaf, cache) };
            let (kind, level) = (x.eax & 0x1f, x.eax >> 5 & 7);
            if kind == 0 {
                break;
            }
            if level == 2 {
                let (ways, parts, line) = (x.ebx >> 22, x.ebx >> 12 & 0x3ff, x.ebx & 0xfff);
                let factors = [ways, parts, line, x.ecx].map(|x| x as usize + 1);
                return Some(factors.iter().product());
            }
        }
    }
    None
}

#[cfg(any(not(target_arch = "x86_64"), miri))]
fn found() -> Option<usize> {
    None
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(super) fn is_intel() -> bool {
    // Unsafe only in older compilers.
    #[allow(unused_unsafe)]
    // SAFETY: every 64-bit x86 has cpuid, whose leaf 0 names the maker.
    let x = unsafe { core::arch::x86_64::__cpuid(0) };
    let name = [x.ebx, x.edx, x.ecx].map(u32::to_le_bytes);
    name.as_flattened() == b"GenuineIntel"
}

#[cfg(any(not(target_arch = "x86_64"), miri))]
pub(super) fn is_intel() -> bool {
    false
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_second_cache_has_a_likely_size() {
        let bytes = super::second_cache();
        assert!((64 << 10..=64 << 20).contains(&bytes), "{bytes}");
    }
}
