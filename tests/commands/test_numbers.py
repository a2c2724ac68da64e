"""Numbers outside what a command can take are refused as its arguments are read, by every command.

Options are found by their types, so that a new one is held to this as well.
"""

import dataclasses
import math
import types
import typing

import pytest

from vlae_jax.commands.train import Evaluate, Train
from vlae_jax.commands.uses import Encode, Gap, Impute, Reconstruct, Sample, Score
from vlae_jax.errors import UserError
from vlae_jax.runs.presets import default_config

COMMANDS = {
    "train": Train(default_config()),
    **{cls.__name__.lower(): cls("run") for cls in (Evaluate, Encode, Reconstruct, Sample, Gap)},
    "impute": Impute("run", missing=0.5),
    "score": Score("run"),
}
MAY_BE_ZERO = {
    *("ascent_momentum", "epochs", "evaluation_budget", "pretrain", "process_id", "seed", "steps"),
    *("temperature", "warmup_steps", "weight_decay", "draws"),
}


def numbers(hint):
    """The types of numbers that a hint allows, and whether they come in a tuple."""
    if hint in (int, float):
        return {(hint, False)}
    if typing.get_origin(hint) in (types.UnionType, typing.Union, typing.Annotated):
        return set().union(*map(numbers, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return {(int, True)} & {(part, True) for part in typing.get_args(hint)}
    return set()


def options(command):
    """The parts of a command that have options, as (path of fields, name, type, in a tuple)."""
    hints = typing.get_type_hints(type(command), include_extras=False)
    for field in dataclasses.fields(command):
        value, hint = getattr(command, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            for path, *rest in options(value):
                yield ((field.name, *path), *rest)
        else:
            for kind, in_tuple in numbers(hint):
                yield ((), field.name, kind, in_tuple)


def part(command, path):
    for name in path:
        command = getattr(command, name)
    return command


CASES = [
    pytest.param(command, path, name, kind, in_tuple, id=f"{label}-{name}-{kind.__name__}")
    for label, command in COMMANDS.items()
    for path, name, kind, in_tuple in sorted(options(command), key=str)
]


@pytest.mark.parametrize(("command", "path", "name", "kind", "in_tuple"), CASES)
def test_a_number_that_no_command_can_take_is_refused_at_the_door(
    command, path, name, kind, in_tuple
):
    owner, wanted = part(command, path), name.replace("_", "[_-]")
    wrong = {int: [-1, 2**32, 2**70], float: [-1.0, math.inf, -math.inf, math.nan]}[kind]
    if kind is int and name != "seed":
        wrong.append(2**31)
    if name not in MAY_BE_ZERO and name != "missing_box":
        wrong.append(kind(0))
    for value in wrong:
        given = {name: (value,) * (4 if name == "missing_box" else 2) if in_tuple else value}
        if name == "missing_box":
            given["missing"] = None
        with pytest.raises(UserError, match=rf"^(distributed\.)?{wanted} ") as caught:
            dataclasses.replace(owner, **given)
        assert "\n" not in str(caught.value)


def test_the_options_are_found():
    names = {(case.id) for case in CASES}
    assert {"train-seed-int", "train-learning_rate-float", "gap-chains-int"} <= names
    assert {"evaluate-importance_samples-int", "impute-missing-float", "sample-seed-int"} <= names
    assert len(names) > 90
