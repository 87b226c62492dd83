"""The benchmarks of sparse decode and of caches as far as they go without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cases
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sparse_cases

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind an installed jax_flashmla

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    cache_ops,
    measure,
    plots,
    report,
    sections,
    sparse,
    targets,
)

LIMITS = {"read_gb_per_s": 4400.0, "bf16_matmul_tflop_per_s": 720.0}
measure_case = cache_ops.measure_case
PEERS = {case.name: case for case in sparse_cases.peer_rows()}

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


class MadeUpTimer(sparse.Timer):
    """A GPU that takes ``us(case)``, with FP8 products two thirds, and 3 µs for any schedule."""

    def __init__(self, us):
        super().__init__(LIMITS, launches=1, replays=1, slots=64)
        self.us = us

    def raw(self, case, batch_invariant=False, fp8_matmul=False, power_of_two_scales=False):
        assert case.cache_format == "fp8_v32" or not (fp8_matmul or power_of_two_scales)
        factor = (1.2 if batch_invariant else 1) / (1.5 if fp8_matmul else 1)
        return measure.Times(self.us(case) * factor, 3.0)

    def raw_dense(self, case, cache_format, fp8_matmul=False, power_of_two_scales=False):
        assert cache_format == "fp8_v32" or not (fp8_matmul or power_of_two_scales)
        return measure.Times(self.us(case) / (1.5 if fp8_matmul else 1), 3.0)

    def fp8_matmul_error(self, case):
        return 0.0265

    def xla(self, case):
        us = 8 * self.us(case)
        rates = self._rates(case.flop(), case.bytes(), us)
        return {**sparse.sizes(case), "us": us, **rates, "raw_us": us / 8, "over_raw": 8.0}


def fast(case):
    """Fast enough for every target."""
    size = case.bytes()
    if isinstance(case, cases.DenseCase):
        size = sparse_cases.fp8_dense_bytes(case)
    return max(size / 4400e3, case.flop() / 720e6) * 1.001


@pytest.fixture(autouse=True)
def copying(monkeypatch):
    """As if every cache were written and read at 4.3 TB/s."""
    monkeypatch.setattr(
        cache_ops,
        "measure_case",
        lambda case, launches, replays: cache_ops.row_of(case, case.bytes() / 4300e3),
    )


def made_up(us=fast, names=sparse.NAMES):
    timer = MadeUpTimer(us)
    result = {"gpu": "Toy", "ceilings": LIMITS}
    for name in names:
        result[name] = [item.measure(timer) for item in sparse.items(name)]
    return result


# --- Cases ------------------------------------------------------------------------------------


def test_rows_of_the_peer_have_its_rates():
    """FLOP are counted as where the peer's rates come from."""
    rates = {
        "v32-b2-h128-sq1-topk2048": 69,
        "v32-b64-h128-sq1-topk2048": 390,
        "v32-b128-h128-sq1-topk2048": 395,
        "v32-b128-h128-sq2-topk2048": 406,
        "v32-b64-h64-sq1-topk2048": 239,
        "v32-b128-h64-sq1-topk2048": 324,
        "v32-b148-h128-sq2-topk16384": 432,
        "v4-b2-h128-sq2-topk128+1024": 77,
        "v4-b74-h128-sq2-topk128+1024": 341,
        "v4-b256-h128-sq2-topk128+1024": 388,
        "v4-b74-h64-sq2-topk128+512": 182,
        "v4-b256-h64-sq2-topk128+512": 254,
    }
    got = {name: case.flop() / case.peer_us / 1e6 for name, case in PEERS.items()}
    assert got.keys() == rates.keys()
    for name, rate in rates.items():
        assert got[name] == pytest.approx(rate, rel=0.01), name


def test_bytes_are_those_of_the_format():
    case = PEERS["v32-b64-h64-sq1-topk2048"]
    assert case.bytes() == 64 * 2048 * 656 + 2 * 64 * 64 * (576 + 512)
    case = PEERS["v4-b74-h64-sq2-topk128+512"]
    assert case.bytes() == 74 * 2 * 640 * 584 + 2 * 74 * 2 * 64 * (512 + 512)
    dense = cases.DenseCase("", 2, 100, 16)
    assert sparse_cases.fp8_dense_bytes(dense) == 200 * 656 + 2 * 32 * (576 + 512)


