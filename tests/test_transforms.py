"""The decode operations under JAX's transformations, against the same calls without them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashmla
from jax_flashmla import _dispatch, _folding, quantization
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.metadata import get_mla_metadata
from jax_flashmla.sparse_prefill import flash_mla_sparse_fwd

GARBAGE = 2147480000  # plus the number of a page, this wraps around to a negative number
B, S_Q, H, D, DV = 8, 2, 4, 24, 16
PAGES, PAGE_SIZE, COLUMNS = 24, 4, 5
TOPK, EXTRA_PAGES, EXTRA_PAGE_SIZE, EXTRA_TOPK = 6, 9, 2, 3


def dense_operands(seed=0, b=B, h_kv=1):
    """Requests of 0 to 20 tokens; table entries past a request's end are garbage."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, COLUMNS * PAGE_SIZE + 1, b).astype(np.int32)
    table = rng.integers(0, PAGES, (b, COLUMNS)).astype(np.int32)
    unused = np.arange(COLUMNS) >= -(-lengths // PAGE_SIZE)[:, None]
    return {
        "q": rng.standard_normal((b, S_Q, H, D), np.float32),
        "k_cache": rng.standard_normal((PAGES, PAGE_SIZE, h_kv, D), np.float32),
        "block_table": np.where(unused, GARBAGE, table).astype(np.int32),
        "cache_seqlens": lengths,
        "attn_sink": rng.standard_normal(H, np.float32),
    }


def dense(q, k_cache, block_table, cache_seqlens, attn_sink=None, schedule=(None, None)):
    return flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, DV, *schedule, attn_sink=attn_sink, causal=True
    )


def sparse_operands(seed=0, b=B):
    """Among the indices: -1, the first slot past the cache, garbage."""
    rng = np.random.default_rng(seed)

    def indices(topk, slots):
        chosen = rng.integers(0, slots, (b, S_Q, topk))
        bad = rng.choice([-1, slots, GARBAGE], (b, S_Q, topk))
        return np.where(rng.random((b, S_Q, topk)) < 0.3, bad, chosen).astype(np.int32)

    return {
        "q": rng.standard_normal((b, S_Q, H, D), np.float32),
        "k_cache": rng.standard_normal((PAGES, PAGE_SIZE, 1, D), np.float32),
        "indices": indices(TOPK, PAGES * PAGE_SIZE),
        "topk_length": rng.integers(0, TOPK + 2, b).astype(np.int32),
        "attn_sink": rng.standard_normal(H, np.float32),
        "extra_k_cache": rng.standard_normal((EXTRA_PAGES, EXTRA_PAGE_SIZE, 1, D), np.float32),
        "extra_indices": indices(EXTRA_TOPK, EXTRA_PAGES * EXTRA_PAGE_SIZE),
        "extra_topk_length": rng.integers(0, EXTRA_TOPK + 2, b).astype(np.int32),
    }


def sparse(
    q,
    k_cache,
    indices,
    topk_length=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices=None,
    extra_topk_length=None,
):
    return flash_mla_with_kvcache(
        q,
        k_cache,
        None,
        None,
        DV,
        is_fp8_kvcache=isinstance(k_cache, PagedKVCache),
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )


CALLS = {"dense": (dense, dense_operands), "sparse": (sparse, sparse_operands)}


def close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


# ------------------------------------------------------------------ vmap


def stack(make, names, size):
    """Operands of ``size`` different calls for those in ``names``, of the first for the others."""
    calls = [make(seed) for seed in range(size)]
    return {
        n: np.stack([call[n] for call in calls]) if n in names else value
        for n, value in calls[0].items()
    }


def check_vmap(function, make, names, size=3):
    operands = stack(make, names, size)
    axes = {n: 0 if n in names else None for n in operands}
    got = jax.jit(jax.vmap(lambda o: function(**o), (axes,)))(operands)
    for i in range(size):
        one = {n: v[i] if n in names else v for n, v in operands.items()}
        close([r[i] for r in got], function(**one))


def subsets(names, mixed):
    """Each operand alone, all together, and ``mixed`` others."""
    rng = np.random.default_rng(0)
    chosen = [(n,) for n in names] + [tuple(names)]
    chosen += [tuple(n for n in names if rng.random() < 0.5) for _ in range(mixed)]
    return list(dict.fromkeys(c for c in chosen if c))


