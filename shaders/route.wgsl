// The k experts of a row with the largest scores + bias, the lower number first on a tie, NaN as the largest; their weights;
// and whether the next one lies closer than `margin`.
// elements; reads scores: f32, bias?: f32; writes weights: f32, chosen: u32, close: f32; numbers experts, k, scale: f32, least: f32, margin: f32; constants NORMALIZE
fn key(r: u32, e: u32) -> f32 {
    var x = load_scores(r * numbers.experts + e);
    if (has_bias) { x += load_bias(e); }
    return select(x, infinity(), is_nan(x));
}

fn element(r: u32) {
    let first = r * numbers.experts;
    var sum = 0.0;
    for (var pass_ = 0u; pass_ < 2u; pass_++) {
        // A later choice is what comes behind the one before it in the order (key, number).
        var before = infinity();
        var before_at = 0u;
        for (var j = 0u; j <= numbers.k; j++) {
            var best = -infinity();
            var best_at = numbers.experts;
            for (var e = 0u; e < numbers.experts; e++) {
                let x = key(r, e);
                let open = j == 0u || x < before || (x == before && e > before_at);
                if (open && (best_at == numbers.experts || x > best)) {
                    best = x;
                    best_at = e;
                }
            }
            if (j == numbers.k) {
                let near = best_at < numbers.experts && (best == before || before - best < numbers.margin);
                store_close(r, select(0.0, 1.0, near));
                continue;
            }
            before = best;
            before_at = best_at;
            let score = load_scores(first + best_at);
            if (pass_ == 0u) {
                sum += score;
            } else {
                var factor = numbers.scale;
                if (NORMALIZE == 1u) { factor = numbers.scale / (sum + numbers.least); }
                store_weights(r * numbers.k + j, factor * score);
                store_chosen(r * numbers.k + j, best_at);
            }
        }
    }
}
