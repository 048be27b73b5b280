"""Mistakes that kernels make, as attentions with one thing wrong: what a wrong kernel may be computing instead.

Each module yields `Alternative`s, simplest first; `paged.oracle.explain` compares a kernel with all of them.

    alternative   what they have in common
    conventions   what is no mistake once it is declared
    features      window, softcap, ALiBi and sinks: ignored, or in the wrong place, unit or head
    masks         who sees whom
    heads         which KV head, how many dims, which scale
    quantised     scales of stored numbers
    places        which slots are read: lengths, tables, layouts
    splits        parts of a context, and their merge
"""
