"""FlashMLA for JAX: multi-head latent attention on Hopper GPUs, and anywhere else through XLA."""

from jax_flashmla.metadata import get_mla_metadata as get_mla_metadata
