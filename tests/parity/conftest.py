"""The tests of this folder import torch and transformers: only if they are asked for."""

from __future__ import annotations

import re


def pytest_ignore_collect(collection_path, config):
    """``-m parity`` or an expression with it collects them; without torch they then fail."""
    expression = config.option.markexpr
    wanted = not expression or re.search(r"(?<!not )\bparity\b", expression)
    return None if wanted or collection_path.suffix != ".py" else True
