"""Calls of the kernels that write and read paged caches through XLA FFI, and what they cannot take.

The functions have the signatures that ``Operation`` asks for, as those of ``_cuda``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _cuda
from jax_flashmla import quantization as _q

Operands = dict[str, Any]

APPEND, GATHER = "flashmla_cache_append", "flashmla_cache_gather"

_INT32_MAX = 2**31 - 1
_MAX_COLUMNS = 2**30  # kMaxColumns in csrc/params.h
_PLAIN_DTYPES = tuple(np.dtype(dtype) for dtype in _q.PLAIN_DTYPES)


def _declined_cache(data: Any, cache_format: str, page_size: int) -> str | None:
    """Why the kernels take no such cache, or None. Making a `PagedKVCache` checks nothing."""
    stored = np.dtype(data.dtype)
    if cache_format == "plain":
        if stored not in _PLAIN_DTYPES:
            return f"the cache has dtype {stored.name}; the kernel takes bfloat16, float16, float32"
    elif stored != np.uint8:
        return f"the cache has dtype {stored.name}; the kernel takes uint8"
    if max(data.shape) > _INT32_MAX or data.shape[-1] > _MAX_COLUMNS:
        return "a dimension is larger than 2^31 - 1, or the last one than 2^30"
    if cache_format == "fp8_v4":
        expected = _q.page_bytes(page_size)
        if data.shape[1] != expected:
            return (
                f"pages have {data.shape[1]} bytes; the kernel takes {expected} for {page_size} "
                "tokens"
            )
        return None
    width = _q.FP8_FORMATS[cache_format].token_bytes if cache_format == "fp8_v32" else None
    if data.shape[1] != page_size or (width and data.shape[2:] != (1, width)):
        return f"the cache has shape {data.shape}, which is not that of its format and page size"
    return None


def append_declines(
    operands: Operands, *, cache_format: str, page_size: int, **_: Any
) -> str | None:
    """Why the kernel cannot write these tokens, or None if it can."""
    return _declined_cache(operands["data"], cache_format, page_size)


def append(
    operands: Operands,
    *,
    cache_format: str,
    page_size: int,
    latent: int,
    power_of_two_scales: bool,
    norm_eps: float,
    rope_layout: str,
) -> tuple[jax.Array, ...]:
    """The cache with tokens written by csrc/smxx/cache_append.cu: the same buffer, if donated."""

    def present(name: str, dtype: Any) -> jax.Array:
        value = operands[name]
        return _cuda._absent(dtype) if value is None else value

    data = operands["data"]
    call = jax.ffi.ffi_call(
        APPEND, (jax.ShapeDtypeStruct(data.shape, data.dtype),), input_output_aliases={0: 0}
    )
    return tuple(
        call(
            data,
            operands["slots"],
            operands["kv"],
            present("k_pe", operands["kv"].dtype),
            present("norm_weight", jnp.float32),
            present("rope_cos", jnp.float32),
            present("rope_sin", jnp.float32),
            format=np.int32(_cuda.FORMAT_CODES[cache_format]),
            page_size=np.int32(page_size),
            latent=np.int32(latent),
            power_of_two_scales=np.bool_(power_of_two_scales),
            norm_eps=np.float32(norm_eps),
            rope_interleaved=np.bool_(rope_layout == "interleaved"),
        )
    )


def gather_declines(
    operands: Operands, *, cache_format: str, page_size: int, **_: Any
) -> str | None:
    """Why the kernel cannot read these slots, or None if it can."""
    return _declined_cache(operands["data"], cache_format, page_size)


def gather(
    operands: Operands, *, cache_format: str, page_size: int, dtype: Any
) -> tuple[jax.Array, ...]:
    """Tokens of slots int32 [...], dequantised by csrc/smxx/cache_gather.cu: [..., h_kv, d]."""
    data, slots = operands["data"], operands["slots"]
    heads = data.shape[2] if cache_format == "plain" else 1
    token = (heads, _q.token_dim(cache_format, data.shape))
    call = jax.ffi.ffi_call(GATHER, (jax.ShapeDtypeStruct((slots.size, *token), dtype),))
    (tokens,) = call(
        data,
        slots.reshape(-1),
        format=np.int32(_cuda.FORMAT_CODES[cache_format]),
        page_size=np.int32(page_size),
    )
    return (tokens.reshape(*slots.shape, *token),)
