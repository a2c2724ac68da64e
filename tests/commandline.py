"""The command line in tests: running it, and the one line with which it refuses."""

from vlae_jax.commands import main as program


def run(*arguments):
    """Run a command in this process."""
    program.main([str(argument) for argument in arguments])


def refused(capsys, *arguments, alone=False):
    """The one line that a wrong call gets, its exit code checked; `alone`: nothing beside it."""
    code = None
    try:
        run(*arguments)
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("vlae_jax: error: ")]
    assert len(lines) == 1, err
    assert not alone or lines == err.splitlines(), err
    return lines[0]
