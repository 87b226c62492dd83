"""Merging partial results of attention: softmax over disjoint sets of keys, put together by lse.

Attention over a set of keys that was divided (a cached context and a new chunk, a shared prefix
and the rest, the pages of several devices) follows from the results over its parts:

    ``lse = log sum_i exp(lse_i)``,  ``out = sum_i exp(lse_i - lse) * out_i``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashmla import _checks

Array = jax.Array

_NAME = "merge_attention_states"
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_PACKED, _BATCHED = ("t", "h_q", "dv"), ("b", "s_q", "h_q", "dv")


def merge_attention_states(
    outs: Sequence[Array] | Array, lses: Sequence[Array] | Array
) -> tuple[Array, Array]:
    """Attention over a union of disjoint sets of keys, from the results over each of them.

    All parts are for the same queries and have one layout, which follows from the rank of their
    ``out``; it is that of the operations of this library:

    ==================================  =====================  ==============================
    layout                              ``out``                ``lse``
    ==================================  =====================  ==============================
    packed: `flash_attn_varlen_func`,   ``[t, h_q, dv]``       float32 ``[t, h_q]``
    `flash_mla_sparse_fwd`
    batched: `flash_mla_with_kvcache`   ``[b, s_q, h_q, dv]``  float32 ``[b, h_q, s_q]``, heads
                                                               before tokens
    ==================================  =====================  ==============================

    To merge a packed with a batched part, bring one into the layout of the other first
    (`jax_flashmla.serving.batched_outputs_to_ragged`).

    A part that is empty for a query, with an lse of +inf (this library's rule for "nothing to
    attend to") or -inf, has no weight there, whatever its ``out`` holds. If all are, the result is
    ``out = 0``, ``lse = +inf`` again. An lse that is NaN makes ``out`` and ``lse`` of its query and
    head NaN, a NaN in an ``out`` that element of the result, and nothing else.

    Parts computed with an ``attn_sink`` cannot be merged: their ``out`` contains it and their
    ``lse`` does not. Leave it out, and multiply the merged ``out`` by
    ``jax.nn.sigmoid(lse - attn_sink)`` (with lse in the order of out's axes).

    Differentiable in ``outs`` and ``lses``. Empty parts get gradients of 0.

    Args:
      outs: a list or tuple of arrays, bfloat16, float16 or float32 alike, all of one of the shapes
        above; or one array of them stacked along a new first axis. A single array is always taken
        as stacked.
      lses: the lse of each part, in the same order: a list or tuple, or one stacked array.

    Returns:
      ``(out, lse)`` in the layout of the parts: out in their dtype, lse float32. Arithmetic is in
      float32. With only one part that is not empty, out has its bits.

    Raises:
      ValueError: there is no part, or not as many of one as of the other, or a shape or dtype is
        not as above.
    """
    out_list, lse_list = _parts("outs", outs), _parts("lses", lses)
    if not out_list or len(out_list) != len(lse_list):
        raise ValueError(
            f"{_NAME}: argument 'outs' has {len(out_list)} parts, 'lses' has {len(lse_list)}; "
            "expected as many of both, at least one"
        )
    first = out_list[0]
    for i, (out, lse) in enumerate(zip(out_list, lse_list, strict=True)):
        _check_part(f"outs[{i}]", out, f"lses[{i}]", lse, first)
    return _merge(
        tuple(map(jnp.asarray, outs)) if isinstance(outs, (list, tuple)) else jnp.asarray(outs),
        tuple(map(jnp.asarray, lses)) if isinstance(lses, (list, tuple)) else jnp.asarray(lses),
    )


def _parts(name: str, value: Any) -> list[Any]:
    """The parts, or their shapes and dtypes if they are stacked."""
    if isinstance(value, (list, tuple)):
        return list(value)
    _checks.check_array(_NAME, name, value, "(parts, ...), or a list or tuple of arrays")
    if not value.shape:
        raise ValueError(f"{_NAME}: argument '{name}' has shape (); expected (parts, ...)")
    return [jax.ShapeDtypeStruct(value.shape[1:], value.dtype)] * value.shape[0]


def _check_part(out_name: str, out: Any, lse_name: str, lse: Any, first: Any) -> None:
    _checks.check_array(_NAME, out_name, out, "(t, h_q, dv) or (b, s_q, h_q, dv)")
    if len(out.shape) not in (3, 4):
        raise ValueError(
            f"{_NAME}: argument '{out_name}' has shape {tuple(out.shape)}; expected (t, h_q, dv) "
            "or (b, s_q, h_q, dv)"
        )
    _checks.check_dtype(_NAME, out_name, out, _DTYPES)
    # The first part has been checked before any other is compared with it.
    _checks.check_dtype(_NAME, out_name, out, (first.dtype,))
    dims = _PACKED if len(first.shape) == 3 else _BATCHED
    _checks.check_shape(_NAME, out_name, out, first.shape, dims)
    if len(out.shape) == 3:
        _checks.check_shape(_NAME, lse_name, lse, out.shape[:2], _PACKED[:2])
    else:
        b, s_q, h_q, _ = out.shape
        _checks.check_shape(_NAME, lse_name, lse, (b, h_q, s_q), ("b", "h_q", "s_q"))
    _checks.check_dtype(_NAME, lse_name, lse, (jnp.float32,))


@jax.jit
def _merge(outs: tuple[Array, ...] | Array, lses: tuple[Array, ...] | Array) -> tuple[Array, Array]:
    lse = jnp.stack(lses) if isinstance(lses, tuple) else lses
    empty = jnp.isinf(lse)
    nothing = jnp.all(empty, axis=0)
    # The maximum only keeps exp in range, it cancels: no gradient is wanted through it. NaN wins.
    largest = lax.stop_gradient(jnp.max(jnp.where(empty, -jnp.inf, lse), axis=0))
    largest = jnp.where(nothing, 0.0, largest)
    # Selected before and after exp: the branch that is not taken must have a finite derivative,
    # since 0 times its derivative goes into the gradient.
    powers = jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, largest, lse) - largest))
    total = jnp.where(nothing, 1.0, jnp.sum(powers, axis=0))
    weights = powers / total
    merged_lse = jnp.where(nothing, jnp.inf, largest + jnp.log(total))

    batched = lse.ndim == 4  # [parts, b, h, s], while out has tokens before heads
    if batched:
        weights, empty = jnp.swapaxes(weights, -1, -2), jnp.swapaxes(empty, -1, -2)
    weights, empty = weights[..., None], empty[..., None]

    # Products and sums and no dot: matrix units would round float32.
    if isinstance(outs, tuple):
        dtype = outs[0].dtype
        out = sum(_weigh(*part) for part in zip(outs, weights, empty, strict=True))
    else:
        dtype = outs.dtype
        out = jnp.sum(_weigh(outs, weights, empty), axis=0)
    return jnp.asarray(out).astype(dtype), merged_lse


def _weigh(out: Array, weight: Array, empty: Array) -> Array:
    return weight * jnp.where(empty, 0.0, out.astype(jnp.float32))
