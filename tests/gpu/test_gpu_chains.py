"""Many calls in a row on a GPU: recorded by XLA as CUDA graphs, and never a race between them.

A kernel that starts before the one ahead of it has ended must wait for what it reads, and must not
overwrite what is still being read. Results of calls that follow each other closely are compared bit
by bit with those of the same calls made one by one. What lies between calls (concatenation,
multiplication by a power of two) rounds nothing, so that fusing it cannot change a bit.
"""

import collections
import dataclasses
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xla_dumps
from cases import DenseCase
from raw_launcher import RawDenseDecode, contents
from test_gpu_decode import DECODE, METADATA, cache_copies, same_bits

from jax_flashmla._cuda import DENSE_DIMS
from jax_flashmla.cache import PagedKVCache, offset_block_table, offset_slots, slot_mapping
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.metadata import get_mla_metadata

pytestmark = pytest.mark.gpu

REPEATS = 20


def name_of(dims):
    return f"{dims[0]}-{dims[1]}"


# ------------------------------------------------------------------ a step of a model, as one graph


def test_step_of_61_layers_is_a_graph(tmp_path):
    """Layers that depend on each other, over one donated cache, with one schedule.

    The first execution is no graph, the second records one, later ones update it for other inputs
    in other buffers: all give the results of the calls made one by one.
    """
    layers, pages, page_size, b, h, d, dv = 61, 16, 64, 3, 16, 576, 512
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def normal(*shape, deviation=1.0):
        values = jax.random.normal(next(keys), shape, jnp.float32) * deviation
        return values.astype(jnp.bfloat16)

    table = jnp.asarray(np.random.default_rng(0).permutation(pages)[:15].reshape(b, 5), jnp.int32)
    rope = normal(layers, b, 1, h, d - dv)

    def next_query(out, rope):
        return jnp.concatenate([out, rope], axis=-1)

    # A token's key depends on the layer before, as its query does. Without that XLA could not tell
    # that a layer has read the cache before the next one writes to it, and would copy it.
    def append(cache, q, k_rope, lengths, first):
        kv = jnp.concatenate([q[:, 0, 0, :dv], k_rope], axis=-1)
        slots = slot_mapping(table, lengths, page_size, num_pages=pages)
        return cache.append(kv, offset_slots(slots, first, page_size=page_size, num_pages=pages))

    def attend(q, cache, first, lengths, schedule):
        own_table = offset_block_table(table, first, num_pages=pages)
        return flash_mla_with_kvcache(
            q, cache, own_table, lengths, dv, *schedule, softmax_scale=3.0, implementation="cuda"
        )

    def decode_step(cache, q, k_rope, lengths, append=append, attend=attend):
        schedule = get_mla_metadata(lengths + 1, h, 1)
        sums = []
        for layer in range(layers):
            cache = append(cache, q, k_rope[layer], lengths, layer * pages)
            out, lse = attend(q, cache, layer * pages, lengths + 1, schedule)
            sums.append(lse)
            q = next_query(out, rope[layer])
        return cache, q, jnp.stack(sums)

    shape = layers * pages, page_size, 1, d
    cache, other = (
        PagedKVCache(jnp.array(data), "plain", page_size)
        for data in [normal(*shape, deviation=0.1)] * 2
    )
    compiled = (
        jax.jit(lambda *arguments: decode_step(*arguments), donate_argnums=0)
        .lower(
            cache,
            jax.ShapeDtypeStruct((b, 1, h, d), jnp.bfloat16),
            jax.ShapeDtypeStruct((layers, b, d - dv), jnp.bfloat16),
            jax.ShapeDtypeStruct((b,), jnp.int32),
        )
        .compile(compiler_options={"xla_dump_to": str(tmp_path)})
    )
    calls = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))
    assert calls[DECODE] == layers and calls[METADATA] == 1
    assert cache_copies(compiled, cache) == []
    # Thunks do not say which handler they call. Ours must all be in command buffers; should XLA
    # call something else of its own, that may be outside.
    thunks = xla_dumps.count_thunks(xla_dumps.thunk_dump(tmp_path), "kCustomCall")
    assert thunks.command_buffers >= 1 and thunks.inside >= layers + 1, thunks
    assert thunks.outside <= calls.total() - layers - 1, thunks

    address = cache.data.unsafe_buffer_pointer()
    append_alone, attend_alone = jax.jit(append, donate_argnums=0), jax.jit(attend)
    kept = []  # so that every execution gets other buffers
    for execution in range(5):
        q, k_rope = normal(b, 1, h, d), normal(layers, b, d - dv, deviation=0.1)
        # The second crosses the border of a page on the way.
        lengths = jnp.asarray([200 + execution, 62 + execution, 310 - 9 * execution], jnp.int32)
        cache, *got = compiled(cache, q, k_rope, lengths)
        other, *want = decode_step(
            other,
            q,
            k_rope,
            lengths,
            append=lambda *arguments: jax.block_until_ready(append_alone(*arguments)),
            attend=lambda *arguments: jax.block_until_ready(attend_alone(*arguments)),
        )
        assert cache.data.unsafe_buffer_pointer() == address
        kept.append((q, k_rope, lengths, got))
        got, want = ([np.asarray(x) for x in results] for results in (got, want))
        assert np.isfinite(got[1]).all()
        same_bits(got, want, f"execution {execution}")
    written, wanted = (np.asarray(x.data).view(np.uint16) for x in (cache, other))
    np.testing.assert_array_equal(written, wanted)
    # The results are of these inputs, not of a graph's first ones.
    assert len({np.asarray(sums).tobytes() for *_, (_, sums) in kept}) == 5


