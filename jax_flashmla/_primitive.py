"""One JAX primitive an operation: every use of unstable JAX API lives in this file.

An :class:`Operation` says what it computes (shapes, a jnp reference, a CUDA call, which dimensions
are independent of each other); this file makes it work under jit, vmap, shard_map, export, meshes
with automatic or explicit axes, and gives derivatives a clear error.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.core import ShardingTypeError
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

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
            vmapped axis, which is then axis 0 and has ``size`` entries; ``unfold`` takes the
            results of the one call and returns them with the vmapped axis at 0. None falls back on
            a loop.
        split: dimensions along which the operation falls apart into independent operations.
        follows: ``{"k": "h"}``: dimension k (key heads) falls apart together with h (query heads),
            ``h // k`` entries of h to each entry of k; a size of 1 stays whole.
        keep_whole: operands that must never be gathered from several devices (the cache).
        drop_when_split: operands that describe the whole call (schedules): left out when it is
            split over devices or folded, so that the operation makes its own.
        transforms_as_reference: the operation has the derivatives of its reference, is divided over
            several devices as XLA divides the reference, and what ``fold`` cannot take is vmapped
            as the reference. Then dims, split, follows, keep_whole and drop_when_split do not count
            (and the kernel runs on one device, or inside shard_map).
    """

    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    abstract: Callable[..., tuple[jax.ShapeDtypeStruct, ...]]
    reference: Callable[..., tuple[Array, ...]]
    dims: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cuda: Callable[..., tuple[Array, ...]] | None = None
    cuda_declines: Callable[..., str | None] | None = None
    fold: Callable[..., tuple[Operands, dict[str, Any], Callable] | None] | None = None
    split: tuple[str, ...] = ()
    follows: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keep_whole: tuple[str, ...] = ()
    drop_when_split: tuple[str, ...] = ()
    transforms_as_reference: bool = False
    # Twice the same, but for the one that may meet the partitioner, and needs devices to lower.
    primitive: Primitive = dataclasses.field(init=False, repr=False)
    manual_primitive: Primitive = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        missing = [n for n in (*self.operands, *self.results) if n not in self.dims]
        if missing and not self.transforms_as_reference:
            raise ValueError(f"{self.name}: dims lacks {missing}")
        object.__setattr__(self, "primitive", _make_primitive(self))
        object.__setattr__(self, "manual_primitive", _make_primitive(self))
        if not self.transforms_as_reference:
            prim_requires_devices_during_lowering.add(self.primitive)

    def __call__(
        self, operands: Mapping[str, Any], *, implementation: str | None, **static: Hashable
    ) -> tuple[Array, ...]:
        """Binds the primitive; raises where the implementation asked for cannot take the call."""
        unknown = [name for name in operands if name not in self.operands]
        if unknown:
            raise TypeError(f"{self.name}: no operand is called {unknown}; it has {self.operands}")
        _dispatch.check_implementation(self.name, implementation)
        names = tuple(n for n in self.operands if operands.get(n) is not None)
        arrays = vary_alike([jnp.asarray(operands[n]) for n in names])
        items = tuple(sorted(static.items()))
        present = dict(zip(names, arrays, strict=True))
        as_reference = self.transforms_as_reference and _on_explicit_axes(arrays)
        if as_reference:
            reason: str | None = _PARTITIONED
        else:
            reason = self.declines({n: shape_of(a) for n, a in present.items()}, items)
        _dispatch.record(self.name, implementation, reason)
        if implementation == "cuda" and reason is not None:
            raise NotImplementedError(f"{self.name}: implementation='cuda' declines: {reason}")
        if as_reference:
            return tuple(self.reference(self.complete(present), **static))
        return _bind(self, present, items, implementation)

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
        raise ValueError(
            f"{self.name}: '{name}' of rank {ndim} fits no dims in {self.dims[name]!r}"
        )

    def result_shapes(self, present: Operands, static: Static) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the results."""
        return tuple(self.abstract(self.complete(present), **dict(static)))


_PARTITIONED = (
    "XLA divides this call over several devices; wrap it in jax.shard_map to run the kernel on each"
)


def _on_explicit_axes(arrays: list[Array]) -> bool:
    """Whether the type of an operand says how it lies on several devices, or could."""
    for sharding in (jax.typeof(a).sharding for a in arrays):
        mesh = sharding.mesh
        if AxisType.Explicit in mesh.axis_types and (mesh.size > 1 or any(sharding.spec)):
            return True
    return False


def shape_of(value: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array or abstract value, nothing else of it."""
    return jax.ShapeDtypeStruct(tuple(value.shape), value.dtype)


