"""The peer's grid of dense decode cases on a GPU: ``python tests/gpu/grid.py --out grid.jsonl``.

The kernels are launched without XLA around them, so a case costs no compilation. Everything XLA
does around a case has one static shape for all of them: the cache is a pool of random tokens that
is made once; a case gets a copy of it in which every slot that the case does not use is NaN, and
its results are compared on the device with a float32 reference that shares nothing with
``jax_flashmla``. Results go to a file of JSON lines; cases that the file says have passed (with
the same compiled kernels) are not run again. Exit status: 0 all cases passed, 1 some failed,
3 some were not run yet (``--time-limit``).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import oracle  # noqa: E402
import raw_launcher as raw  # noqa: E402
from cases import DenseCase  # noqa: E402
from jax import lax  # noqa: E402

from jax_flashmla import _dispatch, _ffi, _planning  # noqa: E402

DIMS = (576, 512)

# Tiles of the reference: work items (a request, a key head, 64 query rows) at a time, and tokens.
_ITEMS, _ROWS, _TOKENS = 32, 64, 512
# Bound on the norm of lse errors where scores are peaked.
LSE_NORM = 1e-5

# Plain library products without a search for the fastest: there is little to gain here, and the
# search would take longer than some cases.
_COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
_jit = functools.partial(jax.jit, compiler_options=_COMPILER_OPTIONS)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of the arrays that all cases share; a case that needs more is an error.

    Attributes:
        cache_rows: tokens x key heads of the pool. The default is 6.0 GB of 16-bit numbers, more
            than 2^31 elements and 2^32 bytes, and fits the largest case of the grid.
        out_rows: query tokens x heads of the results, some more than any case has.
        query_rows: the same of the pool of queries.
        partial_rows: rows of the workspace for partial results.
        pages: pages of the cache that a case chooses from.
        table: entries of all rows of a block table.
        requests: requests of a batch.
        items: work items of the reference.
        parts: rows of a schedule.
        sinks: attention sinks, of all requests if they differ.
    """

    cache_rows: int = 5 << 20
    out_rows: int = (1 << 16) + 512
    query_rows: int = 3 << 15
    partial_rows: int = 1 << 18
    pages: int = 1 << 17
    table: int = 1 << 16
    requests: int = 1024
    items: int = 2048
    parts: int = 1024
    sinks: int = 1 << 15


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case and how it is run.

    Attributes:
        case: of scores "flat"; its page size, lengths and flags count, ``attn_sink`` does not.
        num_sm_parts: rows of the schedule; by default as many as the public functions plan.
        batch_invariant: as in the public functions.
        softmax_scale: default that of the case.
        by_norm: judge by the norm of the errors: for scores so peaked that rounding shows.
        sink: None, "heads" or "requests": attention sinks, infinite ones among them, that all
            requests share or not.
        last_pages: use the last pages of the pool, not any.
    """

    case: DenseCase
    num_sm_parts: int | None = None
    batch_invariant: bool = False
    softmax_scale: float | None = None
    by_norm: bool = False
    sink: str | None = None
    last_pages: bool = False

    @property
    def name(self) -> str:
        """The name of the case and whatever differs from the defaults."""
        default = Problem(self.case)
        changes = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name != "case" and getattr(self, field.name) != getattr(default, field.name)
        ]
        return " ".join([self.case.name, *changes])


@dataclasses.dataclass
class Outcome:
    """What became of a problem: ``failures`` is empty if all was right."""

    name: str
    failures: list[str]
    errors: dict[str, float]
    seconds: float


# ---------------------------------------------------------------------------------------------
# On the device. Shapes are static; what a case is, comes as numbers.


@functools.partial(_jit, static_argnames=("rows", "d", "dtype"))
def _random_rows(key: jax.Array, *, rows: int, d: int, dtype: str) -> jax.Array:
    """Normal / 10 clamped to [-1, 1], [rows, d], a slice at a time to bound the memory."""
    chunk = math.gcd(rows, 1 << 16)

    def one(index):
        values = jax.random.normal(jax.random.fold_in(key, index), (chunk, d), jnp.float32)
        return jnp.clip(values * 0.1, -1, 1).astype(dtype)

    return lax.map(one, jnp.arange(rows // chunk)).reshape(rows, d)


@_jit
def _poisoned(pool: jax.Array, counts: jax.Array, numbers: dict[str, jax.Array]) -> jax.Array:
    """The pool with NaN in every slot but the first ``counts[i]`` of page ``first_page + i``."""
    slot = jnp.arange(pool.shape[0], dtype=jnp.int32) // numbers["h_kv"]
    page = slot // numbers["page_size"] - numbers["first_page"]
    inside = (page >= 0) & (page < counts.shape[0])
    count = jnp.where(inside, counts[jnp.where(inside, page, 0)], 0)
    # Once for each row, not again for each of its columns.
    used = lax.optimization_barrier(slot % numbers["page_size"] < count)
    return jnp.where(used[:, None], pool, jnp.asarray(jnp.nan, pool.dtype))


@_jit
def _count_rows(cache: jax.Array) -> jax.Array:
    """How many rows begin and end with a number, and how many with NaN."""
    nan = jnp.isnan(cache[:, :: cache.shape[1] - 1])
    return jnp.stack([jnp.sum(~nan.any(axis=1)), jnp.sum(nan.all(axis=1))])


@functools.partial(_jit, static_argnames=("rows", "dv", "dtype"))
def _fresh_results(*, rows: int, dv: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    return jnp.full((rows, dv), jnp.nan, dtype), jnp.full((rows,), jnp.nan, jnp.float32)


@functools.partial(_jit, static_argnames=("rows", "dv"))
def _fresh_workspace(*, rows: int, dv: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    # One value more in the second, so that nothing can make them one buffer.
    return (
        jnp.full((rows, dv), jnp.nan, jnp.float32),
        jnp.full((64 * rows + 1,), jnp.nan, jnp.float32),
        jnp.full((1,), -1, jnp.int32),
    )


@_jit
def _different_bits(out: jax.Array, lse: jax.Array, out2: jax.Array, lse2: jax.Array) -> jax.Array:
    def bits(x):
        return lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)

    return jnp.sum(bits(out) != bits(out2)) + jnp.sum(bits(lse) != bits(lse2))


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounded to ``dtype``; a pair of conversions XLA might drop."""
    info = jnp.finfo(dtype)
    normal = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if jnp.dtype(dtype) != jnp.float16:
        return normal
    # Its subnormal numbers, which reduce_precision flushes to zero, are multiples of 2^-24.
    small = jnp.round(x * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(x) < float(info.tiny), small, normal)


