"""Multi-head latent attention (MLA) as pure functions on a dict of parameters.

A token leaves one latent ``kv_c`` [kv_lora_rank] and one rotated key ``k_pe`` [qk_rope_head_dim],
shared by all heads. The same attention is computed in two ways (DeepSeek-V2, arXiv 2405.04434):

* **expanded**: keys and values of every head are made of the latents. Least work for many new
  tokens, differentiable: `prefill`.
* **absorbed**: the projections that would expand the latents are moved to the queries and to the
  result, ``q . (W_UK kv_c) = (W_UK^T q) . kv_c``, so that all heads read the latents as they are
  in the cache: `decode`.

`chunked_prefill` uses both: new tokens attend to each other expanded and to a cached context
absorbed, and the two results are merged by their log-sum-exp.

**Parameters** are a dict of arrays of these names and shapes (`param_shapes`), h heads:

============= ========================================= ==========================================
``q_proj``    [hidden, h, nope + rope]                  only without ``q_lora_rank``
``q_a_proj``  [hidden, q_lora_rank]                     only with it, as the next two
``q_a_norm``  [q_lora_rank]
``q_b_proj``  [q_lora_rank, h, nope + rope]
``kv_a_proj`` [hidden, kv_lora_rank + rope]             latent and rotated key of a token
``kv_a_norm`` [kv_lora_rank]
``k_b_proj``  [kv_lora_rank, h, nope]                   W_UK: latent to keys
``v_b_proj``  [kv_lora_rank, h, v_head_dim]             W_UV: latent to values
``o_proj``    [h, v_head_dim, hidden]
============= ========================================= ==========================================

Every shape is static: the functions work under ``jit``, with ``config`` as a static argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_flashmla import _checks
from jax_flashmla.cache import PagedKVCache, offset_block_table, offset_slots, slot_mapping
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.flax.config import MLAConfig, yarn_mscale
from jax_flashmla.merging import merge_attention_states
from jax_flashmla.metadata import get_mla_metadata
from jax_flashmla.reference import latents as _latents
from jax_flashmla.varlen_prefill import flash_attn_varlen_func

Array = jax.Array
Params = Mapping[str, Any]
Schedule = tuple[Array | None, Array | None]

# ---------------------------------------------------------------------------------------------
# Parameters


def param_shapes(config: MLAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters (see the module's docstring)."""
    hidden, heads, latent = config.hidden_size, config.num_heads, config.kv_lora_rank
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if config.q_lora_rank is None:
        shapes["q_proj"] = (hidden, heads, head)
    else:
        shapes["q_a_proj"] = (hidden, config.q_lora_rank)
        shapes["q_a_norm"] = (config.q_lora_rank,)
        shapes["q_b_proj"] = (config.q_lora_rank, heads, head)
    return shapes | {
        "kv_a_proj": (hidden, config.cache_dim),
        "kv_a_norm": (latent,),
        "k_b_proj": (latent, heads, config.qk_nope_head_dim),
        "v_b_proj": (latent, heads, config.v_head_dim),
        "o_proj": (heads, config.v_head_dim, hidden),
    }


def param_specs(config: MLAConfig, axis: str) -> dict[str, PartitionSpec]:
    """How parameters are divided by heads over a mesh axis; what all heads share stays whole.

    Under ``jax.jit`` with parameters of these shardings the result needs nothing more. Inside
    ``jax.shard_map`` each device computes with ``num_heads`` divided by the devices, and the
    outputs of the layer are summed over the axis (``jax.lax.psum``).
    """
    by_heads = {"q_proj": 1, "q_b_proj": 1, "k_b_proj": 1, "v_b_proj": 1, "o_proj": 0}
    return {
        name: PartitionSpec(*(axis if i == by_heads.get(name) else None for i in range(len(shape))))
        for name, shape in param_shapes(config).items()
    }


def init_param(name: str, key: Array, config: MLAConfig) -> Array:
    """A new parameter: ones for a norm, else normal with variance 1 / (inputs of an output)."""
    shape = param_shapes(config)[name]
    if len(shape) == 1:
        return jnp.ones(shape, config.param_dtype)
    inputs = shape[0] * shape[1] if name == "o_proj" else shape[0]
    values = jax.random.normal(key, shape, jnp.float32) * inputs**-0.5
    return values.astype(config.param_dtype)


