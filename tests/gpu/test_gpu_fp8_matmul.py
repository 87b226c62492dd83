"""Decode with FP8 products on a GPU, dense and sparse, over V3.2 caches.

What is right, and how far from it rounding may lead, is in fp8_oracle.py. Most launches go without
XLA around them (raw_launcher.py), so that a shape costs no compilation.
"""

import dataclasses
import functools

import cases
import fp8_oracle
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sparse_cases
from cases import DenseCase, SparseCase
from decode_checks import (
    INT32_MAX,
    INT32_MIN,
    METADATA,
    all_nan,
    at_the_end,
    chain,
    compile_call,
    custom_calls,
    is_nan,
    others_unchanged,
    run,
    same_bits,
    with_value,
)
from sparse_cases import Fp8DenseInputs, build_fp8_dense, covering, pick, whole_pages

from jax_flashmla.metadata import get_mla_metadata

pytestmark = pytest.mark.gpu

DECODE = {"dense": "flashmla_dense_decode", "sparse": "flashmla_sparse_decode"}
BOTH = pytest.mark.parametrize("kind", ["dense", "sparse"])

#: Beside the kernel without FP8 products, by norm, what docs/semantics.md says and a little more:
#: of scores that differ little, deviate by 3, and by 10 (a few tokens in all, so it varies).
OUT = {"flat": 3e-2, "peaked3": 6e-2, "peaked10": 16e-2}
#: lse of scores that differ little.
FLAT_LSE = 1e-2
#: Where scales are powers of two and scores differ little, all weights are close to one number,
#: which is at worst in the middle of two e4m3 values below a power of two.
FLAT_OUT_POWER = 2.0**-5 + 2e-3


def is_dense(inputs):
    return isinstance(inputs, Fp8DenseInputs)


def launcher(inputs, **options):
    make = sparse_cases.raw_dense_launcher if is_dense(inputs) else sparse_cases.raw_launcher
    return make(inputs, **{"fp8_matmul": True, **options})


def launch(inputs, **options):
    return launcher(inputs, **options).run()


def model(inputs, **options):
    decode = fp8_oracle.dense_decode if is_dense(inputs) else fp8_oracle.sparse_decode
    return decode(inputs, **options)


def check(inputs, got, what="", **options):
    assert got[0].dtype == cases.BFLOAT16 and got[1].dtype == np.float32
    fp8_oracle.check(model(inputs), got, what, **options)


def public_call(inputs):
    return inputs.call() if is_dense(inputs) else sparse_cases.public_call(inputs)


def problem(kind, name="all", **changes):
    """A problem of a kind with all features, requests whole and cut and empty ones among them."""
    if kind == "dense":
        case = DenseCase(
            f"fp8mm-{name}",
            4,
            0,
            20,
            s_q=2,
            page_size=16,
            causal=True,
            lengths=(300, 0, 64, 129),
            attn_sink=True,
        )
        return build_fp8_dense(dataclasses.replace(case, **changes))
    case = next(c for c in sparse_cases.sparse_kinds() if c.name == "v32-arbitrary-all")
    changes = {"name": f"fp8mm-{name}", "h_q": 40} | changes
    return cases.build_sparse(dataclasses.replace(case, **changes))


@functools.cache
def shared(kind):
    """A problem that tests share and must not change."""
    return problem(kind)


@functools.cache
def clean(kind):
    """Its result, in three parts."""
    return launch(shared(kind), num_sm_parts=3)


def rewritten(inputs, change):
    """The problem with other tokens: ``change`` takes and returns the rows uint8 [n, 656]."""
    data = (inputs.data if is_dense(inputs) else inputs.cache.data).copy()
    values = inputs.k_cache if is_dense(inputs) else inputs.cache.values
    rows = data.reshape(-1, 656)
    there = ~is_nan(values.reshape(len(rows), -1)).any(axis=1)
    rows[there] = change(rows[there])
    return inputs.with_data(data) if is_dense(inputs) else sparse_cases.with_data(inputs, data)


def with_scales(inputs, scales_of):
    """The problem with the scales float32 [n, 4] that ``scales_of(n)`` gives."""

    def change(rows):
        scales = np.ascontiguousarray(scales_of(len(rows)), np.float32)
        rows[:, 512:528] = scales.view(np.uint8)
        return rows

    return rewritten(inputs, change)


def with_queries(inputs, q):
    return dataclasses.replace(inputs, q=np.asarray(q).astype(cases.BFLOAT16))


def by_token(got):
    """out [b, s_q, h, dv] and lse [b, s_q, h]."""
    return got[0], got[1].transpose(0, 2, 1)


# ------------------------------------------------------------------ through the public function


