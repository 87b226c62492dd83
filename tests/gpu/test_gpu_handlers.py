"""FFI handlers called with buffers and attributes that the library never passes: errors, no crash.

A good call is recorded from the public function; a bad one is the same with a shape, a dtype or an
attribute changed. The handler says which operation refuses it, and shows the shapes. Only where the
C++ type of an argument gives its dtype does XLA speak before the handler, and names none.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import PagedKVCache, flash_mla_with_kvcache, get_mla_metadata
from jax_flashmla.quantization import page_bytes

pytestmark = pytest.mark.gpu

BF16, F16, F32, I32, U8 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.uint8

DECODE_RESULTS = ("out", "lse", "partial_out", "partial_sums", "status")
# Names of arguments and results, as the handlers show them.
NAMES = {
    "flashmla_dense_decode": (
        ("q", "k_cache", "block_table", "cache_seqlens", "schedule", "attn_sink"),
        DECODE_RESULTS,
    ),
    "flashmla_sparse_decode": (
        (
            *("q", "k_cache", "indices", "topk_length", "attn_sink"),
            *("extra_k_cache", "extra_indices", "extra_topk_length", "schedule"),
        ),
        DECODE_RESULTS,
    ),
    "flashmla_metadata": (("lengths", "extra_lengths"), ("schedule", "num_splits")),
    "flashmla_cache_append": (
        ("cache", "slots", "kv_c", "k_pe", "norm_weight", "rope_cos", "rope_sin"),
        ("result",),
    ),
    "flashmla_cache_gather": (("cache", "slots"), ("out",)),
}


def array(*shape, dtype=I32):
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a handler with arrays of zeros."""

    target: str
    arguments: dict[str, jax.ShapeDtypeStruct]
    results: dict[str, jax.ShapeDtypeStruct]
    attributes: dict[str, Any]
    options: dict[str, Any]

    def run(self):
        call = jax.ffi.ffi_call(self.target, tuple(self.results.values()), **self.options)
        jitted = jax.jit(lambda *arrays: call(*arrays, **self.attributes))
        zeros = (np.zeros(a.shape, a.dtype) for a in self.arguments.values())
        return jax.block_until_ready(jitted(*zeros))

    def changed(self, changes: dict[str, Any]) -> Call:
        """With some arguments, results and attributes in place of its own; None leaves one out."""
        parts = {}
        for part in ("arguments", "results", "attributes"):
            old = getattr(self, part)
            new = old | {name: changes[name] for name in changes.keys() & old.keys()}
            parts[part] = {name: value for name, value in new.items() if value is not None}
        known = self.arguments.keys() | self.results.keys() | self.attributes.keys() | {"options"}
        assert changes.keys() <= known, changes.keys() - known
        return dataclasses.replace(self, **parts, options=changes.get("options", self.options))


def recorded(function, *arguments) -> dict[str, Call]:
    """The calls of handlers in a function of arrays: lowered for CUDA, never run."""
    calls = {}

    def ffi_call(target, results, **options):
        def call(*arrays, **attributes):
            inputs, outputs = NAMES[target]
            calls[target] = Call(
                target,
                {n: array(*a.shape, dtype=a.dtype) for n, a in zip(inputs, arrays, strict=True)},
                dict(zip(outputs, results, strict=True)),
                attributes,
                options,
            )
            return tuple(jnp.zeros(r.shape, r.dtype) for r in results)

        return call

    with mock.patch.object(jax.ffi, "ffi_call", ffi_call):
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return calls


# ------------------------------------------------------------------ good calls

CACHES = {
    "plain": lambda pages, size: array(pages, size, 1, 576, dtype=BF16),
    "fp8_v32": lambda pages, size: array(pages, size, 1, 656, dtype=U8),
    "fp8_v4": lambda pages, size: array(pages, page_bytes(size), dtype=U8),
}


def paged(data, cache_format, page_size):
    return PagedKVCache(data, cache_format, page_size)


def dense_decode(cache_format="plain", batch_invariant=False, heads_kv=1):
    def function(q, cache, table, lengths, sink):
        return flash_mla_with_kvcache(
            *(q, paged(cache, cache_format, 8), table, lengths, 512),
            attn_sink=sink,
            is_fp8_kvcache=cache_format != "plain",
            batch_invariant=batch_invariant,
            implementation="cuda",
        )

    cache = CACHES[cache_format](6, 8)
    if heads_kv > 1:
        cache = array(6, 8, heads_kv, 576, dtype=BF16)
    calls = recorded(
        function,
        array(2, 1, 16, 576, dtype=BF16),
        cache,
        array(2, 3),
        array(2),
        array(16, dtype=F32),
    )
    return calls["flashmla_dense_decode"]


