// y[t] = table[ids[t] - first], 0 where this chip's table lacks the row.
// map y; reads table, ids: u32; numbers width, first, rows
fn value(i: u32) -> f32 {
    let row = load_ids(i / numbers.width) - numbers.first;
    if (row >= numbers.rows) { return 0.0; }
    return load_table(row * numbers.width + i % numbers.width);
}
