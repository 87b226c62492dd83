"""Writing and reading paged caches in numpy, token by token, with the bits that kernels must give.

Bytes of quantised tokens are those of test_quantization's oracle. The RMS norm adds up squares in
the order that docs/caches.md promises of the kernel; everything is IEEE float32.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import test_quantization as formats

BF16 = ml_dtypes.bfloat16
ROPE = 64
LANES, CHUNK = 32, 8


def rms_norm(x, weight, epsilon):
    """x [t, latent] normalised; NaN, which arithmetic makes of whatever sign, is positive."""
    wide = x.astype(np.float32)
    t, latent = wide.shape
    padded = np.zeros((t, -(-latent // (LANES * CHUNK)), LANES, CHUNK), np.float32)
    padded.reshape(t, -1)[:, :latent] = wide
    with np.errstate(all="ignore"):
        sums = np.zeros((t, LANES), np.float32)
        for turn in range(padded.shape[1]):
            for i in range(CHUNK):
                sums = sums + padded[:, turn, :, i] * padded[:, turn, :, i]
        for step in (16, 8, 4, 2, 1):
            sums = sums + sums[:, np.arange(LANES) ^ step]
        mean = sums[:, :1] / np.float32(latent)
        factor = np.float32(1) / np.sqrt(mean + np.float32(epsilon))
        result = wide * factor * weight.astype(np.float32)
        assert result.dtype == np.float32
        return np.where(np.isnan(result), np.float32(np.nan), result).astype(x.dtype)


def rotate(x, cos, sin, layout):
    """x [t, rope] rotated by cos, sin [t, rope / 2]."""
    half = x.shape[-1] // 2
    wide = x.astype(np.float32)
    first, second = (
        (slice(0, None, 2), slice(1, None, 2))
        if layout == "interleaved"
        else (slice(0, half), slice(half, None))
    )
    a, b = wide[:, first], wide[:, second]
    result = np.empty_like(wide)
    with np.errstate(all="ignore"):
        result[:, first] = a * cos - b * sin
        result[:, second] = a * sin + b * cos
        return np.where(np.isnan(result), np.float32(np.nan), result).astype(x.dtype)


def convert(x, dtype):
    """x in another type; a NaN becomes the quiet one of its sign, or stays as it is in its own."""
    if x.dtype == dtype:
        return x
    with np.errstate(all="ignore"):
        result = x.astype(np.float32).astype(dtype)
    quiet = np.copysign(np.full(x.shape, np.nan, np.float32), np.where(np.signbit(x), -1, 1))
    return np.where(np.isnan(x.astype(np.float32)), quiet.astype(dtype), result)


def bits(x):
    """Its bits as unsigned integers of the same shape."""
    x = np.ascontiguousarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def quiet_bits(x):
    """Bits, with every NaN replaced by one and the same."""
    return np.where(np.isnan(x.astype(np.float32)), 0xFFFF, bits(x))


def append(
    data,
    cache_format,
    page_size,
    slots,
    kv_c,
    k_pe,
    *,
    power_of_two=True,
    norm_weight=None,
    norm_eps=1e-6,
    rope_cos=None,
    rope_sin=None,
    rope_layout="interleaved",
):
    """A copy of ``data`` with the tokens kv_c [t, h, latent], k_pe [t, h, rope] at ``slots``."""
    data = np.array(data)
    t = len(slots)
    if norm_weight is not None:
        kv_c = rms_norm(kv_c[:, 0], norm_weight, norm_eps)[:, None]
    if rope_cos is not None:
        k_pe = rotate(k_pe[:, 0], rope_cos, rope_sin, rope_layout)[:, None]
    num_slots = len(data) * page_size
    valid = [i for i in range(t) if 0 <= slots[i] < num_slots]
    if cache_format == "plain":
        flat = bits(data).reshape(num_slots, *data.shape[2:])
        dtype = data.dtype
        rows = np.concatenate([bits(convert(kv_c, dtype)), bits(convert(k_pe, dtype))], axis=-1)
        for i in valid:
            flat[slots[i]] = rows[i]
        return flat.view(dtype).reshape(data.shape)
    tokens = formats.oracle_tokens(kv_c[:, 0], k_pe[:, 0], cache_format, power_of_two)
    for i in valid:
        if cache_format == "fp8_v32":
            data.reshape(num_slots, 656)[slots[i]] = tokens[i]
        else:
            page, offset = divmod(int(slots[i]), page_size)
            data[page, 576 * offset : 576 * offset + 576] = tokens[i, :576]
            start = 576 * page_size + 8 * offset
            data[page, start : start + 8] = tokens[i, 576:]
    return data


def gather(data, cache_format, page_size, slots, dtype):
    """Tokens [n, h, d] of slots int32[n]; zeros for slots that are none. Any NaN for a NaN."""
    num_slots = len(data) * page_size
    if cache_format == "plain":
        flat = data.reshape(num_slots, *data.shape[2:])
        out = np.zeros((len(slots), *data.shape[2:]), dtype)
        for i, slot in enumerate(slots):
            if 0 <= slot < num_slots:
                out[i] = convert(flat[slot], dtype)
        return out
    latent, tile = formats.FORMATS[cache_format]
    out = np.zeros((len(slots), 1, latent + ROPE), dtype)
    for i, slot in enumerate(slots):
        if not 0 <= slot < num_slots:
            continue
        if cache_format == "fp8_v32":
            row = data.reshape(num_slots, 656)[slot]
            codes, scales, rope = row[:512], row[512:528].copy().view("<f4"), row[528:]
        else:
            page, offset = divmod(int(slot), page_size)
            row = data[page, 576 * offset : 576 * offset + 576]
            start = 576 * page_size + 8 * offset
            codes, rope = row[:448], row[448:]
            scales = data[page, start : start + 7].view(ml_dtypes.float8_e8m0fnu)
        with np.errstate(all="ignore"):
            scales = np.repeat(scales.astype(np.float32), tile)
            values = codes.view(formats.E4M3).astype(np.float32) * scales
            out[i, 0, :latent] = values.astype(dtype)
            out[i, 0, latent:] = convert(rope.copy().view(BF16), dtype)
    return out
