"""Operation, with toy operations small enough to compute by hand."""

import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import _dispatch, _ffi
from jax_flashmla._primitive import Operation

SCALE = 2.0


def lookup_abstract(operands, *, scale):
    q = operands["q"]
    return (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((q.shape[1], q.shape[0]), jnp.float32),
    )


def lookup_reference(operands, *, scale):
    """out[b, h] = scale * q[b, h] + sum(cache[table[b]]) + sink[h]; total[h, b] = sum(out)."""
    q, sink = operands["q"], operands["sink"]
    zeros = jnp.asarray(np.zeros(q.shape[-1], np.float32))  # an array constant
    out = scale * q + operands["cache"][operands["table"]].sum(-1)[:, None, None] + zeros
    if sink is not None:
        out = out + (sink[None] if sink.ndim == 1 else sink)[..., None]
    if operands["plan"] is not None:  # made for one batch size; wrong for any other
        out = jnp.where(operands["plan"][0] == q.shape[0], out, jnp.nan)
    return out.astype(q.dtype), out.sum(-1, dtype=jnp.float32).T


def lookup_fold(operands, batched, size, static):
    if batched["cache"]:
        return None
    b = operands["q"].shape[batched["q"]]

    def merge(name):
        x = operands[name]
        x = x if batched[name] else jnp.broadcast_to(x, (size, *x.shape))
        return x.reshape(size * b, *x.shape[2:])

    folded = {"q": merge("q"), "table": merge("table"), "cache": operands["cache"]}
    if operands["plan"] is not None:  # Operation leaves it out
        folded["plan"] = operands["plan"]
    sink = operands["sink"]
    if sink is not None:
        if batched["sink"]:
            sink = jnp.repeat(sink, b, axis=0) if sink.ndim == 2 else merge("sink")
        elif sink.ndim == 2:
            sink = merge("sink")
        folded["sink"] = sink

    def unfold(results):
        out, total = results
        return (
            out.reshape(size, b, *out.shape[1:]),
            jnp.moveaxis(total.reshape(-1, size, b), 1, 0),
        )

    return folded, static, unfold


DIMS = {
    "q": "b h d",
    "cache": "page column",
    "table": "b",
    "sink": "h | b h",
    "plan": "entry",
    "out": "b h d",
    "total": "h b",
}


def make_lookup(**kwargs):
    parameters = {
        "name": "toy_lookup",
        "operands": ("q", "cache", "table", "sink", "plan"),
        "results": ("out", "total"),
        "abstract": lookup_abstract,
        "reference": lookup_reference,
        "dims": DIMS,
        "fold": lookup_fold,
        "split": ("b", "h"),
        "keep_whole": ("cache",),
        "drop_when_split": ("plan",),
    }
    return Operation(**(parameters | kwargs))


LOOKUP = make_lookup()
LOOKUP_LOOP = make_lookup(fold=None)


def lookup(q, cache, table, sink=None, plan=None, *, op=LOOKUP, implementation=None):
    operands = {"q": q, "cache": cache, "table": table, "sink": sink, "plan": plan}
    return op(operands, implementation=implementation, scale=SCALE)


def expected(q, cache, table, sink=None):
    """The definition again, in numpy."""
    out = SCALE * q + cache[table].sum(-1)[..., None, None]
    if sink is not None:
        out = out + sink[..., None]
    return out, out.sum(-1).swapaxes(-1, -2)


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((8, 4, 6), np.float32),
        "cache": rng.standard_normal((16, 4), np.float32),
        "table": rng.permutation(16)[:8].astype(np.int32),
        "sink": rng.standard_normal(4, np.float32),
    }


def check(results, reference, **kwargs):
    for got, want in zip(results, reference, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, **kwargs)


# ------------------------------------------------------------------ one device


