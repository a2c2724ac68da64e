"""Processes of one run: joining, agreeing on values, failing and ending together."""

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlae_jax.errors import UserError, one_line
from vlae_jax.parallel.options import DistributedConfig, keep_threads_awake
from vlae_jax.parallel.placement import Placement

Result = TypeVar("Result")
LOST_PEER = os.EX_TEMPFAIL
"""Exit code after another process died: 75, which means that trying again may succeed."""
_SPEAKS_OF_PEERS = re.compile("gloo|peer|connection|coordination|heartbeat|unavailable", re.I)
_HEARTBEAT_SECONDS = 30
_SAME_PLATFORM = {("cuda", "gpu"), ("rocm", "gpu")}
_MESSAGE_BYTES = 600


def start(options: DistributedConfig) -> Placement:
    """Join the other processes, if there are any, and lay out all devices.

    Call it before any use of JAX. Without a coordinator, JAX detects the cluster: TPU VMs, GKE,
    Slurm and Open MPI. Elsewhere this process is alone.

    Raises:
        UserError: If the others cannot be joined in `options.timeout` seconds, disagree about
            their number, or a device is missing.
    """
    if options.devices is not None:
        keep_threads_awake(options.devices)
        with contextlib.suppress(RuntimeError):  # JAX has started: its devices are checked below
            jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes != 1:
        _join(options)
    require_platform()
    expected = options.processes

    def check() -> None:
        if expected is not None and jax.process_count() != expected:
            raise UserError(
                f"--distributed.processes is {expected}, but process 0 was started for "
                f"{jax.process_count()}; give every process the same number"
            )

    together(check)
    devices = together(lambda: _devices(options))
    return Placement.of(devices, shard_parameters=options.shard_parameters)


def _devices(options: DistributedConfig) -> list[Any]:
    if options.devices is None:
        return jax.devices()
    here = jax.local_device_count()
    if here < options.devices:
        raise UserError(
            f"--distributed.devices is {options.devices}, but this process has only {here} "
            f"{jax.default_backend()} devices"
        )
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for devices in by_process.values() for device in devices[: options.devices]]


def require_platform() -> None:
    """Check that JAX runs on what JAX_PLATFORMS names first: it may pass over a missing one.

    Raises:
        UserError: If it does not.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "").partition(",")[0].strip().lower()
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter where no plugin is installed
        reason = f" ({one_line(error)})" if str(error) else ""
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}{reason}: "
            "install the extra of vlae-jax for it, or choose another platform"
        ) from None
    if wanted not in ("", found) and (wanted, found) not in _SAME_PLATFORM:
        raise UserError(
            f"JAX_PLATFORMS names {wanted} first, but JAX finds only {found} devices: install the "
            f"extra {wanted} of vlae-jax, or choose the platform {found}"
        )


def _join(options: DistributedConfig) -> None:
    given = {
        "--distributed.coordinator": options.coordinator,
        "--distributed.processes": options.processes,
        "--distributed.process-id": options.process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        _join_cluster(options.timeout)
        return
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given too, or none of {', '.join(given)}")
    assert options.coordinator and options.processes is not None and options.process_id is not None
    if options.process_id == 0:
        _require_free(options.coordinator)
    who = f"process {options.process_id} of {options.processes}"
    if options.process_id == 0:
        lacking = f"{who}: not all of the others have come to {options.coordinator}"
    else:
        lacking = f"{who}: no process 0 at {options.coordinator}, or not all of the others came"
    with _deadline(options.timeout, lacking):
        _initialize(
            options.timeout,
            coordinator_address=options.coordinator,
            num_processes=options.processes,
            process_id=options.process_id,
        )


def _join_cluster(timeout: int) -> None:
    try:
        # A cluster needs no address that could be mistyped, so trying again may succeed.
        with _deadline(timeout, "not all processes of this cluster have started", LOST_PEER):
            _initialize(timeout)
    except (ValueError, RuntimeError) as error:
        if "coordinator_address should be defined" in str(error):
            return  # no cluster that JAX knows
        if "before any JAX calls" in str(error):
            return  # the calling program uses JAX already, as one process
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes of this cluster cannot be joined: {reason}; --distributed.processes 1 "
            "trains on this one alone"
        ) from None


def _initialize(timeout: int, **where: Any) -> None:
    # At its own limit JAX ends the process in C++ without an exception: `_deadline` comes first.
    jax.distributed.initialize(
        initialization_timeout=timeout + 60,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        **where,
    )


@contextlib.contextmanager
def _deadline(seconds: int, lacking: str, code: int = 2) -> Iterator[None]:
    """Exit with a message if the body takes too long or JAX aborts in it; raises nothing itself."""
    advice = "start all of them, with the same address and number"
    late = f"{lacking} within {seconds} s (--distributed.timeout); {advice}"
    timer = threading.Timer(seconds, leave, (late, code))
    timer.daemon = True
    timer.start()
    wrong = f"{lacking}, or they were told another number of processes; {advice}"
    try:
        with _instead_of_abort(wrong, code):
            yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _instead_of_abort(message: str, code: int) -> Iterator[None]:
    """Exit with a message where JAX's C++ part aborts the process, in whichever thread.

    A Python signal handler would run too late: abort() does not return.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_: int) -> None:
        leave(message, code)

    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGABRT, before)


