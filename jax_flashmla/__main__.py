"""``python -m jax_flashmla``: what is installed, a self-test, and a paged MLA decode loop.

Exit status: 0 if everything was right, 1 if something was wrong, 2 for bad options.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

import jax_flashmla
from jax_flashmla import _decode_loop, _ffi, _selftest
from jax_flashmla.cache import PagedKVCache

_SHAPE = jax.ShapeDtypeStruct

# Sizes of the decode loop for (CPU, GPU).
_DEFAULTS = {
    "batch": (8, 64),
    "steps": (64, 256),
    "heads": (16, 128),
    "layers": (2, 4),
    "context": (512, 4096),
}


# ---------------------------------------------------------------------------------------------
# Options


def _integer(least: int, most: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_flashmla",
        description="Says what is installed and which kernels will run, tests every operation "
        "against numpy, then runs a paged MLA decode loop, checks it and measures its speed.",
        epilog="exit status: 0 all was right, 1 something was wrong, 2 bad options",
    )
    add = parser.add_argument
    for name, most, text in (
        ("batch", 65535, "requests"),
        ("steps", 1_000_000, "tokens that each request generates"),
        ("heads", 1024, "query heads"),
        ("layers", 1024, "layers of attention"),
        ("context", 1_048_576, "tokens in the cache of the longest request at the start"),
    ):
        on_cpu, on_gpu = _DEFAULTS[name]
        add(
            f"--{name}",
            type=_integer(1, most),
            metavar="N",
            help=f"{text} (default {on_cpu}, on a GPU {on_gpu})",
        )
    add(
        "--page-size",
        type=_integer(1, 65536),
        default=64,
        metavar="N",
        help="tokens of a page of the cache (default 64)",
    )
    add("--cache-format", choices=("plain", "fp8_v32"), default="plain", help="default plain")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of weights, queries and a plain cache (default bfloat16)",
    )
    add(
        "--implementation",
        choices=("auto", "cuda", "xla"),
        default="auto",
        help="cuda insists on the kernels in the decode loop (default auto)",
    )
    add("--seed", type=_integer(0, 2**31 - 1), default=0, metavar="N", help="default 0")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def _config(parser: argparse.ArgumentParser, options: argparse.Namespace) -> _decode_loop.Config:
    """The sizes of the loop; ends the program if they do not go together."""
    backend = jax.default_backend()
    sizes = {
        name: getattr(options, name) or defaults[backend != "cpu"]
        for name, defaults in _DEFAULTS.items()
    }
    dtype = options.dtype
    if dtype is None:
        jaxlib_version = tuple(int(part) for part in jaxlib.__version__.split(".")[:2])
        # There XLA converts a whole bfloat16 array to float32 and back for any update.
        cannot_update = backend == "cpu" and jaxlib_version < (0, 11)
        dtype = "float16" if cannot_update and options.cache_format == "plain" else "bfloat16"
    try:
        return _decode_loop.Config(
            **sizes,
            page_size=options.page_size,
            cache_format=options.cache_format,
            dtype=dtype,
            implementation=None if options.implementation == "auto" else options.implementation,
            seed=options.seed,
        )
    except ValueError as error:
        parser.error(str(error))


# ---------------------------------------------------------------------------------------------
# What is installed


def _versions() -> dict[str, str]:
    return {
        "jax_flashmla": jax_flashmla.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def _kernels() -> dict[str, Any]:
    """What was built: see ``_ffi.build_info``; also the names of the kernels."""
    info, extension = _ffi.build_info(), _ffi.extension()
    return {
        "cuda": info["cuda"],
        "cuda_compiler": info.get("cuda_compiler"),
        "architectures": list(info["architectures"]),
        "built": sorted(extension.registrations()) if extension else [],
    }


def _devices() -> list[dict[str, str]]:
    return [
        {
            "platform": device.platform,
            "kind": device.device_kind,
            "compute_capability": str(getattr(device, "compute_capability", "")),
        }
        for device in jax.local_devices()
    ]


def _typical_calls() -> dict[str, tuple[Any, tuple, dict[str, Any]]]:
    """A call of each kind with DeepSeek's sizes: function, arguments, keywords."""
    bf16, i32 = jnp.bfloat16, jnp.int32
    b, heads, pages, topk = 2, 128, 8, 2048
    lengths, table = _SHAPE((b,), i32), _SHAPE((b, 4), i32)
    q, q_v4 = _SHAPE((b, 1, heads, 576), bf16), _SHAPE((b, 1, heads, 512), bf16)
    indices = _SHAPE((b, 1, topk), i32)

    def cache(cache_format: str, dtype: Any = None) -> PagedKVCache:
        return jax.eval_shape(
            lambda: PagedKVCache.zeros(pages, 64, format=cache_format, dtype=dtype)
        )

    def dense(dtype):
        return _SHAPE((b, 1, heads, 576), dtype), cache("plain", dtype), table, lengths, 512

    decode = jax_flashmla.flash_mla_with_kvcache
    fp8 = {"is_fp8_kvcache": True, "indices": indices}
    rows = _SHAPE((64, heads, 576), bf16), _SHAPE((64, 1, 576), bf16), _SHAPE((64, 1, topk), i32)
    limits = _SHAPE((b + 1,), i32)
    qk = _SHAPE((64, heads, 192), bf16)
    return {
        "schedule (get_mla_metadata)": (
            jax_flashmla.get_mla_metadata,
            (lengths, heads, 1),
            {},
        ),
        "dense decode, bfloat16": (decode, dense(bf16), {}),
        "dense decode, float16": (decode, dense(jnp.float16), {}),
        "dense decode, FP8 (V3.2)": (
            decode,
            (q, cache("fp8_v32"), table, lengths, 512),
            {"is_fp8_kvcache": True},
        ),
        "sparse decode, bfloat16": (
            decode,
            (q, cache("plain"), None, None, 512),
            {"indices": indices},
        ),
        "sparse decode, FP8 (V3.2)": (decode, (q, cache("fp8_v32"), None, None, 512), fp8),
        "sparse decode, FP8 (V4)": (decode, (q_v4, cache("fp8_v4"), None, None, 512), fp8),
        "sparse prefill, bfloat16": (jax_flashmla.flash_mla_sparse_fwd, (*rows, 0.1), {}),
        "varlen prefill, bfloat16": (
            jax_flashmla.flash_attn_varlen_func,
            (qk, qk, _SHAPE((64, heads, 128), bf16), limits, limits, 64, 64),
            {},
        ),
    }