@pytest.mark.parametrize("name", sparse.NAMES)
def test_every_section_has_distinct_rows_and_a_table(name):
    items = sparse.items(name)
    assert items and len({item.name for item in items}) == len(items)
    assert name in report.TABLES and name not in sections.NAMES
    assert sparse.slots_of(items) % 64 == 0


def test_unknown_sections_are_refused():
    with pytest.raises(ValueError, match="is called 'rows'"):
        sparse.items("rows")


def test_choices_are_distinct_and_in_the_pool():
    case = sparse_cases.BenchmarkCase("x", "fp8_v32", 5, 16, 2, 100, 30, s_k=256)
    slots = sparse_cases.benchmark_slots(case, 1024)
    assert slots.shape == (5, 2, 130) and slots.dtype == np.int32
    assert slots.min() >= 0 and slots.max() < 1024
    for r in range(5):
        assert (slots[r] // 256 == r % 4).all()  # of its own tokens, as far as the pool goes
        for i in range(2):
            assert len(set(slots[r, i].tolist())) == 130
    assert (np.diff(slots[0, 0]) < 0).any()


@pytest.mark.parametrize("cache_format", ["plain", "fp8_v32", "fp8_v4"])
def test_pools_are_of_their_format(cache_format, monkeypatch):
    monkeypatch.setattr(sparse, "_PAGES_AT_ONCE", 2)
    pool = np.asarray(sparse.random_pool(3, cache_format))
    assert len(pool) == 4
    values = pool
    if cache_format == "fp8_v32":
        values = oracle.decode_v32(pool)
    elif cache_format == "fp8_v4":
        values = oracle.decode_v4(pool, 64)
    assert values.shape[1:] == (64, 1, sparse_cases.DIMS[cache_format])
    assert np.std(values.astype(np.float32)) == pytest.approx(0.1, rel=0.05)
    sparse.random_pool.clear_cache()  # of two pages only, so not for others


def test_bytes_and_ratio_of_cache_operations():
    names = {case.name: case for case in cache_ops.cases()}
    assert len(names) == 3 * 3 * 5
    # Tokens in, their places, tokens in the cache; for fused ones angles and the weight.
    assert names["append-plain-t128"].bytes() == 128 * (1152 + 4 + 1152)
    assert names["append-v32-t4096"].bytes() == 4096 * (1152 + 4 + 656)
    assert names["gather-v4-t1"].bytes() == 1024 + 4 + 584
    assert names["fused-v4-t65536"].bytes() == 65536 * (1024 + 4 + 584 + 256) + 448 * 4
    case = names["append-v32-t262144"]
    assert case.bytes() > 100e6
    row = cache_ops.row_of(case, 1.5 * case.bytes() / 4.3e6)
    assert row["over_copy"] == pytest.approx(1.5) and row["gb_per_s"] == pytest.approx(4300 / 1.5)
    line = report.TABLES["cache"].line(row).split()
    assert line == ["append-v32-t262144", "475.00", f"{row['us']:.1f}", "2867", "1.50"]


def test_cache_operations_are_timed_on_the_first_tokens(monkeypatch):
    timed = []

    class Problem:
        params = SimpleNamespace(tokens=0)

        def time(self, launches, replays):
            timed.append((self.params.tokens, launches, replays))
            return 2.0

    problems = {op: Problem() for op in cache_ops.OPS}
    monkeypatch.setattr(cache_ops, "_problems", lambda cache_format: problems)
    monkeypatch.setattr(cache_ops, "measure_case", measure_case)
    timer = sparse.Timer(LIMITS, launches=7, replays=2, slots=64)
    rows = [item.measure(timer) for item in sparse.items("cache")]
    assert timed == [(row["tokens"], 7, 2) for row in rows] and len(rows) == 45
    assert {row["us"] for row in rows} == {2.0}


def test_arrays_of_both_caches():
    case = sparse_cases.BenchmarkCase("x", "fp8_v4", 2, 3, 2, 10, 20, s_k=64)
    pool = jnp.zeros((4, 37440), jnp.uint8)
    arrays = sparse.arrays_of(case, pool)
    assert arrays["q"].shape == (2, 2, 3, 512) and arrays["q"].dtype == jnp.bfloat16
    assert arrays["k_cache"] is pool and arrays["extra_k_cache"] is pool
    assert arrays["indices"].shape == (2, 2, 10) and arrays["extra_indices"].shape == (2, 2, 20)
    plain = sparse_cases.BenchmarkCase("x", "plain", 2, 3, 1, 10, s_k=64)
    assert set(sparse.arrays_of(plain, jnp.zeros((4, 64, 1, 576)))) == {"q", "k_cache", "indices"}


def test_queries_over_bytes_are_bfloat16():
    case = cases.DenseCase("x", 2, 100, 3)
    arrays = measure.arrays_of(case, jnp.zeros((9, 64, 1, 656), jnp.uint8))
    assert arrays["q"].shape == (2, 1, 3, 576) and arrays["q"].dtype == jnp.bfloat16


def test_a_case_is_timed_once(monkeypatch):
    launched = []

    class Problem:
        def __init__(self, **arguments):
            launched.append(arguments)

        def time(self, launches, replays):
            assert (launches, replays) == (7, 2)
            return 5.0

        time_schedule = time

        def run(self):
            return np.ones(3, cases.BFLOAT16), None

    monkeypatch.setattr(sparse, "RawSparseDecode", Problem)
    monkeypatch.setattr(sparse, "RawDenseDecode", Problem)
    monkeypatch.setattr(sparse, "arrays_of", lambda case, pool: {"pool": pool})
    monkeypatch.setattr(measure, "arrays_of", lambda case, pool: {"pool": pool})
    monkeypatch.setattr(sparse, "random_pool", lambda *arguments: arguments)
    timer = sparse.Timer(LIMITS, launches=7, replays=2, slots=128)
    case = PEERS["v32-b64-h64-sq1-topk2048"]
    row = timer.decode(case)
    timer.decode(case)
    # Timed ordinary, batch-invariant, with power-of-two scales and with FP8 products; then two of
    # them for the error.
    kinds = [(p.get("batch_invariant"), p["pool"][2], p.get("fp8_matmul")) for p in launched]
    assert kinds == [
        (None, False, None),
        (True, False, None),
        (None, True, None),
        (None, False, True),
        (None, False, False),
        (None, False, True),
    ]
    assert row["us"] == 5.0 and row["peer_over_ours"] == pytest.approx(76.4 / 5)
    assert row["of_matmul_ceiling"] == pytest.approx(case.flop() / 5e-6 / 720e12)
    assert row["gb_per_s"] == pytest.approx(case.bytes() / 5e-6 / 1e9)
    assert timer.pool("fp8_v4") == (2, "fp8_v4", False)

    launched.clear()
    for _ in range(2):
        row = timer.fp8_dense(cases.DenseCase("x", 2, 100, 16))
        assert row["over_plain"] == 1.0
    formats = ["fp8_v32", "fp8_v32", "plain", "fp8_v32", "fp8_v32", "fp8_v32"]
    assert [problem["cache_format"] for problem in launched] == formats
    assert [problem["pool"][2] for problem in launched] == [False, True, False, False, False, False]


# --- Tables, targets, plots -------------------------------------------------------------------


def test_the_report_shows_every_section():
    text = report.full_text(made_up())
    for name in sparse.NAMES:
        assert report.TABLES[name].title in text and report.TABLES[name].header() in text
    assert "geometric mean of peer/ours over 12 cases" in text
    (line,) = [line for line in text.splitlines() if line.startswith("v32-b148-h128-sq2-topk16384")]
    us = fast(PEERS["v32-b148-h128-sq2-topk16384"])
    assert f"{us:.1f}" in line and "3128.6" in line and "1.20" in line


def verdicts(result):
    return {target.key: target.verdict for target in targets.targets_of(result)}


def test_all_targets_can_be_met_and_missed():
    met = verdicts(made_up())
    assert set(met) == {"s1", "s2", "s3", "s4", "s5", "s6", "s7", "f1", "f2", "f3", "w"}
    assert set(met.values()) == {"met"}
    slow = made_up(lambda case: 10_000.0)
    for row in slow["sparse"]:
        row["invariant_over_ordinary"] = 1.31
    for row in slow["fp8_dense"]:
        row["over_plain"] = 1.11
        row["plain_over_fp8_matmul"] = 1.39
    for row in slow["cache"]:
        row["over_copy"] = 1.51
    missed = verdicts(slow)
    assert set(missed.values()) == {"missed"}
    assert "s1" not in verdicts({})


def test_appends_of_over_100_mb_are_judged():
    """Reads are not, nor what moves fewer bytes; there are two sizes of each format and kind."""
    rows = made_up(names=("cache",))["cache"]
    (judged,) = [t for t in targets.targets_of({"cache": rows}) if t.key == "w"]
    assert judged.verdict == "met" and len(judged.judged) == judged.expected == 2 * 2 * 3
    for row in rows:
        if row["op"] == "gather" or row["bytes"] < 1e8:
            row["over_copy"] = 9.0
    assert verdicts({"cache": rows})["w"] == "met"
    few = [row for row in rows if row["tokens"] < 65536]
    assert verdicts({"cache": few})["w"] == "not measured"
    for over, verdict in ((1.499, "met"), (1.501, "missed")):
        next(row for row in rows if row["name"] == "fused-v4-t262144")["over_copy"] = over
        assert verdicts({"cache": rows})["w"] == verdict


def test_target_of_fp8_products():
    """Of 128 heads and 64 requests or more; results from before they were there say nothing."""
    rows = made_up(names=("fp8_dense",))["fp8_dense"]
    (judged,) = [t for t in targets.targets_of({"fp8_dense": rows}) if t.key == "f3"]
    assert judged.verdict == "met" and judged.expected == 3
    assert {
        (row["h_q"], row["b"]) for row in rows if row["name"] in {j.name for j in judged.judged}
    } == {(128, 64), (128, 128), (128, 256)}
    for ratio, verdict in ((1.401, "met"), (1.399, "missed")):
        next(row for row in rows if row["h_q"] == 128)["plain_over_fp8_matmul"] = ratio
        assert verdicts({"fp8_dense": rows})["f3"] == verdict
    for row in rows:
        del row["plain_over_fp8_matmul"]
    assert verdicts({"fp8_dense": rows})["f3"] == "not measured"
    text = report.full_text({"fp8_dense": rows})
    assert report.TABLES["fp8_dense"].title in text


def test_fp8_products_are_compared_with_the_ordinary_ones(monkeypatch):
    """Over V3.2 caches alone; their error is that of another result of the same problem."""
    launched = []

    class Problem:
        def __init__(self, fp8_matmul=False, **arguments):
            launched.append((arguments["cache_format"], fp8_matmul))
            self.fp8_matmul = fp8_matmul

        def time(self, launches, replays):
            return 4.0 if self.fp8_matmul else 6.0

        time_schedule = time

        def run(self):
            return np.full((2, 3), 1.5 if self.fp8_matmul else 1.0, cases.BFLOAT16), None

    monkeypatch.setattr(sparse, "RawSparseDecode", Problem)
    monkeypatch.setattr(sparse, "RawDenseDecode", Problem)
    monkeypatch.setattr(sparse, "arrays_of", lambda case, pool: {})
    monkeypatch.setattr(measure, "arrays_of", lambda case, pool: {})
    monkeypatch.setattr(sparse.Timer, "pool", lambda self, *_: None)
    timer = sparse.Timer(LIMITS, launches=7, replays=2, slots=128)
    row = timer.fp8_dense(cases.DenseCase("x", 2, 100, 128))
    assert row["fp8_matmul_us"] == 4.0 and row["plain_over_fp8_matmul"] == 1.5
    assert row["fp8_matmul_error"] == pytest.approx(0.5)
    assert ("plain", True) not in launched
    line = report.TABLES["fp8_dense"].line(row).split()
    assert line[-3:] == ["4.0", "1.50", "50.0%"]

    launched.clear()
    row = timer.decode(PEERS["v32-b64-h64-sq1-topk2048"])
    assert row["fp8_matmul_us"] == 4.0 and row["ordinary_over_fp8_matmul"] == 1.5
    assert row["fp8_matmul_error"] == pytest.approx(0.5) and ("fp8_v32", True) in launched
    launched.clear()
    for name in ("v4-b74-h64-sq2-topk128+512", "plain-b64-h128-sq1-topk2048"):
        known = {case.name: case for case in (*PEERS.values(), *sparse_cases.more_rows())}
        row = timer.decode(known[name])
        assert row["fp8_matmul_us"] is row["fp8_matmul_error"] is None
        assert report.TABLES["sparse"].line(row).split()[-3:] == ["-", "-", "-"]
    assert not any(fp8_matmul for _, fp8_matmul in launched)


@pytest.mark.parametrize(
    "key,name,bound",
    [
        ("s1", "v4-b74-h64-sq2-topk128+512", 1.0),
        ("s2", "v32-b64-h128-sq1-topk2048", 1.25),
        ("s3", "v32-b64-h64-sq1-topk2048", 1.4),
        ("s4", "v4-b2-h128-sq2-topk128+1024", 1.5),
    ],
)
def test_bounds_beside_the_peer(key, name, bound):
    case = PEERS[name]
    for factor, verdict in ((1.001, "met"), (0.999, "missed")):
        us = case.peer_us / (bound * factor)
        row = MadeUpTimer(lambda _, us=us: us).decode(case)
        assert verdicts({"sparse": [row]})[key] == verdict


def test_bounds_of_rates_and_of_fp8_caches():
    case = PEERS["v32-b128-h128-sq1-topk2048"]
    for rate, verdict in ((551, "met"), (549, "missed")):
        row = MadeUpTimer(lambda c, rate=rate: c.flop() / rate / 1e6).decode(case)
        assert verdicts({"sparse": [row]})["s5"] == verdict
    few = next(c for c in sparse_cases.fp8_dense_rows() if c.h_q == 16)
    for share, verdict in ((0.901, "met"), (0.899, "missed")):
        us = sparse_cases.fp8_dense_bytes(few) / (4400e3 * share)
        row = MadeUpTimer(lambda _, us=us: us).fp8_dense(few)
        assert verdicts({"fp8_dense": [row]})["f1"] == verdict
        assert verdicts({"fp8_dense": [row]})["f2"] == "not measured"


def test_targets_say_how_many_rows_are_missing():
    row = MadeUpTimer(lambda _: 5.0).decode(PEERS["v32-b2-h128-sq1-topk2048"])
    text = targets.full_text({"sparse": [row]})
    assert "b 2: 1.5x the peer: 1 of 1 (1 of 2 rows measured)" in text
    assert "a1 " not in text  # nothing was said of dense decode


@needs_matplotlib
def test_plots(tmp_path):
    result = made_up(names=("sparse",))
    paths = plots.save(result, tmp_path / "one")
    assert [path.name for path in paths] == list(plots.SPARSE_PLOTS)
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in paths)
    labels = plots.sparse_compute(result).legends[0].get_texts()
    expected = ["jax_flashmla", "FlashMLA", "matrix product ceiling"]
    assert sorted(text.get_text() for text in labels) == sorted(expected)
    both = plots.save(result | {"metadata": [{}]}, tmp_path / "both")
    assert {path.name for path in both} == {*plots.PLOTS, *plots.SPARSE_PLOTS}


