"""flash_attn_varlen_func and its packed forms against float64 numpy, forward and gradients."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import varlen_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_flashmla import varlen_prefill
from jax_flashmla.reference import varlen as reference
from jax_flashmla.varlen_prefill import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

FAR = 2147480000  # an int32 that no offset can be added to
ANY = 7  # max_seqlen_*: nothing may depend on it
RESULTS = ("out", "lse", "dq", "dk", "dv")


@functools.partial(jax.jit, static_argnames=("scale", "causal", "blocks"))
def run(q, k, v, cu_q, cu_k, dout, dlse, scale=None, causal=False, blocks=None):
    """(out, lse, dq, dk, dv) through the public function, or with other tiles of the reference."""
    if blocks is None:

        def call(q, k, v):
            return flash_attn_varlen_func(
                q, k, v, cu_q, cu_k, ANY, ANY, softmax_scale=scale, causal=causal
            )

        results, vjp = jax.vjp(call, q, k, v)
        return (*results, *vjp((dout, dlse)))
    sequences = varlen_prefill._sequences(cu_q, cu_k, q.shape[0], k.shape[0])
    operands = {"q": q, "k": k, "v": v, "sequences": sequences}
    options = {"softmax_scale": scale or q.shape[-1] ** -0.5, "causal": causal}
    options |= {"block_q": blocks[0], "block_k": blocks[1]}
    out, lse = reference.varlen_forward(operands, **options)
    operands |= {"out": out, "lse": lse, "dout": dout, "dlse": dlse}
    return (out, lse, *reference.varlen_backward(operands, **options))


def expect(q, k, v, cu_q, cu_k, dout, dlse, scale=None, causal=False):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    forward = oracle.forward(q, k, v, cu_q, cu_k, scale, causal)
    return (*forward, *oracle.gradients(q, k, v, cu_q, cu_k, scale, causal, dout, dlse))


def limits(lengths, start=0):
    return (start + np.cumsum([0, *lengths])).astype(np.int32)


def make(
    lengths_q,
    lengths_k,
    heads=(2, 1),
    dims=(12, 8),
    dtype=np.float32,
    *,
    pad=(0, 0),
    start=(0, 0),
    deviation=1.0,
    seed=0,
):
    """Random arguments of `run`; rows in no sequence hold NaN, in cotangents too."""
    rng = np.random.default_rng(seed)
    cu_q, cu_k = limits(lengths_q, start[0]), limits(lengths_k, start[1])
    rows_q, rows_k = int(cu_q[-1]) + pad[0], int(cu_k[-1]) + pad[1]
    (h_q, h_kv), (d, dv) = heads, dims

    def normal(rows, cu, *shape, dtype=dtype):
        x = (rng.normal(size=(rows, *shape)) * deviation).astype(dtype)
        x[: cu[0]] = x[cu[-1] :] = np.nan
        return x

    q = normal(rows_q, cu_q, h_q, d)
    k = normal(rows_k, cu_k, h_kv, d)
    v = normal(rows_k, cu_k, h_kv, dv)
    dout = normal(rows_q, cu_q, h_q, dv)
    dlse = normal(rows_q, cu_q, h_q, dtype=np.float32)
    return q, k, v, cu_q, cu_k, dout, dlse


def make_24(lengths_q, lengths_k, **options):
    """Up to 4 sequences in 24 rows of 24 each, a shape that many tests share to compile it once."""
    lengths_q, lengths_k = (x + [0] * (4 - len(x)) for x in (lengths_q, lengths_k))
    pad = (24 - sum(lengths_q), 24 - sum(lengths_k))
    return make(lengths_q, lengths_k, dims=(4, 3), pad=pad, **options)


def close(name, actual, expected, rtol=2e-5, atol=2e-5):
    """NaN and infinities in the same places, everything else near."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape, name
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)


def within_contract(name, actual, expected):
    """The tolerances for dense prefill: absolute or relative, and the cosine difference."""
    actual = np.asarray(actual).astype(np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=name)
    x, y = actual[finite], expected[finite]
    lse = name == "lse"
    absolute, relative = (1e-6, 2.01 / 65536) if lse else (1e-3, 8.01 / 128)
    error = np.abs(x - y)
    bad = (error > absolute) & (error > relative * np.abs(y))
    assert not bad.any(), f"{name}: {bad.sum()} of {bad.size} differ, by up to {error.max()}"
    cosine = 1 - 2 * (x * y).sum() / max((x * x + y * y).sum(), 1e-300)
    assert cosine < (1e-7 if lse else 7e-6), f"{name}: cosine difference {cosine}"


def all_close(actual, expected, **tolerances):
    for name, a, e in zip(RESULTS, actual, expected, strict=True):
        close(name, a, e, **tolerances)


# ------------------------------------------------------------------ the oracle itself


def test_oracle_gradients_are_finite_differences():
    args = make([3, 0, 4], [5, 2, 2], heads=(4, 2), dims=(3, 2), dtype=np.float64)
    q, k, v, cu_q, cu_k, dout, dlse = args
    dlse = dlse.astype(np.float64)
    for causal in (False, True):

        def loss(q, k, v, causal=causal):
            out, lse = oracle.forward(q, k, v, cu_q, cu_k, 0.7, causal)
            return (out * dout).sum() + (np.where(np.isfinite(lse), lse, 0) * dlse).sum()

        grads = oracle.gradients(q, k, v, cu_q, cu_k, 0.7, causal, dout, dlse)
        for which, grad in enumerate(grads):
            for index in np.ndindex(grad.shape):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = [q.copy(), k.copy(), v.copy()]
                    moved[which][index] += step
                    ends.append(loss(*moved))
                assert grad[index] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)


def test_oracle_hides_by_the_bottom_right():
    # 2 queries, 3 keys with values 1, 2, 4 and equal scores: means of 2 and of 3 values.
    v = np.array([1.0, 2.0, 4.0]).reshape(3, 1, 1)
    out, lse = oracle.forward(
        np.zeros((2, 1, 1)), np.zeros((3, 1, 1)), v, [0, 2], [0, 3], 1.0, True
    )
    np.testing.assert_allclose(out[:, 0, 0], [1.5, 7 / 3])
    np.testing.assert_allclose(lse[:, 0], np.log([2, 3]))


