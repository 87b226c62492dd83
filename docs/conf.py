"""The documentation as a site: ``sphinx-build -W -b html docs build/docs``.

Needs jax_flashmla, with or without its kernels, and its extra ``docs``. The Markdown files are
written for a reader of the repository; what a site needs beyond that is added here.
"""

import os
import pydoc
import re
from pathlib import Path

from jax_flashmla import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "jax_flashmla"
author = "The jax_flashmla authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build"]

html_theme = "furo"
html_title = f"jax_flashmla {release}"
html_copy_source = False
pygments_style = "default"

smartquotes = False  # in docstrings "..." are code more often than not
myst_heading_anchors = 4  # links to headings, by the anchors that they have on GitHub

default_role = "py:obj"  # `name` in a docstring
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False

# Navigation. index.md has the same links for a reader of the repository.
CONTENTS = """
```{toctree}
:hidden:
:caption: Guides

README <site/readme>
installation
models
indexer
decoding
serving
caches
semantics
implementations
```

```{toctree}
:hidden:
:caption: Reference

api/index
api/jax_flashmla
api/serving
api/flax
api/layers
api/core
api/indexer
api/quantization
```

```{toctree}
:hidden:
:caption: Development

kernels/dense_decode
kernels/sparse_decode
kernels/fp8_few_rows
kernels/fp8_many_rows
kernels/fp8_products
site/contributing
site/changelog
```
"""

# Files of the repository that are pages of the site, and the pages that stand in for them.
SHOWN = {
    "site/readme": ROOT / "README.md",
    "site/contributing": ROOT / "CONTRIBUTING.md",
    "site/changelog": ROOT / "CHANGELOG.md",
}
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def adapt_links(text, written_in, page):
    """Links of a file, as they have to be in a page of the site.

    Those to shown files lead to their pages. Other files of the repository are no part of the
    site: of a link to one its text stays. Images become those beside the pages.
    """
    pages = {file: name for name, file in SHOWN.items()}

    def adapt(link):
        path, hash_sign, anchor = link["target"].partition("#")
        if "://" in path or not path:
            return link[0]
        file = (written_in.parent / path).resolve()
        target = DOCS / f"{pages[file]}.md" if file in pages else file
        if not target.is_relative_to(DOCS):
            return link["text"]
        target = os.path.relpath(target, (DOCS / page).parent)
        return f"[{link['text']}]({target}{hash_sign}{anchor})"

    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(adapt, part) for part in parts[::2]]
    return "".join(parts)


def adapt_page(app, page, source):
    """Puts shown files, navigation and links into a page that has been read."""
    file = SHOWN.get(page)
    text = file.read_text() if file else source[0]
    source[0] = adapt_links(text, file or DOCS / f"{page}.md", page)
    if page == "index":
        source[0] += CONTENTS


def find_name(app, env, node, contnode):
    """Docstrings name functions without their module, or by the one that defines them."""
    if node.get("refdomain") != "py":
        return None
    domain, target = env.get_domain("py"), node["reftarget"]
    names = [name for name in domain.objects if name.endswith(f".{target}")]
    if not names and target.startswith("jax_flashmla."):
        value = pydoc.locate(target)
        names = [name for name in domain.objects if value and pydoc.locate(name) is value]
    if not names:
        return None
    # In the same module if possible, else in the outermost one.
    here = f"{node.get('py:module')}."
    name = min(names, key=lambda name: (not name.startswith(here), name.count("."), name))
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def keep_sentence(app, what, name, obj, options, lines):
    """Napoleon reads a property's "Number of something: this" as one of the type "Number"."""
    mark = ":type: "
    if what == "property" and lines and lines[-1].startswith(mark):
        lines[:] = [f"{lines[-1].removeprefix(mark)}: {lines[0]}", *lines[1:-1]]


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", adapt_page)
    app.connect("missing-reference", find_name)
    app.connect("autodoc-process-docstring", keep_sentence, priority=600)  # after napoleon
