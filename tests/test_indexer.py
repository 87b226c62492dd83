"""The lightning indexer chooses what the formulas say, and attention to its choice is right."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import mla_oracle
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_flashmla import PagedKVCache, flash_mla_sparse_fwd, slot_mapping, token_slots
from jax_flashmla import flax as mla
from jax_flashmla.flax import IndexerConfig, MLAConfig, YarnScaling, core, indexer

ATTENTION = MLAConfig(
    hidden_size=32,
    num_heads=2,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    rope_scaling=YarnScaling(8.0, 24, beta_fast=4.0, beta_slow=0.5, mscale=1.0, mscale_all_dim=0.7),
    dtype="float32",
    param_dtype="float32",
)
SMALL = IndexerConfig.from_mla(ATTENTION, index_n_heads=4, index_head_dim=16, index_topk=6)
RELEASED = dataclasses.replace(SMALL, index_head_dim=128, hadamard=True, fp8=True)
CONFIGS = {
    "half_split": SMALL,
    "interleaved": dataclasses.replace(SMALL, rope_layout="interleaved", rope_scaling=None),
    "released": RELEASED,
    "hadamard": dataclasses.replace(SMALL, hadamard=True),
}
PAGE = 8
TABLE = np.array([[5, 0, 3], [1, 6, 2147480000], [2, 4, 7]], np.int32)  # pages of three requests
LENGTHS = (20, 13, 17)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


# ------------------------------------------------------------------ float64 numpy


def fp8(x):
    """e4m3 with a scale for 128 columns: the smallest power of two that brings amax to 448."""
    tiles = np.asarray(x, np.float32).reshape(*x.shape[:-1], x.shape[-1] // 128, 128)
    amax = np.maximum(np.abs(tiles).max(axis=-1, keepdims=True).astype(np.float64), 1e-4)
    scale = 2.0 ** np.ceil(np.log2(amax / 448))
    codes = np.clip(tiles / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return (codes.astype(np.float64) * scale).reshape(x.shape)


def hadamard(d):
    """Entry (i, j) is -1 to the number of bits that i and j have in common."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(d)] for i in range(d)]
    return np.array(signs, np.float64) / np.sqrt(d)


def finish(config, x, angles):
    rope = config.qk_rope_head_dim
    x = np.concatenate([mla_oracle.rotate(config, x[..., :rope], angles), x[..., rope:]], axis=-1)
    if config.hadamard:
        x = x @ hadamard(config.index_head_dim)
    return fp8(x) if config.fp8 else x


