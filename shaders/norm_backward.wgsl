// With h = (x - mean) rstd and g = dy weight: dx = rstd (g - sum g / n - h sum (g h) / n); without a mean, no sum of g.
// rows; reads x, dy, weight?, mean?: f32, rstd: f32; writes dx; numbers width
fn row(r: u32, lane: u32) {
    let n = numbers.width;
    let first = r * n;
    let rstd = load_rstd(r);
    var mean = 0.0;
    if (has_mean) { mean = load_mean(r); }
    var sum_g = 0.0;
    var sum_gh = 0.0;
    for (var j = lane; j < n; j += WG) {
        var g = load_dy(first + j);
        if (has_weight) { g = g * load_weight(j); }
        sum_g += g;
        sum_gh = fma(g, (load_x(first + j) - mean) * rstd, sum_gh);
    }
    var shift = 0.0;
    if (has_mean) { shift = group_sum(lane, sum_g) / f32(n); }
    let slant = group_sum(lane, sum_gh) / f32(n);
    for (var j = lane; j < n; j += WG) {
        var g = load_dy(first + j);
        if (has_weight) { g = g * load_weight(j); }
        let h = (load_x(first + j) - mean) * rstd;
        store_dx(first + j, rstd * fma(-h, slant, g - shift));
    }
}
