"""Calls of the CUDA kernels through XLA FFI, and what each of them cannot take.

Every function has the signature that ``Operation`` asks for: operands by name and static
parameters. Workspaces are further results of the FFI call that end here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _planning, quantization
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
# The same of the kernels over FP8 caches, and of sparse decode over plain ones.
_FP8_DIMS = {"fp8_v32": ((576, 512),), "fp8_v4": ((512, 512),)}
_SPARSE_DIMS = {"plain": ((576, 512), (512, 512)), **_FP8_DIMS}

# The formats by their number in csrc/params.h.
FORMAT_CODES = {"plain": 0, "fp8_v32": 1, "fp8_v4": 2}

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


def _declined_dtypes(q: Any, k_cache: Any, cache_format: str) -> str | None:
    """Why no decode kernel takes queries of this dtype over such a cache, or None."""
    if cache_format != "plain":
        if q.dtype != jnp.bfloat16:
            return (
                f"q has dtype {q.dtype.name}; over a cache of format {cache_format!r} the kernel "
                "takes bfloat16"
            )
        return None
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q has dtype {q.dtype.name}; the kernel takes bfloat16 and float16"
    if k_cache.dtype != q.dtype:
        return f"k_cache has dtype {k_cache.dtype.name} but q has {q.dtype.name}"
    return None


def _declined_dims(q: Any, head_dim_v: int, pairs: Sequence[tuple[int, int]]) -> str | None:
    """Why the kernel, which takes these pairs, does not take these head dimensions, or None."""
    if (q.shape[-1], head_dim_v) in pairs:
        return None
    what = "the pairs " + ", ".join(f"{d} and {dv}" for d, dv in pairs)
    if len(pairs) == 1:
        what = f"{pairs[0][0]} and {pairs[0][1]}"
    return f"head dimensions are {q.shape[-1]} and head_dim_v={head_dim_v}; the kernel takes {what}"


def _declined_v4_pages(page_size: int | None) -> str | None:
    """Why the sparse kernel takes no V4 pages of so many tokens (None: no cache), or None."""
    size = 0 if page_size is None else quantization.page_bytes(page_size)
    if size <= _INT32_MAX:
        return None
    return f"V4 pages of {page_size} tokens have {size} bytes; the kernel takes up to 2^31 - 1"


def _declined_sizes(*arrays: Any) -> str | None:
    """Why no kernel takes arrays of these shapes, or None; absent arrays are None."""
    if any(size > _INT32_MAX for array in arrays if array is not None for size in array.shape):
        return "a dimension is larger than 2^31 - 1"
    return None


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
    if cache_format == "fp8_v4":
        return f"there is no kernel for dense decode over a cache of format {cache_format!r}"
    if (reason := _declined_dtypes(q, k_cache, cache_format)) is not None:
        return reason
    dims = tuple(DENSE_DIMS) if cache_format == "plain" else _FP8_DIMS[cache_format]
    if (reason := _declined_dims(q, head_dim_v, dims)) is not None:
        return reason
    if cache_format == "plain" and not (
        (page_size > 0 and page_size % scheduler.BLOCK == 0)
        or (page_size >= _MIN_PAGE_SIZE and scheduler.BLOCK % page_size == 0)
    ):
        return (
            f"page_size is {page_size}; the kernel takes multiples of {scheduler.BLOCK}, and "
            f"powers of two from {_MIN_PAGE_SIZE} on"
        )
    return _declined_sizes(q, k_cache, operands["block_table"])


def sparse_decode_declines(
    operands: Operands,
    *,
    head_dim_v: int,
    cache_format: str,
    page_size: int,
    extra_page_size: int | None,
    **_: Any,
) -> str | None:
    """Why the sparse decode kernel cannot take a call of these shapes, or None if it can."""
    q, k_cache = operands["q"], operands["k_cache"]
    if (reason := _declined_dtypes(q, k_cache, cache_format)) is not None:
        return reason
    if (reason := _declined_dims(q, head_dim_v, _SPARSE_DIMS[cache_format])) is not None:
        return reason
    if cache_format == "fp8_v4":
        for size in (page_size, extra_page_size):
            if (reason := _declined_v4_pages(size)) is not None:
                return reason
    names = ("q", "k_cache", "indices", "extra_k_cache", "extra_indices")
    return _declined_sizes(*(operands[name] for name in names))


def workspace_shapes(
    slots: int, *, slices: int, rows: int, head_dim_v: int, cache_format: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes, in floats, of the values and the sums of partial results.

    See csrc/common/partial_results.h. ``rows`` are those of a request, which fall into ``slices``
    that share no keys: KV heads or, if they choose their keys, query tokens. Values are rounded to
    half a float, but by some of the kernels for FP8 caches.
    """
    leading = (slots, slices, -(-(rows // max(slices, 1)) // 16))
    is_plain = cache_format == "plain"
    values, groups = 16 * head_dim_v // (2 if is_plain else 1), 2 if is_plain else 8
    return (*leading, values), (*leading, groups * 32 * 4)


def _call_decode(
    target: str,
    arrays: Sequence[jax.Array],
    *,
    q: jax.Array,
    head_dim_v: int,
    slices: int,
    num_parts: int,
    capacity: int,
    softmax_scale: float,
    batch_invariant: bool,
    fp8_matmul: bool,
    power_of_two_scales: bool,
    cache_format: str,
    page_size: int,
    **attributes: Any,
) -> tuple[jax.Array, jax.Array]:
    """The FFI call of a decode operation: its results and the workspace for split requests.

    ``capacity`` is the most tokens of a request, those of each run filled up to whole blocks.
    """
    b, s_q, h_q, _ = q.shape
    if batch_invariant:
        slots = b * max_invariant_splits(capacity)
    else:
        # A part begins and ends inside a request at most once each; one part cuts nothing.
        slots = 2 * num_parts if num_parts > 1 else 0
    partial = workspace_shapes(
        slots, slices=slices, rows=s_q * h_q, head_dim_v=head_dim_v, cache_format=cache_format
    )
    call = jax.ffi.ffi_call(
        target,
        (
            jax.ShapeDtypeStruct((b, s_q, h_q, head_dim_v), q.dtype),
            jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in partial),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ),
    )
    out, lse, *_ = call(
        *arrays,
        softmax_scale=np.float32(softmax_scale),
        batch_invariant=np.bool_(batch_invariant),
        fp8_matmul=np.bool_(fp8_matmul),
        power_of_two_scales=np.bool_(power_of_two_scales),
        cache_format=np.int32(FORMAT_CODES[cache_format]),
        page_size=np.int32(page_size),
        **attributes,
    )
    return out, lse


def dense_decode(
    operands: Operands,
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
) -> tuple[jax.Array, ...]:
    """Dense decode by the kernels in csrc/sm90 and csrc/smxx/combine.cu."""
    q, k_cache, block_table = operands["q"], operands["k_cache"], operands["block_table"]
    b, s_q, h_q, _ = q.shape
    h_kv = k_cache.shape[2]
    schedule = operands.get("tile_scheduler_metadata")
    if schedule is None:
        row_tiles = _planning.dense_row_tiles(h_kv, s_q * h_q // h_kv)
        schedule, _ = metadata(
            {"cache_seqlens": operands["cache_seqlens"]},
            batch_size=b,
            row_tiles=row_tiles,
            topk=None,
            extra_topk=None,
            num_sm_parts=num_sm_parts or _planning.default_num_sm_parts(row_tiles),
            batch_invariant=batch_invariant,
        )
    sink = operands.get("attn_sink")
    return _call_decode(
        "flashmla_dense_decode",
        (
            q,
            k_cache,
            block_table,
            operands["cache_seqlens"],
            schedule,
            _absent(jnp.float32) if sink is None else sink,
        ),
        q=q,
        head_dim_v=head_dim_v,
        slices=h_kv,
        num_parts=schedule.shape[0],
        capacity=block_table.shape[1] * page_size,
        softmax_scale=softmax_scale,
        batch_invariant=batch_invariant,
        fp8_matmul=fp8_matmul,
        power_of_two_scales=power_of_two_scales,
        cache_format=cache_format,
        page_size=page_size,
        causal=np.bool_(causal),
    )


def selected_capacity(topk: int, extra_topk: int | None = None) -> int:
    """Tokens of the whole blocks that hold the choices from one cache, and from a second one."""
    blocks = -(-topk // scheduler.BLOCK) + -(-(extra_topk or 0) // scheduler.BLOCK)
    return blocks * scheduler.BLOCK


def sparse_decode(
    operands: Operands,
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
) -> tuple[jax.Array, ...]:
    """Sparse decode by the kernels in csrc/sm90 and csrc/smxx/combine.cu."""
    q, k_cache, indices = operands["q"], operands["k_cache"], operands["indices"]
    b, s_q, h_q, _ = q.shape
    extra_indices = operands.get("extra_indices")
    topk = indices.shape[-1]
    extra_topk = None if extra_indices is None else extra_indices.shape[-1]
    schedule = operands.get("tile_scheduler_metadata")
    if schedule is None:
        row_tiles = _planning.sparse_row_tiles(1, h_q, s_q)
        schedule, _ = metadata(
            operands,
            batch_size=b,
            row_tiles=row_tiles,
            topk=topk,
            extra_topk=extra_topk,
            num_sm_parts=num_sm_parts or _planning.default_num_sm_parts(row_tiles),
            batch_invariant=batch_invariant,
        )

    def given(name: str, dtype: Any) -> jax.Array:
        value = operands.get(name)
        return _absent(dtype) if value is None else value

    return _call_decode(
        "flashmla_sparse_decode",
        (
            q,
            k_cache,
            indices,
            given("topk_length", jnp.int32),
            given("attn_sink", jnp.float32),
            given("extra_k_cache", k_cache.dtype),
            given("extra_indices", jnp.int32),
            given("extra_topk_length", jnp.int32),
            schedule,
        ),
        q=q,
        head_dim_v=head_dim_v,
        slices=s_q,
        num_parts=schedule.shape[0],
        capacity=selected_capacity(topk, extra_topk),
        softmax_scale=softmax_scale,
        batch_invariant=batch_invariant,
        fp8_matmul=fp8_matmul,
        power_of_two_scales=power_of_two_scales,
        cache_format=cache_format,
        page_size=page_size,
        extra_page_size=np.int32(extra_page_size or 0),  # 0: there is no extra cache
    )
