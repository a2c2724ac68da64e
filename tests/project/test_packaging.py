"""The dependency files and the Makefile, with every installed program replaced by a recorder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vlae_jax.commands.main import parse
from vlae_jax.parallel.options import DistributedConfig

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOLS = PYPROJECT["project"], PYPROJECT["tool"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# Appends its name and arguments to $LOG, one call a line, and answers with $<NAME>_EXIT.
RECORDER = """#!/bin/sh
{ printf '%s' "${0##*/}"; [ $# = 0 ] || printf '|%s' "$@"; echo; } >> "$LOG"
case "${0##*/} $2" in
"vlae_jax --check") exit "${CHECK_EXIT:-0}" ;;
"python pip") exit "${PIP_EXIT:-0}" ;;
esac
"""


def pinned(name: str) -> list[Requirement]:
    lines = [Requirement(line) for line in CONSTRAINTS.splitlines()]
    return [line for line in lines if canonicalize_name(line.name) == canonicalize_name(name)]


class Recorded:
    """A virtual environment of recorders in which the extra `train` counts as installed."""

    def __init__(self, folder: Path) -> None:
        self.venv = folder / "venv"
        self.log = folder / "log"
        (self.venv / "bin").mkdir(parents=True)
        for name in ("pip", "python", "vlae_jax"):
            self.write_program(self.venv / "bin" / name, RECORDER)
        (self.venv / ".with-train").touch()

    def write_program(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # Nothing is inherited from a surrounding `make test ARGS=...`.
        return subprocess.run(
            ["make", "-C", str(ROOT), f"VENV={self.venv}", *arguments],
            env={"PATH": os.environ["PATH"], "LOG": str(self.log), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[list[str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split("|") for line in lines]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


def installed(extra: str) -> list[str]:
    """The call that installs an extra."""
    pip = ["python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [*pip, "-c", "constraints.txt", "-e", f".[{extra}]"]


def test_constraints_are_nothing_but_pins():
    assert "://" not in CONSTRAINTS
    for line in CONSTRAINTS.splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][^ ]*( ; .+)?", line), line


def test_core_depends_on_jax_and_jaxtyping_alone():
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert names == {"jax", "jaxlib", "jaxtyping"}


@pytest.mark.parametrize("name", ["jax", "jaxlib"])
def test_jax_0_10_which_hangs_on_two_cores_is_neither_pinned_nor_allowed(name):
    (pin,) = pinned(name)
    assert "==0.10" not in str(pin.specifier)
    (allowed,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == name]
    assert "0.10.2" not in allowed.specifier


def test_every_direct_dependency_has_a_pin_that_satisfies_it():
    extras = PROJECT["optional-dependencies"].values()
    wanted = [Requirement(text) for text in sum(extras, PROJECT["dependencies"])]
    for requirement in wanted:
        if requirement.name == PROJECT["name"]:
            continue
        pins = pinned(requirement.name)
        assert pins, f"{requirement.name} is not in constraints.txt: run make lock"
        for pin in pins:
            (version,) = pin.specifier
            assert version.version in requirement.specifier, f"{pin} against {requirement}"


def test_the_version_has_one_source_and_the_files_that_repeat_it_agree():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    source = ROOT / TOOLS["hatch"]["version"]["path"]
    (version,) = re.findall(r'^__version__ = "(.*)"$', source.read_text(), re.MULTILINE)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d.*)\] - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)
    assert released[0] == version


def test_the_source_distribution_holds_what_the_tests_read():
    """Every tracked file but for what only a checkout needs."""
    included = TOOLS["hatch"]["build"]["targets"]["sdist"]["include"]
    assert len(set(included)) == len(included)
    for path in included:
        assert (ROOT / path.removeprefix("/")).exists(), path
    listed = subprocess.run(
        ["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a checkout")
    # pyproject.toml and .gitignore come along by themselves.
    held = {path.split("/")[0] for path in listed.stdout.split()} - {".gitignore", "pyproject.toml"}
    assert held == {path.removeprefix("/") for path in included}


def test_hooks_and_hosted_checks_call_what_the_project_has():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (local,) = hooks["repos"]
    assert local["repo"] == "local"
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in local["hooks"]}
    lint = {Requirement(text).name for text in PROJECT["optional-dependencies"]["lint"]}
    assert tools <= {name.removesuffix("-py") for name in lint}
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    for target in re.findall(r"\bmake (\w+)", commands):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    for path in re.findall(r"\btests/\S+", commands):
        assert (ROOT / path).exists(), path
    # The oldest jax that is tried is the oldest that is allowed.
    (allowed,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "jax"]
    (oldest,) = [s.version for s in allowed.specifier if s.operator == ">="]
    assert workflow["jobs"]["core"]["strategy"]["matrix"]["jax"] == [
        f"=={oldest}",
        f">={oldest},!=0.10.*",
    ]


@needs_make
def test_help_is_the_default_and_lists_every_target(recorded):
    shown = recorded.make()
    assert shown.returncode == 0
    assert shown.stdout == recorded.make("help").stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE)) | set(phony.split())
    assert targets == set(phony.split())
    for target in targets:
        assert re.search(rf"^  {target} +\S", shown.stdout, re.MULTILINE), target


@needs_make
def test_every_variable_becomes_its_option(recorded):
    variables = {
        "PRESET": "paper-screenshot",
        "DATASET": "digits",
        "DATA_DIR": "/data",
        "LEVELS": "17",
        "PREPROCESS": "raw",
        "METHOD": "vlae",
        "STEPS": "4",
        "SEARCH": "gradient",
        "POSTERIOR": "exact",
        "DAMPING": "paper",
        "SOLVER": "cg",
        "GRADIENT": "stop",
        "CURVATURE": "exact",
        "NETWORK": "conv",
        "LATENT": "8",
        "ACTIVATION": "tanh",
        "LIKELIHOOD": "gaussian",
        "VARIANCE": "shared",
        "PRECISION": "bfloat16",
        "OBJECTIVE": "iwae",
        "TRAIN_SAMPLES": "5",
        "EPOCHS": "2",
        "PRETRAIN": "1",
        "MODES": "stored",
        "PATIENCE": "3",
        "MINUTES": "1.5",
        "BATCH_SIZE": "32",
        "MICROBATCHES": "4",
        "LEARNING_RATE": "1e-3",
        "SEED": "7",
        "IMPORTANCE_SAMPLES": "100",
        "PROPOSAL": "student_t",
        "TEST_IMAGES": "50",
        "CHUNK_SIZE": "10",
        "RUN_DIR": "runs/one",
        "RUNS_DIR": "runs",
    }
    (listed,) = re.findall(r"^OPTIONS := ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert {*variables, "HIDDEN", "CHANNELS"} == set(listed.replace("\\", "").split())
    done = recorded.make(
        "experiment",
        *[f"{name}={value}" for name, value in variables.items()],
        "HIDDEN=500 300",
        "CHANNELS=16 32",
        "RESUME=1",
        "OVERWRITE=0",
        "ARGS=--warmup-steps '1 2'",
    )
    assert done.returncode == 0, done.stderr
    (call,) = recorded.calls()
    assert call[:2] == ["vlae_jax", "train"]
    given = call[2:]
    assert given[-3:] == ["--resume", "--warmup-steps", "1 2"]
    train = parse(["train", *given[:-2]])
    assert train.resume and not train.overwrite
    assert (train.config.model.hidden, train.config.training.seed) == ((500, 300), 7)
    for several in (["--hidden", "500", "300"], ["--channels", "16", "32"]):
        at = given.index(several[0])
        assert given[at : at + 3] == several
        del given[at : at + 3]
    options = {f"--{name.lower().replace('_', '-')}": value for name, value in variables.items()}
    assert dict(zip(given[:-3:2], given[1:-3:2], strict=True)) == options


@needs_make
def test_variables_of_devices_and_processes_become_their_options(recorded):
    variables = {"DEVICES": "8", "COORDINATOR": "h:1", "PROCESSES": "2", "PROCESS_ID": "1"}
    (listed,) = re.findall(r"^DISTRIBUTED := (.*)$", MAKEFILE, re.MULTILINE)
    assert set(variables) == set(listed.split())
    done = recorded.make(
        "experiment",
        *[f"{name}={value}" for name, value in variables.items()],
        *("SHARD_PARAMETERS=1", "RESUME_IF_THERE=1"),
    )
    assert done.returncode == 0, done.stderr
    (call,) = recorded.calls()
    assert call[-2:] == ["--resume-if-there", "--distributed.shard-parameters"]
    assert parse(call[1:]).distributed == DistributedConfig("h:1", 2, 1, 60, 8, True)
    given = dict(zip(call[2:-2:2], call[3:-2:2], strict=True))
    assert given == {
        f"--distributed.{name.lower().replace('_', '-')}": value
        for name, value in variables.items()
    }


@needs_make
def test_nothing_set_means_no_option(recorded):
    assert recorded.make("experiment").returncode == 0
    assert recorded.calls() == [["vlae_jax", "train"]]


@needs_make
@pytest.mark.parametrize("where", ["command line", "environment"])
def test_values_reach_the_program_as_they_were_typed(recorded, where):
    folder = '/a  b/it\'s $HOME, "so" #1'
    if where == "environment":
        done = recorded.make("experiment", DATA_DIR=folder, SEED="3")
    else:
        done = recorded.make("experiment", f"DATA_DIR={folder}", "SEED=3")
    assert done.returncode == 0, done.stderr
    assert recorded.calls() == [["vlae_jax", "train", "--data-dir", folder, "--seed", "3"]]


@needs_make
def test_dry_run_prints_the_command_and_runs_nothing(recorded):
    done = recorded.make("-n", "experiment", "DATASET=mnist", "STEPS=4", "DATA_DIR=/a b")
    assert "vlae_jax train --dataset 'mnist' --data-dir '/a b' --steps '4'\n" in done.stdout
    assert recorded.calls() == []


CHECK = ["vlae_jax", "prepare", "--check", "mnist", "--data-dir", "/a b"]
PREPARE = ["vlae_jax", "prepare", "mnist"]
TRAIN = ["vlae_jax", "train", "--dataset", "mnist", "--data-dir", "/a b"]


@needs_make
@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        (0, [CHECK, TRAIN]),
        (4, [CHECK, installed("prepare"), PREPARE, TRAIN]),
        (1, [CHECK]),
        (2, [CHECK]),
        (3, [CHECK, installed("tfds"), TRAIN]),
    ],
)
def test_data_is_prepared_only_where_it_must_be(recorded, answer, calls):
    done = recorded.make("experiment", "DATASET=mnist", "DATA_DIR=/a b", CHECK_EXIT=str(answer))
    assert (done.returncode == 0) == (answer not in (1, 2)), done.stderr
    assert recorded.calls() == calls


@needs_make
def test_docs_installs_its_extra_and_takes_warnings_for_errors(recorded):
    assert recorded.make("docs").returncode == 0
    install, build = recorded.calls()
    assert install == installed("docs")
    assert build[:4] == ["python", "-m", "sphinx", "--fail-on-warning"]
    assert build[-2:] == ["docs", "docs/_build/html"]


@needs_make
def test_build_installs_its_extra_and_builds_both_distributions(recorded):
    assert recorded.make("build").returncode == 0
    assert recorded.calls() == [installed("lint"), ["python", "-m", "build"]]


@needs_make
def test_a_preset_brings_its_data_set(recorded):
    """Another one can be asked for; no other preset, or none, asks for data."""
    preset = ("experiment", "PRESET=paper-screenshot")
    check = ["vlae_jax", "prepare", "--check", "mnist"]
    train = ["vlae_jax", "train", "--preset", "paper-screenshot", "--dataset"]
    assert recorded.make(*preset, CHECK_EXIT="0").returncode == 0
    assert recorded.calls() == [check, [*train, "mnist"]]
    assert recorded.make(*preset, "DATASET=digits").returncode == 0
    assert recorded.calls()[2:] == [[*train, "digits"]]


@needs_make
def test_accelerator_and_tensorboard_extras_are_installed_once(recorded):
    arguments = ("experiment", "PLATFORM=cuda", "TENSORBOARD=1")
    train = ["vlae_jax", "train", "--tensorboard"]
    assert recorded.make(*arguments).returncode == 0
    assert recorded.calls() == [installed("cuda"), installed("tensorboard"), train]
    assert "JAX_PLATFORMS=cuda,cpu" in recorded.make(*arguments).stdout
    assert recorded.calls()[3:] == [train]


@needs_make
def test_streaming_installs_its_extra_and_prepares_what_can_be_streamed(recorded):
    done = recorded.make("experiment", "DATASET=mnist", "STREAM=1", CHECK_EXIT="4")
    assert done.returncode == 0, done.stderr
    assert recorded.calls() == [
        installed("stream"),
        ["vlae_jax", "prepare", "--check", "mnist", "--stream"],
        installed("prepare"),
        ["vlae_jax", "prepare", "mnist", "--stream"],
        ["vlae_jax", "train", "--dataset", "mnist", "--stream"],
    ]


@needs_make
def test_failed_installation_stops_everything_and_is_tried_again(recorded):
    for _ in range(2):
        assert recorded.make("experiment", "PLATFORM=tpu", PIP_EXIT="1").returncode != 0
    assert recorded.calls() == [installed("tpu")] * 2


@needs_make
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["PLATFORM=gpu"], "PLATFORM=gpu is not one of cpu, cuda, tpu"),
        (["PLATFORM=cpu cuda"], "PLATFORM=cpu cuda is not one of cpu, cuda, tpu"),
        (["RESUME=yes"], "RESUME=yes is neither 1 (on) nor 0"),
        (["DATSET=mnist"], "Unknown variable DATSET"),
    ],
)
def test_mistake_is_refused_in_one_line(recorded, arguments, complaint):
    done = recorded.make("experiment", *arguments)
    assert done.returncode != 0
    complaints = [line for line in done.stderr.splitlines() if complaint in line]
    assert len(complaints) == 1, done.stderr
    assert recorded.calls() == []


@needs_make
def test_old_python_is_refused(recorded, tmp_path):
    (recorded.venv / "bin/pip").unlink()
    old = tmp_path / "old-python"
    pretend = "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[2])"
    recorded.write_program(old, f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$@"\n')
    (recorded.venv / ".with-train").unlink()
    done = recorded.make("experiment", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"vlae_jax needs Python 3.11 or newer, but {old} is 3.9" in done.stderr
    assert recorded.calls() == []
