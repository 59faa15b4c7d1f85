// norm = sqrt(squares), factor = min(max_norm / (norm + 1e-6), 1), NaN if the norm is not finite.
// elements; reads squares: f32; writes factor: f32, norm: f32; numbers max_norm: f32
fn element(i: u32) {
    let norm = sqrt(load_squares(0u));
    store_norm(0u, norm);
    store_factor(0u, select(not_a_number(), min(numbers.max_norm / (norm + 1e-6), 1.0), is_finite(norm)));
}
