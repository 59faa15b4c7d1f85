// $out@l_@i, for each of an invocation's four rows of $x: its product with row 4 l + i of $r, over ascending d.
#unroll l LANES
#unroll i 4
        var $out@l_@i = vec4<f32>(0.0);
#end
#end
        // Not D, which the compiler knows: it would unroll this, and take minutes for a head of 256.
        for (var d = 0u; d < numbers.head_dim; d += 4u) {
#unroll i 4
            let r@i = part_$r($r_at@i, d);
            let x@i = part_$x($x_at@i, d);
#end
#unroll q 4
            let x_@q = vec4<f32>(x0[@q], x1[@q], x2[@q], x3[@q]);
#unroll l LANES
#unroll i 4
            $out@l_@i = fma(vec4<f32>(subgroupBroadcast(r@i[@q], @lu)), x_@q, $out@l_@i);
#end
#end
#end
        }
