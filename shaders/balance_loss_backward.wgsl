// dscore = g, or (g - sum of g score / sum) / sum with NORMALIZE, where g = dloss slope.
// map dscores; reads scores: f32, slopes: f32, dloss: f32; numbers tokens, experts; constants NORMALIZE
fn value(i: u32) -> f32 {
    let row = i / numbers.experts;
    let sequence = row / numbers.tokens;
    let slope_at = sequence * numbers.experts;
    let dloss = load_dloss(sequence);
    let g = dloss * load_slopes(slope_at + i % numbers.experts);
    if (NORMALIZE == 0u) { return g; }
    var sum = 0.0;
    var dot_ = 0.0;
    for (var e = 0u; e < numbers.experts; e++) {
        let score = load_scores(row * numbers.experts + e);
        sum += score;
        dot_ += score * (dloss * load_slopes(slope_at + e));
    }
    return (g - dot_ / sum) / sum;
}
