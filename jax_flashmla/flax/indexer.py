"""The lightning indexer of DeepSeek V3.2: which tokens a token attends to. Needs JAX only.

Beside its attention, each layer of DeepSeek V3.2 has an indexer (DeepSeek Sparse Attention, in the
technical report of DeepSeek-V3.2-Exp). For the token at position t it scores every token s up to
t, and the attention sees the ``index_topk`` tokens of the highest scores only:

    score(t, s) = sum over heads h of  w[t, h] * ReLU(q[t, h] . k[s])

* ``k[s]``, one for all heads: the hidden state of token s times ``wk``, through a LayerNorm.
* ``q[t, h]``: the latent of the attention's queries (`query_latent`) times ``wq_b``.
* ``w[t, h]``: the hidden state of token t times ``weights_proj``, times ``heads ** -0.5 *
  index_head_dim ** -0.5``. In float32.
* RoPE turns the *first* ``qk_rope_head_dim`` columns of q and k, by the same frequencies as in the
  attention. In DeepSeek V3.2 the pairs are half-split, although those of its attention are
  interleaved (the released code had this wrong at first); in GLM-5 they are interleaved.

The functions go in parallel with those of `jax_flashmla.flax.core`: `prefill` for packed
sequences, `decode` for new tokens of requests whose other keys are in a paged cache, a plain
`PagedKVCache` of one head that goes by the same block table and slots as that of the attention.
They return *positions* within each request. `jax_flashmla.token_slots` makes of those the
``indices`` of `jax_flashmla.flax.decode`, and of those alone: no derivative goes through a choice.

The released code also rotates q and k by a Hadamard matrix (``hadamard``) and rounds them to FP8
(``fp8``). A rotation of both changes no product, so without rounding it has no effect. Rounding
decides between tokens of nearly the same score; both are off by default. With ``fp8`` the numbers
are those that the released code multiplies: e4m3 with one power-of-two scale for 128 columns.
bfloat16 holds them exactly, so the cache stays an ordinary one of 2 bytes a column; the released
one packs a token into 132 bytes.

**Parameters** are a dict of arrays of these names and shapes (`param_shapes`), h heads:

================ ========================= =======================================================
``wq_b``         [q_lora_rank, h, dim]
``wk``           [hidden, dim]
``k_norm``       [dim]                     weight of the LayerNorm, float32
``k_norm_bias``  [dim]                     its bias, float32
``weights_proj`` [hidden, h]               float32
================ ========================= =======================================================

The formulas were compared with deepseek-ai/DeepSeek-V3.2-Exp (inference/model.py, kernel.py) and
with huggingface/transformers (models/deepseek_v32, glm_moe_dsa).

**Several devices**: the indexer is small, and a choice needs the scores of all heads. Keep its
parameters and its cache whole on each device, as the released code does, and divide requests.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashmla import _checks
from jax_flashmla import quantization as _q
from jax_flashmla.cache import PagedKVCache, slot_mapping
from jax_flashmla.flax import core
from jax_flashmla.flax.config import MLAConfig, YarnScaling
from jax_flashmla.reference import online_softmax

Array = jax.Array
Params = Mapping[str, Any]

# Columns that share a scale, and the smallest amax, in the released code's act_quant.
_FP8_TILE = 128
_MIN_EXPONENT = math.ceil(math.log2(1e-4 / 448))

# Float32 elements of temporary arrays: scores of all keys, and scores of a block for every head.
_SCORES = 1 << 24
_HEAD_SCORES = 1 << 23
_FINEST_BLOCK = 128  # keys, of packed sequences

# ---------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """Dimensions and constants of an indexer. Hashable, so static.

    Names follow Hugging Face's config.json. Make one of such a file with `from_hf_config`, of the
    attention's configuration with `from_mla`, or of a public model's name with `preset`.

    Attributes:
      hidden_size: columns of the layer's input.
      q_lora_rank: columns of the queries' latent.
      index_n_heads: heads.
      index_head_dim: columns of a head and of a key.
      index_topk: tokens that a token attends to.
      qk_rope_head_dim: columns that are rotated, the first ones of a head; even.
      rope_theta: base of RoPE's wavelengths.
      rope_scaling: None, or a `YarnScaling`.
      rope_layout: ``"half_split"`` (columns i and i + qk_rope_head_dim / 2 turn together, DeepSeek
        V3.2) or ``"interleaved"`` (2i and 2i + 1, GLM-5).
      layer_norm_eps: epsilon of the LayerNorm of the keys.
      hadamard: whether queries and keys are rotated by ``H / sqrt(index_head_dim)``, H the
        Hadamard matrix in Sylvester's order; for a power of two of columns.
      fp8: whether they are then rounded to e4m3 with a power-of-two scale for 128 columns; for
        multiples of 128, in bfloat16 or float32.
      dtype: bfloat16, float16 or float32, of queries and keys. Scores are float32.
      param_dtype: the dtype of ``wq_b`` and ``wk``.
    """

    hidden_size: int
    q_lora_rank: int
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    qk_rope_head_dim: int = 64
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    rope_layout: str = "half_split"
    layer_norm_eps: float = 1e-6
    hadamard: bool = False
    fp8: bool = False
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16

    def __post_init__(self):
        op = "IndexerConfig"
        set_field = object.__setattr__  # the dataclass is frozen
        for name in ("q_lora_rank", "index_n_heads", "index_head_dim", "index_topk"):
            set_field(self, name, _checks.check_int(op, name, getattr(self, name), 1))
        for name in ("hadamard", "fp8"):
            set_field(self, name, _checks.check_bool(op, name, getattr(self, name)))
        eps = _checks.check_scale(op, "layer_norm_eps", self.layer_norm_eps)
        set_field(self, "layer_norm_eps", eps)
        if eps <= 0:
            raise ValueError(f"{op}: argument 'layer_norm_eps' is {eps}; expected a number > 0")
        # The rest is the attention's, and checked there.
        rotation = self._rotation(op)
        for name in ("hidden_size", "qk_rope_head_dim", "rope_theta", "dtype", "param_dtype"):
            set_field(self, name, getattr(rotation, name))
        dim, rope = self.index_head_dim, self.qk_rope_head_dim
        if rope > dim:
            raise ValueError(
                f"{op}: argument 'qk_rope_head_dim' is {rope}; expected at most "
                f"index_head_dim={dim}"
            )
        if self.hadamard and dim & (dim - 1):
            raise ValueError(
                f"{op}: argument 'index_head_dim' is {dim}; expected a power of two for "
                "hadamard=True"
            )
        if self.fp8 and dim % _FP8_TILE:
            raise ValueError(
                f"{op}: argument 'index_head_dim' is {dim}; expected a multiple of {_FP8_TILE} "
                "for fp8=True"
            )
        if self.fp8 and self.dtype == jnp.float16:
            raise ValueError(
                f"{op}: argument 'dtype' is float16; expected bfloat16 or float32 for fp8=True, "
                "whose numbers float16 does not hold"
            )

    def _rotation(self, op: str = "IndexerConfig") -> MLAConfig:
        """What `core.apply_rope` needs to know."""
        try:
            return MLAConfig(
                hidden_size=self.hidden_size,
                num_heads=self.index_n_heads,
                qk_rope_head_dim=self.qk_rope_head_dim,
                rope_theta=self.rope_theta,
                rope_scaling=self.rope_scaling,
                rope_layout=self.rope_layout,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )
        except ValueError as error:
            raise ValueError(str(error).replace("MLAConfig", op, 1)) from None

    @classmethod
    def from_mla(cls, config: MLAConfig, **fields: Any) -> IndexerConfig:
        """An indexer beside an attention: its dimensions, RoPE (half-split) and dtypes.

        Args:
          config: of the attention, with a ``q_lora_rank``.
          **fields: fields that are set to something else.

        Raises:
          ValueError: config is no MLAConfig or has no ``q_lora_rank``.
        """
        op = "IndexerConfig.from_mla"
        core._check_config(op, config)
        if config.q_lora_rank is None:
            raise ValueError(
                f"{op}: argument 'config' has q_lora_rank=None; expected a number, since the "
                "indexer's queries are made of that latent"
            )
        shared = (
            "hidden_size",
            "q_lora_rank",
            "qk_rope_head_dim",
            "rope_theta",
            "rope_scaling",
            "dtype",
            "param_dtype",
        )
        return cls(**({name: getattr(config, name) for name in shared} | fields))

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], **overrides: Any) -> IndexerConfig:
        """Reads the config.json of a Hugging Face checkpoint.

        Model types: deepseek_v32 and glm_moe_dsa (GLM-5).

        Args:
          config: the file's contents.
          **overrides: fields that are set to something else, such as ``fp8``.

        Raises:
          ValueError: a key is missing or has a value that no model of these has; the message names
            it.
          NotImplementedError: another model type, or what `MLAConfig.from_hf_config` refuses.
        """
        op = "IndexerConfig.from_hf_config"
        mla = MLAConfig.from_hf_config(config)
        if "kv_lora_rank" not in config:
            config = config["text_config"]
        model_type = config["model_type"]
        if model_type not in ("deepseek_v32", "glm_moe_dsa"):
            raise NotImplementedError(
                f"{op}: 'model_type' is {model_type!r}; expected deepseek_v32 or glm_moe_dsa, the "
                "models with an indexer"
            )
        fields: dict[str, Any] = {}
        for key in ("index_n_heads", "index_head_dim", "index_topk"):
            if key not in config:
                raise ValueError(f"{op}: key '{key}' is missing from a {model_type} config")
            fields[key] = config[key]
        # Older files of GLM-5 do not say; its code in transformers never asks.
        interleaved = config.get("indexer_rope_interleave", model_type == "glm_moe_dsa")
        fields["rope_layout"] = "interleaved" if interleaved else "half_split"
        return cls.from_mla(mla, **(fields | overrides))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> IndexerConfig:
        """The configuration of a public model.

        Args:
          name: ``"deepseek-v3.2"`` or ``"glm-5"``.
          **overrides: fields that are set to something else, such as ``fp8``.

        Raises:
          ValueError: no such preset.
        """
        # Sources: huggingface/transformers, models/deepseek_v32 and models/glm_moe_dsa (whose
        # defaults are the dimensions of V3.2-Exp and GLM-5); the first also the config.json of
        # DeepSeek-V3.2, of which that repository's history has a copy.
        presets: dict[str, dict[str, Any]] = {
            "deepseek-v3.2": {},
            "glm-5": {"index_n_heads": 32, "rope_layout": "interleaved"},
        }
        _checks.check_choice("IndexerConfig.preset", "name", name, tuple(presets))
        return cls.from_mla(MLAConfig.preset(name), **(presets[name] | overrides))


def _check_config(op: str, config: Any) -> None:
    if not isinstance(config, IndexerConfig):
        raise ValueError(
            f"{op}: argument 'config' is a {type(config).__name__}; expected an IndexerConfig"
        )


# ---------------------------------------------------------------------------------------------
# Parameters


def param_shapes(config: IndexerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters (see the module's docstring)."""
    heads, dim = config.index_n_heads, config.index_head_dim
    return {
        "wq_b": (config.q_lora_rank, heads, dim),
        "wk": (config.hidden_size, dim),
        "k_norm": (dim,),
        "k_norm_bias": (dim,),
        "weights_proj": (config.hidden_size, heads),
    }