def scores_of(params, x, latent, config, positions=None):
    """Scores [n, n] of one sequence, one head after the other; -inf above the diagonal."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    n = len(x)
    angles = mla_oracle.angles_of(config, np.arange(n) if positions is None else positions)
    x, latent = np.asarray(x, np.float64), np.asarray(latent, np.float64)
    k = x @ p["wk"]
    k = (k - k.mean(1, keepdims=True)) / np.sqrt(k.var(1, keepdims=True) + config.layer_norm_eps)
    k = finish(config, k * p["k_norm"] + p["k_norm_bias"], angles)
    scores = np.zeros((n, n))
    for h in range(config.index_n_heads):
        q = finish(config, latent @ p["wq_b"][:, h], angles)
        weight = (x @ p["weights_proj"])[:, h : h + 1] / np.sqrt(config.index_n_heads)
        scores += weight * np.maximum(q @ k.T / np.sqrt(config.index_head_dim), 0)
    return np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)


def check_choice(indices, scores, topk):
    """``indices`` [n, topk] are the best columns of ``scores`` [n, n], best first, then -1."""
    for i, (chosen, row) in enumerate(zip(np.asarray(indices), scores, strict=True)):
        count = min(topk, int(np.sum(row > -np.inf)))
        assert np.all(chosen[count:] == -1), i
        chosen = chosen[:count]
        assert np.all(chosen >= 0) and len(set(chosen)) == count, i
        # The same numbers as the best ones: nearly equal scores may change places.
        found, best = row[chosen], np.sort(row)[::-1][:count]
        np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ inputs


def random_of(shapes, seed):
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = ("bias" not in name) + 0.3 * values
        else:
            values *= 1.7 * np.prod(shape[: 2 if name == "o_proj" else 1]) ** -0.5
        params[name] = values.astype(np.float32)
    return params


@functools.cache
def make_params(config):
    return random_of(indexer.param_shapes(config), 0)


@functools.cache
def attention_params():
    return random_of(mla.param_shapes(ATTENTION), 1)


def make_sequences(lengths=LENGTHS, seed=2):
    """Pairs of x [n, hidden] and q_latent [n, q_lora_rank]."""
    rng = np.random.default_rng(seed)
    return [
        tuple(rng.standard_normal((n, width)).astype(np.float32) for width in (32, 24))
        for n in lengths
    ]


def packed(sequences, padding):
    """x, q_latent and cu_seqlens, with rows of NaN at the end."""
    x, latent = (
        np.concatenate([*parts, np.full((padding, parts[0].shape[1]), np.nan, np.float32)])
        for parts in zip(*sequences, strict=True)
    )
    limits = np.cumsum([0, *(len(x) for x, _ in sequences)]).astype(np.int32)
    return x, latent, limits


def prefill_of(config):
    return jax.jit(functools.partial(indexer.prefill, config=config))


def step_of(config, **options):
    """Jitted anew, since some tests change what is traced; with the cache donated."""
    return jax.jit(
        functools.partial(indexer.decode, config=config, **options), donate_argnames="cache"
    )


def poisoned(config, pages=8):
    """A cache whose unused slots hold NaN."""
    cache = indexer.empty_cache(config, pages, PAGE)
    return dataclasses.replace(cache, data=jnp.full_like(cache.data, jnp.nan))


def steps(sequences, counts):
    """x, q_latent, positions of steps with so many new tokens of each request; padding first."""
    done = [0] * len(sequences)
    for step in counts:
        s = max(step)
        x = np.full((len(step), s, 32), np.nan, np.float32)
        latent = np.full((len(step), s, 24), np.nan, np.float32)
        positions = np.full((len(step), s), -1, np.int32)
        for r, n in enumerate(step):
            new = slice(done[r], done[r] + n)
            x[r, s - n :], latent[r, s - n :] = sequences[r][0][new], sequences[r][1][new]
            positions[r, s - n :] = np.arange(done[r], done[r] + n)
            done[r] += n
        yield x, latent, positions


# ------------------------------------------------------------------ choices


def test_prefill(config):
    params = make_params(config)
    sequences = make_sequences((9, 0, 14, 1))
    x, latent, limits = packed(sequences, 3)
    result = prefill_of(config)(params, x, latent, limits)
    for (x, latent), start in zip(sequences, limits, strict=False):
        indices = result.indices[start : start + len(x)]
        check_choice(indices, scores_of(params, x, latent, config), config.index_topk)
        rows = np.where(np.asarray(indices) >= 0, indices + start, -1)
        np.testing.assert_array_equal(result.rows[start : start + len(x)], rows)
    assert np.all(np.asarray(result.indices[24:]) == -1)
    assert np.all(np.asarray(result.rows[24:]) == -1)
    assert np.isfinite(result.keys).all()
    np.testing.assert_array_equal(result.positions, [*range(9), *range(14), 0, -1, -1, -1])
    np.testing.assert_array_equal(result.request_ids, [0] * 9 + [2] * 14 + [3] + [4] * 3)


def check_decode(config, step, counts):
    params, sequences = make_params(config), make_sequences()
    scores = [scores_of(params, x, latent, config) for x, latent in sequences]
    cache = poisoned(config)
    for x, latent, positions in steps(sequences, counts):
        indices, cache = step(params, x, latent, positions, cache=cache, block_table=TABLE)
        assert indices.shape == (*positions.shape, config.index_topk)
        for r, row in enumerate(positions):
            present = row >= 0
            check_choice(indices[r][present], scores[r][row[present]], config.index_topk)
            assert np.all(np.asarray(indices[r][~present]) == -1)
    return cache


COUNTS = ((4, 1, 3), (1, 0, 1), (1, 1, 1), (4, 4, 0), (4, 4, 4), (2, 3, 4), (4, 0, 4))


def test_decode(config):
    """Several tokens and single ones, requests that wait, and NaN in all that is not theirs."""
    cache = check_decode(config, step_of(config), COUNTS)
    written = np.isfinite(np.asarray(cache.data[..., 0, 0])).reshape(-1)
    assert written.sum() == sum(LENGTHS)


@pytest.mark.parametrize("scores, heads", [(1, 1), (80, 1000), (1 << 24, 2000)])
def test_blocks(monkeypatch, scores, heads):
    """Queries and keys are divided where they are many; the choice does not depend on it."""
    monkeypatch.setattr(indexer, "_SCORES", scores)
    monkeypatch.setattr(indexer, "_HEAD_SCORES", heads)
    monkeypatch.setattr(indexer, "_FINEST_BLOCK", 5)
    check_decode(SMALL, step_of(SMALL), COUNTS[:2] + COUNTS[3:])
    params, sequences = make_params(SMALL), make_sequences((9, 14))
    x, latent, limits = packed(sequences, 3)
    result = prefill_of(SMALL)(params, x, latent, limits)
    for (x, latent), start in zip(sequences, limits, strict=False):
        scores = scores_of(params, x, latent, SMALL)
        check_choice(result.indices[start : start + len(x)], scores, SMALL.index_topk)


def test_prefill_then_decode():
    """The keys of prefill go to the cache by the same slots as the attention's latents."""
    params, ((x, latent),) = make_params(RELEASED), make_sequences((20,))
    result = prefill_of(RELEASED)(params, x[:19], latent[:19], np.array([0, 19], np.int32))
    slots = slot_mapping(TABLE[:1], result.positions, PAGE, request_ids=result.request_ids)
    cache = poisoned(RELEASED).append(result.keys, slots)
    indices, _ = step_of(RELEASED)(
        params,
        x[None, 19:],
        latent[None, 19:],
        np.array([[19]], np.int32),
        cache=cache,
        block_table=TABLE[:1],
    )
    check_choice(indices[0], scores_of(params, x, latent, RELEASED)[19:], 6)