def _judge(got: jax.Array, want: jax.Array, valid: jax.Array, tolerance: oracle.Tolerance):
    """Errors of one result: which elements are bad, their errors, and sums for the norms.

    Anything but a finite number is bad unless it is the same infinity as expected.
    """
    same = jnp.isinf(want) & (got == want)
    finite = jnp.isfinite(want) & jnp.isfinite(got)
    error = jnp.where(finite, jnp.abs(got - want), jnp.inf)
    error = jnp.where(valid & ~same, error, 0.0)
    within = (error <= tolerance.abs) | (error <= tolerance.rel * jnp.abs(want))
    bad = valid & ~same & ~(finite & within)
    usable, wanted = (jnp.where(valid & finite, x, 0.0) for x in (got, want))
    sums = jnp.stack([jnp.sum((usable - wanted) ** 2), jnp.sum(usable**2), jnp.sum(wanted**2)])
    return bad, error, sums


def _worst(old: dict[str, jax.Array], error, index, got, want) -> dict[str, jax.Array]:
    at = jnp.argmax(error)
    new = {"error": error, "index": index, "got": got, "want": want}
    new = {name: value.reshape(-1)[at] for name, value in new.items()}
    return {name: jnp.where(new["error"] > old["error"], new[name], old[name]) for name in old}