# ------------------------------------------------------------------ races between calls

CALLS = 16
# As one program that XLA records as a graph, and as one whose kernels it launches one by one.
AS_GRAPH, AS_LAUNCHES = {}, {"xla_gpu_graph_min_graph_size": 1_000_000}


def check_chain(chain, arrays, case, **options):
    """``chain(call, arrays)`` calls ``call`` many times, each with results of the one before.

    Calls that wait for each other are right; calls that do not, and all of them in one program,
    with and without a graph, must give the same. ``options`` go to flash_mla_with_kvcache.
    """

    def call(q, k_cache, block_table, cache_seqlens):
        return flash_mla_with_kvcache(
            *(q, k_cache, block_table, cache_seqlens, case.dv),
            causal=case.causal,
            implementation="cuda",
            **options,
        )

    def on_host(last, sums):
        return np.asarray(last), np.stack([np.asarray(x) for x in sums])

    alone = jax.jit(call)
    want = on_host(*chain(lambda *x: jax.block_until_ready(alone(*x)), arrays))
    # Results that were not waited for are told apart from those of any other call.
    assert np.isfinite(want[1]).all() and len({x.tobytes() for x in want[1]}) == CALLS
    ways = {"calls": lambda arrays: chain(alone, arrays)}
    for name, compiler_options in (("graph", AS_GRAPH), ("launches", AS_LAUNCHES)):
        lowered = jax.jit(lambda arrays: chain(call, arrays)).lower(arrays)
        ways[name] = lowered.compile(compiler_options=compiler_options)
    for way, run in ways.items():
        # Nothing waits between these either.
        for repeat, got in enumerate([run(arrays) for _ in range(REPEATS)]):
            same_bits(on_host(*got), want, f"{way}, repeat {repeat}")


SPLITS = {
    "one-request": (DenseCase("", 1, 0, 16, lengths=(4096,)), {}),
    "two-row-tiles": (DenseCase("", 2, 0, 128, lengths=(700, 2048)), {}),
    # Each request in one piece: nothing is merged.
    "one-part": (
        DenseCase("", 3, 0, 16, s_q=2, causal=True, lengths=(512, 600, 513)),
        {"num_sm_parts": 1},
    ),
    "mixed": (DenseCase("", 4, 0, 64, dtype="float16", lengths=(512, 4096, 40, 640)), {}),
    "invariant": (
        DenseCase("", 4, 0, 9, s_q=3, lengths=(1030, 40, 512, 2048)),
        {"batch_invariant": True},
    ),
}


def normal(rng, case, *shape, deviation=1.0):
    values = rng.standard_normal(shape, np.float32) * np.float32(deviation)
    return jnp.asarray(values.astype(cases.DTYPES[case.dtype]))


