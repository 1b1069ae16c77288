"""Test programs in processes of their own, one or a group that torchrun starts."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(program, *words, processes=2, check=True, cwd=ROOT, **environment):
    """Run a module, or a script by its path, and return the completed process, with what it printed.

    A program that dies in native code is started once more, where its first run left files.

    Args:
        program: a module's name, or a path that ends in ``.py``.
        *words: its arguments.
        processes: of the group that torchrun starts; 0: one process without torchrun.
        check: whether it must succeed; False: it must fail; None: either.
        cwd: where it runs.
        **environment: variables set for it.
    """
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(program)] if str(program).endswith(".py") else ["-m", program]
    command += map(str, words)
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment}

    def run():
        return subprocess.run(command, cwd=cwd, env={**os.environ, **own}, capture_output=True, text=True, check=False)

    result = run()
    if _crashed(result):
        # seen once in some hundred runs, with gloo; this project has no native code
        trace = result.stderr[max(0, result.stderr.find("Fatal Python error")) :]
        warnings.warn(f"{program} crashed in native code and was started again:\n{trace}", stacklevel=2)
        result = run()
    assert not _crashed(result), result.stderr
    if check is not None:
        assert (result.returncode == 0) == check, result.stderr[-8000:]
    return result


def _crashed(result):
    return result.returncode == -signal.SIGSEGV or (result.returncode != 0 and "(SIGSEGV)" in result.stderr)


def several(runs):
    """The words of several runs of one program, with ``and`` between them."""
    return [word for i, words in enumerate(runs) for word in (["and"] * bool(i) + list(words))]
