"""Cases of sparse decode, shared by tests and benchmarks, beyond the small ones of cases.py.

``sparse_shapes`` sweeps what serving meets, ``grid`` is the peer's own test, ``peer_rows`` and the
lists after it are what benchmarks time. Inputs of the first are those of ``cases.build_sparse``;
what changes them for one purpose is here too, and so are inputs of dense decode over an FP8 cache.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cases
import numpy as np
import oracle
from cases import SparseCase, SparseInputs

#: The kinds of caches that there are kernels for, and how a case says so.
FORMATS: dict[str, dict[str, Any]] = {
    "plain-576": {"cache_format": "plain", "d": 576},
    "plain-512": {"cache_format": "plain", "d": 512},
    "plain-576-fp16": {"cache_format": "plain", "d": 576, "dtype": "float16"},
    "v32": {"cache_format": "fp8_v32", "d": 576},
    "v32-arbitrary": {"cache_format": "fp8_v32", "d": 576, "scales": "arbitrary"},
    "v4": {"cache_format": "fp8_v4", "d": 512},
}
#: Bytes of one token, and columns of its key.
TOKEN_BYTES = {"plain": 1152, "fp8_v32": 656, "fp8_v4": 584}
DIMS = {"plain": 576, "fp8_v32": 576, "fp8_v4": 512}


def whole_pages(slots: int, page_size: int) -> int:
    """At least so many slots, in whole pages."""
    return -(-slots // page_size) * page_size


# ---------------------------------------------------------------------------------------
# Sweep
# ---------------------------------------------------------------------------------------


def covering(axes: dict[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Points of a grid that have every pair of values of any two axes. Greedy, deterministic."""
    names, sizes = list(axes), [len(values) for values in axes.values()]
    rng = np.random.default_rng(seed)
    missing = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    }
    points = []
    while missing:
        point = dict(min(missing))
        for k in rng.permutation(len(names)).tolist():
            if k in point:
                continue
            gain = [
                sum(tuple(sorted(((k, v), chosen))) in missing for chosen in point.items())
                for v in range(sizes[k])
            ]
            best = [v for v in range(sizes[k]) if gain[v] == max(gain)]
            point[k] = best[int(rng.integers(len(best)))]
        missing -= set(itertools.combinations(sorted(point.items()), 2))
        points.append({names[k]: axes[names[k]][v] for k, v in sorted(point.items())})
    return points


#: Tokens of the extra cache's pages (None: without it), and whether its lengths are given.
EXTRAS = (None, (1, False), (2, True), (64, True), (69, False))

SHAPES = {
    "kind": tuple(FORMATS),
    "h_q": (1, 3, 8, 10, 16, 20, 32, 63, 64, 65, 100, 128, 130),
    "topk": (0, 1, 7, 64, 65, 130, 576, 2048),
    "page_size": (1, 2, 16, 53, 61, 64, 69, 576),
    "s_q": (1, 2, 3),
    "extra": EXTRAS,
    "topk_length": (False, True),
    "attn_sink": (False, True),
}


@functools.cache
def sparse_shapes() -> tuple[SparseCase, ...]:
    """Cases with every pair of values of ``SHAPES``."""
    chosen = []
    for number, point in enumerate(covering(SHAPES)):
        kind, extra = point.pop("kind"), point.pop("extra")
        name = f"{kind}-h{point['h_q']}-topk{point['topk']}-page{point['page_size']}"
        name += f"-sq{point['s_q']}"
        options = dict(FORMATS[kind])
        if extra is not None:
            page_size, with_length = extra
            name += f"-extra{page_size}{'-lengths' if with_length else ''}"
            options |= {
                "extra_topk": (33, 64, 200)[number % 3],
                "extra_page_size": page_size,
                "extra_slots": whole_pages(200, page_size),
                "extra_topk_length": with_length,
            }
        name += "-length" if point["topk_length"] else ""
        name += "-sink" if point["attn_sink"] else ""
        slots = whole_pages(400, point["page_size"])
        chosen.append(SparseCase(name, 3, slots=slots, **point, **options))
    return tuple(chosen)


