"""Float64 numpy oracles of decode and sparse prefill, and the tolerances of all operations.

Each oracle is a plain loop over requests (or query tokens) written from the definition of the
operation: gather what may be attended to, one softmax over all of it, weighted sum. Nothing
here is shared with ``jax_flashmla``: no block loop, no online softmax, no rounding of the
probabilities, and the FP8 formats are decoded from their bits.

Arrays go in as numpy arrays of any floating dtype and come out as float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


# ---------------------------------------------------------------------------------------
# Attention of one set of query rows over one set of tokens
# ---------------------------------------------------------------------------------------


def _attend(q, keys, values, scale, visible=None):
    """One softmax: q [r, d], keys [t, d], values [t, dv], visible bool [r, t] or None.

    Returns out [r, dv], lse [r], max_logits [r]; a row that sees nothing gets 0, +inf, -inf.
    """
    rows, tokens = q.shape[0], keys.shape[0]
    out = np.zeros((rows, values.shape[1]))
    lse = np.full(rows, np.inf)
    top = np.full(rows, -np.inf)
    if visible is None:
        visible = np.ones((rows, tokens), bool)
    # Rows which see the same tokens are done together: one matrix product each.
    patterns: dict[bytes, list[int]] = {}
    for row in range(rows):
        patterns.setdefault(visible[row].tobytes(), []).append(row)
    for chosen in patterns.values():
        seen = visible[chosen[0]]
        if not seen.any():
            continue
        scores = scale * (q[chosen] @ keys[seen].T)
        best = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - best)
        total = weights.sum(axis=1, keepdims=True)
        out[chosen] = (weights / total) @ values[seen]
        lse[chosen] = (best + np.log(total))[:, 0]
        top[chosen] = best[:, 0]
    return out, lse, top


def _apply_sink(out, lse, sink):
    """out [..., h, dv], lse [..., h], sink [h]: out *= 1 / (1 + exp(sink - lse))."""
    if sink is None:
        return out
    with np.errstate(over="ignore", invalid="ignore"):
        factor = 1.0 / (1.0 + np.exp(np.asarray(sink, np.float64) - lse))
    # Nothing attended: out is 0 whatever the sink (inf - inf would be NaN).
    return np.where(np.isposinf(lse)[..., None], 0.0, out * factor[..., None])


def _float64(x):
    return np.asarray(x).astype(np.float64)


# ---------------------------------------------------------------------------------------
# Decode
# ---------------------------------------------------------------------------------------


def dense_decode(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    *,
    softmax_scale=None,
    causal=False,
    attn_sink=None,
):
    """Dense decode over a paged cache of numbers [pages, page_size, h_kv, d].

    Returns out [b, s_q, h_q, head_dim_v] and lse [b, h_q, s_q].
    """
    b, s_q, h_q, d = q.shape
    pages, page_size, h_kv, _ = k_cache.shape
    group = h_q // h_kv
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    out = np.zeros((b, s_q, h_q, head_dim_v))
    lse = np.full((b, s_q, h_q), np.inf)
    with np.errstate(invalid="ignore"):
        for r in range(b):
            length = max(int(cache_seqlens[r]), 0)
            used = [int(p) for p in block_table[r][: -(-length // page_size)]]
            if length > block_table.shape[1] * page_size or any(not 0 <= p < pages for p in used):
                out[r] = lse[r] = np.nan
                continue
            if length == 0:
                continue
            tokens = _float64(np.concatenate([k_cache[p] for p in used])[:length])
            # Query token i sees keys 0 .. length - s_q + i when causal, else all.
            last = length - s_q + np.arange(s_q) if causal else np.full(s_q, length - 1)
            visible = np.arange(length)[None, :] <= last[:, None]
            for g in range(h_kv):
                heads = slice(g * group, (g + 1) * group)
                rows = _float64(q[r, :, heads]).reshape(s_q * group, d)
                keys = tokens[:, g]
                o, s, _ = _attend(
                    rows, keys, keys[:, :head_dim_v], scale, np.repeat(visible, group, axis=0)
                )
                out[r, :, heads] = o.reshape(s_q, group, head_dim_v)
                lse[r, :, heads] = s.reshape(s_q, group)
        out = _apply_sink(out, lse, attn_sink)
    return out, lse.transpose(0, 2, 1)


def sparse_decode(
    q,
    k_cache,
    indices,
    head_dim_v,
    *,
    softmax_scale=None,
    topk_length=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices=None,
    extra_topk_length=None,
):
    """Sparse decode over one or two caches of numbers [pages, page_size, 1, d].

    Returns out [b, s_q, h_q, head_dim_v] and lse [b, h_q, s_q].
    """
    b, s_q, h_q, d = q.shape
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    out = np.zeros((b, s_q, h_q, head_dim_v))
    lse = np.full((b, s_q, h_q), np.inf)

    def chosen(cache, slots, count):
        slots = slots if count is None else slots[: max(int(count), 0)]
        flat = cache.reshape(-1, d)
        return _float64(flat[[s for s in slots.tolist() if 0 <= s < len(flat)]])

    with np.errstate(invalid="ignore"):
        for r in range(b):
            for i in range(s_q):
                count = None if topk_length is None else topk_length[r]
                tokens = chosen(k_cache, indices[r, i], count)
                if extra_k_cache is not None:
                    count = None if extra_topk_length is None else extra_topk_length[r]
                    more = chosen(extra_k_cache, extra_indices[r, i], count)
                    tokens = np.concatenate([tokens, more])
                out[r, i], lse[r, i], _ = _attend(
                    _float64(q[r, i]), tokens, tokens[:, :head_dim_v], scale
                )
        out = _apply_sink(out, lse, attn_sink)
    return out, lse.transpose(0, 2, 1)


# ---------------------------------------------------------------------------------------
# Sparse prefill
# ---------------------------------------------------------------------------------------


def sparse_prefill(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    """Returns out [s_q, h_q, d_v], max_logits [s_q, h_q], lse [s_q, h_q]."""
    s_q, h_q, d = q.shape
    s_kv = kv.shape[0]
    flat = _float64(kv).reshape(s_kv, d)
    out = np.zeros((s_q, h_q, d_v))
    lse = np.full((s_q, h_q), np.inf)
    top = np.full((s_q, h_q), -np.inf)
    with np.errstate(invalid="ignore"):
        for i in range(s_q):
            row = indices[i, 0]
            if topk_length is not None:
                row = row[: max(int(topk_length[i]), 0)]
            tokens = flat[[s for s in row.tolist() if 0 <= s < s_kv]]
            out[i], lse[i], top[i] = _attend(_float64(q[i]), tokens, tokens[:, :d_v], sm_scale)
        out = _apply_sink(out, lse, attn_sink)
    return out, top, lse


# ---------------------------------------------------------------------------------------
# FP8 cache formats, from their bits
# ---------------------------------------------------------------------------------------

V32_BYTES, V32_NOPE, V32_TILE, ROPE = 656, 512, 128, 64
V4_BYTES, V4_NOPE, V4_TILE = 584, 448, 64


def _e4m3_table():
    """The value of each of the 256 codes: 1 sign, 4 exponent (bias 7), 3 mantissa bits."""
    table = np.empty(256)
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            table[code] = np.nan
        elif exponent == 0:
            table[code] = sign * mantissa * 2.0**-9
        else:
            table[code] = sign * (8 + mantissa) * 2.0 ** (exponent - 10)
    return table


_E4M3 = _e4m3_table()


def _bits(raw):
    return np.ascontiguousarray(raw).view(np.uint8)


def v4_page_bytes(page_size):
    """Bytes of one page of the V4 format: 584 a token, rounded up to a multiple of 576."""
    return -(-V4_BYTES * page_size // 576) * 576


def decode_v32(raw):
    """uint8 [..., 656] -> float64 [..., 576], the exact products fp8 * scale."""
    raw = _bits(raw)
    lead = raw.shape[:-1]
    nope = _E4M3[raw[..., :V32_NOPE]].reshape(*lead, 4, V32_TILE)
    scales = raw[..., V32_NOPE : V32_NOPE + 16].copy().view("<f4").astype(np.float64)
    rope = raw[..., V32_NOPE + 16 :].copy().view(BFLOAT16).astype(np.float64)
    with np.errstate(invalid="ignore"):
        nope = (nope * scales[..., None]).reshape(*lead, V32_NOPE)
    return np.concatenate([nope, rope], axis=-1)


def decode_v4(raw, page_size):
    """uint8 [pages, page_bytes] -> float64 [pages, page_size, 1, 512]."""
    raw = _bits(raw)
    pages = raw.shape[0]
    assert raw.shape[1] == v4_page_bytes(page_size)
    data = raw[:, : 576 * page_size].reshape(pages, page_size, 576)
    tail = raw[:, 576 * page_size : V4_BYTES * page_size].reshape(pages, page_size, 8)
    nope = _E4M3[data[..., :V4_NOPE]].reshape(pages, page_size, 7, V4_TILE)
    exponent = tail[..., :7].astype(np.int64)
    scales = np.where(exponent == 255, np.nan, np.exp2(np.minimum(exponent, 254) - 127.0))
    rope = data[..., V4_NOPE:].copy().view(BFLOAT16).astype(np.float64)
    nope = (nope * scales[..., None]).reshape(pages, page_size, V4_NOPE)
    return np.concatenate([nope, rope], axis=-1)[:, :, None, :]


def _tile_scales(tiles, power_of_two):
    """float32 scale of each tile [..., n, t]: max(amax / 448, 1e-4), perhaps rounded up."""
    amax = np.abs(tiles).max(axis=-1).astype(np.float32)
    scale = np.maximum(amax / np.float32(448), np.float32(1e-4))
    if power_of_two:
        mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2**exponent, 0.5 <= m < 1
        scale = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent))
    return scale.astype(np.float32)


def _to_e4m3(x):
    return np.clip(x, -448, 448).astype(np.float32).astype(FLOAT8).view(np.uint8)


def encode_v32(values, *, power_of_two=True, scale_factor=None):
    """float [..., 576] -> uint8 [..., 656].

    ``scale_factor`` float32 [..., 4] multiplies the scales: arbitrary, not only powers of two.
    """
    values = np.asarray(values, np.float32)
    lead = values.shape[:-1]
    tiles = values[..., :V32_NOPE].reshape(*lead, 4, V32_TILE)
    scale = _tile_scales(tiles, power_of_two)
    if scale_factor is not None:
        scale = scale * np.asarray(scale_factor, np.float32)
    codes = _to_e4m3(tiles / scale[..., None]).reshape(*lead, V32_NOPE)
    rope = np.ascontiguousarray(values[..., V32_NOPE:].astype(BFLOAT16)).view(np.uint8)
    return np.concatenate([codes, np.ascontiguousarray(scale).view(np.uint8), rope], axis=-1)


def encode_v4(values):
    """float [pages, page_size, 1, 512] -> uint8 [pages, page_bytes]; padding bytes are 0xFF."""
    values = np.asarray(values, np.float32)
    pages, page_size = values.shape[:2]
    values = values.reshape(pages, page_size, 512)
    tiles = values[..., :V4_NOPE].reshape(pages, page_size, 7, V4_TILE)
    scale = _tile_scales(tiles, True)
    codes = _to_e4m3(tiles / scale[..., None]).reshape(pages, page_size, V4_NOPE)
    rope = np.ascontiguousarray(values[..., V4_NOPE:].astype(BFLOAT16)).view(np.uint8)
    page = np.full((pages, v4_page_bytes(page_size)), 0xFF, np.uint8)
    page[:, : 576 * page_size] = np.concatenate([codes, rope], axis=-1).reshape(pages, -1)
    tail = np.full((pages, page_size, 8), 0xFF, np.uint8)
    tail[..., :7] = np.frexp(scale)[1] - 1 + 127  # scale = 2**(E - 127)
    page[:, 576 * page_size : V4_BYTES * page_size] = tail.reshape(pages, -1)
    return page


# ---------------------------------------------------------------------------------------
# Tolerances
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """An element passes within ``abs`` or within ``rel``; ``cos`` bounds the whole tensor."""

    abs: float
    rel: float
    cos: float


TOLERANCES = {
    ("dense_decode", "out"): Tolerance(8e-4, 2.01 / 128, 5e-6),
    ("dense_decode", "lse"): Tolerance(1e-6, 8.01 / 65536, 1e-7),
    ("sparse_decode", "out"): Tolerance(1e-3, 2.01 / 128, 5e-6),
    ("sparse_decode", "lse"): Tolerance(1e-6, 8.01 / 65536, 1e-7),
    ("sparse_prefill", "out"): Tolerance(8e-4, 3.01 / 128, 7e-6),
    ("sparse_prefill", "lse"): Tolerance(1e-6, 2.01 / 65536, 1e-7),
    ("sparse_prefill", "max_logits"): Tolerance(1e-6, 2.01 / 65536, 1e-7),
    ("dense_prefill", "out"): Tolerance(1e-3, 8.01 / 128, 7e-6),
    ("dense_prefill", "gradient"): Tolerance(1e-3, 8.01 / 128, 7e-6),
    ("dense_prefill", "lse"): Tolerance(1e-6, 2.01 / 65536, 1e-7),
}
#: Float32 inputs: nothing is rounded on the way but by float32 arithmetic itself.
FLOAT32 = Tolerance(2e-5, 2e-4, 1e-9)
#: Bound of ``relative_norm`` for peaked scores and rising maxima.
RELATIVE_NORM = 3e-3


def cosine_difference(got, want):
    """1 - 2 sum(x y) / sum(x^2 + y^2) over the whole tensor in float64."""
    got, want = _float64(got), _float64(want)
    norm = (got * got + want * want).sum()
    return 0.0 if norm == 0 else float(1 - 2 * (got * want).sum() / norm)


def relative_norm(got, want):
    """‖got - want‖ / ‖want‖ over the whole tensor in float64 (0 / 0 counts as 0)."""
    got, want = _float64(got), _float64(want)
    error, norm = np.linalg.norm(got - want), np.linalg.norm(want)
    return 0.0 if error == 0 else float(error / norm) if norm else np.inf


def _same_specials(got, want, what):
    """Asserts equal shapes and that NaN and infinities sit at the same places."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    for name, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = test(got) != test(want)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{what}: {name} at {int(test(got).sum())} places, expected at "
                f"{int(test(want).sum())}; first difference at {at}: {got[at]} vs {want[at]}"
            )


