"""Pages: their numbers obey laws, and a real browser opens them with its network cut off."""

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from dataclasses import replace
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bids_dataset import environment, here
from conftest import ROOT
from scipy import ndimage

from cadiff_cli.config import Config, OutputConfig, Recipe
from cadiff_cli.data import shipped
from cadiff_cli.errors import OutputError
from cadiff_cli.io.bids import derivatives
from cadiff_cli.io.bids.derivatives import save_result
from cadiff_cli.io.bids.description import people_of, save_dataset_files
from cadiff_cli.io.bids.layout import finished
from cadiff_cli.io.bids.names import page_path
from cadiff_cli.io.bids.people import People
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.templates import EMBEDDED, load_template
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import (
    Calibration,
    Person,
    Prepared,
    Registered,
    Result,
    Scan,
    Segmentation,
    Transform,
)
from cadiff_cli.quality.age_ranges import keep_age_ranges, percentiles
from cadiff_cli.quality.judgement import judge
from cadiff_cli.quality.ranges import Ranges, load_ranges
from cadiff_cli.report import figures
from cadiff_cli.report.case import around, find_scan, read_views
from cadiff_cli.report.group import strips
from cadiff_cli.report.methods import describe
from cadiff_cli.report.page import draw, draw_result, report_scan, write_page
from cadiff_cli.report.viewer import pack
from cadiff_cli.runner.execute import execute
from cadiff_cli.runner.export import LAYOUTS, export
from cadiff_cli.runner.group import collect, column, known_scans, write_group
from cadiff_cli.runner.job import Job
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample
from cadiff_cli.stages.volumes import volumes_mm3

SCALE = 0.5
"""Of the heads: pages show shares of the brain, and say nothing of its size."""
EVIL = '"><script>document.title="owned"</script><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def write_result(phantom, stripped_of, conditions_of, parcellation, tiny_model, tmp_path_factory):
    """Derivatives of a phantom that is labelled perfectly and lies in the embedded template."""
    import ants

    transform = tmp_path_factory.mktemp("identity") / "identity.h5"
    ants.write_transform(ants.new_ants_transform(dimension=3), str(transform))

    @cache
    def head_of(orientation):
        head = phantom(orientation, 1.0, scale=SCALE)
        stored = head.t1.grid.affine.astype(np.float32)  # as its file says it
        head = replace(head, t1=Volume(head.t1.data, Grid(head.t1.grid.shape, stored)))
        return head, stripped_of(head), conditions_of(head)

    def write(
        out,
        name="sub-01_T1w.nii.gz",
        orientation="RAS",
        warnings=(),
        templates=(EMBEDDED,),
        poor=(),
        model=tiny_model.info,
        calibration=None,
        labelled=True,
        person=Person(),
        ranges="",
        skull=False,
        bare=None,
        **found,
    ):
        head, stripped, conditions = head_of(orientation)
        held = Volume(ndimage.binary_dilation(head.codes > 0), head.t1.grid) if skull else None
        stripped = replace(stripped, intracranial=held, bare=not skull if bare is None else bare)
        path = out.parent / "scans" / name
        save_volume(path, head.t1.data, head.t1.grid)
        template = load_template(EMBEDDED, offline=True)
        registrations = tuple(
            Registered(
                replace(template, name=x),
                Transform(
                    *(transform, transform, "affine", 1.2, x not in poor),
                    notes=(Note(NoteCode.POOR_SCORE, "it looks poor"),) * (x in poor),
                ),
            )
            for x in templates
        )
        notes = tuple(Note(NoteCode.UNKNOWN, text) for text in warnings)
        scan = Scan(head.t1, path, notes, person=person)
        prepared = Prepared(
            *(scan, stripped, registrations, conditions),
            tuple(r.template for r in registrations),
        )
        labels = Volume(head.codes * labelled, head.t1.grid)
        segmentation = Segmentation(labels, parcellation, 5, 0, **found)
        mask = Volume(head.codes > 0, head.t1.grid)
        config, seconds = Config(output=OutputConfig(field=True)), {"segment": 1.0}
        volumes = volumes_mm3(segmentation)
        result = Result(
            *(prepared, mask, segmentation, volumes, model, config, seconds, (), calibration),
            ranges=ranges,
            intracranial=held,
            head=None if bare is None else head.t1,
        )
        save_result(result, out, prepared.conditions.field)
        write.result = result
        return path

    return write


