"""Sparse prefill in jnp: the definition of the operation, and the fallback."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla.reference import online_softmax
from jax_flashmla.reference.sparse import Source, attend

Array = jax.Array


def sparse_prefill(
    operands: dict[str, Any], *, sm_scale: float, d_v: int
) -> tuple[Array, Array, Array]:
    """Attention of each query token over the rows of kv that its indices name.

    Args:
        operands: q [s_q, h_q, d]; kv [s_kv, 1, d]; indices int32[s_q, 1, topk], invalid where
            negative or >= s_kv; attn_sink float32[h_q] or [s_q, h_q] or None; topk_length
            int32[s_q] or None: only so many of the indices count.
        sm_scale: factor of the scores.
        d_v: the values are the first ``d_v`` columns of kv.

    Returns:
        out [s_q, h_q, d_v] in q's dtype, max_logits float32[s_q, h_q] and lse float32[s_q, h_q].
    """
    q, kv, indices = operands["q"], operands["kv"], operands["indices"]
    s_q, h_q, _ = q.shape
    length, sink = operands["topk_length"], operands["attn_sink"]
    if length is None:
        length = jnp.full(s_q, indices.shape[2], jnp.int32)
    if sink is None:
        sink = jnp.full((s_q, h_q), -jnp.inf, jnp.float32)

    def load(slots: Array) -> Array:
        slots, rows = online_softmax.in_this_step(slots, kv)
        return jnp.take(rows[:, 0], slots, axis=0, mode="clip").astype(jnp.float32)

    return attend(
        q,
        [Source(load, indices[:, 0], length, kv.shape[0])],
        scale=sm_scale,
        head_dim_v=d_v,
        sink=jnp.broadcast_to(sink, (s_q, h_q)),
        fixed_blocks=False,
    )
