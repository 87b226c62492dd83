"""The kernels that write and read paged caches: the bits of numpy, in place, inside JAX."""

import functools
import re

import cache_oracle as oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_cache as cache_tests
import test_gpu_xla as xla_tests
import test_quantization as formats
from jax import lax
from raw_cache import RawAppend, RawGather, on_device

from jax_flashmla import explain
from jax_flashmla import quantization as q
from jax_flashmla._cuda_cache import APPEND, GATHER
from jax_flashmla._decode_loop import cache_copies
from jax_flashmla.cache import PagedKVCache, offset_slots

pytestmark = pytest.mark.gpu

BF16 = ml_dtypes.bfloat16
DTYPES = {"bfloat16": BF16, "float16": np.float16, "float32": np.float32}
PAGE_SIZES = (1, 2, 53, 64)
BAD_SLOTS = (-1, -(2**31), 2147480000, 2**31 - 1)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
by_mode = pytest.mark.parametrize("cache_format,power_of_two", formats.MODES)


def latent_of(cache_format):
    return formats.FORMATS[cache_format][0]


def empty_cache(cache_format, pages, page_size, dtype=BF16, shape=(1, 576)):
    """A cache full of NaN codes or NaN with a payload: what is not written must stay as it is."""
    if cache_format == "plain":
        data = np.empty((pages, page_size, *shape), dtype)
        oracle.bits(data)[:] = 0x7FD5 if np.dtype(dtype).itemsize == 2 else 0x7FD5ABCD
        return data
    if cache_format == "fp8_v4":
        return np.full((pages, q.page_bytes(page_size)), 0xFF, np.uint8)
    return np.full((pages, page_size, 1, 656), 0xFF, np.uint8)


def choose_slots(rng, t, num_slots):
    """Distinct slots for t tokens, the first and the last among them; some tokens have none."""
    pool = [num_slots - 1, *range(num_slots - 1)]
    chosen = np.full(t, -1)
    taken = np.concatenate([pool[:2], rng.permutation(pool[2:])])[: min(t, num_slots)]
    chosen[: len(taken)] = taken
    skipped = 2 + rng.permutation(max(t - 2, 0))[: t // 5]
    chosen[skipped] = rng.choice([*BAD_SLOTS, num_slots], len(skipped))
    return rng.permutation(chosen).astype(np.int32)


def numbers(rng, *shape, dtype=BF16):
    """Of very different magnitudes, subnormal ones among them, with NaN and infinities of both
    signs here and there."""
    spread = np.exp(rng.uniform(-12, 6, (*shape[:-1], 1)))
    x = rng.standard_normal(shape) * spread
    special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -3e-8, 6e4, -3e38]
    where = rng.random(shape) < 0.01
    with np.errstate(over="ignore"):
        x = np.where(where, rng.choice(special, shape), x).astype(np.float32)
        return x.astype(dtype)


def parts(rng, cache_format, t, dtype, k_pe_dtype=None, finite=False):
    def make(width, dtype):
        if finite:
            return rng.standard_normal((t, 1, width)).astype(dtype)
        return numbers(rng, t, 1, width, dtype=dtype)

    latent = 512 if cache_format == "plain" else latent_of(cache_format)
    return make(latent, dtype), make(oracle.ROPE, k_pe_dtype or dtype)


def same_bytes(got, want):
    got, want = oracle.bits(got), oracle.bits(want)
    different = np.argwhere(got != want)
    assert not len(different), f"{len(different)} of {got.size} differ, first {different[:5]}"


def check_append(data, cache_format, page_size, slots, kv_c, k_pe, *, joined, shift=0, **options):
    """Compares every byte of the cache; ``joined``: tokens in one array."""
    want = oracle.append(data, cache_format, page_size, slots, kv_c, k_pe, **options)
    kv = np.concatenate([kv_c, k_pe], axis=-1) if joined else kv_c
    launcher = RawAppend(
        on_device(data),
        cache_format,
        page_size,
        slots,
        kv,
        None if joined else k_pe,
        latent=kv_c.shape[-1],
        shift=shift,
        **options,
    )
    got = launcher.run()
    if cache_format == "plain" and {"norm_weight", "rope_cos"} & set(options):
        got, want = oracle.quiet_bits(got), oracle.quiet_bits(want)  # arithmetic makes any NaN
    same_bytes(got, want)