@pytest.fixture(scope="module")
def pages(write_result, tmp_path_factory):
    """A folder with two pages, one of a scan whose header and warnings are hostile, and a group."""
    out = tmp_path_factory.mktemp("pages") / "out"
    for name, orientation, warnings in (
        ("sub-01_T1w.nii.gz", "RAS", ()),
        ("sub-02_T1w.nii.gz", "oblique", (EVIL,)),
    ):
        t1 = write_result(out, name, orientation, warnings)
        assert report_scan(out, t1) == ""
    journal = {"entities": "sub-03", "status": "failed", "message": EVIL, "warnings": []}
    path = out / "logs" / "journal" / "sub-03.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(journal))
    return out


def rebuild(out, *more):
    """``cadiff report`` where torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; from cadiff_cli.cli import main; main()"
    arguments = [sys.executable, "-c", code, "report", str(out), *map(str, more)]
    return subprocess.run(
        arguments, capture_output=True, text=True, check=False, env=environment(), timeout=300
    )


def enclosed(path):
    """Area within an SVG path, in pixels."""
    total = 0.0
    for part in re.findall(r"M(-?\d+) (-?\d+)l([^Mz]*)", path):
        steps = np.array([int(x) for x in re.findall(r"-?\d+", part[2])]).reshape(-1, 2)
        x, y = (np.vstack([[int(part[0]), int(part[1])], steps]).cumsum(axis=0) / figures.FINE).T
        total += abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return total


def test_outlines_enclose_what_they_outline():
    y, x = np.indices((60, 80))
    for radius in (5, 12, 25):
        disk = (x - 40) ** 2 + (y - 30) ** 2 < radius**2
        assert enclosed(figures.outline(disk)) == pytest.approx(disk.sum(), rel=0.02)
    assert figures.outline(np.zeros((9, 9))) == ""


def test_an_iso_line_lies_where_the_value_is():
    """Of a ramp, at the pixel's centre; nothing is drawn where nothing is known."""
    ramp = np.tile(np.arange(20.0), (10, 1))
    (line,) = re.findall(r"M(\d+) (\d+)l", figures.outline(ramp, 7.25))
    assert int(line[0]) / figures.FINE == 7.25 + 0.5
    assert figures.outline(np.full((10, 20), np.nan), 0.5) == ""


def test_left_is_left_and_up_is_up():
    data = np.zeros((4, 5, 6))
    data[0, 4, 5] = 1  # left, anterior, superior
    for axis, index in ((0, 0), (1, 4), (2, 5)):
        rows, columns = np.nonzero(figures.cut(data, axis, index))
        assert rows == [0]
        assert columns == [4 if axis == 0 else 0]


def test_a_crop_is_copied_exactly():
    rng = np.random.default_rng(0)
    volume = Volume(rng.normal(size=(9, 8, 7)), Grid((9, 8, 7), np.diag([1.5, 1, 2, 1])))
    part = resample(volume, volume.grid.crop((2, 1, 3), (5, 6, 4)))
    assert (part.data == volume.data[2:7, 1:7, 3:7]).all()
    beyond = resample(volume, volume.grid.crop((-1, 0, 0), (5, 8, 7)), fill=9.0)
    assert (beyond.data[0] == 9).all()
    assert (beyond.data[1:] == volume.data[:4]).all()


def test_around_keeps_the_brain():
    inside = np.zeros((40, 50, 60), dtype=bool)
    inside[3:30, 20:40, 10:55] = True
    mask = Volume(inside, Grid(inside.shape, np.eye(4)))
    near = around(mask, 8.0)
    assert resample(mask, near, order=0).data.sum() == inside.sum()
    assert near.shape == (38, 36, 58)


def test_packed_volumes_unpack():
    volume = np.random.default_rng(0).integers(0, 255, (5, 6, 7), dtype=np.uint8)
    flat = np.frombuffer(gzip.decompress(b64decode(pack(volume))), np.uint8)
    x, y, z = 3, 2, 6
    assert flat[x + 5 * (y + 6 * z)] == volume[x, y, z]
    assert (flat.reshape(7, 6, 5).transpose(2, 1, 0) == volume).all()


