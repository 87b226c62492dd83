"""Sparse decode on a GPU: all cache formats, shapes and schedules, bad values, JAX.

The sweeps launch the kernels without XLA around them (raw_launcher.py), so that a shape costs no
compilation; what concerns JAX goes through the public functions. The peer's grid is in
test_sparse_grid.py.
"""

import dataclasses
import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sparse_cases
from cases import SparseCase
from decode_checks import (
    INT32_MAX,
    INT32_MIN,
    METADATA,
    all_nan,
    at_the_end,
    by_name,
    chain,
    compile_call,
    custom_calls,
    is_nan,
    run,
    same_bits,
    with_value,
)
from sparse_cases import FORMATS, is_used, pick, public_call, raw_launcher, token_bytes, whole_pages

import jax_flashmla
from jax_flashmla import _planning
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.metadata import get_mla_metadata

pytestmark = pytest.mark.gpu

DECODE = "flashmla_sparse_decode"
KINDS = sparse_cases.sparse_kinds()
FP8 = tuple(case for case in KINDS if case.cache_format != "plain")
#: One kind of each way that the bytes of a token lie, where more would show nothing new.
FEW = tuple(case for case in KINDS if case.name in ("plain-576-all", "v32-arbitrary-all", "v4-all"))

check = functools.partial(oracle.check_decode, "sparse_decode")


@functools.lru_cache(maxsize=16)
def built(case):
    """Inputs that tests share and must not change."""
    return cases.build_sparse(case)


@functools.lru_cache(maxsize=16)
def expected(case):
    return built(case).expected()


@functools.lru_cache(maxsize=16)
def clean(case):
    """The result of the shared inputs as they are, in two parts."""
    return launch(built(case), num_sm_parts=2)


def launch(inputs, **options):
    return raw_launcher(inputs, **options).run()


def right(want, got, what=""):
    try:
        oracle.check("sparse_decode", "out", got[0], want[0])
        oracle.check("sparse_decode", "lse", got[1], want[1])
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


# ------------------------------------------------------------------ through the public function

PUBLIC = [
    case
    for case in cases.sparse_small()
    if case.dtype != "float32" and (case.d, case.dv) in ((576, 512), (512, 512))
]
PUBLIC.append(SparseCase("plain-512", 2, 100, 16, s_q=2, d=512, extra_topk=33, attn_sink=True))


@by_name(PUBLIC)
def test_kernel_agrees_with_oracle(case):
    """The kernel is what runs by default, and gives the same bits again."""
    inputs = cases.build_sparse(case)
    compiled, call = compile_call(public_call(inputs), implementation=None)
    assert custom_calls(compiled, DECODE) == custom_calls(compiled, METADATA) == 1
    got = call()
    check(inputs, got)
    same_bits(call(), got, "second run")
    same_bits(launch(inputs), got, "without XLA")


def test_xla_agrees_with_the_kernel():
    case = next(case for case in PUBLIC if case.name == "v32-extra-sink")
    call = public_call(built(case))
    compiled, call_xla = compile_call(call, implementation="xla")
    assert custom_calls(compiled, DECODE) == custom_calls(compiled, METADATA) == 0
    xla, cuda = call_xla(), run(call, implementation="cuda")
    oracle.check_norm("sparse_decode", "out", cuda[0], xla[0], bound=5e-3)
    oracle.check_norm("sparse_decode", "lse", cuda[1], xla[1], bound=1e-5)


def test_rows_as_float8_and_in_a_paged_cache():
    case = next(case for case in PUBLIC if case.name == "v32-arbitrary")
    inputs = built(case)
    call, want = public_call(inputs), launch(inputs)
    same_bits(run(call, k_cache=inputs.cache.data.view(oracle.FLOAT8)), want, "float8")
    cache = PagedKVCache(jnp.asarray(inputs.cache.data), "fp8_v32", case.page_size)
    same_bits(run(call, k_cache=cache), want, "paged")


PLAN = SparseCase(
    "plan",
    4,
    300,
    16,
    s_q=2,
    cache_format="fp8_v32",
    scales="arbitrary",
    topk_length=True,
    extra_topk=130,
    extra_topk_length=True,
)
PLAN_PARTS, PLAN_TILES = 7, 2


