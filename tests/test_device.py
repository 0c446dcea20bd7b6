"""Where torch computes: a device that works, and a remedy where memory does not suffice."""

import platform
import subprocess
import sys

import pytest
import torch

from cadiff_cli.device import enough_memory, usable_device
from cadiff_cli.errors import CadiffError, UsageError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that works")
def test_a_gpu_that_cannot_compute_is_not_chosen(monkeypatch, caplog):
    """Visible, but without kernels for it: this torch's own refusal serves as one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device, why = usable_device("auto")
    assert device.type == "cpu"
    assert "cannot be used" in why
    assert "cannot be used" in caplog.text
    with pytest.raises(UsageError, match="cannot be used"):
        usable_device("cuda")
    assert usable_device("cpu") == (torch.device("cpu"), "")


def test_lack_of_memory_has_a_remedy_and_other_errors_pass():
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")):
        with pytest.raises(CadiffError, match="--device cpu"), enough_memory():
            raise error
    with pytest.raises(RuntimeError, match="mat1"), enough_memory():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


COME_AND_GO = """
import resource
from pathlib import Path

import torch

from cadiff_cli.machine import memory_kept


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def come_and_go():
    [torch.ones(2**24) for _ in range(4)]  # 64 MB each
    return resident_bytes()


before = resident_bytes()
with memory_kept():
    assert come_and_go() > before + 2**26
    with memory_kept():  # as a validation within a training
        assert come_and_go() > before + 2**26
    assert come_and_go() > before + 2**26
assert resident_bytes() < before + 2**27
torch.ones(3 * 2**27)  # 1.5 GB fit into no hole that the block has left
assert resident_bytes() < before + 2**27
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_stays_until_it_is_given_back():
    """The kernel would clear it again; afterwards the process is as small as before.

    In a process of its own, whose memory has no other history.
    """
    done = subprocess.run([sys.executable, "-c", COME_AND_GO], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
