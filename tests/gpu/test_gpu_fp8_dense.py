"""Dense decode over FP8 V3.2 caches on a GPU: what dequantising first would give, and its rules.

Most launches go without XLA around them (raw_launcher.py), so that a shape costs no compilation.
"""

import dataclasses
import functools

import cases
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DenseCase
from decode_checks import (
    INT32_MAX,
    INT32_MIN,
    METADATA,
    all_nan,
    by_name,
    chain,
    compile_call,
    custom_calls,
    is_nan,
    others_unchanged,
    run,
    same_bits,
    with_value,
)
from sparse_cases import build_fp8_dense, covering, raw_dense_launcher

import jax_flashmla
from jax_flashmla import dequantize_k_cache
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.metadata import get_mla_metadata

pytestmark = pytest.mark.gpu

DECODE = "flashmla_dense_decode"
check = functools.partial(oracle.check_decode, "dense_decode")


def launch(inputs, **options):
    return raw_dense_launcher(inputs, **options).run()


def right(want, got, what):
    try:
        oracle.check("dense_decode", "out", got[0], want[0])
        oracle.check("dense_decode", "lse", got[1], want[1])
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


# ------------------------------------------------------------------ through the public function

PUBLIC = [
    DenseCase("one-token", 1, 1, 1),
    DenseCase("few-heads", 3, 0, 16, page_size=16, lengths=(700, 0, 65), attn_sink=True),
    DenseCase("many-heads-causal", 2, 0, 128, s_q=2, causal=True, lengths=(333, 64)),
    DenseCase("odd-pages", 2, 0, 8, s_q=3, page_size=53, causal=True, lengths=(333, 2)),
    DenseCase("peaked10", 2, 700, 16, scores="peaked10"),
]


@by_name(PUBLIC)
def test_kernel_agrees_with_oracle(case):
    """The kernel is what runs by default, and gives the same bits again."""
    inputs = build_fp8_dense(case)
    compiled, call = compile_call(inputs.call(), implementation=None)
    assert custom_calls(compiled, DECODE) == custom_calls(compiled, METADATA) == 1
    got = call()
    check(inputs, got)
    same_bits(call(), got, "second run")
    same_bits(launch(inputs), got, "without XLA")


def test_as_dequantised_first():
    """Beside the kernel for bfloat16 caches: the same tokens, so all but the same result."""
    inputs = build_fp8_dense(DenseCase("first", 3, 0, 64, s_q=2, causal=True, lengths=(900, 7, 64)))
    fp8 = run(inputs.call(), implementation="cuda")
    cache = PagedKVCache(jnp.asarray(inputs.data), "fp8_v32", 64)
    same_bits(run(inputs.call(), k_cache=cache), fp8, "PagedKVCache")
    same_bits(run(inputs.call(), k_cache=inputs.data.view(oracle.FLOAT8)), fp8, "float8")
    plain = dequantize_k_cache(jnp.asarray(inputs.data))
    plain = run(inputs.call(), k_cache=plain, is_fp8_kvcache=False, implementation="cuda")
    oracle.check_norm("dense_decode", "out", fp8[0], plain[0])
    oracle.check_norm("dense_decode", "lse", fp8[1], plain[1], bound=1e-5)


