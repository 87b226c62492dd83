"""Dense decode kernels over shapes, page sizes and schedules, launched without XLA around them.

See grid.py: the cache is NaN wherever a case does not use it, the reference is float32 on the
device, every launch is repeated and must give the same bits. The full grid is grid.py's own.
"""

import dataclasses
import functools
import itertools

import cases
import grid
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DenseCase
from grid import Problem
from raw_launcher import RawDenseDecode

from jax_flashmla._cuda import DENSE_DIMS

# In one process when there are several: each would have its own large caches.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("dense_grid")]

VARYING = functools.partial(DenseCase, lengths="varying", empty=True)
# At most 0.5 GB, for each of many runners.
SMALL_POOL = grid.Sizes(cache_rows=1 << 19)


@pytest.fixture(scope="module")
def check():
    """Runs problems; what is large is made once for each dtype and pair of head dimensions."""
    runners = {}

    def run(problem):
        case = problem.case
        kind = case.dtype, (case.d, case.dv)
        if kind not in runners:
            sizes = grid.Sizes() if kind[1] == grid.DIMS else SMALL_POOL
            runners[kind] = grid.Runner(case.dtype, sizes, kind[1])
        outcome = runners[kind].run(problem)
        assert not outcome.failures, f"{problem}: {'; '.join(outcome.failures)}"

    return run


def names(problem):
    return problem.name.replace(" ", "-")


# bfloat16 first, so that nothing is made twice whatever is selected.
PAIRWISE = sorted(cases.dense_pairwise(), key=lambda case: case.dtype)


@pytest.mark.parametrize("case", PAIRWISE, ids=lambda case: case.name)
def test_pairwise_subset_of_the_grid(check, case):
    check(Problem(case))


SHAPES = [case for dims in DENSE_DIMS for case in cases.dense_shapes(*dims)]


@pytest.mark.parametrize(
    "case",
    sorted(SHAPES, key=lambda case: (case.d, case.dv, case.dtype)),
    ids=lambda case: case.name,
)
def test_shapes_of_all_head_dimensions(check, case):
    check(Problem(case, sink="heads" if case.attn_sink else None))


@pytest.mark.parametrize("dims", DENSE_DIMS, ids=lambda dims: f"{dims[0]}-{dims[1]}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lengths_parts_and_peaked_scores_of_all_head_dimensions(check, dims, dtype):
    """Every tail of a block, pieces of every size, and scores whose maximum moves."""
    case = functools.partial(DenseCase, d=dims[0], dv=dims[1], dtype=dtype)
    name = f"dims{dims[0]}-{dims[1]}"
    lengths = (*range(60, 70), *range(124, 134), 0, 1, 2, 320, 3000)
    around = case(f"{name}-around", len(lengths), 0, 16, lengths=lengths, s_q=2, causal=True)
    two_tiles = case(f"{name}-two-tiles", 3, 0, 128, lengths=(9000, 0, 64))
    for parts in (None, 1, 7, 500):
        check(Problem(around, num_sm_parts=parts))
        check(Problem(two_tiles, num_sm_parts=parts, batch_invariant=True))
    whole = case(f"{name}-whole", 150, 700, 16)
    # The deviation of the scores is about 3 and 10: see normal / 10 times itself.
    for deviation in (3, 10):
        scale = deviation / (0.01 * dims[0] ** 0.5)
        for problem in (around, two_tiles, whole):
            check(Problem(problem, softmax_scale=scale, by_norm=True))


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 192, 256])
@pytest.mark.parametrize(
    "case",
    [
        VARYING("grouped", 6, 1000, 9, s_q=2, h_kv=3, causal=True),
        VARYING("two-tiles", 5, 700, 128, dtype="float16"),
        # The last page holds 1, few, all but one and all of its tokens.
        DenseCase("borders", 8, 0, 16, lengths=(1, 7, 8, 9, 63, 65, 511, 513), causal=True, s_q=3),
    ],
    ids=lambda case: case.name,
)
def test_page_sizes(check, case, page_size):
    case = dataclasses.replace(case, name=f"{case.name}-page{page_size}", page_size=page_size)
    check(Problem(case))


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 132, 1000])
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_any_number_of_parts(check, parts, batch_invariant):
    for case in (
        VARYING("parts-few-heads", 6, 1500, 8, s_q=2, causal=True),
        DenseCase("parts-two-tiles", 3, 0, 70, lengths=(0, 6000, 64)),
        DenseCase("parts-key-heads", 2, 0, 6, s_q=2, h_kv=2, lengths=(1, 2500)),
    ):
        check(Problem(case, num_sm_parts=parts, batch_invariant=batch_invariant))


@pytest.mark.parametrize("h_q", [8, 128])
def test_every_length_around_a_block(check, h_q):
    """All lengths to 130 and around multiples of 64 up to 9 blocks: both buffers, every tail."""
    around = [64 * blocks + more for blocks in range(3, 10) for more in (-1, 0, 1)]
    lengths = tuple(itertools.chain(range(131), around))
    case = DenseCase("around", len(lengths), 0, h_q, lengths=lengths)
    # With all parts most requests are whole, and with one part all are; then pieces are small.
    check(Problem(case))
    check(Problem(case, num_sm_parts=1))
    check(Problem(dataclasses.replace(case, s_q=2, causal=True), num_sm_parts=500))


@pytest.mark.parametrize("scale", [12.5, 41.7], ids=["deviation3", "deviation10"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_peaked_scores(check, scale, dtype):
    for case in (
        VARYING("peaked", 5, 3000, 16, s_q=2, causal=True, dtype=dtype),
        DenseCase("peaked-whole", 150, 700, 128, dtype=dtype),
    ):
        check(Problem(case, softmax_scale=scale, by_norm=True))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30])
