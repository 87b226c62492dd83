"""Attention over packed sequences of different lengths (prefill and training), differentiable.

The three public functions follow FlashAttention's varlen interface as FlashMLA has it; they differ
in how q, k and v are packed. Each is one `jax.custom_vjp` around two Operations, so that the
gradient is a kernel call like the forward.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashmla import _checks, _dispatch
from jax_flashmla._primitive import Operation, vary_alike
from jax_flashmla.reference import varlen as reference

Array = jax.Array

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_MAX_ROWS = 2**31 - 1  # row numbers are int32
_Options = tuple[Any, ...]  # dropout_p and what follows it, not checked yet


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_qo: Array,
    cu_seqlens_kv: Array,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Softmax attention within each of ``b`` sequences packed one after the other.

    Sequence ``i`` has the query rows ``cu_seqlens_qo[i] : cu_seqlens_qo[i + 1]`` and the key rows
    ``cu_seqlens_kv[i] : cu_seqlens_kv[i + 1]``. Either may be empty: a query row without keys gets
    ``out = 0``, ``lse = +inf`` and no gradient, a key row without queries no gradient.

    Differentiable once in q, k and v, by reverse mode; gradients flow through ``out`` and ``lse``
    and have the dtypes of q, k and v.

    Args:
        q: ``[total_q, h_q, d]``, bfloat16, float16 or float32, any d.
        k: ``[total_kv, h_kv, d]`` in q's dtype. ``h_q`` must be a multiple of ``h_kv``: query head
            ``j`` reads key head ``j // (h_q // h_kv)``.
        v: ``[total_kv, h_kv, dv]`` in q's dtype.
        cu_seqlens_qo: ``int32[b + 1]``, not decreasing.
        cu_seqlens_kv: ``int32[b + 1]``, not decreasing.
        max_seqlen_qo: an upper bound of the query lengths, a static int. Only its type is
            checked, nothing depends on its value unless ``is_varlen`` is False: the lengths are
            taken from ``cu_seqlens_qo``.
        max_seqlen_kv: the same for the key lengths.
        dropout_p: must be 0; dropout is not implemented.
        softmax_scale: factor of ``q . k``, a static float; ``d ** -0.5`` by default. Models with
            YaRN multiply it by mscale squared.
        causal: query ``j`` of a sequence with ``s_q`` queries and ``s_k`` keys sees the keys
            ``<= s_k - s_q + j`` (aligned to the bottom right: the last query sees all).
        deterministic: True asks for gradients that are bit-identical from run to run. The XLA
            implementation's always are.
        is_varlen: False says that every sequence has exactly ``max_seqlen_qo`` queries and
            ``max_seqlen_kv`` keys (so upstream's kernels for fixed lengths read it). The values
            of both cu_seqlens are then not read, only their length, ``b + 1``; ``total_q`` must be
            at least ``b * max_seqlen_qo`` and ``total_kv`` at least ``b * max_seqlen_kv``.
        implementation: "cuda" insists on CUDA kernels, "xla" takes the reference, None the best
            that supports the call; the gradient takes the same. There are no CUDA kernels for this
            operation yet, so "cuda" raises and None takes the reference on every platform.

    Returns:
        ``out [total_q, h_q, dv]`` in q's dtype, and ``lse float32[total_q, h_q]``, the natural
        log-sum-exp of the scaled scores.

    Rows in no sequence (past ``cu_seqlens[-1]``, and before ``cu_seqlens[0]`` if that is not 0) are
    padding: their out and gradients are 0, their lse is +inf, and what they contain never
    matters, NaN included, nor does what their cotangents contain.

    The values of cu_seqlens cannot be checked under ``jit``, so they have a rule. An entry is
    *sound* if it lies between 0 and the number of rows and is in order with all other entries of
    its array that do (none before it is larger, none after it smaller). A sequence is broken if
    any of its four entries is not sound. Then out, lse and dq of its query rows, and dk and dv of
    its key rows, are NaN, its rows being all those between the nearest sound entries at or before
    its start and at or after its end (where there is none, row 0 or the end of the array). All
    other rows are as they would be without the broken sequences.

    ``vmap`` over any of the arrays is one call on longer arrays. On several devices, heads (of q,
    k and v alike) may be sharded and tokens may not: wrap the call in `jax.shard_map` for that, as
    for the gradient of several query heads with one key head when the query heads are sharded.

    Raises:
        ValueError: a rank, shape, dtype or static argument is not as above.
        NotImplementedError: ``dropout_p`` is not 0, or ``implementation="cuda"`` cannot take the
            call (the text says why).
    """
    op = "flash_attn_varlen_func"
    _checks.check_rank(op, "q", q, ("total_q", "h_q", "d"))
    _checks.check_rank(op, "k", k, ("total_kv", "h_kv", "d"))
    _checks.check_rank(op, "v", v, ("total_kv", "h_kv", "dv"))
    options: _Options = (dropout_p, softmax_scale, causal, deterministic, is_varlen, implementation)
    limits = (cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv)
    return _varlen(op, _NAMES, q, k, v, *limits, *options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`flash_attn_varlen_func` on q, k and v packed along the last axis, with equal lengths.

    Args:
        qkv: ``[t, h, 2 * d + dv]``: d columns of q, d of k, dv of v. Differentiable.
        cu_seqlens: ``int32[b + 1]``, the limits of the sequences, of queries and keys alike.
        max_seqlen: an upper bound of the lengths, a static int.
        head_dim_qk: d, a static int.
        dropout_p: must be 0.
        softmax_scale: factor of ``q . k``, a static float; ``d ** -0.5`` by default.
        causal: token ``j`` of a sequence sees the tokens ``<= j``.
        deterministic: as in `flash_attn_varlen_func`.
        is_varlen: as in `flash_attn_varlen_func`.
        implementation: as in `flash_attn_varlen_func`.

    Returns:
        ``out [t, h, dv]`` in qkv's dtype and ``lse float32[t, h]``.

    Raises:
        ValueError: a rank, shape, dtype or static argument is not as above.
        NotImplementedError: as for `flash_attn_varlen_func`.
    """
    op = "flash_attn_varlen_qkvpacked_func"
    d = _checks.check_int(op, "head_dim_qk", head_dim_qk, 1)
    _checks.check_rank(op, "qkv", qkv, ("t", "h", "2*d+dv"))
    _check_width(op, "qkv", qkv, f"2*{d} + dv with head_dim_qk={d}", 2 * d)
    qkv = jnp.asarray(qkv)
    q, k, v = qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :]
    names = {"q": "qkv", "k": "qkv", "v": "qkv"}
    names |= {"cu_seqlens_qo": "cu_seqlens", "max_seqlen_qo": "max_seqlen"}
    names |= {"cu_seqlens_kv": "cu_seqlens", "max_seqlen_kv": "max_seqlen"}
    options: _Options = (dropout_p, softmax_scale, causal, deterministic, is_varlen, implementation)
    limits = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _varlen(op, names, q, k, v, *limits, *options)


def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_qo: Array,
    cu_seqlens_kv: Array,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`flash_attn_varlen_func` on k and v packed along the last axis.

    Args:
        q: ``[total_q, h_q, d]``, bfloat16, float16 or float32. Differentiable.
        kv: ``[total_kv, h_kv, d + dv]`` in q's dtype: d columns of k, then dv of v. Differentiable.
        cu_seqlens_qo: ``int32[b + 1]``, not decreasing.
        cu_seqlens_kv: ``int32[b + 1]``, not decreasing.
        max_seqlen_qo: an upper bound of the query lengths, a static int.
        max_seqlen_kv: an upper bound of the key lengths, a static int.
        head_dim_qk: d, a static int.
        dropout_p: must be 0.
        softmax_scale: factor of ``q . k``, a static float; ``d ** -0.5`` by default.
        causal: as in `flash_attn_varlen_func`.
        deterministic: as in `flash_attn_varlen_func`.
        is_varlen: as in `flash_attn_varlen_func`.
        implementation: as in `flash_attn_varlen_func`.

    Returns:
        ``out [total_q, h_q, dv]`` in q's dtype and ``lse float32[total_q, h_q]``.

    Raises:
        ValueError: a rank, shape, dtype or static argument is not as above.
        NotImplementedError: as for `flash_attn_varlen_func`.
    """
    op = "flash_attn_varlen_kvpacked_func"
    d = _checks.check_int(op, "head_dim_qk", head_dim_qk, 1)
    _checks.check_rank(op, "q", q, ("total_q", "h_q", "d"))
    _checks.check_shape(op, "q", q, (*q.shape[:2], d), ("total_q", "h_q", "head_dim_qk"))
    _checks.check_rank(op, "kv", kv, ("total_kv", "h_kv", "d+dv"))
    _check_width(op, "kv", kv, f"{d} + dv with head_dim_qk={d}", d)
    kv = jnp.asarray(kv)
    names = _NAMES | {"k": "kv", "v": "kv"}
    options: _Options = (dropout_p, softmax_scale, causal, deterministic, is_varlen, implementation)
    limits = (cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv)
    return _varlen(op, names, q, kv[..., :d], kv[..., d:], *limits, *options)


# ------------------------------------------------------------------ checks and preparation

# What an argument of `flash_attn_varlen_func` is called in the function that was called.
_NAMES = {
    "q": "q",
    "k": "k",
    "v": "v",
    "cu_seqlens_qo": "cu_seqlens_qo",
    "cu_seqlens_kv": "cu_seqlens_kv",
    "max_seqlen_qo": "max_seqlen_qo",
    "max_seqlen_kv": "max_seqlen_kv",
}


def _varlen(
    op: str,
    names: dict[str, str],
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_qo: Any,
    cu_seqlens_kv: Any,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    is_varlen: bool,
    implementation: str | None,
) -> tuple[Array, Array]:
    """Checks everything but the ranks of q, k and v, and calls; ``names`` goes into errors."""
    _check_arrays(op, names, q, k, v)
    b = _check_limits(op, names, cu_seqlens_qo, cu_seqlens_kv)
    max_seqlen_qo = _checks.check_int(op, names["max_seqlen_qo"], max_seqlen_qo, 0)
    max_seqlen_kv = _checks.check_int(op, names["max_seqlen_kv"], max_seqlen_kv, 0)
    if _checks.check_scale(op, "dropout_p", dropout_p) != 0.0:
        raise NotImplementedError(
            f"{op}: argument 'dropout_p' is {dropout_p}; dropout is not implemented, expected 0"
        )
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5
    softmax_scale = _checks.check_scale(op, "softmax_scale", softmax_scale)
    causal = _checks.check_bool(op, "causal", causal)
    _checks.check_bool(op, "deterministic", deterministic)
    _dispatch.check_implementation(op, implementation)

    if not _checks.check_bool(op, "is_varlen", is_varlen):
        _check_uniform(op, names["q"], q, b, names["max_seqlen_qo"], max_seqlen_qo)
        _check_uniform(op, names["k"], k, b, names["max_seqlen_kv"], max_seqlen_kv)
        cu_seqlens_qo = np.asarray([i * max_seqlen_qo for i in range(b + 1)], np.int32)
        cu_seqlens_kv = np.asarray([i * max_seqlen_kv for i in range(b + 1)], np.int32)
    sequences = _sequences(cu_seqlens_qo, cu_seqlens_kv, q.shape[0], k.shape[0])
    # Inside shard_map q may vary over devices where k and v do not (one key head for all). Casting
    # here and not in the Operation puts the sum over devices into the gradient of the cast.
    q, k, v, sequences = vary_alike([*map(jnp.asarray, (q, k, v)), sequences])
    return _attention(q, k, v, sequences, softmax_scale, causal, implementation)


def _check_arrays(op: str, names: dict[str, str], q: Array, k: Array, v: Array) -> None:
    _checks.check_dtype(op, names["q"], q, _DTYPES)
    _checks.check_dtype(op, names["k"], k, (q.dtype,))
    _checks.check_dtype(op, names["v"], v, (q.dtype,))
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.shape[0] > _MAX_ROWS or 0 in array.shape[1:]:
            raise ValueError(
                f"{op}: argument '{names[name]}' has shape {tuple(array.shape)}; expected at least "
                f"one head and one column, and at most {_MAX_ROWS} rows"
            )
    expected = (k.shape[0], k.shape[1], q.shape[2])
    _checks.check_shape(op, names["k"], k, expected, ("total_kv", "h_kv", "d"))
    expected = (k.shape[0], k.shape[1], v.shape[2])
    _checks.check_shape(op, names["v"], v, expected, ("total_kv", "h_kv", "dv"))
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"{op}: argument '{names['q']}' has {q.shape[1]} heads, '{names['k']}' has "
            f"{k.shape[1]}; expected h_q to be a multiple of h_kv"
        )


