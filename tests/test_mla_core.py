"""The functions of MLA: every mode computes what the paper's formulas say."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mla_oracle as oracle
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_flashmla
from jax_flashmla import PagedKVCache, _dispatch, slot_mapping, token_slots
from jax_flashmla.flax import (
    MLAConfig,
    YarnScaling,
    chunked_prefill,
    core,
    decode,
    empty_cache,
    init_params,
    make_schedule,
    param_shapes,
    param_specs,
    params_from_hf,
    prefill,
)

SMALL = MLAConfig(
    hidden_size=64,
    num_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    dtype="float32",
    param_dtype="float32",
)
# An original context this short makes YaRN matter within a test's few tokens.
YARN = YarnScaling(8.0, 24, beta_fast=4.0, beta_slow=0.5, mscale=1.0, mscale_all_dim=0.7)
CONFIGS = {
    "plain": SMALL,
    "query_latent": dataclasses.replace(
        SMALL, q_lora_rank=24, rope_theta=500.0, q_scale=1.5, kv_scale=2.0
    ),
    "half_split": dataclasses.replace(SMALL, rope_layout="half_split", rope_scaling=YARN),
    "yarn": dataclasses.replace(SMALL, q_lora_rank=24, rope_scaling=YARN),
}
TOLERANCE = 3e-6  # float32 throughout
PAGE = 8
TABLE = np.array([[5, 0, 3], [1, 6, -1], [2, 4, 7]], np.int32)  # pages of three requests


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


# What does not depend on how queries are made or rotated.
two_configs = pytest.mark.parametrize("config", ["half_split", "query_latent"], indirect=True)


@functools.cache
def make_params(config, seed=0):
    """Random ones, by numpy (nothing to compile)."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = 1 + 0.3 * values  # 1 would hide that a norm's weight is left out
        else:
            # Not smaller: scores near 0 would hide errors in them.
            values *= 1.7 * np.prod(shape[: 2 if name == "o_proj" else 1]) ** -0.5
        params[name] = values.astype(config.param_dtype)
    return params


def make_sequences(lengths, config, seed=2):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, config.hidden_size)).astype(np.float32) for n in lengths]


@functools.cache
def step_of(function, config, **options):
    """Jitted, with the cache donated."""
    return jax.jit(functools.partial(function, config=config, **options), donate_argnames="cache")


def cu_seqlens_of(lengths):
    return np.cumsum([0, *lengths]).astype(np.int32)


def filled(params, x, config, **options):
    """A cache that holds x as request 0 of TABLE."""
    cache = empty_cache(config, 8, PAGE, **options)
    result = jax.jit(functools.partial(prefill, config=config))(params, x, cu_seqlens_of([len(x)]))
    slots = slot_mapping(TABLE[:1], result.positions[None], PAGE)[0]
    return cache.append(result.kv_c, slots, k_pe=result.k_pe)


# ------------------------------------------------------------------ the modes


def test_prefill(config):
    params = make_params(config)
    sequences = make_sequences((9, 0, 14, 1), config)
    padding = np.full((3, config.hidden_size), np.nan, np.float32)
    x = np.concatenate([*sequences, padding])
    call = jax.jit(functools.partial(prefill, config=config))
    result = call(params, x, cu_seqlens_of([9, 0, 14, 1]))
    expected = np.concatenate([oracle.attention(params, s, config) for s in sequences])
    assert oracle.error(result.out[:24], expected) < TOLERANCE
    assert np.all(np.asarray(result.out[24:]) == 0)
    assert np.isfinite(result.kv_c).all() and np.isfinite(result.k_pe).all()
    positions = [*range(9), *range(14), 0, -1, -1, -1]
    np.testing.assert_array_equal(result.positions, positions)
    np.testing.assert_array_equal(result.request_ids, [0] * 9 + [2] * 14 + [3] + [4] * 3)


