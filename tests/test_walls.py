"""The walls between the rooms, and the one step that a bad jaxlib never finishes."""

import ast
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import features, random_layers, run_in_subprocess

import vlae_jax
from vlae_jax import affine_head_expansion, elbo, gaussian, infer_posterior, standard_normal

CORE = [
    {"errors"},
    {"densities"},
    {"curvature"},
    {"refinement", "posterior"},
    {"inference"},
    {"bounds"},
    {"__init__"},
]
OUTER = [
    {"interop", "annealing"},
    {"networks"},
    {"flows", "gaps"},
    {"models"},
    {"config"},
    {"data"},
    {"images"},
    {"ppca"},
    {"preprocessing"},
    {"folders"},
    {"run_folder"},
    {"progress"},
    {"systems"},
    {"distributed"},
    {"experiment", "feeding"},
    {"checkpoints"},
    {"training"},
    {"evaluation"},
    {"gap_measurement"},
    {"diagnostics"},
    {"applications"},
    {"report"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
PLACES = {room: place for place, rooms in enumerate(CORE + OUTER) for room in rooms}
CORE_ROOMS = sorted(set.union(*CORE))
FOLDER = Path(vlae_jax.__file__).parent
# A room is a file, or a folder of files.
MODULES = {path.stem: [path] for path in FOLDER.glob("*.py")} | {
    path.parent.name: sorted(path.parent.rglob("*.py")) for path in FOLDER.glob("*/__init__.py")
}
# What the extras bring; the core must do without.
EXTRAS = [
    "array_record",
    "arviz_stats",
    "blackjax",
    "flax",
    "grain",
    "matplotlib",
    "numpyro",
    "optax",
    "optimistix",
    "orbax",
    "PIL",
    "pydantic",
    "rich",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "tyro",
]


def imports_of(room: str) -> set[str]:
    """Every module imported anywhere in a room, in functions too, with rooms as `vlae_jax.room`."""
    found = set()
    trees = [ast.parse(path.read_text()) for path in MODULES[room]]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "vlae_jax" if node.level else node.module
            if node.level and node.module:
                module = f"vlae_jax.{node.module}"
            names = {f"{module}.{alias.name}" for alias in node.names}
            rooms = {name for name in names if name.removeprefix("vlae_jax.") in MODULES}
            found |= rooms if module == "vlae_jax" and rooms else {module}
    return found


def rooms_imported_by(room: str) -> set[str]:
    """A bare `vlae_jax` is its `__init__`; files of one folder may import each other."""
    ours = {name for name in imports_of(room) if name.split(".")[0] == "vlae_jax"}
    return {name.split(".")[1] if "." in name else "__init__" for name in ours} - {room}


def test_every_room_has_a_place():
    """A new room is given one here, and in the table of rooms."""
    assert set(MODULES) == set(PLACES)


@pytest.mark.parametrize("room", MODULES)
def test_imports_point_one_way(room):
    """Only to rooms of an earlier place, wherever in the file they stand; so there is no cycle."""
    for other in rooms_imported_by(room) - {"__init__"}:
        assert PLACES[other] < PLACES[room], f"{room} imports {other}"


@pytest.mark.parametrize("room", CORE_ROOMS)
def test_core_rooms_import_only_jax_and_each_other(room):
    allowed = {"jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
    assert rooms_imported_by(room) <= set(CORE_ROOMS) - {"__init__"}
    packages = {name.split(".")[0] for name in imports_of(room)} - {"vlae_jax"}
    assert packages <= allowed, f"{room} imports {packages - allowed}"


def test_the_import_parser_sees_every_form(tmp_path, monkeypatch):
    """Or the walls would stand on nothing."""
    path = tmp_path / "room.py"
    path.write_text(
        "import vlae_jax.cli\nimport optax as o\nfrom vlae_jax import data, elbo\n"
        "from . import report\nfrom .systems import System\n"
        "def f():\n    from vlae_jax.training import fit\n"
    )
    inner = tmp_path / "inner.py"
    inner.write_text("from vlae_jax.room.other import a\nfrom vlae_jax import models\n")
    monkeypatch.setitem(MODULES, "room", [path, inner])
    assert rooms_imported_by("room") == {"cli", "data", "models", "report", "systems", "training"}
    assert "optax" in imports_of("room")


def test_the_core_imports_without_the_extras():
    blocked = f"import sys\nfor name in {EXTRAS}:\n    sys.modules[name] = None\n"
    output = run_in_subprocess(
        blocked + "import vlae_jax\nprint(len(vlae_jax.__all__))", timeout=60
    )
    assert int(output) == len(vlae_jax.__all__)


def test_the_core_does_not_import_the_extras_where_there_are_any():
    """Importing them would cost every user seconds."""
    output = run_in_subprocess(
        "import sys, jax, jaxtyping\nbefore = set(sys.modules)\nimport vlae_jax\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})",
        timeout=60,
    )
    assert "vlae_jax" in output.split()
    assert not set(output.split()) & set(EXTRAS)


def full_size_step() -> None:
    """One step of training as the paper's, decoder 50-500-500-784, batch 128, T=4, unrolled."""
    layers = random_layers(0, (50, 500, 500, 784), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(128, 784)), jnp.float32)
    z_init = jnp.zeros((128, 50))

    def loss(layers):
        def bound(key, x, z_init):
            expand = affine_head_expansion(
                lambda z: features(layers, "relu", z), *layers[-1], jnp.float32(0), x
            )

            def log_joint(z):
                kernel, bias = layers[-1]
                mean = features(layers, "relu", z) @ kernel + bias
                return gaussian(x, mean, jnp.float32(0)) + standard_normal(z)

            posterior, _ = infer_posterior(expand, z_init, num_steps=4, gradient="unroll")
            return elbo(key, log_joint, posterior)

        return -jnp.mean(jax.vmap(bound)(jax.random.split(jax.random.key(0), 128), x, z_init))

    @jax.jit
    def step(layers):
        value, slope = jax.value_and_grad(loss)(layers)
        return jax.tree.map(lambda w, d: w - 1e-5 * d, layers, slope), value

    layers, value = step(layers)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((layers, value)))


def test_a_full_size_training_step_returns():
    """With jaxlib 0.10 on two cores it never does."""
    run_in_subprocess("import test_walls as t; t.full_size_step()", timeout=120, XLA_FLAGS="")