def init_params(key: Array, config: MLAConfig) -> dict[str, Array]:
    """New parameters in ``config.param_dtype``, see `init_param`."""
    names = list(param_shapes(config))
    keys = jax.random.split(key, len(names))
    return {name: init_param(name, k, config) for name, k in zip(names, keys, strict=True)}


def _read_weight(op: str, weights: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Array:
    """A vector, or a matrix [outputs, inputs], of a checkpoint, of this shape."""
    if name not in weights:
        raise ValueError(f"{op}: '{name}' is missing from the weights")
    dims = ("outputs", "inputs") if len(shape) == 2 else ("columns",)
    value = weights[name]  # once, since a mapping may read it from a file
    _checks.check_shape(op, name, value, shape, dims)
    return jnp.asarray(value)


def params_from_hf(
    weights: Mapping[str, Any], config: MLAConfig, *, prefix: str = ""
) -> dict[str, Array]:
    """Parameters from the weights of a Hugging Face attention layer.

    Args:
      weights: arrays by their names in the checkpoint, ``q_proj.weight`` (or ``q_a_proj.weight``,
        ``q_a_layernorm.weight``, ``q_b_proj.weight``), ``kv_a_proj_with_mqa.weight``,
        ``kv_a_layernorm.weight``, ``kv_b_proj.weight``, ``o_proj.weight``; others are ignored.
        Matrices are [outputs, inputs], not quantised.
      config: of the model.
      prefix: what stands before those names, such as ``"model.layers.0.self_attn."``.

    Returns:
      The parameters in ``config.param_dtype``.

    Raises:
      ValueError: a weight is missing or has another shape than config says.
    """
    op = "params_from_hf"
    shapes = param_shapes(config)
    heads, nope, value = config.num_heads, config.qk_nope_head_dim, config.v_head_dim

    def read(name: str, shape: tuple[int, ...]) -> Array:
        value = _read_weight(op, weights, f"{prefix}{name}.weight", shape)
        return value.astype(config.param_dtype)

    def matrix(name: str, shape: tuple[int, ...], outputs: int) -> Array:
        """A weight whose transpose has ``shape``, of which the last axes are the outputs."""
        inputs = math.prod(shape) // outputs
        return read(name, (outputs, inputs)).T.reshape(shape)

    params = {}
    for ours, theirs in (("q_proj", "q_proj"), ("q_a_proj", "q_a_proj"), ("q_b_proj", "q_b_proj")):
        if ours in shapes:
            params[ours] = matrix(theirs, shapes[ours], math.prod(shapes[ours][1:]))
    if "q_a_norm" in shapes:
        params["q_a_norm"] = read("q_a_layernorm", shapes["q_a_norm"])
    params["kv_a_proj"] = matrix("kv_a_proj_with_mqa", shapes["kv_a_proj"], config.cache_dim)
    params["kv_a_norm"] = read("kv_a_layernorm", shapes["kv_a_norm"])
    both = (config.kv_lora_rank, heads, nope + value)
    expand = matrix("kv_b_proj", both, heads * (nope + value))
    params["k_b_proj"], params["v_b_proj"] = expand[..., :nope], expand[..., nope:]
    params["o_proj"] = matrix("o_proj", shapes["o_proj"], config.hidden_size)
    return params


# ---------------------------------------------------------------------------------------------
# Checks


def _check_config(op: str, config: Any) -> None:
    if not isinstance(config, MLAConfig):
        raise ValueError(
            f"{op}: argument 'config' is a {type(config).__name__}; expected an MLAConfig"
        )


def _check_params(op: str, params: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    if not isinstance(params, Mapping) or set(params) != set(expected):
        found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f"{op}: argument 'params' has {found}; expected a dict of {sorted(expected)}"
        )
    for name, shape in expected.items():
        value = params[name]
        _checks.check_array(op, f"params[{name!r}]", value, str(shape))
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{op}: argument 'params[{name!r}]' has shape {tuple(value.shape)}; expected "
                f"{shape}"
            )