def test_more_topk_than_room():
    config = dataclasses.replace(SMALL, index_topk=40)
    check_decode(config, step_of(config), COUNTS[:2])
    params, ((x, latent),) = make_params(config), make_sequences((9,))
    result = prefill_of(config)(params, x, latent, np.array([0, 9], np.int32))
    check_choice(result.indices, scores_of(params, x, latent, config), 40)


def test_equal_scores_are_chosen_in_order():
    zero = {name: np.zeros(16, np.float32) for name in ("k_norm", "k_norm_bias")}
    ((x, latent),) = make_sequences((9,))
    limits = np.array([0, 9], np.int32)
    result = prefill_of(SMALL)(make_params(SMALL) | zero, x, latent, limits)
    for i, row in enumerate(np.asarray(result.indices)):
        assert list(row) == [j if j <= i else -1 for j in range(6)]


def test_values_that_are_wrong():
    """A page that is none is never chosen; a NaN stays in its request and gives valid positions."""
    params, sequences = make_params(SMALL), make_sequences()
    table = TABLE.copy()
    table[0, 1] = 8
    ((x, latent, positions),) = steps(sequences, [(10, 10, 10)])
    x[1, 3] = np.nan
    indices, _ = step_of(SMALL)(
        params, x, latent, positions, cache=poisoned(SMALL), block_table=table
    )
    indices = np.asarray(indices)
    assert indices[0, 9].max() < 8 and np.all(np.sort(indices[0, 9]) >= 0)
    assert np.all(indices[1, :3] <= np.arange(3)[:, None])
    assert np.all(indices[1, 3:, 0] >= 0) and np.all(indices[1] <= np.arange(10)[:, None])
    assert indices[1, 9, 0] == 3
    x, latent = sequences[2]
    check_choice(indices[2], scores_of(params, x[:10], latent[:10], SMALL), 6)


def test_layers_share_a_cache():
    params, sequences = make_params(SMALL), make_sequences()
    scores = [scores_of(params, x, latent, SMALL) for x, latent in sequences]
    cache = poisoned(SMALL, 16)
    step = step_of(SMALL, num_pages=8)
    for x, latent, positions in steps(sequences, [(7, 5, 6), (2, 2, 2)]):
        for layer in (1, 0):
            indices, cache = step(
                params,
                x if layer else 3 * x,
                latent,
                positions,
                cache=cache,
                block_table=TABLE,
                first_page=jnp.int32(8 * layer),
            )
            if layer:
                for r, row in enumerate(positions):
                    present = row >= 0
                    check_choice(indices[r][present], scores[r][row[present]], 6)


