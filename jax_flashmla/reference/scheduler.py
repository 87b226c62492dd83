"""The tile schedule in jnp; the CUDA scheduler kernel gives the same integers.

Decoding streams the cache in blocks of 64 tokens. A schedule cuts the blocks of all requests, laid
end to end, into ``num_sm_parts`` runs of about equal cost, one for each thread block of the grid
(per row tile). A request costs its blocks and a fixed overhead. A request may be cut into several
pieces, whose partial results are merged afterwards. Where requests are few, all are cut into pieces
of one size, one for each part.

``tile_scheduler_metadata`` int32[num_sm_parts, 8], row p:

    [begin_request, begin_unit, end_request, end_unit, batch_size, row_tiles, stamp, num_sm_parts]

Part p works on all units (request, unit) from its begin up to its end, exclusive, in lexicographic
order; row p + 1 begins where row p ends. A unit is one block, or one whole piece if
``batch_invariant``. A part that goes past a request takes it to the end that the request *has*, not
the one it was planned with: a schedule made for other lengths stays right.

``num_splits`` int32[batch_size + 1]: running sum of the number of pieces of each request (1 for an
uncut or empty one).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 64  # tokens
OVERHEAD = 2  # cost of starting a request, in blocks: load of q, prologue, epilogue
MIN_SHARE = 2  # blocks; smaller parts cost more to merge than they save
LEAST_WHOLE_SLACK = 2  # blocks that an uneven share may cost before requests are cut to even it,
MOST_WHOLE_SLACK = 5  # by how much there would be to merge
EVEN_SLACK = 1  # blocks that even pieces may be larger than an even share
MERGED_TILES_PER_BLOCK = 32  # merging so many row tiles of pieces takes about as long as a block
MAX_EVEN_PARTS = 1024  # even pieces are planned for at most so many parts
MAX_INVARIANT_SPLITS = 16  # bounds the workspace of batch-invariant calls
MIN_INVARIANT_BLOCKS = 8  # blocks; a batch-invariant piece is never smaller unless it is the last

STAMP = 0x4D4C4100  # "MLA" and a byte of flags
STAMP_BATCH_INVARIANT = 1
STAMP_SPARSE = 2
COLUMNS = 8


def stamp(*, batch_invariant: bool, sparse: bool) -> int:
    """The number that marks a schedule of this format and kind."""
    return STAMP | STAMP_BATCH_INVARIANT * batch_invariant | STAMP_SPARSE * sparse


def num_blocks(tokens: jax.Array) -> jax.Array:
    """int32 number of blocks that hold ``tokens``; a negative number of tokens counts as 0."""
    tokens = jnp.maximum(tokens, 0)
    return tokens // BLOCK + (tokens % BLOCK > 0)  # tokens + 63 could pass 2^31


def split_blocks(blocks: jax.Array) -> jax.Array:
    """Blocks in one batch-invariant piece of a request of ``blocks``: depends on nothing else."""
    pieces = blocks // MAX_INVARIANT_SPLITS + (blocks % MAX_INVARIANT_SPLITS > 0)
    return jnp.maximum(pieces, MIN_INVARIANT_BLOCKS)


def request_blocks(
    operands: dict[str, Any], *, batch_size: int, topk: int | None, extra_topk: int | None
) -> jax.Array:
    """int32[batch_size] blocks of each request: of its length, or of its selected tokens."""

    def selected(length: jax.Array | None, most: int) -> jax.Array:
        if length is None:
            length = jnp.full((batch_size,), most, jnp.int32)
        return num_blocks(jnp.minimum(length, most))

    if topk is None:
        return num_blocks(operands["cache_seqlens"])
    blocks = selected(operands["topk_length"], topk)
    if extra_topk is not None:
        blocks = blocks + selected(operands["extra_topk_length"], extra_topk)
    return blocks


def least_even_piece(total: jax.Array, row_tiles: int) -> jax.Array:
    """Blocks of the smallest even pieces that are worth merging.

    The largest power of two whose square is no more than what the pieces have to merge, in blocks'
    time, if they have a block each: a piece takes about as long as merging all of them.
    """
    # Below 2^30. With more blocks pieces are larger in any case.
    merged = jnp.minimum(total, 1 << 24) * min(row_tiles, 32) // MERGED_TILES_PER_BLOCK
    return 1 << ((31 - jax.lax.clz(jnp.maximum(merged, 1))) // 2)


def even_piece_blocks(
    blocks: jax.Array, num_sm_parts: int, payload: jax.Array, row_tiles: int
) -> jax.Array:
    """Blocks of the pieces if all requests are cut into equal ones, one a part; 0 if they are not.

    The least number that makes no more pieces than there are parts, unless that is more than
    EVEN_SLACK above an even share ``payload`` of blocks and overheads, or so few blocks that
    merging costs more.
    """
    total = jnp.sum(blocks)
    least = least_even_piece(total, row_tiles)
    first = jnp.maximum(total // num_sm_parts + (total % num_sm_parts > 0), least)
    # An even share is at most OVERHEAD blocks more than the least of these.
    size = first + jnp.arange(1 + OVERHEAD + EVEN_SLACK, dtype=jnp.int32)
    pieces = blocks[:, None] // size + (blocks[:, None] % size > 0)
    fits = jnp.sum(jnp.minimum(pieces, num_sm_parts + 1), axis=0) <= num_sm_parts
    fits &= size <= jnp.maximum(payload + EVEN_SLACK, least)
    return jnp.where(jnp.any(fits), size[jnp.argmax(fits)], 0)


def whole_request_slack(total: jax.Array, num_sm_parts: int, row_tiles: int) -> jax.Array:
    """Blocks that a part of whole requests may cost more than an even share.

    It is about what merging costs, if all ``total`` blocks are cut into one piece a part, or fewer
    if there are fewer blocks.
    """
    enough = (MOST_WHOLE_SLACK - LEAST_WHOLE_SLACK) * MERGED_TILES_PER_BLOCK
    pieces = jnp.minimum(total, min(num_sm_parts, enough))
    merged = pieces * min(row_tiles, enough) // MERGED_TILES_PER_BLOCK
    return jnp.minimum(LEAST_WHOLE_SLACK + merged, MOST_WHOLE_SLACK)


def boundaries(
    blocks: jax.Array, num_sm_parts: int, *, row_tiles: int, batch_invariant: bool
) -> tuple[jax.Array, jax.Array]:
    """Where the parts begin: int32[num_sm_parts + 1] requests and units; the last is (b, 0)."""
    (b,) = blocks.shape
    if b == 0:
        zeros = jnp.zeros((num_sm_parts + 1,), jnp.int32)
        return zeros, zeros
    cost = blocks + OVERHEAD
    ends = jnp.cumsum(cost, dtype=jnp.int32)
    starts, total = ends - cost, ends[-1]
    payload = jnp.maximum(total // num_sm_parts + (total % num_sm_parts > 0), MIN_SHARE)
    # At most total + num_sm_parts, or 2 * num_sm_parts: below 2^31 whatever fits in memory.
    position = jnp.arange(num_sm_parts, dtype=jnp.int32) * payload
    request = jnp.searchsorted(starts, position, side="right").astype(jnp.int32) - 1
    past = position >= total
    # Whole requests only, each part from the request that its share begins in, unless that leaves
    # a part with much more than its share. Batch-invariant requests are cut in any case.
    whole = jnp.where(past, b, request)
    first_cost = jnp.where(past, total, starts[request])
    most = jnp.max(jnp.append(first_cost[1:], total) - first_cost)
    slack = whole_request_slack(jnp.sum(blocks), num_sm_parts, row_tiles)
    keep_whole = (most <= payload + slack) & (not batch_invariant)
    n = blocks[request]
    unit = position - starts[request] - OVERHEAD
    if batch_invariant:
        length = split_blocks(n)
        unit = unit // length
        n = n // length + (n % length > 0)
    next_request = unit >= n
    request = jnp.where(next_request & (unit > 0), request + 1, request)
    unit = jnp.where(next_request, 0, jnp.maximum(unit, 0))
    request = jnp.where(past | keep_whole, whole, request)
    unit = jnp.where(past | keep_whole, 0, unit)
    if not batch_invariant and b <= num_sm_parts <= MAX_EVEN_PARTS:
        size = even_piece_blocks(blocks, num_sm_parts, payload, row_tiles)
        even = (size > 0) & ~keep_whole
        size = jnp.maximum(size, 1)
        pieces = blocks // size + (blocks % size > 0)
        last = jnp.cumsum(pieces, dtype=jnp.int32)
        part = jnp.arange(num_sm_parts, dtype=jnp.int32)
        # Empty requests go to the part before, and the first ones have none.
        owner = jnp.searchsorted(last - pieces, part, side="right").astype(jnp.int32) - 1
        owner = jnp.where(part < last[-1], owner, b).at[0].set(0)
        first_unit = (part - jnp.append(last - pieces, 0)[owner]) * size
        first_unit = jnp.where((part > 0) & (part < last[-1]), first_unit, 0)
        request = jnp.where(even, owner, request)
        unit = jnp.where(even, first_unit, unit)
    end = jnp.array([b], jnp.int32)
    return jnp.concatenate([request, end]), jnp.concatenate([unit, end * 0])


def metadata(
    operands: dict[str, Any],
    *,
    batch_size: int,
    row_tiles: int,
    topk: int | None,
    extra_topk: int | None,
    num_sm_parts: int,
    batch_invariant: bool,
) -> tuple[jax.Array, jax.Array]:
    """Plans a schedule.

    Args:
        operands: ``cache_seqlens`` int32[b] (dense), or ``topk_length`` and ``extra_topk_length``
            int32[b] or None (sparse).
        batch_size: b.
        row_tiles: tiles of 64 query rows that each part is launched for.
        topk: None for dense attention, else the number of entries of ``indices``.
        extra_topk: entries of the extra indices, or None without an extra cache.
        num_sm_parts: rows of the schedule, at least 1.
        batch_invariant: cut each request as a function of its own length only.

    Returns:
        ``(tile_scheduler_metadata int32[num_sm_parts, 8], num_splits int32[b + 1])``.
    """
    blocks = request_blocks(operands, batch_size=batch_size, topk=topk, extra_topk=extra_topk)
    # Capped so that the sum of all costs stays below 2^30, whatever the lengths are.
    cap = max(2**30 // max(batch_size, 1) - OVERHEAD, 1)
    blocks = jnp.minimum(blocks, cap)
    request, unit = boundaries(
        blocks, num_sm_parts, row_tiles=row_tiles, batch_invariant=batch_invariant
    )
    marks = jnp.array(
        [
            batch_size,
            row_tiles,
            stamp(batch_invariant=batch_invariant, sparse=topk is not None),
            num_sm_parts,
        ],
        jnp.int32,
    )
    rows = jnp.concatenate(
        [
            jnp.stack([request[:-1], unit[:-1], request[1:], unit[1:]], axis=1),
            jnp.broadcast_to(marks, (num_sm_parts, 4)),
        ],
        axis=1,
    )
    if batch_invariant:
        length = split_blocks(blocks)
        pieces = jnp.maximum(blocks // length + (blocks % length > 0), 1)
    else:
        # Boundaries at the start of a request do not cut it. The spare last entry collects them.
        cut = jnp.where(unit > 0, request, batch_size)
        pieces = 1 + jnp.zeros((batch_size + 1,), jnp.int32).at[cut].add(1)[:batch_size]
    num_splits = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(pieces, dtype=jnp.int32)])
    return rows, num_splits


def is_valid(
    tile_scheduler_metadata: jax.Array,
    num_splits: jax.Array,
    *,
    batch_size: int,
    row_tiles: int,
    batch_invariant: bool,
    sparse: bool,
) -> jax.Array:
    """bool[]: whether a schedule was made for such a call and is in itself consistent.

    A schedule for another batch size, number of row tiles, kind or format is foreign; one whose
    parts do not follow each other from (0, 0) to (batch_size, 0), or whose number of pieces does
    not match its parts, is corrupt. The lengths that it was made for do not matter.
    """
    parts = tile_scheduler_metadata.shape[0]
    begin, end = tile_scheduler_metadata[:, :2], tile_scheduler_metadata[:, 2:4]
    marks = jnp.array(
        [batch_size, row_tiles, stamp(batch_invariant=batch_invariant, sparse=sparse), parts],
        jnp.int32,
    )
    valid = jnp.all(tile_scheduler_metadata[:, 4:] == marks)
    valid &= jnp.all(begin[0] == 0)
    valid &= jnp.all(begin[1:] == end[:-1])
    valid &= jnp.all(end[-1] == jnp.array([batch_size, 0], jnp.int32))
    in_order = (end[:, 0] > begin[:, 0]) | ((end[:, 0] == begin[:, 0]) & (end[:, 1] >= begin[:, 1]))
    valid &= jnp.all(in_order) & jnp.all(begin >= 0)
    pieces = num_splits[1:] - num_splits[:-1]
    valid &= num_splits[0] == 0
    if batch_invariant:
        # The pieces follow from lengths that are not known here; only their bounds are.
        valid &= jnp.all((pieces >= 1) & (pieces <= MAX_INVARIANT_SPLITS))
    else:
        request, unit = begin[:, 0], begin[:, 1]
        cut = jnp.where((unit > 0) & (request >= 0) & (request < batch_size), request, batch_size)
        cuts = jnp.zeros((batch_size + 1,), jnp.int32).at[cut].add(1)[:batch_size]
        valid &= jnp.all(pieces == 1 + cuts)
    return valid
