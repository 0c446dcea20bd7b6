"""A second parcellation goes through everything that the shipped one goes through."""

import csv
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from bids_dataset import here
from conftest import TINY, awake
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import TABLES, segmented_alone

from cadiff_cli.errors import DataError, OutputError
from cadiff_cli.io import models
from cadiff_cli.io.bids.layout import Derivatives, finished
from cadiff_cli.io.bids.tables import parcellation_of, save_table
from cadiff_cli.labels.parcellation import (
    BASE,
    base_volumes,
    load_parcellation,
    parse,
    shipped_names,
)
from cadiff_cli.nets.models import Model
from cadiff_cli.quality.ranges import load_ranges
from cadiff_cli.runner.group import known_scans, write_group


@pytest.fixture(scope="module")
def lobes_weights(lobes, tmp_path_factory):
    """A random network that draws ``lobes``, as a file."""
    path = tmp_path_factory.mktemp("weights") / "lobes.safetensors"
    net = awake(replace(TINY, n_classes=lobes.n_classes))
    models.save(path, Model(net, parcellation=lobes))
    return path


@pytest.fixture(scope="module")
def out(phantom, lobes_weights, tmp_path_factory):
    """The folder of one run from file to files."""
    folder = tmp_path_factory.mktemp("lobes")
    head = phantom("RAS", (2.0, 2.0, 2.0), scale=0.4)
    _, out = segmented_alone(head, folder, lobes_weights, "--posteriors", "--uncertainty")
    return out


@pytest.fixture(scope="module")
def dseg(out):
    return out / "sub-01" / "anat" / "sub-01_seg-lobes_desc-structures_dseg.nii.gz"


def codes_of(path):
    return np.asarray(nib.load(path).dataobj)


def test_weights_carry_a_parcellation_that_is_not_shipped(lobes, lobes_weights):
    assert models.load(Model, str(lobes_weights)).parcellation == lobes


def test_weights_name_a_parcellation_that_is(tiny_weights, parcellation, tmp_path):
    """Those that are older than names are of ``cadiff40``; an unknown name is refused."""
    with safe_open(tiny_weights, framework="pt") as stored:
        described = json.loads(stored.metadata()["cadiff"])
    assert described["parcellation"] == BASE
    assert "table" not in described
    path = tmp_path / "again.safetensors"
    for name, message in (("", ""), ("unheard", "'unheard'")):
        told = {key: value for key, value in described.items() if key != "parcellation"}
        told |= {"parcellation": name} if name else {}
        save_file(load_file(tiny_weights), path, {"cadiff": json.dumps(told)})
        if message:
            with pytest.raises(DataError, match=message) as caught:
                models.load(Model, str(path))
            assert caught.value.remedy
        else:
            assert models.load(Model, str(path)).parcellation == parcellation


def test_files_are_named_after_the_parcellation(out, dseg, lobes):
    names = {path.name.removeprefix("sub-01_").split(".")[0] for path in dseg.parent.iterdir()}
    maps = {dseg.name.removeprefix("sub-01_").removesuffix(".nii.gz"), "seg-lobes_probseg"}
    maps |= {"dseg", "seg-lobes_desc-uncertainty_probseg"}
    maps |= {f"label-{tissue}_probseg" for tissue in ("GM", "WM", "CSF")}
    images = {"desc-preproc_T1w", "desc-brain_mask", "res-1_desc-brain_T1w"}
    assert names == {*images, *TABLES, *maps}
    sidecar = json.loads(dseg.with_suffix("").with_suffix(".json").read_text())
    assert sidecar["Parcellation"] == "lobes"
    # The codes are explained beside, and cadiff40's, which nothing holds, are not.
    assert load_parcellation(out / "seg-lobes_dseg.tsv") == parcellation_of(dseg) == lobes
    assert not [*out.glob("*cadiff_dseg.tsv")]


@pytest.mark.parametrize("name", shipped_names())
def test_a_table_is_written_for_every_scan_of_a_dataset(tmp_path, name):
    parcellation, written = load_parcellation(name), []
    for _ in range(2):
        save_table(tmp_path, parcellation)
        (path,) = tmp_path.glob("*_dseg.tsv")
        written.append(path.read_text())
    assert written[0] == written[1]
    codes = [line.split("\t")[0] for line in written[0].splitlines()[1:]]
    assert codes == [str(code) for code in parcellation.codes]


def test_a_table_of_other_names_is_refused(tmp_path, lobes):
    save_table(tmp_path, lobes)
    path = tmp_path / "seg-lobes_dseg.tsv"
    recoloured = lobes.as_tsv().replace("#cd3e4e", "#000001")
    save_table(tmp_path, parse("lobes", recoloured))  # the same structures
    before = path.read_bytes()
    with pytest.raises(OutputError, match="another parcellation"):
        save_table(tmp_path, parse("lobes", lobes.as_tsv().replace("Front", "Side")))
    assert path.read_bytes() == before


