//! What stands before the first layer and behind the last one.

use super::{Beside, Shape, Task, stream};
use crate::collective::Kind;
use crate::forecast::work::{Rows, Work};

/// Kernels of the loss over split logits that touch a few values a token: masks and indices before the exponentials, the logarithm
/// behind their sum, the mean over the batch's mask; of its gradient the same back (Megatron-LM, `cross_entropy.py`, counted line by
/// line). They matter where the host launches slower than kernels run.
const SMALL: [usize; 4] = [10, 2, 5, 11];

impl Shape<'_> {
    /// The embedding, its sum over `tp`, and dropout.
    pub fn embedding(&self) -> Vec<Task> {
        let bytes = (self.tokens() * self.model.hidden) as f64;
        let mut tasks = vec![stream(Rows::Elementwise, 4.0 * bytes)];
        tasks.extend(self.out_of_pair());
        tasks.push(stream(
            Rows::Elementwise,
            (4.0 + self.dropout as u8 as f64) * self.residual(),
        ));
        tasks
    }

    /// The gradient of the embedding: dropout's, a table of zeros to which tokens add their rows, and its addition to the sum of
    /// earlier micro-batches. No product writes it, so no product adds it up either.
    pub fn embedding_backward(&self) -> Vec<Task> {
        let (tokens, c) = (self.tokens(), self.model.hidden);
        let table = (self.model.vocab.div_ceil(self.tp) * c) as f64;
        let mut tasks = vec![];
        if self.dropout {
            tasks.push(stream(Rows::Elementwise, 5.0 * self.residual()));
        }
        if self.sequence_parallel {
            tasks.extend(self.transfer(Kind::AllGather, Beside::Never));
        }
        let bytes = 2.0 * table + 6.0 * (tokens * c) as f64 + (2.0 + 2.0 * self.gradient) * table;
        tasks.push(stream(Rows::Elementwise, bytes).of_weight());
        tasks
    }

    /// Kernels that touch two values in f32 a token.
    fn small(&self, kernels: usize) -> Vec<Task> {
        vec![stream(Rows::Elementwise, 8.0 * self.tokens() as f64); kernels]
    }

    /// A sum or maximum over the chips that share the vocabulary, of a value in f32 a token.
    fn over_vocabulary(&self) -> Vec<Task> {
        if self.tp == 1 {
            return vec![];
        }
        let work = Work::Collective {
            kind: Kind::AllReduce,
            axis: "tp".into(),
            bytes: 4.0 * self.tokens() as f64,
        };
        vec![work.into()]
    }

    /// Norm, logits, and a loss that reads and writes them in f32, pass by pass. The head is never narrower than 2 bytes.
    pub fn head(&self, backward: bool) -> Vec<Task> {
        let (columns, rows) = (self.model.vocab.div_ceil(self.tp), self.model.hidden);
        let wide = Shape {
            size: self.size.max(2.0),
            ..self.clone()
        };
        let logits = (self.tokens() * columns) as f64;
        let passes = |bytes: &'static [f64]| {
            let pass = move |b: &f64| stream(Rows::Softmax, b * logits);
            bytes.iter().map(pass)
        };
        if backward {
            // Softmax minus one-hot times the loss's gradient, in place; narrowed.
            let mut tasks = self.small(SMALL[3]);
            tasks.extend(passes(&[8.0, 6.0]));
            let sum = self.transfer(Kind::AllReduce, Beside::Backward);
            tasks.extend(wide.gradients(self.tokens(), (columns, rows), sum));
            tasks.push(stream(Rows::Norm, 6.0 * self.residual()));
            return tasks;
        }
        let mut tasks = vec![stream(Rows::Norm, 4.0 * self.residual())];
        tasks.extend(self.before_pair());
        tasks.push(wide.product(self.tokens(), columns, rows));
        // To f32, the maximum, its subtraction, exponentials, their sum, the division: each a pass in the loss over split logits
        // (Shoeybi et al. 2019, section 3), which sums three values a token over the chips.
        tasks.extend(passes(&[6.0, 4.0]));
        tasks.extend(self.over_vocabulary());
        tasks.extend(passes(&[8.0]));
        tasks.extend(self.small(SMALL[0]));
        tasks.extend(self.over_vocabulary());
        tasks.extend(passes(&[8.0, 4.0]));
        tasks.extend(self.over_vocabulary());
        tasks.extend(self.small(SMALL[1]));
        tasks.extend(passes(&[8.0]));
        tasks.extend(self.small(SMALL[2]));
        tasks
    }
}