def test_eager_and_jit(operands):
    want = expected(**operands)
    check(lookup(**operands), want)
    check(jax.jit(lookup)(**operands), want)
    without_sink = {k: v for k, v in operands.items() if k != "sink"}
    check(jax.jit(lookup)(**without_sink), expected(**without_sink))


def test_one_equation_in_the_jaxpr(operands):
    jaxpr = jax.make_jaxpr(lookup)(**operands)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["toy_lookup"]


def test_eval_shape_and_aot(operands):
    out, total = jax.eval_shape(lookup, **operands)
    assert (out.shape, out.dtype) == ((8, 4, 6), jnp.float32)
    assert (total.shape, total.dtype) == ((4, 8), jnp.float32)
    compiled = jax.jit(lookup).lower(**operands).compile()
    check(compiled(**operands), expected(**operands))


def test_unknown_operand_and_missing_dims():
    with pytest.raises(TypeError, match="no operand is called"):
        LOOKUP({"k": jnp.ones(3)}, implementation=None, scale=1.0)
    with pytest.raises(ValueError, match="dims lacks"):
        make_lookup(dims={"q": "b h d"})


def test_reference_that_breaks_its_own_shapes_is_caught(operands):
    wrong = make_lookup(reference=lambda o, scale: lookup_reference(o, scale=scale)[::-1])
    with pytest.raises(TypeError, match="toy_lookup: .* abstract shapes"):
        lookup(**operands, op=wrong)


# ------------------------------------------------------------------ derivatives


def test_derivatives_name_the_operation(operands):
    rest = {k: v for k, v in operands.items() if k != "q"}

    def loss(q):
        return lookup(q, **rest)[0].sum()

    for derivative in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.hessian(loss)):
        with pytest.raises(NotImplementedError, match="toy_lookup: derivatives"):
            derivative(operands["q"])
    with pytest.raises(NotImplementedError, match="toy_lookup: derivatives"):
        jax.jvp(loss, (operands["q"],), (operands["q"],))


def test_stop_gradient_is_the_way_out(operands):
    rest = {k: v for k, v in operands.items() if k != "q"}

    def loss(q):
        return (q * lookup(jax.lax.stop_gradient(q), **rest)[0]).sum()

    np.testing.assert_allclose(
        jax.grad(loss)(operands["q"]), expected(**operands)[0], rtol=1e-5, atol=1e-5
    )


# ------------------------------------------------------------------ vmap

SUBSETS = [
    [name for i, name in enumerate(("q", "cache", "table", "sink")) if bits >> i & 1]
    for bits in range(1, 16)
]


def vmapped(names, op, axis=0):
    def call(values):
        return lookup(**values, op=op)

    return jax.vmap(
        call, in_axes=({n: axis if n in names else None for n in ("q", "cache", "table", "sink")},)
    )


def with_axis(operands, names, size, axis=0):
    return {
        n: np.stack([np.roll(v, i, 0) for i in range(size)], axis) if n in names else v
        for n, v in operands.items()
    }


@pytest.mark.parametrize("op", [LOOKUP, LOOKUP_LOOP], ids=["fold", "loop"])
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_vmap_of_any_operands(operands, names, op):
    values = with_axis(operands, names, 3)
    got = vmapped(names, op)(values)
    for i in range(3):
        one = {n: v[i] if n in names else v for n, v in values.items()}
        check([r[i] for r in got], expected(**one))


def test_vmap_of_other_axes_and_nested(operands):
    names = ["q", "table"]
    last = with_axis(operands, names, 3, axis=-1)
    for i, result in enumerate(zip(*vmapped(names, LOOKUP, axis=-1)(last), strict=True)):
        check(result, expected(**{n: v[..., i] if n in names else v for n, v in last.items()}))

    inner = with_axis(operands, ["q"], 2)
    outer = with_axis(inner, ["table", "sink"], 3)
    function = jax.vmap(
        vmapped(["q"], LOOKUP), ({"q": None, "cache": None, "table": 0, "sink": 0},)
    )
    got = jax.jit(function)(outer)
    for i in range(3):
        for j in range(2):
            one = dict(outer, q=outer["q"][j], table=outer["table"][i], sink=outer["sink"][i])
            check([r[i, j] for r in got], expected(**one))


