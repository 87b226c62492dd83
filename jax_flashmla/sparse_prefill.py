"""Sparse prefill: attention of many query tokens, each over its own choice of tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks, _dispatch, _folding
from jax_flashmla._primitive import Operation
from jax_flashmla.reference import sparse_prefill as reference

_NAME = "flash_mla_sparse_fwd"
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def _abstract(operands: dict[str, Any], *, d_v: int, **_: Any):
    s_q, h_q, _ = operands["q"].shape
    per_head = jax.ShapeDtypeStruct((s_q, h_q), jnp.float32)
    return jax.ShapeDtypeStruct((s_q, h_q, d_v), operands["q"].dtype), per_head, per_head


def _fold(
    operands: dict[str, Any], batched: dict[str, bool], size: int, static: dict[str, Any]
) -> _folding.Folded:
    """A vmapped call as one call: query tokens of all entries in a row, and so the rows of kv."""
    cache = _folding.fold_cache(
        operands["kv"], batched["kv"], operands["indices"], batched["indices"], size, 1
    )
    if cache is None:
        return None
    s_q = operands["q"].shape[batched["q"]]
    folded = {
        "q": _folding.merge(operands["q"], batched["q"], size),
        "kv": cache[0],
        "indices": cache[1],
        # Different sinks for different calls become one for each query token.
        "attn_sink": _folding.fold_sink(operands["attn_sink"], batched["attn_sink"], size, s_q),
    }
    if operands["topk_length"] is not None:
        folded["topk_length"] = _folding.merge(
            operands["topk_length"], batched["topk_length"], size
        )
    return folded, static, _folding.unfold_to(size, s_q)


operation = Operation(
    name=_NAME,
    operands=("q", "kv", "indices", "attn_sink", "topk_length"),
    results=("out", "max_logits", "lse"),
    abstract=_abstract,
    reference=reference.sparse_prefill,
    fold=_fold,
    dims={
        "q": "s h d",
        "kv": "row k column",
        "indices": "s k topk",
        "attn_sink": "h | s h",
        "topk_length": "s",
        "out": "s h v",
        "max_logits": "s h",
        "lse": "s h",
    },
    split=("s", "h"),
    follows={"k": "h"},
    keep_whole=("kv",),
)


def flash_mla_sparse_fwd(
    q: jax.Array,
    kv: jax.Array,
    indices: jax.Array,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: jax.Array | None = None,
    topk_length: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Multi-head latent attention of each query token over the rows of kv chosen for it.

    The prefill of DeepSeek sparse attention: for query token i, with k the rows ``indices[i, 0]``
    of ``kv`` and v their first ``d_v`` columns,

        ``out[i] = softmax(sm_scale * q[i] k^T) v``

    with scores, softmax and sums in float32 and the probabilities rounded to the type of q before
    they weigh the values. An index that occurs twice counts twice. Nothing is masked but
    invalid indices: causality is a matter of choosing them. A query token without valid index gets
    ``out = 0``, ``max_logits = -inf`` and ``lse = +inf``.

    Args:
        q: [s_q, h_q, d] bfloat16; d is 576 or 512 in DeepSeek's models. float16 and float32, and
            any other d, run on XLA only.
        kv: [s_kv, 1, d] of q's dtype. Rows that no index names may hold NaN.
        indices: int32[s_q, 1, topk]; those that are negative or >= s_kv are skipped.
        sm_scale: factor of the scores, a static Python float. Real models need
            ``(nope + rope) ** -0.5`` of the head dimensions *before* absorption (``192 ** -0.5``
            for DeepSeek V3.2), times mscale² under YaRN.
        d_v: columns of the values, at most d.
        attn_sink: float32[h_q], a logit for each head that takes part in the softmax without a
            value: ``out *= 1 / (1 + exp(attn_sink - lse))``. +inf gives zeros, -inf no effect;
            the other results do not contain it.
        topk_length: int32[s_q]: only the first so many indices of a query token count (none if
            negative, all if larger than topk); the others are never looked at.
        implementation: "cuda" for the kernels (an error where they do not support the case), "xla"
            for plain XLA, None for the best that supports the case.

    Returns:
        ``out`` [s_q, h_q, d_v] in q's dtype; ``max_logits`` float32[s_q, h_q], the largest scaled
        score; ``lse`` float32[s_q, h_q], the natural logarithm of the sum of exponentials of the
        scaled scores.

    Raises:
        ValueError: an argument is missing, or of the wrong type, shape or dtype, or contradicts
            another one. The message names the argument, what it is and what was expected.
        NotImplementedError: more than one key head; derivatives; and ``implementation="cuda"`` for
            a case or on a platform without a kernel.
    """
    _dispatch.check_implementation(_NAME, implementation)
    _checks.check_rank(_NAME, "q", q, ("s_q", "h_q", "d"))
    _checks.check_dtype(_NAME, "q", q, _DTYPES)
    s_q, h_q, d = q.shape
    if h_q < 1 or d < 1:
        raise ValueError(
            f"{_NAME}: argument 'q' has shape {tuple(q.shape)}; expected (s_q, h_q, d) with h_q "
            "and d at least 1"
        )
    _checks.check_rank(_NAME, "kv", kv, ("s_kv", "h_kv", "d"))
    _checks.check_dtype(_NAME, "kv", kv, (q.dtype,))
    s_kv, h_kv, _ = kv.shape
    if h_kv > 1:
        raise NotImplementedError(
            f"{_NAME}: sparse attention supports one key head, as in absorbed MLA; 'kv' of shape "
            f"{tuple(kv.shape)} has h_kv={h_kv}"
        )
    _checks.check_shape(_NAME, "kv", kv, (s_kv, 1, d), ("s_kv", "h_kv", "d"))
    _checks.check_rank(_NAME, "indices", indices, ("s_q", "h_kv", "topk"))
    _checks.check_dtype(_NAME, "indices", indices, (jnp.int32,))
    _checks.check_shape(
        _NAME, "indices", indices, (s_q, 1, indices.shape[2]), ("s_q", "h_kv", "topk")
    )
    sm_scale = _checks.check_scale(_NAME, "sm_scale", sm_scale)
    d_v = _checks.check_int(_NAME, "d_v", d_v, 1)
    if d_v > d:
        raise ValueError(
            f"{_NAME}: argument 'd_v' is {d_v}; expected at most d={d}, since the values are the "
            "first d_v columns of kv"
        )
    if attn_sink is not None:
        _checks.check_shape(_NAME, "attn_sink", attn_sink, (h_q,), ("h_q",))
        _checks.check_dtype(_NAME, "attn_sink", attn_sink, (jnp.float32,))
    if topk_length is not None:
        _checks.check_shape(_NAME, "topk_length", topk_length, (s_q,), ("s_q",))
        _checks.check_dtype(_NAME, "topk_length", topk_length, (jnp.int32,))
    out, max_logits, lse = operation(
        {
            "q": q,
            "kv": kv,
            "indices": indices,
            "attn_sink": attn_sink,
            "topk_length": topk_length,
        },
        implementation=implementation,
        sm_scale=sm_scale,
        d_v=d_v,
    )
    return out, max_logits, lse
