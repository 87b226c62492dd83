"""Benchmarks of decode: ``python -m benchmarks --out benchmarks/results/NAME``.

Without a section only the rows of dense decode beside the peer are measured. Writes NAME.json (a
key for each section), NAME.csv (the rows) and NAME_end_to_end.csv (those of --end-to-end), again
after every section, and prints tables while it runs. ``--sparse`` measures sparse decode, FP8
caches and what ``--cache`` does: NAME.csv then holds the rows of sparse decode beside the peer,
NAME_fp8_dense.csv dense decode over FP8. A case that fails is reported, and the others go on; the
exit status is then 1.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import measure, plots, report, sections, sparse, targets
from jax_flashmla import _ffi

_SECTION_HELP = {
    "rows": "every case of the peer (what runs if no section is named)",
    "sweep": "uniform cases over lengths and batches, for the plots",
    "inside_jax": "time of a call inside jitted programs",
    "xla": "some cases with implementation='xla'",
    "batch_invariant": "every case of the peer with batch_invariant=True",
    "metadata": "the scheduler of get_mla_metadata",
    "end_to_end": "steps of DeepSeek V3's 61 layers of attention; needs 100 GB of GPU memory",
    "cache": "tokens written to and read from caches of each format",
}


def _at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times decode on the GPU at hand, or shows what was measured before.",
    )
    parser.add_argument("--out", type=Path, help="path of the results, without .json and .csv")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--launches", type=_at_least_1, default=20, help="launches in a CUDA graph")
    parser.add_argument("--replays", type=_at_least_1, default=5, help="replays; the median counts")
    chosen = parser.add_argument_group("sections, to measure")
    for name, text in _SECTION_HELP.items():
        chosen.add_argument("--" + name.replace("_", "-"), action="store_true", help=text)
    chosen.add_argument("--all", action="store_true", help="all of these")
    chosen.add_argument(
        "--sparse",
        action="store_true",
        help="sparse decode beside the peer and XLA, dense decode over an FP8 cache, and --cache",
    )
    chosen.add_argument(
        "--scan",
        action="store_true",
        help="end to end without the unrolled programs, which take longer to compile",
    )
    parser.add_argument("--targets", action="store_true", help="judge the targets; measures rows")
    files = parser.add_argument_group("results of an earlier run; nothing is measured")
    files.add_argument("--report", type=Path, metavar="JSON", help="print its tables and targets")
    files.add_argument("--plot", type=Path, metavar="JSON", help="draw its plots")
    files.add_argument(
        "--plot-dir", type=Path, default=Path("docs/images"), help="folder of plots (%(default)s)"
    )
    return parser


def _chosen_sections(options: argparse.Namespace) -> list[str]:
    chosen = [name for name in _SECTION_HELP if options.all or getattr(options, name)]
    if options.sparse and not chosen:
        return list(sparse.NAMES)
    if not chosen or options.targets:
        chosen = [name for name in _SECTION_HELP if name in {"rows", *chosen}]
    return list(dict.fromkeys(chosen + list(sparse.NAMES if options.sparse else ())))


def _items(name: str, options: argparse.Namespace) -> list[Any]:
    if name in sparse.NAMES:
        return sparse.items(name)
    return sections.items(name, unrolled=not options.scan)


def _timers(
    work: dict[str, list[Any]], limits: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """What times the rows of each section: one timer for those of sparse.py, one for all others."""
    settings = {"launches": options.launches, "replays": options.replays}
    timers = {}
    dense = [item for name, items in work.items() if name not in sparse.NAMES for item in items]
    if dense:
        used = [item.case for item in dense if item.case is not None]
        pages = max((int(measure.pages_of(case).sum()) for case in used), default=1)
        timer = measure.Timer(measure.random_pool(pages), limits, **settings)
        timers |= {name: timer for name in work if name not in sparse.NAMES}
    others = [item for name, items in work.items() if name in sparse.NAMES for item in items]
    if others:
        timer = sparse.Timer(limits, slots=sparse.slots_of(others), **settings)
        timers |= {name: timer for name in work if name in sparse.NAMES}
    return timers


def _load(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    try:
        return report.load(path)
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {path}: {error}")


def _show(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Prints and draws results of earlier runs."""
    measures = [name for name in ("all", "sparse", *_SECTION_HELP) if getattr(options, name)]
    measures += [name for name in ("out", "filter") if getattr(options, name)]
    if measures:
        flag = measures[0].replace("_", "-")
        parser.error(f"--report and --plot measure nothing: leave out --{flag}")
    if options.report:
        result = _load(parser, options.report)
        print(report.full_text(result), targets.full_text(result), sep="\n\n")
    if options.plot:
        result = _load(parser, options.plot)
        try:
            paths = plots.save(result, options.plot_dir)
        except ImportError as error:
            parser.error(str(error))
        print(*paths, sep="\n")
    return 0


