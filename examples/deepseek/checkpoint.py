"""Reads a Hugging Face checkpoint of DeepSeek V2 or V3 from a folder."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from model import CheckpointError, Config
from parallel import check_divides, placement
from safetensors import safe_open

from jax_flashmla.flax import core, params_from_hf

FP8 = np.dtype(jnp.float8_e4m3fn)


def read_config(folder: str | Path) -> dict:
    """The contents of a checkpoint's config.json.

    Raises:
      CheckpointError: there is no such folder or file.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; expected the folder of a Hugging Face checkpoint "
            "(nothing is downloaded)"
        )
    return json.loads(path.read_text())


class Tensors(Mapping):
    """The tensors of a checkpoint by name, each read when it is asked for.

    FP8 weights with scales of blocks (V3) come dequantised, in float32; their scales have no names
    of their own here.
    """

    def __init__(self, folder: str | Path, config: dict):
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._files = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").is_file():
            self._files = dict.fromkeys(
                _open(folder / "model.safetensors").keys(), "model.safetensors"
            )
        else:
            raise CheckpointError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json"
            )
        self._shards = {}
        for name in sorted(set(self._files.values())):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: {name} is missing, which {index.name} names")
            self._shards[name] = _Shard(folder / name)
        for name, file in self._files.items():
            if name not in self._shards[file].names:
                raise CheckpointError(f"{folder}: tensor '{name}' is not in {file}")
        self._block = _block_size(config.get("quantization_config"))

    def __iter__(self) -> Iterator[str]:
        for name in self._files:
            if not (name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in self._files):
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name) -> bool:  # without reading it
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return self._shards[self._files[name]].shape(name)

    def __getitem__(self, name: str) -> np.ndarray:
        value = self._shards[self._files[name]].read(name)
        scale = f"{name}_scale_inv"
        if scale in self._files:
            return dequantise(
                name, value, self._shards[self._files[scale]].read(scale), self._block
            )
        if value.dtype == FP8:
            raise CheckpointError(f"tensor '{name}' is FP8 and its scales '{scale}' are missing")
        return value


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except Exception as error:  # the library has an exception of its own for a damaged file
        raise CheckpointError(f"{path} cannot be read: {error}") from error


