"""Dense decode through the public functions on a GPU: kernels, schedules, bad values, JAX."""

import dataclasses
import functools
import re
import threading
import warnings

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import raw_launcher as raw
from cases import DenseCase
from decode_checks import (
    INT32_MAX,
    INT32_MIN,
    METADATA,
    STATIC,
    all_nan,
    chain,
    compile_call,
    custom_calls,
    decode,
    is_nan,
    others_unchanged,
    run,
    same_bits,
    with_value,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax

import jax_flashmla
from jax_flashmla import _cuda, _dispatch, _ffi, _planning
from jax_flashmla.cache import PagedKVCache, offset_block_table, offset_slots, slot_mapping
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.metadata import get_mla_metadata
from jax_flashmla.reference import scheduler

pytestmark = pytest.mark.gpu

DECODE = "flashmla_dense_decode"
check = functools.partial(oracle.check_decode, "dense_decode")


# ------------------------------------------------------------------ the kernel is used, and right

CASES = [
    case
    for case in cases.dense_small()
    if (case.d, case.dv) in _cuda.DENSE_DIMS and case.dtype != "float32"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_agrees_with_oracle(case):
    inputs = cases.build(case)
    compiled, call = compile_call(inputs.call(), implementation=None)
    assert custom_calls(compiled, DECODE) == custom_calls(compiled, METADATA) == 1
    got = call()
    check(inputs, got)
    same_bits(call(), got, "second run")
    insisted, call = compile_call(inputs.call(), implementation="cuda")
    assert custom_calls(insisted, DECODE) == 1
    same_bits(call(), got, "implementation='cuda'")


@pytest.mark.parametrize(
    "name", ["fp16-grouped", "sink", "rising", "512-512", "320-256-fp16", "256-256"]
)
def test_xla_agrees_with_the_kernel(name):
    inputs = cases.build(next(case for case in CASES if case.name == name))
    compiled, call = compile_call(inputs.call(), implementation="xla")
    assert custom_calls(compiled, DECODE) == custom_calls(compiled, METADATA) == 0
    xla, cuda = call(), run(inputs.call(), implementation="cuda")
    check(inputs, xla)
    oracle.check_norm("dense_decode", "out", cuda[0], xla[0], bound=5e-3)
    oracle.check_norm("dense_decode", "lse", cuda[1], xla[1], bound=1e-5)


def test_without_jit():
    inputs = cases.build(DenseCase("eager", 2, 140, 16, attn_sink=True))
    check(inputs, [np.asarray(x) for x in flash_mla_with_kvcache(**inputs.call())])


def test_paged_cache_and_default_scale():
    inputs = cases.build(DenseCase("paged", 2, 140, 16, page_size=32))
    cache = PagedKVCache(jnp.asarray(inputs.k_cache), "plain", 32)
    check(inputs, run(inputs.call(), k_cache=cache, softmax_scale=None))


def test_repeated_runs_give_the_same_bits():
    inputs = cases.build(DenseCase("repeated", 6, 900, 128, s_q=2, causal=True, lengths="varying"))
    call = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        for name, x in inputs.call().items()
    }
    first = run(call)
    check(inputs, first)
    for _ in range(20):
        same_bits(run(call), first)


# ------------------------------------------------------------------ schedules

BASE = DenseCase("base", 4, 0, 16, s_q=2, causal=True, lengths=(700, 64, 0, 333))
BASE_ROWS = 32  # s_q * h_q / h_kv
PARTS = 7


@pytest.fixture(scope="module")
def base():
    return cases.build(BASE)


@pytest.fixture(scope="module")
def base_expected(base):
    return base.expected()


def run_with(inputs, metadata, splits, **changes):
    return run(
        inputs.call(),
        tile_scheduler_metadata=jnp.asarray(metadata),
        num_splits=jnp.asarray(splits),
        implementation="cuda",
        **changes,
    )


def plan(lengths, **changes):
    options = {"num_q_tokens_per_head_k": BASE_ROWS, "num_heads_k": 1, "num_sm_parts": PARTS}
    options |= {"implementation": "cuda"} | changes
    metadata, splits = get_mla_metadata(jnp.asarray(lengths, jnp.int32), **options)
    return np.asarray(metadata), np.asarray(splits)


def right(got, expected, what):
    try:
        oracle.check("dense_decode", "out", got[0], expected[0])
        oracle.check("dense_decode", "lse", got[1], expected[1])
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def test_metadata_made_before_and_within(base):
    """Given or not, the plan is the same, so the bits are."""
    alone = run(base.call(), implementation="cuda")
    check(base, alone)
    metadata, splits = get_mla_metadata(jnp.asarray(base.cache_seqlens), BASE_ROWS, 1)
    assert metadata.shape[0] == _planning.default_num_sm_parts(1)
    assert metadata.shape[0] == jax.devices()[0].core_count
    same_bits(run_with(base, metadata, splits), alone)

    @jax.jit
    def step(q, k_cache, block_table, cache_seqlens):
        schedule = get_mla_metadata(cache_seqlens, BASE_ROWS, 1)
        return [
            flash_mla_with_kvcache(
                scale * q, k_cache, block_table, cache_seqlens, 512, *schedule, causal=True
            )
            for scale in (1, 2)
        ]

    arrays = (base.q, base.k_cache, base.block_table, base.cache_seqlens)
    compiled = step.lower(*arrays).compile()
    assert custom_calls(compiled, METADATA) == 1 and custom_calls(compiled, DECODE) == 2
    first, second = compiled(*arrays)
    same_bits([np.asarray(x) for x in first], alone)
    check(dataclasses.replace(base, q=2 * base.q), [np.asarray(x) for x in second])


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_metadata_made_for_other_lengths(base, base_expected, batch_invariant):
    """Stale schedules balance badly, no more."""
    for lengths in (
        BASE.lengths,
        (0, 0, 0, 0),
        (64, 700, 333, 0),
        (100000, 1, 1, 1),
        (1, 1, 1, 100000),
        (640, 128, 64, 320),
        (INT32_MAX, -5, INT32_MAX, INT32_MIN),
    ):
        metadata, splits = plan(lengths, batch_invariant=batch_invariant)
        got = run_with(base, metadata, splits, batch_invariant=batch_invariant)
        right(got, base_expected, f"schedule made for {lengths}")


@pytest.mark.parametrize("parts", [1, 3, 200])
def test_metadata_of_any_size(base, base_expected, parts):
    metadata, splits = plan(BASE.lengths, num_sm_parts=parts)
    right(run_with(base, metadata, splits), base_expected, f"{parts} parts")


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_any_partition_is_right(base, base_expected, batch_invariant):
    """Boundaries anywhere, also past the ends of requests, and parts without work."""
    rng = np.random.default_rng(0)
    units = [0, 0, 1, 2, 3, 4, 5, 10, 11, 12, 1000, INT32_MAX]
    for _ in range(40):
        drawn = [(int(rng.integers(0, 5)), int(rng.choice(units))) for _ in range(PARTS - 1)]
        boundaries = sorted([(0, 0), *((r, u if r < 4 else 0) for r, u in drawn)])
        metadata, splits = chain(boundaries, 4, batch_invariant)
        got = run_with(base, metadata, splits, batch_invariant=batch_invariant)
        right(got, base_expected, f"parts that begin at {boundaries}")


def test_foreign_metadata_gives_nan(base):
    """Made for another batch size, row count, head count or kind of attention."""
    metadata, splits = plan(BASE.lengths)
    right(run_with(base, metadata, splits), base.expected(), "its own schedule")
    foreign = {
        "batch of 5": plan((*BASE.lengths, 1))[0],
        "batch of 3": plan(BASE.lengths[:3])[0],
        "more query rows": plan(BASE.lengths, num_q_tokens_per_head_k=65)[0],
        "two key heads": plan(BASE.lengths, num_heads_k=2)[0],
        "batch invariant": plan(BASE.lengths, batch_invariant=True)[0],
        "sparse": plan(BASE.lengths, num_heads_q=16, topk=64)[0],
        "half of one": plan(BASE.lengths, num_sm_parts=2 * PARTS)[0][:PARTS],
        "zeros": np.zeros((PARTS, 8), np.int32),
        "ones": np.full((PARTS, 8), -1, np.int32),
    }
    for name, rows in foreign.items():
        assert all_nan(run_with(base, rows, splits)), name
    got = run_with(base, metadata, splits, batch_invariant=True)
    assert all_nan(got), "not batch invariant"
    # One part takes all requests whole and needs no merge: NaN all the same.
    rows, splits = plan((*BASE.lengths, 1), num_sm_parts=1)
    assert all_nan(run_with(base, rows, splits[:5])), "batch of 5, one part"


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_corrupt_metadata_gives_nan_or_the_right_result(base, base_expected, batch_invariant):
    metadata, splits = plan(BASE.lengths, batch_invariant=batch_invariant)
    rng = np.random.default_rng(1)
    nan, total = 0, 0
    for part in range(PARTS):
        for column in range(8):
            old = int(metadata[part, column])
            values = {old + 1, old - 1, old ^ 64, 0, -1, INT32_MAX, INT32_MIN}
            values.add(int(rng.integers(INT32_MIN, INT32_MAX)))
            for value in values - {old}:
                rows = with_value(metadata, (part, column), value)
                got = run_with(base, rows, splits, batch_invariant=batch_invariant)
                total += 1
                if all_nan(got):
                    nan += 1
                    continue
                what = f"row {part} column {column} {old} -> {value}"
                assert column < 4, f"{what}: not all NaN"
                right(got, base_expected, what)
    assert nan > total // 2


def test_random_metadata_gives_nan(base):
    rng = np.random.default_rng(2)
    _, splits = plan(BASE.lengths)
    stamp = scheduler.stamp(batch_invariant=False, sparse=False)
    for trial in range(60):
        rows = rng.integers(INT32_MIN, INT32_MAX, (PARTS, 8), np.int32)
        if trial % 2:  # only the boundaries are noise, of plausible size
            rows[:, :4] = rng.integers(0, 6, (PARTS, 4))
            rows[:, 4:] = 4, 1, stamp, PARTS
            rows[3, 0] = (rows[2, 2] + 1) % 5  # never by chance a chain
        assert all_nan(run_with(base, rows, splits)), rows.tolist()


# ------------------------------------------------------------------ the scheduler kernel

LENGTHS = st.one_of(
    st.integers(-3, 200),
    st.integers(0, 20_000),
    st.sampled_from([0, 1, 63, 64, 65, 4095, 4096, 131072, 2**30, INT32_MAX, INT32_MAX - 63, -1]),
    st.integers(INT32_MIN, INT32_MAX),
)


def cpu():
    return jax.devices("cpu")[0]


@functools.cache
def reference_plan(keys, b, topk, extra_topk, parts, row_tiles, batch_invariant):
    """The reference on the CPU, compiled once for each shape."""

    def planned(*arrays):
        operands = {"cache_seqlens": None, "topk_length": None, "extra_topk_length": None}
        return scheduler.metadata(
            operands | dict(zip(keys, arrays, strict=True)),
            batch_size=b,
            row_tiles=row_tiles,
            topk=topk,
            extra_topk=extra_topk,
            num_sm_parts=parts,
            batch_invariant=batch_invariant,
        )

    return jax.jit(planned)


def same_plan(
    lengths,
    parts,
    *,
    b=None,
    row_tiles=3,
    batch_invariant=False,
    topk=None,
    extra_topk=None,
    extra_lengths=None,
):
    b = len(lengths) if b is None else b
    first = "cache_seqlens" if topk is None else "topk_length"
    arrays = {first: lengths, "extra_topk_length": extra_lengths}
    arrays = {
        name: jax.device_put(np.asarray(x, np.int32), cpu())
        for name, x in arrays.items()
        if x is not None
    }
    planned = reference_plan(tuple(arrays), b, topk, extra_topk, parts, row_tiles, batch_invariant)
    with jax.default_device(cpu()):
        want = planned(*arrays.values())
    got = raw.plan_schedule(
        lengths,
        num_sm_parts=parts,
        batch_size=b,
        row_tiles=row_tiles,
        batch_invariant=batch_invariant,
        topk=topk,
        extra_topk=extra_topk,
        extra_lengths=extra_lengths,
    )
    for name, a, w in zip(("tile_scheduler_metadata", "num_splits"), got, want, strict=True):
        np.testing.assert_array_equal(a, np.asarray(w), err_msg=name)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
@given(data=st.data(), b=st.sampled_from([0, 1, 3, 40]), parts=st.sampled_from([1, 3, 132]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_scheduler_kernel_plans_as_the_reference(data, b, parts, batch_invariant):
    lengths = data.draw(st.lists(LENGTHS, min_size=b, max_size=b))
    same_plan(lengths, parts, batch_invariant=batch_invariant)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("b,parts", [(1023, 132), (1025, 7), (5000, 132), (100000, 1000)])
def test_scheduler_kernel_on_large_batches(b, parts, batch_invariant):
    rng = np.random.default_rng(b)
    kinds = (
        rng.integers(0, 20_000, b),
        rng.choice([0, 1, 64, 65, 10**6, INT32_MAX, -7], b),
        np.where(np.arange(b) == b // 2, 10**8, 0),
        np.zeros(b),
        np.full(b, INT32_MAX),
    )
    for lengths in kinds:
        same_plan(lengths.astype(np.int32), parts, batch_invariant=batch_invariant)


@pytest.mark.parametrize("extra", [None, "all", "lengths"])
@pytest.mark.parametrize("topk", [0, 1, 2050])
def test_scheduler_kernel_for_sparse_attention(topk, extra):
    rng = np.random.default_rng(topk)
    b, extra_topk = 40, None if extra is None else 130
    for batch_invariant in (False, True):
        options = {"topk": topk, "extra_topk": extra_topk, "batch_invariant": batch_invariant}
        lengths = rng.integers(-5, topk + 100, b)
        lengths[:3] = INT32_MIN, INT32_MAX, 0
        more = rng.integers(-5, 200, b) if extra == "lengths" else None
        same_plan(lengths, 132, extra_lengths=more, **options)
        same_plan(None, 132, b=b, extra_lengths=more, **options)
        same_plan(None, 5, b=0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_seqlens": True},
        {"cache_seqlens": True, "batch_invariant": True, "num_sm_parts": 11},
        {"num_heads_q": 16, "topk": 300, "topk_length": True},
        {"num_heads_q": 16, "topk": 300, "extra_topk": 70, "extra_topk_length": True},
        {"num_heads_q": 16, "topk": 300, "batch_size": 6},
    ],
    ids=lambda options: "-".join(options),
)
def test_get_mla_metadata_is_the_same_on_cuda_and_xla(options):
    lengths = np.array([700, 0, -3, 64, INT32_MAX, 65], np.int32)
    options = {
        name: lengths if x is True and "inv" not in name else x for name, x in options.items()
    }
    arrays = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    rest = {name: x for name, x in options.items() if name not in arrays}

    def planned(implementation):
        function = functools.partial(
            get_mla_metadata,
            num_q_tokens_per_head_k=32,
            num_heads_k=1,
            implementation=implementation,
            **rest,
        )
        return jax.jit(function).lower(**arrays).compile()

    best, cuda, xla = (planned(i) for i in (None, "cuda", "xla"))
    assert [custom_calls(c, METADATA) for c in (best, cuda, xla)] == [1, 1, 0]
    for a, b, c in zip(best(**arrays), cuda(**arrays), xla(**arrays), strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, c)


# ------------------------------------------------------------------ values that are wrong

BAD = DenseCase("bad", 5, 0, 16, s_q=2, lengths=(200, 130, 65, 300, 0))


WHOLE = [(0, 0)]
CUT = [(0, 0), (0, 1), (0, 3), (1, 2), (2, 1), (3, 1), (3, 2), (3, 4), (4, 0)]


@pytest.fixture(
    scope="module",
    params=[(WHOLE, False), (CUT, False), (CUT, True)],
    ids=["whole", "cut", "causal"],
)
def bad(request):
    """A problem under one schedule whatever its lengths: arrays -> result, and the clean result."""
    parts, causal = request.param
    inputs = cases.build(dataclasses.replace(BAD, causal=causal))
    schedule = chain(parts, BAD.b)
    clean = run_with(inputs, *schedule)
    check(inputs, clean)

    def changed(**arrays):
        return run_with(dataclasses.replace(inputs, **arrays), *schedule)

    return inputs, changed, clean


def test_negative_length_counts_as_zero(bad):
    inputs, changed, clean = bad
    for length in (-1, -64, INT32_MIN):
        got = changed(cache_seqlens=with_value(inputs.cache_seqlens, 0, length))
        assert (got[0][0] == 0).all() and (got[1][0] == np.inf).all(), length
        others_unchanged(got, clean, 0, length)


def test_length_past_the_table_is_nan(bad):
    inputs, changed, clean = bad
    capacity = inputs.block_table.shape[1] * BAD.page_size
    table = with_value(inputs.block_table, (1, slice(None)), inputs.block_table[1, 0])
    got = changed(block_table=table, cache_seqlens=with_value(inputs.cache_seqlens, 1, capacity))
    # A full table is no error: here it names a page with 64 tokens again and again.
    assert not is_nan(got[1][1]).any()
    others_unchanged(got, clean, 1, "full table")
    for length in (capacity + 1, capacity + 64, 2**30, INT32_MAX):
        got = changed(cache_seqlens=with_value(inputs.cache_seqlens, 1, length))
        assert all_nan([x[1] for x in got]), length
        others_unchanged(got, clean, 1, length)


def test_used_entry_that_is_no_page_is_nan(bad):
    inputs, changed, clean = bad
    pages = inputs.k_cache.shape[0]
    for entry in (-1, pages, cases.GARBAGE, INT32_MIN, INT32_MAX):
        for column in (0, 2, 3):  # of 4 pages, the last with 8 tokens
            got = changed(block_table=with_value(inputs.block_table, (0, column), entry))
            assert all_nan([x[0] for x in got]), (entry, column)
            others_unchanged(got, clean, 0, (entry, column))


def test_all_requests_bad_at_once(bad):
    inputs, changed, _ = bad
    table = np.full_like(inputs.block_table, cases.GARBAGE)
    got = changed(block_table=table)
    assert all_nan([x[:4] for x in got])
    assert (got[0][4] == 0).all() and (got[1][4] == np.inf).all()
    assert all_nan(changed(cache_seqlens=np.full(5, INT32_MAX, np.int32)))


def test_entries_past_the_length_are_never_used(bad):
    inputs, changed, clean = bad
    for entry in (0, -1, INT32_MIN, INT32_MAX, inputs.k_cache.shape[0]):
        table = inputs.block_table.copy()
        for r, length in enumerate(inputs.cache_seqlens):
            table[r, -(-length // BAD.page_size) :] = entry
        same_bits(changed(block_table=table), clean, entry)


@pytest.mark.parametrize("poison", [np.inf, -np.inf])
def test_unused_slots_never_leak(bad, poison):
    inputs, changed, clean = bad  # the clean result is of a cache with NaN there
    unused = is_nan(inputs.k_cache)
    cache = inputs.k_cache.copy()
    cache[unused] = poison
    same_bits(changed(k_cache=cache), clean, poison)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_token_stays_in_its_request(bad, value):
    inputs, changed, clean = bad
    for token in (0, 63, 64, 129):
        seen_by = slice(int(inputs.case.causal and token == 129), None)  # of the query tokens
        for column in (0, 511, 575):  # the latent's ends, and RoPE, which is no value
            page = inputs.block_table[1, token // BAD.page_size]
            at = (page, token % BAD.page_size, 0, column)
            got = changed(k_cache=with_value(inputs.k_cache, at, value))
            others_unchanged(got, clean, 1, (token, column))
            if np.isnan(value):
                assert all_nan([got[0][1][seen_by], got[1][1][:, seen_by]]), (token, column)
            elif column < 512:  # a weight of 0 times infinity, if it is no NaN already
                assert is_nan(got[0][1]).any(axis=-1).all()


def test_nan_stays_with_its_key_head():
    inputs = cases.build(DenseCase("nan-head", 2, 0, 6, h_kv=3, lengths=(100, 300)))
    clean = run(inputs.call())
    at = (inputs.block_table[1, 2], 5, 1, 7)
    got = run(inputs.call(), k_cache=with_value(inputs.k_cache, at, np.nan))
    assert is_nan(got[0][1, :, 2:4]).all() and is_nan(got[1][1, 2:4]).all()
    assert is_nan(got[0]).sum() == 2 * 512 and is_nan(got[1]).sum() == 2
    keep = [0, 1, 4, 5]
    same_bits([got[0][:, :, keep], got[1][:, keep]], [clean[0][:, :, keep], clean[1][:, keep]])


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("exponent", [-55, -20, 15, 115])
def test_pieces_of_large_and_small_values(h_q, exponent):
    """Exactly as much larger or smaller as the values are: pieces are scaled to fit."""
    inputs = cases.build(DenseCase("pieces", 2, 0, h_q, s_q=1, lengths=(700, 3000)))
    cache = inputs.k_cache.astype(np.float32)

    def scaled(scale):
        values = (cache * np.float32(scale)).astype(cases.BFLOAT16)
        call = inputs.call() | {"q": np.zeros_like(inputs.q), "k_cache": values}
        return run(call, num_sm_parts=7, implementation="cuda")

    (want, want_lse), (got, lse) = scaled(1), scaled(2.0**exponent)
    np.testing.assert_array_equal(
        np.asarray(got, np.float64), np.asarray(want, np.float64) * 2.0**exponent
    )
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


@pytest.mark.parametrize("empty", ["b", "s_q", "columns", "pages"])
def test_sizes_of_zero(empty):
    inputs = cases.build(BAD)
    b = 0 if empty == "b" else 5
    s_q = 0 if empty == "s_q" else 2
    call = inputs.call() | {
        "q": inputs.q[:b, :s_q],
        "k_cache": inputs.k_cache[: 0 if empty == "pages" else None],
        "block_table": inputs.block_table[:b, : 0 if empty == "columns" else None],
        "cache_seqlens": inputs.cache_seqlens[:b],
    }
    for batch_invariant in (False, True):
        out, lse = run(call, implementation="cuda", batch_invariant=batch_invariant)
        assert out.shape == (b, s_q, 16, 512) and lse.shape == (b, 16, s_q)
        if empty in ("columns", "pages"):  # only the empty request can be served
            assert all_nan([out[:4], lse[:4]])
            assert (out[4] == 0).all() and (lse[4] == np.inf).all()
    if empty in ("columns", "pages"):
        out, lse = run(call, cache_seqlens=np.zeros(5, np.int32), implementation="cuda")
        assert (out == 0).all() and (lse == np.inf).all()


def test_batch_of_zero_has_a_schedule():
    metadata, splits = get_mla_metadata(jnp.zeros(0, jnp.int32), 32, 1, num_sm_parts=3)
    assert metadata.shape == (3, 8) and splits.tolist() == [0]
    assert np.asarray(metadata)[:, :5].tolist() == [[0] * 5] * 3


# ------------------------------------------------------------------ batch invariance


def pick(inputs, requests):
    """The same problem with these requests only, in this order; the cache stays."""
    requests = list(requests)
    return dataclasses.replace(
        inputs,
        q=inputs.q[requests],
        block_table=inputs.block_table[requests],
        cache_seqlens=inputs.cache_seqlens[requests],
    )


@pytest.mark.parametrize(
    "case",
    [
        DenseCase("invariant", 6, 0, 16, s_q=2, causal=True, lengths=(1500, 70, 0, 5000, 257, 256)),
        DenseCase(
            "invariant-128", 6, 0, 128, attn_sink=True, lengths=(1500, 70, 0, 5000, 257, 256)
        ),
        DenseCase("invariant-fp16", 3, 0, 9, h_kv=3, dtype="float16", lengths=(1030, 4097, 5)),
        DenseCase("invariant-long", 3, 0, 16, lengths=(19000, 70000, 16384)),
    ],
    ids=lambda case: case.name,
)
def test_batch_invariant_results_have_the_same_bits(case):
    """Alone, at any place in any batch, and with any number of parts."""
    inputs = cases.build(case)

    def launch(requests, **options):
        chosen = pick(inputs, requests)
        return raw.RawDenseDecode(
            q=jnp.asarray(chosen.q),
            k_cache=cache,
            block_table=jnp.asarray(chosen.block_table),
            cache_seqlens=jnp.asarray(chosen.cache_seqlens),
            attn_sink=None if inputs.attn_sink is None else jnp.asarray(inputs.attn_sink),
            softmax_scale=case.softmax_scale,
            causal=case.causal,
            batch_invariant=True,
            **options,
        ).run()

    cache = jnp.asarray(inputs.k_cache)
    everything = range(case.b)
    together = launch(everything)
    check(inputs, together)
    for r in everything:
        got = launch([r])
        same_bits([x[0] for x in got], [x[r] for x in together], f"request {r} alone")
    rng = np.random.default_rng(0)
    for parts in (1, 2, 5, 300):
        order = rng.integers(0, case.b, 11)  # some twice, some not at all
        got = launch(order, num_sm_parts=parts)
        same_bits(got, [x[order] for x in together], f"requests {order} in {parts} parts")


def test_batch_invariant_through_the_public_function():
    inputs = cases.build(
        DenseCase("invariant-jit", 5, 0, 16, s_q=2, causal=True, lengths=(1500, 70, 0, 3000, 256))
    )
    options = {"batch_invariant": True, "implementation": "cuda"}
    together = run(inputs.call(), **options)
    check(inputs, together)
    for order in ([4, 3, 2, 1, 0], [3, 3, 0, 1, 1]):
        got = run(pick(inputs, order).call(), **options)
        same_bits(got, [x[order] for x in together], order)
    schedule = get_mla_metadata(
        jnp.asarray(inputs.cache_seqlens), 32, 1, batch_invariant=True, num_sm_parts=3
    )
    same_bits(run_with(inputs, *schedule, batch_invariant=True), together, "given schedule")
    for r in (0, 3):
        got = run(pick(inputs, [r]).call(), **options)
        same_bits([x[0] for x in got], [x[r] for x in together], f"request {r} alone")


# ------------------------------------------------------------------ vmap


@pytest.fixture(scope="module")
def several():
    """Three problems of the same shapes."""
    case = DenseCase("vmap", 2, 0, 16, s_q=2, causal=True, lengths=(300, 70))
    orders = ((300, 70), (70, 300), (257, 128))
    return [
        cases.build(dataclasses.replace(case, name=f"vmap{i}", lengths=lengths))
        for i, lengths in enumerate(orders)
    ]


@pytest.mark.parametrize(
    "batched",
    [
        {"q"},
        {"q", "block_table", "cache_seqlens"},
        {"q", "k_cache", "block_table", "cache_seqlens"},
        {"k_cache"},
        {"q", "attn_sink"},
    ],
    ids=lambda names: "-".join(sorted(names)),
)
def test_vmap(several, batched):
    size, first = len(several), several[0]
    rng = np.random.default_rng(0)
    sinks = rng.normal(3, 3, (size, 16)).astype(np.float32)
    sinks[:, 3] = np.inf
    arrays = {}
    for name in ("q", "k_cache", "block_table", "cache_seqlens"):
        values = [getattr(inputs, name) for inputs in several]
        arrays[name] = np.stack(values) if name in batched else values[0]
    if batched == {"q", "block_table", "cache_seqlens"}:
        # Shared cache: the tables all name pages of the first one, in different orders.
        arrays["block_table"] = np.stack(
            [first.block_table, first.block_table[::-1], first.block_table]
        )
        arrays["cache_seqlens"] = np.int32([[300, 70], [70, 300], [1, 0]])
    if batched == {"k_cache"}:
        # A shared table, so every cache must hold tokens where the first does.
        arrays["k_cache"] = np.stack(
            [
                np.where(is_nan(first.k_cache), first.k_cache, first.k_cache * (i + 1)).astype(
                    first.k_cache.dtype
                )
                for i in range(size)
            ]
        )
    arrays["attn_sink"] = sinks if "attn_sink" in batched else sinks[0]

    def one(q, k_cache, block_table, cache_seqlens, attn_sink):
        return flash_mla_with_kvcache(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            512,
            causal=True,
            attn_sink=attn_sink,
            implementation="cuda",
        )

    axes = tuple(0 if name in batched else None for name in arrays)
    compiled = jax.jit(jax.vmap(one, in_axes=axes)).lower(*arrays.values()).compile()
    assert custom_calls(compiled, DECODE) == 1  # one call on the folded batch
    out, lse = (np.asarray(x) for x in compiled(*arrays.values()))
    for i in range(size):
        own = {name: x[i] if name in batched else x for name, x in arrays.items()}
        sink = own.pop("attn_sink")
        want = oracle.dense_decode(*own.values(), 512, causal=True, attn_sink=sink)
        right((out[i], lse[i]), want, f"element {i}")


# ------------------------------------------------------------------ decoding loops


def cache_copies(compiled, cache):
    """What shows that a compiled step does not update a donated cache in place."""
    shape = ",".join(map(str, cache.data.shape))
    layout = r"(?:{[^}]*})?"
    patterns = (
        rf"= \w+\[{shape}\]{layout} (?:copy|convert|transpose)\(",
        rf"= \(\w+\[{shape}\]{layout}, .*\) copy-start\(",
    )
    lines = compiled.as_text().splitlines()
    found = [line.strip() for line in lines if any(re.search(p, line) for p in patterns)]
    memory = compiled.memory_analysis()
    if memory.alias_size_in_bytes < cache.data.nbytes:
        found.append(f"{memory.alias_size_in_bytes} bytes of arguments are results")
    # Workspaces are a part of it, a second cache would be more.
    if memory.temp_size_in_bytes > cache.data.nbytes // 4:
        found.append(f"{memory.temp_size_in_bytes} bytes of temporary memory")
    return found


def test_decode_loop_updates_the_cache_in_place():
    """Steps x layers in one program over one flat cache that is donated: nothing copies it."""
    layers, pages, page_size, b, h, steps = 2, 400, 64, 3, 16, 5
    rng = np.random.default_rng(0)

    def normal(*shape):
        return np.clip(rng.standard_normal(shape, np.float32) / 10, -1, 1).astype(cases.BFLOAT16)

    lengths = np.array([126, 0, 62], np.int32)  # cross page borders on the way
    table = np.full((b, 4), cases.GARBAGE, np.int32)
    table[:, :3] = rng.permutation(pages)[: 3 * b].reshape(b, 3)
    start = np.full((layers * pages, page_size, 1, 576), np.nan, cases.BFLOAT16)
    for layer in range(layers):
        for r in range(b):
            for token in range(lengths[r]):
                page = layer * pages + table[r, token // page_size]
                start[page, token % page_size, 0] = normal(576)
    q, kv = normal(steps, layers, b, 1, h, 576), normal(steps, layers, b, 576)

    def decode_steps(cache, q, kv, table, lengths):
        def step(carry, inputs):
            cache, lengths = carry
            q, kv = inputs
            slots = slot_mapping(table, lengths, page_size, num_pages=pages)
            lengths = lengths + 1
            schedule = get_mla_metadata(lengths, h, 1)

            def layer(cache, inputs):
                q, kv, first = inputs
                own = {"num_pages": pages}
                cache = cache.append(kv, offset_slots(slots, first, page_size=page_size, **own))
                own_table = offset_block_table(table, first, **own)
                return cache, flash_mla_with_kvcache(q, cache, own_table, lengths, 512, *schedule)

            first = pages * jnp.arange(layers, dtype=jnp.int32)
            cache, results = lax.scan(layer, cache, (q, kv, first))
            return (cache, lengths), results

        (cache, _), results = lax.scan(step, (cache, lengths), (q, kv))
        return cache, results

    cache = PagedKVCache(jnp.asarray(start), "plain", page_size)
    jitted = jax.jit(decode_steps, donate_argnums=0)
    compiled = jitted.lower(cache, q, kv, table, lengths).compile()
    assert custom_calls(compiled, DECODE) >= 1
    assert cache_copies(compiled, cache) == []
    address = cache.data.unsafe_buffer_pointer()
    cache, (out, lse) = compiled(cache, q, kv, table, lengths)
    assert cache.data.unsafe_buffer_pointer() == address

    want = start.copy()
    for step in range(steps):
        for layer in range(layers):
            for r in range(b):
                token = lengths[r] + step
                page = layer * pages + table[r, token // page_size]
                want[page, token % page_size, 0] = kv[step, layer, r]
            valid = np.where(table < pages, table + layer * pages, cases.GARBAGE)
            expected = oracle.dense_decode(q[step, layer], want, valid, lengths + step + 1, 512)
            got = np.asarray(out[step, layer]), np.asarray(lse[step, layer])
            right(got, expected, f"step {step} layer {layer}")
    np.testing.assert_array_equal(np.asarray(cache.data).view(np.uint16), want.view(np.uint16))


def test_copies_of_the_cache_would_be_seen():
    """The check above can fail: without donation there is a copy."""
    cache = PagedKVCache.zeros(80, 64)
    kv, slots = jnp.ones((1, 1, 576), jnp.bfloat16), jnp.array([5], jnp.int32)
    compiled = jax.jit(PagedKVCache.append).lower(cache, kv, slots).compile()
    assert cache_copies(compiled, cache)


def test_two_threads_at_once():
    problems = [
        cases.build(DenseCase(f"thread{i}", 4, 0, 16, s_q=2, lengths=(900 - i, 64, 130 + i, 2000)))
        for i in range(2)
    ]
    calls = [compile_call(inputs.call(), implementation="cuda")[1] for inputs in problems]
    expected = [call() for call in calls]
    for inputs, got in zip(problems, expected, strict=True):
        check(inputs, got)
    errors = []
    barrier = threading.Barrier(2)

    def work(index):
        try:
            barrier.wait(timeout=60)
            for _ in range(50):
                same_bits(calls[index](), expected[index], f"thread {index}")
        except BaseException as error:  # told by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


# ------------------------------------------------------------------ implementations


UNSUPPORTED = [
    (DenseCase("float32", 2, 140, 4, s_q=2, causal=True, dtype="float32"), "float32"),
    (DenseCase("dims", 2, 140, 4, d=192, dv=128), "192 and head_dim_v=128"),
    (DenseCase("pair", 2, 140, 4, d=576, dv=256), "576 and head_dim_v=256"),
    (DenseCase("page-of-48", 2, 140, 4, page_size=48), "page_size is 48"),
]


@pytest.mark.parametrize("case,reason", UNSUPPORTED, ids=lambda x: getattr(x, "name", None))
def test_what_the_kernel_declines_runs_on_xla(case, reason):
    inputs = cases.build(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled, call = compile_call(inputs.call(), implementation=None)
    # No reason to warn: XLA is what there is for such a call.
    assert not [w for w in caught if "jax_flashmla" in str(w.message)]
    assert custom_calls(compiled, DECODE) == 0
    check(inputs, call())
    with pytest.raises(NotImplementedError, match=f"flash_mla_dense_decode.*{reason}"):
        run(inputs.call(), implementation="cuda")
    static = {name: x for name, x in inputs.call().items() if name in STATIC}
    arrays = {name: x for name, x in inputs.call().items() if name not in STATIC}
    explanation = jax_flashmla.explain(flash_mla_with_kvcache, **arrays, **static)
    assert explanation.implementation == "xla"
    assert reason in str(explanation)


def test_explain_says_cuda(base):
    explanation = jax_flashmla.explain(flash_mla_with_kvcache, **base.call())
    assert explanation.backend == "gpu" and explanation.implementation == "cuda"
    schedule = jax_flashmla.explain(get_mla_metadata, base.cache_seqlens, BASE_ROWS, 1)
    assert schedule.implementation == "cuda"
    forced = jax_flashmla.explain(flash_mla_with_kvcache, **base.call(), implementation="xla")
    assert forced.implementation == "xla"


def test_gpu_without_kernels_falls_back_and_warns_once(monkeypatch):
    """An installation without CUDA kernels, or for other GPUs, on a machine with a GPU."""
    reason = "no kernels here; install them with this test's remedy"
    monkeypatch.setattr(_ffi, "kernels_decline", lambda _: reason)
    monkeypatch.setattr(_dispatch, "_warned", set())
    # Of its own shape: nothing compiled earlier may be found again.
    inputs = cases.build(DenseCase("no-kernels", 2, 141, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled, call = compile_call(inputs.call(), implementation=None)
        compile_call(inputs.call(), implementation=None, causal=True)
    assert custom_calls(compiled, DECODE) == 0
    check(inputs, call())
    remedies = [w for w in caught if reason in str(w.message)]
    assert len(remedies) == 1 and issubclass(remedies[0].category, RuntimeWarning)
    with pytest.raises(NotImplementedError, match="this test's remedy"):
        compile_call(inputs.call(), implementation="cuda")


def test_arrays_on_the_cpu_of_a_machine_with_a_gpu(base):
    """The platform that a computation is lowered for decides, not what the machine has."""
    call = {
        name: jax.device_put(x, cpu()) if isinstance(x, np.ndarray) else x
        for name, x in base.call().items()
    }
    out, lse = decode(**call)
    assert out.devices() == {cpu()}
    check(base, (np.asarray(out), np.asarray(lse)))
    with pytest.raises(NotImplementedError, match="not CUDA"):
        decode(**call, implementation="cuda")


def test_export_and_run(base):
    """Exported for CUDA, written to bytes, read back and run."""

    def step(q, k_cache, block_table, cache_seqlens):
        schedule = get_mla_metadata(cache_seqlens, BASE_ROWS, 1, num_sm_parts=PARTS)
        return flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, 512, *schedule, causal=True
        )

    arrays = (base.q, base.k_cache, base.block_table, base.cache_seqlens)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in (DECODE, METADATA)]
    exported = export.export(jax.jit(step), platforms=["cuda"], disabled_checks=checks)(*arrays)
    assert DECODE in exported.mlir_module()
    again = export.deserialize(exported.serialize())
    got = [np.asarray(x) for x in jax.jit(again.call)(*arrays)]
    check(base, got)
    same_bits(got, run_with(base, *plan(BASE.lengths)))
    # For several platforms at once: here the kernel runs, on a CPU the reference.
    both = export.export(jax.jit(step), platforms=["cpu", "cuda"], disabled_checks=checks)(*arrays)
    both = export.deserialize(both.serialize())
    same_bits([np.asarray(x) for x in jax.jit(both.call)(*arrays)], got)
    on_cpu = jax.jit(both.call)(*(jax.device_put(x, cpu()) for x in arrays))
    check(base, [np.asarray(x) for x in on_cpu])
