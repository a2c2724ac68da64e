"""The search for a data set's files, and the message when they are not found.

Only the names of files and the content of `dataset_info.json` count: no image is read.
"""

import functools
import glob
import json
import re
from pathlib import Path
from typing import Any

from vlae_jax.data.formats import ENDINGS, Source, file_source, installed, read_idx_pair
from vlae_jax.data.pictures import Size, holds_pictures, read_folder
from vlae_jax.data.prepared import (
    KNOWN_DATASETS,
    TFDS_NAMES,
    cache_dir,
    may_be_idx,
    read_prepared,
)
from vlae_jax.errors import UserError, nearest


def find_source(
    name: str, data_dir: str | Path | None, resize: Size | None = None
) -> Source | None:
    """Find the place of a data set: in `data_dir` alone, or in the cache if that is None.

    Args:
        name: Name of the data set.
        data_dir: The folder or file.
        resize: Height and width to bring pictures to.

    Returns:
        None if it is not there.
    """
    if data_dir is None:
        cached = cached_file(name)
        return file_source(cached) if name in KNOWN_DATASETS and cached.is_file() else None
    root = path_of(data_dir)
    if root.is_file():
        return None if _named_for_another(name, root) else file_source(root)
    for ending in ENDINGS:
        if (root / f"{name}{ending}").is_file():
            return file_source(root / f"{name}{ending}")
    return _find_idx(name, root) or _find_prepared(name, root) or _find_folder(name, root, resize)


def find_streamable(name: str, data_dir: str | Path | None) -> Path | None:
    """The prepared directory in `data_dir` or the cache from which images can be streamed."""
    return _prepared_folder(name, cache_dir() if data_dir is None else path_of(data_dir))


def path_of(data_dir: str | Path) -> Path:
    """The folder or file that `data_dir` names."""
    return Path(data_dir).expanduser()


def cached_file(name: str) -> Path:
    """The file of the cache that holds a data set in memory, whether it is there or not."""
    return cache_dir() / f"{name}.npz"


def nothing_fits(name: str, root: Path) -> str:
    """The line for a user in whose `data_dir` no form of the data set was found."""
    if not root.exists():
        return f"data_dir {root} does not exist; give a folder or an .npz file that holds {name}"
    if root.is_file():
        return (
            f"data_dir {root} is not an .npz file of {name}; give a folder or an .npz file, or for "
            f"a table {', '.join(ENDINGS[1:])}"
        )
    wanted = [f"{name}.npz (.npy, .csv, .parquet)"]
    if may_be_idx(name):
        wanted.append(
            "idx files (train-images-idx3-ubyte and t10k-images-idx3-ubyte, .gz or not, "
            f"directly or in {name}/)"
        )
    wanted.append(f"a prepared tensorflow-datasets directory {TFDS_NAMES.get(name, name)}/")
    if not installed("tensorflow_datasets"):
        wanted[-1] += " (readable once you pip install 'vlae-jax[tfds]')"
    wanted.append(f"pictures, directly, in {name}/ or in folders of classes")
    held = ", ".join(sorted(file.name for file in root.glob("*.npz"))) or "none"
    unknown = "" if name in KNOWN_DATASETS else f"; not a known name{nearest(name, KNOWN_DATASETS)}"
    return (
        f"no {name} in data_dir {root}: looked for {', '.join(wanted)}; "
        f".npz files there: {held}{unknown}"
    )


def nothing_to_stream(name: str, root: Path) -> str:
    """The line for a user in whose `data_dir` no prepared directory was found."""
    tfds_name = TFDS_NAMES.get(name, name)
    return (
        f"no {name} that can be streamed in {root}: that takes a directory {tfds_name}/ which "
        f"tensorflow-datasets has prepared; make one with tfds.builder({tfds_name!r}, data_dir=...)"
        ".download_and_prepare(file_format='array_record'), or leave --stream out"
    )


def lacking_to_stream() -> list[str]:
    """Modules that streaming needs and that are not installed."""
    modules = ("tensorflow_datasets", "array_record", "grain")
    return [module for module in modules if not installed(module)]


def refuse_to_stream_digits(name: str) -> None:
    """Raise a UserError for digits, which have no files to stream from."""
    if name == "digits":
        raise UserError(
            "digits comes with scikit-learn and is always in memory; leave --stream out"
        )


def refuse_file_for_digits(data_dir: str | Path | None) -> None:
    """Raise a UserError if digits are to be read from a file, which would not be read."""
    if data_dir is not None and path_of(data_dir).is_file():
        raise UserError(
            f"digits comes with scikit-learn and is not read from {data_dir}; "
            "leave data_dir out, or name the data set that the file holds"
        )


def _find_idx(name: str, root: Path) -> Source | None:
    if not may_be_idx(name):
        return None
    folders = [root / name] + ([] if _named_for_another(name, root) else [root])
    for folder in folders:
        train, test = (_idx_file(folder, part) for part in ("train", "t10k"))
        if train and test:
            return Source(functools.partial(read_idx_pair, train, test), f"idx files in {folder}")
    return None


def _find_folder(name: str, root: Path, resize: Size | None) -> Source | None:
    # Pictures that lie there for another purpose must not stand in for a known set.
    for folder in [root / name] + ([] if name in KNOWN_DATASETS else [root]):
        if holds_pictures(folder):
            read = functools.partial(read_folder, folder, resize)
            return Source(read, f"pictures in {folder}", is_pictures=True)
    return None


def _idx_file(folder: Path, part: str) -> Path | None:
    names = (f"{part}-images{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _find_prepared(name: str, root: Path) -> Source | None:
    folder = _prepared_folder(name, root)
    if folder is None or not installed("tensorflow_datasets"):
        return None
    return Source(lambda: read_prepared(name, folder), f"tensorflow-datasets directory {folder}")


def _prepared_folder(name: str, root: Path) -> Path | None:
    wanted = TFDS_NAMES.get(name, name)
    found = []
    for pattern in ("", "*/", f"{glob.escape(wanted)}/*/"):
        for file in root.glob(f"{pattern}dataset_info.json"):
            about = _description(file)
            if about.get("name") == wanted:
                version = [int(part) for part in re.findall(r"\d+", str(about.get("version")))]
                found.append((version, file.parent))
    return max(found)[1] if found else None


def _named_for_another(name: str, path: Path) -> bool:
    # The pixels do not say what they are: a file's or folder's name is the only sign of a mix-up.
    return path.stem.replace("-", "_") in set(KNOWN_DATASETS) - {name}


def _description(file: Path) -> dict[str, Any]:
    """The content of a `dataset_info.json`; empty if it is damaged or another kind of file."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
