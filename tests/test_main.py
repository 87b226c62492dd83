"""``python -m jax_flashmla``: its output, its exit status, and that its checks can fail."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla import __main__ as program
from jax_flashmla import _decode_loop, _ffi, _selftest
from jax_flashmla.cache import PagedKVCache

OLD_JAXLIB = tuple(int(part) for part in jaxlib.__version__.split(".")[:2]) < (0, 11)
SIZES = "--batch 3 --steps 10 --heads 2 --layers 2 --context 40 --page-size 16".split()


def config(**changes):
    sizes = dict(batch=3, steps=10, heads=2, layers=2, context=40, page_size=16)
    other = dict(cache_format="plain", dtype="float32", implementation=None, seed=0)
    return _decode_loop.Config(**{**sizes, **other, **changes})


@pytest.fixture
def narrow(monkeypatch):
    """A model with less arithmetic around the attention."""
    monkeypatch.setattr(_decode_loop, "MODEL_DIM", 128)


@pytest.fixture
def one_case(monkeypatch):
    """A self-test of one case that costs nothing."""

    def case(call, result):
        del call
        result.check("out", 0.001, 0.003)

    monkeypatch.setattr(_selftest, "CASES", {"nothing at all": case})


# --- the whole program ---


def test_program_prints_one_json_object(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(jax_flashmla.__file__).parents[1])}
    command = [sys.executable, "-m", "jax_flashmla", "--json", *SIZES]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True and "error" not in found
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["jax_flashmla"] == jax_flashmla.__version__
    assert found["devices"] and found["implementations"]
    cases = found["self_test"]
    assert [case["name"] for case in cases] == list(_selftest.CASES)
    assert all(case["passed"] and case["errors"] for case in cases)
    loop = found["decode_loop"]
    assert (loop["batch"], loop["steps"], loop["heads"], loop["context"]) == (3, 10, 2, 40)
    assert loop["implementation"] in ("cuda", "xla")
    assert loop["correct"] and loop["in_place"] and not loop["moved"]
    assert loop["tokens"] == 27 and loop["tokens_per_second"] > 0
    assert loop["pages_allocated"] > 0 and loop["checked"] >= 10 * 3 * 2


def test_program_says_what_it_does(capsys, one_case, narrow):
    assert program.main(SIZES) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert lines[0].startswith(f"jax_flashmla {jax_flashmla.__version__}, jax {jax.__version__}")
    assert "  ok   nothing at all" in text
    assert "decode loop: 3 requests of 0 to 40 tokens" in text
    (bar,) = (line for line in lines if "[" in line)  # no terminal, no redrawing
    assert f"[{'#' * 30}] 10/10 steps" in bar and "\r" not in text
    assert "tokens/s; compiled in" in text and "updated in place" in text
    assert lines[-1] == "all right"


def test_no_cuda_is_one_line_with_the_switch(capsys, monkeypatch, one_case):
    monkeypatch.setattr(_ffi, "build_info", lambda: {"cuda": False, "architectures": ()})
    monkeypatch.setattr(_ffi, "extension", lambda: None)
    monkeypatch.setattr(_decode_loop, "Loop", pytest.fail)
    found = {"versions": {}, "devices": [], "implementations": {}, "kernels": program._kernels()}
    program._describe_installation(program._Report(quiet=False), found)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("CUDA kernels"))
    assert line.startswith("CUDA kernels: none") and "JAX_FLASHMLA_CUDA=ON" in line


def test_kernels_are_listed(capsys, monkeypatch):
    info = {"cuda": True, "architectures": ("90a",), "cuda_compiler": "13.0.88"}
    extension = type("Extension", (), {"registrations": lambda: {"flashmla_b": 1, "flashmla_a": 2}})
    monkeypatch.setattr(_ffi, "build_info", lambda: info)
    monkeypatch.setattr(_ffi, "extension", lambda: extension)
    found = {"versions": {}, "devices": [], "implementations": {}, "kernels": program._kernels()}
    program._describe_installation(program._Report(quiet=False), found)
    assert (
        "CUDA kernels: built with CUDA 13.0.88 for sm_90a: flashmla_a, flashmla_b\n"
        in capsys.readouterr().out
    )


def test_every_kind_of_call_is_explained():
    found = program._implementations("xla")
    assert len(found) == len(program._typical_calls())
    assert {entry["implementation"] for entry in found.values()} == {"xla"}
    assert all("asked for" in entry["not_cuda"][0] for entry in found.values())


RIGHT = _decode_loop.Result(
    tokens=8,
    seconds=1.0,
    compile_seconds=1.0,
    memory=dict(in_place=True, copies=[], cache_bytes=5, aliased_bytes=5, temporary_bytes=5),
    moved=False,
    pages_allocated=1,
    checked=4,
    out_error=1e-3,
    head_error=1e-3,
    lse_error=1e-5,
    out_tolerance=3e-3,
    head_tolerance=6e-3,
)


@pytest.fixture
def pretend_loop(monkeypatch):
    """A loop that does nothing, with the result that the returned function is given."""

    def install(result):
        class Loop:
            def __init__(self, config):
                pass

            def run(self, progress):
                return result

            def verify(self, result):
                pass

        monkeypatch.setattr(_decode_loop, "Loop", Loop)

    return install


def test_failed_cases_give_status_1(capsys, monkeypatch, pretend_loop):
    def bad(call, result):
        result.check("out", float("nan"), 0.003)

    def broken(call, result):
        raise RuntimeError("the wheels came off")

    monkeypatch.setattr(_selftest, "CASES", {"bad": bad, "broken": broken})
    pretend_loop(RIGHT)
    assert program.main(["--json", *SIZES]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["decode_loop"]["correct"] is True
    assert [case["passed"] for case in found["self_test"]] == [False, False]
    assert found["self_test"][0]["errors"] == {"out": None}  # JSON has no NaN
    assert "the wheels came off" in found["self_test"][1]["failure"]


@pytest.mark.parametrize("fault", ["head_error", "out_error", "lse_error", "moved", "copies"])
def test_a_wrong_loop_gives_status_1(capsys, one_case, pretend_loop, fault):
    pretend_loop(RIGHT)
    assert program.main(SIZES) == 0
    wrong = {fault: float("nan") if "error" in fault else True}
    if fault == "copies":
        copies = {"in_place": False, "copies": ["%copy.1 = f32[2]{0} copy(%x)"]}
        wrong = {"memory": {**RIGHT.memory, **copies}}
    pretend_loop(dataclasses.replace(RIGHT, **wrong))
    assert program.main(SIZES) == 1
    out = capsys.readouterr().out
    assert out.endswith("FAILED\n") and "  FAIL " in out
    assert fault != "copies" or "%copy.1" in out


def test_out_of_memory_gives_status_1(capsys, monkeypatch, one_case):
    def loop(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(_decode_loop, "Loop", loop)
    assert program.main(["--json", *SIZES]) == 1
    captured = capsys.readouterr()
    assert "no room" in json.loads(captured.out)["error"]
    assert "no room" in captured.err


# --- options ---


@pytest.mark.parametrize(
    "options, text",
    [
        ("--batch 0", "argument --batch: expected an integer from 1 to 65535"),
        ("--steps two", "argument --steps: expected an integer from 1"),
        ("--heads -1", "argument --heads: expected an integer from 1"),
        ("--layers 1.5", "argument --layers: expected an integer from 1"),
        ("--context 0", "argument --context: expected an integer from 1"),
        ("--page-size 0", "argument --page-size: expected an integer from 1"),
        ("--seed -1", "argument --seed: expected an integer from 0"),
        ("--cache-format fp4", "argument --cache-format: invalid choice: 'fp4'"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--implementation tpu", "argument --implementation: invalid choice: 'tpu'"),
        ("--cache-format fp8_v32 --dtype float16", "goes with queries of bfloat16 or float32"),
        ("--batch 65535 --context 1048576", "slots are numbered up to 2147483647"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_options(capsys, options, text):
    with pytest.raises(SystemExit) as stopped:
        program.main(options.split())
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert text in captured.err and captured.out == ""


def test_cuda_where_there_is_none(capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--implementation", "cuda", "--dtype", "float32"])
    assert stopped.value.code == 2
    assert "cuda cannot run this loop: q has dtype float32" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in "batch steps heads layers context page-size cache-format dtype json".split():
        assert f"--{option}" in text
    assert "exit status" in text


def test_jax_that_cannot_start(capsys, monkeypatch):
    def no_devices():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "local_devices", no_devices)
    assert program.main([]) == 1
    assert "JAX cannot start: Unable to initialize" in capsys.readouterr().err


def test_default_dtype_is_one_that_can_be_updated_in_place(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    parser = program._parser()
    plain = program._config(parser, parser.parse_args([]))
    assert plain.dtype == ("float16" if OLD_JAXLIB else "bfloat16")
    fp8 = program._config(parser, parser.parse_args(["--cache-format", "fp8_v32"]))
    assert fp8.dtype == "bfloat16"


# --- the progress bar ---


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_is_redrawn_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    report = program._Report(quiet=False)
    report.bar(0, 4, 0.0)
    report.bar(1, 4, 10.0)  # too soon after the last
    report.drawn = 0.0
    report.bar(2, 4, 10.0)
    report.bar(4, 4, 1234.5)
    _, *drawn = sys.stdout.getvalue().split("\r\x1b[K")
    assert [text.split("]")[1].strip() for text in drawn] == [
        "0/4 steps, 0 tokens/s",
        "2/4 steps, 10 tokens/s",
        "4/4 steps, 1,234 tokens/s",
    ]
    assert drawn[1].startswith(f"  [{'#' * 15}{'.' * 15}]") and drawn[2].endswith("\n")


# --- the decode loop ---


def assert_right(loop, result, seen):
    assert result.correct and result.in_place, result
    assert result.checked == 10 * 3 * 2  # every step, every request, every layer
    # Lengths 40, 10..40 and 0, all growing by 10 in pages of 16.
    before = sum(-(-int(n) // 16) for n in loop.config.lengths)
    assert result.pages_allocated == sum(loop.table.used) - before > 0
    done = [steps for steps, _ in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 10
    assert seen[-1][1] == pytest.approx(result.tokens_per_second)


def test_loop_over_fp8(narrow):
    seen = []
    loop = _decode_loop.Loop(config(cache_format="fp8_v32", dtype="bfloat16"))
    result = loop.run(lambda done, rate: seen.append((done, rate)))
    loop.verify(result)
    assert_right(loop, result, seen)


def test_loop_notices_one_wrong_number(narrow):
    seen = []
    loop = _decode_loop.Loop(config(heads=16, dtype="float16"))
    result = loop.run(lambda done, rate: seen.append((done, rate)))
    loop.verify(result)
    assert_right(loop, result, seen)
    for name, place, change in (
        ("out", (1, 2, 15, 511), 0.02),
        ("out", (0, 0, 0, 0), np.nan),
        ("lse", (1, 1, 3), 0.002),
        ("lse", (1, 1, 3), np.nan),
    ):
        right = loop.seen[9][name]
        loop.seen[9][name] = right.at[place].add(
            jnp.asarray(change * np.abs(right).max(), right.dtype)
        )
        loop.verify(result)
        assert not result.correct, (name, place, change)
        loop.seen[9][name] = right
    loop.verify(result)
    assert result.correct


def wrong_length(q, cache, table, lengths, *args, **kwargs):
    return jax_flashmla.flash_mla_with_kvcache(q, cache, table, lengths - 1, *args, **kwargs)


def other_layer(table, page_offset, *, num_pages):
    del page_offset, num_pages
    return table


@pytest.mark.gpu
@pytest.mark.parametrize(
    "cache_format, dtype, page_size",
    [("plain", "bfloat16", 64), ("plain", "float16", 16), ("fp8_v32", "bfloat16", 61)],
)
def test_program_on_the_kernels(capsys, cache_format, dtype, page_size):
    sizes = f"--batch 5 --steps 30 --heads 20 --layers 3 --context 900 --page-size {page_size}"
    kind = f"--cache-format {cache_format} --dtype {dtype} --implementation cuda"
    assert program.main(f"{sizes} {kind}".split()) == 0
    text = capsys.readouterr().out
    assert f"{cache_format} cache, {dtype}, cuda" in text and "FAIL" not in text


@pytest.mark.parametrize(
    "name, fault",
    [("flash_mla_with_kvcache", wrong_length), ("offset_block_table", other_layer)],
)
def test_loop_notices_faults(monkeypatch, narrow, name, fault):
    monkeypatch.setattr(_decode_loop, name, fault)
    loop = _decode_loop.Loop(config(steps=4))
    result = loop.run()
    loop.verify(result)
    assert not result.correct, result


def test_nothing_checked_is_not_correct():
    memory = {"in_place": True}
    assert not _decode_loop.Result(8, 1.0, 1.0, memory, False, 1).correct


def test_pages_are_handed_out_once():
    sizes = config(batch=9, steps=50, context=70)
    assert sizes.lengths[0] == 70 and sizes.lengths[-1] == 0 and len(set(sizes.lengths)) > 3
    table = _decode_loop.PageTable(sizes)
    for t in range(sizes.steps + 1):
        for request, length in enumerate(sizes.lengths):
            table.grow(request, int(length) + t)
    used = [row[:n] for row, n in zip(table.entries, table.used, strict=True)]
    assert sorted(np.concatenate(used)) == list(range(sizes.pages)) and table.free == []
    for row, n, length in zip(table.entries, table.used, sizes.lengths, strict=True):
        assert n == -(-(length + 50) // 16) and np.all(row[n:] == _selftest.GARBAGE)


def test_all_requests_are_checked_in_turn():
    for batch, steps in ((1, 1), (3, 1), (5, 2), (64, 256), (200, 3), (7, 12)):
        loop = _decode_loop.Loop.__new__(_decode_loop.Loop)
        loop.config = config(batch=batch, steps=steps)
        loop.choose_checks()
        assert {0, steps - 1} <= set(loop.checked) <= set(range(steps))
        watched = np.concatenate([loop._watch(t) for t in loop.checked])
        assert set(watched) == set(range(batch))


# --- the compiled module ---


def compiled_text(function, *shapes, donate=True):
    lowered = jax.jit(function, donate_argnums=0 if donate else ()).lower(*shapes)
    return lowered.compile().as_text()


SHAPE = (8, 16, 1, 576)
CACHE = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
INDEX = jax.ShapeDtypeStruct((), jnp.int32)
ROW = jax.ShapeDtypeStruct(SHAPE[1:], jnp.float32)


def update(cache, page, row):
    return cache.at[page].set(row)


def stacked_layers(cache, page, row):
    """What slicing each layer out of a stack does."""

    def layer(carry, data):
        return carry, data.at[page].set(row)

    layers = cache.reshape(2, SHAPE[0] // 2, *SHAPE[1:])
    return jax.lax.scan(layer, 0, layers)[1].reshape(SHAPE)


def through_bfloat16(cache, page, row):
    return update(cache.astype(jnp.bfloat16), page, row.astype(jnp.bfloat16)).astype(cache.dtype)


def test_update_in_place_is_no_copy():
    assert _decode_loop.cache_copies(compiled_text(update, CACHE, INDEX, ROW), SHAPE) == []


@pytest.mark.parametrize("function", [update, stacked_layers, through_bfloat16])
def test_copies_are_found(function):
    text = compiled_text(function, CACHE, INDEX, ROW, donate=function is not update)
    assert _decode_loop.cache_copies(text, SHAPE)


HLO = """HloModule m, input_output_alias={{ {{0}}: (0, {{}}, may-alias) }}

