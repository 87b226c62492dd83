"""The examples run, and what they compute is right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load("decode_loop")


def logits_of(example, weights, tokens):
    """The example's model in numpy, of one whole sequence: heads with keys and values of their own.

    Nothing here is paged, cached or absorbed.
    """
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    n = len(tokens)
    half = example.ROPE // 2
    angles = np.arange(n)[:, None] * 10000.0 ** -(np.arange(half) / half)

    def norm(x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def rope(x):
        pairs = x[..., :half] + 1j * x[..., half:]
        pairs = pairs * np.exp(1j * angles).reshape(n, *(1,) * (x.ndim - 2), half)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    x = w["embed"][tokens]
    for i in range(example.LAYERS):
        layer = {name: value[i] for name, value in w["layers"].items()}
        hidden = norm(x)
        latent = norm(hidden @ layer["down"][:, : example.LATENT])
        shared = rope(hidden @ layer["down"][:, example.LATENT :])
        q = np.einsum("nm,mhd->nhd", hidden, layer["query"])
        q_nope, q_rope = q[..., : example.NOPE], rope(q[..., example.NOPE :])
        keys = np.einsum("nl,lhd->nhd", latent, layer["up_key"])
        values = np.einsum("nl,lhd->nhd", latent, layer["up_value"])
        scores = np.einsum("qhd,khd->hqk", q_nope, keys) + np.einsum("qhd,kd->hqk", q_rope, shared)
        scores = scores * (example.NOPE + example.ROPE) ** -0.5
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, values).reshape(n, -1) @ layer["output"]
    return norm(x) @ w["unembed"].T


def test_decode_loop_generates_what_the_model_says(example, monkeypatch):
    monkeypatch.setattr(example, "PAGE", 16)  # so that requests take several pages as they grow
    monkeypatch.setattr(example, "HEADS", 4)
    monkeypatch.setattr(example, "VOCABULARY", 200)
    weights = example.make_weights(jax.random.key(3), jnp.float32)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 200, n) for n in (30, 1, 16)]
    steps = 20
    results = example.generate(weights, prompts, steps, jnp.float32)
    assert results.shape == (3, steps) and results.dtype == np.int32
    for prompt, result in zip(prompts, results, strict=True):
        logits = logits_of(example, weights, np.concatenate([prompt, result[:-1]]))
        logits = logits[len(prompt) - 1 :]
        chosen = np.take_along_axis(logits, result[:, None], axis=-1)[:, 0]
        # The best token, or one that only rounding tells from it.
        assert np.all(logits.max(axis=-1) - chosen <= 1e-5)
    assert len(np.unique(results)) > 3  # the comparison is not of one token throughout


def test_decode_loop_as_a_program():
    command = [sys.executable, "examples/decode_loop.py", "--batch", "2", "--steps", "3"]
    # The package that the tests import, installed or not.
    env = {**os.environ, "PYTHONPATH": str(Path(jax_flashmla.__file__).parents[1])}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(len(line.split(":")[1].split()) == 3 for line in lines)


def test_decode_loop_is_short():
    assert len((ROOT / "examples" / "decode_loop.py").read_text().splitlines()) < 150
