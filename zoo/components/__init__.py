"""Parts that architectures share. They take values and modules, never an architecture's name.

Docstrings write shapes with these letters:

    b  batch                     d  residual width (`dim`)
    s  query position            e  head width (`head_dim`)
    t  key position              f  MLP width (`hidden`)
    h  query heads               v  vocabulary
    g  key and value heads       x  experts
    r  queries per key head      p  relative position

So q is (b, h, s, e), k and v are (b, g, t, e) with h = g · r, and scores are (b, h, s, t).
Without a cache s and t are the same tokens. A mask is True where a query may attend to a key.
"""
