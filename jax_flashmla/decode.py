"""Decoding: attention of a few new query tokens of each request over its paged KV cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _cuda, _dispatch, _folding, quantization
from jax_flashmla._primitive import Operation
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.reference import decode as reference

_NAME = "flash_mla_with_kvcache"
_FLOAT8 = np.dtype(jnp.float8_e4m3fn)

# What XLA computes; the kernels take fewer types.
_PLAIN_QUERIES = (jnp.bfloat16, jnp.float16, jnp.float32)
# FP8 caches are dequantised to bfloat16, or not rounded at all for float32 queries.
_FP8_QUERIES = (jnp.bfloat16, jnp.float32)


# ---------------------------------------------------------------------------------------------
# Operations


def _abstract(operands: dict[str, Any], *, head_dim_v: int, **_: Any):
    b, s_q, h_q, _ = operands["q"].shape
    return (
        jax.ShapeDtypeStruct((b, s_q, h_q, head_dim_v), operands["q"].dtype),
        jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
    )


_COMMON_DIMS = {
    "q": "b s h d",
    "k_cache": "page slot k column | page byte",
    "attn_sink": "h | b h",
    "tile_scheduler_metadata": "part field",
    "num_splits": "bound",
    "out": "b s h v",
    "lse": "b h s",
}

dense_operation = Operation(
    name="flash_mla_dense_decode",
    operands=(
        "q",
        "k_cache",
        "block_table",
        "cache_seqlens",
        "tile_scheduler_metadata",
        "num_splits",
        "attn_sink",
    ),
    results=("out", "lse"),
    abstract=_abstract,
    reference=reference.dense_decode,
    cuda=_cuda.dense_decode,
    cuda_declines=_cuda.dense_decode_declines,
    fold=_folding.fold_dense_decode,
    dims={**_COMMON_DIMS, "block_table": "b n", "cache_seqlens": "b"},
    split=("b", "h"),
    follows={"k": "h"},
    keep_whole=("k_cache",),
    drop_when_split=("tile_scheduler_metadata", "num_splits"),
)

sparse_operation = Operation(
    name="flash_mla_sparse_decode",
    operands=(
        "q",
        "k_cache",
        "indices",
        "topk_length",
        "attn_sink",
        "extra_k_cache",
        "extra_indices",
        "extra_topk_length",
        "tile_scheduler_metadata",
        "num_splits",
    ),
    results=("out", "lse"),
    abstract=_abstract,
    reference=reference.sparse_decode,
    cuda=_cuda.sparse_decode,
    cuda_declines=_cuda.sparse_decode_declines,
    fold=_folding.fold_sparse_decode,
    dims={
        **_COMMON_DIMS,
        "indices": "b s topk",
        "topk_length": "b",
        "extra_k_cache": "extra_page extra_slot k column | extra_page extra_byte",
        "extra_indices": "b s extra_topk",
        "extra_topk_length": "b",
    },
    split=("b", "h"),
    follows={"k": "h"},
    keep_whole=("k_cache", "extra_k_cache"),
    drop_when_split=("tile_scheduler_metadata", "num_splits"),
)


# ---------------------------------------------------------------------------------------------
# Checks


class _Cache(NamedTuple):
    """A cache argument, whether it came as PagedKVCache or as an array."""

    data: Any
    format: str
    page_size: int
    h_kv: int
    d: int


def _shape_error(name: str, data: Any, expected: str) -> ValueError:
    return ValueError(
        f"{_NAME}: argument '{name}' is {np.dtype(data.dtype).name} of shape {tuple(data.shape)}; "
        f"expected {expected}"
    )


def _read_cache(name: str, value: Any, is_fp8: bool) -> _Cache:
    """Checks a cache and finds out its format, from its class or from its shape and dtype."""
    if isinstance(value, PagedKVCache):
        data, cache_format, page_size = value.data, value.format, value.page_size
        _checks.check_choice(_NAME, f"{name}.format", cache_format, quantization.CACHE_FORMATS)
        page_size = _checks.check_int(_NAME, f"{name}.page_size", page_size, 1)
        _checks.check_array(_NAME, f"{name}.data", data, "with pages first")
        name_of_data = f"{name}.data"
    else:
        expected = (
            "uint8 or float8_e4m3fn (pages, page_size, 1, 656), or a PagedKVCache"
            if is_fp8
            else "(pages, page_size, h_kv, d), or a PagedKVCache"
        )
        _checks.check_array(_NAME, name, value, expected)
        data, page_size, name_of_data = value, 0, name  # 0: to be read off the shape
        is_bytes = data.dtype == jnp.uint8 or data.dtype == _FLOAT8
        if is_bytes and len(data.shape) == 2:
            raise _shape_error(
                name,
                data,
                "a PagedKVCache(data, 'fp8_v4', page_size): an array alone does not say its format",
            )
        cache_format = "fp8_v32" if is_bytes else "plain"

    if is_fp8 != (cache_format != "plain"):
        found = f"a {np.dtype(data.dtype).name} cache" if cache_format == "plain" else cache_format
        raise ValueError(
            f"{_NAME}: argument 'is_fp8_kvcache' is {is_fp8}, but '{name}' is {found} of shape "
            f"{tuple(data.shape)}; expected is_fp8_kvcache={not is_fp8} or "
            + ("an FP8 cache" if is_fp8 else "a bfloat16, float16 or float32 cache")
        )

    if cache_format == "fp8_v4":
        _checks.check_dtype(_NAME, name_of_data, data, (jnp.uint8,))
        _checks.check_rank(_NAME, name_of_data, data, ("pages", "page_bytes"))
        page_bytes = quantization.page_bytes(page_size)
        if data.shape[1] != page_bytes:
            raise _shape_error(
                name_of_data, data, f"(pages, {page_bytes}) for page_size={page_size}"
            )
        return _Cache(data, cache_format, page_size, 1, quantization.token_dim("fp8_v4", ()))

    allowed = (jnp.uint8, _FLOAT8) if cache_format == "fp8_v32" else _PLAIN_QUERIES
    _checks.check_dtype(_NAME, name_of_data, data, allowed)
    _checks.check_rank(_NAME, name_of_data, data, ("pages", "page_size", "h_kv", "d"))
    _, rows, h_kv, _ = data.shape
    if rows < 1 or page_size not in (0, rows):
        raise _shape_error(
            name_of_data,
            data,
            "(pages, page_size, h_kv, d) with page_size "
            + (">= 1" if page_size == 0 else f"= {page_size}"),
        )
    row_bytes = quantization.FP8_FORMATS["fp8_v32"].token_bytes
    if cache_format == "fp8_v32" and data.shape[2:] != (1, row_bytes):
        raise _shape_error(name_of_data, data, f"(pages, page_size, 1, {row_bytes})")
    if h_kv < 1:
        raise _shape_error(name_of_data, data, "(pages, page_size, h_kv, d) with h_kv >= 1")
    return _Cache(data, cache_format, rows, h_kv, quantization.token_dim(cache_format, data.shape))


def _check_int32(name: str, value: Any, shape: tuple[int | None, ...], dims: tuple[str, ...]):
    """Checks rank, dtype and those sizes that are not None."""
    _checks.check_rank(_NAME, name, value, dims)
    _checks.check_dtype(_NAME, name, value, (jnp.int32,))
    full = tuple(s if e is None else e for s, e in zip(value.shape, shape, strict=True))
    _checks.check_shape(_NAME, name, value, full, dims)


def _check_optional_length(name: str, value: Any, b: int) -> None:
    if value is not None:
        _check_int32(name, value, (b,), ("b",))


def _check_schedule(metadata: Any, num_splits: Any, num_sm_parts: int | None, b: int) -> None:
    pair = (("tile_scheduler_metadata", metadata), ("num_splits", num_splits))
    if metadata is None and num_splits is None:
        return
    for (name, value), (other, _) in (pair, pair[::-1]):
        if value is None:
            raise ValueError(
                f"{_NAME}: argument '{name}' is missing (None) though '{other}' is given; expected "
                "both results of get_mla_metadata, or neither"
            )
    _check_int32("tile_scheduler_metadata", metadata, (None, 8), ("num_sm_parts", "fields"))
    _check_int32("num_splits", num_splits, (b + 1,), ("b + 1",))
    parts = metadata.shape[0]
    if parts < 1:
        raise ValueError(
            f"{_NAME}: argument 'tile_scheduler_metadata' has shape {tuple(metadata.shape)}; "
            "expected (num_sm_parts, 8) with num_sm_parts >= 1"
        )
    if num_sm_parts not in (None, parts):
        raise ValueError(
            f"{_NAME}: argument 'num_sm_parts' is {num_sm_parts}; expected None or {parts}, the "
            "rows of 'tile_scheduler_metadata'"
        )


def _check_query(q: Any, cache: _Cache, head_dim_v: Any) -> int:
    """Checks that q goes with the cache; returns head_dim_v."""
    allowed = (cache.data.dtype,) if cache.format == "plain" else _FP8_QUERIES
    if not any(q.dtype == dtype for dtype in allowed):
        raise ValueError(
            f"{_NAME}: argument 'q' has dtype {np.dtype(q.dtype).name}; expected "
            f"{' or '.join(np.dtype(dtype).name for dtype in allowed)}, to go with "
            + (
                f"the {np.dtype(cache.data.dtype).name} 'k_cache'"
                if cache.format == "plain"
                else f"an {cache.format} 'k_cache'"
            )
        )
    b, s_q, h_q, _ = q.shape
    _checks.check_shape(_NAME, "q", q, (b, s_q, h_q, cache.d), ("b", "s_q", "h_q", "d"))
    if h_q < 1 or h_q % cache.h_kv:
        raise ValueError(
            f"{_NAME}: argument 'q' has h_q={h_q} heads (shape {tuple(q.shape)}); expected a "
            f"multiple of h_kv={cache.h_kv}, at least that many"
        )
    head_dim_v = _checks.check_int(_NAME, "head_dim_v", head_dim_v, 1)
    if head_dim_v > cache.d:
        raise ValueError(
            f"{_NAME}: argument 'head_dim_v' is {head_dim_v}; expected at most d={cache.d}, since "
            "the values are the first head_dim_v columns of the keys"
        )
    return head_dim_v


def _check_not_plain(cache: _Cache, argument: str, expected: str) -> None:
    """Checks that the cache is one that the argument, which is True, can be for."""
    if cache.format == "plain":
        raise ValueError(
            f"{_NAME}: argument '{argument}' is True, but 'k_cache' is a "
            f"{np.dtype(cache.data.dtype).name} cache of shape {tuple(cache.data.shape)}; expected "
            f"{argument}=False or {expected}"
        )


def _check_fp8_matmul(cache: _Cache) -> None:
    """Checks that products in FP8 can be had over this cache."""
    _check_not_plain(cache, "fp8_matmul", "a V3.2 FP8 cache, whose codes are what is multiplied")
    if cache.format != "fp8_v32":
        raise NotImplementedError(
            f"{_NAME}: 'fp8_matmul' supports caches of format 'fp8_v32'; 'k_cache' is "
            f"{cache.format!r}, whose values contain the RoPE columns, which are bfloat16"
        )


def _check_indices(indices: Any, q: Any, name: str, topk_name: str) -> None:
    b, s_q = q.shape[:2]
    _check_int32(name, indices, (b, s_q, None), ("b", "s_q", topk_name))


def _check_extra(cache: _Cache, extra: _Cache) -> None:
    """The extra cache must hold tokens of the same kind; the page size is its own."""
    ours = (cache.format, np.dtype(cache.data.dtype).name, cache.h_kv, cache.d)
    theirs = (extra.format, np.dtype(extra.data.dtype).name, extra.h_kv, extra.d)
    if ours != theirs:
        form = "format {}, dtype {}, h_kv={}, d={}"
        raise ValueError(
            f"{_NAME}: argument 'extra_k_cache' has {form.format(*theirs)}; expected those of "
            f"'k_cache': {form.format(*ours)}"
        )


# ---------------------------------------------------------------------------------------------
# Public function


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array | PagedKVCache,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array | None,
    head_dim_v: int,
    tile_scheduler_metadata: jax.Array | None = None,
    num_splits: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    extra_k_cache: jax.Array | PagedKVCache | None = None,
    extra_indices_in_kvcache: jax.Array | None = None,
    topk_length: jax.Array | None = None,
    extra_topk_length: jax.Array | None = None,
    *,
    implementation: str | None = None,
    batch_invariant: bool = False,
    fp8_matmul: bool = False,
    power_of_two_scales: bool = False,
    num_sm_parts: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Multi-head latent attention of new query tokens over a paged cache.

    In multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) with absorbed projections all
    query heads read one latent per token: it is the key, and its first ``head_dim_v`` columns are
    the value. For each request the operation computes

        ``out = softmax(softmax_scale * q k^T) v``,  ``lse = logsumexp(softmax_scale * q k^T)``

    with scores, softmax and sums in float32 and the probabilities rounded to the type of q before
    they weigh the values.

    Without ``indices`` the attention is **dense**: over the ``cache_seqlens[r]`` tokens of the
    pages in ``block_table[r]``. With ``indices`` it is **sparse**: each query token attends to the
    cache slots that are listed for it, ``page * page_size + offset`` (``token_slots`` makes them
    from token positions). A slot that is listed twice counts twice.

    A query token that has nothing to attend to (length 0, no valid index, everything masked) gets
    ``out = 0`` and ``lse = +inf``. Slots that nothing refers to may hold NaN, table entries past a
    request's length anything at all. Values cannot be checked under ``jit``, so they have rules:
    a negative length counts as 0; a length past the capacity of the table, or a table entry
    within the length that is no page, makes ``out`` and ``lse`` of that request NaN; a NaN in a
    token reaches the query tokens that attend to it, and with ``causal`` the kernels may bring it
    to the others of that request. No other request is affected.

    Args:
        q: [b, s_q, h_q, d] bfloat16 or float16, over FP8 caches bfloat16; float32 runs on XLA only.
            ``s_q`` is 1, or more with speculative decoding.
        k_cache: a :class:`PagedKVCache`, or an array whose shape says everything: of q's dtype
            [pages, page_size, h_kv, d], or uint8 or float8_e4m3fn [pages, page_size, 1, 656] (the
            FP8 format of DeepSeek V3.2). Dequantised tokens are bfloat16, or not rounded if q is
            float32. ``h_q`` must be a multiple of ``h_kv``; query head i reads key head
            ``i // (h_q // h_kv)``.
        block_table: int32[b, n], the pages of each request in order. Not used by sparse attention,
            and may be None there.
        cache_seqlens: int32[b], tokens of each request, those of q's tokens included. Not used by
            sparse attention, and may be None there.
        head_dim_v: columns of the values, 512 in DeepSeek's models, at most d.
        tile_scheduler_metadata: the first result of :func:`get_mla_metadata`, which plans how the
            work is divided, once for all layers; with it ``num_splits``. Without, each call plans
            for itself. It only balances the work: made for other lengths, results stay right; made
            for another batch size, head count or kind of attention, they are NaN.
        num_splits: the second result of :func:`get_mla_metadata`.
        softmax_scale: factor of the scores, a static Python float; default ``d ** -0.5``. Real
            models need another: ``(nope + rope) ** -0.5`` of the head dimensions *before*
            absorption (``192 ** -0.5`` for DeepSeek V3), times mscale² under YaRN.
        causal: query i of a request sees the tokens ``j <= cache_seqlens - s_q + i`` only. An
            error with ``indices``.
        is_fp8_kvcache: whether the caches are FP8; must agree with them.
        indices: int32[b, s_q, topk] slots; those that are negative or no slot of the cache are
            skipped.
        attn_sink: float32[h_q], a logit for each head that takes part in the softmax without a
            value: ``out *= 1 / (1 + exp(attn_sink - lse))``. +inf gives zeros, -inf no effect;
            ``lse`` does not contain it.
        extra_k_cache: a second cache for sparse attention, of the same format and with its own page
            size; one softmax is taken over the tokens of both. DeepSeek V4: the sliding window is
            in ``k_cache`` and the compressed tokens are here.
        extra_indices_in_kvcache: int32[b, s_q, extra_topk] slots of ``extra_k_cache``.
        topk_length: int32[b]: only the first so many of a request's ``indices`` count (none if
            negative, all if larger than topk); the others are never looked at.
        extra_topk_length: int32[b], likewise for ``extra_indices_in_kvcache``.
        implementation: "cuda" for the kernels (an error where they do not support the case), "xla"
            for plain XLA, None for the best that supports the case.
        batch_invariant: results of a request have the same bits alone and in any batch. The
            metadata must be made with the same.
        fp8_matmul: over a V3.2 FP8 cache, dense or sparse, let the kernels multiply in FP8: faster
            with many requests, and less exact. The latent columns of q and the softmax weights are
            rounded to float8_e4m3fn, three bits of mantissa, and multiplied with the codes of the
            cache as they are; RoPE columns stay bfloat16, and scales are applied in float32. With
            up to 32 rows (query heads, times query tokens if dense) and on XLA it has no effect:
            the products stay as they are without it, which is more exact.
        power_of_two_scales: over an FP8 cache, a promise: all scales of the tokens attended to are
            powers of two from 2^-15 to 2^7, or 0, as this library writes them unless told otherwise
            (and as long as latents are below 57,344). Kernels for more than 32 rows (query heads,
            times query tokens if dense) are faster so. A token that breaks the promise may make
            the results of those that attend to it NaN, and with ``causal`` those of its request.
        num_sm_parts: how many parts the work is divided into when no metadata is given; by
            default as many as fit on the GPU. Any number gives right results.

    Returns:
        ``out`` [b, s_q, h_q, head_dim_v] in q's dtype, and ``lse`` float32[b, h_q, s_q], the
        natural logarithm of the sum of exponentials of the scaled scores.

    Raises:
        ValueError: an argument is missing, or of the wrong type, shape or dtype, or contradicts
            another one. The message names the argument, what it is and what was expected.
        NotImplementedError: sparse attention over more than one key head; ``fp8_matmul`` over a V4
            cache; derivatives; and ``implementation="cuda"`` for a case or on a platform without a
            kernel.
    """
    causal = _checks.check_bool(_NAME, "causal", causal)
    is_fp8_kvcache = _checks.check_bool(_NAME, "is_fp8_kvcache", is_fp8_kvcache)
    batch_invariant = _checks.check_bool(_NAME, "batch_invariant", batch_invariant)
    fp8_matmul = _checks.check_bool(_NAME, "fp8_matmul", fp8_matmul)
    power_of_two_scales = _checks.check_bool(_NAME, "power_of_two_scales", power_of_two_scales)
    _dispatch.check_implementation(_NAME, implementation)
    if num_sm_parts is not None:
        num_sm_parts = _checks.check_int(_NAME, "num_sm_parts", num_sm_parts, 1)

    _checks.check_rank(_NAME, "q", q, ("b", "s_q", "h_q", "d"))
    _checks.check_dtype(_NAME, "q", q, _PLAIN_QUERIES)
    cache = _read_cache("k_cache", k_cache, is_fp8_kvcache)
    head_dim_v = _check_query(q, cache, head_dim_v)
    if fp8_matmul:
        _check_fp8_matmul(cache)
    if power_of_two_scales:
        _check_not_plain(cache, "power_of_two_scales", "an FP8 cache, which has scales")
    b, _, h_q, d = q.shape
    if softmax_scale is None:
        softmax_scale = d**-0.5
    softmax_scale = _checks.check_scale(_NAME, "softmax_scale", softmax_scale)
    _check_schedule(tile_scheduler_metadata, num_splits, num_sm_parts, b)
    if attn_sink is not None:
        _checks.check_shape(_NAME, "attn_sink", attn_sink, (h_q,), ("h_q",))
        _checks.check_dtype(_NAME, "attn_sink", attn_sink, (jnp.float32,))
    if indices is None or block_table is not None:
        _check_int32("block_table", block_table, (b, None), ("b", "n"))
    if indices is None or cache_seqlens is not None:
        _check_int32("cache_seqlens", cache_seqlens, (b,), ("b",))

    operands = {
        "q": q,
        "k_cache": cache.data,
        "tile_scheduler_metadata": tile_scheduler_metadata,
        "num_splits": num_splits,
        "attn_sink": attn_sink,
    }
    static = {
        "head_dim_v": head_dim_v,
        "softmax_scale": softmax_scale,
        "cache_format": cache.format,
        "page_size": cache.page_size,
        "batch_invariant": batch_invariant,
        "fp8_matmul": fp8_matmul,
        "power_of_two_scales": power_of_two_scales,
        "num_sm_parts": num_sm_parts,
    }
    if indices is None:
        for name, value in (
            ("extra_k_cache", extra_k_cache),
            ("extra_indices_in_kvcache", extra_indices_in_kvcache),
            ("topk_length", topk_length),
            ("extra_topk_length", extra_topk_length),
        ):
            if value is not None:
                raise ValueError(
                    f"{_NAME}: argument '{name}' is given without 'indices'; expected None for "
                    "dense attention"
                )
        operands |= {"block_table": block_table, "cache_seqlens": cache_seqlens}
        static |= {"causal": causal}
        out, lse = dense_operation(operands, implementation=implementation, **static)
        return out, lse

    if causal:
        raise ValueError(
            f"{_NAME}: argument 'causal' is True with 'indices'; expected False for sparse "
            "attention: the indices say which tokens each query token may see"
        )
    _check_indices(indices, q, "indices", "topk")
    _check_optional_length("topk_length", topk_length, b)
    extra_page_size = None
    if extra_k_cache is None:
        for name, value in (
            ("extra_indices_in_kvcache", extra_indices_in_kvcache),
            ("extra_topk_length", extra_topk_length),
        ):
            if value is not None:
                raise ValueError(
                    f"{_NAME}: argument '{name}' is given without 'extra_k_cache'; expected both "
                    "or neither"
                )
    else:
        extra = _read_cache("extra_k_cache", extra_k_cache, is_fp8_kvcache)
        _check_extra(cache, extra)
        _check_indices(extra_indices_in_kvcache, q, "extra_indices_in_kvcache", "extra_topk")
        _check_optional_length("extra_topk_length", extra_topk_length, b)
        extra_page_size = extra.page_size
        operands |= {
            "extra_k_cache": extra.data,
            "extra_indices": extra_indices_in_kvcache,
            "extra_topk_length": extra_topk_length,
        }
    if cache.h_kv != 1:
        raise NotImplementedError(
            f"{_NAME}: sparse attention supports one key head, as in absorbed MLA, since 'indices' "
            f"are shared by all heads; 'k_cache' has h_kv={cache.h_kv}"
        )
    operands |= {"indices": indices, "topk_length": topk_length}
    out, lse = sparse_operation(
        operands, implementation=implementation, extra_page_size=extra_page_size, **static
    )
    return out, lse
