//! The tables are walked on simulated chips: each holds a small array, and transitions move elements as a wire would.

use super::*;

/// A 2-dimensional array of whole numbers: what one chip holds.
#[derive(Clone, Debug, PartialEq)]
struct Array {
    shape: [usize; 2],
    data: Vec<f64>,
}

impl Array {
    fn of(shape: [usize; 2], f: impl Fn(usize, usize) -> f64) -> Self {
        let at = |i: usize| f(i / shape[1].max(1), i % shape[1].max(1));
        let data = (0..shape[0] * shape[1]).map(at).collect();
        Array { shape, data }
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.data[i * self.shape[1] + j]
    }

    fn cut(&self, dim: usize, range: Range<usize>) -> Self {
        let mut shape = self.shape;
        shape[dim] = range.len();
        let skip = [
            if dim == 0 { range.start } else { 0 },
            if dim == 1 { range.start } else { 0 },
        ];
        Array::of(shape, |i, j| self.at(i + skip[0], j + skip[1]))
    }

    fn piece(&self, dim: usize, parts: usize, index: usize) -> Self {
        self.cut(dim, split(self.shape[dim], parts, index))
    }

    fn join(pieces: &[Self], dim: usize) -> Self {
        let mut shape = pieces[0].shape;
        shape[dim] = pieces.iter().map(|piece| piece.shape[dim]).sum();
        Array::of(shape, |i, j| {
            let (mut along, across) = if dim == 0 { (i, j) } else { (j, i) };
            for piece in pieces {
                if along < piece.shape[dim] {
                    return if dim == 0 {
                        piece.at(along, across)
                    } else {
                        piece.at(across, along)
                    };
                }
                along -= piece.shape[dim];
            }
            unreachable!()
        })
    }

    fn sum(arrays: &[Self]) -> Self {
        Array::of(arrays[0].shape, |i, j| {
            arrays.iter().map(|array| array.at(i, j)).sum()
        })
    }

    fn dot(&self, other: &Self) -> f64 {
        assert_eq!(self.shape, other.shape);
        self.data.iter().zip(&other.data).map(|(a, b)| a * b).sum()
    }
}

/// What `step` does to the arrays of one group.
fn simulate(step: Transition, group: &[Array]) -> Vec<Array> {
    let n = group.len();
    let each = |f: &dyn Fn(usize) -> Array| (0..n).map(f).collect();
    match step {
        Transition::AllReduce => vec![Array::sum(group); n],
        Transition::ReduceScatter { dim } => each(&|i| Array::sum(group).piece(dim, n, i)),
        Transition::AllGather { dim } => vec![Array::join(group, dim); n],
        Transition::Slice { dim } => each(&|i| group[i].piece(dim, n, i)),
        Transition::AllToAll { from, to } => each(&|i| {
            let pieces: Vec<Array> = group.iter().map(|array| array.piece(to, n, i)).collect();
            Array::join(&pieces, from)
        }),
    }
}

/// `step` along `axis` on every group of the mesh.
fn simulate_on(mesh: &Mesh, axis: usize, step: Transition, chips: &[Array]) -> Vec<Array> {
    let after = |rank: usize| {
        let group = mesh.group_along(rank, axis);
        let arrays: Vec<Array> = group.ranks().map(|rank| chips[rank].clone()).collect();
        simulate(step, &arrays)[group.index()].clone()
    };
    (0..chips.len()).map(after).collect()
}

/// What every chip holds of `global`; along a `Partial` axis the chips' summands differ and add up to it.
fn distribute(global: &Array, placements: &Placements, mesh: &Mesh) -> Vec<Array> {
    let local = |rank: usize| {
        let coordinates = mesh.coordinates(rank);
        let range = |dim| local_range(&global.shape, dim, placements, mesh, &coordinates);
        let mut array = global.cut(0, range(0)).cut(1, range(1));
        for (axis, placement) in placements.iter().enumerate() {
            let (n, i) = (mesh.axes()[axis].size() as f64, coordinates[axis] as f64);
            if *placement == Partial {
                // Shares 1, 2, .., n, less their excess over the whole on the last chip: exact in whole numbers.
                let share = if i + 1.0 < n {
                    i + 1.0
                } else {
                    1.0 - n * (n - 1.0) / 2.0
                };
                array.data.iter_mut().for_each(|x| *x *= share);
            }
        }
        array
    };
    (0..mesh.chips()).map(local).collect()
}