def no_errors() -> dict[str, Any]:
    """What ``account`` starts from."""
    none = {
        "error": jnp.float32(-1),
        "index": jnp.int32(-1),
        "got": jnp.float32(0),
        "want": jnp.float32(0),
    }
    worst = ("worst", "worst_bad", "worst_lse", "worst_bad_lse")
    state = {name: jnp.int32(0) for name in ("rows", "bad", "bad_lse")}
    state |= {"sums": jnp.zeros(3), "sums_lse": jnp.zeros(3)}
    return state | {name: none for name in worst}


def account(
    state: dict[str, Any],
    op: str,
    got: jax.Array,
    want: jax.Array,
    got_lse: jax.Array,
    want_lse: jax.Array,
    valid: jax.Array,
    out_row: jax.Array,
    lse_index: jax.Array,
) -> dict[str, Any]:
    """Adds rows of results, those that are ``valid``, to the errors found so far.

    ``out_row`` and ``lse_index`` say where in the results of the case they are.
    """
    dv = got.shape[-1]
    bad, error, sums = _judge(got, want, valid[..., None], oracle.TOLERANCES[op, "out"])
    index = out_row[..., None] * dv + jnp.arange(dv)
    bad_lse, error_lse, sums_lse = _judge(got_lse, want_lse, valid, oracle.TOLERANCES[op, "lse"])
    return {
        "rows": state["rows"] + jnp.sum(valid),
        "bad": state["bad"] + jnp.sum(bad),
        "bad_lse": state["bad_lse"] + jnp.sum(bad_lse),
        "sums": state["sums"] + sums,
        "sums_lse": state["sums_lse"] + sums_lse,
        "worst": _worst(state["worst"], error, index, got, want),
        "worst_bad": _worst(state["worst_bad"], jnp.where(bad, error, -1.0), index, got, want),
        "worst_lse": _worst(state["worst_lse"], error_lse, lse_index, got_lse, want_lse),
        "worst_bad_lse": _worst(
            state["worst_bad_lse"],
            jnp.where(bad_lse, error_lse, -1.0),
            lse_index,
            got_lse,
            want_lse,
        ),
    }


def written_after(out: jax.Array, lse: jax.Array, rows: jax.Array) -> jax.Array:
    """How many elements that no row of the case owns are not as they were."""
    after = jnp.arange(out.shape[0]) >= rows
    return jnp.sum(~jnp.isnan(out) & after[:, None]) + jnp.sum(~jnp.isnan(lse) & after)


@_jit
def _compare(
    pool: jax.Array,
    queries: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    items: jax.Array,
    sinks: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    numbers: dict[str, jax.Array],
    scale: jax.Array,
) -> dict[str, Any]:
    """Attention in float32 from the definition, and how ``out`` and ``lse`` differ from it.

    Items are int32[., 3]: request, key head, first query row of the (query token, head) rows of
    that key head; the longest requests first, so that those done together are of similar length.
    """
    n, dv = numbers, out.shape[1]
    group = n["h_q"] // n["h_kv"]

    def chunk(number, state):
        item = lax.dynamic_slice_in_dim(items, number * _ITEMS, _ITEMS)
        exists = number * _ITEMS + jnp.arange(_ITEMS) < n["items"]
        request, kv_head = item[:, 0], item[:, 1]
        length = jnp.where(exists, lengths[request], 0)
        row = item[:, 2:] + jnp.arange(_ROWS)
        valid = exists[:, None] & (row < n["s_q"] * group)
        row = jnp.where(valid, row, 0)
        token, head = row // group, kv_head[:, None] * group + row % group
        out_row = (request[:, None] * n["s_q"] + token) * n["h_q"] + head
        lse_index = (request[:, None] * n["h_q"] + head) * n["s_q"] + token
        q = queries[n["first_query"] + out_row].astype(jnp.float32)
        hidden = jnp.where(n["causal"] != 0, n["s_q"] - 1 - token, 0)
        end = length[:, None] - hidden  # tokens that a row attends to

        def block(number, carry):
            top, total, weighted = carry
            position = number * _TOKENS + jnp.arange(_TOKENS)
            inside = position < length[:, None]
            entry = request[:, None] * n["width"] + position // n["page_size"]
            page = table[jnp.where(inside, entry, 0)]
            slot = page * n["page_size"] + position % n["page_size"]
            cache_row = jnp.where(inside, slot * n["h_kv"] + kv_head[:, None], 0)
            keys = pool[cache_row].astype(jnp.float32)
            scores = scale * _product("ird,itd->irt", q, keys)
            scores = jnp.where(position < end[..., None], scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            weights, factor = jnp.exp(scores - base[..., None]), jnp.exp(top - base)
            return (
                new_top,
                total * factor + weights.sum(axis=-1),
                weighted * factor[..., None] + _product("irt,itv->irv", weights, keys[..., :dv]),
            )

        shape = (_ITEMS, _ROWS)
        start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, dv)))
        blocks = (jnp.max(length) + _TOKENS - 1) // _TOKENS
        top, total, weighted = lax.fori_loop(0, blocks, block, start)
        seen = total > 0
        want_lse = jnp.where(seen, top + jnp.log(total), jnp.inf)
        sink = sinks[request[:, None] * n["sink_stride"] + head]
        factor = jax.nn.sigmoid(want_lse - sink) / total
        want = weighted * jnp.where(seen, factor, 0.0)[..., None]
        want = _rounded(want, out.dtype)
        got, got_lse = out[out_row].astype(jnp.float32), lse[lse_index]

        return account(
            state, "dense_decode", got, want, got_lse, want_lse, valid, out_row, lse_index
        )

    chunks = (n["items"] + _ITEMS - 1) // _ITEMS
    result = lax.fori_loop(0, chunks, chunk, no_errors())
    return result | {"written_after": written_after(out, lse, n["rows"])}


