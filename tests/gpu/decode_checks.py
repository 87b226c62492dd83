"""What tests of the decode kernels on a GPU share: calls, compiled modules, bits, schedules."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import STATIC

from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.reference import scheduler

METADATA = "flashmla_metadata"
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
decode = jax.jit(flash_mla_with_kvcache, static_argnames=STATIC)


def run(call, **changes):
    """Results on the host of a jitted call."""
    out, lse = decode(**{**call, **changes})
    return np.asarray(out), np.asarray(lse)


def custom_calls(compiled, target):
    """How often an optimised module calls an FFI handler."""
    return len(re.findall(rf'custom_call_target="{target}"', compiled.as_text()))


def compile_call(call, **changes):
    """A compiled call, and a function that runs it on the arrays of such a call."""
    call = {**call, **changes}
    compiled = decode.lower(**call).compile()

    def run_compiled(call):
        out, lse = compiled(**{name: x for name, x in call.items() if name not in STATIC})
        return np.asarray(out), np.asarray(lse)

    return compiled, functools.partial(run_compiled, call)


def same_bits(got, want, what=""):
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        integers = np.uint16 if a.dtype.itemsize == 2 else np.uint32
        different = np.ascontiguousarray(a).view(integers) != np.ascontiguousarray(b).view(integers)
        assert not different.any(), f"{what} {name}: {different.sum()} elements have other bits"


def others_unchanged(got, clean, request, what):
    """Checks that a change of one request moved no bit of any other."""
    keep = np.arange(len(clean[0])) != request
    same_bits([x[keep] for x in got], [x[keep] for x in clean], what)


def by_name(chosen):
    """Runs a test for each of these cases."""
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def is_nan(x):
    return np.isnan(np.asarray(x, np.float32))


def all_nan(got):
    return bool(is_nan(got[0]).all() and is_nan(got[1]).all())


def with_value(array, at, value):
    array = array.copy()
    array[at] = value
    return array


def chain(boundaries, b, batch_invariant=False, *, sparse=False, row_tiles=1):
    """The schedule whose parts begin at ``boundaries`` (sorted, the first is (0, 0))."""
    begin = np.array(boundaries, np.int64)
    end = np.concatenate([begin[1:], [[b, 0]]])
    stamp = scheduler.stamp(batch_invariant=batch_invariant, sparse=sparse)
    marks = np.broadcast_to([b, row_tiles, stamp, len(begin)], (len(begin), 4))
    cuts = np.bincount(begin[begin[:, 1] > 0, 0], minlength=b)[:b]
    pieces = np.ones(b, int) if batch_invariant else 1 + cuts
    splits = np.concatenate([[0], np.cumsum(pieces)])
    return np.concatenate([begin, end, marks], axis=1).astype(np.int32), splits.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("pages",))
def at_the_end(small, pages):
    """A cache of so many pages, all bits set but in the last ones."""
    integer = jnp.uint8 if small.dtype == jnp.uint8 else jnp.uint16
    whole = jnp.full((pages, *small.shape[1:]), ~integer(0), integer)
    bits = jax.lax.bitcast_convert_type(small, integer)
    whole = jax.lax.dynamic_update_slice_in_dim(whole, bits, pages - small.shape[0], 0)
    return jax.lax.bitcast_convert_type(whole, small.dtype)
