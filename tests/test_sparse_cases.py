"""What the lists of sparse cases hold, and the oracle on small versions of them against XLA."""

import dataclasses
import functools
import itertools

import cases
import jax
import numpy as np
import oracle
import pytest
import sparse_cases
from sparse_cases import FORMATS, GRID, MODES, SHAPES

from jax_flashmla import quantization
from jax_flashmla.decode import flash_mla_with_kvcache

decode = functools.partial(
    jax.jit(flash_mla_with_kvcache, static_argnames=cases.STATIC), implementation="xla"
)


def run(call):
    return [np.asarray(x) for x in decode(**call)]


def small(case):
    """A case with as many heads and choices as an oracle on one core is quick for."""
    return dataclasses.replace(case, topk=min(case.topk, 130), h_q=min(case.h_q, 5))


# ------------------------------------------------------------------ lists


def test_covering_has_every_pair():
    axes = {"a": (1, 2, 3), "b": "xy", "c": (None, 0), "d": tuple(range(5))}
    points = sparse_cases.covering(axes)
    for first, second in itertools.combinations(axes, 2):
        pairs = {(p[first], p[second]) for p in points}
        assert pairs == set(itertools.product(axes[first], axes[second]))
    assert 15 <= len(points) <= 20  # 15 pairs of a and d
    assert points == sparse_cases.covering(axes)


def test_shapes_hold_every_pair_and_what_the_contract_names():
    chosen = sparse_cases.sparse_shapes()
    assert len({case.name for case in chosen}) == len(chosen)

    def kind(case):
        return next(name for name in FORMATS if case.name.startswith(f"{name}-h"))

    for case in chosen:
        assert all(getattr(case, key) == value for key, value in FORMATS[kind(case)].items())
    for first, second in itertools.combinations(("h_q", "topk", "page_size", "s_q"), 2):
        pairs = {(getattr(c, first), getattr(c, second)) for c in chosen}
        assert pairs == set(itertools.product(SHAPES[first], SHAPES[second]))
    for name in ("h_q", "topk", "page_size", "s_q", "topk_length", "attn_sink"):
        pairs = {(kind(c), getattr(c, name)) for c in chosen}
        assert pairs == set(itertools.product(FORMATS, SHAPES[name]))
    assert {1, 3, 8, 10, 16, 20, 32, 63, 64, 65, 100, 128, 130} == set(SHAPES["h_q"])
    assert {1, 2} <= {c.extra_page_size for c in chosen if c.extra_topk}
    assert all(c.slots % c.page_size == c.extra_slots % c.extra_page_size == 0 for c in chosen)
    assert len({c.name for c in sparse_cases.sparse_kinds()}) == len(FORMATS)


def test_the_grid_is_the_peers():
    points = list(sparse_cases.grid())
    assert len({c.name for c in points}) == len(points) == 10368
    values = {name: {getattr(c, name) for c in points} for name in ("page_size", "b", "s_q", "h_q")}
    assert values == {
        "page_size": {2, 53, 61, 64, 69, 576},
        "b": {4, 74, 321},
        "s_q": {1, 3},
        "h_q": {64, 128},
    }
    assert {c.topk for c in points} == {64, 576, 2048}
    assert {c.s_k for c in points} == {512, 1024, 2046}
    assert {c.cache_format for c in points} == {"fp8_v32", "fp8_v4"}
    assert {1, 2} <= {c.extra_page_size for c in points}
    flags = MODES.values()
    assert {(m.lengths, m.sink) for m in flags} >= set(itertools.product((False, True), repeat=2))
    assert any(m.invalid == 1 for m in flags) and any(m.empty for m in flags)

    def point(c):
        return (c.cache_format, c.page_size, c.b, c.s_q, (c.topk, c.s_k), c.h_q, c.extra, c.mode)

    pairwise = [point(c) for c in sparse_cases.grid_pairwise()]
    assert len(pairwise) < 60
    for i, j in itertools.combinations(range(len(GRID)), 2):
        pairs = {(p[i], p[j]) for p in pairwise}
        assert pairs == set(itertools.product(list(GRID.values())[i], list(GRID.values())[j]))


# ------------------------------------------------------------------ the oracle and XLA

#: One of each format, page size and extra cache: enough to compile.
CHECKED = [small(case) for case in sparse_cases.sparse_shapes()[::9]]


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_oracle_agrees_with_xla_on_the_sweep(case):
    inputs = cases.build_sparse(case)
    oracle.check_decode("sparse_decode", inputs, run(sparse_cases.public_call(inputs)))


