"""The time of a call inside a jitted program, and where the rest over the kernels' time goes.

A program makes its schedule once and calls ``flash_mla_with_kvcache`` again and again. Every query
depends on the result before it: XLA merges equal calls into one, and could reorder others.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from cases import DenseCase

from benchmarks import measure
from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata

DECODE, METADATA = "flashmla_dense_decode", "flashmla_metadata"

#: A chain of queries alone is this long: it must not be over before the next one is launched.
_QUERY_STEPS = 100
#: Seconds that one trial of a program lasts, about.
_TRIAL_SECONDS = 0.03

# What may have the type of the cache without writing one.
_WRITES_NOTHING = frozenset(
    "parameter get-tuple-element bitcast tuple while conditional call opt-barrier".split()
)


def next_query(q: jax.Array, out: jax.Array) -> jax.Array:
    """The query after ``q``: a little smaller, and with a trace of what ``q`` has attended to."""
    rest = out[..., : q.shape[-1] - out.shape[-1]]
    return 0.99 * q + 1e-3 * jnp.concatenate([out, rest], axis=-1)


def decode_program(
    calls: int,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
    implementation: str | None = "cuda",
) -> Any:
    """A jitted function of q, k_cache, block_table, cache_seqlens: ``calls`` calls in a chain.

    It returns the last ``out`` and ``lse``.
    """

    @jax.jit
    def attend(q, k_cache, block_table, cache_seqlens, schedule):
        return flash_mla_with_kvcache(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v,
            *schedule,
            softmax_scale=softmax_scale,
            causal=causal,
            implementation=implementation,
        )

    def program(q, k_cache, block_table, cache_seqlens):
        _, s_q, h_q, _ = q.shape
        h_kv = k_cache.shape[2]
        schedule = get_mla_metadata(
            cache_seqlens, s_q * h_q // h_kv, h_kv, implementation=implementation
        )
        out, lse = attend(q, k_cache, block_table, cache_seqlens, schedule)
        for _ in range(calls - 1):
            q = next_query(q, out)
            out, lse = attend(q, k_cache, block_table, cache_seqlens, schedule)
        return out, lse

    return jax.jit(program)


def query_program(steps: int) -> Any:
    """A jitted function of q and some ``out``: ``steps`` times the query that comes next.

    A barrier after each step keeps XLA from making one kernel of them all: on a GPU it goes only
    after fusion.
    """

    def program(q, out):
        for _ in range(steps):
            q, out = jax.lax.optimization_barrier((next_query(q, out), out))
        return q

    return jax.jit(program)


# ---------------------------------------------------------------------------------------------
# What XLA made of a program


def traced_calls(lowered_text: str) -> int:
    """Calls of attention in a lowered program, on any platform."""
    return len(re.findall(r"call @attend\w*\(", lowered_text))


def custom_calls(compiled_text: str, target: str) -> int:
    """Calls of an FFI handler in a compiled module."""
    return len(re.findall(rf'custom_call_target="{target}"', compiled_text))


def cache_writes(compiled_text: str, shape: tuple[int, ...]) -> list[str]:
    """Instructions of a compiled module that write something of the cache's shape."""
    dims = f"[{','.join(map(str, shape))}]"
    found = []
    for line in compiled_text.splitlines():
        bare = re.sub(r"{[^{}]*}", "", line)  # without layouts
        match = re.search(r"= (\([^()]*\)|\S+) ([\w-]+)\(", bare)
        if match and dims in match[1] and match[2] not in _WRITES_NOTHING:
            found.append(line.strip())
    return found


def check_program(compiled: Any, calls: int, k_cache: jax.Array) -> dict[str, int]:
    """Raises RuntimeError unless all calls are there and the cache is only read; counts."""
    text = compiled.as_text()
    counts = {
        "custom_calls": custom_calls(text, DECODE),
        "metadata_calls": custom_calls(text, METADATA),
        "cache_writes": len(cache_writes(text, k_cache.shape)),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "cache_bytes": k_cache.nbytes,
    }
    faults = []
    if (counts["custom_calls"], counts["metadata_calls"]) != (calls, 1):
        faults.append(
            f"{counts['custom_calls']} calls of {DECODE} and {counts['metadata_calls']} of "
            f"{METADATA} instead of {calls} and 1"
        )
    faults += [f"writes what may be the cache: {x}" for x in cache_writes(text, k_cache.shape)]
    if counts["temp_bytes"] >= counts["cache_bytes"]:
        faults.append(
            f"{counts['temp_bytes']} bytes of temporary memory; the cache has "
            f"{counts['cache_bytes']}"
        )
    if faults:
        raise RuntimeError("the compiled program is not as expected: " + "; ".join(faults))
    return counts


# ---------------------------------------------------------------------------------------------
# Times


def _microseconds(function: Callable[[], Any], expected: float) -> float:
    """Microseconds of a call that takes about ``expected`` of them."""
    repeats = min(max(math.ceil(_TRIAL_SECONDS * 1e6 / expected), 3), 200)
    return 1e6 * measure.seconds_of(function, repeats, trials=5)


@functools.lru_cache(maxsize=8)
def _query_us(b: int, s_q: int, h_q: int, d: int, dv: int) -> tuple[float | None, float]:
    """Microseconds of making one query, None if XLA fuses steps; and kernels that it takes."""
    q = jnp.zeros((b, s_q, h_q, d), jnp.bfloat16)
    out = jnp.zeros((b, s_q, h_q, dv), jnp.bfloat16)
    compiled = query_program(_QUERY_STEPS).lower(q, out).compile()
    kernels = len(re.findall(r" fusion\(", compiled.as_text())) / _QUERY_STEPS
    if kernels < 1:
        return None, kernels
    return _microseconds(lambda: compiled(q, out), 3 * _QUERY_STEPS) / _QUERY_STEPS, kernels


def measure_case(timer: measure.Timer, case: DenseCase, calls: int) -> measure.Row:
    """A program of ``calls`` calls beside the same case through the raw launchers.

    ``overhead_us`` is what a call takes over the kernels' own time; ``xla_us`` what is left of it
    without the kernels that make the next query and a call's part of the schedule.
    """
    raw = timer.raw(case)
    arrays = measure.arrays_of(case, timer.pool)
    program = decode_program(
        calls, head_dim_v=case.dv, softmax_scale=case.softmax_scale, causal=case.causal
    )
    lowered = program.lower(**arrays)
    traced = traced_calls(lowered.as_text())
    if traced != calls:
        raise RuntimeError(f"the lowered program has {traced} calls instead of {calls}")
    compiled = lowered.compile()
    counts = check_program(compiled, calls, arrays["k_cache"])
    us = _microseconds(lambda: compiled(**arrays), calls * raw.us) / calls
    b, s_q, h_q, d = arrays["q"].shape
    query, kernels = _query_us(b, s_q, h_q, d, case.dv)
    query = None if query is None else query * (calls - 1) / calls
    schedule = raw.schedule_us / calls
    return {
        **measure.sizes(case),
        "calls": calls,
        "us": us,
        "raw_us": raw.us,
        "overhead_us": us - raw.us,
        "query_us": query,
        "query_kernels": kernels,
        "schedule_us": schedule,
        "xla_us": None if query is None else us - raw.us - query - schedule,
        **counts,
    }
