"""The benchmarks as far as they go without a GPU: command, tables, targets, plots, programs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import flash_mla_with_kvcache

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind an installed jax_flashmla

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    cache_ops,
    end_to_end,
    inside_jax,
    measure,
    plots,
    report,
    sections,
    targets,
)

COMMITTED = ROOT / "benchmarks" / "results" / "h200_dense_decode.json"
LIMITS = {"read_gb_per_s": 4400.0, "bf16_matmul_tflop_per_s": 720.0}

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


class MadeUpTimer(measure.Timer):
    """A GPU that takes ``us(case)``, and 3 µs for any schedule."""

    def __init__(self, us):
        super().__init__(pool=None, limits=LIMITS, launches=1, replays=1)
        self.us = us

    def raw(self, case, batch_invariant=False):
        return measure.Times(self.us(case) * (1.2 if batch_invariant else 1), 3.0)

    def _schedule_us(self, lengths, batch_invariant=False):
        return 3.0

    def xla(self, case):
        us = 8 * self.us(case)
        gb_per_s, tflop_per_s = measure.rates(case, us)
        times = {"us": us, "raw_us": self.us(case), "over_raw": 8.0}
        return {
            **measure.sizes(case),
            **times,
            "gb_per_s": gb_per_s,
            "tflop_per_s": tflop_per_s,
        }


def at_the_ceilings(case):
    """Fast enough for every target."""
    us = max(case.bytes() / LIMITS["read_gb_per_s"] / 1e3, case.flop() / 720e6)
    return us * 1.001


def made_up(us=at_the_ceilings, names=("rows",)):
    """A result with some sections, as if measured."""
    timer = MadeUpTimer(us)
    result = {"gpu": "Toy", "ceilings": LIMITS}
    for name in names:
        result[name] = [item.measure(timer) for item in sections.items(name)]
    return result


def inside_row(xla_us=0.5, calls=61):
    return {
        "name": "toy",
        "calls": calls,
        "us": 12.0,
        "raw_us": 10.0,
        "overhead_us": 2.0,
        "query_us": None if xla_us is None else 1.4,
        "schedule_us": 0.1,
        "xla_us": xla_us,
    }


def step_row(stack, unrolled=True):
    return {
        **measure.sizes(stack.case),
        "program": "unrolled" if unrolled else "scan",
        "us": 40_000.0,
        "scan_us": 42_000.0,
        "tokens_per_s": 25.0 * stack.b,
        "without_attention_us": 10_000.0,
        "attention_us": 30_000.0,
        "attention_share": 0.75,
        "raw_us": 29_000.0,
        "bound_us": None,
        "of_bound": None,
        "xla_us": 1_000_000.0,
        "xla_over_ours": 25.0,
        "xla_note": None,
    }


# --- Sections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sections.NAMES)
def test_every_section_has_distinct_rows_and_a_table(name):
    items = sections.items(name)
    assert items
    assert len({item.name for item in items}) == len(items)
    assert name in report.TABLES


def test_unknown_sections_are_refused():
    with pytest.raises(ValueError, match="no section is called 'nothing'"):
        sections.items("nothing")


def test_sweeps_keep_the_names_and_times_of_the_peers_rows():
    peers = {case.name: case for case in cases.dense_benchmarks()}
    sweep = {item.name: item.case for item in sections.items("sweep")}
    shared = peers.keys() & sweep.keys()
    assert {"b128-sk4096-h16-sq1", "b1-sk4096-h128-sq1"} <= shared
    assert all(sweep[name] == peers[name] for name in shared)
    assert {item.name for item in sections.items("xla")} <= sweep.keys()
    assert all(case.lengths == "uniform" for case in sweep.values())


def test_a_case_is_timed_once():
    launched = []

    class Problem:
        def time(self, launches, replays):
            launched.append((launches, replays))
            return 5.0

        time_schedule = time

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "RawDenseDecode", lambda **_: Problem())
        patch.setattr(measure, "arrays_of", lambda case, pool: {})
        timer = measure.Timer(None, LIMITS, launches=7, replays=2)
        case = cases.DenseCase("one", 2, 64, 16, peer_us=4.0)
        row = timer.decode(case)
        timer.decode(cases.DenseCase("the-same", 2, 64, 16))
        timer.batch_invariant(case)
    assert launched == [(7, 2)] * 4  # attention and schedule, ordinary and batch-invariant
    assert row["us"] == 5.0 and row["peer_over_ours"] == 0.8
    assert row["gb_per_s"] == pytest.approx(case.bytes() / 5e-6 / 1e9)
    assert row["of_matmul_ceiling"] == pytest.approx(case.flop() / 5e-6 / 720e12)


def test_inputs_lie_in_the_pool():
    pool = jnp.zeros((40, 64, 1, 8), jnp.bfloat16)
    case = cases.DenseCase("uneven", 3, 0, 2, 2, d=8, lengths=(65, 0, 640))
    arrays = measure.arrays_of(case, pool)
    assert arrays["q"].shape == (3, 2, 2, 8) and arrays["k_cache"] is pool
    table = np.asarray(arrays["block_table"])
    used = table[table != cases.GARBAGE]
    assert table.shape == (3, 10) and len(used) == len(set(used)) == 12 and used.max() < 40


# --- Tables -----------------------------------------------------------------------------------


def test_the_report_has_every_row_and_both_fractions():
    result = report.load(COMMITTED)
    text = report.full_text(result)
    lines: dict[str, str] = {}
    for line in filter(None, text.splitlines()):
        lines.setdefault(line.split()[0], line)  # other tables name the same cases further down
    for row in result["rows"]:
        assert f"{row['us']:.1f}" in lines[row["name"]]
        assert f"{row['peer_over_ours']:.2f}" in lines[row["name"]]
        bound = max(row["of_read_ceiling"], row["of_matmul_ceiling"])
        assert f"{bound:.0%}*" in lines[row["name"]]
    mean = report.geometric_mean(row["peer_over_ours"] for row in result["rows"])
    assert f"geometric mean of peer/ours over {len(result['rows'])} cases: {mean:.3f}" in text
    assert f"{result['ceilings']['read_gb_per_s']:.0f} GB/s read" in text


def test_the_report_shows_every_section_and_failures():
    others = {"inside_jax", "end_to_end"}
    result = made_up(names=tuple(name for name in sections.NAMES if name not in others))
    result["inside_jax"] = [inside_row(), inside_row(xla_us=None)]
    result["end_to_end"] = [step_row(stack) for stack in end_to_end.STACKS]
    result["errors"] = [{"section": "xla", "case": "b1", "error": "RuntimeError: no"}]
    text = report.full_text(result)
    for name in sections.NAMES:
        table = report.TABLES[name]
        assert table.title in text and table.header() in text
    assert "failed: xla b1: RuntimeError: no" in text
    assert "geometric mean of the ratio: 1.20" in text


def test_rows_without_ceilings_or_peer_have_dashes():
    row = {"name": "x", "us": 1.0, "gb_per_s": 2.0, "tflop_per_s": 3.0, "of_read_ceiling": None}
    assert report.TABLES["rows"].line(row).split() == ["x", "1.0", "2", "3", *"----"]


# --- Targets ----------------------------------------------------------------------------------


def verdicts(result):
    return {target.key: target.verdict for target in targets.targets_of(result)}


def test_all_targets_can_be_met_and_missed():
    names = ("rows", "batch_invariant", "metadata")
    fast = made_up(names=names) | {"inside_jax": [inside_row()]}
    assert set(verdicts(fast).values()) == {"met"}
    slow = made_up(us=lambda case: 10_000.0, names=("rows",))
    slow["batch_invariant"] = [{"name": "x", "over_ordinary": 1.31}]
    slow["metadata"] = [{"b": 128, "uniform_us": 4.1, "varying_us": 3.0}]
    slow["inside_jax"] = [inside_row(xla_us=1.1)]
    missed = verdicts(slow)
    # At one and the same time for all rows, longer ones read more bytes a second.
    assert missed.pop("c2") in ("met", "missed")
    assert set(missed.values()) == {"missed"}
    assert set(verdicts({}).values()) == {"not measured"}


def row(name, us, **changes):
    case = {case.name: case for case in cases.dense_benchmarks()}[name]
    return MadeUpTimer(lambda _: us).decode(case) | changes


@pytest.mark.parametrize(
    "key, name, just_met, just_missed",
    [
        ("a1", "b128-sk4096-h16-sq1", 152.0 * 1.029, 152.0 * 1.031),
        ("b1", "b1-sk2048-h16-sq1", 15.2 / 1.81, 15.2 / 1.79),
        ("b2", "b1-sk4096-h128-sq1", 8.0, 8.01),
        ("b3", "b1-sk16384-h128-sq1", 12.0, 12.01),
        ("b4", "b1-sk512-h8-sq1", 6.0, 6.01),
        ("b5", "b8-sk16384-h16-sq1", 46.7, 46.8),  # the peer's time
        ("b6", "b1-sk131072-h128-sq1", 66.0, 66.1),
        ("d1", "b16-sk16384-h128-sq1", 118.8, 118.9),
        ("d2", "b64-sk4096-h128-sq1", 111.8 / 1.051, 111.8 / 1.049),
    ],
)
def test_bounds_of_targets(key, name, just_met, just_missed):
    assert verdicts({"rows": [row(name, just_met)]})[key] == "met"
    assert verdicts({"rows": [row(name, just_missed)]})[key] == "missed"


def test_bounds_that_follow_from_the_ceilings():
    name = "b8-sk16384-h128-sq2"
    roofline = targets.roofline_us(row(name, 100.0))
    bound = 1.1 * roofline + 6
    assert bound > 115.0  # the peer
    assert verdicts({"rows": [row(name, bound - 0.1)]})["b5"] == "met"
    assert verdicts({"rows": [row(name, bound + 0.1)]})["b5"] == "missed"

    uniform, varying = "b128-sk4096-h64-sq1", "b128-sk4096-h64-sq1-varying"
    by_name = {case.name: case for case in cases.dense_benchmarks()}
    us = by_name[uniform].bytes() / 4400e3
    assert verdicts({"rows": [row(uniform, us / 0.951)]})["c1"] == "met"
    assert verdicts({"rows": [row(uniform, us / 0.949)]})["c1"] == "missed"
    per_byte = us * by_name[varying].bytes() / by_name[uniform].bytes()
    for factor, verdict in ((1.049, "met"), (1.051, "missed")):
        rows = [row(uniform, us), row(varying, per_byte * factor)]
        assert verdicts({"rows": rows})["c2"] == verdict
        assert verdicts({"rows": rows})["c1"] == "met"  # of uniform rows alone


def test_targets_of_the_committed_results():
    result = report.load(COMMITTED)
    text = targets.full_text(result)
    good = sum(row["peer_over_ours"] >= 1 / 1.03 for row in result["rows"])
    assert f"no row slower than the peer (3% noise): {good} of 53\n" in text
    judged = {target.key: target.judged for target in targets.targets_of(result)}
    assert {key: len(judged[key]) for key in judged if key[0] in "abcd"} == {
        **{"a1": 53, "a2": 1, "b1": 12, "b2": 2, "b3": 1, "b4": 1, "b5": 3, "b6": 1},
        **{"c1": 8, "c2": 2, "d1": 15, "d2": 7},
    }


def test_targets_say_how_many_rows_are_missing():
    text = targets.full_text({"rows": [row("b1-sk4096-h16-sq1", 5.0)]})
    assert "1.8x the peer: 1 of 1 (1 of 12 rows measured)" in text
    assert "\n                 b1-sk4096-h16-sq1 5.00 us (<= 8.00 us)" in text


# --- Plots ------------------------------------------------------------------------------------


@needs_matplotlib
def test_plots_of_full_and_of_small_results(tmp_path):
    everything = made_up(names=("rows", "sweep", "xla"))
    for result in (everything, report.load(COMMITTED), {"rows": [], "metadata": [{}]}):
        paths = plots.save(result, tmp_path / "images")
        assert {path.name for path in paths} == set(plots.PLOTS)
        for path in paths:
            assert path.read_bytes().startswith(b"\x89PNG\r\n")
    labels = plots.compute(everything).axes[0].get_legend_handles_labels()[1]
    assert labels == [
        "jax_flashmla, 1 query token",
        "jax_flashmla, 2 query tokens",
        "FlashMLA, 1 query token",
        "FlashMLA, 2 query tokens",
        "XLA, 1 query token",
        "matrix product ceiling",
    ]


def test_points_of_curves():
    result = made_up(names=("rows", "sweep", "xla"))
    over_batch = plots.Axis("b", "", {"s_k": 4096})
    ours = plots.points(result, plots.OURS, "gb_per_s", over_batch, 16, 1)
    assert [b for b, _ in ours] == list(sections.SWEEP_BATCHES)
    peer = dict(plots.points(result, plots.PEER, "tflop_per_s", over_batch, 128, 1))
    assert list(peer) == [1, 8, 32, 64, 128, 256]
    assert peer[128] == pytest.approx(611, abs=1)  # the published rate
    xla = plots.points(result, plots.XLA, "gb_per_s", over_batch, 16, 1)
    assert [b for b, _ in xla] == [1, 8, 32, 128]
    assert xla[0][1] == pytest.approx(ours[0][1] / 8)


# --- Programs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    rng = np.random.default_rng(0)
    return {
        "q": jnp.asarray(rng.standard_normal((2, 2, 3, 48)), jnp.float32),
        "k_cache": jnp.asarray(rng.standard_normal((5, 16, 1, 48)), jnp.float32),
        "block_table": jnp.asarray([[3, 1], [0, 4]], jnp.int32),
        "cache_seqlens": jnp.asarray([20, 7], jnp.int32),
    }


def test_programs_make_every_call_in_turn(tiny):
    calls = 4
    program = inside_jax.decode_program(calls, head_dim_v=32, implementation="xla")
    lowered = program.lower(**tiny)
    assert inside_jax.traced_calls(lowered.as_text()) == calls
    out, lse = lowered.compile()(**tiny)

    attend = jax.jit(
        lambda q: flash_mla_with_kvcache(
            **{**tiny, "q": q}, head_dim_v=32, softmax_scale=48**-0.5, implementation="xla"
        )
    )
    queries, results = [tiny["q"]], [attend(tiny["q"])]
    while len(results) < calls:
        queries.append(inside_jax.next_query(queries[-1], results[-1][0]))
        results.append(attend(queries[-1]))
    np.testing.assert_allclose(out, results[-1][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, results[-1][1], rtol=1e-5, atol=1e-6)
    assert not any(np.allclose(a, b, rtol=1e-3) for a, b in zip(queries, queries[1:], strict=False))


def test_queries_of_bfloat16_differ_from_call_to_call():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 1, 4, 48)) / 10, jnp.bfloat16)
    after = inside_jax.next_query(q, jnp.zeros((2, 1, 4, 32), jnp.bfloat16))
    assert after.dtype == q.dtype
    assert np.mean(np.asarray(q) != np.asarray(after)) > 0.9


def test_query_programs_make_the_same_queries(tiny):
    q, out = tiny["q"], tiny["q"][..., :32]
    got = inside_jax.query_program(3)(q, out)
    for _ in range(3):
        q = inside_jax.next_query(q, out)
    np.testing.assert_allclose(got, q, rtol=1e-6)


COMPILED = """\
HloModule jit_program, entry_computation_layout={(bf16[5,64,1,576]{3,2,1,0})->bf16[2,2]{1,0}}