@functools.cache
def sparse_kinds() -> tuple[SparseCase, ...]:
    """A case of each kind of cache with all features: for tests of what one call may meet."""
    return tuple(
        SparseCase(
            f"{kind}-all",
            4,
            300,
            20,
            s_q=2,
            slots=whole_pages(500, 61),
            page_size=61,
            topk_length=True,
            extra_topk=130,
            extra_slots=160,
            extra_page_size=2,
            extra_topk_length=True,
            attn_sink=True,
            **options,
        )
        for kind, options in FORMATS.items()
    )


# ---------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------


def public_call(inputs: SparseInputs) -> dict[str, Any]:
    """The inputs as keyword arguments of flash_mla_with_kvcache."""
    import jax.numpy as jnp

    from jax_flashmla.cache import PagedKVCache

    case = inputs.case

    def cache(part, page_size):
        if part is None:
            return None
        if case.cache_format == "fp8_v4":
            return PagedKVCache(jnp.asarray(part.data), "fp8_v4", page_size)
        return part.data

    return {
        "q": inputs.q,
        "k_cache": cache(inputs.cache, case.page_size),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": case.dv,
        "softmax_scale": case.softmax_scale,
        "is_fp8_kvcache": case.cache_format != "plain",
        "indices": inputs.indices,
        "attn_sink": inputs.attn_sink,
        "extra_k_cache": cache(inputs.extra_cache, case.extra_page_size),
        "extra_indices_in_kvcache": inputs.extra_indices,
        "topk_length": inputs.topk_length,
        "extra_topk_length": inputs.extra_topk_length,
    }


def raw_launcher(inputs: SparseInputs, **options: Any) -> Any:
    """The problem on the device, to be launched without XLA around it."""
    import jax.numpy as jnp
    from raw_launcher import RawSparseDecode

    case = inputs.case

    def put(x):
        return None if x is None else jnp.asarray(x)

    extra = inputs.extra_cache
    arguments = {
        "q": put(inputs.q),
        "k_cache": put(inputs.cache.data),
        "indices": put(inputs.indices),
        "softmax_scale": case.softmax_scale,
        "cache_format": case.cache_format,
        "head_dim_v": case.dv,
        "topk_length": put(inputs.topk_length),
        "extra_k_cache": None if extra is None else put(extra.data),
        "extra_indices": put(inputs.extra_indices),
        "extra_topk_length": put(inputs.extra_topk_length),
        "attn_sink": put(inputs.attn_sink),
    }
    return RawSparseDecode(**{**arguments, **options})


def pick(inputs: SparseInputs, requests: Sequence[int]) -> SparseInputs:
    """The same problem with these requests only, in this order; the caches stay."""
    requests = list(requests)

    def taken(x):
        return None if x is None else x[requests]

    return dataclasses.replace(
        inputs,
        q=inputs.q[requests],
        indices=inputs.indices[requests],
        topk_length=taken(inputs.topk_length),
        extra_indices=taken(inputs.extra_indices),
        extra_topk_length=taken(inputs.extra_topk_length),
    )


def attends(inputs: SparseInputs, slot: int) -> np.ndarray:
    """bool[b, s_q]: which query tokens attend to a slot of the first cache."""
    counts = np.ones(inputs.indices.shape, bool)
    if inputs.topk_length is not None:
        counts &= np.arange(inputs.case.topk) < inputs.topk_length[:, None, None]
    return ((inputs.indices == slot) & counts).any(axis=-1)


# ---------------------------------------------------------------------------------------
# Bytes of tokens
# ---------------------------------------------------------------------------------------

