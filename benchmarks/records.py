"""What a program measured, with all that it depends on, as a JSON file."""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlae_jax.files import replace_file


def setting_of(program: str, arguments: Sequence[str]) -> dict[str, str]:
    """The command, and what it ran on."""
    return {
        "command": " ".join([f"python -m benchmarks.{program}", *arguments]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jaxlib": importlib.metadata.version("jaxlib"),
    }


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file as a whole, so that a broken-off program leaves what it had before."""
    text = json.dumps(content, indent=1) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))
