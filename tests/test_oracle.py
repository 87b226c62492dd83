"""The oracles against sums written out by hand, and the checker against results that are wrong."""

import ml_dtypes
import numpy as np
import oracle
import pytest

RNG = np.random.default_rng(0)


def test_dense_decode_by_hand():
    """Two requests, two heads of one key head, pages of 2 tokens, written out without arrays."""
    q = RNG.standard_normal((2, 1, 2, 3))
    cache = RNG.standard_normal((3, 2, 1, 3))
    table, lengths = np.array([[2, 0], [1, 99]]), np.array([3, 1])
    tokens = [[cache[2, 0, 0], cache[2, 1, 0], cache[0, 0, 0]], [cache[1, 0, 0]]]
    out, lse = oracle.dense_decode(q, cache, table, lengths, 2, softmax_scale=0.7)
    for r in range(2):
        for h in range(2):
            weights = [np.exp(0.7 * sum(q[r, 0, h] * t)) for t in tokens[r]]
            total = sum(weights)
            want = sum(w / total * t[:2] for w, t in zip(weights, tokens[r], strict=True))
            np.testing.assert_allclose(out[r, 0, h], want, rtol=1e-12)
            np.testing.assert_allclose(lse[r, h, 0], np.log(total), rtol=1e-12)


def test_causal_is_the_prefix():
    """Query i of 3 over 5 keys is a single query over the first 3 + i keys."""
    q, cache = RNG.standard_normal((1, 3, 2, 4)), RNG.standard_normal((5, 1, 1, 4))
    table = np.arange(5)[None]
    out, lse = oracle.dense_decode(q, cache, table, [5], 4, causal=True)
    for i in range(3):
        alone, alone_lse = oracle.dense_decode(q[:, [i]], cache, table, [3 + i], 4)
        np.testing.assert_allclose(out[:, i], alone[:, 0], rtol=1e-12)
        np.testing.assert_allclose(lse[..., i], alone_lse[..., 0], rtol=1e-12)


def test_sparse_oracles_agree_with_dense():
    q, cache = RNG.standard_normal((1, 2, 3, 4)), RNG.standard_normal((3, 2, 1, 4))
    out, lse = oracle.dense_decode(q, cache, np.array([[2, 0, 1]]), [5], 3, softmax_scale=0.3)
    slots = np.array([4, 5, 0, 1, 2, -1])
    sparse, sparse_lse = oracle.sparse_decode(
        q, cache, np.tile(slots, (1, 2, 1)), 3, softmax_scale=0.3
    )
    np.testing.assert_allclose(sparse, out, rtol=1e-12)
    np.testing.assert_allclose(sparse_lse, lse, rtol=1e-12)
    prefill, top, prefill_lse = oracle.sparse_prefill(
        q[0], cache.reshape(6, 1, 4), np.tile(slots, (2, 1, 1)), 0.3, 3
    )
    np.testing.assert_allclose(prefill, out[0], rtol=1e-12)
    np.testing.assert_allclose(prefill_lse, lse[0].T, rtol=1e-12)
    np.testing.assert_allclose(
        top,
        (0.3 * np.einsum("shd,td->sht", q[0], cache.reshape(6, 4)[slots[:5]])).max(-1),
        rtol=1e-12,
    )


def test_sink_is_one_more_token_without_value():
    q, cache = RNG.standard_normal((1, 1, 1, 2)), RNG.standard_normal((1, 4, 1, 2))
    out, lse = oracle.dense_decode(q, cache, np.array([[0]]), [4], 2, attn_sink=[0.5])
    plain, plain_lse = oracle.dense_decode(q, cache, np.array([[0]]), [4], 2)
    weight = np.exp(plain_lse[0, 0, 0])
    np.testing.assert_allclose(out, plain * weight / (weight + np.exp(0.5)), rtol=1e-12)
    np.testing.assert_array_equal(lse, plain_lse)


def test_e4m3_codes_agree_with_ml_dtypes():
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    raw = np.zeros((2, 656), np.uint8)
    raw[:, :128] = codes.reshape(2, 128)
    raw[:, 512:528] = np.ones((2, 4), np.float32).view(np.uint8)
    np.testing.assert_array_equal(oracle.decode_v32(raw)[:, :128].reshape(256), want)


@pytest.mark.parametrize("page_size", [1, 2, 64])
def test_fp8_codecs_invert(page_size):
    """Decoding gives back the values to fp8 precision: half a step of 1/8, or of the scale."""
    values = RNG.standard_normal((3, page_size, 1, 576)).astype(np.float32)
    for power in (True, False):
        raw = oracle.encode_v32(values, power_of_two=power)
        assert raw.shape == (3, page_size, 1, 656)
        np.testing.assert_allclose(oracle.decode_v32(raw), values, rtol=2**-4, atol=1e-4)
    raw = oracle.encode_v4(values[..., :512])
    assert raw.shape == (3, oracle.v4_page_bytes(page_size)) and raw.shape[1] % 576 == 0
    got = oracle.decode_v4(raw, page_size)
    np.testing.assert_allclose(got, values[..., :512], rtol=2**-4, atol=1e-4)
    # RoPE is stored as bfloat16.
    np.testing.assert_allclose(got[..., 448:], values[..., 448:512], rtol=2**-8)


WANT = RNG.standard_normal((4, 2, 8, 32)) / 10


def wrong(change):
    got = WANT.copy()
    change(got)
    return got.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.put(x, 7, x.flat[7] + 0.02),  # one element
        lambda x: np.multiply(x, 1.005, out=x),  # all a little: only the cosine sees it
        lambda x: np.put(x, 7, np.nan),
        lambda x: np.put(x, 7, np.inf),
    ],
    ids=["element", "cosine", "nan", "inf"],
)
def test_checker_refuses(change):
    with pytest.raises(AssertionError):
        oracle.check("dense_decode", "out", wrong(change), WANT)


def test_checker_accepts_rounding_only():
    oracle.check("dense_decode", "out", wrong(lambda x: None), WANT)
    with pytest.raises(AssertionError, match="shape"):
        oracle.check("dense_decode", "out", wrong(lambda x: None)[:1], WANT)
    special = WANT.copy()
    special[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    oracle.check("sparse_decode", "out", special.astype(ml_dtypes.bfloat16), special)


def test_norm_refuses():
    oracle.check_norm("dense_decode", "out", WANT * (1 + 2e-3), WANT)
    with pytest.raises(AssertionError, match="relative norm"):
        oracle.check_norm("dense_decode", "out", WANT * (1 + 4e-3), WANT)
    with pytest.raises(AssertionError, match="relative norm"):
        oracle.check_norm("dense_decode", "out", WANT, WANT * 0)