def _param_dtype(name: str, config: IndexerConfig) -> Any:
    """The released code keeps all but the two large matrices in float32."""
    return config.param_dtype if name in ("wq_b", "wk") else np.dtype(np.float32)


def init_param(name: str, key: Array, config: IndexerConfig) -> Array:
    """A new parameter: ones and zeros for the norm, else normal with variance 1 / inputs."""
    shape, dtype = param_shapes(config)[name], _param_dtype(name, config)
    if len(shape) == 1:
        return jnp.full(shape, 0 if name == "k_norm_bias" else 1, dtype)
    return (jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5).astype(dtype)


def init_params(key: Array, config: IndexerConfig) -> dict[str, Array]:
    """New parameters, see `init_param`."""
    _check_config("init_params", config)
    names = list(param_shapes(config))
    keys = jax.random.split(key, len(names))
    return {name: init_param(name, k, config) for name, k in zip(names, keys, strict=True)}


def params_from_hf(
    weights: Mapping[str, Any], config: IndexerConfig, *, prefix: str = ""
) -> dict[str, Array]:
    """Parameters from the weights of an indexer in a Hugging Face checkpoint.

    Args:
      weights: arrays by their names in the checkpoint, ``wq_b.weight``, ``wk.weight``,
        ``k_norm.weight``, ``k_norm.bias`` and ``weights_proj.weight``; others are ignored.
        Matrices are [outputs, inputs], not quantised.
      config: of the model.
      prefix: what stands before those names, such as ``"model.layers.0.self_attn.indexer."``.

    Returns:
      The parameters: ``wq_b`` and ``wk`` in ``config.param_dtype``, the others in float32.

    Raises:
      ValueError: a weight is missing or has another shape than config says.
    """
    op = "indexer.params_from_hf"
    _check_config(op, config)
    params = {}
    for name, shape in param_shapes(config).items():
        theirs = "k_norm.bias" if name == "k_norm_bias" else f"{name}.weight"
        stored = shape if len(shape) == 1 else (math.prod(shape[1:]), shape[0])
        value = core._read_weight(op, weights, f"{prefix}{theirs}", stored).T.reshape(shape)
        params[name] = value.astype(_param_dtype(name, config))
    return params


