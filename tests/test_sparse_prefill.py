"""Sparse prefill on XLA against the float64 oracle, its edge cases, and vmap."""

import dataclasses
import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla.reference import sparse
from jax_flashmla.reference import sparse_prefill as reference
from jax_flashmla.sparse_prefill import flash_mla_sparse_fwd

OPERANDS = ("q", "kv", "indices", "attn_sink", "topk_length")
RESULTS = ("out", "max_logits", "lse")
prefill = functools.partial(
    jax.jit(flash_mla_sparse_fwd, static_argnames=("sm_scale", "d_v", "implementation")),
    implementation="xla",
)


def run(call, **changes):
    return tuple(np.asarray(x) for x in prefill(**{**call, **changes}))


def check(inputs, got):
    assert got[0].dtype == inputs.q.dtype
    assert got[1].dtype == got[2].dtype == np.float32
    for result, a, b in zip(RESULTS, got, inputs.expected(), strict=True):
        if inputs.case.scores == "flat":
            oracle.check("sparse_prefill", result, a, b)
        else:
            bound = oracle.RELATIVE_NORM if result == "out" else 1e-5
            oracle.check_norm("sparse_prefill", result, a, b, bound)


@pytest.mark.parametrize("case", cases.prefill_small(), ids=lambda case: case.name)
def test_agrees_with_oracle(case):
    inputs = cases.build_prefill(case)
    check(inputs, run(inputs.call()))


@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_agrees_with_oracle_on_any_shape(data):
    draw = data.draw
    d = draw(st.integers(1, 40))
    case = cases.PrefillCase(
        "drawn",
        draw(st.integers(0, 9)),
        draw(st.integers(0, 50)),
        draw(st.integers(1, 6)),
        draw(st.integers(0, 40)),
        d=d,
        dv=draw(st.integers(1, d)),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        invalid=draw(st.sampled_from([0.0, 0.5, 1.0])),
        topk_length=draw(st.booleans()),
        attn_sink=draw(st.booleans()),
    )
    inputs = cases.build_prefill(case, draw(st.integers(0, 100)))
    got = run(inputs.call())
    for result, a, b in zip(RESULTS, got, inputs.expected(), strict=True):
        tolerance = oracle.TOLERANCES["sparse_prefill", result]
        if result == "out":
            # A handful of elements is nothing to average over: the bound by element says it all.
            tolerance = dataclasses.replace(tolerance, cos=1e-4)
        oracle.check("sparse_prefill", result, a, b, tolerance)


# ------------------------------------------------------------------ one small problem, many edges

SMALL = cases.PrefillCase(
    "edges", 5, 20, 4, 12, d=24, dv=16, dtype="float32", invalid=0.2, topk_length=True
)


@pytest.fixture(scope="module")
def small():
    inputs = cases.build_prefill(SMALL)
    inputs.topk_length[-1] = 0
    return inputs


@pytest.fixture(scope="module")
def clean(small):
    got = run(small.call())
    check(small, got)
    return got


def same(got, clean):
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_to_attend_to(clean):
    out, top, lse = clean
    assert (out[-1] == 0).all() and (top[-1] == -np.inf).all() and (lse[-1] == np.inf).all()


@pytest.mark.parametrize("bad", [-1, -7, -(2**31), 20, cases.GARBAGE, 2**31 - 1])
def test_invalid_indices_are_skipped(small, clean, bad):
    indices = small.indices
    indices = np.where((indices < 0) | (indices >= 20), bad, indices).astype(np.int32)
    assert (indices != small.indices).any()
    same(run(small.call(), indices=indices), clean)


def test_lengths_out_of_range(small):
    low, high = np.full(5, -(2**31), np.int32), np.full(5, 2**31 - 1, np.int32)
    nothing = run(small.call(), topk_length=low)
    assert (nothing[0] == 0).all() and (nothing[2] == np.inf).all()
    call = small.call() | {"kv": np.nan_to_num(small.kv)}
    same(run(call, topk_length=high), run(call, topk_length=None))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_unused_rows_never_leak(small, clean, poison):
    kv = np.where(np.isnan(small.kv), np.float32(poison), small.kv)
    # Entries after the length are never looked at.
    after = np.arange(12) >= small.topk_length[:, None, None]
    indices = np.where(after, np.int32(cases.GARBAGE), small.indices)
    same(run(small.call(), kv=kv, indices=indices), clean)


def test_nan_reaches_only_who_attends(small, clean):
    counts = np.arange(12) < small.topk_length[:, None]
    chosen = small.indices[:, 0]
    row = chosen[counts & (chosen >= 0) & (chosen < 20)][0]
    attends = ((small.indices[:, 0] == row) & counts).any(axis=-1)
    assert attends.any() and not attends.all()
    kv = small.kv.copy()
    kv[row, 0, 3] = np.nan
    for a, b in zip(run(small.call(), kv=kv), clean, strict=True):
        assert np.isnan(a[attends]).all()
        np.testing.assert_array_equal(a[~attends], b[~attends])