def test_metadata_of_dense_decode_serves_both_formats():
    case = DenseCase("metadata", 4, 0, 16, s_q=2, causal=True, lengths=(700, 64, 0, 333))
    inputs = build_fp8_dense(case)
    want = inputs.expected()
    schedule = get_mla_metadata(jnp.asarray(inputs.cache_seqlens), 32, 1, num_sm_parts=7)
    names = ("tile_scheduler_metadata", "num_splits")
    given = dict(zip(names, schedule, strict=True))
    right(want, run(inputs.call(), implementation="cuda", **given), "given")
    for lengths in ((0, 0, 0, 0), (1, 1, 1, 100000), (64, 700, 333, 0)):
        stale = get_mla_metadata(jnp.int32(lengths), 32, 1, num_sm_parts=7)
        stale = dict(zip(names, stale, strict=True))
        got = run(inputs.call(), implementation="cuda", **stale)
        right(want, got, f"made for {lengths}")
    rows = np.asarray(schedule[0])
    for column in range(8):
        corrupt = given | {names[0]: with_value(rows, (2, column), rows[2, column] ^ 64)}
        got = run(inputs.call(), implementation="cuda", **corrupt)
        if not all_nan(got):
            assert column < 4, column
            right(want, got, f"column {column}")


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"q": "float32"}, "float32"),
        ({"head_dim_v": 256}, "576 and head_dim_v=256"),
    ],
    ids=["float32", "values"],
)
def test_what_the_kernel_declines(change, reason):
    call = build_fp8_dense(DenseCase("declines", 2, 70, 4)).call()
    if "q" in change:
        change = {"q": call["q"].astype(change["q"])}
    with pytest.raises(NotImplementedError, match=f"flash_mla_dense_decode.*{reason}"):
        run(call, implementation="cuda", **change)
    explanation = jax_flashmla.explain(flash_mla_with_kvcache, **call | change)
    assert explanation.implementation == "xla" and reason in str(explanation)
    assert jax_flashmla.explain(flash_mla_with_kvcache, **call).implementation == "cuda"


@pytest.mark.parametrize("empty", ["b", "s_q", "columns", "pages"])
def test_sizes_of_zero(empty):
    inputs = build_fp8_dense(DenseCase("zero", 3, 0, 16, s_q=2, lengths=(200, 0, 65)))
    b, s_q = 0 if empty == "b" else 3, 0 if empty == "s_q" else 2
    call = inputs.call() | {
        "q": inputs.q[:b, :s_q],
        "k_cache": inputs.data[: 0 if empty == "pages" else None],
        "block_table": inputs.block_table[:b, : 0 if empty == "columns" else None],
        "cache_seqlens": inputs.cache_seqlens[:b],
    }
    out, lse = run(call, implementation="cuda")
    assert out.shape == (b, s_q, 16, 512) and lse.shape == (b, 16, s_q)
    if empty in ("columns", "pages"):  # only the empty request can be served
        assert all_nan([out[[0, 2]], lse[[0, 2]]])
        assert (out[1] == 0).all() and (lse[1] == np.inf).all()


# ------------------------------------------------------------------ shapes

SHAPES = {
    "h_q": (1, 8, 16, 63, 64, 65, 128, 130),
    "s_q": (1, 2, 3, 4, 5),
    "page_size": (1, 2, 16, 53, 64, 256),
    "lengths": ((400, 0, 65, 3), (64, 128, 1, 700), (1500, 63, 0, 129)),
    "causal": (False, True),
    "attn_sink": (False, True),
}


def _shape(point):
    marks = [name for name in ("causal", "attn_sink") if point[name]]
    name = f"h{point['h_q']}-sq{point['s_q']}-page{point['page_size']}-{max(point['lengths'])}"
    return DenseCase("-".join(["fp8", name, *marks]), 4, 0, **point)


@by_name([_shape(point) for point in covering(SHAPES)])
def test_shapes(case):
    inputs = build_fp8_dense(case)
    want = inputs.expected()
    for options in ({}, {"num_sm_parts": 1}, {"num_sm_parts": 40}):
        right(want, launch(inputs, **options), options)


@pytest.mark.parametrize("h_q", [16, 128])
def test_every_length_around_a_block(h_q):
    around = [64 * blocks + more for blocks in range(3, 7) for more in (-1, 0, 1)]
    lengths = (*range(131), *around)
    case = DenseCase(f"fp8-around-{h_q}", len(lengths), 0, h_q, lengths=lengths, page_size=16)
    inputs = build_fp8_dense(case)
    want = inputs.expected()
    for options in ({}, {"num_sm_parts": 1}, {"num_sm_parts": 500}):
        right(want, launch(inputs, **options), options)


