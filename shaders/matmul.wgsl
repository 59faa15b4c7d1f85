// c = f(a b + bias). A group holds a tile of 4 ROWS WG_Y rows by 4 COLUMNS WG_X columns of sums in registers, each one chain of
// fused multiply-adds over ascending k; DEPTH of k at a time go through workgroup memory, by blocks of 4 by 4 that are turned in
// registers where the operand's k is consecutive. The next DEPTH are on their way from memory while these are multiplied.
// A place in workgroup memory is moved by its k, so that neither the turned stores nor the loads of a row meet in one bank.
//
// A 0: a's rows are consecutive in memory; 1: its columns. B 0: b's rows are consecutive; 1: its columns. Rows and columns beyond
// an edge are read somewhere inside and never stored, k beyond the end counts as 0; both are decided outside of the inner loop.
// Groups along z are parts of k, one after another, for each matrix of the batch.
// tiles; reads a, b, bias?; writes c, z?; numbers m, n, k, chunk, batch, a_row, a_column, a_batch, b_row, b_column, b_batch; constants ADD, FUNCTION, WIDE, ROWS, COLUMNS, WG_X, WG_Y, DEPTH, A_BLOCKS, B_BLOCKS, A, B, LOOSE
#include product_end
const DOWN = ROWS * WG_Y;
const ACROSS = COLUMNS * WG_X;
var<workgroup> a_tile: array<vec4<f32>, DEPTH * DOWN>;
var<workgroup> b_tile: array<vec4<f32>, DEPTH * ACROSS>;

fn place(p: u32, x: u32, width: u32) -> u32 { return p * width + (x ^ ((p >> 2u) & (width - 1u))); }

// Column q holds the four rows of a at k = p + q.
fn a_block(first: u32, row: u32, p: u32, end: u32) -> mat4x4<f32> {
    var lines = mat4x4<f32>();
    if (A == 0u) {
#unroll i 4
        let at@i = first + min(row + @iu, numbers.m - 1u) * numbers.a_row + p;
#end
        if (p + 4u <= end) {
            lines = mat4x4<f32>(load4_a(at0), load4_a(at1), load4_a(at2), load4_a(at3));
        } else {
#unroll q 3
            if (p + @qu < end) {
#unroll i 4
                lines[@i][@q] = load_a(at@i + @qu);
#end
            }
#end
        }
        return transpose(lines);
    }
    let at = first + select(row, 0u, row >= numbers.m);
#unroll q 4
    if (p + @qu < end) { lines[@q] = load4_a(at + (p + @qu) * numbers.a_column); }
#end
    return lines;
}

// Column q holds the four columns of b at k = p + q.
fn b_block(first: u32, column: u32, p: u32, end: u32) -> mat4x4<f32> {
    var lines = mat4x4<f32>();
    if (B == 1u) {
#unroll i 4
        let at@i = first + min(column + @iu, numbers.n - 1u) * numbers.b_column + p;
#end
        if (p + 4u <= end) {
            lines = mat4x4<f32>(load4_b(at0), load4_b(at1), load4_b(at2), load4_b(at3));
        } else {
#unroll q 3
            if (p + @qu < end) {
#unroll i 4
                lines[@i][@q] = load_b(at@i + @qu);
#end
            }
#end
        }
        return transpose(lines);
    }
    let at = first + select(column, 0u, column >= numbers.n);
#unroll q 4
    if (p + @qu < end) { lines[@q] = load4_b(at + (p + @qu) * numbers.b_row); }
#end
    return lines;
}

fn tile(group: vec3<u32>, lane: u32) {
    let row0 = group.y * (4u * DOWN);
    let column0 = group.x * (4u * ACROSS);
    let a_first = (group.z % numbers.batch) * numbers.a_batch;
    let b_first = (group.z % numbers.batch) * numbers.b_batch;
    let c_first = group.z * numbers.m * numbers.n;
    let begin = (group.z / numbers.batch) * numbers.chunk;
    let end = min(begin + numbers.chunk, numbers.k);
    let y = lane / WG_X;
    let x = lane % WG_X;
    // The blocks that this invocation brings: along consecutive elements first.
#unroll s A_BLOCKS
    let a_nth@s = lane + @su * (WG_X * WG_Y);
    let a_p@s = 4u * select(a_nth@s / DOWN, a_nth@s % (DEPTH / 4u), A == 0u);
    let a_x@s = select(a_nth@s % DOWN, a_nth@s / (DEPTH / 4u), A == 0u);
    var a_next@s = a_block(a_first, row0 + 4u * a_x@s, begin + a_p@s, end);
#end
#unroll s B_BLOCKS
    let b_nth@s = lane + @su * (WG_X * WG_Y);
    let b_p@s = 4u * select(b_nth@s / ACROSS, b_nth@s % (DEPTH / 4u), B == 1u);
    let b_x@s = select(b_nth@s % ACROSS, b_nth@s / (DEPTH / 4u), B == 1u);
    var b_next@s = b_block(b_first, column0 + 4u * b_x@s, begin + b_p@s, end);
#end
#unroll i ROWS
#unroll c 4
#unroll j COLUMNS
    var sum@i_@c_@j = start(c_first, row0 + 4u * (y + WG_Y * @iu) + @cu, column0 + 4u * (x + WG_X * @ju));
#end
#end
#end
    for (var p = begin; p < end; p += DEPTH) {
#unroll s A_BLOCKS
#unroll q 4
        a_tile[place(a_p@s + @qu, a_x@s, DOWN)] = a_next@s[@q];
#end
#end
#unroll s B_BLOCKS
#unroll q 4
        b_tile[place(b_p@s + @qu, b_x@s, ACROSS)] = b_next@s[@q];
#end
#end
        workgroupBarrier();
        if (p + DEPTH < end) {
#unroll s A_BLOCKS
            a_next@s = a_block(a_first, row0 + 4u * a_x@s, p + DEPTH + a_p@s, end);
#end
#unroll s B_BLOCKS
            b_next@s = b_block(b_first, column0 + 4u * b_x@s, p + DEPTH + b_p@s, end);
#end
        }
        // A count that the compiler knows is unrolled; with LOOSE it does not know it.
        let count = select(DEPTH, min(DEPTH, end - p), LOOSE == 1u);
        for (var d = 0u; d < count; d++) {
#unroll i ROWS
            let a@i = a_tile[place(d, y + WG_Y * @iu, DOWN)];
#end
#unroll j COLUMNS
            let b@j = b_tile[place(d, x + WG_X * @ju, ACROSS)];
#unroll i ROWS
#unroll c 4
            sum@i_@c_@j = fma(vec4<f32>(a@i[@c]), b@j, sum@i_@c_@j);
#end
#end
#end
        }
        workgroupBarrier();
    }
#unroll i ROWS
#unroll c 4
#unroll j COLUMNS
    finish(c_first, row0 + 4u * (y + WG_Y * @iu) + @cu, column0 + 4u * (x + WG_X * @ju), sum@i_@c_@j);
#end
#end
#end
}
