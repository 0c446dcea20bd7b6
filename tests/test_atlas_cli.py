"""``cadiff atlas make`` as a person meets it: folders, and errors of one line."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from atlas_model import make_base
from test_atlas import write_base

from cadiff_cli.cli import cadiff, guarded
from cadiff_cli.config import Config, Request, StripConfig
from cadiff_cli.io import models
from cadiff_cli.io.files import sha256
from cadiff_cli.io.templates import load_template
from cadiff_cli.nets.atlas import AtlasConfig, AtlasNet
from cadiff_cli.nets.brain_mask import BrainConfig, BrainNet
from cadiff_cli.nets.condition import ConditionSpace
from cadiff_cli.nets.models import AtlasModel, BrainModel
from cadiff_cli.products import Person
from cadiff_cli.runner.job import job_of


@pytest.fixture(scope="module")
def weights(phantom, toy_template, tmp_path_factory):
    """A small network that nobody trained, as a file; it deforms the phantom."""
    folder = tmp_path_factory.mktemp("base")
    _, law = make_base(phantom, toy_template, folder / "tpl-toybase", write_base)
    torch.manual_seed(0)
    net = AtlasNet(AtlasConfig(shape=(20, 24, 20), components=2, width=16, depth=1, heads=2))
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if not tensor.any():
                tensor.normal_(std=0.1)
    model = AtlasModel(
        net,
        base=law.base,
        grid=law.grid.working(4.0).crop((-1, -1, -1), (20, 24, 20)),
        space=ConditionSpace((20.0, 90.0), (0.5, 6.0), (0.6, 0.0, 0.0), 0.1),
        labels=law.labels,
    )
    models.save(folder / "untrained.safetensors", model)
    return folder / "untrained.safetensors"


@pytest.fixture
def make(weights, capsys):
    """Run the command: (exit code, lines of stdout, stderr)."""

    def run(*arguments, model=weights):
        words = ["atlas", "make", "--model", *map(str, (model, *arguments))]
        code = guarded(lambda: cadiff.main(words, prog_name="cadiff", standalone_mode=False))
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return run


def test_a_folder_and_a_page_for_an_age(make, tmp_path):
    code, lines, err = make("--age", "72", "--sex", "F", "-o", tmp_path)
    assert (code, err) == (0, "")
    folder = tmp_path / "tpl-untrained" / "cohort-age72F"
    assert lines == [str(folder), str(tmp_path / "tpl-untrained_cohort-age72F.html")]
    template = load_template(str(folder))
    assert template.name == "untrained:cohort-age72F"
    assert template.condition.sex == "F"
    told = json.loads((folder / "template_description.json").read_text())
    assert len(told["Model"]["WeightsSHA256"]) == 64
    # It is there now.
    code, _, err = make("--age", "72", "--sex", "F", "-o", tmp_path)
    assert code == 73
    assert "--overwrite" in err
    code, lines, _ = make("--age", "72", "--sex", "F", "-o", tmp_path, "--overwrite", "--no-report")
    assert (code, lines) == (0, [str(folder)])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 64, "no condition is given. give --age, --sex or --ventricles"),
        (["--age", "120"], 64, "20 to 90 years"),
        (["--age", "20:120:50"], 64, "20 to 90 years"),
        (["--age", "20-90"], 64, "FROM:TO:STEP"),
        (["--age", "40", "--ventricles", "5.9"], 64, "contradict age 40"),
        (["--ventricles", "60"], 64, "0.5 to 6"),
        (["--ventricles", "0"], 64, "--ventricles"),
        (["--sex", "X"], 64, "--sex"),
        (["--age", "40", "--samples", "1"], 64, "--samples"),
    ],
)
def test_conditions_that_make_no_sense(make, tmp_path, arguments, code, words):
    found, _, err = make(*arguments, "-o", tmp_path / "out")
    assert found == code
    assert words.lower() in err.lower()
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_weights_are_refused(make, tiny_weights, tmp_path):
    code, _, err = make("--age", "40", "-o", tmp_path, model=tiny_weights)
    assert code == 65
    assert "has format" in err
    code, _, err = make("--age", "40", "-o", tmp_path, model="cadiff-atlantis")
    assert code == 66
    assert "no model at" in err
    assert "cadiff-atlas," in err
    assert "cadiff-malc" not in err  # another kind of network


def test_a_file_in_the_way(make, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, _, err = make("--age", "40", "-o", tmp_path / "out")
    assert code == 73
    assert "cannot write" in err


def test_jobs_of_people_travel_to_workers(weights, tiny_weights, tmp_path):
    """Without the wish's network, which only the planning process loads."""
    request = Request(
        template="conditional", model=str(tiny_weights), atlas_model=str(weights), offline=True
    )
    job = job_of(request, tmp_path)[0].personal(Person(71.6, "M"))
    assert pickle.loads(pickle.dumps(job)) == job
    assert job.templates == str(tmp_path / "templates" / "tpl-untrained" / "cohort-age72M")
    job.atlas.provide(tmp_path)
    assert load_template(job.templates).name == job.recipe.template == "untrained:cohort-age72M"


def test_files_of_networks_are_found_from_anywhere(weights, tiny_weights, tmp_path, monkeypatch):
    """A worker may have another working folder than who planned its job."""
    brain = tmp_path / "brain.safetensors"
    models.save(brain, BrainModel(BrainNet(BrainConfig((8, 8), (8, 8))), "brain"))
    monkeypatch.chdir(tmp_path)
    files = [Path(os.path.relpath(file, tmp_path)) for file in (tiny_weights, weights, brain)]
    model, atlas_model, strip_model = map(str, files)
    request = Request(
        config=Config(StripConfig(model=strip_model)),
        template="conditional",
        model=model,
        atlas_model=atlas_model,
        offline=True,
    )
    job = job_of(request, tmp_path)[0]
    told = (job.weights, job.conditional.model, job.recipe.config.strip.model)
    assert [Path(name).is_absolute() for name in told] == [True] * 3
    assert [Path(name).resolve() for name in told] == [file.resolve() for file in files]
    other = replace(request, config=Config())
    assert (
        job.recipe.strip_sha256 == sha256(brain) != job_of(other, tmp_path)[0].recipe.strip_sha256
    )
