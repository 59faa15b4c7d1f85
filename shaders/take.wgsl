// y = the elements start .. start + width of each block of `inner` elements of x; added to y with ADD.
// map y; reads x; numbers width, inner, start; constants ADD
fn value(i: u32) -> E {
    let at = (i / numbers.width) * numbers.inner + numbers.start + i % numbers.width;
    if (ADD == 1u) { return load_y(i) + load_x(at); }
    return load_x(at);
}
