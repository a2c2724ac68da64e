"""Output densities by name, and which column has which, as a text: ``poisson:3,gaussian:5``."""

import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from vlae_jax.errors import UserError, nearest

Values = Literal["numbers", "counts", "classes", "binary"]


class Density(NamedTuple):
    """What a density is for."""

    values: Values
    """numbers: measurements. counts: 0, 1, 2, ... classes: whole numbers, each a class of its own.
    binary: 0 and 1."""


LIKELIHOODS: dict[str, Density] = {
    "gaussian": Density("numbers"),
    "student_t": Density("numbers"),
    "bernoulli": Density("binary"),
    "categorical": Density("classes"),
    "poisson": Density("counts"),
    "negative_binomial": Density("counts"),
    "zero_inflated_poisson": Density("counts"),
    "zero_inflated_negative_binomial": Density("counts"),
    "discretized_logistic": Density("counts"),
}
"""Output densities of the shipped model, by name."""

Choice = tuple[str, int | tuple[str, ...] | None]
"""A density, and how many columns have it, their names, or None for the rest of them."""


def as_text(likelihood: Any) -> str:
    """The text of a likelihood that may be given as a mapping or a sequence.

    Args:
        likelihood: A text; pairs of a density and the number of its columns in order, as
            (("poisson", 3), ("gaussian", 5)); or a mapping from densities to the names of their
            columns, or None for all others.

    Raises:
        UserError: If it is none of these, or a density is unknown.
    """
    if isinstance(likelihood, str):
        if likelihood != "auto":
            parse(likelihood)
        return likelihood
    pairs = likelihood.items() if isinstance(likelihood, Mapping) else likelihood
    words = []
    try:
        for name, columns in pairs:
            if columns is None:
                words.append(str(name))
            elif isinstance(columns, int):
                words.append(f"{name}:{columns}")
            else:
                names = [columns] if isinstance(columns, str) else columns
                words.append(f"{name}:{'+'.join(map(_quoted, names))}")
    except (TypeError, ValueError):
        raise UserError(
            "likelihood must be a name, pairs such as (('poisson', 3), ('gaussian', 5)), or a "
            f"mapping from names to columns, got {likelihood!r}"
        ) from None
    text = ",".join(words)
    parse(text)
    return text


def parse(text: str) -> tuple[Choice, ...]:
    """Read the text of a likelihood.

    ``gaussian`` is that of all columns. ``poisson:3,gaussian:5`` counts columns in order,
    ``poisson:visits+falls,gaussian`` names them, with the rest last. In names the signs ``:,+%``
    are written as in URLs, a comma as ``%2C``.

    Raises:
        UserError: If a density is unknown, or the text makes no sense.
    """
    choices: list[Choice] = []
    for part in text.split(","):
        name, colon, columns = part.strip().partition(":")
        if name not in LIKELIHOODS:
            raise UserError(f"unknown likelihood {name!r}{nearest(name, LIKELIHOODS)}")
        if not colon:
            choices.append((name, None))
        elif columns.isdigit():
            choices.append((name, int(columns)))
        else:
            choices.append((name, tuple(map(urllib.parse.unquote, columns.split("+")))))
    counted = [isinstance(columns, int) for _, columns in choices]
    rests = sum(columns is None for _, columns in choices)
    if rests > 1 or (any(counted) and not all(counted)):
        raise UserError(
            f"likelihood {text!r} must count all columns (poisson:3,gaussian:5), or name them "
            "(poisson:visits+falls,gaussian), where one density may take the rest"
        )
    return tuple(choices)


def assigned(text: str, dim: int, names: Sequence[str] | None) -> list[tuple[str, tuple[int, ...]]]:
    """Each density with the indices of its columns.

    Args:
        text: See `parse`.
        dim: How many columns there are.
        names: Their names, or None.

    Raises:
        UserError: If the columns do not add up, or there is no column of a name.
    """
    choices = parse(text)
    if len(choices) == 1 and choices[0][1] is None:
        return [(choices[0][0], tuple(range(dim)))]
    found: list[tuple[str, tuple[int, ...]]] = []
    taken: set[int] = set()
    for name, columns in choices:
        if columns is None:
            continue
        if isinstance(columns, int):
            indices = tuple(range(len(taken), len(taken) + columns))
        else:
            if lacking := [column for column in columns if column not in (names or ())]:
                held = ", ".join(names) if names else "columns without names: count them instead"
                raise UserError(
                    f"likelihood {name} is for the column {lacking[0]!r}, but the data have {held}"
                )
            assert names is not None
            indices = tuple(names.index(column) for column in columns)
        if doubled := taken.intersection(indices):
            raise UserError(f"likelihood {text!r} gives column {min(doubled)} two densities")
        taken.update(indices)
        found.append((name, indices))
    rest = tuple(sorted(set(range(dim)) - taken))
    if others := [name for name, columns in choices if columns is None]:
        found.append((others[0], rest))
        rest = ()
    if rest or len(taken) > dim or (taken and max(taken) >= dim):
        raise UserError(
            f"likelihood {text!r} gives {len(taken)} columns a density, and there are {dim}"
        )
    return [(name, indices) for name, indices in found if indices]


def _quoted(name: Any) -> str:
    text = str(name)
    for sign in "%:,+":
        text = text.replace(sign, urllib.parse.quote(sign))
    return text
