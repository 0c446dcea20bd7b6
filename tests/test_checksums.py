"""Files that were hashed before are known again, and never wrongly."""

import os

import pytest

from cadiff_cli.io import checksums as module
from cadiff_cli.io.checksums import Checksums
from cadiff_cli.io.files import sha256

OLD = 1_600_000_000_000_000_000


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "sub-01_T1w.nii"
    path.write_text("image")
    os.utime(path, ns=(OLD, OLD))
    return path


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read; files of this moment are recorded, too."""
    names = []
    monkeypatch.setattr(module, "FRESH_NS", -(10**18))
    monkeypatch.setattr(module, "sha256", lambda path: names.append(path.name) or sha256(path))
    return names


def test_a_file_is_read_once(scan, hashed, tmp_path):
    record, checksum = tmp_path / "inputs.tsv", sha256(scan)
    for _ in range(3):
        assert Checksums(record).fits(scan, checksum)
    assert hashed == [scan.name]


def test_another_checksum_is_believed_only_after_reading(scan, hashed, tmp_path):
    record, checksum = tmp_path / "inputs.tsv", sha256(scan)
    assert Checksums(record).fits(scan, checksum)
    assert not Checksums(record).fits(scan, "0" * 64)
    assert len(hashed) == 2


@pytest.mark.parametrize("changed_ns", [OLD, OLD + 1])
def test_a_changed_file_is_read_again(scan, hashed, tmp_path, changed_ns):
    """Another size or another time is another file."""
    record, checksum = tmp_path / "inputs.tsv", sha256(scan)
    assert Checksums(record).fits(scan, checksum)
    scan.write_text("imagE" if changed_ns > OLD else "longer image")
    os.utime(scan, ns=(changed_ns, changed_ns))
    assert not Checksums(record).fits(scan, checksum)
    assert len(hashed) == 2


def test_a_file_with_the_times_of_another_is_read_again(scan, hashed, tmp_path):
    """Name, size and time of the content are those of before, as after ``cp -p``."""
    record, checksum = tmp_path / "inputs.tsv", sha256(scan)
    assert Checksums(record).fits(scan, checksum)
    scan.write_text("imagE")
    os.utime(scan, ns=(OLD, OLD))
    assert not Checksums(record).fits(scan, checksum)


def test_a_file_that_has_just_changed_is_not_recorded(scan, tmp_path):
    """It may change again without another time of change."""
    assert Checksums(tmp_path / "inputs.tsv").fits(scan, sha256(scan))
    assert not (tmp_path / "inputs.tsv").exists()


@pytest.mark.parametrize(
    "damage", ["", "\t\t\n", "half a li", "\x00\xff\n", "0" * 64 + "\tx\ty\tz\n"]
)
def test_damaged_lines_are_passed_over(scan, hashed, tmp_path, damage):
    record, checksum = tmp_path / "inputs.tsv", sha256(scan)
    assert Checksums(record).fits(scan, checksum)
    record.write_text(damage + "\n" + record.read_text() + damage)
    assert Checksums(record).fits(scan, checksum)
    assert len(hashed) == 1


def test_a_record_that_cannot_be_written_costs_only_time(scan, hashed, tmp_path):
    checksum = sha256(scan)
    for _ in range(2):
        assert Checksums(tmp_path / "nowhere" / "inputs.tsv").fits(scan, checksum)
    assert len(hashed) == 2


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(OSError, match="nothing"):
        Checksums(tmp_path / "inputs.tsv").fits(tmp_path / "nothing.nii", "0" * 64)
