"""Generates text with a DeepSeek V2 or V3 checkpoint.

    python examples/deepseek/generate.py CHECKPOINT --prompt "..." --prompt "..."

Requests are batched continuously: those that wait join whenever there is a free row and enough free
pages, and leave when they are finished. A step is either the prefill of all that have just joined,
packed, or the next token of everyone; both have fixed shapes (prefill one for each power of two)
and write into a donated cache.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import model
import numpy as np
from checkpoint import load, read_config
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model import CheckpointError, Config
from parallel import DATA, MODEL, make_mesh, shard

from jax_flashmla import serving
from jax_flashmla.flax import empty_cache


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it.

    Attributes:
      prompt: tokens, at least one.
      max_new_tokens: how many to generate, unless the text ends before.
      temperature: 0 takes the best tokens, else they are drawn from ``logits / temperature``.
      seed: of its random choices; the same one makes the same choices in any batch.
      tokens: what has been generated; an end-of-text token is the last one.
    """

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens that it may have in the cache. The last one generated never gets there."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclasses.dataclass
class Times:
    """Tokens and seconds of each kind of step; compilation counts apart."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    compiled: int = 0

    def __str__(self):
        def rate(tokens, seconds):
            return (
                f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)"
            )

        return (
            f"prefill {rate(self.prefill_tokens, self.prefill_seconds)}, "
            f"decode {rate(self.decode_tokens, self.decode_seconds)}, "
            f"compiled {self.compiled} programs in {self.compile_seconds:.1f} s"
        )


# ---------------------------------------------------------------------------------------------
# The steps, on the device


def sample(logits, seeds, positions, temperatures):
    """The next tokens, int32[b]. Random ones depend on nothing but their own row."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits, seed, position, temperature):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))

    def mixed():
        drawn = jax.vmap(draw)(logits, seeds, positions, temperatures)
        return jnp.where(temperatures > 0, drawn.astype(jnp.int32), best)

    return jax.lax.cond(jnp.any(temperatures > 0), mixed, lambda: best)


def prefill_step(params, cache, block_table, seeds, temperatures, tokens, cu_seqlens, **options):
    """Writes the prompts of new rows. Returns the cache and the token that follows each."""
    hidden, cache = model.prefill(params, tokens, cu_seqlens, cache, block_table, **options)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    last = hidden[jnp.maximum(cu_seqlens[1:] - 1, 0)]  # anything, in rows that are not new
    scores = model.logits(params, last, options["axis"])
    return cache, sample(scores, seeds, lengths, temperatures)


def decode_step(params, cache, block_table, seeds, temperatures, tokens, positions, **options):
    """Writes one token of each row. Returns the cache and the token that follows each."""
    hidden, cache = model.decode(
        params, tokens[:, None], positions[:, None], cache, block_table, **options
    )
    scores = model.logits(params, hidden[:, 0], options["axis"])
    return cache, sample(scores, seeds, positions + 1, temperatures)


# ---------------------------------------------------------------------------------------------
# The loop, on the host


