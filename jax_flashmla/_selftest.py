"""The self-test of ``python -m jax_flashmla``: small calls of every operation against numpy.

The numpy functions here are written from the definitions alone and share nothing with the jnp
references. They work in the float type that they are given, on inputs already rounded.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jax_flashmla
from jax_flashmla.cache import PagedKVCache, token_slots
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.metadata import get_mla_metadata
from jax_flashmla.sparse_prefill import flash_mla_sparse_fwd
from jax_flashmla.varlen_prefill import flash_attn_varlen_func

# Largest norm of the error over the norm of the result. In bfloat16, rounding the probabilities
# costs up to 2e-3 where few keys count, and rounding the result 1.7e-3.
TOLERANCE = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 1e-5}
LSE_TOLERANCE = 8.01 / 65536  # relative
# An lse near 0 is a sum that cancelled, of 576 products whose magnitudes add up to about 40, with
# the error in float32 that goes with that. It is measured as if it were this large.
LSE_FLOOR = 0.1
# Where products are in FP8, numbers have three bits after the first: an error of up to 1/16, by
# norm about half of that; and scores, whose deviation is about 2, are off by up to 0.2.
FP8_TOLERANCE, FP8_LSE_TOLERANCE = 5e-2, 0.5
# Gradients pass through two more roundings to bfloat16.
GRADIENT_TOLERANCE = 6e-3

GARBAGE = 2147480000  # for table entries that nothing may read

# ---------------------------------------------------------------------------------------------
# numpy


def attention(q, keys, scale: float, head_dim_v: int, mask=None, sink=None):
    """Attention of [..., d] queries over the same keys [n, d]; returns out and lse.

    Args:
        q: [..., d].
        keys: [n, d]; the values are the first ``head_dim_v`` columns.
        scale: factor of the scores.
        head_dim_v: columns of the values.
        mask: bool, broadcastable to [..., n]: which keys each query sees; None for all.
        sink: a logit for each query that takes part in the softmax without a value, or None.
    """
    scores = scale * (q @ keys.T)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    top = scores.max(axis=-1, initial=-np.inf, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - safe)
    total = weights.sum(axis=-1, keepdims=True)
    empty = total == 0
    out = (weights @ keys[:, :head_dim_v]) / np.where(empty, 1, total)
    lse = np.where(empty, np.inf, np.log(np.where(empty, 1, total)) + safe)
    if sink is not None:
        out = out / (1 + np.exp(np.asarray(sink, out.dtype)[..., None] - lse))
    return np.where(empty, 0, out), lse[..., 0]


def stored(tokens, cache_format: str, rounding: Any = ml_dtypes.bfloat16):
    """float32 values that tokens [..., d] have once they are in a cache of this format.

    ``rounding`` is the type that the products of FP8 numbers and scales are rounded to.
    """
    tokens = np.asarray(tokens, np.float32)
    if cache_format == "plain":
        return tokens
    latent, tile = {"fp8_v32": (512, 128), "fp8_v4": (448, 64)}[cache_format]
    tiles = tokens[..., :latent].reshape(*tokens.shape[:-1], latent // tile, tile)
    scale = np.maximum(np.abs(tiles).max(axis=-1, keepdims=True) / np.float32(448), 1e-4)
    scale = np.exp2(np.ceil(np.log2(scale)))
    codes = np.clip(tiles / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    values = (codes.astype(np.float32) * scale).astype(rounding).astype(np.float32)
    rope = tokens[..., latent:].astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.concatenate([values.reshape(*tokens.shape[:-1], latent), rope], axis=-1)


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of ``expected``; NaN anywhere gives NaN."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = float(np.linalg.norm(actual - expected))
    norm = float(np.linalg.norm(expected))
    return error / norm if norm > 0 else (0.0 if error == 0 else np.inf)


def lse_error(actual, expected) -> float:
    """Largest relative error of an lse, one below ``LSE_FLOOR`` taken as that."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    size = np.maximum(np.where(np.isfinite(expected), np.abs(expected), 1), LSE_FLOOR)
    with np.errstate(invalid="ignore"):
        error = np.where(actual == expected, 0.0, np.abs(actual - expected) / size)
    return float(np.max(error, initial=0.0))


# ---------------------------------------------------------------------------------------------
# Cases