#: The bytes of one token that hold its codes, its scales and its RoPE part; of V4 in the two
#: places ("data", "scales") that a page has for it.
_PARTS = {
    ("fp8_v32", "codes"): ("data", 0, 512),
    ("fp8_v32", "scales"): ("data", 512, 16),
    ("fp8_v32", "rope"): ("data", 528, 128),
    ("fp8_v4", "codes"): ("data", 0, 448),
    ("fp8_v4", "rope"): ("data", 448, 128),
    ("fp8_v4", "scales"): ("scales", 0, 7),
}


def token_bytes(data: np.ndarray, case: SparseCase, slot: int, part: str) -> np.ndarray:
    """A writable view of a part of the bytes of one token: "codes", "scales" or "rope".

    ``data`` is a cache of the case's format and (first) page size, contiguous.
    """
    raw = data.reshape(-1).view(np.uint8)
    if case.cache_format == "plain":
        assert part == "rope"
        return raw[2 * (slot * case.d + case.d - 64) : 2 * (slot + 1) * case.d]
    place, start, count = _PARTS[case.cache_format, part]
    if case.cache_format == "fp8_v4":
        page, offset = divmod(slot, case.page_size)
        begin = page * data.shape[1]
        begin += 576 * offset if place == "data" else 576 * case.page_size + 8 * offset
    else:
        begin = slot * TOKEN_BYTES[case.cache_format]
    return raw[begin + start : begin + start + count]


def decoded(data: np.ndarray, case: SparseCase, page_size: int | None = None) -> np.ndarray:
    """The numbers that a cache stands for, [pages, page_size, 1, d], rounded to bfloat16."""
    if case.cache_format == "plain":
        return data
    with np.errstate(over="ignore", invalid="ignore"):
        if case.cache_format == "fp8_v32":
            return oracle.decode_v32(data).astype(cases.BFLOAT16)
        return oracle.decode_v4(data, page_size or case.page_size).astype(cases.BFLOAT16)


def with_data(inputs: SparseInputs, data: np.ndarray) -> SparseInputs:
    """The same problem over other bytes of the first cache."""
    return dataclasses.replace(inputs, cache=cases.SparseCache(data, decoded(data, inputs.case)))


def is_used(inputs: SparseInputs) -> np.ndarray:
    """bool[slots]: whether any query token attends to a slot of the first cache."""
    return cases._referenced(inputs.indices, inputs.topk_length, inputs.case.slots)


def with_scales(inputs: SparseInputs, draw: Callable[[], np.ndarray]) -> SparseInputs:
    """Scales that ``draw`` makes for each used token of an FP8 cache, as they are stored.

    Queries are multiplied so that scores have a deviation of about 1, whatever the scales.
    """
    case, data = inputs.case, inputs.cache.data.copy()
    used = is_used(inputs)
    for slot in np.flatnonzero(used).tolist():
        token_bytes(data, case, slot, "scales")[:] = draw().view(np.uint8)
    changed = with_data(inputs, data)
    values = changed.cache.values.reshape(-1, case.d)[used].astype(np.float32)
    q = inputs.q.astype(np.float32) / (0.7 * case.softmax_scale * case.d**0.5 * np.std(values))
    return dataclasses.replace(changed, q=q.astype(cases.BFLOAT16))


def v4_scales(low: int, high: int) -> Callable[[], np.ndarray]:
    """For `with_scales`: powers of two from 2^low to 2^high, each tile its own."""
    rng = np.random.default_rng(127 + high)
    return lambda: (127 + rng.integers(low, high, 7, endpoint=True)).astype(np.uint8)


#: Exponents of V4 scales: small ones, those with which fp16 has the values and at both ends of
#: them, large ones. Not far apart, lest a result be that of one token, with all of its rounding.
V4_SCALES = ((-40, -37), (-17, -13), (-3, 3), (5, 9), (12, 15))