@pytest.mark.parametrize("names", subsets(list(dense_operands()), 8), ids="-".join)
def test_vmap_of_dense_decode(names):
    check_vmap(dense, lambda seed: dense_operands(seed, b=3), names)


@pytest.mark.parametrize("names", subsets(list(sparse_operands()), 6), ids="-".join)
def test_vmap_of_sparse_decode(names):
    check_vmap(sparse, lambda seed: sparse_operands(seed, b=2), names)


@pytest.mark.parametrize("call", CALLS)
def test_vmap_that_cannot_fold_loops(call, monkeypatch):
    """As if slot numbers of the folded caches passed 2^31."""
    monkeypatch.setattr(_folding, "_MAX_INT32", PAGES * PAGE_SIZE)
    function, make = CALLS[call]

    def small(seed):
        return make(seed, b=2)

    names = ["k_cache", "q"]
    operands = stack(small, names, 3)
    axes = {n: 0 if n in names else None for n in operands}
    jaxpr = jax.make_jaxpr(jax.vmap(lambda o: function(**o), (axes,)))(operands)
    expected = "scan" if call == "sparse" else "flash_mla_dense_decode"  # 72 pages, 288 slots
    assert expected in [eqn.primitive.name for eqn in jaxpr.eqns]
    monkeypatch.setattr(_folding, "_MAX_INT32", PAGES)
    jaxpr = jax.make_jaxpr(jax.vmap(lambda o: function(**o), (axes,)))(operands)
    assert "scan" in [eqn.primitive.name for eqn in jaxpr.eqns]
    check_vmap(function, small, names)


def test_large_caches_do_not_fold():
    pages = jax.ShapeDtypeStruct((4, 2**24, 64, 1, 576), jnp.bfloat16)
    entries = jax.ShapeDtypeStruct((3, 7), jnp.int32)
    assert _folding.fold_cache(pages, True, entries, False, 4, 64) is None
    fold = jax.eval_shape(
        lambda *a: _folding.fold_cache(*a[:1], True, a[1], False, 4, 1), pages, entries
    )
    assert [f.shape for f in fold] == [(2**26, 64, 1, 576), (12, 7)]


@pytest.mark.parametrize("call", CALLS)
def test_nested_vmap(call):
    function, make = CALLS[call]
    table = "block_table" if call == "dense" else "indices"
    inner_names, outer_names = ["q", table], ["k_cache", "attn_sink", "q"]
    operands = make(0, b=2)
    inner = {
        n: np.stack([v, np.roll(v, 1, 0)]) if n in inner_names else v for n, v in operands.items()
    }
    outer = {
        n: np.stack([v, v[..., ::-1], v * 2]) if n in outer_names else v for n, v in inner.items()
    }
    axes = [
        {n: 0 if n in names else None for n in operands} for names in (inner_names, outer_names)
    ]
    got = jax.jit(jax.vmap(jax.vmap(lambda o: function(**o), (axes[0],)), (axes[1],)))(outer)
    for i in range(3):
        for j in range(2):
            one = {n: v[i] if n in outer_names else v for n, v in outer.items()}
            one = {n: v[j] if n in inner_names else v for n, v in one.items()}
            close([r[i, j] for r in got], function(**one))


@pytest.mark.parametrize("cache_format", ["fp8_v32", "fp8_v4"])
def test_vmap_of_fp8_caches(cache_format):
    """A PagedKVCache is vmapped as a pytree; its tables are shared or not."""
    d = {"fp8_v32": 576, "fp8_v4": 512}[cache_format]
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.standard_normal((2, 6, 4, 1, d), np.float32))
    quantize = functools.partial(quantization.quantize_k_cache, cache_format=cache_format)
    caches = PagedKVCache(jax.vmap(quantize)(tokens), cache_format, 4)
    q = jnp.asarray(rng.standard_normal((2, 3, 1, H, d), np.float32))
    indices = rng.integers(-1, 26, (2, 3, 1, 7)).astype(np.int32)

    def call(q, cache, indices):
        return flash_mla_with_kvcache(
            q, cache, None, None, 512, is_fp8_kvcache=True, indices=indices
        )

    def entry(value, i, batched):
        return jax.tree.map(lambda x: x[i], value) if batched else value

    for axes in ((0, 0, 0), (None, 0, None), (0, None, 0)):
        arguments = [
            entry(x, 0, axis is None) for x, axis in zip((q, caches, indices), axes, strict=True)
        ]
        got = jax.vmap(call, axes)(*arguments)
        for i in range(2):
            one = [entry(x, i, axis == 0) for x, axis in zip(arguments, axes, strict=True)]
            close([r[i] for r in got], call(*one))


