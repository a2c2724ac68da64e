"""Compiled programs with what they cost, and timings taken in turns."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import hlo

GEMM = (6400, 500, 500)
"""Rows, inner size and columns of the product that machines and libraries are rated by."""


class Program(NamedTuple):
    """A compiled JAX function, and its price before it runs."""

    run: Callable[..., Any]
    compile_seconds: float
    """Tracing included."""
    flops: float
    """FLOPs of all matrix products, each counted as often as its loops run."""
    temp_bytes: int
    """Bytes that the program allocates beside arguments and results."""


class Timing(NamedTuple):
    """Seconds of single calls after a warm-up."""

    best: float
    median: float
    calls: int


def compile_program(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compile `function` for these arguments."""
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    temp_bytes = 0 if memory is None else memory.temp_size_in_bytes
    return Program(compiled, seconds, matmul_flops(compiled.as_text() or ""), temp_bytes)


def time_in_turns(
    calls: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds_each: float,
    seconds_total: float = 14.0,
) -> dict[str, Timing]:
    """Call each function once to warm up, then let them take turns.

    In turns, so that whatever else the machine does falls on all alike. A quick function is called
    repeatedly in its turn, for `seconds_each`; a slow one once.

    Args:
        calls: Functions that return when their work is done, or return JAX arrays.
        rounds: Turns each.
        seconds_each: Least seconds of calls in one turn.
        seconds_total: After so many seconds of its own a function gets no further turn.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(samples[name]) > seconds_total:
                continue
            time.sleep(0.05)  # the other library's idle threads stop spinning
            spent = 0.0
            while True:
                began = time.perf_counter()
                jax.block_until_ready(call())
                samples[name].append(time.perf_counter() - began)
                spent += samples[name][-1]
                if spent >= seconds_each:
                    break
    return {
        name: Timing(min(times), statistics.median(times), len(times))
        for name, times in samples.items()
    }


def gemm_rate() -> float:
    """This machine's float32 FLOPs a second in one well-shaped product."""
    rows, inner, columns = GEMM
    a, b = jnp.ones((rows, inner)), jnp.ones((inner, columns))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    timing = time_in_turns({"gemm": lambda: product(a, b)}, rounds=5, seconds_each=0.2)
    return 2 * rows * inner * columns / timing["gemm"].best


def matmul_flops(text: str) -> float:
    """FLOPs of the matrix products in a compiled program's text.

    XLA's own `cost_analysis` counts the body of a loop once, however often it runs. Here it counts
    as often as the compiler knows it to, and else once. A multiply-add is two FLOPs. Elementwise
    work and factorizations count nothing, nor do products handed to a library, as on GPUs.
    """
    return sum(hlo.matmul_flops(hlo.parse(text)).values())
