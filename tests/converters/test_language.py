"""The mapping language: every layout in the wild, against what it means by hand."""

import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.language import (
    Pattern,
    Template,
    Transform,
    parse_name,
    parse_ref,
    parse_rule,
    solve,
)
from converters.lazy import Decoded
from zoo.errors import SpecError

G, R, E, D, F = 2, 3, 5, 7, 11  # key heads, queries per key head, head width, width, hidden
H = G * R


def arrays(*shapes):
    """Distinct values everywhere, so that any wrong permutation shows."""
    start, out = 0, []
    for shape in shapes:
        count = torch.Size(shape).numel()
        out.append(torch.arange(start, start + count).reshape(shape))
        start += count
    return out


def heads_first(x, heads):
    """(heads * e, …) -> (heads, e, …), by indexing alone."""
    return torch.stack(list(x.chunk(heads, dim=0)))


def interleave(x, heads):
    """Rows in Meta's rotary order from rows in halves: pair (k, k + e/2) becomes (2k, 2k + 1)."""
    rows = []
    for head in x.chunk(heads, dim=0):
        low, high = head.chunk(2, dim=0)
        for a, b in zip(low, high, strict=True):
            rows += [a, b]
    return torch.stack(rows)


def falcon(q, k, v):
    """Per key head: its queries, its key, its value."""
    blocks = zip(q.chunk(G), k.chunk(G), v.chunk(G), strict=True)
    return torch.cat([part for block in blocks for part in block])


def neox(q, k, v):
    """Per head: its q rows, k rows, v rows."""
    blocks = zip(q.chunk(H), k.chunk(H), v.chunk(H), strict=True)
    return torch.cat([part for block in blocks for part in block])