class _Shard:
    """One file. Tensors are mapped and not held."""

    def __init__(self, path: Path):
        self._path, self._file = path, _open(path)
        self.names = set(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        if self._file.get_slice(name).get_dtype() != "F8_E4M3":
            return self._file.get_tensor(name)
        begin, end = self._places[name]["data_offsets"]
        with open(self._path, "rb") as file:
            file.seek(self._start + begin)
            return np.frombuffer(file.read(end - begin), FP8).reshape(self.shape(name))

    # safetensors (0.8) has no FP8 for numpy, so FP8 tensors are read without it. A file begins with
    # a length in 8 bytes and that many bytes of JSON, which say where after them each tensor is.

    @functools.cached_property
    def _start(self) -> int:
        with open(self._path, "rb") as file:
            return 8 + int.from_bytes(file.read(8), "little")

    @functools.cached_property
    def _places(self) -> dict:
        with open(self._path, "rb") as file:
            return json.loads(file.read(self._start)[8:])


def _block_size(quantization: dict | None) -> tuple[int, int] | None:
    if quantization is None:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3" or block is None:
        raise CheckpointError(
            f"config.json: 'quantization_config' is {quantization}, which is not implemented; "
            "expected quant_method 'fp8' of format 'e4m3' with a weight_block_size"
        )
    return tuple(block)


def dequantise(name: str, weight, scale, block: tuple[int, int] | None) -> np.ndarray:
    """The float32 weight [n, k] of a quantised one and of its scales, one for each block of it."""
    if block is None:
        raise CheckpointError(
            f"tensor '{name}' has scales, but config.json has no 'quantization_config'"
        )
    blocks = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if scale.shape != blocks:
        raise CheckpointError(
            f"tensor '{name}_scale_inv' has shape {scale.shape}; expected {blocks}, for a weight "
            f"of shape {weight.shape} in blocks of {block}"
        )
    rows, columns = weight.shape
    scale = np.repeat(scale.astype(np.float32), block[0], axis=0)[:rows]
    return weight.astype(np.float32) * np.repeat(scale, block[1], axis=1)[:, :columns]


# ---------------------------------------------------------------------------------------------
# What a model needs


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a checkpoint of this model has."""
    attention, mixture = config.attention, config.mixture
    hidden, heads, latent = attention.hidden_size, attention.num_heads, attention.kv_lora_rank
    nope, rope, value = (
        attention.qk_nope_head_dim,
        attention.qk_rope_head_dim,
        attention.v_head_dim,
    )
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)

    def mlp(prefix: str, columns: int) -> None:
        for name in ("gate", "up"):
            shapes[f"{prefix}.{name}_proj.weight"] = (columns, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, columns)

    for layer, is_mixture in enumerate(config.mixture_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        own = f"{prefix}.self_attn"
        rank = attention.q_lora_rank
        if rank is None:
            shapes[f"{own}.q_proj.weight"] = (heads * (nope + rope), hidden)
        else:
            shapes[f"{own}.q_a_proj.weight"] = (rank, hidden)
            shapes[f"{own}.q_a_layernorm.weight"] = (rank,)
            shapes[f"{own}.q_b_proj.weight"] = (heads * (nope + rope), rank)
        shapes[f"{own}.kv_a_proj_with_mqa.weight"] = (latent + rope, hidden)
        shapes[f"{own}.kv_a_layernorm.weight"] = (latent,)
        shapes[f"{own}.kv_b_proj.weight"] = (heads * (nope + value), latent)
        shapes[f"{own}.o_proj.weight"] = (hidden, heads * value)
        if not is_mixture:
            mlp(f"{prefix}.mlp", config.intermediate_size)
            continue
        shapes[f"{prefix}.mlp.gate.weight"] = (mixture.num_experts, hidden)
        if mixture.scores == "sigmoid":
            shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (mixture.num_experts,)
        if mixture.num_shared:
            mlp(f"{prefix}.mlp.shared_experts", mixture.num_shared * mixture.columns)
        for expert in range(mixture.num_experts):
            mlp(f"{prefix}.mlp.experts.{expert}", mixture.columns)
    return shapes


def _check(tensors: Tensors, config: Config) -> None:
    expected = expected_shapes(config)

    def ignored(name: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return (
            name.endswith(".rotary_emb.inv_freq")  # follows from the config
            or (config.tied and name == "lm_head.weight")
            # Layers past the last one predict further tokens (MTP), which this example does not.
            or (layer is not None and int(layer[1]) >= config.num_layers)
        )

    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected and not ignored(name)]
    for what, names in (("are missing", missing), ("belong to no layer of the model", extra)):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise CheckpointError(f"{len(names)} tensors {what}: {shown}")
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            raise CheckpointError(
                f"tensor '{name}' has shape {tensors.shape(name)}; expected {shape} by config.json"
            )


def load(folder: str | Path, dtype=None, mesh: jax.sharding.Mesh | None = None):
    """Reads a checkpoint. One array at a time is on the host (and a run's attention layers).

    Args:
      folder: with config.json and model.safetensors, or its shards and their index.
      dtype: of parameters and computation; by default the one in config.json.
      mesh: of ``parallel.make_mesh``, to divide the parameters; by default one device has them all.

    Returns:
      The parameters, as described in ``model.py``, and the configuration.

    Raises:
      CheckpointError: a file or tensor is missing, is one too many, has a wrong shape, or is of a
        model or quantisation that is not implemented.
    """
    hf_config = read_config(folder)
    config = Config.from_hf(hf_config, dtype)
    tensors = Tensors(folder, hf_config)
    _check(tensors, config)
    if mesh is not None:
        check_divides(config, mesh)
    place = placement(config, mesh)
    param_dtype = config.attention.param_dtype

    def stack(names: list, path: tuple, dtype=param_dtype, *shape: int):
        """Tensors of one shape as one array, [*shape, ...] or [names, ...]."""
        result = np.empty((len(names), *tensors.shape(names[0])), dtype)
        for row, name in zip(result, names, strict=True):
            row[...] = tensors[name]
        return place(result.reshape(*shape, *result.shape[1:]) if shape else result, path)

    def single(name: str, key: str):
        return place(tensors[name].astype(param_dtype), (key,))

    def mlp(prefixes: list[str], path: tuple, *shape: int) -> dict:
        return {
            key: stack(
                [f"{p}.{key}_proj.weight" for p in prefixes], (*path, key), param_dtype, *shape
            )
            for key in ("gate", "up", "down")
        }

    def run(is_mixture: bool, layers: range) -> dict:
        prefixes = [f"model.layers.{layer}" for layer in layers]
        attention = [
            # On the host, since all layers together may not fit on one device.
            jax.tree.map(
                np.asarray, params_from_hf(tensors, config.attention, prefix=f"{p}.self_attn.")
            )
            for p in prefixes
        ]
        result = {
            "attention": {
                key: place(np.stack([layer[key] for layer in attention]), ("attention", key))
                for key in core.param_shapes(config.attention)
            },
        }
        del attention
        for ours, theirs in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            result[ours] = stack([f"{p}.{theirs}.weight" for p in prefixes], (ours,))
        if not is_mixture:
            return result | {"mlp": mlp([f"{p}.mlp" for p in prefixes], ("mlp",))}
        mixture = config.mixture
        gates = [f"{p}.mlp.gate" for p in prefixes]
        result["router"] = stack([f"{g}.weight" for g in gates], ("router",), np.float32)
        if mixture.scores == "sigmoid":
            names = [f"{g}.e_score_correction_bias" for g in gates]
            result["router_bias"] = stack(names, ("router_bias",), np.float32)
        if mixture.num_shared:
            result["mlp"] = mlp([f"{p}.mlp.shared_experts" for p in prefixes], ("mlp",))
        numbers = range(mixture.num_experts)
        names = [f"{p}.mlp.experts.{i}" for p in prefixes for i in numbers]
        result["experts"] = mlp(names, ("experts",), len(prefixes), len(numbers))
        return result

    params = {
        "embed": single("model.embed_tokens.weight", "embed"),
        "runs": [run(*kind_and_layers) for kind_and_layers in config.runs],
        "norm": single("model.norm.weight", "norm"),
        "unembed": single(
            "model.embed_tokens.weight" if config.tied else "lm_head.weight", "unembed"
        ),
    }
    return params, config