def vary_alike(arrays: list[Array]) -> list[Array]:
    """Inside shard_map, marks all arrays as varying over the union of their manual mesh axes.

    JAX inserts these casts for its own primitives only. Outside shard_map nothing varies.
    """
    varying = [jax.typeof(a).mat.varying for a in arrays]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(a, tuple(sorted(union - v, key=str)), to="varying") if union - v else a
        for a, v in zip(arrays, varying, strict=True)
    ]


def _make_primitive(op: Operation) -> Primitive:
    primitive = Primitive(op.name)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(_evaluate, op))
    primitive.def_abstract_eval(functools.partial(_abstract_eval, op))
    batching.primitive_batchers[primitive] = functools.partial(_batch, op)
    jvp = _derivative_of_reference if op.transforms_as_reference else _no_derivative
    ad.primitive_jvps[primitive] = functools.partial(jvp, op)
    ad.primitive_transposes[primitive] = functools.partial(_no_derivative, op)
    mlir.register_lowering(primitive, functools.partial(_lower, op, False))
    mlir.register_lowering(primitive, functools.partial(_lower, op, True), platform="cuda")
    return primitive


def _bind(op, present: Operands, static: Static, implementation: str | None) -> tuple[Array, ...]:
    """Binds an operation to operands given by name, in the order of ``op.operands``."""
    types = jax.sharding.get_abstract_mesh().axis_types
    manual = bool(types) and all(t == AxisType.Manual for t in types)
    primitive = op.manual_primitive if manual else op.primitive
    return tuple(
        primitive.bind(
            *present.values(), names=tuple(present), static=static, implementation=implementation
        )
    )


# ------------------------------------------------------------------ evaluation and shapes


@functools.lru_cache(maxsize=4096)
def _jitted(op: Operation, names: tuple[str, ...], static: Static, implementation: str | None):
    def call(*arrays):
        return _bind(op, dict(zip(names, arrays, strict=True)), static, implementation)

    call.__name__ = call.__qualname__ = op.name
    return jax.jit(call)


def _evaluate(op, *arrays, names, static, implementation):
    return _jitted(op, names, static, implementation)(*arrays)


def _abstract_eval(op, *avals, names, static, implementation):
    del implementation
    present = dict(zip(names, avals, strict=True))
    shapes = op.result_shapes({n: shape_of(a) for n, a in present.items()}, static)
    in_mesh = [a for a in avals if not a.sharding.mesh.empty]
    mesh = in_mesh[0].sharding.mesh if in_mesh else jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return [jax.core.ShapedArray(s.shape, s.dtype) for s in shapes]
    # Specs of types name explicit mesh axes only: with automatic axes the partitioner decides.
    specs = {n: _axes_of(a.sharding.spec, a.ndim) for n, a in present.items()}
    if op.transforms_as_reference:  # and on no explicit axes, see Operation.__call__
        axes = [((),) * len(s.shape) for s in shapes]
    else:
        division = _divide(op, present, specs, dict(mesh.shape), explicit=True)
        axes = [division.axes_of(n, s.shape) for n, s in zip(op.results, shapes, strict=True)]
    results = []
    for shape, found in zip(shapes, axes, strict=True):
        sharding = NamedSharding(mesh, _spec(found))
        if in_mesh:  # keeps what the type says of manual axes; vary_alike made it the same for all
            aval = in_mesh[0].update(
                shape=shape.shape, dtype=shape.dtype, weak_type=False, sharding=sharding
            )
        else:
            aval = jax.core.ShapedArray(shape.shape, shape.dtype, sharding=sharding)
        results.append(aval)
    return results