def test_used_table_entries_that_are_no_page_stay_so_when_folded():
    """PAGES is the first page of the next cache once folded: it must give NaN all the same."""
    operands = stack(lambda seed: dense_operands(seed, b=3), ["k_cache", "block_table"], 2)
    operands["cache_seqlens"] = np.array([9, 9, 9], np.int32)
    operands["block_table"] = np.stack([np.zeros((3, 5), np.int32)] * 2)
    for i, bad in enumerate((PAGES, -1)):
        operands["block_table"][i, i, 1] = bad
    operands["block_table"][:, 2, 3:] = GARBAGE
    axes = {n: 0 if n in ("k_cache", "block_table") else None for n in operands}
    out, lse = jax.vmap(lambda o: dense(**o), (axes,))(operands)
    broken = np.isnan(out).all((2, 3, 4))
    assert broken.tolist() == [[True, False, False], [False, True, False]]
    assert np.isnan(out).any((2, 3, 4)).tolist() == broken.tolist()
    assert np.isnan(lse).all((2, 3)).tolist() == broken.tolist()


@pytest.mark.parametrize("where", ["inside", "outside", "only the schedule"])
def test_vmap_with_a_schedule(where):
    names = ["q", "cache_seqlens", "block_table"]
    operands = stack(lambda seed: dense_operands(seed, b=3), names, 2)
    want = [dense(**{n: v[i] if n in names else v for n, v in operands.items()}) for i in range(2)]

    def plan(lengths):
        return get_mla_metadata(lengths, S_Q * H, 1, num_sm_parts=5)

    if where == "inside":

        def call(o):
            return dense(**o, schedule=plan(o["cache_seqlens"]))

        axes = ({n: 0 if n in names else None for n in operands},)
        got = jax.vmap(call, axes)(operands)
    elif where == "outside":  # one schedule for all, made for other lengths
        axes = ({n: 0 if n in names else None for n in operands}, None)
        schedule = plan(operands["cache_seqlens"][0])
        got = jax.vmap(lambda o, s: dense(**o, schedule=s), axes)(operands, schedule)
    else:
        one = {n: v[0] if n in names else v for n, v in operands.items()}
        schedules = jax.vmap(plan)(operands["cache_seqlens"])
        got = jax.vmap(lambda s: dense(**one, schedule=s))(schedules)
        want = [want[0]] * 2
    for i in range(2):
        close([r[i] for r in got], want[i])


# ------------------------------------------------------------------ shapes, AOT, export


@pytest.mark.parametrize("call", CALLS)
def test_eval_shape_jit_and_aot(call):
    function, make = CALLS[call]
    operands = make()
    want = function(**operands)
    shapes = jax.eval_shape(lambda o: function(**o), operands)
    assert [(s.shape, s.dtype) for s in shapes] == [
        ((B, S_Q, H, DV), jnp.float32),
        ((B, H, S_Q), jnp.float32),
    ]
    jitted = jax.jit(lambda o: function(**o))
    close(jitted(operands), want)
    close(jitted.lower(operands).compile()(operands), want)


@pytest.mark.parametrize("call", CALLS)
def test_export_round_trip(call):
    function, make = CALLS[call]
    operands = make()
    exported = jax.export.export(jax.jit(lambda o: function(**o)))(operands)
    loaded = jax.export.deserialize(exported.serialize())
    close(loaded.call(operands), function(**operands))


def kernel_shapes():
    def shape(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype)

    return (
        shape(2, 1, 16, 576, dtype=jnp.bfloat16),
        shape(8, 64, 1, 576, dtype=jnp.bfloat16),
        shape(2, 3),
        shape(2),
    )


def decode_step(q, k_cache, block_table, cache_seqlens, implementation=None):
    schedule = get_mla_metadata(cache_seqlens, 16, 1, implementation=implementation)
    return flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, *schedule, implementation=implementation
    )


