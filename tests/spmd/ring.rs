//! Attention over a sequence that chips share is the textbook's, forward and backward: every mask, order, grouping and
//! factor; it sends what its formulas say, computes no hidden block, and gives every chip the same work.

use ndarray::ArrayD;
use supernode::mesh::Mesh;
use supernode::ops::Attention;
use supernode::placement::Placement::Shard;
use supernode::placement::TokenOrder;
use supernode::random::Stream;
use supernode::reference::{self, gamma};
use supernode::spmd::{Chip, Device, Ring, Run, World};
use supernode::trace::{EventKind, Phase, Stream as Lane, Trace};
use supernode::{DType, Sharded, bf16};

/// Half the distance from 1 to the next f32.
const U: f64 = f32::EPSILON as f64 / 2.0;

#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) mesh: &'static str,
    pub(super) exchange: usize,
    pub(super) zigzag: bool,
    pub(super) op: Attention,
    pub(super) b: usize,
    pub(super) t: usize,
    pub(super) h: usize,
    pub(super) g: usize,
    pub(super) d: usize,
}

pub(super) fn causal() -> Attention {
    Attention {
        causal: true,
        ..Default::default()
    }
}

pub(super) fn case(mesh: &'static str, exchange: usize) -> Case {
    Case {
        mesh,
        exchange,
        zigzag: true,
        op: causal(),
        b: 2,
        t: 16,
        h: 4,
        g: 2,
        d: 8,
    }
}

impl Case {
    fn chips(&self) -> usize {
        Mesh::parse(self.mesh).expect("a mesh").size_of("cp")
    }

    pub(super) fn order(&self) -> TokenOrder {
        match self.zigzag {
            true => Ring::order(self.t, self.chips(), self.exchange),
            false => TokenOrder::Ascending,
        }
    }

    pub(super) fn shape(&self, heads: usize) -> [usize; 4] {
        [self.b, self.t, heads, self.d]
    }

    /// Numbers [b, t, heads, d] by position in the text.
    pub(super) fn numbers(&self, name: &str, heads: usize) -> ArrayD<f32> {
        let shape = self.shape(heads);
        let mut x = vec![0.0; shape.iter().product()];
        Stream::new(3, name).fill_normal(0, &mut x);
        ArrayD::from_shape_vec(shape.to_vec(), x).expect("as many as the shape has")
    }

    /// The same as they are kept.
    fn kept(&self, x: &ArrayD<f32>) -> ArrayD<f32> {
        x.select(ndarray::Axis(1), &self.order().positions(0..self.t))
    }

    /// Back from what is kept.
    fn by_position(&self, kept: &ArrayD<f32>) -> ArrayD<f32> {
        let mut x = kept.clone();
        for (at, position) in self.order().positions(0..self.t).into_iter().enumerate() {
            let from = kept.index_axis(ndarray::Axis(1), at);
            x.index_axis_mut(ndarray::Axis(1), position).assign(&from);
        }
        x
    }

    fn documents(&self) -> Vec<u32> {
        let document = |(b, t): (usize, usize)| ((t + 3 * b) / 6) as u32;
        let all = (0..self.b).flat_map(|b| (0..self.t).map(move |t| (b, t)));
        all.map(document).collect()
    }

    /// o and the gradients of q, k and v, whole, on the chip of rank 0; all others read the same.
    fn program(&self, chip: &Chip, dtype: DType) -> Vec<ArrayD<f32>> {
        let placed = chip.placed(&[("dp", Shard(0)), ("cp", Shard(1)), ("tp", Shard(2))]);
        let input = |name: &str, heads: usize| -> Sharded {
            let x = self.kept(&self.numbers(name, heads));
            match dtype {
                DType::Bf16 => {
                    chip.input(name, self.shape(heads), &placed, &x.mapv(bf16::from_f32))
                }
                _ => chip.input(name, self.shape(heads), &placed, &x),
            }
        };
        let [q, k, v] =
            [("q", self.h), ("k", self.g), ("v", self.g)].map(|(n, h)| input(n, h).variable());
        let w = input("do", self.h);
        let ids: Vec<u32> = {
            let (all, order) = (self.documents(), self.order().positions(0..self.t));
            let row = |b: usize| order.iter().map(move |t| b * self.t + t);
            (0..self.b).flat_map(row).map(|i| all[i]).collect()
        };
        let by_token = chip.placed(&[("dp", Shard(0)), ("cp", Shard(1))]);
        let documents = chip.input("documents", [self.b, self.t], by_token, &ids);
        let mut operands = vec![&q, &k, &v];
        operands.extend(self.op.documents.then_some(&documents));
        let ring = Ring {
            axis: "cp",
            exchange: self.exchange,
            order: self.order(),
        };
        let mut o = None;
        let loss = chip.record(|| {
            let y = chip.ring_attention(&self.op, &operands, &ring);
            o = Some(y.detach());
            y.multiply(&w).sum()
        });
        loss.backward();
        let gradients = [&q, &k, &v].map(|x| chip.take_gradient(x).expect("a gradient"));
        let all = [o.expect("recorded")].into_iter().chain(gradients);
        let whole = all.map(|x| x.gather().read());
        whole
            .map(|x| x.map_or(ArrayD::zeros(vec![0]), |x| self.by_position(&x)))
            .collect()
    }

