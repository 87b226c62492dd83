"""The modules of NNX and of Linen are the functions of MLA and of its indexer with parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jax_flashmla.flax import IndexerConfig, MLAConfig, core, empty_cache, indexer
from jax_flashmla.flax.linen import LightningIndexer as LinenIndexer
from jax_flashmla.flax.linen import MultiHeadLatentAttention as LinenAttention
from jax_flashmla.flax.nnx import LightningIndexer as NnxIndexer
from jax_flashmla.flax.nnx import MultiHeadLatentAttention as NnxAttention

CONFIG = MLAConfig(
    hidden_size=64,
    num_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    q_lora_rank=24,
    dtype="float32",
    param_dtype="float32",
)
TABLE = np.array([[2, 0], [1, 3]], np.int32)
CU_SEQLENS = np.array([0, 5, 9], np.int32)
INDEXER = IndexerConfig.from_mla(CONFIG, index_n_heads=2, index_head_dim=16, index_topk=3)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def layer():
    return nnx.jit(lambda: NnxAttention(CONFIG, rngs=nnx.Rngs(0)))()


def modes(layer, x):
    """The result of every mode; ``layer(name, *arguments)`` calls one."""
    results = {"call": layer("__call__", x, CU_SEQLENS), "prefill": layer("prefill", x, CU_SEQLENS)}
    context = np.zeros(2, np.int32)
    results["chunk"], cache = layer(
        "chunked_prefill", x, CU_SEQLENS, context, empty_cache(CONFIG, 4, 8), TABLE
    )
    positions = np.array([[5], [4]], np.int32)
    results["decode"] = layer("decode", x[:2, None], positions, cache, TABLE)
    return results


def check_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@jax.jit
def modes_of_core(params, x):
    def call(name, *arguments):
        if name == "__call__":
            return core.prefill(params, *arguments, config=CONFIG).out
        return getattr(core, name)(params, *arguments, config=CONFIG)

    return modes(call, x)


def test_nnx(x, layer):
    state = nnx.state(layer, nnx.Param)
    shapes = {path[0]: value.shape for path, value in nnx.to_flat_state(state)}
    assert shapes == core.param_shapes(CONFIG)
    call = nnx.jit(lambda layer, x: modes(lambda name, *a: getattr(layer, name)(*a), x))
    check_same(call(layer, x), modes_of_core(layer.params, x))


def test_linen(x):
    layer = LinenAttention(CONFIG)
    variables = jax.jit(layer.init)(jax.random.key(0), x, CU_SEQLENS)
    assert jax.tree.map(jnp.shape, variables["params"]) == core.param_shapes(CONFIG)
    call = jax.jit(lambda v, x: modes(lambda name, *a: layer.apply(v, *a, method=name), x))
    check_same(call(variables, x), modes_of_core(variables["params"], x))


def test_nnx_equals_linen(x, layer):
    """With one's parameters in the other."""
    out = jax.jit(LinenAttention(CONFIG).apply)({"params": layer.params}, x, CU_SEQLENS)
    expected = nnx.jit(lambda layer: layer(x, CU_SEQLENS))(layer)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_nnx_under_jit_with_a_donated_cache(x, layer):

    @nnx.jit(donate_argnums=3)
    def step(layer, x, positions, cache):
        return layer.decode(x, positions, cache, TABLE)

    cache, positions = empty_cache(CONFIG, 4, 8), np.zeros((2, 1), np.int32)
    out, after = step(layer, x[:2, None], positions, cache)
    assert cache.data.is_deleted() and not after.data.is_deleted()
    assert out.shape == (2, 1, 64)


def test_gradients(x, layer):
    by_nnx = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x, CU_SEQLENS) ** 2)))(layer)
    linen = LinenAttention(CONFIG)

    @jax.jit
    @jax.grad
    def by_linen(params):
        return jnp.sum(linen.apply({"params": params}, x, CU_SEQLENS) ** 2)

    found = {path[0]: value[...] for path, value in nnx.to_flat_state(by_nnx)}
    expected = by_linen(layer.params)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert np.isfinite(value).all() and np.any(np.asarray(value) != 0)
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4)


def test_parameters_have_their_dtype(x):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    layer = nnx.eval_shape(lambda: NnxAttention(config, rngs=nnx.Rngs(0)))
    params = dict(nnx.to_flat_state(nnx.state(layer, nnx.Param)))
    assert {value.dtype for value in params.values()} == {np.dtype(jnp.bfloat16)}
    linen = LinenAttention(config)
    out, variables = jax.eval_shape(linen.init_with_output, jax.random.key(0), x, CU_SEQLENS)
    assert out.dtype == jnp.bfloat16
    assert all(value.dtype == jnp.bfloat16 for value in variables["params"].values())


