"""Argument checks whose messages name the argument, what it is and what it should be.

Every public function validates its static properties (rank, shape, dtype, Python values)
before anything is traced or launched. Messages have one form:

    flash_mla_with_kvcache: argument 'q' has shape (2, 3); expected (b, s_q, h_q, d)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def _dtype_name(dtype: Any) -> str:
    return np.dtype(dtype).name


def is_array(value: Any) -> bool:
    """True for anything with a static shape and dtype: arrays, tracers, ShapeDtypeStruct."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def check_array(op: str, name: str, value: Any, expected: str) -> None:
    """Raises ValueError unless ``value`` has a shape and a dtype; ``expected`` describes it."""
    if value is None:
        raise ValueError(f"{op}: argument '{name}' is missing (None); expected {expected}")
    if not is_array(value):
        raise ValueError(
            f"{op}: argument '{name}' is a {type(value).__name__}; expected an array {expected}"
        )


def check_rank(op: str, name: str, value: Any, dims: Sequence[str]) -> None:
    """Raises ValueError unless ``value`` has one dimension for each name in ``dims``."""
    expected = "(" + ", ".join(dims) + ("," if len(dims) == 1 else "") + ")"
    check_array(op, name, value, expected)
    if len(value.shape) != len(dims):
        raise ValueError(
            f"{op}: argument '{name}' has shape {tuple(value.shape)} of rank {len(value.shape)}; "
            f"expected rank {len(dims)}: {expected}"
        )


def check_shape(
    op: str, name: str, value: Any, expected: Sequence[int], dims: Sequence[str]
) -> None:
    """Raises ValueError unless ``value.shape == expected``; ``dims`` names the dimensions."""
    check_rank(op, name, value, dims)
    if tuple(value.shape) != tuple(expected):
        names = ", ".join(f"{d}={e}" for d, e in zip(dims, expected, strict=True))
        raise ValueError(
            f"{op}: argument '{name}' has shape {tuple(value.shape)}; "
            f"expected {tuple(expected)} ({names})"
        )


def check_dtype(op: str, name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises ValueError unless ``value.dtype`` is one of ``allowed``."""
    names = [_dtype_name(dtype) for dtype in allowed]
    if _dtype_name(value.dtype) not in names:
        raise ValueError(
            f"{op}: argument '{name}' has dtype {_dtype_name(value.dtype)}; "
            f"expected {' or '.join(names)}"
        )


def check_bool(op: str, name: str, value: Any) -> bool:
    """Returns ``value`` as bool; it must be a static Python or numpy bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(
            f"{op}: argument '{name}' is {value!r} of type {type(value).__name__}; "
            "expected a static bool"
        )
    return bool(value)


def check_int(op: str, name: str, value: Any, minimum: int | None = None) -> int:
    """Returns ``value`` as int: a static Python or numpy integer of at least ``minimum``."""
    bound = "" if minimum is None else f" >= {minimum}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ValueError(
            f"{op}: argument '{name}' is {value!r} of type {type(value).__name__}; "
            f"expected a static integer{bound}"
        )
    if minimum is not None and value < minimum:
        raise ValueError(f"{op}: argument '{name}' is {value}; expected an integer{bound}")
    return int(value)


def check_scale(op: str, name: str, value: Any) -> float:
    """Returns ``value`` as float; it must be a static, finite Python or numpy number."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise ValueError(
            f"{op}: argument '{name}' is a {type(value).__name__}; expected a static Python float "
            "(it is compiled into the kernel call)"
        )
    if not math.isfinite(float(value)):
        raise ValueError(f"{op}: argument '{name}' is {float(value)}; expected a finite number")
    return float(value)


def check_choice(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        expected = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{op}: argument '{name}' is {value!r}; expected one of {expected}")