@BOTH
def test_kernel_agrees_with_oracle(kind):
    """By default, inside a jitted program; and the same bits again."""
    inputs = shared(kind)
    compiled, call = compile_call(public_call(inputs), fp8_matmul=True)
    assert custom_calls(compiled, DECODE[kind]) == custom_calls(compiled, METADATA) == 1
    got = call()
    check(inputs, got)
    same_bits(call(), got, "second run")
    same_bits(launch(inputs), got, "without XLA")
    same_bits(run(public_call(inputs), fp8_matmul=True, implementation="cuda"), got, "insisted on")


@BOTH
@pytest.mark.parametrize("h_q", [48, 128])
@pytest.mark.parametrize(
    "scores,scales",
    [("flat", "power"), ("flat", "arbitrary"), ("peaked3", "power"), ("peaked10", "arbitrary")],
)
def test_beside_the_kernel_without_it(kind, scores, scales, h_q):
    """Another kernel runs, and its result is as near as the documentation says."""
    name = f"fp8mm-near-{h_q}"
    if kind == "dense":
        case = DenseCase(name, 3, 0, h_q, lengths=(4000, 1000, 333), scores=scores)
        inputs = build_fp8_dense(case, scales=scales)
    else:
        options = {"cache_format": "fp8_v32", "scales": scales, "scores": scores}
        case = SparseCase(name, 3, 1000, h_q, slots=4096, **options)
        inputs = cases.build_sparse(case)
    exact, got = launch(inputs, fp8_matmul=False), launch(inputs)
    assert (exact[0] != got[0]).mean() > 0.5
    bound = FLAT_OUT_POWER if (scores, scales) == ("flat", "power") else OUT[scores]
    oracle.check_norm(kind, "out", got[0], exact[0], bound=bound)
    if scores == "flat":
        np.testing.assert_allclose(got[1], exact[1], rtol=0, atol=FLAT_LSE)
    check(inputs, got)


@BOTH
def test_few_rows_take_the_kernel_without_it(kind):
    """Up to 32 of them: heads, or if dense, heads times query tokens."""
    heads = {"dense": (1, 16), "sparse": (1, 32)}[kind]
    for h_q in heads:
        inputs = problem(kind, f"few{h_q}", h_q=h_q)
        same_bits(launch(inputs), launch(inputs, fp8_matmul=False), h_q)


def test_schedules_of_the_public_function():
    """The metadata of dense decode serves; made for other lengths, too; a corrupt one gives NaN."""
    inputs = shared("dense")
    expected = model(inputs)
    names = ("tile_scheduler_metadata", "num_splits")
    for lengths in (inputs.cache_seqlens, (0, 0, 0, 0), (1, 100000, 1, 1), (64, 300, 1, 0)):
        schedule = get_mla_metadata(jnp.asarray(lengths, jnp.int32), 40, 1, num_sm_parts=7)
        given = dict(zip(names, schedule, strict=True))
        got = run(inputs.call(), implementation="cuda", fp8_matmul=True, **given)
        fp8_oracle.check(expected, got, f"made for {lengths}")
    rows = np.asarray(schedule[0])
    for column in range(4, 8):
        corrupt = given | {names[0]: with_value(rows, (2, column), rows[2, column] ^ 64)}
        assert all_nan(run(inputs.call(), implementation="cuda", fp8_matmul=True, **corrupt))


@BOTH
@pytest.mark.parametrize("empty", ["b", "s_q", "columns", "pages"])
def test_sizes_of_zero(kind, empty):
    inputs = shared(kind)
    b, s_q = 0 if empty == "b" else 4, 0 if empty == "s_q" else 2
    pages, columns = (0 if empty == name else None for name in ("pages", "columns"))
    call = public_call(inputs) | {"q": inputs.q[:b, :s_q]}
    call["k_cache"] = call["k_cache"][:pages]
    if kind == "dense":
        call["block_table"] = inputs.block_table[:b, :columns]
        call["cache_seqlens"] = inputs.cache_seqlens[:b]
    else:
        call |= {
            "indices": inputs.indices[:b, :s_q, :columns],
            "topk_length": inputs.topk_length[:b],
            "extra_k_cache": None,
            "extra_indices_in_kvcache": None,
            "extra_topk_length": None,
        }
    out, lse = run(call, implementation="cuda", fp8_matmul=True)
    h_q = inputs.q.shape[2]
    assert out.shape == (b, s_q, h_q, 512) and lse.shape == (b, h_q, s_q)
    if empty in ("columns", "pages"):
        there = inputs.cache_seqlens > 0 if kind == "dense" else np.zeros(4, bool)
        assert is_nan(out[there]).all() and is_nan(lse[there]).all()
        assert (out[~there] == 0).all() and (lse[~there] == np.inf).all()


# ------------------------------------------------------------------ shapes

