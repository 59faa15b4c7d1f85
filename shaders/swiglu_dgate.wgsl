// dgate = dy up silu'(gate).
// map dgate; reads gate, up, dy
fn value(i: u32) -> f32 { return (load_dy(i) * load_up(i)) * slope(SILU, load_gate(i)); }