def _check_input(op: str, x: Any, config: MLAConfig, lead: tuple[str, ...]) -> Array:
    """Checks x and returns it in the dtype of the layer."""
    dims = (*lead, "hidden_size")
    _checks.check_rank(op, "x", x, dims)
    _checks.check_dtype(op, "x", x, (jnp.bfloat16, jnp.float16, jnp.float32))
    _checks.check_shape(op, "x", x, (*x.shape[:-1], config.hidden_size), dims)
    return jnp.asarray(x).astype(config.dtype)


def _check_int32(op: str, name: str, value: Any, shape: tuple[int, ...], dims: tuple[str, ...]):
    _checks.check_shape(op, name, value, shape, dims)
    _checks.check_dtype(op, name, value, (jnp.int32,))
    return jnp.asarray(value)


def _check_cu_seqlens(op: str, cu_seqlens: Any) -> Array:
    _checks.check_rank(op, "cu_seqlens", cu_seqlens, ("b+1",))
    _checks.check_dtype(op, "cu_seqlens", cu_seqlens, (jnp.int32,))
    if cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{op}: argument 'cu_seqlens' has shape (0,); expected (b+1,), which for no sequences "
            "is (1,)"
        )
    return jnp.asarray(cu_seqlens)


def _check_cache_format(op: str, cache_format: str, config: MLAConfig) -> None:
    if cache_format == "fp8_v4":
        raise ValueError(
            f"{op}: the cache's format is 'fp8_v4', whose values contain the rotated columns; "
            "expected 'plain' or 'fp8_v32'"
        )
    if cache_format == "fp8_v32" and (config.kv_lora_rank, config.qk_rope_head_dim) != (512, 64):
        raise ValueError(
            f"{op}: the cache's format is 'fp8_v32', which has 512 + 64 columns; config has "
            f"kv_lora_rank={config.kv_lora_rank} and qk_rope_head_dim={config.qk_rope_head_dim}"
        )


def _check_cache(op: str, cache: Any, config: MLAConfig) -> None:
    if not isinstance(cache, PagedKVCache):
        raise ValueError(
            f"{op}: argument 'cache' is a {type(cache).__name__}; expected a PagedKVCache"
        )
    _check_cache_format(op, cache.format, config)
    if cache.format != "plain":
        return
    found = (cache.num_heads_k, cache.head_dim, cache.dtype)
    expected = (1, config.cache_dim, config.dtype)
    if found != expected:
        form = "{} key heads of {} columns in {}"
        raise ValueError(
            f"{op}: argument 'cache' has {form.format(*found)}; expected {form.format(*expected)}, "
            "to go with config (empty_cache makes one)"
        )


# ---------------------------------------------------------------------------------------------
# Pieces


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """``x / sqrt(mean(x ** 2) + epsilon) * weight`` over the last axis, in float32; x's dtype."""
    return _latents.rms_norm(x, weight, epsilon)


def rope_frequencies(config: MLAConfig) -> np.ndarray:
    """Radians a position that each pair of columns turns, float32 [qk_rope_head_dim / 2]."""
    dim, theta = config.qk_rope_head_dim, config.rope_theta
    frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies.astype(np.float32)

    def pair_that_turns(times: float) -> float:
        """Which pair turns so many times within the original context (pairs slow down)."""
        wavelength = yarn.original_max_position_embeddings / times
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    # The bounds are clipped to columns and not to pairs, as in the models' own code.
    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001  # a step instead of a division by 0
    slowed = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    blended = frequencies * (1 - slowed) + frequencies / yarn.factor * slowed
    return blended.astype(np.float32)


def rope_length(config: MLAConfig) -> float:
    """What the rotated columns are multiplied by: 1 without YaRN."""
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def rope_tables(positions: Array, config: MLAConfig) -> tuple[Array, Array]:
    """Cosines and sines of positions int32[...], float32 [..., rope / 2], times `rope_length`."""
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(config)
    length = rope_length(config)
    return jnp.cos(angles) * length, jnp.sin(angles) * length


