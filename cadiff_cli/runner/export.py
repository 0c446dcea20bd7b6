"""Tables of volumes in the layouts that other programs write, for communities that merge them.

``enigma``: ``LandRvolumes.csv`` of ENIGMA's subcortical protocol.  ``freesurfer``: what
``asegstats2table`` of FreeSurfer 7 writes.  ``synthseg``: what ``mri_synthseg --vol`` of SynthSeg
2.0 writes: ``subject``, the total, then its 32 structures in the order of their FreeSurfer codes.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cadiff_cli.errors import MissingInputError
from cadiff_cli.io.bids.layout import Finished, finished
from cadiff_cli.io.files import write_text
from cadiff_cli.io.volumes import BRAIN_MASK, INTRACRANIAL, names_of, whole_sum
from cadiff_cli.labels.parcellation import BASE, base_volumes, load_parcellation
from cadiff_cli.runner.group import count_ways, tried_scans

Measure = str | Sequence[str]
"""A volume by its name in our tables, or several to be added; an empty sequence: we have none."""
HEAD_SIZE = "Head-Size"
"""Not in our tables: the intracranial volume where every result knows it, else the mask's."""
ENIGMA: Mapping[str, Measure] = {
    f"{side[0]}{short}": f"{side}-{name}"
    for short, name in (
        ("LatVent", "Lateral-Ventricle"),
        ("thal", "Thalamus"),
        ("caud", "Caudate"),
        ("put", "Putamen"),
        ("pal", "Pallidum"),
        ("hippo", "Hippocampus"),
        ("amyg", "Amygdala"),
        ("accumb", "Accumbens-area"),
    )
    for side in ("Left", "Right")
} | {"ICV": HEAD_SIZE}
WHOLE_HEMISPHERES = {2, 3, 41, 42}
"""``aseg.stats`` has them among its measures, not among its structures."""
VERMIS = names_of(630, 631, 632)
BRAIN_SEG = tuple(s for s in load_parcellation(BASE).structures if s.code not in (16, 85))
"""FreeSurfer counts neither brain stem nor optic chiasm (``cma.cpp``), but vessels."""
FREESURFER: Mapping[str, Measure] = {
    **{
        s.name: s.name
        for s in load_parcellation(BASE).structures
        if s.code not in WHOLE_HEMISPHERES and s.name not in VERMIS
    },
    "Vermis": VERMIS,
    "BrainSegVol": tuple(s.name for s in BRAIN_SEG),
    "BrainSegVolNotVent": tuple(s.name for s in BRAIN_SEG if not s.is_csf),
    "lhCortexVol": "Left-Cerebral-Cortex",
    "rhCortexVol": "Right-Cerebral-Cortex",
    "CortexVol": "Cortex",
    "lhCerebralWhiteMatterVol": "Left-Cerebral-White-Matter",
    "rhCerebralWhiteMatterVol": "Right-Cerebral-White-Matter",
    "CerebralWhiteMatterVol": "Cerebral-White",
    "SubCortGrayVol": "Subcortical-Grey",
    "TotalGrayVol": "Total-Grey",
    "MaskVol": BRAIN_MASK,
    "EstimatedTotalIntraCranialVol": INTRACRANIAL,
}
LEFT = {
    "left cerebral white matter": "Left-Cerebral-White-Matter",
    "left cerebral cortex": "Left-Cerebral-Cortex",
    "left lateral ventricle": "Left-Lateral-Ventricle",
    "left inferior lateral ventricle": "Left-Inf-Lat-Vent",
    "left cerebellum white matter": "Left-Cerebellum-White-Matter",
    "left cerebellum cortex": "Left-Cerebellum-Cortex",
    "left thalamus": "Left-Thalamus",
    "left caudate": "Left-Caudate",
    "left putamen": "Left-Putamen",
    "left pallidum": "Left-Pallidum",
    "3rd ventricle": "3rd-Ventricle",
    "4th ventricle": "4th-Ventricle",
    "brain-stem": "Brain-Stem",
    "left hippocampus": "Left-Hippocampus",
    "left amygdala": "Left-Amygdala",
    "csf": "CSF",
    "left accumbens area": "Left-Accumbens-area",
    "left ventral DC": "Left-VentralDC",
}
SYNTHSEG: Mapping[str, Measure] = {
    "total intracranial": HEAD_SIZE,
    **LEFT,
    "csf": (),  # theirs is all fluid around the brain, up to the skull; our CSF a small part of it
    **{
        column.replace("left ", "right "): name.replace("Left-", "Right-")
        for column, name in LEFT.items()
        if column.startswith("left ")
    },
    "vermis": VERMIS,
}


@dataclass(frozen=True)
class Layout:
    """Its usual file name, the head of its first column, the other columns, and what parts them."""

    file: str
    first: str
    columns: Mapping[str, Measure]
    separator: str = ","


LAYOUTS = {
    "enigma": Layout("LandRvolumes.csv", "SubjID", ENIGMA),
    "freesurfer": Layout("asegstats.tsv", "Measure:volume", FREESURFER, "\t"),
    "synthseg": Layout("synthseg_volumes.csv", "subject", SYNTHSEG),
}


@dataclass(frozen=True)
class Exported:
    """How many rows a table has, and which of our volumes is the head's size (none: empty).

    ``missing`` are scans that have no row, ``ways`` in how many ways the results were made.
    """

    rows: int
    head: str
    missing: Sequence[str]
    ways: int


def export(out: Path, layout: Layout, path: Path) -> Exported:
    """Write the volumes of every finished result in ``out``.

    A row is named after its person, or after the scan where a person has several.  What a network
    never draws is ``NA``.  The size of the head is the intracranial volume if every result has it,
    else the brain mask's: one column must not mix them.  Raises ``MissingInputError`` without a
    result, and ``DataError`` for one that cannot be read.
    """
    results = [*finished(out)]
    if not results:
        raise MissingInputError(f"{out} holds no finished result", "give a folder of cadiff's")
    name = _namer(results)
    volumes = [
        base_volumes(
            {row.name: row.mm3 for row in result.rows() if row.mm3 is not None},
            result.parcellation,
        )
        for result in results
    ]
    head = INTRACRANIAL if all(INTRACRANIAL in known for known in volumes) else BRAIN_MASK
    lines = [(layout.first, *layout.columns)]
    for result, known in zip(results, volumes, strict=True):
        known = {**known, HEAD_SIZE: known[head]} if head in known else known
        cells = (_cell(known, measure) for measure in layout.columns.values())
        lines.append((name(result), *cells))
    write_text(path, "".join(layout.separator.join(line) + "\n" for line in lines))
    return Exported(
        len(results),
        head if HEAD_SIZE in layout.columns.values() else "",
        sorted(tried_scans(out) - {result.entities for result in results}),
        count_ways(results),
    )


def _namer(results: Sequence[Finished]) -> Callable[[Finished], str]:
    people = Counter(result.entities.split("_")[0] for result in results)

    def name(result: Finished) -> str:
        person = result.entities.split("_")[0]
        return person if people[person] == 1 else result.entities

    return name


def _cell(volumes: Mapping[str, float], measure: Measure) -> str:
    total = whole_sum(volumes, [measure] if isinstance(measure, str) else measure)
    return "NA" if total is None else f"{total:.3f}"
