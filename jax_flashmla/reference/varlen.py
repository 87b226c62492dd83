"""Attention over packed sequences of different lengths, forward and backward, in plain jnp.

Written as FlashAttention is (Dao et al., arXiv 2205.14135; backward of 2307.08691): a tile of
query rows of one sequence walks the keys of that sequence block by block with a running maximum,
and only log-sum-exps are kept for the backward, which recomputes the probabilities. So memory
is bounded by one tile of scores, and work by the keys that are visible.

Both functions take the limits of the sequences as ``sequences int32[n, 5]``, one row a sequence:

    (q_begin, q_end, k_begin, k_end, broken)    0 <= begin <= end <= total

Query ranges do not overlap; nor do key ranges in the backward, while in the forward several
sequences may read the same keys. Rows in no sequence are padding and are never looked at.
Rows of a sequence that is ``broken`` (not 0) are NaN in every result and are not looked at.

No sequence can see what is in the rows of another: a block is cut to the rows of its sequence
right after it is read, because 0 * NaN in a matrix product is NaN.

Query heads are grouped, ``h_q = h_kv * r``: query head ``i`` reads key head ``i // r``. In the
einsums q and k are rows of queries and keys, h the key head, r the query head in its group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# Largest tiles. At 128 heads a tile of float32 scores is then 32 MiB.
BLOCK_Q = 128
BLOCK_K = 512

_dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def varlen_forward(
    operands: Mapping[str, Any],
    *,
    softmax_scale: float,
    causal: bool,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Array, Array]:
    """Attention of every sequence: ``(out, lse)``.

    Args:
        operands: ``q [total_q, h_q, d]``, ``k [total_k, h_kv, d]``, ``v [total_k, h_kv, dv]``,
            ``sequences int32[n, 5]`` (see the module).
        softmax_scale: factor of ``q . k``.
        causal: query ``i`` of a sequence sees keys ``j <= s_k - s_q + i`` only.
        block_q: query rows of a tile; by default chosen from the shapes.
        block_k: keys of a block; by default chosen from the shapes.

    Returns:
        ``out [total_q, h_q, dv]`` in q's dtype and ``lse float32[total_q, h_q]``, the
        natural log-sum-exp of the scaled scores. Rows that see no key: 0 and +inf.
    """
    q, k, v, sequences = (operands[name] for name in ("q", "k", "v", "sequences"))
    total_q, heads_q, _ = q.shape
    total_k, heads, dv = v.shape
    group = heads_q // heads
    q = _grouped(q, heads)

    broken = _broken_rows(sequences, total_q, 0)[:, None, None]
    lse = jnp.where(broken, jnp.float32(jnp.nan), jnp.float32(jnp.inf))
    lse = jnp.broadcast_to(lse, (total_q, heads, group))
    out = _blank(broken[..., None], (total_q, heads, group, dv), q.dtype)
    if 0 in (total_q, total_k, sequences.shape[0]):
        return _ungrouped(out), _ungrouped(lse)

    block_q = _block_size(block_q, BLOCK_Q, total_q, sequences.shape[0])
    block_k = _block_size(block_k, BLOCK_K, total_k, sequences.shape[0])

    def tile(sequence: Array, row: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        q_begin, q_end, k_begin, k_end, _ = sequence
        q_rows, q_valid = _rows(row, q_end, block_q, total_q)
        q_tile = _take(q, q_rows, q_valid)
        limit = _key_limit(q_rows, sequence, causal)
        last = jnp.max(jnp.where(q_valid, limit, k_begin))

        def block(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, acc = state
            k_rows, k_valid = _rows(k_begin + index * block_k, k_end, block_k, total_k)
            mask = k_valid & (k_rows < limit[:, None])
            scores = _dot("qhrd,khd->hrqk", q_tile, _take(k, k_rows, k_valid)) * softmax_scale
            scores = jnp.where(mask, scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
            # A row which has seen no key yet has -inf here, and -inf - -inf is NaN.
            shift = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
            probs = jnp.exp(scores - shift[..., None])
            decay = jnp.exp(maximum - shift)
            update = _dot("hrqk,khe->hrqe", probs.astype(v.dtype), _take(v, k_rows, k_valid))
            return (
                new_maximum,
                total * decay + probs.sum(axis=-1),
                acc * decay[..., None] + update,
            )

        state = (
            jnp.full((heads, group, block_q), -jnp.inf, jnp.float32),
            jnp.zeros((heads, group, block_q), jnp.float32),
            jnp.zeros((heads, group, block_q, dv), jnp.float32),
        )
        blocks = _ceil_div(last - k_begin, block_k)
        maximum, total, acc = lax.fori_loop(0, blocks, block, state)

        # Whether a row has keys follows from the lengths, not from total == 0, so that scores
        # which are all -inf (an overflow) give NaN like softmax does, and not zeros.
        seen = limit > k_begin
        tile_out = jnp.where(seen[:, None], acc / total[..., None], 0.0)
        tile_lse = jnp.where(seen, maximum + jnp.log(total), jnp.inf)
        return (
            _put(results[0], q_rows, q_valid, jnp.moveaxis(tile_out, 2, 0)),
            _put(results[1], q_rows, q_valid, jnp.moveaxis(tile_lse, 2, 0)),
        )

    out, lse = _each_tile(sequences, 0, block_q, tile, (out, lse))
    return _ungrouped(out), _ungrouped(lse)


def varlen_backward(
    operands: Mapping[str, Any],
    *,
    softmax_scale: float,
    causal: bool,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of `varlen_forward`: ``(dq, dk, dv)``.

    With ``P = exp(scores - lse)`` and ``delta = sum(dout * out) - dlse`` for each query row,
    ``dS = P * (dout V^T - delta)``; then ``dV = P^T dout``, ``dQ = scale dS K``,
    ``dK = scale dS^T Q``. One pass over query tiles gives dq, a second over key tiles dk and dv:
    every sum has a fixed order, so the result is the same on each run. P and dS are rounded to
    the input dtype before they enter a product, as a tensor core wants them.

    Args:
        operands: those of `varlen_forward`, its results ``out`` and ``lse``, and the cotangents
            of these, ``dout`` (shape and dtype of out) and ``dlse`` (of lse).
        softmax_scale: as in the forward.
        causal: as in the forward.
        block_q: query rows of a tile; by default chosen from the shapes.
        block_k: keys of a tile; by default chosen from the shapes.

    Returns:
        dq, dk, dv with the shapes and dtypes of q, k, v; 0 in padding rows.
    """
    q, k, v, sequences = (operands[name] for name in ("q", "k", "v", "sequences"))
    total_q, heads_q, d = q.shape
    total_k, heads, dv = v.shape
    group = heads_q // heads
    q = _grouped(q, heads)
    out, lse, dout, dlse = (
        _grouped(operands[name], heads) for name in ("out", "lse", "dout", "dlse")
    )

    broken_k = _broken_rows(sequences, total_k, 2)[:, None, None]
    grad_q = _blank(_broken_rows(sequences, total_q, 0)[:, None, None, None], q.shape, q.dtype)
    grad_k = _blank(broken_k, k.shape, k.dtype)
    grad_v = _blank(broken_k, v.shape, v.dtype)
    if 0 in (total_q, total_k, sequences.shape[0]):
        return _ungrouped(grad_q), grad_k, grad_v

    block_q = _block_size(block_q, BLOCK_Q, total_q, sequences.shape[0])
    block_k = _block_size(block_k, BLOCK_K, total_k, sequences.shape[0])
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse

    def probabilities(
        sequence: Array, q_range: tuple[Array, Array], k_range: tuple[Array, Array]
    ) -> tuple[Array, Array, dict[str, Array]]:
        """P and dS of one tile, ``float32[h_kv, r, block_q, block_k]``, and the blocks read."""
        (q_rows, q_valid), (k_rows, k_valid) = q_range, k_range
        taken = {
            "q": _take(q, q_rows, q_valid),
            "dout": _take(dout, q_rows, q_valid),
            "k": _take(k, k_rows, k_valid),
            "v": _take(v, k_rows, k_valid),
        }
        row_lse = _per_row(_take(lse, q_rows, q_valid))
        row_delta = _per_row(_take(delta, q_rows, q_valid))
        limit = _key_limit(q_rows, sequence, causal)
        mask = q_valid[:, None] & k_valid & (k_rows < limit[:, None])
        scores = _dot("qhrd,khd->hrqk", taken["q"], taken["k"]) * softmax_scale
        probs = jnp.where(mask, jnp.exp(scores - row_lse), 0.0)
        dprobs = _dot("qhre,khe->hrqk", taken["dout"], taken["v"])
        # Selected once more: a row that sees no key may have any cotangent of its lse, +inf.
        dscores = jnp.where(mask, probs * (dprobs - row_delta), 0.0)
        return probs.astype(q.dtype), dscores.astype(q.dtype), taken

    def query_tile(sequence: Array, row: Array, grad_q: Array) -> Array:
        _, q_end, k_begin, k_end, _ = sequence
        q_range = _rows(row, q_end, block_q, total_q)
        limit = _key_limit(q_range[0], sequence, causal)
        last = jnp.max(jnp.where(q_range[1], limit, k_begin))

        def block(index: Array, acc: Array) -> Array:
            k_range = _rows(k_begin + index * block_k, k_end, block_k, total_k)
            _, dscores, taken = probabilities(sequence, q_range, k_range)
            return acc + _dot("hrqk,khd->qhrd", dscores, taken["k"])

        acc = jnp.zeros((block_q, heads, group, d), jnp.float32)
        acc = lax.fori_loop(0, _ceil_div(last - k_begin, block_k), block, acc)
        return _put(grad_q, *q_range, acc * softmax_scale)

    def key_tile(sequence: Array, row: Array, grads: tuple[Array, Array]) -> tuple[Array, Array]:
        q_begin, q_end, k_begin, k_end, _ = sequence
        k_range = _rows(row, k_end, block_k, total_k)
        first = q_begin
        if causal:  # the first query which sees the first key of this tile
            lead = (k_end - k_begin) - (q_end - q_begin)
            first = q_begin + jnp.maximum(row - k_begin - lead, 0)

        def block(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            q_range = _rows(first + index * block_q, q_end, block_q, total_q)
            probs, dscores, taken = probabilities(sequence, q_range, k_range)
            return (
                state[0] + _dot("hrqk,qhrd->khd", dscores, taken["q"]),
                state[1] + _dot("hrqk,qhre->khe", probs, taken["dout"]),
            )

        state = (
            jnp.zeros((block_k, heads, d), jnp.float32),
            jnp.zeros((block_k, heads, dv), jnp.float32),
        )
        acc_k, acc_v = lax.fori_loop(0, _ceil_div(q_end - first, block_q), block, state)
        return (
            _put(grads[0], *k_range, acc_k * softmax_scale),
            _put(grads[1], *k_range, acc_v),
        )

    grad_q = _each_tile(sequences, 0, block_q, query_tile, grad_q)
    grad_k, grad_v = _each_tile(sequences, 2, block_k, key_tile, (grad_k, grad_v))
    return _ungrouped(grad_q), grad_k, grad_v


def _grouped(x: Array, heads: int) -> Array:
    """``[rows, h_q, ...]`` to ``[rows, h_kv, r, ...]``."""
    return x.reshape(x.shape[0], heads, x.shape[1] // heads, *x.shape[2:])


def _ungrouped(x: Array) -> Array:
    """``[rows, h_kv, r, ...]`` to ``[rows, h_q, ...]``."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _ceil_div(x: Array, y: int) -> Array:
    return (x + (y - 1)) // y


def _block_size(given: int | None, largest: int, total: int, sequences: int) -> int:
    """Rows of a tile: about the mean length, so that short sequences do not pay for padding."""
    if given is None:
        mean = -(-total // sequences)
        given = min(max(1 << (mean - 1).bit_length(), 16), largest)
    return min(given, total)


def _each_tile(sequences: Array, column: int, block: int, tile: Callable, state: Any) -> Any:
    """Folds ``state = tile(sequence, first_row, state)`` over the tiles of all sequences.

    ``column`` is that of the range to cut: 0 for query tiles, 2 for key tiles.
    """

    def one_sequence(index, state):
        sequence = sequences[index]
        begin, end, broken = sequence[column], sequence[column + 1], sequence[4]
        tiles = jnp.where(broken == 0, _ceil_div(end - begin, block), 0)
        return lax.fori_loop(
            0, tiles, lambda i, state: tile(sequence, begin + i * block, state), state
        )

    return lax.fori_loop(0, sequences.shape[0], one_sequence, state)


def _rows(begin: Array, end: Array, size: int, total: int) -> tuple[Array, Array]:
    """Row numbers of a block of ``size`` that holds rows begin, begin + 1, ... and who is valid.

    The block is moved back where it would run over the end of the array, so the rows before
    ``begin`` belong to the block before and are not valid, like those from ``end`` on.
    """
    rows = jnp.clip(begin, 0, total - size) + jnp.arange(size, dtype=jnp.int32)
    return rows, (rows >= begin) & (rows < jnp.minimum(begin + size, end))


def _take(x: Array, rows: Array, valid: Array) -> Array:
    """The given consecutive rows of x, with zeros where they are not valid."""
    block = lax.dynamic_slice_in_dim(x, rows[0], rows.shape[0])
    return jnp.where(valid.reshape((-1,) + (1,) * (x.ndim - 1)), block, jnp.zeros((), x.dtype))


def _put(x: Array, rows: Array, valid: Array, values: Array) -> Array:
    """x with the valid rows replaced, rounded to x's dtype."""
    block = lax.dynamic_slice_in_dim(x, rows[0], rows.shape[0])
    valid = valid.reshape((-1,) + (1,) * (x.ndim - 1))
    block = jnp.where(valid, values.astype(x.dtype), block)
    return lax.dynamic_update_slice_in_dim(x, block, rows[0], axis=0)


def _per_row(x: Array) -> Array:
    """``[block_q, h_kv, r]`` to ``[h_kv, r, block_q, 1]``, the layout of the scores."""
    return jnp.moveaxis(x, 0, 2)[..., None]


def _key_limit(q_rows: Array, sequence: Array, causal: bool) -> Array:
    """For each query row the first key row it does not see, ``int32[block_q]``."""
    q_begin, q_end, k_begin, k_end, _ = sequence
    if not causal:
        return jnp.full_like(q_rows, k_end)
    return jnp.clip(k_end - q_end + q_rows + 1, k_begin, k_end)


def _broken_rows(sequences: Array, total: int, column: int) -> Array:
    """``bool[total]``: the rows of broken sequences in the range of ``column``."""
    broken = (sequences[:, 4] != 0).astype(jnp.int32)
    steps = jnp.zeros(total + 1, jnp.int32)
    steps = steps.at[sequences[:, column]].add(broken).at[sequences[:, column + 1]].add(-broken)
    return jnp.cumsum(steps)[:total] > 0


def _blank(broken: Array, shape: tuple[int, ...], dtype) -> Array:
    """The result of rows that nothing is computed for: NaN if broken, else 0."""
    blank = jnp.where(broken, jnp.asarray(jnp.nan, dtype), jnp.zeros((), dtype))
    return jnp.broadcast_to(blank, shape)