def test_decode_step_by_step(config):
    """Three requests of different lengths, one without any token at first and one that ends."""
    params = make_params(config)
    sequences = make_sequences((20, 13, 17), config)
    expected = [oracle.attention(params, s, config) for s in sequences]
    starts, step = (0, 2, 5), step_of(decode, config)
    cache = empty_cache(config, 8, PAGE)
    outs = [[] for _ in sequences]
    for i in range(22):
        positions = np.array(
            [i - a if 0 <= i - a < len(s) else -1 for a, s in zip(starts, sequences, strict=True)],
            np.int32,
        )
        x = np.full((3, 1, config.hidden_size), np.nan, np.float32)
        for r, p in enumerate(positions):
            if p >= 0:
                x[r, 0] = sequences[r][p]
        out, cache = step(params, x, positions[:, None], cache=cache, block_table=TABLE)
        for r, p in enumerate(positions):
            if p >= 0:
                outs[r].append(out[r, 0])
            else:
                assert np.all(np.asarray(out[r]) == 0)
    for out, full in zip(outs, expected, strict=True):
        assert oracle.error(out, full) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_writes_the_tokens_of_prefill(config, dtype):
    """They are normalised and rotated on the way into the cache, or before."""
    config = dataclasses.replace(config, dtype=dtype)
    params, (x,) = make_params(config), make_sequences((11,), config)
    positions = np.arange(11, dtype=np.int32)
    result = jax.jit(functools.partial(prefill, config=config))(params, x, cu_seqlens_of([11]))
    slots = slot_mapping(TABLE[:1], positions[None], PAGE)[0]
    _, cache = step_of(decode, config)(
        *(params, x[None], positions[None]),
        cache=empty_cache(config, 8, PAGE),
        block_table=TABLE[:1],
    )
    written = np.asarray(cache.gather(slots)[:, 0], np.float32)
    expected = np.concatenate([result.kv_c, result.k_pe], axis=-1).astype(np.float32)
    # Where XLA adds up in another order, a last bit is another; few are left once rounded.
    rtol = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(written, expected, rtol=rtol, atol=1e-6)
    if dtype == "bfloat16":
        assert np.mean(written != expected) < 0.02


def test_decode_leaves_the_norm_and_the_rotation_to_the_kernel(monkeypatch):
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [])  # lower for another machine
    # Of norms in the program there is that of the queries' latent, and of tokens with a factor.
    for name, norms in (("plain", 0), ("half_split", 0), ("yarn", 1), ("query_latent", 2)):
        config = CONFIGS[name]
        step = jax.jit(functools.partial(decode, config=config))
        arguments = (np.ones((3, 1, 64), np.float32), np.zeros((3, 1), np.int32))
        cache = empty_cache(config, 8, PAGE)
        traced = step.trace(make_params(config), *arguments, cache, TABLE)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        [call] = [line for line in text.splitlines() if "@flashmla_cache_append(" in line]
        assert text.count("stablehlo.rsqrt") == norms, name
        layout = "true" if config.rope_layout == "interleaved" else "false"
        assert name == "query_latent" or f"rope_interleaved = {layout}" in call
        # Empty arrays for what is absent: k_pe beside whole tokens; or a norm, cosines and sines.
        assert call.count("tensor<0xf32>") == (3 if name == "query_latent" else 1)


@two_configs
def test_several_tokens_a_step(config):
    """Padding comes first in the rows of requests with fewer tokens."""
    params = make_params(config)
    sequences = make_sequences((20, 13, 17), config)
    step, cache = step_of(decode, config), empty_cache(config, 8, PAGE)
    done, outs = [0, 0, 0], [[], [], []]
    for counts in ((4, 1, 3), (4, 4, 0), (4, 4, 4), (2, 3, 4), (4, 1, 4), (2, 0, 2)):
        x = np.full((3, 4, config.hidden_size), np.nan, np.float32)
        positions = np.full((3, 4), -1, np.int32)
        for r, n in enumerate(counts):
            x[r, 4 - n :] = sequences[r][done[r] : done[r] + n]
            positions[r, 4 - n :] = np.arange(done[r], done[r] + n)
            done[r] += n
        out, cache = step(params, x, positions, cache=cache, block_table=TABLE)
        for r, n in enumerate(counts):
            outs[r].extend(np.asarray(out[r, 4 - n :]))
            assert np.all(np.asarray(out[r, : 4 - n]) == 0)
    assert done == [20, 13, 17]
    for out, sequence in zip(outs, sequences, strict=True):
        assert oracle.error(out, oracle.attention(params, sequence, config)) < TOLERANCE