def apply_rope(x: Array, positions: Array, config: MLAConfig) -> Array:
    """Rotates x [..., rope], or [..., h, rope] with heads, by positions int32[...]."""
    cos, sin = rope_tables(positions, config)
    if x.ndim == cos.ndim + 1:
        cos, sin = cos[..., None, :], sin[..., None, :]
    return _latents.rotate(x, cos, sin, config.rope_layout)


def _project(spec: str, x: Array, weight: Array) -> Array:
    return jnp.einsum(spec, x, weight.astype(x.dtype))


def project_queries(
    params: Params, x: Array, positions: Array, config: MLAConfig
) -> tuple[Array, Array]:
    """Queries of x [..., hidden]: ``q_nope`` [..., h, nope] and rotated ``q_pe`` [..., h, rope]."""
    if config.q_lora_rank is None:
        q = _project("...m,mhd->...hd", x, params["q_proj"])
    else:
        latent = _project("...m,mr->...r", x, params["q_a_proj"])
        latent = rms_norm(latent, params["q_a_norm"], config.rms_norm_eps)
        q = _project("...r,rhd->...hd", latent, params["q_b_proj"])
    if config.q_scale != 1.0:
        q = q * jnp.asarray(config.q_scale, q.dtype)
    q_nope, q_pe = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, apply_rope(q_pe, positions, config)


def project_latents(
    params: Params, x: Array, positions: Array, config: MLAConfig
) -> tuple[Array, Array]:
    """What x [..., hidden] leaves in the cache: ``kv_c`` [..., latent], ``k_pe`` [..., rope]."""
    kv = _project("...m,mc->...c", x, params["kv_a_proj"])
    kv_c, k_pe = jnp.split(kv, [config.kv_lora_rank], axis=-1)
    kv_c = rms_norm(kv_c, params["kv_a_norm"], config.rms_norm_eps)
    if config.kv_scale != 1.0:
        kv_c = kv_c * jnp.asarray(config.kv_scale, kv_c.dtype)
    return kv_c, apply_rope(k_pe, positions, config)


def append_latents(
    params: Params, x: Array, positions: Array, slots: Array, cache: PagedKVCache, config: MLAConfig
) -> PagedKVCache:
    """Writes what x [..., hidden] leaves in the cache (`project_latents`) to slots int32[...].

    The norm and the rotation are part of the write (see `PagedKVCache.append`), but for models with
    a ``kv_scale``: their latents are rounded between the norm and the factor, which the write does
    not do.
    """
    if config.kv_scale != 1.0:
        kv_c, k_pe = project_latents(params, x, positions, config)
        return cache.append(kv_c, slots, k_pe=k_pe)
    cos, sin = rope_tables(positions, config)
    return cache.append(
        _project("...m,mc->...c", x, params["kv_a_proj"]),
        slots,
        norm_weight=jnp.asarray(params["kv_a_norm"]),
        norm_eps=config.rms_norm_eps,
        rope_cos=cos,
        rope_sin=sin,
        rope_layout=config.rope_layout,
    )


def expand_latents(params: Params, kv_c: Array, k_pe: Array) -> tuple[Array, Array]:
    """Keys [..., h, nope + rope] and values [..., h, v] of every head."""
    k_nope = _project("...c,chn->...hn", kv_c, params["k_b_proj"])
    shared = jnp.broadcast_to(k_pe[..., None, :], (*k_nope.shape[:-1], k_pe.shape[-1]))
    return (
        jnp.concatenate([k_nope, shared], axis=-1),
        _project("...c,chv->...hv", kv_c, params["v_b_proj"]),
    )


def absorb_queries(params: Params, q_nope: Array, q_pe: Array) -> Array:
    """Queries [..., h, latent + rope] for the cache, as if it held the keys of every head."""
    q_latent = _project("...hn,chn->...hc", q_nope, params["k_b_proj"])
    return jnp.concatenate([q_latent, q_pe], axis=-1)


def expand_outputs(params: Params, out: Array) -> Array:
    """Averages of latents [..., h, latent] to averages of values [..., h, v]."""
    return _project("...hc,chv->...hv", out, params["v_b_proj"])