def _explanation(function: Any, *args: Any, **kwargs: Any) -> tuple[str | None, list[str]]:
    """The implementation that a call takes, and why it is not the kernels."""
    explanation = jax_flashmla.explain(function, *args, **kwargs)
    reasons = [
        reason
        for operation in explanation.operations
        for reason in operation.declines.get("cuda", ())
    ]
    return explanation.implementation, reasons


def _implementations(implementation: str | None) -> dict[str, dict[str, Any]]:
    """For each typical call what computes it and why no kernel does."""
    result = {}
    for name, (function, args, kwargs) in _typical_calls().items():
        asked = implementation if implementation == "xla" else None
        taken, reasons = _explanation(function, *args, **kwargs, implementation=asked)
        result[name] = {"implementation": taken, "not_cuda": reasons}
    return result


# ---------------------------------------------------------------------------------------------
# Output


class _Report:
    """Prints for people, or nothing if the result is to be JSON."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.redraws = not quiet and sys.stdout.isatty()
        self.drawn = 0.0

    def line(self, text: str = "") -> None:
        if not self.quiet:
            print(text, flush=True)

    def bar(self, done: int, total: int, rate: float) -> None:
        """A progress bar, redrawn in place on a terminal; elsewhere only the finished one."""
        now = time.perf_counter()
        finished = done >= total
        if self.quiet or not (finished or (self.redraws and now - self.drawn > 0.1)):
            return
        self.drawn = now
        filled = 30 * done // total
        text = f"  [{'#' * filled}{'.' * (30 - filled)}] {done}/{total} steps, {rate:,.0f} tokens/s"
        start, end = ("\r\x1b[K", "\n" if finished else "") if self.redraws else ("", "\n")
        print(start + text, end=end, flush=True)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _describe_installation(report: _Report, found: dict[str, Any]) -> None:
    report.line(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    kinds: dict[str, int] = {}
    for device in found["devices"]:
        capability = device["compute_capability"]
        kind = f"{device['kind']}" + (f" (compute capability {capability})" if capability else "")
        kinds[kind] = kinds.get(kind, 0) + 1
    report.line("devices: " + ", ".join(f"{n} x {kind}" for kind, n in kinds.items()))
    kernels = found["kernels"]
    if kernels["cuda"]:
        names = ", ".join("sm_" + name for name in kernels["architectures"])
        report.line(
            f"CUDA kernels: built with CUDA {kernels['cuda_compiler']} for {names}: "
            + ", ".join(kernels["built"])
        )
    else:
        report.line(
            "CUDA kernels: none, built without CUDA; JAX_FLASHMLA_CUDA=ON in the environment of "
            "pip install builds them"
        )
    report.line("implementations:")
    for name, entry in found["implementations"].items():
        why = f"  ({entry['not_cuda'][0]})" if entry["not_cuda"] else ""
        report.line(f"  {name:28} {entry['implementation']}{why}")


def _describe_case(report: _Report, result: _selftest.Result) -> None:
    if result.errors:
        worst = max(result.errors, key=lambda n: result.errors[n] / result.tolerances[n])
        detail = (
            f"error of {worst} {result.errors[worst]:.1e} (limit {result.tolerances[worst]:.0e})"
        )
    else:
        detail = ""
    detail = result.failure or detail
    mark = "ok  " if result.passed else "FAIL"
    report.line(
        f"  {mark} {result.name:36} {result.implementation or '-':4} {result.seconds:5.1f} s"
        f"  {detail}"
    )


def _describe_loop(
    report: _Report, config: _decode_loop.Config, result: _decode_loop.Result
) -> None:
    memory = result.memory
    report.line(
        f"  {result.tokens} tokens in {result.seconds:.2f} s: "
        f"{result.tokens_per_second:,.0f} tokens/s; compiled in {result.compile_seconds:.1f} s"
    )
    report.line(
        f"  {'ok  ' if result.in_place else 'FAIL'} cache of {_size(memory['cache_bytes'])} "
        + (
            f"updated in place; {_size(memory['temporary_bytes'])} of temporary memory"
            if result.in_place
            else "not updated in place"
        )
    )
    for line in memory["copies"]:
        report.line(f"       {line[:160]}")
    report.line(
        f"  {'ok  ' if result.correct else 'FAIL'} {result.checked} results recomputed in numpy: "
        f"error of out {result.out_error:.1e} (limit {result.out_tolerance:.0e}), of one head "
        f"{result.head_error:.1e} ({result.head_tolerance:.0e}), of lse {result.lse_error:.1e} "
        f"({result.lse_tolerance:.0e}); {result.pages_allocated} pages allocated"
    )


def _jsonable(value: Any) -> Any:
    """``value`` with what JSON does not have: NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------
