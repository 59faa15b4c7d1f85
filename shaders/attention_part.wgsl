// Elements d .. d + 4 of a row of $x; 0 beyond its end.
fn part_$x(at: u32, d: u32) -> vec4<f32> {
    if (D % 4u == 0u) { return load4_$x(at + select(d, 0u, d >= D)); }
    var out = vec4<f32>(0.0);
#unroll c 4
    if (d + @cu < D) { out[@c] = load_$x(at + d + @cu); }
#end
    return out;
}
