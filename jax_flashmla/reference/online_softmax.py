"""Softmax-weighted sums over a sequence of token blocks, in float32.

The attention references visit keys block by block, so that neither the scores of a whole
sequence nor a gathered copy of its cache ever exist. Each block updates a running maximum, a
running sum of exponentials and a running weighted sum of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class State(NamedTuple):
    """Running quantities of each query row over the tokens seen so far."""

    maximum: Array  # float32 [..., rows]; -inf before the first visible token
    total: Array  # float32 [..., rows], sum of exp(score - maximum)
    weighted: Array  # float32 [..., rows, dv], sum of exp(score - maximum) * value


def start(rows: tuple[int, ...], dv: int) -> State:
    """The state before any token."""
    return State(
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, dv), jnp.float32),
    )


def add_block(
    state: State,
    scores: Array,
    visible: Array,
    weigh: Callable[[Array], Array],
    dtype: Any,
) -> State:
    """Takes in one block of tokens.

    Args:
        state: the state so far.
        scores: float32 [..., rows, tokens], scaled; anything at all where not visible.
        visible: bool, broadcastable to ``scores``.
        weigh: probabilities [..., rows, tokens] -> weighted sum of values [..., rows, dv].
        dtype: the input type, which the probabilities are rounded to before they weigh.
    """
    scores = jnp.where(visible, scores, -jnp.inf)
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1))
    # A row that has seen nothing yet: subtract 0, since -inf - (-inf) is NaN.
    base = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    rescale = jnp.exp(state.maximum - base)
    probabilities = jnp.exp(scores - base[..., None])
    return State(
        maximum,
        state.total * rescale + jnp.sum(probabilities, axis=-1),
        state.weighted * rescale[..., None] + weigh(round_to(probabilities, dtype)),
    )


def finish(state: State, attended: Array, sink: Array | None) -> tuple[Array, Array]:
    """Returns out float32 [..., rows, dv] and the natural log-sum-exp float32 [..., rows].

    Args:
        state: the state after the last token.
        attended: bool, broadcastable to [..., rows]: whether the row may attend to any token.
            Rows that may not get out 0 and lse +inf.
        sink: None, or the attention sink, broadcastable to [..., rows].
    """
    lse = jnp.where(attended, state.maximum + jnp.log(state.total), jnp.inf)
    out = state.weighted / state.total[..., None]
    if sink is not None:
        # 1 / (1 + exp(sink - lse)), in a form that has no overflow.
        out = out * jax.nn.sigmoid(lse - sink)[..., None]
    return jnp.where(attended[..., None], out, 0.0), lse


def round_to(values: Array, dtype: Any) -> Array:
    """Float32 probabilities rounded to the precision of ``dtype``, still float32.

    A pair of conversions would do, but XLA may drop it. The exponent keeps its range, so that
    small probabilities in float16 are not flushed to zero.
    """
    info = jnp.finfo(dtype)
    if info.bits >= 32:
        return values
    return lax.reduce_precision(values, exponent_bits=8, mantissa_bits=info.nmant)


def product(equation: str, a: Array, b: Array) -> Array:
    """``jnp.einsum`` of two float32 arrays, in true float32 on every platform."""
    return jnp.einsum(
        equation, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def map_chunks(
    function: Callable[..., Any], arrays: tuple[Array, ...], fills: tuple[Any, ...], limit: int
) -> Any:
    """``function(*arrays)`` on consecutive chunks of at most ``limit`` rows of the first axis.

    Rows are independent. The last chunk is padded with rows of ``fills``, one value for each
    array, whose results are dropped.
    """
    rows = arrays[0].shape[0]
    chunks = -(-rows // max(limit, 1))
    if chunks <= 1:
        return function(*arrays)
    size = -(-rows // chunks)

    def pad(array: Array, fill: Any) -> Array:
        padding = [(0, chunks * size - rows)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding, constant_values=fill)

    padded = tuple(pad(a, f) for a, f in zip(arrays, fills, strict=True))

    def one_chunk(number: Array) -> Any:
        number, *whole = in_this_step(number, *padded)
        return function(*(lax.dynamic_slice_in_dim(a, number * size, size) for a in whole))

    results = lax.map(one_chunk, jnp.arange(chunks, dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:rows], results)


def in_this_step(position: Array, *arrays: Array) -> tuple[Array, ...]:
    """``position`` and ``arrays``, to be read at that position in a step of a loop.

    XLA on CPU up to jaxlib 0.10 has no bfloat16 reads: it converts what is read to float32, which
    is fused into the read, unless it does not change from step to step and leaves the loop: then
    the whole cache is converted. So make it seem to depend on the position.
    """
    return lax.optimization_barrier((position, *arrays))
