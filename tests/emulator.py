"""Some of the CUDA kernels on the CPU: see emulation/simt.h.

A thread of the CPU runs each thread of a kernel, under sanitizers, so that a machine without a GPU
sees an access out of bounds, undefined behaviour, or a race within a CTA.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "csrc/smxx/combine.cu",
    "csrc/smxx/scheduler.cu",
    "csrc/sm90/dense_decode/inst_576_512.cu",
    "csrc/sm90/fp8_few_rows_decode/launch.cu",
    "csrc/sm90/fp8_many_rows_decode/launch.cu",
    "csrc/sm90/gathered_decode/inst_sparse_plain_576.cu",
    "csrc/sm90/gathered_decode/inst_sparse_v4.cu",
    "tests/emulation/main.cc",
)

#: What each build of the emulator looks for.
SANITIZERS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "races": ["-fsanitize=thread"],
}
#: A sanitizer that finds something says so by this exit status.
_FOUND = 86


def compiler() -> str | None:
    """g++, if it is there and knows what the emulator is written in."""
    path = shutil.which("g++")
    if path is None:
        return None
    version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True, check=True)
    return path if int(version.stdout.split(".")[0]) >= 12 else None


def _build(folder: Path, sanitizer: str) -> Path:
    """The program, compiled in the folder unless another process has done so."""
    program = folder / f"emulator-{sanitizer}"
    options = ["-std=c++20", "-O1", "-g", "-pthread", "-fno-strict-aliasing", "-D__CUDACC__"]
    options += SANITIZERS[sanitizer]
    options += ["-include", "tests/emulation/simt.h", "-Itests/emulation", "-Icsrc"]

    def compile_one(number: int) -> Path:
        target = folder / f"{sanitizer}-{number}.o"
        command = [compiler(), *options, "-x", "c++", "-c", SOURCES[number], "-o", target]
        subprocess.run(command, cwd=ROOT, check=True)
        return target

    with open(folder / f"{sanitizer}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, range(len(SOURCES))))
            new = program.with_suffix(".new")
            subprocess.run(
                [compiler(), "-pthread", *SANITIZERS[sanitizer], *objects, "-o", new], check=True
            )
            new.rename(program)
    return program


class Emulator:
    """A build of the kernels with one sanitizer. ``builds``: where processes share builds."""

    def __init__(self, folder: Path, sanitizer: str, builds: Path):
        self.folder = folder
        self.program = _build(builds, sanitizer)
        # Some thread sanitizers cannot bear addresses that are as random as a system makes them.
        self.prefix: list[str] = []
        hello = subprocess.run([self.program], capture_output=True, text=True)
        if "unexpected memory mapping" in hello.stderr:
            self.prefix = ["setarch", "-R"]

    def run(self, what: str, arrays: dict[str, np.ndarray | None], **numbers: int) -> None:
        """Runs a launcher on the arrays; those that it writes are changed in place."""
        for name, array in arrays.items():
            (self.folder / name).unlink(missing_ok=True)
            if array is not None:
                array.tofile(self.folder / name)
        arguments = [f"{name}={int(value)}" for name, value in numbers.items()]
        options = f"exitcode={_FOUND}"
        done = subprocess.run(
            [*self.prefix, self.program, what, self.folder, *arguments],
            env=os.environ | {"ASAN_OPTIONS": f"{options}:detect_leaks=0", "TSAN_OPTIONS": options},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-4000:]}"
        for name, array in arrays.items():
            if array is not None:
                array[...] = np.fromfile(self.folder / name, array.dtype).reshape(array.shape)