def project_outputs(params: Params, out: Array) -> Array:
    """Results of the heads [..., h, v] to the layer's output [..., hidden]."""
    return _project("...hv,hvm->...m", out, params["o_proj"])


# ---------------------------------------------------------------------------------------------
# Prefill


class PrefillResult(NamedTuple):
    """What `prefill` returns.

    Attributes:
      out: [t, hidden], 0 for padding.
      kv_c, k_pe: [t, kv_lora_rank] and [t, qk_rope_head_dim], the tokens for a cache.
      positions: int32[t], positions in their sequences, -1 for padding.
      request_ids: int32[t], the numbers of their sequences, b for padding. `slot_mapping` makes
        the tokens' slots of these two.
    """

    out: Array
    kv_c: Array
    k_pe: Array
    positions: Array
    request_ids: Array


def _unpack(cu_seqlens: Array, total: int) -> tuple[Array, Array]:
    """Number of the sequence (b: none) and offset within it (-1: none) of each packed row."""
    rows = jnp.arange(total, dtype=jnp.int32)
    request = jnp.searchsorted(cu_seqlens[1:], rows, side="right").astype(jnp.int32)
    b = cu_seqlens.shape[0] - 1
    offset = rows - cu_seqlens[request]
    inside = (request < b) & (offset >= 0)
    return jnp.where(inside, request, b), jnp.where(inside, offset, -1)


def _attend_to_new(
    params: Params,
    queries: tuple[Array, Array],
    latents: tuple[Array, Array],
    cu_seqlens: Array,
    config: MLAConfig,
    implementation: str | None,
) -> tuple[Array, Array]:
    q = jnp.concatenate(queries, axis=-1)
    k, v = expand_latents(params, *latents)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        q.shape[0],  # a bound is enough
        q.shape[0],
        softmax_scale=config.softmax_scale,
        causal=True,
        implementation=implementation,
    )


def prefill(
    params: Params,
    x: Array,
    cu_seqlens: Array,
    *,
    config: MLAConfig,
    positions: Array | None = None,
    implementation: str | None = None,
) -> PrefillResult:
    """Causal attention within whole sequences, packed one after the other. Differentiable.

    Args:
      params: see the module's docstring.
      x: [t, hidden], bfloat16, float16 or float32; sequence ``i`` has the rows
        ``cu_seqlens[i] : cu_seqlens[i + 1]``. Rows in none are padding: they may hold anything.
      cu_seqlens: int32[b + 1], not decreasing.
      config: the layer's configuration, static.
      positions: int32[t], for RoPE; by default each sequence's begin at 0.
      implementation: as in `flash_attn_varlen_func`.

    Returns:
      A `PrefillResult` in ``config.dtype``.

    Raises:
      ValueError: a wrong shape or dtype.
    """
    op = "prefill"
    _check_config(op, config)
    _check_params(op, params, param_shapes(config))
    x = _check_input(op, x, config, ("t",))
    cu_seqlens = _check_cu_seqlens(op, cu_seqlens)
    request_ids, offsets = _unpack(cu_seqlens, x.shape[0])
    if positions is None:
        positions = offsets
    else:
        positions = _check_int32(op, "positions", positions, x.shape[:1], ("t",))
        positions = jnp.where(offsets >= 0, positions, -1)
    # Zeros instead of whatever padding holds, since 0 times NaN would go into gradients.
    x = jnp.where((offsets >= 0)[:, None], x, 0)
    latents = project_latents(params, x, positions, config)
    queries = project_queries(params, x, positions, config)
    out, _ = _attend_to_new(params, queries, latents, cu_seqlens, config, implementation)
    return PrefillResult(project_outputs(params, out), *latents, positions, request_ids)


# ---------------------------------------------------------------------------------------------
# The cache


