//! Every list holds every piece once, in an order that can run; bubbles and what is held are the formulas'.

use super::*;
use std::collections::{BTreeSet, HashSet};

/// Plans of up to 16 stages, with as many micro-batches as the formulas ask for and with too few.
fn plans() -> Vec<Plan> {
    let mut all = Vec::new();
    for p in 1..=16usize {
        for m in [1, 2, p.div_ceil(2), p, p + 1, 2 * p - 1, 2 * p, 3 * p + 1] {
            for schedule in Schedule::ALL {
                let chunks: &[usize] = match schedule {
                    Schedule::OneForwardOneBackward => &[1, 2, 3],
                    Schedule::ZbV => &[2],
                    _ => &[1],
                };
                let plan = |v: &usize| Plan::new(schedule, p, *v, m).expect("a plan");
                all.extend(chunks.iter().map(plan));
            }
        }
    }
    all
}

/// Forward, input gradient and weight gradient of a whole stage take so long.
fn even(plan: &Plan, [f, i, w]: [f64; 3]) -> Times {
    let all = |x: f64| vec![vec![x / plan.chunks() as f64; plan.chunks()]; plan.stages()];
    Times {
        forward: all(f),
        backward: all(i + w),
        weights: all(w),
        message: 0.0,
        blocking: false,
    }
}

/// The longest time that a stage waits between its first and its last piece.
fn bubble(plan: &Plan, times: &Times) -> f64 {
    let waits = |ran: &Vec<Ran>| {
        let busy: f64 = ran.iter().map(|r| r.end - r.start).sum();
        ran[ran.len() - 1].end - ran[0].start - busy
    };
    plan.replay(times).iter().map(waits).fold(0.0, f64::max)
}

#[test]
fn every_piece_appears_once_and_the_lists_can_run() {
    for plan in plans() {
        let halves = matches!(plan.schedule(), Schedule::ZbH1 | Schedule::ZbV);
        let works: &[Work] = match halves {
            true => &[Work::Forward, Work::Inputs, Work::Weights],
            false => &[Work::Forward, Work::Backward],
        };
        for (stage, list) in plan.lists().iter().enumerate() {
            let seen: BTreeSet<_> = list.iter().map(|p| (p.work, p.chunk, p.micro)).collect();
            let count = works.len() * plan.chunks() * plan.micros();
            assert_eq!((list.len(), seen.len()), (count, count), "{plan:?} {stage}");
            let known = |p: &Piece| {
                works.contains(&p.work) && p.chunk < plan.chunks() && p.micro < plan.micros()
            };
            assert!(list.iter().all(known), "{plan:?} {stage}");
            assert_eq!(list, &plan.list(stage));
            // Gradients add up in the same order on every mesh: that of the micro-batches.
            for chunk in 0..plan.chunks() {
                let last = works[works.len() - 1];
                let order = list.iter().filter(|p| (p.work, p.chunk) == (last, chunk));
                let order: Vec<usize> = order.map(|p| p.micro).collect();
                assert!(order.is_sorted(), "{plan:?} {stage}: {order:?}");
            }
        }
        plan.replay(&even(&plan, [1.0, 1.0, 1.0]));
    }
}

#[test]
fn parts_and_places_are_each_others_inverse() {
    for plan in plans() {
        for part in 0..plan.parts() {
            let (stage, chunk) = plan.place(part);
            assert_eq!(plan.part(stage, chunk), part, "{plan:?}");
        }
        let last = match plan.schedule() {
            Schedule::ZbV => 0,
            _ => plan.stages() - 1,
        };
        assert_eq!((plan.place(0).0, plan.last_stage()), (0, last), "{plan:?}");
    }
}

#[test]
fn bubbles_are_the_formulas() {
    let mut seen = 0;
    for plan in plans() {
        let (p, m, v) = (plan.stages(), plan.micros(), plan.chunks());
        let whole = m.is_multiple_of(p);
        for times @ [f, i, w] in [[1.0, 1.0, 1.0], [2.0, 3.0, 1.0]] {
            let equal = f == i && i == w;
            let fills = (p - 1) as f64;
            let want = match plan.schedule() {
                Schedule::GPipe if m >= p => fills * (f + i + w),
                Schedule::OneForwardOneBackward if v == 1 && m >= p => fills * (f + i + w),
                Schedule::OneForwardOneBackward if v > 1 && whole => fills * (f + i + w) / v as f64,
                Schedule::ZbH1 if m >= p => fills * (f + i - w),
                Schedule::ZbV if m + 1 >= 2 * p && equal => 0.0,
                _ => continue,
            };
            let error = (bubble(&plan, &even(&plan, times)) - want).abs();
            assert!(error <= 1e-9, "{plan:?} {times:?}: {error} from {want}");
            seen += 1;
        }
    }
    assert!(seen > 500, "{seen} plans were held to a formula");
}

