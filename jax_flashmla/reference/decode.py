"""Decode over a paged cache in jnp: the definition of both operations, and the fallback.

Everything is computed in float32. Keys are visited block by block and requests chunk by chunk, so
memory stays small whatever the lengths: only one block of each request of a chunk is ever
gathered from the cache. The number of blocks visited follows from the longest request at hand,
not from the capacity of the tables.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashmla import _planning, quantization
from jax_flashmla.reference import online_softmax, scheduler
from jax_flashmla.reference.sparse import Source, attend

Array = jax.Array

# Sizes of the temporary arrays, in float32 elements: accumulators of a chunk of requests, and one
# block of keys or of scores of the chunk.
_ACCUMULATORS = 1 << 22
_BLOCK = 1 << 23
# Tokens of a block: at most, and always when results must not depend on the rest of the batch.
_MAX_TOKENS = 1024
_INVARIANT_TOKENS = 256


def dense_decode(
    operands: dict[str, Any],
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    cache_format: str,
    page_size: int,
    batch_invariant: bool,
    fp8_matmul: bool,
    power_of_two_scales: bool,
    num_sm_parts: int | None,
) -> tuple[Array, Array]:
    """Attention of each request's query tokens over the pages of its block table.

    Args:
        operands: q [b, s_q, h_q, d]; k_cache, the raw cache array of ``cache_format``;
            block_table int32[b, n]; cache_seqlens int32[b]; attn_sink float32[h_q] or [b, h_q] or
            None; tile_scheduler_metadata and num_splits or None: a schedule balances work between
            processors, of which there is none here, so only whether it belongs to this call counts.
        head_dim_v: the values are the first ``head_dim_v`` columns of the keys.
        softmax_scale: factor of the scores.
        causal: query i of a request sees keys j <= length - s_q + i.
        cache_format: "plain", "fp8_v32" or "fp8_v4".
        page_size: tokens of a page.
        batch_invariant: compute each request by itself, in blocks of a fixed size, so that its
            result has the same bits alone and in any batch.
        fp8_matmul: unused; rounding to FP8 would gain nothing here.
        power_of_two_scales: unused; any scales are as fast.
        num_sm_parts: unused; processors are XLA's business.

    Returns:
        out [b, s_q, h_q, head_dim_v] in q's dtype and lse float32[b, h_q, s_q]. Requests whose
        length passes the table, or that use a table entry which is no page, are NaN throughout.
    """
    del fp8_matmul, power_of_two_scales, num_sm_parts
    q, cache, table = operands["q"], operands["k_cache"], operands["block_table"]
    b, s_q, h_q, d = q.shape
    pages, columns = cache.shape[0], table.shape[1]
    h_kv = cache.shape[2] if cache_format == "plain" else 1
    group = h_q // h_kv
    rows = s_q * group

    lengths = jnp.maximum(operands["cache_seqlens"], 0)
    used_pages = lengths // page_size + (lengths % page_size > 0)  # cannot overflow
    used = jnp.arange(columns) < used_pages[:, None]
    no_page = (table < 0) | (table >= pages)
    broken = (used_pages > columns) | jnp.any(used & no_page, axis=1)
    lengths = jnp.where(broken, 0, lengths)
    # From here on every entry is the number of a page, if there is one.
    table = jnp.where(used & ~no_page, table, 0)

    sink = _sink_of_requests(operands["attn_sink"], b, h_q)
    sink = jnp.repeat(sink.reshape(b, h_kv, 1, group), s_q, axis=2).reshape(b, h_kv, rows)
    # One row for each query token of each query head of a key head.
    q = q.astype(jnp.float32).reshape(b, s_q, h_kv, group, d)
    q = q.transpose(0, 2, 1, 3, 4).reshape(b, h_kv, rows, d)
    dtype = operands["q"].dtype

    def attend_chunk(q, table, lengths, sink):
        chunk = q.shape[0]
        ends = lengths[:, None] - jnp.zeros(rows, jnp.int32)  # keys that each row sees
        if causal:
            ends = ends - (s_q - 1 - jnp.arange(rows, dtype=jnp.int32) // group)
        ends = ends[:, None]  # [chunk, 1, rows]
        state = online_softmax.start((chunk, h_kv, rows), head_dim_v)
        if columns and pages:
            state = visit(q, table, lengths, ends, state)
        return online_softmax.finish(state, ends > 0, sink)

    def visit(q, table, lengths, ends, state):
        chunk = q.shape[0]
        if batch_invariant:
            step = max(_INVARIANT_TOKENS // page_size, 1)
        else:
            widest = chunk * h_kv * max(d, rows)
            tokens = min(_MAX_TOKENS, _BLOCK // max(widest, 1))
            step = min(max(tokens // page_size, 1), columns)
        tokens = step * page_size
        table = jnp.pad(table, ((0, 0), (0, -columns % step)))
        longest = jnp.max(lengths, initial=0)
        blocks = longest // tokens + (longest % tokens > 0)

        def one_block(block, state):
            numbers = lax.dynamic_slice_in_dim(table, block * step, step, axis=1)
            keys = _load_pages(cache, numbers, cache_format, page_size, dtype)
            keys = keys.reshape(chunk, tokens, h_kv, d)
            positions = block * tokens + jnp.arange(tokens, dtype=jnp.int32)
            # Slots past the length may hold NaN, which a probability of zero would let through.
            inside = positions < lengths[:, None]
            keys = jnp.where(inside[:, :, None, None], keys, 0.0)
            scores = softmax_scale * online_softmax.product("bkrd,btkd->bkrt", q, keys)
            if causal and s_q > 1:
                # Likewise for NaN and infinities in tokens that only later query tokens see.
                finite = jnp.all(jnp.isfinite(keys), axis=-1)
                keys = jnp.where(finite[..., None], keys, 0.0)
                scores = jnp.where(finite.transpose(0, 2, 1)[:, :, None], scores, jnp.nan)
            return online_softmax.add_block(
                state,
                scores,
                positions < ends[..., None],
                lambda p: online_softmax.product("bkrt,btkv->bkrv", p, keys[..., :head_dim_v]),
                dtype,
            )

        return lax.fori_loop(0, blocks, one_block, state)

    smallest_block = max(page_size, 64) * h_kv * max(d, rows)
    limit = min(_ACCUMULATORS // max(h_kv * rows * head_dim_v, 1), _BLOCK // max(smallest_block, 1))
    out, lse = online_softmax.map_chunks(
        attend_chunk,
        (q, table, lengths, sink),
        (0, 0, 0, 0),
        1 if batch_invariant else max(limit, 1),
    )
    out = out.reshape(b, h_kv, s_q, group, head_dim_v).transpose(0, 2, 1, 3, 4)
    out = out.reshape(b, s_q, h_q, head_dim_v).astype(dtype)
    lse = lse.reshape(b, h_kv, s_q, group).transpose(0, 1, 3, 2).reshape(b, h_q, s_q)
    row_tiles = _planning.dense_row_tiles(h_kv, rows)
    broken |= _foreign_schedule(operands, b, row_tiles, batch_invariant, sparse=False)
    return (
        jnp.where(broken[:, None, None, None], jnp.asarray(jnp.nan, dtype), out),
        jnp.where(broken[:, None, None], jnp.nan, lse),
    )


def sparse_decode(
    operands: dict[str, Any],
    *,
    head_dim_v: int,
    softmax_scale: float,
    cache_format: str,
    page_size: int,
    extra_page_size: int | None,
    batch_invariant: bool,
    fp8_matmul: bool,
    power_of_two_scales: bool,
    num_sm_parts: int | None,
) -> tuple[Array, Array]:
    """Attention of each query token over the cache slots that its indices name.

    Args:
        operands: q [b, s_q, h_q, d]; k_cache, the raw cache array of ``cache_format``; indices
            int32[b, s_q, topk], slots page * page_size + offset; topk_length int32[b] or None;
            extra_k_cache, extra_indices and extra_topk_length likewise or None; attn_sink
            float32[h_q] or [b, h_q] or None; tile_scheduler_metadata and num_splits as for
            :func:`dense_decode`.
        head_dim_v: the values are the first ``head_dim_v`` columns of the keys.
        softmax_scale: factor of the scores.
        cache_format: "plain", "fp8_v32" or "fp8_v4", of both caches.
        page_size: tokens of a page.
        extra_page_size: tokens of a page of the extra cache.
        batch_invariant: as for :func:`dense_decode`.
        fp8_matmul, power_of_two_scales: unused.
        num_sm_parts: unused.

    Returns:
        out [b, s_q, h_q, head_dim_v] in q's dtype and lse float32[b, h_q, s_q].
    """
    del fp8_matmul, power_of_two_scales, num_sm_parts
    q = operands["q"]
    b, s_q, h_q, d = q.shape

    def source(cache, indices, length, page_size):
        topk = indices.shape[-1]
        length = jnp.full(b, topk, jnp.int32) if length is None else length
        return Source(
            lambda slots: _load_tokens(cache, slots, cache_format, page_size, q.dtype),
            indices.reshape(b * s_q, topk),
            jnp.repeat(length, s_q),
            cache.shape[0] * page_size,
        )

    sources = [source(operands["k_cache"], operands["indices"], operands["topk_length"], page_size)]
    if operands["extra_k_cache"] is not None:
        sources.append(
            source(
                operands["extra_k_cache"],
                operands["extra_indices"],
                operands["extra_topk_length"],
                extra_page_size,
            )
        )
    out, _, lse = attend(
        q.reshape(b * s_q, h_q, d),
        sources,
        scale=softmax_scale,
        head_dim_v=head_dim_v,
        sink=jnp.repeat(_sink_of_requests(operands["attn_sink"], b, h_q), s_q, axis=0),
        fixed_blocks=batch_invariant,
    )
    out = out.reshape(b, s_q, h_q, head_dim_v)
    lse = lse.reshape(b, s_q, h_q).transpose(0, 2, 1)
    row_tiles = _planning.sparse_row_tiles(1, h_q, s_q)
    foreign = _foreign_schedule(operands, b, row_tiles, batch_invariant, sparse=True)
    return jnp.where(foreign, jnp.asarray(jnp.nan, q.dtype), out), jnp.where(foreign, jnp.nan, lse)


def _foreign_schedule(
    operands: dict[str, Any],
    b: int,
    row_tiles: int,
    batch_invariant: bool,
    *,
    sparse: bool,
) -> Array:
    """bool[]: a schedule was given which is not one for this call: then all results are NaN.

    The schedule has no other part here. But a program that a kernel would refuse to run with its
    schedule should not appear to work elsewhere.
    """
    schedule, num_splits = operands["tile_scheduler_metadata"], operands["num_splits"]
    if schedule is None:
        return jnp.asarray(False)
    return ~scheduler.is_valid(
        schedule,
        num_splits,
        batch_size=b,
        row_tiles=row_tiles,
        batch_invariant=batch_invariant,
        sparse=sparse,
    )


def _sink_of_requests(sink: Array | None, b: int, h_q: int) -> Array:
    """float32[b, h_q]; without a sink -inf, which has no effect."""
    if sink is None:
        return jnp.full((b, h_q), -jnp.inf, jnp.float32)
    return jnp.broadcast_to(sink, (b, h_q))


def _load_pages(cache: Array, pages: Array, cache_format: str, page_size: int, dtype: Any) -> Array:
    pages, cache = online_softmax.in_this_step(pages, cache)
    loaded = quantization.gather_pages(
        cache, pages, cache_format=cache_format, page_size=page_size, dtype=_loaded_as(dtype)
    )
    return loaded.astype(jnp.float32)


def _load_tokens(
    cache: Array, slots: Array, cache_format: str, page_size: int, dtype: Any
) -> Array:
    slots, cache = online_softmax.in_this_step(slots, cache)
    loaded = quantization.gather_tokens(
        cache, slots, cache_format=cache_format, page_size=page_size, dtype=_loaded_as(dtype)
    )
    return loaded.astype(jnp.float32)[..., 0, :]  # sparse caches have one key head


def _loaded_as(dtype: Any) -> Any:
    """float32 queries meet FP8 keys that were never rounded to bfloat16."""
    return jnp.float32 if dtype == jnp.float32 else None