def sparse_decode(cache_format="plain", extra=True, batch_invariant=False):
    def function(q, cache, indices, length, sink, extra_cache, extra_indices, extra_length):
        others = {}
        if extra:
            others = {
                "extra_k_cache": paged(extra_cache, cache_format, 2),
                "extra_indices_in_kvcache": extra_indices,
                "extra_topk_length": extra_length,
            }
        return flash_mla_with_kvcache(
            *(q, paged(cache, cache_format, 8), None, None, 512),
            attn_sink=sink,
            is_fp8_kvcache=cache_format != "plain",
            indices=indices,
            topk_length=length,
            batch_invariant=batch_invariant,
            implementation="cuda",
            **others,
        )

    calls = recorded(
        function,
        array(2, 1, 16, 512 if cache_format == "fp8_v4" else 576, dtype=BF16),
        CACHES[cache_format](6, 8),
        array(2, 1, 1100),
        array(2),
        array(16, dtype=F32),
        CACHES[cache_format](3, 2),
        array(2, 1, 70),
        array(2),
    )
    return calls["flashmla_sparse_decode"]


def metadata():
    def function(lengths, extra_lengths):
        return get_mla_metadata(
            num_heads_q=16,
            topk=70,
            topk_length=lengths,
            extra_topk=5,
            extra_topk_length=extra_lengths,
            num_q_tokens_per_head_k=16,
            num_heads_k=1,
            implementation="cuda",
        )

    return recorded(function, array(2), array(2))["flashmla_metadata"]


def append(cache_format="plain", joined=False):
    def function(cache, slots, kv_c, k_pe, weight, cos, sin):
        kv = jnp.concatenate([kv_c, k_pe], axis=-1) if joined else kv_c
        return paged(cache, cache_format, 8).append(
            kv,
            slots,
            k_pe=None if joined else k_pe,
            norm_weight=weight,
            rope_cos=cos,
            rope_sin=sin,
            implementation="cuda",
        )

    latent = 448 if cache_format == "fp8_v4" else 512
    calls = recorded(
        function,
        CACHES[cache_format](6, 8),
        array(5),
        array(5, 1, latent, dtype=BF16),
        array(5, 1, 64, dtype=BF16),
        array(latent, dtype=F32),
        array(5, 32, dtype=F32),
        array(5, 32, dtype=F32),
    )
    return calls["flashmla_cache_append"]


def gather(cache_format="plain"):
    def function(cache, slots):
        return paged(cache, cache_format, 8).gather(slots, implementation="cuda")

    return recorded(function, CACHES[cache_format](6, 8), array(5))["flashmla_cache_gather"]


GOOD = {
    "dense": dense_decode,
    "dense-invariant": lambda: dense_decode(batch_invariant=True),
    "dense-heads": lambda: dense_decode(heads_kv=2),
    "dense-v32": lambda: dense_decode("fp8_v32"),
    "sparse": sparse_decode,
    "sparse-one": lambda: sparse_decode(extra=False),
    "sparse-invariant": lambda: sparse_decode(batch_invariant=True),
    "sparse-v32": lambda: sparse_decode("fp8_v32"),
    "sparse-v4": lambda: sparse_decode("fp8_v4"),
    "metadata": metadata,
    "append": append,
    "append-joined": lambda: append(joined=True),
    "append-v32": lambda: append("fp8_v32"),
    "append-v4": lambda: append("fp8_v4"),
    "gather": gather,
    "gather-v32": lambda: gather("fp8_v32"),
    "gather-v4": lambda: gather("fp8_v4"),
}


@functools.cache
def good_call(name):
    return GOOD[name]()


@pytest.mark.parametrize("name", GOOD)
def test_recorded_calls_are_good(name):
    """Without a change; and so what is changed below is what is wrong."""
    call = good_call(name)
    results = call.run()
    assert [(r.shape, r.dtype) for r in results] == [
        (s.shape, s.dtype) for s in call.results.values()
    ]


# ------------------------------------------------------------------ bad calls

INT = np.int32