def test_unusual_scales(check, scale):
    case = VARYING("scale", 4, 400, 16, s_q=2, causal=True)
    check(Problem(case, softmax_scale=scale))


@pytest.mark.parametrize("sink", ["heads", "requests"])
@pytest.mark.parametrize("parts", [None, 1, 40])
def test_attention_sinks(check, sink, parts):
    # Requests that are empty, whole and cut.
    case = VARYING("sinks", 7, 800, 20, s_q=2, causal=True)
    check(Problem(case, num_sm_parts=parts, sink=sink))


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_many_query_tokens(check, causal):
    """Up to 1024 rows of a key head; with causal some query tokens see nothing."""
    lengths = (30, 64, 0, 65, 500, 3000)
    for h_q, h_kv in ((16, 1), (3, 3)):
        name = f"many-tokens-{h_q}"
        check(Problem(DenseCase(name, 6, 0, h_q, 64, h_kv, causal=causal, lengths=lengths)))


@pytest.mark.parametrize("h_q,h_kv", [(129, 1), (160, 1), (256, 1), (192, 2), (40, 40)])
def test_many_heads(check, h_q, h_kv):
    check(Problem(VARYING(f"heads-{h_q}-{h_kv}", 3, 500, h_q, 2, h_kv, causal=True)))


@pytest.mark.parametrize("s_k", [131072, 300000])
@pytest.mark.parametrize("h_q", [16, 128])
def test_long_requests(check, s_k, h_q):
    check(Problem(DenseCase(f"long-{s_k}-{h_q}", 1, s_k, h_q)))
    case = DenseCase(f"long-{s_k - 1}-{h_q}", 1, s_k - 1, h_q, s_q=3, causal=True)
    check(Problem(case))
    check(Problem(dataclasses.replace(case, dtype="float16"), batch_invariant=True))


def test_long_and_short_requests(check):
    case = DenseCase("uneven", 5, 0, 32, s_q=2, causal=True, lengths=(131072, 5, 0, 20001, 64))
    check(Problem(case))
    check(Problem(case, batch_invariant=True))
    check(Problem(case, num_sm_parts=3))


@pytest.mark.parametrize("h_kv,page_size", [(1, 64), (1, 8), (2, 192), (3, 16)])
def test_end_of_a_cache_of_more_than_4_gib(check, h_kv, page_size):
    case = VARYING(
        f"end-{h_kv}-{page_size}", 4, 900, 6, s_q=2, h_kv=h_kv, page_size=page_size, causal=True
    )
    tokens = case.cache_seqlens().sum() + case.b * page_size
    first = (grid.Sizes().cache_rows - (tokens + page_size) * h_kv) * grid.DIMS[0]
    assert first > 2**31 and 2 * first > 2**32  # elements and bytes before the first page in use
    check(Problem(case, last_pages=True))


# ------------------------------------------------------------------ scores with their own caches


def check_norms(inputs, **options):
    case = inputs.case
    got = RawDenseDecode(
        q=jax.device_put(inputs.q),
        k_cache=jax.device_put(inputs.k_cache),
        block_table=jax.device_put(inputs.block_table),
        cache_seqlens=jax.device_put(inputs.cache_seqlens),
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        head_dim_v=case.dv,
        attn_sink=None if inputs.attn_sink is None else jnp.asarray(inputs.attn_sink),
        **options,
    ).run()
    assert case.scores != "flat"
    oracle.check_decode("dense_decode", inputs, got)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scores", ["peaked3", "peaked10", "rising"])
@pytest.mark.parametrize("parts", [1, None])
@pytest.mark.parametrize("dims", DENSE_DIMS, ids=lambda dims: f"{dims[0]}-{dims[1]}")
def test_scores(dims, scores, dtype, parts):
    """The maximum moves in every block; judged by the norm of the error."""
    case = DenseCase(
        f"{scores}-{dtype}-{dims[0]}-{dims[1]}",
        2,
        0,
        16,
        s_q=2,
        d=dims[0],
        dv=dims[1],
        causal=True,
        lengths=(2000, 333),
        scores=scores,
        dtype=dtype,
        attn_sink=True,
    )
    check_norms(cases.build(case), num_sm_parts=parts)


def test_falling_scores():
    """The maximum is in the first block, all later factors are 1 and weights vanish."""
    case = DenseCase("falling", 1, 2000, 16, scores="rising")
    inputs = cases.build(case)
    inputs.q[..., -1] *= -1
    check_norms(inputs)
    check_norms(inputs, num_sm_parts=1)


def test_results_do_not_depend_on_results_of_other_rows():
    """One head has huge scores: the others of its tile keep their bits."""
    case = DenseCase("huge", 1, 1000, 16)
    inputs = cases.build(case)

    def run():
        return RawDenseDecode(
            q=jax.device_put(inputs.q),
            k_cache=jax.device_put(inputs.k_cache),
            block_table=jax.device_put(inputs.block_table),
            cache_seqlens=jax.device_put(inputs.cache_seqlens),
            softmax_scale=case.softmax_scale,
        ).run()

    before = run()
    inputs.q[0, 0, 5] = 1e4
    inputs.q[0, 0, 6] = np.nan
    out, lse = run()
    others = [h for h in range(16) if h not in (5, 6)]
    np.testing.assert_array_equal(out[:, :, others], before[0][:, :, others])
    np.testing.assert_array_equal(lse[:, others], before[1][:, others])
    assert np.isnan(out[0, 0, 6].astype(np.float32)).all() and np.isnan(lse[0, 6]).all()
    assert np.isfinite(out[0, 0, 5].astype(np.float32)).all()
