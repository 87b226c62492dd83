"""One JAX primitive an operation: every use of unstable JAX API lives in this file.

An :class:`Operation` says what it computes (shapes, a jnp reference, a CUDA call, which dimensions
are independent of each other); this file makes it work under jit, vmap, shard_map, export, meshes
with automatic or explicit axes, and gives derivatives a clear error.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jax_flashmla import _dispatch

Array = jax.Array
Operands = dict[str, Any]  # name -> Array, ShapeDtypeStruct or None
Static = tuple[tuple[str, Hashable], ...]
Axes = tuple[Any, ...]  # names of mesh axes

_NO_MESH = AbstractMesh((), ())


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """What the library knows about one operation, bound as one JAX primitive.

    Operands are arrays, any of which may be absent (None) in a call; everything else is static
    (hashable, compiled in). Call an Operation with a dictionary of operands and the static
    parameters as keywords; it returns a tuple with one array for each name in ``results``.

    ``dims`` names the dimensions of operands and results, one word each, e.g. ``"b s h d"``. An
    operand that comes in several ranks lists them: ``"h | b h"``. A name shared by an operand and a
    result counts only if it is in ``split`` or follows a name there.

    Attributes:
        name: name of the primitive; error messages begin with it.
        operands: names of the operands in order.
        results: names of the results in order.
        abstract: ``(operands, **static) -> tuple of ShapeDtypeStruct``, operands being
            ShapeDtypeStruct or None. Also used with the shapes of one device or of a folded vmap.
        reference: ``(operands, **static) -> tuple of Array`` in jnp.
        dims: see above; needed for every operand and result.
        cuda: like ``reference``, makes the FFI call; None if there is no kernel.
        cuda_declines: ``(operands, **static) -> reason or None``, operands as in ``abstract``.
        fold: ``(operands, batched, size, static) -> (operands, static, unfold) or None``: turns a
            vmapped call into one call. ``batched`` says for each operand whether it carries the
            vmapped axis, which is then axis 0 and has ``size`` entries; ``unfold`` takes the results
            of the one call and returns them with the vmapped axis at 0. None falls back on a loop.
        split: dimensions along which the operation falls apart into independent operations.
        follows: ``{"k": "h"}``: dimension k (key heads) falls apart together with h (query heads),
            ``h // k`` entries of h to each entry of k; a size of 1 stays whole.
        keep_whole: operands that must never be gathered from several devices (the cache).
        drop_when_split: operands that describe the whole call (schedules): left out when it is
            split over devices or folded, so that the operation makes its own.
    """

    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    abstract: Callable[..., tuple[jax.ShapeDtypeStruct, ...]]
    reference: Callable[..., tuple[Array, ...]]
    dims: Mapping[str, str]
    cuda: Callable[..., tuple[Array, ...]] | None = None
    cuda_declines: Callable[..., str | None] | None = None
    fold: Callable[..., tuple[Operands, dict[str, Any], Callable] | None] | None = None
    split: tuple[str, ...] = ()
    follows: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keep_whole: tuple[str, ...] = ()
    drop_when_split: tuple[str, ...] = ()
    primitive: Primitive = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        missing = [n for n in (*self.operands, *self.results) if n not in self.dims]
        if missing:
            raise ValueError(f"{self.name}: dims lacks {missing}")
        primitive = Primitive(self.name)
        primitive.multiple_results = True
        object.__setattr__(self, "primitive", primitive)
        primitive.def_impl(functools.partial(_evaluate, self))
        primitive.def_abstract_eval(functools.partial(_abstract_eval, self))
        batching.primitive_batchers[primitive] = functools.partial(_batch, self)
        ad.primitive_jvps[primitive] = functools.partial(_no_derivative, self)
        ad.primitive_transposes[primitive] = functools.partial(_no_derivative, self)
        mlir.register_lowering(primitive, functools.partial(_lower, self, False))
        mlir.register_lowering(primitive, functools.partial(_lower, self, True), platform="cuda")

    def __call__(
        self, operands: Mapping[str, Any], *, implementation: str | None, **static: Hashable
    ) -> tuple[Array, ...]:
        """Binds the primitive; raises where the implementation asked for cannot take the call."""
        unknown = [name for name in operands if name not in self.operands]
        if unknown:
            raise TypeError(f"{self.name}: no operand is called {unknown}; it has {self.operands}")
        _dispatch.check_implementation(self.name, implementation)
        names = tuple(n for n in self.operands if operands.get(n) is not None)
        arrays = _vary_alike([jnp.asarray(operands[n]) for n in names])
        items = tuple(sorted(static.items()))
        reason = self.declines({n: shape_of(a) for n, a in zip(names, arrays, strict=True)}, items)
        _dispatch.record(self.name, implementation, reason)
        if implementation == "cuda" and reason is not None:
            raise NotImplementedError(f"{self.name}: implementation='cuda' declines: {reason}")
        return tuple(
            self.primitive.bind(*arrays, names=names, static=items, implementation=implementation)
        )

    def declines(self, present: Operands, static: Static) -> str | None:
        """Why there is no CUDA kernel for these shapes and static parameters, or None."""
        if self.cuda is None:
            return "there is no CUDA kernel for this operation yet"
        if self.cuda_declines is None:
            return None
        return self.cuda_declines(self.complete(present), **dict(static))

    def complete(self, present: Operands) -> Operands:
        """All operands by name, None for those that are absent."""
        return {name: present.get(name) for name in self.operands}

    def letters(self, name: str, ndim: int) -> tuple[str, ...]:
        """The dimension names of operand or result ``name`` when it has ``ndim`` dimensions."""
        for alternative in self.dims[name].split("|"):
            words = tuple(alternative.split())
            if len(words) == ndim:
                return words
        raise ValueError(f"{self.name}: '{name}' of rank {ndim} fits no dims in {self.dims[name]!r}")

    def result_shapes(self, present: Operands, static: Static) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the results."""
        return tuple(self.abstract(self.complete(present), **dict(static)))