def test_export_for_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [])
    allowed = [
        jax.export.DisabledSafetyCheck.custom_call(name)
        for name in ("flashmla_metadata", "flashmla_dense_decode")
    ]
    exported = jax.export.export(
        jax.jit(decode_step), platforms=("cpu", "cuda"), disabled_checks=allowed
    )(*kernel_shapes())
    text = jax.export.deserialize(exported.serialize()).mlir_module()
    assert "flashmla_metadata" in text and "flashmla_dense_decode" in text
    lowered = jax.jit(decode_step).trace(*kernel_shapes()).lower(lowering_platforms=("cpu",))
    assert "flashmla" not in lowered.as_text()


PARTS, TOPK_OF_KERNELS = 7, 600


def kernel_call(cache_format, *, sparse, extra):
    """A jitted function, its operands' shapes, and the attributes of its FFI call."""
    shape = jax.ShapeDtypeStruct
    d = 512 if cache_format == "fp8_v4" else 576

    def cache(pages, page_size):
        make = functools.partial(PagedKVCache.zeros, format=cache_format)
        return jax.eval_shape(functools.partial(make, pages, page_size))

    arrays = {"q": shape((2, 3, 16, d), jnp.bfloat16), "k_cache": cache(8, 64)}
    attributes = {"cache_format": {"plain": 0, "fp8_v32": 1, "fp8_v4": 2}[cache_format]}
    attributes["page_size"] = 64
    if sparse:
        arrays["indices"] = shape((2, 3, TOPK_OF_KERNELS), jnp.int32)
        attributes["extra_page_size"] = 2 if extra else 0
    else:
        arrays |= {"block_table": shape((2, 3), jnp.int32), "cache_seqlens": shape((2,), jnp.int32)}
        attributes["causal"] = "true"
    if extra:
        arrays["extra_k_cache"] = cache(5, 2)
        arrays["extra_indices_in_kvcache"] = shape((2, 3, 0), jnp.int32)
    static = {"is_fp8_kvcache": cache_format != "plain", "causal": not sparse}

    def call(arrays, batch_invariant, fp8_matmul, power_of_two_scales):
        absent = {} if not sparse else {"block_table": None, "cache_seqlens": None}
        return flash_mla_with_kvcache(
            **arrays,
            **absent,
            **static,
            head_dim_v=512,
            batch_invariant=batch_invariant,
            fp8_matmul=fp8_matmul,
            power_of_two_scales=power_of_two_scales,
            num_sm_parts=PARTS,
        )

    return call, arrays, attributes


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("kind", "cache_format", "extra", "fp8_matmul"),
    [
        ("dense", "plain", False, False),
        ("dense", "fp8_v32", False, False),
        ("dense", "fp8_v32", False, True),
        ("sparse", "plain", False, False),
        ("sparse", "fp8_v32", True, False),
        ("sparse", "fp8_v32", True, True),
        ("sparse", "fp8_v4", True, False),
    ],
)
def test_calls_of_the_kernels(monkeypatch, kind, cache_format, extra, fp8_matmul, batch_invariant):
    """Attributes and workspace of the FFI calls, as exported on a machine without a GPU."""
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [])
    call, arrays, attributes = kernel_call(cache_format, sparse=kind == "sparse", extra=extra)
    promise = cache_format != "plain" and not fp8_matmul
    target = f"flashmla_{kind}_decode"
    exported = jax.export.export(
        jax.jit(
            functools.partial(
                call,
                batch_invariant=batch_invariant,
                fp8_matmul=fp8_matmul,
                power_of_two_scales=promise,
            )
        ),
        platforms=("cuda",),
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call(name)
            for name in ("flashmla_metadata", target)
        ],
    )(arrays)
    (line,) = (x for x in exported.mlir_module().splitlines() if f"@{target}(" in x)
    found = dict(re.findall(r"(\w+) = (\w+)", re.search(r"backend_config = {(.*?)}", line)[1]))
    attributes["batch_invariant"] = str(batch_invariant).lower()
    attributes["fp8_matmul"] = str(fp8_matmul).lower()
    attributes["power_of_two_scales"] = str(promise).lower()
    expected = {name: str(value) for name, value in attributes.items()}
    assert found.keys() - expected.keys() == {"softmax_scale"}
    assert {name: found[name] for name in expected} == expected
    operands, results = re.search(r": \((.*)\) -> \((.*?)\)", line).groups()
    # 600 choices in 10 blocks, or a table of 192 tokens: batch-invariant pieces have 8 blocks.
    slots = 2 * (2 if kind == "sparse" else 1) if batch_invariant else 2 * PARTS
    # 16 heads of 3 query tokens in slabs of 16 rows. Those of a token that chooses are a slice.
    slabs = "3x1" if kind == "sparse" else "1x3"
    # In float16, but by some of the kernels for FP8 caches.
    values = 16 * 512 // (2 if cache_format == "plain" else 1)
    assert re.findall(r"<(.*?)>", results) == [
        "2x3x16x512xbf16",
        "2x16x3xf32",
        f"{slots}x{slabs}x{values}xf32",
        f"{slots}x{slabs}x{256 if cache_format == 'plain' else 1024}xf32",
        "1xi32",
    ]
    # Absent operands are empty; the choices of an extra cache may be, too, but with three axes.
    operands = re.findall(r"<(.*?)>", operands)
    lengths = ["2xi32", f"{PARTS}x8xi32", "0xf32"]
    if kind == "dense":
        assert operands[3:] == lengths
    else:
        assert operands[3:5] == ["0xi32", "0xf32"]
        assert operands[6:] == ["2x3x0xi32" if extra else "0xi32", "0xi32", f"{PARTS}x8xi32"]


