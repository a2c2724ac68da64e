"""Folders and files of runs, local or in a bucket of Google Cloud Storage, gs://BUCKET/FOLDER.

A local folder is a `pathlib.Path`. One in a bucket is an `etils.epath.Path`, which has the same
methods, and which Orbax takes. They differ in how files come to be: an object in a bucket appears
whole when its writer closes it, cannot be added to, and needs no folder made before it.

Here are the one writer of files, `write_atomically`, and the one reader, `read_bytes`, of which
`read_json` is made. Each fails with a UserError of one line.
"""

import contextlib
import functools
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from vlae_jax.errors import UserError, one_line
from vlae_jax.files import replace_file
from vlae_jax.runs.seals import is_whole, without_seal

_BUCKET = "gs://"
_PERMISSIONS = {
    "storage.buckets.get",  # Orbax asks what kind of bucket it is
    *(f"storage.objects.{action}" for action in ("create", "delete", "get", "list")),
}
_SECONDS = 10
"""Time limit of the check whether a bucket can be used."""


def as_folder(name: str | os.PathLike[str]) -> Path:
    """The folder of that name; one in a bucket has been reached.

    Raises:
        UserError: If the name is a URL of another kind, or the bucket cannot be used.
    """
    text = os.fspath(name)
    if "://" not in text:
        return Path(text)
    bucket = text.removeprefix(_BUCKET).partition("/")[0]
    if not text.startswith(_BUCKET) or not bucket:
        raise UserError(f"{text} is neither a local folder nor gs://BUCKET/FOLDER")
    _prepare()
    reach(bucket)
    from etils import epath

    return epath.Path(text)


def in_bucket(path: Path) -> bool:
    """Whether a folder or file is in a bucket."""
    return str(path).startswith(_BUCKET)


def is_bucket(path: Path) -> bool:
    """Whether a path is a whole bucket rather than a folder in one."""
    return in_bucket(path) and "/" not in str(path).removeprefix(_BUCKET).strip("/")


def resolved(path: Path) -> Path:
    """The canonical path of a folder: equal for any two names of one folder."""
    return path if in_bucket(path) else path.resolve()


def absolute(path: Path) -> Path:
    """The path of a folder independent of the working directory."""
    return path if in_bucket(path) else path.absolute()


def errors_of(path: Path) -> type[Exception]:
    """The errors that reading or writing a path may raise: in a bucket, any."""
    return Exception if in_bucket(path) else OSError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of writing to `path` into one line for the user.

    Raises:
        UserError: In place of the error.
    """
    try:
        yield
    except errors_of(path) as error:
        raise UserError(
            f"{path} cannot be written: {_reason(error)}; choose another folder, or make room there"
        ) from None


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all.

    Args:
        path: The file; what was there before is replaced.
        write: Writes the content into an open file.

    Raises:
        UserError: If it cannot be written.
    """
    if in_bucket(path):
        content = io.BytesIO()
        write(content)
        with writing(path):
            path.write_bytes(content.getvalue())
        return
    with writing(path):
        replace_file(path, write)


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except errors_of(path) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object, and check its seal where it has one.

    Raises:
        UserError: If it cannot be read, is damaged, or holds something else.
    """
    text = read_bytes(path)
    if not is_whole(text):
        raise UserError(
            f"{path} is damaged: it is not what was written; if you have changed it yourself, take "
            "out its last entry, the checksum"
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it holds no JSON ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return without_seal(content)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def _prepare() -> None:
    """Import the storage clients, with settings that they read then where none are given."""
    # TensorFlow, where it is installed, would be used instead, and no longer reads buckets.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Without this gcsfs asks a second service about zonal buckets and waits a minute for it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        import gcsfs  # noqa: F401
        from google.cloud import storage  # noqa: F401
    except ImportError:
        raise UserError(
            "folders in a bucket need more packages: pip install 'vlae-jax[gcs]'"
        ) from None
    # Other processes and TensorStore write there too: a cached listing would be out of date.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    # They log what they raise as well, and that is reported in one line.
    for name in ("gcsfs", "google"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@functools.cache
def reach(bucket: str) -> None:
    """Check once that a bucket exists and may be used, and fail within seconds if not.

    Later operations try again for minutes, as they should in the middle of a run.
    """
    from google.api_core import exceptions as answers
    from google.auth import exceptions as credentials
    from google.cloud import storage

    try:
        client = storage.Client()  # as Orbax makes it
    except credentials.GoogleAuthError:
        raise UserError(
            f"gs://{bucket} needs Google Cloud credentials: run gcloud auth "
            "application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
        ) from None
    except OSError:
        raise UserError(
            f"gs://{bucket} needs a Google Cloud project: set GOOGLE_CLOUD_PROJECT to its name"
        ) from None
    try:
        granted = client.bucket(bucket).test_iam_permissions(
            sorted(_PERMISSIONS), timeout=_SECONDS, retry=None
        )
    except credentials.RefreshError as error:
        raise UserError(
            f"gs://{bucket}: the Google Cloud credentials are not accepted ({one_line(error)}); "
            "run gcloud auth application-default login again"
        ) from None
    except answers.NotFound:
        raise UserError(
            f"there is no bucket gs://{bucket}: make it by gcloud storage buckets create "
            f"gs://{bucket}, or choose another"
        ) from None
    except (answers.Forbidden, answers.Unauthorized) as error:
        raise UserError(
            f"gs://{bucket} is closed to these credentials ({one_line(error)}); ask its owner for "
            "access, and give a virtual machine the scope cloud-platform"
        ) from None
    except Exception as error:
        raise UserError(
            f"gs://{bucket} cannot be reached ({one_line(error)}); check the network, or choose "
            "a local folder"
        ) from None
    if missing := sorted(_PERMISSIONS.difference(granted)):
        raise UserError(
            f"gs://{bucket}: these credentials lack {', '.join(missing)}; ask its owner for the "
            "roles Storage Object User and Storage Legacy Bucket Reader"
        )
