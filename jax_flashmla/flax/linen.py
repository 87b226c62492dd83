"""The layer and the indexer as Flax Linen modules.

They need Flax: ``pip install 'jax_flashmla[flax]'``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError(
        "jax_flashmla.flax.linen needs Flax, which is not installed or does not fit this JAX "
        f"({error}): pip install 'jax_flashmla[flax]'"
    ) from error

from jax_flashmla.cache import PagedKVCache
from jax_flashmla.flax import core, indexer
from jax_flashmla.flax.config import MLAConfig
from jax_flashmla.flax.indexer import IndexerConfig

Array = jax.Array


class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention: the functions of `jax_flashmla.flax.core` with parameters.

    The collection ``"params"`` of the module is the dict that `jax_flashmla.flax.core` describes
    and takes. The cache is no collection of the module: it is an argument and a result, so that
    all layers of a model can share one and a jitted step can donate it. Other methods than the
    call: ``layer.apply(variables, ..., method="decode")``.

    Attributes:
      config: the layer's configuration.
    """

    config: MLAConfig

    def setup(self):
        """Declares the parameters."""
        core._check_config("MultiHeadLatentAttention", self.config)
        self.params = {
            name: self.param(name, functools.partial(core.init_param, name), self.config)
            for name in core.param_shapes(self.config)
        }

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


class LightningIndexer(nn.Module):
    """The indexer of DeepSeek V3.2: the functions of `jax_flashmla.flax.indexer` with parameters.

    The collection ``"params"`` of the module is the dict that is described there. Its choice has
    no derivative: parameters that only it uses have gradients of zero.

    Attributes:
      config: the indexer's configuration.
    """

    config: IndexerConfig

    def setup(self):
        """Declares the parameters."""
        indexer._check_config("LightningIndexer", self.config)
        self.params = {
            name: self.param(name, functools.partial(indexer.init_param, name), self.config)
            for name in indexer.param_shapes(self.config)
        }

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
