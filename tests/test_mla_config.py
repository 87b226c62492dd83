"""MLAConfig: validation, what is derived, reading config.json, presets."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import pytest

from jax_flashmla.flax import MLAConfig, YarnScaling

# The attention part of deepseek-ai/DeepSeek-V3's config.json.
V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "torch_dtype": "bfloat16",
}


def changed(**changes):
    return {key: value for key, value in (V3 | changes).items() if value is not ...}


def test_softmax_scale():
    config = MLAConfig(64, 4)
    assert config.softmax_scale == 192**-0.5
    assert MLAConfig.preset("deepseek-v3").softmax_scale == pytest.approx(
        192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    )
    assert MLAConfig.preset("deepseek-v2-lite").softmax_scale == pytest.approx(
        192**-0.5 * (0.0707 * math.log(40) + 1) ** 2
    )
    # DeepSeek's default: mscale_all_dim = 0 leaves the scores alone.
    assert MLAConfig(64, 4, rope_scaling=YarnScaling(40, 4096)).softmax_scale == 192**-0.5
    assert MLAConfig.preset("glm-5").softmax_scale == 256**-0.5


def test_it_is_hashable_and_compares_by_value():
    a, b = (MLAConfig(64, 4, dtype=dtype) for dtype in ("float32", jnp.float32))
    assert a == b and hash(a) == hash(b)
    assert a != dataclasses.replace(a, num_heads=8)
    assert a.cache_dim == 576


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", 0),
        ("num_heads", 2.0),
        ("kv_lora_rank", -1),
        ("qk_nope_head_dim", None),
        ("qk_rope_head_dim", 63),
        ("v_head_dim", "128"),
        ("q_lora_rank", 0),
        ("rope_theta", 1.0),
        ("rope_theta", float("nan")),
        ("rope_scaling", {"factor": 40}),
        ("rope_layout", "neox"),
        ("rms_norm_eps", 0.0),
        ("q_scale", "big"),
        ("kv_scale", -1.0),
        ("dtype", "float64"),
        ("param_dtype", "no_such"),
    ],
)
def test_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"MLAConfig: argument '{field}' is"):
        MLAConfig(**({"hidden_size": 64, "num_heads": 4} | {field: value}))


@pytest.mark.parametrize(
    "field, value",
    [
        ("factor", 0.5),
        ("original_max_position_embeddings", 0),
        ("beta_fast", 0.5),
        ("beta_slow", 0.0),
        ("mscale", -1.0),
        ("mscale_all_dim", None),
    ],
)
def test_errors_of_yarn_name_the_field(field, value):
    fields = {"factor": 40, "original_max_position_embeddings": 4096, field: value}
    with pytest.raises(ValueError, match=f"YarnScaling: argument '{field}' is"):
        YarnScaling(**fields)


def test_hf_config_of_deepseek_v3():
    assert MLAConfig.from_hf_config(V3) == MLAConfig.preset("deepseek-v3")
    assert MLAConfig.from_hf_config(changed(model_type="deepseek_v32")) == MLAConfig.preset(
        "deepseek-v3.2"
    )


def test_hf_config_of_transformers_5():
    """All of RoPE in one dict, and another name of the dtype."""
    rope = {"rope_theta": 10000, "rope_type": "yarn", **V3["rope_scaling"]}
    config = changed(
        rope_theta=..., rope_scaling=..., torch_dtype=..., rope_parameters=rope, dtype="float32"
    )
    expected = MLAConfig.preset("deepseek-v3", dtype="float32", param_dtype="float32")
    assert MLAConfig.from_hf_config(config) == expected


def test_hf_config_of_v2_lite_has_no_query_latent():
    scaling = V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}
    config = changed(
        model_type="deepseek_v2",
        hidden_size=2048,
        num_attention_heads=16,
        q_lora_rank=None,
        rope_scaling=scaling,
    )
    assert MLAConfig.from_hf_config(config) == MLAConfig.preset("deepseek-v2-lite")


@pytest.mark.parametrize("name, factor", [("kimi-k2", 32.0), ("kimi-k2-0905", 64.0)])
def test_hf_config_of_kimi(name, factor):
    scaling = V3["rope_scaling"] | {"factor": factor, "beta_fast": 1.0}
    config = changed(
        model_type="kimi_k2", num_attention_heads=64, rope_theta=50000.0, rope_scaling=scaling
    )
    assert MLAConfig.from_hf_config(config) == MLAConfig.preset(name)
    whole = {"model_type": "kimi_k25", "text_config": config}
    assert MLAConfig.from_hf_config(whole) == MLAConfig.preset(name)


def test_hf_config_of_longcat():
    config = changed(
        model_type="longcat_flash",
        hidden_size=6144,
        num_attention_heads=64,
        rope_theta=1e7,
        rope_scaling=None,
        rms_norm_eps=1e-5,
    )
    preset = MLAConfig.preset("longcat-flash")
    assert MLAConfig.from_hf_config(config) == preset
    assert (preset.q_scale, preset.kv_scale) == (2.0, 12**0.5)
    unscaled = config | {"mla_scale_q_lora": False, "mla_scale_kv_lora": False}
    assert MLAConfig.from_hf_config(unscaled).q_scale == 1.0
    assert MLAConfig.from_hf_config(unscaled).kv_scale == 1.0


@pytest.mark.parametrize(
    "name, changes",
    [
        ("glm-4.7-flash", ("glm4_moe_lite", 2048, 20, 768)),
        ("glm-5", ("glm_moe_dsa", 6144, 64, 2048)),
    ],
)
def test_hf_config_of_glm(name, changes):
    keys = ("model_type", "hidden_size", "num_attention_heads", "q_lora_rank")
    config = changed(
        **dict(zip(keys, changes, strict=True)),
        qk_nope_head_dim=192,
        v_head_dim=256,
        rope_theta=...,
        rope_scaling=...,
        rope_parameters={"rope_theta": 1000000, "rope_type": "default"},
    )
    assert MLAConfig.from_hf_config(config) == MLAConfig.preset(name)


def test_hf_config_overrides_and_layout():
    config = MLAConfig.from_hf_config(changed(rope_interleave=False), dtype="float32")
    assert config.rope_layout == "half_split"
    assert config.dtype == jnp.float32 and config.param_dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"model_type": "llama"}, NotImplementedError, "'model_type' is 'llama'; expected one of"),
        ({"model_type": ...}, NotImplementedError, "'model_type' is None"),
        ({"kv_lora_rank": ...}, ValueError, "key 'kv_lora_rank' is missing from a deepseek_v3"),
        ({"q_lora_rank": ...}, ValueError, "key 'q_lora_rank' is missing"),
        ({"num_attention_heads": ...}, ValueError, "key 'num_attention_heads' is missing"),
        ({"rope_theta": ...}, ValueError, "key 'rope_theta' is missing"),
        ({"hidden_size": "big"}, ValueError, "argument 'hidden_size' is 'big'"),
        ({"attention_bias": True}, NotImplementedError, "'attention_bias' is True"),
        ({"rope_scaling": 40}, ValueError, "'rope_scaling' is a int"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            NotImplementedError,
            "'rope_scaling' is of type 'linear'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, ValueError, "key 'original_max_"),
        (
            {"rope_scaling": V3["rope_scaling"] | {"attention_factor": 2.0}},
            NotImplementedError,
            "attention_factor=2.0",
        ),
        (
            {"rope_scaling": V3["rope_scaling"] | {"truncate": False}},
            NotImplementedError,
            "truncate=False",
        ),
    ],
)
def test_hf_configs_that_are_refused(changes, error, text):
    with pytest.raises(error, match=text):
        MLAConfig.from_hf_config(changed(**changes))


def test_hf_config_that_is_no_dict():
    with pytest.raises(ValueError, match="'config' is a str"):
        MLAConfig.from_hf_config("config.json")


def test_unknown_preset():
    with pytest.raises(ValueError, match="'name' is 'gpt-2'; expected one of 'deepseek-v2'"):
        MLAConfig.preset("gpt-2")
