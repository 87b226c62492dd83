"""Small random models of Hugging Face transformers, and the modules of the example."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
import torch  # noqa: E402
import transformers  # noqa: E402

sys.path.append(str(Path(__file__).parents[2] / "examples" / "deepseek"))
import checkpoint  # noqa: E402, F401
import generate  # noqa: E402, F401
import model  # noqa: E402, F401

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,  # not that of the latents' norms
    "bos_token_id": None,
    "eos_token_id": None,
}


def yarn(mscale):
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,  # less than a sequence has
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


GROUPS = {"n_group": 4, "topk_group": 2}
CASES = {
    "v2-lite": (
        "V2",
        {"q_lora_rank": None, "topk_method": "greedy", "rope_parameters": yarn(0.707)},
    ),
    "v2": (
        "V2",
        GROUPS
        | {
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 4.0,
            "rope_parameters": yarn(0.707),
        },
    ),
    "v2-no-yarn-tied-no-dense": (
        "V2",
        {
            "topk_method": "greedy",
            "first_k_dense_replace": 0,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "v3": ("V3", GROUPS | {"rope_parameters": yarn(1.0)}),
    "v3-half-split-one-group": (
        "V3",
        {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "rope_parameters": yarn(1.0) | {"mscale": 0.5},
        },
    ),
}


def build(name, **sizes):
    """A model of transformers whose every parameter is random, and none negligible."""
    family, changes = CASES[name]
    config = getattr(transformers, f"Deepseek{family}Config")(**(SHAPE | changes | sizes))
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"Deepseek{family}ForCausalLM")(config).float().eval()
    rng = torch.Generator().manual_seed(list(CASES).index(name))

    def normal(value):
        return torch.randn(value.shape, generator=rng)

    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if value.ndim == 1:
                value.copy_(1 + 0.3 * normal(value))
            elif "embed_tokens" in key:
                # Small next to what layers add, or greedy decoding soon repeats one token.
                value.copy_(0.2 * normal(value))
            else:
                value.copy_(normal(value) * value.shape[-1] ** -0.5)
        for key, value in theirs.named_buffers():
            if key.endswith("e_score_correction_bias"):
                value.copy_(0.2 * normal(value))
    return theirs