# ---------------------------------------------------------------------------------------------
# Runner


def _padded(values: np.ndarray, size: int, fill: Any, what: str) -> np.ndarray:
    values = np.asarray(values)
    if len(values) > size:
        raise ValueError(f"the case needs {len(values)} {what}; there are {size}")
    rest = np.full((size - len(values), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, rest])


def _relative_norm(sums: np.ndarray) -> float:
    return 0.0 if sums[0] == 0 else float(np.sqrt(sums[0] / sums[2])) if sums[2] else math.inf


def _cosine_difference(sums: np.ndarray) -> float:
    """1 - 2 sum(x y) / sum(x^2 + y^2), which is sum((x - y)^2) / sum(x^2 + y^2)."""
    return float(sums[0] / (sums[1] + sums[2])) if sums[1] + sums[2] else 0.0


def judged(
    op: str,
    case: Any,
    found: dict[str, Any],
    rows: int,
    different: int,
    *,
    by_norm: bool = False,
) -> tuple[list[str], dict[str, float]]:
    """Failures and errors of a case with s_q, h_q and dv, from what the device has found."""
    failures = []

    def describe(worst: dict[str, Any], columns: int, count: int, result: str) -> str:
        index, column = divmod(int(worst["index"]), columns)
        if result == "out":
            row, head = divmod(index, case.h_q)
            at = (*divmod(row, case.s_q), head, column)
        else:
            row, token = divmod(index, case.s_q)
            at = (*divmod(row, case.h_q), token)
        return (
            f"{result}: {count} elements are out of tolerance, the worst at {at}: "
            f"{worst['got']:.6g} instead of {worst['want']:.6g}"
        )

    if int(found["rows"]) != rows:
        failures.append(f"compared {found['rows']} rows instead of {rows}")
    if found["written_after"]:
        failures.append(f"{found['written_after']} elements were written past the results")
    if different:
        failures.append(f"a second run gave {different} elements with other bits")
    errors = {
        "out_abs": float(found["worst"]["error"]),
        "out_cos": _cosine_difference(found["sums"]),
        "out_norm": _relative_norm(found["sums"]),
        "lse_abs": float(found["worst_lse"]["error"]),
        "lse_cos": _cosine_difference(found["sums_lse"]),
        "lse_norm": _relative_norm(found["sums_lse"]),
    }
    # An infinite error is a NaN or an infinity where there should be none.
    by_element = (
        ("out", "worst_bad", found["bad"], errors["out_abs"], case.dv),
        ("lse", "worst_bad_lse", found["bad_lse"], errors["lse_abs"], 1),
    )
    for result, worst, count, error, columns in by_element:
        if count and not (by_norm and math.isfinite(error)):
            failures.append(describe(found[worst], columns, int(count), result))
    limits = {
        "out_cos": oracle.TOLERANCES[op, "out"].cos,
        "lse_cos": oracle.TOLERANCES[op, "lse"].cos,
    }
    if by_norm:
        limits = {"out_norm": oracle.RELATIVE_NORM, "lse_norm": LSE_NORM}
    for name, limit in limits.items():
        if not errors[name] <= limit:
            failures.append(f"{name} is {errors[name]:.3e}, more than {limit}")
    return failures, errors


