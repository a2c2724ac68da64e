"""The built wheel, alone in an environment of its own: what `pip install vlae-jax` gives."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BARE = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
"""Nothing that would lead to a checkout."""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=BARE, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel and what it depends on, nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("vlae_jax-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return python


def test_the_library_example_runs_with_the_wheel_alone(python, tmp_path):
    readme = (ROOT / "README.md").read_text()
    _, example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shown = "print(covariances.shape, bool(is_pd.all()), vl.__file__)"
    (tmp_path / "example.py").write_text(f"{example}\n{shown}\n")
    printed = run(python, "example.py", cwd=tmp_path)
    assert printed.startswith("(128, 3, 3) True ")
    assert str(python.parents[1]) in printed


def test_no_extra_has_come_along(python, tmp_path):
    code = "from importlib import metadata; print(*(d.name for d in metadata.distributions()))"
    names = {
        name.lower().replace("_", "-") for name in run(python, "-c", code, cwd=tmp_path).split()
    }
    assert names >= {"vlae-jax", "jax", "jaxlib", "jaxtyping"}
    assert not names & {"flax", "optax", "orbax-checkpoint", "matplotlib", "tyro", "scikit-learn"}


@pytest.mark.parametrize("name", ["fit", "load", "save", "Trained"])
def test_a_name_of_the_shipped_model_names_the_extra_that_it_needs(python, tmp_path, name):
    code = f"import vlae_jax\ntry: vlae_jax.{name}\nexcept ImportError as error: print(error)"
    (line,) = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert re.fullmatch(rf"vlae_jax\.{name} needs \w+: pip install 'vlae-jax\[train\]'", line)


def test_the_version_is_that_of_the_source(python, tmp_path):
    code = "import vlae_jax; from importlib import metadata; print(metadata.version('vlae-jax'), "
    printed = run(python, "-c", code + "vlae_jax.__version__)", cwd=tmp_path)
    source = (ROOT / "src/vlae_jax/__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE)
    assert printed.split() == [version, version]