class Run:
    """One run: what it has measured, and what failed."""

    def __init__(self, options: argparse.Namespace, command: str):
        self.options = options
        self.result: dict[str, Any] = {
            "command": command,
            **measure.environment(),
            "ceilings": {},
            "geometric_mean_peer_over_ours": None,
        }
        self.errors: list[dict[str, Any]] = []

    def failed(self, section: str, case: str | None, error: Exception) -> None:
        """Reports an exception, and keeps it for the results."""
        traceback.print_exception(error)
        print(f"failed: {section} {case or ''}: {error}", flush=True)
        text = f"{type(error).__name__}: {error}"
        self.errors.append({"section": section, "case": case, "error": text})

    def save(self) -> None:
        """Writes what there is so far."""
        self.result["errors"] = self.errors
        if self.options.out is not None:
            report.save(self.options.out, self.result)

    def ceilings(self) -> dict[str, float]:
        """Measures the ceilings; nothing if that fails."""
        try:
            self.result["ceilings"] = measure.ceilings()
        except Exception as error:
            self.failed("ceilings", None, error)
        print(report.ceilings_line(self.result["ceilings"]), flush=True)
        return self.result["ceilings"]

    def section(self, name: str, items: list[Any], timer: Any) -> None:
        """Measures a section row by row."""
        table = report.TABLES[name]
        print(f"\n{table.title}\n{table.header()}", flush=True)
        rows = self.result.setdefault(name, [])
        start = time.perf_counter()
        for item in items:
            try:
                row = item.measure(timer)
            except Exception as error:
                self.failed(name, item.name, error)
                continue
            rows.append(row)
            print(table.line(row), flush=True)
        self.result.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
        if name == "rows" or (name == "sparse" and not self.result.get("rows")):
            self.result["geometric_mean_peer_over_ours"] = report.mean_over_peer(rows)
        summary = report.summary_line(name, rows)
        if summary:
            print(summary, flush=True)
        self.save()


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmarks; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(argv)
    if options.scan and not (options.end_to_end or options.all):
        parser.error("--scan goes with --end-to-end")
    if options.report or options.plot:
        return _show(parser, options)
    if not _ffi.cuda_built():
        parser.error("this build of jax_flashmla has no CUDA kernels")
    work = {
        name: [item for item in _items(name, options) if options.filter in item.name]
        for name in _chosen_sections(options)
    }
    work = {name: items for name, items in work.items() if items}
    if not work:
        parser.error(f"no case is called {options.filter!r}")

    run = Run(options, shlex.join(["python", "-m", "benchmarks", *argv]))
    limits = run.ceilings()
    timers = _timers(work, limits, options)
    for name, items in work.items():
        run.section(name, items, timers[name])
    if options.targets or options.sparse:
        print("\n" + targets.full_text(run.result))
    if run.errors:
        print(f"\n{len(run.errors)} failed", file=sys.stderr)
    return 1 if run.errors else 0


if __name__ == "__main__":
    sys.exit(main())
