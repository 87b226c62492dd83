"""The decode loop of ``python -m jax_flashmla``: paged MLA decoding, run and then checked.

A batch of requests with different numbers of tokens in the cache generates token by token. The
model is synthetic: a few layers of multi-head latent attention with absorbed projections (queries
in the space of the latents), between an embedding and a greedy choice of the next token. One
jitted step does all layers. They share one schedule and one flat cache of layers x pages, which is
donated and so updated in place.

The host hands out pages from a free list as requests grow. Slots that no token has been written to
hold NaN, and table entries past a request's last page a number that is no page.

`Loop.verify` recomputes what the attention of chosen steps should have given, in numpy, from the
queries and the tokens that the steps saw. It knows nothing of pages, tables or schedules.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _selftest
from jax_flashmla.cache import PagedKVCache, offset_block_table, offset_slots, slot_mapping
from jax_flashmla.decode import flash_mla_with_kvcache
from jax_flashmla.metadata import get_mla_metadata

Array = jax.Array

HEAD_DIM, HEAD_DIM_V, ROPE_DIM = 576, 512, 64
# DeepSeek V3's head dimensions before absorption: 128 without RoPE, 64 with.
SOFTMAX_SCALE = (128 + 64) ** -0.5
# 31 x 16: hardly any cache has as many slots as a weight of this size has rows (`cache_copies`).
MODEL_DIM, VOCABULARY = 496, 1024
CHECKED_STEPS = 12
WATCHED = 4  # at least so many requests are checked at each of them
_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the loop.

    Attributes:
        batch: requests.
        steps: tokens that each request generates.
        heads: query heads.
        layers: layers of attention.
        context: tokens in the cache of the longest request at the start.
        page_size: tokens of a page.
        cache_format: "plain" or "fp8_v32".
        dtype: "bfloat16", "float16" or "float32", of weights, queries and a plain cache.
        implementation: "cuda", "xla" or None for the best.
        seed: of weights, contexts and lengths.

    Raises:
        ValueError: the sizes do not go together.
    """

    batch: int
    steps: int
    heads: int
    layers: int
    context: int
    page_size: int
    cache_format: str
    dtype: str
    implementation: str | None
    seed: int

    def __post_init__(self) -> None:
        if self.cache_format != "plain" and self.dtype == "float16":
            raise ValueError(
                f"a cache of format {self.cache_format} goes with queries of bfloat16 or float32, "
                "not float16"
            )
        if self.layers * self.pages * self.page_size > _INT32_MAX:
            raise ValueError(
                f"the cache would have {self.layers} layers x {self.pages} pages x "
                f"{self.page_size} tokens; slots are numbered up to {_INT32_MAX}"
            )

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64[batch], tokens of each request at the start: the first is longest, the last new."""
        rng = np.random.default_rng(self.seed)
        lengths = rng.integers(self.context // 4, self.context + 1, self.batch)
        lengths[-1] = 0
        lengths[0] = self.context
        return lengths

    @property
    def columns(self) -> int:
        """Entries of a row of the block table: pages of the longest request at the end."""
        return -(-(self.context + self.steps) // self.page_size)

    @functools.cached_property
    def pages(self) -> int:
        """Pages of one layer: as many as all requests need at the end."""
        return int(sum(-(-(int(n) + self.steps) // self.page_size) for n in self.lengths))


# ---------------------------------------------------------------------------------------------
# Pages


class PageTable:
    """Block table of a batch, on the host: gives out pages from a free list as requests grow."""

    def __init__(self, config: Config):
        free = np.random.default_rng(config.seed + 1).permutation(config.pages)
        self.free = [int(page) for page in free]
        self.page_size = config.page_size
        self.entries = np.full((config.batch, config.columns), _selftest.GARBAGE, np.int32)
        self.used = [0] * config.batch

    def grow(self, request: int, length: int) -> None:
        """Gives a request the pages that ``length`` tokens need."""
        while self.used[request] * self.page_size < length:
            self.entries[request, self.used[request]] = self.free.pop()
            self.used[request] += 1


# ---------------------------------------------------------------------------------------------
# The model


def make_weights(key: Array, config: Config) -> dict[str, Array]:
    """Random weights: those of the layers stacked along axis 0, of variance 1 / fan_in."""
    layers, heads = config.layers, config.heads
    shapes = {
        "query": ((layers, MODEL_DIM, heads, HEAD_DIM), MODEL_DIM),
        "latent": ((layers, MODEL_DIM, HEAD_DIM), MODEL_DIM),
        "output": ((layers, heads, HEAD_DIM_V, MODEL_DIM), heads * HEAD_DIM_V),
        # Small, so that the next token follows from attention and not from the last token alone.
        "embedding": ((VOCABULARY, MODEL_DIM), 2500),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: (jax.random.normal(k, shape) * fan_in**-0.5).astype(config.dtype)
        for k, (name, (shape, fan_in)) in zip(keys, shapes.items(), strict=True)
    }


def normalise(x: Array) -> Array:
    """x with mean square 1 along the last axis, in its dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype)


