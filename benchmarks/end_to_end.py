"""Steps of a decoding model: all attention layers of DeepSeek V3 with their projections, no MLPs.

A step takes one token of each request through 61 layers of ``jax_flashmla.flax.decode``, each with
a norm before it and a residual around it, in one jitted program: one schedule for all layers, one
donated cache of layers x pages, weights and cached tokens random. Steps follow each other without
waiting, the tokens' activations and positions of one being those that the step before returned.

The layers are unrolled, and each has arrays of its own, as in a loop over modules. ``scan_us`` is
the same step as a scan over stacked weights, compiled so that their slices are read in place
(`SCAN_OPTIONS`): XLA's own kernels for matrix products would first write out what they multiply
with. Such a program compiles in seconds, however many layers there are.

The fallback, ``xla_us``, is measured as a scan as well, with the same options: unrolled, it takes
many times as long to compile.

What attention takes is the difference to the same step without it: with everything else, the
writes to the cache included, but queries instead of averages of latents going into the output
projections, and no schedule. So it is what a perfectly fast kernel would save, and is more than
the kernels' own time where XLA can fuse less because of them. That time is ``raw_us``: a launch of
one layer times the layers, which is too little where one layer's cache stays in the L2 cache.

``read_us`` is what reading all weights and the cached tokens once takes at the read ceiling of the
run, ``matmul_us`` what the products take at that of matrix products, ``bound_us`` the longer one.

The largest row, of 128 requests, holds 74 GB of cache and 23 GB of weights. JAX takes 75% of a
GPU's memory, which on an H200 is enough; ``XLA_PYTHON_CLIENT_MEM_FRACTION=0.9`` leaves more room.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import DenseCase

from benchmarks import measure
from benchmarks.inside_jax import DECODE, METADATA, custom_calls
from jax_flashmla import PagedKVCache, _decode_loop, slot_mapping
from jax_flashmla.flax import MLAConfig, core

Array = jax.Array

_TRIALS = 5
_TRIAL_SECONDS = 0.05
_MAX_STEPS = 10  # of a trial
#: A fallback whose step takes longer is not timed.
_LONGEST_STEP_SECONDS = 5.0
#: Bound of the relative difference between the results of a step by different programs.
_SAME = 0.05

#: Two matrices with the same input stay two: joined, they would be written out in every step.
UNROLLED_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}
#: And slices of stacked matrices go to cuBLAS, which takes them where they are.
SCAN_OPTIONS = UNROLLED_OPTIONS | {"xla_gpu_enable_triton_gemm": False}

# Instructions that make no array of their own.
_MAKES_NOTHING = frozenset(
    "parameter get-tuple-element bitcast tuple while conditional call opt-barrier".split()
)


@dataclasses.dataclass(frozen=True)
class Stack:
    """A model and a batch: ``b`` requests whose last step sees ``s_k`` tokens."""

    name: str
    config: MLAConfig
    layers: int
    b: int
    s_k: int
    page_size: int = measure.PAGE_SIZE

    @property
    def case(self) -> DenseCase:
        """The attention of one layer."""
        config = self.config
        return DenseCase(
            self.name,
            self.b,
            self.s_k,
            config.num_heads,
            d=config.cache_dim,
            dv=config.kv_lora_rank,
            page_size=self.page_size,
        )

    @property
    def columns(self) -> int:
        """Pages of a request."""
        return -(-self.s_k // self.page_size)

    @property
    def pages(self) -> int:
        """Pages of one layer."""
        return self.b * self.columns

    @property
    def matrices(self) -> int:
        """Numbers in the matrices of one layer."""
        shapes = core.param_shapes(self.config).values()
        return sum(math.prod(shape) for shape in shapes if len(shape) > 1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices."""
        return self.layers * self.matrices * np.dtype(self.config.param_dtype).itemsize

    @property
    def context_bytes(self) -> int:
        """Bytes of all tokens in the cache that a step reads."""
        row = self.config.cache_dim * np.dtype(self.config.dtype).itemsize
        return self.layers * self.b * self.s_k * row

    @property
    def flop(self) -> int:
        """Floating-point operations of a step: every matrix with every token, and attention."""
        return self.layers * (2 * self.b * self.matrices + self.case.flop())


def deepseek_v3(b: int, s_k: int) -> Stack:
    """The attention of DeepSeek V3."""
    return Stack(f"v3-61-layers-b{b}-sk{s_k}", MLAConfig.preset("deepseek-v3"), 61, b, s_k)


