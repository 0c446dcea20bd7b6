"""The released weights on whole brains: nilearn's atlas, and people whose labels are known."""

import numpy as np
import pytest
from conftest import threads

from cadiff_cli.config import Config, RegisterConfig, SampleConfig
from cadiff_cli.io import models
from cadiff_cli.io.images import load_scan, load_volume, save_volume
from cadiff_cli.io.label_maps import load_classes
from cadiff_cli.io.templates import EMBEDDED, PREFERRED, load_template, load_templates
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.nets.models import Model
from cadiff_cli.pipeline import run
from cadiff_cli.spatial.grid import Grid
from cadiff_cli.spatial.resample import check_same_grid
from cadiff_cli.stages.register import rigid
from cadiff_cli.stages.segment import segment

pytestmark = [
    pytest.mark.slow,
    # MONAI warns of its own call of its own function.
    pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning"),
]

PERSON, ANOTHER = "malc/sub-1122/ses-1", "malc/sub-1107/ses-1"
QUICK = Config(sample=SampleConfig(steps=1))
"""As good as five steps (docs/results.md)."""


@pytest.fixture(scope="module", autouse=True)
def _all_threads():
    with threads():
        yield


@pytest.fixture(scope="module")
def t1_of(shared):
    """A factory: path of the one T1w image in a folder of real data."""

    def find(folder):
        (t1,) = sorted(shared(folder).rglob("*_T1w.nii.gz"))
        return t1

    return find


@pytest.fixture(scope="module")
def templates(shared):
    """Those of a default run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPLATEFLOW_HOME", str(shared("templateflow")))
        found = load_templates(offline=True)
    assert [template.name for template in found] == [PREFERRED, EMBEDDED]
    return found


@pytest.fixture(scope="module")
def default_run(released, t1_of, templates, tmp_path_factory):
    """A person with default settings; what is prepared for one network serves another as well."""
    work = tmp_path_factory.mktemp("work")
    return run(load_scan(t1_of(PERSON)), templates, models.load(Model), Config(), work)


@pytest.fixture(scope="module")
def mean_dice(shared, parcellation):
    """Mean over the paper's structures, against the label map in a folder of real data."""

    def score(segmentation, folder, ids):
        (dseg,) = sorted(shared(folder).rglob("*_dseg.nii.gz"))
        mapping = load_scheme(ids, parcellation)
        truth = load_classes(dseg, parcellation, mapping, option="ids")
        check_same_grid("labels", segmentation.labels.grid, dseg.name, truth.grid)
        scored = sorted({*parcellation.subset("malc27")} & {*parcellation.reached(mapping)})
        assert len(scored) > 20
        drawn = parcellation.encode(segmentation.labels.data, parcellation.class_of)
        return np.nanmean(dice(drawn, truth.data, scored))

    return score


def test_the_atlas_brain_is_segmented(released, tmp_path, parcellation):
    template = load_template(EMBEDDED, offline=True)
    path = tmp_path / "sub-mni_T1w.nii.gz"
    save_volume(path, template.brain.data, template.brain.grid)
    # The scan is the template: nothing has to be bent.
    config = Config(register=RegisterConfig("affine"), sample=SampleConfig(steps=1, flip=False))
    result = run(load_scan(path), [template], models.load(Model), config, tmp_path)

    volumes = result.volumes_mm3
    wanted = [parcellation.structures[k - 1] for k in parcellation.subset("malc27")]
    assert all(volumes[s.code] > 0 for s in wanted), [s.name for s in wanted if not volumes[s.code]]
    for s in wanted:
        assert volumes[s.code] == pytest.approx(volumes[s.mirror], rel=0.25), s.name
    assert 1.2e6 < sum(volumes.values()) < 2.2e6
    labels = result.segmentation.labels
    for s in wanted:
        if s.name.startswith("Left"):
            x = labels.grid.to_world(np.argwhere(labels.data == s.code))[:, 0]
            assert x.mean() < 0, s.name


def test_a_labelled_person_is_segmented(default_run, mean_dice):
    assert mean_dice(default_run.segmentation, PERSON, "neuromorphometrics") > 0.86


def test_a_network_that_has_seen_no_image_segments_a_person(default_run, mean_dice):
    """It has learnt from painted brains."""
    model, prepared = models.load(Model, "cadiff-synth"), default_run.prepared
    found = segment(prepared.scan, prepared.conditions, default_run.mask, model, QUICK)
    assert mean_dice(found, PERSON, "neuromorphometrics") > 0.72


def test_a_whole_head_of_another_scanner_is_segmented(released, t1_of, mean_dice, tmp_path):
    """At 2 mm, never trained on, and a machine's labels."""
    folder, template = "heads/nichart/sub-Subj18", load_template(EMBEDDED, offline=True)
    result = run(load_scan(t1_of(folder)), [template], models.load(Model), QUICK, tmp_path)
    assert mean_dice(result.segmentation, folder, "dlmuse") > 0.75


def test_another_persons_brain_is_a_template(released, t1_of, mean_dice, tmp_path):
    """It is laid upright, as templates are, and its frame is measured."""
    brain, place = load_volume(t1_of(ANOTHER)), tmp_path / "tpl-another"
    motion = rigid(brain, load_template(EMBEDDED, offline=True).brain)
    place.mkdir()
    upright = Grid(brain.grid.shape, motion @ brain.grid.affine)
    save_volume(place / "tpl-another_T1w.nii.gz", brain.data, upright)
    template = load_template(str(place))
    result = run(load_scan(t1_of(PERSON)), [template], models.load(Model), QUICK, tmp_path)
    assert mean_dice(result.segmentation, PERSON, "neuromorphometrics") > 0.84
