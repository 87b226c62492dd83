"""Bad calls of the decode and sparse prefill functions: refused before anything is launched.

Each gives a ValueError that names the argument, what it is and what was expected, or a
NotImplementedError with the reason.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla._primitive import Operation
from jax_flashmla.cache import PagedKVCache
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.metadata import get_mla_metadata
from jax_flashmla.sparse_prefill import flash_mla_sparse_fwd

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


def array(*shape, dtype=I32):
    return jnp.zeros(shape, dtype)


def dense():
    """A good call of dense decode."""
    return {
        "q": array(2, 1, 4, 32, dtype=BF16),
        "k_cache": array(6, 8, 2, 32, dtype=BF16),
        "block_table": array(2, 3),
        "cache_seqlens": array(2),
        "head_dim_v": 16,
        "causal": True,
    }


def sparse():
    """A good call of sparse decode."""
    return {
        "q": array(2, 1, 4, 576, dtype=BF16),
        "k_cache": array(6, 8, 1, 656, dtype=jnp.uint8),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "is_fp8_kvcache": True,
        "indices": array(2, 1, 10),
        "topk_length": array(2),
        "extra_k_cache": array(3, 2, 1, 656, dtype=jnp.uint8),
        "extra_indices_in_kvcache": array(2, 1, 5),
        "extra_topk_length": array(2),
    }


def prefill():
    """A good call of sparse prefill."""
    return {
        "q": array(3, 4, 32, dtype=BF16),
        "kv": array(9, 1, 32, dtype=BF16),
        "indices": array(3, 1, 5),
        "sm_scale": 0.1,
        "d_v": 16,
        "attn_sink": array(4, dtype=F32),
        "topk_length": array(3),
    }


def v4(pages=6, page_size=8, page_bytes=5184, dtype=jnp.uint8):
    return PagedKVCache(array(pages, page_bytes, dtype=dtype), "fp8_v4", page_size)


def plain(*shape, dtype=BF16, page_size=8):
    return PagedKVCache(array(*shape, dtype=dtype), "plain", page_size)


# Good call, what is changed, the argument that the message names, what it got, what it expected.
BAD = {
    "rank of q": (dense, {"q": array(2, 4, 32, dtype=BF16)}, "q", "(2, 4, 32)", "rank 4"),
    "q is a list": (dense, {"q": [1.0]}, "q", "list", "an array (b, s_q, h_q, d)"),
    "no q": (dense, {"q": None}, "q", "missing", "(b, s_q, h_q, d)"),
    "dtype of q": (dense, {"q": array(2, 1, 4, 32)}, "q", "int32", "bfloat16"),
    "q unlike the cache": (dense, {"q": array(2, 1, 4, 32, dtype=F32)}, "q", "float32", "bfloat16"),
    "d of q": (dense, {"q": array(2, 1, 4, 64, dtype=BF16)}, "q", "(2, 1, 4, 64)", "d=32"),
    "head count": (
        dense,
        {"q": array(2, 1, 3, 32, dtype=BF16)},
        "q",
        "h_q=3",
        "multiple of h_kv=2",
    ),
    "no heads": (dense, {"q": array(2, 1, 0, 32, dtype=BF16)}, "q", "h_q=0", "multiple"),
    "no cache": (dense, {"k_cache": None}, "k_cache", "missing", "PagedKVCache"),
    "rank of cache": (
        dense,
        {"k_cache": array(6, 8, 32, dtype=BF16)},
        "k_cache",
        "(6, 8, 32)",
        "(pages, page_size, h_kv, d)",
    ),
    "dtype of cache": (dense, {"k_cache": array(6, 8, 2, 32)}, "k_cache", "int32", "bfloat16"),
    "page size 0": (
        dense,
        {"k_cache": array(6, 0, 2, 32, dtype=BF16)},
        "k_cache",
        "(6, 0, 2, 32)",
        "page_size >= 1",
    ),
    "no key heads": (
        dense,
        {"k_cache": array(6, 8, 0, 32, dtype=BF16)},
        "k_cache",
        "(6, 8, 0, 32)",
        "h_kv >= 1",
    ),
    "page size of PagedKVCache": (
        dense,
        {"k_cache": plain(6, 8, 2, 32, page_size=16)},
        "k_cache.data",
        "(6, 8, 2, 32)",
        "page_size = 16",
    ),
    "format of PagedKVCache": (
        dense,
        {"k_cache": PagedKVCache(array(6, 8, 2, 32, dtype=BF16), "fp4", 8)},
        "k_cache.format",
        "'fp4'",
        "'fp8_v32'",
    ),
    "PagedKVCache with a vmap axis": (
        dense,
        {"k_cache": plain(3, 6, 8, 2, 32)},
        "k_cache.data",
        "rank 5",
        "rank 4",
    ),
    "no block_table": (dense, {"block_table": None}, "block_table", "missing", "(b, n)"),
    "rank of block_table": (dense, {"block_table": array(6)}, "block_table", "(6,)", "rank 2"),
    "batch of block_table": (dense, {"block_table": array(3, 3)}, "block_table", "(3, 3)", "b=2"),
    "dtype of block_table": (
        dense,
        {"block_table": np.zeros((2, 3), np.int64)},
        "block_table",
        "int64",
        "int32",
    ),
    "no cache_seqlens": (dense, {"cache_seqlens": None}, "cache_seqlens", "missing", "(b,)"),
    "batch of cache_seqlens": (dense, {"cache_seqlens": array(5)}, "cache_seqlens", "(5,)", "b=2"),
    "dtype of cache_seqlens": (
        dense,
        {"cache_seqlens": array(2, dtype=F32)},
        "cache_seqlens",
        "float32",
        "int32",
    ),
    "head_dim_v past d": (dense, {"head_dim_v": 33}, "head_dim_v", "33", "at most d=32"),
    "head_dim_v 0": (dense, {"head_dim_v": 0}, "head_dim_v", "0", ">= 1"),
    "head_dim_v None": (dense, {"head_dim_v": None}, "head_dim_v", "None", "integer"),
    "NaN scale": (dense, {"softmax_scale": float("nan")}, "softmax_scale", "nan", "finite"),
    "traced scale": (dense, {"softmax_scale": array(dtype=F32)}, "softmax_scale", "Array", "float"),
    "causal 1": (dense, {"causal": 1}, "causal", "1", "bool"),
    "fp8_matmul 1": (sparse, {"fp8_matmul": 1}, "fp8_matmul", "1 of type int", "bool"),
    "fp8_matmul None": (dense, {"fp8_matmul": None}, "fp8_matmul", "None", "bool"),
    "fp8_matmul over a plain cache": (
        dense,
        {"fp8_matmul": True},
        "fp8_matmul",
        "a bfloat16 cache of shape (6, 8, 2, 32)",
        "a V3.2 FP8 cache",
    ),
    "fp8_matmul over a plain cache on XLA": (
        dense,
        {"fp8_matmul": True, "implementation": "xla"},
        "fp8_matmul",
        "a bfloat16 cache",
        "a V3.2 FP8 cache",
    ),
    "fp8_matmul over plain caches, sparse": (
        sparse,
        {
            "k_cache": array(6, 8, 1, 576, dtype=BF16),
            "extra_k_cache": array(3, 2, 1, 576, dtype=BF16),
            "is_fp8_kvcache": False,
            "fp8_matmul": True,
        },
        "fp8_matmul",
        "a bfloat16 cache",
        "a V3.2 FP8 cache",
    ),
    "power_of_two_scales None": (
        dense,
        {"power_of_two_scales": None},
        "power_of_two_scales",
        "None",
        "bool",
    ),
    "power_of_two_scales of a plain cache": (
        dense,
        {"power_of_two_scales": True},
        "power_of_two_scales",
        "a bfloat16 cache of shape (6, 8, 2, 32)",
        "an FP8 cache",
    ),
    "FP8 flag": (dense, {"is_fp8_kvcache": True}, "is_fp8_kvcache", "True", "False"),
    "rank of attn_sink": (
        dense,
        {"attn_sink": array(2, 4, dtype=F32)},
        "attn_sink",
        "(2, 4)",
        "h_q",
    ),
    "heads of attn_sink": (dense, {"attn_sink": array(2, dtype=F32)}, "attn_sink", "(2,)", "h_q=4"),
    "dtype of attn_sink": (
        dense,
        {"attn_sink": array(4, dtype=BF16)},
        "attn_sink",
        "bfloat16",
        "float32",
    ),
    "implementation": (
        dense,
        {"implementation": "triton"},
        "implementation",
        "'triton'",
        "'cuda', 'xla', None",
    ),
    "num_sm_parts 0": (dense, {"num_sm_parts": 0}, "num_sm_parts", "0", ">= 1"),
    "metadata alone": (
        dense,
        {"tile_scheduler_metadata": array(4, 8)},
        "num_splits",
        "missing",
        "get_mla_metadata",
    ),
    "num_splits alone": (
        dense,
        {"num_splits": array(3)},
        "tile_scheduler_metadata",
        "missing",
        "get_mla_metadata",
    ),
    "columns of metadata": (
        dense,
        {"tile_scheduler_metadata": array(4, 7), "num_splits": array(3)},
        "tile_scheduler_metadata",
        "(4, 7)",
        "8",
    ),
    "rows of metadata": (
        dense,
        {"tile_scheduler_metadata": array(0, 8), "num_splits": array(3)},
        "tile_scheduler_metadata",
        "(0, 8)",
        ">= 1",
    ),
    "metadata of another batch": (
        dense,
        {"tile_scheduler_metadata": array(4, 8), "num_splits": array(9)},
        "num_splits",
        "(9,)",
        "(3,)",
    ),
    "num_sm_parts unlike metadata": (
        dense,
        {"tile_scheduler_metadata": array(4, 8), "num_splits": array(3), "num_sm_parts": 5},
        "num_sm_parts",
        "5",
        "4",
    ),
    "topk_length without indices": (
        dense,
        {"topk_length": array(2)},
        "topk_length",
        "given",
        "None",
    ),
    "extra cache without indices": (
        dense,
        {"extra_k_cache": array(6, 8, 2, 32, dtype=BF16)},
        "extra_k_cache",
        "given",
        "None",
    ),
    "causal with indices": (sparse, {"causal": True}, "causal", "True", "False"),
    "FP8 flag missing": (sparse, {"is_fp8_kvcache": False}, "is_fp8_kvcache", "False", "True"),
    "V4 pages as an array": (
        sparse,
        {"k_cache": array(6, 5184, dtype=jnp.uint8)},
        "k_cache",
        "(6, 5184)",
        "PagedKVCache",
    ),
    "bytes of a V3.2 row": (
        sparse,
        {"k_cache": array(6, 8, 1, 576, dtype=jnp.uint8)},
        "k_cache",
        "(6, 8, 1, 576)",
        "656",
    ),
    "bytes of a V4 page": (
        sparse,
        {"k_cache": v4(page_bytes=4672)},
        "k_cache.data",
        "(6, 4672)",
        "5184",
    ),
    "dtype of V4 pages": (sparse, {"k_cache": v4(dtype=jnp.int8)}, "k_cache.data", "int8", "uint8"),
    "fp16 queries over FP8": (
        sparse,
        {"q": array(2, 1, 4, 576, dtype=jnp.float16)},
        "q",
        "float16",
        "bfloat16 or float32",
    ),
    "rank of indices": (sparse, {"indices": array(2, 10)}, "indices", "(2, 10)", "rank 3"),
    "s_q of indices": (sparse, {"indices": array(2, 3, 10)}, "indices", "(2, 3, 10)", "s_q=1"),
    "dtype of indices": (
        sparse,
        {"indices": array(2, 1, 10, dtype=F32)},
        "indices",
        "float32",
        "int32",
    ),
    "batch of topk_length": (sparse, {"topk_length": array(3)}, "topk_length", "(3,)", "b=2"),
    "rank of block_table, sparse": (
        sparse,
        {"block_table": array(2)},
        "block_table",
        "(2,)",
        "rank 2",
    ),
    "extra indices without cache": (
        sparse,
        {"extra_k_cache": None},
        "extra_indices_in_kvcache",
        "without 'extra_k_cache'",
        "both or neither",
    ),
    "extra length without cache": (
        sparse,
        {"extra_k_cache": None, "extra_indices_in_kvcache": None},
        "extra_topk_length",
        "without 'extra_k_cache'",
        "both or neither",
    ),
    "extra cache without indices of its own": (
        sparse,
        {"extra_indices_in_kvcache": None},
        "extra_indices_in_kvcache",
        "missing",
        "(b, s_q, extra_topk)",
    ),
    "extra cache of another format": (
        sparse,
        {"extra_k_cache": v4()},
        "extra_k_cache",
        "fp8_v4",
        "fp8_v32",
    ),
    "extra cache that is not FP8": (
        sparse,
        {"extra_k_cache": array(3, 2, 1, 576, dtype=BF16)},
        "is_fp8_kvcache",
        "'extra_k_cache' is a bfloat16 cache",
        "an FP8 cache",
    ),
    "batch of extra_topk_length": (
        sparse,
        {"extra_topk_length": array(2, 1)},
        "extra_topk_length",
        "(2, 1)",
        "rank 1",
    ),
    "prefill: rank of q": (prefill, {"q": array(1, 3, 4, 32, dtype=BF16)}, "q", "rank 4", "rank 3"),
    "prefill: no heads": (
        prefill,
        {"q": array(3, 0, 32, dtype=BF16)},
        "q",
        "(3, 0, 32)",
        "at least 1",
    ),
    "prefill: dtype of kv": (
        prefill,
        {"kv": array(9, 1, 32, dtype=F32)},
        "kv",
        "float32",
        "bfloat16",
    ),
    "prefill: d of kv": (prefill, {"kv": array(9, 1, 48, dtype=BF16)}, "kv", "(9, 1, 48)", "d=32"),
    "prefill: rank of kv": (prefill, {"kv": array(9, 32, dtype=BF16)}, "kv", "(9, 32)", "rank 3"),
    "prefill: no indices": (prefill, {"indices": None}, "indices", "missing", "(s_q, h_kv, topk)"),
    "prefill: s_q of indices": (
        prefill,
        {"indices": array(4, 1, 5)},
        "indices",
        "(4, 1, 5)",
        "s_q=3",
    ),
    "prefill: infinite scale": (prefill, {"sm_scale": float("inf")}, "sm_scale", "inf", "finite"),
    "prefill: no scale": (prefill, {"sm_scale": None}, "sm_scale", "NoneType", "float"),
    "prefill: d_v past d": (prefill, {"d_v": 512}, "d_v", "512", "at most d=32"),
    "prefill: attn_sink": (
        prefill,
        {"attn_sink": array(3, 4, dtype=F32)},
        "attn_sink",
        "(3, 4)",
        "h_q",
    ),
    "prefill: topk_length": (prefill, {"topk_length": array(1)}, "topk_length", "(1,)", "s_q=3"),
    "prefill: implementation": (
        prefill,
        {"implementation": "gpu"},
        "implementation",
        "'gpu'",
        "'xla'",
    ),
}

FUNCTIONS = {
    dense: flash_mla_with_kvcache,
    sparse: flash_mla_with_kvcache,
    prefill: flash_mla_sparse_fwd,
}


@pytest.fixture
def nothing_launched(monkeypatch):
    def launched(self, *args, **kwargs):
        raise AssertionError(f"{self.name} was reached")

    monkeypatch.setattr(Operation, "__call__", launched)


@pytest.mark.parametrize("good", FUNCTIONS, ids=lambda good: good.__name__)
def test_good_calls_are_good(good):
    """Otherwise the tests below would prove nothing."""
    kwargs = good()
    arrays = {k: v for k, v in kwargs.items() if isinstance(v, jax.Array)}
    rest = {k: v for k, v in kwargs.items() if k not in arrays}
    jax.eval_shape(lambda arrays: FUNCTIONS[good](**arrays, **rest), arrays)


@pytest.mark.parametrize("name", BAD)
def test_value_error_says_what_is_wrong(name, nothing_launched):
    good, changes, argument, got, expected = BAD[name]
    function = FUNCTIONS[good]
    with pytest.raises(ValueError) as error:
        function(**{**good(), **changes})
    message = str(error.value)
    assert message.startswith(f"{function.__name__}: argument '{argument}' "), message
    before, separator, after = message.partition("expected")
    assert separator and got in before and expected in after, message


def test_missing_argument_is_named():
    call = dense()
    del call["cache_seqlens"]
    with pytest.raises(TypeError, match="cache_seqlens"):
        flash_mla_with_kvcache(**call)


def test_bad_calls_are_refused_while_tracing(nothing_launched):
    """Under jit too, where only shapes and types are known."""
    with pytest.raises(ValueError, match=r"argument 'block_table' has shape \(3, 3\)"):
        jax.jit(lambda t: flash_mla_with_kvcache(**{**dense(), "block_table": t}))(array(3, 3))
    with pytest.raises(ValueError, match=r"argument 'softmax_scale' is a .*Tracer"):
        jax.jit(lambda s: flash_mla_with_kvcache(**dense(), softmax_scale=s))(0.1)


@pytest.mark.parametrize(
    ("good", "changes", "reason"),
    [
        (
            sparse,
            {
                "q": array(2, 1, 4, 576, dtype=BF16),
                "k_cache": array(6, 8, 2, 576, dtype=BF16),
                "extra_k_cache": array(3, 2, 2, 576, dtype=BF16),
                "is_fp8_kvcache": False,
            },
            "one key head.*h_kv=2",
        ),
        (prefill, {"kv": array(9, 2, 32, dtype=BF16)}, "one key head.*h_kv=2"),
        (prefill, {"implementation": "cuda"}, "no CUDA kernel"),
        (
            sparse,
            {"head_dim_v": 448, "implementation": "cuda"},
            "head dimensions are 576 and head_dim_v=448; the kernel takes 576 and 512",
        ),
        (
            sparse,
            {"q": array(2, 1, 4, 576, dtype=F32), "implementation": "cuda"},
            "float32.*'fp8_v32'.*bfloat16",
        ),
        (dense, {"implementation": "cuda"}, "head dimensions are 32.*576 and 512"),
        (
            dense,
            {
                "q": array(2, 1, 4, 32, dtype=F32),
                "k_cache": array(6, 8, 2, 32, dtype=F32),
                "implementation": "cuda",
            },
            "float32",
        ),
    ],
    ids=[
        "sparse h_kv",
        "prefill h_kv",
        "prefill",
        "sparse dims",
        "sparse float32",
        "dims",
        "float32",
    ],
)
def test_unsupported_calls_say_why(good, changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        FUNCTIONS[good](**{**good(), **changes})


@pytest.mark.parametrize("implementation", [None, "xla", "cuda"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_fp8_matmul_is_not_for_v4_caches(kind, implementation, nothing_launched):
    call = sparse() | {"q": array(2, 1, 4, 512, dtype=BF16), "k_cache": v4(), "extra_k_cache": v4()}
    if kind == "dense":
        call = {name: call[name] for name in ("q", "k_cache", "head_dim_v", "is_fp8_kvcache")}
        call |= {"block_table": array(2, 3), "cache_seqlens": array(2)}
    with pytest.raises(
        NotImplementedError,
        match="^flash_mla_with_kvcache: 'fp8_matmul' supports .*'fp8_v32'.*'fp8_v4'.*RoPE columns",
    ):
        flash_mla_with_kvcache(**call, fp8_matmul=True, implementation=implementation)


@pytest.mark.parametrize("good", FUNCTIONS, ids=lambda good: good.__name__)
def test_derivatives_name_the_operation(good):
    kwargs = good()

    def loss(q):
        return FUNCTIONS[good](**{**kwargs, "q": q})[0].astype(F32).sum()

    with pytest.raises(NotImplementedError, match="flash_mla_"):
        jax.grad(loss)(kwargs["q"])


def test_metadata_of_another_batch_is_refused():
    metadata, splits = get_mla_metadata(array(5), 2, 2, implementation="xla")
    with pytest.raises(
        ValueError, match=r"argument 'num_splits' has shape \(6,\); expected \(3,\)"
    ):
        flash_mla_with_kvcache(**dense(), tile_scheduler_metadata=metadata, num_splits=splits)
