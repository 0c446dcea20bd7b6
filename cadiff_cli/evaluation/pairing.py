"""Pair label maps to be scored against each other, by the entities in their names."""

import re
from dataclasses import dataclass
from pathlib import Path

from cadiff_cli.errors import DataError, MissingInputError, UsageError, first_few
from cadiff_cli.io.bids.names import HEAD, LABEL_MAP, WORKING, scan_of
from cadiff_cli.io.bids.tables import named_parcellation
from cadiff_cli.io.files import files_below, read_json
from cadiff_cli.io.formats import IMAGE_SUFFIXES, stem
from cadiff_cli.labels.parcellation import OWN_SEGMENTATION


@dataclass(frozen=True)
class Pairs:
    """(prediction, reference) files, and the scans that are on one side only."""

    files: tuple[tuple[Path, Path], ...]
    without_reference: tuple[str, ...] = ()
    without_prediction: tuple[str, ...] = ()


def pair_up(
    prediction: Path, reference: Path, finer: str = "", *, both_ours: bool = False
) -> Pairs:
    """Pair two files, or the dseg images of two folders whose names share sub, ses, run, acq...

    ``finer`` is as in ``label_maps``; ``both_ours`` says that cadiff wrote the references, too, of
    which it then holds as well.  Raises ``MissingInputError`` if no scan has both,
    ``DataError`` for two references of a scan.
    """
    for path in (prediction, reference):
        if not path.exists():
            raise MissingInputError(f"no such file or folder: {path}", "check the path")
    if prediction.is_dir() != reference.is_dir():
        file, folder = sorted((prediction, reference), key=Path.is_dir)
        raise UsageError(f"{file} is a file, {folder} a folder", "give two files or two folders")
    if prediction.is_file():
        return Pairs(((prediction, reference),))
    ours = label_maps(prediction, apart_from=reference, prefer_ours=True, finer=finer)
    theirs = label_maps(
        reference, apart_from=prediction, prefer_ours=both_ours, finer=finer if both_ours else ""
    )
    shared = [scan for scan in ours if scan in theirs]
    if not shared:
        left, right = (first_few([*names], 20) or "none" for names in (ours, theirs))
        raise MissingInputError(
            f"no dseg of {prediction} ({left}) has a partner in {reference} ({right})",
            "names must share sub, ses, run, acq",
        )
    return Pairs(
        tuple((ours[scan], theirs[scan]) for scan in shared),
        tuple(scan for scan in ours if scan not in theirs),
        tuple(scan for scan in theirs if scan not in ours),
    )


def retest_pairs(derivatives: Path, finer: str = "") -> list[tuple[Path, Path]]:
    """Pair the first label map of each subject with each later one; ses-2 is before ses-10.

    Scans of another acquisition, reconstruction... are pairs of their own: only ses and run may
    differ.  ``finer`` is as in ``label_maps``.  Raises ``MissingInputError`` if there is no pair.
    """
    if not derivatives.is_dir():
        raise MissingInputError(f"no folder {derivatives}", "give a folder written by cadiff")
    alike: dict[str, list[Path]] = {}
    found = label_maps(derivatives, prefer_ours=True, finer=finer)
    for scan, path in sorted(found.items(), key=lambda item: _as_counted(item[0])):
        if _is_own(path):
            parts = scan.split("_")
            kind = "_".join(part for part in parts if not part.startswith(("ses-", "run-")))
            alike.setdefault(kind, []).append(path)
    pairs = [(first, later) for first, *others in alike.values() for later in others]
    if not pairs:
        subjects = {kind.split("_")[0] for kind in alike}
        raise MissingInputError(
            f"{len(subjects)} subjects with label maps of cadiff's in {derivatives}, none with two"
            " scans that differ in ses and run alone",
            "segment two sessions of a person into one folder",
        )
    return pairs


def _as_counted(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by the numbers in them."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def label_maps(
    folder: Path,
    *,
    apart_from: Path | None = None,
    prefer_ours: bool = False,
    finer: str = "",
) -> dict[str, Path]:
    """The ``*_dseg`` image of each scan in ``folder``, without those in the folder ``apart_from``.

    Templates (``tpl-*``) are no scans.  If a scan has several, ``prefer_ours`` takes cadiff's on
    the scan's own grid: that of the finer parcellation called ``finer`` (a scan without it is left
    out), or the coarser one.  Raises ``DataError`` if more than one is left.
    """
    skipped = [p for p in (apart_from,) if p and folder.resolve() in p.resolve().parents]
    by_scan: dict[str, list[Path]] = {}
    for path in files_below(folder, "*_dseg.*"):
        if path.name.startswith("tpl-"):
            continue
        within = any(path.resolve().is_relative_to(p.resolve()) for p in skipped)
        if path.name.endswith(IMAGE_SUFFIXES) and path.is_file() and not within:
            by_scan.setdefault(scan_of(path), []).append(path)
    for scan, paths in by_scan.items():
        if prefer_ours:
            here = [p for p in paths if "_space-" not in p.name]
            own = [p for p in here if _is_own(p)]
            wanted = f"_seg-{finer or OWN_SEGMENTATION}_"
            named = [p for p in own if wanted in p.name]
            if finer:  # label fusion draws it too
                by_scan[scan] = paths = named or [p for p in here if wanted in p.name]
            else:
                drawn = [p for p in here if wanted in p.name]  # by label fusion
                by_scan[scan] = paths = named or own or drawn or paths
        elif len(paths) > 1:
            by_scan[scan] = paths = [p for p in paths if not _holds_tissues(p)]
        if len(paths) > 1:
            raise DataError(
                f"{folder} has {len(paths)} label maps of {scan}:"
                f" {first_few([str(p.relative_to(folder)) for p in paths], 20)}",
                "leave one, or give two files",
            )
    return {scan: path for scan, paths in by_scan.items() for path in paths}


def _is_own(path: Path) -> bool:
    """Whether a label map's name says that cadiff wrote it."""
    return bool(LABEL_MAP.search(path.name)) and named_parcellation(path) is not None


def _holds_tissues(path: Path) -> bool:
    """Whether a map holds the tissue classes that cadiff writes beside its labels."""
    sidecar = read_json(path.with_name(f"{stem(path)}.json")) or {}
    sources = sidecar.get("Sources")
    return isinstance(sources, list) and any(LABEL_MAP.search(str(uri)) for uri in sources)


def brain_beside(dseg: Path) -> Path:
    """The brain on the working grid, beside a label map of cadiff's.

    Up to revision 8 its name was that of the whole head today.
    """
    now, before = (dseg.with_name(LABEL_MAP.sub(f"_{x}", dseg.name)) for x in (WORKING, HEAD))
    return now if now.exists() or not before.exists() else before
