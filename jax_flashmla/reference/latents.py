"""What a model does to a token's latent and RoPE part before they are stored, in jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

ROPE_LAYOUTS = ("interleaved", "half_split")


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """``x / sqrt(mean(x ** 2) + epsilon) * weight`` over the last axis, in float32; x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


def rotate(x: Array, cos: Array, sin: Array, layout: str) -> Array:
    """Turns the pairs of columns of x [..., n] by the angles of cos, sin [..., n / 2]; x's dtype.

    Pair i is columns 2i and 2i + 1 (``"interleaved"``), or i and i + n / 2 (``"half_split"``).
    """
    wide = x.astype(jnp.float32)
    if layout == "interleaved":
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x.dtype)
