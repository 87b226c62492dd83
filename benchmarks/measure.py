"""What is timed on the GPU: kernels through the raw launchers, the scheduler, XLA, two ceilings.

A kernel's time is that of one launch in a CUDA graph of back-to-back launches, through the
launchers without XLA around them, on the same buffers with a schedule made beforehand: so small
cases run with a warm L2 cache. It is the median over replays, of attention and merge together.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import raw_launcher
from cases import DenseCase
from raw_launcher import RawDenseDecode

import jax_flashmla
from jax_flashmla import _ffi, _planning, flash_mla_with_kvcache
from jax_flashmla.reference import scheduler

Row = dict[str, Any]

PAGE_SIZE, DIM = 64, 576
_PAGES_AT_ONCE = 1024

#: Microseconds of the peer's scheduler on an H200, by number of requests.
PEER_METADATA_US = {8: 13.6, 128: 21.5, 1024: 68.0}


def seconds_of(function: Callable[[], Any], repeats: int, trials: int = 3) -> float:
    """Seconds of one call among ``repeats`` calls that queue up on the device: median of trials."""
    jax.block_until_ready(function())
    times = []
    for _ in range(trials):
        start = time.perf_counter()
        for _ in range(repeats):
            # Freed first, so that every call finds its results' memory where it was: otherwise XLA
            # would have to update the addresses in its CUDA graphs each time.
            result = None
            result = function()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / repeats)
    return float(np.median(times))


def ceilings() -> dict[str, float]:
    """GB/s of reading 4 GiB of float32, TFLOP/s of an 8192³ bf16 product, on random numbers."""
    numbers = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.float32)
    read = numbers.nbytes / seconds_of(functools.partial(jax.jit(jnp.sum), numbers), 20) / 1e9
    del numbers
    n = 8192
    a, b = jax.random.normal(jax.random.key(1), (2, n, n), jnp.bfloat16)
    product = 2 * n**3 / seconds_of(functools.partial(jax.jit(jnp.matmul), a, b), 20) / 1e12
    return {"read_gb_per_s": read, "bf16_matmul_tflop_per_s": product}


def environment() -> dict[str, Any]:
    """What was measured on what."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    gpu, driver = answer.split("\n")[0].split(", ")
    build = {key: value for key, value in _ffi.build_info().items() if key != "path"}
    return {
        "gpu": gpu,
        "driver": driver,
        "jax_flashmla": jax_flashmla.__version__,
        "build": build,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": sys.version.split()[0],
        "date": datetime.date.today().isoformat(),
    }


# ---------------------------------------------------------------------------------------------
# Inputs


