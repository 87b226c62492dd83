"""The targets of decode on an H200, and whether a result meets them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import cases
import sparse_cases

from benchmarks import cache_ops, measure, report, sections, sparse

Row = dict[str, Any]
K = 1024

#: Part of the peer's time that may be noise where it is only to be reached.
NOISE = 1.03


@dataclasses.dataclass(frozen=True)
class Judged:
    """One row and one bound: ``value`` is to be at least, or ``at_most`` at most, ``bound``."""

    name: str
    value: float
    bound: float
    unit: str
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the bound holds."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    @property
    def margin(self) -> float:
        """How far the value is on the good side of the bound, as a ratio; below 1 it is missed."""
        good, bad = (self.bound, self.value) if self.at_most else (self.value, self.bound)
        return good / bad if bad > 0 else float("inf")

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        forms = {"%": "{:.1%}", "us": "{:.2f} us", "x": "{:.3f}x", "TFLOP/s": "{:.0f} TFLOP/s"}
        number = forms[self.unit]
        return f"{self.name} {number.format(self.value)} ({sign} {number.format(self.bound)})"


@dataclasses.dataclass(frozen=True)
class Target:
    """One target with every row that it is about; ``expected``: how many rows there should be."""

    key: str
    text: str
    judged: tuple[Judged, ...]
    expected: int

    @property
    def verdict(self) -> str:
        """ "met", "missed" or "not measured"."""
        if not self.judged:
            return "not measured"
        return "met" if all(j.met for j in self.judged) else "missed"

    def __str__(self) -> str:
        lines = [f"{self.key:3} {self.verdict:12} {self.text}"]
        if not self.judged:
            return lines[0]
        count = len(self.judged)
        good = sum(j.met for j in self.judged)
        if self.expected > 1:
            of = f" ({count} of {self.expected} rows measured)" if count < self.expected else ""
            lines[0] += f": {good} of {count}{of}"
        missed = sorted((j for j in self.judged if not j.met), key=lambda j: j.margin)
        shown = missed or [min(self.judged, key=lambda j: j.margin)]
        word = "" if missed or count == 1 else "closest: "
        return "\n".join([*lines, *(f"{'':17}{word}{j}" for j in shown)])


def lengths_of(row: Row) -> str:
    """ "uniform", "varying" or "uneven"; older results say so in the name only."""
    if "lengths" in row:
        return row["lengths"]
    if row["name"].endswith("-varying"):
        return "varying"
    return "uneven" if row["name"].startswith("uneven") else "uniform"


def roofline_us(row: Row) -> float | None:
    """What the case takes at the ceilings of the run."""
    read, matmul = row.get("of_read_ceiling"), row.get("of_matmul_ceiling")
    return None if read is None or matmul is None else row["us"] * max(read, matmul)


def _tokens(row: Row) -> int:
    return row["b"] * row["s_k"]


def _is_small(row: Row) -> bool:
    return _tokens(row) <= 32 * K and row["s_k"] >= 2048


def _is_memory_bound(row: Row) -> bool:
    return row["h_q"] * row["s_q"] <= 64 and _tokens(row) >= 512 * K


def _is_compute_bound(row: Row) -> bool:
    return row["h_q"] * row["s_q"] >= 128 and _tokens(row) >= 256 * K


def _at(**sizes: int) -> Callable[[Row], bool]:
    return lambda row: all(row[key] == value for key, value in sizes.items())


def _peer_ratio(row: Row, at_least: float) -> Judged | None:
    if not row.get("peer_over_ours"):
        return None
    return Judged(row["name"], row["peer_over_ours"], at_least, "x")


def _within(us: float) -> Callable[[Row], Judged]:
    return lambda row: Judged(row["name"], row["us"], us, "us", at_most=True)


def _of_read(row: Row) -> Judged | None:
    value = row.get("of_read_ceiling")
    return None if value is None else Judged(row["name"], value, 0.95, "%")


def _near_roofline(row: Row) -> Judged | None:
    roofline = roofline_us(row)
    if roofline is None or not row.get("peer_us"):
        return None
    bound = max(1.1 * roofline + 6, row["peer_us"])
    return Judged(row["name"], row["us"], bound, "us", at_most=True)


def _against_uniform(rows: list[Row]) -> Callable[[Row], Judged | None]:
    """Time per byte of a row over that of the uniform row of the same sizes."""
    kind = ("b", "s_k", "h_q", "s_q")
    uniform = {tuple(r[k] for k in kind): r for r in rows if lengths_of(r) == "uniform"}

    def judge(row: Row) -> Judged | None:
        same = uniform.get(tuple(row[k] for k in kind))
        if same is None:
            return None
        return Judged(row["name"], same["gb_per_s"] / row["gb_per_s"], 1.05, "x", at_most=True)

    return judge


def _expected_rows() -> list[Row]:
    return [
        {**measure.sizes(c), "lengths": measure.lengths_of(c)} for c in cases.dense_benchmarks()
    ]


def _of_rows(rows: list[Row]) -> list[Target]:
    expected = _expected_rows()

    def target(
        key: str, text: str, chosen: Callable[[Row], bool], judge: Callable[[Row], Judged | None]
    ) -> Target:
        found = tuple(j for j in map(judge, filter(chosen, rows)) if j is not None)
        return Target(key, text, found, sum(map(chosen, expected)))

    mean = report.mean_over_peer(rows)
    count = sum(1 for row in rows if row.get("peer_over_ours"))
    means = () if mean is None else (Judged(f"mean of {count} rows", mean, 1.25, "x"),)
    return [
        target(
            "a1",
            "no row slower than the peer (3% noise)",
            lambda row: True,
            lambda row: _peer_ratio(row, 1 / NOISE),
        ),
        Target("a2", "geometric mean of peer/ours", means, 1),
        target(
            "b1",
            "b*s_k <= 32 K and s_k >= 2048: 1.8x the peer",
            _is_small,
            lambda row: _peer_ratio(row, 1.8),
        ),
        target("b2", "1 x 4096 within 8 us", _at(b=1, s_k=4096), _within(8)),
        target(
            "b3", "1 x 16384 x 128 heads within 12 us", _at(b=1, s_k=16384, h_q=128), _within(12)
        ),
        target("b4", "1 x 512 within 6 us", _at(b=1, s_k=512), _within(6)),
        target(
            "b5",
            "8 x 16384 within 1.1 x roofline + 6 us, or the peer's time if longer",
            _at(b=8, s_k=16384),
            _near_roofline,
        ),
        target(
            "b6",
            "1 x 131072 x 128 heads 1.4x the peer",
            _at(b=1, s_k=131072, h_q=128),
            lambda row: _peer_ratio(row, 1.4),
        ),
        target(
            "c1",
            "h_q*s_q <= 64 and b*s_k >= 512 K, uniform: 95% of the read ceiling",
            lambda row: _is_memory_bound(row) and lengths_of(row) == "uniform",
            _of_read,
        ),
        target(
            "c2",
            "the same with varying lengths: time per byte within 5% of uniform ones",
            lambda row: _is_memory_bound(row) and lengths_of(row) == "varying",
            _against_uniform(rows),
        ),
        target(
            "d1",
            "h_q*s_q >= 128 and b*s_k >= 256 K: not slower than the peer",
            _is_compute_bound,
            lambda row: _peer_ratio(row, 1.0),
        ),
        target(
            "d2",
            "of these s_q = 1 and b >= 32: 1.05x the peer",
            lambda row: _is_compute_bound(row) and row["s_q"] == 1 and row["b"] >= 32,
            lambda row: _peer_ratio(row, 1.05),
        ),
    ]


def _metadata(rows: Iterable[Row]) -> Target:
    limits = {128: 4.0, 1024: 6.0, 100_000: 25.0}
    judged = tuple(
        Judged(f"b {row['b']} {kind}", row[f"{kind}_us"], limits[row["b"]], "us", at_most=True)
        for row in rows
        if row["b"] in limits
        for kind in ("uniform", "varying")
    )
    text = "get_mla_metadata within 4 us at b 128, 6 at 1024, 25 at 100000"
    return Target("e", text, judged, 2 * len(limits))


def _inside_jax(rows: Iterable[Row]) -> Target:
    judged = tuple(
        Judged(f"{row['name']} x {row['calls']}", row["xla_us"], 1.0, "us", at_most=True)
        for row in rows
        if row.get("xla_us") is not None and row["calls"] >= 61
    )
    return Target(
        "f", "61 calls in a program: at most 1 us over the kernels for each", judged, len(judged)
    )


def _batch_invariant(rows: Iterable[Row]) -> Target:
    judged = tuple(Judged(r["name"], r["over_ordinary"], 1.3, "x", at_most=True) for r in rows)
    return Target("g", "batch_invariant at most 1.3x slower", judged, len(_expected_rows()))


def dense_targets(result: dict[str, Any]) -> list[Target]:
    """Every target of dense decode, judged by a result."""
    return [
        *_of_rows(result.get("rows") or []),
        _metadata(result.get("metadata") or []),
        _inside_jax(result.get("inside_jax") or []),
        _batch_invariant(result.get("batch_invariant") or []),
    ]


# ---------------------------------------------------------------------------------------------
# Sparse decode, FP8 caches


def _large(row: Row) -> bool:
    return row["b"] >= 64


def _at_least(key: str, bound: float, unit: str) -> Callable[[Row], Judged | None]:
    """``key`` of a row, where it is known, is to be at least ``bound``."""

    def judge(row: Row) -> Judged | None:
        value = row.get(key)
        return None if value is None else Judged(row["name"], value, bound, unit)

    return judge


def _at_most(key: str, bound: float, unit: str) -> Callable[[Row], Judged | None]:
    def judge(row: Row) -> Judged | None:
        value = row.get(key)
        return None if value is None else Judged(row["name"], value, bound, unit, at_most=True)

    return judge


def cache_targets(result: dict[str, Any]) -> list[Target]:
    """Every target of writing and reading caches, judged by a result."""

    judged = tuple(
        Judged(row["name"], row["over_copy"], 1.5, "x", at_most=True)
        for row in result.get("cache") or []
        if row["op"] != "gather" and row["bytes"] > 100e6
    )
    expected = sum(case.op != "gather" and case.bytes() > 100e6 for case in cache_ops.cases())
    text = "append of over 100 MB: within 1.5x of its bytes at 4.3 TB/s"
    return [Target("w", text, judged, expected)]


def sparse_targets(result: dict[str, Any]) -> list[Target]:
    """Every target of sparse decode and of dense decode over FP8 caches, judged by a result."""
    rows, fp8 = result.get("sparse") or [], result.get("fp8_dense") or []
    every_row = rows + (result.get("sparse_more") or [])
    peers = [dataclasses.asdict(case) for case in sparse_cases.peer_rows()]
    everything = peers + [dataclasses.asdict(case) for case in sparse_cases.more_rows()]
    dense = [measure.sizes(case) for case in sparse_cases.fp8_dense_rows()]

    def target(
        key: str,
        text: str,
        measured: list[Row],
        wanted: list[Row],
        judge: Callable[[Row], Judged | None],
        chosen: Callable[[Row], bool] = lambda row: True,
    ) -> Target:
        found = tuple(j for j in map(judge, filter(chosen, measured)) if j is not None)
        return Target(key, text, found, sum(map(chosen, wanted)))

    def peer(at_least: float) -> Callable[[Row], Judged | None]:
        return lambda row: _peer_ratio(row, at_least)

    def heads(h_q: int) -> Callable[[Row], bool]:
        return lambda row: row["h_q"] == h_q and _large(row)

    def large_v32(row: Row) -> bool:
        return _at(cache_format="fp8_v32", b=128, h_q=128, s_q=1)(row)

    def few_rows(row: Row) -> bool:
        return row["h_q"] * row["s_q"] <= 32

    return [
        target("s1", "sparse: no row slower than the peer", rows, peers, peer(1.0)),
        target("s2", "h_q 128, b >= 64: 1.25x the peer", rows, peers, peer(1.25), heads(128)),
        target("s3", "h_q 64, b >= 64: 1.4x the peer", rows, peers, peer(1.4), heads(64)),
        target("s4", "b 2: 1.5x the peer", rows, peers, peer(1.5), _at(b=2)),
        target(
            "s5",
            "aim: 550 TFLOP/s, V3.2, b 128, h_q 128",
            rows,
            peers,
            _at_least("tflop_per_s", 550, "TFLOP/s"),
            large_v32,
        ),
        target(
            "s6",
            "aim: 450 TFLOP/s, h_q 64, b >= 64",
            rows,
            peers,
            _at_least("tflop_per_s", 450, "TFLOP/s"),
            heads(64),
        ),
        target(
            "s7",
            "batch_invariant at most 1.3x slower",
            every_row,
            everything,
            _at_most("invariant_over_ordinary", 1.3, "x"),
        ),
        target(
            "f1",
            "FP8 dense, h_q*s_q <= 32: 90% of the read ceiling",
            fp8,
            dense,
            _at_least("of_read_ceiling", 0.9, "%"),
            few_rows,
        ),
        target(
            "f2",
            "FP8 dense, compute-bound: within 10% of bfloat16",
            fp8,
            dense,
            _at_most("over_plain", 1.1, "x"),
            lambda row: not few_rows(row),
        ),
        target(
            "f3",
            "fp8_matmul at least 1.4x bf16 dense at h_q 128, b >= 64",
            fp8,
            dense,
            _at_least("plain_over_fp8_matmul", 1.4, "x"),
            heads(128),
        ),
    ]


def targets_of(result: dict[str, Any]) -> list[Target]:
    """The targets of what a result is about: dense decode, sparse decode, caches, or several."""
    chosen = []
    if any(result.get(name) for name in sections.NAMES):
        chosen += dense_targets(result)
    is_sparse = any(result.get(name) for name in sparse.NAMES if name != "cache")
    if is_sparse:
        chosen += sparse_targets(result)
    if is_sparse or result.get("cache"):
        chosen += cache_targets(result)
    return chosen or dense_targets(result)


def full_text(result: dict[str, Any]) -> str:
    """All targets with their numbers: what misses, else what came closest to it."""
    return "\n".join(["Targets", *map(str, targets_of(result))])
