"""The API reference has every public name, and the site of the documentation every page."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MODULES = [
    "jax_flashmla",
    "jax_flashmla.serving",
    "jax_flashmla.quantization",
    "jax_flashmla.flax",
    "jax_flashmla.flax.core",
    "jax_flashmla.flax.indexer",
    "jax_flashmla.flax.linen",
    "jax_flashmla.flax.nnx",
]
DIRECTIVE = re.compile(r"^\.\. (\w+):: ([\w.]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def conf():
    return runpy.run_path(str(DOCS / "conf.py"))


def documented():
    """Full names in the API reference."""
    names = []
    for page in sorted((DOCS / "api").glob("*.md")):
        module = None
        for directive, name in DIRECTIVE.findall(page.read_text()):
            if directive in ("automodule", "currentmodule"):
                module = name
            else:
                assert directive in ("autofunction", "autoclass", "autoexception"), directive
                names.append(f"{module}.{name}")
    return names


def value_of(name):
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def public_names(module):
    """Functions and classes that a module defines, or that a package has from its modules."""
    module = importlib.import_module(module)
    is_package = hasattr(module, "__path__")
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isroutine(value))
        and (is_package or value.__module__ == module.__name__)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    """By the object: what a package has from a module is documented in one of the two."""
    names = public_names(module)
    assert names
    found = {id(value_of(name)) for name in documented()}
    for name in names:
        value = value_of(f"{module}.{name}")
        assert id(value) in found, f"{module}.{name} is not in docs/api"
        assert inspect.getdoc(value), f"{module}.{name} has no docstring"


def test_the_reference_has_nothing_else():
    names = documented()
    assert len(names) == len(set(names))
    for name in names:
        module, _, last = name.rpartition(".")
        assert module in MODULES and last in public_names(module), name


def test_every_page_is_in_the_contents(conf):
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    listed = re.findall(r"^(?:.*<)?([\w/]+)>?$", conf["CONTENTS"], re.MULTILINE)
    assert sorted([*listed, "index"]) == sorted(pages)


def test_pages_in_place_of_files(conf):
    assert conf["SHOWN"].keys() == {
        path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob("site/*.md")
    }
    for file in conf["SHOWN"].values():
        assert file.exists()


def test_links(conf):
    """To pages, to files that are shown, to files that are not, and none in code."""
    adapt, root = conf["adapt_links"], DOCS.parent
    text = (
        "[a](docs/caches.md#writing) [b](LICENSE) ![c](docs/images/x.png) [d](#e) "
        "[f](CONTRIBUTING.md#check) [g](https://example.org)\n```python\nx[0](LICENSE)\n```\n"
    )
    assert adapt(text, root / "README.md", "site/readme") == (
        "[a](../caches.md#writing) b ![c](../images/x.png) [d](#e) "
        "[f](contributing.md#check) [g](https://example.org)\n```python\nx[0](LICENSE)\n```\n"
    )
    text = "[a](../README.md#install) [b](../examples/decode_loop.py)"
    assert adapt(text, DOCS / "caches.md", "caches") == "[a](site/readme.md#install) b"