#: What is measured.
STACKS = tuple(deepseek_v3(b, 8192) for b in (1, 32, 128))


# ---------------------------------------------------------------------------------------------
# Inputs


@functools.partial(jax.jit, static_argnums=1)
def _layer_weights(key: Array, config: MLAConfig) -> dict[str, Array]:
    norm = jnp.ones((config.hidden_size,), config.param_dtype)
    return {"norm": norm, **core.init_params(key, config)}


@functools.partial(jax.jit, static_argnums=1)
def _stacked_weights(keys: Array, config: MLAConfig) -> dict[str, Array]:
    return jax.lax.map(lambda key: _layer_weights(key, config), keys)


def make_weights(stack: Stack, *, unrolled: bool) -> Any:
    """Random weights: a list of layers, or else stacked along the first axis. The same numbers."""
    keys = jax.random.split(jax.random.key(0), stack.layers)
    if unrolled:
        return [_layer_weights(key, stack.config) for key in keys]
    return _stacked_weights(keys, stack.config)


def make_cache(stack: Stack) -> PagedKVCache:
    """A cache in which every slot holds random numbers like those of a normalised latent."""
    config = stack.config

    @jax.jit
    def make(keys):
        shape = (stack.columns, stack.page_size, 1, config.cache_dim)
        parts = jax.lax.map(lambda key: jax.random.normal(key, shape, config.dtype), keys)
        return parts.reshape(-1, *shape[1:])

    keys = jax.random.split(jax.random.key(1), stack.layers * stack.b)
    return PagedKVCache(make(keys), "plain", stack.page_size)


@dataclasses.dataclass
class Inputs:
    """Arguments of a step; the cache is that of the last step that ran."""

    cache: PagedKVCache
    weights: Any
    x: Array
    table: Array

    @classmethod
    def make(cls, stack: Stack, *, unrolled: bool) -> Inputs:
        """Random ones."""
        weights = make_weights(stack, unrolled=unrolled)
        shape = (stack.b, 1, stack.config.hidden_size)
        x = jax.random.normal(jax.random.key(2), shape, stack.config.dtype)
        pages = np.random.default_rng(0).permutation(stack.pages).astype(np.int32)
        table = jnp.asarray(pages.reshape(stack.b, stack.columns))
        return jax.block_until_ready(cls(make_cache(stack), weights, x, table))

    def arguments(self, position: int) -> tuple[Any, ...]:
        """Of a step that writes the token at this position of every request."""
        positions = jnp.full((self.table.shape[0], 1), position, jnp.int32)
        return self.cache, self.weights, self.x, positions, self.table


jax.tree_util.register_dataclass(Inputs, ["cache", "weights", "x", "table"], [])


def argument_shapes(stack: Stack, *, unrolled: bool) -> tuple[Any, ...]:
    """Shapes and dtypes of a step's arguments."""
    weights = jax.eval_shape(functools.partial(make_weights, stack, unrolled=unrolled))
    cache = jax.eval_shape(functools.partial(make_cache, stack))
    x = jax.ShapeDtypeStruct((stack.b, 1, stack.config.hidden_size), stack.config.dtype)
    positions = jax.ShapeDtypeStruct((stack.b, 1), jnp.int32)
    return cache, weights, x, positions, jax.ShapeDtypeStruct((stack.b, stack.columns), jnp.int32)


# ---------------------------------------------------------------------------------------------
# The step


def no_attention(q: Array, cache: PagedKVCache, config: MLAConfig) -> Array:
    """Something of the shape of attention's result that depends on all of q, made of q alone."""
    del cache
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    no_padding = [(0, 0)] * (q.ndim - 1)
    return q[..., :latent] + jnp.pad(q[..., latent:], [*no_padding, (0, latent - rope)])


def decode_around(
    attend: Callable[[Array, PagedKVCache], Array],
    params: dict[str, Array],
    x: Array,
    positions: Array,
    cache: PagedKVCache,
    table: Array,
    *,
    config: MLAConfig,
    first_page: Array,
    num_pages: int,
) -> tuple[Array, PagedKVCache]:
    """``jax_flashmla.flax.decode`` of one token a request, around another attention."""
    slots = slot_mapping(
        table, positions, cache.page_size, num_pages=num_pages, page_offset=first_page
    )
    cache = core.append_latents(params, x, positions, slots, cache, config)
    q = core.absorb_queries(params, *core.project_queries(params, x, positions, config))
    out = core.expand_outputs(params, attend(q, cache))
    return core.project_outputs(params, out), cache


