"""Named cases of decode and sparse prefill, and their inputs: shared by tests and benchmarks.

A case is a frozen dataclass of sizes and flags; ``build`` makes its inputs from a seed with
numpy alone, on the host. What an operation must not read is poisoned: slots that no request
refers to are NaN, table entries past a request's length are 2147480000.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import oracle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: What table entries past a request's length hold: no page, and large enough to overflow.
GARBAGE = 2147480000

#: Arguments of ``flash_mla_with_kvcache`` that are static where it is jitted.
STATIC = (
    "head_dim_v",
    "softmax_scale",
    "causal",
    "is_fp8_kvcache",
    "implementation",
    "batch_invariant",
    "fp8_matmul",
    "power_of_two_scales",
    "num_sm_parts",
)

DTYPES = {
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class DenseCase:
    """One call of dense decode.

    ``lengths``: "uniform" (all s_k), "varying" (normal with mean s_k and deviation s_k / 2, at
    least s_q), or the lengths themselves. ``empty``: some requests have length 0.
    ``scores``: how they are distributed: "flat" (inputs normal / 10 clamped to [-1, 1], so their
    deviation is far below 1), "peaked3" and "peaked10" (deviation 3 and 10), "rising" (the running
    maximum rises by about 30 along the keys).
    ``peer_us``: what the peer takes on an H200, in microseconds, where measured.
    """

    name: str
    b: int
    s_k: int
    h_q: int
    s_q: int = 1
    h_kv: int = 1
    d: int = 576
    dv: int = 512
    page_size: int = 64
    dtype: str = "bfloat16"
    causal: bool = False
    lengths: str | tuple[int, ...] = "uniform"
    empty: bool = False
    scores: str = "flat"
    attn_sink: bool = False
    peer_us: float | None = None

    @property
    def softmax_scale(self) -> float:
        """The default scale of the operation, stated."""
        return self.d**-0.5

    def cache_seqlens(self, seed: int = 0) -> np.ndarray:
        """int32[b], the actual lengths."""
        if not isinstance(self.lengths, str):
            return np.asarray(self.lengths, np.int32)
        if self.lengths == "uniform":
            lengths = np.full(self.b, self.s_k)
        else:
            drawn = _rng(self, seed, "lengths").normal(self.s_k, self.s_k / 2, self.b)
            lengths = np.maximum(drawn, self.s_q).astype(np.int64)
        if self.empty:
            # Always the last one, never the first, and a fifth of the others.
            hole = _rng(self, seed, "empty").random(self.b) < 0.2
            hole[0], hole[-1] = False, True
            lengths = np.where(hole, 0, lengths)
        return lengths.astype(np.int32)

    def flop(self, seed: int = 0) -> int:
        """Floating-point operations: 2 (tokens attended) h_q s_q (d + dv)."""
        tokens = int(self.cache_seqlens(seed).astype(np.int64).sum())
        return 2 * tokens * self.h_q * self.s_q * (self.d + self.dv)

    def bytes(self, seed: int = 0) -> int:
        """Bytes that must move: each attended token once, q in and out."""
        tokens = int(self.cache_seqlens(seed).astype(np.int64).sum())
        size = DTYPES[self.dtype].itemsize
        return size * (
            tokens * self.h_kv * self.d + self.b * self.s_q * self.h_q * (self.d + self.dv)
        )


@dataclass
class DenseInputs:
    """Arrays of one dense case; ``call`` gives the arguments of flash_mla_with_kvcache."""

    case: DenseCase
    q: np.ndarray
    k_cache: np.ndarray
    block_table: np.ndarray
    cache_seqlens: np.ndarray
    attn_sink: np.ndarray | None

    def call(self) -> dict[str, Any]:
        """Keyword arguments of flash_mla_with_kvcache."""
        return {
            "q": self.q,
            "k_cache": self.k_cache,
            "block_table": self.block_table,
            "cache_seqlens": self.cache_seqlens,
            "head_dim_v": self.case.dv,
            "softmax_scale": self.case.softmax_scale,
            "causal": self.case.causal,
            "attn_sink": self.attn_sink,
        }

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's out and lse."""
        return oracle.dense_decode(
            self.q,
            self.k_cache,
            self.block_table,
            self.cache_seqlens,
            self.case.dv,
            softmax_scale=self.case.softmax_scale,
            causal=self.case.causal,
            attn_sink=self.attn_sink,
        )


