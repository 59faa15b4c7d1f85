//! Gathering and scattering by chunks: products and their gradients as without, to the last digit where numbers are whole.

use supernode::World;
use supernode::mesh::Mesh;
use supernode::placement::Placement::{Replicate, Shard};
use supernode::spmd::{Chip, Device, FromIndex, Run, Sharded};

const TOKENS: usize = 12;

fn run<T: Send>(mesh: &str, program: impl Fn(&Chip) -> T + Sync) -> Run<T> {
    let mesh = Mesh::parse(mesh).expect("a mesh");
    let world = World::threads(&mesh, Device::cpu()).expect("a small mesh");
    let run = world.with_threads(1).run(&program);
    let run = run.unwrap_or_else(|e| panic!("on {mesh}: {e}"));
    let ghost = World::ghost(&mesh).trace(&program).expect("a ghost");
    assert_eq!(run.trace().difference(&ghost), None, "{mesh}");
    assert_eq!(run.pool_peaks(), ghost.peak_bytes(), "{mesh}");
    run
}

/// Small whole numbers, so that sums in any order are exact.
fn whole_number(i: u64) -> f32 {
    (i * 7 % 11) as f32 - 5.0
}

fn activations(chip: &Chip, width: usize, placed: &[(&str, supernode::Placement)]) -> Sharded {
    let shape = [2, TOKENS, width];
    chip.input("x", shape, chip.placed(placed), &FromIndex(whole_number))
        .variable()
}

/// A weight split over tp along `dim`, with a gradient.
fn weight(chip: &Chip, name: &str, dim: usize) -> Sharded {
    let placed = chip.placed(&[("tp", Shard(dim))]);
    chip.input(name, [12, 12], placed, &FromIndex(whole_number))
        .variable()
}

/// The gradient of a value, whole on every chip.
fn gradient(chip: &Chip, x: &Sharded) -> Sharded {
    chip.take_gradient(x).expect("a gradient").gather()
}

const MESHES: [&str; 5] = ["tp=2", "tp=3", "tp=4", "dp=2,tp=2", "tp=2,dp=2"];

/// Results and gradients of two products of one gathering, whose results are weighted so that every element counts otherwise.
fn gathered(chip: &Chip, by_chunks: bool) -> Vec<Option<ndarray::ArrayD<f32>>> {
    let x = activations(chip, 12, &[("dp", Shard(0)), ("tp", Shard(1))]);
    let [u, v] = ["u", "v"].map(|name| weight(chip, name, 1));
    let (y, loss) = chip.record(|| {
        let y = x.scale(2.0);
        let products = |y: &Sharded| vec![y.matmul(&u), y.matmul(&v)];
        let ys = match by_chunks {
            true => chip.gather_and("tp", &y, products),
            false => {
                let tp = chip.mesh().axis_index("tp");
                products(&y.redistribute(y.placements().with(tp, Replicate)))
            }
        };
        let y = ys[0].multiply(&ys[1]);
        let loss = y.sum().gather();
        (y, loss)
    });
    loss.backward();
    let gradients = [&x, &u, &v].map(|x| gradient(chip, x));
    [y.gather()]
        .iter()
        .chain(&gradients)
        .map(Sharded::read)
        .collect()
}

fn scattered(chip: &Chip, by_chunks: bool) -> Vec<Option<ndarray::ArrayD<f32>>> {
    let x = activations(chip, 12, &[("dp", Shard(0)), ("tp", Shard(2))]);
    let w = weight(chip, "w", 0);
    let (y, loss) = chip.record(|| {
        let h = x.scale(2.0);
        let y = match by_chunks {
            true => chip.scatter_from("tp", &h, |h| h.matmul(&w)),
            false => {
                let tp = chip.mesh().axis_index("tp");
                let y = h.matmul(&w);
                y.redistribute(y.placements().with(tp, Shard(1)))
            }
        };
        let y = y.multiply(&y);
        let loss = y.sum().gather();
        (y, loss)
    });
    loss.backward();
    let gradients = [&x, &w].map(|x| gradient(chip, x));
    [y.gather()]
        .iter()
        .chain(&gradients)
        .map(Sharded::read)
        .collect()
}

#[test]
fn a_gathers_products_and_gradients_are_those_without() {
    for mesh in MESHES {
        let with = run(mesh, |chip| gathered(chip, true));
        let without = run(mesh, |chip| gathered(chip, false));
        assert!(with.outputs()[0].iter().all(Option::is_some));
        assert_eq!(with.outputs(), without.outputs(), "{mesh}");
    }
}

#[test]
fn a_scatters_products_and_gradients_are_those_without() {
    for mesh in MESHES {
        let with = run(mesh, |chip| scattered(chip, true));
        let without = run(mesh, |chip| scattered(chip, false));
        assert!(with.outputs()[0].iter().all(Option::is_some));
        assert_eq!(with.outputs(), without.outputs(), "{mesh}");
    }
}

#[test]
fn one_chip_gets_what_is_made_of_the_whole() {
    let run = run("tp=1,dp=2", |chip| {
        let x = activations(chip, 12, &[("dp", Shard(0))]);
        let w = weight(chip, "w", 0);
        let gathered = chip.gather_and("tp", &x, |x| vec![x.matmul(&w)]);
        let scattered = chip.scatter_from("tp", &x, |x| x.matmul(&w));
        let plain = x.matmul(&w).gather().read();
        [gathered[0].gather().read(), scattered.gather().read()].map(|y| y == plain)
    });
    assert_eq!(run.outputs()[1], [true, true]);
}

fn refused(mesh: &str, program: impl Fn(&Chip) + Sync) -> String {
    let mesh = Mesh::parse(mesh).expect("a mesh");
    let refused = World::ghost(&mesh).trace(program);
    refused.expect_err("a program that is wrong").to_string()
}

#[test]
fn mistakes_name_what_was_given() {
    let whole = refused("tp=2", |chip| {
        let x = activations(chip, 12, &[]);
        chip.gather_and("tp", &x, |x| vec![x.clone()]);
    });
    let two_axes = refused("tp=2,cp=2", |chip| {
        let x = activations(chip, 12, &[("tp", Shard(1)), ("cp", Shard(1))]);
        chip.gather_and("tp", &x, |x| vec![x.clone()]);
    });
    for message in [whole, two_axes] {
        for part in ["gather by chunks over 'tp'", "[b, t, c]", "[2, 12, 12]"] {
            assert!(message.contains(part), "'{part}' is missing in: {message}");
        }
    }
    let uneven = refused("tp=5", |chip| {
        let x = activations(chip, 15, &[("tp", Shard(2))]);
        chip.scatter_from("tp", &x, |x| x.clone());
    });
    assert!(
        uneven.contains("the 5 chips of 'tp' do not divide 12 tokens"),
        "{uneven}"
    );
    let no_sum = refused("tp=2", |chip| {
        let x = activations(chip, 12, &[("tp", Shard(2))]);
        let w = chip.input("w", [12, 12], chip.replicated(), &FromIndex(whole_number));
        chip.scatter_from("tp", &x, |x| x.gather().matmul(&w));
    });
    assert!(no_sum.contains("partial over its axis"), "{no_sum}");
}
