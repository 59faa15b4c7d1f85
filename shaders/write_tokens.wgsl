// y[b inner + starts[b] + j] = x[b width + j]: new tokens of each sequence into a cache, of which the rest is left as it is.
// elements; reads x, starts: u32; writes y; numbers width, inner
fn element(i: u32) {
    let b = i / numbers.width;
    store_y(b * numbers.inner + load_starts(b) + i % numbers.width, load_x(i));
}
