"""FlashMLA for JAX: multi-head latent attention on Hopper GPUs, and anywhere else through XLA."""

# First of all: checks that this JAX fits, with a clear ImportError, and registers the kernels.
from jax_flashmla import _ffi as _ffi  # isort: skip
from jax_flashmla import serving as serving
from jax_flashmla._explain import explain as explain
from jax_flashmla._version import __version__ as __version__
from jax_flashmla.cache import PagedKVCache as PagedKVCache
from jax_flashmla.cache import offset_block_table as offset_block_table
from jax_flashmla.cache import offset_slots as offset_slots
from jax_flashmla.cache import slot_mapping as slot_mapping
from jax_flashmla.cache import token_slots as token_slots
from jax_flashmla.decode import flash_mla_with_kvcache as flash_mla_with_kvcache
from jax_flashmla.merging import merge_attention_states as merge_attention_states
from jax_flashmla.metadata import get_mla_metadata as get_mla_metadata
from jax_flashmla.quantization import dequantize_k_cache as dequantize_k_cache
from jax_flashmla.quantization import dequantize_kv as dequantize_kv
from jax_flashmla.quantization import quantize_k_cache as quantize_k_cache
from jax_flashmla.quantization import quantize_kv as quantize_kv
from jax_flashmla.sparse_prefill import flash_mla_sparse_fwd as flash_mla_sparse_fwd
from jax_flashmla.varlen_prefill import flash_attn_varlen_func as flash_attn_varlen_func
from jax_flashmla.varlen_prefill import (
    flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func,
)
from jax_flashmla.varlen_prefill import (
    flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func,
)
