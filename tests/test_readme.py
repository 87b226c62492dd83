"""The examples in README.md and docs/ run as written, and what they say about files is true."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
import test_deepseek_example as deepseek
import tokenizers

import jax_flashmla
from jax_flashmla import _dispatch, _ffi

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    )
)
# Lines of an example that print something and say what: print(...)  # this: because of that
PRINTS = re.compile(r"^print\(.*\)  # (?P<text>[^:\n]*)", re.MULTILINE)


def examples(page):
    return re.findall(
        r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )


def anchors(page):
    """The anchors that headings of a page get on GitHub."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_has_an_example():
    assert len(examples("README.md")) == 1


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)])
def test_examples_run(page, capsys):
    """Those of a page share their names, as in one program."""
    names = {"__name__": "example"}
    for code in examples(page):
        exec(compile(code, page, "exec"), names)
    printed = "".join(capsys.readouterr().out.split())
    for found in PRINTS.finditer("\n".join(examples(page))):
        assert "".join(found["text"].split()) in printed, found[0]


def test_rows_without_a_request():
    """docs/decoding.md: a length of -1 before the step writes nothing and gives zeros."""
    page = "docs/decoding.md"
    names = {"__name__": "example"}
    exec(compile(examples(page)[0], page, "exec"), names)
    cache = names["PagedKVCache"].zeros(names["LAYERS"] * names["PAGES"], names["PAGE_SIZE"])
    lengths = np.array([-1, 12, -1, 63], np.int32)
    cache, out = names["step"](cache, names["q"], names["kv"], lengths, names["block_table"])
    assert np.all(np.asarray(out[:, ::2], np.float32) == 0)
    written = np.flatnonzero(np.any(np.asarray(cache.data[..., 0], np.float32) != 0, axis=-1))
    pages = names["PAGES"]
    slots = [page * 64 + offset for page, offset in ((1, 12), (5, 63))]
    assert sorted(written) == sorted(slots + [slot + pages * 64 for slot in slots])
    assert np.all(np.asarray(out[:, 1::2], np.float32).any(axis=(-1, -2)))


def test_explanation_in_the_docs_is_what_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(_dispatch, "cuda_devices", lambda: [])
    monkeypatch.setattr(_ffi, "cuda_built", lambda: False)
    page = "docs/implementations.md"
    exec(compile(examples(page)[0], page, "exec"), {})
    shown = re.search(r"prints\n\n```\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert shown[1] == capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(file.relative_to(ROOT)), f"{page} links to {target}"


def test_commands_are_one_line_each():
    """Fresh set-up and run, in one line: .ci/run looks for these lines and runs them."""
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv ")]
    main, tests = (line.split(" && ")[-1] for line in commands)
    assert main == ".venv/bin/python -m jax_flashmla"
    assert tests.split()[0] == ".venv/bin/pytest"


@pytest.mark.parametrize("page", ["README.md", "examples/deepseek/README.md"])
def test_the_deepseek_example_runs(page, tmp_path):
    """As written, but for the checkpoint: a small random one whose words are w0, w1, ..."""
    tensors = deepseek.make_tensors(deepseek.V2)
    folder = deepseek.write(tmp_path / "checkpoint", deepseek.V2, tensors)
    words = {f"w{i}": i for i in range(deepseek.V2["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))

    text = (ROOT / page).read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^python examples/deepseek/generate\.py .*$", text, re.MULTILINE)
    _, program, checkpoint, *options = shlex.split(line)
    assert checkpoint == "/checkpoints/DeepSeek-V2-Lite"
    done = subprocess.run(
        [sys.executable, program, str(folder), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(Path(jax_flashmla.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    pairs = itertools.pairwise(options)
    prompts = [value for option, value in pairs if option == "--prompt"]
    lines = done.stdout.splitlines()
    assert lines[::2] == [f"--- {prompt}" for prompt in prompts]
    for prompt, generated in zip(prompts, lines[1::2], strict=True):
        tokens = [words[word] for word in generated.split()]
        assert len(tokens) == 64 or tokens[-1] == deepseek.V2["eos_token_id"]
        length = len(tokenizer.encode(prompt).ids)
        deepseek.assert_greedy(deepseek.V2, tensors, [0] * length, tokens)


def test_extras_that_are_named_exist():
    """In every command that installs this package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = set()
    for page in PAGES:
        for names in re.findall(r"\.\[([\w,]+)\]", (ROOT / page).read_text()):
            found |= set(names.split(","))
    assert found <= set(project["optional-dependencies"])
    assert {"examples", "parity", "docs", "test"} <= found
