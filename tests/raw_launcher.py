"""Dense decode through ``jax_flashmla._ext.raw``: the kernels without XLA around them.

A new shape costs no compilation here, so tests can sweep thousands of shapes, and benchmarks can
time a CUDA graph of back-to-back launches. Results are written into fresh arrays in place, which
only a test may do to a JAX array.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _cuda, _ffi, _planning
from jax_flashmla.reference import scheduler


def raw_module() -> Any:
    """The raw launchers of the compiled extension; RuntimeError without CUDA kernels."""
    extension = _ffi._extension()
    if extension is None:
        raise RuntimeError("jax_flashmla was built without CUDA kernels")
    return extension.raw


def _address(array: jax.Array | None) -> int:
    if array is None or array.size == 0:
        return 0
    return array.unsafe_buffer_pointer()


def _filled(shape: tuple[int, ...], dtype: Any, value: float) -> jax.Array:
    # A copy of host data: never a constant that JAX may share between arrays.
    return jax.device_put(np.full(shape, value, np.dtype(dtype)))


@dataclasses.dataclass
class RawDenseDecode:
    """One dense decode problem on the device; holds every array that the launches touch."""

    q: jax.Array
    k_cache: jax.Array
    block_table: jax.Array
    cache_seqlens: jax.Array
    softmax_scale: float
    causal: bool = False
    head_dim_v: int = 512
    attn_sink: jax.Array | None = None
    batch_invariant: bool = False
    num_sm_parts: int | None = None
    schedule: jax.Array | None = None

    def __post_init__(self) -> None:
        b, s_q, h_q, d = self.q.shape
        pages, page_size, h_kv, _ = self.k_cache.shape
        rows = s_q * h_q // h_kv
        row_tiles = _planning.dense_row_tiles(h_kv, rows)
        if self.schedule is not None:
            parts = self.schedule.shape[0]
        else:
            parts = self.num_sm_parts or _planning.default_num_sm_parts(row_tiles)
        per_request = _cuda.max_invariant_splits(self.block_table.shape[1] * page_size)
        slots = b * per_request if self.batch_invariant else 2 * parts
        raw = raw_module()

        # Poisoned: every element must be written, and no workspace may be read before it is.
        self.out = _filled((b, s_q, h_q, self.head_dim_v), self.q.dtype, np.nan)
        self.lse = _filled((b, h_q, s_q), np.float32, np.nan)
        self.partial_out = _filled((slots, h_kv, rows, self.head_dim_v), np.float32, np.nan)
        self.partial_lse = _filled((slots, h_kv, rows), np.float32, np.nan)
        self.num_splits = _filled((b + 1,), np.int32, -1)
        plan = self.schedule is None
        if plan:
            self.schedule = _filled((parts, scheduler.COLUMNS), np.int32, -1)

        s = self.schedule_params = raw.ScheduleParams()
        s.batch, s.num_parts, s.row_tiles = b, parts, row_tiles
        s.batch_invariant, s.max_length = self.batch_invariant, -1
        s.lengths = _address(self.cache_seqlens)
        s.schedule, s.num_splits = _address(self.schedule), _address(self.num_splits)

        p = self.params = raw.DenseDecodeParams()
        p.batch, p.seq_q, p.heads_q, p.heads_kv = b, s_q, h_q, h_kv
        p.head_dim, p.head_dim_v = d, self.head_dim_v
        p.num_pages, p.page_size = pages, page_size
        p.table_width, p.num_parts = self.block_table.shape[1], parts
        p.softmax_scale, p.causal = self.softmax_scale, self.causal
        p.batch_invariant = self.batch_invariant
        p.num_slots, p.slots_per_request = slots, per_request
        p.is_fp16 = self.q.dtype == jnp.float16
        p.q, p.k_cache = _address(self.q), _address(self.k_cache)
        p.block_table, p.cache_seqlens = _address(self.block_table), _address(self.cache_seqlens)
        p.schedule = _address(self.schedule)
        p.attn_sink = _address(self.attn_sink)
        p.sink_per_request = self.attn_sink is not None and self.attn_sink.ndim == 2
        p.out, p.lse = _address(self.out), _address(self.lse)
        p.partial_out, p.partial_lse = _address(self.partial_out), _address(self.partial_lse)
        # The launches run on a stream of their own, which waits for nothing.
        jax.block_until_ready(
            [value for value in vars(self).values() if isinstance(value, jax.Array)]
        )
        if plan:
            raw.run(s)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Launches attention and merge, waits, and returns ``out`` and ``lse`` on the host."""
        raw_module().run(self.params)
        return np.asarray(self.out), np.asarray(self.lse)

    def time(self, launches: int = 20, replays: int = 5) -> float:
        """Median microseconds of a launch in a CUDA graph of ``launches`` launches."""
        return float(np.median(raw_module().time(self.params, launches, replays)))

    def time_schedule(self, launches: int = 20, replays: int = 5) -> float:
        """Median microseconds of planning the schedule, measured in the same way."""
        return float(np.median(raw_module().time(self.schedule_params, launches, replays)))
