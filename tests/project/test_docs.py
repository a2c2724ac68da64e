"""The documentation: what the guide shows runs, the reference is whole, the site builds."""

import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import vlae_jax

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CORE = (DOCS / "api" / "core.md").read_text()
ROOMS = ["annealing", "applications", "flows", "gaps", "interop"]


def test_the_guide_runs_as_printed(quick_compile):
    """Its blocks hold themselves to what they say, by assertions."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "guide.md").read_text(), re.DOTALL)
    assert len(blocks) >= 8
    names = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"guide.md, block {number}", "exec"), names)
    assert names["covariances"].shape == (16, 3, 3)


def test_only_tested_pages_have_python_in_them():
    """Code that nothing runs is wrong sooner or later: README's and the guide's are run."""
    for page in DOCS.glob("*.md"):
        if page.name != "guide.md":
            assert "```python" not in page.read_text(), page


def test_every_public_name_is_in_the_reference_once():
    described = re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", CORE, re.MULTILINE)
    listed = re.findall(r"^   (\w+)$", CORE, re.MULTILINE)
    assert Counter(described) == Counter(vlae_jax.__all__)
    assert described == listed


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_page(room):
    assert f".. automodule:: vlae_jax.{room}\n" in (DOCS / "api" / f"{room}.md").read_text()
    assert f"({room}.md)" in (DOCS / "api" / "index.md").read_text()


def test_the_page_of_examples_shows_all_of_them():
    shown = re.findall(
        r"^```\{literalinclude\} \.\./(.*)$", (DOCS / "examples.md").read_text(), re.M
    )
    assert sorted(shown) == sorted(f"examples/{path.name}" for path in ROOT.glob("examples/*.py"))


class Page(HTMLParser):
    """What a page of the site links to, loads and can be linked at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.loads, self.anchors = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if "id" in given:
            self.anchors.append(given["id"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(given["href"])
        if tag in ("script", "img", "iframe") and given.get("src"):
            self.loads.append(given["src"])


def build(folder: Path) -> dict[Path, Page]:
    """Every page of the site, by its path, built in a process of its own."""
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run(
        [*command, "-d", folder / "doctrees", DOCS, folder / "html"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {path.resolve(): Page(path) for path in (folder / "html").rglob("*.html")}


def test_the_site_builds_and_holds_together(tmp_path):
    """Without a warning; all public names, none twice; links resolve; nothing from elsewhere."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="needs the extra docs")
    site = build(tmp_path)
    (reference,) = (page for path, page in site.items() if path.parts[-2:] == ("api", "core.html"))
    for name in vlae_jax.__all__:
        assert f"vlae_jax.{name}" in reference.anchors, name
    for path, page in site.items():
        assert max(Counter(page.anchors).values(), default=1) == 1, path
        assert not [url for url in page.loads if urlsplit(url).netloc], path
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert target.exists(), f"{path.name}: {link}"
            if url.fragment and target in site:
                assert unquote(url.fragment) in site[target].anchors, f"{path.name}: {link}"
