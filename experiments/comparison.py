"""The command line of a comparison on scikit-learn's tables: it measures, or prints its table."""

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import sklearn

Results = list[dict[str, Any]]


def run_comparison(
    program: str,
    about: str | None,
    *,
    tables: Iterable[str],
    record: Path,
    table: Callable[[dict[str, Any]], str],
    measure: Callable[[Sequence[str], Sequence[int]], Iterable[Results]],
) -> None:
    """Run the comparison and write the record after each part of it, or print the table.

    Args:
        program: Name of the module in `experiments`.
        about: What --help says.
        tables: Names of the tables.
        record: The JSON file.
        table: The record as a Markdown table.
        measure: Tables and seeds → the results, part by part.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{program}", description=about)
    parser.add_argument("--table", action="store_true", help="print the table of the record")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", choices=[*tables], default=[*tables])
    parser.add_argument("--output", type=Path, default=record)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.output.read_text())))
        return
    made = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "scikit-learn": sklearn.__version__,
        "device": f"{jax.devices()[0].device_kind}, {jax.default_backend()}",
    }
    results: Results = []
    for part in measure(arguments.only, arguments.seeds):
        results += part
        content = json.dumps({"made_with": made, "results": results}, indent=1)
        arguments.output.write_text(content + "\n")
        for result in part:
            print(result, flush=True)