    fn run(&self, dtype: DType) -> Run<Vec<ArrayD<f32>>> {
        self.run_on(Device::cpu(), dtype)
    }

    fn run_on(&self, device: Device, dtype: DType) -> Run<Vec<ArrayD<f32>>> {
        let mesh = Mesh::parse(self.mesh).expect("a mesh");
        let world = World::threads(&mesh, device).expect("a small mesh");
        let run = world.with_threads(1).run(|chip| self.program(chip, dtype));
        run.unwrap_or_else(|e| panic!("{self:?}: {e}"))
    }

    fn ghost(&self) -> Trace {
        let mesh = Mesh::parse(self.mesh).expect("a mesh");
        let ghost = World::ghost(&mesh).trace(|chip| drop(self.program(chip, DType::F32)));
        ghost.unwrap_or_else(|e| panic!("{self:?}: {e}"))
    }

    /// The textbook's o, dq, dk and dv, [b, t, heads, d], and how far computed ones may be off.
    fn textbook(&self) -> Vec<(Vec<f64>, f64)> {
        let wide = |name, heads: usize| {
            let x: Vec<f64> = self
                .numbers(name, heads)
                .iter()
                .map(|&x| f64::from(x))
                .collect();
            reference::permute(&self.shape(heads), &[0, 2, 1, 3], &x)
        };
        let [q, k, v, dout] =
            [("q", self.h), ("k", self.g), ("v", self.g), ("do", self.h)].map(|(n, h)| wide(n, h));
        let ids = self.documents();
        let book = reference::Attention {
            kv_heads: self.g,
            causal: self.op.causal,
            window: self.op.window,
            soft_cap: self.op.soft_cap.map(f64::from),
            documents: self.op.documents.then_some((&ids[..], &ids[..])),
            ..reference::Attention::full(self.b, self.h, self.t, self.t, self.d)
        };
        let (o, lse) = reference::attention(&book, &q, &k, &v);
        let gradients = reference::attention_backward(&book, [&q, &k, &v], &o, &lse, &dout);
        let norm = |x: &[f64]| {
            let rows = x
                .chunks(self.d)
                .map(|r| r.iter().map(|x| x * x).sum::<f64>().sqrt());
            rows.fold(0.0, f64::max)
        };
        let [qn, kn, vn, on] = [&q, &k, &v, &dout].map(|x| norm(x));
        // A logit is a sum of d products; a weight e^(logit - lse) is off by twice that, and by the merges' weights; a
        // result sums weights over keys (o, dq) or over the queries of a group (dk, dv), part by part.
        let logit = gamma(self.d + 24, U) * (book.scale * qn * kn + 1.0);
        let merged = gamma(self.t + 40 + 16 * self.chips(), U);
        let weight = 2.1 * logit + merged;
        let many = (self.t * self.h / self.g) as f64;
        // ds = p (dp - D) with |dp| and |D| at most |do| |v|.
        let ds = 2.0 * book.scale * on * vn * (weight + gamma(2 * self.d + 48, U) + merged);
        let bounds = [
            weight * vn,
            ds * kn,
            ds * qn * many,
            (weight + merged) * on * many,
        ];
        let by_tokens = |x: &[f64], heads: usize| {
            reference::permute(&[self.b, heads, self.t, self.d], &[0, 2, 1, 3], x)
        };
        let [dq, dk, dv] = &gradients;
        let all = [(&o, self.h), (dq, self.h), (dk, self.g), (dv, self.g)];
        let all = all.map(|(x, heads)| by_tokens(x, heads));
        all.into_iter().zip(bounds).collect()
    }

    fn check(&self) {
        let run = self.check_on(Device::cpu());
        assert_eq!(run.pool_peaks(), self.ghost().peak_bytes(), "{self:?}");
    }

