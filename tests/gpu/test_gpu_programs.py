"""``python -m jax_flashmla`` and the example on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import test_examples as example_tests

import jax_flashmla

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd):
    """A program with the package that the tests import, leaving it memory beside this process."""
    package = str(Path(jax_flashmla.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_main_job(tmp_path):
    """With its own sizes for a GPU, but for fewer steps."""
    done = run("-m", "jax_flashmla", "--json", "--steps", "48", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["ok"] is True and "error" not in found
    assert [device["platform"] for device in found["devices"]] == ["gpu"] * len(jax.devices())
    assert found["kernels"]["cuda"] is True
    assert set(found["kernels"]["built"]) == {
        "flashmla_cache_append",
        "flashmla_cache_gather",
        "flashmla_dense_decode",
        "flashmla_metadata",
        "flashmla_sparse_decode",
    }
    with_kernels = [name for name in found["implementations"] if "prefill" not in name]
    assert len(with_kernels) == 7
    for name in with_kernels:
        assert found["implementations"][name] == {"implementation": "cuda", "not_cuda": []}
    assert found["self_test"] and all(case["passed"] for case in found["self_test"])
    loop = found["decode_loop"]
    assert loop["implementation"] == "cuda" and loop["cache_format"] == "plain"
    assert loop["correct"] and loop["in_place"] and not loop["moved"]
    assert loop["checked"] > 0 and loop["tokens_per_second"] > 0


def test_main_job_insists_on_kernels(tmp_path):
    sizes = "--batch 3 --steps 8 --heads 16 --layers 2 --context 200 --dtype float16".split()
    done = run("-m", "jax_flashmla", "--implementation", "cuda", *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all right"
    # No kernel for these queries: it says so at once.
    done = run(
        *("-m", "jax_flashmla", "--implementation", "cuda", "--cache-format", "fp8_v32", *sizes),
        *("--dtype", "float32"),
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "q has dtype float32" in done.stderr


def test_example_as_a_program():
    done = run("examples/decode_loop.py", "--batch", "2", "--steps", "5", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(len(line.split(":")[1].split()) == 5 for line in lines)


def test_example_generates_what_the_model_says():
    example = example_tests.load("decode_loop")
    weights = example.make_weights(jax.random.key(3))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, example.VOCABULARY, n) for n in (70, 1, 64)]
    steps = 10
    results = example.generate(weights, prompts, steps)
    assert results.shape == (3, steps)
    for prompt, result in zip(prompts, results, strict=True):
        tokens = np.concatenate([prompt, result[:-1]])
        logits = example_tests.logits_of(example, weights, tokens)[len(prompt) - 1 :]
        chosen = np.take_along_axis(logits, result[:, None], axis=-1)[:, 0]
        # The best token of the model in float64, or one that bfloat16 cannot tell from it.
        gap = logits.max(axis=-1) - chosen
        assert np.all(gap <= 0.15 * logits.std()), gap
