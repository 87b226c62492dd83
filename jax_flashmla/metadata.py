"""Schedules for decoding: made once a step, reused by all layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _cuda, _dispatch
from jax_flashmla._planning import default_num_sm_parts, dense_row_tiles, sparse_row_tiles
from jax_flashmla._primitive import Operation
from jax_flashmla.reference import scheduler

_NAME = "get_mla_metadata"


def _abstract(operands: dict[str, Any], *, batch_size: int, num_sm_parts: int, **_: Any):
    del operands
    return (
        jax.ShapeDtypeStruct((num_sm_parts, scheduler.COLUMNS), jnp.int32),
        jax.ShapeDtypeStruct((batch_size + 1,), jnp.int32),
    )


# A schedule is of one whole batch: nothing splits, and vmap plans each batch on its own.
metadata_operation = Operation(
    name="flash_mla_metadata",
    operands=("cache_seqlens", "topk_length", "extra_topk_length"),
    results=("tile_scheduler_metadata", "num_splits"),
    abstract=_abstract,
    reference=scheduler.metadata,
    cuda=_cuda.metadata,
    dims={
        "cache_seqlens": "b",
        "topk_length": "b",
        "extra_topk_length": "b",
        "tile_scheduler_metadata": "part column",
        "num_splits": "bound",
    },
)


def _check_lengths(name: str, value: Any, batch_size: int | None) -> int:
    """Checks an int32[b] argument and returns b."""
    _checks.check_rank(_NAME, name, value, ("b",))
    _checks.check_dtype(_NAME, name, value, (jnp.int32,))
    if batch_size is not None:
        _checks.check_shape(_NAME, name, value, (batch_size,), ("b",))
    return value.shape[0]


def _missing(name: str, expected: str) -> ValueError:
    return ValueError(f"{_NAME}: argument '{name}' is missing (None); expected {expected}")


def get_mla_metadata(
    cache_seqlens: jax.Array | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    batch_size: int | None = None,
    topk_length: jax.Array | None = None,
    extra_topk: int | None = None,
    extra_topk_length: jax.Array | None = None,
    batch_invariant: bool = False,
    num_sm_parts: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Plans how :func:`flash_mla_with_kvcache` divides its work, once for all layers of a step.

    Runs on the device, under ``jit`` too. The results are opaque. They only balance the work: used
    with other lengths than they were made for, results stay right. For another batch size, head
    count, number of query tokens or kind (sparse, batch-invariant), results are NaN.

    Args:
        cache_seqlens: int32[b] tokens in the cache of each request. Needed for dense attention; for
            sparse attention only its size counts, and it may be left out.
        num_q_tokens_per_head_k: query rows for each KV head, ``s_q * h_q // h_kv``.
        num_heads_k: h_kv.
        num_heads_q: h_q; needed for sparse attention.
        is_fp8_kvcache: accepted as upstream does; schedules do not depend on it.
        topk: None for dense attention, else the number of entries of ``indices`` for each query.
        batch_size: b, for sparse attention without any array of lengths.
        topk_length: int32[b], the ``topk_length`` of the call to come, or None for all of topk.
        extra_topk: entries of ``extra_indices_in_kvcache``, or None without an extra cache.
        extra_topk_length: int32[b], as ``topk_length``, for the extra cache.
        batch_invariant: cut each request as a function of its own length only, so that its result
            has the same bits in any batch. The calls must be given the same.
        num_sm_parts: rows of the schedule, at least 1. By default as many as fit on the local CUDA
            device, or on an H200 without one.
        implementation: "cuda", "xla" or None for whichever runs. Both give the same integers.

    Returns:
        ``(tile_scheduler_metadata int32[num_sm_parts, 8], num_splits int32[b + 1])``. Without any
        argument ``(None, None)``: each call then plans for itself.

    Raises:
        ValueError: an argument is missing, of the wrong shape or type, or contradicts another.
        NotImplementedError: ``implementation="cuda"`` where the kernels do not run.
    """
    _checks.check_bool(_NAME, "is_fp8_kvcache", is_fp8_kvcache)
    batch_invariant = _checks.check_bool(_NAME, "batch_invariant", batch_invariant)
    _dispatch.check_implementation(_NAME, implementation)
    described = (
        cache_seqlens,
        num_q_tokens_per_head_k,
        num_heads_k,
        num_heads_q,
        topk,
        batch_size,
        topk_length,
        extra_topk,
        extra_topk_length,
        num_sm_parts,
    )
    if all(value is None for value in described) and not batch_invariant:
        return None, None

    if num_q_tokens_per_head_k is None:
        raise _missing("num_q_tokens_per_head_k", "s_q * h_q // h_kv")
    rows = _checks.check_int(_NAME, "num_q_tokens_per_head_k", num_q_tokens_per_head_k, 0)
    if num_heads_k is None:
        raise _missing("num_heads_k", "the number of KV heads")
    h_kv = _checks.check_int(_NAME, "num_heads_k", num_heads_k, 1)
    s_q = None
    if num_heads_q is not None:
        h_q = _checks.check_int(_NAME, "num_heads_q", num_heads_q, 1)
        if h_q % h_kv:
            raise ValueError(
                f"{_NAME}: argument 'num_heads_q' is {h_q}; "
                f"expected a multiple of num_heads_k={h_kv}"
            )
        if rows % (h_q // h_kv):
            raise ValueError(
                f"{_NAME}: argument 'num_q_tokens_per_head_k' is {rows}; expected a multiple of "
                f"num_heads_q // num_heads_k = {h_q // h_kv} (it is s_q * h_q // h_kv)"
            )
        s_q = rows // (h_q // h_kv)

    if batch_size is not None:
        batch_size = _checks.check_int(_NAME, "batch_size", batch_size, 0)
    arrays = {
        "cache_seqlens": cache_seqlens,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    for name, value in arrays.items():
        if value is not None:
            batch_size = _check_lengths(name, value, batch_size)

    if topk is None:
        for name, sparse_only in (
            ("topk_length", topk_length),
            ("extra_topk", extra_topk),
            ("extra_topk_length", extra_topk_length),
        ):
            if sparse_only is not None:
                raise ValueError(
                    f"{_NAME}: argument '{name}' is given without 'topk'; "
                    "expected None for dense attention"
                )
        if cache_seqlens is None:
            raise _missing("cache_seqlens", "an int32 array (b,) for dense attention")
        row_tiles = dense_row_tiles(h_kv, rows)
    else:
        topk = _checks.check_int(_NAME, "topk", topk, 0)
        if s_q is None:
            raise _missing("num_heads_q", "the number of query heads for sparse attention (topk)")
        if extra_topk is not None:
            extra_topk = _checks.check_int(_NAME, "extra_topk", extra_topk, 0)
        elif extra_topk_length is not None:
            raise _missing("extra_topk", "an integer, since 'extra_topk_length' is given")
        if batch_size is None:
            raise _missing(
                "batch_size", "an integer, or 'cache_seqlens' or 'topk_length' int32 (b,)"
            )
        arrays["cache_seqlens"] = None  # its values play no part in sparse attention
        row_tiles = sparse_row_tiles(h_kv, h_q, s_q)

    if num_sm_parts is None:
        num_sm_parts = default_num_sm_parts(row_tiles)
    num_sm_parts = _checks.check_int(_NAME, "num_sm_parts", num_sm_parts, 1)
    rows_of_schedule, num_splits = metadata_operation(
        arrays,
        implementation=implementation,
        batch_size=batch_size,
        row_tiles=row_tiles,
        topk=topk,
        extra_topk=extra_topk,
        num_sm_parts=num_sm_parts,
        batch_invariant=batch_invariant,
    )
    return rows_of_schedule, num_splits