@two_configs
def test_prefill_in_chunks(config):
    params = make_params(config)
    sequences = make_sequences((20, 13, 17), config)
    step = step_of(chunked_prefill, config, max_seqlen=9)
    cache = empty_cache(config, 8, PAGE)
    done, outs = np.zeros(3, np.int32), [[], [], []]
    for counts in ((9, 4, 0), (3, 9, 1), (8, 0, 7), (0, 0, 9)):
        parts = [s[d : d + n] for s, d, n in zip(sequences, done, counts, strict=True)]
        x = np.full((21, config.hidden_size), np.nan, np.float32)
        x[: sum(counts)] = np.concatenate(parts)
        limits = cu_seqlens_of(counts)
        out, cache = step(params, x, limits, done.copy(), cache=cache, block_table=TABLE)
        for r in range(3):
            outs[r].extend(np.asarray(out[limits[r] : limits[r + 1]]))
        assert np.all(np.asarray(out[limits[-1] :]) == 0)
        done += np.array(counts, np.int32)
    assert list(done) == [20, 13, 17]
    for out, sequence in zip(outs, sequences, strict=True):
        assert oracle.error(out, oracle.attention(params, sequence, config)) < TOLERANCE


def test_prefill_then_decode():
    """As the guide does it: the latents of prefill go to the cache, then tokens follow."""
    config = CONFIGS["yarn"]
    params = make_params(config)
    (x,) = make_sequences((20,), config)
    result = jax.jit(functools.partial(prefill, config=config))(params, x[:19], cu_seqlens_of([19]))
    slots = slot_mapping(TABLE[:1], result.positions, PAGE, request_ids=result.request_ids)
    cache = empty_cache(config, 8, PAGE).append(result.kv_c, slots, k_pe=result.k_pe)
    position = np.array([[19]], np.int32)
    out, _ = step_of(decode, config)(
        params, x[None, 19:], position, cache=cache, block_table=TABLE[:1]
    )
    assert oracle.error(out[0], oracle.attention(params, x, config)[19:]) < TOLERANCE


def test_a_chunk_longer_than_promised_is_nan():
    """Past max_seqlen a token has not attended to its context: no plausible numbers."""
    params = make_params(SMALL)
    (x,) = make_sequences((6,), SMALL)
    cache, none = empty_cache(SMALL, 8, PAGE), np.zeros(3, np.int32)
    step = step_of(chunked_prefill, SMALL, max_seqlen=4)
    out, _ = step(params, x, cu_seqlens_of([6, 0, 0]), none, cache=cache, block_table=TABLE)
    assert oracle.error(out[:4], oracle.attention(params, x, SMALL)[:4]) < TOLERANCE
    assert np.isnan(np.asarray(out[4:])).all()


def test_positions_may_be_given_to_prefill():
    params = make_params(SMALL)
    (x,) = make_sequences((7,), SMALL)
    positions = np.array([3, 4, 9, 10, 11, 40, 2], np.int32)
    call = jax.jit(functools.partial(prefill, config=SMALL))
    out = call(params, x, cu_seqlens_of([7]), positions=positions).out
    expected = oracle.attention(params, x, SMALL, positions=positions)
    assert oracle.error(out, expected) < TOLERANCE


# ------------------------------------------------------------------ sparse, FP8, bfloat16


