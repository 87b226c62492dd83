"""FlashMLA for JAX: multi-head latent attention on Hopper GPUs, and anywhere else through XLA."""
