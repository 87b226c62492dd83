"""What XLA computes on a GPU, where there is no kernel or none is wanted: as exact as on a CPU.

Division, exponentials, casts to 8 and 16 bits and matrix products are not the same there, so the
oracles of the CPU tests judge again. FP8 bytes must be equal, everything else within tolerances.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_cache as cache_tests
import test_dense_decode as dense_tests
import test_quantization as formats
import test_sparse_decode as sparse_tests
import test_sparse_prefill as prefill_tests
import test_varlen as varlen_tests

from jax_flashmla import quantization
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.sparse_prefill import flash_mla_sparse_fwd

pytestmark = pytest.mark.gpu

decode = functools.partial(
    jax.jit(flash_mla_with_kvcache, static_argnames=cases.STATIC), implementation="xla"
)
prefill = jax.jit(flash_mla_sparse_fwd, static_argnames=("sm_scale", "d_v", "implementation"))


def cpu():
    return jax.devices("cpu")[0]


def on_gpu(results):
    """The results on the host, after a look at where they were computed."""
    for leaf in jax.tree.leaves(results):
        assert {device.platform for device in leaf.devices()} == {"gpu"}
    return jax.tree.map(np.asarray, results)


def moved(tree, device):
    return jax.tree.map(lambda x: jax.device_put(x, device), tree)


# ------------------------------------------------------------------ FP8 bytes


@functools.cache
def difficult_tokens(latent, tile):
    """Float32 [n, latent] in which all that is hard about rounding occurs."""
    rng = np.random.default_rng(0)
    in_tiles = functools.partial(formats.in_tiles, latent=latent, tile=tile)
    every = formats.every_bfloat16().astype(np.float32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    tokens = [in_tiles(every, np.float32(a)) for a in (448, 2.0**-12, 3.4e38, np.nan)]
    tokens.append(in_tiles(halves, np.float32(0.1)))
    for k in (-13, -1, 0, 7):  # midpoints of neighbouring codes, and what is beside them
        anchor = np.float32(np.ldexp(448.0, k))
        tokens.append(in_tiles(np.ldexp(formats.e4m3_ties(), k), anchor))
    spread = np.exp(rng.uniform(-12, 6, (200, 1)))
    tokens.append((rng.standard_normal((200, latent)) * spread).astype(np.float32))
    # Scales of every magnitude, each with quotients that fall beside midpoints.
    scales = np.exp(rng.uniform(np.log(1.1e-4), np.log(250), (100, latent // tile, 1)))
    ties = np.abs(rng.choice(formats.e4m3_ties(), (100, latent // tile, tile)))
    near = (ties * scales.astype(np.float32).astype(np.float64)).astype(np.float32)
    away = np.nextafter(near, rng.choice(np.float32([0, np.inf]), near.shape))
    near = np.where(rng.random(near.shape) < 0.6, away, near)
    near[..., :1] = scales.astype(np.float32) * np.float32(448)
    tokens.append(near.reshape(100, latent))
    return np.concatenate(tokens)


@pytest.mark.parametrize("cache_format,power_of_two", formats.MODES)
def test_quantising_gives_the_bytes_of_numpy(cache_format, power_of_two):
    kv_c = difficult_tokens(*formats.FORMATS[cache_format])
    rng = np.random.default_rng(1)
    k_pe = (rng.standard_normal((len(kv_c), 64)) * 10).astype(np.float32)
    options = {"cache_format": cache_format, "power_of_two_scales": power_of_two}
    got = on_gpu(quantization.quantize_kv(jnp.asarray(kv_c), jnp.asarray(k_pe), **options))
    want = formats.oracle_tokens(kv_c, k_pe, cache_format, power_of_two)
    np.testing.assert_array_equal(got, want)
    # And back: the product e4m3 * scale in float32, or rounded once more.
    for dtype in (jnp.float32, jnp.bfloat16):
        back = functools.partial(quantization.dequantize_kv, cache_format=cache_format, dtype=dtype)
        here, there = on_gpu(back(jnp.asarray(want))), back(jax.device_put(want, cpu()))
        for a, b in zip(here, there, strict=True):
            np.testing.assert_array_equal(a.astype(np.float32), np.asarray(b).astype(np.float32))


def test_bfloat16_tokens_quantise_to_the_bytes_of_numpy():
    latent, tile = formats.FORMATS["fp8_v32"]
    kv_c = formats.in_tiles(formats.every_bfloat16(), 448.0, latent, tile)
    assert kv_c.dtype == formats.BF16
    formats.check_quantized(kv_c, formats.zero_rope(kv_c), "fp8_v32", False)


def test_division(monkeypatch):
    """GPU division may be off by some ulps, which the integer remainder repairs."""
    formats.test_division_does_not_rely_on_the_backend(monkeypatch, 0)


def test_codes_scales_and_rope_are_exact():
    formats.test_e4m3_codes_are_exact()
    formats.test_e8m0_codes_are_exact()
    formats.test_rope_is_rounded_to_nearest_even()
    formats.test_v4_every_code_times_every_scale(np.float32)
    formats.test_v32_every_code_times_arbitrary_scales(formats.BF16)
    formats.test_bfloat16_rounding_survives_a_float32_use()


@pytest.mark.parametrize("cache_format", cache_tests.FORMATS)
def test_append_in_place(cache_format):
    cache_tests.test_append(cache_format, donate=True)


@pytest.mark.parametrize("cache_format", ["fp8_v32", "fp8_v4"])
def test_append_writes_the_bytes_of_a_quantised_cache(cache_format):
    cache_tests.test_append_writes_the_bytes_of_a_quantised_cache(cache_format)


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cache_format", ["fp8_v32", "fp8_v4"])
def test_dense_decode_over_fp8_caches(cache_format, dtype):
    inputs, data = dense_tests.fp8_inputs(cache_format, dtype, page_size=8)
    cache = PagedKVCache(jnp.asarray(data), cache_format, 8)
    call = inputs.call() | {"k_cache": cache, "is_fp8_kvcache": True}
    dense_tests.check(inputs, on_gpu(decode(**call)))


SPARSE = (
    "plain-odd",
    "plain-fp16",
    "v32-arbitrary",
    "v32-extra-sink",
    "v32-peaked10",
    "v4-extra",
    "v4-float32",
)


@pytest.mark.parametrize(
    "case", [c for c in cases.sparse_small() if c.name in SPARSE], ids=lambda case: case.name
)
def test_sparse_decode(case):
    inputs = cases.build_sparse(case)
    call = sparse_tests.call_of(inputs)
    got = on_gpu(decode(**call))
    sparse_tests.check(inputs, got)
    if case.name in ("v32-extra-sink", "v4-float32"):
        static = {name: x for name, x in call.items() if name in cases.STATIC}
        arrays = {name: x for name, x in call.items() if name not in static}
        there = decode(**moved(arrays, cpu()), **static)
        for name, a, b in zip(("out", "lse"), got, there, strict=True):
            assert b.devices() == {cpu()}
            # Float32 arithmetic in another order; out is rounded, which can tip over.
            bound = 1e-5 if a.dtype == np.float32 else 1e-3
            oracle.check_norm("sparse_decode", name, a, np.asarray(b), bound)


def test_sparse_names_are_cases():
    assert set(SPARSE) <= {case.name for case in cases.sparse_small()}
    assert set(PREFILL) <= {case.name for case in cases.prefill_small()}


PREFILL = ("512-length", "float32", "peaked10")


@pytest.mark.parametrize(
    "case", [c for c in cases.prefill_small() if c.name in PREFILL], ids=lambda case: case.name
)
def test_sparse_prefill(case):
    inputs = cases.build_prefill(case)
    prefill_tests.check(inputs, on_gpu(prefill(**inputs.call())))


@pytest.mark.parametrize(
    "dtype,dims,causal",
    [
        (jnp.bfloat16, (192, 128), True),
        (jnp.float16, (128, 128), False),
        (jnp.float32, (128, 128), True),
    ],
    ids=["bfloat16", "float16", "float32"],
)
def test_varlen_prefill_and_gradients(dtype, dims, causal):
    args = varlen_tests.make(
        [70, 150, 1], [90, 140, 33], heads=(4, 2), dims=dims, dtype=dtype, deviation=0.1, pad=(5, 3)
    )
    scale = (dims[0] + 100) ** -0.5
    got = on_gpu(varlen_tests.run(*args, scale=scale, causal=causal))
    want = varlen_tests.expect(*args, scale=scale, causal=causal)
    for name, a, e in zip(varlen_tests.RESULTS, got, want, strict=True):
        assert a.dtype == (jnp.float32 if name == "lse" else dtype)
        varlen_tests.within_contract(name, a, e)
        if dtype == jnp.float32:
            varlen_tests.close(name, a, e, rtol=1e-5, atol=1e-6)
