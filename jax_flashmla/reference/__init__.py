"""Every operation in plain jnp: the oracle of the kernels, and what runs where they do not."""
