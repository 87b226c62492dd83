"""FP8 formats: bit-exact against an independent numpy implementation of the contract's formulas."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_flashmla import quantization as q

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
FORMATS = {"fp8_v32": (512, 128), "fp8_v4": (448, 64)}


# --- the oracle: IEEE float32 in numpy, casts by ml_dtypes, bytes written one field at a time ---


def oracle_scale(tile, power_of_two):
    """max(amax / 448, 1e-4) of float32 values, NaN left out; capped as the docs say."""
    magnitudes = np.abs(tile[~np.isnan(tile)])
    amax = np.float32(magnitudes.max()) if magnitudes.size else np.float32(0)
    with np.errstate(over="ignore"):
        scale = max(amax / np.float32(448), np.float32(1e-4))
    assert isinstance(scale, np.float32)
    if not power_of_two:
        return min(scale, np.float32(255))
    if np.isinf(scale):
        return np.float32(128)
    fraction, exponent = np.frexp(scale)  # scale = fraction * 2**exponent, 1/2 <= fraction < 1
    return min(np.float32(2.0 ** (exponent - (fraction == 0.5))), np.float32(128))


def oracle_codes(tile, scale):
    """round_to_nearest_even(x / scale) saturated to +-448; NaN stays NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        quotient = tile / scale
    assert quotient.dtype == np.float32
    return np.clip(quotient, np.float32(-448), np.float32(448)).astype(E4M3).view(np.uint8)