#[test]
fn what_is_held_is_the_formulas() {
    for plan in plans() {
        let (p, m, v) = (plan.stages(), plan.micros(), plan.chunks());
        for (stage, held) in plan.held().into_iter().enumerate() {
            let most = match plan.schedule() {
                Schedule::GPipe => m,
                // Stage s holds p - s micro-batches.
                Schedule::OneForwardOneBackward if v == 1 => m.min(p - stage),
                // 2 (p-s-1) + (v-1) p before the first backward, and the forward in front of it: for stage 0
                // p v + p - 1 chunks, p + (p-1)/v micro-batches.
                Schedule::OneForwardOneBackward if !m.is_multiple_of(p) => continue,
                Schedule::OneForwardOneBackward => {
                    (v * m).min(2 * (p - stage - 1) + (v - 1) * p + 1)
                }
                // Those put off take the place of those that 1F1B holds less than the first stage.
                Schedule::ZbH1 => m.min(p),
                Schedule::ZbV if m >= p => 2 * p,
                Schedule::ZbV => 2 * m,
            };
            assert_eq!(held, most, "{plan:?} stage {stage}");
        }
    }
}

#[test]
fn the_lists_are_those_of_the_papers() {
    let words = |plan: &Plan, stage| -> String {
        let word = |p: &Piece| match (p.work, plan.chunks()) {
            (Work::Forward, 1) => format!("F{}", p.micro),
            (Work::Forward, _) => format!("F{}{}", ["a", "b"][p.chunk], p.micro),
            (Work::Backward, 1) => format!("B{}", p.micro),
            (Work::Backward, _) => format!("B{}{}", ["a", "b"][p.chunk], p.micro),
            (Work::Inputs, 1) => format!("I{}", p.micro),
            (Work::Inputs, _) => format!("I{}{}", ["a", "b"][p.chunk], p.micro),
            (Work::Weights, 1) => format!("W{}", p.micro),
            (Work::Weights, _) => format!("W{}{}", ["a", "b"][p.chunk], p.micro),
        };
        let all: Vec<String> = plan.list(stage).iter().map(word).collect();
        all.join(" ")
    };
    let plan = |schedule, p, v, m| Plan::new(schedule, p, v, m).expect("a plan");
    let gpipe = plan(Schedule::GPipe, 4, 1, 3);
    assert_eq!(words(&gpipe, 2), "F0 F1 F2 B0 B1 B2");
    let one = plan(Schedule::OneForwardOneBackward, 4, 1, 5);
    assert_eq!(words(&one, 0), "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4");
    assert_eq!(words(&one, 3), "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4");
    let interleaved = plan(Schedule::OneForwardOneBackward, 2, 2, 4);
    assert_eq!(
        words(&interleaved, 0),
        "Fa0 Fa1 Fb0 Fb1 Fa2 Bb0 Fa3 Bb1 Fb2 Ba0 Fb3 Ba1 Bb2 Bb3 Ba2 Ba3"
    );
    let h1 = plan(Schedule::ZbH1, 3, 1, 4);
    assert_eq!(words(&h1, 0), "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3");
    assert_eq!(words(&h1, 2), "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3");
    let v = plan(Schedule::ZbV, 2, 2, 3);
    assert_eq!(
        words(&v, 0),
        "Fa0 Fa1 Fa2 Fb0 Ib0 Wb0 Fb1 Ib1 Wb1 Ia0 Wa0 Fb2 Ib2 Ia1 Wa1 Ia2 Wb2 Wa2"
    );
}