def test_sparse_decode():
    config = CONFIGS["yarn"]
    params = make_params(config)
    (x,) = make_sequences((20,), config)
    cache = filled(params, x[:18], config)
    chosen = np.array([[[18, 2, 5, 11, -1], [19, 0, 17, 18, 3]]], np.int32)
    visible = np.tril(np.ones((20, 20), bool))
    visible[18:] = False
    visible[18, [18, 2, 5, 11]] = visible[19, [19, 0, 17, 18]] = True  # topk_length drops the 3
    positions = np.array([[18, 19]], np.int32)
    out, _ = step_of(decode, config)(
        params,
        x[None, 18:],
        positions,
        cache=cache,
        block_table=TABLE[:1],
        indices=token_slots(chosen, TABLE[:1], PAGE, num_pages=8),
        topk_length=np.array([4], np.int32),
        schedule=make_schedule(config, positions, topk=5),
    )
    expected = oracle.attention(params, x, config, visible=visible)[18:]
    assert oracle.error(out[0], expected) < TOLERANCE


WIDE = dataclasses.replace(
    CONFIGS["yarn"], kv_lora_rank=512, qk_rope_head_dim=64, rope_theta=10000.0
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_cache(dtype):
    config = dataclasses.replace(WIDE, dtype=dtype)
    params = make_params(config)
    (x,) = make_sequences((20,), config)
    cache = filled(params, x[:18], config, format="fp8_v32")
    positions = np.array([[18, 19]], np.int32)
    step = step_of(decode, config)
    out, cache = step(params, x[None, 18:], positions, cache=cache, block_table=TABLE[:1])
    expected = oracle.attention(params, x, config)[18:]
    assert oracle.error(out[0], expected) < 0.06  # e4m3: up to 1 / 16 for each number
    if dtype == "bfloat16":
        # The same numbers in a cache that is not quantised.
        plain = PagedKVCache.from_dense(cache.to_dense())
        again, _ = step(params, x[None, 18:], positions, cache=plain, block_table=TABLE[:1])
        assert oracle.error(again, out) < 0.03  # the two new tokens are written again
        return
    chosen = np.broadcast_to(np.arange(20, dtype=np.int32), (1, 1, 20))
    again, _ = step(
        params,
        x[None, 19:],
        positions[:, 1:],
        cache=cache,
        block_table=TABLE[:1],
        indices=token_slots(chosen, TABLE[:1], PAGE, num_pages=8),
    )
    assert oracle.error(again[0], out[0, 1:]) < TOLERANCE


def test_bfloat16():
    config = dataclasses.replace(WIDE, dtype="bfloat16", param_dtype="bfloat16")
    params = make_params(config)
    (x,) = make_sequences((20,), config)
    expected = oracle.attention(params, x, config)
    result = jax.jit(functools.partial(prefill, config=config))(params, x, cu_seqlens_of([20]))
    assert result.out.dtype == jnp.bfloat16
    assert oracle.error(result.out, expected) < 0.02
    slots = slot_mapping(TABLE[:1], result.positions[None], PAGE)[0]
    cache = empty_cache(config, 8, PAGE).append(result.kv_c, slots, k_pe=result.k_pe)
    positions = np.array([[18, 19]], np.int32)
    out, _ = step_of(decode, config)(
        params, x[None, 18:], positions, cache=cache, block_table=TABLE[:1]
    )
    assert out.dtype == jnp.bfloat16
    assert oracle.error(out[0], expected[18:]) < 0.02


# ------------------------------------------------------------------ gradients, jit, devices


def test_gradient_of_prefill():
    """Along a random direction, against differences of the float64 formulas."""
    config = CONFIGS["yarn"]
    params = make_params(config)
    sequences = make_sequences((6, 5), config)
    x = np.concatenate([*sequences, np.full((2, 64), np.nan, np.float32)])
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((13, 64))

    def loss(params, x):
        out = prefill(params, x, cu_seqlens_of([6, 5]), config=config).out
        return jnp.sum(out * weight.astype(np.float32))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert np.all(np.asarray(gradients[1][11:]) == 0)

    def exact(params, x):
        parts = [oracle.attention(params, x[a:b], config) for a, b in ((0, 6), (6, 11))]
        return np.sum(np.concatenate(parts) * weight[:11])

    wide = {name: np.asarray(value, np.float64) for name, value in params.items()}
    for name in (*params, "x"):
        value, gradient = (
            (x[:11], gradients[1][:11]) if name == "x" else (wide[name], gradients[0][name])
        )
        direction = rng.standard_normal(value.shape)
        ends = []
        for sign in (1e-5, -1e-5):
            moved = value + sign * direction
            ends.append(exact(wide, moved) if name == "x" else exact(wide | {name: moved}, x[:11]))
        expected = (ends[0] - ends[1]) / 2e-5
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.sum(np.asarray(gradient, np.float64) * direction) - expected) < 1e-5 * scale


