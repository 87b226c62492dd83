"""merge_attention_states against float64 attention over the union of the keys."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jax_flashmla import (
    PagedKVCache,
    flash_attn_varlen_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    merge_attention_states,
)

BF16, F32 = jnp.bfloat16, jnp.float32
INF = np.inf


def i32(values):
    return np.asarray(values, np.int32)


def softmax_parts(scores, values, sets):
    """float64 (out, lse) over each set of keys; scores [..., keys], values [keys, dv]."""
    parts = []
    for chosen in sets:
        some, rows = scores[..., chosen], values[chosen]
        if some.shape[-1] == 0:
            shape = scores.shape[:-1]
            parts.append((np.zeros((*shape, values.shape[1])), np.full(shape, INF)))
            continue
        top = some.max(axis=-1, keepdims=True)
        powers = np.exp(some - top)
        total = powers.sum(axis=-1, keepdims=True)
        parts.append((powers @ rows / total, (top + np.log(total))[..., 0]))
    return parts


def arranged(parts, dtype, *, batched, stacked):
    """outs and lses in a layout of the library, from [t, h] or [b, s, h] queries."""
    outs = [jnp.asarray(out, dtype) for out, _ in parts]
    lses = [jnp.asarray(lse, F32).swapaxes(-1, -2) if batched else lse for _, lse in parts]
    lses = [jnp.asarray(lse, F32) for lse in lses]
    return (jnp.stack(outs), jnp.stack(lses)) if stacked else (outs, lses)


def merge_float64(outs, lses):
    """The definition, for the packed layout; lists of arrays, NaN and empty parts included."""
    outs, lses = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    lses = np.where(np.isinf(lses), -INF, lses)
    outs = np.where(np.isneginf(lses)[..., None], 0, outs)
    top = lses.max(axis=0)
    top = np.where(np.isneginf(top), 0, top)
    total = np.exp(lses - top).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = (np.exp(lses - top)[..., None] * outs).sum(axis=0) / total[..., None]
        lse = top + np.log(total)
    nothing = total == 0
    return np.where(nothing[..., None], 0, out), np.where(nothing, INF, lse)


# --- unions ---


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_union_equals_merge(data):
    draw = data.draw
    batched, stacked = draw(st.booleans()), draw(st.booleans())
    lead = tuple(draw(st.integers(0, 3)) for _ in range(3 if batched else 2))
    keys, dv, n = draw(st.integers(0, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    deviation = draw(st.sampled_from([0.05, 3.0, 100.0]))
    offset = draw(st.sampled_from([0.0, 80.0, -500.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = deviation * rng.standard_normal((*lead, keys)) + offset
    values = rng.standard_normal((keys, dv))
    owner = rng.integers(0, n, keys)
    parts = softmax_parts(scores, values, [owner == i for i in range(n)])
    [(want_out, want_lse)] = softmax_parts(scores, values, [slice(None)])
    out, lse = merge_attention_states(*arranged(parts, F32, batched=batched, stacked=stacked))
    assert out.dtype == F32 and lse.dtype == F32
    if batched:
        lse = lse.swapaxes(-1, -2)
    # An lse in float32 has an error of its own, which is one of the weights.
    bound = 4e-7 * max(10.0, np.abs(want_lse[np.isfinite(want_lse)]).max(initial=0))
    np.testing.assert_allclose(out, want_out, atol=3 * bound, rtol=0)
    np.testing.assert_allclose(lse, want_lse, atol=bound, rtol=2e-7)


@pytest.mark.parametrize("dtype", [BF16, jnp.float16, F32])
@pytest.mark.parametrize("stacked", [False, True])
def test_result_is_rounded_once(dtype, stacked):
    """The arithmetic is in float32 whatever the type: many parts add no rounding each."""
    rng = np.random.default_rng(0)
    outs = np.asarray(jnp.asarray(rng.standard_normal((30, 4, 3, 8)), dtype), np.float64)
    lses = rng.standard_normal((30, 4, 3)).astype(np.float32)
    parts = list(zip(outs, lses, strict=True))
    got, _ = merge_attention_states(*arranged(parts, dtype, batched=False, stacked=stacked))
    want, _ = merge_float64(outs, lses)
    assert got.dtype == dtype
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1.01 * half_ulp, atol=1e-6)


# --- empty parts, NaN ---


def test_empty_parts_and_nan():
    rng = np.random.default_rng(1)
    outs = rng.standard_normal((3, 6, 2, 4)).astype(np.float32)
    lses = rng.standard_normal((3, 6, 2)).astype(np.float32)
    lses[0, 0], lses[1, 0] = INF, -INF  # one part is left
    outs[0, 0] = np.nan  # of no consequence: that part is empty
    lses[:, 1] = INF
    lses[:, 2] = -INF
    lses[:, 3], lses[1, 3] = INF, -INF
    lses[2, 4, 0] = np.nan
    outs[1, 5, 1, 2] = np.nan
    out, lse = merge_attention_states(list(outs), list(lses))
    want_out, want_lse = merge_float64(outs, lses)
    np.testing.assert_allclose(out, want_out, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-6)
    np.testing.assert_array_equal(out[0], outs[2, 0])  # its bits
    np.testing.assert_array_equal(lse[0], lses[2, 0])
    assert not np.asarray(out[1:4]).any() and np.isposinf(lse[1:4]).all()
    nan = np.zeros(out.shape, bool)
    nan[4, 0] = nan[5, 1, 2] = True
    np.testing.assert_array_equal(np.isnan(out), nan)
    nan = np.zeros(lse.shape, bool)
    nan[4, 0] = True
    np.testing.assert_array_equal(np.isnan(lse), nan)


def test_one_part_and_extreme_lses():
    out, lse = jnp.ones((2, 1, 3), BF16) / 3, jnp.asarray([[-INF], [5.0]], F32)
    got_out, got_lse = merge_attention_states([out], [lse])
    np.testing.assert_array_equal(got_out, out.at[0].set(0))
    np.testing.assert_array_equal(got_lse, [[INF], [5.0]])
    # Far apart, and near the ends of float32's range: the larger wins, nothing overflows.
    big = float(np.finfo(np.float32).max)
    outs = [jnp.full((4, 1, 1), 1.0), jnp.full((4, 1, 1), 2.0)]
    lses = [jnp.asarray([[big], [-big], [0.0], [-big]]), jnp.asarray([[-big], [big], [200.0], [0]])]
    out, lse = merge_attention_states(outs, [x.astype(F32) for x in lses])
    np.testing.assert_array_equal(out[:, 0, 0], [1, 2, 2, 2])
    np.testing.assert_array_equal(lse[:, 0], np.asarray([big, big, 200, 0], np.float32))


def test_order_does_not_matter_and_merges_nest():
    rng = np.random.default_rng(2)
    outs = list(rng.standard_normal((4, 5, 2, 3)).astype(np.float32))
    lses = list(rng.standard_normal((4, 5, 2)).astype(np.float32))
    lses[1][2] = lses[2][3] = INF
    at_once = merge_attention_states(outs, lses)
    order = operator.itemgetter(2, 0, 3, 1)
    pairs = [merge_attention_states(outs[i : i + 2], lses[i : i + 2]) for i in (0, 2)]
    nested = merge_attention_states([o for o, _ in pairs], [x for _, x in pairs])
    for other in (merge_attention_states(order(outs), order(lses)), nested):
        for a, b in zip(at_once, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


# --- through the library's operations ---


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("deviation", [0.05, 3.0])
def test_decode_over_two_halves_of_a_cache(dtype, deviation):
    rng = np.random.default_rng(3)
    b, s_q, h, d, dv, page = 4, 3, 5, 32, 24, 8
    lengths, cut = i32([48, 20, 16, 3]), 16  # the last two have nothing in the second half
    kv = jnp.asarray(rng.standard_normal((b, 48, 1, d)), dtype)
    q = jnp.asarray(deviation * rng.standard_normal((b, s_q, h, d)), dtype)
    cache, table = PagedKVCache.from_sequences(kv, page)
    whole = flash_mla_with_kvcache(q, cache, table, lengths, dv, softmax_scale=0.3)
    parts = [
        flash_mla_with_kvcache(q, cache, columns, rest, dv, softmax_scale=0.3)
        for columns, rest in (
            (table[:, : cut // page], np.minimum(lengths, cut)),
            (table[:, cut // page :], np.maximum(lengths - cut, 0)),
        )
    ]
    assert np.isposinf(parts[1][1][2:]).all()
    out, lse = merge_attention_states(*zip(*parts, strict=True))
    rounding = {"rtol": 2e-2, "atol": 2e-2} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(out.astype(F32), whole[0].astype(F32), **rounding)
    np.testing.assert_allclose(lse, whole[1], rtol=1e-5, atol=1e-5)


def test_chunk_of_a_prompt_on_top_of_cached_context():
    """varlen over the chunk, causal, and decode over the cache give varlen over everything."""
    rng = np.random.default_rng(4)
    cached, chunk = np.array([24, 0, 9]), 4
    h, d, dv, page = 3, 16, 16, 8
    kv = [rng.standard_normal((n + chunk, 1, d)).astype(np.float32) for n in cached]
    q = rng.standard_normal((len(kv) * chunk, h, d)).astype(np.float32)
    limits_q = i32(chunk * np.arange(len(kv) + 1))
    packed = np.concatenate(kv)
    limits_k = i32(np.concatenate([[0], np.cumsum(cached + chunk)]))
    whole = flash_attn_varlen_func(
        q, packed, packed[..., :dv], limits_q, limits_k, chunk, 28, causal=True
    )
    new = np.concatenate([x[-chunk:] for x in kv])
    on_chunk = flash_attn_varlen_func(
        q, new, new[..., :dv], limits_q, limits_q, chunk, chunk, causal=True
    )
    padded = np.stack([np.pad(x[:-chunk], ((0, 28 - len(x)), (0, 0), (0, 0))) for x in kv])
    cache, table = PagedKVCache.from_sequences(jnp.asarray(padded), page)
    out, lse = flash_mla_with_kvcache(
        q.reshape(len(kv), chunk, h, d), cache, table, i32(cached), dv
    )
    on_cache = out.reshape(-1, h, dv), lse.swapaxes(1, 2).reshape(-1, h)
    merged = merge_attention_states(*zip(on_chunk, on_cache, strict=True))
    for got, want in zip(merged, whole, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_sparse_prefill_over_divided_indices():
    rng = np.random.default_rng(5)
    q = jnp.asarray(rng.standard_normal((6, 2, 512)), F32)
    kv = jnp.asarray(rng.standard_normal((20, 1, 512)), F32)
    indices = i32(rng.permuted(np.tile(np.arange(20), (6, 1)), axis=1)[:, None, :12])
    indices[3, 0, 5:] = -1  # nothing in the second part
    attend = functools.partial(flash_mla_sparse_fwd, q, kv, sm_scale=0.05)
    whole_out, _, whole_lse = attend(indices=indices)
    parts = [attend(indices=part) for part in (indices[..., :5], indices[..., 5:])]
    out, lse = merge_attention_states([p[0] for p in parts], [p[2] for p in parts])
    np.testing.assert_allclose(out, whole_out, atol=1e-5)
    np.testing.assert_allclose(lse, whole_lse, atol=1e-5)


def test_sink_after_the_merge():
    """What the docstring says about attn_sink."""
    rng = np.random.default_rng(6)
    b, h, d, page = 2, 3, 16, 4
    kv = jnp.asarray(rng.standard_normal((b, 8, 1, d)), F32)
    cache, table = PagedKVCache.from_sequences(kv, page)
    q = jnp.asarray(rng.standard_normal((b, 1, h, d)), F32)
    sink = jnp.asarray([0.5, -INF, INF], F32)
    want, _ = flash_mla_with_kvcache(q, cache, table, i32([8, 7]), d, attn_sink=sink)
    parts = [
        flash_mla_with_kvcache(q, cache, table[:, i : i + 1], lengths, d)
        for i, lengths in enumerate((i32([4, 4]), i32([4, 3])))
    ]
    out, lse = merge_attention_states(*zip(*parts, strict=True))
    got = out * jax.nn.sigmoid(jnp.swapaxes(lse, 1, 2)[..., None] - sink[:, None])
    np.testing.assert_allclose(got, want, atol=1e-5)


# --- gradients ---


def example(seed=7):
    rng = np.random.default_rng(seed)
    outs = rng.standard_normal((3, 4, 2, 3)).astype(np.float32)
    lses = 2 * rng.standard_normal((3, 4, 2)).astype(np.float32)
    lses[0, 1] = INF
    lses[1:, 1, 0] = -INF
    lses[:, 2] = INF
    outs[0, 1] = np.nan  # in an empty part
    weights = rng.standard_normal((4, 2, 3)), rng.standard_normal((4, 2))
    return outs, lses, weights


def loss(merge, outs, lses, weights, xp=jnp):
    """A number that depends on out and, where it is finite, on lse."""
    out, lse = merge(outs, lses)
    finite = xp.isfinite(lse)
    return (out * weights[0]).sum() + (xp.where(finite, lse, 0) * weights[1]).sum()


@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_against_finite_differences(stacked):
    outs, lses, weights = example()
    arguments = (outs, lses) if stacked else (list(outs), list(lses))
    gradient = jax.jit(jax.grad(functools.partial(loss, merge_attention_states), argnums=(0, 1)))
    got = [np.asarray(g) for g in gradient(*arguments, weights)]
    for argument, result in enumerate(got):
        assert np.isfinite(result).all()
        want = np.zeros(result.shape)
        for place in np.ndindex(result.shape):
            if np.isinf(lses[place[:3]]):
                continue  # an empty part has no derivative
            ends = []
            for step in (1e-6, -1e-6):
                moved = [outs.astype(np.float64), lses.astype(np.float64)]
                moved[argument][place] += step
                ends.append(loss(merge_float64, *moved, weights, np))
            want[place] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(result, want, atol=2e-6, rtol=1e-5)


def test_gradient_is_nan_only_where_the_result_is():
    outs, lses, weights = example()
    lses[1, 3, 1] = np.nan
    gradient = jax.grad(functools.partial(loss, merge_attention_states), argnums=(0, 1))
    d_outs, d_lses = gradient(jnp.asarray(outs), jnp.asarray(lses), weights)
    assert np.isnan(d_outs[:, 3, 1]).any()
    for result in (d_outs, d_lses):
        rest = np.asarray(result).copy()
        rest[:, 3, 1] = 0
        assert np.isfinite(rest).all()


def test_gradients_through_attention():
    """Differentiating attention over parts is differentiating attention over everything."""
    rng = np.random.default_rng(8)
    q, k, v = (jnp.asarray(rng.standard_normal((n, 2, 8)), F32) for n in (5, 12, 12))
    cut = 7

    def attend(q, k, v):
        limits = i32([0, len(q)]), i32([0, len(k)])
        return flash_attn_varlen_func(q, k, v, *limits, len(q), len(k))

    def merged(q, k, v):
        parts = [attend(q, k[:cut], v[:cut]), attend(q, k[cut:], v[cut:]), attend(q, k[:0], v[:0])]
        return merge_attention_states(*zip(*parts, strict=True))

    weights = rng.standard_normal((5, 2, 8)), rng.standard_normal((5, 2))

    def scalar(function, *arguments):
        out, lse = function(*arguments)
        return (out * weights[0]).sum() + (lse * weights[1]).sum()

    got, want = (
        jax.grad(functools.partial(scalar, f), argnums=(0, 1, 2))(q, k, v) for f in (merged, attend)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# --- transformations ---


def test_vmap():
    rng = np.random.default_rng(9)
    outs = jnp.asarray(rng.standard_normal((2, 5, 4, 3, 6)), F32)  # [parts, vmapped, t, h, dv]
    lses = jnp.asarray(rng.standard_normal((2, 5, 4, 3)), F32)
    merge = jax.vmap(merge_attention_states, in_axes=(1, 1), out_axes=1)
    got = merge(outs, lses)
    shared = jax.vmap(
        lambda out, lse: merge_attention_states([out, outs[1, 0]], [lse, lses[1, 0]])
    )(outs[0], lses[0])
    for i in range(5):
        want = merge_attention_states(outs[:, i], lses[:, i])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a[:, i], b, rtol=1e-6)
        want = merge_attention_states([outs[0, i], outs[1, 0]], [lses[0, i], lses[1, 0]])
        for a, b in zip(shared, want, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    kind = jax.sharding.AxisType.Auto
    return jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices()[:4])


def test_shard_map_over_queries(mesh):
    rng = np.random.default_rng(10)
    outs = jnp.asarray(rng.standard_normal((3, 8, 2, 6)), F32)
    lses = jnp.asarray(rng.standard_normal((3, 8, 2)), F32)
    want = merge_attention_states(outs, lses)
    split = jax.shard_map(
        merge_attention_states, mesh=mesh, in_specs=P(None, "x"), out_specs=P("x")
    )
    for got in (split(outs, lses), jax.jit(split)(outs, lses)):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_shard_map_with_a_part_that_all_devices_share(mesh):
    """One part varies over the devices and the other does not; gradients too."""
    rng = np.random.default_rng(11)
    one, other = (jnp.asarray(rng.standard_normal((4, 2, 6)), F32) for _ in range(2))
    lse, other_lse = (jnp.asarray(rng.standard_normal((4, 2)), F32) for _ in range(2))

    def merge(one, lse, other, other_lse):
        return merge_attention_states([one, other], [lse, other_lse])

    split = jax.shard_map(
        merge, mesh=mesh, in_specs=(P(None, "x"), P(None, "x"), P(), P()), out_specs=P(None, "x")
    )

    def total(function, *arguments):
        out, lse = function(*arguments)
        return (out**2).sum() + (lse**3).sum()

    wide, wide_lse = (jnp.tile(x, (1, 4, 1)[: x.ndim]) for x in (one, lse))

    def unsplit(one, lse, other, other_lse):
        return merge(one, lse, *(jnp.tile(x, (1, 4, 1)[: x.ndim]) for x in (other, other_lse)))

    results = []
    for function in (split, unsplit):
        value = jax.value_and_grad(functools.partial(total, function), argnums=(0, 1, 2, 3))
        results.append(jax.jit(value)(wide, wide_lse, other, other_lse))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), *results)


def test_sequence_over_devices(mesh):
    """docs/decoding.md: each device attends to the pages it holds; one of them holds nothing."""
    rng = np.random.default_rng(12)
    b, h, d, page, columns = 2, 3, 16, 4, 2
    lengths = i32([32, 19])
    kv = jnp.asarray(rng.standard_normal((b, 32, 1, d)), F32)
    q = jnp.asarray(rng.standard_normal((b, 1, h, d)), F32)
    cache, table = PagedKVCache.from_sequences(kv, page)
    want = flash_mla_with_kvcache(q, cache, table, lengths, d)

    def attend(q, cache, lengths):
        first = jax.lax.axis_index("x") * columns * page
        here = jnp.clip(lengths - first, 0, columns * page)
        local = jnp.arange(b * columns, dtype=jnp.int32).reshape(b, columns)
        part = flash_mla_with_kvcache(q, cache, local, here, d)
        return merge_attention_states(*(jax.lax.all_gather(x, "x") for x in part))

    # Pages in the order of the devices: device i has columns 2 i and 2 i + 1 of both requests.
    order = table.reshape(b, 4, columns).swapaxes(0, 1).reshape(-1)
    pages = PagedKVCache.from_array(cache.data[order])
    got = jax.shard_map(
        attend, mesh=mesh, in_specs=(P(), P("x"), P()), out_specs=P(), check_vma=False
    )(q, pages, lengths)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# --- errors ---

OUT, LSE = np.zeros((4, 2, 3), np.float32), np.zeros((4, 2), np.float32)
WIDE, WIDE_LSE = np.zeros((2, 4, 3, 5), np.float32), np.zeros((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    "outs,lses,text",
    [
        ([], [], "'outs' has 0 parts, 'lses' has 0; expected as many of both, at least one"),
        ([OUT], [LSE, LSE], "'outs' has 1 parts, 'lses' has 2"),
        (np.zeros((0, 4, 2, 3)), np.zeros((0, 4, 2)), "has 0 parts"),
        (OUT, LSE, r"'outs\[0\]' has shape \(2, 3\); expected \(t, h_q, dv\) or"),
        (np.float32(0), [LSE], r"'outs' has shape \(\)"),
        (None, [LSE], "'outs' is missing"),
        ([OUT, 1], [LSE, LSE], r"'outs\[1\]' is a int"),
        ([OUT, None], [LSE, LSE], r"'outs\[1\]' is missing"),
        ([OUT, OUT[:3]], [LSE, LSE[:3]], r"'outs\[1\]' has shape \(3, 2, 3\); expected \(4, 2, 3"),
        ([OUT, WIDE], [LSE, WIDE_LSE], r"'outs\[1\]' has shape \(2, 4, 3, 5\)"),
        ([OUT], [LSE.T], r"'lses\[0\]' has shape \(2, 4\); expected \(4, 2\) \(t=4, h_q=2\)"),
        # Tokens before heads, as other libraries have it.
        (
            [WIDE],
            [WIDE_LSE.swapaxes(1, 2)],
            r"'lses\[0\]' has shape \(2, 4, 3\); expected \(2, 3, 4",
        ),
        ([OUT], [LSE.astype(np.float16)], r"'lses\[0\]' has dtype float16; expected float32"),
        ([OUT.astype(np.int32)], [LSE], r"'outs\[0\]' has dtype int32; expected bfloat16"),
        ([OUT, OUT.astype(np.float16)], [LSE, LSE], r"'outs\[1\]' has dtype float16; expected fl"),
    ],
)
def test_bad_calls(outs, lses, text):
    with pytest.raises(ValueError, match=f"^merge_attention_states: argument .*{text}"):
        merge_attention_states(outs, lses)
