"""What programs of other people find in our results; by their own code where it is installed."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import niivue_check
import numpy as np
import pytest
from bids.layout import BIDSLayout

from cadiff_cli import load_scan, segment
from cadiff_cli.cli import cadiff, guarded
from cadiff_cli.cli.export import FORMATS
from cadiff_cli.config import (
    REVISION,
    Config,
    OutputConfig,
    RegisterConfig,
    SampleConfig,
    StripConfig,
    fingerprint,
)
from cadiff_cli.io.bids.derivatives import save_result
from cadiff_cli.io.bids.layout import Derivatives, finished
from cadiff_cli.io.bids.tables import save_table
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.provenance import make_recipe
from cadiff_cli.io.templates import EMBEDDED, load_template
from cadiff_cli.labels.parcellation import Tissue
from cadiff_cli.report.case import read_views
from cadiff_cli.runner.export import HEAD_SIZE, LAYOUTS

ORIENTATIONS = {"01": "LAS", "02": "LIA", "03": "oblique"}
SPACING_MM = (1.4, 1.7, 1.5)
QUICK = Config(
    StripConfig("none"),
    RegisterConfig("none"),
    SampleConfig(steps=1, flip=False),
    OutputConfig(posteriors=True, codes="freesurfer"),
)


@pytest.fixture(scope="module")
def made(phantom, tiny_model, tmp_path_factory):
    """Results of three people, on grids that the working grid is not; and their scans."""
    folder = tmp_path_factory.mktemp("clients")
    out, template = folder / "out", load_template(EMBEDDED, offline=True)
    scans = {}
    for person, orientation in ORIENTATIONS.items():
        head = phantom(orientation, SPACING_MM, scale=0.35)
        x = head.t1.grid.to_world(np.moveaxis(np.indices(head.codes.shape), 0, -1))[..., 0]
        uneven = (head.t1.data * np.exp(x / 40)).astype(np.float32)
        scans[person] = folder / f"sub-{person}_T1w.nii.gz"
        save_volume(scans[person], uneven, head.t1.grid)
        result = segment(load_scan(scans[person]), [template], tiny_model, QUICK, device="cpu")
        save_result(result, out)
    return out, scans


@pytest.fixture(params=ORIENTATIONS)
def person(request):
    return request.param


@pytest.fixture
def image(made, person):
    """Open an image of a person by what follows its entities."""
    return lambda name: nib.load(made[0] / f"sub-{person}" / "anat" / f"sub-{person}_{name}.nii.gz")


def values(image):
    return np.asarray(image.dataobj)


def test_images_without_space_and_resolution_lie_on_the_scan(made, person):
    """sMRIPrep multiplies them voxel by voxel."""
    out, scans = made
    scan, seen = nib.load(scans[person]), 0
    for path in (out / f"sub-{person}" / "anat").glob("*.nii.gz"):
        found, apart = nib.load(path), "_res-" in path.name
        same = found.shape[:3] == scan.shape and np.array_equal(found.affine, scan.affine)
        assert same != apart, path.name
        seen += not apart
    assert seen == 9


def test_the_evened_head_is_the_scan_over_a_smooth_field(made, person, image):
    _, scans = made
    scan, head = values(nib.load(scans[person])), values(image("desc-preproc_T1w"))
    inside = scan > 5
    field = np.where(inside, scan / np.where(inside, head, 1), np.nan)
    # Brighter to the right by exp(x / 40): most of it is found, and it has no edges.
    grid = load_scan(scans[person]).t1.grid
    x = grid.to_world(np.moveaxis(np.indices(scan.shape), 0, -1))[..., 0]
    slope, _ = np.polyfit(x[inside], np.log(field[inside]), 1)
    assert slope == pytest.approx(1 / 40, rel=0.3)
    for axis in range(3):
        assert np.nanmax(abs(np.diff(np.log(field), axis=axis))) < 0.3
    assert (head[scan == 0] == 0).all()


def test_tissues_are_those_of_the_labels(image, parcellation):
    labels, tissues = values(image("seg-cadiff_desc-structures_dseg")), values(image("dseg"))
    assert set(np.unique(tissues)) >= {0, int(Tissue.WM), int(Tissue.CSF)}
    codes = np.array([0, *(s.code for s in parcellation.structures)])
    every = parcellation.tissue_map(codes)
    by_tissue = {
        Tissue.WM: (2, 41, 7, 46, 16, 85),
        Tissue.CSF: (4, 43, 5, 44, 14, 15, 24),
        0: (0, 30, 62),  # background and vessels
    }
    for tissue, own in by_tissue.items():
        assert ((tissues == tissue) == np.isin(labels, own)).all(), tissue
        assert {*codes[every == tissue].tolist()} == {*own}
    assert (every == Tissue.GM).sum() == len(codes) - sum(map(len, by_tissue.values()))
    p = np.stack([values(image(f"label-{tissue.name}_probseg")) for tissue in Tissue])
    assert p.min() >= 0
    assert p.sum(axis=0).max() < 1.01
    of_classes = np.moveaxis(values(image("seg-cadiff_probseg")), -1, 0)
    for tissue, total in zip(Tissue, p, strict=True):
        own = of_classes[list(parcellation.tissues[tissue])].sum(axis=0)
        np.testing.assert_allclose(total, own, atol=0.01)


def test_codes_of_freesurfers_table_alone(image, parcellation):
    """The same labels; 91, 92 and 630 to 632 are in no table of FreeSurfer."""
    ours, theirs = (
        values(image(f"seg-cadiff_desc-{name}_dseg")) for name in ("structures", "freesurfer")
    )
    known = {s.code for s in parcellation.structures} - {91, 92, 630, 631, 632}
    assert {*np.unique(theirs)} <= {0, 172, 865, 866, *known}
    other = {91: 865, 92: 866, 630: 172, 631: 172, 632: 172}
    expected = np.vectorize(lambda code: other.get(code, code))(np.unique(ours))
    for code, wanted in zip(np.unique(ours), expected, strict=True):
        assert (theirs[ours == code] == wanted).all()


SMRIPREP = {
    "preproc": {"desc": "preproc", "suffix": "T1w"},
    "mask": {"desc": "brain", "suffix": "mask"},
    "dseg": {"desc": None, "suffix": "dseg"},
    "tpms": {"label": ["GM", "WM", "CSF"], "suffix": "probseg"},
}
"""What sMRIPrep 0.19 asks for (``data/io_spec.json``)."""


def test_what_smriprep_asks_for_is_there_once(made, person):
    """Wherever its query fits two files it takes a list, and fails far from here."""
    layout = BIDSLayout(made[0], config=["bids", "derivatives"], validate=False)
    for name, query in SMRIPREP.items():
        found = layout.get(
            subject=person,
            datatype="anat",
            space=None,
            extension=[".nii.gz", ".nii"],
            **query,
        )
        assert len(found) == (3 if name == "tpms" else 1), [x.filename for x in found]


def test_smriprep_takes_all_and_masks_the_head(made, person, tmp_path):
    """Its own query, and the node that failed where the mask had another grid than the head."""
    bids = pytest.importorskip("smriprep.utils.bids", reason="smriprep is not installed")
    nodes = pytest.importorskip("niworkflows.interfaces.nibabel")
    found = bids.collect_derivatives(made[0], person, [])
    assert [name for name in SMRIPREP if f"t1w_{name}" not in found] == []
    suffixes = [path.split("_label-")[1] for path in found["t1w_tpms"]]
    assert suffixes == [f"{tissue}_probseg.nii.gz" for tissue in ("GM", "WM", "CSF")]
    masked = nodes.ApplyMask(in_file=found["t1w_preproc"], in_mask=found["t1w_mask"])
    done = masked.run(cwd=str(tmp_path)).outputs.out_file
    inside = values(nib.load(found["t1w_mask"])) > 0
    assert (values(nib.load(done))[~inside] == 0).all()
    assert (values(nib.load(done))[inside] > 0).mean() > 0.99


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::DeprecationWarning")
def test_smriprep_builds_a_workflow_that_makes_nothing_again(made, person):
    """Neither brain extraction nor FAST are in it; it registers, and runs no FreeSurfer here."""
    bids = pytest.importorskip("smriprep.utils.bids", reason="smriprep is not installed")
    from niworkflows.utils.spaces import Reference, SpatialReferences
    from smriprep.workflows.anatomical import init_anat_fit_wf

    out, scans = made
    spaces = SpatialReferences(["MNIColin27"])
    spaces.checkpoint()
    workflow = init_anat_fit_wf(
        bids_root=str(out),
        output_dir=str(out),
        freesurfer=False,
        hires=False,
        longitudinal=False,
        msm_sulc=False,
        t1w=[str(scans[person])],
        t2w=[],
        skull_strip_mode="force",
        skull_strip_template=Reference("MNIColin27"),
        spaces=spaces,
        precomputed=bids.collect_derivatives(out, person, ["MNIColin27"]),
        omp_nthreads=1,
    )
    names = workflow.list_node_names()
    assert "apply_mask" in names
    nodes = {name.split(".")[0] for name in names}
    made_again = {"anat_template_wf", "brain_extraction_wf", "n4_only_wf", "fast"}
    saved_again = {f"ds_{what}_wf" for what in ("template", "t1w_mask", "dseg", "tpms")}
    assert nodes & (made_again | saved_again) == set()
    assert "register_template_wf" in nodes  # no transform was made here


def test_nibabies_takes_what_is_linked_for_it(made, person, tmp_path):
    """It wants ``space-T1w`` in names; docs/clients.md shows the links."""
    bids = pytest.importorskip("nibabies.utils.derivatives", reason="nibabies is not installed")
    anat = tmp_path / f"sub-{person}" / "anat"
    anat.mkdir(parents=True)
    (tmp_path / "dataset_description.json").symlink_to(made[0] / "dataset_description.json")
    names = {"desc-preproc_T1w": "", "desc-brain_mask": "space-T1w_", "dseg": "space-T1w_"}
    names |= {f"label-{tissue}_probseg": "space-T1w_" for tissue in ("GM", "WM", "CSF")}
    for name, space in names.items():
        source = made[0] / f"sub-{person}" / "anat" / f"sub-{person}_{name}.nii.gz"
        (anat / f"sub-{person}_{space}{name}.nii.gz").symlink_to(source)
    plain = bids.collect_anatomical_derivatives(made[0], person, [], None)
    assert {*plain} == {"t1w_preproc", "transforms"}  # and nothing that it would misread
    found = bids.collect_anatomical_derivatives(tmp_path, person, [], None)
    assert {"t1w_preproc", "t1w_mask", "t1w_dseg", "t1w_tpms"} <= {*found}
    assert len(found["t1w_tpms"]) == 3


def test_results_up_to_revision_8_are_known(made, tiny_model, tmp_path):
    """Pages show them, another run refuses them in one line, and ``--overwrite`` removes them."""
    source, person, out = made[0] / "sub-01" / "anat", "sub-01", tmp_path / "out"
    anat = out / person / "anat"
    anat.mkdir(parents=True)
    (out / "dseg.tsv").write_bytes((made[0] / "seg-cadiff_dseg.tsv").read_bytes())
    before = {
        "res-1_desc-brain_T1w.nii.gz": "desc-preproc_T1w.nii.gz",
        "seg-cadiff_desc-structures_dseg.nii.gz": "seg-cadiff_dseg.nii.gz",
        "desc-brain_mask.nii.gz": None,
    }
    rows = [
        "\t".join(
            "n/a" if cell is None else str(cell)
            for cell in (row.code, row.name, "X", row.mm3, None)
        )
        for row in next(finished(made[0])).rows()
    ]
    header = "index\tname\tabbreviation\tvolume-mm3\texpected-dice"
    anat.joinpath(f"{person}_desc-volumetric_morph.tsv").write_text("\n".join((header, *rows)))
    for name, earlier in before.items():
        shutil.copy(source / f"{person}_{name}", anat / f"{person}_{earlier or name}")
    sidecar = json.loads((source / f"{person}_seg-cadiff_desc-structures_dseg.json").read_text())
    sidecar["Settings"]["revision"] = 8
    sidecar["Fingerprint"] = fingerprint(sidecar["Settings"])
    (anat / f"{person}_seg-cadiff_dseg.json").write_text(json.dumps(sidecar))

    template = load_template(EMBEDDED, offline=True)
    recipe = make_recipe(QUICK, [template], tiny_model.info.name, tiny_model.info.sha256, None)
    (now, *_), (result,) = finished(made[0]), finished(out)
    assert now.provenance.differs(recipe) == ""
    assert result.provenance.differs(recipe) == f"revision 8 -> {REVISION}"
    assert [(x.name, x.mm3) for x in result.rows()] == [(x.name, x.mm3) for x in now.rows()]
    views, today = read_views(out, result), read_views(made[0], now)
    assert not views.whole
    assert today.whole
    np.testing.assert_array_equal(views.labels.data, today.labels.data)
    place = Derivatives(out, Path(f"{person}_T1w.nii.gz"))
    assert len(place.existing()) == 5
    place.clear()
    save_table(out, tiny_model.parcellation)
    assert [*anat.iterdir()] == []
    assert not (out / "dseg.tsv").exists()


def test_label_maps_say_that_they_are(made, image):
    """NiiVue draws labels by the header's intent; a map of probabilities or a mask is none."""
    for name in ("seg-cadiff_desc-structures_dseg", "dseg"):
        assert image(name).header["intent_code"] == 1002
    for name in ("seg-cadiff_probseg", "desc-preproc_T1w", "label-GM_probseg"):
        assert image(name).header["intent_code"] == 0