def _check_limits(op: str, names: dict[str, str], cu_seqlens_qo: Any, cu_seqlens_kv: Any) -> int:
    """The number of sequences."""
    for name, array in (("cu_seqlens_qo", cu_seqlens_qo), ("cu_seqlens_kv", cu_seqlens_kv)):
        _checks.check_rank(op, names[name], array, ("b+1",))
        _checks.check_dtype(op, names[name], array, (np.int32,))
        if array.shape[0] == 0:
            raise ValueError(
                f"{op}: argument '{names[name]}' has shape (0,); expected (b+1,), which for no "
                "sequences is (1,)"
            )
    expected = tuple(cu_seqlens_qo.shape)
    _checks.check_shape(op, names["cu_seqlens_kv"], cu_seqlens_kv, expected, ("b+1",))
    return expected[0] - 1


def _check_width(op: str, name: str, value: Any, expected: str, others: int) -> None:
    if value.shape[-1] <= others:
        raise ValueError(
            f"{op}: argument '{name}' has shape {tuple(value.shape)}; expected a last dimension of "
            f"{expected}, dv >= 1"
        )


def _check_uniform(op: str, name: str, value: Any, b: int, length_name: str, length: int) -> None:
    if value.shape[0] < b * length:
        raise ValueError(
            f"{op}: argument '{name}' has {value.shape[0]} rows; expected at least "
            f"b * {length_name} = {b} * {length} = {b * length} (is_varlen=False)"
        )


