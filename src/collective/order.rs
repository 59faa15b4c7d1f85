//! In which order sums over chips are taken: the fixed binary tree, and the expression of every algorithm.

use super::{Algorithm, Counts, Kind};
use std::fmt;

/// The fixed binary tree over `n` leaves, as additions in order: for each `(left, right)`, `x[left] += x[right]`;
/// the total ends in `x[0]`.
///
/// Adjacent pairs first, then pairs of pairs; what finds no partner moves up a level unchanged. For 5 leaves that is
/// `((0 + 1) + (2 + 3)) + 4`, for 6 `((0 + 1) + (2 + 3)) + (4 + 5)`. There are `n - 1` additions for `n >= 1`.
pub fn tree(n: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    let strides = std::iter::successors(Some(1usize), |stride| stride.checked_mul(2));
    strides
        .take_while(move |&stride| stride < n)
        .flat_map(move |stride| {
            let lefts = (0..n - stride).step_by(2 * stride);
            lefts.map(move |left| (left, left + stride))
        })
}

/// `items` reduced by `add` along [`tree`]; `None` if there are none.
///
/// ```
/// use supernode::collective::tree_sum;
/// let add = |a: String, b: String| format!("({a}+{b})");
/// let sum = tree_sum((0..5).map(|i| i.to_string()).collect(), add);
/// assert_eq!(sum.unwrap(), "(((0+1)+(2+3))+4)");
/// ```
pub fn tree_sum<T>(items: Vec<T>, mut add: impl FnMut(T, T) -> T) -> Option<T> {
    let mut items: Vec<Option<T>> = items.into_iter().map(Some).collect();
    for (left, right) in tree(items.len()) {
        let pair = items[left].take().zip(items[right].take());
        items[left] = pair.map(|(a, b)| add(a, b));
    }
    items.into_iter().next().flatten()
}

/// How an element of a result comes about: a chip's input, or the reduction of two expressions. Prints as
/// `((0+1)+(2+3))+4`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Expression {
    /// What the chip with this index in the group brought.
    Leaf(usize),
    /// `left + right`, or the maximum of the two.
    Sum(Box<Expression>, Box<Expression>),
}

impl Expression {
    /// `left + right`.
    pub fn sum(left: Expression, right: Expression) -> Self {
        Expression::Sum(Box::new(left), Box::new(right))
    }

    /// The chips in it, from left to right.
    pub fn leaves(&self) -> Vec<usize> {
        match self {
            Expression::Leaf(index) => vec![*index],
            Expression::Sum(left, right) => [left.leaves(), right.leaves()].concat(),
        }
    }

    /// The fixed binary tree over `leaves`, of which there must be one.
    fn tree(leaves: Vec<Expression>) -> Self {
        tree_sum(leaves, Expression::sum).expect("a group has at least one chip")
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, inner: bool) -> fmt::Result {
        match self {
            Expression::Leaf(index) => write!(f, "{index}"),
            Expression::Sum(left, right) => {
                f.write_str(if inner { "(" } else { "" })?;
                left.write(f, true)?;
                f.write_str("+")?;
                right.write(f, true)?;
                f.write_str(if inner { ")" } else { "" })
            }
        }
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, false)
    }
}

/// How an element of chunk `chunk` of the result of a collective over `n` chips comes about.
///
/// Chunks are those of reduce-scatter and all-gather; those of an all-reduce are `split(len, n, chunk)`; in an
/// all-to-all or a shift `chunk` is the source. With `n` = 5:
///
/// | algorithm | all-reduce and reduce-scatter |
/// |---|---|
/// | tree | `((0+1)+(2+3))+4` |
/// | ring | a chain that ends at the chunk's own chip, for chunk 2 `(((3+4)+0)+1)+2` |
/// | recursive | `((0+1)+3)+(2+4)`: the first `2 (n - p)` chips fold in pairs, then halves of the `p` meet (`p` the largest power of two up to `n`) |
///
/// The other kinds move elements without adding: a leaf. The expression has `n` leaves and may be as deep: it is for
/// proofs and people. Panics if there is no such chunk.
#[track_caller]
pub fn order(kind: Kind, algorithm: Algorithm, n: usize, chunk: usize) -> Expression {
    Counts::Len(0).check(kind, n);
    assert!(chunk < n, "chunk {chunk} of {n}");
    let leaves = |range: std::ops::Range<usize>| range.map(Expression::Leaf);
    match (kind, algorithm) {
        (Kind::Broadcast { root }, _) => Expression::Leaf(root),
        (Kind::AllGather | Kind::AllToAll | Kind::Shift | Kind::Barrier, _) => {
            Expression::Leaf(chunk)
        }
        (_, Algorithm::Tree) => Expression::tree(leaves(0..n).collect()),
        (_, Algorithm::Ring) => {
            let mut chain = leaves(chunk + 1..n).chain(leaves(0..chunk + 1));
            let first = chain.next().expect("a group has at least one chip");
            chain.fold(first, Expression::sum)
        }
        (_, Algorithm::Recursive) => {
            let fold = super::recursive::Fold::of(n);
            halving(&fold, 0, 1)
        }
    }
}

/// What recursive halving has added up at `member` once the partners at distances of at least `distance` have met.
fn halving(fold: &super::recursive::Fold, member: usize, distance: usize) -> Expression {
    if distance == fold.members {
        return Expression::tree(fold.chips(member).map(Expression::Leaf).collect());
    }
    let meet = |member| halving(fold, member, 2 * distance);
    Expression::sum(meet(member), meet(member | distance))
}