# The program


def _check_implementation(
    parser: argparse.ArgumentParser, config: _decode_loop.Config
) -> str | None:
    """The implementation of the loop's attention; ends the program if there is none as asked."""
    cache = jax.eval_shape(
        lambda: PagedKVCache.zeros(
            config.layers * config.pages,
            config.page_size,
            format=config.cache_format,
            dtype=config.dtype if config.cache_format == "plain" else None,
        )
    )
    taken, reasons = _explanation(
        jax_flashmla.flash_mla_with_kvcache,
        _SHAPE((config.batch, 1, config.heads, _decode_loop.HEAD_DIM), config.dtype),
        cache,
        _SHAPE((config.batch, config.columns), jnp.int32),
        _SHAPE((config.batch,), jnp.int32),
        _decode_loop.HEAD_DIM_V,
        is_fp8_kvcache=config.cache_format != "plain",
        implementation=config.implementation,
    )
    if taken is None:
        parser.error("--implementation cuda cannot run this loop: " + "; ".join(reasons))
    return taken


def _run(report: _Report, found: dict[str, Any], config: _decode_loop.Config) -> bool:
    """Self-test and decode loop; adds to ``found`` and returns whether all was right."""
    _describe_installation(report, found)

    report.line("self-test:")
    found["self_test"] = []
    right = True
    for case in _selftest.run(config.implementation):
        _describe_case(report, case)
        found["self_test"].append({**dataclasses.asdict(case), "passed": case.passed})
        right &= case.passed

    sizes = dataclasses.asdict(config)
    taken = found["decode_loop"]["implementation"]
    report.line(
        f"decode loop: {config.batch} requests of {config.lengths.min()} to {config.context} "
        f"tokens, {config.layers} layers of {config.heads} heads, {config.layers} x "
        f"{config.pages} pages of {config.page_size} tokens, {config.cache_format} cache, "
        f"{config.dtype}, {taken}"
    )
    loop = _decode_loop.Loop(config)
    result = loop.run(lambda done, rate: report.bar(done, config.steps, rate))
    loop.verify(result)
    _describe_loop(report, config, result)
    found["decode_loop"] |= {
        **sizes,
        **dataclasses.asdict(result),
        "implementation": taken,
        "tokens_per_second": result.tokens_per_second,
        "in_place": result.in_place,
        "correct": result.correct,
    }
    return right and result.in_place and result.correct


def main(arguments: list[str] | None = None) -> int:
    """Runs the program with the given command line; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        devices = _devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a platform without its plugin
        print(f"{parser.prog}: JAX cannot start: {str(error) or repr(error)}", file=sys.stderr)
        return 1
    config = _config(parser, options)
    found: dict[str, Any] = {
        "versions": _versions(),
        "devices": devices,
        "kernels": _kernels(),
        "implementations": _implementations(config.implementation),
        "decode_loop": {"implementation": _check_implementation(parser, config)},
    }
    report = _Report(quiet=options.json)
    try:
        found["ok"] = _run(report, found, config)
    except jax.errors.JaxRuntimeError as error:  # such as out of memory
        found["ok"], found["error"] = False, str(error)
        print(f"{parser.prog}: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps(_jsonable(found), indent=2, allow_nan=False))
    else:
        report.line("all right" if found["ok"] else "FAILED")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