def _no_derivative(op, *args, **params):
    raise NotImplementedError(
        f"{op.name}: derivatives are not defined for this operation; "
        "use jax.lax.stop_gradient on its floating-point inputs if none are wanted"
    )


def _derivative_of_reference(op, primals, tangents, *, names, static, implementation):
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def function(*arrays):
        merged = list(primals)
        for i, array in zip(moving, arrays, strict=True):
            merged[i] = array
        return op.reference(op.complete(dict(zip(names, merged, strict=True))), **dict(static))

    changes = jax.jvp(function, [primals[i] for i in moving], [tangents[i] for i in moving])[1]
    results = _bind(op, dict(zip(names, primals, strict=True)), static, implementation)
    no_change = [t.dtype == jax.dtypes.float0 for t in changes]
    return results, [
        ad.Zero(jax.typeof(r).to_tangent_aval()) if none else t
        for r, t, none in zip(results, changes, no_change, strict=True)
    ]


# ------------------------------------------------------------------ vmap


def _batch(op, arrays, axes, *, names, static, implementation):
    size = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)
    batched = {n: axis is not None for n, axis in zip(names, axes, strict=True)}
    moved = {
        n: a if axis is None else jnp.moveaxis(a, axis, 0)
        for n, a, axis in zip(names, arrays, axes, strict=True)
    }
    try:
        results = _folded(op, moved, batched, size, static, implementation)
    except ShardingTypeError:
        # Explicit axes: requests are sharded and the vmapped axis before them is not, so the two do
        # not become one axis without moving data. A loop takes the axis as it lies.
        results = None
    if results is None and op.transforms_as_reference:
        results = _vmapped_reference(op, moved, batched, names, static, implementation)
    elif results is None:
        results = _looped(op, moved, batched, names, static, implementation)
    return results, (0,) * len(op.results)


def _folded(op, moved, batched, size, static, implementation) -> tuple[Array, ...] | None:
    """One call for all entries of the vmapped axis, if the operation can."""
    if op.fold is None:
        return None
    kept = {n: a for n, a in moved.items() if n not in op.drop_when_split}
    flags = {n: n in kept and batched.get(n, False) for n in op.operands}
    if not any(flags.values()):  # only what is left out has the axis: all entries are the same
        once = _bind(op, kept, static, implementation)
        return tuple(jnp.broadcast_to(r, (size, *r.shape)) for r in once)
    folded = op.fold(op.complete(kept), flags, size, dict(static))
    if folded is None:
        return None
    operands, parameters, unfold = folded
    present = {n: a for n, a in op.complete(operands).items() if a is not None}
    results = _bind(op, present, tuple(sorted(parameters.items())), implementation)
    return tuple(unfold(results))


def _looped(op, moved, batched, names, static, implementation) -> tuple[Array, ...]:
    """One call after the other."""
    scanned = {n: a for n, a in moved.items() if batched[n]}
    for name, array in scanned.items():
        if _axes_of(jax.typeof(array).sharding.spec, array.ndim)[0]:
            raise NotImplementedError(
                f"{op.name}: vmap over an axis of '{name}' that is sharded over explicit mesh axes "
                f"({jax.typeof(array)}) does not work for these operands; reshard it so that the "
                "vmapped axis is replicated, or use jax.shard_map"
            )

    # Operands without the axis are closed over: the loop reads them in place.
    def one(entries):
        merged = {n: entries.get(n, moved[n]) for n in names}
        return _bind(op, merged, static, implementation)

    return jax.lax.map(one, scanned)


def _vmapped_reference(op, moved, batched, names, static, implementation) -> tuple[Array, ...]:
    if implementation == "cuda":
        raise NotImplementedError(
            f"{op.name}: implementation='cuda' declines: the kernel cannot take this vmap at once"
        )

    def one(*arrays):
        return op.reference(op.complete(dict(zip(names, arrays, strict=True))), **dict(static))

    axes = tuple(0 if batched[n] else None for n in names)
    return tuple(jax.vmap(one, axes)(*(moved[n] for n in names)))


# ------------------------------------------------------------------ lowering


