"""In bfloat16 through the CUDA kernels, the example computes what transformers computes.

The models are transformers' own, in float32 on the CPU, with parameters that bfloat16 has exactly;
their attention has the sizes of the public models' latents, for which there are kernels. Every
token goes to all experts, with the weights that the router gives them: a choice that rounding turns
the other way is no error, but would be the largest one here.
"""

from __future__ import annotations

import functools

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import checkpoint, model

from jax_flashmla.flax import empty_cache

pytestmark = [pytest.mark.parity, pytest.mark.gpu]

PROMPT, TOTAL, PAGE = 40, 104, 64
SIZES = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_experts_per_tok": hf_models.SHAPE["n_routed_experts"],
}
BOUND, WORST_BOUND = 4e-2, 1e-1  # of all logits together, and of those of one token
IMPLEMENTATION = "cuda"


@pytest.mark.parametrize("name", ["v2-lite", "v2", "v3"])
def test_logits_step_by_step(name, tmp_path):
    groups = {} if name == "v2-lite" else {"topk_group": hf_models.GROUPS["n_group"]}
    theirs = hf_models.build(name, **SIZES, **groups)
    tokens = np.random.default_rng(2).integers(0, hf_models.SHAPE["vocab_size"], TOTAL)
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(value.bfloat16().float())
        expected = theirs(torch.tensor(tokens[None])).logits[0].numpy()
    theirs.save_pretrained(tmp_path)
    params, config = checkpoint.load(tmp_path, jnp.bfloat16)

    tokens = tokens.astype(np.int32)
    cache = empty_cache(config.attention, 2, PAGE, num_layers=config.num_layers)
    table = np.array([[1, 0]], np.int32)
    hidden, cache = jax.jit(functools.partial(model.prefill, config=config))(
        params, tokens[:PROMPT], np.array([0, PROMPT], np.int32), cache, table
    )
    found = [*hidden]
    step = functools.partial(model.decode, config=config, implementation=IMPLEMENTATION)
    at = np.array([[PROMPT]], np.int32)
    step = jax.jit(step, donate_argnums=3).lower(params, tokens[at], at, cache, table).compile()
    if IMPLEMENTATION == "cuda":
        assert "flashmla_dense_decode" in step.as_text()
    for position in range(PROMPT, TOTAL):
        at = np.array([[position]], np.int32)
        hidden, cache = step(params, tokens[at], at, cache, table)
        found.append(hidden[0, 0])
    found = np.asarray(model.logits(params, jnp.stack(found)))

    each = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    whole = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"{name}: relative error {whole:.1e}, worst token {each.max():.1e}")
    assert whole <= BOUND and each.max() <= WORST_BOUND