def pages_of(case: DenseCase) -> np.ndarray:
    """Pages that each request of the case uses."""
    return -(-case.cache_seqlens() // PAGE_SIZE)


def random_pool(pages: int) -> jax.Array:
    """A cache of at least so many pages of random numbers."""

    @jax.jit
    def make(keys):
        shape = (_PAGES_AT_ONCE, PAGE_SIZE, 1, DIM)
        parts = jax.lax.map(lambda key: jax.random.normal(key, shape, jnp.bfloat16) / 10, keys)
        return parts.reshape(-1, *shape[1:])

    return make(jax.random.split(jax.random.key(2), max(-(-pages // _PAGES_AT_ONCE), 1)))


def arrays_of(case: DenseCase, pool: jax.Array) -> dict[str, jax.Array]:
    """Array arguments of ``flash_mla_with_kvcache``; pages lie scattered over the pool.

    Over a pool of FP8 bytes queries are bfloat16.
    """
    rng = np.random.default_rng(0)
    used = pages_of(case)
    table = np.full((case.b, max(int(used.max()), 1)), cases.GARBAGE, np.int32)
    pages = rng.permutation(len(pool))[: used.sum()]
    table[np.arange(table.shape[1]) < used[:, None]] = pages
    q = rng.standard_normal((case.b, case.s_q, case.h_q, case.d), np.float32) / 10
    dtype = jnp.bfloat16 if pool.dtype == jnp.uint8 else pool.dtype
    return {
        "q": jnp.asarray(q, dtype),
        "k_cache": pool,
        "block_table": jnp.asarray(table),
        "cache_seqlens": jnp.asarray(case.cache_seqlens()),
    }


# ---------------------------------------------------------------------------------------------
# Rows


def sizes(case: DenseCase) -> Row:
    """The columns that say which case a row is of."""
    return {"name": case.name, "b": case.b, "s_k": case.s_k, "h_q": case.h_q, "s_q": case.s_q}


def lengths_of(case: DenseCase) -> str:
    """ "uniform", "varying" or, if they are listed, "uneven"."""
    return case.lengths if isinstance(case.lengths, str) else "uneven"


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds of attention with its merge, and of planning its schedule."""

    us: float
    schedule_us: float


class Timer:
    """Times cases over one pool of pages; what it has timed once it does not time again."""

    def __init__(self, pool: jax.Array, limits: dict[str, float], launches: int, replays: int):
        self.pool, self.limits = pool, limits
        self.launches, self.replays = launches, replays
        self._known: dict[tuple[DenseCase, bool], Times] = {}

    def raw(self, case: DenseCase, batch_invariant: bool = False) -> Times:
        """Times through the raw launchers."""
        key = dataclasses.replace(case, name="", peer_us=None), batch_invariant
        if key not in self._known:
            problem = RawDenseDecode(
                **arrays_of(case, self.pool),
                softmax_scale=case.softmax_scale,
                causal=case.causal,
                batch_invariant=batch_invariant,
            )
            self._known[key] = Times(
                problem.time(self.launches, self.replays),
                problem.time_schedule(self.launches, self.replays),
            )
        return self._known[key]

    def decode(self, case: DenseCase) -> Row:
        """A case beside the ceilings and the peer."""
        times = self.raw(case)
        gb_per_s, tflop_per_s = rates(case, times.us)
        return {
            **sizes(case),
            "us": times.us,
            "schedule_us": times.schedule_us,
            "gb_per_s": gb_per_s,
            "tflop_per_s": tflop_per_s,
            "of_read_ceiling": _share(gb_per_s, self.limits.get("read_gb_per_s")),
            "of_matmul_ceiling": _share(tflop_per_s, self.limits.get("bf16_matmul_tflop_per_s")),
            "peer_us": case.peer_us,
            "peer_over_ours": None if case.peer_us is None else case.peer_us / times.us,
            "lengths": lengths_of(case),
        }

    def batch_invariant(self, case: DenseCase) -> Row:
        """A case with ``batch_invariant=True`` beside the ordinary schedule."""
        ordinary, invariant = self.raw(case).us, self.raw(case, batch_invariant=True).us
        return {
            **sizes(case),
            "us": invariant,
            "ordinary_us": ordinary,
            "over_ordinary": invariant / ordinary,
        }

    def metadata(self, requests: int) -> Row:
        """The scheduler kernel for so many requests of uniform and of varying lengths."""
        rng = np.random.default_rng(0)
        uniform = np.full(requests, 4096, np.int32)
        varying = np.maximum(rng.normal(4096, 2048, requests), 1).astype(np.int32)
        return {
            "b": requests,
            "num_sm_parts": _planning.DEFAULT_SM_COUNT,
            "uniform_us": self._schedule_us(uniform),
            "varying_us": self._schedule_us(varying),
            "batch_invariant_us": self._schedule_us(varying, batch_invariant=True),
            "peer_us": PEER_METADATA_US.get(requests),
        }

    def _schedule_us(self, lengths: np.ndarray, batch_invariant: bool = False) -> float:
        parts = _planning.DEFAULT_SM_COUNT
        on_device = jax.device_put(lengths)
        schedule = jax.device_put(np.full((parts, scheduler.COLUMNS), -1, np.int32))
        num_splits = jax.device_put(np.full(len(lengths) + 1, -1, np.int32))
        raw_launcher.wait_for(on_device, schedule, num_splits)
        params = raw_launcher.schedule_params(
            batch=len(lengths),
            num_parts=parts,
            row_tiles=1,
            batch_invariant=batch_invariant,
            lengths=raw_launcher.address_of(on_device),
            schedule=raw_launcher.address_of(schedule),
            num_splits=raw_launcher.address_of(num_splits),
        )
        times = raw_launcher.raw_module().time(params, self.launches, self.replays)
        return float(np.median(times))

    def xla(self, case: DenseCase) -> Row:
        """``implementation="xla"``, in a jitted program of one call."""
        arrays = arrays_of(case, self.pool)
        call = jax.jit(
            functools.partial(
                flash_mla_with_kvcache,
                head_dim_v=case.dv,
                softmax_scale=case.softmax_scale,
                causal=case.causal,
                implementation="xla",
            )
        )
        us = 1e6 * seconds_of(lambda: call(**arrays), repeats=2)
        gb_per_s, tflop_per_s = rates(case, us)
        return {
            **sizes(case),
            "us": us,
            "gb_per_s": gb_per_s,
            "tflop_per_s": tflop_per_s,
            "raw_us": self.raw(case).us,
            "over_raw": us / self.raw(case).us,
        }


def rates(case: DenseCase, us: float) -> tuple[float, float]:
    """GB/s and TFLOP/s of a case that takes so long."""
    return case.bytes() / us / 1e3, case.flop() / us / 1e6


def _share(value: float, limit: float | None) -> float | None:
    return None if limit is None else value / limit