def rotate(x: Array, positions: Array) -> Array:
    """Rotary embedding (RoPE) of the last ``ROPE_DIM`` columns of x [b, ..., d]."""
    half = ROPE_DIM // 2
    frequencies = 10000.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32).reshape(-1, *(1,) * (x.ndim - 1)) * frequencies
    rest, first, second = jnp.split(x, (x.shape[-1] - ROPE_DIM, x.shape[-1] - half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return jnp.concatenate([rest, turned.astype(x.dtype)], axis=-1)


def decode_step(
    config: Config,
    cache: PagedKVCache,
    weights: dict[str, Array],
    tokens: Array,
    seqlens: Array,
    block_table: Array,
    watched: Array,
) -> tuple[PagedKVCache, Array, Array, dict[str, Array]]:
    """Appends one token to each request and chooses the next.

    Args:
        config: static.
        cache: all layers; pages of layer l are ``l * config.pages`` and up. To be donated.
        weights: from :func:`make_weights`.
        tokens: int32[b], the token of each request that is processed now.
        seqlens: int32[b], tokens in the cache before.
        block_table: int32[b, n], pages of one layer.
        watched: int32[w], requests whose attention is returned.

    Returns:
        The cache, the next tokens, the new lengths, and what the check needs of each layer: ``kv``
        [l, b, d] that was appended, and ``q`` [l, w, h, d], ``out`` [l, w, h, dv] and ``lse``
        [l, w, h] of the watched requests.
    """
    pages = config.pages
    lengths = seqlens + 1
    schedule = get_mla_metadata(lengths, config.heads, 1, implementation=config.implementation)
    slots = slot_mapping(block_table, seqlens, config.page_size, num_pages=pages)

    def layer(carry, inputs):
        x, cache = carry
        index, w = inputs
        first_page = index * pages
        hidden = normalise(x)
        q = rotate(jnp.einsum("bm,mhd->bhd", hidden, w["query"]), seqlens)
        kv = rotate(normalise(hidden @ w["latent"]), seqlens)
        cache = cache.append(
            kv, offset_slots(slots, first_page, num_pages=pages, page_size=config.page_size)
        )
        out, lse = flash_mla_with_kvcache(
            q[:, None],
            cache,
            offset_block_table(block_table, first_page, num_pages=pages),
            lengths,
            HEAD_DIM_V,
            *schedule,
            softmax_scale=SOFTMAX_SCALE,
            is_fp8_kvcache=cache.format != "plain",
            implementation=config.implementation,
        )
        x = x + jnp.einsum("bhv,hvm->bm", out[:, 0], w["output"])
        seen = {"q": q[watched], "out": out[watched, 0], "lse": lse[watched, :, 0], "kv": kv}
        return (x, cache), seen

    x = weights["embedding"][tokens]
    stacked = {name: weights[name] for name in ("query", "latent", "output")}
    numbers = jnp.arange(config.layers, dtype=jnp.int32)
    (x, cache), seen = jax.lax.scan(layer, (x, cache), (numbers, stacked))
    logits = normalise(x) @ weights["embedding"].T
    return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), lengths, seen


def make_context(config: Config, key: Array, request: Array) -> Array:
    """Tokens [layers, context, d] that a request has in the cache before the loop."""
    shape = (config.layers, config.context, HEAD_DIM)
    return jax.random.normal(jax.random.fold_in(key, request), shape).astype(config.dtype)


def fill(
    config: Config, cache: PagedKVCache, block_table: Array, lengths: Array, key: Array, r: Array
) -> PagedKVCache:
    """Writes the context of request r, its first ``lengths[r]`` tokens, to all layers."""
    positions = jnp.arange(config.context, dtype=jnp.int32)
    positions = jnp.where(positions < lengths[r], positions, -1)
    slots = slot_mapping(
        block_table[r][None], positions[None], config.page_size, num_pages=config.pages
    )[0]

    def of_layer(layer):
        return offset_slots(
            slots, layer * config.pages, num_pages=config.pages, page_size=config.page_size
        )

    numbers = jnp.arange(config.layers, dtype=jnp.int32)
    return cache.append(make_context(config, key, r), jax.vmap(of_layer)(numbers))


# ---------------------------------------------------------------------------------------------
# What the compiled module does with the cache

# Instructions that pass a buffer on, or update it where it is. XLA makes a copy before one of them
# as an instruction of its own if it needs one.
_UPDATES = {"dynamic-update-slice", "scatter"}
_PASSES = {"parameter", "get-tuple-element", "bitcast", "while", "conditional", "call"}
_PASSES |= {"opt-barrier", "async-done", "copy-done", "fusion-done"}
# A kernel that writes into the buffer of its first operand.
_ALIASED = re.compile(r"output_to_operand_aliasing=\{\{0?\}: \(0, \{\}\)")

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = "
    r"(?P<type>\(.*?\)|\w+\[[\d,]*\](?:{[^}]*})?) (?P<opcode>[\w\-]+)\((?P<operands>[^)]*)\)"
    r"(?:.*\bcalls=%?(?P<calls>[\w.\-]+))?"
)


