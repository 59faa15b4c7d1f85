//! Writes one chip's trace while it runs.

use super::{ChipTrace, Event, EventKind, HostTotal, Product, Step, Tiles, Time};
use std::collections::{BTreeMap, HashMap};
use std::panic::Location;
use std::sync::Arc;

/// Appends events to a [`ChipTrace`], interning the names that they share.
#[derive(Debug, Default)]
pub struct Recorder {
    trace: ChipTrace,
    scopes: HashMap<Arc<str>, u32>,
    sites: HashMap<(&'static str, u32), u32>,
    products: HashMap<Product, u32>,
    /// Copies whose times may come, by number: to the host or not.
    copies: BTreeMap<u64, bool>,
    times_copies: bool,
    open_scopes: Vec<u32>,
    in_step: bool,
}

impl Recorder {
    /// A recorder with the outermost scope, which has an empty name.
    pub fn new() -> Self {
        let mut recorder = Recorder::default();
        let root = recorder.intern_scope(String::new());
        recorder.open_scopes.push(root);
        recorder
    }

    fn intern_scope(&mut self, name: String) -> u32 {
        if let Some(&id) = self.scopes.get(name.as_str()) {
            return id;
        }
        let (id, name) = (self.trace.scopes.len() as u32, Arc::<str>::from(name));
        self.trace.scopes.push(name.clone());
        self.scopes.insert(name, id);
        id
    }

    /// Enters the scope `name` inside the current one.
    pub fn enter(&mut self, name: &str) {
        let outer = self.scope_name();
        let full = if outer.is_empty() {
            name.to_string()
        } else {
            format!("{outer}.{name}")
        };
        let id = self.intern_scope(full);
        self.open_scopes.push(id);
    }

    /// Enters a scope by its index, wherever the program is: gradients belong to the scope of their forward.
    pub fn enter_scope(&mut self, id: u32) {
        self.open_scopes.push(id);
    }

    /// Leaves the innermost scope.
    pub fn leave(&mut self) {
        assert!(
            self.open_scopes.len() > 1,
            "the outermost scope is never left"
        );
        self.open_scopes.pop();
    }

    /// Index of the current scope.
    pub fn scope(&self) -> u32 {
        *self
            .open_scopes
            .last()
            .expect("the outermost scope is never left")
    }

    /// The current scope's full name.
    pub fn scope_name(&self) -> Arc<str> {
        self.trace.scopes[self.scope() as usize].clone()
    }

    /// Index of a place in the source.
    pub fn site(&mut self, at: &'static Location<'static>) -> u32 {
        let next = self.trace.sites.len() as u32;
        let id = *self.sites.entry((at.file(), at.line())).or_insert(next);
        if id == next {
            self.trace
                .sites
                .push(format!("{}:{}", at.file(), at.line()).into());
        }
        id
    }

    /// The name of a place in the source.
    pub fn site_name(&self, site: u32) -> Arc<str> {
        self.trace.sites[site as usize].clone()
    }

    /// Says what the chip's products are cut up by.
    pub fn cut_up_by(&mut self, tiles: Tiles) {
        self.trace.tiles = Some(tiles);
    }

    /// Says that the chip's copies through host memory are counted, and whether their times will come.
    pub fn counts_copies(&mut self, timed: bool) {
        self.trace.host = Some(HostTotal::default());
        self.times_copies = timed;
    }

    /// Index of a product, with its calls added to those before.
    pub fn product(&mut self, product: Product) -> u32 {
        let calls = product.calls;
        let key = Product {
            calls: 0,
            ..product
        };
        let all = &mut self.trace.products;
        let id = *self.products.entry(key).or_insert_with_key(|key| {
            all.push(key.clone());
            all.len() as u32 - 1
        });
        all[id as usize].calls += calls;
        id
    }

    /// Starts step `number` of a loop; the step before it ends.
    pub fn begin_step(&mut self, number: u64) {
        let step = Step {
            number,
            events: Vec::new(),
        };
        self.trace.steps += 1;
        if self.trace.first.is_none() {
            self.trace.first = Some(step);
        } else {
            let before = self.trace.latest.replace(step);
            self.trace.folded += before.map_or(0, |s| s.events.len() as u64);
        }
        self.in_step = true;
    }

    /// Ends the step: what follows belongs to no step.
    pub fn end_step(&mut self) {
        self.in_step = false;
    }

    /// Appends an event.
    pub fn push(&mut self, event: Event) {
        self.trace.count(&event);
        if self.times_copies {
            let copies = event.host.iter().map(|c| (c.number, c.to_host));
            self.copies.extend(copies);
        }
        let trace = &mut self.trace;
        // A program without steps is kept whole; between the steps of a long run (evaluations, samples) a little is.
        let outside = if trace.steps == 0 { 1 << 20 } else { 1 << 12 };
        let room = match (&mut trace.latest, &mut trace.first) {
            (Some(step), _) | (None, Some(step)) if self.in_step => &mut step.events,
            _ if trace.outside.len() < outside => &mut trace.outside,
            _ => {
                trace.folded += 1;
                return;
            }
        };
        room.push(event);
    }

    /// Gives the started transfer with this ticket the time at which it ran.
    pub(crate) fn complete(&mut self, ticket: u64, time: Time) {
        let trace = &mut self.trace;
        let steps = trace.latest.iter_mut().chain(&mut trace.first);
        let events = steps
            .flat_map(|s| s.events.iter_mut().rev())
            .chain(trace.outside.iter_mut().rev());
        let started = |e: &&mut Event| e.ticket == Some(ticket) && e.kind != EventKind::Wait;
        if let Some(event) = events.into_iter().find(started) {
            event.time = Some(time);
        }
    }

    /// Gives the copy through host memory with this number the time at which it ran.
    // Only graphics processors copy.
    #[cfg_attr(not(feature = "gpu"), allow(dead_code))]
    pub(crate) fn complete_copy(&mut self, number: u64, time: Time) {
        // They come in order: what is older and lacks its time will not get it.
        self.copies = self.copies.split_off(&number);
        let Some(to_host) = self.copies.remove(&number) else {
            return;
        };
        let trace = &mut self.trace;
        trace.host.get_or_insert_default().add_time(to_host, time);
        let steps = trace.latest.iter_mut().chain(&mut trace.first);
        let events = steps
            .flat_map(|s| s.events.iter_mut().rev())
            .chain(trace.outside.iter_mut().rev());
        let mut copies = events.flat_map(|e| &mut e.host);
        if let Some(copy) = copies.find(|c| c.number == number) {
            copy.time = Some(time);
        }
    }

    /// What was recorded so far, with `peak_bytes` as the memory counted it.
    pub fn finish(self, peak_bytes: u64) -> ChipTrace {
        let mut trace = self.trace;
        trace.peak_bytes = peak_bytes;
        trace
    }
}