def test_a_donated_cache_is_updated_in_place():
    cache = indexer.empty_cache(SMALL, 8, PAGE)
    where = cache.data.unsafe_buffer_pointer()
    ((x, latent, positions),) = steps(make_sequences(), [(1, 1, 1)])
    _, cache = step_of(SMALL)(
        make_params(SMALL), x, latent, positions, cache=cache, block_table=TABLE
    )
    assert cache.data.unsafe_buffer_pointer() == where


def test_nothing_to_do():
    params = make_params(SMALL)
    prefill = prefill_of(SMALL)
    empty, limits = np.ones((0, 32), np.float32), np.zeros(1, np.int32)
    assert prefill(params, empty, empty[:, :24], limits).indices.shape == (0, 6)
    rows = np.full((3, 32), np.nan, np.float32)
    assert np.all(np.asarray(prefill(params, rows, rows[:, :24], limits).indices) == -1)
    for b, s, n, pages in ((0, 1, 3, 8), (3, 0, 3, 8), (3, 1, 0, 8), (3, 1, 3, 0)):
        x, latent = np.ones((b, s, 32), np.float32), np.ones((b, s, 24), np.float32)
        cache = indexer.empty_cache(SMALL, pages, PAGE)
        positions = np.zeros((b, s), np.int32)
        indices, _ = step_of(SMALL)(
            params, x, latent, positions, cache=cache, block_table=TABLE[:b, :n]
        )
        assert indices.shape == (b, s, 6) and np.all(np.asarray(indices) == -1)


def test_requests_over_devices():
    """In shard_map, each device with its own requests and pages."""
    params, sequences = make_params(SMALL), make_sequences((5, 5))
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2]
    )
    ((x, latent, positions),) = steps(sequences, [(5, 5)])

    def step(x, latent, positions, cache, table):
        return indexer.decode(params, x, latent, positions, cache, table, config=SMALL)

    spec = P("data")
    indices, _ = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)
    )(x, latent, positions, indexer.empty_cache(SMALL, 4, PAGE), np.array([[1], [0]], np.int32))
    for chosen, (x, latent) in zip(indices, sequences, strict=True):
        check_choice(chosen, scores_of(params, x, latent, SMALL), 6)


# ------------------------------------------------------------------ with the attention


def masked_attention(x, indices):
    """The float64 attention of one sequence, each token to its choice."""
    visible = np.zeros((len(x), len(x)), bool)
    for i, chosen in enumerate(np.asarray(indices)):
        visible[i, chosen[chosen >= 0]] = True
    return mla_oracle.attention(attention_params(), x, ATTENTION, visible=visible)


@functools.partial(jax.jit, donate_argnums=(3, 4))
def layer_step(params, x, positions, cache, index_cache):
    latent = indexer.query_latent(attention_params(), x, ATTENTION)
    config = dataclasses.replace(SMALL, index_topk=params["topk"].shape[0])
    params = {name: value for name, value in params.items() if name != "topk"}
    chosen, index_cache = indexer.decode(
        params, x, latent, positions, index_cache, TABLE, config=config
    )
    slots = token_slots(chosen, TABLE, PAGE, num_pages=8)
    out, cache = mla.decode(
        attention_params(), x, positions, cache, TABLE, config=ATTENTION, indices=slots
    )
    return out, chosen, cache, index_cache


@pytest.mark.parametrize("topk", [6, 24])
def test_attention_to_the_choice(topk):
    """Decode: equal to the masked attention of numpy; with topk >= length to the dense one."""
    params = make_params(SMALL) | {"topk": np.zeros(topk)}
    sequences = make_sequences()
    cache, index_cache = mla.empty_cache(ATTENTION, 8, PAGE), poisoned(SMALL)
    outs, choices = [[], [], []], [[], [], []]
    for x, _, positions in steps(sequences, COUNTS):
        out, chosen, cache, index_cache = layer_step(params, x, positions, cache, index_cache)
        for r, row in enumerate(positions):
            outs[r].extend(np.asarray(out[r][row >= 0]))
            choices[r].extend(np.asarray(chosen[r][row >= 0]))
    for (x, _), out, chosen in zip(sequences, outs, choices, strict=True):
        x = x[: len(out)]
        assert mla_oracle.error(out, masked_attention(x, chosen)) < 3e-6
        dense = mla_oracle.attention(attention_params(), x, ATTENTION)
        assert (mla_oracle.error(out, dense) < 3e-6) == (topk == 24)
        latent = x.astype(np.float64) @ attention_params()["q_a_proj"]
        latent = mla_oracle.norm(ATTENTION, latent, attention_params()["q_a_norm"])
        check_choice(chosen, scores_of(make_params(SMALL), x, latent, SMALL), topk)


