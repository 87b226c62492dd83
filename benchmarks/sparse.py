"""Sparse decode, dense decode over FP8 caches, and writing and reading caches: what is timed.

Kernels are timed as in ``measure``, through the raw launchers in a CUDA graph. Every request
chooses from tokens of its own that lie scattered over a cache of gigabytes, as far as that goes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sparse_cases
from cases import DenseCase
from raw_launcher import RawDenseDecode, RawSparseDecode
from sparse_cases import BenchmarkCase

from benchmarks import cache_ops, measure
from jax_flashmla import flash_mla_with_kvcache, quantization
from jax_flashmla.cache import PagedKVCache

Row = dict[str, Any]

#: Sections in the order in which they run; also their keys in the results.
NAMES = ("sparse", "sparse_more", "fp8_dense", "cache", "sparse_xla")

PAGE_SIZE = 64
#: Pages of random numbers, again and again until the pool is full.
_PAGES_AT_ONCE = 1024

#: Rows that are timed with XLA too.
_XLA_ROWS = (
    "v32-b2-h128-sq1-topk2048",
    "v32-b64-h128-sq1-topk2048",
    "v4-b74-h64-sq2-topk128+512",
)


# ---------------------------------------------------------------------------------------------
# Inputs


@functools.partial(jax.jit, static_argnames=("pages", "cache_format", "power_of_two_scales"))
def random_pool(pages: int, cache_format: str, power_of_two_scales: bool = False) -> jax.Array:
    """A cache of at least so many pages of 64 tokens: normal / 10, quantised as the format does."""
    d = sparse_cases.DIMS[cache_format]
    shape = (_PAGES_AT_ONCE, PAGE_SIZE, 1, d)
    values = jax.random.normal(jax.random.key(2), shape, jnp.bfloat16) / 10
    if cache_format != "plain":
        options = {"power_of_two_scales": power_of_two_scales} if cache_format == "fp8_v32" else {}
        values = quantization.quantize_k_cache(values, cache_format=cache_format, **options)
    repeats = max(-(-pages // _PAGES_AT_ONCE), 1)
    return jnp.tile(values, (repeats, *(1,) * (values.ndim - 1)))


def arrays_of(case: BenchmarkCase, pool: jax.Array) -> dict[str, jax.Array | None]:
    """Array arguments of the raw launcher; both caches are the pool."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((case.b, case.s_q, case.h_q, case.d), np.float32)
    slots = sparse_cases.benchmark_slots(case, len(pool) * PAGE_SIZE)
    arrays = {
        "q": jnp.asarray(np.clip(q, -1, 1), jnp.bfloat16),
        "k_cache": pool,
        "indices": jnp.asarray(slots[..., : case.topk]),
    }
    if case.extra_topk:
        arrays["extra_k_cache"] = pool
        arrays["extra_indices"] = jnp.asarray(slots[..., case.topk :])
    return arrays


# ---------------------------------------------------------------------------------------------
# Rows


def sizes(case: BenchmarkCase) -> Row:
    """The columns that say which case a row is of."""
    names = ("name", "cache_format", "b", "h_q", "s_q", "topk", "extra_topk")
    return {name: getattr(case, name) for name in names}