def empty_cache(
    config: MLAConfig,
    num_pages: int,
    page_size: int = 64,
    *,
    num_layers: int = 1,
    format: str = "plain",
) -> PagedKVCache:
    """A cache of zeros that goes with the layer.

    Args:
      config: the layer's configuration.
      num_pages: pages of one layer.
      page_size: tokens of a page.
      num_layers: layers that share the cache; that of layer l begins at page ``l * num_pages``.
      format: ``"plain"`` (in ``config.dtype``) or ``"fp8_v32"`` (needs 512 + 64 columns).

    Raises:
      ValueError: a bad value, or a format that does not go with config.
    """
    op = "empty_cache"
    _check_config(op, config)
    _checks.check_choice(op, "format", format, ("plain", "fp8_v32"))
    _check_cache_format(op, format, config)
    pages = _checks.check_int(op, "num_pages", num_pages, 0)
    pages *= _checks.check_int(op, "num_layers", num_layers, 1)
    if format == "plain":
        return PagedKVCache.zeros(pages, page_size, head_dim=config.cache_dim, dtype=config.dtype)
    return PagedKVCache.zeros(pages, page_size, format=format)


def make_schedule(
    config: MLAConfig, positions: Array, *, topk: int | None = None, batch_invariant: bool = False
) -> Schedule:
    """The schedule of one `decode` step, for all layers (see `get_mla_metadata`).

    Args:
      config: the layers' configuration.
      positions: int32[b, s], as for `decode`.
      topk: None for dense attention, else the entries of ``indices`` for each token.
      batch_invariant: as in `decode`.
    """
    op = "make_schedule"
    _check_config(op, config)
    _checks.check_rank(op, "positions", positions, ("b", "s"))
    lengths = _lengths(jnp.asarray(positions))
    queries = positions.shape[1] * config.num_heads
    return get_mla_metadata(
        lengths,
        queries,
        1,
        num_heads_q=None if topk is None else config.num_heads,
        topk=topk,
        batch_invariant=batch_invariant,
    )


def _lengths(positions: Array) -> Array:
    """Tokens of each request once those at ``positions`` [b, s] are in the cache."""
    if positions.shape[1] == 0:
        return jnp.zeros(positions.shape[:1], jnp.int32)
    return jnp.maximum(positions[:, -1], -1) + 1


class _Pages(NamedTuple):
    """The pages of one layer in a cache."""

    first: Array | int
    number: int
    shared: bool  # with other layers, so that tables and slots have to be moved

    def table(self, block_table: Array) -> Array:
        if not self.shared:
            return block_table
        return offset_block_table(block_table, self.first, num_pages=self.number)


def _pages_of_layer(
    op: str, cache: PagedKVCache, first_page: Array | int, num_pages: int | None
) -> _Pages:
    if num_pages is not None:
        return _Pages(first_page, _checks.check_int(op, "num_pages", num_pages, 0), True)
    if not isinstance(first_page, int) or first_page != 0:
        raise ValueError(
            f"{op}: argument 'num_pages' is missing (None) though 'first_page' is given; expected "
            "the number of pages of one layer"
        )
    return _Pages(0, cache.num_pages, False)


# ---------------------------------------------------------------------------------------------
# Decode