def step_program(stack: Stack, attention: str | None, *, unrolled: bool) -> Any:
    """A jitted function of cache, weights, x, positions int32[b, 1] and table: one step.

    It returns the cache, which it takes over, the next x [b, 1, hidden] and the next positions.

    Args:
      stack: what decodes.
      attention: ``"cuda"`` or ``"xla"`` (an implementation), or None for a step without it.
      unrolled: layers in a row instead of a scan; for weights made with the same.
    """
    config, layers, pages = stack.config, stack.layers, stack.pages

    def step(cache, weights, x, positions, table):
        options: dict[str, Any] = {"config": config, "num_pages": pages}
        if attention is None:
            attend = functools.partial(no_attention, config=config)
            decode = functools.partial(decode_around, attend)
        else:
            decode = functools.partial(core.decode, implementation=attention)
        if attention == "cuda":
            options["schedule"] = core.make_schedule(config, positions)

        def layer(carry, inputs):
            x, cache = carry
            index, params = inputs
            norm, params = params["norm"], {k: v for k, v in params.items() if k != "norm"}
            hidden = core.rms_norm(x, norm, config.rms_norm_eps)
            out, cache = decode(
                params, hidden, positions, cache, table, first_page=index * pages, **options
            )
            return (x + out, cache), None

        carry = x, cache
        numbers = jnp.arange(layers, dtype=jnp.int32)
        if unrolled:
            for index in range(layers):
                carry, _ = layer(carry, (numbers[index], weights[index]))
        else:
            carry, _ = jax.lax.scan(layer, carry, (numbers, weights))
        x, cache = carry
        # Stands for the rest of the model: what the next token begins with.
        x = core.rms_norm(x, jnp.ones((config.hidden_size,)), config.rms_norm_eps)
        return cache, x, positions + 1

    options = UNROLLED_OPTIONS if unrolled else SCAN_OPTIONS
    return jax.jit(step, donate_argnums=0, compiler_options=options)


# ---------------------------------------------------------------------------------------------
# What XLA made of it