%inside (p: f32[8,576], q: s32[]) -> f32[8,576] {{
  %p = f32[8,576]{{1,0}} parameter(0)
  %q = s32[] parameter(1)
  %row = f32[1,576]{{1,0}} broadcast(%q), dimensions={{}}
  %whole = f32[8,576]{{1,0}} broadcast(%q), dimensions={{}}
  {root}
}}

ENTRY %main (a: f32[8,576], b: s32[]) -> f32[8,576] {{
  %a = f32[8,576]{{1,0}} parameter(0)
  %b = s32[] parameter(1)
  ROOT %f = {kind} {opcode}(%a, %b), calls=%inside
}}
"""
PLAIN, PAIR = "f32[8,576]{1,0}", "(s32[], f32[8,576]{1,0})"


def test_other_arrays_are_not_taken_for_the_cache():
    text = """ENTRY %main (a: f32[4,4,576]) -> f32[4,4,576] {
  %a = f32[4,4,576]{2,1,0} parameter(0)
  ROOT %c = f32[4,4,576]{2,1,0} copy(%a)
}
"""
    assert _decode_loop.cache_copies(text, (2, 8, 1, 576)) == []
    assert len(_decode_loop.cache_copies(text, (4, 4, 1, 576))) == 1


@pytest.mark.parametrize(
    "root, kind, opcode, copies",
    [
        ("ROOT %r = f32[8,576]{1,0} dynamic-update-slice(%p, %row, %q, %q)", PLAIN, "fusion", 0),
        ("ROOT %r = f32[8,576]{1,0} scatter(%p, %q, %row)", PLAIN, "fusion", 0),
        ("ROOT %r = f32[8,576]{1,0} add(%p, %whole)", PLAIN, "fusion", 1),
        ("ROOT %r = f32[8,576]{1,0} copy(%p)", PLAIN, "async-start", 1),
        ("ROOT %r = f32[8,1,576]{2,1,0} bitcast(%whole)", "f32[8,1,576]{2,1,0}", "fusion", 1),
        ("ROOT %r = (s32[], f32[8,576]{1,0}) tuple(%q, %whole)", PAIR, "fusion", 1),
    ],
)
def test_fusions_are_looked_into(root, kind, opcode, copies):
    text = HLO.format(root=root, kind=kind, opcode=opcode)
    found = _decode_loop.cache_copies(text, (8, 576))
    assert len(found) == copies and all(line.startswith("ROOT %f = ") for line in found)


def test_tuple_of_an_update_is_in_place():
    root = """%u = f32[8,576]{1,0} dynamic-update-slice(%p, %row, %q, %q)
  ROOT %r = (s32[], f32[8,576]{1,0}) tuple(%q, %u)"""
    text = HLO.format(root=root, kind=PAIR, opcode="fusion")
    assert _decode_loop.cache_copies(text, (8, 576)) == []


def test_asynchronous_copies_are_found():
    text = """ENTRY %main (a: f32[8,576]) -> f32[8,576] {
  %a = f32[8,576]{1,0} parameter(0)
  %s = (f32[8,576]{1,0}, f32[8,576]{1,0}, u32[]) copy-start(%a)
  ROOT %d = f32[8,576]{1,0} copy-done(%s)
}
"""
    assert _decode_loop.cache_copies(text, (8, 576))


def test_inspect_wants_the_argument_to_be_the_result():
    cache = PagedKVCache(jnp.zeros(SHAPE, jnp.float32), "plain", 16)
    donated = jax.jit(update, donate_argnums=0).lower(cache.data, INDEX, ROW).compile()
    assert _decode_loop.inspect(donated, cache)["in_place"]
    kept = jax.jit(update).lower(cache.data, INDEX, ROW).compile()
    assert not _decode_loop.inspect(kept, cache)["in_place"]


# --- the self-test ---


def test_self_test_notices_wrong_results(monkeypatch):
    def zeros(self, result, function, first, *args, **kwargs):
        shapes = jax.eval_shape(lambda x: function(x, *args, **kwargs), first)
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    monkeypatch.setattr(_selftest.Caller, "__call__", zeros)
    results = list(_selftest.run("xla"))
    assert len(results) == len(_selftest.CASES)
    for result in results:
        assert result.failure is None and not result.passed, result
        for name, error in result.errors.items():
            assert error > result.tolerances[name], (result.name, name)


def test_a_case_passes_within_all_tolerances_only():
    result = _selftest.Result("case")
    assert not result.passed  # nothing was checked
    result.check("out", 0.003, 0.003)
    assert result.passed
    result.check("lse", float("nan"), 0.003)
    assert not result.passed
    result.check("lse", 0.0, 0.003)
    assert result.passed
    result.failure = "anything"
    assert not result.passed


def test_attention_agrees_with_the_oracle_of_the_tests():
    rng = np.random.default_rng(0)
    q, keys = rng.standard_normal((5, 24)), rng.standard_normal((9, 24))
    mask = rng.random((5, 9)) < 0.5
    mask[2] = False
    sink = np.array([0.5, -np.inf, 1.0, np.inf, -3.0])
    out, lse = _selftest.attention(q, keys, 0.3, 16, mask, sink)
    for i in range(5):
        want_out, want_lse = oracle_of_one(q[i], keys[mask[i]], 0.3, 16, sink[i])
        np.testing.assert_allclose(out[i], want_out, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(lse[i], want_lse, rtol=1e-12)


def oracle_of_one(q, keys, scale, head_dim_v, sink):
    """One query by the definition, without a maximum subtracted."""
    if not len(keys):
        return np.zeros(head_dim_v), np.inf
    weights = np.exp(scale * keys @ q)
    total = weights.sum()
    return weights @ keys[:, :head_dim_v] / (total + np.exp(sink)), np.log(total)


@pytest.mark.parametrize("cache_format, latent", [("fp8_v32", 512), ("fp8_v4", 448)])
def test_stored_tokens_are_those_of_the_cache(cache_format, latent):
    rng = np.random.default_rng(1)
    tokens = rng.standard_normal((7, latent + 64)).astype(np.float32)
    tokens *= np.exp2(rng.integers(-12, 12, tokens.shape))
    tokens[0] = 0
    cache, _ = PagedKVCache.from_sequences(
        jnp.asarray(tokens)[None, :, None], 7, format=cache_format
    )
    for dtype in (jnp.bfloat16, jnp.float32):
        got = np.asarray(cache.to_dense(dtype=dtype), np.float32)[0, :, 0]
        np.testing.assert_array_equal(got, _selftest.stored(tokens, cache_format, dtype))


def test_errors_are_measured():
    assert _selftest.relative_error([3.0, 4.0], [3.0, 4.0]) == 0
    assert _selftest.relative_error([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert np.isnan(_selftest.relative_error([np.nan, 4.0], [3.0, 4.0]))
    assert _selftest.relative_error([0.0], [0.0]) == 0
    assert _selftest.relative_error([1.0], [0.0]) == np.inf
    assert _selftest.lse_error([np.inf, 2.0], [np.inf, 2.0]) == 0
    assert _selftest.lse_error([2.02], [2.0]) == pytest.approx(0.01)
    assert _selftest.lse_error([1e-5], [0.0]) == pytest.approx(1e-4)
    for actual, expected in ((1.0, np.inf), (np.inf, 1.0), (np.nan, 1.0), (np.nan, np.inf)):
        error = _selftest.lse_error([actual], [expected])
        assert not error <= _selftest.LSE_TOLERANCE
