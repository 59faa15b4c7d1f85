//! Transfers that are started and waited for later: the same results as the blocking calls, beside computation.

use supernode::mesh::Mesh;
use supernode::placement::Placement::{self, Partial, Replicate, Shard};
use supernode::spmd::{Chip, Device, FromIndex, Init, Run, Sharded, World};
use supernode::trace::{Event, EventKind, Stream};

fn run<T: Send>(mesh: &Mesh, program: impl Fn(&Chip) -> T + Sync) -> Run<T> {
    let run = World::threads(mesh, Device::cpu())
        .expect("a small mesh")
        .with_threads(1)
        .run(&program);
    let run = run.unwrap_or_else(|e| panic!("on {mesh}: {e}"));
    let ghost = World::ghost(mesh)
        .trace(&program)
        .expect("a ghost that fits");
    assert_eq!(run.trace().difference(&ghost), None);
    assert_eq!(run.pool_peaks(), ghost.peak_bytes());
    run
}

/// A tensor of which every chip of `tp` holds another summand or piece.
fn tensor(chip: &Chip, name: &str, from: Placement) -> Sharded {
    let of = if from == Partial {
        chip.coordinate("tp") as u64
    } else {
        0
    };
    chip.input(
        name,
        [5, 6],
        chip.placed(&[("tp", from)]),
        &FromIndex(move |i| ((i * 7 + of * 3) % 11) as f32 / 8.0),
    )
}

const MOVES: [(Placement, Placement); 5] = [
    (Partial, Replicate),
    (Partial, Shard(1)),
    (Shard(0), Replicate),
    (Shard(1), Replicate),
    (Shard(0), Shard(1)),
];

#[test]
fn start_and_wait_gives_what_the_blocking_call_gives() {
    for mesh in ["tp=2", "tp=3", "dp=2,tp=4"] {
        run(&Mesh::parse(mesh).expect("a mesh"), |chip| {
            for (from, to) in MOVES {
                let x = tensor(chip, "x", from);
                let to = chip.placed(&[("tp", to)]);
                let blocking = x.redistribute(&to);
                let started = x.start_redistribute(&to).wait();
                assert_eq!(blocking.placements(), started.placements());
                let (a, b) = (blocking.read(), started.read());
                let bits = |a: Option<ndarray::ArrayD<f32>>| a.map(|a| a.mapv(f32::to_bits));
                assert_eq!(bits(a), bits(b), "{from} to {to} on {mesh}");
            }
        });
    }
}

/// The events' names, with tickets and streams of transfers: `all-reduce#0`, `matmul`, `wait#0`.
fn names<'a>(events: impl Iterator<Item = &'a Event>) -> Vec<String> {
    let name = |e: &Event| {
        assert_eq!(
            e.stream == Stream::Communication,
            e.ticket.is_some() && e.kind != EventKind::Wait
        );
        e.ticket
            .map_or(e.op.to_string(), |ticket| format!("{}#{ticket}", e.op))
    };
    events.map(name).collect()
}

#[test]
fn several_are_in_flight_and_end_in_any_order() {
    let mesh = Mesh::new([("tp", 3)]);
    let run = run(&mesh, |chip| {
        let xs: Vec<Sharded> = MOVES
            .iter()
            .map(|(from, _)| tensor(chip, "x", *from))
            .collect();
        let start = |(x, (_, to)): (&Sharded, &(Placement, Placement))| x.start_redistribute([*to]);
        let mut pending: Vec<_> = xs.iter().zip(&MOVES).map(start).collect();
        let w = chip.parameter("w", [6, 6], [Replicate], Init::normal(0.02));
        let h = w.matmul(&w);
        pending.reverse();
        let ended: Vec<Sharded> = pending.into_iter().map(|p| p.wait()).collect();
        for ((x, (_, to)), y) in xs.iter().zip(&MOVES).zip(ended.iter().rev()) {
            assert_eq!(x.redistribute([*to]).read(), y.read());
        }
        drop(h);
    });
    let names = names(run.trace().chip(1).events());
    let want = [
        "all-reduce#0",
        "reduce-scatter#1",
        "all-gather#2",
        "all-gather#3",
        "all-to-all#4",
        "matmul",
        "wait#4",
        "wait#3",
        "wait#2",
        "wait#1",
        "wait#0",
    ];
    assert_eq!(names[..want.len()], want);
}

#[test]
fn what_runs_beside_computation_is_counted_and_timed() {
    let mesh = Mesh::new([("tp", 2)]);
    let run = run(&mesh, |chip| {
        let x = tensor(chip, "x", Partial);
        let pending = x.start_redistribute([Replicate]);
        let w = chip.parameter("w", [64, 64], [Replicate], Init::normal(0.02));
        let mut h = w.matmul(&w);
        for _ in 0..20 {
            h = h.matmul(&w);
        }
        pending.wait();
        x.redistribute([Replicate]);
    });
    for rank in 0..2 {
        let chip = run.trace().chip(rank);
        let [total] = &chip.collectives[..] else {
            panic!("one collective, one axis: {:?}", chip.collectives)
        };
        // Tree all-reduce of 30 numbers over two chips: half of them out, the other half's sum out.
        assert_eq!(
            (total.calls, total.bytes, total.overlapped_bytes),
            (2, 2 * 120, 120)
        );
        let find = |kind: EventKind| {
            chip.events()
                .find(|e| e.kind == kind)
                .expect("such an event")
        };
        let (transfer, wait) = (find(EventKind::Collective), find(EventKind::Wait));
        assert_eq!((transfer.ticket, wait.ticket), (Some(0), Some(0)));
        let (transfer, wait) = (
            transfer.time.expect("a real run"),
            wait.time.expect("a real run"),
        );
        assert!(
            transfer.start_ns + transfer.duration_ns <= wait.start_ns + wait.duration_ns,
            "the wait ends last"
        );
    }
}

#[test]
fn gradients_pass_through_a_started_transfer() {
    let mesh = Mesh::new([("tp", 2)]);
    let program = |chip: &Chip, started: bool| {
        let x = tensor(chip, "x", Shard(0)).variable();
        let w = chip.parameter("w", [6, 4], [Shard(1)], Init::normal(0.5));
        let loss = chip.record(|| {
            let y = x.scale(2.0);
            let y = if started {
                y.start_redistribute([Replicate]).wait()
            } else {
                y.gather()
            };
            y.matmul(&w).sum().gather()
        });
        loss.backward();
        let dx = chip.take_gradient(&x).expect("a gradient").gather();
        let dw = chip.take_gradients().swap_remove(0).1.gather();
        [loss, dx, dw].map(|t| t.read().map(|a| a.mapv(f32::to_bits)))
    };
    let started = run(&mesh, |chip| program(chip, true));
    let blocking = run(&mesh, |chip| program(chip, false));
    assert_eq!(started.outputs(), blocking.outputs());
}

#[test]
#[should_panic(expected = "sends nothing; use redistribute")]
fn a_slice_is_not_started() {
    let mesh = Mesh::new([("tp", 2)]);
    let refused = World::ghost(&mesh).trace(|chip| {
        tensor(chip, "x", Replicate)
            .start_redistribute([Shard(0)])
            .wait()
    });
    panic!("{}", refused.expect_err("a slice sends nothing"));
}
