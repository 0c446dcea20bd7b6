"""The released weights on whole brains: nilearn's atlas, and a labelled person."""

import numpy as np
import pytest

from cadiff_cli.config import Config, SampleConfig
from cadiff_cli.evaluation.scores import score_pair
from cadiff_cli.evaluation.tables import summarise
from cadiff_cli.io import models
from cadiff_cli.io.images import load_scan, save_volume
from cadiff_cli.io.templates import EMBEDDED, PREFERRED, load_template, load_templates
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.nets.models import Model
from cadiff_cli.pipeline import run

pytestmark = [
    pytest.mark.slow,
    # MONAI warns of its own call of its own function.
    pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning"),
]


def test_the_atlas_brain_is_segmented(released, tmp_path, all_threads, parcellation):
    template = load_template(EMBEDDED, offline=True)
    path = tmp_path / "sub-mni_T1w.nii.gz"
    save_volume(path, template.brain.data, template.brain.grid)
    config = Config(sample=SampleConfig(flip=False))
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


@pytest.mark.parametrize(
    ("model", "folder", "ids", "least"),
    [
        ("cadiff-malc", "malc/sub-1122/ses-1", "neuromorphometrics", 0.86),
        # Another scanner, a whole head at 2 mm, never trained on, and a machine's labels.
        ("cadiff-malc", "heads/nichart/sub-Subj18", "dlmuse", 0.75),
        # A network that has seen no image of anybody.
        ("cadiff-synth", "malc/sub-1122/ses-1", "neuromorphometrics", 0.72),
    ],
    ids=["trained on", "another scanner", "painted brains"],
)
def test_a_labelled_person_is_segmented(
    released, shared, tmp_path, all_threads, monkeypatch, parcellation, model, folder, ids, least
):
    (t1,) = sorted(shared(folder).rglob("*_T1w.nii.gz"))
    (dseg,) = sorted(shared(folder).rglob("*_dseg.nii.gz"))
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(shared("templateflow")))
    templates = load_templates(offline=True)
    assert [template.name for template in templates] == [PREFERRED, EMBEDDED]
    result = run(load_scan(t1), templates, models.load(Model, model), Config(), tmp_path)
    labels = result.segmentation.labels
    path = tmp_path / "sub-01_seg-cadiff_dseg.nii.gz"
    save_volume(path, labels.data, labels.grid, like=t1)
    scores = score_pair(path, dseg, parcellation, "malc27", load_scheme(ids, parcellation))
    (scan,) = summarise(scores, "scan", ["dice"])
    assert scan.mean["dice"] > least