def test_what_to_expect_is_on_the_page(write_result, phantom, parcellation, tmp_path):
    """Calibrated where the weights were measured, as a column, a reason, and a map."""
    halved = Calibration(
        "0" * 64, "four people", (0.0, 1.0), (0.0, 0.5), {}, {"Left-Thalamus": 0.8}
    )
    out = tmp_path / "out"
    uncertain = np.full(phantom("RAS", 1.0, scale=SCALE).t1.grid.shape, 0.1, dtype=np.float32)
    write_result(
        out,
        calibration=halved,
        expected_dice={s.code: 0.9 for s in parcellation.structures},
        volume_sd_mm3={s.code: 12.0 for s in parcellation.structures},
        uncertainty=uncertain,
    )
    (result,) = finished(out)
    rows = [row for row in result.rows() if row.code]
    assert {(row.expected_dice, row.sd_mm3) for row in rows} == {(0.45, 12.0)}
    assert {row.name: row.usual_dice for row in rows if row.usual_dice} == {"Left-Thalamus": 0.8}
    text = write_page(out, result).read_text()
    for needed in (
        "calibrated on four people",
        "<h2>Uncertainty</h2>",
        "Left-Thalamus (0.45, 0.80 is usual)",
    ):
        assert needed in text
    # Tables of earlier versions lack the columns.
    lines = [line.split("\t")[:5] for line in result.morph.read_text().splitlines()]
    result.morph.write_text("".join("\t".join(line) + "\n" for line in lines))
    assert {row.expected_dice for row in result.rows()} == {None}
    assert "a low Dice is expected" not in write_page(out, result).read_text()


def test_volumes_are_shares_of_the_intracranial_volume(write_result, parcellation, tmp_path):
    """Where the skull is known; else the tables say why not."""
    out = tmp_path / "out"
    write_result(out, "sub-01_T1w.nii.gz", skull=True)
    write_result(out, "sub-02_T1w.nii.gz")
    rows = {row["scan"]: row for row in collect(out, ["sub-01", "sub-02"]).rows}
    assert rows["sub-01"].keys() == rows["sub-02"].keys()
    held = float(rows["sub-01"]["intracranial_volume"])
    mask = nib.load(out / "sub-01" / "anat" / "sub-01_desc-icv_mask.nii.gz")
    voxel = float(np.prod(mask.header.get_zooms()))
    assert held == pytest.approx(np.count_nonzero(np.asarray(mask.dataobj)) * voxel, rel=1e-5)
    assert held > float(rows["sub-01"]["brain_mask"])
    for name in (*(s.name for s in parcellation.structures), "Brain-Segmentation"):
        share, mm3 = (rows["sub-01"][column(name) + end] for end in ("_percent_intracranial", ""))
        assert float(share) == pytest.approx(100 * float(mm3) / held, abs=1e-3)
        assert rows["sub-02"][f"{column(name)}_percent_intracranial"] is None
    assert rows["sub-02"]["intracranial_volume"] is None
    assert not [*out.rglob("sub-02*icv*")]
    for name, drawn in (("sub-01", True), ("sub-02", False)):
        (result,) = (r for r in finished(out) if r.entities == name)
        assert ("inner skull" in write_page(out, result).read_text()) is drawn
    # In the table of a group of which no skull is known they would be in the way.
    for scans, shares in ((["sub-01", "sub-02"], True), (["sub-02"], False)):
        header = write_group(out, scans).path.read_text().splitlines()[0]
        assert "intracranial_volume" in header
        assert ("percent_intracranial" in header) is shares
    for name, reason in (("sub-01", False), ("sub-02", True)):
        sidecar = json.loads((out / name / "anat" / f"{name}_desc-totals_morph.json").read_text())
        assert ("skull-stripped" in sidecar["name"]["Levels"]["Intracranial-Volume"]) is reason
        assert ("n/a" in sidecar["percent_intracranial"]["Description"]) is reason


@pytest.mark.parametrize("bare", [True, False])
def test_the_evened_scan_tells_whether_it_shows_the_face(write_result, bare, tmp_path):
    """Whatever method found the brain: the phantom's is that of stripped scans."""
    out = tmp_path / "out"
    write_result(out, bare=bare)
    sidecar = out / "sub-01" / "anat" / "sub-01_desc-preproc_T1w.json"
    assert json.loads(sidecar.read_text())["SkullStripped"] is bare