    fn check_on(&self, device: Device) -> Run<Vec<ArrayD<f32>>> {
        let run = self.run_on(device, DType::F32);
        let names = ["o", "dq", "dk", "dv"];
        for ((got, (want, bound)), name) in run.outputs()[0].iter().zip(self.textbook()).zip(names)
        {
            assert_eq!(got.len(), want.len(), "{self:?} {name}");
            for (a, b) in got.iter().zip(&want) {
                let error = (f64::from(*a) - b).abs();
                assert!(error <= bound, "{self:?} {name}: {a}, {b}, bound {bound}");
            }
        }
        let ghost = self.ghost();
        assert_eq!(run.trace().difference(&ghost), None, "{self:?}");
        run
    }
}

/// The masks on chips of another kind: of the textbook within the same bounds, and twice the same bits.
#[cfg(feature = "gpu")]
pub(crate) fn check_on(device: &Device) {
    let documents = Attention {
        documents: true,
        window: Some(3),
        ..causal()
    };
    let capped = Attention {
        soft_cap: Some(2.0),
        window: Some(5),
        ..causal()
    };
    for (mesh, exchange) in [("cp=2", 1), ("cp=3", 1), ("cp=4", 2)] {
        for op in [
            causal(),
            Attention::default(),
            documents.clone(),
            capped.clone(),
        ] {
            for (zigzag, t) in [(true, 16), (false, 21)] {
                let case = Case {
                    op: op.clone(),
                    zigzag,
                    t,
                    ..case(mesh, exchange)
                };
                let first = case.check_on(device.clone()).into_outputs();
                let again = case.run_on(device.clone(), DType::F32).into_outputs();
                assert_eq!(first, again, "two runs of {case:?}");
            }
        }
    }
}

#[test]
fn every_mask_in_every_order() {
    for (mesh, exchange) in [
        ("cp=1", 1),
        ("cp=2", 1),
        ("cp=2", 2),
        ("cp=3", 1),
        ("cp=4", 1),
        ("cp=4", 2),
    ] {
        let base = case(mesh, exchange);
        let documents = Attention {
            documents: true,
            ..causal()
        };
        let window = Attention {
            window: Some(5),
            ..causal()
        };
        let capped = Attention {
            soft_cap: Some(2.0),
            scale: None,
            ..causal()
        };
        let all_sights = Attention {
            documents: true,
            window: Some(3),
            ..causal()
        };
        for op in [
            causal(),
            Attention::default(),
            documents,
            window,
            capped,
            all_sights,
        ] {
            for zigzag in [true, false] {
                Case {
                    op: op.clone(),
                    zigzag,
                    ..base.clone()
                }
                .check();
            }
        }
    }
}

#[test]
fn lengths_that_do_not_divide_and_grouped_queries() {
    for t in [1, 3, 7, 13, 21] {
        for (mesh, exchange) in [("cp=2", 1), ("cp=3", 1), ("cp=4", 2), ("cp=4", 4)] {
            let base = case(mesh, exchange);
            Case {
                t,
                g: 4,
                ..base.clone()
            }
            .check();
            if exchange <= 2 {
                Case {
                    t,
                    h: 6,
                    g: 2,
                    ..base
                }
                .check();
            }
        }
    }
    Case {
        g: 1,
        ..case("cp=4", 1)
    }
    .check();
}

#[test]
fn it_goes_with_other_axes() {
    for mesh in ["dp=2,cp=2,tp=2", "tp=2,cp=2", "cp=4,tp=2", "dp=2,cp=4"] {
        case(mesh, 1).check();
    }
    Case {
        h: 8,
        g: 4,
        ..case("cp=4,tp=2", 2)
    }
    .check();
    // One key head for query heads that tp splits: its gradient is a sum over tp.
    Case {
        g: 1,
        ..case("cp=2", 1)
    }
    .check();
}

#[test]
fn two_runs_give_the_same_bits_and_bf16_its_rounding() {
    let case = Case {
        t: 21,
        ..case("cp=3", 1)
    };
    let [first, again] = [(); 2].map(|()| case.run(DType::F32).into_outputs());
    assert_eq!(first, again);
    let narrow = case.run(DType::Bf16).into_outputs();
    for (a, b) in first[0].iter().zip(&narrow[0]) {
        let size = a.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (a, b) in a.iter().zip(b) {
            // Operands, o and gradients are rounded to 8 bits; sums stay in f32.
            assert!((a - b).abs() <= 0.05 * size, "{a} {b}");
        }
    }
}

/// Bytes that the chip of `rank` sends in calls of `op` in a phase.
fn sent(trace: &Trace, rank: usize, op: &str, phase: Phase) -> u64 {
    let events = trace.chip(rank).events();
    let calls = events.filter(|e| *e.op == *op && e.phase == phase);
    calls.filter_map(|e| Some(e.traffic.as_ref()?.bytes)).sum()
}