def lut_path(out, ending):
    return out / "luts" / f"seg-cadiff_{ending}"


def lut(out, ending):
    """Lines of a file of colours."""
    return lut_path(out, ending).read_text().splitlines()


def test_colours_are_the_tables_in_every_format(made, parcellation):
    """By the grammar of each: columns between blanks; ITK-SNAP's names in quotes."""
    expected = {
        s.code: (s.name, *bytes.fromhex(s.color.removeprefix("#"))) for s in parcellation.structures
    }
    plain = [line.split() for line in lut(made[0], "FreeSurferColorLUT.txt")]
    rows = [line for line in plain if line[0].isdigit()]
    assert rows.pop(0) == ["0", "Unknown", "0", "0", "0", "0"]
    assert {int(c): (n, *map(int, rgb)) for c, n, *rgb, _ in rows} == expected
    assert {row[-1] for row in rows} == {"0"}
    rows = [line.split() for line in lut(made[0], "fsleyes.lut")]
    found = {int(c): (n, *(round(255 * float(x)) for x in rgb)) for c, *rgb, n in rows}
    assert found == expected
    rows = [shlex.split(line, comments=True) for line in lut(made[0], "itksnap.txt")]
    rows = [row for row in rows if row]
    assert [*map(int, rows.pop(0)[:4])] == [0, 0, 0, 0]
    assert {int(row[0]): (row[7], *map(int, row[1:4])) for row in rows} == expected
    assert {tuple(row[4:7]) for row in rows} == {("1", "1", "1")}
    lists = json.loads(lut_path(made[0], "niivue.json").read_text())
    rows = zip(lists["I"], lists["labels"], lists["R"], lists["G"], lists["B"], strict=True)
    assert next(rows) == (0, "", 0, 0, 0)
    assert {code: tuple(row) for code, *row in rows} == expected