def test_decode_has_no_derivative():
    params = make_params(SMALL)
    cache, position = empty_cache(SMALL, 8, PAGE), np.zeros((1, 1), np.int32)

    def loss(x):
        return decode(params, x, position, cache, TABLE[:1], config=SMALL)[0].sum()

    with pytest.raises(NotImplementedError):
        jax.grad(loss)(jnp.ones((1, 1, 64)))


@pytest.mark.parametrize("mode", ["decode", "chunked_prefill"])
def test_a_donated_cache_is_updated_in_place(mode):
    params = make_params(SMALL)
    cache = empty_cache(SMALL, 8, PAGE)
    where = cache.data.unsafe_buffer_pointer()
    if mode == "decode":
        x, positions = np.ones((3, 1, 64), np.float32), np.zeros((3, 1), np.int32)
        step, arguments = step_of(decode, SMALL), (params, x, positions)
    else:
        x, limits = np.ones((6, 64), np.float32), cu_seqlens_of([2, 3, 1])
        step = step_of(chunked_prefill, SMALL)
        arguments = (params, x, limits, np.zeros(3, np.int32))
    compiled = step.lower(*arguments, cache=cache, block_table=TABLE).compile().as_text()
    shape = ",".join(map(str, cache.data.shape))
    assert not [
        line for line in compiled.splitlines() if f"f32[{shape}]" in line and " copy(" in line
    ]
    _, after = step(*arguments, cache=cache, block_table=TABLE)
    assert cache.data.is_deleted()
    assert after.data.unsafe_buffer_pointer() == where