@pytest.mark.parametrize("scores", ["peaked3", "peaked10", "rising"])
@pytest.mark.parametrize("scales", ["power", "arbitrary"])
@pytest.mark.parametrize("parts", [1, None])
def test_scores(scores, scales, parts):
    case = DenseCase(
        f"fp8-{scores}", 2, 0, 16, s_q=2, causal=True, lengths=(2000, 333), scores=scores
    )
    inputs = build_fp8_dense(case, scales=scales)
    check(inputs, launch(inputs, num_sm_parts=parts))


@pytest.mark.parametrize("h_q", [3, 16, 17, 32, 64])
@pytest.mark.parametrize("parts", [1, 5, None])
def test_powers_of_two_beside_other_scales(h_q, parts):
    """Blocks of either kind in a request, and blocks with both: each has products of its own."""
    case = DenseCase(f"fp8-mixed-{h_q}", 2, 0, h_q, causal=True, lengths=(2000, 333))
    inputs = build_fp8_dense(case, scales="power")
    data = inputs.data.copy()
    other = build_fp8_dense(case, scales="arbitrary").data
    rng = np.random.default_rng(h_q)
    pages = rng.random(len(data)) < 0.4
    data[pages] = other[pages]
    tokens = rng.random(data.shape[:2]) < 0.002
    data[tokens] = other[tokens]
    mixed = inputs.with_data(data)
    check(mixed, launch(mixed, num_sm_parts=parts))


@pytest.mark.parametrize("parts", [1, 2, 7, 132, 500])
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_any_number_of_parts(parts, batch_invariant):
    case = DenseCase("fp8-parts", 3, 0, 70, s_q=2, causal=True, lengths=(0, 3000, 64))
    inputs = build_fp8_dense(case)
    check(inputs, launch(inputs, num_sm_parts=parts, batch_invariant=batch_invariant))


def test_many_requests_and_long_ones():
    varying = DenseCase("fp8-varying", 40, 900, 16, lengths="varying", empty=True)
    long = DenseCase("fp8-long", 1, 20_001, 16, s_q=2, causal=True)
    for case in (varying, long):
        inputs = build_fp8_dense(case)
        check(inputs, launch(inputs))


# ------------------------------------------------------------------ values that are wrong

BAD = DenseCase("fp8-bad", 5, 0, 16, s_q=2, page_size=32, lengths=(200, 130, 65, 300, 0))
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
    inputs = build_fp8_dense(dataclasses.replace(BAD, causal=causal))
    rows, _ = chain(parts, BAD.b)
    clean = launch(inputs, schedule=jnp.asarray(rows))
    check(inputs, clean)

    def changed(**arrays):
        return launch(dataclasses.replace(inputs, **arrays), schedule=jnp.asarray(rows))

    return inputs, changed, clean


def test_bad_lengths(bad):
    inputs, changed, clean = bad
    capacity = inputs.block_table.shape[1] * BAD.page_size
    for length in (-1, -64, INT32_MIN):
        got = changed(cache_seqlens=with_value(inputs.cache_seqlens, 0, length))
        assert (got[0][0] == 0).all() and (got[1][0] == np.inf).all(), length
        others_unchanged(got, clean, 0, length)
    for length in (capacity + 1, capacity + 64, 2**30, INT32_MAX):
        got = changed(cache_seqlens=with_value(inputs.cache_seqlens, 1, length))
        assert all_nan([x[1] for x in got]), length
        others_unchanged(got, clean, 1, length)
    assert all_nan(changed(cache_seqlens=np.full(5, INT32_MAX, np.int32)))


def test_used_entry_that_is_no_page_is_nan(bad):
    inputs, changed, clean = bad
    for entry in (-1, len(inputs.data), cases.GARBAGE, INT32_MIN, INT32_MAX):
        for column in (0, 3, 6):  # of 7 pages, the last with 8 tokens
            got = changed(block_table=with_value(inputs.block_table, (0, column), entry))
            assert all_nan([x[0] for x in got]), (entry, column)
            others_unchanged(got, clean, 0, (entry, column))