def _choose(op, for_cuda, present, static, implementation):
    """The function that computes this call: ``op.cuda`` or ``op.reference``."""
    if implementation == "xla" or (implementation is None and not for_cuda):
        return op.reference
    reason: str | None = "this computation is lowered for a platform that is not CUDA"
    if for_cuda:
        reason = op.declines(present, static)
        if reason is None:
            reason = _dispatch.kernels_missing()
            if reason is None:
                return op.cuda
            if implementation is None:
                _dispatch.warn_fallback(reason)
    if implementation == "cuda":
        raise NotImplementedError(f"{op.name}: implementation='cuda' declines: {reason}")
    return op.reference


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
    if op.transforms_as_reference:
        if _meets_partitioner(ctx):
            if implementation == "cuda":
                raise NotImplementedError(
                    f"{op.name}: implementation='cuda' declines: {_PARTITIONED}"
                )
            function = functools.partial(_compute, op, False, names, static, "xla")
    elif values and _is_partitioned(op, ctx):
        function = _partitioned(op, for_cuda, names, static, implementation, ctx.avals_in)
    plain = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
    with jax.sharding.use_abstract_mesh(_NO_MESH):
        return mlir.lower_fun(function, multiple_results=True)(ctx.replace(avals_in=plain), *values)


# ------------------------------------------------------------------ several devices


def _meets_partitioner(ctx) -> bool:
    """Whether XLA's partitioner may see the operation, whatever becomes of it."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):  # inside shard_map
        sizes = context.mesh.shape
        return math.prod(sizes[a] for a in sizes if a not in context.manual_axes) > 1
    return context.num_devices > 1


def _is_partitioned(op, ctx) -> bool:
    """Whether XLA's partitioner will see the operation: several devices, not all axes manual."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):  # inside shard_map
        automatic = [a for a in context.mesh.axis_names if a not in context.manual_axes]
        if math.prod(context.mesh.shape[a] for a in automatic) == 1:
            return False
        raise NotImplementedError(
            f"{op.name}: inside shard_map all mesh axes must be manual, but {tuple(automatic)} are "
            "not; leave out shard_map's axis_names, and name these axes in its in_specs and "
            "out_specs"
        )
    if context.num_devices == 1:
        return False
    if ctx.module_context.lowering_parameters.for_export or context.device_assignment is None:
        raise NotImplementedError(
            f"{op.name}: cannot be partitioned over {context.num_devices} devices in an exported "
            "program, or one lowered without devices; wrap the call in jax.shard_map, which says "
            "how it is split"
        )
    return True


@dataclasses.dataclass(frozen=True)
class _Division:
    """How one call is divided over devices: mesh axes for each dimension that is split."""

    op: Operation
    axes: Mapping[str, Axes]  # dimension name -> mesh axes, for all names that are split

    @property
    def is_split(self) -> bool:
        return any(self.axes.values())

    def axes_of(self, name: str, shape: tuple[int, ...]) -> tuple[Axes, ...]:
        """Mesh axes for each dimension of an operand or result."""
        letters = self.op.letters(name, len(shape))
        return tuple(
            () if letter in self.op.follows and size == 1 else self.axes.get(letter, ())
            for letter, size in zip(letters, shape, strict=True)
        )


def _axes_of(spec, ndim: int) -> tuple[Axes, ...]:
    """Mesh axes for each of ``ndim`` dimensions, from a PartitionSpec."""
    entries = [() if e is None else e if isinstance(e, tuple) else (e,) for e in tuple(spec)]
    return tuple(entries) + ((),) * (ndim - len(entries))


def _spec(axes: tuple[Axes, ...]) -> PartitionSpec:
    return PartitionSpec(*(a if len(a) > 1 else a[0] if a else None for a in axes))


