// max[r] = maximum of the first `visible` of a row's `width` columns; -infinity without any, NaN with a NaN.
// rows; reads x; writes max: f32; numbers width, visible
fn row(r: u32, lane: u32) {
    var m = -infinity();
    for (var j = lane; j < numbers.visible; j += WG) { m = larger(m, load_x(r * numbers.width + j)); }
    m = group_max(lane, m);
    if (lane == 0u) { store_max(r, m); }
}
