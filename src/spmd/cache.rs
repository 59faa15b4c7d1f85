//! What a chip keeps between forwards of a text that grows: keys and values of the tokens so far (a KV cache).
//!
//! A cache lies as the values that are written to it: sequences split over dp, heads over tp. It is allocated once, for
//! as many tokens as a sequence may get, and written in place; attention reads it where it lies, as far as each sequence's
//! positions say.

use super::apply::Told;
use super::{Chip, Sharded};
use crate::ops::{Cost, device};
use crate::placement::Placements;
use crate::tensor::{Tensor, TensorType};
use crate::trace::{EventKind, Stream};
use std::panic::Location;

/// A cache by name.
pub(super) struct Cache {
    tensor: Tensor,
    global: Vec<usize>,
    placements: Placements,
}

impl Chip {
    /// Writes x [b, n, ..] to the cache `name`, sequence b at tokens `starts[b]` and on, and gives the whole cache
    /// [b, capacity, ..]. Tokens that were never written are 0. The first call makes the cache.
    ///
    /// # Panics
    /// If tokens would lie beyond the capacity, x is split by tokens, or the cache of this name has another shape. While
    /// recording: a cache has no gradient. If a value that an earlier call gave is still in use.
    #[track_caller]
    pub fn cached(&self, name: &str, x: &Sharded, starts: &[usize], capacity: usize) -> Sharded {
        let site = Location::caller();
        self.arrive("cache", site);
        self.refuse_cache(name, x, starts, capacity, site);
        let mut shape = x.shape().to_vec();
        shape[1] = capacity;
        let kept = self.inner().caches.borrow_mut().remove(name);
        let mut cache = kept.unwrap_or_else(|| {
            let local = self.local(&shape, x.dtype(), &x.placements, site);
            let mut tensor = self.allocate(&local.ty);
            if !tensor.is_ghost() {
                // Attention multiplies what is hidden by 0, which NaN would survive.
                device::clear(&mut tensor);
            }
            Cache {
                tensor,
                global: shape.clone(),
                placements: x.placements.clone(),
            }
        });
        assert!(
            cache.global == shape && cache.placements == x.placements && cache.tensor.is_unique(),
            "cache '{name}' at {site} is {:?} {}, in use elsewhere: {}; {x:?} does not belong to it",
            cache.global,
            cache.placements,
            !cache.tensor.is_unique()
        );
        let began = self.now();
        if !self.is_ghost() {
            let first = self.local(&x.global, x.dtype(), &x.placements, site).start[0];
            device::write_tokens(&x.tensor, &starts[first..], &mut cache.tensor);
        }
        let value = Sharded::unrecorded(self, cache.tensor.clone(), shape, x.placements.clone());
        let bytes = 2 * x.tensor.ty().bytes();
        self.tell(Told {
            kind: EventKind::Op,
            op: "cache".into(),
            site,
            inputs: vec![x.traced()],
            outputs: vec![value.traced()],
            cost: Cost {
                bytes,
                ..Cost::default()
            },
            traffic: None,
            stream: Stream::Compute,
            ticket: None,
            began,
        });
        self.inner().caches.borrow_mut().insert(name.into(), cache);
        value
    }

    fn refuse_cache(
        &self,
        name: &str,
        x: &Sharded,
        starts: &[usize],
        capacity: usize,
        site: &'static Location<'static>,
    ) {
        let fits = x.global.len() >= 2
            && x.global[0] == starts.len()
            && starts.iter().all(|s| s + x.global[1] <= capacity);
        assert!(
            fits,
            "cache '{name}' at {site} of {capacity} tokens has no room for {x:?} at {starts:?}"
        );
        assert!(
            x.placements.axes_of(1).next().is_none(),
            "cache '{name}' at {site} wants all tokens of {x:?}; redistribute it first"
        );
        assert!(
            self.inner().tape.borrow().is_none(),
            "cache '{name}' at {site}: a cache has no gradient; end recording first"
        );
    }

    /// Frees all caches: the next text begins.
    pub fn forget_caches(&self) {
        self.inner().caches.borrow_mut().clear();
    }

    /// Bytes of all caches on this chip.
    pub fn cached_bytes(&self) -> u64 {
        let caches = self.inner().caches.borrow();
        let bytes = caches.values().map(|c| TensorType::bytes(c.tensor.ty()));
        bytes.sum()
    }
}
