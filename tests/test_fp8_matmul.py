"""``fp8_matmul=True`` without a GPU: what XLA makes of it, transformations, and its oracle.

test_bad_calls.py has the calls that are refused, gpu/test_gpu_fp8_matmul.py the kernels.
"""

import dataclasses
import functools
import re

import cases
import fp8_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sparse_cases
from cases import DenseCase, SparseCase
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_flashmla
from jax_flashmla import _cuda, _dispatch, _folding
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.flax import MLAConfig, core

BOTH = pytest.mark.parametrize("kind", ["dense", "sparse"])


@functools.cache
def built(kind):
    """A small problem over V3.2 caches; not to be changed."""
    if kind == "dense":
        case = DenseCase("small", 3, 0, 4, s_q=2, page_size=16, causal=True, lengths=(40, 0, 17))
        return sparse_cases.build_fp8_dense(case)
    case = SparseCase(
        "small",
        3,
        40,
        4,
        s_q=2,
        slots=64,
        page_size=16,
        cache_format="fp8_v32",
        scales="arbitrary",
        topk_length=True,
        extra_topk=9,
        extra_slots=32,
        attn_sink=True,
    )
    return cases.build_sparse(case)


def split(kind):
    """The arrays of a call, and a function of them that makes it."""
    inputs = built(kind)
    call = inputs.call() if kind == "dense" else sparse_cases.public_call(inputs)
    arrays = {name: jnp.asarray(x) for name, x in call.items() if isinstance(x, np.ndarray)}
    static = {name: x for name, x in call.items() if name not in arrays}

    def function(arrays, fp8_matmul=True, **changes):
        return flash_mla_with_kvcache(**arrays, **static | changes, fp8_matmul=fp8_matmul)

    return arrays, function


def same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def flags_of(jaxpr, name="fp8_matmul"):
    """This flag of every decode operation in a jaxpr, inner ones included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.endswith("_decode"):
            found.append(dict(eqn.params["static"])[name])
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += flags_of(inner, name)
    return found


# ------------------------------------------------------------------ on XLA


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_xla_computes_as_without_it(kind, dtype):
    arrays, function = split(kind)
    arrays = arrays | {"q": arrays["q"].astype(dtype)}
    want = jax.jit(functools.partial(function, fp8_matmul=False))(arrays)
    same_bits(jax.jit(function)(arrays), want)
    same_bits(jax.jit(functools.partial(function, implementation="xla"))(arrays), want)
    shapes = jax.eval_shape(function, arrays)
    assert [(s.shape, s.dtype) for s in shapes] == [(x.shape, x.dtype) for x in want]
    if dtype == "bfloat16":
        oracle.check_decode(f"{kind}_decode", built(kind), [np.asarray(x) for x in want])


def test_in_every_form_of_cache():
    arrays, function = split("dense")
    want = function(arrays)
    data = arrays.pop("k_cache")
    for cache in (data.view(jnp.float8_e4m3fn), PagedKVCache(data, "fp8_v32", 16)):
        same_bits(function(arrays | {"k_cache": cache}), want)


@BOTH
def test_a_numpy_bool_is_a_bool(kind):
    arrays, function = split(kind)
    jaxpr = jax.make_jaxpr(functools.partial(function, fp8_matmul=np.bool_(True)))(arrays)
    assert flags_of(jaxpr.jaxpr) == [True]


# ------------------------------------------------------------------ transformations


@BOTH
def test_vmap_keeps_it(kind):
    arrays, function = split(kind)
    queries = arrays | {"q": jnp.stack([arrays["q"]] * 2)}
    axes = ({name: 0 if name == "q" else None for name in arrays},)
    for fp8_matmul in (False, True):
        mapped = jax.vmap(functools.partial(function, fp8_matmul=fp8_matmul), axes)
        assert flags_of(jax.make_jaxpr(mapped)(queries).jaxpr) == [fp8_matmul]
    got = [np.asarray(x) for x in jax.jit(mapped)(queries)]
    for i in range(2):
        oracle.check_decode(f"{kind}_decode", built(kind), [x[i] for x in got])


@BOTH
def test_vmap_that_loops_keeps_it(kind, monkeypatch):
    monkeypatch.setattr(_folding, "_MAX_INT32", 1)
    arrays, function = split(kind)
    axes = ({name: 0 if name == "k_cache" else None for name in arrays},)
    caches = arrays | {"k_cache": jnp.stack([arrays["k_cache"]] * 2)}
    jaxpr = jax.make_jaxpr(jax.vmap(function, axes))(caches).jaxpr
    assert "scan" in [eqn.primitive.name for eqn in jaxpr.eqns]
    assert flags_of(jaxpr) == [True]


@BOTH
def test_derivatives_name_the_operation(kind):
    arrays, function = split(kind)

    def loss(q):
        return function(arrays | {"q": q})[0].astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match=f"flash_mla_{kind}_decode: derivatives"):
        jax.grad(loss)(arrays["q"])


def on_mesh(kind, arrays, axis_type):
    """The arrays with the heads of q over two devices, and the mesh."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,), devices=jax.devices("cpu")[:2])
    specs = {name: P(None, None, "x") if name == "q" else P() for name in arrays}
    specs |= {name: P("x") for name in arrays if name == "attn_sink"}
    return mesh, specs