def test_layers_share_a_cache():
    """In a scan with a page offset each; what the table holds past a request is nobody's page."""
    config = CONFIGS["query_latent"]
    layers = [make_params(config, seed) for seed in (0, 10)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    (x,) = make_sequences((11,), config)
    limits, none = cu_seqlens_of([9, 0, 0]), np.zeros(3, np.int32)

    @functools.partial(jax.jit, donate_argnames="cache")
    def run(cache, stacked):
        first_pages = 8 * jnp.arange(2, dtype=jnp.int32)
        pages = {"num_pages": 8, "config": config}

        def start(cache, inputs):
            params, first = inputs
            _, cache = chunked_prefill(
                params, x[:9], limits, none, cache, TABLE, first_page=first, **pages
            )
            return cache, None

        def one(cache, inputs):
            params, first, positions, tokens = inputs
            # Negative first: positions of the other two requests.
            out, cache = decode(
                params,
                tokens,
                positions,
                cache,
                TABLE,
                first_page=first,
                schedule=make_schedule(config, positions),
                **pages,
            )
            return cache, out[0]

        cache, _ = jax.lax.scan(start, cache, (stacked, first_pages))
        tokens = jnp.broadcast_to(x[None, None, 9:], (2, 3, 2, 64))
        positions = jnp.broadcast_to(jnp.array([[9, 10], [-1, -1], [-1, -1]]), (2, 3, 2))
        inputs = (stacked, first_pages, positions.astype(jnp.int32), tokens)
        return jax.lax.scan(one, cache, inputs)

    _, outs = run(empty_cache(config, 8, PAGE, num_layers=2), stacked)
    for out, params in zip(outs, layers, strict=True):
        assert oracle.error(out, oracle.attention(params, x, config)[9:]) < TOLERANCE


def test_sparse_indices_are_moved_to_the_layer():
    params = make_params(SMALL)
    (x,) = make_sequences((1,), SMALL)
    cache = empty_cache(SMALL, 8, PAGE, num_layers=2)
    indices = np.array([[[TABLE[0, 0] * PAGE, 8 * PAGE]]], np.int32)  # the second: no slot
    out, _ = step_of(decode, SMALL, num_pages=8)(
        params,
        x[None],
        np.zeros((1, 1), np.int32),
        cache=cache,
        block_table=TABLE[:1],
        indices=indices,
        first_page=jnp.int32(8),
    )
    assert oracle.error(out[0], oracle.attention(params, x, SMALL)) < TOLERANCE


def test_heads_over_devices():
    """In shard_map each device has some heads; under plain jit their shardings are enough."""
    config = CONFIGS["yarn"]
    params = make_params(config)
    (x,) = make_sequences((12,), config)
    mesh = jax.make_mesh(
        (4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4]
    )
    cache = filled(params, x[:10], config)
    local = dataclasses.replace(config, num_heads=1)
    positions, expected = np.array([[10, 11]], np.int32), oracle.attention(params, x, config)

    def step(params, x, cache):
        out, _ = decode(params, x, positions, cache, TABLE[:1], config=local)
        return jax.lax.psum(out, "model")

    specs = param_specs(config, "model")
    by_map = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(specs, P(), P()), out_specs=P(), check_vma=False)
    )(params, x[None, 10:], cache)
    assert oracle.error(by_map[0], expected[10:]) < TOLERANCE

    placed = {
        name: jax.device_put(value, jax.sharding.NamedSharding(mesh, specs[name]))
        for name, value in params.items()
    }
    everywhere = jax.device_put((x, cache), jax.sharding.NamedSharding(mesh, P()))

    @jax.jit
    def both(params, x, cache):
        whole = prefill(params, x, cu_seqlens_of([12]), config=config).out
        out, _ = decode(params, x[None, 10:], positions, cache, TABLE[:1], config=config)
        return whole, out

    whole, out = both(placed, *everywhere)
    assert oracle.error(whole, expected) < TOLERANCE
    assert oracle.error(out[0], expected[10:]) < TOLERANCE


def test_nothing_to_do():
    params, none = make_params(SMALL), np.zeros(0, np.int32)
    limits, cache = np.zeros(1, np.int32), empty_cache(SMALL, 8, PAGE)

    def shapes(function, *arguments):
        return jax.tree.map(
            jnp.shape, jax.eval_shape(functools.partial(function, config=SMALL), *arguments)
        )

    empty = np.ones((0, 64), np.float32)
    assert shapes(prefill, params, empty, limits).out == (0, 64)
    for b, s in ((0, 1), (1, 0)):
        x, positions = np.ones((b, s, 64), np.float32), np.zeros((b, s), np.int32)
        assert shapes(decode, params, x, positions, cache, TABLE[:b])[0] == (b, s, 64)
    table, context = TABLE[:1], np.zeros(1, np.int32)
    two_limits = np.zeros(2, np.int32)
    out, _ = shapes(chunked_prefill, params, empty, two_limits, context, cache, table)
    assert out == (0, 64)
    step = step_of(chunked_prefill, SMALL)
    padding = np.full((3, 64), np.nan, np.float32)
    out, _ = step(params, padding, limits, none, cache=cache, block_table=TABLE[:0])
    assert np.all(np.asarray(out) == 0)


# ------------------------------------------------------------------ parameters