def decode(
    params: Params,
    x: Array,
    positions: Array,
    cache: PagedKVCache,
    block_table: Array,
    *,
    config: MLAConfig,
    schedule: Schedule = (None, None),
    indices: Array | None = None,
    topk_length: Array | None = None,
    first_page: Array | int = 0,
    num_pages: int | None = None,
    batch_invariant: bool = False,
    fp8_matmul: bool = False,
    power_of_two_scales: bool = False,
    implementation: str | None = None,
) -> tuple[Array, PagedKVCache]:
    """Writes new tokens to the cache and attends from them to all tokens of their requests.

    Dense attention is causal among the new tokens. With ``indices`` it is sparse: each new token
    attends to the slots listed for it and to no others (list its own slot, which is written before
    it is read).

    Args:
      params: see the module's docstring.
      x: [b, s, hidden], the s new tokens of each request.
      positions: int32[b, s], positions in the request: consecutive, and negative for padding, which
        comes first. A request's length in the cache becomes ``positions[:, -1] + 1``; a row without
        a request has only negative ones and writes nothing.
      cache: a `PagedKVCache` of ``config.dtype`` and ``config.cache_dim`` columns, or of format
        ``"fp8_v32"``. Donate it (``donate_argnames`` of the jitted step) for an update in place.
      block_table: int32[b, n], pages of each request, counted from 0 in each layer.
      config: the layer's configuration, static.
      schedule: of `make_schedule`, made once a step; by default each call makes its own.
      indices: int32[b, s, topk], slots of the layer (counted from 0, see `token_slots`), or None.
      topk_length: int32[b], how many of a request's ``indices`` count.
      first_page: the layer's first page if several share the cache, else 0.
      num_pages: pages of one layer; needed with ``first_page``.
      batch_invariant: as in `flash_mla_with_kvcache`; make the schedule with the same.
      fp8_matmul: as in `flash_mla_with_kvcache`; for a cache of format ``"fp8_v32"``.
      power_of_two_scales: as in `flash_mla_with_kvcache`; for a cache of that format. What is
        written here keeps the promise.
      implementation: as in `flash_mla_with_kvcache`.

    Returns:
      ``out`` [b, s, hidden] in ``config.dtype``, 0 for padding, and the cache.

    Raises:
      ValueError: a wrong shape or dtype, or a cache that does not go with config.
      NotImplementedError: derivatives (train with `prefill`), or as in `flash_mla_with_kvcache`.
    """
    op = "decode"
    _check_config(op, config)
    _check_params(op, params, param_shapes(config))
    x = _check_input(op, x, config, ("b", "s"))
    positions = _check_int32(op, "positions", positions, x.shape[:2], ("b", "s"))
    _check_cache(op, cache, config)
    _checks.check_rank(op, "block_table", block_table, ("b", "n"))
    _check_int32(op, "block_table", block_table, (x.shape[0], block_table.shape[1]), ("b", "n"))
    pages = _pages_of_layer(op, cache, first_page, num_pages)

    present = positions >= 0
    x = jnp.where(present[..., None], x, 0)
    slots = slot_mapping(
        block_table,
        positions,
        cache.page_size,
        num_pages=pages.number,
        page_offset=pages.first,
    )
    cache = append_latents(params, x, positions, slots, cache, config)

    attention: dict[str, Any] = {"causal": True}
    if indices is not None:
        _checks.check_rank(op, "indices", indices, ("b", "s", "topk"))
        dims = ("b", "s", "topk")
        _check_int32(op, "indices", indices, (*x.shape[:2], indices.shape[2]), dims)
        indices = jnp.where(present[..., None], indices, -1)
        if pages.shared:
            indices = offset_slots(
                indices, pages.first, num_pages=pages.number, page_size=cache.page_size
            )
        attention = {"indices": indices, "topk_length": topk_length}
    elif topk_length is not None:
        raise ValueError(f"{op}: argument 'topk_length' is given without 'indices'")

    out, _ = flash_mla_with_kvcache(
        absorb_queries(params, *project_queries(params, x, positions, config)),
        cache,
        pages.table(block_table),
        _lengths(positions),
        config.kv_lora_rank,
        *schedule,
        softmax_scale=config.softmax_scale,
        is_fp8_kvcache=cache.format != "plain",
        batch_invariant=batch_invariant,
        fp8_matmul=fp8_matmul,
        power_of_two_scales=power_of_two_scales,
        implementation=implementation,
        **attention,
    )
    out = project_outputs(params, expand_outputs(params, out))
    # Padding is a query like any other to the operation, and has seen some of the context.
    return jnp.where(present[..., None], out, 0), cache


# ---------------------------------------------------------------------------------------------
# Prefill in chunks


