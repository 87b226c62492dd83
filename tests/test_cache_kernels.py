"""Append and gather as operations with kernels, as far as they go without a GPU.

The numpy mirror of the kernels is held against the jnp path here; the kernels against it on a GPU.
"""

import functools
import re

import cache_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_cache as cache_tests
import test_quantization as formats
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import PagedKVCache, _dispatch, _folding, explain
from jax_flashmla._decode_loop import cache_copies
from jax_flashmla.cache import append_operation, gather_operation
from jax_flashmla.flax import MLAConfig, core
from jax_flashmla.reference import latents

BF16 = oracle.BF16
FORMATS = cache_tests.FORMATS
LAYOUTS = latents.ROPE_LAYOUTS


def i32(values):
    return np.asarray(values, np.int32)


def tokens(cache_format, t, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    latent = 512 if cache_format == "plain" else formats.FORMATS[cache_format][0]
    kv_c = (rng.standard_normal((t, 1, latent)) * np.exp(rng.uniform(-9, 4, (t, 1, 1)))).astype(
        dtype
    )
    return kv_c, rng.standard_normal((t, 1, 64)).astype(dtype)


def fused(t, latent=512, rope=64, layout="interleaved", dtype=np.float32):
    rng = np.random.default_rng(1)
    angles = rng.uniform(-9, 9, (t, rope // 2))
    return {
        "norm_weight": (1 + rng.standard_normal(latent) / 4).astype(dtype),
        "norm_eps": 1e-5,
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
        "rope_layout": layout,
    }


# ------------------------------------------------------------------ the mirror and the jnp path


@pytest.mark.parametrize("page_size", [1, 5, 64])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_mirror_writes_and_reads_what_jnp_does(cache_format, page_size):
    kv_c, k_pe = tokens(cache_format, 23)
    kv_c[3, 0, 5], kv_c[4, 0, :2] = np.nan, [np.inf, -np.inf]
    empty = cache_tests.make(cache_format, 30, page_size)
    data = np.full(empty.data.shape, 0x7F, np.uint8)
    if cache_format == "plain":
        data = np.zeros(empty.data.shape, BF16)
    slots = np.random.default_rng(2).permutation(30 * page_size)[:23]
    slots[[0, 9]] = [-1, 30 * page_size]
    want = oracle.append(data, cache_format, page_size, slots, kv_c, k_pe)
    cache = PagedKVCache(jnp.asarray(data), cache_format, page_size)
    got = np.asarray(cache.append(kv_c, i32(slots), k_pe=k_pe).data)
    compare = oracle.quiet_bits if cache_format == "plain" else oracle.bits
    np.testing.assert_array_equal(compare(got), compare(want))
    if cache_format == "fp8_v32":
        exact = oracle.append(data, cache_format, page_size, slots, kv_c, k_pe, power_of_two=False)
        options = {"k_pe": k_pe, "power_of_two_scales": False}
        np.testing.assert_array_equal(cache.append(kv_c, i32(slots), **options).data, exact)
    for dtype in (BF16, np.float32):
        cache = PagedKVCache(jnp.asarray(want), cache_format, page_size)
        read = np.asarray(cache.gather(i32(slots), dtype=dtype))
        expected = oracle.gather(want, cache_format, page_size, slots, dtype)
        np.testing.assert_array_equal(oracle.quiet_bits(read), oracle.quiet_bits(expected))


@pytest.mark.parametrize("latent", [1, 8, 13, 256, 448, 512, 700])
def test_mirror_of_the_norm(latent):
    x = np.random.default_rng(latent).standard_normal((50, latent)).astype(np.float32)
    weight = np.random.default_rng(3).standard_normal(latent).astype(np.float32)
    got = oracle.rms_norm(x, weight, 1e-6)
    wide = x.astype(np.float64)
    want = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(latents.rms_norm(x, weight, 1e-6), got, rtol=2e-6)
    # The order of additions, spelled out.
    sums = []
    for lane in range(32):
        total = np.float32(0)
        for i in range(latent):
            if i // 8 % 32 == lane:
                total = total + x[0, i] * x[0, i]
        sums.append(np.float32(total))
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    factor = np.float32(1) / np.sqrt(sums[0] / np.float32(latent) + np.float32(1e-6))
    np.testing.assert_array_equal(got[0], x[0] * factor * weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_is_that_of_the_layers(layout):
    config = MLAConfig(
        hidden_size=8,
        num_heads=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=12,
        v_head_dim=8,
        rope_layout=layout,
        dtype=jnp.float32,
    )
    x = np.random.default_rng(4).standard_normal((9, 12)).astype(np.float32)
    positions = i32(np.arange(9) * 7)
    angles = positions[:, None].astype(np.float32) * core.rope_frequencies(config)
    cos, sin = np.asarray(jnp.cos(angles)), np.asarray(jnp.sin(angles))
    want = core.apply_rope(x, positions, config)
    np.testing.assert_allclose(latents.rotate(x, cos, sin, layout), want, atol=1e-6)
    np.testing.assert_allclose(oracle.rotate(x, cos, sin, layout), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_fused_is_the_steps_one_by_one(cache_format, layout, dtype):
    kv_c, k_pe = tokens(cache_format, 20, dtype)
    latent = kv_c.shape[-1]
    options = fused(20, latent, layout=layout)
    normed = latents.rms_norm(kv_c, options["norm_weight"], options["norm_eps"])
    cos, sin = (options[name][:, None] for name in ("rope_cos", "rope_sin"))
    turned = latents.rotate(k_pe, cos, sin, layout)
    cache, slots = cache_tests.make(cache_format, 6, 5), i32(np.arange(20) + 3)
    want = cache.append(normed, slots, k_pe=turned).gather(slots, dtype=jnp.float32)
    joined = np.concatenate([kv_c, k_pe], axis=-1)
    reshaped = {
        name: value.reshape(4, 5, -1) if name.startswith(("rope_c", "rope_s")) else value
        for name, value in options.items()
    }
    calls = [
        cache.append(kv_c, slots, k_pe=k_pe, **options),
        jax.jit(functools.partial(PagedKVCache.append, **options))(cache, joined, slots),
        cache.append(joined.reshape(4, 5, -1), slots.reshape(4, 5), **reshaped),
    ]
    for got in calls:
        # Programs that are compiled apart may differ in a last bit, before it is rounded.
        found = np.asarray(got.gather(slots, dtype=jnp.float32))
        assert np.mean(found != np.asarray(want)) < 0.01
        np.testing.assert_allclose(found, want, rtol=0.13, atol=1e-3)
    mirror = oracle.append(np.asarray(cache.data), cache_format, 5, slots, kv_c, k_pe, **options)
    read = oracle.gather(mirror, cache_format, 5, slots, np.float32)
    assert np.mean(read != np.asarray(want)) < 0.01
    np.testing.assert_allclose(read, want, rtol=0.13, atol=1e-3)
    # Each alone leaves the other part as it is.
    norm = {name: options[name] for name in ("norm_weight", "norm_eps")}
    alone = cache.append(kv_c, slots, k_pe=k_pe, **norm).gather(slots, dtype=jnp.float32)
    plain = cache.append(kv_c, slots, k_pe=k_pe).gather(slots, dtype=jnp.float32)
    np.testing.assert_array_equal(alone[..., latent:], plain[..., latent:])
    rope = {name: options[name] for name in ("rope_cos", "rope_sin", "rope_layout")}
    alone = cache.append(kv_c, slots, k_pe=k_pe, **rope).gather(slots, dtype=jnp.float32)
    np.testing.assert_array_equal(alone[..., :latent], plain[..., :latent])
    assert np.abs(alone[..., latent:] - plain[..., latent:]).max() > 0.1


def test_which_columns_of_a_plain_cache_are_the_latent():
    cache = PagedKVCache.zeros(2, 4, head_dim=24, dtype=jnp.float32)
    kv = np.random.default_rng(5).standard_normal((3, 24)).astype(np.float32)
    options, slots = fused(3, 16, 8), i32([0, 5, 7])
    rope = {name: options[name] for name in ("rope_cos", "rope_sin")}
    norm = {"norm_weight": options["norm_weight"]}
    whole = {"norm_weight": np.ones(24, np.float32)}
    for given, latent in ((options, 16), (norm, 16), (rope, 16), (whole, 24)):
        got = cache.append(kv, slots, **given).gather(slots)[:, 0]
        same = np.asarray(got) == kv
        assert same[:, 16:].all() == ("rope_cos" not in given and latent == 16)
        assert same[:, :16].all() == ("norm_weight" not in given)
    # All columns turn, or all are in k_pe.
    turned = cache.append(kv, slots, **{n: x.repeat(3, axis=1) for n, x in rope.items()})
    assert not (np.asarray(turned.gather(slots)[:, 0]) == kv).all(axis=0).any()
    got = cache.append(kv[:, :0], slots, k_pe=kv).gather(slots)
    np.testing.assert_array_equal(got[:, 0], kv)
    got = cache.append(kv, slots, k_pe=kv[:, :0]).gather(slots)
    np.testing.assert_array_equal(got[:, 0], kv)


# ------------------------------------------------------------------ calls of the kernels


def lowered_for_cuda(function, *arguments, **options):
    traced = jax.jit(function, **options).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cache_format", FORMATS)
def test_kernels_are_called_and_the_cache_is_aliased(cache_format, monkeypatch):
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [])  # lower for another machine
    cache = cache_tests.make(cache_format, 6, 5)
    kv_c, k_pe = tokens(cache_format, 4)
    slots = i32([3, -1, 29, 30])

    def step(cache, kv_c, slots):
        def body(cache, slots):
            cache = cache.append(kv_c, slots, k_pe=k_pe)
            return cache, cache.gather(slots)

        return jax.lax.scan(body, cache, slots[None])

    text = lowered_for_cuda(step, cache, kv_c, slots, donate_argnums=0)
    calls = [line for line in text.splitlines() if "@flashmla_cache_append(" in line]
    assert len(calls) == 1 and text.count("@flashmla_cache_gather(") == 1
    assert "output_tuple_indices = [], operand_index = 0, operand_tuple_indices = []" in calls[0]
    assert "stablehlo.scatter" not in text and "stablehlo.concatenate" not in text
    options = fused(4, kv_c.shape[-1], layout="half_split")
    text = lowered_for_cuda(lambda c: c.append(kv_c, slots, k_pe=k_pe, **options), cache)
    assert "rope_interleaved = false" in text and "stablehlo.rsqrt" not in text
    # Asked not to, and where there is no kernel.
    text = lowered_for_cuda(lambda c: c.append(kv_c, slots, k_pe=k_pe, implementation="xla"), cache)
    assert "@flashmla_cache_append" not in text and "stablehlo.scatter" in text
    batched = jax.vmap(lambda c, s: c.append(kv_c, s, k_pe=k_pe).gather(s))
    stacked = PagedKVCache(jnp.stack([cache.data] * 3), cache_format, 5)
    text = lowered_for_cuda(batched, stacked, np.stack([slots] * 3))
    assert text.count("@flashmla_cache_append(") == text.count("@flashmla_cache_gather(") == 1


def test_a_kernel_that_writes_in_place_is_no_copy():
    line = (
        "  %c = u8[4,64,1,656]{3,2,1,0} custom-call(%p, %s, %k), "
        'custom_call_target="flashmla_cache_append", operand_layout_constraints={}'
    )
    module = "ENTRY %main (p: u8[4,64,1,656]) -> u8[4,64,1,656] {\n" + line
    aliased = module + ', output_to_operand_aliasing={{}: (0, {})}, backend_config=""\n}\n'
    assert cache_copies(aliased, (4, 64, 1, 656)) == []
    assert len(cache_copies(module + "\n}\n", (4, 64, 1, 656))) == 1
    other = aliased.replace("(0, {})", "(1, {})")
    assert len(cache_copies(other, (4, 64, 1, 656))) == 1


def test_cuda_is_refused_on_other_platforms():
    cache, kv = cache_tests.make("plain", 2, 4), np.zeros((1, 576), np.float32)
    with pytest.raises(NotImplementedError, match="cache_append.*platform that is not CUDA"):
        cache.append(kv, i32([0]), implementation="cuda")
    with pytest.raises(NotImplementedError, match="cache_gather.*platform that is not CUDA"):
        cache.gather(i32([0]), implementation="cuda")


@pytest.mark.parametrize(
    "cache,text",
    [
        (PagedKVCache(jnp.zeros((2, 4, 1, 8), jnp.float8_e4m3fn), "plain", 4), "float8_e4m3fn"),
        (PagedKVCache(jnp.zeros((2, 4, 1, 656), jnp.int8), "fp8_v32", 4), "int8"),
        (PagedKVCache(jnp.zeros((2, 5, 1, 656), jnp.uint8), "fp8_v32", 4), "is not that of"),
        (PagedKVCache(jnp.zeros((2, 2000), jnp.uint8), "fp8_v4", 4), "2000 bytes"),
        (
            PagedKVCache(jnp.zeros((2, 584 * 4), jnp.uint8), "fp8_v4", 4),
            "2336 bytes; the kernel takes 2880 for 4 tokens",
        ),
    ],
)
def test_what_the_kernels_decline(cache, text):
    kv = np.zeros((1, cache.head_dim), np.float32)
    with pytest.raises(NotImplementedError, match=f"cache_append.*declines.*{text}"):
        cache.append(kv, i32([0]), implementation="cuda")
    with pytest.raises(NotImplementedError, match=f"cache_gather.*declines.*{text}"):
        cache.gather(i32([0]), dtype=jnp.float32, implementation="cuda")
    found = (
        explain(PagedKVCache.gather, cache, i32([0]), dtype=jnp.float32)
        .operations[0]
        .declines["cuda"]
    )
    assert any(text in reason for reason in found)


def test_explain():
    cache = jax.eval_shape(lambda: cache_tests.make("fp8_v4", 2, 4))
    kv, slots = jax.ShapeDtypeStruct((3, 1, 512), jnp.bfloat16), i32([0, 1, 2])
    for op, arguments in (("append", (kv, slots)), ("gather", (slots,))):
        method = getattr(PagedKVCache, op)
        found = explain(method, cache, *arguments)
        assert found == explain(f"PagedKVCache.{op}", cache, *arguments)
        assert [o.operation for o in found.operations] == [f"flash_mla_cache_{op}"]
        if jax.default_backend() == "cpu":
            assert found.implementation == "xla"
        asked = explain(method, cache, *arguments, implementation="xla")
        assert "implementation='xla' was asked for" in asked.operations[0].declines["cuda"]


# ------------------------------------------------------------------ transformations


def plain_cache(pages=3, page_size=4, columns=12):
    rng = np.random.default_rng(6)
    data = rng.standard_normal((pages, page_size, 1, columns)).astype(np.float32)
    return PagedKVCache(jnp.asarray(data), "plain", page_size)


def test_derivatives():
    cache, slots = plain_cache(), i32([3, -1, 11, 12])
    kv = jnp.asarray(np.random.default_rng(7).standard_normal((4, 1, 12)), jnp.float32)

    def loss(cache, kv):
        cache = cache.append(kv, slots)
        return (cache.data**2).sum() + (cache.gather(slots) ** 3).sum()

    for gradient in (jax.grad(loss, (0, 1)), jax.jit(jax.grad(loss, (0, 1)))):
        d_cache, d_kv = gradient(cache, kv)
        flat = np.asarray(cache.data).reshape(12, 12)
        want, own = 2 * flat, np.zeros((4, 12), np.float32)
        for i, slot in ((0, 3), (2, 11)):
            own[i] = 2 * kv[i, 0] + 3 * kv[i, 0] ** 2
            want[slot] = 0
        np.testing.assert_allclose(d_cache.data.reshape(12, 12), want, rtol=1e-6)
        np.testing.assert_allclose(d_kv[:, 0], own, rtol=1e-6)
    second = jax.hessian(lambda kv: (cache.append(kv, slots).gather(slots) ** 3).sum())(kv)
    curvature = np.where(np.isin(np.arange(4), [0, 2])[:, None, None], 6 * kv, 0)
    np.testing.assert_allclose(second.reshape(48, 48), np.diag(curvature.reshape(48)), rtol=1e-6)
    options = fused(4, 8, 4)

    def fused_loss(kv, weight, cos):
        given = {**options, "norm_weight": weight, "rope_cos": cos}
        return (cache.append(kv, slots, **given).gather(slots) ** 3).sum()

    def spelled_out(kv, weight, cos):
        latent = latents.rms_norm(kv[:, 0, :8], weight, options["norm_eps"])
        rope = latents.rotate(kv[:, 0, 8:], cos, options["rope_sin"], "interleaved")
        return sum((part[i32([0, 2])] ** 3).sum() for part in (latent, rope))

    moving = kv, jnp.asarray(options["norm_weight"]), jnp.asarray(options["rope_cos"])
    got, want = (jax.grad(f, (0, 1, 2))(*moving) for f in (fused_loss, spelled_out))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # What is quantised has no slope.
    fp8, wide = cache_tests.make("fp8_v32", 2, 4), jnp.ones((4, 1, 576))
    slope = jax.grad(lambda kv: fp8.append(kv, slots).gather(slots, dtype=jnp.float32).sum())(wide)
    assert slope.shape == wide.shape and not np.asarray(slope[..., :512]).any()


def test_vmap_that_does_not_fold(monkeypatch):
    stacked = PagedKVCache(jnp.stack([plain_cache().data] * 2), "plain", 4)
    kv = jnp.asarray(np.random.default_rng(8).standard_normal((2, 5, 1, 12)), jnp.float32)
    slots = i32([[0, -1, 11, 12, 3], [4, 5, 24, -7, 11]])
    options = fused(5, 8, 4)
    weights = jnp.stack([jnp.ones(8), 2 * jnp.ones(8)])

    def step(cache, kv, slots, weight):
        cache = cache.append(kv, slots, **{**options, "norm_weight": weight})
        return cache, cache.gather(slots)

    each = [
        step(PagedKVCache(stacked.data[i], "plain", 4), kv[i], slots[i], weights[i])
        for i in range(2)
    ]
    for limit in (_folding._MAX_INT32, 20):  # a weight for each; more slots than int32 holds
        monkeypatch.setattr(_folding, "_MAX_INT32", limit)
        cache, read = jax.vmap(step)(stacked, kv, slots, weights)
        for i in range(2):
            np.testing.assert_allclose(cache.data[i], each[i][0].data, atol=1e-6)
            np.testing.assert_allclose(read[i], each[i][1], atol=1e-6)
    with pytest.raises(NotImplementedError, match="cache_gather.*cannot take this vmap"):
        jax.vmap(lambda c, s: c.gather(s, implementation="cuda"))(stacked, slots)


def test_slots_of_any_shape_are_read_under_vmap():
    cache = plain_cache()
    stacked = PagedKVCache(jnp.stack([cache.data, -cache.data]), "plain", 4)
    flat = np.asarray(cache.data).reshape(12, 1, 12)
    got = jax.vmap(PagedKVCache.gather)(stacked, i32([2, 12]))
    np.testing.assert_array_equal(got, [flat[2], np.zeros((1, 12))])
    got = jax.vmap(PagedKVCache.gather, (0, None))(stacked, i32([[2, -1]]))
    np.testing.assert_array_equal(got[1, 0], [-flat[2], np.zeros((1, 12))])
    got = jax.vmap(PagedKVCache.gather, (None, 1))(cache, i32([[2, 5], [1, 0]]))
    np.testing.assert_array_equal(got, flat[[[2, 1], [5, 0]]])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_several_devices(cache_format, axis_type):
    """A replicated cache on a mesh, and with automatic axes one that is divided by pages."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    kv_c, k_pe = tokens(cache_format, 8)
    kv, slots = np.concatenate([kv_c, k_pe], axis=-1), i32([0, 3, 6, -1, 9, 12, 31, 40])
    cache = cache_tests.make(cache_format, 8, 4)
    want = np.asarray(cache.append(kv, slots).data)
    specs = [P()] if axis_type == AxisType.Explicit else [P(), P("x")]
    with jax.set_mesh(mesh):
        for spec in specs:
            sharding = NamedSharding(mesh, spec)
            data = jax.device_put(np.asarray(cache.data), sharding)

            def step(cache, kv, slots):
                def body(cache, _):
                    return cache.append(kv, slots), None

                return jax.lax.scan(body, cache, None, length=2)[0]

            got = jax.jit(step, donate_argnums=0)(PagedKVCache(data, cache_format, 4), kv, slots)
            np.testing.assert_array_equal(np.asarray(got.data), want)
            assert got.data.sharding.is_equivalent_to(sharding, got.data.ndim)
            read = np.asarray(jax.jit(PagedKVCache.gather)(got, slots))
            np.testing.assert_array_equal(
                read, PagedKVCache(jnp.asarray(want), cache_format, 4).gather(slots)
            )
            with pytest.raises(NotImplementedError, match="several devices.*shard_map"):
                jax.jit(lambda c: c.append(kv, slots, implementation="cuda"))(got)


def test_inside_shard_map():
    """Each device has a cache of its own, and may run the kernel on it."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    cache, kv = plain_cache(pages=8), np.ones((4, 12), np.float32)
    slots = i32([0, 7, 8, 3])  # 8: of no device

    def append(data, kv, slots):
        cache = PagedKVCache(data, "plain", 4).append(kv, slots)
        return cache.data, cache.gather(slots)

    mapped = jax.shard_map(append, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    got, read = jax.jit(mapped)(cache.data, kv, slots)
    want = np.asarray(cache.data).reshape(4, 8, 12).copy()
    for device, slot in enumerate(slots):
        if slot < 8:
            want[device, slot] = 1
    np.testing.assert_array_equal(got.reshape(4, 8, 12), want)
    np.testing.assert_array_equal(read[:, 0, 0], [1, 1, 0, 1])


def test_export():
    cache, kv, slots = plain_cache(), np.ones((2, 12), np.float32), i32([5, -1])

    def step(cache, kv, slots):
        return cache.append(kv, slots).data

    data = jax.jit(lambda data, kv, slots: step(PagedKVCache(data, "plain", 4), kv, slots))
    loaded = jax.export.deserialize(jax.export.export(data)(cache.data, kv, slots).serialize())
    np.testing.assert_array_equal(loaded.call(cache.data, kv, slots), step(cache, kv, slots))
    names = ("flashmla_cache_append", "flashmla_cache_gather")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    both = jax.export.export(data, platforms=("cpu", "cuda"), disabled_checks=checks)
    text = both(cache.data, kv, slots).mlir_module()
    if not _dispatch.cuda_devices() or _dispatch.kernels_missing() is None:
        assert "@flashmla_cache_append" in text
    np.testing.assert_array_equal(
        both(cache.data, kv, slots).call(cache.data, kv, slots), step(cache, kv, slots)
    )


def test_operations_need_no_devices():
    """No array is made for shapes alone, whatever the size."""
    cache = jax.eval_shape(lambda: PagedKVCache.zeros(10**6, 64))
    kv, slots = jax.ShapeDtypeStruct((9, 576), jnp.float32), jax.ShapeDtypeStruct((9,), jnp.int32)
    assert jax.eval_shape(PagedKVCache.append, cache, kv, slots).data.shape == cache.data.shape
    assert jax.eval_shape(PagedKVCache.gather, cache, slots).shape == (9, 1, 576)
    assert append_operation.transforms_as_reference and gather_operation.transforms_as_reference


# ------------------------------------------------------------------ errors

CACHE = PagedKVCache.zeros(2, 4, head_dim=24, dtype=jnp.float32)
TWO_HEADS = PagedKVCache.zeros(2, 4, num_heads_k=2, head_dim=24)
KV, SLOTS = np.zeros((3, 24), np.float32), i32([0, 1, 2])
COS = np.zeros((3, 4), np.float32)
WEIGHT = np.ones(16, np.float32)
ROPE = {"rope_cos": COS, "rope_sin": COS}


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda: CACHE.append(KV, SLOTS, implementation="gpu"), "'implementation' is 'gpu'"),
        (lambda: CACHE.gather(SLOTS, implementation="gpu"), "'implementation' is 'gpu'"),
        (lambda: CACHE.append(KV, SLOTS, norm_weight=[1.0] * 16), "'norm_weight' is a list"),
        (lambda: CACHE.append(KV, SLOTS, norm_weight=WEIGHT[None]), "'norm_weight' has shape"),
        (lambda: CACHE.append(KV, SLOTS, norm_weight=np.ones(25, np.float32)), r"\(25,\).*\(24,\)"),
        (
            lambda: CACHE.append(KV[:, :20], SLOTS, k_pe=KV[:, :4], norm_weight=WEIGHT),
            r"'norm_weight' has shape \(16,\); expected \(20,\)",
        ),
        (lambda: CACHE.append(KV, SLOTS, norm_weight=i32(WEIGHT)), "'norm_weight' has dtype int32"),
        (lambda: CACHE.append(KV, SLOTS, norm_weight=WEIGHT, norm_eps=-1.0), "'norm_eps' is -1.0"),
        (lambda: CACHE.append(KV, SLOTS, norm_weight=WEIGHT, norm_eps=WEIGHT), "'norm_eps' is a"),
        (lambda: CACHE.append(KV, SLOTS, norm_weight=WEIGHT, norm_eps=np.inf), "'norm_eps' is inf"),
        (lambda: CACHE.append(KV, SLOTS, rope_cos=COS), "'rope_sin' is missing"),
        (lambda: CACHE.append(KV, SLOTS, rope_sin=COS), "'rope_cos' is missing"),
        (lambda: CACHE.append(KV, SLOTS, rope_cos=COS, rope_sin=COS[:2]), "'rope_sin' has shape"),
        (
            lambda: CACHE.append(KV, SLOTS, rope_cos=COS.astype(np.float16), rope_sin=COS),
            "'rope_cos' has dtype float16; expected float32",
        ),
        (
            lambda: CACHE.append(KV, SLOTS, norm_weight=WEIGHT[:12], **ROPE),
            r"'rope_cos' has shape \(3, 4\); expected \(3, 6\)",
        ),
        (
            lambda: CACHE.append(KV, SLOTS, norm_weight=WEIGHT[:15], **ROPE),
            "'rope_cos' is given, but the RoPE part has 9 columns",
        ),
        (
            lambda: CACHE.append(KV, SLOTS, norm_weight=np.ones(24, np.float32), **ROPE),
            "'rope_cos' is given, but the RoPE part has 0 columns",
        ),
        (
            lambda: CACHE.append(KV, SLOTS, rope_cos=np.zeros((3, 13), np.float32), rope_sin=COS),
            "'rope_cos' has shape .* 26 RoPE columns; expected at most the 24",
        ),
        (lambda: CACHE.append(KV, SLOTS, k_pe=np.zeros((3, 25), np.float32)), "'k_pe' has shape"),
        (lambda: CACHE.append(KV, SLOTS, rope_layout="neox"), "'rope_layout' is 'neox'"),
        (
            lambda: TWO_HEADS.append(np.zeros((3, 2, 24), np.float32), SLOTS, norm_weight=WEIGHT),
            "'norm_weight' is given for a cache of 2 key heads",
        ),
        (
            lambda: TWO_HEADS.append(np.zeros((3, 2, 24), np.float32), SLOTS, **ROPE),
            "'rope_cos' is given for a cache of 2 key heads",
        ),
        (
            lambda: cache_tests.make("fp8_v4", 1, 4).append(
                np.zeros((3, 512), np.float32), SLOTS, norm_weight=WEIGHT
            ),
            r"'norm_weight' has shape \(16,\); expected \(448,\)",
        ),
        (lambda: explain("PagedKVCache.zeros", 3), re.escape("'op' is 'PagedKVCache.zeros'")),
    ],
)
def test_bad_calls(call, text):
    with pytest.raises(ValueError, match=text):
        call()