def _sequences(cu_seqlens_qo: Any, cu_seqlens_kv: Any, total_q: int, total_k: int) -> Array:
    """The limits of all sequences, put right: ``int32[b, 5]``.

    A row is (q_begin, q_end, k_begin, k_end, broken) with ``0 <= begin <= end <= total`` whatever
    the input, so that neither kernels nor reference can be led out of an array. Ranges are in
    ascending order. A run of broken sequences shares the rows between the sound entries around
    it: they are all given to its last sequence.
    """
    q_limits, q_sound = _sound_limits(jnp.asarray(cu_seqlens_qo), total_q)
    k_limits, k_sound = _sound_limits(jnp.asarray(cu_seqlens_kv), total_k)
    sound = q_sound & k_sound
    broken = (~(sound[:-1] & sound[1:])).astype(jnp.int32)
    columns = (q_limits[:-1], q_limits[1:], k_limits[:-1], k_limits[1:], broken)
    return jnp.stack(columns, axis=-1)


def _sound_limits(cu_seqlens: Array, total: int) -> tuple[Array, Array]:
    """Replaces the entries that are not sound by the sound one before; and says which are.

    Entries outside the array have no say in whether the others are in order.
    """
    inside = (cu_seqlens >= 0) & (cu_seqlens <= total)
    largest_before = lax.cummax(jnp.where(inside, cu_seqlens, 0))
    smallest_after = lax.cummin(jnp.where(inside, cu_seqlens, total), reverse=True)
    sound = inside & (largest_before <= cu_seqlens) & (cu_seqlens <= smallest_after)
    limits = lax.cummax(jnp.where(sound, cu_seqlens, 0))
    # Nothing sound follows a last entry that is not: what is left of the array is in doubt.
    last = jnp.where(sound[-1], limits[-1], total)
    return limits.at[-1].set(last), sound