def test_sparse_prefill():
    """Packed sequences, through `flash_mla_sparse_fwd` with absorbed projections."""
    params, sequences = attention_params(), make_sequences((9, 14))
    x, _, limits = packed(sequences, 2)
    x[23:] = 0

    @jax.jit
    def prefill(x):
        latent = indexer.query_latent(params, x, ATTENTION)
        choice = indexer.prefill(make_params(SMALL), x, latent, limits, config=SMALL)
        q = core.absorb_queries(
            params, *core.project_queries(params, x, choice.positions, ATTENTION)
        )
        kv = jnp.concatenate(core.project_latents(params, x, choice.positions, ATTENTION), axis=-1)
        out, _, _ = flash_mla_sparse_fwd(
            q, kv[:, None], choice.rows[:, None], ATTENTION.softmax_scale, ATTENTION.kv_lora_rank
        )
        return core.project_outputs(params, core.expand_outputs(params, out)), choice.indices

    out, indices = prefill(x)
    for (x, _), start in zip(sequences, limits, strict=False):
        rows = slice(start, start + len(x))
        assert mla_oracle.error(out[rows], masked_attention(x, indices[rows])) < 3e-6


# ------------------------------------------------------------------ pieces


def test_scores(config):
    """Their values too, which no choice depends on."""
    params, ((x, latent),) = make_params(config), make_sequences((12,))
    positions = np.array([3, 4, 9, 10, 11, 40, 41, 42, 43, 50, 51, 90], np.int32)

    @jax.jit
    def scores(x, latent):
        q = indexer.index_queries(params, latent, positions, config)
        k = indexer.index_keys(params, x, positions, config)
        return indexer.index_scores(q, indexer.index_weights(params, x, config), k)

    expected = scores_of(params, x, latent, config, positions)
    visible = np.isfinite(expected)
    found = np.asarray(scores(x, latent))
    np.testing.assert_allclose(found[visible], expected[visible], rtol=2e-5, atol=2e-5)


