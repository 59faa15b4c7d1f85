use super::proof::Group;
use super::*;

const ALGORITHMS: [Algorithm; 3] = [Algorithm::Tree, Algorithm::Ring, Algorithm::Recursive];
const SIZES: [usize; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16];

/// Every kind with its counts: nothing, fewer elements than chips, uneven, even, and ragged with zeros.
fn cases(n: usize) -> Vec<(Kind, Counts)> {
    let ragged = |step: usize| -> Vec<usize> { (0..n).map(|i| i * step % 4).collect() };
    let mut cases = vec![(Kind::Barrier, Counts::Len(0))];
    for len in [0, 1, n - 1, n, 2 * n + 1, 3 * n + n / 2] {
        let roots = [0, n / 2, n - 1].map(|root| Kind::Broadcast { root });
        let kinds = [
            Kind::AllReduce,
            Kind::ReduceScatter,
            Kind::AllGather,
            Kind::AllToAll,
            Kind::Shift,
        ];
        cases.extend(
            kinds
                .into_iter()
                .chain(roots)
                .map(|kind| (kind, Counts::Len(len))),
        );
    }
    for step in [1, 3, 5] {
        cases.push((Kind::ReduceScatter, Counts::Each(ragged(step))));
        cases.push((Kind::AllGather, Counts::Each(ragged(step))));
        cases.push((Kind::Shift, Counts::Each(ragged(step))));
        let (rows, columns) = (ragged(step), ragged(step + 2));
        cases.push((Kind::AllToAll, Counts::Product { rows, columns }));
        let row = |s| (0..n).map(|d| (s * step + d * 2) % 3).collect();
        cases.push((Kind::AllToAll, Counts::Matrix((0..n).map(row).collect())));
    }
    let all_on_one = |one: usize| (0..n).map(|c| if c == one { 5 } else { 0 }).collect();
    cases.push((Kind::ReduceScatter, Counts::Each(all_on_one(n - 1))));
    cases.push((Kind::AllGather, Counts::Each(all_on_one(0))));
    cases
}

#[test]
fn every_list_is_proved() {
    let mut proved = 0;
    for n in SIZES {
        for (kind, counts) in cases(n) {
            for algorithm in ALGORITHMS {
                let proof = prove(kind, algorithm, &counts, n);
                assert_eq!(proof, Ok(()), "{algorithm} {kind} of {counts:?} over {n}");
                proved += 1;
            }
        }
    }
    assert_eq!(proved, 11 * 3 * (1 + 6 * 8 + 3 * 5 + 2));
}

/// Above the size at which whole vectors are sent, on as many chips as keep it quick.
#[test]
fn large_all_reduces_are_proved() {
    for n in [3, 4, 16] {
        let len = 8192 / n + 1;
        assert_eq!(
            rounds(Kind::AllReduce, Algorithm::Tree, &Counts::Len(len), n),
            2
        );
        for algorithm in ALGORITHMS {
            assert_eq!(
                prove(Kind::AllReduce, algorithm, &Counts::Len(len), n),
                Ok(())
            );
        }
    }
}

#[test]
fn rounds_are_exact_where_nothing_is_empty() {
    for n in SIZES {
        for (kind, counts) in cases(n)
            .into_iter()
            .filter(|(_, counts)| matches!(counts, Counts::Len(len) if *len >= 2 * n))
        {
            for algorithm in ALGORITHMS {
                let lists = (0..n).map(|i| schedule(kind, algorithm, &counts, n, i));
                let mut group = Group::new(kind, &counts, lists.collect());
                group.run().unwrap();
                let closed = rounds(kind, algorithm, &counts, n);
                assert_eq!(group.rounds(), closed, "{algorithm} {kind} over {n}");
            }
        }
    }
}

#[test]
fn the_tree_pairs_neighbours() {
    assert_eq!(tree(1).count(), 0);
    assert_eq!(tree(0).count(), 0);
    assert_eq!(
        tree(5).collect::<Vec<_>>(),
        [(0, 1), (2, 3), (0, 2), (0, 4)]
    );
    for n in 1..40 {
        let mut merged = vec![false; n];
        for (left, right) in tree(n) {
            assert!(left < right && !merged[left] && !merged[right]);
            merged[right] = true;
        }
        assert!(!merged[0] && merged[1..].iter().all(|&gone| gone));
    }
    assert_eq!(tree_sum(Vec::<u8>::new(), |a, _| a), None);
}