def weight_copies(module: str, stack: Stack) -> int:
    """Bytes of instructions of a compiled module that write out a matrix of one layer as it is.

    And, divided by the layers, of those that write out one of all layers in whatever order.

    In a scan a layer's weights are slices of the stacked ones. Where XLA does not read a slice in
    place, it writes it somewhere first. Of an unrolled program: all layers together.
    """
    size = np.dtype(stack.config.param_dtype).itemsize
    shapes = [shape for shape in core.param_shapes(stack.config).values() if len(shape) > 1]
    stacked = [sorted((stack.layers, *shape)) for shape in shapes]
    fused = set(re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", module))
    found, current = 0, ""
    for line in module.splitlines():
        if line.endswith("{") and not line.startswith(("HloModule", " ")):
            current = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
        match = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]+)\](?:{[^}]*})? ([\w-]+)\(", line)
        if match is None or current in fused or match[2] in _MAKES_NOTHING:
            continue
        dims = tuple(int(n) for n in match[1].split(",") if n != "1")
        if any(_merges(shape, dims) for shape in shapes):
            found += math.prod(dims) * size
        elif sorted(dims) in stacked:
            found += math.prod(dims) * size // stack.layers
    return found


def _merges(shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    """Whether dims are those of shape, neighbours possibly multiplied with each other."""
    ends = np.cumprod(dims).tolist()
    return math.prod(shape) == math.prod(dims) and set(ends) <= set(np.cumprod(shape).tolist())


def check_step(
    compiled: Any, stack: Stack, attention: str | None, cache: PagedKVCache, *, unrolled: bool
) -> measure.Row:
    """Raises RuntimeError unless kernels are where they should be and no cache is copied; counts.

    A copy that the fallback makes is no error, but in the counts.
    """
    text = compiled.as_text()
    memory = _decode_loop.inspect(compiled, cache)
    calls = custom_calls(text, DECODE), custom_calls(text, METADATA)
    expected = ((stack.layers if unrolled else 1), 1) if attention == "cuda" else (0, 0)
    faults = []
    if calls != expected:
        faults.append(
            f"{calls[0]} calls of {DECODE} and {calls[1]} of {METADATA} instead of "
            f"{expected[0]} and {expected[1]}"
        )
    if not memory["in_place"] and attention != "xla":
        aliased = f"{memory['aliased_bytes']} of {memory['cache_bytes']} bytes are updated in place"
        faults += [aliased, *(f"copies the cache: {line}" for line in memory["copies"])]
    if faults:
        raise RuntimeError("the compiled step is not as expected: " + "; ".join(faults))
    return {
        "custom_calls": calls[0],
        "metadata_calls": calls[1],
        "cache_copies": len(memory["copies"]),
        "temp_bytes": memory["temporary_bytes"],
        "cache_bytes": memory["cache_bytes"],
        "weight_copy_bytes": weight_copies(text, stack),
    }


# ---------------------------------------------------------------------------------------------
# Times


def _say(stack: Stack, text: str) -> None:
    print(f"  {stack.name}: {text}", file=sys.stderr, flush=True)


class _NotMeasured(Exception):
    """Why a fallback was not timed."""


def _no_room(needed: int) -> str | None:
    """Why so many bytes cannot be had, None if they can or if the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    if needed <= free:
        return None
    return f"it needs {needed / 1e9:.1f} GB more memory, of which {free / 1e9:.1f} are left"


def _run(compiled: Any, inputs: Inputs, steps: int, end: int) -> tuple[float, Array]:
    """Seconds of so many steps in a row, the last of which sees ``end`` tokens; and its x."""
    arguments = jax.block_until_ready(inputs.arguments(end - steps))
    cache, weights, x, positions, table = arguments
    del arguments
    start = time.perf_counter()
    for _ in range(steps):
        cache, x, positions = compiled(cache, weights, x, positions, table)
    jax.block_until_ready((cache, x))
    seconds = time.perf_counter() - start
    inputs.cache = cache
    return seconds, x


def _step_us(
    compiled: Any, inputs: Inputs, stack: Stack, longest: float = math.inf
) -> tuple[float, int]:
    """Microseconds of a step, the median of trials; and the steps of a trial."""
    _run(compiled, inputs, 1, stack.s_k)
    seconds, _ = _run(compiled, inputs, 1, stack.s_k)
    if seconds > longest:
        raise _NotMeasured(f"one step takes {seconds:.1f} s")
    steps = min(max(math.ceil(_TRIAL_SECONDS / seconds), 1), _MAX_STEPS, stack.s_k)
    _run(compiled, inputs, steps, stack.s_k)  # XLA records graphs on the way
    address = inputs.cache.data.unsafe_buffer_pointer()
    times = [_run(compiled, inputs, steps, stack.s_k)[0] / steps for _ in range(_TRIALS)]
    if inputs.cache.data.unsafe_buffer_pointer() != address:
        raise RuntimeError("the cache has moved")
    return 1e6 * float(np.median(times)), steps


def _difference(a: Array, b: Array) -> float:
    """Relative difference of two results."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


Program = tuple[str | None, bool]  # attention, and whether it is unrolled


def compile_steps(stack: Stack, programs: Iterable[Program]) -> dict[Program, Any]:
    """Compiled steps, all at the same time; or the error where XLA had not enough memory."""

    def compile_one(program: Program) -> Any:
        attention, unrolled = program
        start = time.perf_counter()
        step = step_program(stack, attention, unrolled=unrolled)
        try:
            compiled = step.lower(*argument_shapes(stack, unrolled=unrolled)).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return error
        what = "no attention" if attention is None else f"attention {attention!r}"
        form = "unrolled" if unrolled else "a scan"
        seconds = time.perf_counter() - start
        _say(stack, f"step with {what}, {form}, compiled in {seconds:.1f} s")
        return compiled

    programs = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(len(programs)) as pool:
        return dict(zip(programs, pool.map(compile_one, programs), strict=True))


def _check_same(x: Array, y: Array, what: str) -> float:
    """The relative difference of two results; RuntimeError if it is too large."""
    difference = _difference(x, y)
    if not difference <= _SAME:
        raise RuntimeError(f"{what} differ by {difference:.3g}")
    return difference


def _measure_xla(stack: Stack, inputs: Inputs, compiled: Any, expected: Array) -> measure.Row:
    """The step on the XLA fallback; without a time, why there is none in ``xla_note``.

    Args:
      stack: what decodes.
      inputs: with stacked weights.
      compiled: the program, or the error instead of one.
      expected: x after the step that sees ``s_k`` tokens.
    """
    row: measure.Row = {"xla_us": None, "xla_note": None, "xla_difference": None}
    try:
        if isinstance(compiled, Exception):
            raise compiled
        counts = check_step(compiled, stack, "xla", inputs.cache, unrolled=False)
        names = ("cache_copies", "temp_bytes", "weight_copy_bytes")
        row |= {f"xla_{name}": counts[name] for name in names}
        reason = _no_room(counts["temp_bytes"])
        if reason:
            raise _NotMeasured(reason)
        # The same step by both. What one has written to the cache the other writes again.
        x = _run(compiled, inputs, 1, stack.s_k)[1]
        row["xla_difference"] = _check_same(expected, x, "kernels and XLA")
        row["xla_us"], row["xla_steps"] = _step_us(compiled, inputs, stack, _LONGEST_STEP_SECONDS)
    except _NotMeasured as reason:
        row["xla_note"] = str(reason)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row["xla_note"] = str(error).splitlines()[0][:200]
    return row


def _measure_scan(
    stack: Stack, inputs: Inputs, compiled: Any, kernels: str, expected: Array
) -> measure.Row:
    """The step as a scan over stacked weights, which are made in place of the separate ones."""
    inputs.weights = None  # both may not fit
    inputs.weights = jax.block_until_ready(make_weights(stack, unrolled=False))
    counts = check_step(compiled, stack, kernels, inputs.cache, unrolled=False)
    _check_same(expected, _run(compiled, inputs, 1, stack.s_k)[1], "unrolled layers and a scan")
    return {
        "scan_us": _step_us(compiled, inputs, stack)[0],
        "scan_weight_copy_bytes": counts["weight_copy_bytes"],
    }


def measure_stack(
    timer: measure.Timer, stack: Stack, *, unrolled: bool = True, kernels: str = "cuda"
) -> measure.Row:
    """A row of the section.

    Args:
      timer: for the ceilings, and the kernels' own time.
      stack: what decodes.
      unrolled: whether the program that is measured is unrolled, and the scan only beside it.
      kernels: the implementation that is measured.
    """
    main, bare, scan, fallback = (kernels, unrolled), (None, unrolled), (kernels, False), "xla"
    # While there is memory for XLA to try out kernels in.
    programs = compile_steps(stack, (main, bare, scan, (fallback, False)))
    for program in (main, bare, scan):
        if isinstance(programs[program], Exception):
            raise programs[program]

    start = time.perf_counter()
    inputs = Inputs.make(stack, unrolled=unrolled)
    gigabytes = inputs.cache.data.nbytes / 1e9, stack.weight_bytes / 1e9
    sizes = "{:.1f} GB of cache and {:.1f} GB of weights".format(*gigabytes)
    _say(stack, f"{sizes} filled in {time.perf_counter() - start:.1f} s")

    counts = check_step(programs[main], stack, kernels, inputs.cache, unrolled=unrolled)
    us, steps = _step_us(programs[main], inputs, stack)
    check_step(programs[bare], stack, None, inputs.cache, unrolled=unrolled)
    bare_us, _ = _step_us(programs[bare], inputs, stack)
    _, x = _run(programs[main], inputs, 1, stack.s_k)
    if not bool(jnp.isfinite(x).all()):
        raise RuntimeError("the results of a step are not finite")
    raw_us = stack.layers * timer.raw(stack.case).us
    scanned = {"scan_us": us, "scan_weight_copy_bytes": counts["weight_copy_bytes"]}
    if unrolled:
        scanned = _measure_scan(stack, inputs, programs[scan], kernels, x)
        _, x = _run(programs[scan], inputs, 1, stack.s_k)  # other tokens are cached by now
    xla = _measure_xla(stack, inputs, programs[fallback, False], x)

    read = timer.limits.get("read_gb_per_s")
    matmul = timer.limits.get("bf16_matmul_tflop_per_s")
    moved = stack.weight_bytes + stack.context_bytes
    read_us = None if read is None else moved / read / 1e3
    matmul_us = None if matmul is None else stack.flop / matmul / 1e6
    bound_us = None if read_us is None or matmul_us is None else max(read_us, matmul_us)
    return {
        **measure.sizes(stack.case),
        "layers": stack.layers,
        "program": "unrolled" if unrolled else "scan",
        "us": us,
        "steps": steps,
        "trials": _TRIALS,
        "tokens_per_s": stack.b / us * 1e6,
        "without_attention_us": bare_us,
        "attention_us": us - bare_us,
        "attention_share": (us - bare_us) / us,
        "raw_us": raw_us,
        "bytes": moved,
        "flop": stack.flop,
        "read_us": read_us,
        "matmul_us": matmul_us,
        "bound_us": bound_us,
        "of_bound": None if bound_us is None else bound_us / us,
        **scanned,
        **xla,
        "xla_over_ours": None if xla["xla_us"] is None else xla["xla_us"] / us,
        **counts,
    }