def shape_of(value: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array or abstract value, nothing else of it."""
    return jax.ShapeDtypeStruct(tuple(value.shape), value.dtype)


def _vary_alike(arrays: list[Array]) -> list[Array]:
    """Inside shard_map, marks all arrays as varying over the union of their manual mesh axes.

    JAX inserts these casts for its own primitives only. Outside shard_map nothing varies.
    """
    varying = [jax.typeof(a).mat.varying for a in arrays]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(a, tuple(sorted(union - v, key=str)), to="varying") if union - v else a
        for a, v in zip(arrays, varying, strict=True)
    ]


# ------------------------------------------------------------------ evaluation and shapes


@functools.lru_cache(maxsize=4096)
def _jitted(op: Operation, names: tuple[str, ...], static: Static, implementation: str | None):
    def call(*arrays):
        return op.primitive.bind(
            *arrays, names=names, static=static, implementation=implementation
        )

    call.__name__ = call.__qualname__ = op.name
    return jax.jit(call)


def _evaluate(op, *arrays, names, static, implementation):
    return _jitted(op, names, static, implementation)(*arrays)


def _abstract_eval(op, *avals, names, static, implementation):
    del implementation
    shapes = op.result_shapes({n: shape_of(a) for n, a in zip(names, avals, strict=True)}, static)
    return [jax.core.ShapedArray(s.shape, s.dtype) for s in shapes]


def _no_derivative(op, *args, **params):
    raise NotImplementedError(
        f"{op.name}: derivatives are not defined for this operation; "
        "use jax.lax.stop_gradient on its floating-point inputs if none are wanted"
    )


# ------------------------------------------------------------------ vmap


def _batch(op, arrays, axes, *, names, static, implementation):
    size = next(
        a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None
    )
    batched = {n: axis is not None for n, axis in zip(names, axes, strict=True)}
    moved = {
        n: a if axis is None else jnp.moveaxis(a, axis, 0)
        for n, a, axis in zip(names, arrays, axes, strict=True)
    }
    if op.fold is not None:
        kept = {n: a for n, a in moved.items() if n not in op.drop_when_split}
        flags = {n: n in kept and batched.get(n, False) for n in op.operands}
        folded = op.fold(op.complete(kept), flags, size, dict(static))
        if folded is not None:
            operands, parameters, unfold = folded
            present = {n: a for n, a in op.complete(operands).items() if a is not None}
            results = op.primitive.bind(
                *present.values(),
                names=tuple(present),
                static=tuple(sorted(parameters.items())),
                implementation=implementation,
            )
            return tuple(unfold(tuple(results))), (0,) * len(op.results)

    # Operands without the axis are closed over: the loop reads them in place.
    def one(entries):
        merged = {n: entries.get(n, moved[n]) for n in names}
        return tuple(
            op.primitive.bind(
                *merged.values(), names=names, static=static, implementation=implementation
            )
        )

    results = jax.lax.map(one, {n: a for n, a in moved.items() if batched[n]})
    return results, (0,) * len(op.results)


# ------------------------------------------------------------------ lowering


def _choose(op, for_cuda, present, static, implementation):
    """The function that computes this call: ``op.cuda`` or ``op.reference``."""
    if implementation == "xla":
        return op.reference
    if not for_cuda:
        if implementation == "cuda":
            raise NotImplementedError(
                f"{op.name}: implementation='cuda' was asked for, but this computation is lowered "
                "for a platform that is not CUDA"
            )
        return op.reference
    reason = op.declines(present, static)
    missing = None if reason is not None else _dispatch.kernels_missing()
    if implementation == "cuda" and (reason or missing):
        raise NotImplementedError(
            f"{op.name}: implementation='cuda' declines: {reason or missing}"
        )
    if missing is not None:
        _dispatch.warn_fallback(missing)
    return op.reference if reason or missing else op.cuda


def _compute(op, for_cuda, names, static, implementation, *arrays):
    """Computes the call with plain arrays, without meshes, and checks what comes back."""
    present = dict(zip(names, arrays, strict=True))
    shapes = {n: shape_of(a) for n, a in present.items()}
    function = _choose(op, for_cuda, shapes, static, implementation)
    results = tuple(function(op.complete(present), **dict(static)))
    got = [(tuple(r.shape), r.dtype) for r in results]
    expected = [(tuple(s.shape), s.dtype) for s in op.result_shapes(shapes, static)]
    if got != expected:
        raise TypeError(f"{op.name}: {function} returns {got}; its abstract shapes are {expected}")
    return results


def _lower(op, for_cuda, ctx, *values, names, static, implementation):
    function = functools.partial(_compute, op, for_cuda, names, static, implementation)
    plain = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
    with jax.sharding.use_abstract_mesh(_NO_MESH):
        return mlir.lower_fun(function, multiple_results=True)(
            ctx.replace(avals_in=plain), *values
        )
