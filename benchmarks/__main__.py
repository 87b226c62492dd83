"""Times dense decode on the GPU at hand: ``python -m benchmarks --out benchmarks/results/NAME``.

Each case is a CUDA graph of back-to-back launches of the attention and the merge kernel, through
the launchers without XLA around them, on the same buffers with a schedule made beforehand: so
small cases run with a warm L2 cache. The time is the median over replays, per launch. Two ceilings
are measured in the same run: a float32 sum of 4 GiB (memory reads) and a bf16 matrix product of
8192 x 8192 x 8192. Cases, and the peer's times beside ours, come from tests/cases.py.

Writes NAME.json and NAME.csv and prints a table while it runs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import cases  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxlib  # noqa: E402
import numpy as np  # noqa: E402
from cases import DenseCase  # noqa: E402
from raw_launcher import RawDenseDecode  # noqa: E402

import jax_flashmla  # noqa: E402
from jax_flashmla import _ffi  # noqa: E402

PAGE_SIZE, DIM = 64, 576


def seconds_of(function: Callable[..., jax.Array], *arguments: jax.Array, repeats: int) -> float:
    """Seconds of one call among ``repeats`` calls that queue up on the device."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(repeats)])
        times.append((time.perf_counter() - start) / repeats)
    return float(np.median(times))


def ceilings() -> dict[str, float]:
    """GB/s of reading memory and TFLOP/s of a bf16 matrix product, on random numbers."""
    numbers = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.float32)
    read = numbers.nbytes / seconds_of(jax.jit(jnp.sum), numbers, repeats=20) / 1e9
    del numbers
    n = 8192
    a, b = jax.random.normal(jax.random.key(1), (2, n, n), jnp.bfloat16)
    product = 2 * n**3 / seconds_of(jax.jit(jnp.matmul), a, b, repeats=20) / 1e12
    return {"read_gb_per_s": read, "bf16_matmul_tflop_per_s": product}


def pages_of(case: DenseCase) -> np.ndarray:
    """Pages that each request of the case uses."""
    return -(-case.cache_seqlens() // PAGE_SIZE)


def random_pool(pages: int) -> jax.Array:
    """A cache of at least so many pages of random numbers, made in parts of 1,024 pages."""

    @jax.jit
    def make(keys):
        shape = (1024, PAGE_SIZE, 1, DIM)
        parts = jax.lax.map(lambda key: jax.random.normal(key, shape, jnp.bfloat16) / 10, keys)
        return parts.reshape(-1, *shape[1:])

    return make(jax.random.split(jax.random.key(2), -(-pages // 1024)))


def problem(case: DenseCase, pool: jax.Array) -> RawDenseDecode:
    """The case on the device, its pages scattered over the pool."""
    rng = np.random.default_rng(0)
    used = pages_of(case)
    table = np.full((case.b, max(int(used.max()), 1)), cases.GARBAGE, np.int32)
    pages = rng.permutation(len(pool))[: used.sum()]
    table[np.arange(table.shape[1]) < used[:, None]] = pages
    q = rng.standard_normal((case.b, case.s_q, case.h_q, DIM), np.float32) / 10
    return RawDenseDecode(
        q=jnp.asarray(q, pool.dtype),
        k_cache=pool,
        block_table=jnp.asarray(table),
        cache_seqlens=jnp.asarray(case.cache_seqlens()),
        softmax_scale=case.softmax_scale,
        causal=case.causal,
    )


def measure(case: DenseCase, pool: jax.Array, limits: dict[str, float], options) -> dict[str, Any]:
    """One row of results."""
    raw = problem(case, pool)
    us = raw.time(options.launches, options.replays)
    gb_per_s, tflop_per_s = case.bytes() / us / 1e3, case.flop() / us / 1e6
    return {
        "name": case.name,
        "b": case.b,
        "s_k": case.s_k,
        "h_q": case.h_q,
        "s_q": case.s_q,
        "us": us,
        "schedule_us": raw.time_schedule(options.launches, options.replays),
        "gb_per_s": gb_per_s,
        "tflop_per_s": tflop_per_s,
        "of_read_ceiling": gb_per_s / limits["read_gb_per_s"],
        "of_matmul_ceiling": tflop_per_s / limits["bf16_matmul_tflop_per_s"],
        "peer_us": case.peer_us,
        "peer_over_ours": None if case.peer_us is None else case.peer_us / us,
    }


def environment() -> dict[str, Any]:
    """What was measured on what."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu, driver = (
        subprocess.run(query, capture_output=True, text=True, check=True)
        .stdout.split("\n")[0]
        .split(", ")
    )
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


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="path of the results, without .json and .csv")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--launches", type=int, default=20, help="launches in a CUDA graph")
    parser.add_argument("--replays", type=int, default=5, help="replays; the median counts")
    options = parser.parse_args()
    if not _ffi.cuda_built():
        parser.error("this build of jax_flashmla has no CUDA kernels")
    chosen = [case for case in cases.dense_benchmarks() if options.filter in case.name]
    if not chosen:
        parser.error(f"no case is called {options.filter!r}")

    limits = ceilings()
    print(
        f"ceilings: {limits['read_gb_per_s']:.0f} GB/s read, "
        f"{limits['bf16_matmul_tflop_per_s']:.0f} TFLOP/s bf16 matrix product",
        flush=True,
    )
    pages = max(int(pages_of(case).sum()) for case in chosen)
    pool = random_pool(pages)
    print(f"{'case':40} {'us':>9} {'GB/s':>6} {'TFLOP/s':>8} {'peer us':>9} {'peer/ours':>9}")
    rows = []
    for case in chosen:
        row = measure(case, pool, limits, options)
        rows.append(row)
        peer = row["peer_us"]
        beside = f"{peer:9.1f} {row['peer_over_ours']:9.2f}" if peer else ""
        print(
            f"{case.name:40} {row['us']:9.1f} {row['gb_per_s']:6.0f} {row['tflop_per_s']:8.0f} "
            + beside,
            flush=True,
        )
    ratios = [row["peer_over_ours"] for row in rows if row["peer_over_ours"]]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
    if mean is not None:
        print(f"geometric mean of peer/ours over {len(ratios)} cases: {mean:.3f}")
    if options.out is not None:
        result = {
            "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
            **environment(),
            "ceilings": limits,
            "geometric_mean_peer_over_ours": mean,
            "rows": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        with options.out.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
