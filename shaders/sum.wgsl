// parts[p] = sum of block p of x, 4096 elements: lanes, then a tree; of squares with SQUARES.
// rows; reads x; writes parts: f32; numbers elements; constants SQUARES
fn row(r: u32, lane: u32) {
    let end = min((r + 1u) * 4096u, numbers.elements);
    var sum = 0.0;
    for (var i = r * 4096u + lane; i < end; i += WG) {
        let x = load_x(i);
        if (SQUARES == 1u) { sum = fma(x, x, sum); } else { sum += x; }
    }
    sum = group_sum(lane, sum);
    if (lane == 0u) { store_parts(r, sum); }
}