def test_mne_reads_the_colours(made, parcellation):
    mne = pytest.importorskip("mne", reason="mne is not installed")
    codes, colours = mne.read_freesurfer_lut(lut_path(made[0], "FreeSurferColorLUT.txt"))
    assert {name: code for name, code in codes.items() if code} == {
        s.name: s.code for s in parcellation.structures
    }
    assert [*colours["Left-Putamen"][:3]] == [236, 13, 176]


def test_surfa_reads_the_colours(made, parcellation):
    surfa = pytest.importorskip("surfa", reason="surfa is not installed")
    found = surfa.load_label_lookup(str(lut_path(made[0], "FreeSurferColorLUT.txt")))
    for s in parcellation.structures:
        assert found[s.code].name == s.name
        assert [*found[s.code].color[:3]] == [*bytes.fromhex(s.color[1:])]


def test_mrtrix_reads_the_colours(made, image, parcellation, tmp_path):
    """FreeSurfer's format and ITK-SNAP's: it finds each structure by its name."""
    if (program := shutil.which("labelconvert")) is None:
        pytest.skip("labelconvert is not in PATH (apt-get install mrtrix3)")
    name = "seg-cadiff_desc-structures_dseg"
    labels, target = values(image(name)), tmp_path / "target.txt"
    drawn = [s for s in parcellation.structures if (labels == s.code).any()]
    target.write_text("".join(f"{n} {s.name}\n" for n, s in enumerate(drawn, start=1)))
    for ending in ("FreeSurferColorLUT.txt", "itksnap.txt"):
        source = image(name).get_filename()
        nodes = tmp_path / f"{ending}.nii"
        call = [program, "-quiet", source, lut_path(made[0], ending), target, nodes]
        subprocess.run(call, check=True)
        found = values(nib.load(nodes))
        for node, structure in enumerate(drawn, start=1):
            assert ((found == node) == (labels == structure.code)).all()


