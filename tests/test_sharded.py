"""Sparse decode, caches and layers over several CPU devices; tests/gpu has the same on GPUs."""

import jax
import pytest
import sharded_checks as checks
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_mla_core import CONFIGS, TOLERANCE

DEVICES = jax.devices("cpu")[:8]
BOTH = (4, 2)
by_shape = pytest.mark.parametrize("shape", checks.meshes(DEVICES), ids=str)


def test_meshes():
    assert checks.meshes(DEVICES) == [(8, 1), (1, 8), (4, 2)]
    assert checks.meshes(DEVICES[:3]) == [(2, 1), (1, 2)]
    assert checks.meshes(DEVICES[:1]) == [(1, 1)]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", checks.SPARSE_CASES)
def test_sparse_decode_under_jit(name, kind):
    checks.check_sparse_under_jit(DEVICES, BOTH, name, kind, None)


@pytest.mark.parametrize("name", checks.SPARSE_CASES)
def test_sparse_decode_in_shard_map(name):
    checks.check_sparse_in_shard_map(DEVICES, BOTH, name, None)


@pytest.mark.parametrize("fused", [False, True], ids=["stored", "fused"])
@pytest.mark.parametrize("cache_format", checks.FORMATS)
def test_caches_in_shard_map(cache_format, fused):
    checks.check_caches_in_shard_map(DEVICES, BOTH, cache_format, fused, None)


def test_heads_of_a_cache_in_shard_map():
    checks.check_heads_of_a_cache_in_shard_map(DEVICES, None)


@pytest.mark.parametrize("spec", [P(), P("data")], ids=["whole", "pages"])
@pytest.mark.parametrize("cache_format", checks.FORMATS)
def test_fused_append_under_jit(cache_format, spec):
    with_kernel = checks.check_caches_under_jit(DEVICES, cache_format, spec, True)
    with pytest.raises(NotImplementedError, match="several devices.*shard_map"):
        with_kernel()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["yarn", "query_latent"])
def test_layer(name, sparse):
    checks.check_layer(DEVICES, BOTH, CONFIGS[name], sparse, TOLERANCE, None)
