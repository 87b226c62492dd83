"""The end-to-end benchmark with a model small enough for a CPU, and what it checks."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import PagedKVCache, flash_mla_with_kvcache
from jax_flashmla.flax import MLAConfig, core

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind an installed jax_flashmla

from benchmarks import end_to_end, measure, report  # noqa: E402

CONFIG = MLAConfig(
    hidden_size=64,
    num_heads=4,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    dtype="float32",
    param_dtype="float32",
)
STACK = end_to_end.Stack("mini", CONFIG, layers=2, b=3, s_k=21, page_size=8)
TIMER = SimpleNamespace(
    limits={"read_gb_per_s": 4400.0, "bf16_matmul_tflop_per_s": 720.0},
    raw=lambda case: measure.Times(5.0, 1.0),
)


@pytest.fixture(autouse=True)
def short_trials(monkeypatch):
    monkeypatch.setattr(end_to_end, "_TRIAL_SECONDS", 1e-3)


@pytest.fixture(scope="module")
def inputs():
    return end_to_end.Inputs.make(STACK, unrolled=False)


def copied(inputs):
    """The same arguments, of which a step may take over the cache."""
    return dataclasses.replace(inputs, cache=jax.tree.map(jnp.copy, inputs.cache))


def of_layer(inputs, layer):
    """Its weights, and its pages as a cache of its own."""
    pages = inputs.cache.data[layer * STACK.pages : (layer + 1) * STACK.pages]
    params = {name: value[layer] for name, value in inputs.weights.items()}
    return params.pop("norm"), params, PagedKVCache(pages, "plain", STACK.page_size)


def norm(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + CONFIG.rms_norm_eps)


# --- The model --------------------------------------------------------------------------------


def test_sizes_of_deepseek_v3():
    stack = end_to_end.deepseek_v3(128, 8192)
    queries = 7168 * 1536 + 1536 * 128 * 192
    assert stack.matrices == queries + 7168 * 576 + 2 * 512 * 128 * 128 + 128 * 128 * 7168
    assert stack.weight_bytes == 61 * 2 * stack.matrices == 22_826_844_160
    assert stack.context_bytes == 61 * 128 * 8192 * 576 * 2
    attention = 128 * 8192 * 128 * 2 * (576 + 512)
    assert stack.flop == 61 * (attention + 2 * 128 * stack.matrices)
    assert (stack.pages, stack.case.h_q, stack.case.dv) == (128 * 128, 128, 512)
    assert [(stack.b, stack.s_k) for stack in end_to_end.STACKS] == [
        (1, 8192),
        (32, 8192),
        (128, 8192),
    ]


def test_every_slot_is_filled_and_every_page_used_once(inputs):
    assert inputs.cache.data.shape == (2 * 3 * 3, 8, 1, 40)
    rows = np.asarray(inputs.cache.data).reshape(-1, 40)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert rows.std() == pytest.approx(1, abs=0.05)
    assert sorted(np.ravel(inputs.table)) == list(range(STACK.pages))


def test_the_step_is_its_layers_one_by_one(inputs):
    """Each with a cache of its own, called by itself; the norms in numpy."""
    mine = copied(inputs)
    _, x, positions, table = mine.arguments(19)[1:]
    program = end_to_end.step_program(STACK, "xla", unrolled=False)
    cache, got, after = program(*mine.arguments(19))
    hidden = np.asarray(x)
    for layer in range(STACK.layers):
        _, params, own = of_layer(inputs, layer)
        out, own = core.decode(
            params, norm(hidden).astype(np.float32), positions, own, table, config=CONFIG
        )
        hidden = hidden + np.asarray(out)
        data = cache.data[layer * STACK.pages : (layer + 1) * STACK.pages]
        np.testing.assert_allclose(data, own.data, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got, norm(hidden), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after, [[20]] * 3)
    changed = np.any(np.asarray(cache.data != inputs.cache.data), axis=(2, 3)).sum()
    assert changed == STACK.layers * STACK.b  # slots


def test_unrolled_layers_are_the_same_step(inputs):
    scan = end_to_end.step_program(STACK, "xla", unrolled=False)
    _, x, _ = scan(*copied(inputs).arguments(20))
    unrolled = end_to_end.Inputs.make(STACK, unrolled=True)
    program = end_to_end.step_program(STACK, "xla", unrolled=True)
    _, y, _ = program(*unrolled.arguments(20))
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unrolled", [False, True])
def test_shapes_of_arguments(unrolled):
    """For which programs are compiled before there are arguments."""
    arguments = end_to_end.Inputs.make(STACK, unrolled=unrolled).arguments(20)
    shapes = end_to_end.argument_shapes(STACK, unrolled=unrolled)
    assert jax.tree.structure(arguments) == jax.tree.structure(shapes)
    for a, b in zip(jax.tree.leaves(arguments), jax.tree.leaves(shapes), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_around_its_attention_it_is_decode(inputs):
    """So the step without attention leaves out nothing else."""
    _, params, cache = of_layer(inputs, 1)
    positions = jnp.array([[20], [3], [11]], jnp.int32)
    x = inputs.x

    def attend(q, cache):
        return flash_mla_with_kvcache(
            q,
            cache,
            inputs.table,
            positions[:, 0] + 1,
            CONFIG.kv_lora_rank,
            softmax_scale=CONFIG.softmax_scale,
            implementation="xla",
        )[0]

    out, after = end_to_end.decode_around(
        attend,
        params,
        x,
        positions,
        cache,
        inputs.table,
        config=CONFIG,
        first_page=0,
        num_pages=STACK.pages,
    )
    expected, cache = core.decode(params, x, positions, cache, inputs.table, config=CONFIG)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.data, cache.data)


def test_what_stands_for_attention_needs_all_of_the_query():
    q = jnp.ones((3, 1, 4, CONFIG.cache_dim))
    gradient = jax.grad(lambda q: end_to_end.no_attention(q, None, CONFIG).sum())(q)
    assert end_to_end.no_attention(q, None, CONFIG).shape == (3, 1, 4, CONFIG.kv_lora_rank)
    np.testing.assert_array_equal(gradient, 1)


# --- Rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_row(unrolled, tmp_path, capsys):
    row = end_to_end.measure_stack(TIMER, STACK, kernels="xla", unrolled=unrolled)
    assert row["name"] == "mini" and row["program"] == ("unrolled" if unrolled else "scan")
    assert row["trials"] >= 5 and row["steps"] >= 1
    assert row["tokens_per_s"] == pytest.approx(3e6 / row["us"])
    assert row["attention_us"] == row["us"] - row["without_attention_us"]
    assert row["attention_share"] == pytest.approx(row["attention_us"] / row["us"])
    assert row["raw_us"] == 10.0
    assert row["bytes"] == STACK.weight_bytes + STACK.context_bytes
    assert row["read_us"] == pytest.approx(row["bytes"] / 4400e3)
    assert row["matmul_us"] == pytest.approx(STACK.flop / 720e6)
    assert row["bound_us"] == max(row["read_us"], row["matmul_us"])
    assert (row["scan_us"] == row["us"]) == (not unrolled) and row["scan_us"] > 0
    assert row["xla_us"] > 0 and row["xla_note"] is None
    assert row["xla_difference"] < 1e-5
    assert row["xla_over_ours"] == pytest.approx(row["xla_us"] / row["us"])
    assert row["cache_copies"] == 0 and row["cache_bytes"] == 18 * 8 * 40 * 4
    # XLA for CPUs does copy slices.
    assert (row["weight_copy_bytes"] == 0) == unrolled
    assert row["scan_weight_copy_bytes"] > 0 and row["xla_weight_copy_bytes"] > 0
    progress = capsys.readouterr().err
    assert progress.count("compiled in") == 2 + unrolled and "GB of weights" in progress
    report.save(tmp_path / "result", {"end_to_end": [row]})
    loaded = report.load(tmp_path / "result.json")
    assert loaded["end_to_end"] == [row]
    assert report.TABLES["end_to_end"].line(row).split()[0] == "mini"
    assert (tmp_path / "result_end_to_end.csv").read_text().count("\n") == 2


def test_without_ceilings_there_is_no_bound(monkeypatch):
    monkeypatch.setattr(end_to_end, "_measure_xla", lambda *_: {"xla_us": None, "xla_note": "no"})
    timer = SimpleNamespace(limits={}, raw=TIMER.raw)
    row = end_to_end.measure_stack(timer, STACK, kernels="xla")
    assert row["bound_us"] is row["of_bound"] is row["xla_over_ours"] is None
    assert report.TABLES["end_to_end"].line(row).split()[-4:] == ["-"] * 4
    del row["scan_weight_copy_bytes"]
    assert report.summary_line("end_to_end", [row]) == "mini: no time with XLA: no"


def run_out(message):
    """As if XLA did while it compiles."""

    class Program:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError(message)

    return lambda *_, **__: Program()


def test_programs_that_cannot_be_compiled(monkeypatch):
    message = "RESOURCE_EXHAUSTED: out of memory\nand more"
    monkeypatch.setattr(end_to_end, "step_program", run_out(message))
    programs = end_to_end.compile_steps(STACK, [("xla", False), ("xla", False), (None, True)])
    assert list(programs) == [("xla", False), (None, True)]
    assert {str(error) for error in programs.values()} == {message}
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        end_to_end.measure_stack(TIMER, STACK, kernels="xla")
    monkeypatch.setattr(end_to_end, "step_program", run_out("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        end_to_end.compile_steps(STACK, [("xla", False)])


@pytest.fixture(scope="module")
def fallback():
    return end_to_end.compile_steps(STACK, [("xla", False)])["xla", False]


def xla(inputs, compiled, expected=None):
    return end_to_end._measure_xla(STACK, inputs, compiled, expected)


def test_a_fallback_that_cannot_be_measured_says_why(inputs, fallback, monkeypatch):
    def fails(message):
        return jax.errors.JaxRuntimeError(message)

    row = xla(inputs, fails("RESOURCE_EXHAUSTED: out of memory\nand more"))
    assert row["xla_us"] is None and row["xla_note"] == "RESOURCE_EXHAUSTED: out of memory"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        xla(inputs, fails("INTERNAL: a bug"))

    mine = copied(inputs)
    _, x = end_to_end._run(fallback, mine, 1, STACK.s_k)
    monkeypatch.setattr(end_to_end, "_LONGEST_STEP_SECONDS", 0.0)
    row = xla(mine, fallback, x)
    assert row["xla_us"] is None and "one step takes 0.0 s" in row["xla_note"]
    assert row["xla_difference"] == 0 and row["xla_cache_copies"] == 0
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10, "bytes_in_use": 7})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert "GB more memory" in xla(mine, fallback, x)["xla_note"]


def test_room():
    assert end_to_end._no_room(1 << 62) is None  # a CPU does not say


def test_results_that_differ_are_an_error(inputs, fallback):
    mine = copied(inputs)
    _, x = end_to_end._run(fallback, mine, 1, STACK.s_k)
    with pytest.raises(RuntimeError, match="kernels and XLA differ by 0.1"):
        xla(mine, fallback, 1.1 * x)
    with pytest.raises(RuntimeError, match="kernels and XLA differ by nan"):
        xla(mine, fallback, math.nan * x)
    with pytest.raises(RuntimeError, match="unrolled layers and a scan differ by 0.1"):
        end_to_end._measure_scan(STACK, mine, fallback, "xla", 1.1 * x)


def test_a_cache_that_moves_is_an_error(inputs):
    kept = []

    def step(cache, weights, x, positions, table):
        kept.append(cache)
        return jax.tree.map(jnp.copy, cache), x, positions

    with pytest.raises(RuntimeError, match="the cache has moved"):
        end_to_end._step_us(step, copied(inputs), STACK)


# --- Compiled steps ---------------------------------------------------------------------------

COMPILED = """\
HloModule jit_step

