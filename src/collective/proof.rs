//! The proof that lists do what they say: all chips of a group are run on symbols.
//!
//! Every input element is a symbol of its own, a sum is the pair of its operands, and equal expressions are one number
//! (hash-consing), so comparing an output with the stated order is comparing two numbers. Running lists on floats
//! instead would miss what cancels or commutes.
//!
//! Chips meet as the wire makes them: a round's transfers are posted at once, a send completes when it is received.
//! A group whose lists could deadlock under that rule stops making progress here, whatever the speed of its chips:
//! matching by pairs in order leaves no choice to timing.

use super::{Algorithm, Expression};
use super::{
    Buffer, Counts, Kind, Place, Schedule, Step, Transfer, bounds, even_bounds, floor_elements,
    order, rounds, schedule, scratch_elements, sent_elements, tree_sum,
};
use std::collections::{HashMap, VecDeque};

/// Proves the lists of `kind` by `algorithm` over `n` chips: runs all of them on symbols and checks that
///
/// - every chip comes to the end: no deadlock, no message without a receiver;
/// - the two ends of every message are equally long;
/// - no step reads an element that was never written, leaves its buffers, writes `Input`, or overlaps itself;
/// - every element of every output is exactly the expression of [`order`], with every chip once if the kind reduces;
/// - after a barrier every chip has heard of every other;
/// - together they send [`sent_elements`], at least [`floor_elements`] (a reduction) or the input's worth, in at most
///   [`rounds`], and the chip that needs most scratch needs [`scratch_elements`].
///
/// The error names the chip and the step. Takes time and memory in proportion to `n` times the elements: for tests.
pub fn prove(kind: Kind, algorithm: Algorithm, counts: &Counts, n: usize) -> Result<(), String> {
    let lists = (0..n).map(|index| schedule(kind, algorithm, counts, n, index));
    let mut group = Group::new(kind, counts, lists.collect());
    group.run()?;
    group.check_outputs(kind, algorithm, counts)?;
    let sent: u64 = group
        .chips
        .iter()
        .map(|chip| chip.list.sent_elements())
        .sum();
    let most = group
        .chips
        .iter()
        .map(|chip| chip.list.scratch as u64)
        .max();
    let scratch = scratch_elements(kind, algorithm, counts, n);
    if most != Some(scratch) {
        return Err(format!(
            "the lists need {most:?} elements of scratch, the closed form says {scratch}"
        ));
    }
    let (closed, floor) = (
        sent_elements(kind, algorithm, counts, n),
        floor_elements(kind, counts, n),
    );
    if sent != closed || sent < floor {
        return Err(format!(
            "the lists send {sent} elements; the closed form is {closed}, the floor {floor}"
        ));
    }
    let (took, closed) = (group.rounds(), rounds(kind, algorithm, counts, n));
    if took > closed {
        return Err(format!(
            "the lists take {took} rounds; the closed form is {closed}"
        ));
    }
    Ok(())
}

/// What an element is: an interned expression.
type Symbol = u32;

#[derive(PartialEq, Eq, Hash)]
enum Node {
    /// (chip, element of its input)
    Leaf(usize, usize),
    Sum(Symbol, Symbol),
}

#[derive(Default)]
struct Symbols(HashMap<Node, Symbol>);

impl Symbols {
    fn of(&mut self, node: Node) -> Symbol {
        let next = self.0.len() as Symbol;
        *self.0.entry(node).or_insert(next)
    }

    /// `expression` over element `element(chip)` of each chip's input.
    fn expression(&mut self, expression: &Expression, element: &impl Fn(usize) -> usize) -> Symbol {
        match expression {
            Expression::Leaf(chip) => self.of(Node::Leaf(*chip, element(*chip))),
            Expression::Sum(left, right) => {
                let left = self.expression(left, element);
                let right = self.expression(right, element);
                self.of(Node::Sum(left, right))
            }
        }
    }
}

