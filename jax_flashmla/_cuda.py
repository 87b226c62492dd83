"""Calls of the CUDA kernels through XLA FFI, and what each of them cannot take.

Every function has the signature that ``Operation`` asks for: operands by name and static
parameters. Workspaces are further results of the FFI call that end here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _planning
from jax_flashmla.reference import scheduler

Operands = dict[str, Any]

# What the dense decode kernel for sm_90a takes, see csrc/sm90/dense_decode/config.h: pairs of the
# columns of a key, and of a value, and the models that have them.
DENSE_DIMS = {
    (576, 512): "DeepSeek V2, V3: kv_lora_rank 512 and 64 RoPE columns",
    (512, 512): "all columns are values: no RoPE part in the cache, or one that counts (V4)",
    (320, 256): "kv_lora_rank 256 and 64 RoPE columns",
    (256, 256): "kv_lora_rank 256 without a RoPE part in the cache",
}
_MIN_PAGE_SIZE = 8

_INT32_MAX = 2**31 - 1


def _absent(dtype: Any) -> jax.Array:
    """An empty array stands for an absent operand of an FFI call."""
    return jnp.zeros((0,), dtype)


def metadata(
    operands: Operands,
    *,
    batch_size: int,
    row_tiles: int,
    topk: int | None,
    extra_topk: int | None,
    num_sm_parts: int,
    batch_invariant: bool,
) -> tuple[jax.Array, ...]:
    """The schedule of ``get_mla_metadata`` by the kernel in csrc/smxx/scheduler.cu."""
    sparse = topk is not None
    lengths = operands.get("topk_length" if sparse else "cache_seqlens")
    extra_lengths = operands.get("extra_topk_length")
    call = jax.ffi.ffi_call(
        "flashmla_metadata",
        (
            jax.ShapeDtypeStruct((num_sm_parts, scheduler.COLUMNS), jnp.int32),
            jax.ShapeDtypeStruct((batch_size + 1,), jnp.int32),
        ),
    )
    return tuple(
        call(
            _absent(jnp.int32) if lengths is None else lengths,
            _absent(jnp.int32) if extra_lengths is None else extra_lengths,
            row_tiles=np.int32(row_tiles),
            batch_invariant=np.bool_(batch_invariant),
            sparse=np.bool_(sparse),
            default_length=np.int32(topk or 0),
            max_length=np.int32(-1 if topk is None else topk),
            extra_default_length=np.int32(extra_topk or 0),
            extra_max_length=np.int32(extra_topk or 0),
        )
    )


def max_invariant_splits(capacity: int) -> int:
    """The most pieces a batch-invariant request of up to ``capacity`` tokens has, at least 1."""
    blocks = -(-capacity // scheduler.BLOCK)
    pieces = -(-blocks // scheduler.MIN_INVARIANT_BLOCKS)
    return min(max(pieces, 1), scheduler.MAX_INVARIANT_SPLITS)


def dense_decode_declines(
    operands: Operands,
    *,
    head_dim_v: int,
    cache_format: str,
    page_size: int,
    **_: Any,
) -> str | None:
    """Why the dense decode kernel cannot take a call of these shapes, or None if it can."""
    q, k_cache = operands["q"], operands["k_cache"]
    if cache_format != "plain":
        return f"there is no kernel for dense decode over a cache of format {cache_format!r} yet"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q has dtype {q.dtype.name}; the kernel takes bfloat16 and float16"
    if k_cache.dtype != q.dtype:
        return f"k_cache has dtype {k_cache.dtype.name} but q has {q.dtype.name}"
    if (q.shape[-1], head_dim_v) not in DENSE_DIMS:
        pairs = ", ".join(f"{d} and {dv}" for d, dv in DENSE_DIMS)
        return (
            f"head dimensions are {q.shape[-1]} and head_dim_v={head_dim_v}; the kernel takes "
            f"the pairs {pairs}"
        )
    if not (
        (page_size > 0 and page_size % scheduler.BLOCK == 0)
        or (page_size >= _MIN_PAGE_SIZE and scheduler.BLOCK % page_size == 0)
    ):
        return (
            f"page_size is {page_size}; the kernel takes multiples of {scheduler.BLOCK}, and "
            f"powers of two from {_MIN_PAGE_SIZE} on"
        )
    if max(*q.shape, *k_cache.shape, *operands["block_table"].shape) > _INT32_MAX:
        return "a dimension is larger than 2^31 - 1"
    return None


def dense_decode(
    operands: Operands,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    cache_format: str,
    page_size: int,
    batch_invariant: bool,
    num_sm_parts: int | None,
) -> tuple[jax.Array, ...]:
    """Dense decode by the kernels in csrc/sm90/dense_decode and csrc/smxx/combine.cu."""
    del cache_format  # "plain", see dense_decode_declines
    q, k_cache, block_table = operands["q"], operands["k_cache"], operands["block_table"]
    b, s_q, h_q, _ = q.shape
    h_kv = k_cache.shape[2]
    rows = s_q * h_q // h_kv
    schedule = operands.get("tile_scheduler_metadata")
    if schedule is None:
        row_tiles = _planning.dense_row_tiles(h_kv, rows)
        schedule, _ = metadata(
            {"cache_seqlens": operands["cache_seqlens"]},
            batch_size=b,
            row_tiles=row_tiles,
            topk=None,
            extra_topk=None,
            num_sm_parts=num_sm_parts or _planning.default_num_sm_parts(row_tiles),
            batch_invariant=batch_invariant,
        )
    num_parts = schedule.shape[0]
    if batch_invariant:
        slots = b * max_invariant_splits(block_table.shape[1] * page_size)
    else:
        # A part begins and ends inside a request at most once each; one part cuts nothing.
        slots = 2 * num_parts if num_parts > 1 else 0
    sink = operands.get("attn_sink")
    call = jax.ffi.ffi_call(
        "flashmla_dense_decode",
        (
            jax.ShapeDtypeStruct((b, s_q, h_q, head_dim_v), q.dtype),
            jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
            jax.ShapeDtypeStruct((slots, h_kv, rows, head_dim_v), jnp.float32),
            jax.ShapeDtypeStruct((slots, h_kv, rows), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ),
    )
    out, lse, *_ = call(
        q,
        k_cache,
        block_table,
        operands["cache_seqlens"],
        schedule,
        _absent(jnp.float32) if sink is None else sink,
        softmax_scale=np.float32(softmax_scale),
        causal=np.bool_(causal),
        batch_invariant=np.bool_(batch_invariant),
    )
    return out, lse