def check(op, result, got, want, tolerance=None):
    """Asserts that ``got`` agrees with the oracle's ``want`` within the contract's tolerance.

    NaN and infinities must sit at exactly the same places. ``got.dtype`` rounds the
    reference of the decode operations first.
    """
    what = f"{op} {result}"
    got = np.asarray(got)
    want = _float64(want)
    if op.endswith("decode") and result == "out":
        want = want.astype(got.dtype)
    if tolerance is None:
        tolerance = FLOAT32 if got.dtype == np.float32 and result == "out" else None
    tolerance = tolerance or TOLERANCES[op, result]
    got, want = _float64(got), _float64(want)
    _same_specials(got, want, what)
    finite = np.isfinite(want)
    got, want = got[finite], want[finite]
    error = np.abs(got - want)
    bad = (error > tolerance.abs) & (error > tolerance.rel * np.abs(want))
    if bad.any():
        worst = int(np.argmax(np.where(bad, error, -1)))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.size} elements are out of tolerance; worst "
            f"{got[worst]} vs {want[worst]}, error {error[worst]:.3e}"
        )
    cosine = cosine_difference(got, want)
    assert cosine <= tolerance.cos, f"{what}: cosine difference {cosine:.3e} > {tolerance.cos}"


def check_norm(op, result, got, want, bound=RELATIVE_NORM):
    """Asserts ‖got - want‖ / ‖want‖ <= bound over the finite elements; specials as in check."""
    got, want = _float64(got), _float64(want)
    _same_specials(got, want, f"{op} {result}")
    finite = np.isfinite(want)
    norm = relative_norm(got[finite], want[finite])
    assert norm <= bound, f"{op} {result}: relative norm of the error {norm:.3e} > {bound}"


def check_decode(op, inputs, got):
    """``(out, lse)`` of a decode call, within the tolerances of ``op``.

    By norm where scores are peaked or keep rising: see DenseCase in cases.py.
    """
    out, lse = inputs.expected()
    assert got[0].dtype == inputs.q.dtype and got[1].dtype == np.float32
    if inputs.case.scores == "flat":
        check(op, "out", got[0], out)
        check(op, "lse", got[1], lse)
    else:
        check_norm(op, "out", got[0], out)
        check_norm(op, "lse", got[1], lse, bound=1e-5)
