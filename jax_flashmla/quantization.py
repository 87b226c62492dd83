"""The FP8 formats of the MLA cache: quantise, dequantise, and read tokens out of a cache.

Two formats are stored as bytes, next to plain bf16/fp16/float32 caches. Every number is
little-endian; ``e4m3`` is float8_e4m3fn (no infinities, largest value 448), ``e8m0`` is
float8_e8m0fnu (2**(code - 127), 255 is NaN). One token of a page of ``ps`` tokens:

``"fp8_v32"`` (DeepSeek V3, V3.1, V3.2), d = 576, a row of 656 bytes::

    byte   0 .. 511   512 x e4m3      latent ("NoPE") part
    byte 512 .. 527     4 x float32   scales, one for 128 latent values; value = e4m3 * scale
    byte 528 .. 655    64 x bfloat16  RoPE part, not quantised

``"fp8_v4"`` (DeepSeek V4), d = 512 = 448 + 64, 584 bytes in two places of the page::

    page byte 576*t         .. +447   448 x e4m3      latent part of token t
    page byte 576*t + 448   .. +127    64 x bfloat16  RoPE part of token t
    page byte 576*ps + 8*t  .. +6       7 x e8m0      its scales, one for 64 latent values
    page byte 576*ps + 8*t + 7          padding, written as 0
    page byte 584*ps ..                 padding up to a multiple of 576 bytes

The layouts are those of the caches that deepseek-ai/FlashMLA reads (its README and the
quantisation helper of its tests describe them).

**Quantising a tile** of values that share a scale: ``scale = max(amax / 448, 1e-4)``, where amax
is the largest magnitude in the tile, rounded up to a power of two in V4 and by default in V3.2;
``code = round_to_nearest_even(x / scale)``, saturated to +-448. The 1e-4 keeps the scale of a
tile of zeros finite. Two rules beyond that formula: NaN gives a NaN code and does not count
in amax, so it spoils no neighbour; and a scale is at most 128 (255 if it need not be a power of
two), so that magnitudes above 57,344 (114,240) and infinities saturate. Readers that multiply
in bfloat16 by ``scale * 2**120`` must not overflow: this keeps every stored scale valid for them.
Those here take any scale.

**Bit-exactness.** Results equal the formulas above as evaluated by numpy in float32, on every
backend. Floating-point code cannot promise this: XLA divides by a constant as a multiplication
by its reciprocal, GPU division may be off by some ulps, XLA on CPU flushes subnormals to zero,
casts to float8 give NaN above 464, and XLA may keep a bf16 intermediate in float32. So exponents,
roundings and remainders are computed on the bits, in 32-bit integers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashmla import _checks

Array = jax.Array

CACHE_FORMATS = ("plain", "fp8_v32", "fp8_v4")
PLAIN_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

E4M3_MAX = 448.0
MIN_SCALE = 1e-4
MAX_POWER_OF_TWO_SCALE = 128.0
MAX_SCALE = 255.0


class Fp8Format(NamedTuple):
    """Sizes of one token in an FP8 format: counts of values, bytes where the name says so."""

    latent: int
    rope: int
    tile: int
    token_bytes: int

    @property
    def dim(self) -> int:
        """Columns of the dequantised token."""
        return self.latent + self.rope

    @property
    def tiles(self) -> int:
        """Scales of one token."""
        return self.latent // self.tile


FP8_FORMATS = {
    "fp8_v32": Fp8Format(latent=512, rope=64, tile=128, token_bytes=656),
    "fp8_v4": Fp8Format(latent=448, rope=64, tile=64, token_bytes=584),
}

# V4 pages: all tokens' data, then all tokens' scales, then padding.
V4_DATA_BYTES = 576
V4_SCALE_BYTES = 8
V4_PAGE_MULTIPLE = 576
PAGE_ALIGNMENT = 16


def _fp8_format(op: str, cache_format: Any) -> Fp8Format:
    _checks.check_choice(op, "cache_format", cache_format, tuple(FP8_FORMATS))
    return FP8_FORMATS[cache_format]


# ---------------------------------------------------------------------------------------------
# V4 page sizes


def page_bytes(page_size: int) -> int:
    """Bytes of one ``"fp8_v4"`` page of ``page_size`` tokens.

    584 bytes a token, rounded up to a multiple of 576 (the padding is there even for one page).

    Raises:
      ValueError: ``page_size`` is not an integer >= 1.
    """
    page_size = _checks.check_int("page_bytes", "page_size", page_size, 1)
    used = (V4_DATA_BYTES + V4_SCALE_BYTES) * page_size
    return -(-used // V4_PAGE_MULTIPLE) * V4_PAGE_MULTIPLE


def page_size_of(num_bytes: int) -> int:
    """Tokens of an ``"fp8_v4"`` page of ``num_bytes`` bytes: the inverse of `page_bytes`.

    Raises:
      ValueError: ``num_bytes`` is no multiple of 16 (such pages cannot be read by vector loads)
        or no page size has that many bytes.
    """
    num_bytes = _checks.check_int("page_size_of", "num_bytes", num_bytes, 1)
    if num_bytes % PAGE_ALIGNMENT:
        raise ValueError(
            f"page_size_of: argument 'num_bytes' is {num_bytes}; expected pages aligned to "
            f"{PAGE_ALIGNMENT} bytes"
        )
    # Padding adds less than 576 < 584 bytes, so the quotient is the page size if there is one.
    page_size = num_bytes // (V4_DATA_BYTES + V4_SCALE_BYTES)
    if page_size < 1 or page_bytes(page_size) != num_bytes:
        raise ValueError(
            f"page_size_of: argument 'num_bytes' is {num_bytes}; expected 584 * page_size rounded "
            f"up to a multiple of {V4_PAGE_MULTIPLE}, for an integer page_size >= 1"
        )
    return page_size


# ---------------------------------------------------------------------------------------------
# Numbers as bits. Everything is int32: JAX's default has no 64-bit integers, and comparing
# the bits of positive floats as int32 orders them.


def _float32_bits(x: Array) -> Array:
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32) << 16
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    if x.dtype == jnp.float16:
        # GPUs drop the sign of a NaN in this conversion.
        negative = lax.bitcast_convert_type(x, jnp.int16) < 0
        bits = (bits & 0x7FFFFFFF) | jnp.where(negative, jnp.int32(-(2**31)), 0)
    return bits


def _from_bits(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _round_shift(value: Array, shift: Array | int) -> Array:
    """``value / 2**shift`` to the nearest integer, ties to even (value >= 0, shift >= 1)."""
    half_minus_one = (jnp.int32(1) << (shift - 1)) - 1
    odd = (value >> shift) & 1
    return (value + half_minus_one + odd) >> shift


def float32_bits_to_bfloat16(bits: Array) -> Array:
    """Float32 bits (int32) to the nearest bfloat16, ties to even; NaN stays NaN.

    Done on the bits because XLA may drop the rounding of ``x.astype(bfloat16)`` where the value
    is used in float32 again (``xla_allow_excess_precision``), and flushes subnormals on CPU.
    """
    magnitude = bits & 0x7FFFFFFF
    sign = lax.shift_right_logical(bits, jnp.int32(16)) & 0x8000
    # Overflow carries into the exponent and gives infinity, as it should.
    rounded = jnp.where(magnitude > 0x7F800000, 0x7FC0, _round_shift(magnitude, 16))
    return lax.bitcast_convert_type((sign | rounded).astype(jnp.uint16), jnp.bfloat16)


def _to_bfloat16(x: Array) -> Array:
    return x if x.dtype == jnp.bfloat16 else float32_bits_to_bfloat16(_float32_bits(x))


def _scale_bits(bits: Array, exponent: Array) -> Array:
    """Bits of ``x * 2**exponent`` for float32 bits of an x whose last 20 mantissa bits are 0.

    x is zero, normal or NaN. Results down to 2**-136 are exact subnormals (they have the 20 bits
    to spare), larger ones than float32 holds become infinity.
    """
    magnitude = bits & 0x7FFFFFFF
    field = (magnitude >> 23) + exponent
    mantissa = magnitude & 0x7FFFFF
    normal = (jnp.clip(field, 0, 255) << 23) | mantissa
    subnormal = (mantissa | 0x800000) >> jnp.clip(1 - field, 0, 31)
    scaled = jnp.where(field <= 0, subnormal, jnp.where(field >= 255, 0x7F800000, normal))
    keep = (magnitude == 0) | (magnitude >= 0x7F800000)
    return (bits ^ magnitude) | jnp.where(keep, magnitude, scaled)


def _e4m3_to_float32_bits(codes: Array) -> Array:
    """Float32 bits (int32) of e4m3 codes (uint8): exact, all codes are normal float32 or zero."""
    code = codes.astype(jnp.int32)
    magnitude = code & 0x7F
    sign = (code & 0x80) << 24
    # Exponent bias 7 -> 127; exponent 0 holds the subnormals magnitude * 2**-9.
    normal = (magnitude << 20) + (120 << 23)
    subnormal = _float32_bits(magnitude.astype(jnp.float32) * np.float32(2.0**-9))
    value = jnp.where(magnitude < 8, subnormal, normal)
    return sign | jnp.where(magnitude == 0x7F, 0x7FC00000, value)


def e4m3_to_float32(codes: Array) -> Array:
    """Exact float32 values of float8_e4m3fn codes (uint8, any shape); 0x7F and 0xFF are NaN."""
    return _from_bits(_e4m3_to_float32_bits(codes))


def e8m0_to_float32(codes: Array) -> Array:
    """Exact float32 values 2**(code - 127) of float8_e8m0fnu codes (uint8); 255 is NaN."""
    code = codes.astype(jnp.int32)
    bits = jnp.where(code == 0, 0x400000, code << 23)  # 2**-127 is a subnormal float32
    return _from_bits(jnp.where(code == 255, 0x7FC00000, bits))


def _e4m3_code(exponent: Array, significand: Array) -> Array:
    """E4m3 magnitude codes (int32) of ``significand * 2**(exponent - 23)``, nearest, ties to even.

    significand is in [2**23, 2**24), or anything smaller for a value that rounds to zero.
    Magnitudes that round beyond 448 saturate.
    """
    # Normal numbers: 3 of the 23 mantissa bits stay under the exponent field (bias 7), and a
    # mantissa that rounds up to 8 carries into it. The cap at 2**9 avoids overflow: it
    # saturates anyway.
    field = jnp.clip(exponent + 7, 0, 16)
    normal = _round_shift((field << 23) | (significand & 0x7FFFFF), 20)
    # Subnormals are multiples of 2**-9. From a shift of 25 on the result is zero. Rounding up
    # to 8 gives the code of the smallest normal number.
    subnormal = _round_shift(significand, jnp.clip(14 - exponent, 20, 25))
    return jnp.minimum(jnp.where(exponent >= -6, normal, subnormal), 0x7E)


def _split(magnitude: Array) -> tuple[Array, Array]:
    """Exponent and 24-bit significand of the bits of finite magnitudes; subnormals count as 0."""
    significand = jnp.where(magnitude < 0x800000, 0, (magnitude & 0x7FFFFF) | 0x800000)
    return (magnitude >> 23) - 127, significand


def _approximate_quotient(x: Array, y: Array) -> Array:
    """``x * 2**23 / y`` as int32 for positive integers below 2**25: within a few units."""
    ratio = x.astype(jnp.float32) / y.astype(jnp.float32)
    return (ratio * np.float32(2.0**23)).astype(jnp.int32)


def _divide(a: Array, b: Array) -> tuple[Array, Array]:
    """``a / b`` rounded to float32 (nearest, ties to even) of the bits of two magnitudes.

    a: zero, normal or infinite (counted as 2**128, the next number after the finite ones); b:
    normal. Returns exponent and significand like `_split`, without a limit to the exponent.

    The quotient comes from float division, which may be wrong in its last bits depending on the
    backend; the remainder then is exact whatever the backend does: it is computed modulo 2**32
    and known to be small, so that the int32 difference is the true one.
    """
    exponent_a, x = _split(a)
    exponent_b, y = _split(b)
    smaller = (x < y).astype(jnp.int32)  # then the quotient of the significands is in (1/2, 1)
    x = x << smaller
    # About x * 2**23 / y, in [2**23, 2**24).
    quotient = _approximate_quotient(x, y)
    wide = functools.partial(lax.convert_element_type, new_dtype=jnp.uint32)
    remainder = lax.bitcast_convert_type((wide(x) << 23) - wide(quotient) * wide(y), jnp.int32)
    # Repairs up to four units either way: more than any division in use needs (2 for 2 ulps, and 1
    # for the truncation to an integer). All steps at once, since a chain of them compiles slowly.
    step = jnp.zeros_like(quotient)
    for k in range(4):
        above, below = remainder >= (k + 1) * y, remainder < -k * y
        step = step + above.astype(jnp.int32) - below.astype(jnp.int32)
    quotient = quotient + step
    remainder = remainder - step * y
    twice = 2 * remainder
    quotient = quotient + ((twice > y) | ((twice == y) & (quotient % 2 == 1))).astype(jnp.int32)
    # Rounded up to 2**24: the next power of two.
    carry = (quotient == 1 << 24).astype(jnp.int32)
    exponent = exponent_a - exponent_b - smaller + carry
    return exponent, jnp.where(x == 0, 0, quotient >> carry)


# ---------------------------------------------------------------------------------------------
# Quantising tiles


def _amax_bits(magnitude: Array) -> Array:
    """Largest magnitude (bits) over the last axis, NaN left out."""
    return jnp.max(jnp.where(magnitude > 0x7F800000, 0, magnitude), axis=-1)


def _power_of_two_exponent(amax: Array) -> Array:
    """The exponent k of ``2**ceil(log2(max(amax / 448, 1e-4)))``, from the bits of amax.

    448 = 1.75 * 2**8, so k = exponent - 8, plus one if the mantissa is above 1.75. Rounding of the
    float32 quotient does not matter: amax of one ulp above 448 * 2**k gives a quotient of at
    least one ulp above 2**k. 1e-4 rounds up to 2**-13.
    """
    exponent = (amax >> 23) - 127
    k = exponent - 8 + ((amax & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    return jnp.clip(k, -13, int(np.log2(MAX_POWER_OF_TWO_SCALE)))


def _float32_scale_bits(amax: Array) -> Array:
    """Bits of ``max(amax / 448, 1e-4)`` in float32, capped at `MAX_SCALE`, from bits of amax."""
    exponent, significand = _divide(amax, jnp.full_like(amax, _bits_of(E4M3_MAX)))
    # Below 2**-14 the 1e-4 wins, so the field stays positive.
    field = jnp.clip(exponent, -20, 20) + 127
    bits = jnp.where(significand == 0, 0, (field << 23) | (significand & 0x7FFFFF))
    return jnp.clip(bits, _bits_of(MIN_SCALE), _bits_of(MAX_SCALE))


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _pack_codes(bits: Array, codes: Array) -> Array:
    """Adds sign and NaN of the original float32 bits to magnitude codes: uint8."""
    magnitude = bits & 0x7FFFFFFF
    sign = lax.shift_right_logical(bits, jnp.int32(24)) & 0x80
    return (sign | jnp.where(magnitude > 0x7F800000, 0x7F, codes)).astype(jnp.uint8)


def _quantize_tiles_power_of_two(x: Array, tile: int) -> tuple[Array, Array]:
    """Codes uint8[..., n] and scale exponents int32[..., n / tile] of x [..., n]."""
    bits = _float32_bits(x).reshape(*x.shape[:-1], x.shape[-1] // tile, tile)
    magnitude = bits & 0x7FFFFFFF
    k = _power_of_two_exponent(_amax_bits(magnitude))
    # The exponent field of infinity passes for 2**128 here: far above 448 times any scale.
    exponent, significand = _split(magnitude)
    codes = _pack_codes(bits, _e4m3_code(exponent - k[..., None], significand))
    return codes.reshape(x.shape), k


def _quantize_tiles_float32(x: Array, tile: int) -> tuple[Array, Array]:
    """Codes uint8[..., n] and scale bits int32[..., n / tile] of x [..., n]."""
    bits = _float32_bits(x).reshape(*x.shape[:-1], x.shape[-1] // tile, tile)
    magnitude = bits & 0x7FFFFFFF
    scale = _float32_scale_bits(_amax_bits(magnitude))
    exponent, significand = _divide(magnitude, jnp.broadcast_to(scale[..., None], bits.shape))
    codes = _pack_codes(bits, _e4m3_code(exponent, significand))
    return codes.reshape(x.shape), scale


def _as_bytes(x: Array) -> Array:
    """The little-endian bytes of the last axis: [..., n] to uint8 [..., n * itemsize]."""
    parts = lax.bitcast_convert_type(x, jnp.uint8)
    return parts.reshape(*x.shape[:-1], x.shape[-1] * x.dtype.itemsize)


def _from_bytes(raw: Array, dtype: Any) -> Array:
    """The reverse of `_as_bytes`."""
    size = np.dtype(dtype).itemsize
    parts = raw.reshape(*raw.shape[:-1], raw.shape[-1] // size, size)
    return lax.bitcast_convert_type(parts, dtype)


@functools.partial(jax.jit, static_argnames=("cache_format", "power_of_two_scales"))
def _encode_tokens(
    kv_c: Array, k_pe: Array, *, cache_format: str, power_of_two_scales: bool
) -> Array:
    """Token bytes: V3.2 rows; for V4 the 576 data bytes followed by the 8 scale bytes."""
    tile = FP8_FORMATS[cache_format].tile
    rope = _as_bytes(_to_bfloat16(k_pe))
    if cache_format == "fp8_v4":
        codes, k = _quantize_tiles_power_of_two(kv_c, tile)
        scales = (k + 127).astype(jnp.uint8)
        padding = jnp.zeros((*scales.shape[:-1], 1), jnp.uint8)
        return jnp.concatenate([codes, rope, scales, padding], axis=-1)
    if power_of_two_scales:
        codes, k = _quantize_tiles_power_of_two(kv_c, tile)
        scale_bits = (k + 127) << 23
    else:
        codes, scale_bits = _quantize_tiles_float32(kv_c, tile)
    return jnp.concatenate([codes, _as_bytes(scale_bits), rope], axis=-1)


def _round_result(latent_bits: Array, rope: Array, dtype: Any) -> Array:
    """Latent part as float32 bits and RoPE part as bfloat16, joined in ``dtype``."""
    if dtype == jnp.bfloat16:
        return jnp.concatenate([float32_bits_to_bfloat16(latent_bits), rope], axis=-1)
    joined = jnp.concatenate([_from_bits(latent_bits), rope.astype(jnp.float32)], axis=-1)
    return joined.astype(dtype)


def _decode_v32(rows: Array, dtype: Any) -> Array:
    """uint8 [..., 656] to [..., 576]."""
    fmt = FP8_FORMATS["fp8_v32"]
    lead = rows.shape[:-1]
    values = e4m3_to_float32(rows[..., : fmt.latent]).reshape(*lead, fmt.tiles, fmt.tile)
    scale = _from_bytes(rows[..., fmt.latent : fmt.latent + 4 * fmt.tiles], jnp.float32)
    rope = _from_bytes(rows[..., fmt.latent + 4 * fmt.tiles :], jnp.bfloat16)
    latent = _float32_bits(values * scale[..., None]).reshape(*lead, fmt.latent)
    return _round_result(latent, rope, dtype)


def _decode_v4(data: Array, scales: Array, dtype: Any) -> Array:
    """uint8 [..., 576] and uint8 [..., 8] to [..., 512]."""
    fmt = FP8_FORMATS["fp8_v4"]
    lead = data.shape[:-1]
    bits = _e4m3_to_float32_bits(data[..., : fmt.latent]).reshape(*lead, fmt.tiles, fmt.tile)
    code = scales[..., : fmt.tiles].astype(jnp.int32)[..., None]
    # On the exponent bits, since a product may be subnormal, which XLA on CPU flushes to zero.
    scaled = jnp.where(code == 255, 0x7FC00000, _scale_bits(bits, code - 127))
    rope = _from_bytes(data[..., fmt.latent :], jnp.bfloat16)
    return _round_result(scaled.reshape(*lead, fmt.latent), rope, dtype)


def _check_result_dtype(op: str, dtype: Any) -> Any:
    dtype = np.dtype(jnp.bfloat16 if dtype is None else dtype)
    _checks.check_dtype(op, "dtype", jax.ShapeDtypeStruct((), dtype), PLAIN_DTYPES)
    return dtype


# ---------------------------------------------------------------------------------------------
# Tokens of a cache


def token_dim(cache_format: str, shape: tuple[int, ...]) -> int:
    """Columns d of a (dequantised) token of a cache array of this format and shape.

    576 for ``"fp8_v32"``, 512 for ``"fp8_v4"``, else the last dimension of ``shape``.
    """
    _checks.check_choice("token_dim", "cache_format", cache_format, CACHE_FORMATS)
    return shape[-1] if cache_format == "plain" else FP8_FORMATS[cache_format].dim


def _byte_view(data: Array) -> Array:
    # Bytes, not float8, before anything is gathered: where a backend emulates float8 in a wider
    # type, moving scales or RoPE bytes as float8 values would turn some into other NaNs.
    return data if data.dtype == jnp.uint8 else lax.bitcast_convert_type(data, jnp.uint8)


def _gather(data: Array, starts: list[Array], slice_sizes: tuple[int, ...]) -> Array:
    """Slices of data at ``starts`` (one int32 [...] for each leading axis), clamped into it.

    The axes named by starts are dropped, except that an axis with a slice size above 1 stays.
    """
    collapsed = tuple(i for i in range(len(starts)) if slice_sizes[i] == 1)
    lead = starts[0].ndim
    kept = data.ndim - len(collapsed)
    return lax.gather(
        data,
        jnp.stack(starts, axis=-1),
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(lead, lead + kept)),
            collapsed_slice_dims=collapsed,
            start_index_map=tuple(range(len(starts))),
        ),
        slice_sizes,
        mode=lax.GatherScatterMode.CLIP,
    )


def gather_tokens(
    data: Array, slots: Array, *, cache_format: str, page_size: int, dtype: Any = None
) -> Array:
    """Reads single tokens out of a cache.

    Args:
      data: the cache: ``"plain"`` [pages, page_size, h_kv, d], ``"fp8_v32"`` uint8 or
        float8_e4m3fn [pages, page_size, 1, 656], ``"fp8_v4"`` uint8 [pages, page_bytes].
      slots: int32 [...], ``page * page_size + offset``. They must be valid: an invalid one reads
        some other token.
      cache_format: ``"plain"``, ``"fp8_v32"`` or ``"fp8_v4"``.
      page_size: tokens of a page.
      dtype: of the result; default that of a plain cache, bfloat16 for the others. float32 gives
        the product ``e4m3 * scale`` rounded to float32 only, bfloat16 that product rounded again.
        (V3.2 products below 2**-126 may be flushed to zero; `quantize_kv` stores none but 0.)

    Returns:
      [..., h_kv, d], the cache is read only where slots point.
    """
    _checks.check_choice("gather_tokens", "cache_format", cache_format, CACHE_FORMATS)
    page, offset = lax.div(slots, jnp.int32(page_size)), lax.rem(slots, jnp.int32(page_size))
    if cache_format == "plain":
        rows = _gather(data, [page, offset], (1, 1, *data.shape[2:]))
        return rows if dtype is None else rows.astype(dtype)
    dtype = jnp.bfloat16 if dtype is None else dtype
    data = _byte_view(data)
    if cache_format == "fp8_v32":
        return _decode_v32(_gather(data, [page, offset], (1, 1, *data.shape[2:])), dtype)
    values = _gather(data, [page, offset * V4_DATA_BYTES], (1, V4_DATA_BYTES))
    scale_start = page_size * V4_DATA_BYTES + offset * V4_SCALE_BYTES
    scales = _gather(data, [page, scale_start], (1, V4_SCALE_BYTES))
    return _decode_v4(values, scales, dtype)[..., None, :]


def gather_pages(
    data: Array, pages: Array, *, cache_format: str, page_size: int, dtype: Any = None
) -> Array:
    """Reads whole pages out of a cache: [..., page_size, h_kv, d] for pages int32 [...].

    ``pages`` must be valid; the other arguments are those of `gather_tokens`.
    """
    _checks.check_choice("gather_pages", "cache_format", cache_format, CACHE_FORMATS)
    if cache_format != "plain":
        data = _byte_view(data)
    taken = _gather(data, [pages], (1, *data.shape[1:]))
    return decode_pages(taken, cache_format=cache_format, page_size=page_size, dtype=dtype)


def decode_pages(data: Array, *, cache_format: str, page_size: int, dtype: Any = None) -> Array:
    """Dequantises whole pages: cache arrays with any leading axes to [..., page_size, h_kv, d]."""
    if cache_format == "plain":
        return data if dtype is None else data.astype(dtype)
    dtype = jnp.bfloat16 if dtype is None else dtype
    data = _byte_view(data)
    if cache_format == "fp8_v32":
        return _decode_v32(data, dtype)
    lead = data.shape[:-1]
    scale_start, end = V4_DATA_BYTES * page_size, (V4_DATA_BYTES + V4_SCALE_BYTES) * page_size
    values = data[..., :scale_start].reshape(*lead, page_size, V4_DATA_BYTES)
    scales = data[..., scale_start:end].reshape(*lead, page_size, V4_SCALE_BYTES)
    return _decode_v4(values, scales, dtype)[..., None, :]


# ---------------------------------------------------------------------------------------------
# Public: tokens and whole caches


def _check_kv(op: str, name: str, value: Any, columns: int) -> None:
    _checks.check_array(op, name, value, f"(..., {columns})")
    _checks.check_dtype(op, name, value, PLAIN_DTYPES)
    if not value.shape or value.shape[-1] != columns:
        raise ValueError(
            f"{op}: argument '{name}' has shape {tuple(value.shape)}; expected (..., {columns})"
        )


def _check_scales(op: str, cache_format: str, power_of_two_scales: Any) -> bool:
    flag = _checks.check_bool(op, "power_of_two_scales", power_of_two_scales)
    if not flag and cache_format == "fp8_v4":
        raise ValueError(
            f"{op}: argument 'power_of_two_scales' is False; expected True with cache_format "
            "'fp8_v4', whose scales are e8m0"
        )
    return flag


def quantize_kv(
    kv_c: Array, k_pe: Array, *, cache_format: str = "fp8_v32", power_of_two_scales: bool = True
) -> Array:
    """Quantises tokens into the bytes that a cache stores for them.

    Args:
      kv_c: latent part [..., 512] (``"fp8_v32"``) or [..., 448] (``"fp8_v4"``), bfloat16, float16
        or float32.
      k_pe: RoPE part [..., 64], the same leading axes; stored as bfloat16 (nearest, ties to even).
      cache_format: ``"fp8_v32"`` or ``"fp8_v4"``.
      power_of_two_scales: round scales up to powers of two. False (V3.2 only) keeps float32
        scales, which use the range of e4m3 better.

    Returns:
      uint8 [..., 656] rows of V3.2, or uint8 [..., 584] of V4: the token's 576 data bytes
      followed by its 8 scale bytes, which a page keeps apart. See the module's docstring for
      layouts and rounding.

    Raises:
      ValueError: a wrong shape, dtype or format, or float32 scales asked for V4.
    """
    op = "quantize_kv"
    fmt = _fp8_format(op, cache_format)
    _check_kv(op, "kv_c", kv_c, fmt.latent)
    _check_kv(op, "k_pe", k_pe, fmt.rope)
    flag = _check_scales(op, cache_format, power_of_two_scales)
    if kv_c.shape[:-1] != k_pe.shape[:-1]:
        raise ValueError(
            f"{op}: argument 'k_pe' has shape {tuple(k_pe.shape)}; expected "
            f"{(*kv_c.shape[:-1], fmt.rope)} to go with kv_c {tuple(kv_c.shape)}"
        )
    return _encode_tokens(
        jnp.asarray(kv_c), jnp.asarray(k_pe), cache_format=cache_format, power_of_two_scales=flag
    )


@functools.partial(jax.jit, static_argnames=("cache_format", "dtype"))
def _decode_tokens(rows: Array, *, cache_format: str, dtype: Any) -> Array:
    if cache_format == "fp8_v32":
        return _decode_v32(rows, dtype)
    return _decode_v4(rows[..., :V4_DATA_BYTES], rows[..., V4_DATA_BYTES:], dtype)


def dequantize_kv(
    rows: Array, *, cache_format: str = "fp8_v32", dtype: Any = None
) -> tuple[Array, Array]:
    """Dequantises the bytes of tokens: the reverse of `quantize_kv`.

    Args:
      rows: uint8 [..., 656] (``"fp8_v32"``) or [..., 584] (``"fp8_v4"``).
      cache_format: ``"fp8_v32"`` or ``"fp8_v4"``.
      dtype: bfloat16 (default), float16 or float32, rounded from the float32 product.

    Returns:
      ``(kv_c, k_pe)``: [..., 512] or [..., 448], and [..., 64].

    Raises:
      ValueError: a wrong shape, dtype or format.
    """
    op = "dequantize_kv"
    fmt = _fp8_format(op, cache_format)
    _checks.check_array(op, "rows", rows, f"uint8 (..., {fmt.token_bytes})")
    _checks.check_dtype(op, "rows", rows, (jnp.uint8,))
    if not rows.shape or rows.shape[-1] != fmt.token_bytes:
        raise ValueError(
            f"{op}: argument 'rows' has shape {tuple(rows.shape)}; "
            f"expected (..., {fmt.token_bytes})"
        )
    dtype = _check_result_dtype(op, dtype)
    kv = _decode_tokens(jnp.asarray(rows), cache_format=cache_format, dtype=dtype)
    return kv[..., : fmt.latent], kv[..., fmt.latent :]


def pack_pages(tokens: Array, *, cache_format: str) -> Array:
    """Token bytes [..., page_size, token_bytes] of `quantize_kv` to the bytes of whole pages.

    ``"fp8_v32"``: [..., page_size, 1, 656]; ``"fp8_v4"``: [..., page_bytes], padded with zeros.
    """
    if cache_format == "fp8_v32":
        return tokens[..., None, :]
    lead, page_size = tokens.shape[:-2], tokens.shape[-2]
    data = tokens[..., :V4_DATA_BYTES].reshape(*lead, page_size * V4_DATA_BYTES)
    scales = tokens[..., V4_DATA_BYTES:].reshape(*lead, page_size * V4_SCALE_BYTES)
    unused = page_bytes(page_size) - data.shape[-1] - scales.shape[-1]
    return jnp.concatenate([data, scales, jnp.zeros((*lead, unused), jnp.uint8)], axis=-1)


def quantize_k_cache(
    k_cache: Array, *, cache_format: str = "fp8_v32", power_of_two_scales: bool = True
) -> Array:
    """Quantises a whole paged cache.

    Args:
      k_cache: [num_pages, page_size, 1, d], d = 576 (``"fp8_v32"``) or 512 (``"fp8_v4"``),
        bfloat16, float16 or float32.
      cache_format: ``"fp8_v32"`` or ``"fp8_v4"``.
      power_of_two_scales: as in `quantize_kv`.

    Returns:
      uint8 [num_pages, page_size, 1, 656] or [num_pages, page_bytes(page_size)].

    Raises:
      ValueError: a wrong shape, dtype or format, or float32 scales asked for V4.
    """
    op = "quantize_k_cache"
    fmt = _fp8_format(op, cache_format)
    _checks.check_rank(op, "k_cache", k_cache, ("num_pages", "page_size", "1", str(fmt.dim)))
    _check_kv(op, "k_cache", k_cache, fmt.dim)
    if k_cache.shape[2] != 1 or k_cache.shape[1] < 1:
        raise ValueError(
            f"{op}: argument 'k_cache' has shape {tuple(k_cache.shape)}; expected "
            f"(num_pages, page_size >= 1, 1, {fmt.dim})"
        )
    flag = _check_scales(op, cache_format, power_of_two_scales)
    rows = jnp.asarray(k_cache)[:, :, 0]
    tokens = _encode_tokens(
        rows[..., : fmt.latent],
        rows[..., fmt.latent :],
        cache_format=cache_format,
        power_of_two_scales=flag,
    )
    return pack_pages(tokens, cache_format=cache_format)


def check_cache_array(
    op: str, name: str, data: Any, cache_format: str, page_size: int | None = None
) -> int:
    """Checks a raw cache array (see `gather_tokens`) and returns its page size.

    Raises:
      ValueError: ``data`` is no array of that format, or not one with that page size.
    """
    _checks.check_choice(op, "cache_format", cache_format, CACHE_FORMATS)
    if page_size is not None:
        page_size = _checks.check_int(op, "page_size", page_size, 1)
    if cache_format == "fp8_v4":
        _checks.check_rank(op, name, data, ("num_pages", "page_bytes"))
        _checks.check_dtype(op, name, data, (jnp.uint8,))
        try:
            actual = page_size_of(data.shape[1])
        except ValueError as error:
            reason = str(error).partition("; ")[2]
            raise ValueError(
                f"{op}: argument '{name}' has shape {tuple(data.shape)} with pages of "
                f"{data.shape[1]} bytes; {reason}"
            ) from None
    else:
        width = "656" if cache_format == "fp8_v32" else "d"
        heads = "1" if cache_format == "fp8_v32" else "h_kv"
        dims = ("num_pages", "page_size", heads, width)
        _checks.check_rank(op, name, data, dims)
        if cache_format == "fp8_v32":
            _checks.check_dtype(op, name, data, (jnp.uint8, jnp.float8_e4m3fn))
            fits = tuple(data.shape[2:]) == (1, FP8_FORMATS["fp8_v32"].token_bytes)
        else:
            _checks.check_dtype(op, name, data, PLAIN_DTYPES)
            fits = min(data.shape[2:]) >= 1
        actual = data.shape[1]
        if not fits or actual < 1:
            raise ValueError(
                f"{op}: argument '{name}' has shape {tuple(data.shape)}; "
                f"expected ({', '.join(dims)}), no dimension but num_pages empty"
            )
    if page_size is not None and page_size != actual:
        raise ValueError(
            f"{op}: argument '{name}' has shape {tuple(data.shape)}, pages of {actual} tokens; "
            f"expected page_size {page_size}"
        )
    return actual


@functools.partial(jax.jit, static_argnames=("cache_format", "page_size", "dtype"))
def _decode_pages(data: Array, *, cache_format: str, page_size: int, dtype: Any) -> Array:
    return decode_pages(data, cache_format=cache_format, page_size=page_size, dtype=dtype)


def dequantize_k_cache(
    k_cache: Array, *, cache_format: str = "fp8_v32", dtype: Any = None
) -> Array:
    """Dequantises a whole paged cache.

    Args:
      k_cache: uint8 or float8_e4m3fn [num_pages, page_size, 1, 656] (``"fp8_v32"``), or uint8
        [num_pages, page_bytes] (``"fp8_v4"``; the page size follows from the bytes).
      cache_format: ``"fp8_v32"`` or ``"fp8_v4"``.
      dtype: bfloat16 (default), float16 or float32, rounded from the float32 product.

    Returns:
      [num_pages, page_size, 1, d], d = 576 or 512.

    Raises:
      ValueError: a wrong shape, dtype or format.
    """
    op = "dequantize_k_cache"
    _fp8_format(op, cache_format)
    page_size = check_cache_array(op, "k_cache", k_cache, cache_format)
    dtype = _check_result_dtype(op, dtype)
    return _decode_pages(
        jnp.asarray(k_cache), cache_format=cache_format, page_size=page_size, dtype=dtype
    )
