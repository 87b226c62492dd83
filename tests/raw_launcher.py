"""The kernels through ``jax_flashmla._ext.raw``: without XLA around them.

A new shape costs no compilation here, so tests can sweep thousands of shapes, and benchmarks can
time a CUDA graph of back-to-back launches. Results are written into arrays in place, which only a
test may do to a JAX array: see :func:`wait_for` and :func:`contents`.
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
    extension = _ffi.extension()
    if extension is None:
        raise RuntimeError("jax_flashmla was built without CUDA kernels")
    return extension.raw


def address_of(array: jax.Array | None) -> int:
    """Device address of an array; 0 for None and for an empty array."""
    if array is None or array.size == 0:
        return 0
    return array.unsafe_buffer_pointer()


def wait_for(*arrays: jax.Array | None) -> None:
    """Waits until the arrays are on the device.

    The launchers use a stream of their own, which knows nothing of JAX's: a copy from the host
    that is still under way could overwrite what a kernel has written, or come too late for it.
    Every array that a launch reads *or writes* must have been waited for.
    """
    jax.block_until_ready([array for array in arrays if array is not None])


def contents(array: jax.Array) -> np.ndarray:
    """A copy of what is in the array's buffer now.

    An array remembers its copy on the host once it has one, since it cannot change. Here it does,
    so this looks through a new array over the same buffer.
    """
    again = jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array])
    return np.array(again)


def _filled(shape: tuple[int, ...], dtype: Any, value: float) -> jax.Array:
    # A copy of host data: never a constant that JAX may share between arrays.
    return jax.device_put(np.full(shape, value, np.dtype(dtype)))


def schedule_params(
    *,
    batch: int,
    num_parts: int,
    row_tiles: int,
    lengths: int,
    schedule: int,
    num_splits: int,
    batch_invariant: bool = False,
    topk: int | None = None,
    extra_topk: int | None = None,
    extra_lengths: int = 0,
) -> Any:
    """Parameters of the scheduler kernel; arrays are device addresses, 0 for an absent one."""
    p = raw_module().ScheduleParams()
    p.batch, p.num_parts, p.row_tiles = batch, num_parts, row_tiles
    p.batch_invariant, p.sparse = batch_invariant, topk is not None
    p.default_length = topk or 0
    p.max_length = -1 if topk is None else topk
    p.extra_default_length = p.extra_max_length = extra_topk or 0
    p.lengths, p.extra_lengths = lengths, extra_lengths
    p.schedule, p.num_splits = schedule, num_splits
    return p


def dense_decode_params(
    *,
    b: int,
    s_q: int,
    h_q: int,
    h_kv: int,
    num_pages: int,
    page_size: int,
    table_width: int,
    num_parts: int,
    num_slots: int,
    softmax_scale: float,
    is_fp16: bool,
    causal: bool = False,
    batch_invariant: bool = False,
    sink_per_request: bool = False,
    head_dim: int = 576,
    head_dim_v: int = 512,
    **addresses: int,
) -> Any:
    """Parameters of the attention and merge kernels; ``addresses`` are those of the arrays."""
    p = raw_module().DenseDecodeParams()
    p.batch, p.seq_q, p.heads_q, p.heads_kv = b, s_q, h_q, h_kv
    p.head_dim, p.head_dim_v = head_dim, head_dim_v
    p.num_pages, p.page_size = num_pages, page_size
    p.table_width, p.num_parts = table_width, num_parts
    p.softmax_scale, p.causal = softmax_scale, causal
    p.batch_invariant, p.sink_per_request = batch_invariant, sink_per_request
    p.num_slots = num_slots
    p.slots_per_request = _cuda.max_invariant_splits(table_width * page_size)
    p.is_fp16 = is_fp16
    expected = {"q", "k_cache", "block_table", "cache_seqlens", "schedule", "out", "lse"}
    expected |= {"partial_out", "partial_lse", "schedule_is_broken", "attn_sink"}
    assert set(addresses) == expected, f"addresses of {sorted(expected ^ set(addresses))}"
    for name, address in addresses.items():
        setattr(p, name, address)
    return p


def workspace_slots(
    b: int, table_width: int, page_size: int, num_parts: int, batch_invariant: bool
) -> int:
    """Partial results that the attention kernel may write, as in ``_cuda.dense_decode``."""
    if batch_invariant:
        return b * _cuda.max_invariant_splits(table_width * page_size)
    return 2 * num_parts


def plan_schedule(
    lengths: np.ndarray | None,
    *,
    num_sm_parts: int,
    batch_size: int | None = None,
    row_tiles: int = 1,
    batch_invariant: bool = False,
    topk: int | None = None,
    extra_topk: int | None = None,
    extra_lengths: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """``tile_scheduler_metadata`` and ``num_splits`` of the scheduler kernel, on the host."""
    b = len(lengths) if batch_size is None else batch_size
    arrays = [
        None if x is None else jax.device_put(np.asarray(x, np.int32))
        for x in (lengths, extra_lengths)
    ]
    schedule = _filled((num_sm_parts, scheduler.COLUMNS), np.int32, -1)
    num_splits = _filled((b + 1,), np.int32, -1)
    wait_for(*arrays, schedule, num_splits)
    raw_module().run(
        schedule_params(
            batch=b,
            num_parts=num_sm_parts,
            row_tiles=row_tiles,
            batch_invariant=batch_invariant,
            topk=topk,
            extra_topk=extra_topk,
            lengths=address_of(arrays[0]),
            extra_lengths=address_of(arrays[1]),
            schedule=address_of(schedule),
            num_splits=address_of(num_splits),
        )
    )
    return contents(schedule), contents(num_splits)


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
        width = self.block_table.shape[1]
        rows = s_q * h_q // h_kv
        row_tiles = _planning.dense_row_tiles(h_kv, rows)
        if self.schedule is not None:
            parts = self.schedule.shape[0]
        else:
            parts = self.num_sm_parts or _planning.default_num_sm_parts(row_tiles)
        slots = workspace_slots(b, width, page_size, parts, self.batch_invariant)

        # Poisoned: every element must be written, and no workspace may be read before it is.
        self.out = _filled((b, s_q, h_q, self.head_dim_v), self.q.dtype, np.nan)
        self.lse = _filled((b, h_q, s_q), np.float32, np.nan)
        self.partial_out = _filled((slots, h_kv, rows, self.head_dim_v), np.float32, np.nan)
        self.partial_lse = _filled((slots, h_kv, rows), np.float32, np.nan)
        self.status = _filled((1,), np.int32, -1)
        self.num_splits = _filled((b + 1,), np.int32, -1)
        plan = self.schedule is None
        if plan:
            self.schedule = _filled((parts, scheduler.COLUMNS), np.int32, -1)
        wait_for(*(x for x in vars(self).values() if isinstance(x, jax.Array)))

        self.schedule_params = schedule_params(
            batch=b,
            num_parts=parts,
            row_tiles=row_tiles,
            batch_invariant=self.batch_invariant,
            lengths=address_of(self.cache_seqlens),
            schedule=address_of(self.schedule),
            num_splits=address_of(self.num_splits),
        )
        self.params = dense_decode_params(
            b=b,
            s_q=s_q,
            h_q=h_q,
            h_kv=h_kv,
            head_dim=d,
            head_dim_v=self.head_dim_v,
            num_pages=pages,
            page_size=page_size,
            table_width=width,
            num_parts=parts,
            num_slots=slots,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            batch_invariant=self.batch_invariant,
            sink_per_request=self.attn_sink is not None and self.attn_sink.ndim == 2,
            is_fp16=self.q.dtype == jnp.float16,
            q=address_of(self.q),
            k_cache=address_of(self.k_cache),
            block_table=address_of(self.block_table),
            cache_seqlens=address_of(self.cache_seqlens),
            schedule=address_of(self.schedule),
            attn_sink=address_of(self.attn_sink),
            out=address_of(self.out),
            lse=address_of(self.lse),
            partial_out=address_of(self.partial_out),
            schedule_is_broken=address_of(self.status),
            partial_lse=address_of(self.partial_lse),
        )
        if plan:
            raw_module().run(self.schedule_params)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Launches attention and merge, waits, and returns ``out`` and ``lse`` on the host."""
        raw_module().run(self.params)
        return contents(self.out), contents(self.lse)

    def planned(self) -> tuple[np.ndarray, np.ndarray]:
        """The schedule in use and, if it was planned here, its ``num_splits``, on the host."""
        return contents(self.schedule), contents(self.num_splits)

    def time(self, launches: int = 20, replays: int = 5) -> float:
        """Median microseconds of a launch in a CUDA graph of ``launches`` launches."""
        return float(np.median(raw_module().time(self.params, launches, replays)))

    def time_schedule(self, launches: int = 20, replays: int = 5) -> float:
        """Median microseconds of planning the schedule, measured in the same way."""
        return float(np.median(raw_module().time(self.schedule_params, launches, replays)))
