"""What a layer of multi-head latent attention needs to know of its model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_LAYOUTS = ("interleaved", "half_split")

# The model types (the key of that name in config.json) whose attention is what `core` computes.
# An unknown one may differ where its numbers do not show it, so it is refused.
_MODEL_TYPES = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "kimi_k2",
    "longcat_flash",
    "glm4_moe_lite",
    "glm_moe_dsa",
)


def _check_number(op: str, name: str, value: Any, minimum: float, *, above: bool = False) -> float:
    value = _checks.check_scale(op, name, value)
    if value < minimum or (above and value == minimum):
        raise ValueError(
            f"{op}: argument '{name}' is {value}; expected a number {'>' if above else '>='} "
            f"{minimum:g}"
        )
    return value


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention factor, ``0.1 * mscale * ln(factor) + 1``, and 1 without extension."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN's extension of RoPE to longer contexts (arXiv 2309.00071), as in DeepSeek's models.

    Attributes:
      factor: how many times longer the context becomes.
      original_max_position_embeddings: context length before the extension.
      beta_fast: dimensions that turn more often than this within the original context keep their
        frequency.
      beta_slow: dimensions that turn less often are slowed down by ``factor``. Those in between
        are blended.
      mscale: with mscale_all_dim, the length of rotated vectors: cos and sin are multiplied by
        ``yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)``.
      mscale_all_dim: multiplies the softmax scale by ``yarn_mscale(factor, mscale_all_dim) ** 2``.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        op = "YarnScaling"
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "factor", _check_number(op, "factor", self.factor, 1))
        name = "original_max_position_embeddings"
        set_field(self, name, _checks.check_int(op, name, getattr(self, name), 1))
        for name in ("beta_fast", "beta_slow"):
            set_field(self, name, _check_number(op, name, getattr(self, name), 0, above=True))
        for name in ("mscale", "mscale_all_dim"):
            set_field(self, name, _check_number(op, name, getattr(self, name), 0))
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"{op}: argument 'beta_fast' is {self.beta_fast}; expected at least "
                f"beta_slow={self.beta_slow}"
            )


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Dimensions and constants of a layer of multi-head latent attention. Hashable, so static.

    Names follow Hugging Face's config.json. Make one of such a file with `from_hf_config`, or of a
    public model's name with `preset`; change fields with ``dataclasses.replace``.

    Attributes:
      hidden_size: columns of the layer's input and output.
      num_heads: query heads.
      kv_lora_rank: columns of the latent that a token leaves in the cache.
      qk_nope_head_dim: columns of a head's queries and keys that are not rotated.
      qk_rope_head_dim: columns that are, even. A token's rotated key is shared by all heads and is
        in the cache after its latent.
      v_head_dim: columns of a head's values.
      q_lora_rank: columns of the queries' latent; None for queries straight from the input.
      rope_theta: base of RoPE's wavelengths.
      rope_scaling: None, or a `YarnScaling`.
      rope_layout: which columns of a head turn together: ``"interleaved"`` (2i and 2i + 1, as in
        the checkpoints of all presets) or ``"half_split"`` (i and i + qk_rope_head_dim / 2).
      rms_norm_eps: epsilon of the RMS norms of the two latents.
      q_scale: factor of the queries (LongCat), else 1.
      kv_scale: factor of the latent after its norm (LongCat), else 1. The cache holds the product.
      dtype: bfloat16, float16 or float32, in which the layer computes and what it returns.
      param_dtype: the dtype of parameters.
    """

    hidden_size: int
    num_heads: int
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    q_lora_rank: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    rope_layout: str = "interleaved"
    rms_norm_eps: float = 1e-6
    q_scale: float = 1.0
    kv_scale: float = 1.0
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16

    def __post_init__(self):
        op = "MLAConfig"
        set_field = object.__setattr__  # the dataclass is frozen
        for name in (
            "hidden_size",
            "num_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        ):
            set_field(self, name, _checks.check_int(op, name, getattr(self, name), 1))
        if self.q_lora_rank is not None:
            rank = _checks.check_int(op, "q_lora_rank", self.q_lora_rank, 1)
            set_field(self, "q_lora_rank", rank)
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"{op}: argument 'qk_rope_head_dim' is {self.qk_rope_head_dim}; expected an even "
                "number, since columns are rotated in pairs"
            )
        set_field(
            self, "rope_theta", _check_number(op, "rope_theta", self.rope_theta, 1, above=True)
        )
        for name in ("rms_norm_eps", "q_scale", "kv_scale"):
            set_field(self, name, _check_number(op, name, getattr(self, name), 0, above=True))
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, YarnScaling):
            raise ValueError(
                f"{op}: argument 'rope_scaling' is a {type(self.rope_scaling).__name__}; expected "
                "None or a YarnScaling (from_hf_config reads the dict of a config.json)"
            )
        _checks.check_choice(op, "rope_layout", self.rope_layout, _LAYOUTS)
        for name in ("dtype", "param_dtype"):
            set_field(self, name, _check_float_dtype(op, name, getattr(self, name)))

    @property
    def softmax_scale(self) -> float:
        """Factor of the scores: that of the head before absorption, times YaRN's mscale squared."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.rope_scaling is not None:
            yarn = self.rope_scaling
            scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
        return scale

    @property
    def cache_dim(self) -> int:
        """Columns of a token in the cache: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], **overrides: Any) -> MLAConfig:
        """Reads the config.json of a Hugging Face checkpoint.

        Model types: deepseek_v2, deepseek_v3 (also R1 and V3.1), deepseek_v32, kimi_k2 (also as the
        ``text_config`` of a larger model), longcat_flash, glm4_moe_lite (GLM-4.7-Flash) and
        glm_moe_dsa (GLM-5).

        ``rms_norm_eps`` of the result is 1e-6 whatever the file says: the model code in
        transformers gives the norms of the two latents that value, and the file's one only to the
        norms around the layer.

        Args:
          config: the file's contents.
          **overrides: fields that are set to something else, such as ``dtype``.

        Raises:
          ValueError: a key is missing or has a value that no model of these has; the message names
            it.
          NotImplementedError: another model type, another kind of RoPE scaling, or biases.
        """
        op = "MLAConfig.from_hf_config"
        if not isinstance(config, Mapping):
            raise ValueError(
                f"{op}: argument 'config' is a {type(config).__name__}; expected the dict that "
                "json.load makes of a config.json"
            )
        if "kv_lora_rank" not in config and isinstance(config.get("text_config"), Mapping):
            config = config["text_config"]
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise NotImplementedError(
                f"{op}: 'model_type' is {model_type!r}; expected one of {', '.join(_MODEL_TYPES)}"
            )

        def required(key: str) -> Any:
            if key not in config:
                raise ValueError(f"{op}: key '{key}' is missing from a {model_type} config")
            return config[key]

        if config.get("attention_bias"):
            raise NotImplementedError(
                f"{op}: 'attention_bias' is {config['attention_bias']!r}; projections with biases "
                "are not implemented, expected false"
            )
        fields: dict[str, Any] = {
            name: required(name)
            for name in (
                "hidden_size",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
                "q_lora_rank",
            )
        }
        fields["num_heads"] = required("num_attention_heads")
        # transformers 5 puts all of RoPE into one dict, older files are flat.
        scaling = config.get("rope_parameters") or config.get("rope_scaling")
        if scaling is not None and not isinstance(scaling, Mapping):
            raise ValueError(
                f"{op}: 'rope_scaling' is a {type(scaling).__name__}; expected a dict or null"
            )
        theta = config.get("rope_theta", (scaling or {}).get("rope_theta"))
        if theta is None:
            raise ValueError(f"{op}: key 'rope_theta' is missing from a {model_type} config")
        fields["rope_theta"] = theta
        fields["rope_scaling"] = _read_rope_scaling(op, scaling)
        interleaved = config.get("rope_interleave", True)
        fields["rope_layout"] = "interleaved" if interleaved else "half_split"
        if model_type == "longcat_flash":
            fields |= _longcat_scales(config)
        dtype = config.get("dtype", config.get("torch_dtype"))
        if dtype is not None:
            fields["dtype"] = fields["param_dtype"] = dtype
        return cls(**(fields | overrides))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MLAConfig:
        """The configuration of a public model.

        Args:
          name: ``"deepseek-v2"`` (236B), ``"deepseek-v2-lite"``, ``"deepseek-v3"`` (V3, V3.1 and
            R1), ``"deepseek-v3.2"``, ``"kimi-k2"``, ``"kimi-k2-0905"``, ``"longcat-flash"``,
            ``"glm-4.7-flash"`` or ``"glm-5"``.
          **overrides: fields that are set to something else, such as ``dtype``.

        Raises:
          ValueError: no such preset.
        """
        _checks.check_choice("MLAConfig.preset", "name", name, tuple(PRESETS))
        return dataclasses.replace(PRESETS[name], **overrides)


