"""Dense decode on XLA against the float64 oracle, and every rule of its edge cases."""

import dataclasses
import functools
import itertools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla import _cuda, quantization
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.decode import dense_operation, flash_mla_with_kvcache
from jax_flashmla.metadata import get_mla_metadata
from jax_flashmla.reference import decode as reference

decode = functools.partial(
    jax.jit(flash_mla_with_kvcache, static_argnames=cases.STATIC), implementation="xla"
)


def run(call, **changes):
    out, lse = decode(**{**call, **changes})
    return np.asarray(out), np.asarray(lse)


check = functools.partial(oracle.check_decode, "dense_decode")


@pytest.mark.parametrize("case", cases.dense_small(), ids=lambda case: case.name)
def test_agrees_with_oracle(case):
    inputs = cases.build(case)
    check(inputs, run(inputs.call()))


@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_agrees_with_oracle_on_any_shape(data):
    draw = data.draw
    b, s_q = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    h_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    d = draw(st.integers(1, 40))
    case = cases.DenseCase(
        "drawn",
        b,
        0,
        h_kv * group,
        s_q,
        h_kv,
        d=d,
        dv=draw(st.integers(1, d)),
        page_size=draw(st.integers(1, 20)),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        causal=draw(st.booleans()),
        lengths=tuple(draw(st.lists(st.integers(0, 70), min_size=b, max_size=b))),
        attn_sink=draw(st.booleans()),
    )
    inputs = cases.build(case, draw(st.integers(0, 100)))
    got = run(inputs.call(), batch_invariant=draw(st.booleans()))
    # A handful of elements is nothing to average over: the bound by element says it all.
    out, lse = inputs.expected()
    tolerance = dataclasses.replace(oracle.TOLERANCES["dense_decode", "out"], cos=1e-4)
    oracle.check("dense_decode", "out", got[0], out, tolerance)
    oracle.check("dense_decode", "lse", got[1], lse)


# ------------------------------------------------------------------ one small problem, many edges

SMALL = cases.DenseCase(
    "edges",
    4,
    0,
    6,
    s_q=3,
    h_kv=2,
    d=24,
    dv=16,
    page_size=4,
    dtype="float32",
    causal=True,
    lengths=(13, 8, 0, 2),
)


@pytest.fixture(scope="module")
def small():
    return cases.build(SMALL)


@pytest.fixture(scope="module")
def clean(small):
    got = run(small.call())
    check(small, got)
    return got


def others_unchanged(got, clean, request):
    keep = np.arange(SMALL.b) != request
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a[keep], b[keep])


def with_value(array, at, value):
    array = array.copy()
    array[at] = value
    return array


def test_small_problem_agrees_with_oracle(clean):
    assert clean[0].shape == (4, 3, 6, 16) and clean[1].shape == (4, 6, 3)
    # Request 2 is empty; of request 3's 2 tokens the first of 3 queries sees nothing.
    assert (clean[0][2] == 0).all() and (clean[1][2] == np.inf).all()
    assert (clean[0][3, 0] == 0).all() and (clean[1][3, :, 0] == np.inf).all()
    assert np.isfinite(clean[1][3, :, 1:]).all()


def test_negative_length_counts_as_zero(small, clean):
    for length in (-1, -(2**31)):
        lengths = with_value(small.cache_seqlens, 0, length)
        got = run(small.call(), cache_seqlens=lengths)
        assert (got[0][0] == 0).all() and (got[1][0] == np.inf).all()
        others_unchanged(got, clean, 0)


def test_length_past_the_table_is_nan(small, clean):
    capacity = small.block_table.shape[1] * SMALL.page_size
    # A full table is no error: all its pages must then be pages.
    table = with_value(small.block_table, (1, slice(None)), small.block_table[1, 0])
    got = run(small.call(), block_table=table, cache_seqlens=with_value(small.cache_seqlens, 1, 20))
    assert capacity == 20 and np.isfinite(got[1][1]).all()
    for length in (capacity + 1, 2**31 - 1):
        lengths = with_value(small.cache_seqlens, 1, length)
        got = run(small.call(), block_table=table, cache_seqlens=lengths)
        assert np.isnan(got[0][1]).all() and np.isnan(got[1][1]).all()
        others_unchanged(got, clean, 1)