# ------------------------------------------------------------------ values and gradients

# In arrays of 41 and 55 rows, so that one compilation serves all.
LENGTHS = {
    "one": ([19, 0, 0, 0, 0], [23, 0, 0, 0, 0]),
    "fewer keys": ([41, 0, 0, 0, 0], [9, 0, 0, 0, 0]),
    "ragged": ([5, 1, 30, 2, 0], [9, 33, 7, 1, 0]),
    "empty": ([0, 4, 0, 6, 0], [5, 0, 0, 6, 2]),
    "short": ([1, 2, 3, 2, 1], [3, 2, 1, 2, 3]),
    "full": ([10, 10, 10, 10, 1], [1, 20, 20, 4, 10]),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_float32(name, causal):
    lengths_q, lengths_k = LENGTHS[name]
    pad = (41 - sum(lengths_q), 55 - sum(lengths_k))
    args = make(lengths_q, lengths_k, heads=(4, 2), pad=pad)
    all_close(run(*args, causal=causal), expect(*args, causal=causal))


@pytest.mark.parametrize("blocks, causal", [((1, 1), True), ((4, 7), False)])
def test_any_tile_size(blocks, causal):
    lengths = ([5, 0, 30, 2, 9], [9, 3, 27, 0, 14])
    args = make(*lengths, heads=(2, 2), pad=(3, 2), start=(2, 4))
    all_close(run(*args, causal=causal, blocks=blocks), expect(*args, causal=causal))


def test_one_key_head():
    args = make([7, 9], [8, 11], heads=(3, 1), dims=(4, 6))
    all_close(run(*args, causal=True), expect(*args, causal=True))


@pytest.mark.parametrize(
    "dtype, dims, causal",
    [
        (jnp.bfloat16, (192, 128), True),
        (jnp.float16, (128, 128), False),
        (jnp.float32, (128, 128), True),
    ],
)
def test_tolerances_of_the_contract(dtype, dims, causal):
    args = make(
        [70, 150, 1], [90, 140, 33], heads=(4, 2), dims=dims, dtype=dtype, deviation=0.1, pad=(5, 3)
    )
    scale = (dims[0] + 100) ** -0.5
    actual = run(*args, scale=scale, causal=causal)
    for name, a, e in zip(RESULTS, actual, expect(*args, scale=scale, causal=causal), strict=True):
        assert a.dtype == (jnp.float32 if name == "lse" else dtype)
        within_contract(name, a, e)
        if dtype == jnp.float32:
            close(name, a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["deviation 3", "deviation 10", "rising"])
def test_peaked_scores(kind):
    q, k, v, cu_q, cu_k, dout, dlse = make(
        [40, 90], [200, 70], dims=(64, 32), dtype=jnp.bfloat16, seed=3
    )
    scale = 64**-0.5
    if kind == "rising":  # the maximum moves on in every block
        k = (k * np.linspace(0.1, 6, len(k))[:, None, None]).astype(jnp.bfloat16)
    else:
        q = (q * float(kind.split()[1])).astype(jnp.bfloat16)
    args = (q, k, v, cu_q, cu_k, dout, dlse)
    actual = run(*args, scale=scale, causal=True, blocks=(16, 32))
    expected = expect(*args, scale=scale, causal=True)
    for name, a, e in zip(RESULTS, actual, expected, strict=True):
        finite = np.isfinite(e)
        error = np.linalg.norm(np.asarray(a).astype(np.float64)[finite] - e[finite])
        # dP - delta cancels where one key takes all, so gradients lose a few bits of P and dS.
        limit = 3e-3 if name in ("out", "lse") else 1e-2
        assert error <= limit * np.linalg.norm(e[finite]), name


def test_large_scores_do_not_overflow():
    args = make_24([9], [9], deviation=60.0)
    actual, expected = run(*args), expect(*args)
    assert np.abs(expected[1][:9]).min() > 100  # exp of these is inf in float32
    for name, a, e in zip(RESULTS, actual, expected, strict=True):
        close(name, a, e, rtol=1e-3, atol=1e-3 * np.abs(e[np.isfinite(e)]).max())


def test_scores_that_are_all_minus_infinity_are_not_an_empty_row():
    q = np.full((1, 1, 1), 1e30, np.float32)
    k = np.full((2, 1, 1), -1e30, np.float32)
    v = np.ones((2, 1, 1), np.float32)
    out, lse = flash_attn_varlen_func(q, k, v, limits([1]), limits([2]), ANY, ANY)
    assert np.isnan(out).all() and lse[0, 0] == -np.inf


# Entries may repeat (empty sequences); a start that is not 0 leaves padding in front.
cuts = st.lists(st.integers(0, 24), min_size=5, max_size=5).map(sorted)


@settings(max_examples=60, deadline=None)
@given(cu_q=cuts, cu_k=cuts, causal=st.booleans())
def test_any_lengths(cu_q, cu_k, causal):
    q, k, v, _, _, dout, dlse = make_24([24], [24])
    cu_q, cu_k = np.array(cu_q, np.int32), np.array(cu_k, np.int32)
    for array in (q, dout, dlse):
        array[: cu_q[0]] = array[cu_q[-1] :] = np.nan
    for array in (k, v):
        array[: cu_k[0]] = array[cu_k[-1] :] = np.nan
    args = (q, k, v, cu_q, cu_k, dout, dlse)
    all_close(run(*args, causal=causal), expect(*args, causal=causal))


@settings(max_examples=3, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2)]),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    pad=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    causal=st.booleans(),
)
def test_any_shapes(lengths, heads, dims, pad, causal):
    args = make([q for q, _ in lengths], [k for _, k in lengths], heads, dims, pad=pad)
    all_close(run(*args, causal=causal), expect(*args, causal=causal))


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize(
    "lengths_q, lengths_k, pad",
    [
        ([], [], (4, 5)),
        ([0], [5], (0, 0)),
        ([5], [0], (0, 0)),
        ([0, 0], [0, 0], (0, 0)),
        ([], [], (0, 0)),
        ([0] * 4, [3, 4, 0, 0], (24, 17)),
        ([3, 4, 0, 0], [0] * 4, (17, 24)),
    ],
)
def test_sizes_of_zero(lengths_q, lengths_k, pad):
    args = make(lengths_q, lengths_k, dims=(4, 3), pad=pad)
    out, lse, *grads = run(*args)
    all_close((out, lse, *grads), expect(*args))
    assert not np.any(out) and np.isposinf(lse).all() and not any(np.any(g) for g in grads)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_leaks_from_other_sequences(bad):
    clean = make_24([6, 7, 6], [9, 6, 7])
    dirty = [np.copy(x) for x in clean]
    for index in (0, 5, 6):  # q, dout, dlse of the middle sequence
        dirty[index][6:13] = bad
    for index in (1, 2):
        dirty[index][9:15] = bad
    # Keys of all sequences fit in one block here, so a product that took them all would leak.
    rows = {"out": slice(6, 13), "lse": slice(6, 13), "dq": slice(6, 13)}
    rows |= {"dk": slice(9, 15), "dv": slice(9, 15)}
    for name, a, b in zip(RESULTS, run(*clean), run(*dirty), strict=True):
        keep = np.ones(len(a), bool)
        keep[rows[name]] = False
        np.testing.assert_array_equal(a[keep], b[keep], err_msg=name)
        assert np.isnan(np.asarray(b)[~keep]).all(), name


