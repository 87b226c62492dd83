"""The paged KV cache: a pytree around the cache array, and the arithmetic of pages and slots.

A cache is a pool of pages of ``page_size`` tokens. A *slot* is one token's place in it,
``page * page_size + offset``. A *block table* int32[b, n] lists the pages of each request:
token ``i`` of request ``r`` lies in page ``block_table[r, i // page_size]`` at offset
``i % page_size``. The slot -1 stands for "no token": appending to it does nothing, and the sparse
operations skip it.

Several layers share one array (a scan over stacked per-layer caches would copy a layer out of
the stack and back at every step): pages of layer ``l`` are ``l * num_pages`` and up, and
`offset_block_table` and `offset_slots` move tables and slots made for one layer there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashmla import _checks, _cuda_cache, _dispatch, _folding
from jax_flashmla import quantization as _q
from jax_flashmla._primitive import Operation
from jax_flashmla.reference import latents as _latents

Array = jax.Array

_INT32_MAX = 2**31 - 1


# ---------------------------------------------------------------------------------------------
# Slots


def _join_slots(
    valid: Array, page: Array, offset: Array, page_size: int, page_offset: Array | int
) -> Array:
    """``(page + page_offset) * page_size + offset`` where valid and representable, else -1.

    Offset is in [0, page_size), and page >= 0 where valid. Validity is decided by the caller before
    anything is added: garbage plus an offset may well be some page. A sum of two valid numbers
    that wraps is negative.
    """
    page = page + jnp.asarray(page_offset, jnp.int32)
    valid &= (page >= 0) & (page <= lax.div(_INT32_MAX - offset, jnp.int32(page_size)))
    return jnp.where(valid, jnp.where(valid, page, 0) * page_size + offset, -1)


def _check_int32(op: str, name: str, value: Any, expected: str) -> None:
    _checks.check_array(op, name, value, expected)
    _checks.check_dtype(op, name, value, (jnp.int32,))


def _check_page_offset(op: str, page_offset: Any, num_pages: Any) -> int | None:
    if _checks.is_array(page_offset) and not isinstance(page_offset, np.generic):
        _checks.check_dtype(op, "page_offset", page_offset, (jnp.int32,))
        _checks.check_shape(op, "page_offset", page_offset, (), ())
    else:
        page_offset = _checks.check_int(op, "page_offset", page_offset, 0)
        if page_offset > _INT32_MAX:
            raise ValueError(
                f"{op}: argument 'page_offset' is {page_offset}; expected at most {_INT32_MAX}"
            )
    if num_pages is None:
        if isinstance(page_offset, int) and page_offset == 0:
            return None
        raise ValueError(
            f"{op}: argument 'num_pages' is missing (None); expected the number of pages of one "
            "layer, without which a bad table entry could fall into another layer's pages"
        )
    return _checks.check_int(op, "num_pages", num_pages, 0)


@functools.partial(jax.jit, static_argnames=("page_size", "num_pages"))
def _lookup(
    indices: Array,
    block_table: Array,
    page_size: int,
    num_pages: int | None,
    page_offset: Array | int,
    limits: Array | None,
    rows: Array | None,
) -> Array:
    """Slots of ``indices`` through the table rows: rows given, or one per leading index, or one."""
    if block_table.shape[-1] == 0 or block_table.size == 0 or indices.size == 0:
        return jnp.full(indices.shape, -1, jnp.int32)
    valid = indices >= 0
    if limits is not None:
        valid &= indices < limits.reshape(limits.shape + (1,) * (indices.ndim - limits.ndim))
    column = lax.div(jnp.where(valid, indices, 0), jnp.int32(page_size))
    offset = lax.rem(jnp.where(valid, indices, 0), jnp.int32(page_size))
    valid &= column < block_table.shape[-1]
    if block_table.ndim == 1:
        starts = [column]
    else:
        if rows is None:
            rows = lax.broadcasted_iota(jnp.int32, indices.shape, 0)
        valid &= (rows >= 0) & (rows < block_table.shape[0])
        starts = [rows, column]
    page = _q._gather(block_table, starts, (1,) * block_table.ndim)
    valid &= page >= 0
    if num_pages is not None:
        valid &= page < num_pages
    return _join_slots(valid, page, offset, page_size, page_offset)


def token_slots(
    indices: Array,
    block_table: Array,
    page_size: int,
    *,
    num_pages: int | None = None,
    cache_seqlens: Array | None = None,
    page_offset: Array | int = 0,
) -> Array:
    """Logical token indices of requests to slots of the cache, through the block table.

    Makes the ``indices`` of sparse decode out of what an indexer chooses (positions within each
    request).

    Args:
      indices: int32 [b, ...] with a table per request, or int32 [...] with a single one.
      block_table: int32 [b, n], or int32 [n].
      page_size: tokens of a page.
      num_pages: pages of the cache (of one layer, if several share it). Without it, entries
        that are no page give slots past the cache, which every operation skips as well.
      cache_seqlens: int32 [b], or int32 [] with a single table. Indices from here on are
        invalid, so that whatever the table holds past a request's pages is never used.
      page_offset: added to each page, an int or an int32 scalar array (>= 0): the first page of a
        layer. Needs ``num_pages``.

    Returns:
      int32 of the shape of ``indices``: slots, and -1 for every index that is negative, past
      ``cache_seqlens`` or the table, whose table entry is no page, or whose slot passes 2**31 - 1.

    Raises:
      ValueError: a wrong shape or dtype.
    """
    op = "token_slots"
    _check_int32(op, "indices", indices, "int32 (b, ...)")
    _check_int32(op, "block_table", block_table, "int32 (b, n)")
    page_size = _checks.check_int(op, "page_size", page_size, 1)
    num_pages = _check_page_offset(op, page_offset, num_pages)
    lead = tuple(block_table.shape[:-1])
    if len(block_table.shape) not in (1, 2):
        _checks.check_rank(op, "block_table", block_table, ("b", "n"))
    if tuple(indices.shape[: len(lead)]) != lead:
        raise ValueError(
            f"{op}: argument 'indices' has shape {tuple(indices.shape)}; expected ({lead[0]}, ...) "
            f"to go with block_table {tuple(block_table.shape)}"
        )
    if cache_seqlens is not None:
        _check_int32(op, "cache_seqlens", cache_seqlens, "int32 (b,)")
        _checks.check_shape(op, "cache_seqlens", cache_seqlens, lead, ("b",)[: len(lead)])
        cache_seqlens = jnp.asarray(cache_seqlens)
    return _lookup(
        jnp.asarray(indices),
        jnp.asarray(block_table),
        page_size,
        num_pages,
        page_offset,
        cache_seqlens,
        None,
    )


def slot_mapping(
    block_table: Array,
    positions: Array,
    page_size: int,
    *,
    request_ids: Array | None = None,
    num_pages: int | None = None,
    page_offset: Array | int = 0,
) -> Array:
    """Slots where new tokens go, for `PagedKVCache.append`.

    Args:
      block_table: int32 [b, n], the pages of each request.
      positions: int32 [b, ...], positions in its request of each new token (before the append, the
        first new token of request r has position ``cache_seqlens[r]``); negative for none. With
        ``request_ids``: int32 [t].
      page_size: tokens of a page.
      request_ids: int32 [t], the row of the table that each of t packed tokens belongs to; a
        number that is no row gives -1.
      num_pages, page_offset: as in `token_slots`.

    Returns:
      int32 of the shape of ``positions``; -1 where there is no slot, as in `token_slots`.

    Raises:
      ValueError: a wrong shape or dtype.
    """
    op = "slot_mapping"
    _check_int32(op, "block_table", block_table, "int32 (b, n)")
    _checks.check_rank(op, "block_table", block_table, ("b", "n"))
    _check_int32(op, "positions", positions, "int32 (b, ...)")
    page_size = _checks.check_int(op, "page_size", page_size, 1)
    num_pages = _check_page_offset(op, page_offset, num_pages)
    if request_ids is not None:
        _checks.check_rank(op, "positions", positions, ("t",))
        _check_int32(op, "request_ids", request_ids, "int32 (t,)")
        _checks.check_shape(op, "request_ids", request_ids, positions.shape, ("t",))
        request_ids = jnp.asarray(request_ids)
    elif not positions.shape or positions.shape[0] != block_table.shape[0]:
        raise ValueError(
            f"{op}: argument 'positions' has shape {tuple(positions.shape)}; expected "
            f"({block_table.shape[0]}, ...) to go with block_table {tuple(block_table.shape)}, or "
            "request_ids"
        )
    return _lookup(
        jnp.asarray(positions),
        jnp.asarray(block_table),
        page_size,
        num_pages,
        page_offset,
        None,
        request_ids,
    )


def offset_block_table(block_table: Array, page_offset: Array | int, *, num_pages: int) -> Array:
    """Moves a block table made for one layer to the pages of another in a shared array.

    Args:
      block_table: int32, any shape; pages of one layer, 0 to ``num_pages - 1``.
      page_offset: first page of the layer, ``layer * num_pages``: an int or an int32 scalar array.
      num_pages: pages of one layer.

    Returns:
      int32 of the same shape: entry + page_offset, and -1 for every entry that is no page of the
      layer (garbage past a request's end would otherwise become another layer's page).

    Raises:
      ValueError: a wrong shape or dtype.
    """
    op = "offset_block_table"
    _check_int32(op, "block_table", block_table, "int32 (b, n)")
    num_pages = _checks.check_int(op, "num_pages", num_pages, 0)
    _check_page_offset(op, page_offset, num_pages)
    table = jnp.asarray(block_table)
    valid = (table >= 0) & (table < num_pages)
    return _join_slots(valid, table, jnp.zeros_like(table), 1, page_offset)


def offset_slots(
    slots: Array, page_offset: Array | int, *, num_pages: int, page_size: int
) -> Array:
    """Moves slots made for one layer (slot mappings, sparse indices) to another's pages.

    Args:
      slots: int32, any shape; slots of one layer, 0 to ``num_pages * page_size - 1``.
      page_offset: first page of the layer, ``layer * num_pages``: an int or an int32 scalar array.
      num_pages: pages of one layer.
      page_size: tokens of a page.

    Returns:
      int32 of the same shape: slot + page_offset * page_size, and -1 for every slot that is none
      of the layer or would pass 2**31 - 1.

    Raises:
      ValueError: a wrong shape or dtype.
    """
    op = "offset_slots"
    _check_int32(op, "slots", slots, "int32 (...)")
    num_pages = _checks.check_int(op, "num_pages", num_pages, 0)
    page_size = _checks.check_int(op, "page_size", page_size, 1)
    _check_page_offset(op, page_offset, num_pages)
    slots = jnp.asarray(slots)
    page, offset, valid = _split_slots(slots, num_pages, page_size)
    return _join_slots(valid, page, offset, page_size, page_offset)


def _split_slots(slots: Array, num_pages: int, page_size: int) -> tuple[Array, Array, Array]:
    """Page, offset and validity of slots; compares pages, as num_pages * page_size may overflow."""
    inside = jnp.maximum(slots, 0)
    page = lax.div(inside, jnp.int32(page_size))
    offset = lax.rem(inside, jnp.int32(page_size))
    return page, offset, (slots >= 0) & (page < num_pages)


# ---------------------------------------------------------------------------------------------
# Writing


def _scatter(data: Array, starts: list[Array], rows: Array) -> Array:
    """Writes rows [t, ...] at ``starts`` (int32 [t] for each leading axis); outside: dropped.

    The window of row i covers the trailing axes of data that rows has; of the axes named by
    ``starts``, those that rows lacks are single.
    """
    single = data.ndim - (rows.ndim - 1)
    return lax.scatter(
        data,
        jnp.stack(starts, axis=-1),
        rows,
        lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(1, rows.ndim)),
            inserted_window_dims=tuple(range(single)),
            scatter_dims_to_operand_dims=tuple(range(len(starts))),
        ),
        # Slots are distinct by contract, and skipped tokens are given distinct places outside.
        # Without this promise XLA on GPU writes bytes by compare-and-swap.
        unique_indices=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )


_APPEND_STATIC = (
    "cache_format",
    "page_size",
    "latent",
    "power_of_two_scales",
    "norm_eps",
    "rope_layout",
)


@functools.partial(jax.jit, static_argnames=_APPEND_STATIC)
def _append(
    data: Array,
    slots: Array,
    kv: Array,
    k_pe: Array | None,
    norm_weight: Array | None,
    rope_cos: Array | None,
    rope_sin: Array | None,
    *,
    cache_format: str,
    page_size: int,
    latent: int,
    power_of_two_scales: bool,
    norm_eps: float,
    rope_layout: str,
) -> Array:
    """``data`` with tokens written to ``slots`` int32[t]; t, pages > 0.

    kv is [t, h_kv, latent] beside k_pe [t, h_kv, rope], or both together without k_pe.
    """
    num_pages = data.shape[0]
    page, offset, valid = _split_slots(slots, num_pages, page_size)
    page = jnp.where(valid, page, num_pages + lax.iota(jnp.int32, page.shape[0]))
    if k_pe is None:
        kv, k_pe = kv[..., :latent], kv[..., latent:]
    if norm_weight is not None:
        kv = _latents.rms_norm(kv, norm_weight, norm_eps)
    if rope_cos is not None and rope_sin is not None:
        k_pe = _latents.rotate(k_pe, rope_cos[:, None], rope_sin[:, None], rope_layout)
    if cache_format == "plain":
        rows = jnp.concatenate([kv.astype(data.dtype), k_pe.astype(data.dtype)], axis=-1)
        return _scatter(data, [page, offset], rows)
    tokens = _q._encode_tokens(
        kv, k_pe, cache_format=cache_format, power_of_two_scales=power_of_two_scales
    )
    if cache_format == "fp8_v32":
        return _scatter(data, [page, offset], tokens)
    tokens = tokens[:, 0]
    data_at = offset * _q.V4_DATA_BYTES
    scales_at = page_size * _q.V4_DATA_BYTES + offset * _q.V4_SCALE_BYTES
    data = _scatter(data, [page, data_at], tokens[:, : _q.V4_DATA_BYTES])
    return _scatter(data, [page, scales_at], tokens[:, _q.V4_DATA_BYTES :])


append_operation = Operation(
    name="flash_mla_cache_append",
    operands=("data", "slots", "kv", "k_pe", "norm_weight", "rope_cos", "rope_sin"),
    results=("data",),
    abstract=lambda operands, **_: (operands["data"],),
    reference=lambda operands, **static: (_append(*operands.values(), **static),),
    cuda=_cuda_cache.append,
    cuda_declines=_cuda_cache.append_declines,
    fold=_folding.fold_cache_append,
    transforms_as_reference=True,
)


# ---------------------------------------------------------------------------------------------
# Reading


@functools.partial(jax.jit, static_argnames=("cache_format", "page_size", "dtype"))
def _gather_or_zero(
    data: Array, slots: Array, *, cache_format: str, page_size: int, dtype: Any
) -> Array:
    """Tokens of ``slots``, zeros where a slot is not in the cache; pages > 0."""
    _, _, valid = _split_slots(slots, data.shape[0], page_size)
    tokens = _q.gather_tokens(
        data,
        jnp.where(valid, slots, 0),
        cache_format=cache_format,
        page_size=page_size,
        dtype=dtype,
    )
    return jnp.where(valid[..., None, None], tokens, jnp.zeros((), dtype))


def _gather_abstract(
    operands: dict[str, Any], *, cache_format: str, page_size: int, dtype: Any
) -> tuple[jax.ShapeDtypeStruct, ...]:
    del page_size
    data, slots = operands["data"], operands["slots"]
    heads = data.shape[2] if cache_format == "plain" else 1
    shape = (*slots.shape, heads, _q.token_dim(cache_format, data.shape))
    return (jax.ShapeDtypeStruct(shape, dtype),)


gather_operation = Operation(
    name="flash_mla_cache_gather",
    operands=("data", "slots"),
    results=("tokens",),
    abstract=_gather_abstract,
    reference=lambda operands, **static: (_gather_or_zero(*operands.values(), **static),),
    cuda=_cuda_cache.gather,
    cuda_declines=_cuda_cache.gather_declines,
    fold=_folding.fold_cache_gather,
    transforms_as_reference=True,
)


# ---------------------------------------------------------------------------------------------
# The cache


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data",),
    meta_fields=("format", "page_size"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class PagedKVCache:
    """A paged KV cache: a pytree with one array and its static format.

    Make one with `zeros`, `from_array`, `from_dense` or `from_sequences`; the constructor itself
    checks nothing, since JAX also builds instances whose ``data`` is no array.
    `flash_mla_with_kvcache` takes it as ``k_cache`` and ``extra_k_cache``.

    Attributes:
      data: ``"plain"``: bfloat16, float16 or float32 [num_pages, page_size, h_kv, d];
        ``"fp8_v32"``: uint8 [num_pages, page_size, 1, 656]; ``"fp8_v4"``: uint8 [num_pages,
        page_bytes]. `jax_flashmla.quantization` describes the bytes. Further leading axes are
        allowed for `jax.vmap` over them.
      format: ``"plain"``, ``"fp8_v32"`` or ``"fp8_v4"``.
      page_size: tokens of a page.
    """

    data: Array
    format: str
    page_size: int

    # Shapes are read from the end: inside vmap, or stacked for it, they mean the same.

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self.data.shape[-2 if self.format == "fp8_v4" else -4]

    @property
    def num_slots(self) -> int:
        """Tokens that the cache has room for."""
        return self.num_pages * self.page_size

    @property
    def num_heads_k(self) -> int:
        """Key heads, h_kv; 1 in the FP8 formats."""
        return self.data.shape[-2] if self.format == "plain" else 1

    @property
    def head_dim(self) -> int:
        """Columns d of a (dequantised) token."""
        return _q.token_dim(self.format, self.data.shape)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        axes = 1 if self.format == "fp8_v4" else 3
        return int(np.prod(self.data.shape[-axes:])) * self.data.dtype.itemsize

    @property
    def dtype(self) -> np.dtype:
        """dtype of the tokens that `gather` returns: that of plain data, else bfloat16."""
        return np.dtype(self.data.dtype if self.format == "plain" else jnp.bfloat16)

    @classmethod
    def zeros(
        cls,
        num_pages: int,
        page_size: int = 64,
        *,
        format: str = "plain",
        num_heads_k: int | None = None,
        head_dim: int | None = None,
        dtype: Any = None,
    ) -> PagedKVCache:
        """A cache of zeros (zero bytes are tokens of zeros in every format).

        Args:
          num_pages: pages, >= 0; for several layers in one array, layers * pages of one.
          page_size: tokens of a page.
          format: ``"plain"``, ``"fp8_v32"`` or ``"fp8_v4"``.
          num_heads_k: key heads, default 1; the FP8 formats have one.
          head_dim: d, default that of the format, 576 for a plain cache.
          dtype: of a plain cache, bfloat16 (default), float16 or float32. Not given for FP8.

        Raises:
          ValueError: a bad value, or one that the format does not have.
        """
        op = "PagedKVCache.zeros"
        num_pages = _checks.check_int(op, "num_pages", num_pages, 0)
        page_size = _checks.check_int(op, "page_size", page_size, 1)
        _checks.check_choice(op, "format", format, _q.CACHE_FORMATS)
        heads = 1 if num_heads_k is None else _checks.check_int(op, "num_heads_k", num_heads_k, 1)
        fixed = 576 if format == "plain" else _q.FP8_FORMATS[format].dim
        dim = fixed if head_dim is None else _checks.check_int(op, "head_dim", head_dim, 1)
        if format == "plain":
            dtype = _q._check_result_dtype(op, dtype)
            return cls(jnp.zeros((num_pages, page_size, heads, dim), dtype), format, page_size)
        for name, value, expected in (("num_heads_k", heads, 1), ("head_dim", dim, fixed)):
            if value != expected:
                raise ValueError(
                    f"{op}: argument '{name}' is {value}; expected {expected} in format {format!r}"
                )
        if dtype is not None and np.dtype(dtype) != np.uint8:
            raise ValueError(
                f"{op}: argument 'dtype' is {np.dtype(dtype).name}; expected None (or uint8) in "
                f"format {format!r}, which is stored as bytes"
            )
        if format == "fp8_v4":
            shape: tuple[int, ...] = (num_pages, _q.page_bytes(page_size))
        else:
            shape = (num_pages, page_size, 1, _q.FP8_FORMATS[format].token_bytes)
        return cls(jnp.zeros(shape, jnp.uint8), format, page_size)

    @classmethod
    def from_array(
        cls, data: Array, *, format: str | None = None, page_size: int | None = None
    ) -> PagedKVCache:
        """Wraps a cache array as it is (see the attribute ``data``).

        Args:
          data: the array; V3.2 rows may also be typed float8_e4m3fn.
          format: default what the array can only be: uint8 with pages and bytes ``"fp8_v4"``, rows
            of 656 bytes ``"fp8_v32"``, floating-point numbers ``"plain"``.
          page_size: checked against the array if given.

        Raises:
          ValueError: the array is none of that format and page size; pages are not aligned to 16
            bytes.
        """
        op = "PagedKVCache.from_array"
        _checks.check_array(op, "data", data, "(num_pages, ...)")
        if format is None:
            bytes_of = "fp8_v4" if len(data.shape) == 2 else "fp8_v32"
            is_bytes = np.dtype(data.dtype) in (np.dtype(np.uint8), np.dtype(jnp.float8_e4m3fn))
            format = bytes_of if is_bytes else "plain"
        _checks.check_choice(op, "format", format, _q.CACHE_FORMATS)
        page_size = _q.check_cache_array(op, "data", data, format, page_size)
        array = jnp.asarray(data)
        return cls(array if format == "plain" else _q._byte_view(array), format, page_size)

    @classmethod
    def from_dense(
        cls, k_cache: Array, *, format: str = "plain", power_of_two_scales: bool = True
    ) -> PagedKVCache:
        """A cache with the pages of a floating-point one, quantised if the format says so.

        Args:
          k_cache: bfloat16, float16 or float32 [num_pages, page_size, h_kv, d].
          format: ``"plain"`` (kept as it is), ``"fp8_v32"`` (h_kv 1, d 576) or ``"fp8_v4"`` (h_kv
            1, d 512).
          power_of_two_scales: as in `quantize_kv`.

        Raises:
          ValueError: a wrong shape, dtype or format.
        """
        op = "PagedKVCache.from_dense"
        _checks.check_choice(op, "format", format, _q.CACHE_FORMATS)
        _q.check_cache_array(op, "k_cache", k_cache, "plain")
        if format == "plain":
            return cls.from_array(k_cache, format=format)
        data = _q.quantize_k_cache(
            k_cache, cache_format=format, power_of_two_scales=power_of_two_scales
        )
        return cls(data, format, k_cache.shape[1])

    @classmethod
    def from_sequences(
        cls,
        kv: Array,
        page_size: int = 64,
        *,
        format: str = "plain",
        power_of_two_scales: bool = True,
    ) -> tuple[PagedKVCache, Array]:
        """A cache filled with whole sequences, one after the other.

        Args:
          kv: bfloat16, float16 or float32 [b, s, h_kv, d]; each request's first s tokens.
          page_size: tokens of a page. s is padded with zeros to whole pages.
          format, power_of_two_scales: as in `from_dense`.

        Returns:
          ``(cache, block_table)`` with int32 [b, ceil(s / page_size)]: request r has the pages
          ``r * n`` to ``r * n + n - 1``.

        Raises:
          ValueError: a wrong shape, dtype or format.
        """
        op = "PagedKVCache.from_sequences"
        _checks.check_rank(op, "kv", kv, ("b", "s", "h_kv", "d"))
        _checks.check_dtype(op, "kv", kv, _q.PLAIN_DTYPES)
        page_size = _checks.check_int(op, "page_size", page_size, 1)
        b, s, heads, dim = kv.shape
        n = -(-s // page_size)
        padded = jnp.pad(jnp.asarray(kv), ((0, 0), (0, n * page_size - s), (0, 0), (0, 0)))
        cache = cls.from_dense(
            padded.reshape(b * n, page_size, heads, dim),
            format=format,
            power_of_two_scales=power_of_two_scales,
        )
        return cache, jnp.arange(b * n, dtype=jnp.int32).reshape(b, n)

    def _check_pages_first(self, op: str) -> None:
        rank = 2 if self.format == "fp8_v4" else 4
        if len(self.data.shape) != rank:
            raise ValueError(
                f"{op}: the cache's data has shape {tuple(self.data.shape)}; expected rank {rank}: "
                "jax.vmap over further leading axes, or make one flat cache and use page offsets"
            )

    def _rows(self, op: str, name: str, value: Any, lead: tuple[int, ...], width: int) -> Array:
        """``value`` [*lead, width] or [*lead, h_kv, width] as [t, h_kv, width]."""
        heads = self.num_heads_k
        _checks.check_array(op, name, value, f"(*slot_mapping.shape, {heads}, {width})")
        _checks.check_dtype(op, name, value, _q.PLAIN_DTYPES)
        shapes = [(*lead, heads, width)] + ([(*lead, width)] if heads == 1 else [])
        if tuple(value.shape) not in shapes:
            raise ValueError(
                f"{op}: argument '{name}' has shape {tuple(value.shape)}; expected "
                f"{' or '.join(map(str, shapes))} to go with slot_mapping {lead}"
            )
        return jnp.asarray(value).reshape(int(np.prod(lead)), heads, width)

    def _check_fused(
        self,
        op: str,
        lead: tuple[int, ...],
        latent: int,
        norm_weight: Any,
        norm_eps: Any,
        rope_cos: Any,
        rope_sin: Any,
        rope_layout: Any,
    ) -> tuple[dict[str, Array], float, str]:
        """Checks what is done to tokens before they are stored: operands, epsilon and layout."""
        _checks.check_choice(op, "rope_layout", rope_layout, _latents.ROPE_LAYOUTS)
        norm_eps = _checks.check_scale(op, "norm_eps", norm_eps)
        if norm_eps < 0:
            raise ValueError(f"{op}: argument 'norm_eps' is {norm_eps}; expected a number >= 0")
        given = {"norm_weight": norm_weight, "rope_cos": rope_cos, "rope_sin": rope_sin}
        operands: dict[str, Array] = {}
        for name, value in given.items():
            if value is not None and self.num_heads_k != 1:
                raise ValueError(
                    f"{op}: argument '{name}' is given for a cache of {self.num_heads_k} key "
                    "heads; expected a cache of one"
                )
        if norm_weight is None:
            norm_eps = 0.0
        else:
            _checks.check_shape(op, "norm_weight", norm_weight, (latent,), ("latent",))
            _checks.check_dtype(op, "norm_weight", norm_weight, _q.PLAIN_DTYPES)
            operands["norm_weight"] = jnp.asarray(norm_weight)
        if (rope_cos is None) != (rope_sin is None):
            missing = "rope_cos" if rope_cos is None else "rope_sin"
            raise ValueError(
                f"{op}: argument '{missing}' is missing (None); expected rope_cos and rope_sin, or "
                "neither"
            )
        if rope_cos is None:
            return operands, norm_eps, "interleaved"
        rope = self.head_dim - latent
        if rope == 0 or rope % 2:
            raise ValueError(
                f"{op}: argument 'rope_cos' is given, but the RoPE part has {rope} columns; "
                "expected an even number of them, and k_pe or norm_weight to say how many"
            )
        expected = (*lead, rope // 2)
        for name in ("rope_cos", "rope_sin"):
            value = given[name]
            _checks.check_array(op, name, value, f"float32 {expected}")
            _checks.check_dtype(op, name, value, (jnp.float32,))
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"{op}: argument '{name}' has shape {tuple(value.shape)}; expected {expected} "
                    f"to go with slot_mapping {lead} and {rope} RoPE columns"
                )
            operands[name] = jnp.asarray(value).reshape(int(np.prod(lead)), rope // 2)
        return operands, norm_eps, rope_layout

    def _rope_columns(self, k_pe: Any, norm_weight: Any, rope_cos: Any) -> int:
        """Columns of the RoPE part, as far as they are told; 0 if all columns are alike."""
        if self.format != "plain":
            return _q.FP8_FORMATS[self.format].rope
        if k_pe is not None:
            return k_pe.shape[-1] if k_pe.shape else 0
        if norm_weight is not None:
            return max(self.head_dim - (norm_weight.shape[-1] if norm_weight.shape else 0), 0)
        if rope_cos is not None:
            return 2 * rope_cos.shape[-1] if rope_cos.shape else 0
        return 0

    def append(
        self,
        kv: Array,
        slot_mapping: Array,
        *,
        k_pe: Array | None = None,
        power_of_two_scales: bool = True,
        norm_weight: Array | None = None,
        norm_eps: float = 1e-6,
        rope_cos: Array | None = None,
        rope_sin: Array | None = None,
        rope_layout: str = "interleaved",
        implementation: str | None = None,
    ) -> PagedKVCache:
        """Writes tokens to slots, quantised if the format says so.

        Donate the cache (``jax.jit(step, donate_argnums=...)``) and the array is updated in place;
        otherwise the whole cache is copied. (One case is out of reach: XLA of jaxlib 0.10 on CPU
        converts a whole bfloat16 array to float32 and back for any update. Use a newer jaxlib or
        another dtype there.)

        In the same pass the latent can be normalised (``norm_weight``) and the RoPE part rotated
        (``rope_cos``, ``rope_sin``), with the rounding of `jax_flashmla.flax.core`: both in
        float32, then rounded to the dtype of kv or k_pe, and from there to what is stored. The
        kernel gives the bits of numpy in float32, with the sum of squares added up in the order
        that docs/caches.md says; XLA's may differ in the last bit of that sum.

        Args:
          kv: tokens [t, h_kv, d] (or [t, d] if h_kv is 1), bfloat16, float16 or float32. With
            ``k_pe``, only their latent part [t, 512] or [t, 448] (or d less the columns of k_pe).
          slot_mapping: int32[t], or of any shape if kv has those axes in place of t. A slot that is
            negative or past the cache skips its token. Slots that occur twice leave either token,
            or a mixture of both.
          k_pe: the RoPE part [t, 64] (or [t, 1, 64]) if it is not in kv.
          power_of_two_scales: as in `quantize_kv`.
          norm_weight: [latent], bfloat16, float16 or float32: the latent becomes ``x / sqrt(mean(x
            ** 2) + norm_eps) * norm_weight``. Needs h_kv 1. Of a plain cache without ``k_pe`` its
            length says which columns are the latent.
          norm_eps: static, >= 0.
          rope_cos, rope_sin: float32 [t, rope / 2] (or with the axes of slot_mapping), the angles
            of each token: a pair (a, b) becomes (a cos - b sin, a sin + b cos). Needs h_kv 1.
          rope_layout: pairs are columns 2i and 2i + 1 (``"interleaved"``), or i and i + rope / 2
            (``"half_split"``).
          implementation: ``"cuda"``, ``"xla"``, or None for the kernel where it runs.

        Returns:
          The cache with the tokens written.

        Raises:
          ValueError: a wrong shape or dtype.
          NotImplementedError: ``implementation="cuda"`` where the kernel does not run.
        """
        op = "PagedKVCache.append"
        _dispatch.check_implementation(op, implementation)
        self._check_pages_first(op)
        _check_int32(op, "slot_mapping", slot_mapping, "int32 (t,)")
        lead = tuple(slot_mapping.shape)
        for name, value in (("k_pe", k_pe), ("norm_weight", norm_weight), ("rope_cos", rope_cos)):
            if value is not None:
                _checks.check_array(op, name, value, "(t, 64)" if name == "k_pe" else "(...)")
        rope = self._rope_columns(k_pe, norm_weight, rope_cos)
        latent = self.head_dim - rope
        if latent < 0:
            name = "rope_cos" if k_pe is None else "k_pe"
            too_wide: Any = rope_cos if k_pe is None else k_pe
            raise ValueError(
                f"{op}: argument '{name}' has shape {tuple(too_wide.shape)}, which is of {rope} "
                f"RoPE columns; expected at most the {self.head_dim} columns of the cache"
            )
        operands: dict[str, Any] = {"data": self.data}
        if k_pe is None:
            operands["kv"] = self._rows(op, "kv", kv, lead, self.head_dim)
        else:
            operands["kv"] = self._rows(op, "kv", kv, lead, latent)
            operands["k_pe"] = self._rows(op, "k_pe", k_pe, lead, rope)
        fused, norm_eps, rope_layout = self._check_fused(
            op, lead, latent, norm_weight, norm_eps, rope_cos, rope_sin, rope_layout
        )
        flag = _q._check_scales(op, self.format, power_of_two_scales)
        if operands["kv"].shape[0] == 0 or self.num_pages == 0:
            return self
        if rope == 0:  # k_pe without columns
            operands.pop("k_pe", None)
        (data,) = append_operation(
            {**operands, "slots": jnp.asarray(slot_mapping).reshape(-1), **fused},
            implementation=implementation,
            cache_format=self.format,
            page_size=self.page_size,
            latent=latent,
            power_of_two_scales=flag,
            norm_eps=norm_eps,
            rope_layout=rope_layout,
        )
        return dataclasses.replace(self, data=data)

    def gather(
        self, slots: Array, *, dtype: Any = None, implementation: str | None = None
    ) -> Array:
        """Reads tokens, dequantised.

        Args:
          slots: int32 [...].
          dtype: bfloat16, float16 or float32; default that of a plain cache, else bfloat16.
          implementation: ``"cuda"``, ``"xla"``, or None for the kernel where it runs.

        Returns:
          [..., h_kv, d]; zeros for slots that are negative or past the cache.

        Raises:
          ValueError: a wrong shape or dtype.
          NotImplementedError: ``implementation="cuda"`` where the kernel does not run.
        """
        op = "PagedKVCache.gather"
        _dispatch.check_implementation(op, implementation)
        self._check_pages_first(op)
        _check_int32(op, "slots", slots, "int32 (...)")
        dtype = _q._check_result_dtype(op, self.dtype if dtype is None else dtype)
        slots = jnp.asarray(slots)
        if self.num_pages == 0:
            return jnp.zeros((*slots.shape, self.num_heads_k, self.head_dim), dtype)
        (tokens,) = gather_operation(
            {"data": self.data, "slots": slots},
            implementation=implementation,
            cache_format=self.format,
            page_size=self.page_size,
            dtype=dtype,
        )
        return tokens

    def to_dense(self, *, dtype: Any = None) -> Array:
        """The whole cache dequantised: [num_pages, page_size, h_kv, d] (leading axes are kept).

        Args:
          dtype: bfloat16, float16 or float32; default that of a plain cache, else bfloat16.

        Raises:
          ValueError: a wrong dtype.
        """
        dtype = _q._check_result_dtype(
            "PagedKVCache.to_dense", self.dtype if dtype is None else dtype
        )
        return _q._decode_pages(
            self.data, cache_format=self.format, page_size=self.page_size, dtype=dtype
        )
