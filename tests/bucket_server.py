"""A bucket on loopback: an emulator of Google Cloud Storage's JSON API, with generations added."""

import contextlib
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from http.server import HTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class Bucket(Storage):
    """The objects of one bucket, in memory."""

    def __init__(self) -> None:
        super().__init__(use_memory_fs=True)
        create_bucket(BUCKET, self)
        self.before_write: Callable[[str], None] = lambda name: None
        """Called with the name of each object before it is written; may refuse by an exception."""

    def names(self, prefix: str = "") -> list[str]:
        """The objects whose names begin so."""
        return sorted(name for name in self.objects.get(BUCKET, {}) if name.startswith(prefix))

    def create_file(self, bucket: str, name: str, *arguments: Any, **options: Any) -> None:
        """Write an object."""
        self.before_write(name)
        super().create_file(bucket, name, *arguments, **options)


class Handler(RequestHandler):
    """The emulator's, which knows no generations; TensorStore needs them to read and to write.

    Requests come one after the other, so that a condition still holds when it is acted on.
    """

    def generation(self) -> str:
        """Of the object that the request names; 0 where there is none."""
        url = urlsplit(self.path)
        found = re.search(r"/b/[^/]+/o/(.+)$", url.path)
        name = unquote(found[1]) if found else parse_qs(url.query).get("name", [""])[0]
        return str(self.storage.objects.get(BUCKET, {}).get(name, {}).get("generation", "0"))

    def handle_if(self, handle: Callable[[], None]) -> None:
        """Answer, if the request's conditions on the generation hold."""
        query = parse_qs(urlsplit(self.path).query)
        must, must_not = (query.get(f"ifGeneration{kind}Match") for kind in ("", "Not"))
        now = self.generation()
        if (must is None or must == [now]) and must_not != [now]:
            handle()
            return
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(412 if must_not is None else 304)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers(self) -> None:
        """Say the generation of what was read."""
        if self.command == "GET":
            self.send_header("X-Goog-Generation", self.generation())
        super().end_headers()

    def do_GET(self) -> None:
        """Read."""
        self.handle_if(super().do_GET)

    def do_POST(self) -> None:
        """Write."""
        self.handle_if(super().do_POST)

    def do_DELETE(self) -> None:
        """Delete."""
        self.handle_if(super().do_DELETE)


class Server(HTTPServer):
    """One request at a time."""

    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave it to the client that went away."""


@contextlib.contextmanager
def served() -> Iterator[tuple[Bucket, str]]:
    """An empty bucket, and the URL of its service."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL + 1)
    for name in ("api.object", "api.bucket"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    bucket = Bucket()
    with Server(("127.0.0.1", 0), functools.partial(Handler, bucket)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield bucket, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