def planned(inputs, **changes):
    case = inputs.case
    options = {
        "num_q_tokens_per_head_k": case.s_q * case.h_q,
        "num_heads_k": 1,
        "num_heads_q": case.h_q,
        "topk": case.topk,
        "topk_length": inputs.topk_length,
        "extra_topk": case.extra_topk,
        "extra_topk_length": inputs.extra_topk_length,
        "num_sm_parts": PLAN_PARTS,
    }
    return get_mla_metadata(**options | changes)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_metadata_through_the_public_functions(batch_invariant):
    """Given, stale, foreign and corrupt: one program for all of them."""
    inputs, case = built(PLAN), PLAN
    call = public_call(inputs)
    metadata, splits = map(np.asarray, planned(inputs, batch_invariant=batch_invariant))
    options = {"implementation": "cuda", "batch_invariant": batch_invariant}

    def run_with(rows, splits=splits):
        return run(call, tile_scheduler_metadata=rows, num_splits=splits, **options)

    got = run_with(metadata)
    right(expected(case), got, "its own schedule")
    same_bits(run(call, **options, num_sm_parts=PLAN_PARTS), got, "planned within the call")
    rng = np.random.default_rng(0)
    for lengths in ((0, 0, 0, 0), (300, 1, 1, 1), (1, 1, 1, INT32_MAX), (-5, 64, 65, 300)):
        for more in (inputs.extra_topk_length, rng.integers(-5, 140, 4).astype(np.int32)):
            stale = planned(
                inputs,
                topk_length=np.int32(lengths),
                extra_topk_length=more,
                batch_invariant=batch_invariant,
            )
            right(expected(case), run_with(*stale), f"schedule made for {lengths} and {more}")
    foreign = {
        "more query tokens": planned(
            inputs, num_q_tokens_per_head_k=48, batch_invariant=batch_invariant
        ),
        "the other splitting": planned(inputs, batch_invariant=not batch_invariant),
        "dense": get_mla_metadata(
            jnp.zeros(4, jnp.int32), 128, 1, num_sm_parts=7, batch_invariant=batch_invariant
        ),
        "batch of 3": planned(pick(inputs, range(3)), batch_invariant=batch_invariant),
        "zeros": (np.zeros((PLAN_PARTS, 8), np.int32),),
        "noise": (rng.integers(INT32_MIN, INT32_MAX, (PLAN_PARTS, 8), np.int32),),
    }
    for name, (rows, *_) in foreign.items():
        assert all_nan(run_with(rows)), name
    for part, column in itertools.product((0, 3, 6), range(8)):
        got = run_with(with_value(metadata, (part, column), metadata[part, column] ^ 64))
        if not all_nan(got):
            assert column < 4, (part, column)
            right(expected(case), got, f"row {part} column {column}")


def test_one_schedule_for_two_layers():
    inputs = built(PLAN)
    call = public_call(inputs)
    names = [name for name, x in call.items() if isinstance(x, np.ndarray)]
    rest = {name: x for name, x in call.items() if name not in names}

    @jax.jit
    def step(arrays):
        schedule = get_mla_metadata(
            num_q_tokens_per_head_k=32,
            num_heads_k=1,
            num_heads_q=16,
            topk=300,
            topk_length=arrays["topk_length"],
            extra_topk=130,
            extra_topk_length=arrays["extra_topk_length"],
        )
        given = dict(zip(("tile_scheduler_metadata", "num_splits"), schedule, strict=True))
        return [
            flash_mla_with_kvcache(**arrays | {"q": factor * arrays["q"]}, **rest, **given)
            for factor in (1, 2)
        ]

    arrays = {name: call[name] for name in names}
    compiled = step.lower(arrays).compile()
    assert custom_calls(compiled, METADATA) == 1 and custom_calls(compiled, DECODE) == 2
    first, second = compiled(arrays)
    assert _planning.default_num_sm_parts(2) == jax.devices()[0].core_count // 2
    check(inputs, [np.asarray(x) for x in first])
    check(dataclasses.replace(inputs, q=2 * inputs.q), [np.asarray(x) for x in second])