fn numbers(shape: [usize; 2], seed: usize) -> Array {
    Array::of(shape, |i, j| {
        ((i * 7 + j * 13 + seed * 5) % 11) as f64 - 4.0
    })
}

#[test]
fn split_is_balanced_and_complete() {
    for len in 0..20 {
        for parts in 1..8 {
            let pieces: Vec<_> = (0..parts).map(|i| split(len, parts, i)).collect();
            assert_eq!((pieces[0].start, pieces[parts - 1].end), (0, len));
            assert!(pieces.windows(2).all(|w| w[0].end == w[1].start));
            let sizes = || pieces.iter().map(|piece| piece.len());
            assert!(sizes().max().unwrap() - sizes().min().unwrap() <= 1);
        }
    }
    assert_eq!(split(usize::MAX, 1 << 19, (1 << 19) - 1).end, usize::MAX);
}

#[test]
fn local_shapes_nest_in_axis_order() {
    let mesh = Mesh::new([("dp", 3), ("tp", 2)]);
    let both = Placements::from([Shard(0), Shard(0)]);
    let ranges: Vec<_> = (0..6)
        .map(|rank| local_range(&[10, 4], 0, &both, &mesh, &mesh.coordinates(rank)))
        .collect();
    assert_eq!(ranges, [0..1, 1..3, 3..4, 4..6, 6..8, 8..10]);
    assert_eq!(local_shape(&[10, 4], &both, &mesh, &[2, 1]), [2, 4]);
    assert!(!splits_evenly(&[10, 4], &both, &mesh) && splits_evenly(&[12, 5], &both, &mesh));
    assert!(splits_evenly(&[0], &both, &mesh));
    assert_eq!(local_shape(&[5], &[].into(), &Mesh::single(), &[]), [5]);
    assert_eq!(both.with(0, Replicate).to_string(), "[Replicate, Shard(0)]");
}

#[test]
fn transitions_lead_from_source_to_target() {
    let placements = [Shard(0), Shard(1), Replicate, Partial];
    for from in placements {
        for to in placements {
            match transition(from, to) {
                Ok(None) => assert_eq!(from, to),
                Ok(Some(step)) => assert_eq!((step.source(), step.target()), (from, to)),
                Err(sentence) => {
                    assert!(to == Partial && from != Partial);
                    assert!(
                        sentence.contains(&format!("{from} as it is would do")),
                        "{sentence}"
                    );
                }
            }
        }
    }
}

/// Every transition, on groups of 1 to 5 chips and uneven shapes, gives what its target placement says.
#[test]
fn transitions_keep_the_value() {
    for n in 1..=5 {
        let mesh = Mesh::new([("tp", n)]);
        for shape in [[4, 6], [5, 3], [1, 2], [0, 3]] {
            let global = numbers(shape, n);
            for from in [Shard(0), Shard(1), Replicate, Partial] {
                for to in [Shard(0), Shard(1), Replicate] {
                    let Some(step) = transition(from, to).unwrap() else {
                        continue;
                    };
                    let before = distribute(&global, &[from].into(), &mesh);
                    let after = simulate_on(&mesh, 0, step, &before);
                    assert_eq!(
                        after,
                        distribute(&global, &[to].into(), &mesh),
                        "{step} {shape:?} n={n}"
                    );
                }
            }
        }
    }
}

/// `<value, gradient>` from what the chips hold: Replicate on both sides counts once, everything else is summed.
fn pairing(values: &[Array], value: Placement, gradients: &[Array], gradient: Placement) -> f64 {
    if (value, gradient) == (Replicate, Replicate) {
        return values[0].dot(&gradients[0]);
    }
    values.iter().zip(gradients).map(|(a, b)| a.dot(b)).sum()
}

