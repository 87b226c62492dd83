"""Results as tables, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: its head, its width (negative: flush left) and what stands in it for a row."""

    head: str
    width: int
    text: Callable[[Row], str]

    def align(self, text: str) -> str:
        """The text in the column's width."""
        return text.ljust(-self.width) if self.width < 0 else text.rjust(self.width)


def _number(key: str, head: str, width: int, form: str, scale: float = 1) -> Column:
    def text(row: Row) -> str:
        value = row.get(key)
        return "-" if value is None else format(value if scale == 1 else value * scale, form)

    return Column(head, width, text)


def bound_by(row: Row) -> str | None:
    """Which of the two ceilings the case meets first, "read" or "matmul"; None if unknown."""
    read, matmul = row.get("of_read_ceiling"), row.get("of_matmul_ceiling")
    if read is None or matmul is None:
        return None
    return "read" if read >= matmul else "matmul"


def _fraction(ceiling: str) -> Column:
    """The fraction of a ceiling, marked where this is the one that bounds the case."""

    def text(row: Row) -> str:
        value = row.get(f"of_{ceiling}_ceiling")
        if value is None:
            return "- "
        return f"{value:.0%}" + ("*" if bound_by(row) == ceiling else " ")

    return Column(ceiling, 8, text)


@dataclasses.dataclass(frozen=True)
class Table:
    """The table of one section."""

    title: str
    columns: tuple[Column, ...]

    def header(self) -> str:
        """The line above the rows."""
        return " ".join(c.align(c.head) for c in self.columns).rstrip()

    def line(self, row: Row) -> str:
        """A row."""
        return " ".join(c.align(c.text(row)) for c in self.columns).rstrip()


_NAME = Column("case", -32, lambda row: row["name"])
_US = _number("us", "us", 9, ".1f")
_RATES = (_number("gb_per_s", "GB/s", 6, ".0f"), _number("tflop_per_s", "TFLOP/s", 8, ".0f"))
_RAW = _number("raw_us", "raw us", 9, ".1f")
_DECODE = (
    _NAME,
    _US,
    *_RATES,
    _fraction("read"),
    _fraction("matmul"),
    _number("peer_us", "peer us", 9, ".1f"),
    _number("peer_over_ours", "peer/ours", 9, ".2f"),
)
_FP8_ERROR = _number("fp8_matmul_error", "error", 6, ".1%")
_POWERS = _number("power_of_two_us", "powers of 2", 11, ".1f")
_SPARSE = (
    *_DECODE,
    _POWERS,
    _number("invariant_us", "invariant", 9, ".1f"),
    _number("invariant_over_ordinary", "ratio", 6, ".2f"),
    _number("fp8_matmul_us", "FP8 products", 12, ".1f"),
    _number("ordinary_over_fp8_matmul", "ratio", 6, ".2f"),
    _FP8_ERROR,
)

