"""Sparse decode on XLA against the float64 oracle, and every rule of its edge cases."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import public_call as call_of

from jax_flashmla import _cuda, quantization
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.decode import flash_mla_with_kvcache, sparse_operation
from jax_flashmla.metadata import get_mla_metadata
from jax_flashmla.reference import scheduler

decode = functools.partial(
    jax.jit(flash_mla_with_kvcache, static_argnames=cases.STATIC), implementation="xla"
)


def run(call, **changes):
    out, lse = decode(**{**call, **changes})
    return np.asarray(out), np.asarray(lse)


check = functools.partial(oracle.check_decode, "sparse_decode")


@pytest.mark.parametrize("case", cases.sparse_small(), ids=lambda case: case.name)
def test_agrees_with_oracle(case):
    inputs = cases.build_sparse(case)
    check(inputs, run(call_of(inputs)))


@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_agrees_with_oracle_on_any_shape(data):
    draw = data.draw
    pages, page_size = draw(st.integers(0, 5)), draw(st.integers(1, 20))
    extra_pages, extra_page_size = draw(st.integers(0, 5)), draw(st.integers(1, 20))
    d = draw(st.integers(1, 40))
    case = cases.SparseCase(
        "drawn",
        draw(st.integers(1, 3)),
        draw(st.integers(0, 40)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 3)),
        pages * page_size,
        page_size,
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        d=d,
        dv=draw(st.integers(1, d)),
        invalid=draw(st.sampled_from([0.0, 0.5, 1.0])),
        topk_length=draw(st.booleans()),
        extra_topk=draw(st.integers(0, 9)),
        extra_slots=extra_pages * extra_page_size,
        extra_page_size=extra_page_size,
        extra_topk_length=draw(st.booleans()),
        attn_sink=draw(st.booleans()),
    )
    inputs = cases.build_sparse(case, draw(st.integers(0, 100)))
    got = run(call_of(inputs), batch_invariant=draw(st.booleans()))
    # A handful of elements is nothing to average over: the bound by element says it all.
    out, lse = inputs.expected()
    tolerance = oracle.TOLERANCES["sparse_decode", "out"]
    oracle.check("sparse_decode", "out", got[0], out, dataclasses.replace(tolerance, cos=1e-4))
    oracle.check("sparse_decode", "lse", got[1], lse)


# ------------------------------------------------------------------ one small problem, many edges

SMALL = cases.SparseCase(
    "edges",
    3,
    10,
    4,
    s_q=2,
    slots=32,
    page_size=4,
    dtype="float32",
    d=24,
    dv=16,
    invalid=0.2,
    topk_length=True,
    extra_topk=6,
    extra_slots=15,
    extra_page_size=3,
    extra_topk_length=True,
)


@pytest.fixture(scope="module")
def small():
    return cases.build_sparse(SMALL)


@pytest.fixture(scope="module")
def clean(small):
    got = run(call_of(small))
    check(small, got)
    return got


def same(got, clean):
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a, b)


def test_small_problem_agrees_with_oracle(clean):
    # Of the last request no index of either cache counts.
    assert (clean[0][2] == 0).all() and (clean[1][2] == np.inf).all()
    assert np.isfinite(clean[1][:2]).any()


@pytest.mark.parametrize("bad", [-1, -7, -(2**31), "slots", cases.GARBAGE, 2**31 - 1])
def test_invalid_indices_are_skipped(small, clean, bad):
    """Whichever invalid index stands in for another, the result is the same."""
    bad = (32, 15) if bad == "slots" else (bad, bad)
    indices, extra = small.indices, small.extra_indices
    indices = np.where((indices < 0) | (indices >= 32), bad[0], indices).astype(np.int32)
    extra = np.where((extra < 0) | (extra >= 15), bad[1], extra).astype(np.int32)
    assert (indices != small.indices).any() and (extra != small.extra_indices).any()
    same(run(call_of(small), indices=indices, extra_indices_in_kvcache=extra), clean)


def test_entries_after_the_length_never_count(small, clean):
    for name, width in (("topk_length", 10), ("extra_topk_length", 6)):
        field = "indices" if name == "topk_length" else "extra_indices"
        length = getattr(small, name)
        after = np.arange(width) >= length[:, None, None]
        for garbage in (0, cases.GARBAGE, -5):
            changed = np.where(after, garbage, getattr(small, field)).astype(np.int32)
            key = field if field == "indices" else "extra_indices_in_kvcache"
            same(run(call_of(small), **{key: changed}), clean)


def test_lengths_out_of_range(small):
    """A negative length counts as 0, one larger than topk as topk."""
    call = call_of(small)
    low, high = np.int32([-1, -(2**31), -3]), np.int32([11, 2**31 - 1, 10])
    same(
        run(call, topk_length=low, extra_topk_length=high),
        run(call, topk_length=low * 0, extra_topk_length=np.int32([6, 6, 6])),
    )
    nothing = run(call, topk_length=low, extra_topk_length=low)
    assert (nothing[0] == 0).all() and (nothing[1] == np.inf).all()


def test_duplicates_count_twice(small):
    """Doubling every index leaves out as it is and adds log 2 to lse."""
    call = call_of(small) | {"topk_length": None, "extra_topk_length": None}
    once = run(call)
    twice = run(
        call,
        indices=np.tile(small.indices, 2),
        extra_indices_in_kvcache=np.tile(small.extra_indices, 2),
    )
    np.testing.assert_allclose(twice[0], once[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(twice[1], once[1] + np.log(2), rtol=1e-6, atol=1e-6)


def test_two_caches_are_one_union(small):
    """The same tokens in one cache or spread over two give the same attention."""
    values = np.nan_to_num(np.asarray(small.cache.values))
    indices = np.arange(24, dtype=np.int32).reshape(1, 1, 24)
    call = call_of(small) | {
        "q": small.q[:1, :1],
        "k_cache": values,
        "topk_length": None,
        "extra_topk_length": None,
    }
    one = run(call, indices=indices, extra_k_cache=None, extra_indices_in_kvcache=None)
    two = run(
        call,
        indices=indices[..., :10],
        extra_k_cache=values.reshape(16, 2, 1, 24),
        extra_indices_in_kvcache=indices[..., 10:],
    )
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two[1], one[1], rtol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_unused_slots_never_leak(small, poison):
    # Nobody attends to slot 0, the one that an invalid index may be replaced with.
    indices, extra_indices = (np.where(x == 0, -1, x) for x in (small.indices, small.extra_indices))

    def results(unused):
        caches = []
        for cache in (small.cache, small.extra_cache):
            data = np.where(np.isnan(cache.data), np.float32(unused), cache.data)
            data[0, 0] = unused
            caches.append(data)
        call = call_of(dataclasses.replace(small, indices=indices, extra_indices=extra_indices))
        return run(call, k_cache=caches[0], extra_k_cache=caches[1])

    same(results(poison), results(0))


def test_nan_reaches_only_who_attends(small, clean):
    counts = np.arange(10) < small.topk_length[:, None, None]
    slot = small.indices[counts & (small.indices >= 0) & (small.indices < 32)][0]
    attends = ((small.indices == slot) & counts).any(axis=-1)
    assert attends.any() and not attends.all()
    data = small.cache.data.copy()
    data.reshape(32, 24)[slot, 3] = np.nan
    out, lse = run(call_of(small), k_cache=data)
    assert np.isnan(out[attends]).all() and np.isnan(lse.transpose(0, 2, 1)[attends]).all()
    np.testing.assert_array_equal(out[~attends], clean[0][~attends])


def test_attn_sink(small, clean):
    inputs = dataclasses.replace(small, attn_sink=np.float32([np.inf, -np.inf, 0.5, 1000]))
    got = run(call_of(inputs))
    check(inputs, got)
    np.testing.assert_array_equal(got[1], clean[1])
    assert not np.isnan(got[0]).any()
    assert (got[0][:, :, 0] == 0).all()
    np.testing.assert_array_equal(got[0][:, :, 1], clean[0][:, :, 1])


def test_tables_and_lengths_are_not_used(small, clean):
    table, lengths = np.full((3, 2), cases.GARBAGE, np.int32), np.full(3, -5, np.int32)
    same(run(call_of(small), block_table=table, cache_seqlens=lengths), clean)


@pytest.mark.parametrize("empty", ["b", "s_q", "topk", "pages", "extra", "all"])
def test_sizes_of_zero(small, empty):
    b = 0 if empty in ("b", "all") else 3
    s_q = 0 if empty in ("s_q", "all") else 2
    topk = 0 if empty in ("topk", "all") else 10
    pages = 0 if empty in ("pages", "all") else 8
    extra = 0 if empty in ("extra", "all") else 6
    call = call_of(small) | {
        "q": small.q[:b, :s_q],
        "k_cache": small.cache.data[:pages],
        "indices": small.indices[:b, :s_q, :topk],
        "topk_length": small.topk_length[:b],
        "extra_indices_in_kvcache": small.extra_indices[:b, :s_q, :extra],
        "extra_topk_length": small.extra_topk_length[:b],
    }
    inputs = dataclasses.replace(
        small,
        q=call["q"],
        cache=cases.SparseCache(call["k_cache"], call["k_cache"]),
        indices=call["indices"],
        topk_length=call["topk_length"],
        extra_indices=call["extra_indices_in_kvcache"],
        extra_topk_length=call["extra_topk_length"],
    )
    got = run(call)
    assert got[0].shape == (b, s_q, 4, 16) and got[1].shape == (b, 4, s_q)
    check(inputs, got)


# ------------------------------------------------------------------ caches, schedules, invariance


def test_v32_rows_as_float8(small):
    case = next(c for c in cases.sparse_small() if c.name == "v32-arbitrary")
    inputs = cases.build_sparse(case)
    call = call_of(inputs)
    same(run(call, k_cache=inputs.cache.data.view(oracle.FLOAT8)), run(call))
    cache = PagedKVCache(jnp.asarray(inputs.cache.data), "fp8_v32", case.page_size)
    same(run(call, k_cache=cache), run(call))


def test_schedules(small, clean):
    kind = {"num_q_tokens_per_head_k": 8, "num_heads_k": 1, "num_heads_q": 4, "topk": 10}
    kind |= {"batch_size": 3, "num_sm_parts": 5, "implementation": "xla"}
    for changes in ({}, {"topk": 5000, "extra_topk": 64}):
        metadata, splits = get_mla_metadata(**kind | changes)
        same(run(call_of(small), tile_scheduler_metadata=metadata, num_splits=splits), clean)
    for changes in ({"num_q_tokens_per_head_k": 12}, {"batch_invariant": True}):
        metadata, splits = get_mla_metadata(**kind | changes)
        got = run(call_of(small), tile_scheduler_metadata=metadata, num_splits=splits)
        assert np.isnan(got[0]).all() and np.isnan(got[1]).all()


def test_batch_invariant_results_have_the_same_bits():
    case = cases.SparseCase(
        "invariant", 3, 600, 5, s_q=2, d=96, dv=64, extra_topk=40, topk_length=True
    )
    inputs = cases.build_sparse(case)
    call = call_of(inputs)
    together = run(call, batch_invariant=True)
    check(inputs, together)
    for r in range(3):
        names = ("q", "indices", "topk_length", "extra_indices_in_kvcache")
        alone = {name: call[name][[r]] for name in names}
        got = run(call | alone, batch_invariant=True)
        for a, b in zip(got, together, strict=True):
            np.testing.assert_array_equal(a[0], b[r])


def test_memory_is_bounded():
    """b 128, two query tokens, topk 2048: a gather of all tokens would take 1.2 GB."""
    b, s_q, h, topk = 128, 2, 128, 2048
    shape = jax.ShapeDtypeStruct
    compiled = jax.jit(
        functools.partial(
            flash_mla_with_kvcache, head_dim_v=512, is_fp8_kvcache=True, implementation="xla"
        )
    )
    compiled = compiled.lower(
        shape((b, s_q, h, 576), jnp.bfloat16),
        shape((4096, 64, 1, 656), jnp.uint8),
        None,
        None,
        indices=shape((b, s_q, topk), jnp.int32),
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512e6


# ------------------------------------------------------------------ what the kernel takes


def kernel_declines(
    cache_format, d, dv=512, dtype=jnp.bfloat16, page_size=64, topk=10, extra_page_size=None
):
    shape = jax.ShapeDtypeStruct

    def data(page_size):
        return {
            "plain": shape((6, page_size, 1, d), dtype),
            "fp8_v32": shape((6, page_size, 1, 656), jnp.uint8),
            "fp8_v4": shape((6, quantization.page_bytes(page_size)), jnp.uint8),
        }[cache_format]

    operands = dict.fromkeys(sparse_operation.operands)
    operands |= {
        "q": shape((2, 1, 4, d), dtype),
        "k_cache": data(page_size),
        "indices": shape((2, 1, topk), jnp.int32),
    }
    if extra_page_size is not None:
        operands["extra_k_cache"] = data(extra_page_size)
        operands["extra_indices"] = shape((2, 1, topk), jnp.int32)
    static = {"page_size": page_size, "extra_page_size": extra_page_size, "softmax_scale": 1.0}
    return _cuda.sparse_decode_declines(
        operands, head_dim_v=dv, cache_format=cache_format, **static
    )


@pytest.mark.parametrize("page_size", [1, 2, 53, 64])
@pytest.mark.parametrize(
    ("cache_format", "d", "dtype"),
    [
        ("plain", 576, jnp.bfloat16),
        ("plain", 512, jnp.bfloat16),
        ("plain", 576, jnp.float16),
        ("fp8_v32", 576, jnp.bfloat16),
        ("fp8_v4", 512, jnp.bfloat16),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_kernel_takes_these_caches(cache_format, d, dtype, page_size):
    for topk in (0, 1, 64, 2048):
        assert kernel_declines(cache_format, d, 512, dtype, page_size, topk) is None


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            {"cache_format": "plain", "d": 576, "dtype": jnp.float32},
            "q has dtype float32; the kernel takes bfloat16 and float16",
        ),
        (
            {"cache_format": "fp8_v4", "d": 512, "dtype": jnp.float32},
            "q has dtype float32; over a cache of format 'fp8_v4' the kernel takes bfloat16",
        ),
        (
            {"cache_format": "plain", "d": 320, "dv": 256},
            "head dimensions are 320 and head_dim_v=256; the kernel takes the pairs "
            "576 and 512, 512 and 512",
        ),
        (
            {"cache_format": "fp8_v4", "d": 512, "dv": 448},
            "head dimensions are 512 and head_dim_v=448; the kernel takes 512 and 512",
        ),
        (
            {"cache_format": "fp8_v32", "d": 576, "topk": 2**31},
            "a dimension is larger than 2^31 - 1",
        ),
    ],
    ids=["plain float32", "FP8 float32", "plain dims", "FP8 dims", "topk"],
)
def test_kernel_says_what_it_does_not_take(call, reason):
    assert kernel_declines(**call) == reason


def test_kernel_takes_v4_pages_of_as_many_bytes_as_it_can_count():
    """2^31 - 1 for both caches; the other formats have no such limit."""
    most = (2**31 - 1) // 576 * 576 // 584  # padding to a multiple of 576 bytes is less than 584
    assert quantization.page_bytes(most) < 2**31 <= quantization.page_bytes(most + 1)
    takes = functools.partial(kernel_declines, "fp8_v4", 512)
    assert takes(page_size=most, extra_page_size=most) is None
    reason = (
        f"V4 pages of {most + 1} tokens have {quantization.page_bytes(most + 1)} bytes; the kernel "
        "takes up to 2^31 - 1"
    )
    assert takes(page_size=most + 1) == reason
    assert takes(page_size=64, extra_page_size=most + 1) == reason
    assert kernel_declines("fp8_v32", 576, page_size=most + 1) is None


@pytest.mark.parametrize("extra_topk", [None, 0, 1, 64, 700])
@pytest.mark.parametrize("topk", [0, 1, 63, 64, 65, 500, 600, 2048, 20_000, 100_000])
def test_batch_invariant_workspace_has_room_for_all_pieces(topk, extra_topk):
    """Each cache's choices are in blocks of their own, so the blocks count, not the choices."""
    blocks = -(-topk // 64) + -(-(extra_topk or 0) // 64)
    pieces = -(-blocks // int(scheduler.split_blocks(jnp.int32(blocks))))
    room = _cuda.max_invariant_splits(_cuda.selected_capacity(topk, extra_topk))
    assert 1 <= room and pieces <= room <= 16
    assert room == max(pieces, 1) or blocks > 128
