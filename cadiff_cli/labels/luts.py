"""Colours and names of a parcellation as viewers read them.

FreeSurfer's format is read by FreeView, MNE, surfa and MRtrix too.  Sources: FreeSurfer's
``FreeSurferColorLUT.txt``, FSLeyes' "lookup tables", ITK-SNAP's "label descriptions", NiiVue's
``setColormapLabel``.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping

from cadiff_cli.labels.parcellation import Parcellation, Structure

ITK_SNAP = """################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
"""


def freesurfer(parcellation: Parcellation) -> str:
    """``FreeSurferColorLUT.txt``: code, name, red, green, blue 0 to 255, and 0 for opaque."""
    lines = ["#No. Label Name:                        R   G   B   A", _freesurfer(0, "Unknown")]
    lines += [_freesurfer(s.code, s.name, *rgb(s)) for s in parcellation.structures]
    return _text(lines)


def fsleyes(parcellation: Parcellation) -> str:
    """A ``.lut``: code, red, green, blue 0 to 1, name."""
    return _text(
        f"{s.code} {' '.join(f'{x / 255:.5f}' for x in rgb(s))} {s.name}"
        for s in parcellation.structures
    )


def itk_snap(parcellation: Parcellation) -> str:
    """Label descriptions: code, colour, opacity, whether it is shown, whether as a mesh, name."""
    lines = [_itk_snap(0, "Clear Label", visible=False)]
    lines += [_itk_snap(s.code, s.name, *rgb(s)) for s in parcellation.structures]
    return ITK_SNAP + _text(lines)


def niivue(parcellation: Parcellation) -> str:
    """A label colormap: lists of red, green and blue 0 to 255, of codes (``I``) and of names."""
    red, green, blue = zip((0, 0, 0), *map(rgb, parcellation.structures), strict=True)
    codes = [0, *(s.code for s in parcellation.structures)]
    names = ["", *(s.name for s in parcellation.structures)]
    return json.dumps({"R": red, "G": green, "B": blue, "I": codes, "labels": names}) + "\n"


FORMATS: Mapping[str, Callable[[Parcellation], str]] = {
    "FreeSurferColorLUT.txt": freesurfer,
    "fsleyes.lut": fsleyes,
    "itksnap.txt": itk_snap,
    "niivue.json": niivue,
}
"""End of a file's name -> what writes its text."""


def rgb(structure: Structure) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255; grey for a colour that is not written as ``#rrggbb``.

    >>> from cadiff_cli.labels.parcellation import load_parcellation
    >>> rgb(load_parcellation("cadiff40").structures[0])
    (245, 245, 245)
    """
    digits = re.fullmatch(r"#([0-9a-fA-F]{6})", structure.color)
    red, green, blue = bytes.fromhex(digits[1] if digits else "808080")
    return red, green, blue


def _freesurfer(code: int, name: str, red: int = 0, green: int = 0, blue: int = 0) -> str:
    return f"{code:<5d} {name:<35} {red:3d} {green:3d} {blue:3d} 0"


def _itk_snap(
    code: int, name: str, red: int = 0, green: int = 0, blue: int = 0, *, visible: bool = True
) -> str:
    shown = int(visible)
    return f'{code:5d} {red:5d} {green:4d} {blue:4d} {shown:8d} {shown:2d} {shown:2d}    "{name}"'


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