ENTRY %main.9 (q.1: bf16[2,2], k_cache.1: bf16[5,64,1,576]) -> bf16[2,2] {
  %k_cache.1 = bf16[5,64,1,576]{3,2,1,0} parameter(1), metadata={op_name="k_cache"}
  %bitcast.3 = bf16[5,64,1,576]{3,2,1,0} bitcast(%k_cache.1)
  %s = (s32[132,8]{1,0}, s32[3]{0}) custom-call(%n), custom_call_target="flashmla_metadata"
  %a = (bf16[2,2]{1,0}, s32[1]{0}) custom-call(%q, %bitcast.3), \
custom_call_target="flashmla_dense_decode", operand_layout_constraints={bf16[5,64,1,576]{3,2,1,0}}
  %b = (bf16[2,2]{1,0}, s32[1]{0}) custom-call(%a, %k_cache.1), \
custom_call_target="flashmla_dense_decode"
}
"""


def compiled(text=COMPILED, temp_bytes=0):
    memory = SimpleNamespace(temp_size_in_bytes=temp_bytes)
    return SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: memory)


def test_compiled_programs_are_checked():
    cache = np.empty((5, 64, 1, 576), np.float16)
    counts = inside_jax.check_program(compiled(temp_bytes=10), 2, cache)
    assert counts == {
        "custom_calls": 2,
        "metadata_calls": 1,
        "cache_writes": 0,
        "temp_bytes": 10,
        "cache_bytes": cache.nbytes,
    }
    with pytest.raises(RuntimeError, match="2 calls of .* instead of 3 and 1"):
        inside_jax.check_program(compiled(), 3, cache)
    with pytest.raises(RuntimeError, match="bytes of temporary memory"):
        inside_jax.check_program(compiled(temp_bytes=cache.nbytes), 2, cache)
    for line in (
        "  %copy.1 = bf16[5,64,1,576]{3,2,1,0} copy(%k_cache.1)",
        "  %c = (bf16[5,64,1,576]{3,2,1,0}, bf16[5,64,1,576]{3,2,1,0}, u32[]) copy-start(%k)",
        "  ROOT %f = bf16[5,64,1,576]{3,2,1,0} fusion(%k_cache.1), kind=kLoop, calls=%x",
    ):
        with pytest.raises(RuntimeError, match="writes what may be the cache"):
            inside_jax.check_program(compiled(COMPILED + line), 2, cache)


def test_writes_of_the_cache_are_found_in_a_real_module(tiny):
    cache = tiny["k_cache"]
    writes = jax.jit(lambda x: x.at[0].set(0.0)).lower(cache).compile().as_text()
    reads = jax.jit(lambda x: x[1].sum()).lower(cache).compile().as_text()
    assert inside_jax.cache_writes(writes, cache.shape)
    assert not inside_jax.cache_writes(reads, cache.shape)


def test_seconds_of_calls_and_waits():
    calls = []
    seconds = measure.seconds_of(lambda: calls.append(None), repeats=3, trials=2)
    assert len(calls) == 1 + 3 * 2 and seconds >= 0


# --- The command ------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one; inside JAX everything fails."""

    def inside(timer, case, calls):
        raise RuntimeError("toy failure")

    monkeypatch.setattr(command._ffi, "cuda_built", lambda: True)
    monkeypatch.setattr(measure, "environment", lambda: {"gpu": "Toy"})
    monkeypatch.setattr(measure, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(measure, "random_pool", lambda pages: None)
    monkeypatch.setattr(measure, "Timer", lambda *_, **__: MadeUpTimer(at_the_ceilings))
    monkeypatch.setattr(inside_jax, "measure_case", inside)
    monkeypatch.setattr(
        end_to_end, "measure_stack", lambda timer, stack, unrolled: step_row(stack, unrolled)
    )
    monkeypatch.setattr(
        cache_ops, "measure_case", lambda case, *_: cache_ops.row_of(case, case.bytes() / 2e6)
    )


def test_without_a_section_the_rows_are_measured(gpu, tmp_path, capsys):
    out = tmp_path / "deep" / "result"
    assert command.main(["--out", str(out), "--filter", "b8-"]) == 0
    printed = capsys.readouterr().out
    assert "4400 GB/s read" in printed and "b8-sk16384-h128-sq2" in printed
    result = report.load(out.with_suffix(".json"))
    assert result["command"] == f"python -m benchmarks --out {out} --filter b8-"
    assert [row["name"] for row in result["rows"]] == [
        case.name for case in cases.dense_benchmarks() if case.b == 8
    ]
    assert result["geometric_mean_peer_over_ours"] > 1
    assert result["errors"] == [] and "xla" not in result
    # What results have had from the start.
    committed = report.load(COMMITTED)
    assert committed["rows"][0].keys() <= result["rows"][0].keys()
    header, *lines = out.with_suffix(".csv").read_text().splitlines()
    assert header.startswith("name,b,s_k,h_q,s_q,us,") and len(lines) == len(result["rows"])


def test_a_failing_section_does_not_stop_the_others(gpu, tmp_path, capsys):
    out = tmp_path / "result"
    assert command.main(["--all", "--targets", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    result = report.load(out.with_suffix(".json"))
    assert result["inside_jax"] == [] and len(result["xla"]) == len(sections.items("xla"))
    assert len(result["rows"]) == 53 and len(result["metadata"]) == 7
    assert [row["program"] for row in result["end_to_end"]] == ["unrolled"] * 3
    assert len(result["cache"]) == len(cache_ops.cases()) and "sparse" not in result
    assert {error["section"] for error in result["errors"]} == {"inside_jax"}
    assert result["errors"][0]["error"] == "RuntimeError: toy failure"
    assert "failed: inside_jax b1-sk512-h8-sq1: toy failure" in captured.out
    assert "a1  met" in captured.out and "13 failed" in captured.err
    assert command.main(["--report", str(out.with_suffix(".json"))]) == 0


def test_failing_ceilings_leave_fractions_out(gpu, monkeypatch, tmp_path, capsys):
    def ceilings():
        raise RuntimeError("no memory")

    monkeypatch.setattr(measure, "ceilings", ceilings)
    out = tmp_path / "result"
    assert command.main(["--metadata", "--out", str(out)]) == 1
    result = report.load(out.with_suffix(".json"))
    assert result["ceilings"] == {} and result["metadata"]
    assert "rows" not in result and not out.with_suffix(".csv").exists()
    assert "ceilings: not measured" in capsys.readouterr().out


def test_targets_measure_the_rows_too(gpu, capsys):
    assert command.main(["--targets", "--metadata"]) == 0
    printed = capsys.readouterr().out
    assert "a1  met" in printed and "e   met" in printed and "f   not measured" in printed


def test_end_to_end_alone(gpu, tmp_path, capsys):
    out = tmp_path / "result"
    options = ["--end-to-end", "--scan", "--filter", "b32-sk8192", "--out", str(out)]
    assert command.main(options) == 0
    (row,) = report.load(out.with_suffix(".json"))["end_to_end"]
    assert row["b"] == 32 and row["s_k"] == 8192 and row["program"] == "scan"
    assert not out.with_suffix(".csv").exists()
    header, line = (tmp_path / "result_end_to_end.csv").read_text().splitlines()
    assert header.split(",") == list(row) and line.startswith("v3-61-layers-b32-sk8192,32,8192,")
    capsys.readouterr()
    assert command.main(["--report", str(out.with_suffix(".json"))]) == 0
    printed = capsys.readouterr().out.splitlines()
    (line,) = [line for line in printed if line.startswith("v3-61-layers-b32-sk8192")]
    numbers = ["40.00", "800", "42.00", "10.00", "75%", "29.00", "-", "-", "1000.0", "25.0"]
    assert line.split()[1:] == numbers


def test_results_of_earlier_runs_are_shown(capsys, tmp_path):
    assert command.main(["--report", str(COMMITTED)]) == 0
    printed = capsys.readouterr().out
    assert "b128-sk4096-h16-sq1 " in printed and "\nTargets\na1 " in printed


@needs_matplotlib
def test_plots_are_drawn_from_a_file(capsys, tmp_path):
    assert command.main(["--plot", str(COMMITTED), "--plot-dir", str(tmp_path)]) == 0
    drawn = capsys.readouterr().out.split()
    assert sorted(drawn) == sorted(str(path) for path in tmp_path.iterdir())


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        command.main(list(map(str, arguments)))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_wrong_arguments(gpu, capsys, tmp_path):
    assert "no case is called 'b7-'" in fails(capsys, "--filter", "b7-")
    assert "0 is not at least 1" in fails(capsys, "--launches", 0)
    assert "invalid" in fails(capsys, "--replays", "many")
    assert "leave out --inside-jax" in fails(capsys, "--report", COMMITTED, "--inside-jax")
    assert "--scan goes with --end-to-end" in fails(capsys, "--scan", "--rows")
    assert "leave out --out" in fails(capsys, "--plot", COMMITTED, "--out", "x")
    assert "cannot read" in fails(capsys, "--report", tmp_path / "none.json")
    other = tmp_path / "other.json"
    for text in ("{", "[]", json.dumps({"fingerprint": 1})):
        other.write_text(text)
        assert f"cannot read {other}" in fails(capsys, "--plot", other)


def test_measuring_needs_kernels(monkeypatch, capsys):
    monkeypatch.setattr(command._ffi, "cuda_built", lambda: False)
    assert "has no CUDA kernels" in fails(capsys)


def test_plots_say_what_they_need(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = fails(capsys, "--plot", COMMITTED, "--plot-dir", tmp_path / "images")
    assert "pip install '.[benchmarks]'" in error
    assert not (tmp_path / "images").exists()