TABLES = {
    "rows": Table("Dense decode; fractions of the ceilings, * of the one that bounds it", _DECODE),
    "sweep": Table("Dense decode, uniform lengths, for the curves", _DECODE),
    "inside_jax": Table(
        "Time inside JAX, for each call of a jitted program; raw: the kernels alone",
        (
            _NAME,
            _number("calls", "calls", 5, "d"),
            _US,
            _RAW,
            _number("overhead_us", "overhead", 9, ".2f"),
            _number("query_us", "of query", 9, ".2f"),
            _number("schedule_us", "schedule", 9, ".2f"),
            _number("xla_us", "XLA", 7, ".2f"),
        ),
    ),
    "xla": Table(
        "implementation='xla'",
        (_NAME, _US, *_RATES, _RAW, _number("over_raw", "xla/raw", 9, ".1f")),
    ),
    "batch_invariant": Table(
        "batch_invariant=True beside the ordinary schedule",
        (
            _NAME,
            _US,
            _number("ordinary_us", "ordinary", 9, ".1f"),
            _number("over_ordinary", "ratio", 7, ".2f"),
        ),
    ),
    "metadata": Table(
        "get_mla_metadata, in us: the scheduler kernel for 132 parts",
        (
            _number("b", "requests", 9, "d"),
            _number("uniform_us", "uniform", 9, ".1f"),
            _number("varying_us", "varying", 9, ".1f"),
            _number("batch_invariant_us", "invariant", 9, ".1f"),
            _number("peer_us", "peer", 9, ".1f"),
        ),
    ),
    "sparse": Table(
        "Sparse decode beside the peer; fractions of the ceilings, * of the one that bounds it",
        _SPARSE,
    ),
    "sparse_more": Table("Sparse decode, further cases", _SPARSE),
    "fp8_dense": Table(
        "Dense decode over an FP8 V3.2 cache, and in us over a bfloat16 one and with FP8 products",
        (
            _NAME,
            _US,
            *_RATES,
            _fraction("read"),
            _fraction("matmul"),
            _POWERS,
            _number("plain_us", "bf16", 9, ".1f"),
            _number("over_plain", "FP8/bf16", 9, ".2f"),
            _number("power_of_two_over_plain", "with these", 10, ".2f"),
            _number("fp8_matmul_us", "FP8 products", 12, ".1f"),
            _number("plain_over_fp8_matmul", "bf16/that", 9, ".2f"),
            _FP8_ERROR,
        ),
    ),
    "cache": Table(
        "Tokens written to caches and read from them; over copy: time over the bytes at 4.3 TB/s",
        (
            _NAME,
            _number("bytes", "MB", 8, ".2f", 1e-6),
            _US,
            _RATES[0],
            _number("over_copy", "over copy", 10, ".2f"),
        ),
    ),
    "sparse_xla": Table(
        "Sparse decode with implementation='xla'",
        (_NAME, _US, *_RATES, _RAW, _number("over_raw", "xla/raw", 9, ".1f")),
    ),
    "end_to_end": Table(
        "A step of DeepSeek V3's attention layers, in ms; bound: what the ceilings allow",
        (
            _NAME,
            _number("us", "step", 8, ".2f", 1e-3),
            _number("tokens_per_s", "tokens/s", 9, ".0f"),
            _number("scan_us", "scan", 8, ".2f", 1e-3),
            _number("without_attention_us", "without attention", 18, ".2f", 1e-3),
            _number("attention_share", "attention", 10, ".0%"),
            _number("raw_us", "kernels", 8, ".2f", 1e-3),
            _number("bound_us", "bound", 7, ".2f", 1e-3),
            _number("of_bound", "of it", 6, ".0%"),
            _number("xla_us", "XLA", 9, ".1f", 1e-3),
            _number("xla_over_ours", "XLA/ours", 9, ".1f"),
        ),
    ),
}


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """None of nothing."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else None


def mean_over_peer(rows: Iterable[Row]) -> float | None:
    """Geometric mean of peer/ours over the rows that have it."""
    return geometric_mean(r["peer_over_ours"] for r in rows if r.get("peer_over_ours"))


def ceilings_line(limits: dict[str, float]) -> str:
    """The two ceilings of a run."""
    if not limits:
        return "ceilings: not measured"
    return (
        f"ceilings: {limits['read_gb_per_s']:.0f} GB/s read, "
        f"{limits['bf16_matmul_tflop_per_s']:.0f} TFLOP/s bf16 matrix product"
    )


def summary_line(section: str, rows: list[Row]) -> str | None:
    """What to say below the rows of a section."""
    if section in ("rows", "sparse"):
        count = sum(1 for row in rows if row.get("peer_over_ours"))
        mean = mean_over_peer(rows)
        return mean and f"geometric mean of peer/ours over {count} cases: {mean:.3f}"
    if section == "batch_invariant" and rows:
        worst = max(rows, key=lambda row: row["over_ordinary"])
        mean = geometric_mean(row["over_ordinary"] for row in rows)
        return (
            f"geometric mean of the ratio: {mean:.2f}; highest {worst['over_ordinary']:.2f} "
            f"({worst['name']})"
        )
    if section == "end_to_end":
        return "\n".join(note for row in rows for note in _end_to_end_notes(row)) or None
    return None


def _end_to_end_notes(row: Row) -> Iterable[str]:
    """What the numbers of a step do not say."""
    if row.get("xla_note"):
        yield f"{row['name']}: no time with XLA: {row['xla_note']}"
    if row.get("xla_cache_copies"):
        yield f"{row['name']}: with XLA the step copies the cache"
    for key, where in (
        ("weight_copy_bytes", "all layers" if row.get("program") == "unrolled" else "each layer"),
        ("scan_weight_copy_bytes", "each layer of the scan"),
        ("xla_weight_copy_bytes", "each layer with XLA"),
    ):
        if row.get(key):
            yield f"{row['name']}: {row[key] / 1e6:.0f} MB of weights are copied in {where}"


def full_text(result: Result) -> str:
    """All tables of a result."""
    keys = ("gpu", "driver", "jax", "jax_flashmla", "date")
    lines = [", ".join(f"{key} {result[key]}" for key in keys if key in result)]
    lines.append(ceilings_line(result.get("ceilings") or {}))
    for section, table in TABLES.items():
        rows = result.get(section)
        if not rows:
            continue
        lines += ["", table.title, table.header(), *map(table.line, rows)]
        summary = summary_line(section, rows)
        lines += [summary] if summary else []
    for error in result.get("errors", ()):
        lines.append(f"failed: {error['section']} {error['case'] or ''}: {error['error']}")
    return "\n".join(lines)


def save(out: Path, result: Result) -> None:
    """Writes OUT.json, and OUT.csv with the rows beside the peer if there are any.

    Other sections have files of their own: OUT_end_to_end.csv, OUT_sparse.csv (OUT.csv if there are
    no rows of dense decode) and OUT_fp8_dense.csv.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    suffixes = {"rows": "", "end_to_end": "_end_to_end", "fp8_dense": "_fp8_dense"}
    suffixes["sparse"] = "_sparse" if result.get("rows") else ""
    for section, suffix in suffixes.items():
        rows = result.get(section)
        if not rows:
            continue
        # A row may lack what it could not measure.
        names = list(dict.fromkeys(name for row in rows for name in row))
        path = out.with_suffix("")
        with path.with_name(f"{path.name}{suffix}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def load(path: Path) -> Result:
    """A result that :func:`save` has written; OSError or ValueError if it is none."""
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or not any(result.get(name) for name in TABLES):
        raise ValueError("it holds no section of benchmark results")
    return result
