"""The layer and the indexer as Flax NNX modules.

They need Flax: ``pip install 'jax_flashmla[flax]'``.
"""

from __future__ import annotations

from typing import Any

import jax

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "jax_flashmla.flax.nnx needs Flax, which is not installed or does not fit this JAX "
        f"({error}): pip install 'jax_flashmla[flax]'"
    ) from error

from jax_flashmla.cache import PagedKVCache
from jax_flashmla.flax import core, indexer
from jax_flashmla.flax.config import MLAConfig
from jax_flashmla.flax.indexer import IndexerConfig

Array = jax.Array


class MultiHeadLatentAttention(nnx.Module):
    """Multi-head latent attention: the functions of `jax_flashmla.flax.core` with parameters.

    Each parameter is an ``nnx.Param`` attribute, with the names and shapes that are listed in
    `jax_flashmla.flax.core`. The cache is no state of the module: it is an argument and a result,
    so that all layers of a model can share one and a jitted step can donate it.
    """

    def __init__(self, config: MLAConfig, *, rngs: nnx.Rngs):
        core._check_config("MultiHeadLatentAttention", config)
        self.config = config
        for name in core.param_shapes(config):
            setattr(self, name, nnx.Param(core.init_param(name, rngs.params(), config)))

    @property
    def params(self) -> dict[str, Array]:
        """The parameters as `core` takes them."""
        return {name: getattr(self, name)[...] for name in core.param_shapes(self.config)}

    def query_latent(self, x: Array) -> Array:
        """`jax_flashmla.flax.indexer.query_latent` of x [..., hidden], for a `LightningIndexer`."""
        return indexer.query_latent(self.params, x, self.config)

    def __call__(self, x: Array, cu_seqlens: Array, **options: Any) -> Array:
        """Causal attention within packed sequences: ``out`` of `prefill`, for training."""
        return self.prefill(x, cu_seqlens, **options).out

    def prefill(self, x: Array, cu_seqlens: Array, **options: Any) -> core.PrefillResult:
        """`jax_flashmla.flax.core.prefill`: x [t, hidden], cu_seqlens int32[b + 1]."""
        return core.prefill(self.params, x, cu_seqlens, config=self.config, **options)

    def decode(
        self, x: Array, positions: Array, cache: PagedKVCache, block_table: Array, **options: Any
    ) -> tuple[Array, PagedKVCache]:
        """`jax_flashmla.flax.core.decode`: x [b, s, hidden], positions int32[b, s]."""
        return core.decode(
            self.params, x, positions, cache, block_table, config=self.config, **options
        )

    def chunked_prefill(
        self,
        x: Array,
        cu_seqlens: Array,
        context_lens: Array,
        cache: PagedKVCache,
        block_table: Array,
        **options: Any,
    ) -> tuple[Array, PagedKVCache]:
        """`jax_flashmla.flax.core.chunked_prefill`: x [t, hidden], context_lens int32[b]."""
        return core.chunked_prefill(
            self.params,
            x,
            cu_seqlens,
            context_lens,
            cache,
            block_table,
            config=self.config,
            **options,
        )


class LightningIndexer(nnx.Module):
    """The indexer of DeepSeek V3.2: the functions of `jax_flashmla.flax.indexer` with parameters.

    Each parameter is an ``nnx.Param`` attribute, with the names and shapes that are listed there.
    Its choice has no derivative: parameters that only it uses have gradients of zero.
    """

    def __init__(self, config: IndexerConfig, *, rngs: nnx.Rngs):
        indexer._check_config("LightningIndexer", config)
        self.config = config
        for name in indexer.param_shapes(config):
            setattr(self, name, nnx.Param(indexer.init_param(name, rngs.params(), config)))

    @property
    def params(self) -> dict[str, Array]:
        """The parameters as `indexer` takes them."""
        return {name: getattr(self, name)[...] for name in indexer.param_shapes(self.config)}

    def __call__(self, x: Array, q_latent: Array, cu_seqlens: Array) -> indexer.PrefillResult:
        """`prefill`."""
        return self.prefill(x, q_latent, cu_seqlens)

    def prefill(self, x: Array, q_latent: Array, cu_seqlens: Array) -> indexer.PrefillResult:
        """`jax_flashmla.flax.indexer.prefill`: x [t, hidden], q_latent [t, q_lora_rank]."""
        return indexer.prefill(self.params, x, q_latent, cu_seqlens, config=self.config)

    def decode(
        self,
        x: Array,
        q_latent: Array,
        positions: Array,
        cache: PagedKVCache,
        block_table: Array,
        **options: Any,
    ) -> tuple[Array, PagedKVCache]:
        """`jax_flashmla.flax.indexer.decode`: x [b, s, hidden], q_latent [b, s, q_lora_rank]."""
        return indexer.decode(
            self.params,
            x,
            q_latent,
            positions,
            cache,
            block_table,
            config=self.config,
            **options,
        )
