"""Attention of query tokens that each choose their own keys: shared by decode and prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashmla.reference import online_softmax

Array = jax.Array

# As in decode.py: sizes of temporary arrays in float32 elements, and tokens of a block.
_ACCUMULATORS = 1 << 22
_BLOCK = 1 << 23
_MAX_TOKENS = 1024
_FIXED_TOKENS = 256

_INT32_MAX = 2**31 - 1


class Source(NamedTuple):
    """Keys to choose from, and the choice of each of n query tokens."""

    load: Callable[[Array], Array]  # slots int32 [..., t], all valid -> keys float32 [..., t, d]
    indices: Array  # int32 [n, topk]
    length: Array  # int32 [n]: only so many of the indices count
    slots: int  # indices outside 0 .. slots - 1 are invalid


def attend(
    q: Array,
    sources: Sequence[Source],
    *,
    scale: float,
    head_dim_v: int,
    sink: Array,
    fixed_blocks: bool,
) -> tuple[Array, Array, Array]:
    """One softmax for each query token over the valid indices into all sources.

    Args:
        q: [n, h, d].
        sources: where to find keys; the values are their first ``head_dim_v`` columns.
        scale: factor of the scores.
        head_dim_v: columns of the values.
        sink: float32[n, h]; -inf where there is none.
        fixed_blocks: compute each query token by itself, in blocks of a fixed size, so that its
            result has the same bits whatever accompanies it.

    Returns:
        out [n, h, head_dim_v] in q's dtype, the maximal scores float32[n, h] (-inf without valid
        index) and lse float32[n, h] (+inf without valid index).
    """
    n, h, d = q.shape
    dtype = q.dtype
    sources = [s for s in sources if s.slots and s.indices.shape[1]]
    widest = max(d, h)

    def attend_chunk(q, sink, *choices):
        chunk = q.shape[0]
        state = online_softmax.start((chunk, h), head_dim_v)
        attended = jnp.zeros((chunk, 1), bool)
        for source, indices, length in zip(sources, choices[::2], choices[1::2], strict=True):
            valid = (indices >= 0) & (indices <= min(source.slots - 1, _INT32_MAX))
            valid &= jnp.arange(indices.shape[1], dtype=jnp.int32) < length[:, None]
            attended |= jnp.any(valid, axis=1, keepdims=True)
            state = visit(source.load, q, jnp.where(valid, indices, -1), state)
        out, lse = online_softmax.finish(state, attended, sink)
        return out.astype(dtype), state.maximum, lse

    def visit(load, q, indices, state):
        """Takes in the keys at ``indices`` [chunk, topk], -1 where invalid."""
        chunk, topk = indices.shape
        if fixed_blocks:
            tokens = _FIXED_TOKENS
        else:
            tokens = min(_MAX_TOKENS, max(_BLOCK // max(chunk * widest, 1), 1), topk)
        indices = jnp.pad(indices, ((0, 0), (0, -topk % tokens)), constant_values=-1)
        ends = jnp.where(indices >= 0, jnp.arange(1, indices.shape[1] + 1, dtype=jnp.int32), 0)
        blocks = (jnp.max(ends, initial=0) + (tokens - 1)) // tokens

        def one_block(block, state):
            slots = lax.dynamic_slice_in_dim(indices, block * tokens, tokens, axis=1)
            valid = slots >= 0
            # An unused slot may hold NaN, which a probability of zero would let through.
            keys = jnp.where(valid[..., None], load(jnp.maximum(slots, 0)), 0.0)
            return online_softmax.add_block(
                state,
                scale * online_softmax.product("nhd,ntd->nht", q.astype(jnp.float32), keys),
                valid[:, None],
                lambda p: online_softmax.product("nht,ntv->nhv", p, keys[..., :head_dim_v]),
                dtype,
            )

        return lax.fori_loop(0, blocks, one_block, state)

    limit = min(_ACCUMULATORS // max(h * head_dim_v, 1), _BLOCK // max(64 * widest, 1))
    choices: list[Any] = [x for s in sources for x in (s.indices, s.length)]
    return online_softmax.map_chunks(
        attend_chunk,
        (q, sink, *choices),
        (0, 0, *(-1, 0) * len(sources)),
        1 if fixed_blocks else max(limit, 1),
    )
