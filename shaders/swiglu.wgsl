// y = silu(gate) up.
// map y; reads gate, up
fn value(i: u32) -> f32 { return activate(SILU, load_gate(i)) * load_up(i); }