@dataclasses.dataclass
class Result:
    """One case of the self-test.

    Attributes:
        name: what was computed.
        implementation: "cuda" or "xla", what computed it.
        errors: for each result its error, as :func:`relative_error` or :func:`lse_error`.
        tolerances: for each result the largest error allowed.
        failure: what went wrong otherwise, or None.
        seconds: time taken, compilation included.
    """

    name: str
    implementation: str | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    tolerances: dict[str, float] = dataclasses.field(default_factory=dict)
    failure: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every error is within its tolerance (NaN is not) and nothing else went wrong."""
        within = (self.errors[name] <= self.tolerances[name] for name in self.errors)
        return self.failure is None and bool(self.errors) and all(within)

    def check(self, name: str, error: float, tolerance: float) -> None:
        """Notes the error of a result."""
        self.errors[name], self.tolerances[name] = error, tolerance


class Caller:
    """Calls operations with the implementation that was asked for, where it can be had.

    "cuda" is insisted on by the decode loop; an operation without a kernel takes what there is, and
    its result says so.
    """

    def __init__(self, implementation: str | None):
        self.wanted = implementation

    def __call__(self, result: Result, function: Callable, *args: Any, **kwargs: Any) -> Any:
        best = jax_flashmla.explain(function, *args, **kwargs).implementation
        chosen = best if self.wanted == "cuda" else self.wanted
        result.implementation = chosen or best
        return function(*args, **kwargs, implementation=chosen)


def _normal(rng: np.random.Generator, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _poison(cache: PagedKVCache) -> PagedKVCache:
    """A cache whose every token is NaN, in every format."""
    if cache.format == "plain":
        return PagedKVCache(jnp.full_like(cache.data, jnp.nan), cache.format, cache.page_size)
    return PagedKVCache(jnp.full_like(cache.data, 0xFF), cache.format, cache.page_size)


def _check_decode(result: Result, got: Any, want: Any, fp8_matmul: bool) -> None:
    """Notes the errors of out and lse."""
    out, lse = TOLERANCE["bfloat16"], LSE_TOLERANCE
    if fp8_matmul:
        out, lse = FP8_TOLERANCE, FP8_LSE_TOLERANCE
    result.check("out", relative_error(got[0], want[0]), out)
    result.check("lse", lse_error(got[1], want[1]), lse)


def _dense_decode(
    call: Caller,
    result: Result,
    *,
    schedule: bool = False,
    cache_format: str = "plain",
    fp8_matmul: bool = False,
) -> None:
    """Two query tokens a request, causal; a request without tokens; NaN in all unused slots."""
    rng = np.random.default_rng(1)
    lengths, page_size, s_q = (150, 0, 1, 64), 64, 2
    heads = 20 if fp8_matmul else 16  # with up to 32 rows there are no products in FP8
    b, d, dv, scale = len(lengths), 576, 512, 192**-0.5
    q = _normal(rng, b, s_q, heads, d)
    tokens = [_normal(rng, n, d) for n in lengths]
    pages = rng.permutation(12)
    table = np.full((b, 3), GARBAGE, np.int32)
    slots = []
    for r, n in enumerate(lengths):
        used = -(-n // page_size)
        table[r, :used], pages = pages[:used], pages[used:]
        at = np.arange(n)
        slots.append(table[r, at // page_size] * page_size + at % page_size)
    cache = _poison(PagedKVCache.zeros(12, page_size, format=cache_format))
    cache = cache.append(
        jnp.concatenate(tokens)[:, None], jnp.asarray(np.concatenate(slots), jnp.int32)
    )
    seqlens = jnp.asarray(lengths, jnp.int32)
    # Planned for other lengths than those it is used with: that must not matter.
    plan = get_mla_metadata(seqlens[::-1], s_q * heads, 1, num_sm_parts=7) if schedule else ()
    out, lse = call(
        result,
        flash_mla_with_kvcache,
        q,
        cache,
        jnp.asarray(table),
        seqlens,
        dv,
        *plan,
        softmax_scale=scale,
        causal=True,
        is_fp8_kvcache=cache_format != "plain",
        fp8_matmul=fp8_matmul,
    )
    want_out, want_lse = np.zeros(out.shape), np.zeros(lse.shape)
    for r, n in enumerate(lengths):
        keys = _f64(stored(tokens[r], cache_format))
        for i in range(s_q):
            seen = np.arange(n) <= n - s_q + i
            want_out[r, i], want_lse[r, :, i] = attention(_f64(q[r, i]), keys, scale, dv, seen)
    _check_decode(result, (out, lse), (want_out, want_lse), fp8_matmul)


def _sparse_decode(
    call: Caller, result: Result, *, cache_format: str, extra: bool, fp8_matmul: bool = False
) -> None:
    """Chosen tokens of one cache or two, some choices invalid, with an attention sink."""
    rng = np.random.default_rng(2)
    b, d, dv, topk = 3, 512 if cache_format == "fp8_v4" else 576, 512, 96
    heads = 40 if fp8_matmul else 8  # as for dense decode
    scale = d**-0.55
    q = _normal(rng, b, 1, heads, d)
    sink = jnp.asarray(rng.standard_normal(heads), jnp.float32).at[0].set(-jnp.inf)
    caches, indices, limits = [], [], []
    chosen: list[list[np.ndarray]] = [[] for _ in range(b)]
    for page_size in (64, 16)[: 1 + extra]:
        tokens = _normal(rng, b, 2 * page_size, 1, d)
        cache, table = PagedKVCache.from_sequences(tokens, page_size, format=cache_format)
        choice = rng.integers(0, 2 * page_size, (b, 1, topk)).astype(np.int32)
        choice[:, :, ::7] = -1
        choice[:, :, 3::31] = GARBAGE
        length = rng.integers(0, topk + 1, b).astype(np.int32)
        caches.append(cache)
        indices.append(token_slots(jnp.asarray(choice), table, page_size, num_pages=2 * b))
        limits.append(jnp.asarray(length))
        for r in range(b):
            picked = choice[r, 0, : length[r]]
            picked = picked[(picked >= 0) & (picked < 2 * page_size)]
            chosen[r].append(stored(tokens[r, picked, 0], cache_format))
    more: dict[str, Any] = {}
    if extra:
        more = {
            "extra_k_cache": caches[1],
            "extra_indices_in_kvcache": indices[1],
            "extra_topk_length": limits[1],
        }
    out, lse = call(
        result,
        flash_mla_with_kvcache,
        q,
        caches[0],
        None,
        None,
        dv,
        softmax_scale=scale,
        is_fp8_kvcache=cache_format != "plain",
        indices=indices[0],
        topk_length=limits[0],
        attn_sink=sink,
        fp8_matmul=fp8_matmul,
        **more,
    )
    want_out, want_lse = np.zeros(out.shape), np.zeros(lse.shape)
    for r in range(b):
        keys = _f64(np.concatenate(chosen[r]))
        want_out[r, 0], want_lse[r, :, 0] = attention(
            _f64(q[r, 0]), keys, scale, dv, sink=_f64(sink)
        )
    _check_decode(result, (out, lse), (want_out, want_lse), fp8_matmul)


def _sparse_prefill(call: Caller, result: Result) -> None:
    """Chosen rows for each of several query tokens, one of which chooses nothing."""
    rng = np.random.default_rng(3)
    s_q, s_kv, heads, d, dv, topk = 5, 70, 8, 576, 512, 40
    scale = 192**-0.5
    q, kv = _normal(rng, s_q, heads, d), _normal(rng, s_kv, 1, d)
    choice = rng.integers(-5, s_kv + 5, (s_q, 1, topk)).astype(np.int32)
    length = np.array([topk, 0, 1, topk + 9, 17], np.int32)
    out, top, lse = call(
        result,
        flash_mla_sparse_fwd,
        q,
        kv,
        jnp.asarray(choice),
        scale,
        dv,
        topk_length=jnp.asarray(length),
    )
    want_out, want_lse = np.zeros(out.shape), np.zeros(lse.shape)
    want_top = np.full(top.shape, -np.inf)
    for i in range(s_q):
        picked = choice[i, 0, : length[i]]
        keys = _f64(kv[picked[(picked >= 0) & (picked < s_kv)], 0])
        want_out[i], want_lse[i] = attention(_f64(q[i]), keys, scale, dv)
        want_top[i] = (scale * _f64(q[i]) @ keys.T).max(axis=-1, initial=-np.inf)
    result.check("out", relative_error(out, want_out), TOLERANCE["bfloat16"])
    result.check("lse", lse_error(lse, want_lse), LSE_TOLERANCE)
    result.check("max_logits", lse_error(top, want_top), LSE_TOLERANCE)


def _varlen_prefill(call: Caller, result: Result) -> None:
    """Causal attention within packed sequences, and its gradient."""
    rng = np.random.default_rng(4)
    limits_q, limits_k = (0, 17, 17, 40), (0, 30, 33, 56)
    total_q, total_k, heads, heads_k, d, dv = 44, 60, 4, 2, 192, 128
    group, scale = heads // heads_k, d**-0.5
    q = _normal(rng, total_q, heads, d)
    k, v = _normal(rng, total_k, heads_k, d), _normal(rng, total_k, heads_k, dv)
    dout, dlse = _normal(rng, total_q, heads, dv), _normal(rng, total_q, heads, dtype=jnp.float32)

    def forward(q, k, v):
        return call(
            result,
            flash_attn_varlen_func,
            q,
            k,
            v,
            jnp.asarray(limits_q, jnp.int32),
            jnp.asarray(limits_k, jnp.int32),
            32,
            32,
            softmax_scale=scale,
            causal=True,
        )

    def both(q, k, v, dout, dlse):
        (out, lse), pullback = jax.vjp(forward, q, k, v)
        return out, lse, *pullback((dout, dlse))

    out, lse, *gradients = jax.jit(both)(q, k, v, dout, dlse)
    q64, k64, v64, dout64, dlse64 = map(_f64, (q, k, v, dout, dlse))
    want_out, want_lse = np.zeros(out.shape), np.full(lse.shape, np.inf)
    want = [np.zeros(x.shape) for x in (q, k, v)]
    for s in range(len(limits_q) - 1):
        qs, ks = slice(limits_q[s], limits_q[s + 1]), slice(limits_k[s], limits_k[s + 1])
        n_q, n_k = qs.stop - qs.start, ks.stop - ks.start
        if n_q == 0:
            continue
        seen = np.arange(n_k) <= n_k - n_q + np.arange(n_q)[:, None]
        for h in range(heads):
            qh, kh, vh = q64[qs, h], k64[ks, h // group], v64[ks, h // group]
            scores = np.where(seen, scale * qh @ kh.T, -np.inf)
            total = np.logaddexp.reduce(scores, axis=-1, keepdims=True)
            p = np.exp(scores - total)
            want_out[qs, h], want_lse[qs, h] = p @ vh, total[:, 0]
            dp = dout64[qs, h] @ vh.T
            delta = (p * dp).sum(axis=-1, keepdims=True) - dlse64[qs, h][:, None]
            ds = scale * p * (dp - delta)
            want[0][qs, h] += ds @ kh
            want[1][ks, h // group] += ds.T @ qh
            want[2][ks, h // group] += p.T @ dout64[qs, h]
    result.check("out", relative_error(out, want_out), TOLERANCE["bfloat16"])
    result.check("lse", lse_error(lse, want_lse), LSE_TOLERANCE)
    for name, actual, expected in zip(("dq", "dk", "dv"), gradients, want, strict=True):
        result.check(name, relative_error(actual, expected), GRADIENT_TOLERANCE)


CASES: dict[str, Callable[[Caller, Result], None]] = {
    "dense decode, bfloat16": _dense_decode,
    "dense decode, reused schedule": lambda c, r: _dense_decode(c, r, schedule=True),
    "dense decode, FP8 (V3.2)": lambda c, r: _dense_decode(c, r, cache_format="fp8_v32"),
    "dense decode, FP8 products": lambda c, r: _dense_decode(
        c, r, cache_format="fp8_v32", fp8_matmul=True
    ),
    "sparse decode, bfloat16": lambda c, r: _sparse_decode(c, r, cache_format="plain", extra=False),
    "sparse decode, FP8 (V3.2)": lambda c, r: _sparse_decode(
        c, r, cache_format="fp8_v32", extra=False
    ),
    "sparse decode, FP8 products, two caches": lambda c, r: _sparse_decode(
        c, r, cache_format="fp8_v32", extra=True, fp8_matmul=True
    ),
    "sparse decode, FP8 (V4), two caches": lambda c, r: _sparse_decode(
        c, r, cache_format="fp8_v4", extra=True
    ),
    "sparse prefill, bfloat16": _sparse_prefill,
    "varlen prefill and gradient": _varlen_prefill,
}


def run(implementation: str | None = None) -> Iterator[Result]:
    """Runs the cases one by one.

    Args:
        implementation: "xla" for all operations, "cuda" or None for what :class:`Caller` says.
    """
    call = Caller(implementation)
    for name, case in CASES.items():
        result = Result(name)
        start = time.perf_counter()
        try:
            case(call, result)
        except Exception as error:  # a case that cannot run is a failed one; the others go on
            result.failure = f"{type(error).__name__}: {error}"
        result.seconds = time.perf_counter() - start
        yield result
