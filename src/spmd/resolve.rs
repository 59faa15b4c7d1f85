//! The placement rule: from an op's letters and its operands' placements to its results' and its gradients'.

use crate::mesh::Mesh;
use crate::ops::{Axes, Linear};
use crate::placement::Placement::{self, Partial, Replicate, Shard};
use crate::placement::Placements;

/// How an op's results lie, and how the gradients that its backward computes will.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub outputs: Vec<Placements>,
    pub gradients: Vec<Placements>,
}

/// Applies the rule of [`Axes`] on every axis of the mesh.
///
/// The error is a sentence that names the mesh axis, the operands' placements and what would do.
pub(crate) fn resolve(
    axes: &Axes,
    inputs: &[&Placements],
    mesh: &Mesh,
) -> Result<Resolved, String> {
    assert_eq!(
        axes.inputs.len(),
        inputs.len(),
        "the op's axes name {} operands, it was given {}",
        axes.inputs.len(),
        inputs.len()
    );
    let mut outputs = vec![Vec::new(); axes.outputs.len()];
    let mut gradients = vec![Vec::new(); inputs.len()];
    for (number, axis) in mesh.axes().iter().enumerate() {
        let placed: Vec<Placement> = inputs.iter().map(|p| p[number]).collect();
        let on_axis = along_one(axes, &placed).map_err(|why| {
            let list: Vec<String> = placed.iter().map(ToString::to_string).collect();
            format!(
                "over mesh axis '{}' the operands are placed {}: {why}",
                axis.name(),
                list.join(", ")
            )
        })?;
        outputs
            .iter_mut()
            .zip(on_axis.0)
            .for_each(|(to, p)| to.push(p));
        gradients
            .iter_mut()
            .zip(on_axis.1)
            .for_each(|(to, p)| to.push(p));
    }
    Ok(Resolved {
        outputs: outputs.into_iter().map(Placements::from).collect(),
        gradients: gradients.into_iter().map(Placements::from).collect(),
    })
}

type OnAxis = (Vec<Placement>, Vec<Placement>);

fn along_one(axes: &Axes, placed: &[Placement]) -> Result<OnAxis, String> {
    let whole = |p: Placement| (vec![p; axes.outputs.len()], vec![p; placed.len()]);
    let letter_of = |i: usize, dim: usize| axes.inputs[i].get(dim).copied();
    let split = placed.iter().enumerate().find_map(|(i, p)| match p {
        Shard(dim) => Some(letter_of(i, *dim)),
        _ => None,
    });
    match split {
        Some(letter) => {
            let letter = letter.ok_or("a split dimension is not among the op's axes")?;
            along_letter(axes, placed, letter)
        }
        None if placed.contains(&Partial) => along_partial(axes, placed),
        None => Ok(whole(Replicate)),
    }
}

fn along_letter(axes: &Axes, placed: &[Placement], letter: char) -> Result<OnAxis, String> {
    if letter.is_uppercase() {
        return Err(format!(
            "the op needs axis '{letter}' of its operands whole; redistribute it to Replicate first"
        ));
    }
    for (i, p) in placed.iter().enumerate() {
        let want = match axes.inputs[i].iter().position(|&l| l == letter) {
            Some(dim) => Shard(dim),
            None => Replicate,
        };
        if *p != want {
            return Err(format!(
                "operand {i} would have to be {want} (axis '{letter}')"
            ));
        }
    }
    let out = |letters: &Vec<char>| match letters.iter().position(|&l| l == letter) {
        Some(dim) => Shard(dim),
        None if axes.whole_without.contains(&letter) => Replicate,
        None => Partial,
    };
    let gradient = |letters: &Vec<char>| match letters.iter().position(|&l| l == letter) {
        Some(dim) => Shard(dim),
        None => Partial,
    };
    Ok((
        axes.outputs.iter().map(out).collect(),
        axes.inputs.iter().map(gradient).collect(),
    ))
}

fn along_partial(axes: &Axes, placed: &[Placement]) -> Result<OnAxis, String> {
    let partials = placed.iter().filter(|p| **p == Partial).count();
    let outputs = vec![Partial; axes.outputs.len()];
    match axes.linear {
        Linear::Jointly if partials == placed.len() => Ok((outputs, vec![Replicate; placed.len()])),
        Linear::Each if partials == 1 => {
            // The gradient of the partial operand is the whole one, that of the others a sum over chips.
            let gradient = |p: &Placement| if *p == Partial { Replicate } else { Partial };
            Ok((outputs, placed.iter().map(gradient).collect()))
        }
        _ => Err(
            "a partial sum goes only through ops that are linear in it; redistribute it first, to \
             Replicate by an all-reduce or to Shard(dim) by a reduce-scatter"
                .into(),
        ),
    }
}