def test_vmap_drops_what_describes_the_whole_call(operands):
    plan = jnp.array([8])  # right for this batch size alone: folded with it, all would be NaN
    stacked = with_axis(operands, ["q"], 3)

    def call(q):
        rest = {k: v for k, v in operands.items() if k != "q"}
        return lookup(q, **rest, plan=plan)

    got = jax.vmap(call)(stacked["q"])
    check([r[1] for r in got], expected(**dict(operands, q=stacked["q"][1])))


def test_vmap_over_only_what_is_dropped(operands):
    got = jax.vmap(lambda plan: lookup(**operands, plan=plan))(jnp.full((3, 1), 8))
    check([r[2] for r in got], expected(**operands))


def test_vmap_of_size_zero(operands):
    out, total = vmapped(["q"], LOOKUP_LOOP)(
        with_axis(operands, ["q"], 1) | {"q": np.ones((0, 8, 4, 6), np.float32)}
    )
    assert out.shape == (0, 8, 4, 6) and total.shape == (0, 4, 8)


def test_loop_reads_unbatched_operands_in_place(operands):
    values = with_axis(operands, ["q"], 3)
    text = jax.jit(vmapped(["q"], LOOKUP_LOOP)).lower(values).as_text()
    assert "tensor<3x8x4x6xf32>" in text
    assert "tensor<3x16x4xf32>" not in text


# ------------------------------------------------------------------ implementation=


def cuda_lookup(operands, *, scale):
    shapes = lookup_abstract(operands, scale=scale)
    call = jax.ffi.ffi_call("toy_lookup_kernel", shapes)
    return tuple(call(operands["q"], operands["cache"], operands["table"], scale=np.float32(scale)))


def declines(operands, *, scale):
    return None if operands["sink"] is None else "the toy kernel takes no sink"


LOOKUP_CUDA = make_lookup(cuda=cuda_lookup, cuda_declines=declines)


def lowered(operands, platform, implementation, op=LOOKUP_CUDA):
    def call(values):
        return lookup(**values, op=op, implementation=implementation)

    return jax.jit(call).trace(operands).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def no_gpu(monkeypatch):
    """As on a machine without a GPU, whose kernels would decide otherwise."""
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [])


@pytest.fixture
def plain(operands):
    return {k: v for k, v in operands.items() if k != "sink"}


def test_implementation_values(operands):
    with pytest.raises(ValueError, match="toy_lookup: argument 'implementation' is 'pallas'"):
        lookup(**operands, implementation="pallas")
    check(lookup(**operands, implementation="xla"), expected(**operands))
    with pytest.raises(NotImplementedError, match="toy_lookup.* no CUDA kernel"):
        lookup(**operands, implementation="cuda")


def test_declined_call_names_the_reason_when_traced(operands):
    with pytest.raises(NotImplementedError, match="toy_lookup.* takes no sink"):
        jax.eval_shape(lambda v: lookup(**v, op=LOOKUP_CUDA, implementation="cuda"), operands)


def test_lowering_for_each_platform(plain, operands, no_gpu):
    """Without a local GPU the FFI call is emitted: the program is for another machine."""
    for implementation in (None, "cuda"):
        assert "toy_lookup_kernel" in lowered(plain, "cuda", implementation)
    assert "toy_lookup_kernel" not in lowered(plain, "cuda", "xla")
    assert "toy_lookup_kernel" not in lowered(operands, "cuda", None)
    for platform in ("cpu", "tpu", "rocm"):
        assert "toy_lookup_kernel" not in lowered(plain, platform, None)
        with pytest.raises(NotImplementedError, match="toy_lookup.* not CUDA"):
            lowered(plain, platform, "cuda")


