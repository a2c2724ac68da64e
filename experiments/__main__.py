"""Run a study: `python -m experiments NAME --data-dir PATH`; list them: `--list`."""

import argparse
from pathlib import Path

from experiments.studies import STUDIES
from experiments.study import run_study


def main() -> None:
    """Parse the command line, and run or list."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Run a study.")
    parser.add_argument("name", nargs="?", choices=STUDIES, help="the study")
    parser.add_argument("--list", action="store_true", help="list the studies with their results")
    parser.add_argument("--data-dir", help="folder with the images, if they are not in the cache")
    parser.add_argument("--folder", type=Path, help="for the runs; runs/NAME if it is not given")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--only", nargs="+", metavar="LABEL", default=[], help="these variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="these seeds")
    arguments = parser.parse_args()
    if arguments.list:
        print(listing())
        return
    if arguments.name is None:
        parser.error("name a study, or --list them")
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    variants = STUDIES[arguments.name].variants
    if unknown := [label for label in arguments.only if label not in variants]:
        parser.error(f"no variant {unknown[0]!r} in this study; there are: {', '.join(variants)}")
    run_study(
        arguments.name,
        arguments.folder or Path("runs") / arguments.name,
        labels=arguments.only,
        seeds=arguments.seeds,
        data_dir=arguments.data_dir,
        jobs=arguments.jobs,
    )


def listing() -> str:
    """Every study with its title, main result and time, one a line."""
    return "\n".join(
        f"{name:<20} {study.title}: {len(study.variants)} variants, {len(study.seeds)} seeds, "
        f"{study.measured.minutes} minutes; {study.measured.label} {study.measured.elbo:+.1f} nats "
        f"in ELBO, {study.measured.log_prob:+.1f} in log p(x)"
        for name, study in STUDIES.items()
    )


if __name__ == "__main__":
    main()
