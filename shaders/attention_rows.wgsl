// Rows of queries of one key head: its query heads, one behind the other. Rows beyond the end are the last one.

fn rows_of_head() -> u32 { return (numbers.heads / numbers.kv_heads) * numbers.queries; }
fn row_of(r: u32) -> u32 { return min(r, rows_of_head() - 1u); }
fn token(r: u32) -> u32 { return row_of(r) % numbers.queries; }
fn head(g: u32, r: u32) -> u32 { return g * (numbers.heads / numbers.kv_heads) + row_of(r) / numbers.queries; }
fn query_at(b: u32, g: u32, r: u32) -> u32 { return ((b * numbers.queries + token(r)) * numbers.heads + head(g, r)) * D; }
fn lse_at(b: u32, g: u32, r: u32) -> u32 { return (b * numbers.heads + head(g, r)) * numbers.queries + token(r); }
fn key_at(b: u32, g: u32, s: u32) -> u32 { return ((b * numbers.keys + min(s, numbers.keys - 1u)) * numbers.kv_heads + g) * D; }

// The first and last token of the 4 LANES rows from `first` on.
fn tokens_of_block(first: u32) -> vec2<u32> {
    let last = row_of(first + 4u * LANES - 1u);
    if (first / numbers.queries == last / numbers.queries) { return vec2<u32>(first % numbers.queries, last % numbers.queries); }
    return vec2<u32>(0u, numbers.queries - 1u);
}

// True if all of these tokens see all of the `count` keys from s0 on.
fn all_see(tokens: vec2<u32>, s0: u32, count: u32) -> bool {
    return !has_of_queries && s0 >= first_key(tokens.y) && s0 + count <= end_of_keys(tokens.x);
}

fn hidden_from(b: u32, t: vec4<u32>, s: u32, l: vec4<f32>) -> vec4<f32> {
    var out = l;
#unroll i 4
    if (!visible(b, t[@i], s)) { out[@i] = -infinity(); }
#end
    return out;
}
