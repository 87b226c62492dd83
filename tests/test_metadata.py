"""Schedules: checked against a planner in plain Python, and by walking them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashmla
from jax_flashmla import _planning
from jax_flashmla.metadata import get_mla_metadata
from jax_flashmla.reference import scheduler

BLOCK = 64
INT32_MAX = 2**31 - 1

ROW_TILES = 2  # of 64 rows, for 128 heads
# Few sizes, since each is compiled; lengths are values and vary freely.
BATCHES = st.sampled_from([0, 1, 3, 33])
PARTS = st.sampled_from([1, 3, 13, 132])
LENGTHS = st.one_of(
    st.integers(-3, 200),
    st.integers(0, 20_000),
    st.sampled_from([0, 63, 64, 65, 1023, 1024, 1025, 131072, INT32_MAX, -(2**31)]),
)


def ceil(a, b):
    return -(-a // b)


def blocks_of(length):
    return ceil(max(length, 0), BLOCK)


def piece_blocks(blocks):
    return max(8, ceil(blocks, 16))


def least_even_piece(total, row_tiles):
    least = 1
    while (2 * least) ** 2 <= min(total, 2**24) * min(row_tiles, 32) // 32:
        least *= 2
    return least


def plan(blocks, parts, batch_invariant, row_tiles):
    """Boundaries and pieces by walking along the requests, in Python's integers."""
    b = len(blocks)
    blocks = [min(n, max(2**30 // max(b, 1) - 2, 1)) for n in blocks]
    costs = [n + 2 for n in blocks]
    payload = max(ceil(sum(costs), parts), 2)
    boundaries, whole = [], []
    for p in range(parts):
        position, request = p * payload, 0
        while request < b and position >= costs[request]:
            position -= costs[request]
            request += 1
        whole.append(request)
        unit = max(position - 2, 0) if request < b else 0
        if batch_invariant and request < b:
            unit //= piece_blocks(blocks[request])
        boundaries.append((request, unit))
    boundaries.append((b, 0))
    whole.append(b)
    most = max(sum(costs[i:j]) for i, j in zip(whole, whole[1:], strict=False))
    slack = min(2 + min(sum(blocks), parts) * row_tiles // 32, 5)
    if most <= payload + slack and not batch_invariant:
        boundaries = [(request, 0) for request in whole]
    elif not batch_invariant and b <= parts <= 1024:
        least = least_even_piece(sum(blocks), row_tiles)
        for size in range(max(least, ceil(sum(blocks), parts)), max(least, payload + 1) + 1):
            starts = [(r, u) for r, n in enumerate(blocks) for u in range(0, n, size)]
            if len(starts) <= parts:
                starts += [(b, 0)] * (parts + 1 - len(starts))
                boundaries = [(0, 0), *starts[1:]]
                break
    if batch_invariant:
        pieces = [max(ceil(n, piece_blocks(n)), 1) for n in blocks]
    else:
        pieces = [1 + sum(r == i and u > 0 for r, u in boundaries) for i in range(b)]
    return boundaries, pieces


def schedule(lengths, parts, batch_invariant=False, **kwargs):
    rows, splits = get_mla_metadata(
        jnp.asarray(lengths, jnp.int32).reshape(-1),
        128,
        1,
        num_sm_parts=parts,
        batch_invariant=batch_invariant,
        **kwargs,
    )
    return np.asarray(rows), np.asarray(splits)


def walk(rows, lengths, batch_invariant):
    """What each part works on, with the lengths that requests have: (request, block) -> part."""
    b = len(lengths)
    done = []
    for part, row in enumerate(rows.tolist()):
        begin, end = tuple(row[:2]), tuple(row[2:4])
        for request in range(begin[0], min(end[0], b - 1) + 1):
            blocks = blocks_of(lengths[request])
            size = piece_blocks(blocks) if batch_invariant else 1
            first = begin[1] if request == begin[0] else 0
            last = end[1] if request == end[0] else ceil(blocks, size)
            for block in range(first * size, min(last * size, blocks)):
                done.append((request, block, part))
    return done


def every_block(lengths):
    return [(r, block) for r, n in enumerate(lengths) for block in range(blocks_of(n))]


# ------------------------------------------------------------------ the plan


@given(data=st.data(), b=BATCHES, parts=PARTS, batch_invariant=st.booleans())
@settings(max_examples=120, deadline=None)
def test_dense_schedule_is_the_planned_one(data, b, parts, batch_invariant):
    lengths = data.draw(st.lists(LENGTHS, min_size=b, max_size=b))
    rows, splits = schedule(lengths, parts, batch_invariant)
    boundaries, pieces = plan([blocks_of(n) for n in lengths], parts, batch_invariant, ROW_TILES)
    assert rows.dtype == splits.dtype == np.int32
    assert [tuple(r) for r in rows[:, :2].tolist()] == boundaries[:-1]
    assert [tuple(r) for r in rows[:, 2:4].tolist()] == boundaries[1:]
    stamp = 0x4D4C4100 | batch_invariant
    assert rows[:, 4:].tolist() == [[b, ROW_TILES, stamp, parts]] * parts
    assert splits.tolist() == [0, *np.cumsum(pieces, dtype=int).tolist()]


@pytest.mark.parametrize(
    "lengths, parts, size",
    [
        ([64 * 64] * 32, 132, 16),  # 4 pieces each; 4 parts have nothing to do
        ([0, 0, 64 * 64, 0, 64 * 64, 0], 13, 11),
        ([1, 64 * 90, 64 * 30], 13, 10),
        ([64 * 256], 132, 4),  # more pieces would cost more to merge than they save
        ([64 * 100], 132, 2),  # 50 pieces
        ([64 * 40], 40, 1),
        ([64 * 8], 132, 1),
        ([64 * 64 * 1024] * 2, 1024, 128),
        ([64 * 64 * 1024] * 2, 1025, None),
    ],
)
def test_few_requests_are_cut_into_even_pieces(lengths, parts, size):
    rows, _ = schedule(lengths, parts)
    done = walk(rows, lengths, False)
    assert sorted((request, block) for request, block, _ in done) == every_block(lengths)
    pieces = {}
    for request, _, part in done:
        pieces[request, part] = pieces.get((request, part), 0) + 1
    alone = len({part for _, part in pieces}) == len(pieces)
    assert alone == (size is not None)
    if alone:
        assert max(pieces.values()) == size
        last = {request: part for request, part in sorted(pieces)}
        assert all(n == size or last[request] == part for (request, part), n in pieces.items())


@given(
    data=st.data(),
    b=st.sampled_from([0, 3]),
    topk=st.sampled_from([0, 64, 2050]),
    extra_topk=st.sampled_from([None, 100]),
    given_lengths=st.sampled_from(["none", "first", "both"]),
    batch_invariant=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_sparse_schedule_is_the_planned_one(
    data, b, topk, extra_topk, given_lengths, batch_invariant
):
    lengths = st.lists(st.one_of(st.integers(-2, 3000), LENGTHS), min_size=b, max_size=b)
    selected, extra = [topk] * b, [extra_topk or 0] * b
    arrays = {}
    if given_lengths != "none":
        selected = data.draw(lengths)
        arrays["topk_length"] = jnp.array(selected, jnp.int32)
    if given_lengths == "both" and extra_topk is not None:
        extra = data.draw(lengths)
        arrays["extra_topk_length"] = jnp.array(extra, jnp.int32)
    rows, splits = get_mla_metadata(
        None,
        2 * 128,
        1,
        128,
        topk=topk,
        batch_size=b,
        extra_topk=extra_topk,
        batch_invariant=batch_invariant,
        num_sm_parts=7,
        **arrays,
    )
    blocks = [
        blocks_of(min(n, topk)) + blocks_of(min(e, extra_topk or 0))
        for n, e in zip(selected, extra, strict=True)
    ]
    boundaries, pieces = plan(blocks, 7, batch_invariant, row_tiles=4)
    assert [tuple(r) for r in np.asarray(rows)[:, :2].tolist()] == boundaries[:-1]
    # Two query tokens of 128 heads: two tiles of 64 rows each.
    assert np.asarray(rows)[0, 4:].tolist() == [b, 4, 0x4D4C4102 | batch_invariant, 7]
    assert np.asarray(splits).tolist() == [0, *np.cumsum(pieces, dtype=int).tolist()]


# ------------------------------------------------------------------ walking it


@given(data=st.data(), b=BATCHES, parts=PARTS, batch_invariant=st.booleans())
@settings(max_examples=80, deadline=None)
def test_each_block_is_covered_once_whatever_the_lengths_are_now(data, b, parts, batch_invariant):
    length = st.one_of(st.integers(-2, 300), st.integers(0, 10_000))
    planned = data.draw(st.lists(length, min_size=b, max_size=b))
    stale = data.draw(st.lists(length, min_size=b, max_size=b))
    rows, splits = schedule(planned, parts, batch_invariant)
    for lengths in (planned, stale):
        done = walk(rows, lengths, batch_invariant)
        # In order of the parts, which thus take consecutive runs of the blocks.
        assert [d[:2] for d in done] == every_block(lengths)
        for request, length in enumerate(lengths):
            if batch_invariant:  # a piece is never cut
                size = piece_blocks(blocks_of(length))
                owners = {(d[1] // size, d[2]) for d in done if d[0] == request}
                assert len(owners) == ceil(blocks_of(length), size)
            else:  # pieces are consecutive
                used = sorted({d[2] for d in done if d[0] == request})
                assert used == list(range(used[0], used[-1] + 1) if used else [])
    if not batch_invariant:
        done = walk(rows, planned, False)
        pieces = [max(len({d[2] for d in done if d[0] == r}), 1) for r in range(b)]
        assert np.diff(splits).tolist() == pieces


@given(data=st.data(), b=st.sampled_from([1, 33]), parts=PARTS)
@settings(max_examples=40, deadline=None)
def test_no_part_has_more_than_its_share(data, b, parts):
    lengths = data.draw(st.lists(st.integers(0, 20_000), min_size=b, max_size=b))
    rows, _ = schedule(lengths, parts)
    share = max(ceil(sum(blocks_of(n) + 2 for n in lengths), parts), 2)
    work = np.bincount([d[2] for d in walk(rows, lengths, False)], minlength=parts)
    # A little more is allowed where no request is cut, and for pieces that would else be too many.
    cut = bool(np.asarray(rows)[:, 1].any())
    least = least_even_piece(sum(map(blocks_of, lengths)), ROW_TILES)
    assert work.max() <= (max(share + 1, least) if cut else share + 5)


@given(data=st.data(), length=LENGTHS.filter(lambda n: n < 2**28), b=st.sampled_from([3]))
@settings(max_examples=40, deadline=None)
def test_batch_invariant_pieces_follow_from_the_length_alone(data, length, b):
    """The number of pieces is the same alone and in any batch; boundaries never cut a piece."""
    rest = data.draw(st.lists(st.integers(0, 200_000), min_size=b - 1, max_size=b - 1))
    place = data.draw(st.integers(0, b - 1))
    lengths = [*rest[:place], length, *rest[place:]]
    _, alone = schedule([length], 132, True)
    for parts in (3, 132):
        rows, splits = schedule(lengths, parts, True)
        assert np.diff(splits)[place] == alone[1]
        inside = [unit for request, unit in rows[:, :2].tolist() if request == place]
        assert all(unit < alone[1] for unit in inside)
    assert 1 <= alone[1] <= 16


def test_single_part_cuts_nothing():
    rows, splits = schedule([100, 0, 100_000], 1)
    assert rows[0, :4].tolist() == [0, 0, 3, 0]
    assert splits.tolist() == [0, 1, 2, 3]


def test_empty_batch():
    rows, splits = schedule([], 3)
    assert rows[:, :4].tolist() == [[0, 0, 0, 0]] * 3
    assert splits.tolist() == [0]


# ------------------------------------------------------------------ is_valid


def valid(rows, splits, **kwargs):
    parameters = {"batch_size": 4, "row_tiles": 2, "batch_invariant": False, "sparse": False}
    return bool(scheduler.is_valid(jnp.asarray(rows), jnp.asarray(splits), **parameters | kwargs))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_is_valid_knows_its_own_and_refuses_foreign_schedules(batch_invariant):
    rows, splits = schedule([5000, 0, 70, 90_000], 13, batch_invariant)
    assert valid(rows, splits, batch_invariant=batch_invariant)
    assert not valid(rows, splits, batch_invariant=not batch_invariant)
    assert not valid(rows, splits, batch_invariant=batch_invariant, row_tiles=3)
    assert not valid(rows, splits, batch_invariant=batch_invariant, sparse=True)
    assert not valid(rows[:-1], splits, batch_invariant=batch_invariant)
    other, _ = schedule([5000, 0, 70], 13, batch_invariant)
    assert not valid(other, splits, batch_invariant=batch_invariant)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_is_valid_refuses_corrupt_schedules(batch_invariant):
    rows, splits = schedule([5000, 0, 70, 90_000], 13, batch_invariant)
    changed = []
    for index in np.ndindex(rows.shape):
        for change in (-1, 1, 1 << 20):
            copy = rows.copy()
            copy[index] += change
            changed.append((copy, splits))
    swapped = rows.copy()
    swapped[[2, 5]] = swapped[[5, 2]]
    changed += [(swapped, splits), (rows * 0, splits), (rows, splits * 0), (rows, splits + 1)]
    check = jax.jit(
        jax.vmap(
            lambda r, s: scheduler.is_valid(
                r, s, batch_size=4, row_tiles=2, batch_invariant=batch_invariant, sparse=False
            )
        )
    )
    found = check(*(np.stack(x) for x in zip(*changed, strict=True)))
    assert not found.any()


# ------------------------------------------------------------------ the function


def test_without_arguments():
    assert get_mla_metadata() == (None, None)
    assert jax_flashmla.get_mla_metadata is get_mla_metadata


def test_cache_seqlens_gives_the_batch_of_a_sparse_schedule_and_nothing_else():
    one = get_mla_metadata(jnp.array([1, 2, 3]), 64, 1, 64, topk=512, num_sm_parts=4)
    two = get_mla_metadata(None, 64, 1, 64, topk=512, num_sm_parts=4, batch_size=3)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_default_number_of_parts():
    count = 100
    assert _planning.default_num_sm_parts(2, count) == 50
    assert _planning.default_num_sm_parts(3, count) == 33
    assert _planning.default_num_sm_parts(101, count) == 1
    assert _planning.default_num_sm_parts(0, count) == 100
    # rows of one KV head share tiles of 64; sparse query tokens do not.
    assert _planning.dense_row_tiles(2, 3 * 16) == 2
    assert _planning.dense_row_tiles(1, 65) == 2
    assert _planning.sparse_row_tiles(1, 128, 3) == 6
    assert _planning.sparse_row_tiles(1, 8, 3) == 3
    lengths = jnp.array([10, 20], jnp.int32)
    rows, _ = get_mla_metadata(lengths, 4 * 128, 1)
    assert rows.shape == (_planning.default_num_sm_parts(8), 8)
    rows, _ = get_mla_metadata(lengths, 4 * 128, 1, 128, topk=64)
    assert rows.shape == (_planning.default_num_sm_parts(8), 8)


def test_no_query_tokens():
    rows, _ = get_mla_metadata(jnp.array([10, 20], jnp.int32), 0, 1)
    assert rows.shape == (_planning.default_num_sm_parts(0), 8) and (rows[:, 5] == 0).all()


GOOD = {"cache_seqlens": jnp.zeros(3, jnp.int32), "num_q_tokens_per_head_k": 128, "num_heads_k": 1}
SPARSE = {"num_q_tokens_per_head_k": 128, "num_heads_k": 1, "num_heads_q": 128, "topk": 64}
BAD = {
    "no cache_seqlens": (GOOD | {"cache_seqlens": None}, "'cache_seqlens' is missing"),
    "no rows": (GOOD | {"num_q_tokens_per_head_k": None}, "'num_q_tokens_per_head_k' is missing"),
    "no heads": (GOOD | {"num_heads_k": None}, "'num_heads_k' is missing"),
    "only a flag": ({"batch_invariant": True}, "'num_q_tokens_per_head_k' is missing"),
    "rank": (GOOD | {"cache_seqlens": jnp.zeros((3, 1), jnp.int32)}, r"\(3, 1\).*\(b,\)"),
    "dtype": (GOOD | {"cache_seqlens": jnp.zeros(3)}, "dtype float32; expected int32"),
    "list": (GOOD | {"cache_seqlens": [1, 2]}, "'cache_seqlens' is a list"),
    "negative": (GOOD | {"num_q_tokens_per_head_k": -1}, "is -1; expected an integer >= 0"),
    "zero heads": (GOOD | {"num_heads_k": 0}, "is 0; expected an integer >= 1"),
    "float": (GOOD | {"num_heads_k": 1.0}, "'num_heads_k' is 1.0 of type float"),
    "heads": (GOOD | {"num_heads_k": 3, "num_heads_q": 8}, "'num_heads_q' is 8.*num_heads_k=3"),
    "rows": (GOOD | {"num_heads_q": 48}, "'num_q_tokens_per_head_k' is 128.*multiple of.*48"),
    "parts": (GOOD | {"num_sm_parts": 0}, "'num_sm_parts' is 0"),
    "fp8": (GOOD | {"is_fp8_kvcache": 1}, "'is_fp8_kvcache' is 1"),
    "invariant": (GOOD | {"batch_invariant": None}, "'batch_invariant' is None"),
    "implementation": (GOOD | {"implementation": "gpu"}, "'implementation' is 'gpu'"),
    "batch": (GOOD | {"batch_size": 4}, r"'cache_seqlens' has shape \(3,\); expected \(4,\)"),
    "topk_length": (GOOD | {"topk_length": jnp.zeros(3, jnp.int32)}, "'topk_length'.*without"),
    "extra": (GOOD | {"extra_topk": 3}, "'extra_topk' is given without 'topk'"),
    "sparse batch": (SPARSE, "'batch_size' is missing"),
    "sparse heads": (SPARSE | {"num_heads_q": None, "batch_size": 1}, "'num_heads_q' is missing"),
    "topk": (SPARSE | {"topk": -1, "batch_size": 1}, "'topk' is -1"),
    "topk type": (SPARSE | {"topk": True, "batch_size": 1}, "'topk' is True"),
    "extra length": (
        SPARSE | {"extra_topk_length": jnp.zeros(3, jnp.int32)},
        "'extra_topk' is missing",
    ),
    "lengths": (
        SPARSE | {"topk_length": jnp.zeros(3, jnp.int32), "batch_size": 2},
        r"'topk_length' has shape \(3,\); expected \(2,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=f"get_mla_metadata: argument .*{message.lstrip()}"):
        get_mla_metadata(**kwargs)


# ------------------------------------------------------------------ transformations


def plan_of(lengths):
    return get_mla_metadata(lengths, 256, 2, num_sm_parts=5)


RAGGED = np.array([[100, 5000, 0], [70_000, 1, 64], [0, 0, 0], [3, 3, 3]], np.int32)


def test_jit_aot_and_eval_shape():
    lengths = jnp.array(RAGGED[0])
    want = plan_of(lengths)
    shapes = jax.eval_shape(plan_of, lengths)
    assert [(s.shape, s.dtype) for s in shapes] == [((5, 8), jnp.int32), ((4,), jnp.int32)]
    for function in (jax.jit(plan_of), jax.jit(plan_of).lower(lengths).compile()):
        jax.tree.map(np.testing.assert_array_equal, function(lengths), want)
    # Without any array: planned when the step is compiled.
    static = jax.jit(lambda: get_mla_metadata(None, 8, 1, 8, topk=64, batch_size=2))()
    jax.tree.map(
        np.testing.assert_array_equal,
        static,
        get_mla_metadata(None, 8, 1, 8, topk=64, batch_size=2),
    )


def test_vmap_plans_each_batch():
    got = jax.vmap(plan_of)(RAGGED)
    nested = jax.jit(jax.vmap(jax.vmap(plan_of)))(RAGGED.reshape(2, 2, 3))
    for i, lengths in enumerate(RAGGED):
        want = plan_of(jnp.array(lengths))
        for j in range(2):
            np.testing.assert_array_equal(got[j][i], want[j])
            np.testing.assert_array_equal(nested[j][i // 2, i % 2], want[j])


def test_export():
    exported = jax.export.export(jax.jit(plan_of), platforms=("cpu",))(jnp.array(RAGGED[1]))
    loaded = jax.export.deserialize(exported.serialize())
    for lengths in RAGGED:
        jax.tree.map(np.testing.assert_array_equal, loaded.call(lengths), plan_of(lengths))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_lengths(kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices("cpu")[:4])
    lengths = np.array([100, 5000, 0, 70_000, 1, 64, 0, 3], np.int32)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(lengths, NamedSharding(mesh, P("x")))
        for function in (plan_of, jax.jit(plan_of)):
            got = function(sharded)
            jax.tree.map(np.testing.assert_array_equal, got, plan_of(lengths))


def test_shard_map_plans_for_each_device():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:4])
    mapped = jax.shard_map(
        lambda lengths: jax.tree.map(lambda x: x[None], plan_of(lengths[0])),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
    )
    got = mapped(RAGGED)
    for i, lengths in enumerate(RAGGED):
        want = plan_of(jnp.array(lengths))
        jax.tree.map(np.testing.assert_array_equal, tuple(g[i] for g in got), want)


def test_explain():
    found = jax_flashmla.explain("get_mla_metadata", jnp.zeros(3, jnp.int32), 128, 1)
    assert [o.operation for o in found.operations] == ["flash_mla_metadata"]
    assert jax_flashmla.explain(get_mla_metadata).operations == ()
    with pytest.raises(ValueError, match="explain: argument 'op'.*get_mla_metadata"):
        jax_flashmla.explain("flash_attention")
    with pytest.raises(ValueError, match="explain: argument 'op'"):
        jax_flashmla.explain(lambda: None)
    with pytest.raises(ValueError, match="get_mla_metadata: argument 'num_heads_k' is missing"):
        jax_flashmla.explain("get_mla_metadata", jnp.zeros(3, jnp.int32), 128)
