// y = (x - mean) rstd weight + bias over rows of `width`; without MEAN the mean is 0 (RMS norm).
// rows; reads x, weight?, bias?; writes y, mean?: f32, rstd: f32; numbers width, eps: f32; constants MEAN
fn row(r: u32, lane: u32) {
    let n = numbers.width;
    let first = r * n;
    var scale = 1.0;
    var found = moments(lane, first, 1.0);
    var v = found.y + numbers.eps;
    if (lane == 0u) { outside = select(1u, 0u, v >= 7.8886e-31 && v <= 3.4e38); }
    if (workgroupUniformLoad(&outside) == 1u) {
        // Squares leave f32: a power of two brings the greatest element to about 1 first.
        var most = 0.0;
        for (var j = lane; j < n; j += WG) { most = larger(most, abs(load_x(first + j))); }
        let exponent = (bitcast<u32>(group_max(lane, most)) >> 23u) & 255u;
        scale = bitcast<f32>(clamp(254u - min(exponent, 254u), 1u, 253u) << 23u);
        found = moments(lane, first, scale);
        v = found.y + numbers.eps * scale * scale;
        // Of a row without deviation and eps 0; a NaN stays.
        v = select(v, 1e-37, v < 1e-37);
    }
    let inverse = 1.0 / sqrt(v);
    for (var j = lane; j < n; j += WG) {
        var y = (load_x(first + j) * scale - found.x) * inverse;
        if (has_weight) { y = y * load_weight(j); }
        if (has_bias) { y = y + load_bias(j); }
        store_y(first + j, y);
    }
    if (lane == 0u) {
        store_mean(r, found.x / scale);
        store_rstd(r, inverse * scale);
    }
}

var<workgroup> outside: u32;

// Mean and variance of x times scale. The first mean is off by a rounding of its sum: the mean of the differences is added to it.
fn moments(lane: u32, first: u32, scale: f32) -> vec2<f32> {
    let n = numbers.width;
    var mean = 0.0;
    if (MEAN == 1u) {
        var sum = 0.0;
        for (var j = lane; j < n; j += WG) { sum += load_x(first + j) * scale; }
        mean = group_sum(lane, sum) / f32(n);
    }
    var rest = 0.0;
    var squares = 0.0;
    for (var j = lane; j < n; j += WG) {
        let x = load_x(first + j) * scale - mean;
        rest += x;
        squares = fma(x, x, squares);
    }
    squares = group_sum(lane, squares);
    if (MEAN == 0u) { return vec2(0.0, squares / f32(n)); }
    rest = group_sum(lane, rest) / f32(n);
    let variance = (squares - rest * rest * f32(n)) / f32(n);
    return vec2(mean + rest, select(variance, 0.0, variance < 0.0));
}
