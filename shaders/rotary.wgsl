// (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin) for each pair of a head's first 2 `half` elements; `sign` -1 turns back.
// PAIRS 0: elements i and i + half are a pair; 1: elements 2 i and 2 i + 1.
// map y; reads x, cos: f32, sin: f32; numbers tokens, heads, head_dim, half, sign: f32; constants PAIRS
fn value(i: u32) -> f32 {
    let d = i % numbers.head_dim;
    let head = i / numbers.head_dim;
    let x = load_x(i);
    if (d >= 2u * numbers.half) { return x; }
    let t = (head / numbers.heads) % numbers.tokens;
    var pair = d % numbers.half;
    var second = d >= numbers.half;
    var other = select(i + numbers.half, i - numbers.half, second);
    if (PAIRS == 1u) {
        pair = d / 2u;
        second = (d & 1u) == 1u;
        other = select(i + 1u, i - 1u, second);
    }
    let c = load_cos(t * numbers.half + pair);
    let s = numbers.sign * load_sin(t * numbers.half + pair);
    return x * c + load_x(other) * select(-s, s, second);
}
