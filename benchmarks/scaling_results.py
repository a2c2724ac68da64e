"""The one file that holds what `benchmarks.scaling` finds, part by part."""

import datetime
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scaling.json"


def read() -> dict[str, Any]:
    """All parts that there are."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(part: str, found: Any) -> None:
    """Replace one part."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**read(), part: found}, indent=1)
    RESULTS.write_text(text + "\n")


def setting(*packages: str) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    names = ("jax", "jaxlib", "flax", *packages)
    return {
        "command": " ".join(["python -m benchmarks.scaling", *sys.argv[1:2]]),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in names),
    }
