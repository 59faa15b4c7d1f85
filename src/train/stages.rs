//! A step over the stages of a pipeline: one executor for every schedule, on one stage as on many.
//!
//! A stage holds the parts of the model that its chunks are, and an open [`Segment`] for every chunk and micro-batch that has
//! run forward and not yet backward. Its list says what to compute, receive, start to send, and wait for; see
//! [`crate::pipeline`]. What two stages share is settled behind the list: the loss is on the stage of the last part and told to
//! the others; a tied embedding is on the first and the last stage, which add up their gradients in that order, both of them,
//! and so stay equal bit for bit; the norm of all gradients is a sum over stages, in which the shared one counts once.

use super::batch::{Half, Rows};
use super::check::replicas;
use super::trainer::Training;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::model::{EMBEDDING, Part, Transformer};
use crate::pipeline::{Action, Message, Piece, Plan, Work, layers_of_parts};
use crate::spmd::{Chip, FromIndex, Segment, Sending, Sharded};
use crate::trace::Phase;
use std::collections::HashMap;
use std::ops::Range;

/// The mesh axis of stages.
const AXIS: &str = "pp";

/// The model cut into parts, and the lists by which stages run them.
pub(super) struct Stages {
    plan: Plan,
    layers: Vec<Range<usize>>,
    /// Sequences of a micro-batch over the whole mesh.
    rows: usize,
    /// True if the first and the last stage both hold the embedding.
    shares_embedding: bool,
}

impl Stages {
    /// The stages of a training on a mesh.
    ///
    /// # Errors
    /// [`ErrorKind::Mesh`] or [`ErrorKind::Input`]: the number that stands in the way, and the nearest that works.
    pub(super) fn new(training: &Training, mesh: &Mesh) -> Result<Self> {
        let (options, config) = (&training.options, training.model.config());
        let stages = mesh.size_of(AXIS);
        let chunks = options.virtual_stages.unwrap_or(options.schedule.chunks());
        let rows = training.micro_batch(mesh) * replicas(mesh);
        let plan = Plan::new(
            options.schedule,
            stages,
            chunks,
            training.batches.rows() / rows,
        )?;
        let slots = config.layers + 2;
        if plan.parts() > slots && plan.parts() > 1 {
            let each = match chunks {
                1 => String::new(),
                _ => format!(" with {chunks} virtual stages each"),
            };
            return Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "mesh axis pp={stages}{each} cuts the model into {} parts; its {} layers, the embedding and the head are \
                     only {slots}: {}",
                    plan.parts(),
                    config.layers,
                    match slots / chunks {
                        0 => format!("fewer than {slots} virtual stages would do"),
                        most => format!("pp={most} would do"),
                    }
                ),
            ));
        }
        Ok(Stages {
            layers: layers_of_parts(config.layers, plan.parts())?,
            rows,
            shares_embedding: config.tied && plan.last_stage() != plan.place(0).0,
            plan,
        })
    }

    /// Runs the forwards and backwards of a step. Returns the mean loss of the batch, `[1]` on every chip.
    pub(super) fn run(&self, training: &Training, chip: &Chip, number: u64) -> Sharded {
        let at = At::Step(number - 1);
        let loss = self.walk(training, chip, at, &self.plan, self.plan.actions());
        self.told(chip, &[1], loss)
    }

    /// The sum of the losses of validation windows from `first` on, as many as a step has rows, `[1]` on every chip.
    pub(super) fn validate(&self, training: &Training, chip: &Chip, first: usize) -> Sharded {
        let (at, actions) = (At::Validation(first), self.plan.forward_actions());
        let loss = self.walk(training, chip, at, &self.plan, actions);
        self.told(chip, &[1], loss)
    }

    /// Which blocks run where, in order.
    pub(super) fn parts(&self) -> Vec<Part> {
        let part = |(i, layers): (usize, &Range<usize>)| Part {
            stage: self.plan.place(i).0,
            layers: layers.clone(),
        };
        self.layers.iter().enumerate().map(part).collect()
    }

    fn walk(
        &self,
        training: &Training,
        chip: &Chip,
        at: At,
        plan: &Plan,
        mut actions: Vec<Vec<Action>>,
    ) -> Option<Sharded> {
        let here = chip.coordinate(AXIS);
        let mut stage = Stage {
            stages: self,
            training,
            chip,
            at,
            plan,
            here,
            values: HashMap::new(),
            segments: HashMap::new(),
            sending: HashMap::new(),
            result: None,
        };
        for action in actions.swap_remove(here) {
            match action {
                Action::Receive(message) => stage.receive(&message),
                Action::Run(piece) => stage.compute(&piece),
                Action::Send(message) => stage.send(message),
                Action::Wait(message) => {
                    let sending = stage.sending.remove(&message);
                    sending.expect("what is waited for was sent").wait();
                }
            }
        }
        stage.result.map(|x| x.gather())
    }

    /// What the last part's stage has, on every chip.
    fn told(&self, chip: &Chip, shape: &[usize], result: Option<Sharded>) -> Sharded {
        if self.plan.stages() == 1 {
            return result.expect("the only stage has the last part");
        }
        let nothing = || chip.input("untold", shape, chip.replicated(), &FromIndex(|_| 0f32));
        let result = result.unwrap_or_else(nothing);
        chip.broadcast(&result, AXIS, self.plan.last_stage())
    }

    /// Adds up the gradients of the embedding that the first and the last stage share.
    pub(super) fn add_shared(&self, chip: &Chip, gradients: &mut [(usize, Sharded)]) {
        let last = self.plan.last_stage();
        let here = chip.coordinate(AXIS);
        if !self.shares_embedding || here != 0 && here != last {
            return;
        }
        let shared = |(index, _): &&mut (usize, Sharded)| is_embedding(chip, *index);
        let (_, own) = gradients
            .iter_mut()
            .find(shared)
            .expect("the embedding and the head both give it a gradient");
        let offset = match here {
            0 => last as isize,
            _ => -(last as isize),
        };
        let other = chip.scope(EMBEDDING, || {
            let sending = chip.start_send(own, AXIS, offset, SHARED);
            let ty = (own.shape(), own.dtype(), own.placements());
            let other = chip.receive_tagged(ty, AXIS, offset, SHARED);
            sending.wait();
            other
        });
        *own = match here {
            0 => own.add(&other),
            _ => other.add(own),
        };
    }

    /// True if another stage counts this parameter's gradient in the norm.
    pub(super) fn counted_elsewhere(&self, chip: &Chip, index: usize) -> bool {
        self.shares_embedding && is_embedding(chip, index) && chip.coordinate(AXIS) != 0
    }

    /// The sum of what each stage has of a value.
    pub(super) fn summed(&self, chip: &Chip, value: Sharded) -> Sharded {
        match self.plan.stages() {
            1 => value,
            _ => value.as_summand(AXIS).redistribute(chip.replicated()),
        }
    }
}

