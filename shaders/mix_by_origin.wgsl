// y[slot] = weight x[token], 0 in empty slots.
// map y; reads x, origin: u32, weights?: f32; numbers width, b, k, assignments, places
fn value(i: u32) -> f32 {
    let row = i / numbers.width;
    let choice = load_origin(row);
    if (choice == 0xffffffffu) { return 0.0; }
    let at = row / numbers.places % numbers.b * numbers.assignments + choice;
    let x = load_x(at / numbers.k * numbers.width + i % numbers.width);
    if (has_weights) { return load_weights(at) * x; }
    return x;
}
