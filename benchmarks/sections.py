"""What a run consists of: for each section its cases and how one of them is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cases
from cases import DenseCase

from benchmarks import end_to_end, inside_jax, measure

#: Sections in the order in which they run; also their keys in the results.
NAMES = ("rows", "sweep", "metadata", "batch_invariant", "inside_jax", "xla", "end_to_end")

SWEEP_HEADS = (16, 64, 128)
SWEEP_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # at SWEEP_BATCH requests
SWEEP_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of SWEEP_LENGTH tokens
SWEEP_BATCH, SWEEP_LENGTH = 128, 4096

# Of the sweep, what is timed with XLA too, which takes several times as long.
_XLA_HEADS = (16, 128)
_XLA_LENGTHS = (1024, 4096, 16384)
_XLA_BATCHES = (1, 8, 32)

#: Cases whose time inside JAX is taken, and the number of calls in the program.
_INSIDE_JAX = (
    ("b1-sk512-h8-sq1", 20),
    ("b1-sk4096-h16-sq1", 20),
    ("b1-sk4096-h128-sq1", 20),
    ("b1-sk16384-h128-sq1", 20),
    ("b8-sk4096-h16-sq1", 20),
    ("b8-sk16384-h128-sq1", 20),
    ("b8-sk16384-h128-sq2", 20),
    ("b32-sk4096-h16-sq1", 61),
    ("b32-sk4096-h64-sq1", 20),
    ("b32-sk4096-h128-sq2", 20),
    ("b128-sk4096-h16-sq1", 20),
    ("b128-sk4096-h128-sq1", 61),
    ("b128-sk4096-h128-sq2", 20),
)

METADATA_REQUESTS = (1, 8, 32, 128, 1024, 10_000, 100_000)


@dataclasses.dataclass(frozen=True)
class Item:
    """One row to measure. ``case``: what must be in the cache for it, None if nothing."""

    name: str
    case: DenseCase | None
    measure: Callable[[measure.Timer], dict[str, Any]]


def _named(b: int, s_k: int, h_q: int) -> DenseCase:
    """A uniform case, the peer's row if there is one."""
    name = f"b{b}-sk{s_k}-h{h_q}-sq1"
    known = {case.name: case for case in cases.dense_benchmarks()}
    return known.get(name) or DenseCase(name, b, s_k, h_q)


def _curves(
    heads: tuple[int, ...], lengths: tuple[int, ...], batches: tuple[int, ...]
) -> list[DenseCase]:
    """Uniform cases over the length and over the number of requests, each once."""
    points = [(SWEEP_BATCH, s_k) for s_k in lengths] + [(b, SWEEP_LENGTH) for b in batches]
    return [_named(b, s_k, h) for h in heads for b, s_k in dict.fromkeys(points)]


def items(section: str, *, unrolled: bool = True) -> list[Item]:
    """The rows of a section; ``unrolled``: end to end not only with a loop over layers."""
    if section == "rows":
        return [
            Item(c.name, c, lambda timer, c=c: timer.decode(c)) for c in cases.dense_benchmarks()
        ]
    if section == "sweep":
        chosen = _curves(SWEEP_HEADS, SWEEP_LENGTHS, SWEEP_BATCHES)
        return [Item(c.name, c, lambda timer, c=c: timer.decode(c)) for c in chosen]
    if section == "inside_jax":
        by_name = {case.name: case for case in cases.dense_benchmarks()}
        return [
            Item(
                name,
                by_name[name],
                lambda timer, c=by_name[name], n=n: inside_jax.measure_case(timer, c, n),
            )
            for name, n in _INSIDE_JAX
        ]
    if section == "xla":
        chosen = _curves(_XLA_HEADS, _XLA_LENGTHS, _XLA_BATCHES)
        return [Item(c.name, c, lambda timer, c=c: timer.xla(c)) for c in chosen]
    if section == "batch_invariant":
        return [
            Item(c.name, c, lambda timer, c=c: timer.batch_invariant(c))
            for c in cases.dense_benchmarks()
        ]
    if section == "metadata":
        return [
            Item(f"metadata-b{b}", None, lambda timer, b=b: timer.metadata(b))
            for b in METADATA_REQUESTS
        ]
    if section == "end_to_end":
        return [
            Item(
                stack.name,
                stack.case,
                lambda timer, s=stack: end_to_end.measure_stack(timer, s, unrolled=unrolled),
            )
            for stack in end_to_end.STACKS
        ]
    raise ValueError(f"no section is called {section!r}; there are {NAMES}")
