"""Read a scan from a folder of DICOM files.  The only module that runs dcm2niix.

Names, birth dates and times of the files never leave this module: the scan is written with a new
header, and messages name a series by number and description.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.errors import CadiffError, DataError, MissingInputError, OutputError, UsageError
from cadiff_cli.io.images import load_volume, save_volume
from cadiff_cli.machine import work_folder
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import same_grid

LEAST_MM = 100.0
"""Shortest edge of a field of view that a whole head fills."""
LONGEST_ECHO_S = 0.015
"""Longest echo time of a T1-weighted image that is taken unasked, in seconds."""
IS_T1 = re.compile(r"(?<![a-z0-9])t1|mp-?rage|spgr|bravo|(?<![a-z])tfe|mp2rage.*uni", re.I)
IS_OTHER = re.compile(
    r"t2(?!\d)|flair|(?<![a-z])pd(?![a-z])|swi|swan|dwi|diff|dti|adc|bold|fmri|loca|scout|survey"
    r"|tof|angio|mra|field|perf|asl|t1[ _-]?map|_inv[12]|phase",
    re.I,
)

EVENED = "_Eq_"
"""Part of the name of an image that dcm2niix resampled to even distances."""


@dataclass(frozen=True)
class Series:
    """An image that dcm2niix made of a series.

    ``about`` is its sidecar.  A series may give several images.  One that is not ``even`` lacks
    slices: the image is shorter than the head.
    """

    image: Path
    about: Mapping[str, Any]
    even: bool = True

    @property
    def number(self) -> int:
        """The scanner's number."""
        return int(self.about.get("SeriesNumber", 0))

    @property
    def title(self) -> str:
        """Number and description."""
        return f"{self.number} {self._description!r}"

    @property
    def _description(self) -> str:
        return str(self.about.get("SeriesDescription") or self.about.get("ProtocolName") or "")

    @property
    def is_t1(self) -> bool:
        """Whether it looks like a T1-weighted head, by name, echo time and field of view."""
        name, echo_s = self._description, self.about.get("EchoTime")
        if not IS_T1.search(name) or IS_OTHER.search(name):
            return False
        if isinstance(echo_s, int | float) and echo_s > LONGEST_ECHO_S:
            return False
        try:
            grid = load_volume(self.image).grid
        except CadiffError:  # four dimensions, colours
            return False
        return bool((np.array(grid.shape) * grid.spacing_mm).min() >= LEAST_MM)

    @property
    def is_derived(self) -> bool:
        """Whether the scanner computed it from others."""
        return "DERIVED" in self.about.get("ImageType", ())


def convert(
    folder: Path,
    wanted: int | None,
    path: Path,
    *,
    overwrite: bool,
    check: Callable[[Path], object] = lambda _image: None,
) -> str:
    """Write the T1-weighted scan of a folder of DICOM files, or the series ``wanted``, to ``path``.

    ``check`` is given the image first, and may raise: then ``path`` stays as it is.

    Returns the title of the series and the number of others.  Raises ``MissingInputError`` without
    dcm2niix, ``DataError`` for a folder without images, ``UsageError`` where no series or several
    can be meant, ``OutputError`` if another scan is there.
    """
    with work_folder("cadiff-dicom-") as work:
        every = sorted(_converted(folder, Path(work)), key=lambda one: (one.number, one.image.name))
        if not every:
            raise DataError(
                f"{folder} holds no DICOM images that dcm2niix can read",
                "copy the examination again: a file may be damaged"
                if any(map(_is_dicom, folder.rglob("*")))
                else "give the folder of one examination, or a NIfTI file",
            )
        series = _chosen(every, wanted)
        scan = load_volume(series.image)
        if os.path.lexists(path) and not overwrite and not _is_same(path, scan):
            raise OutputError(
                f"{path} is another scan, or damaged",
                "use another --subject or another output folder, or --overwrite",
            )
        check(series.image.rename(series.image.with_name(path.name.removesuffix(".gz"))))
        save_volume(path, scan.data, scan.grid)  # with a new header: no times, no names
    others = len({one.number for one in every} - {series.number})
    return f"series {series.title}" + (f" of {others + 1}" if others else "")


def _converted(folder: Path, work: Path) -> Iterator[Series]:
    """Every image that dcm2niix makes; its messages, which may hold names, are swallowed.

    Of slices at uneven distances it makes a second image, resampled to even ones (``_Eq_``), or
    gives up before it has written the sidecar.
    """
    arguments = ["-b", "y", "-ba", "y", "-z", "n", "-d", "9", "-f", "s%s"]
    command = [_program(), *arguments, "-o", str(work), str(folder)]
    subprocess.run(command, capture_output=True, check=False)
    images = sorted(work.glob("*.nii"))
    uneven = {image.name.split(EVENED)[0] for image in images if EVENED in image.name}
    for image in (image for image in images if EVENED not in image.name):
        sidecar = image.with_suffix(".json")
        told = sidecar.is_file()
        about = json.loads(sidecar.read_text(encoding="utf-8")) if told else {}
        yield Series(image, about, even=told and image.stem not in uneven)


def _program() -> str:
    """The path of dcm2niix: of its wheel, beside this Python, or anywhere."""
    spec = find_spec("dcm2niix")
    beside = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for folder in (*beside, Path(sys.executable).parent):
        if (program := folder / "dcm2niix").is_file():
            return str(program)
    if found := shutil.which("dcm2niix"):
        return found
    raise MissingInputError(
        "DICOM files are converted by dcm2niix, which is not installed",
        "pip install dcm2niix (cadiff[dicom] includes it), or convert them yourself and give the"
        " NIfTI file",
    )


def _chosen(every: Sequence[Series], wanted: int | None) -> Series:
    """The series with the number ``wanted``, or the only T1-weighted one."""
    if wanted is not None:
        found = [one for one in every if one.number == wanted]
    else:
        found = [one for one in every if one.is_t1]
        found = [one for one in found if not one.is_derived] or found
    spoilt = [one for one in found or every if not one.even and (found or not one.about)]
    if len(found) == 1 and not spoilt:
        return found[0]
    # A series that dcm2niix gave up on has no sidecar, so no number.
    titles = ", ".join(dict.fromkeys(one.title for one in every if one.about)) or "none"
    if spoilt and len(found) < 2:
        raise DataError(
            f"slices of {spoilt[0].image.stem} are missing, or unevenly spaced",
            "copy the examination again, and compare the number of files with the scanner's; or"
            f" name another with --series: {titles}",
        )
    if wanted is not None and found:
        raise UsageError(
            f"series {wanted} gives {len(found)} images", "run dcm2niix, and give one NIfTI file"
        )
    if wanted is not None:
        raise UsageError(f"there is no series {wanted}", f"there are {titles}")
    what = "several series look" if found else "no series looks"
    raise UsageError(f"{what} like a T1-weighted head", f"name one with --series: {titles}")


def _is_same(path: Path, scan: Volume) -> bool:
    try:
        kept = load_volume(path)
    except CadiffError:
        return False
    return same_grid(kept.grid, scan.grid) and np.array_equal(kept.data, scan.data)


def _is_dicom(path: Path) -> bool:
    """Whether a file has the mark that DICOM wants after its first 128 bytes."""
    try:
        with path.open("rb") as stream:
            stream.seek(128)
            return stream.read(4) == b"DICM"
    except OSError:
        return False
