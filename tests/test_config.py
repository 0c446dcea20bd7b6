"""Settings: what decides a result is in its fingerprint, what does not is not, old ones stay."""

from dataclasses import fields, replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cadiff_cli.cli.options import made, options_of
from cadiff_cli.config import BRAIN_FOR, Config, Machine, Recipe, Request, StripConfig
from cadiff_cli.io.releases import BRAIN_FINDER, find_weights
from cadiff_cli.runner.job import job_of

CHANGED = {
    "strip.method": "none",
    "strip.mask": Path("mask.nii.gz"),
    "strip.model": "own.safetensors",
    "register.name": "affine",
    "register.seed": 1,
    "sample.steps": 1,
    "sample.seed": 1,
    "sample.samples": 2,
    "sample.flip": False,
    "sample.tile": 96,
    "output.codes": "freesurfer",
    "output.posteriors": True,
    "output.uncertainty": True,
    "output.parcellation": "nmm138",
    "output.field": True,
    "output.spaces": ("MNI152NLin2009cAsym",),
    "output.report": False,
}
"""Another value for every setting."""
DECIDE_NOTHING = {"output.report", "strip.model"}
"""Pages are made from results, and again at any time; a network's checksum counts, not its name."""
FINISHED = {
    None: "8762e2f71cef",
    "strip.method": "0fa16b03cdd4",
    "strip.mask": "8339bd9d9fb5",
    "register.name": "70dab0d317a5",
    "register.seed": "ffa45e03a8b4",
    "sample.steps": "ae7a5922cf7b",
    "sample.seed": "0a04abe7f02e",
    "sample.samples": "49471515dbfd",
    "sample.flip": "2f796feb4697",
    "sample.tile": "6491ce5852cb",
    "output.posteriors": "1502b548fe39",
    "output.uncertainty": "45af0d481230",
    "output.field": "ab9f3071868e",
    "output.spaces": "dbbe3823174e",
}
"""Fingerprints in sidecars that version 0.1.0 has written, by the setting that was changed."""


def changed(name):
    if name is None:
        return Config()
    part, key = name.split(".")
    inner = replace(getattr(Config(), part), **{key: CHANGED[name]})
    return replace(Config(), **{part: inner})


def fingerprint(config):
    return Recipe(config, "MNIColin27", "cadiff-malc", "0" * 64).fingerprint


def test_every_setting_has_another_value_here():
    """A new setting must be sorted in: does it decide a result?"""
    names = {f"{part.name}.{f.name}" for part in fields(Config) for f in fields(part.type)}
    assert names == set(CHANGED)


@pytest.mark.parametrize("name", sorted(set(CHANGED) - DECIDE_NOTHING))
def test_a_setting_that_decides_a_result_changes_its_fingerprint(name):
    assert fingerprint(changed(name)) != fingerprint(Config())


@pytest.mark.parametrize("name", sorted(DECIDE_NOTHING))
def test_a_setting_that_decides_no_result_does_not(name):
    assert fingerprint(changed(name)) == fingerprint(Config())


def test_the_content_of_the_strip_network_changes_the_fingerprint():
    recipe = Recipe(Config(), "MNIColin27", "cadiff-malc", "0" * 64, "1" * 64)
    assert replace(recipe, strip_sha256="2" * 64).fingerprint != recipe.fingerprint


def test_the_machine_is_no_part_of_the_settings():
    """Device and threads never change a fingerprint: they are not in what it is made from."""
    assert Machine not in {f.type for f in fields(Config)} | {f.type for f in fields(Recipe)}
    settings = str(Recipe(Config(), "x", "m", "0" * 64).settings())
    assert not [f.name for f in fields(Machine) if f.name in settings]


@pytest.mark.parametrize("name", FINISHED, ids=str)
def test_finished_results_stay_finished(name, monkeypatch):
    """However settings are arranged in the code, fingerprints are those of before."""
    monkeypatch.setattr("cadiff_cli.config.__version__", "0.1.0")
    monkeypatch.setattr("cadiff_cli.config.REVISION", 8)
    assert fingerprint(changed(name)) == FINISHED[name]


def test_own_age_ranges_change_the_fingerprint():
    """They decide percentiles; those that ship have those of before."""
    recipe = Recipe(Config(), "MNIColin27", "cadiff-malc", "0" * 64)
    assert replace(recipe, ranges="abc").fingerprint != recipe.fingerprint
    assert "ranges" not in recipe.settings()


@pytest.fixture
def parse():
    """What a command with the options of ``Request`` makes of words."""
    made_of = []

    @click.command()
    @options_of(Request)
    def command(**options):
        made_of.append(made(Request, options))

    def call(*words):
        answer = CliRunner().invoke(command, words)
        assert answer.exit_code == 0, answer.output
        return made_of.pop()

    return call


def test_without_options_settings_are_the_defaults(parse):
    assert parse() == Request()


@pytest.mark.parametrize("name", sorted({*CHANGED} - {"register.seed", "sample.seed"}))
def test_an_option_sets_its_field(parse, name):
    part, key = name.split(".")
    field = next(f for f in fields(getattr(Config(), part)) if f.name == key)
    (flag, *_), value = field.metadata["option"].names or (f"--{key}",), CHANGED[name]
    if isinstance(value, tuple):
        words = [flag, *value]
    elif isinstance(value, bool):
        words = [flag if value else f"--no-{flag[2:]}"]
    else:
        words = [flag, str(value)]
    assert parse(*words) == Request(config=changed(name))


def test_one_seed_serves_registration_and_noise(parse):
    for flag in ("--seed", "--random-seed"):
        config = parse(flag, "7").config
        assert (config.register.seed, config.sample.seed) == (7, 7)


def test_machine_and_names_are_options_too(parse):
    request = parse("--device", "cpu", "--threads", "2", "--model", "x", "--offline", "-w", "tmp")
    assert request.machine == Machine("cpu", 2)
    assert (request.model, request.offline, request.work_dir) == ("x", True, Path("tmp"))
    assert request.config == Config()


def test_spaces_are_wanted_once(parse):
    twice = parse("--output-spaces", "MNIColin27", "MNI152NLin2009cAsym", "MNIColin27")
    assert twice.config.output.spaces == ("MNIColin27", "MNI152NLin2009cAsym")


def test_the_order_of_spaces_is_no_setting(parse):
    names = ("MNIColin27", "MNI152NLin2009cAsym")
    one, other = (parse("--output-spaces", *order).config for order in (names, names[::-1]))
    assert fingerprint(one) == fingerprint(other)


def test_labels_of_any_contrast_come_with_a_brain_of_any_contrast(tmp_path):
    """Unless a network is named; Python programs get it as the command line does."""
    named = Config(strip=StripConfig(model="own.safetensors"))
    for model, wanted in (("cadiff-malc", "brain-mask"), ("cadiff-synth", "brain-mask-synth")):
        assert Config().for_model(model).strip.network == wanted
        assert named.for_model(model) == named
        job, _ = job_of(Request(model=model, template="MNI152NLin2009aSym"), tmp_path)
        assert job.recipe.config.strip.model == wanted
        assert job.recipe.strip_sha256 == find_weights(wanted)[2]
    for name in ("brain-mask", *BRAIN_FOR.values()):
        assert find_weights(name, BRAIN_FINDER)[1] == name