struct Chip {
    list: Schedule,
    buffers: [Vec<Option<Symbol>>; 3],
    next: usize,
    /// Transfers of the current round that have not completed; `None` between rounds.
    pending: Option<usize>,
    /// Rounds behind this chip, waiting for others included; and where the current one will end.
    clock: usize,
    end: usize,
    /// Who has, through any chain of messages, told this chip that it arrived.
    heard: Vec<bool>,
}

struct Message {
    contents: Vec<Option<Symbol>>,
    clock: usize,
    heard: Vec<bool>,
}

pub(super) struct Group {
    chips: Vec<Chip>,
    symbols: Symbols,
    /// Posted sends and receives by (from, to), in order.
    sends: HashMap<(usize, usize), VecDeque<Message>>,
    receives: HashMap<(usize, usize), VecDeque<Place>>,
}

impl Group {
    pub(super) fn new(kind: Kind, counts: &Counts, lists: Vec<Schedule>) -> Self {
        let n = lists.len();
        let mut symbols = Symbols::default();
        let chips = lists.into_iter().enumerate().map(|(index, list)| {
            let leaf = |element| Some(symbols.of(Node::Leaf(index, element)));
            let input = (0..counts.input_len(kind, n, index)).map(leaf).collect();
            let output = vec![None; counts.output_len(kind, n, index)];
            let mut heard = vec![false; n];
            heard[index] = true;
            Chip {
                buffers: [input, output, vec![None; list.scratch]],
                list,
                next: 0,
                pending: None,
                clock: 0,
                end: 0,
                heard,
            }
        });
        Group {
            chips: chips.collect(),
            symbols,
            sends: HashMap::new(),
            receives: HashMap::new(),
        }
    }

    /// The longest chain of rounds that had to wait for each other.
    pub(super) fn rounds(&self) -> usize {
        self.chips.iter().map(|chip| chip.clock).max().unwrap_or(0)
    }

    pub(super) fn run(&mut self) -> Result<(), String> {
        loop {
            let mut moved = false;
            for index in 0..self.chips.len() {
                moved |= self.advance(index).map_err(|sentence| {
                    format!("chip {index}, step {}: {sentence}", self.chips[index].next)
                })?;
            }
            moved |= self.deliver()?;
            if !moved {
                break;
            }
        }
        let waiting = |chip: &Chip| chip.next < chip.list.steps.len();
        if let Some(index) = self.chips.iter().position(waiting) {
            let left = |queue: usize, pair: (usize, usize), verb: &str| {
                let (from, to) = pair;
                (queue > 0).then(|| format!("{verb} {from} -> {to}"))
            };
            let sends = self.sends.iter();
            let mut open: Vec<String> = sends
                .filter_map(|(&pair, queue)| left(queue.len(), pair, "send"))
                .collect();
            let receives = self.receives.iter();
            open.extend(receives.filter_map(|(&pair, queue)| left(queue.len(), pair, "receive")));
            open.sort();
            return Err(format!(
                "deadlock: chip {index} waits at step {}; open are {}",
                self.chips[index].next,
                open.join(", ")
            ));
        }
        Ok(())
    }

    /// Runs chip `index` up to the end of its list or a round that others must join. True if anything happened.
    fn advance(&mut self, index: usize) -> Result<bool, String> {
        let mut moved = false;
        loop {
            let chip = &mut self.chips[index];
            match chip.pending {
                Some(0) => {
                    chip.pending = None;
                    chip.clock = chip.end;
                    chip.next += 1;
                }
                Some(_) => return Ok(moved),
                None => {
                    let Some(step) = chip.list.steps.get(chip.next).cloned() else {
                        return Ok(moved);
                    };
                    match step {
                        Step::Round { sends, receives } => self.post(index, &sends, &receives)?,
                        Step::Reduce { sources, into } => self.reduce(index, &sources, into)?,
                        Step::Copy { from, into } => {
                            apart(&[from], &[into])?;
                            let contents = self.read(index, from)?;
                            self.write(index, into, contents)?;
                            self.chips[index].next += 1;
                        }
                    }
                }
            }
            moved = true;
        }
    }

