"""Writing without losing anything, and locks between processes."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from cadiff_cli.errors import CadiffError, DiskError, MissingInputError, OutputError
from cadiff_cli.evaluation.pairing import label_maps
from cadiff_cli.io.bids.index import anatomical_files
from cadiff_cli.io.bids.labelled import labelled_scans
from cadiff_cli.io.bids.layout import candidates
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.files import (
    check_writable,
    files_below,
    locked,
    read_json,
    refuse_existing,
    replacing,
    write_json,
    write_text,
)
from cadiff_cli.text import read_text
from cadiff_cli.training.atlas.data import scans_of
from cadiff_cli.training.brain_mask.data import prepare_heads


def test_a_link_to_an_absent_file_is_no_free_place(tmp_path):
    """So git-annex leaves a file whose content was dropped."""
    link = tmp_path / "table.csv"
    refuse_existing(link, overwrite=False)
    link.symlink_to(".git/annex/gone")
    with pytest.raises(OutputError, match=r"table\.csv is a link to a file that is absent"):
        refuse_existing(link, overwrite=False)
    refuse_existing(link, overwrite=True)


def test_replacing_puts_the_new_file_in_place(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    with replacing(path) as temporary:
        temporary.write_text("done")
        assert not path.exists()
    assert path.read_text() == "done"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_replacing_keeps_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def refusing(error):
    def refuse(*_args, **_options):
        raise OSError(error, os.strerror(error))

    return refuse


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_mount_without_modes_loses_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setattr(os, "chmod", refusing(error))
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errno.ENOSPC, DiskError),
        (errno.EDQUOT, DiskError),
        (errno.EIO, DiskError),
        (errno.EACCES, OutputError),
    ],
)
def test_a_disk_that_fails_is_told_from_a_folder_that_refuses(tmp_path, monkeypatch, error, kind):
    monkeypatch.setattr(os, "replace", refusing(error))
    monkeypatch.setattr(os, "unlink", refusing(errno.EROFS))  # must not hide the error before it
    with pytest.raises(CadiffError) as caught:
        write_json(tmp_path / "a.json", {})
    assert type(caught.value) is kind
    assert os.strerror(error) in caught.value.message


def test_a_platform_without_quotas_has_no_number_for_them():
    code = "import errno; del errno.EDQUOT; import cadiff_cli.runner.journal"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    """Nor a device: ``-o /dev/null --overwrite`` would take it from the whole system."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OutputError, match=r"is a (pipe|folder|device)"), replacing(path):
            pass
    assert (tmp_path / "pipe").is_fifo()


def test_replacing_below_a_file_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught, replacing(tmp_path / "file" / "x.txt"):
        pass
    assert caught.value.exit_code == 73
    assert caught.value.remedy


def test_looking_whether_a_folder_can_be_written_changes_nothing_in_it(tmp_path):
    mine = tmp_path / ".writable"
    mine.write_text("mine")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]
    assert mine.read_text() == "mine"
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(OutputError, match="cannot write to"):
        check_writable(mine / "c")


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    free = namedtuple("usage", "free")(1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(DiskError, match="1 MB of space left"):
        check_writable(tmp_path)


def test_names_that_are_no_text_can_be_written(tmp_path):
    """Files of old archives: their bytes come back from JSON."""
    name = os.fsdecode(b"M\xfcller_T1.nii.gz")
    write_json(tmp_path / "a.json", {"Sources": [name, "Müller"]})
    assert read_json(tmp_path / "a.json") == {"Sources": [name, "Müller"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_from_windows_editors_is_read(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text('{"Name": "Müller"}', encoding=encoding)
    assert read_text(path) == '{"Name": "Müller"}'
    assert read_json(path) == {"Name": "Müller"}


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EINVAL", "ENOTSUP", "EOPNOTSUPP"])
def test_everybody_gets_a_lock_where_there_are_none(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fcntl, "flock", refusing(getattr(errno, name)))
    with locked(tmp_path / "x.lock", wait=False) as mine:
        assert mine


def test_a_lock_that_became_a_link_is_a_file_again(tmp_path):
    """git-annex turns empty files into links to one object, which a clone may lack."""
    for k in range(2):
        (tmp_path / f"{k}.lock").symlink_to(tmp_path / "annex" / "empty")
    with locked(tmp_path / "0.lock", wait=False) as first:
        with locked(tmp_path / "1.lock", wait=False) as second:
            assert (first, second) == (True, True)
        with locked(tmp_path / "0.lock", wait=False) as again:
            assert not again
    assert not (tmp_path / "0.lock").is_symlink()


def test_another_failure_is_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path / "x", wait=True):
        pass


@pytest.fixture
def dataset(tmp_path):
    """A person with two sessions, each with a T1w, a dseg and a finished result's sidecar."""
    for session in ("a", "b"):
        name = f"sub-1/ses-{session}/anat/sub-1_ses-{session}"
        for ending in ("T1w.nii.gz", "dseg.nii.gz", "seg-cadiff_desc-structures_dseg.json"):
            write_text(tmp_path / f"{name}_{ending}", "{}")
    return tmp_path


READERS = {
    "scans of a dataset": lambda folder: anatomical_files(folder / "sub-1"),
    "sessions": lambda folder: Dataset(folder).sessions(),
    "finished results": lambda folder: list(candidates(folder)),
    "labelled scans": labelled_scans,
    "label maps": label_maps,
    "people of an atlas": scans_of,
    "heads": lambda folder: prepare_heads([], [folder], folder / "cache"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("closed", ["sub-1", "ses-b", "anat"])
def test_a_folder_that_cannot_be_read_is_not_empty(dataset, reader, closed, monkeypatch):
    """Its scans and results must not count as absent: the error names the folder."""
    scan = os.scandir

    def scandir(folder):
        parts = Path(folder).parts
        if closed in parts and (closed != "anat" or "ses-b" in parts):
            raise OSError(errno.ESTALE, "Stale file handle")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    if reader == "sessions" and closed != "sub-1":  # their names are all that is read
        assert READERS[reader](dataset) == ["a", "b"]
        return
    with pytest.raises(MissingInputError, match=rf"cannot read the folder \S*{closed}\S* \(Stale"):
        READERS[reader](dataset)


def test_files_below_follow_links_only_where_bids_has_some(tmp_path):
    root = tmp_path / "root"
    write_text(tmp_path / "elsewhere" / "anat" / "x.nii", "")
    write_text(root / "sub-1" / "anat" / "y.nii.gz", "")
    write_text(root / "sub-1" / ".hidden.nii", "")
    write_text(root / "top.nii", "")
    for link in ("sub-2", "sub-1/ses-a", "sub-1/other"):
        (root / link).symlink_to(tmp_path / "elsewhere")
    (root / "sub-1" / "ses-b").symlink_to("ses-b")  # a circle
    inside = ["sub-1/anat/y.nii.gz", "sub-1/ses-a/anat/x.nii", "sub-2/anat/x.nii"]
    found = [str(path.relative_to(root)) for path in files_below(root, "*.nii*", within="sub-")]
    assert found == inside
    found = [str(path.relative_to(root)) for path in files_below(root, "*.nii*")]
    assert found == [*inside, "top.nii"]
    assert files_below(root / "nowhere", "*") == []
