"""Folders by name: local ones, and those in a bucket of Google Cloud Storage, gs://BUCKET/FOLDER.

A local folder is a `pathlib.Path`. One in a bucket is an `etils.epath.Path`, which has the same
methods, and which Orbax takes. What differs is how files come to be: an object in a bucket appears
whole when its writer closes it, cannot be added to, and needs no folder made before it.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from vlae_jax.errors import UserError

_BUCKET = "gs://"
_PERMISSIONS = {
    "storage.buckets.get",  # Orbax asks what kind of bucket it is
    *(f"storage.objects.{action}" for action in ("create", "delete", "get", "list")),
}
_SECONDS = 10
"""How long one answer of the storage service may take at the first question."""


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
    _reach(bucket)
    from etils import epath

    return epath.Path(text)


def in_bucket(path: Path) -> bool:
    """Whether a folder or file is in a bucket."""
    return str(path).startswith(_BUCKET)


def is_bucket(path: Path) -> bool:
    """Whether it is a bucket itself, and no folder in it."""
    return in_bucket(path) and "/" not in str(path).removeprefix(_BUCKET).strip("/")


def resolved(path: Path) -> Path:
    """The same folder by the one name that all its names have in common."""
    return path if in_bucket(path) else path.resolve()


def absolute(path: Path) -> Path:
    """The same folder by a name that does not depend on the working directory."""
    return path if in_bucket(path) else path.absolute()


def errors_of(path: Path) -> type[Exception]:
    """What reading and writing there may raise; storage clients have many errors of their own."""
    return Exception if in_bucket(path) else OSError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what is said against writing `path` into one line for the user.

    Raises:
        UserError: In place of that.
    """
    try:
        yield
    except errors_of(path) as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise UserError(
            f"{path} cannot be written: {reason}; choose another folder, or make room there"
        ) from None


def one_line(error: Exception) -> str:
    """What an error says, or else its name, on one line of moderate length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _prepare() -> None:
    """Settings that the clients read when they are imported; the environment's own come first."""
    # TensorFlow, where it is installed, would be asked instead, and has lost its buckets.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Or gcsfs asks a second service, which knows of zonal buckets, and waits for it for a minute.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        import gcsfs  # noqa: F401
        from google.cloud import storage  # noqa: F401
    except ImportError:
        raise UserError(
            "folders in a bucket need more packages: pip install 'vlae-jax[gcs]'"
        ) from None
    # Other processes and TensorStore write there too: a listing that is kept would be wrong.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    # What they log comes before the exception, which is told in one line.
    for name in ("gcsfs", "google"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@functools.cache
def _reach(bucket: str) -> None:
    """Ask the bucket what may be done with it, once, and take no for an answer in seconds.

    What is used afterwards tries again for minutes, as it should in the middle of a run.
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