def chain_of_queries(case, page_size=64):
    """The first query, a cache, and what differs from call to call.

    Each call has pages of its own choice, or queries could become the same from call to call, and
    lengths of its own, and so a schedule of its own.
    """
    rng = np.random.default_rng(0)
    lengths = np.asarray(case.lengths)
    width = -(-lengths.max() // page_size)
    used, pages = case.b * width, 3 * case.b * width
    rows = case.b, case.s_q, case.h_q
    return {
        "q": normal(rng, case, *rows, case.d),
        "rope": [normal(rng, case, *rows, case.d - case.dv) for _ in range(CALLS)],
        "cache": normal(rng, case, pages, page_size, 1, case.d, deviation=0.1),
        "tables": [
            jnp.asarray(rng.permutation(pages)[:used].reshape(case.b, width), jnp.int32)
            for _ in range(CALLS)
        ],
        "lengths": [jnp.asarray(lengths - call, jnp.int32) for call in range(CALLS)],
    }


# In all chains softmax_scale is such that scores deviate by 4 and more: results are then sums of
# few values, and do not become the same from call to call.


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dims", DENSE_DIMS, ids=name_of)
def test_query_made_of_the_last_result(dims, split):
    """Another kernel, which knows nothing of ours, is between two calls."""
    case, options = SPLITS[split]
    case = dataclasses.replace(case, d=dims[0], dv=dims[1])

    def chain(call, arrays):
        q, sums = arrays["q"], []
        for i in range(CALLS):
            out, lse = call(q, arrays["cache"], arrays["tables"][i], arrays["lengths"][i])
            sums.append(lse)
            q = jnp.concatenate([out * 8, arrays["rope"][i]], axis=-1)
        return q, sums

    check_chain(chain, chain_of_queries(case), case, softmax_scale=8.0, **options)


# Where all columns of a key are values, a result can be what the next call reads.
SAME_DIMS = pytest.mark.parametrize(
    "dims", [(d, dv) for d, dv in DENSE_DIMS if d == dv], ids=name_of
)


@pytest.mark.parametrize("split", SPLITS)
@SAME_DIMS
def test_query_is_the_last_result(dims, split):
    """Nothing is between two calls but their schedules."""
    case, options = SPLITS[split]
    case = dataclasses.replace(case, d=dims[0], dv=dims[1])

    def chain(call, arrays):
        q, sums = arrays["q"], []
        for i in range(CALLS):
            q, lse = call(q, arrays["cache"], arrays["tables"][i], arrays["lengths"][i])
            sums.append(lse)
        return q, sums

    check_chain(chain, chain_of_queries(case), case, softmax_scale=100.0, **options)


@pytest.mark.parametrize(
    "case,options",
    [
        (DenseCase("512-tokens", 4, 0, 128), {}),
        (DenseCase("512-tokens-whole", 4, 0, 128), {"num_sm_parts": 1}),
        (DenseCase("2048-tokens", 2, 0, 128, s_q=8), {}),
        (DenseCase("4096-tokens", 4, 0, 64, s_q=16, causal=True, dtype="float16"), {}),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
@SAME_DIMS
def test_cache_is_the_last_result(dims, case, options):
    """A call attends to the rows that the last one has written, of all requests."""
    case = dataclasses.replace(case, d=dims[0], dv=dims[1])
    rng = np.random.default_rng(0)
    b, page_size = case.b, case.s_q * case.h_q
    tokens = b * page_size
    arrays = {
        "cache": normal(rng, case, b, page_size, 1, case.d, deviation=0.1),
        "q": [normal(rng, case, b, case.s_q, case.h_q, case.d) for _ in range(CALLS)],
        "table": jnp.asarray([rng.permutation(b) for _ in range(b)], jnp.int32),
        "lengths": [
            jnp.asarray([tokens - call - 5 * r for r in range(b)], jnp.int32)
            for call in range(CALLS)
        ],
    }

    def chain(call, arrays):
        cache, sums = arrays["cache"], []
        for i in range(CALLS):
            out, lse = call(arrays["q"][i], cache, arrays["table"], arrays["lengths"][i])
            sums.append(lse)
            cache = out.reshape(cache.shape)
        return cache, sums

    check_chain(chain, arrays, case, softmax_scale=10.0, **options)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dims", DENSE_DIMS, ids=name_of)
def test_launches_on_the_same_buffers(dims, split):
    """Without XLA: a graph of launches leaves what one launch that was waited for has written."""
    case, options = SPLITS[split]
    case = dataclasses.replace(case, d=dims[0], dv=dims[1])
    arrays = chain_of_queries(case)

    def problem():
        return RawDenseDecode(
            q=arrays["q"],
            k_cache=arrays["cache"],
            block_table=arrays["tables"][0],
            cache_seqlens=arrays["lengths"][0],
            softmax_scale=4.0,
            causal=case.causal,
            head_dim_v=case.dv,
            **options,
        )

    want = problem().run()
    assert np.isfinite(want[1]).all()
    for launches in (2, 3, 50):
        again = problem()
        again.time(launches, replays=3)
        same_bits((contents(again.out), contents(again.lse)), want, f"{launches} launches")
        same_bits(again.run(), want, f"one more after {launches} launches")
