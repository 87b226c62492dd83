"""examples/deepseek on GPUs: through the kernels, and over all GPUs that there are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")

from test_deepseek_example import (  # noqa: E402
    V2,
    V3,
    checkpoint,
    engine_of,
    expected_logits,
    generate,
    make_tensors,
    parallel,
    requests_of,
    write,
)

pytestmark = pytest.mark.gpu

# Latents for which there are kernels.
SIZES = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
MARGIN = 0.25  # of logits that reach 7; how far below the best one bfloat16 may choose


@pytest.fixture(scope="module", params=["v2", "v3"])
def written(request, tmp_path_factory):
    hf = {"v2": V2, "v3": V3}[request.param] | SIZES
    tensors = make_tensors(hf)
    return hf, tensors, write(tmp_path_factory.mktemp("models") / request.param, hf, tensors)


def meshes():
    n = jax.device_count()
    return [None, *(parallel.make_mesh(*shape) for shape in {(1, n), (n, 1)})]


def generated(folder, dtype, mesh, **options):
    params, config = checkpoint.load(folder, dtype, mesh)
    options = {"page_size": 64, "num_pages": 4, "max_batch": 4, "mesh": mesh} | options
    engine = engine_of(params, config, **options)
    requests = requests_of()
    engine.generate(requests)
    return engine, requests


def test_float32_gives_the_same_tokens_on_all_gpus(written):
    """Tensor and data parallel; float32 runs through XLA."""
    hf, tensors, folder = written
    with jax.default_matmul_precision("highest"):
        runs = [generated(folder, jnp.float32, mesh)[1] for mesh in meshes()]
    for requests in runs:
        assert [r.tokens for r in requests] == [r.tokens for r in runs[0]]
    for request in runs[0]:
        assert gap(hf, tensors, request) < 1e-3


def test_bfloat16_through_the_kernels(written):
    hf, tensors, folder = written
    for mesh in meshes():
        engine, requests = generated(folder, jnp.bfloat16, mesh, implementation="cuda")
        [decode] = [p for (step, _), p in engine.programs.items() if step is generate.decode_step]
        assert "flashmla_dense_decode" in decode.as_text()
        gaps = [gap(hf, tensors, request) for request in requests]
        print(mesh and mesh.shape, "largest gap", max(gaps))
        assert max(gaps) < MARGIN


def gap(hf, tensors, request):
    """How far the chosen tokens are below the best ones, by the model in numpy."""
    tokens = np.array([*request.prompt, *request.tokens[:-1]])
    logits = expected_logits(hf, tensors, tokens)[len(request.prompt) - 1 :]
    chosen = np.take_along_axis(logits, np.array(request.tokens)[:, None], axis=-1)[:, 0]
    return np.max(logits.max(axis=-1) - chosen)
