"""Plots of a result, for the documentation. Needs matplotlib: ``pip install '.[benchmarks]'``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import sections, sparse, targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

OURS, PEER, XLA, CEILING = "jax_flashmla", "FlashMLA", "XLA", "ceiling"
# Of Okabe and Ito's palette, which the colour-blind can tell apart; markers differ as well.
_STYLES = {
    OURS: {"color": "#0072B2", "marker": "o"},
    PEER: {"color": "#D55E00", "marker": "s"},
    XLA: {"color": "#009E73", "marker": "^"},
}
_CEILING_STYLE = {"color": "#555555", "linestyle": (0, (1, 1.5)), "linewidth": 1.5}
_DPI = 160


@dataclasses.dataclass(frozen=True)
class Axis:
    """What a curve runs over: a column of the rows, and what is fixed on the way."""

    key: str
    label: str
    fixed: dict[str, int]


_OVER_LENGTH = Axis(
    "s_k",
    f"tokens of each request, for {sections.SWEEP_BATCH} requests",
    {"b": sections.SWEEP_BATCH},
)
_OVER_BATCH = Axis(
    "b",
    f"requests, of {sections.SWEEP_LENGTH} tokens each",
    {"s_k": sections.SWEEP_LENGTH},
)


@dataclasses.dataclass(frozen=True)
class Rate:
    """What stands upright: a rate of rows, its ceiling in a result, and how both are called."""

    key: str
    label: str
    ceiling: str
    ceiling_label: str


_BANDWIDTH = Rate("gb_per_s", "GB/s", "read_gb_per_s", "read ceiling")
_COMPUTE = Rate("tflop_per_s", "TFLOP/s", "bf16_matmul_tflop_per_s", "matrix product ceiling")


def _uniform(rows: Iterable[Row] | None) -> list[Row]:
    return [row for row in rows or () if targets.lengths_of(row) == "uniform"]


def points(
    result: dict[str, Any], who: str, rate: str, axis: Axis, h_q: int, s_q: int
) -> list[tuple[int, float]]:
    """(value on the axis, rate) of every uniform case with these heads and query tokens."""
    names = ("xla",) if who == XLA else ("rows", "sweep")
    fixed = {**axis.fixed, "h_q": h_q, "s_q": s_q}
    found: dict[int, float] = {}
    for row in (row for name in names for row in _uniform(result.get(name))):
        if any(row[key] != value for key, value in fixed.items()):
            continue
        value = row[rate]
        if who == PEER:
            if not row.get("peer_us"):
                continue
            value *= row["us"] / row["peer_us"]
        found[row[axis.key]] = value
    return sorted(found.items())


def _short(number: int) -> str:
    return f"{number // 1024}K" if number >= 1024 and number % 1024 == 0 else str(number)


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"plots need matplotlib ({error}); install it with: pip install '.[benchmarks]'"
        ) from error
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One curve of everybody: heads, query tokens, and how the legend tells it from others."""

    h_q: int
    s_q: int
    label: str


def _draw(axes: Axes, line: list[tuple[int, float]], who: str, label: str, first: bool) -> None:
    """One curve; those that are not a panel's first are dashed and hollow."""
    axes.plot(
        *zip(*line, strict=True),
        label=label,
        linestyle="-" if first else "--",
        markerfacecolor=_STYLES[who]["color"] if first else "white",
        linewidth=1.6,
        markersize=5.5,
        **_STYLES[who],
    )


def _panel(
    axes: Axes, result: dict[str, Any], rate: Rate, axis: Axis, curves: tuple[Curve, ...]
) -> None:
    """One plot of a rate over one axis."""
    marks: set[int] = set()
    top = 0.0
    for who in (OURS, PEER, XLA):
        for curve in curves:
            line = points(result, who, rate.key, axis, curve.h_q, curve.s_q)
            if line:
                _draw(axes, line, who, f"{who}, {curve.label}", first=curve == curves[0])
                marks |= {x for x, _ in line}
                top = max(top, *(y for _, y in line))
    ceiling = (result.get("ceilings") or {}).get(rate.ceiling)
    if ceiling:
        axes.axhline(ceiling, label=rate.ceiling_label, **_CEILING_STYLE)
        top = max(top, ceiling)
    if marks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(marks), labels=[_short(x) for x in sorted(marks)])
        axes.minorticks_off()
    axes.set_ylim(0, 1.07 * top or 1)
    axes.set_xlabel(axis.label)
    axes.set_ylabel(rate.label)
    _tidy(axes)


def _rates_figure(
    result: dict[str, Any], rate: Rate, curves: tuple[Curve, ...], title: str
) -> Figure:
    figure = _new_figure(9, 4.3)
    panels = figure.subplots(1, 2)
    for axes, axis in zip(panels, (_OVER_LENGTH, _OVER_BATCH), strict=True):
        _panel(axes, result, rate, axis, curves)
    top = max(axes.get_ylim()[1] for axes in panels)
    handles = {}
    for axes in panels:
        axes.set_ylim(0, top)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    figure.suptitle(f"{title} ({_gpu(result)})", fontsize=11)
    return figure


def _gpu(result: dict[str, Any]) -> str:
    return result.get("gpu", "GPU")


def bandwidth(result: dict[str, Any]) -> Figure:
    """Memory-bound: GB/s with few heads over the length and over the number of requests."""
    curves = (Curve(16, 1, "16 heads"), Curve(64, 1, "64 heads"))
    title = "Dense decode, bfloat16, 1 query token of 16 or 64 heads"
    return _rates_figure(result, _BANDWIDTH, curves, title)