@pytest.mark.parametrize("layout", ["enigma", "synthseg"])
def test_an_exported_size_of_the_head_is_of_one_kind(write_result, layout, tmp_path):
    """One stripped scan among others: then it is the brain mask's in every row."""
    out, known, mixed = (tmp_path / name for name in ("out", "known.csv", "mixed.csv"))
    write_result(out, "sub-01_T1w.nii.gz", skull=True)
    assert export(out, LAYOUTS[layout], known).head == "Intracranial-Volume"
    write_result(out, "sub-02_T1w.nii.gz")
    assert export(out, LAYOUTS[layout], mixed).head == "Brain-Mask"
    whole = {"enigma": "ICV", "synthseg": "total intracranial"}[layout]
    for n, table, name in ((1, known, "Intracranial-Volume"), (2, mixed, "Brain-Mask")):
        with table.open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == n
        for result, row in zip(finished(out), rows, strict=False):
            own = {x.name: x.mm3 for x in result.rows()}
            assert float(row[whole]) == pytest.approx(own[name], abs=1e-3)


def test_pages_and_groups_say_where_a_person_stands(
    write_result, age_ranges, parcellation, tmp_path
):
    """Where the age is known, and among those of the people; else adults' ranges, and why."""
    out, known = tmp_path / "out", age_ranges.fingerprint
    people = {"sub-01": Person(40.0, "F"), "sub-02": Person(85.0), "sub-03": Person(3.0, "M")}
    for name, person in people.items():
        write_result(out, f"{name}_T1w.nii.gz", person=person, ranges=known)
    keep_age_ranges(out, age_ranges)
    first = next(finished(out))
    text = write_page(out, first).read_text()
    assert text.count('class="chart"') == 5
    for needed in ('id="age"', "of the same age and sex", "60 made-up people", "<dd>F</dd>"):
        assert needed in text
    rows = {row["scan"]: row for row in collect(out, [*people]).rows}
    row = rows["sub-01"]
    volumes = {x.name: x.mm3 for x in first.rows() if x.code is not None}
    wanted = percentiles(age_ranges, volumes, parcellation, people["sub-01"])
    assert float(row["left_thalamus_percentile"]) == pytest.approx(
        wanted["Left-Thalamus"].value, abs=0.06
    )
    assert (row["age"], row["sex"], row["left_amygdala_percentile"]) == (40.0, "F", None)
    assert row["compared_with"] == "60 people of 20 to 80 years"
    assert not any("Brain-Segmentation" in (row["reasons"] or "") for row in rows.values())
    for name in ("sub-02", "sub-03"):
        assert rows[name]["left_thalamus_percentile"] is None
        assert rows[name]["compared_with"] == "adults of 18 to 90 years"
    assert "age 3: the ranges, and what the network has learnt, are of" in rows["sub-03"]["reasons"]
    # Ages that are known later, or better, need no new segmentation.
    later = People({"03": Person(50.0)})
    row = next(row for row in collect(out, [*people], later).rows if row["scan"] == "sub-03")
    assert (row["age"], row["sex"]) == (50.0, "M")
    assert float(row["left_thalamus_percentile"]) >= 0
    # Without their file, ranges that were given are unknown: no others take their place.
    next(out.glob("age_ranges_*")).unlink()
    (row,) = collect(out, ["sub-01"]).rows
    assert row["left_thalamus_percentile"] is None
    assert row["compared_with"] is None


def shown_ages(out):
    """The ages on the pages of a folder."""
    texts = {page.stem: page.read_text() for page in out.glob("sub-*.html")}
    return {name: re.findall(r"<dt>Age</dt><dd>([^<]*) years", x) for name, x in texts.items()}


