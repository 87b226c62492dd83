"""Float64 numpy oracle of attention over packed sequences, forward and gradients.

Written from the definition, one sequence and one head at a time with the whole score matrix;
nothing is shared with ``jax_flashmla``.
"""

from __future__ import annotations

import numpy as np


def sound_entries(cu_seqlens, total):
    """For each entry: is it inside the array, and in order with every other one inside it?"""
    inside = [0 <= int(c) <= total for c in cu_seqlens]
    sound = []
    for j, entry in enumerate(cu_seqlens):
        before = [c for i, c in enumerate(cu_seqlens) if i < j and inside[i]]
        after = [c for i, c in enumerate(cu_seqlens) if i > j and inside[i]]
        ordered = all(c <= entry for c in before) and all(c >= entry for c in after)
        sound.append(inside[j] and ordered)
    return sound


def broken_sequences(cu_seqlens_qo, cu_seqlens_kv, total_q, total_k):
    """The sequences of which any of the four limits is not sound."""
    sound_q = sound_entries(cu_seqlens_qo, total_q)
    sound_k = sound_entries(cu_seqlens_kv, total_k)
    return [
        i
        for i in range(len(cu_seqlens_qo) - 1)
        if not (sound_q[i] and sound_q[i + 1] and sound_k[i] and sound_k[i + 1])
    ]


def claimed_rows(cu_seqlens, total, sequence):
    """The rows that a sequence may own: between the nearest sound entries around it."""
    sound = sound_entries(cu_seqlens, total)
    low = [int(c) for i, c in enumerate(cu_seqlens) if i <= sequence and sound[i]]
    high = [int(c) for i, c in enumerate(cu_seqlens) if i > sequence and sound[i]]
    return slice(max(low, default=0), min(high, default=total))


def _float64(x):
    return np.asarray(x).astype(np.float64)


def _sequences(cu_seqlens_qo, cu_seqlens_kv, total_q, total_k):
    broken = broken_sequences(cu_seqlens_qo, cu_seqlens_kv, total_q, total_k)
    for i in range(len(cu_seqlens_qo) - 1):
        if i not in broken:
            yield (
                slice(int(cu_seqlens_qo[i]), int(cu_seqlens_qo[i + 1])),
                slice(int(cu_seqlens_kv[i]), int(cu_seqlens_kv[i + 1])),
            )


def _one_head(q, k, scale, causal):
    """Scores ``[s_q, s_k]``, -inf where hidden, and the rows which see anything."""
    s_q, s_k = len(q), len(k)
    scores = scale * (q @ k.T)
    if causal:
        i, j = np.arange(s_q)[:, None], np.arange(s_k)[None, :]
        scores = np.where(j <= s_k - s_q + i, scores, -np.inf)
    return scores, (scores > -np.inf).any(axis=1) if s_k else np.zeros(s_q, bool)


def forward(q, k, v, cu_seqlens_qo, cu_seqlens_kv, scale, causal):
    """``(out float64[total_q, h_q, dv], lse float64[total_q, h_q])``."""
    q, k, v = _float64(q), _float64(k), _float64(v)
    total_q, h_q, _ = q.shape
    total_k, h_kv, dv = v.shape
    out = np.zeros((total_q, h_q, dv))
    lse = np.full((total_q, h_q), np.inf)
    for rows, keys in _sequences(cu_seqlens_qo, cu_seqlens_kv, total_q, total_k):
        for head in range(h_q):
            kv_head = head * h_kv // h_q
            scores, seen = _one_head(q[rows, head], k[keys, kv_head], scale, causal)
            if not seen.any():
                continue
            top = scores[seen].max(axis=1, keepdims=True)
            weights = np.exp(scores[seen] - top)
            norm = weights.sum(axis=1, keepdims=True)
            out[rows, head][seen] = weights / norm @ v[keys, kv_head]
            lse[rows, head][seen] = (top + np.log(norm))[:, 0]
    for i in broken_sequences(cu_seqlens_qo, cu_seqlens_kv, total_q, total_k):
        out[claimed_rows(cu_seqlens_qo, total_q, i)] = np.nan
        lse[claimed_rows(cu_seqlens_qo, total_q, i)] = np.nan
    return out, lse


def gradients(q, k, v, cu_seqlens_qo, cu_seqlens_kv, scale, causal, dout, dlse):
    """``(dq, dk, dv)`` in float64 of ``sum(out * dout) + sum(lse * dlse)``.

    By the chain rule through softmax: with A the attention weights of one head,
    ``dA = dout V^T``, ``dS = A * (dA - rowsum(A * dA)) + A * dlse``.
    """
    q, k, v, dout, dlse = (_float64(x) for x in (q, k, v, dout, dlse))
    total_q, h_q, _ = q.shape
    total_k, h_kv, _ = v.shape
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for rows, keys in _sequences(cu_seqlens_qo, cu_seqlens_kv, total_q, total_k):
        for head in range(h_q):
            kv_head = head * h_kv // h_q
            keys_here = k[keys, kv_head]
            scores, seen = _one_head(q[rows, head], keys_here, scale, causal)
            if not seen.any():
                continue
            weights = np.exp(scores[seen] - scores[seen].max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            above = dout[rows, head][seen]
            dweights = above @ v[keys, kv_head].T
            inner = (weights * dweights).sum(axis=1, keepdims=True)
            dscores = weights * (dweights - inner + dlse[rows, head][seen][:, None])
            dq[rows, head][seen] = scale * dscores @ keys_here
            dk[keys, kv_head] += scale * dscores.T @ q[rows, head][seen]
            dv[keys, kv_head] += weights.T @ above
    for i in broken_sequences(cu_seqlens_qo, cu_seqlens_kv, total_q, total_k):
        dq[claimed_rows(cu_seqlens_qo, total_q, i)] = np.nan
        dk[claimed_rows(cu_seqlens_kv, total_k, i)] = np.nan
        dv[claimed_rows(cu_seqlens_kv, total_k, i)] = np.nan
    return dq, dk, dv