/// Runs the actions with sends that complete when they are received; returns what went from stage to stage.
fn rendezvous(plan: &Plan, actions: &[Vec<Action>]) -> Vec<Message> {
    let mut at = vec![0; actions.len()];
    let (mut sent, mut received) = (HashSet::new(), HashSet::new());
    let mut order = Vec::new();
    loop {
        let mut moved = false;
        for (stage, list) in actions.iter().enumerate() {
            while let Some(action) = list.get(at[stage]) {
                let can = match action {
                    Action::Run(_) => true,
                    Action::Send(m) => {
                        assert!(m.from == stage && sent.insert(*m), "{plan:?}: {m:?}");
                        order.push(*m);
                        true
                    }
                    Action::Receive(m) => {
                        let there = sent.contains(m);
                        assert!(!there || (m.to == stage && received.insert(*m)));
                        there
                    }
                    Action::Wait(m) => {
                        // A wait in front of further work never blocks, whoever was how fast.
                        let last = list[at[stage]..]
                            .iter()
                            .all(|a| matches!(a, Action::Wait(_)));
                        assert!(received.contains(m) || last, "{plan:?}: {m:?} blocks");
                        received.contains(m)
                    }
                };
                if !can {
                    break;
                }
                at[stage] += 1;
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    for (list, at) in actions.iter().zip(&at) {
        assert_eq!(list.len(), *at, "{plan:?} is stuck");
    }
    assert_eq!(sent, received, "{plan:?}");
    order
}

#[test]
fn messages_meet_and_nothing_blocks() {
    for plan in plans() {
        let between = |part: &usize| plan.place(*part).0 != plan.place(part - 1).0;
        let borders = (1..plan.parts()).filter(between).count();
        let all = rendezvous(&plan, &plan.actions());
        assert_eq!(all.len(), 2 * borders * plan.micros(), "{plan:?}");
        let forward = rendezvous(&plan, &plan.forward_actions());
        assert_eq!(forward.len(), borders * plan.micros(), "{plan:?}");
        assert!(forward.iter().all(|m| !m.gradient));
    }
}

#[test]
fn what_was_sent_is_not_kept_much_longer_than_what_is_held() {
    for plan in plans() {
        let held = plan.held();
        for (stage, list) in plan.actions().iter().enumerate() {
            let (mut open, mut most) = (0usize, 0);
            for action in list {
                match action {
                    Action::Send(_) => open += 1,
                    Action::Wait(_) => open -= 1,
                    _ => {}
                }
                most = most.max(open);
            }
            assert_eq!(open, 0);
            // At most as many as are held, and as many gradients at the end.
            let bound = held[stage] + plan.chunks() * plan.stages() + 1;
            assert!(
                most <= bound,
                "{plan:?} stage {stage}: {most} above {bound}"
            );
        }
    }
}

#[test]
fn layers_are_cut_evenly_with_embedding_and_head() {
    for layers in 1..40 {
        for parts in 1..=layers + 2 {
            let ranges = layers_of_parts(layers, parts).expect("enough slots");
            assert_eq!(ranges.len(), parts);
            assert_eq!((ranges[0].start, ranges[parts - 1].end), (0, layers));
            assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
            let slots = |i: usize| ranges[i].len() + (i == 0) as usize + (i + 1 == parts) as usize;
            let all: Vec<usize> = (0..parts).map(slots).collect();
            let (least, most) = (all.iter().min().expect("a part"), all.iter().max());
            assert!(
                most.expect("a part") - least <= 1,
                "{layers} {parts}: {all:?}"
            );
        }
        let why = layers_of_parts(layers, layers + 3).expect_err("too few slots");
        assert!(why.to_string().contains(&format!("{} slots", layers + 2)));
    }
}

#[test]
fn plans_that_make_no_sense_are_refused() {
    let refused = |schedule, p, v, m| {
        let why = Plan::new(schedule, p, v, m).expect_err("refused");
        why.to_string()
    };
    assert!(refused(Schedule::GPipe, 2, 2, 4).contains("gpipe has one chunk"));
    assert!(refused(Schedule::ZbH1, 2, 3, 4).contains("not 3"));
    assert!(refused(Schedule::ZbV, 2, 1, 4).contains("two chunks"));
    assert!(refused(Schedule::OneForwardOneBackward, 2, 1, 0).contains("micro-batches"));
    let why = "2f2b".parse::<Schedule>().expect_err("refused").to_string();
    assert!(why.contains("2f2b") && why.contains("zb-v"), "{why}");
    for schedule in Schedule::ALL {
        assert_eq!(
            schedule.name().parse::<Schedule>().expect("a name"),
            schedule
        );
    }
}