class FakeDevice:
    device_kind = "NVIDIA Toy"
    compute_capability = "1.0"


def test_gpu_without_kernels_falls_back_and_warns_once(plain, monkeypatch):
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [FakeDevice()])
    monkeypatch.setattr(_ffi, "kernels_decline", lambda capability: f"no code for {capability}")
    monkeypatch.setattr(_dispatch, "_warned", set())
    with pytest.warns(RuntimeWarning, match="NVIDIA Toy: no code for 1.0.*Falling back to XLA"):
        assert "toy_lookup_kernel" not in lowered(plain, "cuda", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "toy_lookup_kernel" not in lowered(plain, "cuda", None)
        assert "toy_lookup_kernel" not in lowered(plain, "cuda", "xla")
    with pytest.raises(NotImplementedError, match="toy_lookup.*no code for 1.0"):
        lowered(plain, "cuda", "cuda")
    monkeypatch.setattr(_ffi, "kernels_decline", lambda capability: None)
    assert "toy_lookup_kernel" in lowered(plain, "cuda", None)


def test_export_round_trip(operands):
    exported = jax.export.export(jax.jit(lookup))(**operands)
    loaded = jax.export.deserialize(exported.serialize())
    check(loaded.call(**operands), expected(**operands))


def test_export_for_several_platforms(plain, no_gpu):
    def call(values):
        return lookup(**values, op=LOOKUP_CUDA)

    exported = jax.export.export(
        jax.jit(call),
        platforms=("cpu", "cuda"),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("toy_lookup_kernel")],
    )(plain)
    assert exported.platforms == ("cpu", "cuda")
    assert "toy_lookup_kernel" in exported.mlir_module()
    check(exported.call(plain), expected(**plain))


# ------------------------------------------------------------------ several devices


def place(mesh, operands, **specs):
    return {
        n: jax.device_put(v, NamedSharding(mesh, P(*specs.get(n, ())))) for n, v in operands.items()
    }


def make_mesh(shape, names, kind):
    """A mesh of virtual CPU devices, also where the default device is a GPU."""
    devices = jax.devices("cpu")[: math.prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def automatic_mesh(shape=(4, 2), names=("x", "y")):
    return make_mesh(shape, names, AxisType.Auto)


def explicit_mesh(shape=(4, 2), names=("x", "y")):
    return make_mesh(shape, names, AxisType.Explicit)


def collectives(compiled):
    return re.findall(r"(all-gather|all-to-all|collective-permute|all-reduce)", compiled.as_text())


SPLITS = {
    "batch": dict(q=("x",), table=("x",)),
    "heads": dict(q=(None, "y"), sink=("y",)),
    "both": dict(q=("x", "y"), table=("x",), sink=("y",)),
    "two axes": dict(q=(("x", "y"),), table=(("x", "y"),)),
    "q alone": dict(q=("x", "y")),
    "table alone": dict(table=("x",)),
}
OUTPUTS = {
    "batch": ("x", None),
    "heads": (None, "y"),
    "both": ("x", "y"),
    "two axes": (("x", "y"), None),
    "q alone": ("x", "y"),
    "table alone": ("x", None),
}


@pytest.mark.parametrize("split", SPLITS)
def test_jit_partitions(operands, split):
    values = place(automatic_mesh(), operands, **SPLITS[split])
    compiled = jax.jit(lookup).lower(**values).compile()
    assert not collectives(compiled)
    out, total = compiled(**values)
    check((out, total), expected(**operands))
    batch, heads = OUTPUTS[split]
    mesh = out.sharding.mesh
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(batch, heads)), 3)
    assert total.sharding.is_equivalent_to(NamedSharding(mesh, P(heads, batch)), 2)


def test_eager_call_on_sharded_operands(operands):
    values = place(automatic_mesh(), operands, **SPLITS["both"])
    check(lookup(**values), expected(**operands))