def _require_free(address: str) -> None:
    """Refuse a port that is taken: JAX's C++ part would end the process without a message."""
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} of --distributed.coordinator {address} cannot be opened: "
                f"{error.strerror}; choose another"
            ) from None


def is_first() -> bool:
    """Whether this process is the first one, which alone writes."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether there is no other process."""
    return jax.process_count() == 1


def together(action: Callable[[], Result]) -> Result:
    """Run an action on every process; if it fails on one, fail on all with its message.

    Raises:
        UserError: If `action` raised one on any process.
    """
    if is_alone():
        return action()
    result, message = None, ""
    try:
        result = action()
    except UserError as error:
        message = " ".join(str(error).split()) or "failed"
    text = message.encode()[:_MESSAGE_BYTES]
    padded = np.zeros(_MESSAGE_BYTES, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    for index, row in enumerate(np.asarray(multihost_utils.process_allgather(padded))):
        if said := bytes(row).rstrip(b"\0").decode(errors="replace"):
            raise UserError(said if index == jax.process_index() else f"process {index}: {said}")
    return result  # type: ignore[return-value]


def on_first(action: Callable[[], object]) -> None:
    """Run an action on the first process alone; the others wait for it.

    Raises:
        UserError: On all processes, if `action` raised one.
    """
    together(lambda: action() if is_first() else None)


@contextlib.contextmanager
def held_by_first(context: AbstractContextManager[object]) -> Iterator[None]:
    """Enter a context on the first process alone, and leave it there in the end.

    Raises:
        UserError: On all processes, if entering raised one.
    """
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(context))
        yield


def from_first(value: float) -> float:
    """The value of the first process, on all: for values that may differ, such as times."""
    if is_alone():
        return value
    bits = np.array([value]).view(np.uint32)  # JAX has 32 bits
    return float(np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64)[0])


def require_equal(what: str, value: str) -> None:
    """Check that all processes have the same value.

    Args:
        what: Name of the value, for the message.
        value: The value of this process.

    Raises:
        UserError: On all processes, if the values differ.
    """
    if is_alone():
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(digest))
    differing = [index for index, row in enumerate(rows) if not np.array_equal(row, rows[0])]
    if differing:
        raise UserError(
            f"{what} of process {differing[0]} is not that of process 0; start all with the same "
            "options, on the same files"
        )


@contextlib.contextmanager
def running(options: DistributedConfig) -> Iterator[Placement]:
    """Join the processes as `start` does, and end them together on leaving the context.

    JAX takes a process that ends before the others for dead. When another process has died, this
    one exits at once with `LOST_PEER`.
    """
    lost = "another process ended or was killed; start all again with --resume"
    try:
        placement = start(options)
        if is_alone():
            yield placement
            return
        lost = f"process {jax.process_index()} has lost another one: {lost}"
        with _instead_of_abort(lost, LOST_PEER):
            yield placement
            together(lambda: None)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Errors of the network library arrive as either type.
        if is_alone() or not _SPEAKS_OF_PEERS.search(str(error)):
            raise
        leave(f"{lost} ({' '.join(str(error).split())[:200]})", LOST_PEER)
    finally:
        if jax.distributed.is_initialized():
            with contextlib.suppress(Exception):  # there may be no others left
                jax.distributed.shutdown()


def leave(message: str, code: int) -> NoReturn:
    """End this process now, without waiting for others at the exit."""
    with contextlib.suppress(Exception):
        print(f"vlae_jax: error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)


def stop_signal(step: int, received: list[int]) -> int | None:
    """The signal to stop for after this step, if any; all processes get it at the same step.

    Args:
        step: Steps done; every process must call this after each.
        received: Signals that this process has received; used where it is alone.
    """
    if is_alone():
        return received[0] if received else None
    return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None


def interrupt_all(_: int, __: Any) -> None:
    """Handle Ctrl-C by sending SIGTERM to this process: JAX passes that on to all others."""
    os.kill(os.getpid(), signal.SIGTERM)