@pytest.mark.parametrize("entry", [-1, "pages", cases.GARBAGE, -(2**31), 2**31 - 1])
def test_used_entry_that_is_no_page_is_nan(small, clean, entry):
    pages = small.k_cache.shape[0]
    for column in (0, 3):  # 3 holds the last token, 12, alone
        value = pages if entry == "pages" else entry
        table = with_value(small.block_table, (0, column), value)
        got = run(small.call(), block_table=table)
        assert np.isnan(got[0][0]).all() and np.isnan(got[1][0]).all()
        others_unchanged(got, clean, 0)


@pytest.mark.parametrize("entry", [0, -1, cases.GARBAGE, -(2**31), 2**31 - 1])
def test_entries_past_the_length_are_never_used(small, clean, entry):
    table = small.block_table.copy()
    for r, length in enumerate(small.cache_seqlens):
        table[r, -(-length // SMALL.page_size) :] = entry
    for a, b in zip(run(small.call(), block_table=table), clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_unused_slots_never_leak(small, poison, causal):
    def results(unused):
        cache = np.where(np.isnan(small.k_cache), np.float32(unused), small.k_cache)
        return run(small.call(), k_cache=cache, causal=causal)

    for a, b in zip(results(poison), results(0), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("column", [0, 15, 20])
def test_nan_reaches_only_who_attends(small, clean, column):
    # Token 11 of 13 in request 0: of its 3 query tokens the last two see it. Key head 1 only.
    page = small.block_table[0, 11 // SMALL.page_size]
    at = (page, 11 % SMALL.page_size, 1, column)
    got = run(small.call(), k_cache=with_value(small.k_cache, at, np.nan))
    others_unchanged(got, clean, 0)
    assert np.isnan(got[0][0, 1:, 3:]).all() and np.isnan(got[1][0, 3:, 1:]).all()
    np.testing.assert_array_equal(got[0][0, 0], clean[0][0, 0])
    np.testing.assert_array_equal(got[1][0, :, 0], clean[1][0, :, 0])
    np.testing.assert_array_equal(got[0][0, :, :3], clean[0][0, :, :3])


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_reaches_only_who_attends(small, clean, value):
    page = small.block_table[0, 11 // SMALL.page_size]
    at = (page, 11 % SMALL.page_size, 1, 3)
    got = run(small.call(), k_cache=with_value(small.k_cache, at, value))
    others_unchanged(got, clean, 0)
    assert np.isnan(got[0][0, 1:, 3:]).any(axis=-1).all()
    np.testing.assert_array_equal(got[0][0, 0], clean[0][0, 0])


def test_nan_without_causal(small):
    clean = run(small.call(), causal=False)
    page = small.block_table[0, 0]
    got = run(
        small.call(), causal=False, k_cache=with_value(small.k_cache, (page, 1, 0, 2), np.nan)
    )
    others_unchanged(got, clean, 0)
    assert np.isnan(got[0][0, :, :3]).all() and np.isnan(got[1][0, :3]).all()
    np.testing.assert_array_equal(got[0][0, :, 3:], clean[0][0, :, 3:])


def test_nan_in_q_stays_in_its_row(small, clean):
    got = run(small.call(), q=with_value(small.q, (1, 2, 5, 0), np.nan))
    assert np.isnan(got[0][1, 2, 5]).all() and np.isnan(got[1][1, 5, 2])
    assert np.isnan(got[0]).sum() == 16 and np.isnan(got[1]).sum() == 1
    others_unchanged(got, clean, 1)


def test_attn_sink(small, clean):
    sink = np.array([np.inf, -np.inf, 0, 3, -80, 1000], np.float32)
    inputs = dataclasses.replace(small, attn_sink=sink)
    got = run(inputs.call())
    check(inputs, got)
    np.testing.assert_array_equal(got[1], clean[1])
    assert not np.isnan(got[0]).any()
    assert (got[0][:, :, 0] == 0).all()
    np.testing.assert_array_equal(got[0][:, :, 1], clean[0][:, :, 1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_probabilities_are_rounded_to_the_input_type(dtype):
    """Scores 0 and -2**-12: only float32 tells exp(-2**-12) from 1, so that 1 - 1 is not 0."""
    dtype = cases.DTYPES[dtype]
    cache = np.array([[1, 0], [-1, 1]], dtype).reshape(1, 2, 1, 2)
    got, _ = run(
        {
            "q": np.array([0, 1], dtype).reshape(1, 1, 1, 2),
            "k_cache": cache,
            "block_table": np.zeros((1, 1), np.int32),
            "cache_seqlens": np.array([2], np.int32),
            "head_dim_v": 1,
            "softmax_scale": -(2.0**-12),
        }
    )
    exact = dtype == np.float32
    np.testing.assert_allclose(got.item(), 2.0**-13 if exact else 0.0, rtol=1e-3)


def test_default_softmax_scale(small, clean):
    got = run(small.call(), softmax_scale=None)
    np.testing.assert_array_equal(got[0], clean[0])


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_unusual_softmax_scale(small, scale):
    got = run(small.call(), softmax_scale=scale)
    out, lse = oracle.dense_decode(
        small.q,
        small.k_cache,
        small.block_table,
        small.cache_seqlens,
        SMALL.dv,
        softmax_scale=scale,
        causal=True,
    )
    oracle.check("dense_decode", "out", got[0], out)
    oracle.check("dense_decode", "lse", got[1], lse)


@pytest.mark.parametrize("empty", ["b", "s_q", "columns", "pages", "all"])
def test_sizes_of_zero(small, empty):
    b = 0 if empty in ("b", "all") else 4
    s_q = 0 if empty in ("s_q", "all") else 3
    columns = 0 if empty in ("columns", "all") else 5
    pages = 0 if empty in ("pages", "all") else small.k_cache.shape[0]
    call = small.call() | {
        "q": small.q[:b, :s_q],
        "k_cache": small.k_cache[:pages],
        "block_table": small.block_table[:b, :columns],
        "cache_seqlens": small.cache_seqlens[:b],
    }
    out, lse = run(call)
    assert out.shape == (b, s_q, 6, 16) and lse.shape == (b, 6, s_q)
    if empty in ("columns", "pages"):
        # Only the empty request can be served.
        assert np.isnan(out[[0, 1, 3]]).all() and np.isnan(lse[[0, 1, 3]]).all()
        assert (out[2] == 0).all() and (lse[2] == np.inf).all()


# ------------------------------------------------------------------ caches


def test_paged_cache_and_array_are_the_same(small, clean):
    cache = PagedKVCache(jnp.asarray(small.k_cache), "plain", SMALL.page_size)
    for a, b in zip(run(small.call(), k_cache=cache), clean, strict=True):
        np.testing.assert_array_equal(a, b)


def fp8_inputs(cache_format, dtype, page_size):
    d = 576 if cache_format == "fp8_v32" else 512
    case = cases.DenseCase(
        f"dense-{cache_format}-{dtype}",
        2,
        0,
        3,
        s_q=2,
        d=d,
        page_size=page_size,
        dtype=dtype,
        causal=True,
        lengths=(37, 5),
    )
    inputs = cases.build(case)
    values = np.asarray(inputs.k_cache, np.float32)
    if cache_format == "fp8_v32":
        factor = np.random.default_rng(0).uniform(1, 2, (*values.shape[:-1], 4))
        with np.errstate(invalid="ignore"):
            data = oracle.encode_v32(values, power_of_two=False, scale_factor=factor)
        values = oracle.decode_v32(data)
    else:
        filled = np.where(np.isnan(values), 0, values)
        data = oracle.encode_v4(filled)
        nan = np.isnan(values[:, :, 0, 0])
        for page, offset in np.argwhere(nan):
            data[page, 576 * offset : 576 * (offset + 1)] = 0xFF
        values = oracle.decode_v4(data, page_size)
    if dtype == "bfloat16":
        values = values.astype(cases.BFLOAT16)
    return dataclasses.replace(inputs, k_cache=values), data


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cache_format", ["fp8_v32", "fp8_v4"])
def test_fp8_caches(cache_format, dtype):
    inputs, data = fp8_inputs(cache_format, dtype, page_size=8)
    cache = PagedKVCache(jnp.asarray(data), cache_format, 8)
    got = run(inputs.call(), k_cache=cache, is_fp8_kvcache=True)
    check(inputs, got)
    if cache_format == "fp8_v32" and dtype == "bfloat16":
        for raw in (data, data.view(oracle.FLOAT8)):
            again = run(inputs.call(), k_cache=raw, is_fp8_kvcache=True)
            np.testing.assert_array_equal(again[1], got[1])


# ------------------------------------------------------------------ schedules and invariance


def schedule(lengths, **changes):
    kinds = {"num_q_tokens_per_head_k": 9, "num_heads_k": 2, "num_sm_parts": 7} | changes
    return get_mla_metadata(jnp.asarray(lengths), implementation="xla", **kinds)


def test_schedules_change_nothing(small, clean):
    for lengths, parts in itertools.product(((13, 8, 0, 2), (900, 0, 5, 70000)), (1, 40)):
        metadata, splits = schedule(np.asarray(lengths, np.int32), num_sm_parts=parts)
        got = run(small.call(), tile_scheduler_metadata=metadata, num_splits=splits)
        for a, b in zip(got, clean, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "kind",
    [
        {"num_q_tokens_per_head_k": 65},
        {"num_heads_k": 1},
        {"batch_invariant": True},
        {"num_heads_k": 2, "num_heads_q": 6, "topk": 64},
    ],
    ids=["row tiles", "key heads", "batch invariant", "sparse"],
)
def test_foreign_schedules_give_nan(small, kind):
    metadata, splits = schedule(small.cache_seqlens, **kind)
    got = run(small.call(), tile_scheduler_metadata=metadata, num_splits=splits)
    assert np.isnan(got[0]).all() and np.isnan(got[1]).all()


def test_corrupt_schedules_give_nan(small):
    metadata, splits = schedule(small.cache_seqlens)
    for broken, pieces in (
        (metadata * 0, splits),
        (metadata.at[3, 0].set(1), splits),
        (metadata, splits + 1),
    ):
        got = run(small.call(), tile_scheduler_metadata=broken, num_splits=pieces)
        assert np.isnan(got[0]).all() and np.isnan(got[1]).all()


def test_batch_invariant_results_have_the_same_bits():
    case = cases.DenseCase("invariant", 3, 0, 5, s_q=2, d=96, dv=64, lengths=(700, 1, 300))
    inputs = cases.build(case)
    together = run(inputs.call(), batch_invariant=True)
    check(inputs, together)
    for r, pages in enumerate((11, 1, 5)):
        alone = {
            "q": inputs.q[[r]],
            "block_table": inputs.block_table[[r], :pages],
            "cache_seqlens": inputs.cache_seqlens[[r]],
        }
        got = run(inputs.call() | alone, batch_invariant=True)
        for a, b in zip(got, together, strict=True):
            np.testing.assert_array_equal(a[0], b[r])


def test_result_does_not_depend_on_capacity():
    """The loop follows the lengths, not the table: a table for 2**20 tokens costs nothing."""
    case = cases.DenseCase("wide", 2, 0, 2, d=32, dv=16, lengths=(70, 3), dtype="float32")
    inputs = cases.build(case)
    wide = np.full((2, 2**20 // 64), cases.GARBAGE, np.int32)
    wide[:, :3] = inputs.block_table
    check(inputs, run(inputs.call(), block_table=wide))


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_any_chunks_and_blocks(monkeypatch, limit):
    """Whatever the sizes of temporary arrays: 5 requests in chunks, pages one by one or a few."""
    case = cases.DenseCase(
        "chunks", 5, 0, 2, s_q=2, d=16, dv=8, page_size=4, causal=True, lengths=(9, 0, 21, 1, 16)
    )
    inputs = cases.build(dataclasses.replace(case, dtype="float32", attn_sink=True))
    monkeypatch.setattr(reference, "_ACCUMULATORS", limit * 4 * case.dv)
    monkeypatch.setattr(reference, "_MAX_TOKENS", 4 * limit)
    call = inputs.call()
    operands = dict.fromkeys(dense_operation.operands)
    operands |= {name: jnp.asarray(call[name]) for name in operands.keys() & call.keys()}
    got = jax.jit(
        lambda operands: reference.dense_decode(
            operands,
            head_dim_v=case.dv,
            softmax_scale=case.softmax_scale,
            causal=True,
            cache_format="plain",
            page_size=case.page_size,
            batch_invariant=False,
            fp8_matmul=False,
            power_of_two_scales=False,
            num_sm_parts=None,
        )
    )(operands)
    check(inputs, tuple(map(np.asarray, got)))


@pytest.mark.parametrize("causal", [False, True])
def test_memory_of_the_largest_benchmark_is_bounded(causal):
    """b 128, s_k 32768, h 128: 4.8 GB of cache, of which only blocks are ever gathered."""
    b, s_q, h, columns = 128, 2, 128, 512
    shape = jax.ShapeDtypeStruct
    compiled = jax.jit(
        functools.partial(
            flash_mla_with_kvcache, head_dim_v=512, causal=causal, implementation="xla"
        )
    )
    compiled = compiled.lower(
        shape((b, s_q, h, 576), jnp.bfloat16),
        shape((b * columns, 64, 1, 576), jnp.bfloat16),
        shape((b, columns), jnp.int32),
        shape((b,), jnp.int32),
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512e6


# ------------------------------------------------------------------ what the kernel takes


def kernel_declines(d, dv, dtype=jnp.bfloat16, page_size=64, cache_format="plain"):
    shape = jax.ShapeDtypeStruct
    k_cache = {
        "plain": shape((6, page_size, 1, d), dtype),
        "fp8_v32": shape((6, page_size, 1, 656), jnp.uint8),
        "fp8_v4": shape((6, quantization.page_bytes(page_size)), jnp.uint8),
    }[cache_format]
    operands = {
        "q": shape((2, 1, 4, d), dtype),
        "k_cache": k_cache,
        "block_table": shape((2, 3), jnp.int32),
    }
    static = {"cache_format": cache_format, "page_size": page_size}
    return _cuda.dense_decode_declines(operands, head_dim_v=dv, **static)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 192])
def test_kernel_takes_these_head_dimensions(dtype, page_size):
    assert set(_cuda.DENSE_DIMS) == {(576, 512), (512, 512), (320, 256), (256, 256)}
    for d, dv in _cuda.DENSE_DIMS:
        assert kernel_declines(d, dv, dtype, page_size) is None
    assert "page_size is 48" in kernel_declines(320, 256, dtype, 48)


@pytest.mark.parametrize("d,dv", [(576, 256), (512, 256), (320, 320), (256, 192), (192, 128)])
def test_kernel_names_the_head_dimensions_it_takes(d, dv):
    reason = kernel_declines(d, dv)
    assert reason.startswith(f"head dimensions are {d} and head_dim_v={dv};")
    for pair in _cuda.DENSE_DIMS:
        assert f"{pair[0]} and {pair[1]}" in reason


@pytest.mark.parametrize("page_size", [1, 2, 7, 48, 64, 100])
def test_kernel_takes_fp8_caches_of_any_page_size(page_size):
    assert kernel_declines(576, 512, page_size=page_size, cache_format="fp8_v32") is None


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dtype": jnp.float32}, "q has dtype float32.*'fp8_v32'.*takes bfloat16"),
        ({"dv": 256}, "are 576 and head_dim_v=256; the kernel takes 576 and 512"),
        ({"d": 512, "cache_format": "fp8_v4"}, "no kernel for dense decode.*'fp8_v4'"),
    ],
    ids=["float32", "head_dim_v", "fp8_v4"],
)
def test_kernel_says_what_it_does_not_take_of_fp8_caches(call, reason):
    call = {"d": 576, "dv": 512, "cache_format": "fp8_v32"} | call
    assert re.search(reason, kernel_declines(**call))


# ------------------------------------------------------------------ the lists of cases


def test_pairwise_subset_has_every_pair():
    grid = list(cases.dense_grid())
    assert len(grid) == len({case.name for case in grid}) == 2880

    def point(case):
        varying = case.lengths == "varying"
        return (case.b, case.s_q, case.s_k, case.h_q, case.h_kv, varying, case.causal)

    def pairs(points):
        return {pair for p in points for pair in itertools.combinations(tuple(enumerate(p)), 2)}

    subset = cases.dense_pairwise()
    assert pairs(map(point, subset)) == pairs(map(point, grid))
    assert {point(case) for case in subset} <= {point(case) for case in grid}
    assert {case.dtype for case in subset} == {"bfloat16", "float16"}
    assert len(subset) < 60


@pytest.mark.parametrize("dims", _cuda.DENSE_DIMS, ids=lambda dims: f"{dims[0]}-{dims[1]}")
def test_shapes_of_all_head_dimensions(dims):
    chosen = cases.dense_shapes(*dims)
    assert len({case.name for case in chosen}) == len(chosen) < 120
    assert {(case.d, case.dv) for case in chosen} == {dims}
    axes = tuple(cases.SHAPES)
    pairs = {
        ((x, getattr(case, x)), (y, getattr(case, y)))
        for case in chosen
        for x, y in itertools.combinations(axes, 2)
    }
    for x, y in itertools.combinations(axes, 2):
        for a, b in itertools.product(cases.SHAPES[x], cases.SHAPES[y]):
            assert ((x, a), (y, b)) in pairs or (x == "h_q" and y == "h_kv" and a % b)
    small = {(case.d, case.dv, case.dtype) for case in cases.dense_small()}
    assert {(*dims, "bfloat16"), (*dims, "float16")} <= small
    row = cases.DenseCase("count", 2, 100, 8, s_q=2, d=dims[0], dv=dims[1])
    assert row.flop() == 2 * 200 * 16 * sum(dims)
    assert row.bytes() == 2 * (200 * dims[0] + 2 * 16 * sum(dims))


def test_benchmark_rows_are_complete():
    rows = cases.dense_benchmarks()
    assert len({case.name for case in rows}) == len(rows) == 53
    by_name = {case.name: case for case in rows}
    # The FLOP and byte counts behind the published rates (TFLOP/s, GB/s) of two rows.
    for name, tflops, gigabytes in (
        ("b128-sk4096-h128-sq1", 611, 2677),
        ("uneven-h16-sq4", 154, 1285),
    ):
        row = by_name[name]
        assert row.flop() / row.peer_us / 1e6 == pytest.approx(tflops, abs=1)
        assert row.bytes() / row.peer_us / 1e3 == pytest.approx(gigabytes, abs=2)


def test_inputs_are_poisoned_and_reproducible():
    case = cases.DenseCase("poison", 3, 0, 1, d=8, dv=8, page_size=4, lengths=(5, 0, 8))
    first, second = cases.build(case), cases.build(case)
    np.testing.assert_array_equal(first.block_table, second.block_table)
    np.testing.assert_array_equal(first.q, second.q)
    other = cases.build(case, seed=1)
    assert not np.array_equal(np.asarray(first.q), np.asarray(other.q))
    used = first.block_table[first.block_table != cases.GARBAGE]
    assert sorted(used) != list(used) or len(used) < 3  # permuted
    assert len(used) == len(set(used)) == 4
    assert (first.block_table[:, -1] == cases.GARBAGE).all()
    assert np.isnan(first.k_cache).all(axis=(1, 2, 3)).sum() == 1
    assert (~np.isnan(first.k_cache[..., 0, 0])).sum() == 13