def _check_float_dtype(op: str, name: str, value: Any) -> np.dtype:
    allowed = {np.dtype(dtype).name: np.dtype(dtype) for dtype in _DTYPES}
    try:
        found = np.dtype(getattr(jnp, value) if isinstance(value, str) else value).name
    except (AttributeError, TypeError):
        found = repr(value)
    if found not in allowed:
        raise ValueError(
            f"{op}: argument '{name}' is {found}; expected one of {', '.join(allowed)}"
        )
    return allowed[found]


def _read_rope_scaling(op: str, scaling: Mapping[str, Any] | None) -> YarnScaling | None:
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("yarn", "deepseek_yarn"):
        raise NotImplementedError(
            f"{op}: 'rope_scaling' is of type {kind!r}; expected 'yarn' or none at all"
        )
    # None of the models has these, and they would change what is computed.
    for key, usual in (("attention_factor", None), ("truncate", True)):
        if scaling.get(key, usual) != usual:
            raise NotImplementedError(
                f"{op}: 'rope_scaling' has {key}={scaling[key]!r}; expected {usual}"
            )
    for key in ("factor", "original_max_position_embeddings"):
        if scaling.get(key) is None:
            raise ValueError(f"{op}: key '{key}' is missing from 'rope_scaling'")
    names = [field.name for field in dataclasses.fields(YarnScaling)]
    return YarnScaling(**{key: scaling[key] for key in names if scaling.get(key) is not None})


