// y[token, head] = x[token, head], then shared[token].
// map y; reads x, shared; numbers heads, own, rest
fn value(i: u32) -> f32 {
    let width = numbers.own + numbers.rest;
    let head = i / width;
    let at = i % width;
    if (at < numbers.own) { return load_x(head * numbers.own + at); }
    return load_shared(head / numbers.heads * numbers.rest + at - numbers.own);
}