class Engine:
    """Serves requests with one model and one cache.

    Over a mesh, each device of the data axis has its share of the rows, and pages of its own for
    them; the numbers of pages given here are those of one device.
    """

    def __init__(
        self,
        params,
        config: Config,
        *,
        max_batch: int,
        max_length: int,
        num_pages: int | None = None,
        page_size: int = 64,
        max_prefill_tokens: int = 2048,
        implementation: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """An engine without requests.

        Args:
          params, config: of `checkpoint.load`, with the same mesh.
          max_batch: rows, requests that run at a time.
          max_length: the longest that a request may become, prompt included.
          num_pages: pages of the cache; by default enough for all rows.
          page_size: tokens of a page.
          max_prefill_tokens: new requests wait if prompts of one step would exceed it; a longer
            prompt has a step of its own.
          implementation: of the attention in decoding: ``"cuda"``, ``"xla"`` or None for the best
            there is. In prefill it is XLA's with ``"xla"``, and else the best there is.
          mesh: of ``parallel.make_mesh``.
        """
        shards = 1 if mesh is None else mesh.shape[DATA]
        if max_batch < 1 or max_batch % shards:
            raise ValueError(
                f"a batch has {max_batch} rows; expected a positive multiple of {shards}"
            )
        if max_length > config.max_length:
            raise ValueError(
                f"the model has {config.max_length} positions; {max_length} are asked for"
            )
        self.params, self.config, self.mesh = params, config, mesh
        self.rows: list[Request | None] = [None] * max_batch
        self.rows_per_shard = max_batch // shards
        self.width = -(-max_length // page_size)  # columns of the block table
        if num_pages is None:
            num_pages = self.rows_per_shard * self.width
        self.pages = [serving.PageAllocator(num_pages, page_size) for _ in range(shards)]
        self.max_length, self.max_prefill_tokens = max_length, max_prefill_tokens
        self.options = {
            "config": config if mesh is None else config.divided(mesh.shape[MODEL]),
            "axis": None if mesh is None else MODEL,
        }
        self.implementations = {
            decode_step: implementation,
            prefill_step: None if implementation == "cuda" else implementation,
        }
        make_cache = functools.partial(
            empty_cache,
            config.attention,
            shards * num_pages,
            page_size,
            num_layers=config.num_layers,
        )
        # Made where it will be: no device need hold all of it.
        where = None if mesh is None else NamedSharding(mesh, P(DATA))
        self.cache = jax.jit(make_cache, out_shardings=where)()
        self.programs = {}
        self.times = Times()

    def generate(self, requests: list[Request], progress=lambda tokens: None) -> Times:
        """Serves all requests, whose ``tokens`` it fills in; calls progress with numbers of them.

        Raises:
          ValueError: a request is empty, or can never fit.
        """
        for number, request in enumerate(requests):
            self._check(number, request)
        self.times = Times()
        waiting = collections.deque(requests)
        while waiting or any(self.rows):
            joined = self._admit(waiting)
            for row, token in self._prefill(joined) if joined else self._decode():
                request = self.rows[row]
                request.tokens.append(token)
                ended = token in self.config.eos
                finished = ended or len(request.tokens) == request.max_new_tokens
                progress(1 + (request.max_new_tokens - len(request.tokens) if ended else 0))
                if finished:
                    self._pages(row).free(request)
                    self.rows[row] = None
        return self.times

    def _check(self, number: int, request: Request) -> None:
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError(f"request {number} has no prompt, or nothing to generate")
        if request.temperature < 0:
            raise ValueError(f"request {number} has a temperature of {request.temperature}")
        if not all(0 <= token < self.config.vocab_size for token in request.prompt):
            raise ValueError(f"request {number} has a token outside of the vocabulary")
        available = min(self.max_length, self.pages[0].num_pages * self.pages[0].page_size)
        if request.longest > available:
            raise ValueError(
                f"request {number} may take {request.longest} tokens; the cache has room for "
                f"{available}"
            )

    def _pages(self, row: int) -> serving.PageAllocator:
        return self.pages[row // self.rows_per_shard]

    def _admit(self, waiting) -> list[int]:
        """Gives rows and pages to requests that wait, first come first served.

        A request gets pages for the longest it may become, so that it never has to be stopped on
        the way. They may come from any pages, and are free again as soon as it ends.
        """
        joined, budget = [], [self.max_prefill_tokens] * len(self.pages)
        while waiting:
            free = [row for row, request in enumerate(self.rows) if request is None]
            if not free:
                break
            # Where most pages are free.
            row = max(free, key=lambda row: self._pages(row).free_pages)
            shard, request = row // self.rows_per_shard, waiting[0]
            alone = budget[shard] == self.max_prefill_tokens
            if len(request.prompt) > budget[shard] and not alone:
                break
            try:
                self._pages(row).allocate(request, request.longest)
            except serving.OutOfPagesError:
                break
            budget[shard] -= len(request.prompt)
            self.rows[row] = waiting.popleft()
            joined.append(row)
        return joined

    def _prefill(self, joined: list[int]) -> list[tuple[int, int]]:
        """The first token of rows that have just joined."""
        prompts = [self.rows[row].prompt if row in joined else [] for row in range(len(self.rows))]
        shards = [
            prompts[first : first + self.rows_per_shard]
            for first in range(0, len(prompts), self.rows_per_shard)
        ]
        longest = max(sum(map(len, part)) for part in shards)
        size = max(64, 1 << (longest - 1).bit_length())  # so that few programs do for all
        tokens = np.zeros((len(shards), size), np.int32)
        for packed, part in zip(tokens, shards, strict=True):
            flat = [token for prompt in part for token in prompt]
            packed[: len(flat)] = flat
        limits = [serving.cu_seqlens([len(prompt) for prompt in part]) for part in shards]
        started = time.perf_counter()
        compiling = self.times.compile_seconds
        result = self._run(prefill_step, tokens.reshape(-1), np.concatenate(limits))
        compiling = self.times.compile_seconds - compiling
        self.times.prefill_tokens += sum(map(len, prompts))
        self.times.prefill_seconds += time.perf_counter() - started - compiling
        return [(row, int(result[row])) for row in joined]

    def _decode(self) -> list[tuple[int, int]]:
        """The next token of all rows."""
        tokens = np.array([r.tokens[-1] if r else 0 for r in self.rows], np.int32)
        positions = np.array(
            [len(r.prompt) + len(r.tokens) - 1 if r else -1 for r in self.rows], np.int32
        )
        started = time.perf_counter()
        compiling = self.times.compile_seconds
        result = self._run(decode_step, tokens, positions)
        compiling = self.times.compile_seconds - compiling
        active = [row for row, request in enumerate(self.rows) if request]
        self.times.decode_tokens += len(active)
        self.times.decode_seconds += time.perf_counter() - started - compiling
        return [(row, int(result[row])) for row in active]

    def _run(self, step, *arrays) -> np.ndarray:
        """Runs a step; the cache is replaced. Compiles it if it is the first one of its shape."""
        tables = [
            pages.block_table(
                self.rows[i * self.rows_per_shard :][: self.rows_per_shard], self.width
            )
            for i, pages in enumerate(self.pages)
        ]
        seeds = np.array([r.seed if r else 0 for r in self.rows], np.int32)
        temperatures = np.array([r.temperature if r else 0 for r in self.rows], np.float32)
        name = (step, arrays[0].shape)
        arrays = (np.concatenate(tables), seeds, temperatures, *arrays)
        if name not in self.programs:
            started = time.perf_counter()
            implementation = self.implementations[step]
            program = functools.partial(step, **self.options, implementation=implementation)
            if self.mesh is not None:
                program = shard(program, self.mesh, self.config, self.params, len(arrays))
            program = jax.jit(program, donate_argnums=1)
            self.programs[name] = program.lower(self.params, self.cache, *arrays).compile()
            self.times.compile_seconds += time.perf_counter() - started
            self.times.compiled += 1
        self.cache, tokens = self.programs[name](self.params, self.cache, *arrays)
        return np.asarray(tokens)  # waits for the step


# ---------------------------------------------------------------------------------------------
# The program


class Tokenizer:
    """Text to tokens and back, by a checkpoint's tokenizer.json."""

    def __init__(self, folder: str):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json; give --token-ids instead of --prompt"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise CheckpointError("--prompt needs tokenizers: pip install tokenizers") from error
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        settings = Path(folder) / "tokenizer_config.json"
        settings = json.loads(settings.read_text()) if settings.is_file() else {}
        # Whether a text gets a first token is not always in tokenizer.json.
        bos = settings.get("bos_token") if settings.get("add_bos_token") else None
        bos = bos["content"] if isinstance(bos, dict) else bos
        self._bos = None if bos is None else self._tokenizer.token_to_id(bos)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        tokens = self._tokenizer.encode(text).ids
        return tokens if self._bos is None or tokens[:1] == [self._bos] else [self._bos, *tokens]

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(tokens)


class Progress:
    """A bar of tqdm, or where that is not installed a line that says how far it is."""

    def __init__(self, total: int):
        try:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=" tokens")
        except ImportError:
            self._bar, self._done, self._total, self._shown = None, 0, total, 0

    def __call__(self, tokens: int) -> None:
        """So many more are done."""
        if self._bar is not None:
            self._bar.update(tokens)
            return
        self._done += tokens
        if self._done == self._total or time.monotonic() - self._shown >= 1:
            self._shown = time.monotonic()
            end = "\n" if self._done == self._total else ""
            print(f"\r{self._done}/{self._total} tokens", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """The end of the line."""
        if self._bar is not None:
            self._bar.close()


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", help="folder with config.json and *.safetensors")
    add("--prompt", action="append", default=[], help="a text; may be repeated")
    add("--token-ids", action="append", default=[], type=_integers, metavar="1,2,3",
        help="a prompt as tokens; may be repeated")  # fmt: skip
    add("--max-new-tokens", type=int, default=64, help="for each prompt (default 64)")
    add("--temperature", type=float, default=0.0, help="0, the default, takes the best token")
    add("--seed", type=int, default=0, help="of the first prompt; the next have the next ones")
    add("--dtype", choices=("bfloat16", "float32"), help="default: that of the checkpoint")
    add("--page-size", type=int, default=64, help="tokens of a page of the cache (default 64)")
    add("--pages", type=int, help="pages of the cache (default: enough for the batch)")
    add("--max-batch", type=int, help="requests at a time (default: all, at most 32)")
    add("--implementation", choices=("cuda", "xla"), help="of decoding (default: the best)")
    add("--mesh", type=_integers, metavar="DATA,MODEL", help="devices for requests, for heads")
    options = parser.parse_args(arguments)
    if not options.prompt and not options.token_ids:
        parser.error("give at least one --prompt or --token-ids")
    if options.mesh is not None and len(options.mesh) != 2:
        parser.error("--mesh takes two numbers")
    try:
        _generate(options)
    except (ValueError, NotImplementedError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _generate(options) -> None:
    read_config(options.checkpoint)  # the likeliest mistake first
    tokenizer = Tokenizer(options.checkpoint) if options.prompt else None
    prompts = [*map(tokenizer.encode, options.prompt)] if tokenizer else []
    requests = [
        Request(prompt, options.max_new_tokens, options.temperature, options.seed + number)
        for number, prompt in enumerate(prompts + options.token_ids)
    ]
    mesh = None if options.mesh is None else make_mesh(*options.mesh)
    started = time.perf_counter()
    params, config = load(options.checkpoint, options.dtype, mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"read {size / 2**30:.2f} GiB in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    shards = 1 if mesh is None else mesh.shape[DATA]
    batch = min(len(requests), 32) if options.max_batch is None else options.max_batch
    engine = Engine(
        params,
        config,
        max_batch=-(-batch // shards) * shards,
        max_length=max(request.longest for request in requests),
        num_pages=options.pages,
        page_size=options.page_size,
        implementation=options.implementation,
        mesh=mesh,
    )
    progress = Progress(sum(request.max_new_tokens for request in requests))
    try:
        times = engine.generate(requests, progress)
    finally:
        progress.close()
    for number, request in enumerate(requests):
        text = number < len(options.prompt)
        print(f"--- {options.prompt[number] if text else request.prompt}")
        print(tokenizer.decode(request.tokens) if text else ",".join(map(str, request.tokens)))
    print(times, file=sys.stderr)


if __name__ == "__main__":
    main()