def test_as_a_part_of_a_model(x):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, cu_seqlens):
            return x + LinenAttention(CONFIG, name="attention")(nn.RMSNorm()(x), cu_seqlens)

    out, variables = jax.eval_shape(Block().init_with_output, jax.random.key(0), x, CU_SEQLENS)
    assert set(variables["params"]["attention"]) == set(core.param_shapes(CONFIG))
    assert out.shape == x.shape


@pytest.mark.parametrize("module", [LinenAttention, NnxAttention])
def test_a_config_that_is_none(module, x):
    with pytest.raises(
        ValueError, match="MultiHeadLatentAttention: argument 'config' is a NoneType"
    ):
        if module is NnxAttention:
            NnxAttention(None, rngs=nnx.Rngs(0))
        else:
            LinenAttention(None).init(jax.random.key(0), x, CU_SEQLENS)


# ------------------------------------------------------------------ the indexer


def choices(attention, own, x):
    """What is chosen in both modes; ``attention`` and ``own`` call methods by name."""
    latent = attention("query_latent", x)
    choice = own("__call__", x, latent, CU_SEQLENS)
    positions = np.array([[0, 1, 2, 3, 4], [-1, 0, 1, 2, 3]], np.int32)
    rows = np.array([[0, 1, 2, 3, 4], [0, 5, 6, 7, 8]])
    cache = indexer.empty_cache(INDEXER, 4, 8)
    return choice, own("decode", x[rows], latent[rows], positions, cache, TABLE)


@jax.jit
def choices_of_functions(params, index_params, x):
    def attention(name, x):
        return indexer.query_latent(params, x, CONFIG)

    def own(name, *arguments):
        function = indexer.decode if name == "decode" else indexer.prefill
        return function(index_params, *arguments, config=INDEXER)

    return choices(attention, own, x)


def test_nnx_indexer(x, layer):
    own = nnx.jit(lambda: NnxIndexer(INDEXER, rngs=nnx.Rngs(1)))()
    state = nnx.to_flat_state(nnx.state(own, nnx.Param))
    assert {path[0]: value.shape for path, value in state} == indexer.param_shapes(INDEXER)

    @nnx.jit
    def call(layer, own, x):
        return choices(
            lambda name, *a: getattr(layer, name)(*a), lambda name, *a: getattr(own, name)(*a), x
        )

    found = call(layer, own, x)
    check_same(found, choices_of_functions(layer.params, own.params, x))
    choice, (indices, _) = found
    assert np.max(choice.indices) > 2 and np.min(choice.indices[1]) == -1
    np.testing.assert_array_equal(np.concatenate([indices[0], indices[1, 1:]]), choice.indices)


def test_linen_indexer(x, layer):
    own = LinenIndexer(INDEXER)
    linen, variables = LinenAttention(CONFIG), {"params": layer.params}
    latent = jnp.ones((9, CONFIG.q_lora_rank))
    index_variables = jax.jit(own.init)(jax.random.key(0), x, latent, CU_SEQLENS)
    assert jax.tree.map(jnp.shape, index_variables["params"]) == indexer.param_shapes(INDEXER)

    @jax.jit
    def call(variables, index_variables, x):
        return choices(
            lambda name, *a: linen.apply(variables, *a, method=name),
            lambda name, *a: own.apply(index_variables, *a, method=name),
            x,
        )

    expected = choices_of_functions(layer.params, index_variables["params"], x)
    check_same(call(variables, index_variables, x), expected)


def test_parameters_of_an_indexer_have_their_dtype():
    config = dataclasses.replace(INDEXER, dtype="bfloat16", param_dtype="bfloat16")
    own = nnx.eval_shape(lambda: NnxIndexer(config, rngs=nnx.Rngs(0)))
    by_nnx = {path[0]: v.dtype for path, v in nnx.to_flat_state(nnx.state(own, nnx.Param))}
    x, latent = jnp.zeros((9, 64)), jnp.zeros((9, 24))
    linen = jax.eval_shape(LinenIndexer(config).init, jax.random.key(0), x, latent, CU_SEQLENS)
    assert by_nnx == {name: value.dtype for name, value in linen["params"].items()}
    large = {name for name, dtype in by_nnx.items() if dtype == jnp.bfloat16}
    assert large == {"wq_b", "wk"} and by_nnx["k_norm"] == by_nnx["weights_proj"] == jnp.float32


@pytest.mark.parametrize("config", [None, CONFIG])
@pytest.mark.parametrize("module", [LinenIndexer, NnxIndexer])
def test_an_indexer_whose_config_is_none(module, config, x):
    with pytest.raises(ValueError, match="LightningIndexer: argument 'config' is a "):
        if module is NnxIndexer:
            NnxIndexer(config, rngs=nnx.Rngs(0))
        else:
            LinenIndexer(config).init(jax.random.key(0), x, x[:, :24], CU_SEQLENS)
