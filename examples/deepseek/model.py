"""The decoder of DeepSeek V2, V2-Lite, V3 and R1, with the attention of `jax_flashmla.flax`.

Parameters are one tree of arrays (``checkpoint.py`` reads it). A run of layers of the same kind is
stacked along axis 0 and scanned, so that 61 layers compile as fast as two:

    embed           [vocabulary, hidden]
    runs            a list of runs, each a dict of arrays with the run's layers in front:
      attention       the dict of `jax_flashmla.flax.core`
      attention_norm  [hidden]
      mlp_norm        [hidden]
      mlp             gate and up [columns, hidden], down [hidden, columns]: the dense MLP, or the
                      shared experts of a mixture
      router          [experts, hidden], float32, only with a mixture, as the next two
      router_bias     [experts], float32, only with sigmoid scores (V3)
      experts         gate and up [experts, columns, hidden], down [experts, hidden, columns]
    norm            [hidden]
    unembed         [vocabulary, hidden]

All layers share one cache: with N pages a layer, those of layer l are N * l and up. Everything
works under ``jit`` with ``config`` static, and inside ``shard_map`` (see ``parallel.py``): then
``axis`` is the mesh axis over which heads and columns are divided.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashmla import PagedKVCache, slot_mapping
from jax_flashmla.flax import MLAConfig, core

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")


class CheckpointError(ValueError):
    """A checkpoint is not one of a model that this example can run; the message says why."""


# ---------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """A mixture-of-experts MLP and its router.

    Attributes:
      num_experts: experts among which the router chooses.
      num_chosen: experts of each token.
      columns: width of an expert.
      num_shared: experts that every token has in addition.
      scores: ``"softmax"`` (V2) or ``"sigmoid"`` (V3, with a bias that counts for the choice only).
      num_groups, num_chosen_groups: experts are chosen within that many of the groups.
      normalise: whether the weights of a token's experts are divided by their sum.
      scale: factor of the weights.
    """

    num_experts: int
    num_chosen: int
    columns: int
    num_shared: int
    scores: str
    num_groups: int
    num_chosen_groups: int
    normalise: bool
    scale: float


@dataclasses.dataclass(frozen=True)
class Config:
    """A model. Hashable, so static under ``jit``.

    Attributes:
      attention: configuration of the attention layers, with the model's hidden size and dtypes.
      vocab_size: rows of the embedding.
      intermediate_size: columns of a dense MLP.
      rms_norm_eps: epsilon of the norms around the layers.
      max_length: tokens that the model has positions for.
      mixture: None for a model without experts.
      mixture_layers: for each layer whether its MLP is the mixture.
      tied: whether the embedding is also the output projection.
      eos: tokens that end a text.
    """

    attention: MLAConfig
    vocab_size: int
    intermediate_size: int
    rms_norm_eps: float
    max_length: int
    mixture: MixtureConfig | None
    mixture_layers: tuple[bool, ...]
    tied: bool
    eos: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """All layers."""
        return len(self.mixture_layers)

    @property
    def runs(self) -> list[tuple[bool, range]]:
        """Layers of the same kind in a row: whether they are mixtures, and their numbers."""
        runs, first = [], 0
        for kind, layers in itertools.groupby(self.mixture_layers):
            count = len(list(layers))
            runs.append((kind, range(first, first + count)))
            first += count
        return runs

    def divided(self, devices: int) -> Config:
        """The configuration of one of several devices among which heads are divided."""
        heads = self.attention.num_heads // devices
        return dataclasses.replace(
            self, attention=dataclasses.replace(self.attention, num_heads=heads)
        )

    @classmethod
    def from_hf(cls, config: dict, dtype=None) -> Config:
        """Reads the contents of a config.json.

        Args:
          config: the file's contents.
          dtype: of computation and parameters; by default the one in the file.

        Raises:
          CheckpointError: a key is missing, or what it says is not implemented.
        """
        if config.get("model_type") not in MODEL_TYPES:
            raise CheckpointError(
                f"model_type is {config.get('model_type')!r}; this example runs "
                f"{', '.join(MODEL_TYPES)}"
            )
        get = _Reader(config)
        get.expect("hidden_act", "silu")
        get.expect("mlp_bias", False)
        get.expect("num_key_value_heads", config.get("num_attention_heads"), None)
        overrides = {} if dtype is None else {"dtype": dtype, "param_dtype": dtype}
        try:
            attention = MLAConfig.from_hf_config(config, **overrides)
        except (ValueError, NotImplementedError) as error:
            raise CheckpointError(f"config.json: {error}") from error
        mixture = _read_mixture(get) if config.get("n_routed_experts") else None
        dense = get("first_k_dense_replace") if mixture else 0
        every = get("moe_layer_freq", 1)
        layers = range(get("num_hidden_layers"))
        eos = get("eos_token_id", None)
        return cls(
            attention=attention,
            vocab_size=get("vocab_size"),
            intermediate_size=get("intermediate_size"),
            rms_norm_eps=get("rms_norm_eps"),
            max_length=get("max_position_embeddings"),
            mixture=mixture,
            mixture_layers=tuple(
                mixture is not None and i >= dense and i % every == 0 for i in layers
            ),
            tied=bool(get("tie_word_embeddings", False)),
            eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )


class _Reader:
    """Keys of a config.json, with errors that name them."""

    def __init__(self, config: dict):
        self.config = config

    def __call__(self, key: str, *default):
        value = self.config.get(key)  # null is as good as missing
        if value is None and not default:
            raise CheckpointError(f"config.json: key '{key}' is missing")
        return default[0] if value is None else value

    def expect(self, key: str, *values) -> None:
        found = self.config.get(key, values[0])
        if found not in values:
            raise CheckpointError(
                f"config.json: '{key}' is {found!r}, which is not implemented; expected "
                f"{' or '.join(map(repr, values))}"
            )


def _read_mixture(get: _Reader) -> MixtureConfig:
    v2 = get("model_type") == "deepseek_v2"
    # transformers leaves out of a file what it has no choice in.
    method = get("topk_method", "greedy" if v2 else "noaux_tc")
    methods = {
        "greedy": "softmax",
        "group_limited_greedy": "softmax",
        "noaux_tc": "sigmoid",
    }
    if method not in methods:
        raise CheckpointError(
            f"config.json: 'topk_method' is {method!r}, which is not implemented; expected one of "
            f"{', '.join(methods)}"
        )
    get.expect("scoring_func", methods[method])
    mixture = MixtureConfig(
        num_experts=get("n_routed_experts"),
        num_chosen=get("num_experts_per_tok"),
        columns=get("moe_intermediate_size"),
        num_shared=get("n_shared_experts", 0),
        scores=methods[method],
        num_groups=1 if method == "greedy" else get("n_group"),
        num_chosen_groups=1 if method == "greedy" else get("topk_group"),
        normalise=bool(get("norm_topk_prob")),
        scale=float(get("routed_scaling_factor")),
    )
    # DeepSeek's V2 code scales or normalises, its V3 code does both, transformers never normalises
    # in V2; and they differ in whether the weight of a single expert is normalised. No public
    # model depends on it.
    if mixture.normalise and (mixture.num_chosen == 1 or (v2 and mixture.scale != 1)):
        raise CheckpointError(
            f"config.json: 'norm_topk_prob' is true with num_experts_per_tok={mixture.num_chosen} "
            f"and routed_scaling_factor={mixture.scale}, on which implementations of "
            f"{get('model_type')} do not agree"
        )
    size, rest = divmod(mixture.num_experts, mixture.num_groups)
    if rest or (mixture.num_groups > 1 and mixture.scores == "sigmoid" and size < 2):
        raise CheckpointError(
            f"config.json: n_routed_experts={mixture.num_experts} does not divide into "
            f"n_group={mixture.num_groups} groups"
        )
    if not (
        0 < mixture.num_chosen_groups <= mixture.num_groups
        and 0 < mixture.num_chosen <= mixture.num_chosen_groups * size
    ):
        raise CheckpointError(
            f"config.json: num_experts_per_tok={mixture.num_chosen} experts cannot be chosen from "
            f"topk_group={mixture.num_chosen_groups} of {mixture.num_groups} groups of {size}"
        )
    return mixture


# ---------------------------------------------------------------------------------------------
# The MLPs


def linear(x, weight):
    """``x @ weight.T``: matrices are [outputs, inputs], as in checkpoints."""
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


def gated_mlp(x, weights):
    """SwiGLU."""
    hidden = jax.nn.silu(linear(x, weights["gate"])) * linear(x, weights["up"])
    return linear(hidden, weights["down"])


def route(x, router, bias, mixture: MixtureConfig):
    """The experts of each token of x [t, hidden], int32[t, k], and their weights, float32[t, k]."""
    logits = jnp.dot(x.astype(jnp.float32), router.T, precision=lax.Precision.HIGHEST)
    # What an expert is chosen by, and what is then its weight.
    if mixture.scores == "softmax":
        merit = scores = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
        merit = scores + bias
    if mixture.num_groups > 1:
        groups = merit.reshape(len(x), mixture.num_groups, -1)
        best = lax.top_k(groups, 1 if mixture.scores == "softmax" else 2)[0].sum(axis=-1)
        _, chosen_groups = lax.top_k(best, mixture.num_chosen_groups)
        allowed = (chosen_groups[..., None] == jnp.arange(mixture.num_groups)).any(axis=1)
        merit = jnp.where(allowed[..., None], groups, -jnp.inf).reshape(merit.shape)
    _, chosen = lax.top_k(merit, mixture.num_chosen)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if mixture.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * mixture.scale


def apply_experts(x, chosen, weights, experts, num_experts: int, first_expert=0):
    """The weighted sum of each token's experts.

    Tokens are sorted by expert and cut into blocks, each of one expert, and the blocks are done one
    after the other. So the work grows with the tokens and not with tokens times experts, and no
    token is ever dropped. (``jax.lax.ragged_dot`` multiplies every token with every expert outside
    TPUs.)

    Args:
      x: [t, hidden].
      chosen, weights: [t, k], of `route`.
      experts: matrices of the experts of one or several layers, along axis 0.
      num_experts: how many experts a layer has.
      first_expert: where this layer's begin. (A slice of them would be copied.)
    """
    t, k = chosen.shape
    pairs = t * k
    most = min(pairs, num_experts)  # experts that may have tokens
    block = min(max(8, 1 << (pairs // num_experts).bit_length()), 128)
    num_blocks = (pairs + most * (block - 1)) // block  # enough however the tokens are spread

    expert_of_pair = chosen.reshape(-1)
    order = jnp.argsort(expert_of_pair)  # pairs by expert; pair p is of token p // k
    counts = jnp.bincount(expert_of_pair, length=num_experts)
    ends, block_ends = jnp.cumsum(counts), jnp.cumsum(-(-counts // block))
    index = jnp.arange(num_blocks)
    expert = jnp.searchsorted(block_ends, index, side="right")
    expert = jnp.minimum(expert, num_experts - 1)  # of blocks that are not needed: the last one
    first_block = block_ends[expert] + -counts[expert] // block
    row = (ends - counts)[expert] + (index - first_block) * block
    row = row[:, None] + jnp.arange(block)
    # Past the end of the expert: no pair.
    pair = jnp.where(row < ends[expert][:, None], order[jnp.minimum(row, pairs - 1)], pairs)

    def one_block(_, inputs):
        expert, pair = inputs
        rows = x.at[pair // k].get(mode="fill", fill_value=0)
        matrices = {name: experts[name][expert] for name in ("gate", "up", "down")}
        return None, gated_mlp(rows, matrices)

    _, results = lax.scan(one_block, None, (first_expert + expert, pair))
    by_pair = jnp.zeros((pairs, x.shape[1]), x.dtype)
    by_pair = by_pair.at[pair.reshape(-1)].set(results.reshape(-1, x.shape[1]), mode="drop")
    by_pair = by_pair.reshape(t, k, -1).astype(jnp.float32)
    return jnp.einsum("tk,tkh->th", weights, by_pair).astype(x.dtype)


# ---------------------------------------------------------------------------------------------
# The decoder


def _total(x, axis: str | None):
    return x if axis is None else lax.psum(x, axis)


def feed_forward(weights, x, config: Config, experts=None, layer=0):
    """The MLP of a layer, dense or a mixture: x [..., hidden]. Sum the results of several devices.

    Args:
      weights: the layer's parameters but the experts.
      x: the normalised input.
      config: the model's.
      experts: those of all layers of the run, or None.
      layer: the layer's number in the run.
    """
    out = gated_mlp(x, weights["mlp"]) if "mlp" in weights else jnp.zeros_like(x)
    if experts is None:
        return out
    tokens = x.reshape(-1, x.shape[-1])
    mixture = config.mixture
    chosen, share = route(tokens, weights["router"], weights.get("router_bias"), mixture)
    flat = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), experts)
    routed = apply_experts(
        tokens, chosen, share, flat, mixture.num_experts, layer * mixture.num_experts
    )
    return out + routed.reshape(x.shape)


def run_layers(run, layers: range, x, cache, attend, config: Config, axis: str | None = None):
    """The layers of one run. Returns x and the cache.

    Args:
      run: parameters of the layers, stacked.
      layers: their numbers in the model.
      x: [..., hidden].
      cache: of all layers.
      attend: ``(attention parameters, x, cache, layer) -> (out, cache)``.
      config: the model's.
      axis: the mesh axis to sum over, if any.
    """
    # Not scanned over: a slice of a layer's experts would be a copy of all of them.
    experts = run.get("experts")
    scanned = {name: value for name, value in run.items() if name != "experts"}

    def layer(carry, inputs):
        x, cache = carry
        index, weights = inputs
        normed = core.rms_norm(x, weights["attention_norm"], config.rms_norm_eps)
        out, cache = attend(weights["attention"], normed, cache, layers.start + index)
        x = x + _total(out, axis)
        normed = core.rms_norm(x, weights["mlp_norm"], config.rms_norm_eps)
        x = x + _total(feed_forward(weights, normed, config, experts, index), axis)
        return (x, cache), None

    index = jnp.arange(len(layers), dtype=jnp.int32)
    (x, cache), _ = lax.scan(layer, (x, cache), (index, scanned))
    return x, cache


def _decoder(params, tokens, cache, attend, config: Config, axis: str | None):
    x = params["embed"][tokens].astype(config.attention.dtype)
    for run, (_, layers) in zip(params["runs"], config.runs, strict=True):
        x, cache = run_layers(run, layers, x, cache, attend, config, axis)
    return core.rms_norm(x, params["norm"], config.rms_norm_eps), cache


def prefill(
    params,
    tokens,
    cu_seqlens,
    cache: PagedKVCache,
    block_table,
    *,
    config: Config,
    axis: str | None = None,
    implementation: str | None = None,
):
    """Whole prompts: tokens int32[t], packed with limits cu_seqlens int32[b + 1].

    Returns:
      The last hidden state of every token, [t, hidden], and the cache with all tokens written to
      the pages in block_table int32[b, n].
    """
    num_pages = cache.num_pages // config.num_layers

    def attend(weights, x, cache, layer):
        result = core.prefill(
            weights, x, cu_seqlens, config=config.attention, implementation=implementation
        )
        slots = slot_mapping(
            block_table,
            result.positions,
            cache.page_size,
            request_ids=result.request_ids,
            num_pages=num_pages,
            page_offset=layer * num_pages,
        )
        return result.out, cache.append(result.kv_c, slots, k_pe=result.k_pe)

    return _decoder(params, tokens, cache, attend, config, axis)


def decode(
    params,
    tokens,
    positions,
    cache: PagedKVCache,
    block_table,
    *,
    config: Config,
    axis: str | None = None,
    implementation: str | None = None,
):
    """The next tokens of requests: tokens and positions int32[b, s], -1 in rows without a request.

    Returns:
      The last hidden states, [b, s, hidden], and the cache.
    """
    num_pages = cache.num_pages // config.num_layers
    schedule = core.make_schedule(config.attention, positions)  # one for all layers

    def attend(weights, x, cache, layer):
        return core.decode(
            weights,
            x,
            positions,
            cache,
            block_table,
            config=config.attention,
            schedule=schedule,
            first_page=layer * num_pages,
            num_pages=num_pages,
            implementation=implementation,
        )

    return _decoder(params, tokens, cache, attend, config, axis)


def logits(params, hidden, axis: str | None = None):
    """Scores of all tokens, float32 [..., vocabulary], from hidden states."""
    scores = jnp.einsum(
        "...h,vh->...v",
        hidden,
        params["unembed"].astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    return (
        scores if axis is None else lax.all_gather(scores, axis, axis=scores.ndim - 1, tiled=True)
    )
