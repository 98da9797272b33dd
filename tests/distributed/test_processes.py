"""Crashes of process groups: those of gloo's threads are told apart from others, and none passes
silently."""

from __future__ import annotations

import ctypes
import os
import time

import processes
import pytest


def _once(folder):
    """Whether this is the group's first attempt."""
    try:
        (folder / "begun").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _abort_elsewhere():
    """Aborts in a thread that Python has not started, like gloo's."""
    c = ctypes.CDLL(None)
    c.pthread_create(ctypes.byref(ctypes.c_void_p()), None, c.abort, None)
    time.sleep(60)


def check_before(mesh, folder):
    assert mesh.get_local_rank() or not (folder / "begun").exists(), "it has passed already"


def check_foreign_thread(mesh, folder):
    if mesh.get_local_rank() == 0 and _once(folder):
        _abort_elsewhere()


def check_after(mesh, folder):
    (folder / "after").touch()


def check_foreign_thread_always(mesh, folder):
    if mesh.get_local_rank() == 0:
        _abort_elsewhere()


def check_own_thread(mesh, folder):
    if mesh.get_local_rank() == 0 and _once(folder):
        os.abort()


def check_failure(mesh, folder):
    assert mesh.get_local_rank() or not _once(folder), "it fails at first"


def test_crash_of_torchs_own_thread_is_warned_of_and_tried_again(tmp_path):
    with pytest.warns(UserWarning, match="Threads of torch's own ended check_foreign_thread of"):
        names = ["check_before", "check_foreign_thread", "check_after"]
        processes.run(__name__, 2, tmp_path, names)
    assert (tmp_path / "after").exists()
    with (
        pytest.warns(UserWarning, match="torch"),
        pytest.raises(AssertionError, match="was not run"),
    ):
        processes.run(__name__, 1, tmp_path / "twice", ["check_foreign_thread_always"])


@pytest.mark.parametrize(
    "name, match", [("check_own_thread", "in check_own_thread"), ("check_failure", "at first")]
)
def test_faults_of_pythons_threads_fail(tmp_path, name, match):
    with pytest.raises(AssertionError, match=match):
        processes.run(__name__, 1, tmp_path, [name])