def test_parameters():
    config = CONFIGS["query_latent"]
    half = dataclasses.replace(config, param_dtype="bfloat16")
    params = jax.jit(functools.partial(init_params, config=half))(jax.random.key(0))
    assert {name: value.shape for name, value in params.items()} == param_shapes(config)
    assert all(value.dtype == jnp.bfloat16 for value in params.values())
    assert np.all(np.asarray(params["kv_a_norm"]) == 1)
    assert "q_proj" in param_shapes(SMALL) and "q_a_proj" not in param_shapes(SMALL)
    assert np.std(np.asarray(params["o_proj"], np.float32)) == pytest.approx(48**-0.5, rel=0.1)
    assert param_specs(config, "m")["o_proj"] == P("m", None, None)
    assert param_specs(config, "m")["kv_a_proj"] == P(None, None)


@pytest.mark.parametrize("name", ["plain", "query_latent"])
def test_parameters_from_a_checkpoint(name):
    config = CONFIGS[name]
    params = make_params(config)
    flat = {key: np.asarray(value) for key, value in params.items()}
    weights = {
        "kv_a_proj_with_mqa": flat["kv_a_proj"].T,
        "kv_a_layernorm": flat["kv_a_norm"],
        "kv_b_proj": np.concatenate([flat["k_b_proj"], flat["v_b_proj"]], axis=-1)
        .reshape(32, -1)
        .T,
        "o_proj": flat["o_proj"].reshape(-1, 64).T,
    }
    if config.q_lora_rank is None:
        weights["q_proj"] = flat["q_proj"].reshape(64, -1).T
    else:
        weights["q_a_proj"] = flat["q_a_proj"].T
        weights["q_a_layernorm"] = flat["q_a_norm"]
        weights["q_b_proj"] = flat["q_b_proj"].reshape(24, -1).T
    prefix = "model.layers.0.self_attn."
    weights = {f"{prefix}{key}.weight": value for key, value in weights.items()}
    read = params_from_hf(weights, config, prefix=prefix)
    assert set(read) == set(params)
    for key, value in params.items():
        np.testing.assert_array_equal(read[key], value)

    full = f"{prefix}o_proj.weight"
    with pytest.raises(ValueError, match=f"'{full}' has shape .*expected \\(64, 48\\)"):
        params_from_hf(weights | {full: weights[full].T}, config, prefix=prefix)
    with pytest.raises(ValueError, match="'o_proj.weight' is missing"):
        params_from_hf({k.removeprefix(prefix): weights[k] for k in weights if k != full}, config)


# ------------------------------------------------------------------ errors