def _longcat_scales(config: Mapping[str, Any]) -> dict[str, float]:
    """LongCat scales queries and latents up to the variance of the hidden state."""
    scales = {}
    for ours, rank, switch in (
        ("q_scale", "q_lora_rank", "mla_scale_q_lora"),
        ("kv_scale", "kv_lora_rank", "mla_scale_kv_lora"),
    ):
        if config.get(switch, True) and config[rank] is not None:
            scales[ours] = (config["hidden_size"] / config[rank]) ** 0.5
    return scales


def _deepseek_yarn(mscale: float) -> YarnScaling:
    return YarnScaling(40.0, 4096, mscale=mscale, mscale_all_dim=mscale)


def _kimi_yarn(factor: float) -> YarnScaling:
    return YarnScaling(factor, 4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0)


# Each with the public sources that its numbers were compared with. Those have mscale; that
# mscale_all_dim is the same is what copies of the config.json of V2-Lite, V3 and Kimi K2 say.
PRESETS: dict[str, MLAConfig] = {
    # AI-Hypercomputer/maxtext, configs/models/deepseek2-236b.yml.
    "deepseek-v2": MLAConfig(
        hidden_size=5120, num_heads=128, q_lora_rank=1536, rope_scaling=_deepseek_yarn(0.707)
    ),
    # AI-Hypercomputer/maxtext, configs/models/deepseek2-16b.yml.
    "deepseek-v2-lite": MLAConfig(
        hidden_size=2048, num_heads=16, rope_scaling=_deepseek_yarn(0.707)
    ),
    # deepseek-ai/DeepSeek-V3, inference/configs/config_671B.json; YaRN as in V3.2, with which
    # maxtext says it is identical.
    "deepseek-v3": MLAConfig(
        hidden_size=7168, num_heads=128, q_lora_rank=1536, rope_scaling=_deepseek_yarn(1.0)
    ),
    # AI-Hypercomputer/maxtext, configs/models/deepseek3.2-671b.yml; huggingface/transformers,
    # models/deepseek_v32 (its defaults are the dimensions of V3.2-Exp).
    "deepseek-v3.2": MLAConfig(
        hidden_size=7168, num_heads=128, q_lora_rank=1536, rope_scaling=_deepseek_yarn(1.0)
    ),
    # AI-Hypercomputer/maxtext, configs/models/kimi-k2-1t.yml. That beta_fast is 1 is no mistake.
    "kimi-k2": MLAConfig(
        hidden_size=7168,
        num_heads=64,
        q_lora_rank=1536,
        rope_theta=50000.0,
        rope_scaling=_kimi_yarn(32.0),
    ),
    # The config.json of moonshotai/Kimi-K2-Instruct-0905, as ParagEkbote/hf-model-inspector
    # (model_inspection_report.md) shows it.
    "kimi-k2-0905": MLAConfig(
        hidden_size=7168,
        num_heads=64,
        q_lora_rank=1536,
        rope_theta=50000.0,
        rope_scaling=_kimi_yarn(64.0),
    ),
    # huggingface/transformers, models/longcat_flash (its defaults are those of LongCat-Flash-Chat).
    "longcat-flash": MLAConfig(
        hidden_size=6144,
        num_heads=64,
        q_lora_rank=1536,
        rope_theta=1e7,
        q_scale=(6144 / 1536) ** 0.5,
        kv_scale=(6144 / 512) ** 0.5,
    ),
    # huggingface/transformers, models/glm4_moe_lite (dimensions); blap/Mod,
    # src/inference_pio/models/glm_4_7_flash/config.py (rope_theta).
    "glm-4.7-flash": MLAConfig(
        hidden_size=2048,
        num_heads=20,
        q_lora_rank=768,
        qk_nope_head_dim=192,
        v_head_dim=256,
        rope_theta=1e6,
    ),
    # jd-opensource/xllm, xllm/models/llm/glm5.h; huggingface/transformers, models/glm_moe_dsa
    # (dimensions).
    "glm-5": MLAConfig(
        hidden_size=6144,
        num_heads=64,
        q_lora_rank=2048,
        qk_nope_head_dim=192,
        v_head_dim=256,
        rope_theta=1e6,
    ),
}
