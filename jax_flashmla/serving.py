"""Pieces of a serving loop: who owns which page, and the arrays that a step needs from that.

On the host: `PageAllocator` hands out the pages of a cache and writes down the owners as numpy
arrays. It never sees the cache itself. On the device, under ``jit``: `plan_step` makes what all
layers of a step share, `copy_pages` copies pages on behalf of the allocator, and the other
functions move tokens between packed and batched arrays. None of them depends on a model.

Requests of a batch often have different numbers of new tokens (prompts in chunks, speculative
decoding). *Packed*, their tokens follow each other, ``[t, ...]``, with limits ``cu_seqlens``
int32[b + 1]. *Batched*, each request has ``s`` places, ``[b, s, ...]``. The padding of a batched
array comes **first**: a causal mask aligned to the bottom right then fits every request, since the
last place is always its last token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks
from jax_flashmla import cache as _cache
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.metadata import get_mla_metadata

Array = jax.Array

_INT32_MAX = 2**31 - 1


# ---------------------------------------------------------------------------------------------
# Pages on the host


class OutOfPagesError(RuntimeError):
    """There are not enough free pages. The allocator is as it was before the call.

    Attributes:
      needed: pages that the call needed.
      free: pages that are free.
    """

    def __init__(self, message: str, needed: int, free: int):
        super().__init__(message)
        self.needed = needed
        self.free = free


@dataclasses.dataclass
class _Request:
    tokens: int
    pages: list[int]


class PageAllocator:
    """Which request has which pages of a cache.

    A request is any hashable name but None. It has a number of tokens and the pages for them, in
    order; the last one may be partly filled. `fork` lets a request share the full pages of another
    one; a page that is partly filled has one owner, so that whoever grows writes to pages of its
    own. Pages that are shared become free with their last owner.

    Everything is plain Python on the host, in time proportional to the pages touched. The same
    calls in the same order give the same pages. One thread at a time.
    """

    def __init__(self, num_pages: int, page_size: int = 64):
        """An allocator of ``num_pages`` free pages.

        Args:
          num_pages: pages of the cache; of one layer, if several share it.
          page_size: tokens of a page.

        Raises:
          ValueError: a size is wrong, or slots would not fit in int32.
        """
        op = "PageAllocator"
        self._num_pages = _checks.check_int(op, "num_pages", num_pages, 0)
        self._page_size = _checks.check_int(op, "page_size", page_size, 1)
        if self._num_pages * self._page_size > _INT32_MAX:
            raise ValueError(
                f"{op}: argument 'num_pages' is {num_pages} with pages of {page_size} tokens; "
                f"expected at most {_INT32_MAX} tokens in all, since slots are int32"
            )
        # A stack, so that pages used a moment ago are used again; the first one out is page 0.
        self._free = list(range(self._num_pages))[::-1]
        self._owners = [0] * self._num_pages
        self._shared = 0
        self._requests: dict[Hashable, _Request] = {}

    def __repr__(self) -> str:
        return (
            f"PageAllocator({self._num_pages}, {self._page_size}): {len(self._requests)} requests, "
            f"{self.used_pages} pages used, {self.shared_pages} of them shared, "
            f"{self.free_pages} free"
        )

    def __contains__(self, request: Hashable) -> bool:
        return request in self._requests

    @property
    def num_pages(self) -> int:
        """All pages."""
        return self._num_pages

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._page_size

    @property
    def free_pages(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """Pages with an owner; one that is shared counts once."""
        return self._num_pages - len(self._free)

    @property
    def shared_pages(self) -> int:
        """Pages with several owners."""
        return self._shared

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """All requests, the oldest first."""
        return tuple(self._requests)

    def tokens(self, request: Hashable) -> int:
        """Tokens of a request."""
        return self._get("tokens", "request", request).tokens

    def pages(self, request: Hashable) -> tuple[int, ...]:
        """Pages of a request, in order."""
        return tuple(self._get("pages", "request", request).pages)

    # Changes. Each checks everything before it changes anything.

    def allocate(self, request: Hashable, tokens: int) -> None:
        """Adds a request with pages for ``tokens`` tokens, which may be 0.

        Raises:
          OutOfPagesError: there are not enough pages.
          ValueError: the request exists already, or tokens is negative.
        """
        self._check_new("allocate", request)
        tokens = self._check_tokens("allocate", tokens)
        pages = self._take("allocate", request, self._pages_of(tokens))
        self._requests[request] = _Request(tokens, pages)

    def grow(self, request: Hashable, tokens: int = 1) -> None:
        """Adds ``tokens`` tokens to the end of a request, with new pages as needed.

        Raises:
          OutOfPagesError: there are not enough pages.
          ValueError: there is no such request, or tokens is negative.
        """
        entry = self._get("grow", "request", request)
        total = entry.tokens + self._check_tokens("grow", tokens)
        entry.pages += self._take("grow", request, self._pages_of(total) - len(entry.pages))
        entry.tokens = total

    def fork(
        self, request: Hashable, source: Hashable, tokens: int | None = None
    ) -> list[tuple[int, int]]:
        """Adds a request that begins with the first ``tokens`` tokens of another one.

        Pages that these tokens fill are shared. If they end within a page, the new request gets
        that page as a copy, which is to be made on the device before any request of the two writes
        to the cache again (`page_copies`, `copy_pages`).

        Args:
          request: the new request.
          source: the request that has the tokens. It may go on growing, and may be freed.
          tokens: how many, default all that source has.

        Returns:
          The copies to make, ``[(source page, target page)]``: one, or none.

        Raises:
          OutOfPagesError: the copy needs a page and there is none.
          ValueError: the request exists already, the source does not, or it has fewer tokens.
        """
        self._check_new("fork", request)
        entry = self._get("fork", "source", source)
        tokens = entry.tokens if tokens is None else self._check_prefix("fork", tokens, source)
        full, rest = divmod(tokens, self._page_size)
        copied = self._take("fork", request, 1 if rest else 0)
        for page in entry.pages[:full]:
            self._shared += self._owners[page] == 1
            self._owners[page] += 1
        self._requests[request] = _Request(tokens, entry.pages[:full] + copied)
        return [(entry.pages[full], copied[0])] if rest else []

    def truncate(self, request: Hashable, tokens: int) -> list[tuple[int, int]]:
        """Takes tokens off the end of a request, such as drafted ones that were rejected.

        Returns:
          The copies to make, as `fork`: one if the request now ends within a page that it shares.

        Raises:
          OutOfPagesError: the copy needs a page and there is none.
          ValueError: there is no such request, or it has fewer than ``tokens`` tokens.
        """
        entry = self._get("truncate", "request", request)
        tokens = self._check_prefix("truncate", tokens, request)
        kept = self._pages_of(tokens)
        dropped = entry.pages[kept:]
        last = entry.pages[kept - 1] if tokens % self._page_size else None
        copies = last is not None and self._owners[last] > 1
        if copies and not any(self._owners[page] == 1 for page in dropped):
            self._check_free("truncate", request, 1)
        self._release(dropped)
        del entry.pages[kept:]
        entry.tokens = tokens
        if not copies:
            return []
        assert last is not None
        [page] = self._take("truncate", request, 1)
        self._release([last])
        entry.pages[-1] = page
        return [(last, page)]

    def free(self, request: Hashable) -> None:
        """Removes a request. Pages that no other request shares are free again.

        Raises:
          ValueError: there is no such request.
        """
        entry = self._get("free", "request", request)
        del self._requests[request]
        self._release(entry.pages)

    # Arrays

    def block_table(
        self, requests: Sequence[Hashable | None], width: int | None = None
    ) -> np.ndarray:
        """The block table of a batch.

        Args:
          requests: one for each row; None for a row without a request.
          width: columns, the same at every step so that nothing is compiled again; default as many
            as the longest request has pages.

        Returns:
          int32[b, width], padded with -1: no page, so that reading it by mistake gives NaN and not
          another request's tokens.

        Raises:
          ValueError: there is no such request, or it has more pages than ``width``.
        """
        op = "block_table"
        rows = [self._row(op, request).pages for request in requests]
        longest = max(map(len, rows), default=0)
        if width is None:
            width = longest
        width = _checks.check_int(f"PageAllocator.{op}", "width", width, 0)
        if longest > width:
            request = next(r for r, pages in zip(requests, rows, strict=True) if len(pages) > width)
            raise ValueError(
                f"PageAllocator.{op}: argument 'width' is {width}; expected at least {longest}, "
                f"since request {request!r} has {len(self._requests[request].pages)} pages"
            )
        table = np.full((len(rows), width), -1, np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return table

    def cache_seqlens(self, requests: Sequence[Hashable | None]) -> np.ndarray:
        """Tokens of each request of a batch, int32[b]; 0 for None.

        Raises:
          ValueError: there is no such request.
        """
        return np.array([self._row("cache_seqlens", r).tokens for r in requests], np.int32)

    def slots(self, request: Hashable, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Slots of the tokens ``start`` to ``stop - 1`` of a request, int32.

        Args:
          request: the request.
          start: the first token.
          stop: the token after the last, default the number of tokens.

        Raises:
          ValueError: there is no such request, or it has no such tokens.
        """
        entry = self._get("slots", "request", request)
        stop = entry.tokens if stop is None else self._check_prefix("slots", stop, request, "stop")
        start = self._check_tokens("slots", start, "start")
        if start > stop:
            raise ValueError(
                f"PageAllocator.slots: argument 'start' is {start}; expected at most stop={stop}"
            )
        positions = np.arange(start, stop)
        first = start // self._page_size
        pages = np.array(entry.pages[first : self._pages_of(stop)], np.int64)
        slots = pages[positions // self._page_size - first] * self._page_size
        return (slots + positions % self._page_size).astype(np.int32)

    def slot_mapping(
        self,
        requests: Sequence[Hashable | None],
        new_tokens: Sequence[int] | np.ndarray,
        size: int | None = None,
    ) -> np.ndarray:
        """Slots of the last tokens of each request, packed: where a step writes (`append`).

        Grow the requests first: the new tokens are the last ones.

        Args:
          requests: the batch; None for a row without a request.
          new_tokens: how many tokens each has, [b]; 0 for None.
          size: length of the result, the same at every step; default the sum of new_tokens.

        Returns:
          int32[size], -1 (no token) in the rest.

        Raises:
          ValueError: there is no such request, it has fewer tokens, or size is too small.
        """
        op = "PageAllocator.slot_mapping"
        if len(requests) != len(new_tokens):
            raise ValueError(
                f"{op}: argument 'new_tokens' has {len(new_tokens)} entries; expected one for each "
                f"of {len(requests)} requests"
            )
        parts = [np.zeros(0, np.int32)]
        for request, count in zip(requests, new_tokens, strict=True):
            count = _checks.check_int(op, "new_tokens", count, 0)
            length = self._row("slot_mapping", request).tokens
            if count > length:
                raise ValueError(
                    f"{op}: argument 'new_tokens' has {count} for request {request!r}; expected at "
                    f"most its {length} tokens (grow it first)"
                )
            if count:
                parts.append(self.slots(request, length - count, length))
        packed = np.concatenate(parts)
        size = len(packed) if size is None else _checks.check_int(op, "size", size, 0)
        if size < len(packed):
            raise ValueError(
                f"{op}: argument 'size' is {size}; expected at least the {len(packed)} new tokens"
            )
        return np.pad(packed, (0, size - len(packed)), constant_values=-1)

    # Parts of the above

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _get(self, op: str, name: str, request: Hashable) -> _Request:
        entry = self._requests.get(request)
        if entry is None:
            raise ValueError(
                f"PageAllocator.{op}: argument '{name}' is {request!r}; expected one of the "
                f"{len(self._requests)} requests that have been allocated and not freed"
            )
        return entry

    def _row(self, op: str, request: Hashable | None) -> _Request:
        return _Request(0, []) if request is None else self._get(op, "requests", request)

    def _check_new(self, op: str, request: Hashable) -> None:
        if request is None:
            raise ValueError(
                f"PageAllocator.{op}: argument 'request' is None; expected a name (None stands for "
                "rows without a request)"
            )
        if request in self._requests:
            raise ValueError(
                f"PageAllocator.{op}: argument 'request' is {request!r}, which exists already; "
                "expected a new name (or free it first)"
            )

    def _check_tokens(self, op: str, tokens: Any, name: str = "tokens") -> int:
        return _checks.check_int(f"PageAllocator.{op}", name, tokens, 0)

    def _check_prefix(self, op: str, tokens: Any, request: Hashable, name: str = "tokens") -> int:
        tokens = self._check_tokens(op, tokens, name)
        length = self._requests[request].tokens
        if tokens > length:
            raise ValueError(
                f"PageAllocator.{op}: argument '{name}' is {tokens}; expected at most {length}, "
                f"the tokens of request {request!r}"
            )
        return tokens

    def _check_free(self, op: str, request: Hashable, needed: int) -> None:
        if needed > len(self._free):
            raise OutOfPagesError(
                f"PageAllocator.{op}: request {request!r} needs {needed} more pages of "
                f"{self._page_size} tokens; {len(self._free)} of {self._num_pages} are free",
                needed,
                len(self._free),
            )

    def _take(self, op: str, request: Hashable, count: int) -> list[int]:
        """``count`` pages with one owner."""
        self._check_free(op, request, count)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def _release(self, pages: Sequence[int]) -> None:
        """One owner less. In reverse, so that pages come out in order again."""
        for page in reversed(pages):
            self._owners[page] -= 1
            self._shared -= self._owners[page] == 1
            if self._owners[page] == 0:
                self._free.append(page)


def page_copies(
    copies: Iterable[tuple[int, int]], size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Copies that an allocator asked for, as arrays for `copy_pages`.

    Args:
      copies: pairs (source, target), all that were asked for since the last time, in that order.
        A page that is copied again, or given to another request, comes out right.
      size: length of the arrays, the same at every step; default as many as there are copies.

    Returns:
      ``(sources, targets)``, each int32[size], -1 in the rest.

    Raises:
      ValueError: size is too small.
    """
    op = "page_copies"
    # copy_pages reads all pages before it writes any. So follow each page back to where its
    # contents are before the first copy.
    origin: dict[int, int] = {}
    for source, target in copies:
        origin[target] = origin.get(source, source)
    pairs = [(source, target) for target, source in origin.items() if source != target]
    size = len(pairs) if size is None else _checks.check_int(op, "size", size, 0)
    if len(pairs) > size:
        raise ValueError(
            f"{op}: argument 'size' is {size}; expected at least {len(pairs)}, the number of copies"
        )
    padded = np.full((2, size), -1, np.int32)
    padded[:, : len(pairs)] = np.array(pairs, np.int32).reshape(-1, 2).T
    return padded[0], padded[1]


def cu_seqlens(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Limits of packed sequences, int32[b + 1], from their lengths: 0, then running sums.

    Raises:
      ValueError: the lengths are not one row of integers >= 0, or their sum passes int32.
    """
    values = np.asarray(lengths)
    if values.size == 0:
        values = values.astype(np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu" or (values < 0).any():
        raise ValueError(
            f"cu_seqlens: argument 'lengths' is {lengths!r}; expected integers >= 0 of shape (b,)"
        )
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    if sums[-1] > _INT32_MAX:
        raise ValueError(
            f"cu_seqlens: argument 'lengths' has sum {sums[-1]}; expected at most {_INT32_MAX}"
        )
    return sums.astype(np.int32)


# ---------------------------------------------------------------------------------------------
# Pages on the device


def copy_pages(
    cache: PagedKVCache, sources: Array, targets: Array, *, num_pages: int | None = None
) -> PagedKVCache:
    """Copies whole pages within a cache, in all layers that share it.

    Donate the cache (``jax.jit(copy_pages, donate_argnames="cache", static_argnames="num_pages")``)
    and the array is updated in place, as by `PagedKVCache.append`. All pages are read before any is
    written.

    Args:
      cache: the cache.
      sources: int32[n], pages to read.
      targets: int32[n], pages to write, each at most once. Where source or target is no page (-1),
        nothing is copied.
      num_pages: pages of one layer, if the cache holds several: pages ``l * num_pages`` and up
        belong to layer ``l``, and each layer gets the same copies. Default: all pages.

    Returns:
      The cache with the pages copied.

    Raises:
      ValueError: a wrong shape or dtype, or num_pages does not divide the pages of the cache.
    """
    op = "copy_pages"
    if not isinstance(cache, PagedKVCache):
        raise ValueError(
            f"{op}: argument 'cache' is a {type(cache).__name__}; expected a PagedKVCache"
        )
    cache._check_pages_first(op)
    _check_vector(op, "sources", sources, "n")
    _check_vector(op, "targets", targets, "n")
    _checks.check_shape(op, "targets", targets, sources.shape, ("n",))
    if num_pages is None:
        num_pages = cache.num_pages
    num_pages = _checks.check_int(op, "num_pages", num_pages, 0)
    layers, rest = divmod(cache.num_pages, num_pages) if num_pages else (0, cache.num_pages)
    if rest:
        raise ValueError(
            f"{op}: argument 'num_pages' is {num_pages}; expected a divisor of the cache's "
            f"{cache.num_pages} pages"
        )
    if layers == 0 or sources.shape[0] == 0:
        return cache
    sources, targets = jnp.asarray(sources), jnp.asarray(targets)
    first = num_pages * jnp.arange(layers, dtype=jnp.int32)[:, None]
    valid = (sources >= 0) & (sources < num_pages) & (targets >= 0) & (targets < num_pages)
    pages = cache.data[(jnp.where(valid, sources, 0) + first).reshape(-1)]
    # Copies that are skipped go to distinct places outside: the scatter may then rely on all being
    # distinct.
    outside = cache.num_pages + jnp.arange(pages.shape[0], dtype=jnp.int32)
    where = jnp.where(valid, targets + first, outside.reshape(layers, -1)).reshape(-1)
    return dataclasses.replace(cache, data=_cache._scatter(cache.data, [where], pages))


def _check_vector(op: str, name: str, value: Any, length: str) -> None:
    _checks.check_rank(op, name, value, (length,))
    _checks.check_dtype(op, name, value, (jnp.int32,))


# ---------------------------------------------------------------------------------------------
# One plan for all layers of a step


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("block_table", "cache_seqlens", "positions", "slots", "schedule"),
    meta_fields=("num_pages", "page_size"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """What all layers of a step share, made by `plan_step`. A pytree.

    Attributes:
      block_table: int32[b, n], pages within a layer.
      cache_seqlens: int32[b], tokens of each request, new ones included.
      positions: int32[b, s], the position of each new token in its request, -1 for padding.
      slots: int32[b, s], where it goes within a layer's pages, -1 for padding.
      schedule: the two results of `get_mla_metadata`.
      num_pages: pages of one layer.
      page_size: tokens of a page.
    """

    block_table: Array
    cache_seqlens: Array
    positions: Array
    slots: Array
    schedule: tuple[Array | None, Array | None]
    num_pages: int
    page_size: int

    def layer(self, index: Array | int) -> tuple[Array, Array]:
        """``(block_table, slots)`` of a layer in a cache of layers x num_pages pages.

        Args:
          index: the layer, an int or an int32 scalar array (in a scan over layers).
        """
        first = jnp.asarray(index, jnp.int32) * self.num_pages
        table = _cache.offset_block_table(self.block_table, first, num_pages=self.num_pages)
        slots = _cache.offset_slots(
            self.slots, first, num_pages=self.num_pages, page_size=self.page_size
        )
        return table, slots


def plan_step(
    block_table: Array,
    cache_seqlens: Array,
    new_tokens: Array,
    max_new_tokens: int,
    *,
    num_pages: int,
    page_size: int,
    num_heads_q: int,
    num_heads_k: int = 1,
    **metadata: Any,
) -> StepPlan:
    """Positions, slots and schedule of a decoding step, once for all layers. Runs under ``jit``.

    Args:
      block_table: int32[b, n], pages within a layer.
      cache_seqlens: int32[b], tokens of each request, new ones included.
      new_tokens: int32[b], how many of these are new; 0 for rows without a request.
      max_new_tokens: s, places for new tokens of each request, a static int. Padding comes first.
        Of a request with more new tokens the last s count.
      num_pages: pages of one layer.
      page_size: tokens of a page.
      num_heads_q, num_heads_k: query heads and key heads of the attention (on this device).
      **metadata: further arguments of `get_mla_metadata`, such as ``topk`` or ``batch_invariant``.

    Raises:
      ValueError: a wrong shape, dtype or size.
    """
    op = "plan_step"
    _checks.check_rank(op, "block_table", block_table, ("b", "n"))
    positions = new_token_positions(cache_seqlens, new_tokens, max_new_tokens)
    _checks.check_shape(op, "cache_seqlens", cache_seqlens, block_table.shape[:1], ("b",))
    num_heads_k = _checks.check_int(op, "num_heads_k", num_heads_k, 1)
    num_heads_q = _checks.check_int(op, "num_heads_q", num_heads_q, 1)
    if num_heads_q % num_heads_k:
        raise ValueError(
            f"{op}: argument 'num_heads_q' is {num_heads_q}; expected a multiple of "
            f"num_heads_k={num_heads_k}"
        )
    slots = _cache.slot_mapping(block_table, positions, page_size, num_pages=num_pages)
    rows = max_new_tokens * num_heads_q // num_heads_k
    schedule = get_mla_metadata(cache_seqlens, rows, num_heads_k, num_heads_q, **metadata)
    return StepPlan(
        jnp.asarray(block_table),
        jnp.asarray(cache_seqlens),
        positions,
        slots,
        schedule,
        num_pages,
        page_size,
    )


def new_token_positions(cache_seqlens: Array, new_tokens: Array, max_new_tokens: int) -> Array:
    """Positions of new tokens in their requests, batched, padding first.

    Args:
      cache_seqlens: int32[b], tokens of each request, new ones included.
      new_tokens: int32[b], how many of these are new.
      max_new_tokens: s, a static int.

    Returns:
      int32[b, s], -1 for padding: for `slot_mapping` and rotary embeddings.

    Raises:
      ValueError: a wrong shape, dtype or size.
    """
    op = "new_token_positions"
    _check_vector(op, "cache_seqlens", cache_seqlens, "b")
    _check_vector(op, "new_tokens", new_tokens, "b")
    _checks.check_shape(op, "new_tokens", new_tokens, cache_seqlens.shape, ("b",))
    s = _checks.check_int(op, "max_new_tokens", max_new_tokens, 0)
    lengths, new = jnp.asarray(cache_seqlens)[:, None], jnp.asarray(new_tokens)[:, None]
    before_end = s - jnp.arange(s, dtype=jnp.int32)
    return jnp.where(before_end <= jnp.minimum(new, lengths), lengths - before_end, -1)


# ---------------------------------------------------------------------------------------------
# Packed and batched tokens


def ragged_to_batched(
    x: Array, cu_seqlens: Array, max_tokens: int, *, fill: float | int = 0
) -> Array:
    """Packed tokens to batched ones, padding first: queries for decoding, for example.

    Args:
      x: [t, ...]. Rows in no sequence are not looked at.
      cu_seqlens: int32[b + 1], limits of the sequences, not decreasing.
      max_tokens: s, a static int. Of a longer sequence only the last s tokens are taken.
      fill: what padding holds.

    Returns:
      [b, s, ...] in x's dtype: the tokens of each request in its last places. Differentiable in x.

    Raises:
      ValueError: a wrong shape, dtype or size.
    """
    op = "ragged_to_batched"
    _check_ragged(op, x, cu_seqlens, "(t, ...)", 1)
    s = _checks.check_int(op, "max_tokens", max_tokens, 0)
    x, limits = jnp.asarray(x), jnp.asarray(cu_seqlens)
    t = x.shape[0]
    rows = limits[1:, None] - s + jnp.arange(s, dtype=jnp.int32)
    valid = (rows >= limits[:-1, None]) & (rows >= 0) & (rows < t)
    if t == 0:
        return jnp.full((*rows.shape, *x.shape[1:]), fill, x.dtype)
    return _select(valid, x[jnp.where(valid, rows, 0)], fill)


def batched_to_ragged(x: Array, cu_seqlens: Array, total: int, *, fill: float | int = 0) -> Array:
    """Batched tokens with padding first to packed ones: the inverse of `ragged_to_batched`.

    Args:
      x: [b, s, ...]. Padding is not looked at.
      cu_seqlens: int32[b + 1], limits of the sequences, not decreasing.
      total: t, rows of the result, a static int.
      fill: what rows in no sequence hold, and tokens that had no place in x.

    Returns:
      [t, ...] in x's dtype. Differentiable in x.

    Raises:
      ValueError: a wrong shape, dtype or size.
    """
    op = "batched_to_ragged"
    _check_ragged(op, x, cu_seqlens, "(b, s, ...)", 2)
    total = _checks.check_int(op, "total", total, 0)
    x, limits = jnp.asarray(x), jnp.asarray(cu_seqlens)
    b, s = x.shape[:2]
    if cu_seqlens.shape[0] != b + 1:
        raise ValueError(
            f"{op}: argument 'cu_seqlens' has shape {tuple(cu_seqlens.shape)}; expected "
            f"{(b + 1,)} (b + 1) to go with x {tuple(x.shape)}"
        )
    if x.shape[0] == 0 or s == 0:
        return jnp.full((total, *x.shape[2:]), fill, x.dtype)
    row = jnp.arange(total, dtype=jnp.int32)
    # The sequence of a row is the first that ends after it: empty ones never do.
    sequence = jnp.searchsorted(limits[1:], row, side="right").astype(jnp.int32)
    inside = jnp.minimum(sequence, b - 1)
    place = row - limits[inside + 1] + s
    valid = (sequence < b) & (row >= limits[inside]) & (place >= 0) & (place < s)
    return _select(valid, x[inside, jnp.where(valid, place, 0)], fill)


def batched_outputs_to_ragged(
    out: Array, lse: Array, cu_seqlens: Array, total: int
) -> tuple[Array, Array]:
    """Results of `flash_mla_with_kvcache` on batched queries, packed as those of prefill.

    Args:
      out: [b, s, h, dv].
      lse: float32[b, h, s].
      cu_seqlens: int32[b + 1], limits of the packed queries.
      total: t, a static int.

    Returns:
      ``(out [t, h, dv], lse float32[t, h])``, with 0 and +inf in rows of no sequence: what
      `flash_attn_varlen_func` gives, and `merge_attention_states` takes together with it.

    Raises:
      ValueError: a wrong shape, dtype or size.
    """
    op = "batched_outputs_to_ragged"
    _checks.check_rank(op, "out", out, ("b", "s", "h", "dv"))
    b, s, h, _ = out.shape
    _checks.check_shape(op, "lse", lse, (b, h, s), ("b", "h", "s"))
    return (
        batched_to_ragged(out, cu_seqlens, total),
        batched_to_ragged(jnp.swapaxes(jnp.asarray(lse), 1, 2), cu_seqlens, total, fill=np.inf),
    )


def _check_ragged(op: str, x: Any, cu_seqlens: Any, expected: str, rank: int) -> None:
    _checks.check_array(op, "x", x, expected)
    if len(x.shape) < rank:
        raise ValueError(f"{op}: argument 'x' has shape {tuple(x.shape)}; expected {expected}")
    _check_vector(op, "cu_seqlens", cu_seqlens, "b + 1")
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: argument 'cu_seqlens' has shape (0,); expected (b + 1,)")


def _select(valid: Array, values: Array, fill: float | int) -> Array:
    wide = valid.reshape(valid.shape + (1,) * (values.ndim - valid.ndim))
    return jnp.where(wide, values, jnp.asarray(fill, values.dtype))
