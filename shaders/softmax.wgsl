// y = e^(x - max) / sum of e^(x - max) over rows of `width`.
// rows; reads x; writes y; numbers width
fn row(r: u32, lane: u32) {
    let n = numbers.width;
    let first = r * n;
    var m = -infinity();
    for (var j = lane; j < n; j += WG) { m = larger(m, load_x(first + j)); }
    m = group_max(lane, m);
    var sum = 0.0;
    for (var j = lane; j < n; j += WG) { sum += exponential(load_x(first + j) - m); }
    sum = group_sum(lane, sum);
    for (var j = lane; j < n; j += WG) { store_y(first + j, exponential(load_x(first + j) - m) / sum); }
}