def compute(result: dict[str, Any]) -> Figure:
    """Compute-bound: TFLOP/s with 128 heads over the length and over the number of requests."""
    curves = (Curve(128, 1, "1 query token"), Curve(128, 2, "2 query tokens"))
    title = "Dense decode, bfloat16, 1 or 2 query tokens of 128 heads"
    return _rates_figure(result, _COMPUTE, curves, title)


def small_batches(result: dict[str, Any]) -> Figure:
    """Times of up to 8 requests beside the peer's, and what the ceilings allow."""
    rows = [r for r in _uniform(result.get("rows")) if r["b"] <= 8 and r.get("peer_us")]
    rows.sort(key=lambda r: (r["b"], r["s_k"], r["h_q"], r["s_q"]), reverse=True)
    figure = _new_figure(7.5, 1.6 + 0.3 * len(rows))
    axes = figure.subplots()
    height = 0.38
    for who, key, offset in ((OURS, "us", height / 2), (PEER, "peer_us", -height / 2)):
        axes.barh(
            [i + offset for i in range(len(rows))],
            [row[key] for row in rows],
            height=height,
            color=_STYLES[who]["color"],
            label=who,
        )
    limits = [(i, targets.roofline_us(row)) for i, row in enumerate(rows)]
    limits = [(i, us) for i, us in limits if us is not None]
    if limits:
        axes.vlines(
            [us for _, us in limits],
            [i - height for i, _ in limits],
            [i + height for i, _ in limits],
            color="black",
            linewidth=1.5,
            label="at the ceilings",
        )
    for i, row in enumerate(rows):
        axes.text(
            max(row["us"], row["peer_us"]),
            i,
            f"  {row['peer_us'] / row['us']:.2f} ×",
            va="center",
            fontsize=8,
        )
    labels = [
        f"{r['b']} × {_short(r['s_k'])}, {r['h_q']} heads"
        + (f", {r['s_q']} queries" if r["s_q"] > 1 else "")
        for r in rows
    ]
    axes.set_yticks(range(len(rows)), labels=labels, fontsize=9)
    axes.set_ylim(-0.6, max(len(rows), 1) - 0.4)
    axes.set_xlabel(f"µs for attention and merge; beside the bars {PEER} / {OURS}")
    axes.margins(x=0.12)
    _tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    axes.set_title(f"Small batches: requests × tokens ({_gpu(result)})", fontsize=11)
    return figure


def _sparse_label(row: Row) -> str:
    kind = {"fp8_v32": "V3.2", "fp8_v4": "V4", "plain": "bf16"}[row["cache_format"]]
    extra = f" + {row['extra_topk']}" if row["extra_topk"] else ""
    queries = f", {row['s_q']} queries" if row["s_q"] > 1 else ""
    return f"{kind}: {row['b']} × {row['topk']}{extra}, {row['h_q']} heads{queries}"


def sparse_compute(result: dict[str, Any]) -> Figure:
    """TFLOP/s of every row of sparse decode beside the peer's."""
    rows = [r for r in result.get("sparse") or () if r.get("peer_us")][::-1]
    figure = _new_figure(7.5, 1.6 + 0.42 * len(rows))
    axes = figure.subplots()
    height = 0.38
    rates = {
        OURS: [row["tflop_per_s"] for row in rows],
        PEER: [row["tflop_per_s"] * row["us"] / row["peer_us"] for row in rows],
    }
    for who, offset in ((OURS, height / 2), (PEER, -height / 2)):
        places = [i + offset for i in range(len(rows))]
        axes.barh(places, rates[who], height=height, color=_STYLES[who]["color"], label=who)
    for i, row in enumerate(rows):
        right = max(rates[OURS][i], rates[PEER][i])
        axes.text(right, i, f"  {row['peer_us'] / row['us']:.2f} ×", va="center", fontsize=8)
    ceiling = (result.get("ceilings") or {}).get(_COMPUTE.ceiling)
    if ceiling:
        axes.axvline(ceiling, label=_COMPUTE.ceiling_label, **_CEILING_STYLE)
    axes.set_yticks(range(len(rows)), labels=[_sparse_label(row) for row in rows], fontsize=9)
    axes.set_ylim(-0.6, max(len(rows), 1) - 0.4)
    axes.set_xlabel(f"TFLOP/s; beside the bars µs of {PEER} / {OURS}")
    axes.margins(x=0.12)
    _tidy(axes)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axes.set_title(f"Sparse decode: requests × chosen tokens ({_gpu(result)})", fontsize=11)
    return figure


#: File names, and what is drawn in each.
PLOTS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "dense_decode_bandwidth.png": bandwidth,
    "dense_decode_compute.png": compute,
    "dense_decode_small_batches.png": small_batches,
}


SPARSE_PLOTS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "sparse_decode_compute.png": sparse_compute,
}


def save(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the plots of what a result is about into a folder. ImportError without matplotlib."""
    is_sparse = any(result.get(name) for name in sparse.NAMES)
    is_dense = any(result.get(name) for name in sections.NAMES)
    chosen = PLOTS if is_dense or not is_sparse else {}
    figures = {name: draw(result) for name, draw in chosen.items()}
    if result.get("sparse"):
        figures |= {name: draw(result) for name, draw in SPARSE_PLOTS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, metadata={"Software": None})
    return paths