def test_sharded_call_inside_a_loop(operands):
    values = place(automatic_mesh(), operands, **SPLITS["both"])

    @jax.jit
    def twice(q, rest):
        return jax.lax.scan(lambda x, _: (lookup(x, **rest)[0], None), q, None, length=2)[0]

    rest = {k: v for k, v in values.items() if k != "q"}
    got = twice(values["q"], rest)
    first = expected(**operands)[0]
    np.testing.assert_allclose(got, expected(**dict(operands, q=first))[0], rtol=1e-5, atol=1e-5)


def test_results_that_are_asked_for_split(operands):
    mesh = automatic_mesh()
    values = place(mesh, operands)
    shardings = NamedSharding(mesh, P("x", "y")), NamedSharding(mesh, P("y", "x"))
    jitted = jax.jit(lookup, out_shardings=shardings)
    compiled = jitted.lower(**values).compile()
    assert not collectives(compiled)
    assert "f32[2,2,6]" in compiled.as_text()  # one device's part
    check(compiled(**values), expected(**operands))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_mesh_axes_of_one_device_do_not_count(operands, kind):
    mesh = make_mesh((8, 1), ("x", "y"), kind)
    values = place(mesh, operands, q=("x",), cache=("y",), table=("y",), sink=("y",))
    with jax.set_mesh(mesh):
        check(jax.jit(lookup)(**values), expected(**operands))


def test_plan_is_dropped_when_split_and_kept_when_not(operands):
    mesh = automatic_mesh()
    wrong, right = np.array([2]), np.array([8])  # of one device's batch, of the whole batch
    split = place(mesh, operands, **SPLITS["batch"])
    check(jax.jit(lookup)(**split, plan=right), expected(**operands))
    whole = place(mesh, operands)
    check(jax.jit(lookup)(**whole, plan=right), expected(**operands))
    assert np.isnan(jax.jit(lookup)(**whole, plan=wrong)[0]).all()


@pytest.mark.parametrize("spec", [("x",), (None, "y"), ("y", "x")], ids=str)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_cache_raises_with_advice(operands, spec, kind):
    mesh = automatic_mesh() if kind == "auto" else explicit_mesh()
    values = place(mesh, operands, cache=spec)
    # The partitioner wraps errors of automatic axes; explicit ones are known when tracing.
    error = jax.errors.JaxRuntimeError if kind == "auto" else ValueError
    with (
        jax.set_mesh(mesh),
        pytest.raises(error, match="toy_lookup: 'cache'.*replicated.*shard_map"),
    ):
        jax.jit(lookup)(**values)


def test_other_dimensions_of_small_operands_may_be_gathered(operands):
    operands = dict(operands, q=operands["q"][..., :4])
    values = place(automatic_mesh(), operands, q=("y", None, "x"))
    out, total = jax.jit(lookup)(**values)
    check((out, total), expected(**operands))
    assert out.sharding.is_equivalent_to(NamedSharding(out.sharding.mesh, P("y")), 3)


def test_sizes_that_devices_do_not_divide_stay_whole():
    rng = np.random.default_rng(1)
    q = rng.standard_normal((6, 4, 2), np.float32)
    cache = rng.standard_normal((16, 4), np.float32)
    table = np.arange(6, dtype=np.int32)
    mesh = automatic_mesh((8,), ("x",))

    @jax.jit
    def call(q):  # 6 requests over 8 devices: only a constraint inside a program can ask for it
        q = jax.lax.with_sharding_constraint(q, NamedSharding(mesh, P("x")))
        return lookup(q, cache, table)

    check(call(jax.device_put(q, NamedSharding(mesh, P()))), expected(q, cache, table))


