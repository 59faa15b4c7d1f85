//! Products beside the transfers of sequence parallelism, chunk by chunk: see [`crate::spmd::Chip::gather_and`].
//!
//! A gather or scatter of t tokens over P chips becomes P products of t / P tokens, and P - 1 messages to a neighbour, each beside
//! the product that follows. What was gathered is kept: the backward does not gather it once more.

use super::{Beside, Shape, Task, stream};
use crate::forecast::work::{Rows, Work};

impl Shape<'_> {
    fn chunk(&self) -> usize {
        self.tokens().div_ceil(self.tp)
    }

    /// A chunk of the residual stream, or of sums, on its way to a neighbour.
    fn passing(&self) -> Task {
        let bytes = 2.0 * (self.chunk() * self.model.hidden) as f64;
        let axis = "tp".to_string();
        Task::from(Work::Message { axis, bytes }).beside(Beside::Always)
    }

    /// A chunk's sum joins what came.
    fn joined(&self) -> Task {
        let elements = (self.chunk() * self.model.hidden) as f64;
        stream(Rows::Elementwise, 6.0 * elements)
    }

    /// `each` for every chunk, of which all but the first run beside a chunk that travels to where it is needed or summed up.
    fn by_chunks(&self, sums: bool, each: impl Fn() -> Vec<Task>) -> Vec<Task> {
        let mut tasks = vec![];
        for step in 0..self.tp {
            // A chunk that is gathered travels while the one before it is used, a sum while the next one is made.
            let moves = if sums { step > 0 } else { step + 1 < self.tp };
            if moves {
                tasks.push(self.passing());
            }
            tasks.extend(each());
            if sums && step > 0 {
                tasks.push(self.joined());
            }
        }
        tasks
    }

    /// A product [t, k] by [k, n] of the residual stream, gathered, or one that is summed up into it, scattered.
    fn in_chunks(&self, sums: bool, (n, k): (usize, usize)) -> Vec<Task> {
        self.by_chunks(sums, || vec![self.product(self.chunk(), n, k)])
    }

    /// Gradients of a product of [t, rows] by [rows, columns]: of a scattered one, whose result's gradient is gathered, or of a
    /// gathered one, whose input's gradient is summed up.
    fn gradients_in_chunks(&self, sums: bool, (columns, rows): (usize, usize)) -> Vec<Task> {
        self.by_chunks(sums, || {
            self.gradients(self.chunk(), (columns, rows), vec![])
        })
    }

    /// A product in front of which tokens are gathered if they are split.
    pub(super) fn gathered(&self, n: usize, k: usize) -> Vec<Task> {
        if self.collective_matmul {
            return self.in_chunks(false, (n, k));
        }
        let mut tasks = self.before_pair();
        tasks.push(self.product(self.tokens(), n, k));
        tasks
    }

    /// A product whose sums are reduced, and scattered by tokens if those are split.
    pub(super) fn scattered(&self, n: usize, k: usize) -> Vec<Task> {
        if self.collective_matmul {
            return self.in_chunks(true, (n, k));
        }
        let mut tasks = vec![self.product(self.tokens(), n, k)];
        tasks.extend(self.out_of_pair());
        tasks
    }

    /// Gradients of [`Shape::scattered`] of [t, rows] by [rows, columns].
    pub(super) fn scattered_backward(&self, columns: usize, rows: usize) -> Vec<Task> {
        if self.collective_matmul {
            return self.gradients_in_chunks(false, (columns, rows));
        }
        let mut tasks = self.before_pair();
        tasks.extend(self.gradients(self.tokens(), (columns, rows), vec![]));
        tasks
    }

    /// Gradients of [`Shape::gathered`] of [t, rows] by [rows, columns].
    pub(super) fn gathered_backward(&self, columns: usize, rows: usize) -> Vec<Task> {
        if self.collective_matmul {
            return self.gradients_in_chunks(true, (columns, rows));
        }
        self.gradients(self.tokens(), (columns, rows), self.back_into_pair())
    }

    /// Inputs of a layer's products that were gathered and are kept whole.
    pub(super) fn kept_whole(&self, dense: bool) -> usize {
        let attention = self.model.latent.is_none();
        match self.collective_matmul {
            true => attention as usize + dense as usize,
            false => 0,
        }
    }
}