/// `<Fx, y> = <x, F'y>` for every transition and every placement in which the gradient y can meet Fx.
#[test]
fn backward_is_the_transpose() {
    let mut rows = 0;
    for n in 1..=5 {
        let mesh = Mesh::new([("tp", n)]);
        for shape in [[4, 6], [5, 3], [1, 2]] {
            let (x, y) = (numbers(shape, 1), numbers(shape, 2));
            for forward in [
                Transition::AllReduce,
                Transition::ReduceScatter { dim: 1 },
                Transition::AllGather { dim: 0 },
                Transition::Slice { dim: 1 },
                Transition::AllToAll { from: 0, to: 1 },
            ] {
                let (source, target) = (forward.source(), forward.target());
                let gradients = match target {
                    Replicate => vec![Replicate, Partial],
                    other => vec![other],
                };
                for gradient in gradients {
                    let xs = distribute(&x, &[source].into(), &mesh);
                    let ys = distribute(&y, &[gradient].into(), &mesh);
                    let forwards = simulate(forward, &xs);
                    let backwards = match transpose(forward, gradient) {
                        Some(step) => simulate(step, &ys),
                        None => ys.clone(),
                    };
                    let left = pairing(&forwards, target, &ys, gradient);
                    let right = pairing(&xs, source, &backwards, source.gradient());
                    assert_eq!(left, right, "{forward}, gradient {gradient}, n={n}");
                    assert_eq!(left, x.dot(&y));
                    assert_eq!(
                        backwards,
                        distribute(&y, &[source.gradient()].into(), &mesh)
                    );
                    rows += 1;
                }
            }
        }
    }
    assert_eq!(rows, 7 * 5 * 3);
}

#[test]
fn the_transpose_table_reads_as_documented() {
    use Transition::*;
    let all_to_all = |from, to| AllToAll { from, to };
    for (forward, gradient, backward) in [
        (AllReduce, Replicate, None),
        (AllReduce, Partial, Some(AllReduce)),
        (
            ReduceScatter { dim: 1 },
            Shard(1),
            Some(AllGather { dim: 1 }),
        ),
        (
            AllGather { dim: 1 },
            Partial,
            Some(ReduceScatter { dim: 1 }),
        ),
        (AllGather { dim: 1 }, Replicate, Some(Slice { dim: 1 })),
        (AllGather { dim: 1 }, Shard(0), Some(all_to_all(0, 1))),
        (Slice { dim: 0 }, Shard(0), Some(AllGather { dim: 0 })),
        (all_to_all(0, 1), Shard(1), Some(all_to_all(1, 0))),
    ] {
        assert_eq!(
            transpose(forward, gradient),
            backward,
            "{forward}, gradient {gradient}"
        );
    }
    assert_eq!(
        Placements::from([Partial, Shard(1)]).gradient(),
        [Replicate, Shard(1)].into()
    );
}

fn every_placements(axes: usize) -> Vec<Placements> {
    let words = [Shard(0), Shard(1), Replicate, Partial];
    (0..4usize.pow(axes as u32))
        .map(|code| {
            (0..axes)
                .map(|axis| words[code >> (2 * axis) & 3])
                .collect()
        })
        .collect()
}

/// Every pair of placements on meshes of 2 and 3 axes, sizes 1 and uneven shapes included, ends where it should.
#[test]
fn plans_lead_from_every_placement_to_every_other() {
    for (mesh, shape) in [
        (Mesh::new([("a", 2), ("b", 3)]), [7, 11]),
        (Mesh::new([("a", 1), ("b", 2)]), [3, 1]),
        (Mesh::new([("a", 2), ("b", 2), ("c", 2)]), [9, 5]),
        (Mesh::new([("a", 2), ("b", 1), ("c", 3)]), [4, 7]),
    ] {
        let global = numbers(shape, 3);
        let all = every_placements(mesh.axes().len());
        for from in &all {
            let before = distribute(&global, from, &mesh);
            for to in &all {
                let planned = plan(from, to, &shape, &mesh);
                let forbidden = from
                    .iter()
                    .zip(to.iter())
                    .any(|(&a, &b)| a != b && b == Partial);
                assert_eq!(planned.is_err(), forbidden);
                let Ok(steps) = planned else { continue };
                let mut state = from.clone();
                let mut chips = before.clone();
                for (axis, step) in steps {
                    assert_eq!(state[axis], step.source());
                    chips = simulate_on(&mesh, axis, step, &chips);
                    state = state.with(axis, step.target());
                }
                assert_eq!(&state, to);
                if to.contains(&Partial) {
                    // The summands may differ from those that `distribute` would choose; their sum may not.
                    let settled: Placements = to.gradient();
                    for (axis, &placement) in to.iter().enumerate() {
                        if placement == Partial {
                            chips = simulate_on(&mesh, axis, Transition::AllReduce, &chips);
                        }
                    }
                    assert_eq!(
                        chips,
                        distribute(&global, &settled, &mesh),
                        "{from} to {to} on {mesh}"
                    );
                } else {
                    assert_eq!(
                        chips,
                        distribute(&global, to, &mesh),
                        "{from} to {to} on {mesh}"
                    );
                }
            }
        }
    }
}

