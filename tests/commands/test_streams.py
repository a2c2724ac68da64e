"""Standard streams that are closed, narrow or left by their reader end no command."""

import os
import subprocess
import sys

import pytest

PRINTS = """
import sys
from vlae_jax.commands import main
class Printing:
    def run(self):
        for i in range(20_000):
            print("−0.5 ± 0.1 nats")
        sys.stdout.flush()
        open(sys.argv[1], "w").write("all work is done")
main.parse = lambda argv: Printing()
main.main()
"""


@pytest.mark.parametrize(
    "shell",
    [
        '"$PYTHON" -c "$CODE" "$FILE" >&-',
        '"$PYTHON" -c "$CODE" "$FILE" >&- 2>&- <&-',
        'set -o pipefail; "$PYTHON" -c "$CODE" "$FILE" | head -1',
        'PYTHONIOENCODING=ascii "$PYTHON" -c "$CODE" "$FILE" > /dev/null',
    ],
    ids=["stdout closed", "all closed", "left by its reader", "without ±"],
)
def test_the_work_is_done_and_the_exit_code_says_so(tmp_path, shell):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "CODE": PRINTS,
        "FILE": str(tmp_path / "done"),
    }
    finished = subprocess.run(
        ["bash", "-c", shell], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "done").read_text() == "all work is done"
    assert finished.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_that_cannot_be_printed_is_told_when_the_work_is_done(tmp_path):
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            [sys.executable, "-c", PRINTS, tmp_path / "done"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert finished.returncode == 1
    assert (tmp_path / "done").read_text() == "all work is done"
    (line,) = finished.stderr.splitlines()
    assert line.startswith("vlae_jax: error: the work is done, but its output cannot be printed: ")
