//! The model in burn: GPT-2's architecture with tied embeddings, written as burn's users write it.

use super::CHAR_6X384;
use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{
    Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig,
};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData, activation};

#[derive(Module, Debug)]
struct Block {
    attend: LayerNorm,
    qkv: Linear,
    out: Linear,
    think: LayerNorm,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Gpt {
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

fn normal() -> Initializer {
    Initializer::Normal {
        mean: 0.0,
        std: 0.02,
    }
}

impl Block {
    fn new(width: usize, device: &Device) -> Block {
        let linear = |from, to| {
            LinearConfig::new(from, to)
                .with_initializer(normal())
                .init(device)
        };
        let norm = || LayerNormConfig::new(width).init(device);
        Block {
            attend: norm(),
            qkv: linear(width, 3 * width),
            out: linear(width, width),
            think: norm(),
            up: linear(width, 4 * width),
            down: linear(4 * width, width),
        }
    }

    fn forward(&self, x: Tensor<3>, heads: usize, hidden: &Tensor<4, Bool>) -> Tensor<3> {
        let [b, t, c] = x.dims();
        let all = self.qkv.forward(self.attend.forward(x.clone()));
        let all = all
            .reshape([b, t, 3, heads, c / heads])
            .permute([2, 0, 3, 1, 4]);
        let part = |i: usize| {
            all.clone()
                .slice([i..i + 1])
                .reshape([b, heads, t, c / heads])
        };
        let scores = part(0).matmul(part(1).transpose()) / ((c / heads) as f64).sqrt();
        let shares = activation::softmax(scores.mask_fill(hidden.clone(), f32::NEG_INFINITY), 3);
        let mixed = shares
            .matmul(part(2))
            .permute([0, 2, 1, 3])
            .reshape([b, t, c]);
        let x = x + self.out.forward(mixed);
        let inner = activation::gelu(self.up.forward(self.think.forward(x.clone())));
        x + self.down.forward(inner)
    }
}

impl Gpt {
    fn forward(&self, ids: Tensor<2, Int>, heads: usize) -> Tensor<3> {
        let [b, t] = ids.dims();
        let device = ids.device();
        let places = Tensor::<1, Int>::arange(0..t as i64, &device).reshape([1, t]);
        let mut x = self.tokens.forward(ids) + self.positions.forward(places);
        let hidden = Tensor::<2, Bool>::tril_mask([t, t], 0, &device);
        let hidden = hidden.reshape([1, 1, t, t]).expand([b, heads, t, t]);
        for block in &self.blocks {
            x = block.forward(x, heads, &hidden);
        }
        let head = self.tokens.weight.val().transpose().unsqueeze::<3>();
        self.norm.forward(x).matmul(head)
    }
}

/// The model in training on one batch.
pub(crate) struct Trainer {
    model: Option<Gpt>,
    optimizer: ModuleOptimizer,
    ids: Tensor<2, Int>,
    labels: Tensor<1, Int>,
    device: Device,
}

impl Trainer {
    pub(crate) fn new(device: &Device, ids: &[u32], labels: &[u32]) -> Trainer {
        let [layers, width, _, vocab, tokens, rows] = CHAR_6X384;
        let table = |n| {
            EmbeddingConfig::new(n, width)
                .with_initializer(normal())
                .init(device)
        };
        let model = Gpt {
            tokens: table(vocab),
            positions: table(tokens),
            blocks: (0..layers).map(|_| Block::new(width, device)).collect(),
            norm: LayerNormConfig::new(width).init(device),
        };
        let whole = |v: &[u32]| -> Vec<i32> { v.iter().map(|&x| x as i32).collect() };
        Trainer {
            model: Some(model),
            optimizer: AdamWConfig::new().with_weight_decay(0.01).init(),
            ids: Tensor::from_data(TensorData::new(whole(ids), [rows, tokens]), device),
            labels: Tensor::from_data(TensorData::new(whole(labels), [rows * tokens]), device),
            device: device.clone(),
        }
    }

    /// One step: the mean loss before the update, read when all of it is done.
    pub(crate) fn step(&mut self) -> f64 {
        let [_, _, heads, vocab, tokens, rows] = CHAR_6X384;
        let model = self.model.take().expect("a step gives it back");
        let logits = model
            .forward(self.ids.clone(), heads)
            .reshape([rows * tokens, vocab]);
        let loss = CrossEntropyLossConfig::new().init(&self.device);
        let value = loss.forward(logits, self.labels.clone());
        let gradients = GradientsParams::from_grads(value.backward(), &model);
        self.model = Some(self.optimizer.step(3e-4, model, gradients));
        let value = value.into_scalar::<f32>();
        self.device.sync().expect("the device finishes");
        f64::from(value)
    }
}