# ---------------------------------------------------------------------------------------------
# Pieces


def query_latent(params: Params, x: Array, config: MLAConfig) -> Array:
    """The latent of the attention's queries after its norm, which the indexer shares.

    Args:
      params: of the *attention* (``q_a_proj`` and ``q_a_norm`` are used).
      x: [..., hidden].
      config: of the attention.

    Returns:
      [..., q_lora_rank] in ``config.dtype``. Under ``jit`` XLA computes it once for indexer and
      attention.

    Raises:
      ValueError: queries of the attention have no latent (``q_lora_rank`` is None).
    """
    op = "query_latent"
    core._check_config(op, config)
    if config.q_lora_rank is None:
        raise ValueError(f"{op}: argument 'config' has q_lora_rank=None; expected a number")
    core._check_params(op, params, core.param_shapes(config))
    _checks.check_array(op, "x", x, "(..., hidden_size)")
    lead = tuple(f"axis_{i}" for i in range(len(x.shape) - 1))
    latent = core._project(
        "...m,mr->...r", core._check_input(op, x, config, lead), params["q_a_proj"]
    )
    return core.rms_norm(latent, params["q_a_norm"], config.rms_norm_eps)


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """``(x - mean) / sqrt(variance + epsilon) * weight + bias`` over the last axis, in float32.

    In the dtype of x.
    """
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@functools.cache
def _hadamard_matrix(dim: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * np.float32(dim**-0.5)


def hadamard_transform(x: Array) -> Array:
    """``x @ H / sqrt(d)`` over the last axis of d columns, a power of two, in x's dtype.

    H is the Hadamard matrix in Sylvester's order, its own transpose. The rotation is orthogonal:
    products of two vectors stay, and outliers in single columns are spread over all.
    """
    dim = x.shape[-1] if x.shape else 0
    if dim < 1 or dim & (dim - 1):
        raise ValueError(
            f"hadamard_transform: argument 'x' has shape {tuple(x.shape)}; expected (..., d) with "
            "d a power of two"
        )
    matrix = jnp.asarray(_hadamard_matrix(dim))
    return online_softmax.product("...d,de->...e", x.astype(jnp.float32), matrix).astype(x.dtype)


def round_to_fp8(x: Array) -> Array:
    """The nearest numbers to x [..., d] that e4m3 with a scale for 128 columns holds; x's dtype.

    The scale is ``max(amax, 1e-4) / 448`` of the 128 columns, rounded up to a power of two, as the
    released code's for ``scale_fmt`` "ue8m0". Exact in bfloat16 and float32, on every backend.
    """
    if not x.shape or x.shape[-1] % _FP8_TILE:
        raise ValueError(
            f"round_to_fp8: argument 'x' has shape {tuple(x.shape)}; expected (..., d) with d a "
            f"multiple of {_FP8_TILE}"
        )
    bits = _q._float32_bits(x).reshape(*x.shape[:-1], x.shape[-1] // _FP8_TILE, _FP8_TILE)
    magnitude = bits & 0x7FFFFFFF
    amax = _q._amax_bits(magnitude)
    # 448 is 1.75 * 2**8. On the bits, since a quotient near a power of two could round over it.
    scale = (amax >> 23) - 127 - 8 + ((amax & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    scale = jnp.maximum(scale, _MIN_EXPONENT)[..., None]
    exponent, significand = _q._split(magnitude)
    codes = _q._pack_codes(bits, _q._e4m3_code(exponent - scale, significand))
    values = _q._scale_bits(_q._e4m3_to_float32_bits(codes), jnp.broadcast_to(scale, bits.shape))
    return lax.bitcast_convert_type(values, jnp.float32).reshape(x.shape).astype(x.dtype)


def _rotate(x: Array, positions: Array, config: IndexerConfig) -> Array:
    """What queries and keys have in common: RoPE, and the two options."""
    turned, rest = jnp.split(x, [config.qk_rope_head_dim], axis=-1)
    turned = core.apply_rope(turned, positions, config._rotation())
    x = jnp.concatenate([turned, rest], axis=-1)
    if config.hadamard:
        x = hadamard_transform(x)
    return round_to_fp8(x) if config.fp8 else x


def index_keys(params: Params, x: Array, positions: Array, config: IndexerConfig) -> Array:
    """Keys [..., dim] of x [..., hidden] at positions int32[...], in ``config.dtype``."""
    k = core._project("...m,md->...d", x.astype(config.dtype), params["wk"])
    k = layer_norm(k, params["k_norm"], params["k_norm_bias"], config.layer_norm_eps)
    return _rotate(k, positions, config)


def index_queries(
    params: Params, q_latent: Array, positions: Array, config: IndexerConfig
) -> Array:
    """Queries [..., h, dim] of q_latent [..., q_lora_rank] at positions int32[...]."""
    q = core._project("...r,rhd->...hd", q_latent.astype(config.dtype), params["wq_b"])
    return _rotate(q, positions, config)


def index_weights(params: Params, x: Array, config: IndexerConfig) -> Array:
    """Weights of the heads float32[..., h] of x [..., hidden], with both factors of the scores."""
    projection = params["weights_proj"].astype(jnp.float32)
    weights = online_softmax.product("...m,mh->...h", x.astype(jnp.float32), projection)
    return weights * np.float32((config.index_n_heads * config.index_head_dim) ** -0.5)


def index_scores(q: Array, weights: Array, k: Array) -> Array:
    """Scores float32[..., s, t]: the sum over heads of ``weights * ReLU(q . k)``.

    Args:
      q: [..., s, h, dim], of `index_queries`.
      weights: float32[..., s, h], of `index_weights`.
      k: [..., t, dim], of `index_keys`. Every query is scored with every key, in one array
        [..., s, h, t]; `decode` and `prefill` go by blocks.
    """
    products = jnp.einsum(
        "...shd,...td->...sht",
        q,
        k,
        precision=lax.Precision.HIGHEST,  # of float32; 16-bit products are exact anyway
        preferred_element_type=jnp.float32,
    )
    return online_softmax.product("...sht,...sh->...st", jnp.maximum(products, 0), weights)


# ---------------------------------------------------------------------------------------------
# Choosing


def _best_columns(
    q: Array,
    weights: Array,
    first: Array,
    last: Array,
    load: Callable[[Array], tuple[Array, Array]],
    *,
    block: int,
    blocks: int,
    topk: int,
) -> Array:
    """int32 [m, s, topk]: the columns of the highest scores, best first, then -1.

    Args:
        q: [m, s, h, dim].
        weights: float32 [m, s, h].
        first, last: int32 [m, s], the columns that each query sees, none if last < first.
        load: number of a block -> its keys [m, block, dim] or [block, dim], and which of them
            there are, bool of the same shape without dim.
        block: columns of a block.
        blocks: blocks that there are.
        topk: columns of the result.
    """
    sees = first <= last
    begin = jnp.min(jnp.where(sees, first, blocks * block), initial=blocks * block) // block
    end = jnp.max(jnp.where(sees, last, -1), initial=-1) // block + 1

    def one_block(number, scores):
        keys, present = load(number)
        new = index_scores(q, weights, keys)
        # All of them above -inf, which is for columns that are not seen; NaN on top, where it
        # shows.
        new = jnp.where(jnp.isnan(new), jnp.inf, jnp.maximum(new, jnp.finfo(jnp.float32).min))
        column = number * block + jnp.arange(block, dtype=jnp.int32)
        visible = (first[..., None] <= column) & (column <= last[..., None])
        new = jnp.where(visible & present[..., None, :], new, -jnp.inf)
        return lax.dynamic_update_slice_in_dim(scores, new, number * block, axis=2)

    scores = jnp.full((*q.shape[:2], blocks * block), -jnp.inf, jnp.float32)
    scores = lax.fori_loop(begin, end, one_block, scores)
    found = min(topk, blocks * block)
    best, columns = lax.top_k(scores, found)
    columns = jnp.where(best > -jnp.inf, columns.astype(jnp.int32), -1)
    return jnp.pad(columns, ((0, 0), (0, 0), (0, topk - found)), constant_values=-1)


def _rows_at_once(columns: int, unit: int, config: IndexerConfig) -> int:
    """Queries whose scores are in memory at the same time, if blocks have at least ``unit``."""
    widest = max(config.index_n_heads, config.index_head_dim)
    return max(min(_SCORES // max(columns, 1), _HEAD_SCORES // (unit * widest)), 1)


def _units_at_once(rows: int, units: int, unit: int, config: IndexerConfig) -> int:
    """Units of a block of keys for so many queries."""
    widest = max(config.index_n_heads, config.index_head_dim)
    return max(min(_HEAD_SCORES // (rows * unit * widest), units), 1)


def _check_input(op: str, name: str, value: Any, lead: tuple[str, ...], width: int, dim: str):
    _checks.check_rank(op, name, value, (*lead, dim))
    _checks.check_dtype(op, name, value, (jnp.bfloat16, jnp.float16, jnp.float32))
    _checks.check_shape(op, name, value, (*value.shape[:-1], width), (*lead, dim))
    return jnp.asarray(value)


def _check_inputs(
    op: str, params: Any, x: Any, q_latent: Any, config: Any, lead: tuple[str, ...]
) -> tuple[Array, Array]:
    _check_config(op, config)
    core._check_params(op, params, param_shapes(config))
    x = _check_input(op, "x", x, lead, config.hidden_size, "hidden_size")
    q_latent = _check_input(op, "q_latent", q_latent, lead, config.q_lora_rank, "q_lora_rank")
    dims = (*lead, "q_lora_rank")
    _checks.check_shape(op, "q_latent", q_latent, (*x.shape[:-1], config.q_lora_rank), dims)
    return x, q_latent


class PrefillResult(NamedTuple):
    """What `prefill` returns.

    Attributes:
      indices: int32[t, index_topk], positions in the token's sequence, best first, then -1.
      rows: int32[t, index_topk], the same as rows of the packed tokens, for the ``indices`` of
        `flash_mla_sparse_fwd`.
      keys: [t, dim] in ``config.dtype``, the tokens' keys for a cache (`empty_cache`).
      positions: int32[t], positions in their sequences, -1 for padding.
      request_ids: int32[t], the numbers of their sequences, b for padding. `slot_mapping` makes
        the keys' slots of these two.
    """

    indices: Array
    rows: Array
    keys: Array
    positions: Array
    request_ids: Array


def prefill(
    params: Params, x: Array, q_latent: Array, cu_seqlens: Array, *, config: IndexerConfig
) -> PrefillResult:
    """Chooses for each token among the tokens of its sequence up to itself; packed sequences.

    Args:
      params: see the module's docstring.
      x: [t, hidden], bfloat16, float16 or float32, the layer's input; sequence ``i`` has the rows
        ``cu_seqlens[i] : cu_seqlens[i + 1]``. Rows in none are padding: they may hold anything.
      q_latent: [t, q_lora_rank], of `query_latent`.
      cu_seqlens: int32[b + 1], not decreasing.
      config: the indexer's configuration, static.

    Returns:
      A `PrefillResult`. Among equal scores the earlier token is chosen first.

    Raises:
      ValueError: a wrong shape or dtype.
    """
    op = "indexer.prefill"
    x, q_latent = _check_inputs(op, params, x, q_latent, config, ("t",))
    cu_seqlens = core._check_cu_seqlens(op, cu_seqlens)
    t, topk = x.shape[0], config.index_topk
    request_ids, positions = core._unpack(cu_seqlens, t)
    present = (positions >= 0)[:, None]
    x, q_latent = jnp.where(present, x, 0), jnp.where(present, q_latent, 0)
    keys = index_keys(params, x, positions, config)
    if t == 0:
        none = jnp.zeros((0, topk), jnp.int32)
        return PrefillResult(none, none, keys, positions, request_ids)

    unit = min(_FINEST_BLOCK, t)
    at_once = _rows_at_once(t, unit, config)
    block = unit * _units_at_once(min(at_once, t), -(-t // unit), unit, config)
    blocks = -(-t // block)
    padded = jnp.pad(keys, ((0, blocks * block - t), (0, 0)))
    row = jnp.where(positions >= 0, jnp.arange(t, dtype=jnp.int32), -1)

    def choose(x, q_latent, positions, row):
        q = index_queries(params, q_latent, positions, config)

        def load(number):
            number, whole = online_softmax.in_this_step(number, padded)
            taken = lax.dynamic_slice_in_dim(whole, number * block, block)
            return taken, jnp.ones(block, bool)

        first = jnp.where(row >= 0, row - positions, 0)
        rows = _best_columns(
            q[None],
            index_weights(params, x, config)[None],
            first[None],
            row[None],
            load,
            block=block,
            blocks=blocks,
            topk=topk,
        )[0]
        return rows, jnp.where(rows >= 0, rows - first[:, None], -1)

    rows, indices = online_softmax.map_chunks(
        choose,
        (x, q_latent, positions, row),
        (0, 0, -1, -1),
        at_once,
    )
    return PrefillResult(indices, rows, keys, positions, request_ids)


def empty_cache(
    config: IndexerConfig, num_pages: int, page_size: int = 64, *, num_layers: int = 1
) -> PagedKVCache:
    """A cache of zeros for the keys: plain, one head of ``index_head_dim`` columns.

    Args:
      config: the indexer's configuration.
      num_pages: pages of one layer, as many as the attention's cache has.
      page_size: tokens of a page, as in the attention's cache.
      num_layers: layers that share the cache; that of layer l begins at page ``l * num_pages``.

    Raises:
      ValueError: a bad value.
    """
    op = "indexer.empty_cache"
    _check_config(op, config)
    pages = _checks.check_int(op, "num_pages", num_pages, 0)
    pages *= _checks.check_int(op, "num_layers", num_layers, 1)
    return PagedKVCache.zeros(pages, page_size, head_dim=config.index_head_dim, dtype=config.dtype)


def _check_cache(op: str, cache: Any, config: IndexerConfig) -> None:
    if not isinstance(cache, PagedKVCache):
        raise ValueError(
            f"{op}: argument 'cache' is a {type(cache).__name__}; expected a PagedKVCache"
        )
    found = (cache.format, cache.num_heads_k, cache.head_dim, cache.dtype)
    expected = ("plain", 1, config.index_head_dim, config.dtype)
    if found != expected:
        form = "format {!r}, {} key heads of {} columns in {}"
        raise ValueError(
            f"{op}: argument 'cache' has {form.format(*found)}; expected {form.format(*expected)}, "
            "to go with config (indexer.empty_cache makes one)"
        )


def decode(
    params: Params,
    x: Array,
    q_latent: Array,
    positions: Array,
    cache: PagedKVCache,
    block_table: Array,
    *,
    config: IndexerConfig,
    first_page: Array | int = 0,
    num_pages: int | None = None,
) -> tuple[Array, PagedKVCache]:
    """Writes the keys of new tokens to the cache and chooses for each among those up to itself.

    Also for the chunks of a long prompt, with many new tokens of each request.

    Args:
      params: see the module's docstring.
      x: [b, s, hidden], bfloat16, float16 or float32, the layer's input at the s new tokens of
        each request.
      q_latent: [b, s, q_lora_rank], of `query_latent`.
      positions: int32[b, s], positions in the request, as for `jax_flashmla.flax.decode`: negative
        for padding, whose x and q_latent may hold anything.
      cache: a `PagedKVCache` as `empty_cache` makes it. Donate it for an update in place.
      block_table: int32[b, n], pages of each request, counted from 0 in each layer: the same as
        for the attention.
      config: the indexer's configuration, static.
      first_page: the layer's first page if several share the cache, else 0.
      num_pages: pages of one layer; needed with ``first_page``.

    Returns:
      ``indices`` int32[b, s, index_topk], positions in the request, best first, then -1 (also
      where the table has no page for a position), and the cache. Among equal scores the earlier
      token is chosen first. Give ``token_slots(indices, block_table, page_size, num_pages=...)``
      to `jax_flashmla.flax.decode`; where layers share a choice, to all of them.

    Raises:
      ValueError: a wrong shape or dtype, or a cache that does not go with config.
    """
    op = "indexer.decode"
    x, q_latent = _check_inputs(op, params, x, q_latent, config, ("b", "s"))
    b, s = x.shape[:2]
    positions = core._check_int32(op, "positions", positions, (b, s), ("b", "s"))
    _check_cache(op, cache, config)
    _checks.check_rank(op, "block_table", block_table, ("b", "n"))
    n = block_table.shape[1]
    block_table = core._check_int32(op, "block_table", block_table, (b, n), ("b", "n"))
    pages = core._pages_of_layer(op, cache, first_page, num_pages)

    present = (positions >= 0)[..., None]
    x, q_latent = jnp.where(present, x, 0), jnp.where(present, q_latent, 0)
    page_size, topk = cache.page_size, config.index_topk
    slots = slot_mapping(
        block_table, positions, page_size, num_pages=pages.number, page_offset=pages.first
    )
    cache = cache.append(index_keys(params, x, positions, config), slots)
    if 0 in (b, s, n) or cache.num_pages == 0:
        return jnp.full((b, s, topk), -1, jnp.int32), cache

    # Rows of the table with several queries each; of many queries, a row for each part of them.
    at_once = _rows_at_once(n * page_size, page_size, config)
    parts = -(-s // min(s, at_once))
    each = -(-s // parts)
    rows = min(max(at_once // each, 1), b * parts)
    pages_at_once = _units_at_once(rows * each, n, page_size, config)
    blocks = -(-n // pages_at_once)
    table = pages.table(block_table)
    table = jnp.where((table >= 0) & (table < cache.num_pages), table, -1)
    table = jnp.pad(table, ((0, 0), (0, blocks * pages_at_once - n)), constant_values=-1)

    def divide(array, fill):
        padding = [(0, 0), (0, parts * each - s)] + [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, padding, constant_values=fill)
        return array.reshape(b * parts, each, *array.shape[2:])

    def choose(x, q_latent, positions, table):
        q = index_queries(params, q_latent, positions, config)

        def load(number):
            number, data = online_softmax.in_this_step(number, cache.data)
            taken = lax.dynamic_slice_in_dim(table, number * pages_at_once, pages_at_once, axis=1)
            keys = _q.gather_pages(
                data, jnp.maximum(taken, 0), cache_format="plain", page_size=page_size
            )
            keys = keys.reshape(len(taken), -1, config.index_head_dim)
            return keys, jnp.repeat(taken >= 0, page_size, axis=1)

        return _best_columns(
            q,
            index_weights(params, x, config),
            jnp.zeros_like(positions),
            positions,
            load,
            block=pages_at_once * page_size,
            blocks=blocks,
            topk=topk,
        )

    indices = online_softmax.map_chunks(
        choose,
        (
            divide(x, 0),
            divide(q_latent, 0),
            divide(positions, -1),
            jnp.repeat(table, parts, axis=0),
        ),
        (0, 0, -1, -1),
        rows,
    )
    return indices.reshape(b, parts * each, topk)[:, :s], cache
