"""FP8 caches whose scales are promised to be powers of two: other kernels for more than 32 rows.

And what kernels over FP8 caches have in common that convert in registers: queries of any size,
scales of the softmax that are not positive, long runs.
"""

import dataclasses
import functools

import cases
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sparse_cases
from cases import DenseCase, SparseCase
from decode_checks import all_nan, by_name, compile_call, custom_calls, is_nan, same_bits
from sparse_cases import BenchmarkCase, Fp8DenseInputs, build_fp8_dense

pytestmark = pytest.mark.gpu

EXTRA = {"extra_topk": 130, "extra_slots": 305, "extra_page_size": 61, "extra_topk_length": True}
V32 = {"cache_format": "fp8_v32", "scales": "power"}
SPARSE = {"slots": 1220, "page_size": 61, "topk_length": True, **V32}

# Few parts, with enough blocks for each that the kernels are taken.
CASES = [
    DenseCase("p-64-heads", 3, 0, 64, lengths=(700, 0, 65)),
    DenseCase(
        "p-40-heads-odd-pages", 2, 0, 40, s_q=2, causal=True, lengths=(999, 64), page_size=53
    ),
    DenseCase("p-33-heads-peaked10", 2, 0, 33, lengths=(2000, 333), scores="peaked10"),
    DenseCase("p-128-heads", 2, 0, 128, attn_sink=True, lengths=(2000, 333), scores="rising"),
    DenseCase("p-7-tokens", 1, 3000, 16, s_q=7, causal=True, page_size=16),
    DenseCase("p-varying", 40, 900, 64, lengths="varying", empty=True),
    SparseCase("p-sparse-64-heads", 3, 500, 64, attn_sink=True, **SPARSE),
    SparseCase("p-sparse-35-heads", 4, 700, 35, s_q=2, **SPARSE, **EXTRA),
    SparseCase("p-sparse-128-heads", 3, 450, 128, s_q=2, **SPARSE, **EXTRA),
    SparseCase("p-sparse-page-1", 2, 2048, 70, slots=2500, page_size=1, **V32),
    SparseCase("p-sparse-garbage", 4, 600, 64, invalid=0.7, **SPARSE),
]


def build(case):
    if isinstance(case, DenseCase):
        return build_fp8_dense(case, scales="power")
    return cases.build_sparse(case)


def launch(inputs, **options):
    dense = isinstance(inputs, Fp8DenseInputs)
    make = sparse_cases.raw_dense_launcher if dense else sparse_cases.raw_launcher
    return make(inputs, **options).run()


def check(inputs, got):
    oracle.check_decode(
        "dense_decode" if isinstance(inputs, Fp8DenseInputs) else "sparse_decode", inputs, got
    )


promised = functools.partial(launch, power_of_two_scales=True)


@by_name(CASES)
@pytest.mark.parametrize("parts", [1, 2])
def test_kernel_agrees_with_oracle(case, parts):
    inputs = build(case)
    got = promised(inputs, num_sm_parts=parts)
    check(inputs, got)
    same_bits(promised(inputs, num_sm_parts=parts), got, "second run")
    # The products have another type, so this is another kernel.
    without = launch(inputs, num_sm_parts=parts)
    assert (without[0].view(np.uint16) != got[0].view(np.uint16)).any()


@pytest.mark.parametrize("rows", [16, 32])
def test_few_rows_go_the_same_way(rows):
    inputs = build(DenseCase(f"p-{rows}-rows", 2, 0, rows, lengths=(900, 65)))
    same_bits(promised(inputs, num_sm_parts=2), launch(inputs, num_sm_parts=2))


@pytest.mark.parametrize("how", ["batch-invariant", "few blocks", "V4"])
def test_what_goes_the_same_way(how):
    options = {"num_sm_parts": 2}
    inputs = build(CASES[0])
    if how == "batch-invariant":
        options["batch_invariant"] = True
    elif how == "few blocks":
        options["num_sm_parts"] = None
    else:
        inputs = build(SparseCase("p-v4", 2, 900, 64, slots=1280, cache_format="fp8_v4", d=512))
    got = promised(inputs, **options)
    check(inputs, got)
    same_bits(got, launch(inputs, **options))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("scale", [3.0, 2.0**8, 2.0**-16, np.nan, np.inf, -1.0])