def test_explicit_axes_state_the_output_sharding(operands):
    mesh = explicit_mesh()
    values = place(mesh, operands, **SPLITS["both"])
    with jax.set_mesh(mesh):
        for function in (lookup, jax.jit(lookup)):
            out, total = function(**values)
            assert jax.typeof(out).sharding.spec == P("x", "y", None)
            assert jax.typeof(total).sharding.spec == P("y", "x")
            check((out, total), expected(**operands))
        shape = jax.eval_shape(lookup, **values)[1]
        assert shape.sharding.spec == P("y", "x")
        assert not collectives(jax.jit(lookup).lower(**values).compile())


def test_explicit_axes_that_disagree_raise(operands):
    mesh = explicit_mesh()
    values = place(mesh, operands, q=("x",), table=("y",))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="'q' over .*'table' over .*reshard"):
        jax.jit(lookup)(**values)


def test_explicit_axes_under_vmap(operands):
    mesh = explicit_mesh()
    values = place(mesh, with_axis(operands, ["q"], 3), q=(None, "x"))
    with jax.set_mesh(mesh):
        got = jax.jit(vmapped(["q"], LOOKUP_LOOP))(values)
    for i in range(3):
        check([r[i] for r in got], expected(**dict(operands, q=np.asarray(values["q"][i]))))


def test_explicit_axes_on_the_vmapped_axis(operands):
    mesh = explicit_mesh()
    stacked = with_axis(operands, ["q"], 2)
    with jax.set_mesh(mesh):
        # Folds to one axis over y and x, and back.
        values = place(mesh, stacked, q=("y", "x"))
        got = jax.jit(vmapped(["q"], LOOKUP))(values)
        assert jax.typeof(got[0]).sharding.spec == P("y", "x", None, None)
        for i in range(2):
            check([np.asarray(r)[i] for r in got], expected(**dict(operands, q=stacked["q"][i])))
        # Cannot: the requests of the table are sharded, but it has no vmapped axis.
        values = place(mesh, stacked, q=("y", "x"), table=("x",))
        with pytest.raises(NotImplementedError, match="toy_lookup: vmap over an axis of 'q'"):
            jax.jit(vmapped(["q"], LOOKUP))(values)
        with pytest.raises(NotImplementedError, match="toy_lookup: vmap over an axis of 'q'"):
            jax.jit(vmapped(["q"], LOOKUP_LOOP))(values)


# ------------------------------------------------------------------ shard_map

MANUAL = dict(
    in_specs=({"q": P("x", "y"), "cache": P(), "table": P("x"), "sink": P("y")},),
    out_specs=(P("x", "y"), P("y", "x")),
)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(operands, check_vma):
    mapped = jax.shard_map(
        lambda v: lookup(**v), mesh=automatic_mesh(), check_vma=check_vma, **MANUAL
    )
    check(mapped(operands), expected(**operands))
    check(jax.jit(mapped)(operands), expected(**operands))
    assert not collectives(jax.jit(mapped).lower(operands).compile())


def test_shard_map_knows_that_results_vary(operands):
    wrong = dict(MANUAL, out_specs=(P("x"), P("y", "x")))  # out varies over y as well
    mapped = jax.shard_map(lambda v: lookup(**v), mesh=automatic_mesh(), **wrong)
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(mapped, operands)


def test_shard_map_of_operands_that_vary_differently(operands):
    """q is the same everywhere, the table is not: neither are the results."""
    rest = {k: v for k, v in operands.items() if k != "table"}
    tables = np.random.default_rng(5).integers(0, 16, 32).astype(np.int32)

    def mapped(spec):
        return jax.shard_map(
            lambda rest, table: lookup(**rest, table=table),
            mesh=automatic_mesh(),
            in_specs=(P(), P("x")),
            out_specs=(spec, P(None, "x")),
        )

    for function in (mapped(P("x")), jax.jit(mapped(P("x")))):
        out, total = function(rest, tables)
        for i in range(4):
            want = expected(**rest, table=tables[8 * i : 8 * i + 8])
            check((out[8 * i : 8 * i + 8], total[:, 8 * i : 8 * i + 8]), want)
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(mapped(P()), rest, tables)