def workspace(slots=264, slices=1, slabs=1, columns=512, sums=None, *, is_fp8=False):
    """Partial results; as they are they go with the calls, which have 132 parts and 16 heads."""
    if sums is None:
        sums = 1024 if is_fp8 else 256
    return {
        "partial_out": array(slots, slices, slabs, (16 if is_fp8 else 8) * columns, dtype=F32),
        "partial_sums": array(slots, slices, slabs, sums, dtype=F32),
    }


def narrow_values(is_fp8=False):
    """What no kernel has; the workspace goes with the result."""
    return {
        "out": array(2, 1, 16, 256, dtype=BF16),
        **workspace(columns=256, is_fp8=is_fp8),
        "schedule": array(132, 8),
    }


NARROW_VALUES = "values of 256 columns"

# What all decode handlers have in common.
DECODE_BAD = {
    "rank of q": {"q": array(2, 16, 576, dtype=BF16)},
    "rank 0 of q": {"q": array(dtype=BF16)},
    "batch of q": {"q": array(3, 1, 16, 576, dtype=BF16)},
    "heads of q": {"q": array(2, 1, 8, 576, dtype=BF16)},
    "tokens of q": {"q": array(2, 2, 16, 576, dtype=BF16)},
    "columns of q": {"q": array(2, 1, 16, 512, dtype=BF16)},
    "no columns of q": {"q": array(2, 1, 16, 0, dtype=BF16)},
    "dtype of q": {"q": array(2, 1, 16, 576, dtype=F16)},
    "rank of cache": {"k_cache": array(6, 8, 576, dtype=BF16)},
    "columns of cache": {"k_cache": array(6, 8, 1, 568, dtype=BF16)},
    "page of cache": {"k_cache": array(6, 16, 1, 576, dtype=BF16)},
    "dtype of cache": {"k_cache": array(6, 8, 1, 576, dtype=F32)},
    "no heads of cache": {"k_cache": array(6, 8, 0, 576, dtype=BF16)},
    "heads of cache": {"k_cache": array(6, 8, 3, 576, dtype=BF16)},
    "rank of schedule": {"schedule": array(16)},
    "columns of schedule": {"schedule": array(16, 7)},
    "empty schedule": {"schedule": array(0, 8)},
    "dtype of schedule": {"schedule": array(16, 8, dtype=F32)},
    "longer schedule": {"schedule": array(100_000, 8)},
    "heads of sink": {"attn_sink": array(8, dtype=F32)},
    "rank of sink": {"attn_sink": array(2, 1, 16, dtype=F32)},
    "batch of sink": {"attn_sink": array(3, 16, dtype=F32)},
    "sink without a dimension": {"attn_sink": array(dtype=F32)},
    "dtype of sink": {"attn_sink": array(16, dtype=BF16)},
    "rank of out": {"out": array(2, 16, 512, dtype=BF16)},
    "batch of out": {"out": array(3, 1, 16, 512, dtype=BF16)},
    "heads of out": {"out": array(2, 1, 15, 512, dtype=BF16)},
    "columns of out": {"out": array(2, 1, 16, 256, dtype=BF16)},
    "dtype of out": {"out": array(2, 1, 16, 512, dtype=F32)},
    "rank of lse": {"lse": array(32, dtype=F32)},
    "heads of lse": {"lse": array(2, 15, 1, dtype=F32)},
    "dtype of lse": {"lse": array(2, 16, 1, dtype=BF16)},
    "no workspace": workspace(slots=0),
    "rank of workspace": {"partial_out": array(264, 8 * 512, dtype=F32)},
    "slices of workspace": workspace(slices=2),
    "slabs of workspace": workspace(slabs=2),
    "no slabs of workspace": workspace(slabs=0),
    "columns of workspace": workspace(columns=511),
    "rank of sums": workspace() | {"partial_sums": array(264, 256, dtype=F32)},
    "slots of sums": workspace() | {"partial_sums": array(263, 1, 1, 256, dtype=F32)},
    "slices of sums": workspace() | {"partial_sums": array(264, 2, 1, 256, dtype=F32)},
    "slabs of sums": workspace() | {"partial_sums": array(264, 1, 2, 256, dtype=F32)},
    "columns of sums": workspace(sums=32),
    "empty status": {"status": array(0)},
    "long status": {"status": array(2)},
    "format -1": {"cache_format": INT(-1)},
    "format 3": {"cache_format": INT(3)},
    "format that the cache has not": {"cache_format": INT(1)},
    "V4 for a plain cache": {"cache_format": INT(2)},
    "page size": {"page_size": INT(16)},
    "page size 0": {"page_size": INT(0), "k_cache": array(6, 0, 1, 576, dtype=BF16)},
    "page size below 0": {"page_size": INT(-8)},
    "FP8 products of a plain cache": {"fp8_matmul": np.bool_(True)},
    "scales of a plain cache": {"power_of_two_scales": np.bool_(True)},
    NARROW_VALUES: narrow_values(),
    "no page size": {"page_size": None},
    "wide page size": {"page_size": np.int64(8)},
    "float format": {"cache_format": np.float32(0)},
}
SPARSE_BAD = {
    "rank of indices": {"indices": array(2, 70)},
    "batch of indices": {"indices": array(1, 1, 70)},
    "tokens of indices": {"indices": array(2, 2, 70)},
    "dtype of indices": {"indices": array(2, 1, 70, dtype=F32)},
    "lengths": {"topk_length": array(3)},
    "dtype of lengths": {"topk_length": array(2, dtype=F32)},
    "two key heads": {"k_cache": array(6, 8, 2, 576, dtype=BF16)},
    "rank of extra cache": {"extra_k_cache": array(3, 2, 576, dtype=BF16)},
    "columns of extra cache": {"extra_k_cache": array(3, 2, 1, 512, dtype=BF16)},
    "page of extra cache": {"extra_k_cache": array(3, 8, 1, 576, dtype=BF16)},
    "dtype of extra cache": {"extra_k_cache": array(3, 2, 1, 576, dtype=F16)},
    "no extra cache": {"extra_k_cache": array(0, dtype=BF16)},
    "rank of extra indices": {"extra_indices": array(0)},
    "batch of extra indices": {"extra_indices": array(3, 1, 70)},
    "extra lengths": {"extra_topk_length": array(1)},
    "extra page size": {"extra_page_size": INT(8)},
    "extra page size below 0": {"extra_page_size": INT(-2)},
}
DENSE_BAD = {
    "rank of table": {"block_table": array(6)},
    "batch of table": {"block_table": array(3, 3)},
    "dtype of table": {"block_table": array(2, 3, dtype=F32)},
    "lengths": {"cache_seqlens": array(3)},
    "no lengths": {"cache_seqlens": array(0)},
    "rank of lengths": {"cache_seqlens": array(2, 1)},
    "dtype of lengths": {"cache_seqlens": array(2, dtype=jnp.uint32)},
    "V4 cache": {
        "q": array(2, 1, 16, 512, dtype=BF16),
        "k_cache": array(6, page_bytes(8), dtype=U8),
        "cache_format": INT(2),
    },
}
INVARIANT_BAD = {
    "workspace of no whole requests": workspace(slots=5),
}
# Workspace for one piece of each request, where a request may have several.
SMALL_WORKSPACE = {
    "too little workspace": workspace(slots=2),
}
V32_DECODE_BAD = {
    "columns of cache": {"k_cache": array(6, 8, 1, 655, dtype=U8)},
    "heads of cache": {"k_cache": array(6, 8, 2, 656, dtype=U8)},
    "page of cache": {"k_cache": array(6, 4, 1, 656, dtype=U8)},
    "dtype of cache": {"k_cache": array(6, 8, 1, 656, dtype=BF16)},
    "plain cache": {"k_cache": array(6, 8, 1, 576, dtype=BF16)},
    "format plain": {"cache_format": INT(0)},
    "columns of q": {"q": array(2, 1, 16, 512, dtype=BF16)},
    "dtype of q": {
        "q": array(2, 1, 16, 576, dtype=F16),
        "out": array(2, 1, 16, 512, dtype=F16),
    },
    NARROW_VALUES: narrow_values(is_fp8=True),
}
V4_DECODE_BAD = {
    "rank of cache": {"k_cache": array(6, 8, 1, 584, dtype=U8)},
    "bytes of cache": {"k_cache": array(6, page_bytes(8) - 576, dtype=U8)},
    "more bytes of cache": {"k_cache": array(6, page_bytes(8) + 576, dtype=U8)},
    "dtype of cache": {"k_cache": array(6, page_bytes(8), dtype=jnp.int8)},
    "page size": {"page_size": INT(7)},
    "largest page size": {"page_size": INT(2**31 - 1)},
    "columns of q": {"q": array(2, 1, 16, 576, dtype=BF16)},
    "extra bytes": {"extra_k_cache": array(3, page_bytes(1), dtype=U8)},
    "FP8 products": {"fp8_matmul": np.bool_(True)},
    NARROW_VALUES: narrow_values(is_fp8=True),
}
METADATA_BAD = {
    "lengths": {"lengths": array(3)},
    "extra lengths": {"extra_lengths": array(1)},
    "dtype of lengths": {"lengths": array(2, dtype=F32)},
    "rank of schedule": {"schedule": array(8)},
    "columns of schedule": {"schedule": array(4, 9)},
    "empty schedule": {"schedule": array(0, 8)},
    "no splits": {"num_splits": array(0)},
    "splits of another batch": {"num_splits": array(2)},
}
CACHE_BAD = {
    "rank of cache": array(6, 8, 576, dtype=BF16),
    "rank 0 of cache": array(dtype=BF16),
    "page of cache": array(6, 4, 1, 576, dtype=BF16),
    "no heads of cache": array(6, 8, 0, 576, dtype=BF16),
    "no columns of cache": array(6, 8, 1, 0, dtype=BF16),
    "columns of cache": array(6, 8, 1, 568, dtype=BF16),
    "heads of cache": array(6, 8, 2, 576, dtype=BF16),
    "dtype of cache": array(6, 8, 1, 576, dtype=I32),
    "bytes of a plain cache": array(6, 8, 1, 576, dtype=U8),
}
V32_CACHE_BAD = {
    "columns of cache": array(6, 8, 1, 655, dtype=U8),
    "heads of cache": array(6, 8, 2, 656, dtype=U8),
    "page of cache": array(6, 7, 1, 656, dtype=U8),
    "dtype of cache": array(6, 8, 1, 656, dtype=jnp.int8),
}
V4_CACHE_BAD = {
    "rank of cache": array(6, 8, 1, 584, dtype=U8),
    "bytes of cache": array(6, 584 * 8 - 1, dtype=U8),
    "unpadded pages": array(6, 584 * 8, dtype=U8),
    "more bytes of cache": array(6, page_bytes(8) + 576, dtype=U8),
    "dtype of cache": array(6, page_bytes(8), dtype=jnp.int8),
}
CACHE_ATTRIBUTES_BAD = {
    "format -1": {"format": INT(-1)},
    "format 3": {"format": INT(3)},
    "V3.2 for a plain cache": {"format": INT(1)},
    "V4 for a plain cache": {"format": INT(2)},
    "page size": {"page_size": INT(7)},
    "page size 0": {"page_size": INT(0)},
    "page size below 0": {"page_size": INT(-8)},
    "no page size": {"page_size": None},
    "wide format": {"format": np.int64(0)},
}
APPEND_BAD = {
    "result of another shape": {"result": array(6, 8, 1, 568, dtype=BF16), "options": {}},
    "result of another dtype": {"result": array(6, 8, 1, 576, dtype=F16), "options": {}},
    "result that is not the cache": {"options": {}},
    "rank of slots": {"slots": array(5, 1)},
    "slots": {"slots": array(4)},
    "dtype of slots": {"slots": array(5, dtype=F32)},
    "rank of tokens": {"kv_c": array(5, 512, dtype=BF16)},
    "number of tokens": {"kv_c": array(6, 1, 512, dtype=BF16)},
    "heads of tokens": {"kv_c": array(5, 2, 512, dtype=BF16)},
    "columns of tokens": {"kv_c": array(5, 1, 511, dtype=BF16)},
    "all columns twice": {"kv_c": array(5, 1, 576, dtype=BF16)},
    "dtype of tokens": {"kv_c": array(5, 1, 512, dtype=I32)},
    "rank of RoPE part": {"k_pe": array(5, 64, dtype=BF16)},
    "number of RoPE parts": {"k_pe": array(4, 1, 64, dtype=BF16)},
    "heads of RoPE part": {"k_pe": array(5, 2, 64, dtype=BF16)},
    "columns of RoPE part": {"k_pe": array(5, 1, 32, dtype=BF16)},
    "dtype of RoPE part": {"k_pe": array(5, 1, 64, dtype=U8)},
    "no RoPE part": {"k_pe": array(0, dtype=BF16)},
    "rank of weight": {"norm_weight": array(1, 512, dtype=F32)},
    "columns of weight": {"norm_weight": array(576, dtype=F32)},
    "dtype of weight": {"norm_weight": array(512, dtype=I32)},
    "rank of cosines": {"rope_cos": array(5, 1, 32, dtype=F32)},
    "number of cosines": {"rope_cos": array(4, 32, dtype=F32)},
    "columns of cosines": {"rope_cos": array(5, 64, dtype=F32)},
    "dtype of cosines": {"rope_cos": array(5, 32, dtype=BF16)},
    "no cosines": {"rope_cos": array(0, dtype=F32)},
    "number of sines": {"rope_sin": array(6, 32, dtype=F32)},
    "columns of sines": {"rope_sin": array(5, 16, dtype=F32)},
    "no sines": {"rope_sin": array(0, dtype=F32)},
    "latent": {"latent": INT(448)},
    "latent below 0": {"latent": INT(-1)},
    "latent past the columns": {"latent": INT(577)},
    "wide latent": {"latent": np.int64(512)},
    "whole-number epsilon": {"norm_eps": INT(0)},
}
GATHER_BAD = {
    "rank of slots": {"slots": array(5, 1)},
    "slots": {"slots": array(6)},
    "dtype of slots": {"slots": array(5, dtype=F32)},
    "rank of out": {"out": array(5, 576, dtype=BF16)},
    "heads of out": {"out": array(5, 2, 576, dtype=BF16)},
    "columns of out": {"out": array(5, 1, 512, dtype=BF16)},
    "dtype of out": {"out": array(5, 1, 576, dtype=I32)},
}