def call_decode(**changes):
    arguments = {
        "params": make_params(SMALL),
        "x": np.ones((3, 1, 64), np.float32),
        "positions": np.zeros((3, 1), np.int32),
        "cache": empty_cache(SMALL, 8, PAGE),
        "block_table": TABLE,
        "config": SMALL,
    }
    return decode(**(arguments | changes))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"config": None}, "'config' is a NoneType"),
        ({"params": {}}, "'params' has"),
        ({"params": make_params(CONFIGS["yarn"])}, "'params' has"),
        ({"params": make_params(SMALL) | {"o_proj": np.ones((4, 12, 65))}}, "'o_proj'.*12, 64"),
        ({"x": np.ones((3, 64), np.float32)}, "'x' has shape"),
        ({"x": np.ones((3, 1, 65), np.float32)}, "'x' has shape"),
        ({"x": np.ones((3, 1, 64), np.int32)}, "'x' has dtype"),
        ({"positions": np.zeros((3, 2), np.int32)}, "'positions' has shape"),
        ({"positions": np.zeros((3, 1))}, "'positions' has dtype"),
        ({"block_table": TABLE[:2]}, "'block_table' has shape"),
        ({"cache": np.zeros((8, PAGE, 1, 40))}, "'cache' is a ndarray"),
        ({"cache": PagedKVCache.zeros(8, PAGE, dtype="float32")}, "'cache' has 1 key heads of 576"),
        ({"cache": PagedKVCache.zeros(8, PAGE, head_dim=40)}, "in bfloat16; expected"),
        ({"cache": PagedKVCache.zeros(8, PAGE, format="fp8_v32")}, "512 \\+ 64 columns"),
        ({"cache": PagedKVCache.zeros(8, PAGE, format="fp8_v4")}, "'fp8_v4'"),
        ({"first_page": 8}, "'num_pages' is missing"),
        ({"topk_length": np.zeros(3, np.int32)}, "'topk_length' is given without 'indices'"),
        ({"indices": np.zeros((3, 2, 4), np.int32)}, "'indices' has shape"),
    ],
)
def test_bad_calls_of_decode(changes, text):
    with pytest.raises(ValueError, match=f"(?s)decode: .*{text}"):
        call_decode(**changes)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"cu_seqlens": np.zeros(0, np.int32)}, "'cu_seqlens' has shape \\(0,\\)"),
        ({"cu_seqlens": np.zeros(4)}, "'cu_seqlens' has dtype"),
        ({"context_lens": np.zeros(2, np.int32)}, "'context_lens' has shape"),
        ({"block_table": TABLE[:2]}, "'block_table' has shape"),
        ({"max_seqlen": 0}, "'max_seqlen' is 0"),
        ({"x": np.ones((1, 6, 64), np.float32)}, "'x' has shape"),
        ({"cache": PagedKVCache.zeros(8, PAGE, dtype="float32")}, "'cache' has"),
    ],
)
def test_bad_calls_of_chunked_prefill(changes, text):
    arguments = {
        "params": make_params(SMALL),
        "x": np.ones((6, 64), np.float32),
        "cu_seqlens": cu_seqlens_of([2, 3, 1]),
        "context_lens": np.zeros(3, np.int32),
        "cache": empty_cache(SMALL, 8, PAGE),
        "block_table": TABLE,
        "config": SMALL,
    }
    with pytest.raises(ValueError, match=f"chunked_prefill: .*{text}"):
        chunked_prefill(**(arguments | changes))


def test_bad_calls_of_the_rest():
    with pytest.raises(ValueError, match="prefill: argument 'positions' has shape"):
        prefill(
            make_params(SMALL),
            np.ones((6, 64), np.float32),
            cu_seqlens_of([6]),
            config=SMALL,
            positions=np.zeros(5, np.int32),
        )
    with pytest.raises(ValueError, match="empty_cache: argument 'format' is 'fp8_v4'"):
        empty_cache(SMALL, 8, format="fp8_v4")
    with pytest.raises(ValueError, match="empty_cache: .*512 \\+ 64"):
        empty_cache(SMALL, 8, format="fp8_v32")
    with pytest.raises(ValueError, match="make_schedule: argument 'positions'"):
        make_schedule(SMALL, np.zeros(3, np.int32))


def test_flax_is_needed_by_the_layers_only():
    code = """
import sys
sys.modules["flax"] = None  # what an import of a missing package looks like
from jax_flashmla.flax import MLAConfig, decode
for name in ("nnx", "linen"):
    try:
        __import__(f"jax_flashmla.flax.{name}")
    except ImportError as error:
        assert f"jax_flashmla.flax.{name} needs Flax" in str(error), error
        assert "pip install 'jax_flashmla[flax]'" in str(error)
    else:
        raise AssertionError(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(jax_flashmla.__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_frequencies_of_a_real_model():
    """DeepSeek V3: fast pairs keep their frequency, slow ones are 40 times slower."""
    config = MLAConfig.preset("deepseek-v3")
    frequencies = core.rope_frequencies(config)
    plain = core.rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    np.testing.assert_allclose(frequencies[:10], plain[:10], rtol=1e-6)
    np.testing.assert_allclose(frequencies[24:], plain[24:] / 40, rtol=1e-6)
    assert core.rope_length(config) == 1.0
    expected = oracle.angles_of(config, [1])[0]
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
