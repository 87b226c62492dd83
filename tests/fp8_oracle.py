"""Oracle of decode with FP8 products (``fp8_matmul=True``), and how far from it a kernel may be.

Queries are rounded here as a kernel rounds them: the latent columns of a row times a power of two,
to e4m3. That is exact, so ``lse`` follows from it, in float64, up to the arithmetic of the tensor
cores. How softmax weights round depends on the maximum that a kernel has subtracted when it meets
a key. So they are not rounded here, and a bound says how far the roundings can move a result.

The largest error of a value that is rounded to e4m3, which has three bits after the first, is
2^-4 of it. Of many values, whose first bits are as likely as they mostly are, it is 2.65e-2 in the
root of the mean square, and 2^-4 / sqrt(3) = 3.6e-2 of values just above a power of two. Errors of
keys that are independent of each other make the same part of ``out``, by its norm, as they are of
the weights; of a single key, up to 2^-4 of each element.

Nothing here is shared with ``jax_flashmla``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle
from cases import SparseInputs
from sparse_cases import Fp8DenseInputs

LATENT, TILE = oracle.V32_NOPE, oracle.V32_TILE
TILES = [slice(first, first + TILE) for first in range(0, LATENT, TILE)]

#: A weight times a scale that is rounded to e4m3: of itself, float16 on the way included.
WEIGHT_ERROR = 2.0**-4 + 2.0**-10
#: Such products below the normal numbers, of the largest weight times the largest scale: the last
#: bit of e4m3 is 2^-9, half of it may be lost, the largest weight becomes 2^4 at least, and the
#: largest scale 2^-1 at least.
WEIGHT_FLOOR = 2.0**-10 / 2**4 * 2
#: Sums of FP8 products, of the size of what was summed up before, for each 128 columns more: tensor
#: cores keep about 13 bits of it, and lose some four times, as they add up 32 columns at once.
FP8_SUM = 2.0**-11
#: Sums of bfloat16 products, and all that is done in float32.
FLOAT32_SUM = 2.0**-18
#: lse of scores near 0, where the above is nothing.
LSE_FLOOR = 5e-4
#: Norm of the error of ``out``, of the norm of ``out``, where many keys count: see above.
NORM = 4e-2
#: So many equal weights, at least, have the squares of their errors near the mean.
MANY_KEYS = 32


def to_e4m3(x):
    """The nearest e4m3 value, ties to even, saturated to 448."""
    return oracle._E4M3[oracle._to_e4m3(x)]


def rounded_queries(latent):
    """float64 [rows, 512] as e4m3 values times a power of two for each row."""
    _, exponent = np.frexp(np.abs(latent).max(axis=1, initial=0, keepdims=True))
    # The largest is in [128, 256).
    return np.ldexp(to_e4m3(np.ldexp(latent, 8 - exponent)), exponent - 8)


@dataclass
class Expected:
    """``out`` and ``lse`` of the oracle and how far from them is right, element by element.

    Attributes:
        out: [b, s_q, h_q, 512].
        lse: [b, h_q, s_q].
        out_bound: as ``out``; holds for any rounding of the weights.
        lse_bound: as ``lse``.
        loose: as ``out``; the part of ``out_bound`` that is not in ``NORM``.
        many: bool[b, s_q, h_q, 4]: many keys count in a tile of 128 columns.
    """

    out: np.ndarray
    lse: np.ndarray
    out_bound: np.ndarray
    lse_bound: np.ndarray
    loose: np.ndarray
    many: np.ndarray

    def pick(self, requests) -> Expected:
        """The same of these requests."""
        return Expected(*(x[requests] for x in vars(self).values()))


def _share(own, others):
    """Weights [rows, n] of keys of score ``own`` among keys of scores ``others``; 0 for -inf."""
    rows = np.arange(len(others))
    best = others.argmax(axis=1)
    top = others[rows, best][:, None]
    terms = np.exp(others - top)
    rest = top + np.log(terms.sum(axis=1, keepdims=True) - terms)  # of all but this key
    # Without the largest one the difference would be nothing but rounding errors.
    second = others.copy()
    second[rows, best] = -np.inf
    top = second.max(axis=1)
    top = np.where(np.isfinite(top), top, 0)
    rest[rows, best] = top + np.log(np.exp(second - top[:, None]).sum(axis=1))
    return np.where(np.isneginf(own), 0.0, 1 / (1 + np.exp(rest - own)))


def _log_sum(scores):
    top = scores.max(axis=1, keepdims=True)
    return (top + np.log(np.exp(scores - top).sum(axis=1, keepdims=True)))[:, 0]


def _weight_errors(weights, largest):
    """Largest errors of rounded weights, and the part of them that is below the normal numbers."""
    floor = np.minimum(weights, WEIGHT_FLOOR * largest)
    normal = WEIGHT_ERROR * weights
    return np.maximum(normal, floor), np.where(floor > normal, floor, 0)


def _attend(q, raw, scale, visible):
    """Query rows [r, 576] over tokens uint8 [n, 656]; visible bool [r, n].

    Returns the fields of `Expected`, each [r, ...].
    """
    rows = len(q)
    codes = oracle._E4M3[raw[:, :LATENT]]
    scales = raw[:, LATENT : LATENT + 16].copy().view("<f4").astype(np.float64)
    rope = raw[:, LATENT + 16 :].copy().view(oracle.BFLOAT16).astype(np.float64)
    whole = np.isfinite(np.concatenate([codes, scales, rope], axis=1)).all(axis=1)
    codes, scales, rope = (np.where(whole[:, None], x, 0) for x in (codes, scales, rope))
    row_is_whole = np.isfinite(q).all(axis=1)
    q = np.where(row_is_whole[:, None], q, 0)
    sees = visible.any(axis=1)
    nan = sees & ~(row_is_whole & ~(visible & ~whole).any(axis=1))

    def products(a, b):
        """Products of rows, and the size of what is summed up in them."""
        return a @ b.T, np.sqrt((a * a) @ (b * b).T)

    latent = rounded_queries(q[:, :LATENT])
    rope_scores, size = products(q[:, LATENT:], rope)
    slack = FLOAT32_SUM * (np.abs(rope_scores) + size)
    scores, squares = np.zeros_like(slack), np.zeros_like(slack)
    for tile in range(4):
        part, size = products(latent[:, TILES[tile]], codes[:, TILES[tile]])
        scores += part * scales[:, tile]
        squares += np.square(size * scales[:, tile])
        slack += FP8_SUM * (np.abs(scores) + np.sqrt(squares))
    scores += rope_scores
    slack = abs(scale) * slack + FLOAT32_SUM * np.abs(scale * scores)
    scores = np.where(visible, scale * scores, -np.inf)
    scores[~sees] = 0  # only so that it is a number

    low, high = scores - slack, scores + slack
    lse = _log_sum(scores)
    weights, least, most = _share(scores, scores), _share(low, high), _share(high, low)
    moved = np.maximum(most - weights, weights - least)
    out, bound, loose = (np.zeros((rows, LATENT)) for _ in range(3))
    many = np.zeros((rows, 4), bool)
    largest = most.max(axis=1, keepdims=True)
    for tile, columns in enumerate(TILES):
        scale_of = scales[:, tile]
        # Of the tokens that a row sees, the largest scale.
        reference = np.where(visible, scale_of, 0).max(axis=1, keepdims=True)
        errors, lost = _weight_errors(most * scale_of, largest * reference)
        magnitudes = np.abs(codes[:, columns])
        scaled = weights * scale_of
        many[:, tile] = scaled.sum(axis=1) ** 2 >= MANY_KEYS * np.square(scaled).sum(axis=1)
        out[:, columns] = scaled @ codes[:, columns]
        bound[:, columns] = (errors + moved * scale_of) @ magnitudes
        loose[:, columns] = (lost + moved * scale_of) @ magnitudes
    lse_bound = np.maximum(_log_sum(high) - lse, lse - _log_sum(low))
    lse_bound += LSE_FLOOR + FLOAT32_SUM * np.abs(lse)
    for x, nothing in ((out, 0), (bound, 0), (loose, 0), (lse, np.inf), (lse_bound, 0)):
        x[~sees] = nothing
    out[nan] = lse[nan] = np.nan
    return out, lse, bound, lse_bound, loose, many & (sees & ~nan)[:, None]


def _collect(q, sink, one_token):
    """An `Expected` of what ``one_token(r, i)`` gives for all of q [b, s_q, h_q, 576]."""
    b, s_q, h_q, _ = q.shape
    out, bound, loose = (np.zeros((b, s_q, h_q, LATENT)) for _ in range(3))
    lse, lse_bound = np.zeros((b, s_q, h_q)), np.zeros((b, s_q, h_q))
    many = np.zeros((b, s_q, h_q, 4), bool)
    with np.errstate(all="ignore"):
        for r, i in np.ndindex(b, s_q):
            (
                out[r, i],
                lse[r, i],
                bound[r, i],
                lse_bound[r, i],
                loose[r, i],
                many[r, i],
            ) = one_token(r, i)
        if sink is not None:
            attended = ~np.isposinf(lse)

            def factor(lse):
                value = 1 / (1 + np.exp(sink.astype(np.float64) - lse))
                return np.where(attended, value, 1.0)[..., None]

            most = factor(lse + lse_bound)
            moved = np.abs(out) * (most - factor(lse - lse_bound))
            out, bound, loose = out * factor(lse), bound * most + moved, loose * most + moved
    # Rounded to bfloat16 in the end.
    bound += 2.0**-8 * (np.abs(out) + bound) + 1e-37
    lse, lse_bound = (x.transpose(0, 2, 1) for x in (lse, lse_bound))
    return Expected(out, lse, bound, lse_bound, loose, many)


def dense_decode(inputs: Fp8DenseInputs, softmax_scale: float | None = None) -> Expected:
    """Of dense decode; a request of a bad length or with a bad page is NaN."""
    case, data = inputs.case, inputs.data
    pages, page_size = data.shape[:2]
    scale = case.softmax_scale if softmax_scale is None else softmax_scale
    q = inputs.q.astype(np.float64)
    s_q = q.shape[1]

    def one_token(r, i):
        length = max(int(inputs.cache_seqlens[r]), 0)
        table = inputs.block_table[r]
        used = table[: -(-length // page_size)].tolist()
        if length > len(table) * page_size or any(not 0 <= page < pages for page in used):
            nothing = np.zeros(q.shape[2])
            blank = np.zeros((q.shape[2], LATENT))
            return blank + np.nan, nothing + np.nan, blank, nothing, blank, nothing[:, None] > 0
        seen = max(length - (s_q - 1 - i) if case.causal else length, 0)
        tokens = np.zeros((1, oracle.V32_BYTES), np.uint8)
        if seen:
            tokens = np.concatenate([data[page, :, 0] for page in used])[:seen]
        return _attend(q[r, i], tokens, scale, np.full((q.shape[2], len(tokens)), seen > 0))

    return _collect(q, inputs.attn_sink, one_token)


def sparse_decode(inputs: SparseInputs, softmax_scale: float | None = None) -> Expected:
    """Of sparse decode over one V3.2 cache or two."""
    scale = inputs.case.softmax_scale if softmax_scale is None else softmax_scale
    q = inputs.q.astype(np.float64)

    def chosen(cache, slots, length):
        rows = cache.data.reshape(-1, oracle.V32_BYTES)
        slots = slots if length is None else slots[: max(int(length), 0)]
        return rows[[slot for slot in slots.tolist() if 0 <= slot < len(rows)]]

    def one_token(r, i):
        length = None if inputs.topk_length is None else inputs.topk_length[r]
        tokens = chosen(inputs.cache, inputs.indices[r, i], length)
        if inputs.extra_cache is not None:
            length = None if inputs.extra_topk_length is None else inputs.extra_topk_length[r]
            more = chosen(inputs.extra_cache, inputs.extra_indices[r, i], length)
            tokens = np.concatenate([tokens, more])
        seen = len(tokens) > 0
        if not seen:
            tokens = np.zeros((1, oracle.V32_BYTES), np.uint8)
        return _attend(q[r, i], tokens, scale, np.full((q.shape[2], len(tokens)), seen))

    return _collect(q, inputs.attn_sink, one_token)


def check(expected: Expected, got, what="", *, by_norm=True) -> None:
    """Asserts that ``got`` (out, lse) is right.

    Element by element within the bounds, with NaN and infinities at exactly the same places; and
    for each query token and tile of 128 columns, over the heads where many keys count, by norm.

    Args:
        expected: of `dense_decode` or `sparse_decode`.
        got: out and lse.
        what: begins the message.
        by_norm: whether keys are different tokens; of equal ones the weights have equal errors.
    """
    for name, have, want, bound in (
        ("out", got[0], expected.out, expected.out_bound),
        ("lse", got[1], expected.lse, expected.lse_bound),
    ):
        have = np.asarray(have).astype(np.float64)
        oracle._same_specials(have, want, f"{what} {name}")
        finite = np.isfinite(want)
        error = np.abs(np.where(finite, have - np.where(finite, want, 0), 0))
        bad = ~(error <= bound) & finite
        if bad.any():
            at = np.unravel_index(np.argmax(np.where(bad, error - bound, -np.inf)), bad.shape)
            at = tuple(int(i) for i in at)
            raise AssertionError(
                f"{what} {name}: {int(bad.sum())} of {bad.size} elements are out of bounds; worst "
                f"at {at}: {have[at]} vs {want[at]}, error {error[at]:.3e} > {bound[at]:.3e}"
            )
    if by_norm:
        check_norm(expected, got[0], what)


def check_norm(expected: Expected, out, what="") -> None:
    """Asserts that the norm of the error of ``out`` is small, where many keys count."""

    def norms(x):
        """[b, s_q, 4] over heads and the columns of a tile."""
        tiles = x.reshape(*x.shape[:3], 4, TILE)
        return np.sqrt(np.square(np.where(expected.many[..., None], tiles, 0)).sum(axis=(2, 4)))

    have = norms(np.asarray(out).astype(np.float64) - expected.out)
    bound = NORM * norms(expected.out) + norms(expected.loose)
    bad = ~(have <= bound)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        size = norms(expected.out)[at]
        raise AssertionError(
            f"{what} out: norm of the error at request, query token, tile {at} is "
            f"{have[at] / size:.3e} of its norm > {bound[at] / size:.3e}"
        )
