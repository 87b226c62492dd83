"""What XLA's dumps of a compiled GPU program say about command buffers (CUDA graphs).

XLA turns runs of *thunks*, the steps of an executable, into command buffers when all of them can
be recorded. That is not seen in the program's HLO but in ``*.thunk_sequence.txt``, and if there are
command buffers in ``*.thunk_sequence_after_thunk_passes.txt``, of the folder ``xla_dump_to``.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

# "  012: kCustomCall" and whatever else is on the line; other lines are titles of parts of a loop.
_THUNK = re.compile(r"^( *)\d+: (k[A-Z]\w*)")


@dataclasses.dataclass
class Thunks:
    """How many thunks of one kind are inside and outside of command buffers, and their number."""

    inside: int = 0
    outside: int = 0
    command_buffers: int = 0


def count_thunks(text: str, kind: str) -> Thunks:
    """Counts thunks of ``kind``, "kCustomCall" for example, in the text of a dump."""
    counts = Thunks()
    open_thunks: list[tuple[int, str]] = []  # indentation and kind of those a line is inside of
    for line in text.splitlines():
        found = _THUNK.match(line)
        if found is None:
            continue
        indent, this = len(found[1]), found[2]
        while open_thunks and open_thunks[-1][0] >= indent:
            open_thunks.pop()
        inside = any(outer == "kCommandBuffer" for _, outer in open_thunks)
        open_thunks.append((indent, this))
        counts.command_buffers += this == "kCommandBuffer"
        if this == kind:
            counts.inside += inside
            counts.outside += not inside
    return counts


def thunk_dump(folder: Path) -> str:
    """The thunks that are executed of the one program that was dumped to ``folder``."""
    for pattern in ("*.thunk_sequence_after_thunk_passes*.txt", "*.thunk_sequence.txt"):
        if files := sorted(folder.glob(pattern)):
            assert len(files) == 1, [file.name for file in files]
            return files[0].read_text(encoding="utf-8")
    names = sorted(file.name for file in folder.iterdir())
    raise AssertionError(f"no thunks among the files that XLA dumped: {names}")