def both(caches):
    """Changes of the cache of an append: the result has its shape, too.

    Not where it is empty, since XLA runs nothing for empty results.
    """
    return {
        name: {"cache": cache, "result": cache}
        for name, cache in caches.items()
        if 0 not in cache.shape
    }


def only(caches):
    return {name: {"cache": cache} for name, cache in caches.items()}


BAD = {
    "dense": DECODE_BAD | DENSE_BAD,
    "dense-invariant": INVARIANT_BAD,
    "dense-v32": V32_DECODE_BAD,
    "sparse": DECODE_BAD | SPARSE_BAD,
    "sparse-invariant": INVARIANT_BAD | SMALL_WORKSPACE,
    "sparse-v32": V32_DECODE_BAD,
    "sparse-v4": V4_DECODE_BAD,
    "metadata": METADATA_BAD,
    "append": APPEND_BAD | both(CACHE_BAD) | CACHE_ATTRIBUTES_BAD,
    "append-v32": both(V32_CACHE_BAD) | {"latent": {"latent": INT(448)}},
    "append-v4": both(V4_CACHE_BAD)
    | {"latent": {"latent": INT(512)}, "page size": {"page_size": INT(7)}},
    "gather": GATHER_BAD | only(CACHE_BAD) | CACHE_ATTRIBUTES_BAD,
    "gather-v32": only(V32_CACHE_BAD),
    "gather-v4": only(V4_CACHE_BAD) | {"page size": {"page_size": INT(2**31 - 1)}},
}
# Arguments whose C++ type gives their dtype, and all attributes: XLA compares them.
TYPED = {
    "block_table",
    "cache_seqlens",
    "schedule",
    "attn_sink",
    "lse",
    "indices",
    "topk_length",
    "lengths",
    "slots",
    "rope_cos",
}
BY_XLA = "Failed to decode all FFI handler operands|Wrong number of attributes"