DENSE_SHAPES = {
    "h_q": (33, 48, 64, 65, 128),
    "s_q": (1, 2, 3),
    "page_size": (1, 16, 53, 64),
    "lengths": ((0, 1, 63, 64, 65, 1000), (1000, 65, 2, 0, 128, 64)),
    "causal": (False, True),
    "attn_sink": (False, True),
    "scales": ("power", "arbitrary"),
}


def _points(shapes):
    """The points of a sweep that has every pair of values."""
    return [
        pytest.param(
            point, id=f"{number}-h{point['h_q']}-sq{point['s_q']}-page{point['page_size']}"
        )
        for number, point in enumerate(covering(shapes))
    ]


@pytest.mark.parametrize("point", _points(DENSE_SHAPES))
def test_dense_shapes(point):
    name = "-".join(map(str, point.values()))
    shape = {key: value for key, value in point.items() if key != "scales"}
    case = DenseCase(f"fp8mm-{name}", 6, 0, **shape)
    inputs = build_fp8_dense(case, scales=point["scales"])
    expected = model(inputs)
    for options in ({}, {"num_sm_parts": 1}, {"num_sm_parts": 40}):
        fp8_oracle.check(expected, launch(inputs, **options), options)


SPARSE_SHAPES = {
    "h_q": (33, 48, 64, 65, 128),
    "topk": (0, 1, 63, 64, 65, 130, 1000),
    "s_q": (1, 2),
    "page_size": (1, 16, 53, 64),
    # Tokens of the extra cache's pages, 0 without it; its lengths are given with pages of 2.
    "extra_page_size": (0, 2, 69),
    "topk_length": (False, True),
    "attn_sink": (False, True),
    "scales": ("power", "arbitrary"),
}


@pytest.mark.parametrize("point", _points(SPARSE_SHAPES))
def test_sparse_shapes(point):
    name, extra = "-".join(map(str, point.values())), point["extra_page_size"]
    shape = {key: value for key, value in point.items() if key != "extra_page_size"}
    if extra:
        shape |= {
            "extra_topk": 70,
            "extra_page_size": extra,
            "extra_slots": whole_pages(200, extra),
            "extra_topk_length": extra == 2,
        }
    slots = whole_pages(1500, point["page_size"])
    case = SparseCase(f"fp8mm-{name}", 3, slots=slots, cache_format="fp8_v32", **shape)
    inputs = cases.build_sparse(case)
    expected = model(inputs)
    for options in ({}, {"num_sm_parts": 1}, {"num_sm_parts": 40}):
        fp8_oracle.check(expected, launch(inputs, **options), options)


@pytest.mark.parametrize("h_q", [40, 128])
def test_every_length_around_a_block(h_q):
    around = [64 * blocks + more for blocks in range(3, 7) for more in (-1, 0, 1)]
    lengths = (*range(131), *around)
    case = DenseCase(f"fp8mm-around-{h_q}", len(lengths), 0, h_q, lengths=lengths, page_size=16)
    inputs = build_fp8_dense(case)
    expected = model(inputs)
    for options in ({}, {"num_sm_parts": 1}, {"num_sm_parts": 500}):
        fp8_oracle.check(expected, launch(inputs, **options), options)


def test_every_number_of_choices_around_a_block():
    """Of the first cache, and what is left of 130 of the extra one."""
    lengths = np.arange(131, dtype=np.int32)
    inputs = problem("sparse", "around", b=131, topk=130, h_q=40, s_q=1)
    inputs = sparse_cases.repaired(inputs)
    for extra in (np.zeros_like(lengths), 130 - lengths):
        changed = dataclasses.replace(inputs, topk_length=lengths, extra_topk_length=extra)
        expected = model(changed)
        for options in ({}, {"num_sm_parts": 500}, {"num_sm_parts": 1}):
            fp8_oracle.check(expected, launch(changed, **options), options)


@BOTH
def test_many_tokens(kind):
    """Nothing adds up in accumulators that have few bits."""
    if kind == "dense":
        case = DenseCase("fp8mm-long", 2, 0, 17, s_q=2, causal=True, lengths=(20_001, 9000))
        inputs = build_fp8_dense(case)
    else:
        case = SparseCase("fp8mm-long", 2, 16384, 70, slots=20_032, cache_format="fp8_v32")
        inputs = cases.build_sparse(case)
    expected = model(inputs)
    for options in ({}, {"num_sm_parts": 1}):
        fp8_oracle.check(expected, launch(inputs, **options), options)


@BOTH
@pytest.mark.parametrize("parts", [1, 2, 7, 132, 500])
def test_any_number_of_parts(kind, parts):
    expected = model(shared(kind))
    for batch_invariant in (False, True):
        got = launch(shared(kind), num_sm_parts=parts, batch_invariant=batch_invariant)
        fp8_oracle.check(expected, got, f"batch_invariant={batch_invariant}")