@pytest.mark.parametrize("batched", ["q-indices-sink", "k_cache"])
def test_vmap(batched):
    """Queries and choices over a shared cache, and caches under shared choices."""
    case = SparseCase("vmap", 2, 100, 16, s_q=2, cache_format="fp8_v32", topk_length=True)
    several = [built(dataclasses.replace(case, name=f"vmap{i}")) for i in range(3)]
    first = several[0]
    rng = np.random.default_rng(0)
    sinks = rng.normal(3, 3, (3, 16)).astype(np.float32)
    sinks[:, 3], sinks[0, 4] = np.inf, -np.inf
    # Nothing is poisoned where another entry may look.
    data = [sparse_cases.unpoisoned(inputs) for inputs in several]
    axes = {"q": 0, "k_cache": None, "indices": 0, "topk_length": 0, "attn_sink": 0}
    arrays = {
        "q": np.stack([x.q for x in several]),
        "k_cache": data[0],
        "indices": np.stack([x.indices for x in several]),
        "topk_length": np.stack([x.topk_length for x in several]),
        "attn_sink": sinks,
    }
    if batched == "k_cache":
        axes = {name: 0 if name == "k_cache" else None for name in axes}
        arrays = {name: x[0] for name, x in arrays.items()} | {"k_cache": np.stack(data)}

    def one(q, k_cache, indices, topk_length, attn_sink):
        return flash_mla_with_kvcache(
            q,
            k_cache,
            None,
            None,
            512,
            is_fp8_kvcache=True,
            softmax_scale=case.softmax_scale,
            indices=indices,
            topk_length=topk_length,
            attn_sink=attn_sink,
            implementation="cuda",
        )

    vmapped = jax.jit(jax.vmap(one, in_axes=tuple(axes.values())))
    compiled = vmapped.lower(*arrays.values()).compile()
    assert custom_calls(compiled, DECODE) == 1
    out, lse = (np.asarray(x) for x in compiled(*arrays.values()))
    for i in range(3):
        own = {name: x if axes[name] is None else x[i] for name, x in arrays.items()}
        inputs = dataclasses.replace(
            first,
            q=own["q"],
            indices=own["indices"],
            topk_length=own["topk_length"],
            attn_sink=own["attn_sink"],
        )
        check(sparse_cases.with_data(inputs, own["k_cache"]), (out[i], lse[i]))


@pytest.mark.parametrize("empty", ["b", "s_q", "topk", "pages", "both"])
def test_sizes_of_zero(empty):
    inputs = built(PLAN)
    b, s_q = 0 if empty == "b" else 4, 0 if empty == "s_q" else 2
    topk = 0 if empty in ("topk", "both") else None
    extra = 0 if empty == "both" else None
    call = public_call(inputs) | {
        "q": inputs.q[:b, :s_q],
        "k_cache": inputs.cache.data[: 0 if empty == "pages" else None],
        "indices": inputs.indices[:b, :s_q, :topk],
        "topk_length": inputs.topk_length[:b],
        "extra_indices_in_kvcache": inputs.extra_indices[:b, :s_q, :extra],
        "extra_topk_length": inputs.extra_topk_length[:b],
    }
    out, lse = run(call, implementation="cuda")
    assert out.shape == (b, s_q, 16, 512) and lse.shape == (b, 16, s_q)
    if empty == "both":
        assert (out == 0).all() and (lse == np.inf).all()
    elif empty in ("topk", "pages"):  # the extra cache alone
        none = dataclasses.replace(inputs, indices=np.full_like(inputs.indices, -1))
        check(none, (out, lse))


UNSUPPORTED = [
    (SparseCase("float32", 2, 40, 4, dtype="float32"), "float32"),
    (SparseCase("fp8-float32", 2, 40, 4, cache_format="fp8_v32", dtype="float32"), "float32"),
    (SparseCase("dims", 2, 40, 4, d=192, dv=128), "192 and head_dim_v=128"),
    (SparseCase("values", 2, 40, 4, d=576, dv=256), "576 and head_dim_v=256"),
]


@pytest.mark.parametrize("case,reason", UNSUPPORTED, ids=lambda x: getattr(x, "name", None))
def test_what_the_kernel_declines(case, reason):
    call = public_call(cases.build_sparse(case))
    with pytest.raises(NotImplementedError, match=f"flash_mla_sparse_decode.*{reason}"):
        run(call, implementation="cuda")
    explanation = jax_flashmla.explain(flash_mla_with_kvcache, **call)
    assert explanation.implementation == "xla" and reason in str(explanation)


def test_explain_says_cuda():
    for case in FEW:
        explanation = jax_flashmla.explain(flash_mla_with_kvcache, **public_call(built(case)))
        assert explanation.implementation == "cuda", case.name


# ------------------------------------------------------------------ shapes


@by_name(sparse_cases.sparse_shapes())
def test_shapes(case):
    """Formats, heads, choices, pages, query tokens, extra caches, lengths and sinks."""
    inputs = cases.build_sparse(case)
    want = inputs.expected()
    right(want, launch(inputs), "as planned")
    right(want, launch(inputs, num_sm_parts=1), "one part")


