"""Sparse decode, caches and layers through the kernels, over all GPUs that there are.

Of one GPU a mesh is made as well: what is divided then is not, but runs inside shard_map.
"""

import jax
import jax.numpy as jnp
import pytest
import sharded_checks as checks
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_gpu_models import CONFIGS, TOLERANCE

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpus():
    return jax.devices("cuda")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", checks.SPARSE_CASES)
def test_sparse_decode_under_jit(gpus, name, kind):
    for shape in checks.meshes(gpus):
        checks.check_sparse_under_jit(gpus, shape, name, kind, "cuda")


@pytest.mark.parametrize("name", checks.SPARSE_CASES)
def test_sparse_decode_in_shard_map(gpus, name):
    for shape in checks.meshes(gpus):
        checks.check_sparse_in_shard_map(gpus, shape, name, "cuda")


@pytest.mark.parametrize("fused", [False, True], ids=["stored", "fused"])
@pytest.mark.parametrize("cache_format", checks.FORMATS)
def test_caches_in_shard_map(gpus, cache_format, fused):
    for shape in checks.meshes(gpus):
        checks.check_caches_in_shard_map(gpus, shape, cache_format, fused, "cuda")


def test_heads_of_a_cache_in_shard_map(gpus):
    checks.check_heads_of_a_cache_in_shard_map(gpus, "cuda")


@pytest.mark.parametrize("fused", [False, True], ids=["stored", "fused"])
@pytest.mark.parametrize("spec", [P(), P("data")], ids=["whole", "pages"])
@pytest.mark.parametrize("cache_format", checks.FORMATS)
def test_caches_under_jit(gpus, cache_format, spec, fused):
    """Where XLA divides a cache, it writes and reads it itself; of one GPU there is no dividing."""
    with_kernel = checks.check_caches_under_jit(gpus, cache_format, spec, fused)
    if len(gpus) == 1:
        jax.block_until_ready(with_kernel())
    else:
        with pytest.raises(NotImplementedError, match="several devices.*shard_map"):
            with_kernel()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_layer(gpus, sparse):
    config = CONFIGS["v2-lite"]
    assert config.dtype == jnp.bfloat16
    for shape in checks.meshes(gpus):
        checks.check_layer(gpus, shape, config, sparse, TOLERANCE, "cuda")