def _divide(op, present, specs, mesh_shape, *, explicit, results=()) -> _Division:
    """Decides how a call is divided, from how its operands lie on the devices.

    Args:
        op: the Operation.
        present: shaped operands by name.
        specs: mesh axes for each dimension of each operand.
        mesh_shape: size of each mesh axis.
        explicit: whether the specs are part of the program's types, so that operands that disagree
            are an error instead of being moved.
        results: mesh axes for each dimension of each result if something asks for them, as
            ``(name, shape, axes)``; they count after the operands.

    Raises:
        ValueError: an operand that must stay whole would be gathered, with advice.
    """
    sizes: dict[str, int] = {}
    wishes: dict[str, list[tuple[str, Axes]]] = {}  # split dimension -> (operand, mesh axes)

    def several(axes: Axes) -> Axes:
        return tuple(a for a in axes if mesh_shape[a] > 1)

    def collect(name, shape, axes):
        for letter, size, found in zip(op.letters(name, len(shape)), shape, axes, strict=True):
            sizes.setdefault(letter, size)
            leader = op.follows.get(letter, letter)
            wish = several(found)
            if wish and leader in op.split:
                wishes.setdefault(leader, []).append((name, wish))

    # What must not move comes first, then the largest operands.
    kept = [n for n in present if n not in op.drop_when_split]
    kept.sort(key=lambda n: (n not in op.keep_whole, -math.prod(present[n].shape)))
    for name in kept:
        collect(name, present[name].shape, specs[name])
    from_operands = {letter: list(found) for letter, found in wishes.items()}
    for name, shape, axes in results:
        collect(name, shape, axes)

    chosen: dict[str, Axes] = {}
    taken: set[Any] = set()
    for letter in op.split:
        if explicit and len({axes for _, axes in from_operands.get(letter, ())}) > 1:
            wanted = ", ".join(f"'{n}' over {axes}" for n, axes in from_operands[letter])
            raise ValueError(
                f"{op.name}: operands are sharded differently along dimension '{letter}': "
                f"{wanted}; reshard them alike with jax.sharding.reshard"
            )
        for _, axes in wishes.get(letter, ()):
            devices = math.prod(mesh_shape[a] for a in axes)
            if sizes[letter] % devices == 0 and not taken.intersection(axes):
                chosen[letter] = axes
                taken.update(axes)
                break
    for follower, leader in op.follows.items():
        if leader not in chosen or follower not in sizes:
            continue
        devices = math.prod(mesh_shape[a] for a in chosen[leader])
        if sizes[follower] == 1:
            if any(follower in op.dims[name].split() for name in op.results):
                raise ValueError(
                    f"{op.name}: dimension '{leader}' is sharded over {devices} devices, but a "
                    f"result has the dimension '{follower}' of size 1 and sums over all of "
                    f"'{leader}'; use jax.shard_map"
                )
            continue
        if sizes[follower] % devices:
            raise ValueError(
                f"{op.name}: dimension '{leader}' of size {sizes[leader]} is sharded over "
                f"{devices} devices, which do not divide dimension '{follower}' of size "
                f"{sizes[follower]}; shard it over mesh axes whose sizes divide "
                f"{sizes[follower]}, or use jax.shard_map"
            )
        chosen[follower] = chosen[leader]

    division = _Division(op, chosen)
    for name in kept:
        if name not in op.keep_whole:
            continue
        shape = tuple(present[name].shape)
        allowed = division.axes_of(name, shape)
        for letter, size, found, may in zip(
            op.letters(name, len(shape)), shape, specs[name], allowed, strict=True
        ):
            have = several(found)
            if have not in ((), may):
                along = f" and shard the other operands along {' or '.join(op.split)}"
                raise ValueError(
                    f"{op.name}: '{name}' of shape {shape} is sharded over mesh axes {have} along "
                    f"dimension '{letter}' of size {size}, and would be gathered whole on every "
                    f"device. Keep it replicated over {have}{along if op.split else ''}; or wrap "
                    "the call in jax.shard_map so that each device attends to the part that it "
                    "holds, and merge the results through their lse"
                )
    return division