@by_name(KINDS)
def test_every_length_around_a_block(case):
    """0 to 130 choices and around multiples of 64, and the same of the extra cache."""
    around = [64 * blocks + more for blocks in (3, 4, 5) for more in (-1, 0, 1)]
    lengths = np.array([*range(131), *around], np.int32)
    b = len(lengths)
    inputs = cases.build_sparse(
        dataclasses.replace(case, name=f"{case.name}-around", b=b, topk=330, h_q=8, s_q=1)
    )
    inputs = sparse_cases.repaired(inputs)
    rng = np.random.default_rng(0)
    for extra in (np.zeros(b), 130 - np.minimum(lengths, 130), rng.integers(0, 131, b)):
        changed = dataclasses.replace(
            inputs, topk_length=lengths, extra_topk_length=extra.astype(np.int32)
        )
        want = changed.expected()
        for options in ({}, {"num_sm_parts": 500}, {"num_sm_parts": 1}):
            right(want, launch(changed, **options), options)


@by_name(KINDS)
def test_lengths_out_of_range(case):
    """A negative length counts as 0, one larger than topk as topk."""
    inputs = built(dataclasses.replace(case, name=f"{case.name}-range", topk_length=False))
    low, high = np.int32([-1, INT32_MIN, 0, -64]), np.int32([301, INT32_MAX, 300, 1000])
    for first, extra in ((low, high), (high, low), (high, high), (low, low)):
        changed = dataclasses.replace(inputs, topk_length=first, extra_topk_length=extra)
        clipped = dataclasses.replace(
            inputs,
            topk_length=np.clip(first, 0, case.topk),
            extra_topk_length=np.clip(extra, 0, case.extra_topk),
        )
        # What the extra indices past their former lengths name may be poisoned.
        clipped, changed = (sparse_cases.repaired(x) for x in (clipped, changed))
        got = launch(changed)
        check(clipped, got)
        same_bits(got, launch(clipped), (first, extra))


@by_name(KINDS)
@pytest.mark.parametrize("parts", [1, 2, 7, 132, 500])
def test_any_number_of_parts(case, parts):
    for batch_invariant in (False, True):
        got = launch(built(case), num_sm_parts=parts, batch_invariant=batch_invariant)
        right(expected(case), got, f"{parts} parts, batch_invariant={batch_invariant}")


@by_name(FEW)
@pytest.mark.parametrize("topk,h_q", [(4096, 16), (16384, 128)])
def test_many_choices(case, topk, h_q):
    case = SparseCase(
        f"{case.name}-many-{topk}-{h_q}",
        2,
        topk,
        h_q,
        slots=whole_pages(12_000, 64),
        page_size=64,
        cache_format=case.cache_format,
        scales=case.scales,
        d=case.d,
        topk_length=topk == 16384,
    )
    inputs = cases.build_sparse(case)
    if inputs.topk_length is not None:
        inputs = sparse_cases.repaired(
            dataclasses.replace(inputs, topk_length=np.int32([topk, topk - 63]))
        )
    want = inputs.expected()
    right(want, launch(inputs), "ordinary")
    right(want, launch(inputs, batch_invariant=True), "batch_invariant")


@by_name(FEW)
@pytest.mark.parametrize("invalid", [0.9, 1.0])
def test_mostly_and_only_invalid_indices(case, invalid):
    """Blocks without a single valid index among them."""
    case = dataclasses.replace(case, name=f"{case.name}-{invalid}", invalid=invalid, topk=1000)
    inputs = cases.build_sparse(case)
    got = launch(inputs)
    check(inputs, got)
    if invalid == 1:
        assert (got[0] == 0).all() and (got[1] == np.inf).all()
    # Whole blocks of one kind of invalid index, and one valid one at the very end.
    valid = np.flatnonzero(is_used(inputs)) if invalid < 1 else []
    for bad in (-1, case.slots, cases.GARBAGE, INT32_MIN, INT32_MAX):
        indices = np.full_like(inputs.indices, bad)
        if len(valid):
            indices[..., -1] = valid[0]
        changed = dataclasses.replace(inputs, indices=indices, topk_length=None)
        check(changed, launch(changed, num_sm_parts=40))


