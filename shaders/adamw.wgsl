// One AdamW step in place (see cpu/rows/optimizer.rs); nothing changes where the clipping factor is not finite.
// elements; reads g, clip?: f32; writes p: f32, m: f32, v: f32; numbers beta1: f32, beta2: f32, eps: f32, keep: f32, rate: f32, root: f32
fn element(i: u32) {
    var factor = 1.0;
    if (has_clip) { factor = load_clip(0u); }
    if (!is_finite(factor)) { return; }
    let g = load_g(i) * factor;
    let m = fma(numbers.beta1, load_m(i), (1.0 - numbers.beta1) * g);
    let v = fma(numbers.beta2, load_v(i), (1.0 - numbers.beta2) * (g * g));
    let step = m / (sqrt(v * numbers.root) + numbers.eps);
    store_p(i, fma(-numbers.rate, step, load_p(i) * numbers.keep));
    store_m(i, m);
    store_v(i, v);
}
