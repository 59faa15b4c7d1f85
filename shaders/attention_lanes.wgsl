// o = softmax(mask(logit(q k^T))) v and its log-sum-exp, for processors that run a subgroup as one vector. An invocation holds
// four query rows, so softmax needs no other invocation; rows of keys and values reach all by broadcast. Rows of the query heads
// that share a key head stand behind one another. Online over blocks of 4 LANES keys; blocks that nobody sees are skipped.
// Groups: blocks of rows, key heads of each sequence, pieces of 4 LANES VECTORS elements of o.
// lanes; reads q, k, v, of_queries?: u32, of_keys?: u32, offsets?: u32; writes o, lse: f32; numbers heads, kv_heads, queries, keys, head_dim, offset, causal, window, scale: f32, cap: f32; constants D, LANES, VECTORS
#include attention_sees
#include attention_part x=q
#include attention_part x=k
#include attention_part x=v
#include attention_rows
var<workgroup> weights: array<vec4<f32>, 4u * LANES * LANES>;

fn tile(group: vec3<u32>, lane: u32) {
    let g = group.y % numbers.kv_heads;
    let b = group.y / numbers.kv_heads;
    offset = numbers.offset;
    if (has_offsets) { offset = load_offsets(b); }
    let rows = rows_of_head();
    let first = group.x * 4u * LANES;
    let d0 = group.z * 4u * LANES * VECTORS;
#unroll i 4
    let t@i = token(first + 4u * lane + @iu);
    let q_at@i = query_at(b, g, first + 4u * lane + @iu);
#end
    let t = vec4<u32>(t0, t1, t2, t3);
    let seen = tokens_of_block(first);
#unroll x VECTORS
#unroll l LANES
#unroll c 4
    var o@x_@l_@c = vec4<f32>(0.0);
#end
#end
#end
    var m = vec4<f32>(-infinity());
    var sum = vec4<f32>(0.0);
    let end = end_of_keys(seen.y);
    for (var s0 = (first_key(seen.x) / (4u * LANES)) * (4u * LANES); s0 < end; s0 += 4u * LANES) {
#unroll i 4
        let k_at@i = key_at(b, g, s0 + 4u * lane + @iu);
#end
#include block_product out=s r=k x=q
#unroll l LANES
#unroll i 4
        weights[(4u * @lu + @iu) * LANES + lane] = s@l_@i;
#end
#end
        let count = min(4u * LANES, end - s0);
        let all = all_see(seen, s0, 4u * LANES);
        var top = m;
        for (var r = 0u; r < count; r++) {
            var l = logit4(weights[r * LANES + lane]);
            if (!all) { l = hidden_from(b, t, s0 + r, l); }
            weights[r * LANES + lane] = l;
            top = max(top, l);
        }
        // Before anything is seen there is no maximum to take away.
        let base = select(top, vec4<f32>(0.0), top == vec4<f32>(-infinity()));
        let down = exponential4(m - base);
        m = top;
        sum = sum * down;
#unroll x VECTORS
#unroll l LANES
#unroll c 4
        o@x_@l_@c = o@x_@l_@c * down;
#end
#end
#end
        for (var r = 0u; r < count; r++) {
            let p = exponential4(weights[r * LANES + lane] - base);
            sum += p;
            let at = key_at(b, g, s0 + r);
#unroll x VECTORS
            let v@x = part_v(at, d0 + 4u * (@xu * LANES + lane));
#unroll l LANES
#unroll c 4
            o@x_@l_@c = fma(vec4<f32>(subgroupBroadcast(v@x[@c], @lu)), p, o@x_@l_@c);
#end
#end
#end
        }
    }
    let share = select(1.0 / sum, vec4<f32>(0.0), sum == vec4<f32>(0.0));
#unroll i 4
    if (first + 4u * lane + @iu < rows) {
#unroll x VECTORS
#unroll l LANES
        store_part_o(q_at@i, d0 + 4u * (@xu * LANES + @lu), share[@i] * vec4<f32>(o@x_@l_0[@i], o@x_@l_1[@i], o@x_@l_2[@i], o@x_@l_3[@i]));
#end
#end
        if (group.z == 0u) {
            store_lse(lse_at(b, g, first + 4u * lane + @iu), select(m[@i] + logarithm(sum[@i]), -infinity(), sum[@i] == 0.0));
        }
    }
#end
}

fn store_part_o(at: u32, d: u32, x: vec4<f32>) {
#include attention_store y=o
}