def test_cuda_on_the_cpu_raises():
    operands = [jnp.zeros(s.shape, s.dtype) for s in kernel_shapes()]
    with jax.default_device(jax.devices("cpu")[0]):
        for function in (decode_step, jax.jit(decode_step, static_argnums=4)):
            with pytest.raises(NotImplementedError, match="flash_mla_.*not CUDA"):
                function(*operands, "cuda")


@pytest.mark.parametrize("call", CALLS)
def test_derivatives_name_the_operation(call):
    function, make = CALLS[call]
    operands = make()

    def loss(q):
        return function(**dict(operands, q=q))[0].sum()

    for derivative in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.jacfwd(loss)):
        with pytest.raises(NotImplementedError, match=f"flash_mla_{call}_decode: derivatives"):
            derivative(operands["q"])


def test_explain(monkeypatch):
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [])
    text = str(jax_flashmla.explain("flash_mla_with_kvcache", *kernel_shapes(), 512))
    assert "flash_mla_dense_decode: xla" in text and "not CUDA" in text
    operands = dense_operands()
    found = jax_flashmla.explain(
        "flash_mla_with_kvcache", *(operands[n] for n in list(operands)[:4]), head_dim_v=DV
    )
    assert "float32" in found.operations[0].declines["cuda"][0]
    assert "'q' is missing" in str(
        pytest.raises(
            ValueError, jax_flashmla.explain, flash_mla_with_kvcache, None, None, None, None, 1
        ).value
    )


# ------------------------------------------------------------------ several devices


def make_mesh(kind, shape=(4, 2), names=("x", "y")):
    devices = jax.devices("cpu")[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


# Where each operand's requests and heads are.
PER_REQUEST = (
    "q",
    "block_table",
    "cache_seqlens",
    "indices",
    "topk_length",
    "extra_indices",
    "extra_topk_length",
)


def specs_of(operands, batch, heads):
    """PartitionSpecs that put requests on mesh axes ``batch`` and heads on ``heads``."""
    specs = {n: P(batch) if n in PER_REQUEST else P() for n in operands}
    specs["q"] = P(batch, None, heads)
    specs["attn_sink"] = P(heads)
    if operands["k_cache"].shape[2] > 1:
        specs["k_cache"] = P(None, None, heads)
    return specs


def place(mesh, operands, specs):
    return {n: jax.device_put(v, NamedSharding(mesh, specs[n])) for n, v in operands.items()}


SPLITS = {"batch": ("x", None), "heads": (None, "y"), "both": ("x", "y")}


def collectives(compiled):
    """(kind, elements) of every collective in a compiled module."""
    pattern = r"= \(?\w+\[([\d,]*)\][^ ]* (all-gather|all-to-all|collective-permute|all-reduce)"
    return [
        (kind, int(np.prod([int(n) for n in dims.split(",") if n])))
        for dims, kind in re.findall(pattern, compiled.as_text())
    ]


def test_collectives_are_found():
    """The proof below would see a gather: of a cache that plain jnp indexes."""
    mesh = make_mesh(AxisType.Auto)
    operands = dense_operands()
    cache = jax.device_put(operands["k_cache"], NamedSharding(mesh, P("x")))
    compiled = jax.jit(lambda c: jnp.cumsum(c.reshape(-1, D), 0)).lower(cache).compile()
    assert max(size for _, size in collectives(compiled)) >= 4 * D


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("call", CALLS)
def test_jit_partitions(call, split, kind):
    """No collective at all, and results stay where their requests and heads are."""
    function, make = CALLS[call]
    operands = make()
    batch, heads = SPLITS[split]
    mesh = make_mesh(AxisType.Auto if kind == "auto" else AxisType.Explicit)
    values = place(mesh, operands, specs_of(operands, batch, heads))
    jitted = jax.jit(lambda o: function(**o))
    with jax.set_mesh(mesh):
        compiled = jitted.lower(values).compile()
        assert not collectives(compiled)
        out, lse = compiled(values)
        close((out, lse), function(**operands))
        if kind == "explicit":
            assert jax.typeof(out).sharding.spec == P(batch, None, heads, None)
            assert jax.typeof(lse).sharding.spec == P(batch, heads, None)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(batch, None, heads)), 4)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, P(batch, heads)), 3)