def test_cotangents_of_rows_without_keys_do_not_matter():
    args = list(make_24([6, 4], [3, 0]))
    expected = expect(*args, causal=True)
    assert np.isposinf(expected[1][:10]).sum() == 7 * 2
    args[5], args[6] = np.copy(args[5]), np.copy(args[6])
    blind = np.isposinf(expected[1])
    args[5][blind] = args[6][blind] = np.nan
    all_close(run(*args, causal=True), expected)


BROKEN = {
    "decreasing queries": ([0, 9, 4, 20], [0, 5, 10, 20], slice(0, 20), slice(0, 20)),
    "decreasing keys": ([0, 5, 10, 20], [0, 15, 10, 20], slice(0, 20), slice(0, 20)),
    "swap among sound ones": ([0, 4, 12, 8, 16], [0, 5, 9, 14, 20], slice(4, 16), slice(5, 20)),
    "one past the array": ([0, 4, FAR, 12, 16], [0, 5, 9, 14, 20], slice(4, 12), slice(5, 14)),
    "one negative": ([0, 4, 8, 12, 16], [0, 5, -9, 14, 20], slice(4, 12), slice(5, 14)),
    "end past the array": ([0, 4, 8, 30], [0, 5, 9, 14], slice(8, 24), slice(9, 14)),
    "negative start": ([-4, 4, 8, 12], [0, 5, 9, 14], slice(0, 4), slice(0, 5)),
    "end missing": ([0, 4, 8, 0, 0], [0, 5, 9, 14, 20], slice(0, 24), slice(0, 20)),
    "end by one": ([0, 4, 25], [0, 5, 24], slice(4, 24), slice(5, 24)),
    "keys end by one": ([0, 4, 24], [0, 5, 25], slice(4, 24), slice(5, 24)),
    "lowest": ([0, 4, 8], [-(2**31), 5, 10], slice(0, 4), slice(0, 5)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_cu_seqlens_out_of_order(name):
    cu_q, cu_k, nan_q, nan_k = BROKEN[name]
    # One shape, so one compilation: repeated last entries are empty sequences, unless the
    # last entry is what is wrong, which then is repeated too.
    cu_q, cu_k = (np.array(c + c[-1:] * (5 - len(c)), np.int32) for c in (cu_q, cu_k))
    q, k, v, _, _, dout, dlse = make_24([24], [24])
    args = (q, k, v, cu_q, cu_k, dout, dlse)
    actual = run(*args, causal=True)
    all_close(actual, expect(*args, causal=True))
    for result, nan in zip(RESULTS, (nan_q, nan_q, nan_q, nan_k, nan_k), strict=True):
        is_nan = np.isnan(actual[RESULTS.index(result)]).reshape(24, -1)
        expected = np.zeros(24, bool)
        expected[nan] = True
        np.testing.assert_array_equal(is_nan.all(axis=1), expected, err_msg=result)
        np.testing.assert_array_equal(is_nan.any(axis=1), expected, err_msg=result)


entries = st.lists(st.one_of(st.integers(-3, 27), st.just(FAR)), min_size=5, max_size=5)


@settings(max_examples=60, deadline=None)
@given(cu_q=st.one_of(entries, cuts), cu_k=st.one_of(entries, cuts), causal=st.booleans())
def test_any_cu_seqlens(cu_q, cu_k, causal):
    q, k, v, _, _, dout, dlse = make_24([24], [24])
    args = (q, k, v, np.array(cu_q, np.int32), np.array(cu_k, np.int32), dout, dlse)
    all_close(run(*args, causal=causal), expect(*args, causal=causal))


def test_sequences_are_always_inside_the_arrays():
    rng = np.random.default_rng(0)
    put_right = jax.jit(varlen_prefill._sequences, static_argnums=(2, 3))
    for _ in range(200):
        cu_q = rng.choice([-5, 0, 3, 8, 12, 20, 21, FAR, -FAR], 6).astype(np.int32)
        cu_k = rng.choice([-5, 0, 3, 8, 12, 30, 31, FAR, -FAR], 6).astype(np.int32)
        q_begin, q_end, k_begin, k_end, broken = np.asarray(put_right(cu_q, cu_k, 20, 30)).T
        for begin, end, total in ((q_begin, q_end, 20), (k_begin, k_end, 30)):
            assert 0 <= begin[0] and end[-1] <= total
            assert (begin <= end).all() and (begin[1:] == end[:-1]).all()
        assert set(broken) <= {0, 1}


# ------------------------------------------------------------------ options


def test_is_varlen_false_reads_the_lengths_from_the_arguments():
    q, k, v, *_ = make([21], [33], pad=(2, 1))
    junk = np.full(4, FAR, np.int32)
    actual = flash_attn_varlen_func(q, k, v, junk, junk, 7, 11, causal=True, is_varlen=False)
    expected = oracle.forward(q, k, v, limits([7] * 3), limits([11] * 3), 12**-0.5, True)
    for name, a, e in zip(RESULTS, actual, expected, strict=False):
        close(name, a, e)
    with pytest.raises(ValueError, match=r"'k' has 34 rows; expected .* 3 \* 12 = 36"):
        flash_attn_varlen_func(q, k, v, junk, junk, 7, 12, is_varlen=False)


def test_deterministic_gives_the_same_bits():
    q, k, v, cu_q, cu_k, dout, dlse = make_24([9, 15], [20, 4])

    @jax.jit
    def gradients(q, k, v):
        def call(*x):
            return flash_attn_varlen_func(*x, cu_q, cu_k, ANY, ANY, deterministic=True)

        return jax.vjp(call, q, k, v)[1]((jnp.asarray(dout), jnp.asarray(dlse)))

    for a, b in zip(gradients(q, k, v), gradients(q, k, v), strict=True):
        np.testing.assert_array_equal(a, b)


def test_packed_forms_are_the_same_function():
    d = 12
    q, k, v, cu, _, dout, dlse = make([6, 9], [6, 9], heads=(2, 2), pad=(2, 2))

    @jax.jit
    def qkv_packed(qkv, dout, dlse):
        def call(qkv):
            return flash_attn_varlen_qkvpacked_func(qkv, cu, ANY, d, causal=True)

        results, vjp = jax.vjp(call, qkv)
        return (*results, *vjp((dout, dlse)))

    out, lse, dqkv = qkv_packed(np.concatenate([q, k, v], axis=-1), dout, dlse)
    dqkv = np.asarray(dqkv)
    grads = (dqkv[..., :d], dqkv[..., d : 2 * d], dqkv[..., 2 * d :])
    all_close((out, lse, *grads), expect(q, k, v, cu, cu, dout, dlse, causal=True))

    q, k, v, cu_q, cu_k, dout, dlse = make([6, 9], [8, 4], heads=(4, 2), pad=(1, 3))

    @jax.jit
    def kv_packed(q, kv, dout, dlse):
        def call(q, kv):
            return flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, ANY, ANY, d, causal=True)

        results, vjp = jax.vjp(call, q, kv)
        return (*results, *vjp((dout, dlse)))

    out, lse, dq, dkv = kv_packed(q, np.concatenate([k, v], axis=-1), dout, dlse)
    grads = (dq, np.asarray(dkv)[..., :d], np.asarray(dkv)[..., d:])
    all_close((out, lse, *grads), expect(q, k, v, cu_q, cu_k, dout, dlse, causal=True))


def test_packed_scale_defaults_to_that_of_the_qk_columns():
    q, k, v, cu, _, _, _ = make([6], [6], heads=(2, 2))
    expected = flash_attn_varlen_func(q, k, v, cu, cu, ANY, ANY)[1]
    qkv, kv = np.concatenate([q, k, v], axis=-1), np.concatenate([k, v], axis=-1)
    np.testing.assert_array_equal(flash_attn_varlen_qkvpacked_func(qkv, cu, ANY, 12)[1], expected)
    np.testing.assert_array_equal(
        flash_attn_varlen_kvpacked_func(q, kv, cu, cu, ANY, ANY, 12)[1], expected
    )


def test_signatures_are_those_of_the_contract():
    options = "dropout_p softmax_scale causal deterministic is_varlen implementation".split()
    limits_names = "cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv".split()
    expected = {
        flash_attn_varlen_func: ["q", "k", "v", *limits_names, *options],
        flash_attn_varlen_qkvpacked_func: [
            "qkv",
            "cu_seqlens",
            "max_seqlen",
            "head_dim_qk",
            *options,
        ],
        flash_attn_varlen_kvpacked_func: ["q", "kv", *limits_names, "head_dim_qk", *options],
    }
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names
        defaults = [parameters[name].default for name in options]
        assert defaults == [0.0, None, False, False, True, None]
        assert parameters["implementation"].kind is inspect.Parameter.KEYWORD_ONLY


# ------------------------------------------------------------------ transformations


def batch_arguments(size=3):
    """A batch of arguments with different lengths and padding in each element."""
    lengths = [([4, 3], [5, 6]), ([0, 6], [7, 2]), ([2, 2], [1, 1])][:size]
    elements = []
    for i, (lengths_q, lengths_k) in enumerate(lengths):
        pad = (9 - sum(lengths_q) - (i == 1), 12 - sum(lengths_k) - (i == 1))
        start = (int(i == 1), int(i == 1))
        elements.append(make(lengths_q, lengths_k, dims=(4, 3), pad=pad, start=start, seed=i))
    return [np.stack(column) for column in zip(*elements, strict=True)]


def gradients_of_one(q, k, v, cu_q, cu_k, dout, dlse, causal=True):
    def loss(q, k, v):
        out, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, ANY, ANY, causal=causal)
        seen = jnp.isfinite(lse)
        dot = jnp.where(seen[..., None], out * dout, 0).sum()
        return dot + jnp.where(seen, lse * dlse, 0).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


