// One SGD step in place, with a momentum if there is one; nothing changes where the clipping factor is not finite.
// elements; reads g, clip?: f32; writes p: f32, momentum?: f32; numbers lr: f32, decay: f32, weight_decay: f32
fn element(i: u32) {
    var factor = 1.0;
    if (has_clip) { factor = load_clip(0u); }
    if (!is_finite(factor)) { return; }
    var g = fma(numbers.weight_decay, load_p(i), load_g(i) * factor);
    if (has_momentum) {
        g = fma(numbers.decay, load_momentum(i), g);
        store_momentum(i, g);
    }
    store_p(i, fma(-numbers.lr, g, load_p(i)));
}
