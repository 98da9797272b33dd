"""Runs code in processes where nothing of this package has been imported. They are forked by a
process that has imported torch and has done nothing else, since that import takes longer than most
of them."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from oracle import PACKAGE_PARENT

PARENT = """
import json, os, signal, sys, traceback, warnings
import torch

def run(code, path, env, filters, out, err):
    signal.alarm(300)  # what hangs is not to outlive the tests
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(path)
    sys.path[:0] = ["", path]
    for action, category in filters:
        warnings.simplefilter(action, getattr(__builtins__, category))
    status = 1
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(**json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _parent() -> subprocess.Popen[str]:
    # The environment must not name the package's folder or a plugin of pytest.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ADDITIVE_ATTN_CPU")}
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=os.sep, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(process.kill)
    return process


def python(
    code: str,
    path: str | Path = PACKAGE_PARENT,
    env: Mapping[str, str] | None = None,
    filters: Sequence[tuple[str, str]] = (),
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -c code`` in the folder ``path``, with these filters of warnings."""
    env = dict(os.environ if env is None else env)
    if sys.platform != "linux":
        flags = [x for action, category in filters for x in ("-W", f"{action}::{category}")]
        env["PYTHONPATH"] = str(path)
        return subprocess.run(
            [sys.executable, *flags, "-c", code], capture_output=True, text=True, env=env,
            check=False, cwd=path,
        )  # fmt: skip
    parent = _parent()
    assert parent.stdin is not None and parent.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        names = {name: f"{folder}/{name}" for name in ("out", "err")}
        job = {"code": code, "path": str(path), "env": env, "filters": list(filters)}
        parent.stdin.write(json.dumps(job | names) + "\n")
        parent.stdin.flush()
        status = int(parent.stdout.readline())
        out, err = (Path(name).read_text() for name in names.values())
    return subprocess.CompletedProcess(["python", "-c", code], status, out, err)