# --- The command ------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(command._ffi, "cuda_built", lambda: True)
    monkeypatch.setattr(measure, "environment", lambda: {"gpu": "Toy"})
    monkeypatch.setattr(measure, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(measure, "random_pool", lambda pages: pytest.fail("no dense row is timed"))
    monkeypatch.setattr(sparse, "Timer", lambda *_, **__: MadeUpTimer(fast))


def test_the_command_measures_sparse_decode_alone(gpu, tmp_path, capsys):
    out = tmp_path / "result"
    assert command.main(["--sparse", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "v4-b256-h64-sq2-topk128+512" in printed and "s1  met" in printed
    assert "a1 " not in printed
    result = report.load(out.with_suffix(".json"))
    assert set(sparse.NAMES) <= set(result) and "rows" not in result and result["errors"] == []
    assert result["geometric_mean_peer_over_ours"] > 1
    header, *lines = out.with_suffix(".csv").read_text().splitlines()
    assert header.startswith("name,cache_format,b,h_q,s_q,topk,extra_topk,us,")
    assert len(lines) == len(PEERS)
    header, *lines = (tmp_path / "result_fp8_dense.csv").read_text().splitlines()
    assert len(lines) == len(sparse_cases.fp8_dense_rows())
    assert command.main(["--report", str(out.with_suffix(".json"))]) == 0
    assert "s7  met" in capsys.readouterr().out


def test_caches_alone(gpu, tmp_path, capsys):
    out = tmp_path / "result"
    assert command.main(["--cache", "--out", str(out)]) == 0
    assert "append-v32-t262144" in capsys.readouterr().out
    result = report.load(out.with_suffix(".json"))
    assert len(result["cache"]) == len(cache_ops.cases()) and "sparse" not in result
    assert not out.with_suffix(".csv").exists()
    assert command.main(["--report", str(out.with_suffix(".json"))]) == 0
    printed = capsys.readouterr().out
    assert "w   met" in printed and "s1 " not in printed and "a1 " not in printed
    # Once, beside the others, too.
    assert command.main(["--cache", "--sparse", "--out", str(out)]) == 0
    assert len(report.load(out.with_suffix(".json"))["cache"]) == len(cache_ops.cases())


def test_sparse_beside_dense_rows(gpu, monkeypatch, tmp_path, capsys):
    class Dense(measure.Timer):
        def raw(self, case, batch_invariant=False):
            return measure.Times(case.bytes() / 4400e3, 3.0)

    monkeypatch.setattr(measure, "random_pool", lambda pages: None)
    monkeypatch.setattr(measure, "Timer", Dense)
    out = tmp_path / "result"
    options = ["--sparse", "--rows", "--filter", "b2-", "--out", str(out)]
    assert command.main(options) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert {row["name"] for row in result["sparse"]} == {n for n in PEERS if "-b2-" in n}
    assert "rows" not in result  # none of them has such a name
    assert command.main(["--sparse", "--rows", "--filter", "h16-sq1", "--out", str(out)]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["rows"] and result["sparse_more"] and result["fp8_dense"]
    assert out.with_suffix(".csv").read_text().count("\n") == len(result["rows"]) + 1


def test_failing_rows_do_not_stop_the_others(gpu, monkeypatch, tmp_path, capsys):
    def fails(self, case):
        raise RuntimeError("toy failure")

    monkeypatch.setattr(MadeUpTimer, "fp8_dense", fails)
    out = tmp_path / "result"
    assert command.main(["--sparse", "--out", str(out)]) == 1
    result = report.load(out.with_suffix(".json"))
    assert result["fp8_dense"] == [] and len(result["sparse_xla"]) == 3
    assert {error["section"] for error in result["errors"]} == {"fp8_dense"}


def test_wrong_arguments(gpu, capsys, tmp_path):
    out = tmp_path / "result"
    command.main(["--sparse", "--filter", "v4-b2-", "--out", str(out)])
    for flag in ("--report", "--plot"):
        with pytest.raises(SystemExit):
            command.main([flag, str(out.with_suffix(".json")), "--sparse"])
        assert "leave out --sparse" in capsys.readouterr().err


@pytest.mark.parametrize("cache_format", ["plain", "fp8_v32", "fp8_v4"])
def test_xla_is_timed_on_both_caches(cache_format, monkeypatch):
    monkeypatch.setattr(sparse, "_PAGES_AT_ONCE", 2)
    monkeypatch.setattr(sparse.Timer, "raw", lambda self, case: measure.Times(2.0, 1.0))
    extra = 5 if cache_format == "fp8_v4" else 0
    case = sparse_cases.BenchmarkCase("tiny", cache_format, 2, 3, 1, 10, extra, s_k=64)
    row = sparse.Timer(LIMITS, launches=1, replays=1, slots=128).xla(case)
    assert row["us"] > 0 and row["over_raw"] == pytest.approx(row["us"] / 2)
    assert row["tflop_per_s"] == pytest.approx(case.flop() / row["us"] / 1e6)
    sparse.random_pool.clear_cache()
