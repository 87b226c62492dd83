"""The peer's grid of sparse decode cases on a GPU: ``python tests/gpu/sparse_grid.py --out FILE``.

As grid.py: kernels are launched without XLA around them, everything XLA does around a case has one
static shape for all of them (for V4, one for each page size), results go to a file of JSON lines,
and cases that have passed with the same kernels are not run again.

The tokens of a format are made once, from their bits, and so are the numbers that they stand for.
A case gets a copy of the bytes in which every slot that it does not attend to is NaN. Its results
are compared on the device with a reference that shares nothing with ``jax_flashmla``: products of
bfloat16 keys and queries, which are exact in float32, softmax in float32, and probabilities in two
bfloat16 parts, so that nothing is rounded that shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import cases  # noqa: E402
import grid  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import oracle  # noqa: E402
import raw_launcher as raw  # noqa: E402
import sparse_cases  # noqa: E402
from grid import Outcome, _jit, _padded, _rounded  # noqa: E402
from jax import lax  # noqa: E402
from sparse_cases import GridCase  # noqa: E402

from jax_flashmla import _planning  # noqa: E402

DV = 512
#: The most heads of a case, and how many chosen tokens the reference takes at a time.
_HEADS, _TOKENS = 128, 512
#: Columns that share a scale, and how many scales a token has.
_TILES = {"fp8_v32": (128, 4), "fp8_v4": (64, 7)}
_ALL_ONES = np.uint32(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of the arrays that all cases share; a case that needs more is an error.

    Attributes:
        slots: of the first cache. By default as many as the largest case needs, and some more.
        extra_slots: of the extra cache.
        entries: of the indices of a case.
        extra_entries: of its indices into the extra cache.
        query_rows: query tokens x heads of the pool of queries.
        out_rows: the same of the results, some more than any case has.
        partial_rows: rows of the workspace for partial results.
        requests: requests of a batch.
        parts: rows of a schedule.
        items: query tokens that the reference takes at a time.
    """

    slots: int = 181 << 12
    extra_slots: int = 86 << 12
    entries: int = 321 * 3 * 2048
    extra_entries: int = 321 * 3 * 1365
    query_rows: int = 150_000
    out_rows: int = 321 * 3 * 128 + 512
    partial_rows: int = 1 << 15
    requests: int = 321
    parts: int = 256
    items: int = 64


# ---------------------------------------------------------------------------------------------
# On the device. Shapes are static; what a case is, comes as numbers.