def test_entries_past_the_length_are_never_used(bad):
    inputs, changed, clean = bad
    for entry in (0, -1, INT32_MIN, INT32_MAX, len(inputs.data)):
        table = inputs.block_table.copy()
        for r, length in enumerate(inputs.cache_seqlens):
            table[r, -(-length // BAD.page_size) :] = entry
        same_bits(changed(block_table=table), clean, entry)


def test_unused_slots_never_leak(bad):
    inputs, changed, clean = bad  # the clean result is of a cache with 0xFF there
    unused = is_nan(inputs.k_cache).any(axis=-1)
    assert unused.any()
    for value in (0x00, 0x7F, 0x80):
        data = inputs.data.copy()
        data[unused] = value
        same_bits(changed(data=data), clean, value)


@pytest.mark.parametrize(
    "byte,value",
    [
        (0, b"\x7f"),
        (511, b"\xff"),
        (516, b"\x00\x00\xc0\x7f"),
        (528, b"\xc0\x7f"),
        (654, b"\xc0\xff"),
    ],
    ids=["first-code", "last-code", "scale", "rope", "last-of-rope"],
)
def test_nan_in_a_token_stays_in_its_request(bad, byte, value):
    inputs, changed, clean = bad
    for token in (0, 63, 64, 129):
        page = inputs.block_table[1, token // BAD.page_size]
        data = inputs.data.copy()
        row = data[page, token % BAD.page_size, 0]
        row[byte : byte + len(value)] = np.frombuffer(value, np.uint8)
        got = changed(data=data)
        seen_by = slice(int(inputs.case.causal and token == 129), None)  # of the query tokens
        assert all_nan([got[0][1][seen_by], got[1][1][:, seen_by]]), token
        others_unchanged(got, clean, 1, token)


def test_schedules_that_are_none_give_nan(bad):
    inputs, _, _ = bad
    rng = np.random.default_rng(0)
    noise = rng.integers(INT32_MIN, INT32_MAX, (3, 8), np.int32)
    sparse, _ = chain(WHOLE, BAD.b, sparse=True)
    for rows in (noise, np.zeros((3, 8), np.int32), np.full((5, 8), INT32_MAX, np.int32), sparse):
        assert all_nan(launch(inputs, schedule=jnp.asarray(rows)))


# ------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("h_q", [16, 128])
def test_batch_invariant_results_have_the_same_bits(h_q):
    """Alone, at any place in any batch, and with any number of parts."""
    case = DenseCase(f"fp8-invariant-{h_q}", 5, 0, h_q, lengths=(1500, 70, 0, 3000, 256))
    inputs = build_fp8_dense(case)

    def picked(requests):
        requests = list(requests)
        return dataclasses.replace(
            inputs,
            q=inputs.q[requests],
            block_table=inputs.block_table[requests],
            cache_seqlens=inputs.cache_seqlens[requests],
        )

    together = launch(inputs, batch_invariant=True)
    check(inputs, together)
    for r in range(case.b):
        got = launch(picked([r]), batch_invariant=True)
        same_bits([x[0] for x in got], [x[r] for x in together], f"request {r} alone")
    rng = np.random.default_rng(0)
    for parts in (1, 2, 300):
        order = rng.integers(0, case.b, 11)  # some twice, some not at all
        got = launch(picked(order), batch_invariant=True, num_sm_parts=parts)
        same_bits(got, [x[order] for x in together], f"requests {order} in {parts} parts")


def test_repeated_runs_give_the_same_bits():
    case = DenseCase("fp8-repeated", 6, 900, 128, s_q=2, causal=True, lengths="varying")
    problem = raw_dense_launcher(build_fp8_dense(case))
    first = problem.run()
    assert not is_nan(first[0]).any()
    for _ in range(10):
        same_bits(problem.run(), first)