def _rng(case: Any, seed: int, purpose: str) -> np.random.Generator:
    """Its own stream of random numbers for each case, seed and purpose."""
    return np.random.default_rng([seed, *f"{case.name}/{purpose}".encode()])


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(deviation)
    return values


def _query_deviation(scores: str, scale: float, d: int) -> float:
    """Deviation of q such that scale * q.k deviates as asked, keys being normal / 10."""
    wanted = {"peaked3": 3.0, "peaked10": 10.0}.get(scores)
    return 0.1 if wanted is None else wanted / (scale * 0.1 * d**0.5)


RISE = 30.0


def build(case: DenseCase, seed: int = 0) -> DenseInputs:
    """The inputs of a dense case. The cache has one page more than all requests use."""
    dtype = DTYPES[case.dtype]
    rng = _rng(case, seed, "values")
    lengths = case.cache_seqlens(seed)
    pages_of = -(-lengths.astype(np.int64) // case.page_size)
    used = int(pages_of.sum())

    q = _normal(
        rng,
        (case.b, case.s_q, case.h_q, case.d),
        _query_deviation(case.scores, case.softmax_scale, case.d),
    )
    k_cache = np.full((used + 1, case.page_size, case.h_kv, case.d), np.nan, dtype)
    block_table = np.full((case.b, int(pages_of.max(initial=0)) + 1), GARBAGE, np.int32)
    order = rng.permutation(used + 1)[:used].astype(np.int32)
    taken = 0
    for request, (length, count) in enumerate(
        zip(lengths.tolist(), pages_of.tolist(), strict=True)
    ):
        pages = order[taken : taken + count]
        taken += count
        block_table[request, :count] = pages
        keys = _normal(rng, (length, case.h_kv, case.d), 0.1)
        if case.scores == "flat":
            np.clip(keys, -1, 1, out=keys)
        elif case.scores == "rising":
            # The last column of q is 8: the score gains RISE from the first key to the last.
            ramp = np.linspace(0, RISE / (case.softmax_scale * 8), length, dtype=np.float32)
            keys[:, :, -1] = ramp[:, None]
        tokens = np.full((count * case.page_size, case.h_kv, case.d), np.nan, dtype)
        tokens[:length] = keys.astype(dtype)
        k_cache[pages] = tokens.reshape(count, case.page_size, case.h_kv, case.d)
    if case.scores == "flat":
        np.clip(q, -1, 1, out=q)
    elif case.scores == "rising":
        q[..., -1] = 8
    sink = _normal(rng, (case.h_q,), 4.0) if case.attn_sink else None
    if sink is not None and case.h_q >= 3:
        sink[:2] = np.inf, -np.inf
    return DenseInputs(case, q.astype(dtype), k_cache, block_table, lengths, sink)


# ---------------------------------------------------------------------------------------
# Lists of dense cases
# ---------------------------------------------------------------------------------------

# The grid of the peer's own test.
GRID = {
    "b": (1, 2, 6, 64, 128),
    "s_q": (1, 2, 4),
    "s_k": (20, 140, 4096),
    "h_q": (1, 3, 9, 63, 64, 126, 128),
    "h_kv": (1, 2, 3, 8),
    "varying": (False, True),
    "causal": (False, True),
}


def _grid_case(b, s_q, s_k, h_q, h_kv, varying, causal, dtype="bfloat16") -> DenseCase:
    name = (
        f"grid-b{b}-sq{s_q}-sk{s_k}-hq{h_q}-hkv{h_kv}"
        f"{'-varying' if varying else ''}{'-causal' if causal else ''}-{dtype}"
    )
    return DenseCase(
        name,
        b,
        s_k,
        h_q,
        s_q,
        h_kv,
        dtype=dtype,
        causal=causal,
        lengths="varying" if varying else "uniform",
        # A lone request of length 0 would test nothing else.
        empty=varying and b > 1,
    )


def dense_grid(dtype: str = "bfloat16") -> Iterator[DenseCase]:
    """The full grid: every combination whose h_kv divides h_q."""
    for point in itertools.product(*GRID.values()):
        if point[3] % point[4] == 0:
            yield _grid_case(*point, dtype=dtype)


def _pairwise(
    axes: dict[str, tuple], valid: Callable[[tuple], bool], cost: Callable[[tuple], int]
) -> list[tuple]:
    """Points of a grid that have every pair of values which some valid point has.

    Greedy and deterministic: the point with the most new pairs next, the cheapest of these.
    """
    points = [p for p in itertools.product(*axes.values()) if valid(p)]
    numbers: dict[tuple, int] = {}

    def pairs(point):
        mask = 0
        for (i, x), (j, y) in itertools.combinations(enumerate(point), 2):
            mask |= 1 << numbers.setdefault((i, x, j, y), len(numbers))
        return mask

    masks = sorted(((pairs(p), p) for p in points), key=lambda item: cost(item[1]))
    missing = (1 << len(numbers)) - 1
    chosen = []
    while missing:
        mask, point = max(masks, key=lambda item: (item[0] & missing).bit_count())
        missing &= ~mask
        chosen.append(point)
    return chosen


@functools.cache
def dense_pairwise() -> tuple[DenseCase, ...]:
    """A subset of the grid over bf16 and fp16 that has every pair of values that some point has."""

    def cost(point):
        b, s_q, s_k, h_q, h_kv = point[:5]
        return b * s_k * (h_kv * 64 + h_q * s_q)

    axes = {**GRID, "dtype": ("bfloat16", "float16")}
    points = _pairwise(axes, lambda point: point[3] % point[4] == 0, cost)
    return tuple(_grid_case(*point) for point in points)


# What serving meets beyond the peer's grid: heads under tensor parallelism and around row tiles,
# every page size the kernel tells apart, and more query tokens.
SHAPES = {
    "h_q": (1, 8, 10, 16, 20, 32, 63, 64, 65, 96, 100, 128, 160, 192, 256),
    "h_kv": (1, 2),
    "s_q": (1, 2, 3, 8, 64),
    "page_size": (8, 16, 32, 64, 128, 256),
    "lengths": ("uniform", "varying", (1, 64, 129, 511)),
    "causal": (False, True),
    "attn_sink": (False, True),
    "dtype": ("bfloat16", "float16"),
}


@functools.cache
def _shape_points() -> list[dict[str, Any]]:
    def cost(point):
        h_q, h_kv, s_q, _, lengths = point[:5]
        return (2 if lengths == "varying" else 1) * (h_kv * 64 + h_q * s_q)

    points = _pairwise(SHAPES, lambda point: point[0] % point[1] == 0, cost)
    return [dict(zip(SHAPES, point, strict=True)) for point in points]


def dense_shapes(d: int, dv: int) -> tuple[DenseCase, ...]:
    """For these head dimensions, cases with every pair of values of ``SHAPES``."""
    chosen = []
    for point in _shape_points():
        lengths = point["lengths"]
        name = (
            f"d{d}-{dv}-hq{point['h_q']}-hkv{point['h_kv']}-sq{point['s_q']}"
            f"-page{point['page_size']}-{lengths if isinstance(lengths, str) else 'around'}"
            f"{'-causal' if point['causal'] else ''}{'-sink' if point['attn_sink'] else ''}"
            f"-{point['dtype']}"
        )
        s_k = 900 if lengths == "varying" else 400
        case = DenseCase(name, 4, s_k, d=d, dv=dv, empty=lengths == "varying", **point)
        chosen.append(case)
    return tuple(chosen)


def dense_small() -> tuple[DenseCase, ...]:
    """Cases small enough for the oracle on one CPU core; between them they have every feature."""
    small = functools.partial(DenseCase, b=3, s_k=140, h_q=9, empty=True, lengths="varying")
    return (
        DenseCase("one-token", 1, 1, 1),
        DenseCase("one-page", 1, 64, 16),
        DenseCase("page-and-one", 2, 65, 3, dtype="float16"),
        small("varying"),
        small("causal", s_q=2, causal=True),
        small("fp16-grouped", h_kv=3, s_q=4, causal=True, dtype="float16"),
        small("float32", s_q=2, causal=True, dtype="float32"),
        small("float32-grouped-sink", h_kv=3, dtype="float32", attn_sink=True),
        small("sink", s_q=2, attn_sink=True),
        small("other-sizes", d=48, dv=32, page_size=16, h_kv=3),
        small("512-512", d=512, s_q=2, causal=True, page_size=16),
        small("512-512-fp16", d=512, h_q=65, attn_sink=True, dtype="float16"),
        small("320-256", d=320, dv=256, h_kv=3, attn_sink=True, page_size=32),
        small("320-256-fp16", d=320, dv=256, s_q=3, causal=True, dtype="float16"),
        small("256-256", d=256, dv=256, s_q=8, causal=True),
        small("256-256-fp16", d=256, dv=256, h_kv=3, page_size=8, dtype="float16"),
        small("odd-page", d=48, dv=48, page_size=7, s_q=2, causal=True),
        DenseCase("fewer-keys-than-queries", 4, 3, 4, s_q=4, causal=True, lengths=(0, 1, 3, 5)),
        DenseCase("many-heads", 2, 140, 128, s_q=2, causal=True),
        DenseCase("peaked3", 2, 700, 16, s_q=2, causal=True, scores="peaked3"),
        DenseCase("peaked10", 2, 700, 16, scores="peaked10", dtype="float16"),
        DenseCase("rising", 2, 1500, 8, s_q=2, scores="rising", lengths=(1500, 333)),
        DenseCase("rising-fp16", 1, 1500, 8, scores="rising", dtype="float16", attn_sink=True),
    )


# Rows of the benchmark: b, s_k, h_q, s_q and what the peer takes, in microseconds.
_DENSE_ROWS = (
    (1, 4096, 16, 1, 22.5),
    (1, 4096, 128, 1, 19.3),
    (1, 16384, 16, 1, 38.7),
    (1, 16384, 128, 1, 37.4),
    (1, 131072, 16, 1, 77.2),
    (1, 131072, 128, 1, 92.5),
    (8, 4096, 16, 1, 21.6),
    (8, 4096, 128, 1, 33.6),
    (8, 16384, 16, 1, 46.7),
    (8, 16384, 128, 1, 70.3),
    (8, 16384, 128, 2, 115.0),
    (32, 4096, 16, 1, 46.2),
    (32, 4096, 64, 1, 53.0),
    (32, 4096, 128, 1, 69.9),
    (32, 4096, 128, 2, 108.6),
    (32, 16384, 16, 1, 149.3),
    (32, 16384, 128, 1, 255.1),
    (128, 4096, 16, 1, 152.0),
    (128, 4096, 64, 1, 150.7),
    (128, 4096, 128, 1, 239.0),
    (128, 4096, 128, 2, 522.9),
    (128, 8192, 32, 1, 289.1),
    (128, 8192, 128, 1, 492.6),
    (128, 8192, 128, 2, 1011.2),
    (128, 16384, 64, 1, 648.5),
    (128, 16384, 128, 2, 1956.0),
    (128, 32768, 128, 1, 2115.1),
    (128, 32768, 128, 2, 3879.3),
    (1, 512, 8, 1, 8.3),
    (1, 2048, 16, 1, 15.2),
    (1, 8192, 128, 1, 25.3),
    (1, 32768, 128, 1, 41.5),
    (4, 2048, 128, 1, 19.2),
    (4, 8192, 16, 1, 23.1),
    (4, 8192, 128, 1, 36.8),
    (4, 32768, 128, 1, 70.3),
    (16, 1024, 128, 1, 22.8),
    (16, 4096, 64, 1, 34.6),
    (16, 16384, 128, 1, 118.8),
    (64, 1024, 16, 1, 30.4),
    (64, 4096, 128, 1, 111.8),
    (64, 8192, 64, 1, 160.7),
    (256, 4096, 8, 1, 278.5),
    (256, 4096, 20, 1, 281.1),
    (256, 4096, 128, 1, 489.5),
    (32, 8192, 16, 4, 89.0),
    (32, 8192, 128, 4, 429.7),
    (32, 8192, 128, 8, 815.9),
)
_VARYING_ROWS = (
    (128, 4096, 16, 1, 160.1),
    (128, 4096, 64, 1, 180.2),
    (128, 4096, 128, 1, 280.6),
    (128, 4096, 128, 2, 560.9),
)


def dense_benchmarks() -> tuple[DenseCase, ...]:
    """Every dense decode row that the peer was measured on."""
    rows = [
        DenseCase(f"b{b}-sk{s_k}-h{h}-sq{s_q}", b, s_k, h, s_q, peer_us=us)
        for b, s_k, h, s_q, us in _DENSE_ROWS
    ]
    rows += [
        DenseCase(
            f"b{b}-sk{s_k}-h{h}-sq{s_q}-varying", b, s_k, h, s_q, lengths="varying", peer_us=us
        )
        for b, s_k, h, s_q, us in _VARYING_ROWS
    ]
    uneven = (4641, 45118, 1730, 1696)
    rows.append(DenseCase("uneven-h16-sq4", 4, max(uneven), 16, 4, lengths=uneven, peer_us=48.1))
    return tuple(rows)


# ---------------------------------------------------------------------------------------
# Sparse decode
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseCase:
    """One call of sparse decode.

    ``cache_format``: "plain", "fp8_v32" or "fp8_v4"; ``scales`` of V3.2: "power" of two or
    "arbitrary". ``invalid``: the part of the indices that is invalid (-1, other negative numbers,
    the number of slots and beyond, in turn). ``topk_length``: whether given; entries after it are
    garbage. ``slots``, ``extra_slots``: tokens of a cache, whole pages.
    """

    name: str
    b: int
    topk: int
    h_q: int
    s_q: int = 1
    slots: int = 512
    page_size: int = 64
    cache_format: str = "plain"
    scales: str = "power"
    dtype: str = "bfloat16"
    d: int = 576
    dv: int = 512
    invalid: float = 0.1
    topk_length: bool = False
    extra_topk: int = 0
    extra_slots: int = 256
    extra_page_size: int = 32
    extra_topk_length: bool = False
    attn_sink: bool = False
    scores: str = "flat"

    @property
    def softmax_scale(self) -> float:
        """The scale that the peer tests with."""
        return self.d**-0.55


@dataclass
class SparseCache:
    """One cache: its raw array, and the numbers that it stands for, [pages, page_size, 1, d]."""

    data: np.ndarray
    values: np.ndarray


@dataclass
class SparseInputs:
    """Arrays of one sparse case."""

    case: SparseCase
    q: np.ndarray
    cache: SparseCache
    indices: np.ndarray
    topk_length: np.ndarray | None
    extra_cache: SparseCache | None
    extra_indices: np.ndarray | None
    extra_topk_length: np.ndarray | None
    attn_sink: np.ndarray | None

    def operands(self) -> dict[str, Any]:
        """Operands of the sparse decode operation, as its reference takes them."""
        return {
            "q": self.q,
            "k_cache": self.cache.data,
            "indices": self.indices,
            "topk_length": self.topk_length,
            "attn_sink": self.attn_sink,
            "extra_k_cache": None if self.extra_cache is None else self.extra_cache.data,
            "extra_indices": self.extra_indices,
            "extra_topk_length": self.extra_topk_length,
            "tile_scheduler_metadata": None,
            "num_splits": None,
        }

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's out and lse."""
        extra = self.extra_cache
        return oracle.sparse_decode(
            self.q,
            self.cache.values,
            self.indices,
            self.case.dv,
            softmax_scale=self.case.softmax_scale,
            topk_length=self.topk_length,
            attn_sink=self.attn_sink,
            extra_k_cache=None if extra is None else extra.values,
            extra_indices=self.extra_indices,
            extra_topk_length=self.extra_topk_length,
        )


def _spoil(rng: np.random.Generator, indices: np.ndarray, slots: int, part: float) -> np.ndarray:
    """Makes a part of the indices invalid, in every way there is."""
    bad = np.array([-1, slots, GARBAGE, -(2**31), 2**31 - 1, -slots - 3])
    hit = rng.random(indices.shape) < part
    return np.where(hit, rng.choice(bad, indices.shape), indices).astype(np.int32)


def _choices(rng, case, topk, slots, with_length):
    """Indices int32[b, s_q, topk], duplicates included, and lengths int32[b] or None."""
    if slots == 0:
        indices = np.zeros((case.b, case.s_q, topk), np.int32)
    else:
        indices = rng.integers(0, slots, (case.b, case.s_q, topk), dtype=np.int32)
    indices = _spoil(rng, indices, slots, case.invalid)
    if not with_length:
        return indices, None
    length = rng.integers(0, topk + 1, case.b, dtype=np.int32)
    if case.b > 1:
        length[-1] = 0
    after = np.arange(topk) >= length[:, None, None]
    # Garbage and valid slots alike must not count after the length.
    garbage = np.where(rng.random(indices.shape) < 0.5, GARBAGE, indices)
    return np.where(after, garbage, indices).astype(np.int32), length


def _referenced(indices, length, slots):
    counts = np.ones(indices.shape, bool)
    if length is not None:
        counts &= np.arange(indices.shape[-1]) < length[:, None, None]
    counts &= (indices >= 0) & (indices < slots)
    used = np.zeros(slots, bool)
    used[indices[counts]] = True
    return used


def _sparse_cache(rng, case, slots, page_size, used) -> SparseCache:
    """A cache of normal / 10 values clamped to [-1, 1]; NaN in slots that nothing refers to."""
    assert slots % page_size == 0
    pages = slots // page_size
    shape = (pages, page_size, 1, case.d)
    values = np.clip(_normal(rng, shape, 0.1), -1, 1)
    free = ~used.reshape(pages, page_size)
    if case.cache_format == "plain":
        values[free] = np.nan
        data = values.astype(DTYPES[case.dtype])
        return SparseCache(data, data)
    if case.cache_format == "fp8_v32":
        factor = None
        if case.scales == "arbitrary":
            factor = rng.uniform(1, 2, (pages, page_size, 1, 4))
        data = oracle.encode_v32(values, power_of_two=case.scales == "power", scale_factor=factor)
        data[free] = 0xFF  # NaN as fp8, as float32 and as bfloat16
        values = oracle.decode_v32(data)
    else:
        data = oracle.encode_v4(values)
        for page, offset in np.argwhere(free):
            data[page, 576 * offset : 576 * (offset + 1)] = 0xFF
            start = 576 * page_size + 8 * offset
            data[page, start : start + 8] = 0xFF
        values = oracle.decode_v4(data, page_size)
    # bfloat16 queries meet keys rounded to bfloat16, float32 queries the exact products.
    if case.dtype == "bfloat16":
        values = values.astype(BFLOAT16)
    return SparseCache(data, values)


def build_sparse(case: SparseCase, seed: int = 0) -> SparseInputs:
    """The inputs of a sparse decode case."""
    rng = _rng(case, seed, "values")
    deviation = 1.0
    if case.scores != "flat":
        deviation = _query_deviation(case.scores, case.softmax_scale, case.d)
    q = _normal(rng, (case.b, case.s_q, case.h_q, case.d), deviation)
    if case.scores == "flat":
        np.clip(q, -1, 1, out=q)
    indices, length = _choices(rng, case, case.topk, case.slots, case.topk_length)
    used = _referenced(indices, length, case.slots)
    cache = _sparse_cache(rng, case, case.slots, case.page_size, used)
    extra_cache = extra_indices = extra_length = None
    if case.extra_topk:
        extra_indices, extra_length = _choices(
            rng, case, case.extra_topk, case.extra_slots, case.extra_topk_length
        )
        used = _referenced(extra_indices, extra_length, case.extra_slots)
        extra_cache = _sparse_cache(rng, case, case.extra_slots, case.extra_page_size, used)
    sink = _normal(rng, (case.h_q,), 4.0) if case.attn_sink else None
    if sink is not None and case.h_q >= 3:
        sink[:2] = np.inf, -np.inf
    return SparseInputs(
        case,
        q.astype(DTYPES[case.dtype]),
        cache,
        indices,
        length,
        extra_cache,
        extra_indices,
        extra_length,
        sink,
    )


def sparse_small() -> tuple[SparseCase, ...]:
    """Cases small enough for the oracle on one CPU core; between them they have every feature."""
    v32 = functools.partial(SparseCase, cache_format="fp8_v32")
    v4 = functools.partial(SparseCase, cache_format="fp8_v4", d=512, page_size=32)
    extra = {"extra_topk": 96, "extra_page_size": 2, "topk_length": True}
    return (
        SparseCase("plain", 2, 128, 16, s_q=2),
        SparseCase("plain-odd", 3, 77, 10, page_size=8, topk_length=True, attn_sink=True),
        SparseCase("plain-float32", 2, 77, 3, s_q=2, dtype="float32", topk_length=True),
        SparseCase("plain-fp16", 2, 64, 3, dtype="float16", extra_topk=33),
        SparseCase("plain-other-sizes", 2, 20, 3, d=48, dv=32, page_size=16, extra_topk=7),
        SparseCase("plain-all-invalid", 2, 20, 3, invalid=1.0, attn_sink=True),
        SparseCase("plain-one", 1, 1, 1, invalid=0.0),
        v32("v32", 2, 128, 16, s_q=2),
        v32("v32-arbitrary", 2, 128, 16, scales="arbitrary", topk_length=True),
        v32("v32-float32", 2, 50, 5, scales="arbitrary", dtype="float32"),
        v32("v32-extra-sink", 2, 50, 5, scales="arbitrary", attn_sink=True, **extra),
        v32("v32-peaked10", 2, 200, 5, scales="arbitrary", scores="peaked10", invalid=0.0),
        v4("v4", 2, 128, 16, s_q=2),
        v4("v4-extra", 3, 40, 5, s_q=2, extra_topk_length=True, attn_sink=True, **extra),
        v4("v4-float32", 2, 40, 5, dtype="float32", **extra),
        v4("v4-peaked3", 2, 200, 5, scores="peaked3", **extra),
        SparseCase("plain-many-tokens", 96, 40, 64, d=64, dv=64, topk_length=True),
    )


# ---------------------------------------------------------------------------------------
# Sparse prefill
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefillCase:
    """One call of sparse prefill; the fields are those of :class:`SparseCase`."""

    name: str
    s_q: int
    s_kv: int
    h_q: int
    topk: int
    d: int = 576
    dv: int = 512
    dtype: str = "bfloat16"
    invalid: float = 0.1
    topk_length: bool = False
    attn_sink: bool = False
    scores: str = "flat"
    sm_scale: float = 0.5


@dataclass
class PrefillInputs:
    """Arrays of one sparse prefill case."""

    case: PrefillCase
    q: np.ndarray
    kv: np.ndarray
    indices: np.ndarray
    topk_length: np.ndarray | None
    attn_sink: np.ndarray | None

    def call(self) -> dict[str, Any]:
        """Keyword arguments of flash_mla_sparse_fwd."""
        return {
            "q": self.q,
            "kv": self.kv,
            "indices": self.indices,
            "sm_scale": self.case.sm_scale,
            "d_v": self.case.dv,
            "attn_sink": self.attn_sink,
            "topk_length": self.topk_length,
        }

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The oracle's out, max_logits and lse."""
        return oracle.sparse_prefill(**self.call())


def build_prefill(case: PrefillCase, seed: int = 0) -> PrefillInputs:
    """The inputs of a sparse prefill case: normal / 10 plus an offset, clamped to +-10."""
    dtype = DTYPES[case.dtype]
    rng = _rng(case, seed, "values")
    offset = rng.uniform(-0.05, 0.05, 2).astype(np.float32)
    q = _normal(
        rng,
        (case.s_q, case.h_q, case.d),
        _query_deviation(case.scores, case.sm_scale, case.d),
    )
    kv = _normal(rng, (case.s_kv, 1, case.d), 0.1)
    if case.scores == "flat":
        q, kv = (np.clip(x + o, -10, 10) for x, o in zip((q, kv), offset, strict=True))
    if case.s_kv:
        indices = rng.integers(0, case.s_kv, (case.s_q, 1, case.topk), dtype=np.int32)
    else:
        indices = np.zeros((case.s_q, 1, case.topk), np.int32)
    indices = _spoil(rng, indices, case.s_kv, case.invalid)
    length = None
    if case.topk_length:
        length = rng.integers(0, case.topk + 1, case.s_q, dtype=np.int32)
    used = _referenced(indices, length, case.s_kv)
    kv[~used] = np.nan
    sink = _normal(rng, (case.h_q,), 4.0) if case.attn_sink else None
    if sink is not None and case.h_q >= 3:
        sink[:2] = np.inf, -np.inf
    return PrefillInputs(case, q.astype(dtype), kv.astype(dtype), indices, length, sink)


def prefill_small() -> tuple[PrefillCase, ...]:
    """Cases small enough for the oracle on one CPU core; between them they have every feature."""
    return (
        PrefillCase("576", 5, 300, 16, 128),
        PrefillCase("512-length", 4, 300, 10, 77, d=512, topk_length=True, attn_sink=True),
        PrefillCase("float32", 4, 100, 3, 33, dtype="float32", topk_length=True),
        PrefillCase("fp16", 4, 100, 3, 33, dtype="float16", attn_sink=True),
        PrefillCase("all-invalid", 3, 50, 2, 20, invalid=1.0, attn_sink=True),
        PrefillCase("other-sizes", 7, 50, 3, 20, d=48, dv=32),
        PrefillCase("one", 1, 1, 1, 1, invalid=0.0),
        PrefillCase("peaked10", 3, 800, 4, 700, scores="peaked10", invalid=0.0),
        PrefillCase("many-tokens", 150, 64, 64, 24, d=64, dv=64, topk_length=True),
    )