@BOTH
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_any_partition_is_right(kind, batch_invariant):
    """Boundaries anywhere, also past the ends of requests, and parts without work."""
    inputs, expected = shared(kind), model(shared(kind))
    row_tiles = 2 if kind == "sparse" else 1
    rng = np.random.default_rng(0)
    units = [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1000, INT32_MAX]
    for _ in range(12):
        drawn = [(int(rng.integers(0, 5)), int(rng.choice(units))) for _ in range(6)]
        boundaries = sorted([(0, 0), *((r, u if r < 4 else 0) for r, u in drawn)])
        rows, _ = chain(
            boundaries, 4, batch_invariant, sparse=kind == "sparse", row_tiles=row_tiles
        )
        got = launch(inputs, schedule=jnp.asarray(rows), batch_invariant=batch_invariant)
        fp8_oracle.check(expected, got, f"parts that begin at {boundaries}")


@BOTH
def test_schedules_that_are_none_give_nan(kind):
    inputs = shared(kind)
    rng = np.random.default_rng(0)
    noise = rng.integers(INT32_MIN, INT32_MAX, (3, 8), np.int32)
    row_tiles = 2 if kind == "sparse" else 1
    other, _ = chain([(0, 0), (1, 1)], 4, sparse=kind == "dense", row_tiles=row_tiles)
    for rows in (noise, np.zeros((3, 8), np.int32), np.full((5, 8), INT32_MAX, np.int32), other):
        assert all_nan(launch(inputs, schedule=jnp.asarray(rows)))


# ------------------------------------------------------------------ scores


@BOTH
@pytest.mark.parametrize("scores", ["peaked3", "peaked10"])
@pytest.mark.parametrize("parts", [1, None])
def test_peaked_scores(kind, scores, parts):
    if kind == "dense":
        inputs = problem(kind, scores, scores=scores, lengths=(2000, 0, 333, 64))
    else:
        inputs = problem(kind, scores, scores=scores, topk=2000, slots=whole_pages(3000, 61))
    check(inputs, launch(inputs, num_sm_parts=parts))


@BOTH
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_rising_and_falling_maxima(kind, order):
    """The maximum moves in every block, or never after the first, whose weights then vanish."""
    if kind == "dense":
        inputs = problem(kind, "rising", scores="rising", lengths=(1500, 0, 1000, 64))
    else:
        case = SparseCase(
            "fp8mm-rising", 2, 1500, 40, s_q=2, slots=1024, cache_format="fp8_v32", topk_length=True
        )
        inputs = sparse_cases.build_rising(case)
        lengths = np.int32([1500, 1000])
        inputs = sparse_cases.repaired(dataclasses.replace(inputs, topk_length=lengths))
    if order == "falling":
        inputs.q[..., -1] *= -1
    expected = model(inputs)
    for parts in (1, None):
        fp8_oracle.check(expected, launch(inputs, num_sm_parts=parts), f"{parts} parts")


@BOTH
@pytest.mark.parametrize("scale", [0.0, -0.3, 0.3])
def test_unusual_softmax_scales(kind, scale):
    inputs = shared(kind)
    got = launch(inputs, softmax_scale=scale)
    fp8_oracle.check(model(inputs, softmax_scale=scale), got, scale)


@BOTH
@pytest.mark.parametrize("zero", ["all", "latent", "rope", "one row", "but one"])
def test_zeros_in_queries(kind, zero):
    """Scores of zero are no scores that are missing: all tokens count alike."""
    inputs = shared(kind)
    q = inputs.q.copy()
    if zero == "latent":
        q[..., :512] = 0
    elif zero == "rope":
        q[..., 512:] = 0
    elif zero == "but one":
        q[..., :511] = 0
    else:
        q[..., slice(3, 4) if zero == "one row" else slice(None), :] = 0
    changed = with_queries(inputs, q)
    expected, got = model(changed), launch(changed)
    fp8_oracle.check(expected, got, zero)
    if zero == "all":
        there = np.isfinite(expected.lse)
        assert there.any()
        tokens = np.rint(np.exp(expected.lse[there]))
        np.testing.assert_allclose(got[1][there], np.log(tokens), rtol=0, atol=1e-5)