def test_niivue_draws_the_colours(made, tmp_path):
    """As ``tools/niivue_check.py`` does on a real result."""
    program = os.environ.get("CADIFF_NIIVUE")
    if not program:
        pytest.skip("no NiiVue (npm pack @niivue/niivue; CADIFF_NIIVUE=package/dist/index.js)")
    files = niivue_check.Files.of(made[0])
    places = niivue_check.deepest(nib.load(files.labels))
    with niivue_check.niivue(Path(program), files) as page:
        assert list(niivue_check.differences(page, files, places)) == []


def test_a_unit_is_written_where_the_scan_has_none(made, image, tmp_path):
    """Other programs would guess; we took it to be mm."""
    scan = nib.load(made[1]["01"])
    scan.header.set_xyzt_units("unknown", "unknown")
    nib.save(nib.Nifti1Image(values(scan), None, scan.header), tmp_path / "scan.nii")
    given = load_scan(tmp_path / "scan.nii").t1
    save_volume(tmp_path / "out.nii", given.data, given.grid, like=tmp_path / "scan.nii")
    assert nib.load(tmp_path / "out.nii").header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize(
    ("layout", "separator", "first", "names"),
    [
        ("enigma", ",", "SubjID", {"Lhippo": "Left-Hippocampus", "ICV": "Brain-Mask"}),
        (
            "freesurfer",
            "\t",
            "Measure:volume",
            {"Left-Thalamus": "Left-Thalamus", "lhCortexVol": "Left-Cerebral-Cortex"},
        ),
        ("synthseg", ",", "subject", {"right caudate": "Right-Caudate"}),
    ],
    ids=["enigma", "freesurfer", "synthseg"],
)
def test_volumes_in_the_layouts_of_others(made, layout, separator, first, names, tmp_path):
    path = tmp_path / "table"
    arguments = ["export", str(made[0]), "--format", layout, "-o", str(path)]
    assert guarded(lambda: cadiff.main(arguments, standalone_mode=False)) == 0
    rows = list(csv.DictReader(path.read_text().splitlines(), delimiter=separator))
    assert [row[first] for row in rows] == ["sub-01", "sub-02", "sub-03"]
    for result, row in zip(finished(made[0]), rows, strict=True):
        own = {x.name: x.mm3 for x in result.rows()}
        for column, name in names.items():
            assert float(row[column]) == pytest.approx(own[name], abs=1e-3)
        if layout == "freesurfer":  # which counts vessels, but neither brain stem nor chiasm
            whole = (
                own["Brain-Segmentation"] + own.get("Left-vessel", 0) + own.get("Right-vessel", 0)
            )
            lacking = own["Brain-Stem"] + (own.get("Optic-Chiasm") or 0)
            assert float(row["BrainSegVol"]) == pytest.approx(whole - lacking, abs=0.1)
        for column in ("Vermis", "vermis"):
            if column in row:
                parts = [mm3 for name, mm3 in own.items() if "Vermal" in name]
                assert float(row[column]) == pytest.approx(sum(parts), abs=0.01)
        # These scans are stripped: they do not show the skull.
        unknown = {"synthseg": ["csf"], "freesurfer": ["EstimatedTotalIntraCranialVol"]}
        assert [name for name in row if row[name] == "NA"] == unknown.get(layout, [])
    assert guarded(lambda: cadiff.main(arguments, standalone_mode=False)) == 73