def chunked_prefill(
    params: Params,
    x: Array,
    cu_seqlens: Array,
    context_lens: Array,
    cache: PagedKVCache,
    block_table: Array,
    *,
    config: MLAConfig,
    max_seqlen: int | None = None,
    first_page: Array | int = 0,
    num_pages: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, PagedKVCache]:
    """Prefill of the next tokens of requests whose first ones are in the cache; writes the new.

    New tokens attend to each other causally with expanded heads, and to the context with absorbed
    projections; the two results are merged. With an FP8 cache only the context is quantised.

    Args:
      params: see the module's docstring.
      x: [t, hidden], the new tokens of all requests, packed as for `prefill`.
      cu_seqlens: int32[b + 1], not decreasing.
      context_lens: int32[b], tokens of each request that are in the cache already; 0 for none.
      cache: as in `decode`.
      block_table: int32[b, n], with pages for the context and the new tokens.
      config: the layer's configuration, static.
      max_seqlen: an upper bound of the new tokens of one request, static; by default t. The
        queries to the context are padded to it. The result of a token past it is NaN.
      first_page, num_pages: as in `decode`.
      implementation: as in `flash_attn_varlen_func` and `flash_mla_with_kvcache`.

    Returns:
      ``out`` [t, hidden] in ``config.dtype``, 0 for padding, and the cache.

    Raises:
      ValueError: a wrong shape or dtype, or a cache that does not go with config.
      NotImplementedError: derivatives, or as in the operations.
    """
    op = "chunked_prefill"
    _check_config(op, config)
    _check_params(op, params, param_shapes(config))
    x = _check_input(op, x, config, ("t",))
    cu_seqlens = _check_cu_seqlens(op, cu_seqlens)
    t, b = x.shape[0], cu_seqlens.shape[0] - 1
    context_lens = _check_int32(op, "context_lens", context_lens, (b,), ("b",))
    _check_cache(op, cache, config)
    _checks.check_rank(op, "block_table", block_table, ("b", "n"))
    _check_int32(op, "block_table", block_table, (b, block_table.shape[1]), ("b", "n"))
    s = t if max_seqlen is None else _checks.check_int(op, "max_seqlen", max_seqlen, 1)
    pages = _pages_of_layer(op, cache, first_page, num_pages)

    request_ids, offsets = _unpack(cu_seqlens, t)
    present = offsets >= 0
    context_lens = jnp.maximum(context_lens, 0)
    before = jnp.append(context_lens, 0)[request_ids]  # of no request: 0
    positions = jnp.where(present, before + offsets, -1)
    x = jnp.where(present[:, None], x, 0)
    latents = project_latents(params, x, positions, config)
    queries = project_queries(params, x, positions, config)
    slots = slot_mapping(
        block_table,
        positions,
        cache.page_size,
        request_ids=request_ids,
        num_pages=pages.number,
        page_offset=pages.first,
    )
    # Before the context is read, so that no second copy of the cache need live; these slots are
    # not among those of the context.
    cache = cache.append(latents[0], slots, k_pe=latents[1])
    out, lse = _attend_to_new(params, queries, latents, cu_seqlens, config, implementation)
    if t == 0 or b == 0:  # nothing but padding
        return project_outputs(params, out), cache

    rows = cu_seqlens[:-1, None] + jnp.arange(s, dtype=jnp.int32)
    rows = jnp.where(rows < cu_seqlens[1:, None], rows, t)  # t: past the end, filled with zeros
    absorbed = absorb_queries(params, *queries)
    context_out, context_lse = flash_mla_with_kvcache(
        absorbed.at[rows].get(mode="fill", fill_value=0),
        cache,
        pages.table(block_table),
        context_lens,
        config.kv_lora_rank,
        softmax_scale=config.softmax_scale,
        is_fp8_kvcache=cache.format != "plain",
        implementation=implementation,
    )
    fits = present & (offsets < s)
    at = jnp.where(fits, request_ids * s + offsets, b * s)  # b * s: past the end
    heads, latent = config.num_heads, config.kv_lora_rank
    context_out = context_out.reshape(b * s, heads, latent)
    context_out = context_out.at[at].get(mode="fill", fill_value=0)
    context_lse = jnp.swapaxes(context_lse, 1, 2).reshape(b * s, heads)
    context_lse = context_lse.at[at].get(mode="fill", fill_value=jnp.inf)
    # A token past max_seqlen has not attended to its context. Not a plausible result, but NaN.
    context_lse = jnp.where((present & ~fits)[:, None], jnp.nan, context_lse)

    merged, _ = merge_attention_states(
        [out, expand_outputs(params, context_out)], [lse, context_lse]
    )
    return project_outputs(params, merged), cache