@BOTH
def test_rows_of_very_different_size(kind):
    """Heads from 1e-20 to 1e6, each with a scale of its own; no row changes a bit of another."""
    inputs = shared(kind)
    h_q = inputs.q.shape[2]
    sizes = np.logspace(-20, 6, h_q)[np.random.default_rng(0).permutation(h_q)]
    changed = with_queries(inputs, inputs.q.astype(np.float64) * sizes[:, None])
    got = launch(changed)
    check(changed, got)
    for head in np.argsort(sizes)[[0, h_q // 2, -1]]:
        q = inputs.q.copy()
        q[:, :, head] = changed.q[:, :, head]
        other = launch(with_queries(inputs, q))
        same_bits(
            [other[0][:, :, head], other[1][:, head]], [got[0][:, :, head], got[1][:, head]], head
        )


@BOTH
@pytest.mark.parametrize("latent,rope", [(0.1, 30), (1e-3, 1e3), (1e-12, 30), (30, 1e-12)])
def test_parts_of_very_different_size(kind, latent, rope):
    """The RoPE part much larger than the latent part, which keeps its own bits; and smaller."""
    inputs = shared(kind)
    q = inputs.q.astype(np.float64)
    q[..., :512] *= latent
    q[..., 512:] *= rope
    changed = with_queries(inputs, q)
    check(changed, launch(changed))


@BOTH
def test_columns_of_very_different_size(kind):
    """What is 2^-9 of the largest column keeps three bits, what is 2^-18 vanishes."""
    inputs = shared(kind)
    q = inputs.q.astype(np.float64)
    q[..., 128:256] *= 2.0**-7
    q[..., 256:384] *= 2.0**-15
    q[..., 384:512] *= 2.0**-30
    changed = with_queries(inputs, 8 * q)
    check(changed, launch(changed))


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 300, 511, 512, 575])
def test_queries_that_are_not_finite(kind, value, column):
    """NaN in their row, and no other bit in any other."""
    inputs, want = shared(kind), clean(kind)
    r, i, head = 0, 1, 7
    changed = with_queries(inputs, with_value(inputs.q, (r, i, head, column), value))
    got = by_token(launch(changed, num_sm_parts=3))
    assert is_nan(got[0][r, i, head]).all() and is_nan(got[1][r, i, head]).all()
    keep = np.ones(got[1].shape, bool)
    keep[r, i, head] = False
    same_bits([x[keep] for x in got], [x[keep] for x in by_token(want)], (value, column))


# ------------------------------------------------------------------ scales


def moderate(inputs, deviation=1.0):
    """The problem with queries whose scores have about this deviation, whatever the scales."""
    values = (inputs.k_cache if is_dense(inputs) else inputs.cache.values).astype(np.float64)
    values = values.reshape(-1, 576)
    values = values[~np.isnan(values).any(axis=1)]
    q = inputs.q.astype(np.float64)
    q *= deviation / (q.std() * abs(inputs.case.softmax_scale) * 576**0.5 * values.std())
    return with_queries(inputs, q)


@BOTH
@pytest.mark.parametrize(
    "low,high", [(1e-6, 1e-3), (1 / 3, 3), (1, 1e3), (1e-6, 1e3), (1e-30, 1e-20)], ids=str
)
def test_scales_of_any_size(kind, low, high):
    """Scales that are no powers of two, each token's and each tile's its own."""
    rng = np.random.default_rng(0)
    inputs = with_scales(
        problem(kind, f"scales{low}"),
        lambda n: np.exp(rng.uniform(np.log(low), np.log(high), (n, 4))),
    )
    # Scores as they come, and none from the latent part: then the weights differ by scales alone.
    without = inputs.q.copy()
    without[..., :512] = 0
    for changed in (moderate(inputs), with_queries(inputs, without)):
        expected = model(changed)
        for parts in (None, 1):
            fp8_oracle.check(expected, launch(changed, num_sm_parts=parts), f"{parts} parts")


@BOTH
@pytest.mark.parametrize("order", [(1e-6, 1, 1e3, 1e-3), (1e3, 1e-6, 1e-6, 1e3)], ids=str)
def test_tiles_of_very_different_scales(kind, order):
    rng = np.random.default_rng(0)
    inputs = with_scales(
        problem(kind, "tiles"), lambda n: np.float64(order) * rng.uniform(1, 2, (n, 4))
    )
    changed = moderate(inputs)
    check(changed, launch(changed))
    # Every tile has its share of the scores, as far as e4m3 goes below the largest query.
    q = inputs.q.astype(np.float64).reshape(*inputs.q.shape[:3], 9, 64)
    q[..., :8, :] /= np.repeat(order, 2)[:, None]
    changed = with_queries(inputs, q.reshape(inputs.q.shape))
    check(changed, launch(changed))


