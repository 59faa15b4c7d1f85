// y = x in the type of y.
// map y; reads x
fn value(i: u32) -> E { return load_x(i); }