def test_a_broken_promise_makes_nan(kind, scale):
    """For those who attend to the token; also if it comes late, and the request is cut."""
    if kind == "dense":
        inputs = build(DenseCase("p-broken", 3, 0, 64, lengths=(700, 1000, 65)))
        clean = promised(inputs, num_sm_parts=2)
        data = inputs.data.copy()
        token = data[inputs.block_table[1, 12], 5].reshape(-1)
        token[512:528].view(np.float32)[2] = scale
        got = promised(inputs.with_data(data), num_sm_parts=2)
    else:
        inputs = build(SparseCase("p-broken", 3, 700, 64, slots=1220, page_size=61, **V32))
        slot = inputs.indices[1, 0, 600]
        inputs.indices[[0, 2]] = np.where(
            inputs.indices[[0, 2]] == slot, -1, inputs.indices[[0, 2]]
        )
        clean = promised(inputs, num_sm_parts=2)
        data = inputs.cache.data.copy()
        data.reshape(-1, 656)[slot, 512:528].view(np.float32)[0] = scale
        cache = dataclasses.replace(inputs.cache, data=data)
        got = promised(dataclasses.replace(inputs, cache=cache), num_sm_parts=2)
    assert all_nan([x[1] for x in got])
    others = [0, 2]
    same_bits([x[others] for x in got], [x[others] for x in clean])


def test_through_the_public_function():
    inputs = build(DenseCase("p-public", 4, 0, 64, causal=True, lengths=(900, 0, 65, 700)))
    options = {"implementation": "cuda", "power_of_two_scales": True, "num_sm_parts": 2}
    compiled, call = compile_call(inputs.call(), **options)
    assert custom_calls(compiled, "flashmla_dense_decode") == 1
    got = call()
    check(inputs, got)
    same_bits(got, promised(inputs, num_sm_parts=2))


# ------------------------------------------------------------------ queries and scales

REGISTERS = [
    ("16 rows", 16, "fp8_v32", False),
    ("16 rows", 16, "fp8_v4", False),
    ("32 rows", 30, "fp8_v32", False),
    ("64 rows", 64, "fp8_v32", False),
    ("64 rows", 64, "fp8_v4", False),
    ("64 rows, promise", 64, "fp8_v32", True),
]
by_kernel = pytest.mark.parametrize(
    "h_q, cache_format, promise",
    [row[1:] for row in REGISTERS],
    ids=[f"{row[0]}, {row[2]}" for row in REGISTERS],
)


def sparse(h_q, cache_format, **options):
    options |= {"d": sparse_cases.DIMS[cache_format], "cache_format": cache_format}
    if cache_format == "fp8_v32":
        options |= {"scales": "power"}
    return cases.build_sparse(
        SparseCase(f"queries-{h_q}", 3, 600, h_q, slots=1220, page_size=61, **options)
    )


@by_kernel
@pytest.mark.parametrize("sign", [-1, 0])
def test_a_scale_that_is_not_positive(h_q, cache_format, promise, sign):
    """A negative scale is as good as negative queries, and 0 as queries of zeros."""
    inputs = sparse(h_q, cache_format, attn_sink=True)
    same = dataclasses.replace(inputs, q=(sign * inputs.q).astype(cases.BFLOAT16))
    scale = sign * inputs.case.softmax_scale
    options = {"num_sm_parts": 2, "softmax_scale": scale, "power_of_two_scales": promise}
    check(same, launch(inputs, **options))


@by_kernel
def test_queries_of_any_size(h_q, cache_format, promise):
    """A row that is not finite is NaN alone."""
    inputs = sparse(h_q, cache_format)
    latent = {"fp8_v32": 512, "fp8_v4": 448}[cache_format]
    q = inputs.q.astype(np.float32)
    q *= np.exp2(np.linspace(-120, 6, h_q, dtype=np.float32))[:, None]
    q[:, :, 1, :latent] = 0  # RoPE columns alone,
    q[:, :, 2, :latent] *= np.float32(2) ** -10  # RoPE columns far larger,
    q[:, :, 3, latent:] = 0  # and none
    q[:, :, 2, latent:] *= np.float32(2) ** 95
    q[0, 0, 4, 5], q[0, 0, 6, -3] = np.nan, np.inf
    inputs = dataclasses.replace(inputs, q=q.astype(cases.BFLOAT16))
    out, lse = launch(inputs, num_sm_parts=2, power_of_two_scales=promise)
    want_out, want_lse = inputs.expected()
    assert is_nan(want_out[0, 0, [4, 6]]).all()
    oracle.check_norm("sparse_decode", "out", out, want_out)
    oracle.check_norm("sparse_decode", "lse", lse, want_lse, bound=1e-5)


# ------------------------------------------------------------------ long runs


@pytest.mark.parametrize("h_q", [16, 32, 64])
def test_long_runs_end(h_q):
    """Blocks whose tokens come late, from far apart in a cache of 1.4 GB: rare, but no failure."""
    from benchmarks import sparse as benchmark

    timer = benchmark.Timer({}, launches=20, replays=5, slots=1 << 21)
    case = BenchmarkCase("long", "fp8_v32", b=148, h_q=h_q, s_q=2, topk=16384)
    problem = timer._sparse(case, power_of_two_scales=True)
    first = problem.run()
    assert not is_nan(first[0]).any()
    for _ in range(3):
        problem.time(20, 5)
        same_bits(problem.run(), first)
    assert jnp.isfinite(first[1]).all()