def cache_copies(module: str, shape: tuple[int, ...]) -> list[str]:
    """Instructions of an optimised HLO module that make a second array as large as the cache.

    Args:
        module: ``compiled.as_text()``.
        shape: shape of the cache's array.

    Returns:
        The instructions, one a line: copies, conversions and whatever else writes a whole array
        rather than updating one in place, alone or inside a fusion. Arrays are told by their
        number of elements and their last two dimensions, not counting those of size 1.
    """

    def longer_than_one(sizes: Iterable[int]) -> list[int]:
        return [size for size in sizes if size != 1]

    row = longer_than_one(shape)[-2:]

    def is_cache(dims: str) -> bool:
        sizes = longer_than_one(int(size) for size in dims.split(","))
        return sizes[-2:] == row and math.prod(sizes) == math.prod(shape)

    def makes_cache(instruction: re.Match) -> bool:
        return any(is_cache(dims) for dims in re.findall(r"\[([\d,]+)\]", instruction["type"]))

    computations: dict[str, dict[str, re.Match]] = {}
    roots: dict[str, re.Match] = {}
    current = ""
    for line in module.splitlines():
        if line.endswith("{") and not line.startswith(("HloModule", " ")):
            current = re.sub(r"^ENTRY ", "", line).lstrip("%").split(" ")[0].split("(")[0]
            computations[current] = {}
        elif (instruction := _INSTRUCTION.match(line)) is not None:
            computations[current][instruction["name"]] = instruction
            if instruction["root"]:
                roots[current] = instruction

    def writes_in_place(instruction: re.Match) -> bool:
        return instruction["opcode"] == "custom-call" and bool(
            _ALIASED.search(instruction.string, instruction.end())
        )

    def updates_in_place(computation: str) -> bool:
        """Whether a fusion makes arrays of that size by updating them and in no other way."""
        inside = computations[computation]

        def is_update(instruction: re.Match) -> bool:
            names = re.findall(r"%([\w.\-]+)", instruction["operands"])
            if instruction["opcode"] == "tuple":
                return all(is_update(inside[n]) for n in names if makes_cache(inside[n]))
            if instruction["opcode"] == "bitcast":
                return is_update(inside[names[0]])
            return instruction["opcode"] in _UPDATES or writes_in_place(instruction)

        return is_update(roots[computation])

    instructions = [i for inside in computations.values() for i in inside.values()]
    wrapped = {i["calls"] for i in instructions if i["calls"]}
    copies = []
    for name, inside in computations.items():
        if name in wrapped:
            continue  # only its result becomes an array
        for instruction in inside.values():
            opcode = instruction["opcode"]
            if not makes_cache(instruction) or opcode in _PASSES | _UPDATES | {"tuple"}:
                continue
            if writes_in_place(instruction):
                continue
            if not (instruction["calls"] and updates_in_place(instruction["calls"])):
                copies.append(instruction.string.strip())
    return copies