@BOTH
def test_runs_of_tokens_with_very_different_scales(kind):
    """Large scales in some blocks and small ones in others: what is summed up spans them all."""
    sizes = np.float32([1e-6, 1e3, 1, 1e-3])
    inputs = with_scales(
        problem(kind, "runs"),
        lambda n: np.repeat(np.resize(sizes, -(-n // 40)), 40)[:n, None].repeat(4, axis=1),
    )
    without = inputs.q.copy()
    without[..., :512] = 0
    for changed in (moderate(inputs), with_queries(inputs, without)):
        expected = model(changed)
        for parts in (None, 1):
            fp8_oracle.check(expected, launch(changed, num_sm_parts=parts), f"{parts} parts")


@BOTH
def test_scales_that_make_up_for_weights(kind):
    """Tokens of small weights have large scales, so that all of them count for about as much."""
    rng = np.random.default_rng(0)
    inputs = problem(kind, "opposite")
    scale = inputs.case.softmax_scale

    def change(rows):
        sizes = np.exp2(rng.uniform(-3, 3, len(rows)))
        scales = sizes[:, None] * rng.uniform(1, 4, (len(rows), 4))
        rows[:, 512:528] = scales.astype("<f4").view(np.uint8)
        rope = np.zeros((len(rows), 64), cases.BFLOAT16)
        rope[:, 5] = -np.log(sizes)
        rows[:, 528:] = rope.view(np.uint8)
        return rows

    q = np.zeros(inputs.q.shape)
    q[..., 512 + 5] = 1 / scale
    changed = with_queries(rewritten(inputs, change), q)
    expected = model(changed)
    assert expected.many.any()
    fp8_oracle.check(expected, launch(changed))


@BOTH
def test_codes_of_all_values(kind):
    """Every e4m3 code but NaN, subnormal ones and zeros of both signs among them."""
    rng = np.random.default_rng(0)
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)

    def change(rows):
        rows[:, :512] = rng.choice(finite, (len(rows), 512))
        return rows

    changed = moderate(rewritten(problem(kind, "codes"), change))
    check(changed, launch(changed))
    nothing = rewritten(shared(kind), lambda rows: np.zeros_like(rows))
    check(nothing, launch(nothing))


# ------------------------------------------------------------------ tokens that are not finite

#: Bytes of a token, and what they become: NaN but for the last two.
BROKEN = {
    "first code": (0, b"\x7f"),
    "code 0xff": (131, b"\xff"),
    "last code": (511, b"\x7f"),
    "first scale": (512, b"\x00\x00\xc0\x7f"),
    "last scale": (524, b"\x01\x00\x80\xff"),
    "RoPE": (528, b"\xc0\x7f"),
    "last of RoPE": (654, b"\xc0\xff"),
    "infinite scale": (516, b"\x00\x00\x80\x7f"),
    "infinite scale of the last tile": (524, b"\x00\x00\x80\x7f"),
}


def broken(row, where):
    at, value = BROKEN[where]
    row[at : at + len(value)] = np.frombuffer(value, np.uint8)


@pytest.mark.parametrize("where", BROKEN)
def test_nan_in_a_token_stays_in_its_request(where):
    inputs, want = shared("dense"), clean("dense")
    heads = ~np.isposinf(inputs.attn_sink)  # a sink of +inf gives zeros whatever else there is
    for token in (0, 63, 64, 127):
        page = inputs.block_table[3, token // 16]
        data = inputs.data.copy()
        broken(data[page, token % 16, 0], where)
        got = launch(inputs.with_data(data), num_sm_parts=3)
        assert is_nan(got[0][3][:, heads]).all() and is_nan(got[1][3]).all(), token
        same_bits([x[:3] for x in got], [x[:3] for x in want], token)


@pytest.mark.parametrize("where", BROKEN)
@pytest.mark.parametrize("extra", [False, True], ids=["first cache", "extra cache"])
def test_nan_reaches_exactly_who_attends(where, extra):
    inputs, want = shared("sparse"), by_token(clean("sparse"))
    cache = inputs.extra_cache if extra else inputs.cache
    indices = inputs.extra_indices if extra else inputs.indices
    lengths = inputs.extra_topk_length if extra else inputs.topk_length
    count = cache.data.size // 656
    counts = np.arange(indices.shape[2]) < lengths[:, None, None]
    valid = counts & (indices >= 0) & (indices < count)
    slots, uses = np.unique(indices[valid], return_counts=True)
    slot = int(slots[uses == 1][0])
    attends = (valid & (indices == slot)).any(axis=2)
    assert attends.sum() == 1
    data = cache.data.copy()
    broken(data.reshape(-1, 656)[slot], where)
    changed = dataclasses.replace(cache, data=data)
    names = {"extra_cache": changed} if extra else {"cache": changed}
    got = by_token(launch(dataclasses.replace(inputs, **names), num_sm_parts=3))
    heads = ~np.isposinf(inputs.attn_sink)
    assert is_nan(got[0][attends][:, heads]).all() and is_nan(got[1][attends]).all()
    same_bits([x[~attends] for x in got], [x[~attends] for x in want], where)


@BOTH
def test_unused_bytes_are_never_read_into_a_result(kind):
    """They are 0xFF in the clean result."""
    inputs, want = shared(kind), clean(kind)
    values = inputs.k_cache if kind == "dense" else inputs.cache.values
    unused = is_nan(values).any(axis=-1)
    assert unused.any()
    for value in (0x00, 0x7E, 0x7F, 0x80):
        data = (inputs.data if kind == "dense" else inputs.cache.data).copy()
        data[unused] = value
        changed = {"data": data}
        if kind == "sparse":
            changed = {"cache": cases.SparseCache(data, inputs.cache.values)}
        same_bits(launch(dataclasses.replace(inputs, **changed), num_sm_parts=3), want, value)


# ------------------------------------------------------------------ lengths, tables and indices

WHOLE = [(0, 0)]
CUT = [(0, 0), (0, 1), (0, 3), (2, 0), (3, 1), (3, 2), (4, 0)]


@pytest.fixture(scope="module", params=[WHOLE, CUT], ids=["whole", "cut"])
def bad(request):
    """A problem under one schedule whatever its lengths: arrays -> result, and the clean result."""
    inputs = shared("dense")
    rows, _ = chain(request.param, 4)

    def changed(**arrays):
        return launch(dataclasses.replace(inputs, **arrays), schedule=jnp.asarray(rows))

    want = changed()
    check(inputs, want)
    return inputs, changed, want


def test_bad_lengths(bad):
    inputs, changed, want = bad
    heads = ~np.isposinf(inputs.attn_sink)
    capacity = inputs.block_table.shape[1] * 16
    for length in (-1, -64, INT32_MIN):
        got = changed(cache_seqlens=with_value(inputs.cache_seqlens, 0, length))
        assert (got[0][0] == 0).all() and (got[1][0] == np.inf).all(), length
        others_unchanged(got, want, 0, length)
    for length in (capacity + 1, capacity + 64, 2**30, INT32_MAX):
        got = changed(cache_seqlens=with_value(inputs.cache_seqlens, 2, length))
        assert is_nan(got[0][2][:, heads]).all() and is_nan(got[1][2]).all(), length
        others_unchanged(got, want, 2, length)


def test_used_entry_that_is_no_page_is_nan(bad):
    inputs, changed, want = bad
    heads = ~np.isposinf(inputs.attn_sink)
    for entry in (-1, len(inputs.data), cases.GARBAGE, INT32_MIN, INT32_MAX):
        for column in (0, 7, 18):  # of 19 pages
            got = changed(block_table=with_value(inputs.block_table, (0, column), entry))
            what = entry, column
            assert is_nan(got[0][0][:, heads]).all() and is_nan(got[1][0]).all(), what
            others_unchanged(got, want, 0, what)


def test_entries_past_the_length_are_never_used(bad):
    inputs, changed, want = bad
    for entry in (0, -1, INT32_MIN, INT32_MAX, len(inputs.data)):
        table = inputs.block_table.copy()
        for r, length in enumerate(inputs.cache_seqlens):
            table[r, -(-length // 16) :] = entry
        same_bits(changed(block_table=table), want, entry)


@pytest.mark.parametrize("bad_index", [-1, -7, INT32_MIN, "slots", cases.GARBAGE, INT32_MAX])
def test_whichever_invalid_index(bad_index):
    inputs = shared("sparse")

    def replaced(indices, slots):
        value = slots if bad_index == "slots" else bad_index
        return np.where((indices < 0) | (indices >= slots), value, indices).astype(np.int32)

    changed = dataclasses.replace(
        inputs,
        indices=replaced(inputs.indices, inputs.case.slots),
        extra_indices=replaced(inputs.extra_indices, inputs.case.extra_slots),
    )
    assert (changed.indices != inputs.indices).any()
    same_bits(launch(changed, num_sm_parts=3), clean("sparse"), bad_index)


def test_entries_after_the_length_never_count():
    inputs = shared("sparse")
    for garbage in (0, cases.GARBAGE, -5, INT32_MAX):
        arrays = {}
        for name in ("indices", "extra_indices"):
            indices = getattr(inputs, name)
            lengths = inputs.topk_length if name == "indices" else inputs.extra_topk_length
            after = np.arange(indices.shape[2]) >= lengths[:, None, None]
            arrays[name] = np.where(after, garbage, indices).astype(np.int32)
        got = launch(dataclasses.replace(inputs, **arrays), num_sm_parts=3)
        same_bits(got, clean("sparse"), garbage)


@pytest.mark.parametrize("invalid", [0.9, 1.0])
def test_mostly_and_only_invalid_indices(invalid):
    inputs = problem("sparse", f"invalid{invalid}", invalid=invalid, topk=1000)
    got = launch(inputs)
    check(inputs, got)
    if invalid == 1:
        assert (got[0] == 0).all() and (got[1] == np.inf).all()


def test_lengths_of_nothing():
    """None of either cache, of one of them, and of all requests."""
    inputs = sparse_cases.repaired(shared("sparse"))
    none = np.zeros(4, np.int32)
    for arrays in (
        {"topk_length": none},
        {"extra_topk_length": none},
        {"topk_length": none, "extra_topk_length": none},
        {"topk_length": np.int32([-1, INT32_MIN, 0, 1]), "extra_topk_length": none},
    ):
        changed = dataclasses.replace(inputs, **arrays)
        for parts in (None, 1):
            check(changed, launch(changed, num_sm_parts=parts), arrays)


def test_duplicates_count_twice():
    inputs = dataclasses.replace(
        shared("sparse"), topk_length=None, extra_topk_length=None, attn_sink=None
    )
    once = sparse_cases.repaired(inputs)
    twice = dataclasses.replace(
        once, indices=np.tile(once.indices, 2), extra_indices=np.tile(once.extra_indices, 2)
    )
    first, second = launch(once), launch(twice)
    check(twice, second)
    np.testing.assert_allclose(second[1], first[1] + np.log(2), rtol=1e-5, atol=1e-5)
    # One token and nothing else: all weights are rounded alike.
    slot = int(np.flatnonzero(sparse_cases.is_used(once))[0])
    only = dataclasses.replace(
        once,
        indices=np.full((4, 2, 200), slot, np.int32),
        extra_indices=np.full_like(once.extra_indices, -1),
    )
    check(only, launch(only), by_norm=False)


@BOTH
def test_attention_sinks(kind):
    inputs = shared(kind)
    bare = launch(dataclasses.replace(inputs, attn_sink=None))
    check(dataclasses.replace(inputs, attn_sink=None), bare)
    for value in (np.inf, -np.inf, 0.5, 1000.0, -1000.0):
        sink = np.full(inputs.q.shape[2], value, np.float32)
        changed = dataclasses.replace(inputs, attn_sink=sink)
        got = launch(changed)
        check(changed, got, value)
        np.testing.assert_array_equal(got[1], bare[1])
        if value == np.inf:
            assert (got[0] == 0).all()
        if value == -np.inf:
            np.testing.assert_array_equal(got[0], bare[0])


# ------------------------------------------------------------------ the same bits


def picked(inputs, requests):
    requests = list(requests)
    if not is_dense(inputs):
        return pick(inputs, requests)
    names = ("q", "block_table", "cache_seqlens")
    return dataclasses.replace(inputs, **{name: getattr(inputs, name)[requests] for name in names})


@BOTH
@pytest.mark.parametrize("h_q", [40, 70, 128])
def test_batch_invariant_results_have_the_same_bits(kind, h_q):
    """Alone, at any place in any batch, and with any number of parts."""
    if kind == "dense":
        inputs = problem(kind, f"invariant{h_q}", h_q=h_q, b=5, lengths=(1500, 70, 0, 3000, 256))
    else:
        inputs = problem(kind, f"invariant{h_q}", h_q=h_q, b=5, topk=1500)
    together = launch(inputs, batch_invariant=True)
    check(inputs, together)
    for r in range(5):
        got = launch(picked(inputs, [r]), batch_invariant=True)
        same_bits([x[0] for x in got], [x[r] for x in together], f"request {r} alone")
    rng = np.random.default_rng(0)
    for parts in (1, 2, 300):
        order = rng.integers(0, 5, 11)  # some twice, some not at all
        got = launch(picked(inputs, order), batch_invariant=True, num_sm_parts=parts)
        same_bits(got, [x[order] for x in together], f"requests {order} in {parts} parts")


@BOTH
@pytest.mark.parametrize("h_q", [40, 128])
def test_repeated_runs_give_the_same_bits(kind, h_q):
    more = {"topk": 2000} if kind == "sparse" else {"lengths": (3000, 0, 64, 999)}
    repeated = launcher(problem(kind, f"repeated{h_q}", h_q=h_q, **more))
    first = repeated.run()
    assert not is_nan(first[0]).any()
    for _ in range(10):
        same_bits(repeated.run(), first)


# ------------------------------------------------------------------ large caches


@BOTH
def test_end_of_a_cache_of_more_than_2_gib(kind):
    if kind == "dense":
        inputs = problem(kind, "large", page_size=53)
        small = inputs.data
    else:
        inputs = problem(kind, "large", page_size=53, slots=whole_pages(400, 53), invalid=0.0)
        small = inputs.cache.data
    want = launch(inputs)
    check(inputs, want)
    pages = int(2.2 * 2**31) // (small.nbytes // len(small)) + 1
    moved = pages - len(small)
    large = at_the_end(jnp.asarray(small), pages)
    if kind == "dense":
        table = inputs.block_table
        table = np.where(table == cases.GARBAGE, table, table + moved).astype(np.int32)
        options = {"block_table": jnp.asarray(table)}
    else:
        indices = np.where(
            (inputs.indices < 0) | (inputs.indices >= inputs.case.slots),
            -1,
            inputs.indices + moved * 53,
        )
        options = {"indices": jnp.asarray(indices.astype(np.int32))}
    same_bits(launch(inputs, k_cache=large, **options), want)
