// loss[b] = sum over its tokens and experts of slope score, a token's scores divided by their sum with NORMALIZE.
// map loss; reads scores: f32, slopes: f32; numbers tokens, experts; constants NORMALIZE
fn value(i: u32) -> f32 {
    var loss = 0.0;
    for (var t = 0u; t < numbers.tokens; t++) {
        let first = (i * numbers.tokens + t) * numbers.experts;
        var sum = 0.0;
        var dot_ = 0.0;
        for (var e = 0u; e < numbers.experts; e++) {
            let score = load_scores(first + e);
            sum += score;
            dot_ += score * load_slopes(i * numbers.experts + e);
        }
        if (NORMALIZE == 1u) { dot_ = dot_ / sum; }
        loss += dot_;
    }
    return loss;
}