def oracle_token(kv_c, k_pe, cache_format, power_of_two):
    """Bytes of one token: (data, scales) for V4, one row for V3.2."""
    latent, tile = FORMATS[cache_format]
    assert kv_c.shape == (latent,)
    with np.errstate(over="ignore"):
        rope = k_pe.astype(np.float32).astype(BF16).view(np.uint16)
    rope_bytes = [b for value in rope for b in (int(value) & 255, int(value) >> 8)]
    codes, scales = [], []
    for t in range(latent // tile):
        x = kv_c[t * tile : (t + 1) * tile].astype(np.float32)
        scales.append(oracle_scale(x, power_of_two))
        codes += list(oracle_codes(x, scales[-1]))
    if cache_format == "fp8_v32":
        scale_bytes = list(np.array(scales, "<f4").view(np.uint8))
        return np.array(codes + scale_bytes + rope_bytes, np.uint8)
    e8m0 = [int(np.log2(float(s))) + 127 for s in scales]
    return np.array(codes + rope_bytes + [*e8m0, 0], np.uint8)


def oracle_tokens(kv_c, k_pe, cache_format, power_of_two=True):
    return np.stack(
        [oracle_token(c, r, cache_format, power_of_two) for c, r in zip(kv_c, k_pe, strict=True)]
    )


def every_bfloat16():
    return np.arange(1 << 16, dtype=np.uint16).view(BF16)


def in_tiles(values, anchor, latent, tile):
    """``values`` in tokens of tiles that each hold ``anchor`` too, so that it fixes the scale."""
    per_token = (latent // tile) * (tile - 1)
    tokens = -(-len(values) // per_token)
    padded = np.zeros(tokens * per_token, values.dtype)
    padded[: len(values)] = values
    tiles = padded.reshape(tokens, latent // tile, tile - 1)
    anchors = np.full((*tiles.shape[:2], 1), anchor, values.dtype)
    return np.concatenate([anchors, tiles], axis=-1).reshape(tokens, latent)


def zero_rope(kv_c):
    return np.zeros((kv_c.shape[0], 64), BF16)


def check_quantized(kv_c, k_pe, cache_format, power_of_two=True):
    got = q.quantize_kv(kv_c, k_pe, cache_format=cache_format, power_of_two_scales=power_of_two)
    want = oracle_tokens(kv_c, k_pe, cache_format, power_of_two)
    np.testing.assert_array_equal(np.asarray(got), want)
    return want


MODES = [("fp8_v32", True), ("fp8_v32", False), ("fp8_v4", True)]


# --- quantising ---


@pytest.mark.parametrize("anchor", [448.0, 2.0**-12, 3.4e38, np.inf, np.nan])
@pytest.mark.parametrize("cache_format,power_of_two", MODES)
def test_every_bfloat16_value(cache_format, power_of_two, anchor):
    # All bit patterns, NaN, infinities and subnormals among them. Where the anchor is small the
    # values of a tile fix its scale: neighbours in the order of bits, so of every magnitude.
    kv_c = in_tiles(every_bfloat16(), anchor, *FORMATS[cache_format])
    check_quantized(kv_c, zero_rope(kv_c), cache_format, power_of_two)


@pytest.mark.parametrize("cache_format,power_of_two", MODES)
def test_every_float16_value(cache_format, power_of_two):
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    kv_c = in_tiles(values, 0.1, *FORMATS[cache_format])
    check_quantized(kv_c, zero_rope(kv_c), cache_format, power_of_two)


def e4m3_ties():
    """Midpoints of neighbouring e4m3 values and their float32 neighbours, both signs."""
    values = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float64)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    up = np.nextafter(middle, np.float32(np.inf))
    down = np.nextafter(middle, np.float32(0))
    every = np.concatenate([values.astype(np.float32), middle, up, down])
    return np.concatenate([every, -every])


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("k", [-13, -12, -1, 0, 3, 7])
def test_ties_at_every_code(cache_format, k):
    values = np.ldexp(e4m3_ties(), k)
    kv_c = in_tiles(values, np.float32(np.ldexp(448.0, k)), *FORMATS[cache_format])
    want = check_quantized(kv_c, zero_rope(kv_c), cache_format)
    assert len(np.unique(want[:, : FORMATS[cache_format][0]])) == 254  # every code but NaN


def test_ties_round_to_even_by_exhaustive_search():
    # An oracle of its own: the nearest of all e4m3 values in float64, the even code on a tie.
    table = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float64)
    values = np.abs(e4m3_ties())
    values = np.concatenate([values, np.float32([2.0**-10, 2.0**-11, 1e-30, 448, 447.99])])
    distance = np.abs(values[:, None].astype(np.float64) - table)
    nearest = distance.argmin(axis=1)  # the lower of two
    tie = distance[np.arange(len(values)), np.minimum(nearest + 1, 0x7E)] == distance.min(axis=1)
    want = np.where(tie & (nearest % 2 == 1), nearest + 1, nearest)
    kv_c = in_tiles(values, np.float32(448), *FORMATS["fp8_v32"])
    got = np.asarray(q.quantize_kv(kv_c, zero_rope(kv_c)))[:, :512].reshape(-1, 128)[:, 1:]
    np.testing.assert_array_equal(got.reshape(-1)[: len(values)], want)


@pytest.mark.parametrize("cache_format,power_of_two", MODES)
def test_scales_of_every_magnitude(cache_format, power_of_two):
    # amax at every power of two, at 448 times each, and one float32 step to either side.
    latent, tile = FORMATS[cache_format]
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    with np.errstate(over="ignore"):
        amax = np.concatenate([powers, powers * np.float32(448), powers * np.float32(1.7)])
    amax = amax[np.isfinite(amax)]
    amax = np.concatenate([amax, np.nextafter(amax, np.float32(np.inf)), np.nextafter(amax, 0)])
    amax = np.concatenate([amax, np.float32([448e-4, 0.0, 3.4028235e38])])
    tiles = np.zeros((-(-len(amax) // (latent // tile)) * (latent // tile), tile), np.float32)
    tiles[: len(amax), 5] = -amax
    tiles[: len(amax), 6] = amax / 3
    kv_c = tiles.reshape(-1, latent)
    want = check_quantized(kv_c, zero_rope(kv_c), cache_format, power_of_two)
    if cache_format == "fp8_v4":
        assert want[:, 576:583].min() == 127 - 13 and want[:, 576:583].max() == 127 + 7


def test_float32_scales_near_every_tie():
    # Quotients that fall on, or within half a float32 ulp of, a midpoint of e4m3: the double
    # rounding of "divide in float32, then cast" must be reproduced.
    rng = np.random.default_rng(1)
    scales = np.exp(rng.uniform(np.log(1.1e-4), np.log(250), 400)).astype(np.float32)
    ties = np.abs(e4m3_ties())
    tokens = []
    for scale in scales:
        products = rng.choice(ties, 42).astype(np.float64) * float(scale)
        near = products.astype(np.float32)
        steps = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(0))]
        anchor = np.float32(np.float64(scale) * 448)
        row = np.concatenate([[anchor], *steps, [0]]).astype(np.float32)
        tokens.append(np.minimum(row, anchor))
    kv_c = np.stack(tokens).reshape(100, 512)
    check_quantized(kv_c, zero_rope(kv_c), "fp8_v32", power_of_two=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("cache_format,power_of_two", MODES)
def test_random_tokens(cache_format, power_of_two, dtype):
    rng = np.random.default_rng(2)
    latent, _ = FORMATS[cache_format]
    spread = np.exp(rng.uniform(-12, 6, (100, 1)))
    kv_c = (rng.standard_normal((100, latent)) * spread).astype(dtype)
    k_pe = (rng.standard_normal((100, 64)) * spread).astype(dtype)
    check_quantized(kv_c, k_pe, cache_format, power_of_two)


def quotients_near_a_half_ulp(rng, n):
    """Pairs of significands whose float32 quotient has a remainder just beside one half."""
    pairs = []
    while len(pairs) < n:
        y = int(rng.integers(1 << 22, 1 << 23)) * 2 + 1
        # x < y: x * 2**24 / y is an integer of 24 bits and the remainder (y +- 1) / 2.
        x = pow(1 << 24, -1, y) * ((y + (1 if len(pairs) % 2 else -1)) // 2) % y
        if x >= 1 << 23:
            pairs.append((x, y))
    return np.array(pairs, np.float32).T


def random_significands(rng, n):
    x = rng.integers(1 << 23, 1 << 24, n).astype(np.uint32)
    x[:64] = 1 << 23
    x[64:128] = (1 << 24) - 1
    return (x & 0x7FFFFF | (127 << 23)).view(np.float32)


@pytest.mark.parametrize("error", [-2, -1, 0, 1, 2])
def test_division_does_not_rely_on_the_backend(monkeypatch, error):
    # GPUs may be 2 ulps off; the integer remainder must repair that.
    exact = q._approximate_quotient
    monkeypatch.setattr(q, "_approximate_quotient", lambda x, y: exact(x, y) + error)
    rng = np.random.default_rng(3)
    a, b = random_significands(rng, 20_000), random_significands(rng, 20_000)[::-1].copy()
    a[1000:2000] = b[1000:2000]
    a[2000:2500], b[2000:2500] = quotients_near_a_half_ulp(rng, 500)
    exponent, significand = q._divide(jnp.asarray(a.view(np.int32)), jnp.asarray(b.view(np.int32)))
    got = np.ldexp(np.asarray(significand).astype(np.float64), np.asarray(exponent) - 23)
    np.testing.assert_array_equal(got, (a / b).astype(np.float64))


def test_rope_is_rounded_to_nearest_even():
    # Every bfloat16 value and the float32 numbers half way to the next, and beside those.
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        k_pe = (patterns | low).view(np.float32).reshape(-1, 64)
        rows = np.asarray(q.quantize_kv(np.zeros((len(k_pe), 512), np.float32), k_pe))
        got = rows[:, 528:].copy().view(BF16).reshape(-1)
        with np.errstate(invalid="ignore"):
            want = k_pe.reshape(-1).astype(BF16)
        nan = np.isnan(k_pe.reshape(-1))
        assert np.isnan(got[nan].astype(np.float32)).all()
        np.testing.assert_array_equal(got[~nan].view(np.uint16), want[~nan].view(np.uint16))


def test_zero_tile_and_nan_tile_have_finite_scales():
    kv_c = np.zeros((2, 512), np.float32)
    kv_c[1] = np.nan
    for power_of_two, scale in ((True, 2.0**-13), (False, np.float32(1e-4))):
        rows = np.asarray(q.quantize_kv(kv_c, zero_rope(kv_c), power_of_two_scales=power_of_two))
        np.testing.assert_array_equal(rows[:, 512:528].copy().view("<f4"), np.float32(scale))
        assert (rows[0, :512] == 0).all() and (rows[1, :512] == 0x7F).all()


def test_nan_spoils_no_neighbour():
    kv_c = np.linspace(-3, 3, 448, dtype=np.float32)[None]
    clean = np.asarray(q.quantize_kv(kv_c, zero_rope(kv_c), cache_format="fp8_v4"))
    kv_c[0, 70] = np.nan
    dirty = np.asarray(q.quantize_kv(kv_c, zero_rope(kv_c), cache_format="fp8_v4"))
    changed = np.flatnonzero(clean != dirty)
    np.testing.assert_array_equal(changed, [70])
    assert dirty[0, 70] == 0x7F


# --- dequantising ---


def test_e4m3_codes_are_exact():
    codes = np.arange(256, dtype=np.uint8)
    got, want = np.asarray(q.e4m3_to_float32(codes)), codes.view(E4M3).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[[0, 128]]), [False, True])


def test_e8m0_codes_are_exact():
    codes = np.arange(256, dtype=np.uint8)
    got = np.asarray(q.e8m0_to_float32(codes))
    np.testing.assert_array_equal(got, codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert np.isnan(got[255]) and got[0] == 2.0**-127


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_v4_every_code_times_every_scale(dtype):
    # 256 x 256 products, subnormal and overflowing ones too.
    rows = np.zeros((256, 7 * 64 + 128 + 8), np.uint8)
    scale = np.arange(256, dtype=np.uint8)
    rows[:, 576:583] = scale[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        factor = scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        for first in (0, 192):  # 448 columns hold the 256 codes, and cross each tile's border
            codes = ((first + np.arange(448)) % 256).astype(np.uint8)
            rows[:, :448] = codes
            got, _ = q.dequantize_kv(rows, cache_format="fp8_v4", dtype=dtype)
            exact = codes.view(E4M3).astype(np.float64) * factor[:, None]
            want = exact.astype(np.float32).astype(dtype)
            got = np.asarray(got)
            np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
            np.testing.assert_array_equal(
                np.signbit(got), np.where(np.isnan(want), np.signbit(got), np.signbit(want))
            )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_v32_every_code_times_arbitrary_scales(dtype):
    rng = np.random.default_rng(4)
    scales = np.exp(rng.uniform(np.log(1e-30), np.log(1e30), (64, 4))).astype(np.float32)
    scales[:2] = [[2.0**-13, 128, 255, 0.0], [np.nan, np.inf, 1.0, -2.5]]
    rows = np.zeros((64, 656), np.uint8)
    rows[:, :512] = np.arange(512) % 256
    rows[:, 512:528] = scales.view(np.uint8)
    rope = rng.standard_normal((64, 64)).astype(BF16)
    rows[:, 528:] = rope.view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        values = rows[:, :512].copy().view(E4M3).astype(np.float32)
        want = (values * np.repeat(scales, 128, axis=1)).astype(dtype)
    kv_c, k_pe = q.dequantize_kv(rows, dtype=dtype)
    np.testing.assert_array_equal(np.asarray(kv_c).astype(np.float32), want.astype(np.float32))
    np.testing.assert_array_equal(
        np.asarray(k_pe).astype(np.float32), rope.astype(dtype).astype(np.float32)
    )


def test_bfloat16_rounding_survives_a_float32_use():
    # XLA may skip the rounding of float32 -> bfloat16 -> float32 if it is written as casts.
    rng = np.random.default_rng(5)
    kv = rng.standard_normal((2, 8, 1, 576)).astype(np.float32)
    data = q.quantize_k_cache(kv, power_of_two_scales=False)
    slots = jnp.arange(16, dtype=jnp.int32)

    @jax.jit
    def read(data):
        rows = q.gather_tokens(data, slots, cache_format="fp8_v32", page_size=8)
        return rows.astype(jnp.float32) * 3

    exact = q.gather_tokens(data, slots, cache_format="fp8_v32", page_size=8, dtype=jnp.float32)
    rounded = np.asarray(exact).astype(BF16).astype(np.float32)
    assert (rounded != np.asarray(exact)).mean() > 0.5
    np.testing.assert_array_equal(np.asarray(read(data)), rounded * 3)


@pytest.mark.parametrize("cache_format,power_of_two", MODES)
def test_round_trip_error(cache_format, power_of_two):
    rng = np.random.default_rng(6)
    latent, tile = FORMATS[cache_format]
    kv_c = rng.standard_normal((50, latent)).astype(np.float32)
    k_pe = rng.standard_normal((50, 64)).astype(BF16)
    rows = q.quantize_kv(kv_c, k_pe, cache_format=cache_format, power_of_two_scales=power_of_two)
    back, rope = q.dequantize_kv(rows, cache_format=cache_format, dtype=jnp.float32)
    amax = np.abs(kv_c).reshape(50, -1, tile).max(axis=-1).repeat(tile, axis=-1)
    # 3 mantissa bits, and subnormals of the tile: 2**-10 of a scale of at most 2 * amax / 448.
    bound = np.maximum(np.abs(kv_c) * 2.0**-4, amax * (2 / 448) * 2.0**-10)
    assert (np.abs(np.asarray(back) - kv_c) <= bound * (1 + 1e-6)).all()
    np.testing.assert_array_equal(np.asarray(rope), k_pe.astype(np.float32))
    # What was dequantised is quantised to itself.
    again = q.quantize_kv(back, rope, cache_format=cache_format)
    if power_of_two:
        kept = np.asarray(q.dequantize_kv(again, cache_format=cache_format, dtype=jnp.float32)[0])
        np.testing.assert_array_equal(kept, np.asarray(back))


# --- pages ---


def test_page_bytes_and_its_inverse():
    assert q.page_bytes(64) == 37440 and q.page_bytes(1) == 1152 and q.page_bytes(2) == 1728
    sizes = [q.page_bytes(n) for n in range(1, 3000)]
    assert all(n * 584 <= size < n * 584 + 576 for n, size in enumerate(sizes, 1))
    assert [q.page_size_of(size) for size in sizes] == list(range(1, 3000))
    known = set(sizes)
    for size in range(16, 40_000, 16):
        if size not in known:
            with pytest.raises(ValueError, match="584 \\* page_size"):
                q.page_size_of(size)


@pytest.mark.parametrize("size", [584, 37441, 37448, 8, 1])
def test_pages_not_aligned_to_16_bytes_are_rejected(size):
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        q.page_size_of(size)


def v4_page_oracle(tokens, page_size):
    """One page, byte by byte, from token records of 576 + 8 bytes."""
    page = np.zeros(q.page_bytes(page_size), np.uint8)
    for t, token in enumerate(tokens):
        page[576 * t : 576 * t + 576] = token[:576]
        page[576 * page_size + 8 * t : 576 * page_size + 8 * t + 8] = token[576:]
    return page


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_v4_page_layout(page_size):
    rng = np.random.default_rng(7)
    kv = rng.standard_normal((3, page_size, 1, 512)).astype(BF16)
    data = np.asarray(q.quantize_k_cache(kv, cache_format="fp8_v4"))
    for page in range(3):
        tokens = oracle_tokens(kv[page, :, 0, :448], kv[page, :, 0, 448:], "fp8_v4")
        np.testing.assert_array_equal(data[page], v4_page_oracle(tokens, page_size))
    dense = q.dequantize_k_cache(data, cache_format="fp8_v4")
    assert dense.shape == kv.shape and dense.dtype == jnp.bfloat16


def poisoned_cache(cache_format, page_size=5, pages=4):
    """A cache of random tokens and its float32 oracle; padding and unused bytes are 0xFF."""
    rng = np.random.default_rng(8)
    if cache_format == "plain":
        data = rng.standard_normal((pages, page_size, 2, 24)).astype(np.float16)
        return data, data.astype(np.float32)
    latent, tile = FORMATS[cache_format]
    codes = rng.integers(0, 256, (pages, page_size, latent)).astype(np.uint8)
    codes[codes % 128 == 127] = 3
    exponents = rng.integers(100, 140, (pages, page_size, latent // tile)).astype(np.uint8)
    rope = rng.standard_normal((pages, page_size, 64)).astype(BF16)
    if cache_format == "fp8_v32":
        scales = rng.uniform(1e-4, 3, exponents.shape).astype(np.float32)
        parts = [codes, scales.view(np.uint8), rope.view(np.uint8)]
        data = np.concatenate(parts, axis=-1)[:, :, None]
    else:
        scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
        data = np.full((pages, q.page_bytes(page_size)), 0xFF, np.uint8)
        for p in range(pages):
            for t in range(page_size):
                start = 576 * page_size + 8 * t
                data[p, 576 * t : 576 * t + 448] = codes[p, t]
                data[p, 576 * t + 448 : 576 * t + 576] = rope[p, t].view(np.uint8)
                data[p, start : start + 7] = exponents[p, t]
    latent_values = codes.view(E4M3).astype(np.float32) * np.repeat(scales, tile, axis=-1)
    dense = np.concatenate([latent_values, rope.astype(np.float32)], axis=-1)
    return data, dense[:, :, None]


@pytest.mark.parametrize("cache_format", ["plain", "fp8_v32", "fp8_v4"])
def test_gather_tokens_and_pages(cache_format):
    data, dense = poisoned_cache(cache_format)
    slots = np.random.default_rng(9).integers(0, 20, (3, 7)).astype(np.int32)
    pages = np.array([[3, 0, 3]], np.int32)
    arrays = [data] if cache_format != "fp8_v32" else [data, data.view(E4M3)]
    for array in arrays:
        for dtype in (jnp.float32, jnp.bfloat16):
            kwargs = {"cache_format": cache_format, "page_size": 5, "dtype": dtype}
            want = dense.astype(dtype).astype(np.float32)
            tokens = q.gather_tokens(jnp.asarray(array), slots, **kwargs)
            taken = q.gather_pages(jnp.asarray(array), pages, **kwargs)
            assert tokens.dtype == taken.dtype == dtype
            np.testing.assert_array_equal(
                np.asarray(tokens, np.float32), want.reshape(20, *dense.shape[2:])[slots]
            )
            np.testing.assert_array_equal(np.asarray(taken, np.float32), want[pages])
    default = q.gather_tokens(jnp.asarray(data), slots, cache_format=cache_format, page_size=5)
    assert default.dtype == (jnp.float16 if cache_format == "plain" else jnp.bfloat16)
    assert q.token_dim(cache_format, data.shape) == dense.shape[-1]


@pytest.mark.parametrize("cache_format", ["plain", "fp8_v32", "fp8_v4"])
def test_gather_under_vmap(cache_format):
    data, dense = poisoned_cache(cache_format)
    slots = np.array([[1, 19, 4], [0, 7, 13]], np.int32)
    flat = dense.reshape(20, *dense.shape[2:])

    def gather(data, slots):
        return q.gather_tokens(
            data, slots, cache_format=cache_format, page_size=5, dtype=jnp.float32
        )

    both = jnp.stack([jnp.asarray(data), jnp.asarray(data)[::-1]])
    reverse = dense[::-1].reshape(flat.shape)
    np.testing.assert_array_equal(jax.vmap(gather, (None, 0))(data, slots), flat[slots])
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(gather))(both, slots), np.stack([flat[slots[0]], reverse[slots[1]]])
    )
    np.testing.assert_array_equal(
        jax.vmap(gather, (0, None))(both, slots[0]), np.stack([flat[slots[0]], reverse[slots[0]]])
    )


@pytest.mark.parametrize("cache_format", ["fp8_v32", "fp8_v4"])
def test_gather_makes_no_temporary_of_the_size_of_the_cache(cache_format):
    # float8 too: its view as bytes must not be a copy.
    shape = (64, 64, 1, 656) if cache_format == "fp8_v32" else (64, q.page_bytes(64))
    slots = jax.ShapeDtypeStruct((4,), jnp.int32)
    dtypes = [jnp.uint8, jnp.float8_e4m3fn] if cache_format == "fp8_v32" else [jnp.uint8]
    gather = functools.partial(q.gather_tokens, cache_format=cache_format, page_size=64)
    for dtype in dtypes:
        compiled = jax.jit(gather).lower(jax.ShapeDtypeStruct(shape, dtype), slots).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 200_000 < np.prod(shape) // 10


@pytest.mark.parametrize("cache_format,power_of_two", MODES)
def test_transformations(cache_format, power_of_two):
    latent, _ = FORMATS[cache_format]
    rng = np.random.default_rng(10)
    kv_c = rng.standard_normal((2, 3, latent)).astype(np.float32)
    k_pe = rng.standard_normal((2, 3, 64)).astype(np.float32)

    def quantize(c, r):
        return q.quantize_kv(c, r, cache_format=cache_format, power_of_two_scales=power_of_two)

    want = np.asarray(quantize(kv_c, k_pe))
    np.testing.assert_array_equal(jax.jit(jax.vmap(quantize))(kv_c, k_pe), want)
    np.testing.assert_array_equal(jax.vmap(quantize, (1, 1), 1)(kv_c, k_pe), want)
    shape = jax.eval_shape(quantize, kv_c, k_pe)
    assert shape.shape == want.shape and shape.dtype == np.uint8
    empty = quantize(kv_c[:0], k_pe[:0])
    assert empty.shape == (0, *want.shape[1:])
    back = jax.jit(jax.vmap(lambda r: q.dequantize_kv(r, cache_format=cache_format)))(want)
    direct = q.dequantize_kv(want, cache_format=cache_format)
    np.testing.assert_array_equal(np.asarray(back[0]), np.asarray(direct[0]))


# --- errors ---

KV_C, K_PE = np.zeros((3, 512), np.float32), np.zeros((3, 64), np.float32)


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda: q.quantize_kv(KV_C, K_PE, cache_format="fp8"), "'cache_format' is 'fp8'"),
        (lambda: q.quantize_kv(KV_C, K_PE, cache_format="plain"), "'cache_format' is 'plain'"),
        (lambda: q.quantize_kv(None, K_PE), "'kv_c' is missing"),
        (lambda: q.quantize_kv(KV_C[:, :448], K_PE), r"'kv_c' has shape \(3, 448\)"),
        (lambda: q.quantize_kv(KV_C, K_PE, cache_format="fp8_v4"), r"expected \(\.\.\., 448\)"),
        (lambda: q.quantize_kv(KV_C, K_PE[:2]), r"'k_pe' has shape \(2, 64\); expected \(3, 64\)"),
        (lambda: q.quantize_kv(KV_C.astype(np.int32), K_PE), "'kv_c' has dtype int32"),
        (lambda: q.quantize_kv(KV_C, K_PE, power_of_two_scales=1), "expected a static bool"),
        (
            lambda: q.quantize_kv(
                KV_C[:, :448], K_PE, cache_format="fp8_v4", power_of_two_scales=False
            ),
            "e8m0",
        ),
        (lambda: q.dequantize_kv(np.zeros((3, 656), np.int8)), "'rows' has dtype int8"),
        (lambda: q.dequantize_kv(np.zeros((3, 584), np.uint8)), r"expected \(\.\.\., 656\)"),
        (lambda: q.dequantize_kv(np.zeros((3, 656), np.uint8), dtype=jnp.int8), "'dtype' has dtyp"),
        (lambda: q.quantize_k_cache(np.zeros((2, 4, 576), np.float32)), "rank 3"),
        (lambda: q.quantize_k_cache(np.zeros((2, 4, 2, 576), np.float32)), r"\(2, 4, 2, 576\)"),
        (lambda: q.quantize_k_cache(np.zeros((2, 0, 1, 576), np.float32)), "page_size >= 1"),
        (lambda: q.dequantize_k_cache(np.zeros((2, 4, 1, 655), np.uint8)), r"\(2, 4, 1, 655\)"),
        (
            lambda: q.dequantize_k_cache(np.zeros((2, 1160), np.uint8), cache_format="fp8_v4"),
            "pages of 1160 bytes; expected pages aligned to 16 bytes",
        ),
        (
            lambda: q.dequantize_k_cache(np.zeros((2, 1168), np.uint8), cache_format="fp8_v4"),
            "pages of 1168 bytes; expected 584",
        ),
        (lambda: q.page_bytes(0), "'page_size' is 0"),
        (lambda: q.page_bytes(2.0), "'page_size' is 2.0"),
        (lambda: q.page_size_of(576), "584"),
        (
            lambda: q.gather_tokens(KV_C, np.zeros(1, np.int32), cache_format="v32", page_size=1),
            "'cache_format' is 'v32'",
        ),
    ],
)
def test_bad_calls(call, text):
    with pytest.raises(ValueError, match=text):
        call()
