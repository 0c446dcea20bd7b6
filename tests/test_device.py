"""Where torch computes: a device that works, and a remedy where memory does not suffice."""

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
