//! What a chip keeps between forwards of a text that grows: keys and values of the tokens so far (a KV cache).
//!
//! A cache lies as the values that are written to it: sequences split over dp, heads over tp. It is allocated once, for
//! as many tokens as a sequence may get, and written in place; attention reads it where it lies, as far as each sequence's
//! positions say.
//!
//! The chips of an axis may also share the tokens: each keeps some, in slots of its own order, and
//! [`Chip::attention_over_shares`] reads them.

use super::apply::Told;
use super::{Chip, Sharded};
use crate::ops::{Cost, device};
use crate::placement::Placement::{Replicate, Shard};
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
        assert!(
            x.placements.axes_of(1).next().is_none(),
            "cache '{name}' at {site} wants all tokens of {x:?}; redistribute it first"
        );
        let mut cache = self.cache(name, x, (capacity, x.placements.clone()), site);
        let began = self.now();
        let first = match self.is_ghost() {
            true => 0,
            false => self.local(&x.global, x.dtype(), &x.placements, site).start[0],
        };
        device::write_tokens(&x.tensor, &starts[first..], &mut cache.tensor);
        self.keep_cache(name, cache, (Some(x), began), site)
    }

    /// Writes x [b, n, ..] to the cache `name` whose tokens the chips of `axis` share, `share` slots each: all sequences of it
    /// from slot `at` of this chip on, or nothing here if there is none. x is split by tokens over the axis, or has tokens that
    /// all of its chips have. Gives the whole cache [b, chips share, ..], split by tokens. Slots that were never written are 0.
    ///
    /// # Panics
    /// As [`Chip::cached`]; if tokens of x are split over another axis.
    #[track_caller]
    pub fn cached_share(
        &self,
        name: &str,
        x: &Sharded,
        axis: &str,
        at: Option<usize>,
        share: usize,
    ) -> Sharded {
        let site = Location::caller();
        self.arrive("cache", site);
        let number = self.mesh().axis_index(axis);
        let own = Sharded::unrecorded(
            self,
            x.tensor.clone(),
            x.tensor.shape().to_vec(),
            x.placements.with(number, Replicate),
        );
        let starts = vec![at.unwrap_or(0); own.global[0]];
        self.refuse_cache(name, &own, &starts, share, site);
        assert!(
            x.placements.axes_of(1).all(|a| a == number),
            "cache '{name}' at {site} is shared over '{axis}', {x:?} is split by tokens over another axis too"
        );
        self.equal_shares(axis, "a cache shared by tokens", site);
        let capacity = share * self.size_of(axis);
        let placed = match self.size_of(axis) {
            1 => x.placements.clone(),
            _ => x.placements.with(number, Shard(1)),
        };
        let mut cache = self.cache(name, x, (capacity, placed), site);
        let began = self.now();
        if at.is_some() {
            device::write_tokens(&x.tensor, &starts, &mut cache.tensor);
        }
        self.keep_cache(name, cache, (at.map(|_| x), began), site)
    }

    /// The cache of this name, made if there is none: x with so many tokens, placed so.
    fn cache(
        &self,
        name: &str,
        x: &Sharded,
        (capacity, placements): (usize, Placements),
        site: &'static Location<'static>,
    ) -> Cache {
        let mut shape = x.shape().to_vec();
        shape[1] = capacity;
        let kept = self.inner().caches.borrow_mut().remove(name);
        let cache = kept.unwrap_or_else(|| {
            let local = self.local(&shape, x.dtype(), &placements, site);
            let mut tensor = self.allocate(&local.ty);
            // Attention multiplies what is hidden by 0, which NaN would survive.
            device::clear(&mut tensor);
            Cache {
                tensor,
                global: shape.clone(),
                placements: placements.clone(),
            }
        });
        assert!(
            cache.global == shape && cache.placements == placements && cache.tensor.is_unique(),
            "cache '{name}' at {site} is {:?} {}, in use elsewhere: {}; {x:?} does not belong to it",
            cache.global,
            cache.placements,
            !cache.tensor.is_unique()
        );
        cache
    }

    /// Puts the cache back and gives its value; `written` is what was just written to it, if anything was.
    fn keep_cache(
        &self,
        name: &str,
        cache: Cache,
        (written, began): (Option<&Sharded>, Option<u64>),
        site: &'static Location<'static>,
    ) -> Sharded {
        let value = Sharded::unrecorded(
            self,
            cache.tensor.clone(),
            cache.global.clone(),
            cache.placements.clone(),
        );
        if let Some(x) = written {
            self.tell(Told {
                kind: EventKind::Op,
                op: "cache".into(),
                site,
                inputs: vec![x.traced()],
                outputs: vec![value.traced()],
                cost: Cost {
                    bytes: 2 * x.tensor.ty().bytes(),
                    ..Cost::default()
                },
                traffic: None,
                stream: Stream::Compute,
                ticket: None,
                began,
            });
        }
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
            self.inner().tape.borrow().is_none(),
            "cache '{name}' at {site}: a cache has no gradient; end recording first"
        );
    }

    /// What `make` gives the first time, from then on kept under `name` beside the caches until [`Chip::forget_caches`]: for what
    /// is made of parameters alone, which do not change while a text grows.
    ///
    /// # Panics
    /// While recording: what was kept has no gradient.
    #[track_caller]
    pub fn made_once(&self, name: &str, make: impl FnOnce() -> Sharded) -> Sharded {
        assert!(
            self.inner().tape.borrow().is_none(),
            "'{name}' at {}: what is kept has no gradient; end recording first",
            Location::caller()
        );
        let kept = self.inner().made.borrow_mut().remove(name);
        let kept = kept.unwrap_or_else(|| {
            let made = make();
            Cache {
                tensor: made.tensor.clone(),
                global: made.global.clone(),
                placements: made.placements.clone(),
            }
        });
        let value = Sharded::unrecorded(
            self,
            kept.tensor.clone(),
            kept.global.clone(),
            kept.placements.clone(),
        );
        self.inner().made.borrow_mut().insert(name.into(), kept);
        value
    }

    /// Frees all caches and what was made once: the next text begins.
    pub fn forget_caches(&self) {
        self.inner().caches.borrow_mut().clear();
        self.inner().made.borrow_mut().clear();
    }

    /// Bytes of all caches on this chip, without what was made once.
    pub fn cached_bytes(&self) -> u64 {
        let caches = self.inner().caches.borrow();
        let bytes = caches.values().map(|c| TensorType::bytes(c.tensor.ty()));
        bytes.sum()
    }
}