def inspect(compiled: Any, cache: PagedKVCache) -> dict[str, Any]:
    """Whether a compiled step updates the donated cache in place, from the module and its buffers.

    Returns:
        ``in_place``; ``copies``, the instructions that make a second array of the cache's shape;
        ``cache_bytes``; ``aliased_bytes`` of arguments that are results too; ``temporary_bytes``.
    """
    memory = compiled.memory_analysis()
    copies = cache_copies(compiled.as_text(), tuple(cache.data.shape))
    return {
        "in_place": not copies and memory.alias_size_in_bytes >= cache.data.nbytes,
        "copies": copies,
        "cache_bytes": cache.data.nbytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


# ---------------------------------------------------------------------------------------------
# The loop


@dataclasses.dataclass
class Result:
    """What the loop did.

    Attributes:
        tokens: tokens generated in the time measured.
        seconds: the time measured: of all steps but the first, which warms up, if there are others.
        compile_seconds: to trace and compile the step.
        memory: from :func:`inspect`.
        moved: whether the cache's buffer had another address after the loop than before.
        pages_allocated: pages of one layer handed out during the loop.
        checked: how many (step, request, layer) were recomputed.
        out_error: the largest error of one of them, all heads together.
        head_error: the largest error of a single head.
        lse_error: the largest error of an lse.
        out_tolerance: the largest ``out_error`` allowed.
        head_tolerance: the largest ``head_error`` allowed.
        lse_tolerance: the largest ``lse_error`` allowed.
    """

    tokens: int
    seconds: float
    compile_seconds: float
    memory: dict[str, Any]
    moved: bool
    pages_allocated: int
    checked: int = 0
    out_error: float = math.nan
    head_error: float = math.nan
    lse_error: float = math.nan
    out_tolerance: float = 0.0
    head_tolerance: float = 0.0
    lse_tolerance: float = _selftest.LSE_TOLERANCE

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, of all requests together."""
        return self.tokens / self.seconds

    @property
    def correct(self) -> bool:
        """Whether the recomputed results agree; without any, they do not."""
        return (
            self.checked > 0
            and self.out_error <= self.out_tolerance
            and self.head_error <= self.head_tolerance
            and self.lse_error <= self.lse_tolerance
        )

    @property
    def in_place(self) -> bool:
        """Whether the cache was updated in place, as compiled and as run."""
        return self.memory["in_place"] and not self.moved


class Loop:
    """Runs the decode loop and checks it."""

    def __init__(self, config: Config):
        self.config = config
        self.key, weights_key = jax.random.split(jax.random.key(config.seed))
        self.table = PageTable(config)
        for request, length in enumerate(config.lengths):
            self.table.grow(request, int(length))
        self.weights = jax.jit(functools.partial(make_weights, config=config))(weights_key)
        self.contexts = jax.jit(functools.partial(make_context, config))
        self.choose_checks()
        self.seen: dict[int, dict[str, Array]] = {}
        self.appended: list[Array] = []
        self.watched: dict[int, np.ndarray] = {}

    def choose_checks(self) -> None:
        """Decides which steps are checked, and how many requests at each: all have their turn."""
        last = self.config.steps - 1
        self.checked = sorted({round(i * last / (CHECKED_STEPS - 1)) for i in range(CHECKED_STEPS)})
        share = -(-self.config.batch // len(self.checked))
        self.watched_count = min(self.config.batch, max(WATCHED, share))

    def run(self, progress: Callable[[int, float], None] = lambda done, rate: None) -> Result:
        """Compiles the step and decodes ``config.steps`` tokens of each request.

        Args:
            progress: called with the number of steps done and the tokens a second so far.
        """
        config = self.config
        cache = self._filled_cache()
        tokens = jnp.zeros((config.batch,), jnp.int32)
        seqlens = jnp.asarray(config.lengths, jnp.int32)

        progress(0, 0.0)
        start = time.perf_counter()
        step = jax.jit(functools.partial(decode_step, config), donate_argnums=0)
        arguments = (cache, self.weights, tokens, seqlens, self.table.entries, self._watch(0))
        compiled = step.lower(*arguments).compile()
        compile_seconds = time.perf_counter() - start

        memory = inspect(compiled, cache)
        address = cache.data.unsafe_buffer_pointer()
        pages_before = sum(self.table.used)
        running: collections.deque[Array] = collections.deque()
        untimed = 1 if config.steps > 1 else 0
        jax.block_until_ready((cache, self.weights))
        start = time.perf_counter()
        for t in range(config.steps):
            for request, length in enumerate(config.lengths):
                self.table.grow(request, int(length) + t + 1)
            # A copy, since JAX may still read the array when the table grows again.
            table, watched = self.table.entries.copy(), self._watch(t)
            cache, tokens, seqlens, seen = compiled(
                cache, self.weights, tokens, seqlens, table, watched
            )
            self.appended.append(seen.pop("kv"))
            if t in self.checked:
                self.seen[t], self.watched[t] = seen, watched
            if t < untimed:
                jax.block_until_ready(tokens)
                start = time.perf_counter()
                continue
            # The host stays two steps ahead of the device, and tells what is done.
            running.append(tokens)
            if len(running) > 2:
                running.popleft().block_until_ready()
                rate = config.batch * (t - 1 - untimed) / (time.perf_counter() - start)
                progress(t - 1, rate)
        jax.block_until_ready((cache, tokens))
        seconds = time.perf_counter() - start
        count = config.batch * (config.steps - untimed)
        progress(config.steps, count / seconds)
        tolerance = _selftest.TOLERANCE[config.dtype]
        return Result(
            tokens=count,
            seconds=seconds,
            compile_seconds=compile_seconds,
            memory=memory,
            moved=cache.data.unsafe_buffer_pointer() != address,
            pages_allocated=sum(self.table.used) - pages_before,
            out_tolerance=tolerance,
            head_tolerance=2 * tolerance,
        )

    def _filled_cache(self) -> PagedKVCache:
        config = self.config
        dtype = config.dtype if config.cache_format == "plain" else None
        shape = jax.eval_shape(
            lambda: PagedKVCache.zeros(
                config.layers * config.pages,
                config.page_size,
                format=config.cache_format,
                dtype=dtype,
            )
        )
        nothing = jnp.nan if config.cache_format == "plain" else 0xFF  # NaN in FP8, too
        cache = dataclasses.replace(
            shape, data=jnp.full(shape.data.shape, nothing, shape.data.dtype)
        )
        write = jax.jit(functools.partial(fill, config), donate_argnums=0)
        table, lengths = jnp.asarray(self.table.entries), jnp.asarray(config.lengths, jnp.int32)
        for request in range(config.batch):
            if config.lengths[request]:
                cache = write(cache, table, lengths, self.key, request)
        return cache

    def _watch(self, t: int) -> np.ndarray:
        """int32, requests whose attention step t returns: over the checked steps, all in turn."""
        first = bisect.bisect_left(self.checked, t) * self.watched_count
        return ((first + np.arange(self.watched_count)) % self.config.batch).astype(np.int32)

    def verify(self, result: Result) -> None:
        """Recomputes the attention of the checked steps and notes the largest errors in result."""
        config = self.config
        appended = np.stack([np.asarray(kv, np.float32) for kv in self.appended])
        rounding = np.dtype(config.dtype)
        work = collections.defaultdict(list)
        for t, watched in self.watched.items():
            for i, request in enumerate(watched):
                work[int(request)].append((t, i))
        seen = {
            t: {name: np.asarray(value, np.float32) for name, value in arrays.items()}
            for t, arrays in self.seen.items()
        }
        errors = []
        for request, places in work.items():
            length = int(config.lengths[request])
            context = np.asarray(self.contexts(self.key, request), np.float32)[:, :length]
            history = np.concatenate([context, appended[:, :, request].swapaxes(0, 1)], axis=1)
            history = _selftest.stored(history, config.cache_format, rounding)
            for t, i in places:
                for layer in range(config.layers):
                    q, out, lse = (seen[t][name][layer, i] for name in ("q", "out", "lse"))
                    keys = history[layer, : length + t + 1]
                    want_out, want_lse = _selftest.attention(q, keys, SOFTMAX_SCALE, HEAD_DIM_V)
                    error, norm = (np.linalg.norm(x, axis=-1) for x in (out - want_out, want_out))
                    errors.append(
                        (
                            np.linalg.norm(error) / np.linalg.norm(norm),
                            np.max(error / norm),
                            _selftest.lse_error(lse, want_lse),
                        )
                    )
        result.checked = len(errors)
        # NaN stays NaN.
        result.out_error, result.head_error, result.lse_error = map(float, np.max(errors, axis=0))