def test_fp8_numbers():
    """Those of e4m3 and a power of two, bit for bit, also at the limits of the scale."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((40, 256)) * 2.0 ** rng.integers(-30, 30, (40, 1))
    x[0], x[1, :128], x[2, 0] = 0, 1e-9, 448 * 16
    x[3, :128] = np.clip(x[3, :128], -1, 1)
    x[3, 5] = np.nextafter(np.float32(448), np.float32(500))
    for dtype in (jnp.float32, jnp.bfloat16):
        values = jnp.asarray(x, dtype)
        rounded = jax.jit(indexer.round_to_fp8)(values)
        assert rounded.dtype == dtype
        expected = fp8(np.asarray(values, np.float64))
        np.testing.assert_array_equal(np.asarray(rounded, np.float64), expected)
    assert np.isnan(np.asarray(indexer.round_to_fp8(jnp.full((1, 128), jnp.nan)))).all()
    with pytest.raises(ValueError, match="round_to_fp8: argument 'x' has shape \\(2, 64\\)"):
        indexer.round_to_fp8(jnp.ones((2, 64)))


def test_hadamard_transform():
    x = np.random.default_rng(6).standard_normal((3, 16)).astype(np.float32)
    turned = np.asarray(indexer.hadamard_transform(x))
    np.testing.assert_allclose(turned, x @ hadamard(16), atol=1e-6)
    np.testing.assert_allclose(turned @ turned.T, x @ x.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="hadamard_transform: argument 'x' has shape \\(2, 12\\)"):
        indexer.hadamard_transform(jnp.ones((2, 12)))


def test_bfloat16():
    """As the model is run: nearly the scores of float64 numbers, and float32 ones."""
    config = dataclasses.replace(RELEASED, dtype="bfloat16", param_dtype="bfloat16")
    ((x, latent),) = make_sequences((20,))
    params = make_params(RELEASED)
    result = prefill_of(config)(params, x, latent, np.array([0, 20], np.int32))
    assert result.keys.dtype == jnp.bfloat16
    scores = scores_of(params, x, latent, dataclasses.replace(config, fp8=False))
    for row, chosen in zip(scores[6:], np.asarray(result.indices)[6:], strict=True):
        best = np.sort(row)[::-1][:6]
        assert np.all(row[chosen] >= best[-1] - 0.15)
    k = np.asarray(result.keys, np.float32)
    np.testing.assert_array_equal(k, np.asarray(fp8(k), np.float32))  # rounded before


# ------------------------------------------------------------------ configuration, parameters


HF = {
    "model_type": "deepseek_v32",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "torch_dtype": "bfloat16",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}


def test_config_of_a_checkpoint():
    v32 = IndexerConfig.preset("deepseek-v3.2")
    assert IndexerConfig.from_hf_config(HF) == v32
    assert IndexerConfig.from_hf_config({"text_config": HF}, fp8=True).fp8
    assert (v32.rope_layout, v32.rope_scaling.factor, v32.qk_rope_head_dim) == (
        "half_split",
        40,
        64,
    )
    glm = HF | {"model_type": "glm_moe_dsa", "rope_scaling": None}
    assert IndexerConfig.from_hf_config(glm).rope_layout == "interleaved"
    told = IndexerConfig.from_hf_config(glm | {"indexer_rope_interleave": False})
    assert told.rope_layout == "half_split"
    assert IndexerConfig.preset("glm-5", fp8=True).index_n_heads == 32
    with pytest.raises(NotImplementedError, match="'model_type' is 'deepseek_v3'"):
        IndexerConfig.from_hf_config(HF | {"model_type": "deepseek_v3"})
    with pytest.raises(ValueError, match="key 'index_topk' is missing"):
        IndexerConfig.from_hf_config({k: v for k, v in HF.items() if k != "index_topk"})
    with pytest.raises(ValueError, match="'name' is 'deepseek-v3'"):
        IndexerConfig.preset("deepseek-v3")
    with pytest.raises(ValueError, match="q_lora_rank=None"):
        IndexerConfig.from_mla(MLAConfig.preset("deepseek-v2-lite"))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"index_topk": 0}, "'index_topk' is 0"),
        ({"hidden_size": 1.5}, "'hidden_size' is 1.5"),
        ({"qk_rope_head_dim": 18}, "'qk_rope_head_dim' is 18; expected at most"),
        ({"qk_rope_head_dim": 7}, "'qk_rope_head_dim' is 7; expected an even"),
        ({"rope_layout": "neox"}, "'rope_layout' is 'neox'"),
        ({"layer_norm_eps": 0.0}, "'layer_norm_eps' is 0.0"),
        ({"hadamard": 1}, "'hadamard' is 1"),
        ({"hadamard": True, "index_head_dim": 24}, "'index_head_dim' is 24; expected a power"),
        ({"fp8": True}, "'index_head_dim' is 16; expected a multiple of 128"),
        ({"fp8": True, "index_head_dim": 128, "dtype": "float16"}, "'dtype' is float16"),
        ({"dtype": "int8"}, "'dtype' is"),
    ],
)
def test_bad_configurations(changes, text):
    with pytest.raises(ValueError, match=f"^IndexerConfig: .*{text}"):
        dataclasses.replace(SMALL, **changes)


def test_parameters():
    config = dataclasses.replace(SMALL, param_dtype="bfloat16")
    params = indexer.init_params(jax.random.key(0), config)
    assert {name: value.shape for name, value in params.items()} == indexer.param_shapes(config)
    dtypes = {name: value.dtype.name for name, value in params.items()}
    assert [name for name in dtypes if dtypes[name] == "bfloat16"] == ["wq_b", "wk"]
    assert np.all(np.asarray(params["k_norm"]) == 1)
    assert np.all(np.asarray(params["k_norm_bias"]) == 0)
    assert np.std(np.asarray(params["wq_b"], np.float32)) == pytest.approx(24**-0.5, rel=0.1)

    params = make_params(SMALL)
    prefix = "model.layers.0.self_attn.indexer."
    weights = {
        f"{prefix}wq_b.weight": params["wq_b"].reshape(24, 64).T,
        f"{prefix}wk.weight": params["wk"].T,
        f"{prefix}k_norm.weight": params["k_norm"],
        f"{prefix}k_norm.bias": params["k_norm_bias"],
        f"{prefix}weights_proj.weight": params["weights_proj"].T,
    }
    read = indexer.params_from_hf(weights, SMALL, prefix=prefix)
    assert set(read) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(read[name], value)
    name = f"{prefix}wk.weight"
    with pytest.raises(ValueError, match=f"'{name}' has shape .*expected \\(16, 32\\)"):
        indexer.params_from_hf(weights | {name: params["wk"]}, SMALL, prefix=prefix)
    with pytest.raises(ValueError, match="'wq_b.weight' is missing"):
        indexer.params_from_hf(weights, SMALL)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"config": ATTENTION}, "'config' is a MLAConfig; expected an IndexerConfig"),
        ({"params": {}}, "'params' has \\[\\]"),
        ({"params": make_params(SMALL) | {"wk": np.ones((32, 8))}}, "'wk'.*expected \\(32, 16\\)"),
        ({"x": np.ones((3, 32), np.float32)}, "'x' has shape \\(3, 32\\)"),
        ({"x": np.ones((3, 1, 33), np.float32)}, "'x' has shape .*expected \\(3, 1, 32\\)"),
        ({"x": np.ones((3, 1, 32), np.int32)}, "'x' has dtype int32"),
        ({"q_latent": np.ones((3, 2, 24), np.float32)}, "'q_latent' has shape \\(3, 2, 24\\)"),
        ({"q_latent": np.ones((3, 1, 25), np.float32)}, "'q_latent' has shape \\(3, 1, 25\\)"),
        ({"positions": np.zeros((3, 2), np.int32)}, "'positions' has shape"),
        ({"positions": np.zeros((3, 1))}, "'positions' has dtype"),
        ({"block_table": TABLE[:2]}, "'block_table' has shape"),
        ({"cache": np.zeros((8, PAGE, 1, 16))}, "'cache' is a ndarray"),
        ({"cache": PagedKVCache.zeros(8, PAGE, head_dim=16)}, "'cache' has .* in bfloat16"),
        ({"cache": PagedKVCache.zeros(8, PAGE, format="fp8_v32")}, "'cache' has format 'fp8_v32'"),
        ({"first_page": 8}, "'num_pages' is missing"),
    ],
)
def test_bad_calls_of_decode(changes, text):
    arguments = {
        "params": make_params(SMALL),
        "x": np.ones((3, 1, 32), np.float32),
        "q_latent": np.ones((3, 1, 24), np.float32),
        "positions": np.zeros((3, 1), np.int32),
        "cache": indexer.empty_cache(SMALL, 8, PAGE),
        "block_table": TABLE,
        "config": SMALL,
    }
    with pytest.raises(ValueError, match=f"(?s)^indexer.decode: .*{text}"):
        indexer.decode(**(arguments | changes))


def test_bad_calls_of_the_rest():
    x, latent = np.ones((6, 32), np.float32), np.ones((6, 24), np.float32)
    with pytest.raises(ValueError, match="^indexer.prefill: argument 'cu_seqlens' has dtype"):
        indexer.prefill(make_params(SMALL), x, latent, np.zeros(2), config=SMALL)
    with pytest.raises(ValueError, match="^indexer.prefill: argument 'q_latent' has shape"):
        indexer.prefill(make_params(SMALL), x, latent[:5], np.zeros(2, np.int32), config=SMALL)
    with pytest.raises(ValueError, match="^indexer.empty_cache: argument 'num_pages' is -1"):
        indexer.empty_cache(SMALL, -1)
    with pytest.raises(ValueError, match="^query_latent: .*q_lora_rank=None"):
        indexer.query_latent({}, x, dataclasses.replace(ATTENTION, q_lora_rank=None))
    with pytest.raises(ValueError, match="^query_latent: argument 'x' has shape \\(6, 24\\)"):
        indexer.query_latent(attention_params(), latent, ATTENTION)