    fn post(
        &mut self,
        index: usize,
        sends: &[Transfer],
        receives: &[Transfer],
    ) -> Result<(), String> {
        let places = |transfers: &[Transfer]| -> Vec<Place> {
            transfers.iter().map(|transfer| transfer.place).collect()
        };
        apart(&places(sends), &places(receives))?;
        for transfer in sends.iter().chain(receives) {
            if transfer.peer == index || transfer.peer >= self.chips.len() {
                return Err(format!("a transfer with chip {}", transfer.peer));
            }
        }
        for send in sends {
            let message = Message {
                contents: self.read(index, send.place)?,
                clock: self.chips[index].clock,
                heard: self.chips[index].heard.clone(),
            };
            let queue = self.sends.entry((index, send.peer)).or_default();
            queue.push_back(message);
        }
        for receive in receives {
            self.range(index, receive.place)?;
            let queue = self.receives.entry((receive.peer, index)).or_default();
            queue.push_back(receive.place);
        }
        let chip = &mut self.chips[index];
        chip.pending = Some(sends.len() + receives.len());
        chip.end = chip.clock;
        Ok(())
    }

    /// Completes every transfer that both ends have posted. True if there was one.
    fn deliver(&mut self) -> Result<bool, String> {
        let mut moved = false;
        let pairs: Vec<(usize, usize)> = self.sends.keys().copied().collect();
        for pair @ (from, to) in pairs {
            loop {
                let (sends, receives) = (self.sends.get_mut(&pair), self.receives.get_mut(&pair));
                let (Some(sends), Some(receives)) = (sends, receives) else {
                    break;
                };
                if sends.is_empty() || receives.is_empty() {
                    break;
                }
                let (Some(message), Some(place)) = (sends.pop_front(), receives.pop_front()) else {
                    unreachable!("neither queue is empty")
                };
                if message.contents.len() != place.len {
                    return Err(format!(
                        "chip {from} sends {} elements where chip {to} receives {}",
                        message.contents.len(),
                        place.len
                    ));
                }
                let end = 1 + message.clock.max(self.chips[to].clock);
                self.write(to, place, message.contents)?;
                for (mine, theirs) in self.chips[to].heard.iter_mut().zip(message.heard) {
                    *mine |= theirs;
                }
                for chip in [from, to] {
                    let chip = &mut self.chips[chip];
                    chip.end = chip.end.max(end);
                    chip.pending = chip.pending.map(|open| open - 1);
                }
                moved = true;
            }
        }
        Ok(moved)
    }

    fn reduce(&mut self, index: usize, sources: &[Place], into: Place) -> Result<(), String> {
        if sources.len() < 2 || sources.iter().any(|source| source.len != into.len) {
            return Err(format!("{sources:?} cannot be added into {into:?}"));
        }
        for source in sources {
            apart(&[*source], &[into])?;
        }
        let read = sources.iter().map(|&source| self.read(index, source));
        let summands = read.collect::<Result<Vec<_>, _>>()?;
        let sums = (0..into.len).map(|element| {
            let column = summands.iter().map(|summand| summand[element]).collect();
            // `read` has refused elements that were never written.
            tree_sum(column, |a, b| Some(self.symbols.of(Node::Sum(a?, b?)))).flatten()
        });
        let sums = sums.collect();
        self.write(index, into, sums)?;
        self.chips[index].next += 1;
        Ok(())
    }

    /// The place as a range, if it lies in its buffer.
    fn range(&self, index: usize, place: Place) -> Result<std::ops::Range<usize>, String> {
        let len = self.chips[index].buffers[place.buffer as usize].len();
        if place.range().end > len {
            return Err(format!("{place:?} of a buffer of {len} elements"));
        }
        Ok(place.range())
    }

    fn read(&self, index: usize, place: Place) -> Result<Vec<Option<Symbol>>, String> {
        let range = self.range(index, place)?;
        let contents = self.chips[index].buffers[place.buffer as usize][range].to_vec();
        if contents.contains(&None) {
            return Err(format!("{place:?} is read before it is written"));
        }
        Ok(contents)
    }

