"""Tensor and data parallelism: the same model inside ``shard_map``.

The mesh has two axes. Over ``"model"`` attention is divided by heads, and dense MLPs, each expert
and the output projection by columns: every device computes a part of each layer's output, and
``psum`` adds the parts up. The latent that a token leaves in the cache is one for all heads, so the
cache is the same on all devices of that axis. Over ``"data"`` requests are divided: each part has
its own requests, its own pages and its own cache.
"""

from __future__ import annotations

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from model import CheckpointError, Config

from jax_flashmla.flax import core

DATA, MODEL = "data", "model"


def make_mesh(data: int, model: int) -> jax.sharding.Mesh:
    """A mesh of the first ``data * model`` devices.

    Raises:
      ValueError: there are not so many.
    """
    if min(data, model) < 1 or data * model > jax.device_count():
        raise ValueError(
            f"a mesh of {data} x {model} does not fit: there are {jax.device_count()} devices"
        )
    devices = jax.devices()[: data * model]
    return jax.make_mesh(
        (data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def check_divides(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises a CheckpointError if the model does not divide among the devices of the model axis."""
    devices = mesh.shape[MODEL]
    sizes = {
        "num_attention_heads": config.attention.num_heads,
        "vocab_size": config.vocab_size,
    }
    if not all(config.mixture_layers):
        sizes["intermediate_size"] = config.intermediate_size
    if config.mixture is not None:
        sizes["moe_intermediate_size"] = config.mixture.columns
    for name, size in sizes.items():
        if size % devices:
            raise CheckpointError(f"{name}={size} does not divide among {devices} devices")


def param_spec(config: Config, path: tuple[str, ...]) -> P:
    """How the parameter at ``path`` (names on the way to it in the tree) is divided."""
    *outer, name = path
    if outer == ["attention"]:
        return P(None, *core.param_specs(config.attention, MODEL)[name])  # the first axis: layers
    if outer in (["mlp"], ["experts"]):
        lead = (None,) * (1 if outer == ["mlp"] else 2)
        return P(*lead, None, MODEL) if name == "down" else P(*lead, MODEL, None)
    return P(MODEL, None) if name == "unembed" else P()


def param_specs(config: Config, params):
    """The same for a whole tree of parameters."""

    def spec(path, _):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return param_spec(config, tuple(name for name in names if name != "runs"))

    return jax.tree_util.tree_map_with_path(spec, params)


def placement(config: Config, mesh: jax.sharding.Mesh | None):
    """A function of an array of the host and its path that puts it where it belongs."""
    if mesh is None:
        return lambda array, path: jax.device_put(array)
    return lambda array, path: jax.device_put(array, NamedSharding(mesh, param_spec(config, path)))


def shard(step, mesh: jax.sharding.Mesh, config: Config, params, num_arrays: int):
    """``step(params, cache, *arrays) -> (cache, tokens)`` of one device as one of the mesh.

    Arrays are divided along their first axis over the data axis, and so is the cache along its
    pages. Inside, ``step`` has the configuration ``config.divided(mesh.shape[MODEL])``.
    """
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(param_specs(config, params), P(DATA), *(P(DATA),) * num_arrays),
        out_specs=(P(DATA), P(DATA)),
        check_vma=False,
    )
