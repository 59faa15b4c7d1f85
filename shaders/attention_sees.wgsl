// What attends to what, once a kernel has set `offset` to that of its sequence: query t stands at position offset + t, key s at position s. No window is one beyond every position, and
// no cap is 0: masks are numbers, so that one pipeline serves all of them.

var<private> offset: u32;

const NO_WINDOW: u32 = 0xffffffffu;

fn first_key(t: u32) -> u32 {
    let p = offset + t;
    if (numbers.window != NO_WINDOW && p + 1u > numbers.window) { return min(p + 1u - numbers.window, numbers.keys); }
    return 0u;
}

fn end_of_keys(t: u32) -> u32 {
    let p = offset + t;
    if (numbers.causal == 1u) { return min(p + 1u, numbers.keys); }
    if (numbers.window != NO_WINDOW) { return min(p + numbers.window, numbers.keys); }
    return numbers.keys;
}

fn first_query(s: u32) -> u32 {
    var p = 0u;
    if (numbers.causal == 1u) { p = s; } else if (numbers.window != NO_WINDOW && s + 1u > numbers.window) { p = s + 1u - numbers.window; }
    return min(select(0u, p - offset, p > offset), numbers.queries);
}

fn end_of_queries(s: u32) -> u32 {
    if (numbers.window == NO_WINDOW) { return numbers.queries; }
    let p = s + numbers.window;
    return min(select(0u, p - offset, p > offset), numbers.queries);
}

fn same_document(b: u32, t: u32, s: u32) -> bool {
    if (has_of_queries) { return load_of_queries(b * numbers.queries + t) == load_of_keys(b * numbers.keys + s); }
    return true;
}

fn logit(dot: f32) -> f32 {
    if (numbers.cap != 0.0) { return numbers.cap * hyperbolic_tangent(dot * numbers.scale / numbers.cap); }
    return dot * numbers.scale;
}

// d logit / d dot.
fn logit_slope(l: f32) -> f32 {
    if (numbers.cap != 0.0) {
        let r = l / numbers.cap;
        return numbers.scale * fma(-r, r, 1.0);
    }
    return numbers.scale;
}

fn visible(b: u32, t: u32, s: u32) -> bool {
    return s >= first_key(t) && s < end_of_keys(t) && same_document(b, t, s);
}

fn logit4(dot: vec4<f32>) -> vec4<f32> {
    if (numbers.cap != 0.0) { return vec4<f32>(logit(dot.x), logit(dot.y), logit(dot.z), logit(dot.w)); }
    return dot * numbers.scale;
}

fn slope4(l: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(logit_slope(l.x), logit_slope(l.y), logit_slope(l.z), logit_slope(l.w));
}