/// The tag of the shared embedding's gradient: beyond those of values and gradients.
const SHARED: u64 = u64::MAX;

fn is_embedding(chip: &Chip, index: usize) -> bool {
    *chip.parameters()[index].name == *EMBEDDING
}

/// What goes through the stages.
#[derive(Clone, Copy)]
enum At {
    /// The batch of this step, from 0, forward and backward.
    Step(u64),
    /// Windows of the validation split from this one on.
    Validation(usize),
}

/// One stage under way.
struct Stage<'a> {
    stages: &'a Stages,
    training: &'a Training,
    chip: &'a Chip,
    at: At,
    plan: &'a Plan,
    here: usize,
    /// Values and gradients that are there and not yet used, by whether they are gradients, the part that takes them, and
    /// the micro-batch.
    values: HashMap<(bool, usize, usize), Sharded>,
    segments: HashMap<(usize, usize), Segment>,
    sending: HashMap<Message, Sending>,
    /// The loss, or the logits, of the last part.
    result: Option<Sharded>,
}

impl Stage<'_> {
    fn receive(&mut self, message: &Message) {
        let model = &self.training.model;
        let placed = Transformer::batch_placement(self.chip);
        let placed = model.residual_placement(self.chip, &placed);
        let (rows, context) = (self.stages.rows, self.training.batches.context());
        let shape = [rows, context, model.config().hidden];
        let offset = message.from as isize - self.here as isize;
        let ty = (&shape[..], model.dtype(), &placed);
        let x = self.chip.phase(phase_of(message), || {
            self.chip
                .receive_tagged(ty, AXIS, offset, self.tag(message))
        });
        self.values
            .insert((message.gradient, message.part, message.micro), x);
    }

    fn send(&mut self, message: Message) {
        let key = (message.gradient, message.part, message.micro);
        let x = self.values.remove(&key).expect("a piece made it");
        let offset = message.to as isize - self.here as isize;
        let sending = self.chip.phase(phase_of(&message), || {
            self.chip.start_send(&x, AXIS, offset, self.tag(&message))
        });
        self.sending.insert(message, sending);
    }

    fn tag(&self, message: &Message) -> u64 {
        let part = message.gradient as usize * self.plan.parts() + message.part;
        (part * self.plan.micros() + message.micro) as u64
    }

    fn compute(&mut self, piece: &Piece) {
        let part = self.plan.part(self.here, piece.chunk);
        let (chip, micro) = (self.chip, piece.micro);
        let gradient = self.values.remove(&(true, part, micro));
        // Micro-batches run backward in order: behind the last nothing is added to the gradients of the part's blocks.
        let last = micro + 1 == self.plan.micros();
        let gradient = match piece.work {
            Work::Forward => return self.forward(part, micro),
            Work::Backward => {
                let segment = self.segments.remove(&(part, micro));
                let segment = segment.expect(OPEN);
                chip.last_backward(last, || segment.backward(chip, gradient))
            }
            Work::Inputs => {
                let segment = self.segments.get_mut(&(part, micro));
                segment.expect(OPEN).backward_inputs(chip, gradient)
            }
            Work::Weights => {
                let segment = self.segments.remove(&(part, micro));
                let segment = segment.expect(OPEN);
                chip.last_backward(last, || segment.backward_weights(chip));
                None
            }
        };
        if let Some(dx) = gradient {
            self.values.insert((true, part - 1, micro), dx);
        }
    }

    fn forward(&mut self, part: usize, micro: usize) {
        let x = self.values.remove(&(false, part, micro));
        let body = |x: Option<&Sharded>| self.run_part(part, micro, x);
        let y = match self.at {
            At::Step(_) => {
                let (y, segment) = self.chip.segment(x, body);
                self.segments.insert((part, micro), segment);
                y
            }
            _ => {
                self.chip.stop_recording();
                body(x.as_ref())
            }
        };
        if part + 1 < self.plan.parts() {
            self.values.insert((false, part + 1, micro), y);
            return;
        }
        self.result = Some(match self.result.take() {
            Some(sum) => sum.add(&y),
            None => y,
        });
    }

    /// The embedding if the part has it, its layers, the head and the loss if it has them.
    fn run_part(&self, part: usize, micro: usize, x: Option<&Sharded>) -> Sharded {
        let (chip, batches) = (self.chip, &self.training.batches);
        let model = match self.at {
            At::Step(step) => {
                let share = self.stages.rows as f32 / batches.rows() as f32;
                let model = self.training.model.training(step);
                let before = micro * self.stages.rows;
                model.with_share(share).with_rows_before(before)
            }
            At::Validation(_) => self.training.model.clone(),
        };
        let documents = self.half(micro, false).documents(self.stages.rows);
        let model = model.with_documents(documents);
        let is_last = part + 1 == self.plan.parts();
        let tokens = (part == 0).then(|| self.batch(micro, false));
        let labels = is_last.then(|| self.batch(micro, true));
        let scope = match self.at {
            At::Step(_) => "forward",
            At::Validation(_) => "evaluate",
        };
        chip.scope(scope, || {
            let x = match (x, tokens) {
                (Some(x), _) => x.clone(),
                (None, Some(tokens)) => model.embed(chip, &tokens),
                (None, None) => unreachable!("the first part has tokens, the others values"),
            };
            let x = model.blocks(chip, self.stages.layers[part].clone(), x);
            if !is_last {
                return x;
            }
            let logits = model.head(chip, &x);
            drop(x);
            let labels = labels.expect("the last part has labels");
            let sum = model.losses_of(chip, logits, &labels).sum();
            match self.at {
                At::Step(step) => sum.scale(1.0 / batches.labels(step) as f32),
                _ => sum,
            }
        })
    }

    /// Tokens or labels of a micro-batch.
    fn half(&self, micro: usize, labels: bool) -> Half<'_> {
        let first = micro * self.stages.rows;
        let rows = match self.at {
            At::Step(step) => Rows::Training { step, first },
            At::Validation(window) => Rows::Validation {
                first: window + first,
            },
        };
        Half {
            batches: &self.training.batches,
            rows,
            labels,
        }
    }

    /// The same, placed as a batch is.
    fn batch(&self, micro: usize, labels: bool) -> Sharded {
        let name = if labels { "labels" } else { "tokens" };
        let shape = [self.stages.rows, self.training.batches.context()];
        let contents = self.half(micro, labels);
        self.training.model.batch(self.chip, name, shape, &contents)
    }
}

fn phase_of(message: &Message) -> Phase {
    match message.gradient {
        true => Phase::Backward,
        false => Phase::Forward,
    }
}

const OPEN: &str = "a part runs backward once, after its forward";