def _sharding_rule(op, present, result_shapes) -> tuple[str, dict[str, int]]:
    """The propagation rule for Shardy: only dimensions that may be split are tied together.

    All others get a factor of their own, so that their sharding neither spreads nor is undone
    before the partitioner asks: an operand that must stay whole is then seen as it lies.
    """
    sizes: dict[str, int] = {}
    for name, value in present.items():
        sizes.update(zip(op.letters(name, len(value.shape)), value.shape, strict=True))
    groups = {
        leader: follower for follower, leader in op.follows.items() if sizes.get(follower, 1) > 1
    }
    factor_sizes: dict[str, int] = {}
    fresh = itertools.count()

    def factor(letter: str, size: int) -> str:
        leader = op.follows.get(letter, letter)
        if leader not in op.split or (letter != leader and size == 1):
            return f"own{next(fresh)}"
        follower = groups.get(letter)
        if follower is not None and sizes[follower] < size:
            # Consecutive entries share one entry of the follower.
            factor_sizes[f"group_{letter}"] = size // sizes[follower]
            return f"(split_{letter} group_{letter})"
        return f"split_{leader}"

    def factors(name: str, shape: tuple[int, ...]) -> str:
        if name in op.drop_when_split:
            return " ".join(f"own{next(fresh)}" for _ in shape)
        return " ".join(map(factor, op.letters(name, len(shape)), shape))

    left = ", ".join(factors(n, v.shape) for n, v in present.items())
    right = ", ".join(factors(n, s.shape) for n, s in zip(op.results, result_shapes, strict=True))
    return f"{left} -> {right}", factor_sizes


def _partitioned(op, for_cuda, names, static, implementation, avals):
    """The call as a function that XLA's partitioner divides along ``op.split``."""

    # The inner jit keeps array constants to itself: custom_partitioning cannot have any.
    @jax.jit
    def inner(*arrays):
        return _compute(op, for_cuda, names, static, implementation, *arrays)

    @custom_partitioning
    def whole(*arrays):
        return inner(*arrays)

    def axes_of(value):
        sharding = value.sharding
        if isinstance(sharding, NamedSharding):
            return _axes_of(sharding.spec, len(value.shape))
        if sharding is None or sharding.is_fully_replicated:  # where no operand has a mesh
            return ((),) * len(value.shape)
        raise ValueError(
            f"{op.name}: operands are sharded without a mesh; give them a "
            "jax.sharding.NamedSharding, or wrap the call in jax.shard_map"
        )

    def divide(mesh, arguments, results):
        own = {n: axes_of(a) for n, a in zip(names, arguments, strict=True)}
        asked = [(n, tuple(r.shape), axes_of(r)) for n, r in results]
        present = dict(zip(names, arguments, strict=True))
        return own, _divide(op, present, own, dict(mesh.shape), explicit=False, results=asked)

    def placed(mesh, value, axes):
        if isinstance(value.sharding, NamedSharding):
            return NamedSharding(mesh, _spec(axes))
        return value.sharding  # replicated, as axes_of found

    def partition(mesh, arguments, results):
        named_results = list(zip(op.results, results, strict=True))
        own, division = divide(mesh, arguments, named_results)
        dropped = op.drop_when_split if division.is_split else ()

        def local(*arrays):
            kept = {n: a for n, a in zip(names, arrays, strict=True) if n not in dropped}
            with jax.sharding.use_abstract_mesh(_NO_MESH):
                return _compute(op, for_cuda, tuple(kept), static, implementation, *kept.values())

        return (
            mesh,
            local,
            tuple(placed(mesh, r, division.axes_of(n, r.shape)) for n, r in named_results),
            tuple(
                placed(mesh, a, own[n] if n in dropped else division.axes_of(n, a.shape))
                for n, a in zip(names, arguments, strict=True)
            ),
        )

    def infer(mesh, arguments, results):  # for the partitioner before Shardy
        _, division = divide(mesh, arguments, [])
        if mesh.empty:  # all replicated, as axes_of found
            return tuple(arguments[0].sharding for _ in results)
        return tuple(
            NamedSharding(mesh, _spec(division.axes_of(n, r.shape)))
            for n, r in zip(op.results, results, strict=True)
        )

    present = {n: shape_of(a) for n, a in zip(names, avals, strict=True)}
    rule, factor_sizes = _sharding_rule(op, present, op.result_shapes(present, static))
    whole.def_partition(
        partition, infer_sharding_from_operands=infer, sharding_rule=rule, **factor_sizes
    )
    return whole