@pytest.mark.parametrize("kind", ["plain-512", "v32-arbitrary", "v4"])
def test_oracle_agrees_with_xla_on_rising_maxima(kind):
    case = cases.SparseCase("rising", 2, 300, 3, slots=256, topk_length=True, **FORMATS[kind])
    inputs = sparse_cases.build_rising(case)
    got = run(sparse_cases.public_call(inputs))
    oracle.check_decode("sparse_decode", inputs, got)
    # They do rise, by about the number of the case.
    r = int(np.argmax(inputs.topk_length))
    chosen = inputs.indices[r, 0, : inputs.topk_length[r]]
    keys = inputs.cache.values.reshape(-1, case.d).astype(np.float32)[chosen]
    scores = case.softmax_scale * keys @ inputs.q[r, 0, 0].astype(np.float32)
    assert np.isfinite(scores).all() and len(scores) > 64
    top = np.maximum.accumulate(scores)
    assert 20 < top[-1] - top[0] < 40
    assert (np.diff(top[::16]) > 0).mean() > 0.9


@pytest.mark.parametrize("scales", ["power", "arbitrary"])
def test_oracle_agrees_with_xla_on_dense_fp8(scales):
    case = cases.DenseCase(
        "fp8", 3, 0, 4, s_q=2, page_size=53, causal=True, lengths=(130, 0, 54), attn_sink=True
    )
    inputs = sparse_cases.build_fp8_dense(case, scales=scales)
    oracle.check_decode("dense_decode", inputs, run(inputs.call()))
    rows = inputs.data[~np.isnan(inputs.k_cache.astype(np.float32)).any(axis=-1)]
    mantissa = np.frexp(rows[:, 512:528].copy().view("<f4"))[0]
    assert (mantissa == 0.5).all() == (scales == "power")
    assert (inputs.data == 0xFF).all(axis=-1).any()


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("kind", FORMATS)
def test_bytes_of_a_token(kind):
    """Parts that are overwritten change this token, in the columns of the part, and no other."""
    case = cases.SparseCase("bytes", 1, 40, 2, slots=30, page_size=3, invalid=0.0, **FORMATS[kind])
    inputs = sparse_cases.repaired(cases.build_sparse(case))
    before = inputs.cache.values.reshape(-1, case.d).astype(np.float32)
    assert not np.isnan(before).any()
    latent = {"plain": case.d - 64, "fp8_v32": 512, "fp8_v4": 448}[case.cache_format]
    columns = {"codes": slice(latent), "scales": slice(latent), "rope": slice(latent, None)}
    parts = ("rope",) if case.cache_format == "plain" else ("codes", "scales", "rope")
    for part, slot in itertools.product(parts, (0, 7, 29)):
        data = inputs.cache.data.copy()
        sparse_cases.token_bytes(data, case, slot, part)[:] = 0xFF
        after = sparse_cases.decoded(data, case).reshape(-1, case.d).astype(np.float32)
        nan = np.isnan(after)
        assert nan[slot, columns[part]].all() and nan.sum() == nan[slot, columns[part]].size
        np.testing.assert_array_equal(after[~nan], before[~nan])


@pytest.mark.parametrize("kind", ["plain-576", "v32", "v4"])
def test_repaired_caches_hold_numbers_everywhere(kind):
    case = next(c for c in sparse_cases.sparse_kinds() if c.name == f"{kind}-all")
    inputs = cases.build_sparse(case)
    repaired = sparse_cases.repaired(inputs)
    for cache, fixed in (
        (inputs.cache, repaired.cache),
        (inputs.extra_cache, repaired.extra_cache),
    ):
        values, numbers = cache.values.astype(np.float32), fixed.values.astype(np.float32)
        assert np.isnan(values).any() and not np.isnan(numbers).any()
        there = ~np.isnan(values)
        np.testing.assert_array_equal(values[there], numbers[there])
    if case.cache_format == "fp8_v4":
        assert quantization.page_size_of(repaired.extra_cache.data.shape[1]) == 2


def test_who_attends():
    case = cases.SparseCase("attends", 3, 20, 2, s_q=2, slots=64, topk_length=True)
    inputs = cases.build_sparse(case)
    want = np.zeros((64, 3, 2), bool)
    for r, i, j in np.ndindex(3, 2, 20):
        slot = inputs.indices[r, i, j]
        if j < inputs.topk_length[r] and 0 <= slot < 64:
            want[slot, r, i] = True
    for slot in range(64):
        np.testing.assert_array_equal(sparse_cases.attends(inputs, slot), want[slot])
    np.testing.assert_array_equal(sparse_cases.is_used(inputs), want.any(axis=(1, 2)))
    picked = sparse_cases.pick(inputs, [2, 0, 0])
    np.testing.assert_array_equal(picked.q, inputs.q[[2, 0, 0]])
    np.testing.assert_array_equal(picked.topk_length, inputs.topk_length[[2, 0, 0]])
