"""Named cases for compute-sanitizer: ``python tests/gpu/sanitizer_cases.py TOOL [NAME ...]``.

Each case launches the kernels without XLA around them on a small problem and compares the result
with the oracle, since a kernel that stops early is clean too. All cases of a tool share one
process, because starting JAX under the sanitizer takes longer than a case; a case's name is
printed before it runs. ``--list`` prints the names instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases  # noqa: E402
import fp8_oracle  # noqa: E402
import oracle  # noqa: E402
import sparse_cases  # noqa: E402
from cases import DenseCase, SparseCase  # noqa: E402

from jax_flashmla._cuda import DENSE_DIMS  # noqa: E402

TOOLS = ("memcheck", "racecheck")
_CASES: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {}


def _case(name: str, tools: tuple[str, ...] = TOOLS):
    """Adds the decorated function to the cases of these tools."""

    def add(function: Callable[[], None]) -> Callable[[], None]:
        assert name not in _CASES
        _CASES[name] = function, tools
        return function

    return add


def _launcher(inputs: cases.DenseInputs, **options):
    import jax.numpy as jnp
    from raw_launcher import RawDenseDecode

    return RawDenseDecode(
        q=jnp.asarray(inputs.q),
        k_cache=jnp.asarray(inputs.k_cache),
        block_table=jnp.asarray(inputs.block_table),
        cache_seqlens=jnp.asarray(inputs.cache_seqlens),
        softmax_scale=inputs.case.softmax_scale,
        causal=inputs.case.causal,
        head_dim_v=inputs.case.dv,
        attn_sink=None if inputs.attn_sink is None else jnp.asarray(inputs.attn_sink),
        **options,
    )


def _check_dense(inputs: cases.DenseInputs, **options) -> None:
    oracle.check_decode("dense_decode", inputs, _launcher(inputs, **options).run())


def _dense(name: str, case: DenseCase, tools: tuple[str, ...] = TOOLS, **options) -> None:
    case = dataclasses.replace(case, name=name)
    _case(name, tools)(lambda: _check_dense(cases.build(case), **options))


MEMCHECK = ("memcheck",)

# num_sm_parts is small where one part shall walk over several requests, and larger than the work
# where parts are empty.
_dense("one-token", DenseCase("", 1, 1, 1))
_dense("one-page", DenseCase("", 1, 64, 16), num_sm_parts=1)
_dense("page-and-one-fp16", DenseCase("", 2, 65, 3, dtype="float16"), num_sm_parts=2)
_dense("many-splits", DenseCase("", 1, 3000, 16), num_sm_parts=24)
_dense(
    "several-requests-a-part",
    DenseCase("", 5, 200, 64, lengths=(0, 200, 1, 64, 130)),
    num_sm_parts=2,
)
_dense("two-row-tiles", DenseCase("", 2, 300, 128), num_sm_parts=3)
_dense("odd-rows-causal", DenseCase("", 2, 140, 63, s_q=2, causal=True), num_sm_parts=4)
_dense(
    "grouped-heads-causal-fp16",
    DenseCase("", 3, 140, 9, h_kv=3, s_q=4, causal=True, dtype="float16", lengths="varying"),
)
_dense("batch-invariant", DenseCase("", 2, 1500, 16, lengths=(1500, 70)), batch_invariant=True)
_dense("sink", DenseCase("", 2, 140, 16, attn_sink=True), num_sm_parts=3)
_dense("page-16", DenseCase("", 2, 300, 16, page_size=16), MEMCHECK)
_dense("page-256", DenseCase("", 2, 600, 16, page_size=256), MEMCHECK)
_dense("long", DenseCase("", 1, 20000, 16), MEMCHECK)
_dense(
    "fewer-keys-than-queries",
    DenseCase("", 4, 3, 4, s_q=4, causal=True, lengths=(0, 1, 3, 5)),
    MEMCHECK,
)
_dense("more-parts-than-work", DenseCase("", 1, 70, 16), MEMCHECK, num_sm_parts=132)
_dense(
    "page-8-grouped-heads",
    DenseCase("", 2, 130, 6, h_kv=3, s_q=2, causal=True, page_size=8),
    MEMCHECK,
    num_sm_parts=3,
)
_dense("page-192", DenseCase("", 2, 500, 16, page_size=192), MEMCHECK)
_dense("empty-requests", DenseCase("", 3, 0, 16, lengths=(0, 0, 0)), MEMCHECK)
_dense(
    "many-query-tokens",
    DenseCase("", 2, 0, 16, s_q=20, causal=True, lengths=(10, 300)),
    MEMCHECK,
    num_sm_parts=2,
)
_dense(
    "batch-invariant-causal-fp16",
    DenseCase("", 3, 0, 9, h_kv=3, s_q=2, causal=True, dtype="float16", lengths=(1100, 0, 300)),
    batch_invariant=True,
    num_sm_parts=3,
)
for _d, _dv in DENSE_DIMS:
    # A request that is cut, one that is whole and none; two row tiles, the second not full.
    _dense(
        f"dims-{_d}-{_dv}",
        DenseCase("", 3, 0, 65, d=_d, dv=_dv, lengths=(700, 0, 65), attn_sink=True),
        num_sm_parts=3,
    )
    _dense(
        f"dims-{_d}-{_dv}-causal-fp16-pages",
        DenseCase(
            "",
            2,
            0,
            6,
            s_q=2,
            h_kv=2,
            d=_d,
            dv=_dv,
            page_size=8,
            dtype="float16",
            causal=True,
            lengths=(130, 70),
        ),
        MEMCHECK,
        num_sm_parts=2,
    )
_dense("four-row-tiles", DenseCase("", 1, 300, 128, s_q=2, causal=True), num_sm_parts=2)
_dense("three-row-tiles", DenseCase("", 2, 0, 160, lengths=(330, 64)), num_sm_parts=3)
_dense(
    "page-16-two-row-tiles",
    DenseCase("", 2, 0, 128, page_size=16, lengths=(200, 37)),
    num_sm_parts=3,
)


@_case("no-pages", MEMCHECK)
def _no_pages() -> None:
    """A cache without pages: nothing can be read from it, and requests with tokens are NaN."""
    inputs = cases.build(DenseCase("no-pages", 2, 100, 16))
    inputs.k_cache = inputs.k_cache[:0]
    _all_nan(*_launcher(inputs, num_sm_parts=3).run())
    inputs.cache_seqlens = np.zeros(2, np.int32)
    out, lse = _launcher(inputs, num_sm_parts=3).run()
    assert (out == 0).all() and np.isposinf(lse).all()


@_case("schedules", MEMCHECK)
def _schedules() -> None:
    """The scheduler kernel on batches below, at and above its threads, and on odd lengths."""
    from raw_launcher import plan_schedule

    rng = np.random.default_rng(0)
    for b, parts in ((0, 3), (1, 1), (1, 132), (1024, 7), (1025, 132), (5000, 1000)):
        for lengths in (rng.integers(-5, 9000, b), np.full(b, 2**31 - 1)):
            for batch_invariant in (False, True):
                rows, splits = plan_schedule(
                    lengths, num_sm_parts=parts, batch_invariant=batch_invariant
                )
                assert (rows[0, :2] == 0).all() and rows[-1, 2:4].tolist() == [b, 0]
                assert (rows[1:, :2] == rows[:-1, 2:4]).all() and splits[0] == 0
                assert (np.diff(splits) >= 1).all()


def _all_nan(out: np.ndarray, lse: np.ndarray) -> None:
    assert np.isnan(out.astype(np.float32)).all() and np.isnan(lse).all()


@_case("stale-schedule", MEMCHECK)
def _stale_schedule() -> None:
    """A schedule made for other lengths must still give the right result."""
    import jax.numpy as jnp

    made_for = cases.build(DenseCase("made-for", 3, 500, 16, lengths=(500, 40, 900)))
    schedule = _launcher(made_for, num_sm_parts=7).schedule
    for lengths in ((40, 900, 0), (1500, 1500, 1500), (1, 1, 1)):
        inputs = cases.build(DenseCase(f"stale-{lengths}", 3, max(lengths), 16, lengths=lengths))
        _check_dense(inputs, schedule=jnp.asarray(schedule))


@_case("corrupt-schedule", MEMCHECK)
def _corrupt_schedule() -> None:
    """Numbers that are no schedule give NaN and touch nothing else."""
    import jax.numpy as jnp

    inputs = cases.build(DenseCase("corrupt", 3, 500, 16))
    rng = np.random.default_rng(0)
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    random = rng.integers(low, high, (7, 8), np.int32)
    for schedule in (random, np.zeros((7, 8), np.int32), np.full((7, 8), high, np.int32)):
        _all_nan(*_launcher(inputs, schedule=jnp.asarray(schedule)).run())


@_case("bad-lengths-and-pages", MEMCHECK)
def _bad_values() -> None:
    """Negative lengths count as 0; impossible lengths and pages give NaN for their request only."""
    case = DenseCase("bad-values", 4, 200, 16)
    inputs = cases.build(case)
    capacity = inputs.block_table.shape[1] * case.page_size
    inputs.cache_seqlens = np.array([-5, capacity + 1, 200, 200], np.int32)
    inputs.block_table[2, 1] = len(inputs.k_cache)
    out, lse = _launcher(inputs, num_sm_parts=5).run()
    assert (out[0] == 0).all() and np.isposinf(lse[0]).all()
    _all_nan(out[1:3], lse[1:3])
    inputs.cache_seqlens[:3] = 0
    expected_out, expected_lse = inputs.expected()
    oracle.check("dense_decode", "out", out[3], expected_out[3])
    oracle.check("dense_decode", "lse", lse[3], expected_lse[3])


# ------------------------------------------------------------------ sparse decode


def _check_sparse(inputs: cases.SparseInputs, **options) -> None:
    got = sparse_cases.raw_launcher(inputs, **options).run()
    oracle.check_decode("sparse_decode", inputs, got)


def _sparse(name: str, case: SparseCase, tools: tuple[str, ...] = TOOLS, **options) -> None:
    case = dataclasses.replace(case, name=name)
    _case(name, tools)(lambda: _check_sparse(cases.build_sparse(case), **options))


_EXTRA = {"extra_topk": 70, "extra_slots": 130, "extra_page_size": 2, "extra_topk_length": True}

for _kind, _format in sparse_cases.FORMATS.items():
    # Whole and cut requests and an empty one, invalid indices, both caches.
    _sparse(
        f"sparse-{_kind}",
        SparseCase(
            "",
            3,
            200,
            16,
            s_q=2,
            slots=305,
            page_size=61,
            topk_length=True,
            attn_sink=True,
            **_EXTRA,
            **_format,
        ),
        num_sm_parts=3,
    )
    if not _kind.startswith("plain"):  # 16 heads have a kernel of their own
        _sparse(
            f"sparse-{_kind}-a-row-tile",
            SparseCase("", 2, 130, 40, slots=256, page_size=1, **_format),
            num_sm_parts=2,
        )
    _sparse(
        f"sparse-{_kind}-two-row-tiles",
        SparseCase("", 2, 130, 128, slots=256, page_size=1, **_format),
        num_sm_parts=2,
    )
    _sparse(
        f"sparse-{_kind}-odd-heads-invariant",
        SparseCase("", 2, 700, 65, slots=576, page_size=576, topk_length=True, **_format),
        MEMCHECK,
        batch_invariant=True,
    )
    _sparse(
        f"sparse-{_kind}-one-choice",
        SparseCase("", 1, 1, 1, slots=2, page_size=2, invalid=0.0, **_format),
        MEMCHECK,
    )
    _sparse(
        f"sparse-{_kind}-nothing-valid",
        SparseCase("", 2, 130, 16, slots=64, invalid=1.0, extra_topk=7, **_format),
        MEMCHECK,
        num_sm_parts=7,
    )


@_case("sparse-garbage", MEMCHECK)
def _sparse_garbage() -> None:
    """Indices that lie anywhere, caches without pages, lengths past topk, choices of none."""
    for name in ("plain-512", "v32", "v4"):
        case = SparseCase("garbage", 3, 100, 16, slots=128, **_EXTRA, **sparse_cases.FORMATS[name])
        inputs = sparse_cases.repaired(cases.build_sparse(case))
        inputs.topk_length = np.int32([-5, 2**31 - 1, 101])
        inputs.extra_topk_length = np.int32([2**31 - 1, -(2**31), 70])
        clipped = dataclasses.replace(
            inputs, topk_length=np.int32([0, 100, 100]), extra_topk_length=np.int32([70, 0, 70])
        )
        got = sparse_cases.raw_launcher(inputs, num_sm_parts=5).run()
        oracle.check_decode("sparse_decode", clipped, got)
        rng = np.random.default_rng(0)
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        inputs.indices = rng.integers(low, high, inputs.indices.shape, np.int32)
        inputs.indices[0, 0, :40] = np.arange(108, 148)  # across the end of the cache
        inputs.topk_length = None
        clipped = dataclasses.replace(inputs, extra_topk_length=np.int32([70, 0, 70]))
        got = sparse_cases.raw_launcher(inputs, num_sm_parts=5).run()
        oracle.check_decode("sparse_decode", clipped, got)
        empty = dataclasses.replace(
            inputs, extra_cache=None, extra_indices=None, extra_topk_length=None
        )
        empty.cache = cases.SparseCache(inputs.cache.data[:0], inputs.cache.values[:0])
        out, lse = sparse_cases.raw_launcher(empty, num_sm_parts=2).run()
        assert (out == 0).all() and np.isposinf(lse).all()
        empty.indices = inputs.indices[..., :0]
        out, lse = sparse_cases.raw_launcher(empty, num_sm_parts=2).run()
        assert (out == 0).all() and np.isposinf(lse).all()


@_case("sparse-schedules", MEMCHECK)
def _sparse_schedules() -> None:
    """Numbers that are no schedule give NaN, and one that is stale the right result."""
    import jax.numpy as jnp

    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    for name in ("plain-576", "v32", "v4"):
        case = SparseCase("schedules", 3, 400, 16, s_q=2, **_EXTRA, **sparse_cases.FORMATS[name])
        inputs = cases.build_sparse(case)
        schedule = sparse_cases.raw_launcher(inputs, num_sm_parts=7).schedule
        for length in ([0, 0, 400], [1, 65, 64]):
            stale = sparse_cases.repaired(dataclasses.replace(inputs, topk_length=np.int32(length)))
            _check_sparse(stale, schedule=jnp.asarray(schedule))
        rng = np.random.default_rng(0)
        noise = rng.integers(low, high, (7, 8), np.int32)
        for rows in (noise, np.zeros((7, 8), np.int32), np.full((7, 8), high, np.int32)):
            _all_nan(*sparse_cases.raw_launcher(inputs, schedule=jnp.asarray(rows)).run())


# ------------------------------------------------------------------ dense decode over FP8


def _fp8_dense(
    name: str,
    case: DenseCase,
    tools: tuple[str, ...] = TOOLS,
    scales: str = "arbitrary",
    **options,
) -> None:
    case = dataclasses.replace(case, name=name)

    def check() -> None:
        inputs = sparse_cases.build_fp8_dense(case, scales=scales)
        got = sparse_cases.raw_dense_launcher(inputs, **options).run()
        oracle.check_decode("dense_decode", inputs, got)

    _case(name, tools)(check)


_fp8_dense("fp8-dense", DenseCase("", 3, 0, 16, lengths=(700, 0, 65)), num_sm_parts=3)
_fp8_dense(
    "fp8-dense-powers",
    DenseCase("", 3, 0, 16, lengths=(500, 0, 65)),
    scales="power",
    num_sm_parts=3,
)
for _scales in ("arbitrary", "power"):
    _fp8_dense(
        f"fp8-dense-32-rows-{_scales}",
        DenseCase("", 2, 0, 16, s_q=2, causal=True, lengths=(300, 65), attn_sink=True),
        scales=_scales,
        num_sm_parts=2,
    )
_fp8_dense(
    "fp8-dense-two-row-tiles",
    DenseCase("", 2, 0, 65, s_q=2, causal=True, lengths=(200, 37), page_size=16, attn_sink=True),
    num_sm_parts=3,
)
_fp8_dense(
    "fp8-dense-odd-pages",
    DenseCase("", 2, 0, 16, s_q=3, causal=True, lengths=(200, 107), page_size=53),
    MEMCHECK,
    num_sm_parts=2,
)
_fp8_dense(
    "fp8-dense-page-1-invariant",
    DenseCase("", 2, 0, 8, lengths=(700, 1), page_size=1),
    MEMCHECK,
    batch_invariant=True,
)


for _name, _options in {
    "fp8-power-dense": {"lengths": (500, 300), "attn_sink": True},
    "fp8-power-dense-row-tiles": {"lengths": (400, 470), "s_q": 2, "causal": True},
}.items():
    _fp8_dense(
        _name,
        DenseCase("", 2, 0, 40, page_size=16, **_options),
        scales="power",
        power_of_two_scales=True,
        num_sm_parts=1,
    )
_sparse(
    "fp8-power-sparse",
    SparseCase(
        "", 2, 500, 40, slots=305, page_size=61, cache_format="fp8_v32", scales="power", **_EXTRA
    ),
    power_of_two_scales=True,
    num_sm_parts=2,
)


@_case("fp8-dense-bad-values", MEMCHECK)
def _fp8_dense_bad_values() -> None:
    """As bad-lengths-and-pages, over an FP8 cache."""
    case = DenseCase("fp8-bad-values", 4, 200, 16)
    inputs = sparse_cases.build_fp8_dense(case)
    capacity = inputs.block_table.shape[1] * case.page_size
    inputs.cache_seqlens = np.array([-5, capacity + 1, 200, 200], np.int32)
    inputs.block_table[2, 1] = len(inputs.data)
    out, lse = sparse_cases.raw_dense_launcher(inputs, num_sm_parts=5).run()
    assert (out[0] == 0).all() and np.isposinf(lse[0]).all()
    _all_nan(out[1:3], lse[1:3])
    inputs.cache_seqlens[:3] = 0
    expected_out, expected_lse = inputs.expected()
    oracle.check("dense_decode", "out", out[3], expected_out[3])
    oracle.check("dense_decode", "lse", lse[3], expected_lse[3])


# ------------------------------------------------------------------ products in FP8


def _fp8_matmul(name: str, case: DenseCase | SparseCase, **options) -> None:
    case = dataclasses.replace(case, name=name)

    def check() -> None:
        if isinstance(case, DenseCase):
            dense = sparse_cases.build_fp8_dense(case)
            got = sparse_cases.raw_dense_launcher(dense, fp8_matmul=True, **options).run()
            fp8_oracle.check(fp8_oracle.dense_decode(dense), got, name)
        else:
            sparse = cases.build_sparse(case)
            got = sparse_cases.raw_launcher(sparse, fp8_matmul=True, **options).run()
            fp8_oracle.check(fp8_oracle.sparse_decode(sparse), got, name)

    _case(name)(check)


_V32: dict = {"cache_format": "fp8_v32", "scales": "arbitrary"}
# Whole and cut requests and an empty one; one row tile that is not full, and two.
_fp8_matmul(
    "fp8-matmul-dense-20-heads",
    DenseCase("", 3, 0, 20, s_q=2, causal=True, lengths=(330, 0, 65), page_size=16),
    num_sm_parts=3,
)
_fp8_matmul(
    "fp8-matmul-dense-70-heads-invariant",
    DenseCase("", 2, 0, 70, lengths=(600, 64), page_size=53, attn_sink=True),
    batch_invariant=True,
)
_fp8_matmul(
    "fp8-matmul-sparse-40-heads",
    SparseCase(
        "",
        3,
        200,
        40,
        s_q=2,
        slots=305,
        page_size=61,
        topk_length=True,
        attn_sink=True,
        **_EXTRA,
        **_V32,
    ),
    num_sm_parts=3,
)
_fp8_matmul(
    "fp8-matmul-sparse-70-heads",
    SparseCase("", 2, 130, 70, slots=256, page_size=1, **_V32),
    num_sm_parts=2,
)


# ------------------------------------------------------------------ caches


def _check_cache(
    cache_format: str,
    page_size: int,
    dtype: str,
    *,
    t: int = 19,
    heads: int = 1,
    latent: int = 512,
    rope: int = 64,
    fused: bool = False,
    power_of_two: bool = True,
) -> None:
    """Writes tokens to a poisoned cache and reads them, with slots that are none among them."""
    import cache_oracle
    from raw_cache import RawAppend, RawGather, on_device

    from jax_flashmla.quantization import page_bytes

    rng = np.random.default_rng(0)
    pages = 1 + t // page_size
    columns = {"plain": latent + rope, "fp8_v32": 656, "fp8_v4": 512}[cache_format]
    shape: tuple[int, ...] = (pages, page_size, heads, columns)
    if cache_format == "fp8_v4":
        shape, latent = (pages, page_bytes(page_size)), 448
    data = np.full(shape, 0xFF, np.uint8)
    if cache_format == "plain":
        data = np.full(shape, np.nan, np.float32).astype(cases.BFLOAT16)
    num_slots = pages * page_size
    slots = rng.permutation(num_slots)[:t].astype(np.int32)
    slots[:4] = [-1, num_slots, 2147480000, -(2**31)]
    kv_c = rng.standard_normal((t, heads, latent)).astype(dtype)
    k_pe = rng.standard_normal((t, heads, rope)).astype(dtype)
    options: dict = {"power_of_two": power_of_two}
    if fused:
        options["norm_weight"] = rng.standard_normal(latent).astype(np.float32)
        for name in ("rope_cos", "rope_sin"):
            options[name] = rng.standard_normal((t, rope // 2)).astype(np.float32)
    want = cache_oracle.append(data, cache_format, page_size, slots, kv_c, k_pe, **options)
    calls = [(np.concatenate([kv_c, k_pe], axis=-1), None, 0), (kv_c, k_pe, 0), (kv_c, k_pe, 1)]
    for kv, own_k_pe, shift in calls:
        got = RawAppend(
            on_device(data),
            cache_format,
            page_size,
            slots,
            kv,
            own_k_pe,
            latent=latent,
            shift=shift,
            **options,
        ).run()
        assert (cache_oracle.bits(got) == cache_oracle.bits(want)).all()
    for out in (cases.BFLOAT16, np.float32):
        got = RawGather(on_device(want), cache_format, page_size, slots, out).run()
        expected = cache_oracle.gather(want, cache_format, page_size, slots, out)
        assert (cache_oracle.quiet_bits(got) == cache_oracle.quiet_bits(expected)).all()


def _cache(name: str, *arguments, tools: tuple[str, ...] = MEMCHECK, **options) -> None:
    _case(f"cache-{name}", tools)(lambda: _check_cache(*arguments, **options))


_cache("v32", "fp8_v32", 53, "float32", tools=TOOLS)
_cache("v32-float-scales-fused", "fp8_v32", 64, "float16", fused=True, power_of_two=False)
_cache("v4", "fp8_v4", 2, "float16")
_cache("v4-fused", "fp8_v4", 1, "float32", t=300, fused=True)
_cache("plain", "plain", 64, "float32")
_cache("plain-fused", "plain", 1, "float16", fused=True)
_cache("plain-odd", "plain", 53, "float16", heads=3, latent=13, rope=5)
_cache("plain-odd-fused", "plain", 2, "float32", latent=299, rope=6, fused=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("names", nargs="*", help="cases to run; default: all of the tool")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    chosen = [name for name, (_, tools) in _CASES.items() if options.tool in tools]
    if unknown := set(options.names) - set(chosen):
        parser.error(f"no {options.tool} cases: {', '.join(sorted(unknown))}")
    chosen = options.names or chosen
    if options.list:
        print("\n".join(chosen))
        return 0
    for name in chosen:
        print(f"case {name}", flush=True)
        _CASES[name][0]()
    print(f"all {len(chosen)} cases right", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
