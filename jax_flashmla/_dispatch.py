"""Which implementation a call takes, why the others decline, and how a user asks.

``implementation=`` follows ``jax.nn.dot_product_attention``: ``"cuda"`` insists on the kernels,
``"xla"`` takes the reference on every platform, ``None`` takes the kernels where they run.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jax_flashmla import _checks

IMPLEMENTATIONS = ("cuda", "xla", None)


def check_implementation(op: str, implementation: Any) -> None:
    """Raises ValueError unless ``implementation`` is "cuda", "xla" or None."""
    _checks.check_choice(op, "implementation", implementation, IMPLEMENTATIONS)


def cuda_devices() -> list[jax.Device]:
    """CUDA devices of this process; empty without a GPU, a driver or JAX's CUDA plugin."""
    try:
        return list(jax.local_devices(backend="cuda"))
    except RuntimeError:  # JAX knows no such backend, or it failed to start
        return []


def kernels_missing() -> str | None:
    """Why this process cannot run the CUDA kernels on its GPUs, with the remedy, or None.

    None too without a local GPU: whoever lowers for CUDA then exports for another machine.
    """
    devices = cuda_devices()
    if not devices:
        return None
    from jax_flashmla import _ffi

    if not _ffi.cuda_built():
        return (
            "jax_flashmla was built without its CUDA kernels; reinstall it with "
            "JAX_FLASHMLA_CUDA=ON set in the environment of pip"
        )
    for device in devices:
        capability = str(getattr(device, "compute_capability", "unknown"))
        if not _ffi.kernels_for(capability):
            built = ", ".join("sm_" + name for name in _ffi.cuda_architectures())
            return (
                f"jax_flashmla has no CUDA kernels for {device.device_kind} (compute capability "
                f"{capability}; built for {built}); pass implementation='xla' to choose XLA "
                "without this warning"
            )
    return None


_warned: set[str] = set()
_warned_lock = threading.Lock()


def warn_fallback(reason: str) -> None:
    """Warns once a process and reason that calls fall back to XLA."""
    with _warned_lock:
        if reason in _warned:
            return
        _warned.add(reason)
    warnings.warn(f"{reason}. Falling back to XLA.", RuntimeWarning, stacklevel=2)


@dataclasses.dataclass(frozen=True)
class Call:
    """One Operation met while tracing: its name, what was asked, why CUDA declines or None."""

    operation: str
    implementation: str | None
    declines: str | None


_recorder: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar(
    "jax_flashmla_recorder", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Collects the Operations that are traced inside the context."""
    calls: list[Call] = []
    token = _recorder.set(calls)
    try:
        yield calls
    finally:
        _recorder.reset(token)


def record(operation: str, implementation: str | None, declines: str | None) -> None:
    """Notes one traced Operation for an enclosing :func:`recording`."""
    calls = _recorder.get()
    if calls is not None:
        calls.append(Call(operation, implementation, declines))