class Runner:
    """Runs problems of one dtype and pair (d, dv); everything large is made once."""

    def __init__(self, dtype: str, sizes: Sizes | None = None, dims: tuple[int, int] = DIMS):
        self.dtype, self.sizes, self.dims = dtype, sizes or Sizes(), dims
        key = jax.random.key(0 if dtype == "bfloat16" else 1)
        first, second = jax.random.split(key)
        self.pool = _random_rows(first, rows=self.sizes.cache_rows, d=dims[0], dtype=dtype)
        self.queries = _random_rows(second, rows=self.sizes.query_rows, d=dims[0], dtype=dtype)

    def run(self, problem: Problem, seed: int = 0) -> Outcome:
        """Runs one problem twice and compares.

        Raises ValueError if it does not fit the sizes, RuntimeError if a launch fails.
        """
        start = time.perf_counter()
        failures, errors = self._run(problem, seed)
        return Outcome(problem.name, failures, errors, time.perf_counter() - start)

    def _tables(self, problem: Problem, rng: np.random.Generator, lengths: np.ndarray):
        """Block table [b, width], tokens in each page from ``first_page`` on, ``first_page``."""
        case, sizes = problem.case, self.sizes
        pages_of = -(-lengths.astype(np.int64) // case.page_size)
        used = int(pages_of.sum())
        num_pages = sizes.cache_rows // (case.page_size * case.h_kv)
        choice = min(num_pages, sizes.pages)
        if used > choice:
            raise ValueError(f"{problem.name}: needs {used} pages; there are {choice}")
        if problem.last_pages:
            choice = used
        first_page = num_pages - choice
        chosen = rng.permutation(choice)[:used]
        table = np.full((case.b, int(pages_of.max(initial=0)) + 1), cases.GARBAGE, np.int32)
        filled = np.arange(table.shape[1]) < pages_of[:, None]
        table[filled] = first_page + chosen
        counts = np.zeros(choice, np.int32)
        position = np.broadcast_to(np.arange(table.shape[1]) * case.page_size, table.shape)
        left = np.minimum(lengths[:, None] - position, case.page_size)
        counts[chosen] = left[filled]
        return table, counts, first_page, num_pages

    def _items(self, case: DenseCase, lengths: np.ndarray) -> np.ndarray:
        rows = case.s_q * case.h_q // case.h_kv
        starts = np.arange(0, rows, _ROWS)
        grid = np.meshgrid(np.argsort(-lengths, kind="stable"), np.arange(case.h_kv), starts)
        # Requests vary slowest.
        return np.stack([axis.transpose(1, 0, 2).reshape(-1) for axis in grid], axis=1)

    def _run(self, problem: Problem, seed: int) -> tuple[list[str], dict[str, float]]:
        case, sizes = problem.case, self.sizes
        d, dv = self.dims
        if case.dtype != self.dtype or case.scores != "flat" or (case.d, case.dv) != (d, dv):
            raise ValueError(f"{problem.name}: not a case for this runner")
        rng = cases._rng(case, seed, "runner")
        lengths = case.cache_seqlens(seed)
        table, counts, first_page, num_pages = self._tables(problem, rng, lengths)
        b, s_q, h_q, h_kv = case.b, case.s_q, case.h_q, case.h_kv
        rows, width = b * s_q * h_q, table.shape[1]
        row_tiles = _planning.dense_row_tiles(h_kv, s_q * h_q // h_kv)
        parts = problem.num_sm_parts or _planning.default_num_sm_parts(row_tiles)
        slots = raw.workspace_slots(b, width, case.page_size, parts, problem.batch_invariant)
        for needed, there, what in (
            (rows + 1, sizes.out_rows, "rows of results"),
            (rows, sizes.query_rows, "queries"),
            (
                raw.workspace_rows(slots, slices=h_kv, rows=s_q * h_q),
                sizes.partial_rows,
                "rows of workspace",
            ),
            (parts, sizes.parts, "rows of the schedule"),
            (b, sizes.requests, "requests"),
        ):
            if needed > there:
                raise ValueError(f"{problem.name}: needs {needed} {what}; there are {there}")
        scale = case.softmax_scale if problem.softmax_scale is None else problem.softmax_scale
        sink = np.full(h_q, -np.inf, np.float32)
        if problem.sink is not None:
            sink = rng.normal(3, 4, b * h_q if problem.sink == "requests" else h_q)
            sink[rng.random(sink.shape) < 0.2] = np.inf
            sink[rng.random(sink.shape) < 0.2] = -np.inf
            sink = sink.astype(np.float32)
        items = self._items(case, lengths)
        numbers = {
            "s_q": s_q,
            "h_q": h_q,
            "h_kv": h_kv,
            "page_size": case.page_size,
            "width": width,
            "causal": case.causal,
            "first_page": first_page,
            "first_query": int(rng.integers(0, sizes.query_rows - rows + 1)),
            "sink_stride": h_q if problem.sink == "requests" else 0,
            "items": len(items),
            "rows": rows,
        }
        numbers = {name: np.int32(value) for name, value in numbers.items()}

        put = jax.device_put
        counts = put(_padded(counts, sizes.pages, 0, "pages"))
        self.cache = None  # two copies at a time would not always fit
        self.cache = _poisoned(self.pool, counts, numbers)
        on_device = {
            "table": put(_padded(table.reshape(-1), sizes.table, cases.GARBAGE, "table entries")),
            "lengths": put(_padded(lengths, sizes.requests, -1, "requests")),
            "sinks": put(_padded(sink, sizes.sinks, np.float32(np.nan), "sinks")),
            "schedule": put(np.full((sizes.parts, 8), -1, np.int32)),
            "num_splits": put(np.full(sizes.requests + 1, -1, np.int32)),
            "workspace": _fresh_workspace(rows=sizes.partial_rows, dv=dv),
            "results": _fresh_results(rows=sizes.out_rows, dv=dv, dtype=self.dtype),
            "again": _fresh_results(rows=sizes.out_rows, dv=dv, dtype=self.dtype),
        }
        used_rows, nan_rows = np.asarray(_count_rows(self.cache)).tolist()
        tokens = int(lengths.astype(np.int64).sum())
        if (used_rows, nan_rows) != (tokens * h_kv, sizes.cache_rows - tokens * h_kv):
            raise AssertionError(f"{problem.name}: {used_rows} rows in use, {nan_rows} NaN")
        raw.wait_for(self.pool, self.queries, self.cache, *jax.tree.leaves(on_device))

        address = {
            name: raw.address_of(on_device[name]) for name in ("table", "lengths", "schedule")
        }
        plan = raw.schedule_params(
            batch=b,
            num_parts=parts,
            row_tiles=row_tiles,
            batch_invariant=problem.batch_invariant,
            lengths=address["lengths"],
            schedule=address["schedule"],
            num_splits=raw.address_of(on_device["num_splits"]),
        )

        def launch(results):
            partial_out, partial_sums, status = on_device["workspace"]
            row_bytes = d * self.queries.dtype.itemsize
            raw.raw_module().run(
                raw.dense_decode_params(
                    b=b,
                    s_q=s_q,
                    h_q=h_q,
                    h_kv=h_kv,
                    head_dim=d,
                    head_dim_v=dv,
                    num_pages=num_pages,
                    page_size=case.page_size,
                    table_width=width,
                    num_parts=parts,
                    num_slots=slots,
                    softmax_scale=scale,
                    is_fp16=self.dtype == "float16",
                    causal=case.causal,
                    batch_invariant=problem.batch_invariant,
                    sink_per_request=problem.sink == "requests",
                    q=raw.address_of(self.queries) + int(numbers["first_query"]) * row_bytes,
                    k_cache=raw.address_of(self.cache),
                    block_table=address["table"],
                    cache_seqlens=address["lengths"],
                    schedule=address["schedule"],
                    attn_sink=raw.address_of(on_device["sinks"]) if problem.sink else 0,
                    out=raw.address_of(results[0]),
                    lse=raw.address_of(results[1]),
                    partial_out=raw.address_of(partial_out),
                    partial_sums=raw.address_of(partial_sums),
                    schedule_is_broken=raw.address_of(status),
                )
            )

        raw.raw_module().run(plan)
        launch(on_device["results"])
        # The second time the workspace is as the first has left it, which must not matter.
        launch(on_device["again"])
        different = int(_different_bits(*on_device["results"], *on_device["again"]))
        found = jax.device_get(
            _compare(
                self.pool,
                self.queries,
                on_device["table"],
                on_device["lengths"],
                put(_padded(items.astype(np.int32), sizes.items, 0, "items")),
                on_device["sinks"],
                *on_device["results"],
                numbers,
                np.float32(scale),
            )
        )
        return judged("dense_decode", case, found, rows, different, by_norm=problem.by_norm)


# ---------------------------------------------------------------------------------------------
# The script


def build_fingerprint() -> str:
    """Changes whenever the compiled kernels do: results of other kernels do not count."""
    path = _ffi.build_info().get("path")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else "none"


def environment() -> dict[str, Any]:
    """Versions and device, for the record."""
    import jaxlib

    device = jax.devices()[0]
    info = _ffi.build_info()
    extension = _ffi.extension()
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "gpu": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "driver": driver,
        "driver_cuda": extension.driver_version() if extension is not None else 0,
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "build": {name: value for name, value in info.items() if name != "path"},
        "fingerprint": build_fingerprint(),
    }


def read_results(path: Path, fingerprint: str) -> dict[str, dict[str, Any]]:
    """The last result of each case in a file, of these kernels. An unfinished line is ignored."""
    results: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return results
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "case" in entry and entry.get("fingerprint") == fingerprint:
            results[entry["case"]] = entry
    return results


def summarise(
    wanted: Iterable[str], results: dict[str, dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Counts and worst errors of all cases wanted, run now or earlier."""
    wanted = list(wanted)
    done = [results[name] for name in wanted if name in results]
    worst = {}
    for error in ("out_abs", "out_cos", "out_norm", "lse_abs", "lse_cos", "lse_norm"):
        entries = [e for e in done if error in e.get("errors", {})]
        if entries:
            # What is not finite was written as text, and is worse than any number.
            entry = max(entries, key=lambda e: float(e["errors"][error]))
            worst[error] = {"value": entry["errors"][error], "case": entry["case"]}
    return {
        **facts,
        "total": len(wanted),
        "passed": sum(e["passed"] for e in done),
        "failed": sum(not e["passed"] for e in done),
        "not_run": len(wanted) - len(done),
        "case_seconds": round(sum(e["seconds"] for e in done), 1),
        "worst_errors": worst,
        "failures": {e["case"]: e["failures"] for e in done if not e["passed"]},
    }


def _finite(errors: dict[str, float]) -> dict[str, float | str]:
    return {n: v if math.isfinite(v) else repr(v) for n, v in errors.items()}


def run_cases(
    problems: list[Problem],
    run: Callable[[Problem], Outcome],
    path: Path,
    fingerprint: str,
    time_limit: float | None,
) -> dict[str, dict[str, Any]]:
    """Runs what has not passed yet, writing each result at once; returns all results.

    A launch that fails leaves the device unusable, so it ends the run.
    """
    results = read_results(path, fingerprint)
    todo = [p for p in problems if not results.get(p.name, {}).get("passed")]
    print(f"{len(problems)} cases, {len(problems) - len(todo)} of them passed before", flush=True)
    start = shown = time.monotonic()
    failed = 0
    # A line of its own, should the file end in an unfinished one.
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        if torn:
            file.write("\n")
        for number, problem in enumerate(todo):
            now = time.monotonic()
            if time_limit is not None and now - start > time_limit:
                print(f"time limit: {len(todo) - number} cases are left", flush=True)
                break
            lost = None
            try:
                outcome = run(problem)
            except RuntimeError as error:  # CUDA errors, also as XlaRuntimeError
                lost = error
                outcome = Outcome(problem.name, [f"{type(error).__name__}: {error}"], {}, 0.0)
            entry = {
                "case": outcome.name,
                "passed": not outcome.failures,
                "failures": outcome.failures,
                "errors": _finite(outcome.errors),
                "seconds": round(outcome.seconds, 4),
                "fingerprint": fingerprint,
            }
            results[problem.name] = entry
            file.write(json.dumps(entry) + "\n")
            file.flush()
            if outcome.failures:
                failed += 1
                print(f"FAILED {outcome.name}: " + "; ".join(outcome.failures), flush=True)
            now = time.monotonic()
            if now - shown > 5 or number + 1 == len(todo):
                shown = now
                rate = (now - start) / (number + 1)
                print(
                    f"{number + 1}/{len(todo)} cases, {failed} failed, {now - start:.0f} s, "
                    f"about {rate * (len(todo) - number - 1):.0f} s left, last {outcome.name}",
                    flush=True,
                )
            if lost is not None:
                print("the device cannot be used any further", flush=True)
                break
    return results


def script_parser(description: str) -> argparse.ArgumentParser:
    """Options that all grids have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", required=True, type=Path, help="file of results, JSON lines")
    parser.add_argument("--time-limit", type=float, help="stop before a new case after so many s")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--summary", type=Path, help="file of the summary; default: beside --out, .summary.json"
    )
    return parser


def run_script(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    problems: list[Any],
    make_run: Callable[[], Callable[[Any], Outcome]],
    command: list[str],
    facts: dict[str, Any],
) -> int:
    """Runs the problems that ``--filter`` leaves and writes a summary; returns the exit status.

    ``command`` and ``facts`` are what is to be said of the run in particular.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    problems = [p for p in problems if options.filter in p.name]
    if not problems:
        parser.error(f"no case has {options.filter!r} in its name")
    reason = _dispatch.kernels_missing()
    if reason is not None or jax.default_backend() != "gpu":
        parser.error(reason or f"JAX's default backend is {jax.default_backend()}, not a GPU")
    where = environment()
    print(f"{where['gpu']}, jax {where['jax']}, kernels {where['fingerprint']}", flush=True)
    start = time.monotonic()
    results = run_cases(problems, make_run(), options.out, where["fingerprint"], options.time_limit)
    command = [*command, "--filter", options.filter] if options.filter else command
    command += ["--time-limit", f"{options.time_limit:g}"] if options.time_limit else []
    facts = {"command": shlex.join(command), "started": started, **facts, **where}
    facts["seconds_of_last_run"] = round(time.monotonic() - start, 1)
    summary = summarise([p.name for p in problems], results, facts)
    text = json.dumps(summary, indent=2)
    (options.summary or options.out.with_suffix(".summary.json")).write_text(
        text + "\n", encoding="utf-8"
    )
    print(text, flush=True)
    if summary["failed"]:
        return 1
    return 3 if summary["not_run"] else 0


def main(arguments: list[str] | None = None) -> int:
    parser = script_parser(__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    options = parser.parse_args(arguments)
    # The directory of the results says nothing to anybody else.
    command = ["python", "tests/gpu/grid.py", "--out", options.out.name, "--dtype", options.dtype]
    return run_script(
        parser,
        options,
        [Problem(case) for case in cases.dense_grid(options.dtype)],
        lambda: Runner(options.dtype).run,
        command,
        {"dtype": options.dtype},
    )


if __name__ == "__main__":
    sys.exit(main())