# ------------------------------------------------------------------ append


@by_dtype
@by_mode
def test_append_of_everything_that_is_hard_to_round(cache_format, power_of_two, dtype):
    latent, tile = formats.FORMATS[cache_format]
    with np.errstate(over="ignore", invalid="ignore"):
        kv_c = xla_tests.difficult_tokens(latent, tile).astype(dtype)
    t = len(kv_c)
    rng = np.random.default_rng(0)
    k_pe = np.arange(t * 64, dtype=np.uint32).reshape(t, 64) * 0x9E3779B1
    k_pe = k_pe.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        k_pe = k_pe.astype(dtype) if dtype != np.float32 else k_pe
    k_pe = np.where(np.isnan(k_pe), np.array(-np.nan, dtype), k_pe)
    pages = -(-t // 64) + 1
    data = empty_cache(cache_format, pages, 64)
    slots = rng.permutation(pages * 64)[:t].astype(np.int32)
    for joined in (False, True):
        check_append(
            data,
            cache_format,
            64,
            slots,
            kv_c[:, None],
            k_pe[:, None],
            joined=joined,
            power_of_two=power_of_two,
        )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@by_mode
def test_append_sizes(cache_format, power_of_two, page_size):
    rng = np.random.default_rng(page_size)
    for t in (1, 2, 31, 257, 700):
        data = empty_cache(cache_format, -(-t // page_size) + 3, page_size)
        slots = choose_slots(rng, t, len(data) * page_size)
        kv_c, k_pe = parts(rng, cache_format, t, BF16)
        options = {"joined": False, "power_of_two": power_of_two}
        check_append(data, cache_format, page_size, slots, kv_c, k_pe, **options)


@pytest.mark.parametrize("k_pe_dtype", DTYPES.values(), ids=DTYPES)
@by_dtype
@pytest.mark.parametrize("cache_format", ["fp8_v32", "fp8_v4"])
def test_append_mixed_types_and_unaligned_rows(cache_format, dtype, k_pe_dtype):
    rng = np.random.default_rng(1)
    data = empty_cache(cache_format, 5, 53)
    slots = choose_slots(rng, 93, 5 * 53)
    kv_c, k_pe = parts(rng, cache_format, 93, dtype, k_pe_dtype)
    for shift in (0, 1):
        check_append(data, cache_format, 53, slots, kv_c, k_pe, joined=False, shift=shift)
        if dtype == k_pe_dtype:
            check_append(data, cache_format, 53, slots, kv_c, k_pe, joined=True, shift=shift)


PLAIN_SIZES = [
    (1, 512, 64),
    (1, 128, 0),
    (2, 8, 8),
    (1, 7, 0),
    (3, 13, 5),
    (1, 40, 6),
    (4, 96, 32),
    (1, 2, 1),
]


@pytest.mark.parametrize("heads,latent,rope", PLAIN_SIZES)
@pytest.mark.parametrize("cache_dtype", DTYPES.values(), ids=DTYPES)
@by_dtype
def test_append_plain(dtype, cache_dtype, heads, latent, rope):
    rng = np.random.default_rng(heads)
    for page_size, t in ((1, 3), (53, 121), (64, 1)):
        shape = (heads, latent + rope)
        data = empty_cache("plain", 3 + t // page_size, page_size, cache_dtype, shape)
        slots = choose_slots(rng, t, len(data) * page_size)
        kv_c = numbers(rng, t, heads, latent, dtype=dtype)
        k_pe = numbers(rng, t, heads, rope, dtype=dtype)
        for joined in (False, True) if rope else (True,):
            for shift in (0, 1):
                check_append(
                    data, "plain", page_size, slots, kv_c, k_pe, joined=joined, shift=shift
                )


def test_append_to_plain_keeps_the_bits_of_nan():
    patterns = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 1, 576 - 64)
    for dtype in (BF16, np.float16):
        kv_c = patterns.view(dtype)
        data = empty_cache("plain", 3, 64, dtype)
        slots = np.arange(128, dtype=np.int32)
        check_append(data, "plain", 64, slots, kv_c, kv_c[..., ::8].copy(), joined=False)


# ------------------------------------------------------------------ append, fused


def fused_options(rng, t, latent, rope, layout, weight_dtype=np.float32, eps=1e-6):
    angles = rng.uniform(-400, 400, (t, rope // 2))
    return {
        "norm_weight": (1 + rng.standard_normal(latent) / 4).astype(weight_dtype),
        "norm_eps": eps,
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
        "rope_layout": layout,
    }


@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
@by_dtype
@pytest.mark.parametrize("cache_format,power_of_two", [*formats.MODES, ("plain", True)])
def test_append_fused(cache_format, power_of_two, dtype, layout):
    rng = np.random.default_rng(2)
    t = 301
    kv_c, k_pe = parts(rng, cache_format, t, dtype, finite=True)
    special = rng.permutation(t)[:40]
    kv_c[special], k_pe[special] = (x[:40] for x in parts(rng, cache_format, 40, dtype))
    kv_c[7], kv_c[8, :, 5] = 0, 3e38 if dtype != np.float16 else 6e4
    data = empty_cache(cache_format, 6, 64)
    slots = choose_slots(rng, t, 6 * 64)
    kv_c[9, :, 3] = np.nan
    options = fused_options(rng, t, kv_c.shape[-1], 64, layout)
    if cache_format != "plain":
        options["power_of_two"] = power_of_two
    both = dict(options)
    norm_only = {n: x for n, x in options.items() if not n.startswith("rope")}
    rope_only = {n: x for n, x in options.items() if not n.startswith("norm")}
    for chosen in (both, norm_only, rope_only):
        for joined in (False, True):
            check_append(data, cache_format, 64, slots, kv_c, k_pe, joined=joined, **chosen)
    check_append(data, cache_format, 64, slots, kv_c, k_pe, joined=False, shift=1, **both)


@pytest.mark.parametrize("cache_format,power_of_two", [*formats.MODES, ("plain", True)])
def test_append_of_more_tokens_than_warps(cache_format, power_of_two):
    """Each warp has several tokens, one after the other."""
    rng = np.random.default_rng(3)
    t, page_size = 20_001, 61
    kv_c, k_pe = parts(rng, cache_format, t, BF16, finite=True)
    data = empty_cache(cache_format, t // page_size + 4, page_size)
    slots = choose_slots(rng, t, len(data) * page_size)
    mode = {} if cache_format == "plain" else {"power_of_two": power_of_two}
    check_append(data, cache_format, page_size, slots, kv_c, k_pe, joined=False, **mode)
    for layout in ("interleaved", "half_split"):
        options = fused_options(rng, t, kv_c.shape[-1], 64, layout) | mode
        check_append(data, cache_format, page_size, slots, kv_c, k_pe, joined=True, **options)


@pytest.mark.parametrize("weight_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "latent,rope", [(512, 64), (256, 64), (448, 32), (13, 2), (700, 6), (8, 8)]
)
def test_append_fused_plain_sizes(latent, rope, weight_dtype):
    rng = np.random.default_rng(latent)
    t = 77
    for dtype, cache_dtype in ((BF16, BF16), (np.float32, BF16), (np.float16, np.float32)):
        data = empty_cache("plain", 3, 53, cache_dtype, (1, latent + rope))
        slots = choose_slots(rng, t, 3 * 53)
        kv_c = rng.standard_normal((t, 1, latent)).astype(dtype)
        k_pe = rng.standard_normal((t, 1, rope)).astype(dtype)
        for layout, eps in (("interleaved", 1e-6), ("half_split", 0.0)):
            options = fused_options(rng, t, latent, rope, layout, weight_dtype, eps)
            for joined in (False, True):
                check_append(data, "plain", 53, slots, kv_c, k_pe, joined=joined, **options)


# ------------------------------------------------------------------ gather


def every_byte(rng, cache_format, pages, page_size):
    """Random bytes: all codes, scales of all kinds, NaN of all kinds."""
    shape = empty_cache(cache_format, pages, page_size).shape
    return rng.integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@by_dtype
@pytest.mark.parametrize("cache_format", ["fp8_v32", "fp8_v4"])
def test_gather_fp8(cache_format, dtype, page_size):
    rng = np.random.default_rng(page_size)
    for t in (1, 33, 1025):
        data = every_byte(rng, cache_format, max(200 // page_size, 3), page_size)
        num_slots = len(data) * page_size
        slots = rng.integers(0, num_slots, t).astype(np.int32)
        slots[:: max(t // 9, 2)] = rng.choice(
            [*BAD_SLOTS, num_slots], len(slots[:: max(t // 9, 2)])
        )
        got = RawGather(on_device(data), cache_format, page_size, slots, dtype).run()
        want = oracle.gather(data, cache_format, page_size, slots, dtype)
        np.testing.assert_array_equal(oracle.quiet_bits(got), oracle.quiet_bits(want))


@by_dtype
def test_gather_of_every_code_times_every_scale(dtype):
    """V4: subnormal and overflowing products too, and the signs of NaN."""
    data = np.zeros((256, q.page_bytes(2)), np.uint8)
    data[:, :448] = np.arange(448) % 256
    data[:, 576 : 576 + 448] = (np.arange(448) + 192) % 256
    data[:, 1152 : 1152 + 16] = np.arange(256)[:, None]
    slots = np.arange(512, dtype=np.int32)
    got = RawGather(on_device(data), "fp8_v4", 2, slots, dtype).run()
    want = oracle.gather(data, "fp8_v4", 2, slots, dtype)
    np.testing.assert_array_equal(oracle.quiet_bits(got), oracle.quiet_bits(want))
    xla = PagedKVCache(jnp.asarray(data), "fp8_v4", 2).gather(
        slots, dtype=dtype, implementation="xla"
    )
    if dtype != np.float16:  # the only cast that XLA leaves to the GPU
        same_bytes(got, np.asarray(xla))


@pytest.mark.parametrize("shape", [(1, 576), (1, 128), (3, 13), (2, 8), (1, 1)])
@pytest.mark.parametrize("cache_dtype", DTYPES.values(), ids=DTYPES)
@by_dtype
def test_gather_plain(dtype, cache_dtype, shape):
    rng = np.random.default_rng(3)
    for page_size in PAGE_SIZES:
        data = numbers(rng, 9, page_size, *shape, dtype=cache_dtype)
        num_slots = 9 * page_size
        slots = rng.integers(-3, num_slots + 3, 77).astype(np.int32)
        got = RawGather(on_device(data), "plain", page_size, slots, dtype).run()
        same_bytes(got, oracle.gather(data, "plain", page_size, slots, dtype))


# ------------------------------------------------------------------ inside JAX


def custom_calls(compiled, target):
    return len(re.findall(rf'custom_call_target="{target}"', compiled.as_text()))


@pytest.mark.parametrize("implementation", [None, "cuda"])
@pytest.mark.parametrize("cache_format", cache_tests.FORMATS)
def test_public_functions_run_the_kernels(cache_format, implementation):
    rng = np.random.default_rng(4)
    data = empty_cache(cache_format, 4, 53)
    kv_c, k_pe = parts(rng, cache_format, 60, BF16)
    slots = choose_slots(rng, 60, 4 * 53)
    want = oracle.append(data, cache_format, 53, slots, kv_c, k_pe)
    cache = PagedKVCache(on_device(data), cache_format, 53)
    for call in (
        lambda c: c.append(kv_c, slots, k_pe=k_pe, implementation=implementation),
        lambda c: c.append(
            np.concatenate([kv_c, k_pe], axis=-1).reshape(4, 15, -1),
            slots.reshape(4, 15),
            implementation=implementation,
        ),
    ):
        compiled = jax.jit(call).lower(cache).compile()
        assert custom_calls(compiled, APPEND) == 1
        same_bytes(np.asarray(compiled(cache).data), want)
        same_bytes(np.asarray(call(cache).data), want)  # without jit
    same_bytes(np.asarray(cache.data), data)
    read = jax.jit(lambda c, s: c.gather(s, implementation=implementation))
    compiled = read.lower(cache, slots.reshape(4, 15)).compile()
    assert custom_calls(compiled, GATHER) == 1
    full = PagedKVCache(jnp.asarray(want), cache_format, 53)
    got = np.asarray(read(full, slots.reshape(4, 15)))
    expected = oracle.gather(want, cache_format, 53, slots, BF16).reshape(got.shape)
    np.testing.assert_array_equal(oracle.quiet_bits(got), oracle.quiet_bits(expected))
    assert read(full, slots[:0]).shape == (0, *got.shape[-2:])
    assert explain(PagedKVCache.append, cache, kv_c, slots, k_pe=k_pe).implementation == "cuda"
    assert explain(PagedKVCache.gather, cache, slots).implementation == "cuda"


@pytest.mark.parametrize("cache_format", cache_tests.FORMATS)
def test_fused_append_in_jax(cache_format):
    """The kernel's arguments arrive; and XLA computes the same but for the order of a sum."""
    rng = np.random.default_rng(5)
    data = empty_cache(cache_format, 3, 64)
    kv_c, k_pe = parts(rng, cache_format, 90, BF16, finite=True)
    slots = rng.permutation(3 * 64)[:90].astype(np.int32)
    for layout in ("interleaved", "half_split"):
        options = fused_options(rng, 90, kv_c.shape[-1], 64, layout, BF16, 1e-3)
        want = oracle.append(data, cache_format, 64, slots, kv_c, k_pe, **options)
        cache = PagedKVCache(on_device(data), cache_format, 64)
        kv = np.concatenate([kv_c, k_pe], axis=-1)
        got = cache.append(kv, slots, **options, implementation="cuda")
        same_bytes(np.asarray(got.data), want)
        xla = cache.append(kv, slots, **options, implementation="xla").gather(slots)
        ours = np.asarray(got.gather(slots), np.float32)
        assert np.mean(ours != np.asarray(xla, np.float32)) < 0.01
        np.testing.assert_allclose(ours, np.asarray(xla, np.float32), rtol=0.13, atol=0.02)


@pytest.mark.parametrize("cache_format", cache_tests.FORMATS)
def test_donated_cache_is_written_in_place(cache_format):
    """A scan over layers on one flat cache, step after step: never a second array of its size."""
    rng = np.random.default_rng(6)
    layers, pages, page_size, steps, b = 3, 40, 64, 2, 5
    data = empty_cache(cache_format, layers * pages, page_size)
    kv_c, k_pe = parts(rng, cache_format, steps * layers * b, BF16)
    kv = np.concatenate([kv_c, k_pe], axis=-1).reshape(steps, layers, b, 1, -1)
    slots = rng.permutation(pages * page_size)[: steps * b].reshape(steps, b).astype(np.int32)
    slots[0, 0] = -1

    def run(cache, kv, slots):
        def step(cache, inputs):
            kv, slots = inputs

            def layer(cache, inputs):
                index, kv = inputs
                own = offset_slots(slots, index * pages, num_pages=pages, page_size=page_size)
                cache = cache.append(kv, own, implementation="cuda")
                return cache, cache.gather(own, implementation="cuda")

            return lax.scan(layer, cache, (jnp.arange(layers, dtype=jnp.int32), kv))

        return lax.scan(step, cache, (kv, slots))

    cache = PagedKVCache(on_device(data), cache_format, page_size)
    jitted = jax.jit(run, donate_argnums=0)
    compiled = jitted.lower(cache, kv, slots).compile()
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if f'custom_call_target="{APPEND}"' in line]
    assert calls and all("output_to_operand_aliasing={{}: (0, {})}" in line for line in calls)
    assert cache_copies(text, cache.data.shape) == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.data.nbytes
    assert memory.temp_size_in_bytes < cache.data.nbytes // 4
    # The check can fail: without donation the copy is there.
    kept = jax.jit(run).lower(cache, kv, slots).compile()
    assert cache_copies(kept.as_text(), cache.data.shape)

    address = cache.data.unsafe_buffer_pointer()
    cache, seen = compiled(cache, kv, slots)
    assert cache.data.unsafe_buffer_pointer() == address
    want = data
    for s in range(steps):
        for layer in range(layers):
            moved = np.where(slots[s] >= 0, slots[s] + layer * pages * page_size, -1)
            latent = kv_c.shape[-1]
            tokens = kv[s, layer]
            want = oracle.append(
                want, cache_format, page_size, moved, tokens[..., :latent], tokens[..., latent:]
            )
            expected = oracle.gather(want, cache_format, page_size, moved, BF16)
            got = np.asarray(seen[s, layer])
            np.testing.assert_array_equal(oracle.quiet_bits(got), oracle.quiet_bits(expected))
    same_bytes(np.asarray(cache.data), want)


@pytest.mark.parametrize("cache_format", cache_tests.FORMATS)
def test_vmap_is_one_call(cache_format):
    rng = np.random.default_rng(7)
    data = np.stack([empty_cache(cache_format, 3, 4)] * 2)
    kv_c, k_pe = parts(rng, cache_format, 2 * 7, BF16)
    kv = np.concatenate([kv_c, k_pe], axis=-1).reshape(2, 7, 1, -1)
    slots = np.stack([choose_slots(rng, 7, 12) for _ in range(2)])
    slots[0, 0] = 12  # of the first cache none, though it would be one of the second

    def run(data, kv, slots):
        cache = PagedKVCache(data, cache_format, 4).append(kv, slots, implementation="cuda")
        return cache.data, cache.gather(slots, implementation="cuda")

    compiled = jax.jit(jax.vmap(run)).lower(data, kv, slots).compile()
    assert custom_calls(compiled, APPEND) == custom_calls(compiled, GATHER) == 1
    got, read = compiled(data, kv, slots)
    latent = kv_c.shape[-1]
    for i in range(2):
        want = oracle.append(
            data[i], cache_format, 4, slots[i], kv[i, ..., :latent], kv[i, ..., latent:]
        )
        same_bytes(np.asarray(got[i]), want)
        tokens = oracle.gather(want, cache_format, 4, slots[i], BF16)
        np.testing.assert_array_equal(
            oracle.quiet_bits(np.asarray(read[i])), oracle.quiet_bits(tokens)
        )


def test_derivatives_are_those_of_the_reference():
    rng = np.random.default_rng(8)
    data = rng.standard_normal((3, 4, 1, 24)).astype(np.float32)
    kv = rng.standard_normal((5, 1, 24)).astype(np.float32)
    slots = np.array([3, -1, 11, 0, 12], np.int32)
    weight = rng.standard_normal(16).astype(np.float32)

    def loss(data, kv, weight, implementation):
        cache = PagedKVCache(data, "plain", 4)
        cache = cache.append(kv, slots, norm_weight=weight, implementation=implementation)
        seen = cache.gather(slots, implementation=implementation)
        return (cache.data**3).sum() + (seen**2).sum()

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    ours, xla = (gradient(data, kv, weight, name) for name in ("cuda", "xla"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, xla)


@pytest.mark.parametrize("cache_format", cache_tests.FORMATS)
def test_slots_past_2_to_the_31_bytes(cache_format):
    """The last slots of a cache of more than 2^32 bytes, and the bytes beside them."""
    limit = jax.devices("cuda")[0].memory_stats()["bytes_limit"]
    if limit < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    page_size = 64
    token_bytes = {"plain": 1152, "fp8_v32": 656, "fp8_v4": 585}[cache_format]
    pages = (1 << 32) // (page_size * token_bytes) + 3
    cache = jax.jit(lambda: PagedKVCache.zeros(pages, page_size, format=cache_format))()
    assert cache.data.nbytes > 1 << 32
    num_slots = pages * page_size
    slots = np.array([num_slots - 1, num_slots - 130, num_slots, 5, 2**31 - 1, -1], np.int32)
    rng = np.random.default_rng(9)
    kv_c, k_pe = parts(rng, cache_format, len(slots), BF16)
    append = functools.partial(PagedKVCache.append, implementation="cuda")
    cache = jax.jit(append, donate_argnums=0)(cache, kv_c, slots, k_pe=k_pe)
    tail = np.asarray(cache.data[-3:])
    first = num_slots - 3 * page_size
    want = np.zeros(tail.shape, tail.dtype)
    in_tail = np.where(slots >= num_slots, -1, slots - first)
    in_tail = np.where(slots < 0, -1, in_tail).astype(np.int32)
    want = oracle.append(want, cache_format, page_size, in_tail, kv_c, k_pe)
    same_bytes(tail, want)
    head = np.asarray(cache.data[:1])
    want = oracle.append(
        np.zeros(head.shape, head.dtype), cache_format, page_size, slots[3:4], kv_c[3:4], k_pe[3:4]
    )
    same_bytes(head, want)
    got = np.asarray(jax.jit(PagedKVCache.gather)(cache, slots))
    expected = np.zeros(got.shape, BF16)
    tokens = oracle.gather(tail, cache_format, page_size, in_tail, BF16)
    for i in (0, 1):
        expected[i] = tokens[i]
    expected[3] = oracle.gather(head, cache_format, page_size, slots[3:4], BF16)[0]
    np.testing.assert_array_equal(oracle.quiet_bits(got), oracle.quiet_bits(expected))
    # Nothing else was written.
    written = jax.jit(lambda c: jnp.sum(jnp.any(c.data.reshape(pages, -1) != 0, axis=1)))(cache)
    assert int(written) == 3