#[test]
fn plans_send_little() {
    let mesh = Mesh::new([("dp", 2), ("tp", 4)]);
    let show = |from: [Placement; 2], to: [Placement; 2]| {
        let steps = plan(&from.into(), &to.into(), &[16, 16], &mesh).unwrap();
        let words: Vec<String> = steps
            .iter()
            .map(|(axis, step)| format!("{axis} {step}"))
            .collect();
        words.join(", ")
    };
    // Cut before reducing, reduce before gathering.
    assert_eq!(
        show([Replicate, Partial], [Shard(0), Replicate]),
        "0 slice(0), 1 all-reduce"
    );
    assert_eq!(
        show([Partial, Shard(1)], [Replicate, Replicate]),
        "0 all-reduce, 1 all-gather(1)"
    );
    assert_eq!(
        show([Partial, Partial], [Shard(0), Shard(0)]),
        "0 reduce-scatter(0), 1 reduce-scatter(0)"
    );
    // Neighbouring ranks are added first when nothing else decides.
    assert_eq!(
        show([Partial, Partial], [Replicate, Replicate]),
        "1 all-reduce, 0 all-reduce"
    );
    // Inner pieces are joined before outer ones are cut or joined.
    assert_eq!(
        show([Shard(0), Shard(0)], [Replicate, Replicate]),
        "1 all-gather(0), 0 all-gather(0)"
    );
    assert_eq!(
        show([Replicate, Shard(0)], [Shard(0), Shard(0)]),
        "1 all-gather(0), 0 slice(0), 1 slice(0)"
    );
    assert_eq!(
        show([Replicate, Replicate], [Shard(0), Shard(0)]),
        "0 slice(0), 1 slice(0)"
    );
    assert_eq!(
        show([Replicate, Shard(0)], [Replicate, Shard(1)]),
        "1 all-to-all(0 to 1)"
    );
    assert_eq!(show([Shard(1), Replicate], [Shard(1), Replicate]), "");
    // An axis of one chip stands in nobody's way.
    let thin = Mesh::new([("dp", 1), ("tp", 4)]);
    let from = Placements::from([Replicate, Shard(0)]);
    let steps = plan(&from, &from.with(0, Shard(0)), &[16], &thin).unwrap();
    assert_eq!(steps, [(0, Transition::Slice { dim: 0 })]);
}

#[test]
fn bad_placements_are_explained() {
    let mesh = Mesh::new([("dp", 2), ("tp", 4)]);
    let error = |from: Placements, to: Placements| plan(&from, &to, &[8], &mesh).unwrap_err();
    let fine = || Placements::all(Replicate, 2);
    assert!(
        error(fine(), [Replicate, Partial].into())
            .contains("on axis 'tp': Replicate cannot become Partial")
    );
    assert!(
        error(fine(), [Shard(1), Replicate].into())
            .contains("Shard(1) on axis 'dp' of a tensor of shape [8]")
    );
    assert!(error([Replicate].into(), fine()).contains("1 placements for 2 axes"));
}

#[test]
fn placements_round_trip_through_json() {
    let placements = Placements::from([Shard(3), Replicate, Partial]);
    let json = serde_json::to_string(&placements).unwrap();
    assert_eq!(json, r#"[{"Shard":3},"Replicate","Partial"]"#);
    assert_eq!(
        serde_json::from_str::<Placements>(&json).unwrap(),
        placements
    );
}
