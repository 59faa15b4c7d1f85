// y = (x - mean) rstd weight + bias over rows of `width`; without MEAN the mean is 0 (RMS norm).
// rows; reads x, weight?, bias?; writes y, mean?: f32, rstd: f32; numbers width, eps: f32; constants MEAN
fn row(r: u32, lane: u32) {
    let n = numbers.width;
    let first = r * n;
    var mean = 0.0;
    if (MEAN == 1u) {
        var sum = 0.0;
        for (var j = lane; j < n; j += WG) { sum += load_x(first + j); }
        mean = group_sum(lane, sum) / f32(n);
    }
    var squares = 0.0;
    for (var j = lane; j < n; j += WG) {
        let x = load_x(first + j) - mean;
        squares = fma(x, x, squares);
    }
    let rstd = 1.0 / sqrt(group_sum(lane, squares) / f32(n) + numbers.eps);
    for (var j = lane; j < n; j += WG) {
        var y = (load_x(first + j) - mean) * rstd;
        if (has_weight) { y = y * load_weight(j); }
        if (has_bias) { y = y + load_bias(j); }
        store_y(first + j, y);
    }
    if (lane == 0u) {
        store_mean(r, mean);
        store_rstd(r, rstd);
    }
}
