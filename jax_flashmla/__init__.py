"""FlashMLA for JAX: multi-head latent attention on Hopper GPUs, and anywhere else through XLA."""

# First of all: checks that this JAX fits, with a clear ImportError, and registers the kernels.
from jax_flashmla import _ffi as _ffi  # isort: skip
from jax_flashmla._explain import explain as explain
from jax_flashmla._version import __version__ as __version__
from jax_flashmla.metadata import get_mla_metadata as get_mla_metadata
