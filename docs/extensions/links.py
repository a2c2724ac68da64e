"""Links that are right on disk become links that are right in the site.

Files beside the code (changelog, contributing, examples, studies, benchmarks) are included whole,
so their links lead from where they lie. A link to a file that the site has as a page leads to that
page. And a name of the package, written as code, is a link to its place in the reference.
"""

import os
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import vlae_jax

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "experiments/README.md": "studies.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Files in place of which the site has a page, by their paths from the root."""
_PUBLIC = (*vlae_jax.__all__, *vlae_jax.APPLICATION)
NAMES = (
    {name: f"vlae_jax.{name}" for name in _PUBLIC}
    | {f"vlae_jax.{name}": f"vlae_jax.{name}" for name in _PUBLIC}
    | {f"vlae_jax.{room}": f"vlae_jax.{room}" for room in ("annealing", "gaps", "interop")}
)
"""Targets in the reference, by the names that prose writes."""
PROSE = ("getting-started", "python", "method", "guide", "changelog")
"""Pages on which such a name means the function; elsewhere it may be the value of an option."""
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(\))")


def rewrite(text: str, folder: Path, page: Path) -> str:
    """Make the links of Markdown that was written in `folder` right for `page`."""

    def relocate(match: re.Match[str]) -> str:
        before, path, fragment, after = match.groups(default="")
        path = os.path.relpath(folder / path, ROOT)
        if path in PAGES:
            target = DOCS / PAGES[path]
        elif Path(path).parent == Path("examples"):
            # The page of examples shows each of them under a heading that is its name.
            target, fragment = DOCS / "examples.md", "#" + Path(path).name.replace(".", "")
        else:
            target = ROOT / path
        return f"{before}{os.path.relpath(target, page.parent)}{fragment}{after}"

    return _LINK.sub(relocate, text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Rewrite every page as it is read, and everything that it includes."""

    def on_page(app: Sphinx, name: str, content: list[str]) -> None:
        page = DOCS / f"{name}.md"
        content[0] = rewrite(content[0], page.parent, page)

    def on_include(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
        # Pages that include lie in the folder of the site itself.
        content[0] = rewrite(content[0], (DOCS / path).parent, DOCS / "page.md")

    def on_document(app: Sphinx, document: nodes.document) -> None:
        if app.env.current_document.docname not in PROSE:
            return
        for code in list(document.findall(nodes.literal)):
            target = NAMES.get(code.astext().partition("(")[0])
            if target and not isinstance(code.parent, nodes.title | nodes.reference):
                link = addnodes.pending_xref(
                    refdomain="py", reftype="obj", reftarget=target, refwarn=True
                )
                code.replace_self(link)
                link += code

    app.connect("doctree-read", on_document)
    app.connect("source-read", on_page)
    app.connect("include-read", on_include)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
