// delta[b, h, t] = sum over d of dout o, which both backward kernels subtract.
// map delta: f32; reads o, dout; numbers heads, queries, head_dim
fn value(i: u32) -> f32 {
    let t = i % numbers.queries;
    let h = (i / numbers.queries) % numbers.heads;
    let b = i / (numbers.queries * numbers.heads);
    let at = ((b * numbers.queries + t) * numbers.heads + h) * numbers.head_dim;
    var sum = 0.0;
    for (var d = 0u; d < numbers.head_dim; d++) { sum = fma(load_dout(at + d), load_o(at + d), sum); }
    return sum;
}
