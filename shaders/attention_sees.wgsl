// What attends to what: query t stands at position offset + t, key s at position s.

fn first_key(t: u32) -> u32 {
    let p = numbers.offset + t;
    if (WINDOW == 1u && p + 1u > numbers.window) { return min(p + 1u - numbers.window, numbers.keys); }
    return 0u;
}

fn end_of_keys(t: u32) -> u32 {
    let p = numbers.offset + t;
    if (CAUSAL == 1u) { return min(p + 1u, numbers.keys); }
    if (WINDOW == 1u) { return min(p + numbers.window, numbers.keys); }
    return numbers.keys;
}

fn first_query(s: u32) -> u32 {
    var p = 0u;
    if (CAUSAL == 1u) { p = s; } else if (WINDOW == 1u && s + 1u > numbers.window) { p = s + 1u - numbers.window; }
    return min(select(0u, p - numbers.offset, p > numbers.offset), numbers.queries);
}

fn end_of_queries(s: u32) -> u32 {
    if (WINDOW == 0u) { return numbers.queries; }
    let p = s + numbers.window;
    return min(select(0u, p - numbers.offset, p > numbers.offset), numbers.queries);
}

fn same_document(b: u32, t: u32, s: u32) -> bool {
    if (has_of_queries) { return load_of_queries(b * numbers.queries + t) == load_of_keys(b * numbers.keys + s); }
    return true;
}

fn logit(dot: f32) -> f32 {
    if (CAP == 1u) { return numbers.cap * hyperbolic_tangent(dot * numbers.scale / numbers.cap); }
    return dot * numbers.scale;
}

// d logit / d dot.
fn logit_slope(l: f32) -> f32 {
    if (CAP == 1u) {
        let r = l / numbers.cap;
        return numbers.scale * fma(-r, r, 1.0);
    }
    return numbers.scale;
}