SUBSETS = [tuple(bool(bits >> i & 1) for i in range(5)) for bits in range(1, 32)]


@pytest.mark.parametrize("batched", SUBSETS, ids=lambda b: "".join("01"[x] for x in b))
def test_vmap_over_any_operands(batched):
    args = batch_arguments()
    # Garbage in one element must not reach its neighbours.
    args[3][1, -1] = FAR
    chosen = [
        a if b else a[1 if i in (3, 4) else 0]
        for i, (a, b) in enumerate(zip(args[:5], batched, strict=True))
    ]
    # Padding differs between the elements mixed here: what is padding in one is not in another.
    chosen[:3] = [np.nan_to_num(a, nan=0.5) for a in chosen[:3]]
    dout, dlse = np.nan_to_num(args[5][0], nan=0.5), np.nan_to_num(args[6][0], nan=0.5)
    axes = tuple(0 if b else None for b in batched)

    def forward(*args):
        return flash_attn_varlen_func(*args, ANY, ANY, causal=True)

    def both(*args):
        return (*forward(*args), *gradients_of_one(*args, dout, dlse))

    actual = jax.vmap(both, in_axes=axes)(*chosen)
    for i in range(3):
        one = [a[i] if b else a for a, b in zip(chosen, batched, strict=True)]
        expected = expect(*one, dout, dlse, causal=True)
        all_close([a[i] for a in actual], expected)


