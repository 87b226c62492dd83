"""The kernels that write and read paged caches, through ``jax_flashmla._ext.raw``.

As `raw_launcher`: no compilation for a shape, and results written into arrays in place.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from raw_launcher import address_of, contents, raw_module, wait_for

from jax_flashmla._cuda import FORMAT_CODES
from jax_flashmla.quantization import FP8_FORMATS

DTYPE_CODES = {"bfloat16": 0, "float16": 1, "float32": 2}
LAYOUT_CODES = {None: 0, "interleaved": 1, "half_split": 2}


def _code(array: Any) -> int:
    return DTYPE_CODES[np.dtype(array.dtype).name]


def _set_cache(p: Any, data: Any, cache_format: str, page_size: int) -> None:
    p.format = FORMAT_CODES[cache_format]
    p.num_pages, p.page_size = data.shape[0], page_size
    if cache_format == "plain":
        p.dtype = _code(data)
    elif cache_format == "fp8_v4":
        p.page_bytes = data.shape[1]
    p.cache = address_of(data)


class RawAppend:
    """One append on the device: ``run`` writes to ``data`` and returns what is in it then.

    Args:
      data: the cache's array. No other array may share its buffer.
      kv: [t, h, latent], or [t, h, d] without k_pe.
      latent: without k_pe, the columns of kv that are the latent; default as in the format, or d.
      shift: elements by which the rows of kv are moved from where they could be read by 16 bytes.
    """

    def __init__(
        self,
        data: jax.Array,
        cache_format: str,
        page_size: int,
        slots: Any,
        kv: Any,
        k_pe: Any = None,
        *,
        latent: int | None = None,
        power_of_two: bool = True,
        norm_weight: Any = None,
        norm_eps: float = 1e-6,
        rope_cos: Any = None,
        rope_sin: Any = None,
        rope_layout: str = "interleaved",
        shift: int = 0,
    ):
        self.data = data
        t, heads, width = kv.shape
        columns = data.shape[-1]
        if cache_format != "plain":
            latent, columns = FP8_FORMATS[cache_format].latent, FP8_FORMATS[cache_format].dim
        elif k_pe is not None:
            latent = width
        elif latent is None:
            latent = columns
        itemsize = np.dtype(kv.dtype).itemsize
        flat = jnp.asarray(kv).reshape(-1)
        self.arrays = {
            "kv_c": jnp.concatenate([jnp.zeros(shift, flat.dtype), flat]) if shift else flat,
            "k_pe": k_pe,
            "norm_weight": norm_weight,
            "rope_cos": rope_cos,
            "rope_sin": rope_sin,
            "slots": slots,
        }
        self.arrays = {n: None if x is None else jnp.asarray(x) for n, x in self.arrays.items()}
        wait_for(data, *self.arrays.values())
        p = self.params = raw_module().CacheAppendParams()
        _set_cache(p, data, cache_format, page_size)
        p.tokens, p.heads = t, heads
        p.latent, p.rope = latent, columns - latent
        p.power_of_two_scales = power_of_two
        for name, array in self.arrays.items():
            setattr(p, name, address_of(array))
        p.kv_c += shift * itemsize
        p.kv_c_dtype, p.kv_c_stride = _code(kv), width
        if k_pe is not None:
            p.k_pe_dtype, p.k_pe_stride = _code(k_pe), columns - latent
        else:
            p.k_pe_dtype, p.k_pe_stride = _code(kv), width
            p.k_pe = p.kv_c + latent * itemsize if columns > latent else 0
        if norm_weight is not None:
            p.norm_dtype, p.norm_eps = _code(norm_weight), norm_eps
        p.rope_layout = LAYOUT_CODES[None if rope_cos is None else rope_layout]

    def run(self) -> np.ndarray:
        """Launches, waits, and returns the cache on the host."""
        raw_module().run(self.params)
        return contents(self.data)

    def time(self, launches: int = 20, replays: int = 5) -> float:
        """Median microseconds of a launch in a CUDA graph of ``launches`` launches."""
        return float(np.median(raw_module().time(self.params, launches, replays)))


class RawGather:
    """One read of slots int32[n] on the device, into an array that is poisoned first."""

    def __init__(self, data: jax.Array, cache_format: str, page_size: int, slots: Any, dtype: Any):
        self.data, self.slots = data, jnp.asarray(slots)
        if cache_format == "plain":
            heads, columns = data.shape[2:]
        else:
            heads, columns = 1, FP8_FORMATS[cache_format].dim
        poison = np.full((len(slots), heads, columns), np.nan, np.float32).astype(dtype)
        self.out = jax.device_put(poison)
        wait_for(data, self.slots, self.out)
        p = self.params = raw_module().CacheGatherParams()
        _set_cache(p, data, cache_format, page_size)
        p.columns, p.tokens = heads * columns, len(slots)
        p.out_dtype = _code(self.out)
        p.slots, p.out = address_of(self.slots), address_of(self.out)

    def run(self) -> np.ndarray:
        """Launches, waits, and returns the tokens on the host."""
        raw_module().run(self.params)
        return contents(self.out)

    def time(self, launches: int = 20, replays: int = 5) -> float:
        """As that of `RawAppend`."""
        return float(np.median(raw_module().time(self.params, launches, replays)))


def on_device(array: np.ndarray) -> jax.Array:
    """A copy that no other array shares."""
    return jax.device_put(np.array(array))
