// dx = y (dy - sum of y dy) over rows of `width`.
// rows; reads y, dy; writes dx; numbers width
fn row(r: u32, lane: u32) {
    let n = numbers.width;
    let first = r * n;
    var sum = 0.0;
    for (var j = lane; j < n; j += WG) { sum += load_y(first + j) * load_dy(first + j); }
    sum = group_sum(lane, sum);
    for (var j = lane; j < n; j += WG) {
        let y = load_y(first + j);
        store_dx(first + j, fma(-sum, y, y * load_dy(first + j)));
    }
}