    fn write(
        &mut self,
        index: usize,
        place: Place,
        contents: Vec<Option<Symbol>>,
    ) -> Result<(), String> {
        let range = self.range(index, place)?;
        if place.buffer == Buffer::Input || contents.len() != place.len {
            return Err(format!("{} elements into {place:?}", contents.len()));
        }
        self.chips[index].buffers[place.buffer as usize][range].copy_from_slice(&contents);
        Ok(())
    }

    pub(super) fn check_outputs(
        &mut self,
        kind: Kind,
        algorithm: Algorithm,
        counts: &Counts,
    ) -> Result<(), String> {
        let n = self.chips.len();
        let orders: Vec<Expression> = (0..n).map(|c| order(kind, algorithm, n, c)).collect();
        for expression in orders.iter().filter(|_| kind.reduces()) {
            let mut leaves = expression.leaves();
            leaves.sort_unstable();
            if leaves != (0..n).collect::<Vec<_>>() {
                return Err(format!("{expression} is no sum over {n} chips, each once"));
            }
        }
        for index in 0..n {
            let expected = self.expected(kind, counts, &orders, index);
            let output = &self.chips[index].buffers[Buffer::Output as usize];
            let differs = |(held, expected): (&Option<Symbol>, &Symbol)| *held != Some(*expected);
            let wrong = output.iter().zip(&expected).position(differs);
            if output.len() != expected.len() || wrong.is_some() {
                return Err(format!(
                    "chip {index}: output element {wrong:?} is not what the order of {algorithm} {kind} states"
                ));
            }
            if kind == Kind::Barrier && self.chips[index].heard.contains(&false) {
                return Err(format!(
                    "chip {index} passes the barrier before it has heard of everyone"
                ));
            }
        }
        Ok(())
    }

    /// The symbols that chip `index` must end with.
    fn expected(
        &mut self,
        kind: Kind,
        counts: &Counts,
        orders: &[Expression],
        index: usize,
    ) -> Vec<Symbol> {
        let n = orders.len();
        let mut expected = Vec::new();
        // Chunk by chunk: elements there are, the expression, and where in chip c's input each begins.
        let mut chunk = |len: usize, order: &Expression, begin: &dyn Fn(usize) -> usize| {
            for element in 0..len {
                expected.push(self.symbols.expression(order, &|c| begin(c) + element));
            }
        };
        match kind {
            Kind::Barrier => {}
            Kind::Broadcast { .. } => chunk(counts.total(n), &orders[0], &|_| 0),
            Kind::AllReduce => {
                for (order, at) in orders
                    .iter()
                    .zip(even_bounds(counts.total(n), n).windows(2))
                {
                    chunk(at[1] - at[0], order, &|_| at[0]);
                }
            }
            Kind::ReduceScatter => {
                let at = bounds((0..n).map(|c| counts.chunk(n, c)));
                chunk(at[index + 1] - at[index], &orders[index], &|_| at[index]);
            }
            Kind::AllGather => {
                for (c, order) in orders.iter().enumerate() {
                    chunk(counts.chunk(n, c), order, &|_| 0);
                }
            }
            Kind::Shift => {
                let before = (index + n - 1) % n;
                chunk(counts.chunk(n, before), &orders[before], &|_| 0);
            }
            Kind::AllToAll => {
                for (s, order) in orders.iter().enumerate() {
                    let before = (0..index).map(|d| counts.block(n, s, d)).sum::<usize>();
                    chunk(counts.block(n, s, index), order, &|_| before);
                }
            }
        }
        expected
    }
}

/// Written places overlap neither each other nor those read at the same time.
fn apart(read: &[Place], written: &[Place]) -> Result<(), String> {
    let meet = |a: &Place, b: &Place| {
        a.buffer == b.buffer && a.range().start.max(b.start) < a.range().end.min(b.range().end)
    };
    for (i, place) in written.iter().enumerate() {
        if let Some(other) = read
            .iter()
            .chain(&written[..i])
            .find(|other| meet(place, other))
        {
            return Err(format!("{place:?} is written while {other:?} is in use"));
        }
    }
    Ok(())
}
