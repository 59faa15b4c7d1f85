// dup = dy silu(gate).
// map dup; reads gate, dy
fn value(i: u32) -> f32 { return load_dy(i) * activate(SILU, load_gate(i)); }