def test_shard_map_with_vmap_inside_and_outside(operands):
    values = with_axis(operands, ["q", "sink"], 2)
    axes = {"q": 0, "cache": None, "table": None, "sink": 0}
    specs = {"q": P(None, "x", "y"), "cache": P(), "table": P("x"), "sink": P(None, "y")}
    inside = jax.shard_map(
        jax.vmap(lambda v: lookup(**v), (axes,)),
        mesh=automatic_mesh(),
        in_specs=(specs,),
        out_specs=(P(None, "x", "y"), P(None, "y", "x")),
    )
    outside = jax.vmap(
        jax.shard_map(lambda v: lookup(**v), mesh=automatic_mesh(), **MANUAL), (axes,)
    )
    for function in (inside, outside):
        got = jax.jit(function)(values)
        for i in range(2):
            one = dict(values, q=values["q"][i], sink=values["sink"][i])
            check([r[i] for r in got], expected(**one))


def test_shard_map_over_some_axes_only(operands):
    def mapped(mesh):
        return jax.jit(
            jax.shard_map(
                lambda v: lookup(**v),
                mesh=mesh,
                in_specs=({"q": P("x"), "cache": P(), "table": P("x"), "sink": P()},),
                out_specs=(P("x"), P(None, "x")),
                axis_names={"x"},
            )
        )

    check(mapped(automatic_mesh((8, 1)))(operands), expected(**operands))
    with pytest.raises(NotImplementedError, match="toy_lookup: .* all mesh axes must be manual"):
        mapped(automatic_mesh())(operands)


def test_export_of_shard_map(operands):
    mesh = automatic_mesh()
    mapped = jax.jit(jax.shard_map(lambda v: lookup(**v), mesh=mesh, **MANUAL))
    values = place(mesh, operands, **SPLITS["both"])
    exported = jax.export.export(mapped)(values)
    check(jax.jit(exported.call)(values), expected(**operands))
    with pytest.raises(NotImplementedError, match="toy_lookup: .*exported.*shard_map"):
        jax.export.export(jax.jit(lambda v: lookup(**v)))(values)


def test_shard_map_lowers_for_cuda_without_any_device(plain, no_gpu):
    """An AbstractMesh: the program of 8 GPUs, made where there are none."""
    mesh = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"q": P("x", "y"), "cache": P(), "table": P("x")}
    mapped = jax.shard_map(
        lambda v: lookup(**v, op=LOOKUP_CUDA),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(P("x", "y"), P("y", "x")),
    )
    shapes = {
        n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, specs[n]))
        for n, v in plain.items()
    }
    text = jax.jit(mapped).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "toy_lookup_kernel" in text


# ------------------------------------------------------------------ dimensions that follow


def grouped_reference(operands):
    """out[t, h] = q[t, h] * sum_s k[s, h * heads of k // heads of q]."""
    q, k = operands["q"], operands["k"]
    group = q.shape[1] // k.shape[1]
    return (q * jnp.repeat(k.sum(0), group, axis=0),)


GROUPED = Operation(
    name="toy_grouped",
    operands=("q", "k"),
    results=("out",),
    abstract=lambda operands: (jax.ShapeDtypeStruct(operands["q"].shape, operands["q"].dtype),),
    reference=grouped_reference,
    dims={"q": "t h d", "k": "s k d", "out": "t h d"},
    split=("h",),
    follows={"k": "h"},
    keep_whole=("k",),
)


