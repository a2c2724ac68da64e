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
import vlae_jax.report

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CORE = (DOCS / "api" / "core.md").read_text()
WITH_BLOCKS = {
    "getting-started.md": 1,
    "gllvm.md": 1,
    "guide.md": 8,
    "python.md": 8,
    "sklearn.md": 3,
}
"""Pages whose Python is run, and how many blocks each has at least."""
FOLDERS = ["analysis", "data", "models", "parallel", "runs", "training"]
INTERNAL = {
    "data.formats",
    "data.prepared",
    "data.search",
    "data.stored",
    "models.arithmetic",
    "parallel.processes",
    "runs.records",
    "runs.seals",
    "runs.storage",
}
"""Modules of those folders that no user calls, and that have no place in the reference."""
EXTRA_ROOMS = {"annealing", "gaps", "interop"}
"""Mathematics that `import vlae_jax` does not bring."""


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_a_page_runs_as_printed(name, quick_compile, tmp_path, monkeypatch):
    """Its blocks hold themselves to what they say, by assertions."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert len(blocks) >= WITH_BLOCKS[name]
    names = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{name}, block {number}", "exec"), names)


def test_only_tested_pages_have_python_in_them():
    """Code that nothing runs is wrong sooner or later."""
    for page in DOCS.rglob("*.md"):
        if page.name not in WITH_BLOCKS:
            assert "```python" not in page.read_text(), page


def test_no_page_borrows_its_text_from_the_readme():
    for page in DOCS.rglob("*.md"):
        for included in re.findall(r"^```\{include\} (.*)$", page.read_text(), re.MULTILINE):
            assert Path(included) != Path("../README.md"), page


def test_every_public_name_is_in_the_reference_once():
    described = re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", CORE, re.MULTILINE)
    listed = re.findall(r"^   (\w+)$", CORE, re.MULTILINE)
    assert Counter(described) == Counter((*vlae_jax.__all__, *vlae_jax.APPLICATION))
    assert described == listed


def test_every_room_is_in_the_reference_once():
    """Of every folder that a user calls each module, but for those that are named as internal."""
    package = Path(vlae_jax.__file__).parent
    modules = {
        f"{folder}.{path.stem}" for folder in FOLDERS for path in package.glob(f"{folder}/*")
    }
    wanted = {name for name in modules if not name.endswith(("__init__", "__pycache__"))}
    assert wanted >= INTERNAL
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    described = re.findall(r"^\.\. automodule:: vlae_jax\.([\w.]+)$", pages, re.MULTILINE)
    assert Counter(described) == Counter(wanted - INTERNAL | EXTRA_ROOMS)


def test_the_index_of_the_reference_leads_to_all_of_its_pages():
    index = (DOCS / "api" / "index.md").read_text()
    for page in (DOCS / "api").glob("*.md"):
        if page.name != "index.md":
            assert f"({page.name})" in index and f"\n{page.stem}\n" in index, page.name


def test_every_public_name_of_the_report_is_in_the_reference():
    page = (DOCS / "api" / "report.md").read_text()
    described = re.findall(r"^\.\. autofunction:: (\w+)$", page, re.MULTILINE)
    assert sorted(described) == sorted(vlae_jax.report.__all__)


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


@pytest.mark.slow
def test_the_site_builds_and_holds_together(tmp_path):
    """Without a warning; all public names, none twice; links resolve; nothing from elsewhere."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="needs the extra docs")
    site = build(tmp_path)
    (reference,) = (page for path, page in site.items() if path.parts[-2:] == ("api", "core.html"))
    for name in (*vlae_jax.__all__, *vlae_jax.APPLICATION):
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