def test_labels_and_volumes_are_the_parcellations(dseg, lobes):
    present = {*np.unique(codes_of(dseg)).tolist()} - {0}
    assert present
    assert present <= {*lobes.class_of}
    with dseg.with_name("sub-01_desc-volumetric_morph.tsv").open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream, delimiter="\t")}
    mm3 = np.prod(nib.load(dseg).header.get_zooms())
    for s in lobes.structures:
        count = np.count_nonzero(codes_of(dseg) == s.code)
        assert float(rows[s.name]["volume_mm3"]) == pytest.approx(count * mm3)


def test_pages_and_the_group_table_are_the_parcellations(out, lobes):
    (result,) = finished(out)
    assert result.parcellation == lobes
    assert "Left-Front" in (out / "sub-01.html").read_text()
    group = write_group(out, known_scans(out))
    assert not group.missing
    assert group.parcellation == lobes
    with group.path.open() as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert {"left_front", "right_back", "brain_stem"} <= {*row}
    assert "left_thalamus" not in row


def score(tmp_path, *arguments):
    """Rows of ``evaluation.tsv``."""
    done = here("evaluate", *map(str, arguments), "-o", str(tmp_path), "--overwrite")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "evaluation.tsv").open() as stream:
        return {row["structure"]: row for row in csv.DictReader(stream, delimiter="\t")}


def test_fine_label_maps_are_scored_fine_and_coarse(dseg, lobes, tmp_path):
    present = {s.name for s in lobes.structures if (codes_of(dseg) == s.code).any()}
    scores = score(tmp_path, dseg, dseg, "--labels", "all", "--reference-labels", "cadiff")
    assert {name for name, row in scores.items() if row["dice"] == "1.0000"} == present
    assert {
        *score(tmp_path, dseg, dseg, "--labels", "frontal", "--reference-labels", "cadiff")
    } == {
        "Left-Front",
        "Right-Front",
    }
    # The same labels as somebody else's cadiff40 have the parents' names.
    coarse, image = lobes.coarsen(codes_of(dseg)), nib.load(dseg)
    path = tmp_path / "sub-01_seg-cadiff_dseg.nii.gz"
    nib.save(nib.Nifti1Image(coarse.astype(np.int16), image.affine), path)
    scores = score(tmp_path, dseg, path, "--labels", "malc27", "--reference-labels", "cadiff")
    cortex = {"Left-Cerebral-Cortex", "Right-Cerebral-Cortex"}
    found = {name for name, row in scores.items() if row["dice"] == "1.0000"}
    assert found & cortex
    assert found <= cortex | {"Brain-Stem"}


def test_a_parcellation_without_parents_is_scored_in_its_own_structures(dseg, lobes, tmp_path):
    """Nothing in it corresponds to ``cadiff40``, so no score of ``cadiff40`` makes sense."""
    table = replace(
        lobes, name="regions", structures=tuple(replace(s, parent=None) for s in lobes.structures)
    )
    (tmp_path / "seg-regions_dseg.tsv").write_text(table.as_tsv())
    path = tmp_path / "sub-01_seg-regions_dseg.nii.gz"
    path.write_bytes(dseg.read_bytes())
    (tmp_path / "dataset_description.json").write_text("{}")
    present = {s.name for s in lobes.structures if (codes_of(dseg) == s.code).any()}
    scores = score(tmp_path, path, path, "--reference-labels", "cadiff")
    assert {name for name, row in scores.items() if row["dice"] == "1.0000"} == present
    done = here("evaluate", str(path), str(path), "--labels", "malc27")
    assert done.returncode == 64
    assert "unknown label subset 'malc27' of regions" in done.stderr


def test_a_rerun_with_another_parcellation_leaves_nothing(out, dseg, tmp_path):
    """Other programs' segmentations stay."""
    (tmp_path / "seg-lobes_dseg.tsv").write_bytes((out / "seg-lobes_dseg.tsv").read_bytes())
    place = Derivatives(tmp_path, dseg.with_name("sub-01_T1w.nii.gz"))
    place.folder.mkdir(parents=True)
    ours = ("seg-lobes_desc-structures_dseg", "seg-lobes_probseg", "label-GM_probseg", "dseg")
    for name in (*ours, "seg-cadiff_dseg", "seg-aseg_dseg"):
        place.path(f"{name}.json").write_text("{}")
    assert [path.name for path in place.sidecars] == [
        "sub-01_seg-cadiff_dseg.json",
        "sub-01_seg-lobes_desc-structures_dseg.json",
    ]
    place.clear()
    assert [path.name for path in place.folder.iterdir()] == ["sub-01_seg-aseg_dseg.json"]


def test_ranges_of_the_whole_brain_are_for_parcellations_of_it(lobes, parcellation):
    """Four lobes and a stem are no brain: their shares are others."""
    assert load_ranges(parcellation).people
    assert not load_ranges(lobes).people
    assert not load_ranges(lobes).percent_brain
    finer = tuple(replace(s, parent=s.code) for s in parcellation.structures)
    assert load_ranges(replace(parcellation, name="finer", structures=finer)) == load_ranges(
        parcellation
    )
    volumes = base_volumes({"Left-Front": 3.0, "Left-Back": 4.0, "Brain-Stem": 2.0}, lobes)
    assert volumes["Left-Cerebral-Cortex"] == 7
    assert volumes["Brain-Stem"] == 2
    assert "Right-Cerebral-Cortex" not in volumes, "of which no part is known"
