"""The kernels through ``jax_flashmla._ext.raw``: without XLA around them.

A new shape costs no compilation here, so tests can sweep thousands of shapes, and benchmarks can
time a CUDA graph of back-to-back launches. Results are written into arrays in place, which only a
test may do to a JAX array: see :func:`wait_for` and :func:`contents`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _cuda, _ffi, _planning, quantization
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
    fp8_matmul: bool = False,
    power_of_two_scales: bool = False,
    sink_per_request: bool = False,
    head_dim: int = 576,
    head_dim_v: int = 512,
    cache_format: str = "plain",
    cache_seqlens: int,
    **addresses: int,
) -> Any:
    """Parameters of the attention and merge kernels; ``addresses`` are those of the arrays."""
    p = raw_module().DenseDecodeParams()
    p.num_pages, p.page_size, p.table_width = num_pages, page_size, table_width
    p.causal = causal
    p.cache_format = _cuda.FORMAT_CODES[cache_format]
    p.set_run(0, cache_seqlens, table_width * page_size)
    p.k_cache, p.block_table = addresses.pop("k_cache"), addresses.pop("block_table")
    _set_common(
        p,
        b=b,
        s_q=s_q,
        h_q=h_q,
        h_kv=h_kv,
        sparse=False,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        num_parts=num_parts,
        num_slots=num_slots,
        capacity=table_width * page_size,
        softmax_scale=softmax_scale,
        is_fp16=is_fp16,
        batch_invariant=batch_invariant,
        fp8_matmul=fp8_matmul,
        power_of_two_scales=power_of_two_scales,
        sink_per_request=sink_per_request,
        addresses=addresses,
    )
    return p


def sparse_decode_params(
    *,
    b: int,
    s_q: int,
    h_q: int,
    head_dim: int,
    num_pages: int,
    page_size: int,
    topk: int,
    num_parts: int,
    num_slots: int,
    softmax_scale: float,
    cache_format: str,
    k_cache: int,
    indices: int,
    topk_length: int = 0,
    extra_k_cache: int = 0,
    extra_indices: int = 0,
    extra_topk_length: int = 0,
    extra_num_pages: int = 0,
    extra_page_size: int = 1,
    extra_topk: int = 0,
    is_fp16: bool = False,
    batch_invariant: bool = False,
    fp8_matmul: bool = False,
    power_of_two_scales: bool = False,
    sink_per_request: bool = False,
    head_dim_v: int = 512,
    **addresses: int,
) -> Any:
    """Likewise for sparse decode. Without a second cache its sizes and addresses stay as they are.

    Arrays are device addresses, 0 for lengths that are not given.
    """
    p = raw_module().SparseDecodeParams()
    p.cache_format = _cuda.FORMAT_CODES[cache_format]
    p.set_run(0, topk_length, topk)
    p.set_run(1, extra_topk_length, extra_topk)
    p.set_source(0, k_cache, indices, num_pages, page_size, topk)
    p.set_source(1, extra_k_cache, extra_indices, extra_num_pages, extra_page_size, extra_topk)
    _set_common(
        p,
        b=b,
        s_q=s_q,
        h_q=h_q,
        h_kv=1,
        sparse=True,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        num_parts=num_parts,
        num_slots=num_slots,
        capacity=_cuda.selected_capacity(topk, extra_topk),
        softmax_scale=softmax_scale,
        is_fp16=is_fp16,
        batch_invariant=batch_invariant,
        fp8_matmul=fp8_matmul,
        power_of_two_scales=power_of_two_scales,
        sink_per_request=sink_per_request,
        addresses=addresses,
    )
    return p


def _set_common(
    p: Any,
    *,
    b: int,
    s_q: int,
    h_q: int,
    h_kv: int,
    sparse: bool,
    head_dim: int,
    head_dim_v: int,
    num_parts: int,
    num_slots: int,
    capacity: int,
    softmax_scale: float,
    is_fp16: bool,
    batch_invariant: bool,
    fp8_matmul: bool,
    power_of_two_scales: bool,
    sink_per_request: bool,
    addresses: dict[str, int],
) -> None:
    """Sets what all decode operations have in common; ``capacity`` as in ``_cuda``."""
    p.batch, p.seq_q, p.heads_q, p.heads_kv = b, s_q, h_q, h_kv
    p.sparse, p.slices = sparse, s_q if sparse else h_kv
    p.head_dim, p.head_dim_v = head_dim, head_dim_v
    p.num_parts, p.num_slots = num_parts, num_slots
    p.slots_per_request = _cuda.max_invariant_splits(capacity)
    p.softmax_scale, p.is_fp16 = softmax_scale, is_fp16
    p.batch_invariant, p.sink_per_request = batch_invariant, sink_per_request
    p.fp8_matmul = fp8_matmul
    p.power_of_two_scales = power_of_two_scales
    expected = {"q", "schedule", "attn_sink", "out", "lse"}
    expected |= {"partial_out", "partial_sums", "schedule_is_broken"}
    assert set(addresses) == expected, f"addresses of {sorted(expected ^ set(addresses))}"
    for name, address in addresses.items():
        setattr(p, name, address)


def _workspace_slots(b: int, capacity: int, num_parts: int, batch_invariant: bool) -> int:
    """Partial results that an attention kernel may write, at least as many as in ``_cuda``."""
    if batch_invariant:
        return b * _cuda.max_invariant_splits(capacity)
    return 2 * num_parts


def workspace_slots(
    b: int, table_width: int, page_size: int, num_parts: int, batch_invariant: bool
) -> int:
    """Partial results that the dense attention kernel may write."""
    return _workspace_slots(b, table_width * page_size, num_parts, batch_invariant)


def workspace_rows(slots: int, *, slices: int, rows: int) -> int:
    """Rows that so many slots have room for, those that fill up slabs among them."""
    values, _ = _cuda.workspace_shapes(
        slots, slices=slices, rows=rows, head_dim_v=1, cache_format="fp8_v32"
    )
    return math.prod(values)


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


class _RawDecode:
    """What a problem of either kind has: results, workspace, schedule and the launches."""

    q: jax.Array
    attn_sink: jax.Array | None
    head_dim_v: int
    batch_invariant: bool
    cache_format: str
    fp8_matmul: bool
    power_of_two_scales: bool
    num_sm_parts: int | None
    schedule: jax.Array | None
    # Set by the class of each kind.
    params: Any
    schedule_params: Any

    def _allocate(self, *, slices: int, row_tiles: int, capacity: int) -> dict[str, Any]:
        """Allocates results, workspace and schedule; returns their sizes and addresses."""
        b, s_q, h_q, d = self.q.shape
        self._plans = self.schedule is None
        if self.schedule is not None:
            parts = self.schedule.shape[0]
        else:
            parts = self.num_sm_parts or _planning.default_num_sm_parts(row_tiles)
            self.schedule = _filled((parts, scheduler.COLUMNS), np.int32, -1)
        slots = _workspace_slots(b, capacity, parts, self.batch_invariant)

        # Poisoned: every element must be written, and no workspace may be read before it is.
        self.out = _filled((b, s_q, h_q, self.head_dim_v), self.q.dtype, np.nan)
        self.lse = _filled((b, h_q, s_q), np.float32, np.nan)
        self.partial_out, self.partial_sums = (
            _filled(shape, np.float32, np.nan)
            for shape in _cuda.workspace_shapes(
                slots,
                slices=slices,
                rows=s_q * h_q,
                head_dim_v=self.head_dim_v,
                cache_format=self.cache_format,
            )
        )
        self.status = _filled((1,), np.int32, -1)
        self.num_splits = _filled((b + 1,), np.int32, -1)
        wait_for(*(x for x in vars(self).values() if isinstance(x, jax.Array)))
        return {
            "b": b,
            "s_q": s_q,
            "h_q": h_q,
            "head_dim": d,
            "head_dim_v": self.head_dim_v,
            "num_parts": parts,
            "num_slots": slots,
            "batch_invariant": self.batch_invariant,
            "fp8_matmul": self.fp8_matmul,
            "power_of_two_scales": self.power_of_two_scales,
            "sink_per_request": self.attn_sink is not None and self.attn_sink.ndim == 2,
            "is_fp16": self.q.dtype == jnp.float16,
            "q": address_of(self.q),
            "schedule": address_of(self.schedule),
            "attn_sink": address_of(self.attn_sink),
            "out": address_of(self.out),
            "lse": address_of(self.lse),
            "partial_out": address_of(self.partial_out),
            "partial_sums": address_of(self.partial_sums),
            "schedule_is_broken": address_of(self.status),
        }

    def _plan(self, row_tiles: int, **kind: Any) -> None:
        """Makes the parameters of the scheduler and, without a schedule given, runs it."""
        self.schedule_params = schedule_params(
            batch=self.q.shape[0],
            num_parts=self.schedule.shape[0],
            row_tiles=row_tiles,
            batch_invariant=self.batch_invariant,
            schedule=address_of(self.schedule),
            num_splits=address_of(self.num_splits),
            **kind,
        )
        if self._plans:
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


@dataclasses.dataclass
class RawDenseDecode(_RawDecode):
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
    cache_format: str = "plain"
    fp8_matmul: bool = False
    power_of_two_scales: bool = False

    def __post_init__(self) -> None:
        _, s_q, h_q, _ = self.q.shape
        pages, page_size, h_kv, _ = self.k_cache.shape
        width = self.block_table.shape[1]
        row_tiles = _planning.dense_row_tiles(h_kv, s_q * h_q // h_kv)
        common = self._allocate(slices=h_kv, row_tiles=row_tiles, capacity=width * page_size)
        self.params = dense_decode_params(
            **common,
            h_kv=h_kv,
            num_pages=pages,
            page_size=page_size,
            table_width=width,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            cache_format=self.cache_format,
            k_cache=address_of(self.k_cache),
            block_table=address_of(self.block_table),
            cache_seqlens=address_of(self.cache_seqlens),
        )
        self._plan(row_tiles, lengths=address_of(self.cache_seqlens))


@dataclasses.dataclass
class RawSparseDecode(_RawDecode):
    """One sparse decode problem on the device; holds every array that the launches touch.

    Caches are the raw arrays of ``cache_format``; the page size of "fp8_v4" pages follows from
    their bytes.
    """

    q: jax.Array
    k_cache: jax.Array
    indices: jax.Array
    softmax_scale: float
    cache_format: str = "plain"
    topk_length: jax.Array | None = None
    extra_k_cache: jax.Array | None = None
    extra_indices: jax.Array | None = None
    extra_topk_length: jax.Array | None = None
    head_dim_v: int = 512
    attn_sink: jax.Array | None = None
    batch_invariant: bool = False
    num_sm_parts: int | None = None
    schedule: jax.Array | None = None
    fp8_matmul: bool = False
    power_of_two_scales: bool = False

    def _page_size(self, cache: jax.Array) -> int:
        if self.cache_format == "fp8_v4":
            return quantization.page_size_of(cache.shape[1])
        return cache.shape[1]

    def __post_init__(self) -> None:
        _, s_q, h_q, _ = self.q.shape
        topk, extra_topk, extra = self.indices.shape[2], None, {}
        if self.extra_k_cache is not None:
            extra_topk = self.extra_indices.shape[2]
            extra = {
                "extra_k_cache": address_of(self.extra_k_cache),
                "extra_indices": address_of(self.extra_indices),
                "extra_topk_length": address_of(self.extra_topk_length),
                "extra_num_pages": self.extra_k_cache.shape[0],
                "extra_page_size": self._page_size(self.extra_k_cache),
                "extra_topk": extra_topk,
            }
        row_tiles = _planning.sparse_row_tiles(1, h_q, s_q)
        capacity = _cuda.selected_capacity(topk, extra_topk)
        common = self._allocate(slices=s_q, row_tiles=row_tiles, capacity=capacity)
        self.params = sparse_decode_params(
            **common,
            **extra,
            num_pages=self.k_cache.shape[0],
            page_size=self._page_size(self.k_cache),
            topk=topk,
            softmax_scale=self.softmax_scale,
            cache_format=self.cache_format,
            k_cache=address_of(self.k_cache),
            indices=address_of(self.indices),
            topk_length=address_of(self.topk_length),
        )
        self._plan(
            row_tiles,
            topk=topk,
            extra_topk=extra_topk,
            lengths=address_of(self.topk_length),
            extra_lengths=address_of(self.extra_topk_length),
        )