def check_by_tiles(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> None:
    """``(out, lse)`` by the norm of each 128 columns, since some are far larger than others."""
    for tile in range(0, 512, 128):
        columns = slice(tile, tile + 128)
        oracle.check_norm("sparse_decode", "out", got[0][..., columns], want[0][..., columns])
    oracle.check_norm("sparse_decode", "lse", got[1], want[1], bound=2e-4)


def _filled(data: np.ndarray, values: np.ndarray, case: SparseCase, page_size: int) -> np.ndarray:
    """The cache with tokens of its own in the slots that are NaN."""
    poisoned = np.isnan(values.reshape(-1, case.d)[:, 0].astype(np.float32))
    there = np.flatnonzero(~poisoned)
    source = np.arange(len(poisoned))
    # Zeros if there is no token at all.
    source[poisoned] = np.resize(there, poisoned.sum()) if len(there) else 0
    data = data if len(there) else np.zeros_like(data)
    if case.cache_format != "fp8_v4":
        rows = data.reshape(len(poisoned), -1)
        return rows[source].reshape(data.shape)
    split, end = 576 * page_size, 584 * page_size
    numbers, scales = (
        part.reshape(-1, width)[source].reshape(len(data), -1)
        for part, width in ((data[:, :split], 576), (data[:, split:end], 8))
    )
    return np.concatenate([numbers, scales, data[:, end:]], axis=1)


def unpoisoned(inputs: SparseInputs) -> np.ndarray:
    """The first cache with numbers in every slot."""
    return _filled(inputs.cache.data, inputs.cache.values, inputs.case, inputs.case.page_size)


def repaired(inputs: SparseInputs) -> SparseInputs:
    """The problem with numbers in all slots, for lengths or indices that have been changed."""
    case, extra = inputs.case, inputs.extra_cache
    inputs = with_data(inputs, unpoisoned(inputs))
    if extra is None:
        return inputs
    data = _filled(extra.data, extra.values, case, case.extra_page_size)
    extra = cases.SparseCache(data, decoded(data, case, case.extra_page_size))
    return dataclasses.replace(inputs, extra_cache=extra)


def build_rising(case: SparseCase) -> SparseInputs:
    """The running maximum rises by about ``cases.RISE`` along the indices of each query token.

    By the last column of the keys, which no format quantises: 8 in q, a ramp in the cache.
    """
    case = dataclasses.replace(case, scores="rising", invalid=0.0)
    inputs = cases.build_sparse(case)
    data = inputs.cache.data.copy()
    top = cases.RISE / (case.softmax_scale * 8)
    used = ~np.isnan(inputs.cache.values.reshape(case.slots, case.d)[:, 0].astype(np.float32))
    dtype = cases.DTYPES[case.dtype]  # of q, of plain caches, and of RoPE columns
    for slot in np.flatnonzero(used).tolist():
        value = np.asarray(top * slot / case.slots, dtype)
        token_bytes(data, case, slot, "rope")[-2:] = value.reshape(1).view(np.uint8)
    q = inputs.q.copy()
    q[..., -1] = 8
    # What follows the length stays where it is, garbage among it.
    count = case.topk if inputs.topk_length is None else inputs.topk_length
    order = np.where(
        np.arange(case.topk) < np.reshape(count, (-1, 1, 1)), inputs.indices, np.iinfo(np.int32).max
    )
    indices = np.take_along_axis(inputs.indices, np.argsort(order, axis=-1, kind="stable"), -1)
    return with_data(dataclasses.replace(inputs, q=q, indices=indices), data)


# ---------------------------------------------------------------------------------------
# Dense decode over an FP8 cache
# ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Fp8DenseInputs(cases.DenseInputs):
    """A dense problem whose ``k_cache`` is what the bytes of ``data`` stand for."""

    data: np.ndarray

    def call(self) -> dict[str, Any]:
        """Keyword arguments of flash_mla_with_kvcache."""
        return super().call() | {"k_cache": self.data, "is_fp8_kvcache": True}

    def with_data(self, data: np.ndarray) -> Fp8DenseInputs:
        """The same problem over other bytes."""
        values = oracle.decode_v32(data).astype(cases.BFLOAT16)
        return dataclasses.replace(self, k_cache=values, data=data)


def build_fp8_dense(case: cases.DenseCase, *, scales: str = "arbitrary") -> Fp8DenseInputs:
    """Inputs of dense decode over an FP8 V3.2 cache; NaN of all kinds where nobody looks."""
    plain = cases.build(case)
    poisoned = np.isnan(plain.k_cache.astype(np.float32)).any(axis=-1)
    values = np.where(poisoned[..., None], 0, plain.k_cache.astype(np.float32))
    factor = None
    if scales == "arbitrary":
        factor = cases._rng(case, 0, "scales").uniform(1, 2, (*poisoned.shape, 4))
    data = oracle.encode_v32(values, power_of_two=scales == "power", scale_factor=factor)
    data[poisoned] = 0xFF
    return Fp8DenseInputs(**vars(plain), data=data).with_data(data)


def raw_dense_launcher(inputs: Fp8DenseInputs, **options: Any) -> Any:
    """The problem on the device, to be launched without XLA around it."""
    import jax.numpy as jnp
    from raw_launcher import RawDenseDecode

    arguments = {
        "q": jnp.asarray(inputs.q),
        "k_cache": jnp.asarray(inputs.data),
        "block_table": jnp.asarray(inputs.block_table),
        "cache_seqlens": jnp.asarray(inputs.cache_seqlens),
        "softmax_scale": inputs.case.softmax_scale,
        "causal": inputs.case.causal,
        "head_dim_v": inputs.case.dv,
        "attn_sink": None if inputs.attn_sink is None else jnp.asarray(inputs.attn_sink),
        "cache_format": "fp8_v32",
    }
    return RawDenseDecode(**{**arguments, **options})


# ---------------------------------------------------------------------------------------
# The peer's grid
# ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GridCase:
    """One point of the peer's test.

    Each request has ``s_k`` tokens of its own in the cache (and ``extra_s_k`` in the extra one), in
    whole pages that lie anywhere, and chooses from them. ``mode``: a key of ``MODES``.
    """

    cache_format: str
    page_size: int
    b: int
    s_q: int
    topk: int
    s_k: int
    h_q: int
    extra: bool
    mode: str

    @property
    def name(self) -> str:
        return (
            f"{self.cache_format}-page{self.page_size}-b{self.b}-sq{self.s_q}-topk{self.topk}"
            f"-sk{self.s_k}-h{self.h_q}{'-extra' if self.extra else ''}-{self.mode}"
        )

    @property
    def d(self) -> int:
        return DIMS[self.cache_format]

    @property
    def dv(self) -> int:
        return 512

    @property
    def softmax_scale(self) -> float:
        return self.d**-0.55

    @property
    def flags(self) -> Mode:
        return MODES[self.mode]

    @property
    def extra_topk(self) -> int:
        """Entries of the extra cache's indices; 0 without one."""
        return 2 * self.topk // 3 if self.extra else 0

    @property
    def extra_s_k(self) -> int:
        """Tokens of each request in the extra cache: no multiple of its page size."""
        return self.s_k // 2 + 5 if self.extra else 0

    @property
    def extra_page_size(self) -> int:
        """Another than that of the first cache, now and then 1."""
        return {2: 64, 53: 1, 61: 2, 64: 53, 69: 64, 576: 2}[self.page_size]


@dataclasses.dataclass(frozen=True)
class Mode:
    """``invalid``: the part of the indices that is; ``empty``: whether some requests have none."""

    lengths: bool
    sink: bool
    invalid: float = 0.1
    empty: bool = False


MODES = {
    "bare": Mode(False, False),
    "lengths": Mode(True, False),
    "sink": Mode(False, True),
    "both": Mode(True, True),
    "invalid": Mode(False, True, invalid=1.0),
    "empty": Mode(True, True, empty=True),
}

GRID = {
    "cache_format": ("fp8_v32", "fp8_v4"),
    "page_size": (2, 53, 61, 64, 69, 576),
    "b": (4, 74, 321),
    "s_q": (1, 3),
    "topk, s_k": ((64, 512), (64, 2046), (576, 512), (576, 1024), (2048, 1024), (2048, 2046)),
    "h_q": (64, 128),
    "extra": (False, True),
    "mode": tuple(MODES),
}


def _grid_case(point: tuple) -> GridCase:
    cache_format, page_size, b, s_q, (topk, s_k), h_q, extra, mode = point
    return GridCase(cache_format, page_size, b, s_q, topk, s_k, h_q, extra, mode)


def grid() -> Iterator[GridCase]:
    """Every point of the grid; those of one format and page size follow each other."""
    return map(_grid_case, itertools.product(*GRID.values()))


@functools.cache
def grid_pairwise() -> tuple[GridCase, ...]:
    """A subset of the grid that has every pair of values."""

    def cost(point):
        _, _, b, s_q, (topk, _), h_q, extra, _ = point
        return b * s_q * topk * h_q * (1 + extra)

    points = cases._pairwise(GRID, lambda point: True, cost)
    return tuple(sorted(map(_grid_case, points), key=lambda c: (c.cache_format, c.page_size)))


# ---------------------------------------------------------------------------------------
# What benchmarks time
# ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BenchmarkCase:
    """One call to be timed: every request chooses from ``s_k`` tokens of its own in each cache.

    ``peer_us``: what the peer takes on an H200, in microseconds, where measured.
    """

    name: str
    cache_format: str
    b: int
    h_q: int
    s_q: int
    topk: int
    extra_topk: int = 0
    peer_us: float | None = None
    s_k: int = 32768
    page_size: int = 64
    dv: int = 512

    @property
    def d(self) -> int:
        return DIMS[self.cache_format]

    @property
    def softmax_scale(self) -> float:
        return self.d**-0.55

    @property
    def tokens(self) -> int:
        """Tokens attended to by all query tokens."""
        return self.b * self.s_q * (self.topk + self.extra_topk)

    def flop(self) -> int:
        """Floating-point operations: 2 (tokens attended) h_q (d + dv)."""
        return 2 * self.tokens * self.h_q * (self.d + self.dv)

    def bytes(self) -> int:
        """Bytes that must move: tokens as each query token chooses them, q in and out."""
        rows = self.b * self.s_q * self.h_q
        return self.tokens * TOKEN_BYTES[self.cache_format] + 2 * rows * (self.d + self.dv)


def _benchmark(cache_format, b, h_q, s_q, topk, extra_topk=0, peer_us=None) -> BenchmarkCase:
    kind = cache_format.removeprefix("fp8_")
    extra = f"+{extra_topk}" if extra_topk else ""
    name = f"{kind}-b{b}-h{h_q}-sq{s_q}-topk{topk}{extra}"
    # A multiple of the choice, so that tokens lie scattered.
    s_k = max(32768 if not extra_topk else 16384, 2 * topk)
    return BenchmarkCase(name, cache_format, b, h_q, s_q, topk, extra_topk, peer_us, s_k)


_PEER_ROWS = (
    ("fp8_v32", 2, 128, 1, 2048, 0, 16.5),
    ("fp8_v32", 64, 128, 1, 2048, 0, 93.7),
    ("fp8_v32", 128, 128, 1, 2048, 0, 184.7),
    ("fp8_v32", 128, 128, 2, 2048, 0, 359.3),
    ("fp8_v32", 64, 64, 1, 2048, 0, 76.4),
    ("fp8_v32", 128, 64, 1, 2048, 0, 112.8),
    ("fp8_v32", 148, 128, 2, 16384, 0, 3128.6),
    ("fp8_v4", 2, 128, 2, 128, 1024, 15.7),
    ("fp8_v4", 74, 128, 2, 128, 1024, 131.3),
    ("fp8_v4", 256, 128, 2, 128, 1024, 398.2),
    ("fp8_v4", 74, 64, 2, 128, 512, 68.2),
    ("fp8_v4", 256, 64, 2, 128, 512, 169.0),
)


def peer_rows() -> tuple[BenchmarkCase, ...]:
    """Every sparse decode row that the peer was measured on."""
    return tuple(_benchmark(*row) for row in _PEER_ROWS)


def more_rows() -> tuple[BenchmarkCase, ...]:
    """What the peer was not measured on: few heads, few requests, plain caches."""
    rows = [("fp8_v32", 128, h, 1, 2048) for h in (8, 16, 32)]
    rows += [("fp8_v32", b, h, 1, 2048) for b in (1, 2, 4, 8) for h in (16, 128)]
    rows += [("fp8_v4", b, 128, 1, 128, 1024) for b in (1, 8)]
    rows += [("fp8_v4", 128, h, 1, 128, 1024) for h in (8, 16, 32, 64)]
    rows += [("plain", b, h, 1, 2048) for b, h in ((2, 128), (64, 128), (128, 16), (128, 64))]
    rows += [("plain", 128, 128, 1, 2048), ("plain", 128, 128, 2, 2048)]
    known = {case.name for case in peer_rows()}
    return tuple(case for case in (_benchmark(*row) for row in rows) if case.name not in known)


#: Dense decode over an FP8 cache beside bfloat16: b, s_k, h_q.
_FP8_DENSE_ROWS = (
    (128, 4096, 16),
    (128, 16384, 16),
    (128, 8192, 32),
    (32, 4096, 16),
    (1, 16384, 16),
    (128, 4096, 64),
    (128, 4096, 128),
    (64, 4096, 128),
    (256, 4096, 128),
)


def fp8_dense_rows() -> tuple[cases.DenseCase, ...]:
    """Dense decode, few heads and many: over an FP8 V3.2 cache and over a bfloat16 one."""
    return tuple(
        cases.DenseCase(f"b{b}-sk{s_k}-h{h}-sq1", b, s_k, h) for b, s_k, h in _FP8_DENSE_ROWS
    )


def fp8_dense_bytes(case: cases.DenseCase) -> int:
    """As ``DenseCase.bytes`` over an FP8 V3.2 cache."""
    tokens = int(case.cache_seqlens().astype(np.int64).sum())
    rows = case.b * case.s_q * case.h_q
    return tokens * TOKEN_BYTES["fp8_v32"] + 2 * rows * (case.d + case.dv)


def benchmark_slots(case: BenchmarkCase, pool_slots: int, seed: int = 0) -> np.ndarray:
    """int32[b, s_q, topk + extra_topk]: distinct slots for each query token, scattered.

    Requests choose from tokens of their own as far as the pool goes, then from those of others.
    """
    rng = np.random.default_rng(seed)
    count = case.topk + case.extra_topk
    s_k = min(case.s_k, pool_slots)
    assert count <= s_k, f"{case.name}: {count} of {s_k} tokens"
    regions = pool_slots // s_k
    slots = np.empty((case.b, case.s_q, count), np.int32)
    for r in range(case.b):
        for i in range(case.s_q):
            chosen = rng.permutation(s_k)[:count]
            slots[r, i] = r % regions * s_k + chosen
    return slots


def pool_slots(benchmarks: Sequence[BenchmarkCase], limit: int = 1 << 22) -> int:
    """Slots that all these cases want, at most ``limit``: a multiple of 64."""
    most = max((math.prod((case.b, case.s_k)) for case in benchmarks), default=64)
    return whole_pages(min(most, limit), 64)