# ------------------------------------------------------------------ the operations

_INPUTS = ("q", "k", "v", "sequences")
_INPUT_DIMS = {"q": "t h d", "k": "s k d", "v": "s k e", "sequences": "n five"}
_RESULT_DIMS = {"out": "t h e", "lse": "t h"}


def _like(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _abstract_forward(operands: dict[str, Any], **_: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    q, v = operands["q"], operands["v"]
    out = jax.ShapeDtypeStruct((*q.shape[:2], v.shape[2]), q.dtype)
    return out, jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)


def _abstract_backward(operands: dict[str, Any], **_: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return _like(operands["q"]), _like(operands["k"]), _like(operands["v"])


def _fold(operands, batched, size, static, *, results: tuple[str, ...]):
    """vmap: the batch elements one after the other, each with its own sequences.

    The rows between the last sequence of an element and the first of the next are in no sequence,
    so padding stays padding. ``results`` says for each result whether its rows are those of "q" or
    of "k". If none are those of "k", then keys and values without the vmapped axis are not
    repeated: the sequences of every element read the same rows.
    """
    rows_q = operands["q"].shape[1 if batched["q"] else 0]
    rows_k = operands["k"].shape[1 if batched["k"] else 0]
    shared = {"k", "v"} if "k" not in results and not (batched["k"] or batched["v"]) else set()
    if size * max(rows_q, rows_k) > _MAX_ROWS:
        return None

    folded = {}
    for name, array in operands.items():
        if name in shared or name == "sequences":
            continue
        if not batched[name]:
            array = jnp.broadcast_to(array, (size, *array.shape))
        folded[name] = array.reshape(size * array.shape[1], *array.shape[2:])
    for name in shared:
        folded[name] = operands[name]

    step_k = 0 if shared else rows_k
    step = jnp.asarray([rows_q, rows_q, step_k, step_k, 0], jnp.int32)
    first = jnp.arange(size, dtype=jnp.int32)[:, None, None] * step
    sequences = operands["sequences"] + first  # adds the axis if there is none
    folded["sequences"] = sequences.reshape(-1, 5)

    def unfold(values):
        rows = [rows_q if result == "q" else rows_k for result in results]
        return tuple(x.reshape(size, n, *x.shape[1:]) for x, n in zip(values, rows, strict=True))

    return folded, static, unfold


_FORWARD = Operation(
    name="flash_attn_varlen_fwd",
    operands=_INPUTS,
    results=("out", "lse"),
    abstract=_abstract_forward,
    reference=reference.varlen_forward,
    dims=_INPUT_DIMS | _RESULT_DIMS,
    fold=functools.partial(_fold, results=("q", "q")),
    split=("h",),
    follows={"k": "h"},
    keep_whole=("q", "k", "v"),
)


def _backward_operation(**division: Any) -> Operation:
    return Operation(
        name="flash_attn_varlen_bwd",
        operands=(*_INPUTS, "out", "lse", "dout", "dlse"),
        results=("dq", "dk", "dv"),
        abstract=_abstract_backward,
        reference=reference.varlen_backward,
        dims=_INPUT_DIMS
        | _RESULT_DIMS
        | {"dout": "t h e", "dlse": "t h", "dq": "t h d", "dk": "s k d", "dv": "s k e"},
        fold=functools.partial(_fold, results=("q", "k", "k")),
        keep_whole=("q", "k", "v"),
        **division,
    )


_BACKWARD = _backward_operation(split=("h",), follows={"k": "h"})
# dk and dv sum over all query heads of a key head. With one key head for several query heads these
# cannot be split over devices: each would return its part of the sum.
_BACKWARD_ONE_KEY_HEAD = _backward_operation()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, sequences, softmax_scale, causal, implementation):
    operands = {"q": q, "k": k, "v": v, "sequences": sequences}
    return _FORWARD(
        operands, implementation=implementation, softmax_scale=softmax_scale, causal=causal
    )


def _attention_fwd(q, k, v, sequences, softmax_scale, causal, implementation):
    out, lse = _attention(q, k, v, sequences, softmax_scale, causal, implementation)
    return (out, lse), (q, k, v, sequences, out, lse)


def _attention_bwd(softmax_scale, causal, implementation, residuals, cotangents):
    names = (*_INPUTS, "out", "lse", "dout", "dlse")
    operands = dict(zip(names, (*residuals, *cotangents), strict=True))
    shared = operands["k"].shape[1] == 1 < operands["q"].shape[1]
    backward = _BACKWARD_ONE_KEY_HEAD if shared else _BACKWARD
    gradients = backward(
        operands, implementation=implementation, softmax_scale=softmax_scale, causal=causal
    )
    return (*gradients, None)


_attention.defvjp(_attention_fwd, _attention_bwd)