#[test]
fn bytes_are_those_of_the_formulas() {
    for (mesh, u) in [
        ("cp=2", 1),
        ("cp=4", 1),
        ("cp=4", 2),
        ("cp=4", 4),
        ("cp=8", 2),
    ] {
        let case = Case {
            h: 8,
            g: 4,
            t: 32,
            ..case(mesh, u)
        };
        let trace = case.ghost();
        let (p, u, e) = (case.chips() as u64, u as u64, 4);
        let r = p / u;
        // All tokens of the batch, elements of all query heads and of all key heads.
        let n = (case.b * case.t) as u64;
        let (h, gh) = ((case.h * case.d) as u64, (case.g * case.d) as u64);
        let ring = 2 * n * gh * e * (r - 1) / p;
        let exchange = n * (2 * h + 2 * gh) * e * (u - 1) / (p * u);
        for rank in 0..case.chips() {
            let bytes = |op, phase| sent(&trace, rank, op, phase);
            assert_eq!(bytes("shift", Phase::Forward), ring, "{mesh} {u}");
            assert_eq!(bytes("all-to-all", Phase::Forward), exchange, "{mesh} {u}");
            // Keys and values again, and their gradients, here both in f32.
            assert_eq!(bytes("shift", Phase::Backward), 2 * ring, "{mesh} {u}");
            assert_eq!(bytes("all-to-all", Phase::Backward), exchange, "{mesh} {u}");
        }
        let chip = trace.chip(0);
        let shifts = chip.collectives.iter().find(|c| *c.op == *"shift");
        if let Some(shifts) = shifts {
            assert_eq!(
                (shifts.bytes, shifts.overlapped_bytes),
                (shifts.floor_bytes, shifts.bytes)
            );
        }
    }
}

/// Flops of attention that the chip of `rank` computes.
fn work(trace: &Trace, rank: usize) -> u64 {
    let events = trace.chip(rank).events();
    let parts = events.filter(|e| matches!(&*e.op, "attention" | "attention.backward"));
    parts.map(|e| e.flops).sum()
}

#[test]
fn zigzag_gives_all_chips_the_same_work_and_hidden_blocks_cost_nothing() {
    let zigzag = Case {
        t: 64,
        ..case("cp=4", 1)
    };
    let work_of = |case: &Case| -> Vec<u64> {
        let trace = case.ghost();
        (0..4).map(|rank| work(&trace, rank)).collect()
    };
    let balanced = work_of(&zigzag);
    let total: u64 = balanced.iter().sum();
    let slowest = *balanced.iter().max().expect("four chips");
    let ratio = 4.0 * slowest as f64 / total as f64;
    assert!(ratio <= 1.05, "{balanced:?}: {ratio}");
    assert_eq!(slowest, balanced[0]);
    // Forward 4 and backward 10 flops for each visible pair, element and head: nothing else is computed.
    let visible = (64 * 65 / 2) * 2 * 4 * 8;
    assert_eq!(total, 14 * visible);
    let plain = work_of(&Case {
        zigzag: false,
        ..zigzag.clone()
    });
    assert_eq!(plain.iter().sum::<u64>(), total);
    assert!(plain[3] > 6 * plain[0], "{plain:?}");
    // A window leaves out most blocks, on every chip.
    let op = Attention {
        window: Some(8),
        ..causal()
    };
    let narrow = work_of(&Case {
        op: op.clone(),
        ..zigzag.clone()
    });
    assert_eq!(
        narrow.iter().sum::<u64>(),
        14 * op.pairs(64, 64) * 2 * 4 * 8
    );
}

#[test]
fn keys_travel_beside_the_computation() {
    let trace = case("cp=4", 1).ghost();
    let events: Vec<_> = trace.chip(1).events().collect();
    let forward: Vec<&str> = events
        .iter()
        .filter(|e| e.phase == Phase::Forward && (e.kind != EventKind::Op || &*e.op == "attention"))
        .map(|e| &*e.op)
        .collect();
    let step = ["shift", "shift", "attention", "wait", "wait"];
    let want: Vec<&str> = step
        .iter()
        .cycle()
        .take(15)
        .copied()
        .chain(["attention"])
        .collect();
    assert_eq!(forward[..16], want);
    let shifts = events.iter().filter(|e| &*e.op == "shift");
    assert!(
        shifts.clone().count() == 6 + 12 && shifts.clone().all(|e| e.stream == Lane::Communication)
    );
}