def layouts():
    """name -> (rule, sizes, sources by hand, targets)"""
    q, k, v = arrays((H * E, D), (G * E, D), (G * E, D))
    qf, kf, vf = arrays((H * E, D), (H * E, D), (H * E, D))
    gate, up = arrays((F, D), (F, D))
    bq, bk, bv = arrays((H * E,), (H * E,), (H * E,))
    even = 4  # an even head width, for rotary
    (rq,) = arrays((H * even, D))
    (rk,) = arrays((G * even, D))
    (rb,) = arrays((G * even,))
    experts = arrays(*[(F, D)] * 3)
    wide = {"h": H, "g": G, "r": R, "e": E, "i": D, "two": 2, "three": 3, "one": 1}
    yield (
        "gpt2 conv1d",
        "c_attn.weight [i (n o)]",
        "{n=q,k,v} [o i]",
        {"n": 3, "o": H * E, "i": D},
        [torch.cat([qf.T, kf.T, vf.T], dim=1)],
        [qf, kf, vf],
    )
    yield (
        "gpt2 bias",
        "c_attn.bias [(n o)]",
        "{n=q,k,v} [o]",
        {"n": 3, "o": H * E},
        [torch.cat([bq, bk, bv])],
        [bq, bk, bv],
    )
    yield (
        "neox and bloom",
        "qkv [(h n e) i]",
        "{n=q,k,v} [(h e) i]",
        {**wide, "n": 3},
        [neox(qf, kf, vf)],
        [qf, kf, vf],
    )
    yield (
        "neox bias",
        "qkv [(h n e)]",
        "{n=q,k,v} [(h e)]",
        {**wide, "n": 3},
        [neox(bq, bk, bv)],
        [bq, bk, bv],
    )
    yield (
        "falcon 7b multi-query",
        "qkv [(q|k|v) i]",
        ["q [q i]", "k [k i]", "v [v i]"],
        {"q": H * E, "k": G * E, "v": G * E, "i": D},
        [torch.cat([q, k, v])],
        [q, k, v],
    )
    yield (
        "falcon new decoder, internlm2",
        "qkv [(g (r|one|one) e) i]",
        ["q [(g r e) i]", "k [(g e) i]", "v [(g e) i]"],
        wide,
        [falcon(q, k, v)],
        [q, k, v],
    )
    yield (
        "phi-3 gate_up",
        "gate_up [(n f) i]",
        "{n=gate,up} [f i]",
        {"n": 2, "f": F, "i": D},
        [torch.cat([gate, up])],
        [gate, up],
    )
    yield (
        "mpt Wqkv",
        "Wqkv [(n o) i]",
        "{n=q,k,v} [o i]",
        {"n": 3, "o": H * E, "i": D},
        [torch.cat([qf, kf, vf])],
        [qf, kf, vf],
    )
    yield (
        "gpt-oss interleaved gate and up",
        "gate_up [x i (f n)]",
        "{n=gate,up} [x f i]",
        {"n": 2, "f": F, "i": D, "x": 3},
        [
            torch.stack(
                [torch.stack([gate.T, up.T], dim=-1).reshape(D, -1)] * 3,
            )
        ],
        [torch.stack([gate] * 3), torch.stack([up] * 3)],
    )
    yield (
        "meta rotary, query heads",
        "wq [(h e two) i]",
        "q [(h two e) i]",
        {**wide, "e": even // 2},
        [interleave(rq, H)],
        [rq],
    )
    yield (
        "meta rotary, key heads",
        "wk [(g e two) i]",
        "k [(g two e) i]",
        {**wide, "e": even // 2},
        [interleave(rk, G)],
        [rk],
    )
    yield (
        "meta rotary bias",
        "wk [(g e two)]",
        "k [(g two e)]",
        {**wide, "e": even // 2},
        [interleave(rb, G)],
        [rb],
    )
    (partial,) = arrays((G * (even + 3), D))
    turned = torch.cat(
        [torch.cat([interleave(head[:even], 1), head[even:]]) for head in partial.chunk(G)]
    )
    yield (
        "partial rotary: only the rotary slice",
        "wk [(g ((e two) | p)) i]",
        "k [(g ((two e) | p)) i]",
        {**wide, "e": even // 2, "p": 3},
        [turned],
        [partial],
    )
    yield (
        "mixtral experts stack",
        "experts.{expert}.w1 [f d]",
        "gate [expert f d]",
        {"expert": 3, "f": F, "d": D},
        experts,
        [torch.stack(experts)],
    )
    yield (
        "llama2.c keeps all layers in one array",
        "wq [layer (h e two) i]",
        "blocks.{layer}.q [(h two e) i]",
        {**wide, "e": even // 2, "layer": 3},
        [torch.stack([interleave(rq + n, H) for n in range(3)])],
        [rq + n for n in range(3)],
    )
    yield (
        "model-parallel shards on the output axis",
        "{shard}/wq [o i]",
        "q [(shard o) i]",
        {"shard": 2, "o": H * E // 2, "i": D},
        list(q.chunk(2)),
        [q],
    )
    yield (
        "model-parallel shards on the input axis",
        "{shard}/wo [o i]",
        "out [o (shard i)]",
        {"shard": 2, "o": 4, "i": 3},
        [torch.arange(12).reshape(4, 3), torch.arange(12, 24).reshape(4, 3)],
        [
            torch.cat(
                [torch.arange(12).reshape(4, 3), torch.arange(12, 24).reshape(4, 3)],
                dim=1,
            )
        ],
    )
    joined, alone = torch.arange(12).reshape(3, 4), torch.arange(12, 17)
    yield (
        "a vector whose parts are a matrix and a vector",
        "b [(r e | k)]",
        ["x [r e]", "y [k]"],
        {"r": 3, "e": 4, "k": 5},
        [torch.cat([joined.flatten(), alone])],
        [joined, alone],
    )
    yield (
        "tensorflow kernels with a leading 1",
        "model/h0/attn/c_attn/w [1 i (n o)]",
        "{n=q,k,v} [o i]",
        {"n": 3, "o": H * E, "i": D},
        [torch.cat([qf.T, kf.T, vf.T], dim=1)[None]],
        [qf, kf, vf],
    )


LAYOUTS = {name: rest for name, *rest in layouts()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_means_what_it_means_by_hand(name):
    source, target, sizes, sources, targets = LAYOUTS[name]
    transform = Transform(parse_rule(source, target), tuple(sizes.items()))
    assert transform.source_shape() == tuple(sources[0].shape)
    there = transform.forward(sources)
    assert len(there) == len(targets)
    for mine, truth in zip(there, targets, strict=True):
        assert torch.equal(mine, truth)
    back = transform.backward(targets)
    assert len(back) == len(sources)
    for mine, truth in zip(back, sources, strict=True):
        assert torch.equal(mine, truth)
    for lazy, truth in zip(transform.targets_of(sources), targets, strict=True):
        in_pieces(lazy, truth)
    for lazy, truth in zip(transform.sources_of(targets), sources, strict=True):
        in_pieces(lazy, truth)
    for lazy, truth in zip(transform.targets_of(decoded(sources)), targets, strict=True):
        in_pieces(lazy, truth)
    for lazy, truth in zip(transform.sources_of(decoded(targets)), sources, strict=True):
        in_pieces(lazy, truth)
    twice = transform.sources_of(transform.targets_of(decoded(sources)))
    for lazy, truth in zip(twice, sources, strict=True):
        in_pieces(lazy, truth)


def decoded(tensors):
    """The same numbers, to be had in boxes of rows and columns alone."""
    matrices = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return [
        Decoded(t.shape, t.dtype, lambda rows, columns, m=m: m[rows, columns])
        for t, m in zip(tensors, matrices, strict=True)
    ]


def in_pieces(lazy, truth):
    """Of any size, one behind the other, they are the whole; and none is larger than was asked."""
    for limit in (1, 3 * truth.element_size(), 64, 10**9):
        pieces = list(lazy.pieces(limit))
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), truth.flatten())
        width = max(limit, truth.element_size())
        assert all(piece.numel() * piece.element_size() <= width for piece in pieces)


def test_what_is_decoded_is_what_is_looked_at():
    """Heads whose queries lie far apart are read one by one, and those that lie close together."""
    asked = []

    def read(rows, columns):
        asked.append((rows.stop - rows.start, columns.stop - columns.start))
        return qkv[rows, columns]

    h, e, i = 4, 8, 6
    qkv = torch.arange(h * 3 * e * i).reshape(h * 3 * e, i)
    rule = parse_rule("qkv [(h n e) i]", "{n=q,k,v} [(h e) i]")
    cut = Transform(rule, (("h", h), ("n", 3), ("e", e), ("i", i)))
    (q, *_) = cut.targets_of([Decoded(qkv.shape, qkv.dtype, read)])
    assert torch.equal(q.whole(), qkv.reshape(h, 3, e, i)[:, 0].reshape(h * e, i))
    assert asked == [(e, i)] * h
    asked.clear()
    rule = parse_rule("q [(h e two) i]", "p [(h two e) i]")
    turn = Transform(rule, (("h", 3 * h), ("two", 2), ("e", e // 2), ("i", i)))
    (p,) = turn.targets_of([Decoded(qkv.shape, qkv.dtype, read)])
    pieces = list(p.pieces(e // 2 * i * qkv.element_size()))  # half a head
    assert len(pieces) == len(asked) == 3 * h * 2 and set(asked) == {(e - 1, i)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_sizes_are_solved_from_shapes(name):
    """Every axis but head counts and the rotary share follows from the shapes on both sides."""
    source, target, sizes, sources, targets = LAYOUTS[name]
    rule = parse_rule(source, target)
    given_axes = {"h", "g", "p", "two", "one", "three", "n", "shard", "layer", "expert"}
    solved = {a: n for a, n in sizes.items() if a in given_axes}
    refs = rule.targets if len(rule.targets) > 1 else rule.targets * len(targets)
    for _ in range(2):
        for ref, array in zip(refs, targets, strict=True):
            assert solve(ref.pattern, array.shape, solved) is None
        assert solve(rule.source.pattern, sources[0].shape, solved) is None
    used = rule.source.pattern.axes - {"1"}
    assert {a: solved[a] for a in used} == {a: sizes[a] for a in used}


def test_key_heads_are_not_query_heads():
    """Width 8 and 8/2 heads is where a wrong head count is the identity; here it shows."""
    (k,) = arrays((G * 4, D))
    right = Transform(parse_rule("wk [(g e two) i]", "k [(g two e) i]"), _sizes(g=G, e=2, i=D))
    wrong = Transform(parse_rule("wk [(h e two) i]", "k [(h two e) i]"), _sizes(h=1, e=4, i=D))
    assert not torch.equal(right.forward([k])[0], wrong.forward([k])[0])


def _sizes(**sizes):
    return tuple({**sizes, "two": 2}.items())


def test_views_are_views():
    """A transpose and a cut cost no memory."""
    x = torch.randn(4, 15)
    transform = Transform(
        parse_rule("w [i (n o)]", "{n=q,k,v} [o i]"), tuple({"n": 3, "i": 4, "o": 5}.items())
    )
    for part in transform.forward([x]):
        assert part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


# --- properties ----------------------------------------------------------------------------------


@st.composite
def random_rules(draw):
    """A random bijection between two groupings of the same axes, with stacks and cuts."""
    names = [f"a{n}" for n in range(draw(st.integers(2, 5)))]
    sizes = {name: draw(st.integers(1, 4)) for name in names}
    loose = draw(st.sampled_from(["none", "stack", "spread"]))
    inside = names[1:] if loose == "stack" else names
    left = _grouped(draw, draw(st.permutations(inside)))
    right_names = names[1:] if loose == "spread" else names
    right = _grouped(draw, draw(st.permutations(right_names)))
    source = "s.{a0}.w" if loose == "stack" else "s.w"
    target = "t.{a0}.w" if loose == "spread" else "t.w"
    return f"{source} [{left}]", f"{target} [{right}]", sizes


def _grouped(draw, names):
    words, rest = [], list(names)
    while rest:
        take = draw(st.integers(1, len(rest)))
        words.append(rest[0] if take == 1 else f"({' '.join(rest[:take])})")
        rest = rest[take:]
    return " ".join(words)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_rules())
def test_forward_then_backward_is_the_identity(case):
    source, target, sizes = case
    rule = parse_rule(source, target)
    transform = Transform(rule, tuple(sizes.items()))
    count = sizes["a0"] if rule.stacked else 1
    shape = transform.source_shape()
    total = torch.Size(shape).numel()
    sources = [torch.arange(n * total, (n + 1) * total).reshape(shape) for n in range(count)]
    targets = transform.forward(sources)
    back = transform.backward(targets)
    assert [torch.equal(a, b) for a, b in zip(back, sources, strict=True)] == [True] * count
    for lazy, target in zip(transform.targets_of(sources), targets, strict=True):
        in_pieces(lazy, target)
    for lazy, target in zip(transform.targets_of(decoded(sources)), targets, strict=True):
        in_pieces(lazy, target)
    twice = transform.sources_of(transform.targets_of(decoded(sources)))
    for lazy, source_ in zip(twice, sources, strict=True):
        in_pieces(lazy, source_)
    seen = torch.cat([t.flatten() for t in targets]).sort().values
    assert torch.equal(seen, torch.arange(count * total))  # nothing twice, nothing lost


HOLES = st.sampled_from(["{layer}", "{n=q,k,qk}", "{p}"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(HOLES, st.text("abxy.", min_size=1, max_size=4)), max_size=4), st.data())
def test_match_inverts_format(parts, data):
    used = dict(parts)
    text = "m." + "".join(hole + literal for hole, literal in used.items())
    template = parse_name(text)
    binding = {
        name: data.draw(st.integers(0, len(p.values) - 1 if p.values else 120))
        for name, p in template.placeholders.items()
    }
    name = template.format(binding)
    match = template.match(name)
    assert match is not None
    assert template.format(match) == name


def test_indices_are_numbers_not_strings():
    template = parse_name("h.{layer}.w")
    assert template.match("h.10.w") == {"layer": 10}
    for name in ("h.01.w", "h.1x.w", "h.-1.w", "h..w", "h.١.w", "h.1.w2", "xh.1.w"):
        assert template.match(name) is None


def test_matching_is_linear():
    """A name that would make a backtracking matcher explode takes no longer than its length."""
    template = parse_name("".join(f"{{n{k}=a,aa}}" for k in range(40)) + "b")
    started = time.process_time()
    assert template.match("a" * 4000 + "c") is None
    assert time.process_time() - started < 10


# --- errors point at the column ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "column", "why"),
    [
        ("h.{layer [a]", 3, "never closed"),
        ("h.{layer}.x [i (n o]", 16, "never closed"),
        ("h [i j", 3, "never closed"),
        ("h [i i]", 3, "twice"),
        ("x [a (b|c|) d]", 6, "empty part"),
        ("x [a () d]", 6, "empty group"),
        ("x [(a|b) (c|d)]", 3, "two ragged"),
        ("x [(a|(b|c))]", 4, "inside a ragged"),
        ("{layer}5.x", 8, "digit behind a number"),
        ("{a}{b}.x", 4, "needs a literal"),
        ("x [a b] c", 9, "end of the line"),
        ("x [a $]", 6, "expected an axis"),
        ("x.{n=q,q}", 4, "distinct"),
        ("x.{9}", 4, "no placeholder name"),
        ("x.{n=a,b}.{n=c,d}", 12, "declared twice"),
        ("", 1, "expected a tensor"),
    ],
)
def test_grammar_errors_point_at_the_column(text, column, why):
    with pytest.raises(SpecError) as error:
        parse_ref(text, "specs/x.yaml: hf.weights")
    message = str(error.value)
    assert f"column {column}:" in message and why in message
    *_, shown, caret = message.splitlines()
    assert shown.strip() == text and caret.index("^") == 2 + column - 1


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("x [a b]", "y [a c]", "axis 'b' is on the left alone"),
        ("x", "y.{n=q,k}", "say by axes"),
        ("x.{n=q,k}", "y", "say by axes"),
        ("x.{n=q,k} [a]", "y [a]", "an axis of neither side"),
        ("x.{n=q,k}", "y.{n=q,k,v}", "2 values on the left and 3"),
        ("x.{n=q,k}", "y.{n}", "numbers"),
        ("x [(a|b) i]", ["p [a i]", "q [b i]", "r [b i]"], "2 parts on the left, 3 tensors"),
        ("x [(a|b) i]", ["p [a i]", "q"], "axes in [ ] are missing"),
        ("x [(a|b) i]", "y [(a b) i]", "same number of parts"),
        ("x", [], "expected a tensor's name"),
    ],
)
def test_rules_that_mean_nothing_are_refused(source, target, why):
    with pytest.raises(SpecError) as error:
        parse_rule(source, target, "spec")
    assert why in str(error.value)


def test_rules_read_back_as_written():
    for source, target, *_ in LAYOUTS.values():
        rule = parse_rule(source, target)
        left = parse_ref(str(rule.source))
        assert left == rule.source
        assert all(parse_ref(str(t)) == t for t in rule.targets)
        assert isinstance(left.name, Template) and isinstance(left.pattern, Pattern)


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes", "why"),
    [
        ("x [(h e) i]", (10, 4), {"h": 3}, "10 is not divisible by 3"),
        ("x [a b]", (2, 3, 4), {}, "3 dimensions"),
        ("x [a]", (5,), {"a": 4}, "5 where [a=4] has 4"),
        ("x [(a|b)]", (5,), {"a": 2, "b": 2}, "5 where"),
    ],
)
def test_shapes_that_do_not_fit_say_which_axis(pattern, shape, sizes, why):
    assert why in str(solve(parse_ref(pattern).pattern, shape, sizes))
