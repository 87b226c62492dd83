"""Multi-head latent attention in float64 numpy, from the formulas of arXiv 2405.04434, section 2.1.

One sequence at a time, keys and values of every head spelled out: nothing is packed, cached or
absorbed. Nothing is taken from the library but the configuration's numbers.
"""

from __future__ import annotations

import math

import numpy as np


def angles_of(config, positions):
    """Angles [n, rope / 2]: pair i turns theta^(-2i/d) radians a token, less with YaRN."""
    d = config.qk_rope_head_dim
    yarn = config.rope_scaling
    rates = []
    for i in range(d // 2):
        rate = config.rope_theta ** (-2 * i / d)
        if yarn is not None:
            # The pairs that turn beta times within the original context, from
            # theta^(-2i/d) * length = 2 pi beta, solved for i.
            first, last = (
                d
                / 2
                * math.log(yarn.original_max_position_embeddings / (2 * math.pi * beta))
                / math.log(config.rope_theta)
                for beta in (yarn.beta_fast, yarn.beta_slow)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), d - 1)
            if first == last:
                share = 0.0 if i <= first else 1.0
            else:
                share = min(max((i - first) / (last - first), 0.0), 1.0)
            rate = (1 - share) * rate + share * rate / yarn.factor
        rates.append(rate)
    return np.asarray(positions, np.float64)[:, None] * np.asarray(rates)


def rotate(config, x, angles):
    """Rotates x [n, d] or [n, h, d]; pairs of columns are complex numbers."""
    half = x.shape[-1] // 2
    if config.rope_layout == "interleaved":
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        first, second = slice(0, half), slice(half, None)
    turn = np.exp(1j * angles).reshape(len(x), *(1,) * (x.ndim - 2), half)
    if config.rope_scaling is not None:
        yarn = config.rope_scaling
        log = 0.1 * math.log(yarn.factor)
        turn = turn * (1 + log * yarn.mscale) / (1 + log * yarn.mscale_all_dim)
    turned = (x[..., first] + 1j * x[..., second]) * turn
    result = np.empty_like(x)
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def norm(config, x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def attention(params, x, config, *, positions=None, visible=None):
    """Output [n, hidden] of one sequence x [n, hidden]; token i sees j where visible[i, j]."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)
    n = len(x)
    angles = angles_of(config, np.arange(n) if positions is None else positions)
    if visible is None:
        visible = np.tril(np.ones((n, n), bool))
    nope, latent = config.qk_nope_head_dim, config.kv_lora_rank

    if config.q_lora_rank is None:
        queries = np.tensordot(x, p["q_proj"], 1)
    else:
        queries = np.tensordot(norm(config, x @ p["q_a_proj"], p["q_a_norm"]), p["q_b_proj"], 1)
    queries = queries * config.q_scale
    compressed = x @ p["kv_a_proj"]
    c = norm(config, compressed[:, :latent], p["kv_a_norm"]) * config.kv_scale
    shared = rotate(config, compressed[:, latent:], angles)

    scale = 1 / math.sqrt(nope + config.qk_rope_head_dim)
    if config.rope_scaling is not None:
        yarn = config.rope_scaling
        scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1) ** 2
    result = np.zeros((n, config.hidden_size))
    for h in range(config.num_heads):
        keys = np.concatenate([c @ p["k_b_proj"][:, h], shared], axis=1)
        q = np.concatenate([queries[:, h, :nope], rotate(config, queries[:, h, nope:], angles)], 1)
        scores = np.where(visible, scale * q @ keys.T, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-1e300))
        weights /= weights.sum(axis=1, keepdims=True)
        result += weights @ (c @ p["v_b_proj"][:, h]) @ p["o_proj"][h]
    return result


def error(actual, expected):
    """Relative error over the whole array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)
