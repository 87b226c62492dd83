"""Multi-head latent attention as a layer of a model: configuration, functions, Flax modules.

`MLAConfig`, the functions of `jax_flashmla.flax.core` and the indexer of DeepSeek V3.2
(`jax_flashmla.flax.indexer`) need nothing but JAX. The layers are in
`jax_flashmla.flax.nnx` and `jax_flashmla.flax.linen`, which need Flax
(``pip install 'jax_flashmla[flax]'``) and are not imported here.
"""

from jax_flashmla.flax import indexer as indexer
from jax_flashmla.flax.config import MLAConfig as MLAConfig
from jax_flashmla.flax.config import YarnScaling as YarnScaling
from jax_flashmla.flax.core import PrefillResult as PrefillResult
from jax_flashmla.flax.core import chunked_prefill as chunked_prefill
from jax_flashmla.flax.core import decode as decode
from jax_flashmla.flax.core import empty_cache as empty_cache
from jax_flashmla.flax.core import init_params as init_params
from jax_flashmla.flax.core import make_schedule as make_schedule
from jax_flashmla.flax.core import param_shapes as param_shapes
from jax_flashmla.flax.core import param_specs as param_specs
from jax_flashmla.flax.core import params_from_hf as params_from_hf
from jax_flashmla.flax.core import prefill as prefill
from jax_flashmla.flax.indexer import IndexerConfig as IndexerConfig
