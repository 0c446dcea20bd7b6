"""Child processes: they answer, they end, and their errors are ours."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cadiff_cli.errors import CadiffError, DataError
from cadiff_cli.processes import children


def double(x):
    return 2 * x


def refuse(x):
    raise DataError(f"{x} is bad", "use another")


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def not_there():
    raise ImportError("no such library")


def nothing():
    """A beginning that takes no time."""


def test_answers_come_in_order():
    with children(2, begin=nothing) as each:
        assert list(each(double, range(5))) == [0, 2, 4, 6, 8]


def test_errors_keep_their_remedy():
    with pytest.raises(DataError, match="3 is bad") as caught, children(2) as each:
        list(each(refuse, [3]))
    assert caught.value.remedy == "use another"


def test_a_beginning_that_fails_is_named():
    with pytest.raises(ImportError, match="no such library"), children(1, begin=not_there) as each:
        list(each(double, [1]))


def test_a_child_that_is_killed_is_an_error():
    with pytest.raises(CadiffError, match="child process was killed"), children(1) as each:
        list(each(die, [1]))


PARENT = """
import multiprocessing
import signal
import time
from test_processes import nothing
from cadiff_cli.processes import children
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with children(2, begin=nothing) as each:
        list(each(abs, [1, 2]))
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc to look into")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_children_end_with_their_parent(number, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    folders = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": folders},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with parent:
        pids = parent.stdout.readline().split()
        assert pids
        assert all(map(is_running, pids))
        parent.send_signal(number)
    ends = time.monotonic() + 120
    while any(map(is_running, pids)) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not any(map(is_running, pids))
