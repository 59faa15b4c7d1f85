// dtable[v] (+)= the rows of dy whose id is v, one chain over ascending tokens: order[begin[v] .. begin[v + 1]] are their numbers.
// map dtable; reads dy, order: u32, begin: u32; numbers width; constants ADD
fn value(i: u32) -> f32 {
    let row = i / numbers.width;
    let column = i % numbers.width;
    var sum = 0.0;
    if (ADD == 1u) { sum = load_dtable(i); }
    let end = load_begin(row + 1u);
    for (var at = load_begin(row); at < end; at++) {
        sum += load_dy(load_order(at) * numbers.width + column);
    }
    return sum;
}