@pytest.mark.parametrize("heads_k", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("k_spec", ["replicated", "split"])
def test_key_heads_follow_query_heads(heads_k, kind, k_spec):
    rng = np.random.default_rng(2)
    q = rng.standard_normal((3, 8, 2), np.float32)
    k = rng.standard_normal((5, heads_k, 2), np.float32)
    want = q * np.repeat(k.sum(0), 8 // heads_k, axis=0)
    mesh = automatic_mesh((2,), ("x",)) if kind == "auto" else explicit_mesh((2,), ("x",))
    split = k_spec == "split" and heads_k > 1

    def call(q, k):
        return GROUPED({"q": q, "k": k}, implementation=None)[0]

    with jax.set_mesh(mesh):
        q = jax.device_put(q, NamedSharding(mesh, P(None, "x")))
        k = jax.device_put(k, NamedSharding(mesh, P(None, "x" if split else None)))
        compiled = jax.jit(call).lower(q, k).compile()
        assert not collectives(compiled)
        out = compiled(q, k)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 3)


def test_more_devices_than_key_heads_raise_with_advice():
    mesh = explicit_mesh((8,), ("x",))
    with jax.set_mesh(mesh):
        q = jax.device_put(np.ones((3, 8, 2), np.float32), NamedSharding(mesh, P(None, "x")))
        k = np.ones((5, 2, 2), np.float32)
        with pytest.raises(
            ValueError, match="toy_grouped: dimension 'h' .* dimension 'k' of size 2"
        ):
            jax.jit(lambda q, k: GROUPED({"q": q, "k": k}, implementation=None))(q, k)


def test_sums_over_split_heads_raise_with_advice():
    summed = Operation(
        name="toy_summed",
        operands=("q", "k"),
        results=("out",),
        abstract=lambda operands: (jax.ShapeDtypeStruct(operands["k"].shape, jnp.float32),),
        reference=lambda operands: (operands["k"] * operands["q"].sum(),),
        dims={"q": "t h d", "k": "s k d", "out": "s k d"},
        split=("h",),
        follows={"k": "h"},
    )
    mesh = explicit_mesh((2,), ("x",))
    with jax.set_mesh(mesh):
        q = jax.device_put(np.ones((3, 8, 2), np.float32), NamedSharding(mesh, P(None, "x")))
        k = np.ones((5, 1, 2), np.float32)
        with pytest.raises(ValueError, match="toy_summed: .* sums over all of 'h'.*shard_map"):
            jax.jit(lambda q, k: summed({"q": q, "k": k}, implementation=None))(q, k)


# ------------------------------------------------------------------ explain


def test_explain_call_lists_reasons(operands, no_gpu):
    def function(values, scale, implementation=None):
        assert isinstance(scale, np.float32)  # static parameters arrive as they are
        return lookup(**values, op=LOOKUP_CUDA, implementation=implementation)

    scale = np.float32(2)
    found = _dispatch.explain_call("function", function, (operands, scale), {})
    assert found.implementation == "xla"
    (operation,) = found.operations
    assert operation.operation == "toy_lookup"
    assert "takes no sink" in operation.declines["cuda"][0]
    assert "function" in str(found) and "takes no sink" in str(found) and "not CUDA" in str(found)

    asked = _dispatch.explain_call("f", function, (operands, scale), {"implementation": "cuda"})
    assert asked.implementation is None
    assert "raises NotImplementedError" in str(asked)
    xla = _dispatch.explain_call("f", function, (operands, scale), {"implementation": "xla"})
    assert "implementation='xla' was asked for" in str(xla)
    nothing = _dispatch.explain_call("f", lambda: None, (), {})
    assert nothing.operations == () and "no operation" in str(nothing)


def test_explain_on_a_gpu_with_kernels(plain, monkeypatch):
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [FakeDevice()])
    monkeypatch.setattr(_ffi, "kernels_decline", lambda capability: None)
    monkeypatch.setattr(_ffi, "cuda_built", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = _dispatch.explain_call("f", lambda v: lookup(**v, op=LOOKUP_CUDA), (plain,), {})
    assert found.implementation == "cuda"
    assert "toy_lookup: cuda" in str(found)