MADE_SO = re.compile('"Fingerprint": "([0-9a-f]{12})"')


def test_an_export_names_scans_without_a_row(made, tmp_path, capsys):
    """And links that lead in circles cost nobody a row."""
    out = shutil.copytree(made[0], tmp_path / "out")
    (out / "sub-x").symlink_to("sub-x")
    (out / "sub-01" / "ses-x").symlink_to("ses-x")
    journal = out / "logs" / "journal"
    journal.mkdir(parents=True, exist_ok=True)
    (journal / "sub-04.json").write_text("{}")
    arguments = ["export", str(out), "--format", "synthseg", "-o", str(tmp_path / "table")]
    assert guarded(lambda: cadiff.main(arguments, standalone_mode=False)) == 0
    told = capsys.readouterr()
    assert "3 rows" in told.out
    assert "sub-04 has no row" in told.err
    assert "different ways" not in told.err
    first, second = (result.sidecar for result in list(finished(out))[:2])
    first.write_text(first.read_text().replace(MADE_SO.search(first.read_text())[1], "f" * 12))
    second.write_text('{"a')
    assert guarded(lambda: cadiff.main([*arguments, "--overwrite"], standalone_mode=False)) == 0
    told = capsys.readouterr()
    assert "2 rows" in told.out
    assert "made in 2 different ways" in told.err
    description = out / "dataset_description.json"
    description.write_text("{bad")
    arguments[4:] = []
    assert guarded(lambda: cadiff.main(arguments, standalone_mode=False)) == 73
    assert guarded(lambda: cadiff.main(["report", str(out)], standalone_mode=False)) == 73
    assert not (out / "export").exists()


