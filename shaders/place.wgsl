// y[start .. start + width] of each block of `inner` elements = x; the rest of y is left as it is.
// elements; reads x; writes y; numbers width, inner, start
fn element(i: u32) {
    store_y((i / numbers.width) * numbers.inner + numbers.start + i % numbers.width, load_x(i));
}
