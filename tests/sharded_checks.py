"""Sparse decode, writing and reading of caches, and layers over several devices, with oracles.

Every check takes a mesh of `meshes`, and ``implementation``: None for what a CPU does, "cuda" where
the kernels must run. Requests lie along the axis "data", heads along "model".
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import cache_oracle
import cases
import jax
import jax.numpy as jnp
import mla_oracle
import numpy as np
import oracle
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sparse_cases import public_call
from test_mla_core import make_params, make_sequences

from jax_flashmla import PagedKVCache, flash_mla_with_kvcache, get_mla_metadata, token_slots
from jax_flashmla._decode_loop import cache_copies
from jax_flashmla.flax import MLAConfig, decode, empty_cache, make_schedule, param_specs
from jax_flashmla.quantization import page_bytes

BF16 = cache_oracle.BF16
APPEND, GATHER = "flashmla_cache_append", "flashmla_cache_gather"
SPARSE, DENSE = "flashmla_sparse_decode", "flashmla_dense_decode"


def meshes(devices):
    """Shapes (data, model) of meshes of these devices: over requests, over heads, over both."""
    n = 1 << min(len(devices), 8).bit_length() - 1
    shapes = [(n, 1), (1, n)] + ([(n // 2, 2)] if n >= 4 else [])
    return list(dict.fromkeys(shapes))


def make_mesh(devices, shape, kind=AxisType.Auto):
    """A mesh of the first of these devices."""
    chosen = devices[: math.prod(shape)]
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2, devices=chosen)


def collectives(compiled):
    """Kinds of the collectives in a compiled module."""
    kinds = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
    return re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text())


def calls(compiled, target):
    """How often a compiled module calls a handler."""
    return len(re.findall(rf'custom_call_target="{target}"', compiled.as_text()))


def place(mesh, tree, specs):
    """The arrays on the devices of the mesh."""
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)
    return jax.tree.map(jax.device_put, tree, shardings)


def is_spec(value):
    """Whether it is a PartitionSpec, which is also a tuple."""
    return isinstance(value, P)


# ------------------------------------------------------------------ sparse decode

_EXTRA = {"extra_topk": 70, "extra_page_size": 2, "extra_slots": 64, "topk_length": True}
_COMMON = {"b": 8, "topk": 77, "h_q": 16, "slots": 256, "attn_sink": True}
SPARSE_CASES = {
    case.name: case
    for case in (
        cases.SparseCase("plain", s_q=2, topk_length=True, **_COMMON),
        cases.SparseCase(
            "v32", cache_format="fp8_v32", scales="arbitrary", page_size=8, **_EXTRA, **_COMMON
        ),
        cases.SparseCase(
            "v4", cache_format="fp8_v4", d=512, extra_topk_length=True, **_EXTRA, **_COMMON
        ),
    )
}
_PER_REQUEST = ("q", "indices", "topk_length", "extra_indices_in_kvcache", "extra_topk_length")


@functools.cache
def built(name):
    """Inputs of a case, and their arrays and static arguments as the public function has them."""
    inputs = cases.build_sparse(SPARSE_CASES[name])
    arrays, static = {}, {}
    for key, value in public_call(inputs).items():
        is_array = isinstance(value, PagedKVCache | np.ndarray | jax.Array)
        (arrays if is_array else static)[key] = value
    return inputs, arrays, static


def sparse_specs(arrays):
    """How the arrays of a call lie; caches are whole on every device."""
    specs = {name: P("data") if name in _PER_REQUEST else P() for name in arrays}
    specs |= {"q": P("data", None, "model"), "attn_sink": P("model")}
    return {
        name: jax.tree.map(lambda _, spec=specs[name]: spec, value)
        for name, value in arrays.items()
    }


def check_sparse_under_jit(devices, shape, name, kind, implementation):
    """XLA divides the call as its operands lie, without moving anything."""
    inputs, arrays, static = built(name)
    mesh = make_mesh(devices, shape, kind)
    values = place(mesh, arrays, sparse_specs(arrays))

    @jax.jit
    def run(values):
        return flash_mla_with_kvcache(**values, **static, implementation=implementation)

    with jax.set_mesh(mesh):
        compiled = run.lower(values).compile()
        out, lse = compiled(values)
    assert not collectives(compiled)
    if implementation == "cuda":
        assert calls(compiled, SPARSE) == 1
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "model")), 4)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 3)
    oracle.check_decode("sparse_decode", inputs, (np.asarray(out), np.asarray(lse)))


def check_sparse_in_shard_map(devices, shape, name, implementation):
    """Each device makes a schedule of its own requests and heads."""
    inputs, arrays, static = built(name)
    case = inputs.case

    def run(values):
        heads = values["q"].shape[2]
        schedule = get_mla_metadata(
            None,
            case.s_q * heads,
            1,
            num_heads_q=heads,
            topk=case.topk,
            extra_topk=case.extra_topk or None,
            batch_size=len(values["q"]),
            topk_length=values.get("topk_length"),
            extra_topk_length=values.get("extra_topk_length"),
            implementation=implementation,
        )
        return flash_mla_with_kvcache(
            **values,
            **static,
            tile_scheduler_metadata=schedule[0],
            num_splits=schedule[1],
            implementation=implementation,
        )

    mapped = jax.shard_map(
        run,
        mesh=make_mesh(devices, shape),
        in_specs=(sparse_specs(arrays),),
        out_specs=(P("data", None, "model"), P("data", "model")),
    )
    compiled = jax.jit(mapped).lower(arrays).compile()
    assert not collectives(compiled)
    if implementation == "cuda":
        assert calls(compiled, SPARSE) == calls(compiled, "flashmla_metadata") == 1
    got = [np.asarray(result) for result in jax.jit(mapped)(arrays)]
    oracle.check_decode("sparse_decode", inputs, got)


# ------------------------------------------------------------------ caches

FORMATS = ("plain", "fp8_v32", "fp8_v4")
PAGES, PAGE_SIZE, TOKENS = 6, 8, 9  # of one device


def filled_data(cache_format, devices):
    """Pages of all devices with a pattern in every byte, none of them part of a NaN."""
    shape = {
        "plain": (PAGES * devices, PAGE_SIZE, 1, 576),
        "fp8_v32": (PAGES * devices, PAGE_SIZE, 1, 656),
        "fp8_v4": (PAGES * devices, page_bytes(PAGE_SIZE)),
    }[cache_format]
    if cache_format == "plain":
        return np.full(shape, 0.75, BF16)
    return np.full(shape, 0x3B, np.uint8)


def new_tokens(cache_format, devices, seed=0):
    """Tokens for each device, with slots of its own pages, and what is done to them on the way."""
    rng = np.random.default_rng(seed)
    t, latent = TOKENS * devices, 448 if cache_format == "fp8_v4" else 512
    room = PAGES * PAGE_SIZE
    slots = np.concatenate([rng.permutation(room)[:TOKENS] for _ in range(devices)])
    slots[:: TOKENS - 1] = rng.choice([-1, room, cases.GARBAGE], len(slots[:: TOKENS - 1]))
    angles = rng.uniform(-9, 9, (t, 32))
    return {
        "kv_c": rng.standard_normal((t, 1, latent)).astype(BF16),
        "k_pe": rng.standard_normal((t, 1, 64)).astype(BF16),
        "slots": slots.astype(np.int32),
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
    }, (1 + rng.standard_normal(latent) / 4).astype(np.float32)


def same_tokens(got, want, exact):
    """Tokens read from caches are the same; or nearly, where XLA adds up squares for the norm."""
    if exact:
        np.testing.assert_array_equal(oracle_bits(got), oracle_bits(want))
        return
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.mean(got != want) < 0.01
    np.testing.assert_allclose(got, want, rtol=0.13, atol=0.02)


def oracle_bits(x):
    """Bits to compare: of bytes themselves, of numbers with one NaN for all."""
    x = np.asarray(x)
    return x if x.dtype == np.uint8 else cache_oracle.quiet_bits(x)


def check_caches_in_shard_map(devices, shape, cache_format, fused, implementation):
    """Each device of "data" writes to pages of its own, in place, reads, and attends to them."""
    mesh = make_mesh(devices, shape)
    groups, heads = shape[0], 16
    tokens, weight = new_tokens(cache_format, groups)
    data = filled_data(cache_format, groups)
    dim = tokens["kv_c"].shape[-1] + 64
    rng = np.random.default_rng(1)
    q = rng.standard_normal((TOKENS * groups, 1, heads, dim)).astype(BF16)
    # Of each device its own pages; some that it has just written to, some that are none.
    indices = rng.integers(-3, PAGES * PAGE_SIZE + 3, (TOKENS * groups, 1, 20)).astype(np.int32)
    indices[:, 0, 0] = tokens["slots"]

    def step(data, tokens, weight, q, indices):
        cache = PagedKVCache(data, cache_format, PAGE_SIZE)
        options = {}
        if fused:
            options = {name: tokens[name] for name in ("rope_cos", "rope_sin")}
            options |= {"norm_weight": weight, "norm_eps": 1e-5, "rope_layout": "half_split"}
        cache = cache.append(
            tokens["kv_c"],
            tokens["slots"],
            k_pe=tokens["k_pe"],
            implementation=implementation,
            **options,
        )
        read = cache.gather(tokens["slots"], implementation=implementation)
        out, _ = flash_mla_with_kvcache(
            *(q, cache, None, None, 512),
            indices=indices,
            is_fp8_kvcache=cache_format != "plain",
            implementation=implementation,
        )
        return cache.data, read, out

    own = P("data")
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(own, own, P(), P("data", None, "model"), own),
        out_specs=(own, own, P("data", None, "model")),
        check_vma=False,  # what every device of "model" computes is the same
    )
    placed = place(mesh, data, own)
    compiled = jax.jit(mapped, donate_argnums=0).lower(placed, tokens, weight, q, indices).compile()
    assert not collectives(compiled)
    if implementation == "cuda":
        assert calls(compiled, APPEND) == calls(compiled, GATHER) == calls(compiled, SPARSE) == 1
        local = (len(data) // groups, *data.shape[1:])
        assert cache_copies(compiled.as_text(), local) == []
        assert compiled.memory_analysis().alias_size_in_bytes >= data.nbytes // groups
    specs = [{name: own for name in tokens}, P(), P("data", None, "model"), own]
    got, read, out = compiled(placed, *place(mesh, [tokens, weight, q, indices], specs))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, own), got.ndim)

    exact = implementation == "cuda" or not fused
    for g in range(groups):
        mine = {name: x[g * TOKENS : (g + 1) * TOKENS] for name, x in tokens.items()}
        options = {}
        if fused:
            options = {name: mine[name] for name in ("rope_cos", "rope_sin")}
            options |= {"norm_weight": weight, "norm_eps": 1e-5, "rope_layout": "half_split"}
        want = cache_oracle.append(
            data[g * PAGES : (g + 1) * PAGES],
            *(cache_format, PAGE_SIZE, mine["slots"], mine["kv_c"], mine["k_pe"]),
            **options,
        )
        held = np.asarray(got)[g * PAGES : (g + 1) * PAGES]
        everything = np.arange(PAGES * PAGE_SIZE, dtype=np.int32)
        stored, expected = (
            cache_oracle.gather(x, cache_format, PAGE_SIZE, everything, BF16) for x in (held, want)
        )
        same_tokens(stored, expected, exact)
        if exact:
            np.testing.assert_array_equal(oracle_bits(held), oracle_bits(want))
        rows = slice(g * TOKENS, (g + 1) * TOKENS)
        seen = cache_oracle.gather(held, cache_format, PAGE_SIZE, mine["slots"], BF16)
        same_tokens(np.asarray(read)[rows], seen, True)
        attended, _ = oracle.sparse_decode(
            q[rows], stored.reshape(PAGES, PAGE_SIZE, 1, dim), indices[rows], 512
        )
        oracle.check_norm("sparse_decode", "out", np.asarray(out)[rows], attended, bound=5e-3)


def check_heads_of_a_cache_in_shard_map(devices, implementation):
    """A plain cache of several key heads: each device writes and reads the columns of its own."""
    mesh = make_mesh(devices, meshes(devices)[-1])
    rng = np.random.default_rng(2)
    heads, dim, t = 8, 40, 13
    data = rng.standard_normal((PAGES, PAGE_SIZE, heads, dim)).astype(np.float32)
    kv = rng.standard_normal((t, heads, dim)).astype(np.float32)
    slots = rng.permutation(PAGES * PAGE_SIZE)[:t].astype(np.int32)
    slots[3] = -1

    def step(data, kv, slots):
        cache = PagedKVCache(data, "plain", PAGE_SIZE)
        cache = cache.append(kv, slots, implementation=implementation)
        return cache.data, cache.gather(slots, implementation=implementation)

    both = P(None, None, "model")
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(both, P(None, "model"), P()), out_specs=(both, P(None, "model"))
    )
    compiled = jax.jit(mapped).lower(data, kv, slots).compile()
    assert not collectives(compiled)
    if implementation == "cuda":
        assert calls(compiled, APPEND) == calls(compiled, GATHER) == 1
    got, read = jax.jit(mapped)(data, kv, slots)
    want = data.copy().reshape(-1, heads, dim)
    want[slots[slots >= 0]] = kv[slots >= 0]
    np.testing.assert_array_equal(np.asarray(got).reshape(want.shape), want)
    np.testing.assert_array_equal(read, np.where((slots >= 0)[:, None, None], kv, 0))


def check_caches_under_jit(devices, cache_format, spec, fused):
    """A cache that XLA divides, whole on every device or by pages: as if it were on one.

    Returns:
      A function that tries the same with the kernel, which runs on one device only.
    """
    mesh = make_mesh(devices, meshes(devices)[0])
    groups = mesh.shape["data"]
    tokens, weight = new_tokens(cache_format, groups)
    data = filled_data(cache_format, groups)
    # Slots of the whole cache, each group of tokens in a part of its own.
    first = np.repeat(np.arange(groups) * PAGES * PAGE_SIZE, TOKENS)
    inside = (tokens["slots"] >= 0) & (tokens["slots"] < PAGES * PAGE_SIZE)
    tokens["slots"] = np.where(inside, tokens["slots"] + first, -1).astype(np.int32)
    options = {"norm_weight": weight, "norm_eps": 1e-5} if fused else {}
    turned = ("rope_cos", "rope_sin") if fused else ()

    def step(data, tokens, implementation=None):
        cache = PagedKVCache(data, cache_format, PAGE_SIZE).append(
            tokens["kv_c"],
            tokens["slots"],
            k_pe=tokens["k_pe"],
            implementation=implementation,
            **options,
            **{name: tokens[name] for name in turned},
        )
        return cache.data, cache.gather(tokens["slots"])

    placed = place(mesh, data, spec)
    values = place(mesh, tokens, {name: P("data") for name in tokens})
    got, read = jax.jit(step)(placed, values)
    want = cache_oracle.append(
        *(data, cache_format, PAGE_SIZE, tokens["slots"], tokens["kv_c"], tokens["k_pe"]),
        **options,
        **{name: tokens[name] for name in turned},
    )
    if not fused:
        np.testing.assert_array_equal(oracle_bits(got), oracle_bits(want))
    everything = np.arange(groups * PAGES * PAGE_SIZE, dtype=np.int32)
    stored, expected = (
        cache_oracle.gather(np.asarray(x), cache_format, PAGE_SIZE, everything, BF16)
        for x in (got, want)
    )
    same_tokens(stored, expected, not fused)
    seen = cache_oracle.gather(np.asarray(got), cache_format, PAGE_SIZE, tokens["slots"], BF16)
    same_tokens(read, seen, True)
    return functools.partial(jax.jit(step, static_argnums=2), placed, values, "cuda")


# ------------------------------------------------------------------ a layer


def check_layer(devices, shape, config: MLAConfig, sparse, tolerance, implementation):
    """Requests and pages along "data", heads along "model": decode of whole sequences at once."""
    mesh = make_mesh(devices, shape)
    groups, parts = shape
    length, page_size = 11, 8
    params = make_params(config)
    sequences = make_sequences([length] * groups, config)
    x = np.stack(sequences).astype(config.dtype)
    positions = np.tile(np.arange(length, dtype=np.int32), (groups, 1))
    table = np.tile(np.array([[1, 0]], np.int32), (groups, 1))  # of each group its own pages
    local = dataclasses.replace(config, num_heads=config.num_heads // parts)
    cache = jax.tree.map(np.asarray, empty_cache(config, 2 * groups, page_size))

    def step(params, x, positions, cache, table):
        options = {}
        if sparse:
            seen = jnp.arange(length, dtype=jnp.int32)
            chosen = jnp.where(seen <= positions[..., None], seen, -1)
            options["indices"] = token_slots(chosen, table, page_size, num_pages=2)
        out, cache = decode(
            *(params, x, positions, cache, table),
            config=local,
            schedule=make_schedule(local, positions, topk=length if sparse else None),
            implementation=implementation,
            **options,
        )
        return jax.lax.psum(out, "model"), cache

    own = P("data")
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(param_specs(config, "model"), own, own, own, own),
        out_specs=(own, own),
        check_vma=False,
    )
    arguments = (params, x, positions, cache, table)
    compiled = jax.jit(mapped).lower(*arguments).compile()
    found = set(collectives(compiled))
    assert found <= {"all-reduce"} and (found or parts == 1)  # of the outputs
    if implementation == "cuda":
        assert calls(compiled, APPEND) == 1
        assert calls(compiled, SPARSE if sparse else DENSE) == 1
    out, _ = jax.jit(mapped)(*arguments)
    for got, sequence in zip(np.asarray(out), x, strict=True):
        expected = mla_oracle.attention(params, sequence, config)
        assert mla_oracle.error(got, expected) < tolerance