def test_vmap_keeps_padding_of_every_element():
    args = batch_arguments()  # with NaN in the padding of each
    actual = jax.vmap(functools.partial(run, causal=True))(*args)
    for i in range(3):
        all_close([a[i] for a in actual], expect(*(a[i] for a in args), causal=True))


def test_vmap_along_other_axes_and_nested():
    args = [np.stack([a, a[::-1]]) for a in batch_arguments()]  # [2, 3, ...]
    nested = jax.vmap(jax.vmap(functools.partial(run, causal=True)))
    actual = nested(*args)
    for i in range(2):
        for j in range(3):
            all_close([a[i, j] for a in actual], expect(*(a[i, j] for a in args), causal=True))
    # The outer axis of q and cu_seqlens_qo only, and last instead of first.
    q, k, v, cu_q, cu_k, _, _ = args
    q, k, v = (np.nan_to_num(x, nan=0.5) for x in (q, k, v))

    def forward(*args):
        return flash_attn_varlen_func(*args, ANY, ANY)

    out, lse = jax.vmap(
        jax.vmap(forward, in_axes=(0, 0, 0, 0, None)), in_axes=(-1, None, None, -1, None)
    )(np.moveaxis(q, 0, -1), k[0], v[0], np.moveaxis(cu_q, 0, -1), cu_k[0, 0])
    for i in range(2):
        for j in range(3):
            one = (q[i, j], k[0, j], v[0, j], cu_q[i, j], cu_k[0, 0], 12**-0.5)
            e_out, e_lse = oracle.forward(*one[:5], 4**-0.5, False)
            close("out", out[i, j], e_out)
            close("lse", lse[i, j], e_lse)


def test_grad_of_vmap():
    args = batch_arguments()
    q, k, v, cu_q, cu_k, dout, dlse = args

    def loss(q, k, v):
        call = functools.partial(flash_attn_varlen_func, causal=True)
        out, lse = jax.vmap(lambda *a: call(*a, ANY, ANY))(q, k, v, cu_q, cu_k)
        seen = jnp.isfinite(lse)
        return (
            jnp.where(seen[..., None], out * dout, 0).sum() + jnp.where(seen, lse * dlse, 0).sum()
        )

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for i in range(3):
        expected = expect(*(a[i] for a in args), causal=True)[2:]
        for name, a, e in zip(RESULTS[2:], grads, expected, strict=True):
            close(name, a[i], e)


def test_vmap_that_cannot_fold_loops(monkeypatch):
    args = batch_arguments()
    monkeypatch.setattr(varlen_prefill, "_MAX_ROWS", 20)
    looped = jax.make_jaxpr(jax.vmap(run.__wrapped__))(*args)
    calls = [e for e in flatten(looped.jaxpr) if e.primitive.name.startswith("flash_attn_varlen")]
    assert [call.invars[0].aval.shape for call in calls] == [(9, 2, 4)] * 2
    actual = jax.jit(jax.vmap(run.__wrapped__))(*args)
    for i in range(3):
        all_close([a[i] for a in actual], expect(*(a[i] for a in args)))


def test_vmap_over_nothing():
    q, k, v, cu_q, cu_k, dout, dlse = (a[:0] for a in batch_arguments())
    results = jax.vmap(run)(q, k, v, cu_q, cu_k, dout, dlse)
    assert [r.shape for r in results] == [x.shape for x in (dout, dlse, q, k, v)]


def test_vmap_does_not_repeat_shared_keys():
    q, k, v, cu_q, cu_k, _, _ = batch_arguments()

    def forward(q, cu_q):
        return flash_attn_varlen_func(q, k[0], v[0], cu_q, cu_k[0], ANY, ANY)

    jaxpr = jax.make_jaxpr(jax.vmap(forward))(q, cu_q)
    (call,) = [e for e in flatten(jaxpr.jaxpr) if e.primitive.name == "flash_attn_varlen_fwd"]
    assert call.invars[0].aval.shape == (27, 2, 4)
    assert call.invars[1].aval.shape == k[0].shape


def flatten(jaxpr):
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from flatten(inner)


def test_eval_shape():
    shape = jax.ShapeDtypeStruct
    q, k, v = (shape((2**20, 128, d), jnp.bfloat16) for d in (192, 192, 128))
    cu = shape((9,), jnp.int32)
    call = functools.partial(
        flash_attn_varlen_func, max_seqlen_qo=ANY, max_seqlen_kv=ANY, softmax_scale=0.1
    )
    out, lse = jax.eval_shape(call, q, k, v, cu, cu)
    assert (out.shape, out.dtype) == ((2**20, 128, 128), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((2**20, 128), jnp.float32)

    def loss(q, k, v):
        return call(q, k, v, cu_q, cu_q)[0].sum()

    cu_q = jnp.zeros(9, jnp.int32)
    grads = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), q, k, v)
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


def test_checkpoint():
    q, k, v, cu_q, cu_k, *_ = make([6, 5], [6, 7])

    @jax.checkpoint
    def loss(q, k, v):
        out, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, ANY, ANY)
        return (out**2).sum() + jnp.sin(lse).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    out, lse = oracle.forward(q, k, v, cu_q, cu_k, 12**-0.5, False)
    expected = expect(q, k, v, cu_q, cu_k, 2 * out, np.cos(lse))[2:]
    for name, a, e in zip(RESULTS[2:], grads, expected, strict=True):
        close(name, a, e)