#[test]
fn orders_read_as_documented() {
    let show = |algorithm, n, chunk| order(Kind::AllReduce, algorithm, n, chunk).to_string();
    assert_eq!(show(Algorithm::Tree, 5, 3), "((0+1)+(2+3))+4");
    assert_eq!(show(Algorithm::Tree, 6, 0), "((0+1)+(2+3))+(4+5)");
    assert_eq!(show(Algorithm::Ring, 5, 2), "(((3+4)+0)+1)+2");
    assert_eq!(show(Algorithm::Recursive, 4, 0), "(0+2)+(1+3)");
    assert_eq!(show(Algorithm::Recursive, 5, 0), "((0+1)+3)+(2+4)");
    assert_eq!(
        order(Kind::AllGather, Algorithm::Ring, 4, 3),
        Expression::Leaf(3)
    );
}

/// The default adds in one order at any size: the promise behind choosing whole vectors for small ones.
#[test]
fn both_forms_of_the_default_add_alike() {
    let reductions = |list: &Schedule| -> Vec<usize> {
        let steps = list.steps.iter();
        steps
            .filter_map(|step| match step {
                Step::Reduce { sources, .. } => Some(sources.len()),
                _ => None,
            })
            .collect()
    };
    for len in [5, 100_000] {
        assert_eq!(reductions(&tree_all_reduce(5, 2, len)), [5]);
    }
}

#[test]
fn volumes_of_half_a_million_chips_are_closed_forms() {
    let (n, len) = (524_288, 1usize << 34);
    let counts = Counts::Len(len);
    let floor = floor_elements(Kind::AllReduce, &counts, n);
    assert_eq!(floor, 2 * (n as u64 - 1) * len as u64);
    for algorithm in ALGORITHMS {
        assert_eq!(sent_elements(Kind::AllReduce, algorithm, &counts, n), floor);
    }
    assert_eq!(
        rounds(Kind::AllReduce, Algorithm::Recursive, &counts, n),
        38
    );
    assert_eq!(
        sent_elements(Kind::AllReduce, Algorithm::Tree, &Counts::Len(1), 4),
        6
    );
}

#[test]
fn a_schedule_counts_itself() {
    let list = tree_all_gather(1, &[3, 2, 4]);
    assert_eq!((list.sent_elements(), list.received_elements()), (4, 7));
    assert_eq!((list.messages(), list.rounds(), list.scratch), (2, 1, 0));
}

/// A wrong list is caught: each damage to a sound group fails with its own sentence.
#[test]
fn damage_is_caught() {
    let counts = Counts::Len(6);
    let run = |damage: &dyn Fn(&mut Vec<Schedule>)| {
        let list = |i| schedule(Kind::AllReduce, Algorithm::Ring, &counts, 3, i);
        let mut lists: Vec<Schedule> = (0..3).map(list).collect();
        damage(&mut lists);
        Group::new(Kind::AllReduce, &counts, lists).run()
    };
    assert_eq!(run(&|_| {}), Ok(()));
    let fails = |damage: &dyn Fn(&mut Vec<Schedule>), part: &str| {
        let sentence = run(damage).unwrap_err();
        assert!(sentence.contains(part), "{sentence}");
    };
    let first_send = |lists: &mut Vec<Schedule>, change: &dyn Fn(&mut Transfer)| {
        let Step::Round { sends, .. } = &mut lists[1].steps[0] else {
            panic!()
        };
        change(&mut sends[0]);
    };
    fails(&|lists| drop(lists[1].steps.pop()), "deadlock");
    fails(
        &|lists| first_send(lists, &|send| send.peer = 0),
        "deadlock",
    );
    fails(
        &|lists| first_send(lists, &|send| send.peer = 1),
        "a transfer with chip 1",
    );
    fails(
        &|lists| first_send(lists, &|send| send.place.len = 1),
        "chip 1 sends 1 elements where chip 2",
    );
    fails(
        &|lists| first_send(lists, &|send| send.place.start = 5),
        "of a buffer of 6",
    );
    fails(
        &|lists| first_send(lists, &|send| send.place.buffer = Buffer::Output),
        "before it is written",
    );
    fails(
        &|lists| {
            let Step::Reduce { sources, into } = &mut lists[0].steps[1] else {
                panic!()
            };
            *into = sources[0];
        },
        "while",
    );
    fails(
        &|lists| {
            let Step::Reduce { into, .. } = &mut lists[0].steps[1] else {
                panic!()
            };
            into.buffer = Buffer::Input;
        },
        "in use",
    );
}