def test_attn_sink(small, clean):
    inputs = dataclasses.replace(small, attn_sink=np.float32([np.inf, -np.inf, 0.5, 1000]))
    got = run(inputs.call())
    check(inputs, got)
    same(got[1:], clean[1:])
    assert not np.isnan(got[0]).any()
    assert (got[0][:, 0] == 0).all()
    np.testing.assert_array_equal(got[0][:, 1], clean[0][:, 1])


@pytest.mark.parametrize("empty", ["s_q", "s_kv", "topk", "all"])
def test_sizes_of_zero(small, empty):
    s_q = 0 if empty in ("s_q", "all") else 5
    s_kv = 0 if empty in ("s_kv", "all") else 20
    topk = 0 if empty in ("topk", "all") else 12
    inputs = dataclasses.replace(
        small,
        q=small.q[:s_q],
        kv=small.kv[:s_kv],
        indices=small.indices[:s_q, :, :topk],
        topk_length=small.topk_length[:s_q],
    )
    got = run(inputs.call())
    assert [x.shape for x in got] == [(s_q, 4, 16), (s_q, 4), (s_q, 4)]
    check(inputs, got)


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_any_chunks_and_blocks(monkeypatch, small, clean, limit):
    """Whatever the sizes of temporary arrays: 5 query tokens in chunks, a few indices at a time."""
    monkeypatch.setattr(sparse, "_ACCUMULATORS", limit * SMALL.h_q * SMALL.dv)
    monkeypatch.setattr(sparse, "_MAX_TOKENS", 2 * limit + 1)
    call = small.call()
    operands = {name: None if call[name] is None else jnp.asarray(call[name]) for name in OPERANDS}
    got = jax.jit(
        lambda operands: reference.sparse_prefill(operands, sm_scale=SMALL.sm_scale, d_v=SMALL.dv)
    )(operands)
    check(small, tuple(map(np.asarray, got)))


def test_memory_of_a_long_prefill_is_bounded():
    """4096 query tokens, 128 heads: 1 GB of float32 results at once, 19 GB of gathered rows."""
    shape = jax.ShapeDtypeStruct
    compiled = jax.jit(functools.partial(flash_mla_sparse_fwd, sm_scale=0.1, implementation="xla"))
    compiled = compiled.lower(
        shape((4096, 128, 576), jnp.bfloat16),
        shape((32768, 1, 576), jnp.bfloat16),
        shape((4096, 1, 2048), jnp.int32),
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512e6


# ------------------------------------------------------------------ vmap


@pytest.fixture(scope="module")
def several():
    """Three problems of the same shape, and each operand stacked."""
    case = dataclasses.replace(SMALL, attn_sink=True)
    problems = [cases.build_prefill(case, seed).call() for seed in range(3)]
    for problem in problems:
        problem["kv"] = np.nan_to_num(problem["kv"])  # rows in use differ from problem to problem
    return problems, {name: np.stack([p[name] for p in problems]) for name in OPERANDS}


def vmapped(batched):
    def one(*operands):
        return flash_mla_sparse_fwd(
            **dict(zip(OPERANDS, operands, strict=True)),
            sm_scale=SMALL.sm_scale,
            d_v=SMALL.dv,
            implementation="xla",
        )

    return jax.vmap(one, in_axes=tuple(0 if name in batched else None for name in OPERANDS))


@pytest.mark.parametrize(
    "batched",
    [
        *((name,) for name in OPERANDS),
        ("q", "indices"),
        ("kv", "indices"),
        ("q", "kv", "indices", "topk_length"),
        OPERANDS,
    ],
    ids=" ".join,
)
def test_vmap(several, batched):
    problems, stacked = several
    operands = [stacked[n] if n in batched else problems[0][n] for n in OPERANDS]
    got = jax.jit(vmapped(batched))(*operands)
    for i, problem in enumerate(problems):
        mixed = {n: (problem if n in batched else problems[0])[n] for n in OPERANDS}
        want = oracle.sparse_prefill(**mixed, sm_scale=SMALL.sm_scale, d_v=SMALL.dv)
        for result, a, b in zip(RESULTS, got, want, strict=True):
            oracle.check("sparse_prefill", result, np.asarray(a[i]), b)


def test_nested_vmap(several):
    """Outer axis on kv and indices, inner axis on q and attn_sink."""
    problems, stacked = several
    inner = vmapped(("q", "attn_sink"))
    outer = jax.vmap(inner, in_axes=(None, 0, 0, None, None))
    arguments = [stacked[n] if n != "topk_length" else problems[0]["topk_length"] for n in OPERANDS]
    got = jax.jit(outer)(*arguments)
    for i, j in itertools.product(range(3), range(3)):
        mixed = problems[0] | {n: problems[i][n] for n in ("kv", "indices")}
        mixed |= {n: problems[j][n] for n in ("q", "attn_sink")}
        want = oracle.sparse_prefill(**mixed)
        for result, a, b in zip(RESULTS, got, want, strict=True):
            oracle.check("sparse_prefill", result, np.asarray(a[i, j]), b)
