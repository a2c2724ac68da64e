"""The start of the program `vlae_jax`: from its first line on a signal ends it in order.

A module beside the package, not in it: to import any of the package imports JAX, which takes
seconds, in which Ctrl-C would already end in a traceback.
"""

import os
import signal
import sys
import threading
from types import FrameType


def main() -> None:
    """Run the command line; SIGINT and SIGTERM end it with exit code 128 + signal.

    Training handles them in its own way, and saves first.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    sys.unraisablehook = _of_main_thread
    from vlae_jax.commands.main import main as run

    run()


def _leave(number: int, _: FrameType | None) -> None:
    """End now, with nothing half done left behind.

    To raise KeyboardInterrupt would not do: compiled modules crash when it hits their import, and a
    finalizer that it hits drops it.
    """
    try:
        if files := sys.modules.get("vlae_jax.files"):
            files.undo_unfinished()
        os.write(2, f"vlae_jax: stopped by {signal.Signals(number).name}\n".encode())
    finally:
        os._exit(128 + number)


def _of_main_thread(unraisable: "sys.UnraisableHookArgs") -> None:
    """Print what could not be raised, of the main thread alone.

    Where a full disk cuts a checkpoint off, the storage layer's threads print a traceback for each
    of their tasks; the error itself reaches the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    main()