/// A list that comes to its end with another sum than stated is caught too: order counts, not only who is in it.
#[test]
fn another_order_is_caught() {
    let counts = Counts::Len(6);
    for (algorithm, kind) in ALGORITHMS
        .into_iter()
        .flat_map(|algorithm| [Kind::AllReduce, Kind::ReduceScatter].map(|kind| (algorithm, kind)))
    {
        for damaged in [false, true] {
            let mut lists: Vec<Schedule> = (0..3)
                .map(|i| schedule(kind, algorithm, &counts, 3, i))
                .collect();
            if damaged {
                let mut reductions = lists[1].steps.iter_mut().filter_map(|step| match step {
                    Step::Reduce { sources, .. } => Some(sources),
                    _ => None,
                });
                reductions.next().unwrap().swap(0, 1);
            }
            let mut group = Group::new(kind, &counts, lists);
            group.run().unwrap();
            let outputs = group.check_outputs(kind, algorithm, &counts);
            assert_eq!(outputs.is_err(), damaged, "{algorithm} {kind}: {outputs:?}");
        }
    }
}

/// A barrier that lets one chip go too early is caught.
#[test]
fn an_early_barrier_is_caught() {
    let mut lists: Vec<Schedule> = (0..4).map(|i| barrier(4, i)).collect();
    lists.iter_mut().for_each(|list| list.steps.truncate(1));
    let mut group = Group::new(Kind::Barrier, &Counts::Len(0), lists);
    group.run().unwrap();
    let outputs = group.check_outputs(Kind::Barrier, Algorithm::Tree, &Counts::Len(0));
    assert!(
        outputs
            .unwrap_err()
            .contains("before it has heard of everyone")
    );
}

#[test]
#[should_panic(expected = "are no counts for all-reduce")]
fn counts_must_fit_the_kind() {
    schedule(
        Kind::AllReduce,
        Algorithm::Tree,
        &Counts::Each(vec![1, 2]),
        2,
        0,
    );
}

#[test]
#[should_panic(expected = "in a group of 3 chips: one count per chip")]
fn counts_must_fit_the_group() {
    schedule(
        Kind::AllGather,
        Algorithm::Ring,
        &Counts::Each(vec![1, 2]),
        3,
        0,
    );
}

/// A chip whose input has elements reads it by its list exactly if the kind says so.
#[test]
fn lists_read_the_inputs_that_their_kinds_do() {
    let read = |place: &Place| place.buffer == Buffer::Input && place.len > 0;
    let reads = |step: &Step| match step {
        Step::Round { sends, .. } => sends.iter().any(|send| read(&send.place)),
        Step::Reduce { sources, .. } => sources.iter().any(read),
        Step::Copy { from, .. } => read(from),
    };
    for n in SIZES {
        for (kind, counts) in cases(n) {
            // Where every chip has elements: at least one for each.
            if !matches!(counts, Counts::Len(len) if len >= n) {
                continue;
            }
            for (algorithm, index) in ALGORITHMS.iter().flat_map(|a| (0..n).map(move |i| (*a, i))) {
                let list = schedule(kind, algorithm, &counts, n, index);
                let found = list.steps.iter().any(reads);
                assert_eq!(
                    found,
                    kind.reads_input(index),
                    "{algorithm} {kind} of {counts:?} on chip {index} of {n}"
                );
            }
        }
    }
}
