"""Writing tokens to paged caches and reading them: time against that of moving the bytes.

Through the raw launchers, in a CUDA graph of back-to-back launches, at slots scattered over a cache
with room for twice the tokens. What moves less than the L2 cache holds may be faster than memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from raw_cache import RawAppend, RawGather

from jax_flashmla.cache import PagedKVCache
from jax_flashmla.quantization import FP8_FORMATS

Row = dict[str, Any]

#: GB/s at which an H200 copies; what a kernel's time is held against.
COPY_GB_PER_S = 4300.0
FORMATS = ("plain", "fp8_v32", "fp8_v4")
#: ``append``: kv_c and k_pe; ``fused``: both in one array, normalised and rotated; ``gather``.
OPS = ("append", "fused", "gather")
TOKENS = (1, 128, 4096, 65536, 262144)
PAGE_SIZE, ROPE = 64, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation on so many bfloat16 tokens."""

    op: str
    cache_format: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.op}-{self.cache_format.removeprefix('fp8_')}-t{self.tokens}"

    @property
    def columns(self) -> int:
        return 576 if self.cache_format == "plain" else FP8_FORMATS[self.cache_format].dim

    @property
    def latent(self) -> int:
        return self.columns - ROPE

    def bytes(self) -> int:
        """Bytes read and written: tokens on both sides, slots, cosines and sines."""
        outside = 2 * self.columns
        inside = outside
        if self.cache_format != "plain":
            inside = FP8_FORMATS[self.cache_format].token_bytes
        angles = 4 * ROPE if self.op == "fused" else 0
        weight = 4 * self.latent if self.op == "fused" else 0
        return self.tokens * (outside + inside + 4 + angles) + weight


def cases() -> list[Case]:
    """Every operation, format and size; formats apart, since each needs caches of its own."""
    return [Case(op, f, tokens) for f in FORMATS for op in OPS for tokens in TOKENS]


@functools.lru_cache(maxsize=1)
def _problems(cache_format: str) -> dict[str, RawAppend | RawGather]:
    """The operations on as many tokens as there are at most: fewer are the first of them."""
    most = max(TOKENS)
    case = Case("append", cache_format, most)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    dtype = jnp.bfloat16 if cache_format == "plain" else None
    cache = PagedKVCache.zeros(2 * most // PAGE_SIZE, PAGE_SIZE, format=cache_format, dtype=dtype)

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    angles = jax.random.uniform(next(keys), (most, ROPE // 2), maxval=6.3)
    slots = jax.random.permutation(next(keys), cache.num_slots)[:most].astype(jnp.int32)
    place = cache.data, cache_format, PAGE_SIZE, slots
    return {
        "append": RawAppend(*place, normal(most, 1, case.latent), normal(most, 1, ROPE)),
        "fused": RawAppend(
            *place,
            normal(most, 1, case.columns),
            latent=case.latent,
            norm_weight=normal(case.latent).astype(jnp.float32),
            rope_cos=jnp.cos(angles),
            rope_sin=jnp.sin(angles),
        ),
        "gather": RawGather(*place, jnp.bfloat16),
    }


def row_of(case: Case, us: float) -> Row:
    """A row of the results; ``over_copy``: the time over that of copying as many bytes."""
    return {
        "name": case.name,
        "op": case.op,
        "cache_format": case.cache_format,
        "tokens": case.tokens,
        "bytes": case.bytes(),
        "us": us,
        "gb_per_s": case.bytes() / us / 1e3,
        "over_copy": us / (case.bytes() / COPY_GB_PER_S / 1e3),
    }


def measure_case(case: Case, launches: int, replays: int) -> Row:
    """Times one case: the median of replays of a CUDA graph of so many launches."""
    problem = _problems(case.cache_format)[case.op]
    problem.params.tokens = case.tokens
    return row_of(case, problem.time(launches, replays))
