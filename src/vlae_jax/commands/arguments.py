"""Types of arguments that several commands take."""

from pathlib import Path, PurePath
from typing import Annotated

import tyro

from vlae_jax.runs.storage import as_folder

Folder = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: as_folder(words[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""The name of a folder or file, local or in a bucket."""