def spoken_by_xla(call, changes):
    for name, value in changes.items():
        if name in call.attributes and (
            value is None or value.dtype != call.attributes[name].dtype
        ):
            return True
        before = (call.arguments | call.results).get(name)
        if name in TYPED and before is not None and value.dtype != before.dtype:
            return True
    return False


@pytest.mark.parametrize(
    "good,what", [(good, what) for good, bad in BAD.items() for what in bad], ids=str
)
def test_bad_calls_are_refused(good, what):
    call, changes = good_call(good), BAD[good][what]
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call.changed(changes).run()
    message = str(caught.value)
    if spoken_by_xla(call, changes):
        assert re.search(BY_XLA, message), message
        return
    assert f"{call.target}: " in message, message
    if what == NARROW_VALUES:  # refused after all checks of the handler, where there are kernels
        assert re.search("head.dim.*cudaErrorNotSupported", message), message
        return
    arrays = {n: v for n, v in changes.items() if isinstance(v, jax.ShapeDtypeStruct)}
    shown = [f"{name}{list(value.shape)}" for name, value in arrays.items()]
    assert not shown or any(text in message for text in shown), message


def test_calls_after_refused_ones_are_right():
    """A refused call leaves nothing behind: the next ones run."""
    call = good_call("append")
    for _ in range(3):
        with pytest.raises(jax.errors.JaxRuntimeError, match="flashmla_cache_append: expected"):
            call.changed(APPEND_BAD["slots"]).run()
        call.run()