def test_eager_calls_on_sharded_operands():
    operands = dense_operands()
    values = place(make_mesh(AxisType.Auto), operands, specs_of(operands, "x", "y"))
    close(dense(**values), dense(**operands))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_jit_with_a_schedule_moves_nothing_large(kind):
    """The schedule is of the whole batch, so lengths are gathered, but neither q nor the cache."""
    operands = dense_operands()
    mesh = make_mesh(kind)
    values = place(mesh, operands, specs_of(operands, "x", "y"))

    @jax.jit
    def step(o):
        schedule = get_mla_metadata(o["cache_seqlens"], S_Q * H, 1, num_sm_parts=5)
        return dense(**o, schedule=schedule)

    with jax.set_mesh(mesh):
        compiled = step.lower(values).compile()
        assert all(size <= B for _, size in collectives(compiled))
        close(compiled(values), dense(**operands))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_cache_of_several_heads_is_split_with_the_query_heads(kind):
    operands = dense_operands(h_kv=2)
    mesh = make_mesh(kind)
    values = place(mesh, operands, specs_of(operands, "x", "y"))
    jitted = jax.jit(lambda o: dense(**o))
    with jax.set_mesh(mesh):
        compiled = jitted.lower(values).compile()
        assert not collectives(compiled)
        close(compiled(values), dense(**operands))


@pytest.mark.parametrize("spec", [P("x"), P(None, "y"), P(None, None, None, "y")], ids=str)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("call", CALLS)
def test_sharded_cache_raises_with_advice(call, kind, spec):
    function, make = CALLS[call]
    operands = make()
    mesh = make_mesh(AxisType.Auto if kind == "auto" else AxisType.Explicit)
    values = place(mesh, operands, specs_of(operands, "x", None) | {"k_cache": spec})
    error = jax.errors.JaxRuntimeError if kind == "auto" else ValueError
    message = f"flash_mla_{call}_decode: 'k_cache' of shape .*replicated.*shard_map"
    with jax.set_mesh(mesh), pytest.raises(error, match=message):
        jax.jit(lambda o: function(**o))(values)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("call", CALLS)
def test_shard_map(call, split):
    function, make = CALLS[call]
    operands = make()
    batch, heads = SPLITS[split]
    mapped = jax.jit(
        jax.shard_map(
            lambda o: function(**o),
            mesh=make_mesh(AxisType.Auto),
            in_specs=(specs_of(operands, batch, heads),),
            out_specs=(P(batch, None, heads), P(batch, heads)),
        )
    )
    assert not collectives(mapped.lower(operands).compile())
    close(mapped(operands), function(**operands))


def test_shard_map_with_a_schedule_for_each_device():
    operands = dense_operands()

    def step(o):
        schedule = get_mla_metadata(o["cache_seqlens"], S_Q * o["q"].shape[2], 1, num_sm_parts=3)
        return dense(**o, schedule=schedule)

    mapped = jax.shard_map(
        step,
        mesh=make_mesh(AxisType.Auto),
        in_specs=(specs_of(operands, "x", "y"),),
        out_specs=(P("x", None, "y"), P("x", "y")),
    )
    close(jax.jit(mapped)(operands), dense(**operands))
    close(mapped(operands), dense(**operands))