@pytest.fixture
def followed(write_result, tmp_path):
    """A dataset, and finished results of two sessions that were made before an age was known.

    The second session has an age of its own; what else is told of ages is odd.
    """
    raw, out = tmp_path / "bids", tmp_path / "bids" / "derivatives" / "cadiff"
    for name in ("a", "b"):
        t1 = write_result(out, f"sub-01_ses-{name}_T1w.nii.gz")
        anat = raw / "sub-01" / f"ses-{name}" / "anat"
        anat.mkdir(parents=True)
        t1.rename(anat / t1.name)
    description = {"Name": "x", "BIDSVersion": "1.10.0"}
    (raw / "dataset_description.json").write_text(json.dumps(description))
    (raw / "participants.tsv").write_text(
        "participant_id\tage\tsex\nsub-01\t40\tF\nsub-02\t999\tM\n"
    )
    (raw / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-b\t43\n")
    save_dataset_files(out, Dataset(raw))
    return raw, out


AGES = {"sub-01_ses-a": ["40"], "sub-01_ses-b": ["43"]}


def test_reports_and_tables_know_the_ages_of_today_and_tell_what_is_odd(followed):
    raw, out = followed
    told = "ages above 120 years are ignored (sub-02 999)"
    for words in (
        ("report", out),
        ("report", out, "--scans", raw / "sub-01"),  # a folder without a table
        ("run", raw, out, "participant", "group", "--reports-only"),
    ):
        done = here(*words)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(told) == 1
        assert shown_ages(out) == AGES
        for page in out.glob("*.html"):
            page.unlink()
    done = here("run", raw, out, "group")
    assert done.returncode == 0, done.stderr
    assert told in done.stderr
    lines = (out / "group_morph.tsv").read_text().splitlines()
    header, *rows = (line.split("\t") for line in lines)
    age, sex = header.index("age"), header.index("sex")
    assert [(row[age], row[sex]) for row in rows] == [("40.0", "F"), ("43.0", "F")]
    # Where another folder tells ages, those count; a dataset that has gone tells none.
    other = raw.parent / "other"
    other.mkdir()
    (other / "participants.tsv").write_text("participant_id\tage\nsub-01\t50\n")
    assert [people_of(out, x).of("01").age_years for x in (raw, other)] == [40, 50]
    # A table that tells neither age nor sex does not hide one that does.
    (other / "participants.tsv").write_text("participant_id\tgroup\nsub-01\tpatient\n")
    assert people_of(out, other) == people_of(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, _: not path.samefile(raw))
        assert not people_of(out, raw), "its owner alone may look into it"
    (raw / "participants.tsv").unlink()
    assert people_of(out).of_scan("sub-01_ses-b") == Person(43.0)
    (out / "dataset_description.json").unlink()
    assert not people_of(out)


def test_a_missing_page_is_made_for_the_person_as_known_now(followed, monkeypatch):
    raw, out = followed
    monkeypatch.setattr(Job, "outdated", lambda *_: "")
    t1 = raw / "sub-01" / "ses-b" / "anat" / "sub-01_ses-b_T1w.nii.gz"
    job = Job(t1, out, "", Recipe(Config(), "", "", ""), "", "", person=Person(43.0, "F"))
    outcome = execute(job)
    assert (outcome.status, outcome.warnings) == ("done", ())
    assert shown_ages(out) == {"sub-01_ses-b": ["43"]}
    # A page that cannot be made costs nothing else.
    (out / "sub-01_ses-b.html").unlink()
    next(out.rglob("sub-01_ses-b_desc-volumetric_morph.tsv")).write_text("not a table\n1")
    outcome = execute(job)
    assert outcome.status == "done"
    (note,) = outcome.warnings
    assert note.code == NoteCode.NO_PAGE
    assert "not a volume table" in note.text


def test_the_page_on_pages_counts_steps_as_the_calibration_does():
    counted = re.compile(r"[\d,]+ steps before")
    (file,) = (x for x in shipped("calibration").iterdir() if x.name == "cadiff-malc.json")
    said = counted.findall((ROOT / "docs" / "report.md").read_text(encoding="utf-8"))
    assert said == counted.findall(file.read_text(encoding="utf-8"))
    assert said


def test_what_the_network_never_draws_is_neither_missing_nor_compared(
    write_result, tiny_model, parcellation, tmp_path
):
    """No vermis in FreeSurfer's labels: shares of such a brain are not those of other people."""
    vermis = [s for s in parcellation.structures if s.code in (630, 631, 632)]
    drawn = sorted({s.code for s in parcellation.structures} - {s.code for s in vermis})
    out = tmp_path / "out"
    write_result(out, model=replace(tiny_model.info, structures=frozenset(drawn)))
    (result,) = finished(out)
    rows = result.rows()
    assert {row.code for row in rows if row.mm3 is None} - {None} == {s.code for s in vermis}
    found = judge(result, rows, None, parcellation, load_ranges(parcellation))
    known = judge(
        result,
        [replace(r, mm3=r.mm3 or 0.0) for r in rows],
        None,
        parcellation,
        load_ranges(parcellation),
    )
    assert {s.name for s in vermis} <= set(known.missing)
    assert not {s.name for s in vermis} & set(found.missing)
    assert known.implausible
    assert not found.implausible
    text = write_page(out, result).read_text()
    assert vermis[0].name.replace("-", " ") in text
    assert "Ranges in brackets" not in text
    group = collect(out, known_scans(out))
    (row,) = group.rows
    assert row[column(vermis[0].name)] is None
    assert float(row["left_thalamus"]) > 0
    assert vermis[0].name not in [
        strip.name for strip in strips(group.judged, parcellation, Ranges("", {}, {}))
    ]


def test_what_is_not_in_the_field_is_told_and_not_shown(write_result, tmp_path, monkeypatch):
    out, names = tmp_path / "out", ("MNIColin27", EMBEDDED)
    embedded = load_template(EMBEDDED, offline=True)
    monkeypatch.setattr(
        "cadiff_cli.report.case.load_template", lambda name, offline: replace(embedded, name=name)
    )
    for poor, in_field in (((), names), (names[:1], names[1:]), (names, names)):
        write_result(out, templates=names, poor=poor)
        (result,) = finished(out)
        folder = result.sidecar.parent
        for name in names:
            for way in (f"from-{name}_to-T1w", f"from-T1w_to-{name}"):
                assert (folder / f"sub-01_{way}_mode-image_xfm.h5").is_file()
        field = json.loads((folder / "sub-01_desc-distance_field.json").read_text())
        shares = {x: x in in_field for x in names}
        assert {t["Name"]: t["InField"] for t in field["Templates"]} == shares
        assert {used.name: used.in_field for used in result.provenance.templates} == shares
        (said,) = (text for text in describe([result]) if "distance field" in text)
        assert f"registered to {' and '.join(in_field)} [" in said
        page = write_page(out, result).read_text()
        assert f"Edges of {in_field[0]} over the scan" in page
        assert page.count(", not in the field") == len(names) - len(in_field)
        assert all(name in page for name in names)


def test_coordinates_have_colours_inside_the_brain():
    image = np.full((3, 3, 3), 100, dtype=np.uint8)
    field = np.zeros((3, 3, 3, 3), dtype=np.float32)
    field[0] = np.array([0.0, 0.5, np.nan])[:, None, None]
    inside = np.ones((3, 3, 3), dtype=bool)
    inside[:, :, 0] = False
    shown = figures.tinted(image, field, inside)
    assert (shown[:, :, 0] == 100).all()
    left, middle, unknown = shown[:, 1, 1].astype(int)
    assert middle[0] > left[0]
    assert (middle[1:] == left[1:]).all()
    assert (unknown == left).all()


def test_uncertainty_glows_where_it_is():
    image = np.full((2, 2, 2), 100, dtype=np.uint8)
    entropy = np.zeros((2, 2, 2), dtype=np.float32)
    entropy[1] = 1
    shown = figures.glow(image, entropy)
    assert (shown[0] == 100).all()
    assert (shown[1] == figures.ALARM).all()
    rows = figures.cut(shown, 1, 0)
    assert rows.shape == (2, 2, 3)
    assert (rows[:, 1] == figures.ALARM).all()


def test_no_file_is_written_that_overwriting_would_forget(write_result, tmp_path, monkeypatch):
    monkeypatch.setattr(derivatives, "FIELD", "desc-new_field")
    with pytest.raises(ValueError, match=r"desc-new_field\.nii\.gz is not in io/bids/names\.OURS"):
        write_result(tmp_path / "out")
    assert not [*tmp_path.rglob("*desc-new*")]


def test_a_result_without_any_structure_has_a_page(write_result, tmp_path):
    out = tmp_path / "out"
    path = write_result(out, labelled=False)
    assert report_scan(out, path) == ""
    assert "not found" in (out / "sub-01.html").read_text()


def test_a_new_result_is_drawn_as_its_files_are(write_result, parcellation, tmp_path):
    """But for the field: it is that of the network, not one that is computed again."""
    path = write_result(tmp_path / "out", orientation="oblique")
    (result,) = finished(tmp_path / "out")
    new = draw_result(write_result.result)
    read = draw(read_views(tmp_path / "out", result, path), parcellation, None)
    assert new.viewer == read.viewer
    assert (new.template, new.registration) == (read.template, read.registration)
    for k, (one, other) in enumerate(zip(new.groups, read.groups, strict=True)):
        assert one == other or k == 3
        assert [plane.name for plane in one] == [plane.name for plane in other]
    assert new.groups[3]


def test_the_scan_is_known_by_its_content(write_result, tmp_path):
    out = tmp_path / "out"
    t1 = write_result(out)
    (result,) = finished(out)
    assert find_scan(out, result).samefile(t1), "the sidecar tells a short path"
    assert find_scan(out, result, t1) == t1
    assert find_scan(out, result, t1.parent).samefile(t1)
    nested = t1.parent / "sub-01" / "anat" / t1.name
    nested.parent.mkdir(parents=True)
    t1.rename(nested)
    assert find_scan(out, result) is None
    assert find_scan(out, result, t1.parent).samefile(nested)

    def locked(path):
        raise PermissionError(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cadiff_cli.report.case.sha256", locked)
        assert find_scan(out, result, t1.parent) is None, "its owner alone may read it"
    nested.write_bytes(nested.read_bytes() + b"\0")
    assert find_scan(out, result, t1.parent) is None
    text = write_page(out, result, t1.parent).read_text()
    assert "only its brain is shown" in text


def test_a_page_never_costs_a_segmentation(write_result, tmp_path):
    out = tmp_path / "out"
    t1 = write_result(out)
    (result,) = finished(out)
    page = page_path(out, result.entities)
    page.write_text("<html>another program's</html>")
    assert "another program's page" in report_scan(out, t1)
    assert page.read_text() == "<html>another program's</html>"
    with pytest.raises(OutputError):
        write_page(out, result)
    page.unlink()
    assert report_scan(out, t1) == ""
    assert page.exists()
    result.morph.write_text("not a table\n1")
    # The page shows labels that are gone: none is better than a wrong one.
    assert "not a volume table" in report_scan(out, t1)
    assert [r.entities for r in finished(out)] == ["sub-01"]
    assert not page.exists()


def test_without_a_report_an_earlier_one_goes(pages, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pages, out)
    assert report_scan(out, Path("sub-01_T1w.nii.gz"), wanted=False) == ""
    assert not (out / "sub-01.html").exists()
    assert (out / "sub-02.html").exists()


def test_pages_are_rebuilt_without_torch_or_network(pages, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pages, out)
    done = rebuild(out, "--scans", pages.parent / "scans")
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.splitlines()] == [
        "sub-01.html",
        "sub-02.html",
        "group.html",
    ]
    assert (out / "sub-01.html").read_text() == (pages / "sub-01.html").read_text()
    bare = rebuild(tmp_path)
    assert bare.returncode == 66
    assert "holds no finished result" in bare.stderr


def test_a_page_holds_what_it_promises_and_asks_for_nothing(pages):
    text = (pages / "sub-01.html").read_text()
    assert len(text) < 12e6
    # Whatever is fetched is in the file: no address of another but in words.
    assert re.findall(r'(?:src|href|action)="(?!data:)[^"]*"', text) == []
    assert re.findall(r"url\(|@import", text) == []
    assert text.count("<script") == 2
    for needed in (
        "Look here",
        "Registration",
        "Distance field",
        "0" * 64,
        "Hippocampus",
        "seed 0",
    ):
        assert needed in text, needed


# In a real browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium without a network."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra 'browser')")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium in PATH (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open a page offline; an error, a dialog or a request to anywhere fails the test."""
    contexts, said = [], []

    def open_page(path, scheme="light", width=1100):
        size = {"width": width, "height": 900}
        context = browser.new_context(offline=True, color_scheme=scheme, viewport=size)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on(
            "request", lambda request: request.url.startswith("http") and said.append(request.url)
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def viewer_ready(page):
    page.wait_for_function("document.documentElement.dataset.ready === 'yes'", timeout=20_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_follows_the_theme_and_fits_a_phone(pages, visit, scheme):
    page = visit(pages / "sub-01.html", scheme, width=390)
    viewer_ready(page)
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", color)[:3])) / 3
    assert (brightness > 128) == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.emulate_media(media="print")
    assert not page.is_visible("#viewer")


def test_a_click_names_the_structure(pages, visit, phantom):
    """The phantom's labels are known in millimetres; the readout tells millimetres back."""
    page = visit(pages / "sub-01.html")
    viewer_ready(page)
    readout = page.locator("#readout")
    seen = set()
    axial = page.locator("canvas[data-axis='2']")
    axial.scroll_into_view_if_needed()
    box = axial.bounding_box()
    head = phantom("RAS", 1.0, scale=SCALE)
    for across, down in ((0.3, 0.4), (0.7, 0.4), (0.6, 0.2), (0.45, 0.6), (0.02, 0.02)):
        page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])
        text = readout.inner_text()
        seen.add(text)
        xyz = [int(n) for n in re.findall(r"[xyz] (-?\d+)", text)]
        ijk = np.rint(np.linalg.solve(head.t1.grid.affine, [*xyz, 1])[:3]).astype(int)
        near = head.codes[tuple(slice(i - 1, i + 2) for i in ijk)]
        code = re.search(r"\((\d+)\)", text)
        assert (int(code[1]) if code else 0) in near
        # Left in the picture is left in the world.
        assert (xyz[0] < 0) == (across < 0.5)
    assert len(seen) == 5
    page.click("button[data-code='51']")
    assert "(51)" in readout.inner_text()
    axial.focus()
    before = readout.inner_text()
    page.keyboard.press("PageUp")
    assert readout.inner_text() != before


def test_opacity_and_outlines_change_the_picture(pages, visit):
    page = visit(pages / "sub-01.html")
    viewer_ready(page)

    def coloured():
        """Pixels that are not grey."""
        return page.evaluate(
            """() => { const c = document.querySelector("canvas[data-axis='1']");
            const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data; let n = 0;
            for (let i = 0; i < d.length; i += 4) n += Math.abs(d[i] - d[i + 1]) > 8; return n; }"""
        )

    filled = coloured()
    page.check("#edges")
    assert 0 < coloured() < filled / 2
    page.fill("#opacity", "0")
    assert coloured() == 0
    assert page.locator(".outlines").first.is_visible()
    page.locator(".outlines-on").first.uncheck()
    assert not page.locator(".outlines").first.is_visible()
    second = "getComputedStyle(document.querySelector('.second'))"
    assert page.evaluate(f"{second}.opacity") == "0"
    page.check(".flicker")
    assert page.evaluate(f"{second}.animationName") == "flicker"
    page.check(".hold")
    assert page.evaluate(f"{second}.opacity") == "1"


def test_a_pointer_inside_a_structure_meets_its_outline(pages, visit, parcellation):
    page = visit(pages / "sub-01.html")
    names = page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].slice(0, 24).map((svg) => {
        svg.scrollIntoView({ block: "center" }); const b = svg.getBoundingClientRect();
        const e = document.elementFromPoint(b.x + .4 * b.width, b.y + .5 * b.height);
        return e.querySelector("title")?.textContent; })"""
    )
    met = {name for name in names if name}
    assert len(met) > 2
    assert met <= {s.name for s in parcellation.structures}


def test_names_are_words_and_nothing_more(pages, visit, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pages, out)
    results = list(finished(out))
    made = replace(results[1].provenance, source=EVIL)
    write_page(out, replace(results[1], provenance=made))
    page = visit(out / "sub-02.html")
    viewer_ready(page)
    assert page.title() == "sub-02 \u2013 cadiff"
    assert EVIL in page.inner_text("#verdict")
    assert EVIL in page.inner_text("header")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2


def test_a_group_sorts_and_links(pages, visit, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pages, out)
    assert rebuild(out).returncode == 0
    page = visit(out / "group.html")
    assert EVIL in page.inner_text("#missing")
    first = page.locator("#scans tbody tr td:first-child").first
    assert first.inner_text() == "sub-01"
    page.click("#scans th:first-child button")
    page.click("#scans th:first-child button")
    assert first.inner_text() == "sub-02"
    first.locator("a").click()
    page.wait_for_url("**/sub-02.html")
    assert page.inner_text("h1") == "sub-02"
