// y[start .. start + width] of each block of `inner` elements = x; the rest of y becomes 0, or with ADD x is added and the rest
// stays.
// map y; reads x; numbers width, inner, start; constants ADD
fn value(i: u32) -> E {
    let block = i / numbers.inner;
    let at = i % numbers.inner;
    let inside = at >= numbers.start && at < numbers.start + numbers.width;
    var x = E(0);
    if (inside) { x = load_x(block * numbers.width + at - numbers.start); }
    if (ADD == 1u) { x = load_y(i) + x; }
    return x;
}