def test_shard_map_over_pages_merges_through_lse():
    """What the error about a sharded cache advises: each device attends to the pages it holds."""
    operands = dense_operands()
    mesh = make_mesh(AxisType.Auto, (4,), ("x",))
    mine = PAGES // 4
    operands["cache_seqlens"] = np.full(B, COLUMNS * PAGE_SIZE, np.int32)
    rng = np.random.default_rng(3)
    operands["block_table"] = rng.integers(0, PAGES, (B, COLUMNS)).astype(np.int32)

    def one_device(q, k_cache, block_table):
        local = block_table - jax.lax.axis_index("x") * mine
        held = (local >= 0) & (local < mine)
        order = jnp.argsort(~held, axis=1)  # held pages first
        table = jnp.take_along_axis(jnp.where(held, local, 0), order, axis=1)
        lengths = held.sum(1, dtype=jnp.int32) * PAGE_SIZE
        out, lse = flash_mla_with_kvcache(q, k_cache, table, lengths, DV)
        lse = jnp.where(lse == jnp.inf, -jnp.inf, lse)  # nothing held
        total = jax.nn.logsumexp(jax.lax.all_gather(lse, "x"), axis=0)
        weight = jnp.exp(lse - total).swapaxes(1, 2)[..., None]
        return jax.lax.psum(out * weight, "x"), total

    specs = (P(), P("x"), P())
    mapped = jax.shard_map(
        one_device, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=False
    )
    arguments = [operands[n] for n in ("q", "k_cache", "block_table")]
    want = flash_mla_with_kvcache(*arguments, operands["cache_seqlens"], DV)
    close(jax.jit(mapped)(*arguments), want)


@pytest.mark.parametrize("spec", [P(None, "x"), P("y"), P("y", "x")], ids=str)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_vmap_of_sharded_requests(kind, spec):
    # Any operation will do where nothing depends on it: the sparse one has most operands.
    function, make = CALLS["dense" if kind == "auto" else "sparse"]
    operands = stack(make, PER_REQUEST, 2)
    mesh = make_mesh(AxisType.Auto if kind == "auto" else AxisType.Explicit)
    specs = {n: spec if n in PER_REQUEST else P() for n in operands}
    values = place(mesh, operands, specs)
    axes = ({n: 0 if n in PER_REQUEST else None for n in operands},)
    with jax.set_mesh(mesh):
        results = jax.jit(jax.vmap(lambda o: function(**o), axes))(values)
    got = [np.asarray(r) for r in results]
    for i in range(2):
        one = {n: v[i] if n in PER_REQUEST else v for n, v in operands.items()}
        close([r[i] for r in got], function(**one))


# ------------------------------------------------------------------ sparse prefill


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sparse_prefill_partitions(kind):
    rng = np.random.default_rng(4)
    operands = {
        "q": rng.standard_normal((8, H, D), np.float32),
        "kv": rng.standard_normal((20, 1, D), np.float32),
        "indices": rng.integers(-1, 22, (8, 1, TOPK)).astype(np.int32),
        "attn_sink": rng.standard_normal(H, np.float32),
        "topk_length": rng.integers(0, TOPK + 1, 8).astype(np.int32),
    }

    def call(o):
        return flash_mla_sparse_fwd(
            o["q"], o["kv"], o["indices"], 0.5, DV, o["attn_sink"], o["topk_length"]
        )

    want = call(operands)
    mesh = make_mesh(AxisType.Auto if kind == "auto" else AxisType.Explicit)
    specs = {
        "q": P("x", "y"),
        "kv": P(),
        "indices": P("x"),
        "attn_sink": P("y"),
        "topk_length": P("x"),
    }
    values = place(mesh, operands, specs)
    with jax.set_mesh(mesh):
        compiled = jax.jit(call).lower(values).compile()
        assert not collectives(compiled)
        close(compiled(values), want)
        with pytest.raises(Exception, match="flash_mla_sparse_fwd: 'kv' of shape .*replicated"):
            jax.jit(call)(place(mesh, operands, specs | {"kv": P("y")}))
    mapped = jax.shard_map(
        call, mesh=make_mesh(AxisType.Auto), in_specs=(specs,), out_specs=(P("x", "y"),) * 3
    )
    close(jax.jit(mapped)(operands), want)
    with pytest.raises(NotImplementedError, match="flash_mla_sparse_fwd: derivatives"):
        jax.grad(lambda q: call(dict(operands, q=q))[0].sum())(operands["q"])
