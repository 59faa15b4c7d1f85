// c = f(a b + bias), for processors that run a subgroup as one vector. A subgroup holds LANES * DOWN rows by LANES * 4 * COLUMNS
// columns of sums; each is one chain of fused multiply-adds over ascending k. A load there costs as much as ten multiply-adds,
// whatever its width, so every invocation loads four elements, and rows of a reach the others by broadcast.
//
// A 0: a's rows are consecutive in memory; 1: its columns (DOWN is 4); 2: neither. B 0: b's rows are consecutive; 1: its columns.
// Groups along z are parts of k, one after another, for each matrix of the batch.
// lanes; reads a, b, bias?; writes c, z?; numbers m, n, k, chunk, batch, a_row, a_column, a_batch, b_row, b_column, b_batch; constants ADD, FUNCTION, WIDE, LANES, DOWN, COLUMNS, A, B
#include product_end
// Sums that an activation follows: in a loop, because one for each would be a long program to compile.
var<workgroup> all: array<vec4<f32>, LANES * LANES * DOWN * COLUMNS>;

fn tile(group: vec3<u32>, lane: u32) {
    let row0 = group.y * (LANES * DOWN);
    let left = group.x * (LANES * 4u * COLUMNS);
    let a_first = (group.z % numbers.batch) * numbers.a_batch;
    let b_first = (group.z % numbers.batch) * numbers.b_batch;
    let c_first = group.z * numbers.m * numbers.n;
    let begin = (group.z / numbers.batch) * numbers.chunk;
    let end = min(begin + numbers.chunk, numbers.k);
    let whole = begin + ((end - begin) & 0xfffffffcu);
#unroll i DOWN
    let a_at@i = a_first + min(row0 + DOWN * lane + @iu, numbers.m - 1u) * numbers.a_row;
#end
    let down = row0 + 4u * lane;
    let a_down = a_first + select(down, 0u, down >= numbers.m);
#unroll j COLUMNS
    let column@j = left + (@ju * LANES + lane) * 4u;
    let b_across@j = b_first + select(column@j, 0u, column@j >= numbers.n);
#unroll c 4
    let b_at@j_@c = b_first + min(column@j + @cu, numbers.n - 1u) * numbers.b_column;
#end
#unroll l LANES
#unroll i DOWN
    var sum@l_@i_@j = start(c_first, row0 + DOWN * @lu + @iu, column@j);
#end
#end
#end
    for (var p = begin; p < whole; p += 4u) {
#unroll i DOWN
        var a@i: vec4<f32>;
#end
        if (A == 0u) {
#unroll i DOWN
            a@i = load4_a(a_at@i + p);
#end
        } else if (A == 1u) {
#unroll q 4
            let x@q = load4_a(a_down + (p + @qu) * numbers.a_column);
#end
#unroll i DOWN
            a@i = vec4<f32>(x0[@i], x1[@i], x2[@i], x3[@i]);
#end
        } else {
#unroll i DOWN
            let at@i = a_at@i + p * numbers.a_column;
            a@i = vec4<f32>(load_a(at@i), load_a(at@i + numbers.a_column), load_a(at@i + 2u * numbers.a_column), load_a(at@i + 3u * numbers.a_column));
#end
        }
#unroll j COLUMNS
#unroll q 4
        var b@j_@q: vec4<f32>;
#end
        if (B == 0u) {
#unroll q 4
            b@j_@q = load4_b(b_across@j + (p + @qu) * numbers.b_row);
#end
        } else {
#unroll c 4
            let y@c = load4_b(b_at@j_@c + p);
#end
#unroll q 4
            b@j_@q = vec4<f32>(y0[@q], y1[@q], y2[@q], y3[@q]);
#end
        }
#end
#unroll q 4
#unroll l LANES
#unroll i DOWN
        let f@l_@i_@q = vec4<f32>(subgroupBroadcast(a@i[@q], @lu));
#unroll j COLUMNS
        sum@l_@i_@j = fma(f@l_@i_@q, b@j_@q, sum@l_@i_@j);
#end
#end
#end
#end
    }
    for (var p = whole; p < end; p++) {
#unroll i DOWN
        let a@i = load_a(a_at@i + p * numbers.a_column);
#end
#unroll j COLUMNS
        let b@j = vec4<f32>(load_b(b_at@j_0 + p * numbers.b_row), load_b(b_at@j_1 + p * numbers.b_row), load_b(b_at@j_2 + p * numbers.b_row), load_b(b_at@j_3 + p * numbers.b_row));
#unroll l LANES
#unroll i DOWN
        sum@l_@i_@j = fma(vec4<f32>(subgroupBroadcast(a@i, @lu)), b@j, sum@l_@i_@j);
#end
#end
#end
    }
    if (FUNCTION == IDENTITY) {
#unroll l LANES
#unroll i DOWN
#unroll j COLUMNS
        finish(c_first, row0 + DOWN * @lu + @iu, column@j, sum@l_@i_@j);
#end
#end
#end
        return;
    }
#unroll l LANES
#unroll i DOWN
#unroll j COLUMNS
    all[((DOWN * @lu + @iu) * COLUMNS + @ju) * LANES + lane] = sum@l_@i_@j;
#end
#end
#end
    for (var x = 0u; x < LANES * DOWN * COLUMNS; x++) {
        finish(c_first, row0 + x / COLUMNS, left + ((x % COLUMNS) * LANES + lane) * 4u, all[x * LANES + lane]);
    }
}