@BOTH
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_calls(kind, axis_type):
    arrays, function = split(kind)
    mesh, specs = on_mesh(kind, arrays, axis_type)
    placed = {
        name: jax.device_put(x, jax.sharding.NamedSharding(mesh, specs[name]))
        for name, x in arrays.items()
    }
    with jax.set_mesh(mesh):
        got = [np.asarray(x) for x in jax.jit(function)(placed)]
    oracle.check_decode(f"{kind}_decode", built(kind), got)


def exported_text(function, arrays, targets):
    """The module that is exported for CUDA."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in targets]
    exported = jax.export.export(jax.jit(function), platforms=("cuda",), disabled_checks=checks)
    exported = exported(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays))
    return jax.export.deserialize(exported.serialize()).mlir_module()


@BOTH
@pytest.mark.parametrize("fp8_matmul", [False, True])
@pytest.mark.parametrize("how", ["plain", "vmap", "shard_map"])
def test_the_kernels_are_told(monkeypatch, kind, fp8_matmul, how):
    """The attribute of the FFI call, in a call alone, in a larger one, and in that of a device."""
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [])
    arrays, function = split(kind)
    function = functools.partial(function, fp8_matmul=fp8_matmul)
    if how == "vmap":
        arrays = arrays | {"q": jnp.stack([arrays["q"]] * 2)}
        function = jax.vmap(function, ({name: 0 if name == "q" else None for name in arrays},))
    elif how == "shard_map":
        mesh, specs = on_mesh(kind, arrays, AxisType.Auto)
        out_specs = P(None, None, "x"), P(None, "x")
        function = jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=out_specs)
    target = f"flashmla_{kind}_decode"
    text = exported_text(function, arrays, ("flashmla_metadata", target))
    (line,) = (x for x in text.splitlines() if f"@{target}(" in x)
    assert re.search(r"fp8_matmul = (\w+)", line)[1] == str(fp8_matmul).lower()


@BOTH
def test_explain(kind, monkeypatch):
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [])
    inputs = built(kind)
    call = inputs.call() if kind == "dense" else sparse_cases.public_call(inputs)
    without, within = (
        jax_flashmla.explain(flash_mla_with_kvcache, **call, fp8_matmul=flag)
        for flag in (False, True)
    )
    assert str(within) == str(without) and within.implementation == "xla"
    call = call | {"q": call["q"].astype(np.float32)}
    text = str(jax_flashmla.explain(flash_mla_with_kvcache, **call, fp8_matmul=True))
    assert "not cuda: q has dtype float32" in text


@BOTH
def test_the_kernels_take_it(kind):
    """What declines is the same with it."""
    declines = {"dense": _cuda.dense_decode_declines, "sparse": _cuda.sparse_decode_declines}[kind]
    operation = {"dense": jax_flashmla.decode.dense_operation}
    operation["sparse"] = jax_flashmla.decode.sparse_operation
    shape = jax.ShapeDtypeStruct
    operands = dict.fromkeys(operation[kind].operands) | {
        "q": shape((2, 1, 128, 576), jnp.bfloat16),
        "k_cache": shape((6, 53, 1, 656), jnp.uint8),
        "block_table": shape((2, 3), jnp.int32),
        "indices": shape((2, 1, 100), jnp.int32),
    }
    static = {"cache_format": "fp8_v32", "page_size": 53, "extra_page_size": None}
    for fp8_matmul in (False, True):
        assert declines(operands, head_dim_v=512, fp8_matmul=fp8_matmul, **static) is None
        reason = declines(operands, head_dim_v=256, fp8_matmul=fp8_matmul, **static)
        assert "head_dim_v=256" in reason


# ------------------------------------------------------------------ layers


LAYER = MLAConfig(
    hidden_size=64,
    num_heads=4,
    kv_lora_rank=512,
    qk_nope_head_dim=16,
    qk_rope_head_dim=64,
    v_head_dim=12,
    dtype="bfloat16",
    param_dtype="bfloat16",
)


def layer_step(cache, **options):
    """A function of x that decodes a token of two requests."""
    params = core.init_params(jax.random.key(0), LAYER)
    table = jnp.array([[0, 1], [2, -1]], jnp.int32)
    positions = jnp.array([[9], [3]], jnp.int32)
    return lambda x: core.decode(params, x, positions, cache, table, config=LAYER, **options)[0]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_layers_pass_it_on(sparse):
    cache = core.empty_cache(LAYER, 4, 8, format="fp8_v32")
    x = jnp.ones((2, 1, 64), jnp.bfloat16)
    options = {"indices": jnp.array([[[9, 0]], [[19, -1]]], jnp.int32)} if sparse else {}
    names = ("fp8_matmul", "power_of_two_scales")
    for given in ((), *((name,) for name in names), names):
        more = dict.fromkeys(given, True)
        jaxpr = jax.make_jaxpr(layer_step(cache, **options, **more))(x)
        for name in names:
            assert flags_of(jaxpr.jaxpr, name) == [name in given]


def test_layers_over_plain_caches_refuse_it():
    cache = core.empty_cache(LAYER, 4, 8)
    with pytest.raises(ValueError, match="'fp8_matmul' is True, but 'k_cache' is a bfloat16 cache"):
        layer_step(cache, fp8_matmul=True)(jnp.ones((2, 1, 64), jnp.bfloat16))


# ------------------------------------------------------------------ the oracle


def test_rounding_to_e4m3():
    """Every value to itself, what lies between two of them to the nearer one, ties to even."""
    values = oracle._E4M3[:127]  # 0 to 448, ascending
    assert (np.diff(values) > 0).all() and values[-1] == 448
    np.testing.assert_array_equal(fp8_oracle.to_e4m3(values), values)
    middles = (values[:-1] + values[1:]) / 2
    np.testing.assert_array_equal(fp8_oracle.to_e4m3(middles), values[np.arange(1, 127) // 2 * 2])
    for nudge, want in ((1 - 1e-6, values[:-1]), (1 + 1e-6, values[1:])):
        np.testing.assert_array_equal(fp8_oracle.to_e4m3(-nudge * middles), -want)
    np.testing.assert_array_equal(fp8_oracle.to_e4m3([1e9, -1e9]), [448, -448])


def test_rounded_queries():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((6, 512)) * np.array([1, 1e-20, 1e20, 3, 1, 0])[:, None]
    q[4, 1:] *= 1e-7  # of one large column the rest is nothing
    got = fp8_oracle.rounded_queries(q)
    share = np.abs(got[:4] - q[:4]) / np.abs(q[:4])
    tiny = np.abs(q[:4]) < 2.0**-13 * np.abs(q[:4]).max(axis=1, keepdims=True)
    assert (share[~tiny] <= 2.0**-4).all()
    assert 0.025 < np.sqrt(np.square(share[~tiny]).mean()) < 0.028  # 2.65e-2
    assert (got[4, 1:] == 0).all() and got[4, 0] != 0 and (got[5] == 0).all()


def test_oracle_without_rounding_is_the_other_oracle(monkeypatch):
    monkeypatch.setattr(fp8_oracle, "rounded_queries", lambda latent: latent)
    for kind, model in (("dense", fp8_oracle.dense_decode), ("sparse", fp8_oracle.sparse_decode)):
        inputs = built(kind)
        found, (out, lse) = model(inputs), inputs.expected()
        # The other one rounds keys to bfloat16.
        oracle.check_norm(kind, "out", found.out, out, bound=3e-3)
        oracle.check_norm(kind, "lse", found.lse, lse, bound=1e-4)


BUGS = {
    "scores of another tile's scales": "flat",
    "no RoPE columns": "peaked3",
    "values of another tile's scales": "flat",
    "a lost token": "flat",
    "queries without their scale": "flat",
    "queries rounded otherwise": "peaked3",
    "weights cut off": "flat",
    "weights of four bits range": "peaked3",
    "sum of rounded weights": "peaked3",
}


def emulated(inputs, bug=None):
    """What a kernel may give: weights times scales rounded to e4m3, all keys at once."""
    case = inputs.case
    b, s_q, h_q, _ = inputs.q.shape
    assert s_q == 1 and not case.causal and inputs.attn_sink is None
    out, lse = np.zeros((b, s_q, h_q, 512)), np.full((b, h_q, s_q), np.inf)
    to_e4m3 = fp8_oracle.to_e4m3
    for r in range(b):
        length, page_size = int(inputs.cache_seqlens[r]), inputs.data.shape[1]
        if length == 0:
            continue
        pages = inputs.block_table[r][: -(-length // page_size)]
        rows = inputs.data[pages].reshape(-1, 656)[:length]
        codes = oracle._E4M3[rows[:, :512]].reshape(length, 4, 128)
        scales = rows[:, 512:528].copy().view("<f4")
        rope = rows[:, 528:].copy().view(oracle.BFLOAT16).astype(np.float64)
        q = inputs.q[r, 0].astype(np.float64)
        unit = np.exp2(7 - np.floor(np.log2(np.abs(q[:, :512]).max(axis=1, keepdims=True))))
        if bug == "queries rounded otherwise":
            unit *= 1.3
        latent = to_e4m3(q[:, :512] * unit) / (1 if bug == "queries without their scale" else unit)
        scale_of = scales[:, ::-1] if bug == "scores of another tile's scales" else scales
        keys = (codes * scale_of[:, :, None]).reshape(length, 512)
        scores = latent @ keys.T
        if bug != "no RoPE columns":
            scores += q[:, 512:] @ rope.T
        scores *= case.softmax_scale
        top = scores.max(axis=1, keepdims=True)
        weights = 16 * np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        lse[r, :, 0] = (top + np.log(total / 16))[:, 0]
        if bug == "a lost token":
            weights[:, length // 2] = 0
        if bug == "sum of rounded weights":
            total = to_e4m3(weights / 2).sum(axis=1, keepdims=True)
        scale_of = scales[:, ::-1] if bug == "values of another tile's scales" else scales
        for tile in range(4):
            reference = np.exp2(np.ceil(np.log2(scale_of[:, tile].max())))
            product = weights * scale_of[:, tile] / reference
            rounded = to_e4m3(product)
            if bug == "weights cut off":
                rounded = np.where(rounded > product, to_e4m3(product * (1 - 2.0**-4)), rounded)
            elif bug == "weights of four bits range":
                rounded = np.where(product < 1, 0, rounded)
            values = rounded @ codes[:, tile] * reference / total
            out[r, 0, :, fp8_oracle.TILES[tile]] = values
    return out.astype(cases.BFLOAT16), lse.astype(np.float32)


@functools.cache
def judged(scores, scales="arbitrary"):
    case = DenseCase(f"judged-{scores}", 4, 0, 8, lengths=(300, 0, 70, 1), scores=scores)
    inputs = sparse_cases.build_fp8_dense(case, scales=scales)
    return inputs, fp8_oracle.dense_decode(inputs)


@pytest.mark.parametrize("scales", ["power", "arbitrary"])
@pytest.mark.parametrize("scores", ["flat", "peaked3", "peaked10", "rising"])
def test_bounds_hold_for_rounded_weights(scores, scales):
    inputs, expected = judged(scores, scales)
    fp8_oracle.check(expected, emulated(inputs), scores)
    assert expected.many[0].all() == (scores == "flat") == expected.many[0].any()


@pytest.mark.parametrize("bug", BUGS)
def test_bounds_are_not_too_wide(bug):
    inputs, expected = judged(BUGS[bug])
    with pytest.raises(AssertionError, match="judged.*(out of bounds|norm of the error)"):
        fp8_oracle.check(expected, emulated(inputs, bug), "judged")


def test_what_is_not_finite():
    """NaN, of whole rows and whole requests, and where there is nothing to attend to."""
    inputs, expected = judged("flat")
    page = inputs.block_table[0, 1]
    for byte, value in ((0, b"\x7f"), (512, b"\x00\x00\x80\x7f"), (530, b"\xc0\xff")):
        data = inputs.data.copy()
        data[page, 3, 0, byte : byte + len(value)] = np.frombuffer(value, np.uint8)
        found = fp8_oracle.dense_decode(inputs.with_data(data))
        assert np.isnan(found.out[0]).all() and np.isnan(found.lse[0]).all()
        np.testing.assert_array_equal(found.out[1:], expected.out[1:])
        with pytest.raises(AssertionError, match="NaN"):
            fp8_oracle.check(found, emulated(inputs), "judged")
    q = inputs.q.copy()
    q[0, 0, 3, 570], q[2, 0, 5, 0] = np.nan, np.inf
    found = fp8_oracle.dense_decode(dataclasses.replace(inputs, q=q))
    assert np.argwhere(np.isnan(found.lse[..., 0])).tolist() == [[0, 3], [2, 5]]
    assert np.argwhere(np.isnan(found.out).any(axis=-1)[:, 0]).tolist() == [[0, 3], [2, 5]]
    assert (expected.out[1] == 0).all() and np.isposinf(expected.lse[1]).all()
    picked = expected.pick([2, 1])
    np.testing.assert_array_equal(picked.lse, expected.lse[[2, 1]])
