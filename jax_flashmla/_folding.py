"""vmap of the paged operations: the vmapped axis becomes part of the batch axis.

These are the ``fold`` functions of Operations (see ``_primitive.Operation``): one call on a batch
of ``size * b`` requests instead of a loop over ``size`` calls. A cache that is vmapped too becomes
one cache with ``size`` times the pages, and every page or slot number moves by its batch's offset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Operands = dict[str, Any]
Folded = tuple[Operands, dict[str, Any], Callable] | None

_MAX_INT32 = 2**31 - 1


def merge(array: jax.Array, batched: bool, size: int) -> jax.Array:
    """[size, b, ...] -> [size * b, ...]; an array without the vmapped axis is repeated."""
    if not batched:
        array = jnp.broadcast_to(array[None], (size, *array.shape))
    return array.reshape(size * array.shape[1], *array.shape[2:])


def unfold_to(size: int, b: int) -> Callable:
    """Splits the leading axis of every result back: [size * b, ...] -> [size, b, ...]."""

    def unfold(results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(r.reshape(size, b, *r.shape[1:]) for r in results)

    return unfold


def offset_entries(entries: jax.Array, batched: bool, size: int, extent: int) -> jax.Array:
    """Page or slot numbers into a cache that was folded: int32 [size, ...] with offsets applied.

    Args:
        entries: int32 numbers, with the vmapped axis at 0 if ``batched``.
        batched: whether they carry the vmapped axis.
        size: entries along the vmapped axis.
        extent: pages or slots of one of the ``size`` caches. Numbers outside [0, extent) are
            invalid and become -1 *before* the offset is added: 2147480000 plus an offset would wrap
            around, and a number a little too large would name a page of the next cache.
    """
    if not batched:
        entries = jnp.broadcast_to(entries[None], (size, *entries.shape))
    valid = (entries >= 0) & (entries < extent)
    offsets = jnp.arange(size, dtype=jnp.int32) * extent
    offsets = offsets.reshape(size, *(1,) * (entries.ndim - 1))
    return jnp.where(valid, entries + offsets, -1)


def fold_cache(
    data: jax.Array,
    data_batched: bool,
    entries: jax.Array,
    entries_batched: bool,
    size: int,
    entries_per_page: int,
) -> tuple[jax.Array, jax.Array] | None:
    """Folds a paged cache and the numbers that point into it.

    Args:
        data: [pages, ...] or, if ``data_batched``, [size, pages, ...].
        data_batched: whether the cache carries the vmapped axis.
        entries: int32 [b, ...] or, if ``entries_batched``, [size, b, ...].
        entries_batched: whether the numbers carry it.
        size: entries along the vmapped axis.
        entries_per_page: 1 if the numbers are pages, the page size if they are slots.

    Returns:
        ``(data [pages or size * pages, ...], entries [size * b, ...])``, or None if the folded
        numbers would pass 2^31. A cache that is not vmapped stays as it is, shared by all.
    """
    if not data_batched:
        return data, merge(entries, entries_batched, size)
    extent = data.shape[1] * entries_per_page
    if size * extent > _MAX_INT32:
        return None
    entries = offset_entries(entries, entries_batched, size, extent)
    return merge(data, True, size), merge(entries, True, size)


def fold_sink(sink: jax.Array | None, batched: bool, size: int, b: int) -> jax.Array | None:
    """attn_sink [h] or [b, h] (vmapped: an axis more) -> [h] if shared by all, or [size*b, h]."""
    if sink is None:
        return None
    if sink.ndim - batched == 2:
        return merge(sink, batched, size)
    if not batched:
        return sink
    return jnp.repeat(sink, b, axis=0)


def fold_dense_decode(
    operands: Operands, batched: dict[str, bool], size: int, static: dict[str, Any]
) -> Folded:
    """``Operation.fold`` of dense decoding over a paged cache."""
    b = operands["block_table"].shape[batched["block_table"]]
    cache = fold_cache(
        operands["k_cache"],
        batched["k_cache"],
        operands["block_table"],
        batched["block_table"],
        size,
        1,
    )
    if cache is None:
        return None
    folded: dict[str, Any] = {
        name: merge(operands[name], batched[name], size) for name in ("q", "cache_seqlens")
    }
    folded["k_cache"], folded["block_table"] = cache
    folded["attn_sink"] = fold_sink(operands["attn_sink"], batched["attn_sink"], size, b)
    return folded, static, unfold_to(size, b)


def fold_sparse_decode(
    operands: Operands, batched: dict[str, bool], size: int, static: dict[str, Any]
) -> Folded:
    """``Operation.fold`` of sparse decoding over one or two paged caches."""
    b = operands["q"].shape[batched["q"]]
    folded: Operands = {"q": merge(operands["q"], batched["q"], size)}
    for data, indices, lengths, page_size in (
        ("k_cache", "indices", "topk_length", static["page_size"]),
        ("extra_k_cache", "extra_indices", "extra_topk_length", static["extra_page_size"]),
    ):
        if operands[data] is None:
            continue
        cache = fold_cache(
            operands[data], batched[data], operands[indices], batched[indices], size, page_size
        )
        if cache is None:
            return None
        folded[data], folded[indices] = cache
        if operands[lengths] is not None:
            folded[lengths] = merge(operands[lengths], batched[lengths], size)
    folded["attn_sink"] = fold_sink(operands["attn_sink"], batched["attn_sink"], size, b)
    return folded, static, unfold_to(size, b)


def fold_cache_append(
    operands: Operands, batched: dict[str, bool], size: int, static: dict[str, Any]
) -> Folded:
    """``Operation.fold`` of writing tokens to a paged cache."""
    data = operands["data"]
    if not batched["data"]:  # each gets a cache of its own
        data = jnp.broadcast_to(data[None], (size, *data.shape))
    cache = fold_cache(data, True, operands["slots"], batched["slots"], size, static["page_size"])
    if cache is None or batched["norm_weight"]:
        return None
    folded: Operands = {"norm_weight": operands["norm_weight"]}
    folded["data"], folded["slots"] = cache
    for name in ("kv", "k_pe", "rope_cos", "rope_sin"):
        if operands[name] is not None:
            folded[name] = merge(operands[name], batched[name], size)
    return folded, static, unfold_to(size, data.shape[1])


def fold_cache_gather(
    operands: Operands, batched: dict[str, bool], size: int, static: dict[str, Any]
) -> Folded:
    """``Operation.fold`` of reading slots, int32 of any shape, from a paged cache."""
    data, slots = operands["data"], operands["slots"]
    if batched["data"]:
        extent = data.shape[1] * static["page_size"]
        if size * extent > _MAX_INT32:
            return None
        slots = offset_entries(slots, batched["slots"], size, extent)
        data = merge(data, True, size)
    return {"data": data, "slots": slots}, static, lambda results: results
