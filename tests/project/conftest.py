"""What the repository has beside the package, for the tests of it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def studies(monkeypatch):
    """`experiments` can be imported; without it, as beside an installed package, tests skip."""
    if not (ROOT / "experiments").is_dir():
        pytest.skip("the studies come with the repository only")
    monkeypatch.syspath_prepend(str(ROOT))
