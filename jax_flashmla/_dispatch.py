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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jax_flashmla import _checks, _ffi

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
    for device in cuda_devices():
        reason = _ffi.kernels_decline(str(getattr(device, "compute_capability", "unknown")))
        if reason is not None:
            return f"jax_flashmla has no CUDA kernels for {device.device_kind}: {reason}"
    return None


_warned: set[str] = set()
_warned_lock = threading.Lock()


def warn_fallback(reason: str) -> None:
    """Warns, once a process and reason, that calls fall back to XLA."""
    with _warned_lock:
        if reason in _warned:
            return
        _warned.add(reason)
    warnings.warn(
        f"{reason}. Falling back to XLA (implementation='xla' asks for that without a warning).",
        RuntimeWarning,
        stacklevel=2,
    )


# ------------------------------------------------------------------ explain


@dataclasses.dataclass(frozen=True)
class Call:
    """One Operation met while tracing: its name, what was asked, why CUDA declines it or None."""

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


@dataclasses.dataclass(frozen=True)
class OperationExplanation:
    """What one operation inside a call does.

    Attributes:
        operation: its name.
        implementation: "cuda" or "xla", or None if the call raises NotImplementedError.
        declines: for each implementation that is not taken, the reasons.
    """

    operation: str
    implementation: str | None
    declines: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        taken = "raises NotImplementedError" if self.implementation is None else self.implementation
        lines = [f"{self.operation}: {taken}"]
        for name, reasons in self.declines.items():
            lines += [f"    not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str`` of it is meant to be read.

    Attributes:
        function: name of the public function.
        backend: JAX's default backend, "cpu" or "gpu", for which this holds.
        operations: one entry for each operation that the call performs.
    """

    function: str
    backend: str
    operations: tuple[OperationExplanation, ...]

    @property
    def implementation(self) -> str | None:
        """ "cuda" or "xla" if all operations take the same, else None."""
        taken = {operation.implementation for operation in self.operations}
        return taken.pop() if len(taken) == 1 else None

    def __str__(self) -> str:
        head = f"{self.function} on the default backend {self.backend}"
        if not self.operations:
            return f"{head}: plain jax.numpy, no operation with several implementations"
        body = "\n".join(f"  {line}" for op in self.operations for line in str(op).split("\n"))
        return f"{head}:\n{body}"


def _explain_call(call: Call, backend: str, on_cuda: bool) -> OperationExplanation:
    reasons = []
    if call.implementation == "xla":
        reasons.append("implementation='xla' was asked for")
    if call.declines is not None:
        reasons.append(call.declines)
    if not on_cuda:
        reasons.append(f"the default backend {backend} is not CUDA")
    missing = kernels_missing()
    if missing is not None:
        reasons.append(missing)
    elif not _ffi.cuda_built():
        reasons.append("jax_flashmla was built without CUDA kernels")
    if not reasons:
        why = "'cuda' was asked for" if call.implementation == "cuda" else "cuda runs this call"
        return OperationExplanation(call.operation, "cuda", {"xla": (why,)})
    declines = {"cuda": tuple(reasons)}
    if call.implementation == "cuda":
        declines["xla"] = ("implementation='cuda' was asked for",)
        return OperationExplanation(call.operation, None, declines)
    return OperationExplanation(call.operation, "xla", declines)


def explain_call(
    name: str, function: Callable, args: Sequence[Any], kwargs: dict[str, Any]
) -> Explanation:
    """Traces ``function`` on the shapes of its arguments and says what its operations take."""
    leaves, tree = jax.tree.flatten((tuple(args), kwargs))
    # numpy scalars have a shape and a dtype too, but are static parameters.
    dynamic = [_checks.is_array(x) and not isinstance(x, np.generic) for x in leaves]
    shapes = [x for x, is_dynamic in zip(leaves, dynamic, strict=True) if is_dynamic]

    def traced(*arrays):
        rest = iter(arrays)
        merged = [next(rest) if d else x for x, d in zip(leaves, dynamic, strict=True)]
        merged_args, merged_kwargs = jax.tree.unflatten(tree, merged)
        return function(*merged_args, **merged_kwargs)

    with recording() as calls:
        try:
            jax.eval_shape(traced, *shapes)
        except NotImplementedError:
            if not calls:
                raise
    backend = jax.default_backend()
    on_cuda = backend == "gpu" and bool(cuda_devices())
    # One trace may meet an operation twice (a custom derivative traces its function again).
    operations = [_explain_call(call, backend, on_cuda) for call in dict.fromkeys(calls)]
    return Explanation(name, backend, tuple(operations))
