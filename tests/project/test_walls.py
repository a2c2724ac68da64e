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

FOLDER = Path(vlae_jax.__file__).parent
# From the top down. A folder imports from itself and from floors below its own; a file that lies
# directly in vlae_jax is mathematics, which knows nothing of the floors above it.
FLOORS = [
    {"__main__"},
    {"commands", "estimator"},
    {"training", "analysis", "report"},
    {"models"},
    {"runs"},
    {"data", "parallel"},
    {"errors", "progress"},
    {"files"},
    {"mathematics"},
]
NO_MATHEMATICS = {"__main__", "errors", "estimator", "files", "progress"}
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


def modules(folder: Path = FOLDER) -> dict[str, Path]:
    """Every module below a folder by its dotted name, packages by that of their `__init__`."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__") or "__init__"] = path
    return found


def imports_of(path: Path, known: set[str]) -> tuple[set[str], set[str]]:
    """What a file imports, in functions too: modules of ours, and packages of others.

    What stands under `if TYPE_CHECKING` is no import but a word for the type checker.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    ours, others = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import, which hides where it leads"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package != "vlae_jax":
                others.add(package)
                continue
            while rest and rest not in known:
                rest = rest.rpartition(".")[0]
            ours.add(rest or "__init__")
    return ours, others


def room_of(module: str) -> str:
    """The folder that a module lies in, or the name of what lies directly in `vlae_jax`."""
    first, _, _ = module.partition(".")
    is_folder = (FOLDER / first).is_dir()
    return first if is_folder or first in NO_MATHEMATICS else "mathematics"


FILES = modules()
IMPORTS = {name: imports_of(path, set(FILES)) for name, path in FILES.items()}


def test_every_folder_has_a_floor():
    folders = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert {room_of(name) for name in FILES} == set.union(*FLOORS)
    assert folders <= set.union(*FLOORS)


@pytest.mark.parametrize("module", sorted(set(FILES) - {"__init__"}))
def test_imports_lead_downward(module):
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    here = room_of(module)
    for other in IMPORTS[module][0] - {"__init__"}:
        there = room_of(other)
        assert there == here or floors[there] > floors[here], f"{module} imports {other}"
        if here == "report":
            assert there in ("report", "runs"), f"{module} imports {other}"


def test_no_module_imports_itself_in_the_end():
    """Not in the folders either: what is imported can be read before who imports it."""
    left = {name: IMPORTS[name][0] - {name, "__init__"} for name in FILES if name != "__init__"}
    packages = {name for name in left if (FOLDER / name.replace(".", "/")).is_dir()}
    for name in left:
        left[name] -= packages
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("module", sorted(n for n in FILES if room_of(n) == "mathematics"))
def test_the_mathematics_imports_only_jax_and_itself(module):
    packages = IMPORTS[module][1]
    allowed = {"jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
    bridges = {
        "annealing": {"blackjax"},
        "gaps": {"optax"},
        "interop": {"blackjax", "numpyro", "optax", "optimistix"},
    }
    extra = packages - allowed - bridges.get(module, set())
    assert not extra, f"{module} imports {extra}"


def test_the_import_parser_sees_every_form(tmp_path):
    """Or the walls would stand on nothing."""
    path = tmp_path / "room.py"
    path.write_text(
        "import vlae_jax.commands.main\nimport optax as o\nfrom vlae_jax import bounds, elbo\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import flax\n"
        "def f():\n    from vlae_jax.training.loop import fit\n"
    )
    ours, others = imports_of(path, {"commands.main", "bounds", "training.loop"})
    assert ours == {"commands.main", "bounds", "__init__", "training.loop"}
    assert others == {"optax", "typing"}


def test_modules_are_short_or_say_why():
    for name, path in FILES.items():
        text = path.read_text()
        if text.count("\n") > 400:
            assert "lines" in text.split('"""')[1], f"{name}: over 400 lines, and does not say why"


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


@pytest.mark.slow
def test_a_full_size_training_step_returns():
    """With jaxlib 0.10 on two cores it never does."""
    run_in_subprocess(
        "import project.test_walls as t; t.full_size_step()", timeout=240, XLA_FLAGS=""
    )