class Timer:
    """Times cases over one pool of each format; what it has timed once it does not time again."""

    def __init__(self, limits: dict[str, float], launches: int, replays: int, slots: int):
        self.limits, self.launches, self.replays, self.slots = limits, launches, replays, slots
        self._pools: dict[tuple[str, bool], jax.Array] = {}
        self._known: dict[tuple[Any, ...], measure.Times] = {}
        self._errors: dict[BenchmarkCase | DenseCase, float] = {}

    def pool(self, cache_format: str, power_of_two_scales: bool = False) -> jax.Array:
        """The cache of this format, made when it is first asked for."""
        key = cache_format, power_of_two_scales
        if key not in self._pools:
            pages = -(-self.slots // PAGE_SIZE)
            self._pools[key] = random_pool(pages, cache_format, power_of_two_scales)
        return self._pools[key]

    def _timed(self, key: tuple[Any, ...], make: Callable[[], Any]) -> measure.Times:
        if key not in self._known:
            problem = make()
            self._known[key] = measure.Times(
                problem.time(self.launches, self.replays),
                problem.time_schedule(self.launches, self.replays),
            )
        return self._known[key]

    def _sparse(
        self, case: BenchmarkCase, power_of_two_scales: bool = False, **options: bool
    ) -> RawSparseDecode:
        return RawSparseDecode(
            **arrays_of(case, self.pool(case.cache_format, power_of_two_scales)),
            softmax_scale=case.softmax_scale,
            cache_format=case.cache_format,
            head_dim_v=case.dv,
            power_of_two_scales=power_of_two_scales,
            **options,
        )

    def _dense(
        self,
        case: DenseCase,
        cache_format: str,
        power_of_two_scales: bool = False,
        **options: bool,
    ) -> RawDenseDecode:
        return RawDenseDecode(
            **measure.arrays_of(case, self.pool(cache_format, power_of_two_scales)),
            softmax_scale=case.softmax_scale,
            cache_format=cache_format,
            power_of_two_scales=power_of_two_scales,
            **options,
        )

    def raw(self, case: BenchmarkCase, **options: bool) -> measure.Times:
        """Times of a sparse case through the raw launchers."""
        return self._timed((case, *options.items()), lambda: self._sparse(case, **options))

    def raw_dense(self, case: DenseCase, cache_format: str, **options: bool) -> measure.Times:
        """Times of a dense case over a cache of this format."""
        return self._timed(
            (case, cache_format, *options.items()),
            lambda: self._dense(case, cache_format, **options),
        )

    def fp8_matmul_error(self, case: BenchmarkCase | DenseCase) -> float:
        """How far ``out`` with FP8 products is from ``out`` without, over a V3.2 cache, by norm."""

        def out(fp8_matmul: bool) -> np.ndarray:
            if isinstance(case, DenseCase):
                problem: Any = self._dense(case, "fp8_v32", fp8_matmul=fp8_matmul)
            else:
                problem = self._sparse(case, fp8_matmul=fp8_matmul)
            return problem.run()[0].astype(np.float32)

        if case not in self._errors:
            exact = out(False)
            self._errors[case] = float(np.linalg.norm(out(True) - exact) / np.linalg.norm(exact))
        return self._errors[case]

    def decode(self, case: BenchmarkCase) -> Row:
        """A sparse case beside the ceilings and the peer; batch-invariant; with FP8 products."""
        times, invariant = self.raw(case), self.raw(case, batch_invariant=True)
        powers_us = fp8_us = error = None
        if case.cache_format == "fp8_v32":
            powers_us = self.raw(case, power_of_two_scales=True).us
            fp8_us = self.raw(case, fp8_matmul=True).us
            error = self.fp8_matmul_error(case)
        return {
            **sizes(case),
            "us": times.us,
            "schedule_us": times.schedule_us,
            **self._rates(case.flop(), case.bytes(), times.us),
            "peer_us": case.peer_us,
            "peer_over_ours": None if case.peer_us is None else case.peer_us / times.us,
            "power_of_two_us": powers_us,
            "invariant_us": invariant.us,
            "invariant_over_ordinary": invariant.us / times.us,
            "fp8_matmul_us": fp8_us,
            "ordinary_over_fp8_matmul": None if fp8_us is None else times.us / fp8_us,
            "fp8_matmul_error": error,
        }

    def fp8_dense(self, case: DenseCase) -> Row:
        """Dense decode over an FP8 cache, ordinary and in FP8, and over a bfloat16 one."""
        us = self.raw_dense(case, "fp8_v32").us
        powers_us = self.raw_dense(case, "fp8_v32", power_of_two_scales=True).us
        plain_us = self.raw_dense(case, "plain").us
        fp8_us = self.raw_dense(case, "fp8_v32", fp8_matmul=True).us
        return {
            **measure.sizes(case),
            "us": us,
            **self._rates(case.flop(), sparse_cases.fp8_dense_bytes(case), us),
            "power_of_two_us": powers_us,
            "plain_us": plain_us,
            "over_plain": us / plain_us,
            "power_of_two_over_plain": powers_us / plain_us,
            "fp8_matmul_us": fp8_us,
            "plain_over_fp8_matmul": plain_us / fp8_us,
            "fp8_matmul_error": self.fp8_matmul_error(case),
        }

    def _rates(self, flop: int, size: int, us: float) -> Row:
        gb_per_s, tflop_per_s = size / us / 1e3, flop / us / 1e6
        read, matmul = (
            self.limits.get(name) for name in ("read_gb_per_s", "bf16_matmul_tflop_per_s")
        )
        return {
            "gb_per_s": gb_per_s,
            "tflop_per_s": tflop_per_s,
            "of_read_ceiling": None if read is None else gb_per_s / read,
            "of_matmul_ceiling": None if matmul is None else tflop_per_s / matmul,
        }

    def xla(self, case: BenchmarkCase) -> Row:
        """``implementation="xla"``, in a jitted program of one call."""
        pool = self.pool(case.cache_format)
        arrays = arrays_of(case, pool)

        @jax.jit
        def call(q, cache, indices, extra_indices):
            cache = PagedKVCache(cache, case.cache_format, PAGE_SIZE)
            extra = {}
            if extra_indices is not None:
                extra = {"extra_k_cache": cache, "extra_indices_in_kvcache": extra_indices}
            return flash_mla_with_kvcache(
                q,
                cache,
                None,
                None,
                case.dv,
                softmax_scale=case.softmax_scale,
                is_fp8_kvcache=case.cache_format != "plain",
                indices=indices,
                implementation="xla",
                **extra,
            )

        operands = arrays["q"], pool, arrays["indices"], arrays.get("extra_indices")
        us = 1e6 * measure.seconds_of(lambda: call(*operands), repeats=2)
        raw_us = self.raw(case).us
        return {
            **sizes(case),
            "us": us,
            **self._rates(case.flop(), case.bytes(), us),
            "raw_us": raw_us,
            "over_raw": us / raw_us,
        }


# ---------------------------------------------------------------------------------------------
# Sections


@dataclasses.dataclass(frozen=True)
class Item:
    """One row to measure."""

    name: str
    case: BenchmarkCase | DenseCase | cache_ops.Case
    measure: Callable[[Timer], Row]


def _named_rows() -> dict[str, BenchmarkCase]:
    return {case.name: case for case in (*sparse_cases.peer_rows(), *sparse_cases.more_rows())}


def items(section: str) -> list[Item]:
    """The rows of a section."""
    if section in ("sparse", "sparse_more"):
        chosen = sparse_cases.peer_rows() if section == "sparse" else sparse_cases.more_rows()
        return [Item(c.name, c, lambda timer, c=c: timer.decode(c)) for c in chosen]
    if section == "fp8_dense":
        return [
            Item(c.name, c, lambda timer, c=c: timer.fp8_dense(c))
            for c in sparse_cases.fp8_dense_rows()
        ]
    if section == "cache":
        return [
            Item(
                c.name,
                c,
                lambda timer, c=c: cache_ops.measure_case(c, timer.launches, timer.replays),
            )
            for c in cache_ops.cases()
        ]
    if section == "sparse_xla":
        known = _named_rows()
        return [Item(n, known[n], lambda timer, c=known[n]: timer.xla(c)) for n in _XLA_ROWS]
    raise ValueError(f"no section of sparse decode is called {section!r}; there are {NAMES}")


def slots_of(chosen: list[Item]) -> int:
    """Slots that the pools must have for these rows; those of "cache" have caches of their own."""
    sparse = [item.case for item in chosen if isinstance(item.case, BenchmarkCase)]
    dense = [item.case for item in chosen if isinstance(item.case, DenseCase)]
    pages = [int(measure.pages_of(case).sum()) for case in dense]
    return max(sparse_cases.pool_slots(sparse), PAGE_SIZE * max(pages, default=1))