@by_name(KINDS)
def test_duplicates_count_twice(case):
    """Every index twice leaves out as it is and adds log 2 to lse."""
    once = dataclasses.replace(
        built(case), topk_length=None, extra_topk_length=None, attn_sink=None
    )
    once = sparse_cases.repaired(once)
    twice = dataclasses.replace(
        once,
        indices=np.tile(once.indices, 2),
        extra_indices=np.tile(once.extra_indices, 2),
    )
    first, second = launch(once), launch(twice)
    check(twice, second)
    oracle.check_norm("sparse_decode", "out", second[0], first[0], bound=5e-3)
    np.testing.assert_allclose(second[1], first[1] + np.log(2), rtol=1e-5, atol=1e-5)
    # One slot and nothing else: out is that token, lse its score and the number of times.
    slot = int(np.flatnonzero(is_used(once))[0])
    only = dataclasses.replace(
        once,
        indices=np.full((4, 2, 200), slot, np.int32),
        extra_indices=np.full_like(once.extra_indices, -1),
    )
    check(only, launch(only))


@by_name(KINDS)
def test_two_caches_are_one_union(case):
    """Which of two equal caches a token is taken from does not matter."""
    inputs = dataclasses.replace(built(case), topk_length=None, attn_sink=None)
    data = sparse_cases.unpoisoned(inputs)
    rng = np.random.default_rng(0)
    indices = rng.integers(0, case.slots, (4, 2, 192), dtype=np.int32)
    one = dataclasses.replace(
        sparse_cases.with_data(inputs, data),
        case=dataclasses.replace(case, extra_page_size=case.page_size),
        indices=indices,
        extra_cache=None,
        extra_indices=None,
        extra_topk_length=None,
    )
    two = dataclasses.replace(
        one, extra_cache=one.cache, indices=indices[..., :64], extra_indices=indices[..., 64:]
    )
    first, second = launch(one, num_sm_parts=1), launch(two, num_sm_parts=1)
    check(one, first)
    right(one.expected(), second, "from two caches")
    np.testing.assert_allclose(second[1], first[1], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("scores", ["peaked3", "peaked10"])
def test_peaked_scores(kind, scores):
    case = SparseCase(
        f"{kind}-{scores}",
        2,
        2000,
        20,
        s_q=2,
        slots=1024,
        scores=scores,
        extra_topk=200,
        attn_sink=True,
        **FORMATS[kind],
    )
    inputs = cases.build_sparse(case)
    check(inputs, launch(inputs))
    check(inputs, launch(inputs, num_sm_parts=1))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_rising_and_falling_maxima(kind, order):
    """The maximum moves in every block, or never after the first, whose weights then vanish."""
    case = SparseCase(
        f"{kind}-{order}", 2, 1500, 20, s_q=2, slots=1024, topk_length=True, **FORMATS[kind]
    )
    inputs = sparse_cases.build_rising(case)
    inputs = sparse_cases.repaired(dataclasses.replace(inputs, topk_length=np.int32([1500, 1000])))
    if order == "falling":
        inputs.q[..., -1] *= -1
    want = inputs.expected()
    for parts in (1, None):
        got = launch(inputs, num_sm_parts=parts)
        oracle.check_norm("sparse_decode", "lse", got[1], want[1], bound=1e-5)
        # The column that makes scores rise is a value if d is dv, and by far the largest.
        for columns in (slice(511), slice(511, 512)) if case.d == case.dv else (slice(512),):
            out = got[0][..., columns], want[0][..., columns]
            oracle.check_norm("sparse_decode", "out", *out)


@pytest.mark.parametrize("kind", FORMATS)
def test_results_do_not_depend_on_other_rows(kind):
    """One head has huge scores and one is NaN: the others of its tile keep their bits."""
    inputs = cases.build_sparse(SparseCase(f"{kind}-rows", 1, 500, 16, **FORMATS[kind]))
    before = launch(inputs)
    inputs.q[0, 0, 5] = 1e4
    inputs.q[0, 0, 6] = np.nan
    out, lse = launch(inputs)
    others = [h for h in range(16) if h not in (5, 6)]
    same_bits([out[:, :, others], lse[:, others]], [before[0][:, :, others], before[1][:, others]])
    assert is_nan(out[0, 0, 6]).all() and is_nan(lse[0, 6]).all()
    assert np.isfinite(out[0, 0, 5].astype(np.float32)).all()


# ------------------------------------------------------------------ scales and codes of FP8 caches


def right_by_tiles(changed, got, *, or_nan=False):
    """By the norm of each tile, since some are far larger; ``or_nan``: NaN will do as well."""
    want = changed.expected()
    if or_nan and is_nan(got[1]).any():
        # All of a query token or nothing of it.
        tokens = is_nan(got[1].transpose(0, 2, 1)).all(axis=-1)
        want = tuple(x.copy() for x in want)
        want[0][tokens] = want[1].transpose(0, 2, 1)[tokens] = np.nan
    sparse_cases.check_by_tiles(got, want)


@pytest.mark.parametrize("h_q", [16, 20, 64])
@pytest.mark.parametrize("powers", [False, True], ids=["any", "powers"])
@pytest.mark.parametrize(
    "low,high",
    [(2**-20, 2**-10), (2**-15, 2**-12), (1 / 3, 3), (16, 128), (50, 255), (200, 4000)],
    ids=str,
)
def test_scales_of_any_size(low, high, powers, h_q):
    """Scales that are powers of two or not, small ones and large ones, each tile its own."""
    case = SparseCase("scales", 2, 300, h_q, s_q=2, cache_format="fp8_v32", invalid=0.0)
    rng = np.random.default_rng(int(high))

    def scales():
        exponents = rng.uniform(np.log2(low), np.log2(high), 4)
        return np.exp2(np.round(exponents) if powers else exponents).astype(np.float32)

    changed = sparse_cases.with_scales(cases.build_sparse(case), scales)
    right_by_tiles(changed, launch(changed), or_nan=high > 256)


@pytest.mark.parametrize("h_q", [16, 20, 64])
@pytest.mark.parametrize("low,high", sparse_cases.V4_SCALES)
def test_v4_scales_of_any_size(low, high, h_q):
    case = SparseCase("scales", 2, 300, h_q, s_q=2, invalid=0.0, **FORMATS["v4"])
    changed = sparse_cases.with_scales(cases.build_sparse(case), sparse_cases.v4_scales(low, high))
    right_by_tiles(changed, launch(changed))


@pytest.mark.parametrize("scale", [255.9, 256.0, 300.0, 65504.0, 1e10, 1e34, 3e38])
def test_large_scales_are_never_plausible_garbage(scale):
    """One token with one huge tile: right or NaN, and NaN beyond what bfloat16 holds."""
    case = SparseCase("huge-scale", 2, 130, 16, cache_format="fp8_v32", invalid=0.0)
    inputs = cases.build_sparse(case)
    slot = int(inputs.indices[0, 0, 70])
    data = inputs.cache.data.copy()
    token_bytes(data, case, slot, "scales")[4:8] = np.float32([scale]).view(np.uint8)
    q = inputs.q.copy()
    q[..., 128:256] = 0  # the tile counts as a value only, so every score is as before
    before = dataclasses.replace(inputs, q=q)
    changed = dataclasses.replace(sparse_cases.with_data(inputs, data), q=q)
    got, attends = launch(changed), sparse_cases.attends(changed, slot)
    assert attends[0, 0]
    token = changed.cache.values.reshape(-1, 576)[slot].astype(np.float32)
    if np.isfinite(token).all():
        right_by_tiles(changed, got, or_nan=scale >= 256)
    else:  # 0 times infinity in the scores
        assert all_nan([x[attends] for x in by_token(got)])
    unchanged = [x[~attends] for x in by_token(launch(before))]
    same_bits([x[~attends] for x in by_token(got)], unchanged, "who does not attend")


def by_token(got):
    """out [b, s_q, h, dv] and lse [b, s_q, h]."""
    return got[0], got[1].transpose(0, 2, 1)


BROKEN = {
    "code 0x7f": ("codes", 5, b"\x7f"),
    "code 0xff": ("codes", 131, b"\xff"),
    "last code": ("codes", -1, b"\x7f"),
    "rope": ("rope", 0, b"\xc0\x7f"),
    "last of rope": ("rope", 126, b"\xc0\xff"),
}
BROKEN_SCALES = {
    "fp8_v32": ("scales", 8, np.float32([np.nan]).tobytes()),
    "fp8_v4": ("scales", 3, b"\xff"),
}


@by_name(KINDS)
@pytest.mark.parametrize(
    "where", ["code 0x7f", "code 0xff", "last code", "scale", "rope", "last of rope"]
)
def test_nan_reaches_exactly_who_attends(case, where):
    """NaN in a token makes the query tokens NaN that attend to it, and changes no other bit."""
    inputs, before = built(case), clean(case)
    counts = np.arange(case.topk) < inputs.topk_length[:, None, None]
    valid = counts & (inputs.indices >= 0) & (inputs.indices < case.slots)
    data = inputs.cache.data.copy()
    slots, uses = np.unique(inputs.indices[valid], return_counts=True)
    slot = int(slots[uses == 1][0])
    if case.cache_format == "plain":
        column = {"code 0x7f": 0, "code 0xff": 300, "last code": 447, "scale": 511}.get(where)
        column = {"rope": case.d - 64, "last of rope": case.d - 1}.get(where, column)
        data.reshape(-1, case.d)[slot, column] = np.nan
    else:
        part, at, value = BROKEN[where] if where in BROKEN else BROKEN_SCALES[case.cache_format]
        view = token_bytes(data, case, slot, part)
        at %= len(view)
        view[at : at + len(value)] = np.frombuffer(value, np.uint8)
    changed = sparse_cases.with_data(inputs, data)
    assert np.isnan(changed.cache.values.reshape(-1, case.d)[slot].astype(np.float32)).any()
    attends = sparse_cases.attends(inputs, slot)
    assert attends.sum() == 1 and not is_nan(before[1]).any()
    got, want = by_token(launch(changed, num_sm_parts=2)), by_token(before)
    # A sink of +inf gives zeros whatever else there is.
    heads = ~np.isposinf(inputs.attn_sink)
    assert is_nan(got[0][attends][:, heads]).all() and is_nan(got[1][attends]).all()
    same_bits([x[~attends] for x in got], [x[~attends] for x in want], where)


@by_name(FP8)
def test_unused_bytes_are_never_read_into_a_result(case):
    """Other bytes in slots that nobody attends to, and in the padding of pages."""
    inputs, want = built(case), clean(case)
    unused = np.flatnonzero(~is_used(inputs)).tolist()
    for value in (0x00, 0x7F, 0x80):
        data = inputs.cache.data.copy()
        if case.cache_format == "fp8_v4":
            data[:, 584 * case.page_size :] = value
        for slot in unused:
            for part in ("codes", "scales", "rope"):
                token_bytes(data, case, slot, part)[:] = value
        changed = dataclasses.replace(inputs, cache=cases.SparseCache(data, inputs.cache.values))
        same_bits(launch(changed, num_sm_parts=2), want, value)


@by_name(KINDS)
@pytest.mark.parametrize("bad", [-1, -7, INT32_MIN, "slots", cases.GARBAGE, INT32_MAX])
def test_whichever_invalid_index(case, bad):
    inputs = built(case)

    def replaced(indices, slots):
        value = slots if bad == "slots" else bad
        return np.where((indices < 0) | (indices >= slots), value, indices).astype(np.int32)

    changed = dataclasses.replace(
        inputs,
        indices=replaced(inputs.indices, case.slots),
        extra_indices=replaced(inputs.extra_indices, case.extra_slots),
    )
    assert (changed.indices != inputs.indices).any()
    same_bits(launch(changed, num_sm_parts=2), clean(case), bad)


@by_name(KINDS)
def test_entries_after_the_length_never_count(case):
    inputs = built(case)
    for garbage in (0, cases.GARBAGE, -5, INT32_MAX):
        after = np.arange(case.topk) >= inputs.topk_length[:, None, None]
        extra_after = np.arange(case.extra_topk) >= inputs.extra_topk_length[:, None, None]
        changed = dataclasses.replace(
            inputs,
            indices=np.where(after, garbage, inputs.indices).astype(np.int32),
            extra_indices=np.where(extra_after, garbage, inputs.extra_indices).astype(np.int32),
        )
        same_bits(launch(changed, num_sm_parts=2), clean(case), garbage)


@by_name(KINDS)
def test_attention_sinks(case):
    inputs = built(case)
    bare = launch(dataclasses.replace(inputs, attn_sink=None))
    for value in (np.inf, -np.inf, 0.5, 1000.0, -1000.0):
        changed = dataclasses.replace(inputs, attn_sink=np.full(case.h_q, value, np.float32))
        got = launch(changed)
        check(changed, got)
        np.testing.assert_array_equal(got[1], bare[1])
        if value == np.inf:
            assert (got[0] == 0).all()
        if value == -np.inf:
            np.testing.assert_array_equal(got[0], bare[0])


# ------------------------------------------------------------------ schedules without XLA


@by_name(FEW)
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_any_partition_is_right(case, batch_invariant):
    """Boundaries anywhere, also past the ends of requests, and parts without work."""
    rng = np.random.default_rng(0)
    units = [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1000, INT32_MAX]
    for _ in range(12):
        drawn = [(int(rng.integers(0, 5)), int(rng.choice(units))) for _ in range(6)]
        boundaries = sorted([(0, 0), *((r, u if r < 4 else 0) for r, u in drawn)])
        rows, _ = chain(boundaries, 4, batch_invariant, sparse=True, row_tiles=case.s_q)
        got = launch(built(case), schedule=jnp.asarray(rows), batch_invariant=batch_invariant)
        right(expected(case), got, f"parts that begin at {boundaries}")


@by_name(FEW)
def test_schedules_that_are_none_give_nan(case):
    rng = np.random.default_rng(1)
    good, _ = chain([(0, 0), (1, 3), (3, 0)], 4, sparse=True, row_tiles=case.s_q)
    right(expected(case), launch(built(case), schedule=jnp.asarray(good)), "a schedule of its own")
    dense, _ = chain([(0, 0), (1, 3), (3, 0)], 4, sparse=False, row_tiles=case.s_q)
    noise = rng.integers(INT32_MIN, INT32_MAX, (3, 8), np.int32)
    for rows in (dense, noise, np.zeros((3, 8), np.int32), np.full((5, 8), INT32_MAX, np.int32)):
        assert all_nan(launch(built(case), schedule=jnp.asarray(rows))), rows.tolist()


@by_name(KINDS)
def test_batch_invariant_results_have_the_same_bits(case):
    """Alone, at any place in any batch, and with any number of parts."""
    case = dataclasses.replace(case, name=f"{case.name}-invariant", b=6, topk=1500)
    inputs = cases.build_sparse(case)
    together = launch(inputs, batch_invariant=True)
    check(inputs, together)
    for r in range(case.b):
        got = launch(pick(inputs, [r]), batch_invariant=True)
        same_bits([x[0] for x in got], [x[r] for x in together], f"request {r} alone")
    rng = np.random.default_rng(0)
    for parts in (1, 2, 300):
        order = rng.integers(0, case.b, 11)  # some twice, some not at all
        got = launch(pick(inputs, order), batch_invariant=True, num_sm_parts=parts)
        same_bits(got, [x[order] for x in together], f"requests {order} in {parts} parts")


@by_name(KINDS)
def test_repeated_runs_give_the_same_bits(case):
    case = dataclasses.replace(case, name=f"{case.name}-repeated", b=9, topk=2000, h_q=128)
    problem = raw_launcher(cases.build_sparse(case))
    first = problem.run()
    assert not is_nan(first[0]).any()
    for _ in range(10):
        same_bits(problem.run(), first)


# ------------------------------------------------------------------ large caches

#: The page size, and how many times 2^31 bytes the cache has.
LARGE = {"plain-576": (64, 2.2), "v32-arbitrary": (53, 2.2), "v4": (2, 1.1), "plain-512": (1, 1.1)}


@pytest.mark.parametrize("kind", LARGE)
def test_end_of_a_cache_of_more_than_2_gib(kind):
    page_size, factor = LARGE[kind]
    case = SparseCase(
        f"{kind}-large",
        2,
        200,
        16,
        s_q=2,
        slots=whole_pages(400, page_size),
        page_size=page_size,
        invalid=0.0,
        extra_topk=100,
        extra_slots=whole_pages(100, page_size),
        extra_page_size=page_size,
        **FORMATS[kind],
    )
    inputs = cases.build_sparse(case)
    small, extra = inputs.cache.data, inputs.extra_cache.data
    pages = int(factor * 2**31) // (small.nbytes // len(small)) + 1
    moved = (pages - len(small)) * page_size
    assert moved * small.nbytes // case.slots > 2**31 and pages * page_size < 2**31
    want = launch(inputs)
    check(inputs, want)
    indices = (inputs.indices + moved).astype(np.int32)
    large = at_the_end(jnp.asarray(small), pages)
    options = {"k_cache": large, "indices": jnp.asarray(indices)}
    same_bits(launch(inputs, **options), want, "first cache")
    del large, options
    moved = (pages - len(extra)) * page_size
    large = at_the_end(jnp.asarray(extra), pages)
    indices = jnp.asarray(np.where(inputs.extra_indices < 0, -1, inputs.extra_indices + moved))
    got = launch(inputs, extra_k_cache=large, extra_indices=indices.astype(jnp.int32))
    same_bits(got, want, "extra cache")
