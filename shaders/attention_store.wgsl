    if (d >= D) { return; }
    if (D % 4u == 0u) { store4_$y(at + d, x); return; }
#unroll c 4
    if (d + @cu < D) { store_$y(at + d + @cu, x[@c]); }
#end
