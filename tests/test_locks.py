"""Locks on file systems that know none."""

import errno
import fcntl
import os

import pytest

from cadiff_cli.io.locks import locked


def answering(error):
    def flock(*_args):
        raise OSError(error, os.strerror(error))

    return flock


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EINVAL", "ENOTSUP", "EOPNOTSUPP"])
def test_everybody_gets_a_lock_where_there_are_none(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fcntl, "flock", answering(getattr(errno, name)))
    with locked(tmp_path / "x.lock", wait=False) as mine:
        assert mine


def test_another_failure_is_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", answering(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path / "x", wait=True):
        pass