%fused_computation.1 (p.1: f32[2,24,4,24], p.2: s32[]) -> f32[24,96] {
  %p.1 = f32[2,24,4,24]{3,2,1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %inside.1 = f32[1,24,4,24]{3,2,1,0} dynamic-slice(%p.1, %p.2, %p.2, %p.2, %p.2)
  ROOT %inside.2 = f32[24,96]{1,0} bitcast(%inside.1)
}

ENTRY %main.9 (cache.1: f32[18,8,1,40]) -> f32[18,8,1,40] {
  %cache.1 = f32[18,8,1,40]{3,2,1,0} parameter(0)
  %m = (s32[132,8]{1,0}, s32[4]{0}) custom-call(%n), custom_call_target="flashmla_metadata"
  %a = (f32[2,2]{1,0}, s32[1]{0}) custom-call(%q, %cache.1), \
custom_call_target="flashmla_dense_decode"
  %f.1 = f32[3,96]{1,0} fusion(%q, %w), kind=kLoop, calls=%fused_computation.1
  ROOT %t.1 = f32[18,8,1,40]{3,2,1,0} bitcast(%cache.1)
LINES
}
"""


def check(attention="cuda", lines="", text=COMPILED, aliased=None, unrolled=False):
    cache = PagedKVCache.zeros(18, 8, head_dim=40, dtype=jnp.float32)
    memory = SimpleNamespace(
        alias_size_in_bytes=cache.data.nbytes if aliased is None else aliased,
        temp_size_in_bytes=12,
    )
    compiled = SimpleNamespace(
        as_text=lambda: text.replace("LINES", lines), memory_analysis=lambda: memory
    )
    return end_to_end.check_step(compiled, STACK, attention, cache, unrolled=unrolled)


COPY = "  %copy.1 = f32[18,8,1,40]{3,2,1,0} copy(%cache.1)"


def test_compiled_steps_are_checked():
    assert check() == {
        "custom_calls": 1,
        "metadata_calls": 1,
        "cache_copies": 0,
        "temp_bytes": 12,
        "cache_bytes": 18 * 8 * 40 * 4,
        "weight_copy_bytes": 0,
    }
    with pytest.raises(RuntimeError, match="1 calls of .* and 1 of .* instead of 2 and 1"):
        check(unrolled=True)
    without = COMPILED.replace("flashmla_dense_decode", "other")
    for attention, text in (("cuda", without), ("xla", COMPILED), (None, COMPILED)):
        with pytest.raises(RuntimeError, match="calls of flashmla_dense_decode"):
            check(attention, text=text)
    with pytest.raises(RuntimeError, match=r"copies the cache: %copy.1"):
        check(lines=COPY)
    with pytest.raises(RuntimeError, match="0 of 23040 bytes are updated in place"):
        check(aliased=0)
    neither = without.replace("flashmla_metadata", "other")
    counts = check("xla", text=neither, lines=COPY)
    assert counts["cache_copies"] == 1 and counts["custom_calls"] == 0
    row = {"name": "mini", "xla_cache_copies": 1, "weight_copy_bytes": 3_000_000}
    assert report.summary_line("end_to_end", [row]).splitlines() == [
        "mini: with XLA the step copies the cache",
        "mini: 3 MB of weights are copied in each layer",
    ]
    row = {"name": "mini", "program": "unrolled", "weight_copy_bytes": 5_000_000}
    row |= {"scan_weight_copy_bytes": 2_000_000, "xla_weight_copy_bytes": 1_000_000}
    assert report.summary_line("end_to_end", [row]).splitlines() == [
        "mini: 5 MB of weights are copied in all layers",
        "mini: 2 MB of weights are copied in each layer of the scan",
        "mini: 1 MB of weights are copied in each layer with XLA",
    ]


def test_copies_of_weights_are_found():
    found = {
        "  %s.1 = f32[1,24,4,24]{3,2,1,0} dynamic-slice(%w, %i)": 24 * 96,
        "  %s.1 = f32[24,96]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused_computation.1": 24 * 96,
        "  %c.1 = f32[64,40]{0,1} copy(%w)": 64 * 40,
        "  %t.2 = f32[4,32,2,16]{3,2,1,0} fusion(%w), kind=kLoop, calls=%transpose": 32 * 64,
        "  %b.1 = f32[24,4,24]{3,2,1,0} bitcast(%w)": 0,
        "  %x.1 = f32[24,24,4]{2,1,0} fusion(%w), kind=kLoop, calls=%fused_computation.1": 0,
        "  %x.1 = f32[24]{0} fusion(%w), kind=kLoop, calls=%fused_computation.1": 0,
    }
    for line, numbers in found.items():
        assert check(lines=line)["weight_copy_bytes"] == 4 * numbers, line


def test_rows_are_json():
    """Numbers of numpy would not be."""
    counts = check()
    assert json.loads(json.dumps(counts)) == counts