def test_the_command_offers_every_layout():
    assert set(FORMATS) == set(LAYOUTS)


def test_every_export_knows_only_volumes_that_there_are(made):
    """A misspelt name would be an empty column."""
    known = {row.name for row in next(finished(made[0])).rows()} | {HEAD_SIZE}
    for layout in LAYOUTS.values():
        for measure in layout.columns.values():
            assert {*([measure] if isinstance(measure, str) else measure)} <= known
    assert len(LAYOUTS["enigma"].columns) == 17
    assert len(LAYOUTS["synthseg"].columns) == 34


def test_nilearn_measures_in_the_labels(image):
    """Its masker wants image and labels on one grid, or resamples."""
    from nilearn.maskers import NiftiLabelsMasker

    head, labels = image("desc-preproc_T1w"), image("seg-cadiff_desc-structures_dseg")
    masker = NiftiLabelsMasker(labels, resampling_target=None, standardize=None, verbose=0)
    found = np.ravel(masker.fit_transform(nib.Nifti1Image(values(head)[..., None], head.affine)))
    codes = np.unique(values(labels))[1:]
    expected = [values(head)[values(labels) == code].mean() for code in codes]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_ants_sees_one_grid(made, person):
    import ants

    anat = made[0] / f"sub-{person}" / "anat"
    names = ("desc-preproc_T1w", "desc-brain_mask", "seg-cadiff_desc-structures_dseg", "dseg")
    head, *others = (ants.image_read(str(anat / f"sub-{person}_{name}.nii.gz")) for name in names)
    for other in others:
        assert ants.image_physical_space_consistency(head, other)
