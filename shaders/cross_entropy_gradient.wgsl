// dx[j] = scale (e^(x[j] - max) / sum - [j is the label]); 0 in rows whose label is ignored and in columns from `visible` on.
// map dx; reads x, max: f32, sum: f32, labels: u32, scale: f32; numbers width, visible, first, ignored
fn value(i: u32) -> f32 {
    let r = i / numbers.width;
    let j = i % numbers.width;
    let label = load_labels(r);
    if (label == numbers.ignored || j >= numbers.visible) { return 0.0; }
    let scale = load_scale(r);
    let p = exponential(load_x(i) - load_max(r)) * (scale / load_sum(r));
    return select(p, p - scale, j + numbers.first == label);
}
