// y = the pieces of a dimension of x [.., len, inner], one behind the other: piece p is the indices starts[p] .. starts[p + 1], and an
// index is `each` elements in all.
// map y; reads x, starts: u32; numbers each, len, inner
fn value(i: u32) -> E {
    let index = i / numbers.each;
    var p = 0u;
    while (load_starts(p + 1u) <= index) { p++; }
    let start = load_starts(p);
    let width = (load_starts(p + 1u) - start) * numbers.inner;
    let rest = i - start * numbers.each;
    return load_x((rest / width) * numbers.len * numbers.inner + start * numbers.inner + rest % width);
}