@functools.partial(_jit, static_argnames=("slots", "cache_format"))
def _tokens(key: jax.Array, *, slots: int, cache_format: str) -> dict[str, jax.Array]:
    """Tokens in bits and in numbers: normal / 10 clamped to [-1, 1] before they are quantised.

    Returns ``numbers`` uint32[slots, .] (codes and RoPE; of V3.2 the scales lie in between),
    ``scales`` uint32[slots, .] and ``values`` bfloat16[slots, d].
    """
    tile, tiles = _TILES[cache_format]
    latent = tile * tiles
    values_key, scales_key = jax.random.split(key)
    table = jnp.asarray(oracle._E4M3, jnp.float32)

    def some(number):
        normal = jax.random.normal(
            jax.random.fold_in(values_key, number), (chunk, latent + 64), jnp.float32
        )
        x = jnp.clip(normal * 0.1, -1, 1)
        tiled = x[:, :latent].reshape(chunk, tiles, tile)
        scale = jnp.max(jnp.abs(tiled), axis=-1) / 448
        if cache_format == "fp8_v4":
            bits = lax.bitcast_convert_type(scale, jnp.int32)
            exponent = (bits >> 23) + (bits & 0x7FFFFF != 0)  # rounded up
            scale = lax.bitcast_convert_type(exponent << 23, jnp.float32)
            filled = jnp.concatenate([exponent, jnp.full((chunk, 1), 255)], axis=1)
            words = filled.astype(jnp.uint8).reshape(chunk, 2, 4)
        else:
            more = jax.random.uniform(jax.random.fold_in(scales_key, number), scale.shape)
            scale = scale * (1 + more)
            words = scale
        # However this rounds: what counts is the bits that come of it.
        codes = lax.bitcast_convert_type(
            (tiled / scale[..., None]).astype(jnp.float8_e4m3fn), jnp.uint8
        )
        rope = x[:, latent:].astype(jnp.bfloat16)
        exact = table[codes.astype(jnp.int32)] * scale[..., None]
        numbers = jnp.concatenate(
            [_rounded(exact, jnp.bfloat16).reshape(chunk, latent), rope.astype(jnp.float32)], axis=1
        ).astype(jnp.bfloat16)
        codes = lax.bitcast_convert_type(codes.reshape(chunk, latent // 4, 4), jnp.uint32)
        rope = lax.bitcast_convert_type(rope.reshape(chunk, 32, 2), jnp.uint32)
        return codes, lax.bitcast_convert_type(words, jnp.uint32), rope, numbers

    chunk = math.gcd(slots, 1 << 12)
    codes, scales, rope, values = lax.map(some, jnp.arange(slots // chunk))
    codes, scales, rope, values = (
        x.reshape(slots, x.shape[-1]) for x in (codes, scales, rope, values)
    )
    middle = [scales] if cache_format == "fp8_v32" else []
    return {
        "numbers": jnp.concatenate([codes, *middle, rope], axis=1),
        "scales": scales,
        "values": values,
    }


@functools.partial(_jit, static_argnames=("rows", "d"))
def _queries(key: jax.Array, *, rows: int, d: int) -> jax.Array:
    return jnp.clip(jax.random.normal(key, (rows, d)), -1, 1).astype(jnp.bfloat16)


def _slots_of(n: dict[str, jax.Array], request: jax.Array, token: jax.Array) -> jax.Array:
    """Where a request's tokens lie: its pages are scattered over the cache, none is shared."""
    page = request * n["pages_each"] + token // n["page_size"]
    return page * n["stride"] % n["pages"] * n["page_size"] + token % n["page_size"]


@functools.partial(_jit, static_argnames=("entries",))
def _choose(
    key: jax.Array, lengths: jax.Array, n: dict[str, jax.Array], invalid: jax.Array, *, entries: int
) -> tuple[jax.Array, jax.Array]:
    """Indices int32[entries] of a case, [b, s_q, topk] side by side, and which of them count.

    Of those after the length half are slots, which may be NaN, and half are far outside.
    """
    draw = jax.random.bits(key, (3, entries), jnp.uint32)
    position = jnp.arange(entries, dtype=jnp.int32)
    query = position // jnp.maximum(n["topk"], 1)
    request, place = query // n["s_q"], position % jnp.maximum(n["topk"], 1)
    exists = (request < n["b"]) & (n["topk"] > 0)
    token = (draw[0] % n["s_k"].astype(jnp.uint32)).astype(jnp.int32)
    slots = n["pages"] * n["page_size"]
    bad = jnp.stack(
        [-1, slots, cases.GARBAGE, jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max, -slots - 3]
    ).astype(jnp.int32)
    chance = (draw[1] >> 8).astype(jnp.float32) * 2.0**-24
    spoiled = chance < invalid
    index = jnp.where(spoiled, bad[draw[2] % 6], _slots_of(n, request, token))
    after = place >= lengths[jnp.where(exists, request, 0)]
    index = jnp.where(after & (draw[2] % 2 == 0), cases.GARBAGE, index)
    counts = exists & ~after & ~spoiled
    return jnp.where(exists, index, cases.GARBAGE), counts


@functools.partial(_jit, static_argnames=("slots",))
def _used(indices: jax.Array, counts: jax.Array, *, slots: int) -> jax.Array:
    """bool[slots]: what any query token attends to."""
    at = jnp.where(counts, indices, slots)
    return jnp.zeros((slots + 1,), jnp.int32).at[at].set(1)[:slots] != 0


@functools.partial(_jit, static_argnames=("cache_format", "page_size"))
def _cache(
    numbers: jax.Array, scales: jax.Array, used: jax.Array, *, cache_format: str, page_size: int
) -> jax.Array:
    """The cache in 32-bit words, all bits set in slots that are not used and in padding."""
    pages = len(numbers) // page_size if cache_format == "fp8_v4" else 0
    keep = lax.optimization_barrier(used)[:, None]
    numbers = jnp.where(keep, numbers, _ALL_ONES)
    if cache_format == "fp8_v32":
        return numbers
    scales = jnp.where(keep, scales, _ALL_ONES)
    parts = [x[: pages * page_size].reshape(pages, -1) for x in (numbers, scales)]
    rest = oracle.v4_page_bytes(page_size) // 4 - sum(x.shape[1] for x in parts)
    return jnp.concatenate([*parts, jnp.full((pages, rest), _ALL_ONES)], axis=1)


def _exact_product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Of bfloat16: each product fits float32, and sums are in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@functools.partial(_jit, static_argnames=("items",))
def _compare(
    queries: jax.Array,
    sources: tuple[dict[str, Any], ...],
    sinks: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    n: dict[str, jax.Array],
    scale: jax.Array,
    *,
    items: int,
) -> dict[str, Any]:
    """Attention from the definition, and how ``out`` and ``lse`` differ from it.

    A source has ``values`` [slots, d], ``indices`` and ``counts`` [entries], and ``topk``.
    """
    head = jnp.arange(_HEADS)

    def chunk(number, state):
        item = number * items + jnp.arange(items)  # a query token of a request
        exists = item < n["b"] * n["s_q"]
        item = jnp.where(exists, item, 0)
        valid = exists[:, None] & (head < n["h_q"])
        own_head = jnp.where(head < n["h_q"], head, 0)
        out_row = item[:, None] * n["h_q"] + own_head
        request, token = item // n["s_q"], item % n["s_q"]
        lse_index = (request[:, None] * n["h_q"] + own_head) * n["s_q"] + token[:, None]
        q = queries[n["first_query"] + out_row]

        def visit(source, carry):
            def block(number, carry):
                top, total, weighted = carry
                place = number * _TOKENS + jnp.arange(_TOKENS)
                inside = place < source["topk"]
                entry = item[:, None] * source["topk"] + jnp.where(inside, place, 0)
                seen = inside & source["counts"][entry]
                keys = source["values"][jnp.where(seen, source["indices"][entry], 0)]
                scores = scale * _exact_product("ihd,itd->iht", q, keys)
                scores = jnp.where(seen[:, None], scores, -jnp.inf)
                new_top = jnp.maximum(top, scores.max(axis=-1))
                base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                weights, factor = jnp.exp(scores - base[..., None]), jnp.exp(top - base)
                high = _rounded(weights, jnp.bfloat16)
                products = (
                    _exact_product("iht,itv->ihv", part.astype(jnp.bfloat16), keys[..., :DV])
                    for part in (high, weights - high)
                )
                return (
                    new_top,
                    total * factor + weights.sum(axis=-1),
                    weighted * factor[..., None] + sum(products),
                )

            return lax.fori_loop(0, (source["topk"] + _TOKENS - 1) // _TOKENS, block, carry)

        shape = (items, _HEADS)
        carry = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, DV)))
        for source in sources:
            carry = visit(source, carry)
        top, total, weighted = carry
        seen = total > 0
        want_lse = jnp.where(seen, top + jnp.log(total), jnp.inf)
        factor = jax.nn.sigmoid(want_lse - sinks[own_head]) / total
        want = _rounded(weighted * jnp.where(seen, factor, 0.0)[..., None], jnp.bfloat16)
        got, got_lse = out[out_row].astype(jnp.float32), lse[lse_index]
        return grid.account(
            state,
            "sparse_decode",
            got,
            want,
            got_lse,
            want_lse,
            valid,
            out_row,
            jnp.broadcast_to(lse_index, shape),
        )

    chunks = (n["b"] * n["s_q"] + items - 1) // items
    result = lax.fori_loop(0, chunks, chunk, grid.no_errors())
    rows = n["b"] * n["s_q"] * n["h_q"]
    return result | {"written_after": grid.written_after(out, lse, rows)}


# ---------------------------------------------------------------------------------------------
# Runner


@dataclasses.dataclass
class Source:
    """A cache of a case, and what is chosen from it; arrays are on the device."""

    pages: int
    page_size: int
    topk: int
    cache: jax.Array
    values: jax.Array
    indices: jax.Array
    counts: jax.Array
    lengths: jax.Array
    host_lengths: np.ndarray | None


class Runner:
    """Runs cases of one format; everything large is made once."""

    def __init__(self, cache_format: str, sizes: Sizes | None = None):
        self.cache_format, self.sizes = cache_format, sizes or Sizes()
        keys = jax.random.split(jax.random.key(3), 3)
        slots = (self.sizes.slots, self.sizes.extra_slots)
        self.pools = [
            _tokens(key, slots=count, cache_format=cache_format)
            for key, count in zip(keys, slots, strict=False)
        ]
        d = sparse_cases.DIMS[cache_format]
        self.queries = _queries(keys[2], rows=self.sizes.query_rows, d=d)

    def run(self, case: GridCase, seed: int = 0) -> Outcome:
        """Runs one case twice and compares.

        Raises ValueError if it does not fit the sizes, RuntimeError if a launch fails.
        """
        start = time.perf_counter()
        failures, errors = self._run(case, seed)
        return Outcome(case.name, failures, errors, time.perf_counter() - start)

    def source(self, case: GridCase, extra: bool, rng: np.random.Generator) -> Source:
        """The first or the extra cache of a case."""
        sizes, pool, flags = self.sizes, self.pools[extra], case.flags
        page_size = case.extra_page_size if extra else case.page_size
        topk, s_k = (case.extra_topk, case.extra_s_k) if extra else (case.topk, case.s_k)
        slots, entries = sizes.slots, sizes.entries
        if extra:
            slots, entries = sizes.extra_slots, sizes.extra_entries
        pages, pages_each = slots // page_size, -(-s_k // page_size)
        for needed, there, what in (
            (case.b, sizes.requests, "requests"),
            (case.b * pages_each, pages, "pages"),
            (case.b * case.s_q * topk, entries, "entries of indices"),
        ):
            if needed > there:
                raise ValueError(f"{case.name}: needs {needed} {what}; there are {there}")
        # A stride that has no divisor in common with the pages leads to each of them once.
        most = max(min(5000, (2**31 - 1) // pages), 1)
        strides = [x for x in rng.integers(1, most + 1, 50).tolist() if math.gcd(x, pages) == 1]
        numbers = {
            "b": case.b,
            "s_q": case.s_q,
            "topk": topk,
            "s_k": s_k,
            "pages": pages,
            "pages_each": pages_each,
            "page_size": page_size,
            "stride": (strides or [1])[0],
        }
        lengths = np.full(case.b, topk, np.int32)
        if flags.lengths:
            lengths = rng.integers(0, topk + 1, case.b, dtype=np.int32)
            lengths[0] = topk + 7  # counts as topk
            if flags.empty:
                hole = rng.random(case.b) < 0.2
                hole[-1] = True
                lengths[hole] = np.where(rng.random(hole.sum()) < 0.5, 0, -3)
        on_device = jax.device_put(_padded(lengths, sizes.requests, 0, "requests"))
        indices, counts = _choose(
            jax.random.key(int(rng.integers(2**31))),
            on_device,
            {name: np.int32(value) for name, value in numbers.items()},
            np.float32(flags.invalid),
            entries=entries,
        )
        cache = _cache(
            pool["numbers"],
            pool["scales"],
            _used(indices, counts, slots=slots),
            cache_format=self.cache_format,
            page_size=page_size if self.cache_format == "fp8_v4" else 0,
        )
        given = lengths if flags.lengths else None
        return Source(
            pages, page_size, topk, cache, pool["values"], indices, counts, on_device, given
        )

    def launch(
        self, case: GridCase, sources: list[Source], sinks: jax.Array | None, first_query: int
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Two launches of the kernels: ``out`` [out_rows, dv] and ``lse`` [out_rows] of each."""
        sizes = self.sizes
        row_tiles = _planning.sparse_row_tiles(1, case.h_q, case.s_q)
        parts = _planning.default_num_sm_parts(row_tiles)
        slots = 2 * parts
        for needed, there, what in (
            (parts, sizes.parts, "rows of the schedule"),
            (
                raw.workspace_rows(slots, slices=case.s_q, rows=case.s_q * case.h_q),
                sizes.partial_rows,
                "rows of workspace",
            ),
        ):
            if needed > there:
                raise ValueError(f"{case.name}: needs {needed} {what}; there are {there}")
        workspace = grid._fresh_workspace(rows=sizes.partial_rows, dv=DV)
        results = [
            grid._fresh_results(rows=sizes.out_rows, dv=DV, dtype="bfloat16") for _ in range(2)
        ]
        schedule = jax.device_put(np.full((sizes.parts, 8), -1, np.int32))
        num_splits = jax.device_put(np.full(sizes.requests + 1, -1, np.int32))
        raw.wait_for(
            self.queries, sinks, schedule, num_splits, *workspace, *jax.tree.leaves(results)
        )
        for source in sources:
            raw.wait_for(source.cache, source.indices, source.lengths)

        def lengths(source: Source) -> int:
            return 0 if source.host_lengths is None else raw.address_of(source.lengths)

        first, extra = sources[0], sources[1] if len(sources) > 1 else None
        raw.raw_module().run(
            raw.schedule_params(
                batch=case.b,
                num_parts=parts,
                row_tiles=row_tiles,
                topk=first.topk,
                extra_topk=None if extra is None else extra.topk,
                lengths=lengths(first),
                extra_lengths=0 if extra is None else lengths(extra),
                schedule=raw.address_of(schedule),
                num_splits=raw.address_of(num_splits),
            )
        )
        more = {}
        if extra is not None:
            more = {
                "extra_k_cache": raw.address_of(extra.cache),
                "extra_indices": raw.address_of(extra.indices),
                "extra_topk_length": lengths(extra),
                "extra_num_pages": extra.pages,
                "extra_page_size": extra.page_size,
                "extra_topk": extra.topk,
            }
        # The second time the workspace is as the first has left it, which must not matter.
        for out, lse in results:
            raw.raw_module().run(
                raw.sparse_decode_params(
                    b=case.b,
                    s_q=case.s_q,
                    h_q=case.h_q,
                    head_dim=case.d,
                    head_dim_v=DV,
                    num_pages=first.pages,
                    page_size=first.page_size,
                    topk=first.topk,
                    num_parts=parts,
                    num_slots=slots,
                    softmax_scale=case.softmax_scale,
                    cache_format=self.cache_format,
                    k_cache=raw.address_of(first.cache),
                    indices=raw.address_of(first.indices),
                    topk_length=lengths(first),
                    **more,
                    q=raw.address_of(self.queries) + first_query * case.d * 2,
                    schedule=raw.address_of(schedule),
                    attn_sink=raw.address_of(sinks),
                    out=raw.address_of(out),
                    lse=raw.address_of(lse),
                    partial_out=raw.address_of(workspace[0]),
                    partial_sums=raw.address_of(workspace[1]),
                    schedule_is_broken=raw.address_of(workspace[2]),
                )
            )
        return results

    def _run(self, case: GridCase, seed: int) -> tuple[list[str], dict[str, float]]:
        if case.cache_format != self.cache_format:
            raise ValueError(f"{case.name}: not a case for this runner")
        rng = cases._rng(case, seed, "runner")
        rows = case.b * case.s_q * case.h_q
        for there, what in ((self.sizes.out_rows - 1, "results"), (len(self.queries), "queries")):
            if rows > there:
                raise ValueError(f"{case.name}: needs {rows} {what}; there are {there}")
        sources = [self.source(case, False, rng)]
        if case.extra:
            sources.append(self.source(case, True, rng))
        sinks = np.full(_HEADS, -np.inf, np.float32)
        if case.flags.sink:
            sinks[: case.h_q] = rng.normal(3, 4, case.h_q)
            sinks[:2] = np.inf, -np.inf
        sinks = jax.device_put(sinks)
        first_query = int(rng.integers(0, len(self.queries) - rows + 1))
        results = self.launch(case, sources, sinks if case.flags.sink else None, first_query)
        different = grid._different_bits(*results[0], *results[1])
        numbers = {"b": case.b, "s_q": case.s_q, "h_q": case.h_q, "first_query": first_query}
        found = _compare(
            self.queries,
            tuple(
                {
                    "values": source.values,
                    "indices": source.indices,
                    "counts": source.counts,
                    "topk": np.int32(source.topk),
                }
                for source in sources
            ),
            sinks,
            *results[0],
            {name: np.int32(value) for name, value in numbers.items()},
            np.float32(case.softmax_scale),
            items=self.sizes.items,
        )
        found, different = jax.device_get((found, different))
        return grid.judged("sparse_decode", case, found, rows, int(different))


class Runners:
    """A runner of each format, made when it is first needed."""

    def __init__(self) -> None:
        self._runners: dict[str, Runner] = {}

    def run(self, case: GridCase) -> Outcome:
        """Runs one case."""
        if case.cache_format not in self._runners:
            self._runners[case.cache_format] = Runner(case.cache_format)
        return self._runners[case.cache_format].run(case)


def main(arguments: list[str] | None = None) -> int:
    parser = grid.script_parser(__doc__.splitlines()[0])
    options: argparse.Namespace = parser.parse_args(arguments)
    command = ["python", "tests/gpu/sparse_grid.py", "--out", options.out.name]
    problems = list(sparse_cases.grid())
    return grid.run_script(parser, options, problems, lambda: Runners().run, command, {})


if __name__ == "__main__":
    sys.exit(main())