def test_gradient_of_lse_alone():
    q, k, v, cu_q, cu_k, dout, dlse = make([6, 5], [6, 7])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(q, k, v):
        return (flash_attn_varlen_func(q, k, v, cu_q, cu_k, ANY, ANY)[1] * dlse).sum()

    grads = gradients(q, k, v)
    expected = expect(q, k, v, cu_q, cu_k, 0 * dout, dlse)[2:]
    for name, a, e in zip(RESULTS[2:], grads, expected, strict=True):
        close(name, a, e)
    assert not np.any(grads[2]) and np.any(grads[0])


def test_second_derivative_names_the_operation():
    q, k, v, cu_q, cu_k, *_ = make([3], [4])

    def loss(q):
        return (flash_attn_varlen_func(q, k, v, cu_q, cu_k, ANY, ANY)[0] ** 2).sum()

    with pytest.raises(TypeError, match="forward-mode"):  # JAX's, for any custom_vjp
        jax.jvp(loss, (q,), (q,))
    with pytest.raises(NotImplementedError, match="flash_attn_varlen_.wd: derivatives"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(q)


def test_export_with_gradient():
    args = make([6, 5], [6, 7], pad=(1, 1))
    exported = export.export(jax.jit(run.__wrapped__))(*args)
    all_close(exported.call(*args), expect(*args))


def test_under_x64():
    args = make([6, 5], [6, 7], pad=(1, 1))
    with jax.enable_x64(True):
        actual = run(*args)
        assert [a.dtype for a in actual] == [jnp.float32] * 5
        all_close(actual, expect(*args))


# ------------------------------------------------------------------ several devices


def mesh_of(size, kind):
    devices = jax.devices("cpu")
    assert len(devices) >= size, "tests/conftest.py asks for 8 CPU devices"
    return jax.make_mesh((size,), ("x",), axis_types=(kind,), devices=devices[:size])


HEADS = PartitionSpec(None, "x")
WHOLE = PartitionSpec()


def run_sharded(mesh, args, specs):
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        return jax.jit(functools.partial(run.__wrapped__, causal=True))(*placed)


@pytest.mark.parametrize("kind, heads", [(AxisType.Auto, (4, 2)), (AxisType.Explicit, (2, 2))])
def test_heads_split_over_devices(kind, heads):
    args = make([5, 7], [9, 6], heads=heads, dims=(4, 3), pad=(1, 2))
    specs = (HEADS, HEADS, HEADS, WHOLE, WHOLE, HEADS, HEADS)
    actual = run_sharded(mesh_of(2, kind), args, specs)
    all_close(actual, expect(*args, causal=True))
    for name, result in zip(RESULTS, actual, strict=True):
        shard = result.addressable_shards[0].data.shape
        assert shard == (result.shape[0], result.shape[1] // 2, *result.shape[2:]), name


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tokens_do_not_split_over_devices(name):
    args = make([5, 7], [9, 5], heads=(2, 2), dims=(4, 3))
    specs = [WHOLE] * 7
    specs["qkv".index(name)] = PartitionSpec("x")
    with pytest.raises(ValueError, match=f"flash_attn_varlen_fwd: '{name}' of shape .* gathered"):
        run_sharded(mesh_of(2, AxisType.Explicit), args, specs)
    # Sharding that is not part of the types is seen by XLA's partitioner only.
    with pytest.raises(Exception, match=f"flash_attn_varlen_fwd: '{name}' of shape .* gathered"):
        run_sharded(mesh_of(2, AxisType.Auto), args, specs)


def test_one_key_head_for_split_heads():
    args = make([5, 7], [9, 6], heads=(4, 1), dims=(4, 3), pad=(1, 2))
    q, k, v, cu_q, cu_k, dout, dlse = args
    specs = (HEADS, WHOLE, WHOLE, WHOLE, WHOLE, HEADS, HEADS)
    mesh = mesh_of(2, AxisType.Explicit)
    # dk and dv are sums over all query heads, and jit has no place for a sum over devices.
    with pytest.raises(ValueError, match="flash_attn_varlen_bwd: 'q' of shape .* gathered"):
        run_sharded(mesh, args, specs)

    @jax.jit
    def split(q, k, v, dout, dlse):
        def one_device(q, k, v):
            return flash_attn_varlen_func(q, k, v, cu_q, cu_k, ANY, ANY, causal=True)

        def call(q, k, v):
            return jax.shard_map(
                one_device, mesh=mesh, in_specs=(HEADS, WHOLE, WHOLE), out_specs=(HEADS, HEADS)
            )(q, k, v)

        results, vjp = jax.vjp(call, q, k, v)
        return (*results, *vjp((dout, dlse)))

    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in ((q, HEADS), (k, WHOLE), (v, WHOLE), (dout, HEADS), (dlse, HEADS))
    ]
    with jax.set_mesh(mesh):
        all_close(split(*placed), expect(*args, causal=True))


def test_shard_map_over_batches():
    mesh = mesh_of(2, AxisType.Auto)
    args = [np.concatenate([a, a[::-1]])[:4] for a in batch_arguments()]
    along = PartitionSpec("x")

    def one_device(*args):
        return jax.vmap(functools.partial(run.__wrapped__, causal=True))(*args)

    split = jax.shard_map(one_device, mesh=mesh, in_specs=(along,) * 7, out_specs=(along,) * 5)
    actual = jax.jit(split)(*args)
    for i in range(4):
        all_close([a[i] for a in actual], expect(*(a[i] for a in args), causal=True))


# ------------------------------------------------------------------ cost


def count_products(monkeypatch, function, *args, **kwargs):
    """Matrix products made, with the loops run in Python."""
    made = []
    dot = reference._dot
    monkeypatch.setattr(reference, "_dot", lambda *a: made.append(a[0]) or dot(*a))
    with jax.disable_jit():
        function(*args, **kwargs)
    monkeypatch.setattr(reference, "_dot", dot)
    return len(made)


def test_only_visible_blocks_are_visited(monkeypatch):
    q, k, v, cu_q, cu_k, dout, dlse = make([8, 3, 0, 4], [8, 8, 8, 0], dims=(2, 2), pad=(9, 9))
    sequences = varlen_prefill._sequences(cu_q, cu_k, len(q), len(k))
    operands = {"q": q, "k": k, "v": v, "sequences": sequences}
    options = {"softmax_scale": 1.0, "block_q": 4, "block_k": 4}
    count = functools.partial(count_products, monkeypatch)
    # Tiles of 4 x 4: 2 * 2 of the first sequence, 1 * 2 of the second, none of the others.
    # Two products each.
    assert count(reference.varlen_forward, operands, causal=False, **options) == 2 * (4 + 2)
    assert count(reference.varlen_forward, operands, causal=True, **options) == 2 * (3 + 2)
    results = {"out": dout, "lse": dlse}  # whatever they are
    operands |= results | {"dout": dout, "dlse": dlse}
    # Three products a tile in the pass over queries, four in that over keys.
    assert count(reference.varlen_backward, operands, causal=False, **options) == 7 * (4 + 2)
    assert count(reference.varlen_backward, operands, causal=True, **options) == 7 * (3 + 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_products_take_the_input_dtype_and_add_up_in_float32(dtype):
    args = make_24([24], [24], dtype=dtype)
    jaxpr = jax.make_jaxpr(functools.partial(run.__wrapped__, blocks=(8, 8)))(*args)
    products = [e for e in flatten(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 2 + 7  # so P and dS are rounded like everything else
    for product in products:
        assert [x.aval.dtype for x in product.invars] == [dtype, dtype]
        assert product.outvars[0].aval.dtype == jnp.float32
        assert product.params["preferred_element_type"] == jnp.float32
        assert product.params["precision"] == (lax.Precision.HIGHEST,) * 2


def test_long_sequences_fit_in_memory():
    shape = jax.ShapeDtypeStruct
    q, k, v = (shape((16384, 128, d), jnp.bfloat16) for d in (192, 192, 128))

    def loss(q, k, v, cu):
        out, lse = flash_attn_varlen_func(q, k, v, cu, cu, ANY, ANY, causal=True)
        return out.astype(jnp.float32).sum() + lse.sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = gradient.lower(q, k, v, shape((3,), jnp.int32)).compile()
    # All scores at once would be 128 GiB. It is 2 GiB, and 6.5 with jaxlib 0.10, whose CPU backend
    # keeps float32 copies of bfloat16 arrays that a loop goes over.
    assert compiled.memory_analysis().temp_size_in_bytes < 7 * 2**30


# ------------------------------------------------------------------ implementation= and bad calls


def test_implementation():
    q, k, v, cu_q, cu_k, *_ = make([3], [4])
    call = functools.partial(flash_attn_varlen_func, q, k, v, cu_q, cu_k, ANY, ANY)
    for a, b in zip(call(), call(implementation="xla"), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(NotImplementedError, match="flash_attn_varlen_fwd: .*'cuda'"):
        call(implementation="cuda")
    with pytest.raises(NotImplementedError, match="flash_attn_varlen_fwd: .*'cuda'"):
        flash_attn_varlen_qkvpacked_func(
            np.ones((3, 1, 9), np.float32), cu_q, ANY, 4, implementation="cuda"
        )


Q = np.zeros((10, 4, 8), np.float32)
K = np.zeros((12, 2, 8), np.float32)
V = np.zeros((12, 2, 6), np.float32)
CU_Q = limits([4, 6])
CU_K = limits([5, 7])

BAD = {
    "q missing": ({"q": None}, r"'q' is missing.*\(total_q, h_q, d\)"),
    "q rank": ({"q": Q[0]}, r"'q' has shape \(4, 8\) of rank 2; expected rank 3"),
    "q list": ({"q": [1.0]}, r"'q' is a list; expected an array"),
    "q dtype": ({"q": Q.astype(np.int32)}, r"'q' has dtype int32; expected bfloat16 or float16"),
    "q float64": ({"q": Q.astype(np.float64)}, r"'q' has dtype float64; expected"),
    "k dtype": ({"k": K.astype(np.float16)}, r"'k' has dtype float16; expected float32"),
    "v dtype": ({"v": V.astype(jnp.bfloat16)}, r"'v' has dtype bfloat16; expected float32"),
    "k columns": ({"k": K[..., :7]}, r"'k' has shape \(12, 2, 7\); expected \(12, 2, 8\)"),
    "k rank": ({"k": K[:, 0]}, r"'k' has shape \(12, 8\) of rank 2; expected rank 3"),
    "v rows": ({"v": V[:11]}, r"'v' has shape \(11, 2, 6\); expected \(12, 2, 6\)"),
    "v heads": ({"v": V[:, :1]}, r"'v' has shape \(12, 1, 6\); expected \(12, 2, 6\)"),
    "v no columns": ({"v": V[..., :0]}, r"'v' has shape \(12, 2, 0\); expected at least one"),
    "no heads": ({"q": Q[:, :0]}, r"'q' has shape \(10, 0, 8\); expected at least one head"),
    "heads": ({"q": Q[:, :3]}, r"'q' has 3 heads, 'k' has 2; expected h_q to be a multiple"),
    "fewer heads": ({"q": Q[:, :1]}, r"'q' has 1 heads, 'k' has 2; expected h_q to be a multiple"),
    "cu missing": ({"cu_seqlens_qo": None}, r"'cu_seqlens_qo' is missing.*\(b\+1,\)"),
    "cu dtype": (
        {"cu_seqlens_qo": CU_Q.astype(np.int64)},
        r"'cu_seqlens_qo' has dtype int64; expected int32",
    ),
    "cu rank": ({"cu_seqlens_kv": CU_K[None]}, r"'cu_seqlens_kv' has shape \(1, 3\) of rank 2"),
    "cu sizes": (
        {"cu_seqlens_kv": CU_K[:2]},
        r"'cu_seqlens_kv' has shape \(2,\); expected \(3,\) \(b\+1=3\)",
    ),
    "cu empty": ({"cu_seqlens_qo": CU_Q[:0]}, r"'cu_seqlens_qo' has shape \(0,\); expected \(b\+1"),
    "max array": ({"max_seqlen_qo": CU_Q}, r"'max_seqlen_qo' is .*; expected a static integer"),
    "max float": ({"max_seqlen_kv": 7.0}, r"'max_seqlen_kv' is 7.0 .*; expected a static integer"),
    "max bool": ({"max_seqlen_kv": True}, r"'max_seqlen_kv' is True .*expected a static integer"),
    "max negative": ({"max_seqlen_qo": -1}, r"'max_seqlen_qo' is -1; expected an integer >= 0"),
    "scale nan": ({"softmax_scale": float("nan")}, r"'softmax_scale' is nan; expected a finite"),
    "scale array": ({"softmax_scale": np.ones(2)}, r"'softmax_scale' is a ndarray; expected"),
    "causal": ({"causal": 1}, r"'causal' is 1 of type int; expected a static bool"),
    "deterministic": ({"deterministic": None}, r"'deterministic' is None .*expected a static bool"),
    "is_varlen": ({"is_varlen": "no"}, r"'is_varlen' is 'no' .*expected a static bool"),
    "dropout": ({"dropout_p": "0"}, r"'dropout_p' is a str; expected"),
    "implementation": (
        {"implementation": "triton"},
        r"'implementation' is 'triton'; expected one of 'cuda', 'xla', None",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_call(name):
    changed, message = BAD[name]
    good = dict(q=Q, k=K, v=V, cu_seqlens_qo=CU_Q, cu_seqlens_kv=CU_K)
    good |= dict(max_seqlen_qo=6, max_seqlen_kv=7)
    flash_attn_varlen_func(**good)
    with pytest.raises(ValueError, match="^flash_attn_varlen_func: argument " + message):
        flash_attn_varlen_func(**(good | changed))


QKV = np.zeros((10, 2, 22), np.float32)
BAD_QKV = {
    "rank": ({"qkv": QKV[0]}, r"'qkv' has shape \(2, 22\) of rank 2; expected rank 3: \(t, h, 2"),
    "missing": ({"qkv": None}, r"'qkv' is missing"),
    "dtype": ({"qkv": QKV.astype(np.int8)}, r"'qkv' has dtype int8; expected"),
    "width": ({"head_dim_qk": 11}, r"'qkv' has shape \(10, 2, 22\); expected .* 2\*11 \+ dv"),
    "head_dim": ({"head_dim_qk": 0}, r"'head_dim_qk' is 0; expected an integer >= 1"),
    "cu": ({"cu_seqlens": CU_Q[None]}, r"'cu_seqlens' has shape \(1, 3\) of rank 2"),
    "max": ({"max_seqlen": None}, r"'max_seqlen' is None .*expected a static integer"),
    "uniform": ({"is_varlen": False}, r"'qkv' has 10 rows; expected at least b \* max_seqlen = 2"),
}


@pytest.mark.parametrize("name", BAD_QKV)
def test_bad_qkvpacked_call(name):
    changed, message = BAD_QKV[name]
    good = dict(qkv=QKV, cu_seqlens=CU_Q, max_seqlen=6, head_dim_qk=8)
    flash_attn_varlen_qkvpacked_func(**good)
    prefix = "^flash_attn_varlen_qkvpacked_func: argument "
    with pytest.raises(ValueError, match=prefix + message):
        flash_attn_varlen_qkvpacked_func(**(good | changed))


KV = np.zeros((12, 2, 14), np.float32)
BAD_KV = {
    "q width": ({"q": Q[..., :7]}, r"'q' has shape \(10, 4, 7\); expected \(10, 4, 8\)"),
    "q missing": ({"q": None}, r"'q' is missing"),
    "rank": ({"kv": KV[0]}, r"'kv' has shape \(2, 14\) of rank 2"),
    "dtype": ({"kv": KV.astype(np.float16)}, r"'kv' has dtype float16; expected float32"),
    "width": ({"kv": KV[..., :8]}, r"'kv' has shape \(12, 2, 8\); expected .* 8 \+ dv"),
    "heads": ({"q": Q[:, :3]}, r"'q' has 3 heads, 'kv' has 2; expected h_q to be a multiple"),
    "head_dim": ({"head_dim_qk": 8.0}, r"'head_dim_qk' is 8.0 .*expected a static integer"),
    "cu": ({"cu_seqlens_kv": CU_K[:1]}, r"'cu_seqlens_kv' has shape \(1,\); expected \(3,\)"),
    "uniform": (
        {"is_varlen": False, "max_seqlen_qo": 5},
        r"'kv' has 12 rows; expected at least b \* max_seqlen_kv = 2 \* 7 = 14",
    ),
}


@pytest.mark.parametrize("name", BAD_KV)
def test_bad_kvpacked_call(name):
    changed, message = BAD_KV[name]
    good = dict(q=Q, kv=KV, cu_seqlens_qo=CU_Q, cu_seqlens_kv=CU_K)
    good |= dict(max_seqlen_qo=6, max_seqlen_kv=7, head_dim_qk=8)
    flash_attn_varlen_kvpacked_func(**good)
    prefix = "^flash_attn_varlen_kvpacked_func: argument "
    with pytest.raises(ValueError, match=prefix + message):
        flash_attn_varlen_kvpacked_func(**(good | changed))


def test_dropout_is_not_implemented():
    good = (Q, K, V, CU_Q, CU_K, 6, 7)
    with pytest.raises(NotImplementedError, match="flash_attn_varlen_func: .*'dropout_p' is 0.1"):
        flash_attn_varlen_func(*good, 0.1)
    with pytest.raises(NotImplementedError, match="qkvpacked_func: .*'dropout_p' is 0.1"):
        flash_attn_varlen_qkvpacked_func(QKV, CU_Q, 6, 8, dropout_p=0.1)
