"""A training is a file: what is absent is the default, what is wrong is named."""

import tomllib
from dataclasses import asdict, replace
from importlib import import_module

import pytest
from click.testing import CliRunner
from conftest import LOBES, ROOT

from cadiff_cli.cli import cadiff
from cadiff_cli.errors import CadiffError, MissingInputError, UsageError
from cadiff_cli.io.releases import weights_folder
from cadiff_cli.training import settings
from cadiff_cli.training.brain_mask import config as brain_mask
from cadiff_cli.training.segmenter import config as segmenter
from cadiff_cli.training.settings import CONFIGS, shipped_configs

PACKAGE = ROOT / "cadiff_cli"
FOLDERS = sorted(path.parent.name for path in (PACKAGE / "training").glob("*/config.py"))
MODULES = [import_module(f"cadiff_cli.training.{folder}.config") for folder in FOLDERS]
TENANTS = {module.Training.kind: module for module in MODULES}
FILES = sorted((*CONFIGS.glob("*.toml"), *weights_folder().glob("*/recipe/*.toml")))


def loaded(module, name):
    """A training of the module's kind; the segmenter's also follows its parcellation."""
    if module is segmenter:
        return segmenter.load(name)
    return settings.load(name, module.Training())


def load(path):
    """Whatever kind of training a file holds."""
    return loaded(TENANTS[tomllib.loads(path.read_text())["kind"]], str(path))


@pytest.fixture
def write(tmp_path):
    def write(text, kind="segmenter"):
        path = tmp_path / "config.toml"
        path.write_text(f'kind = "{kind}"\n{text}')
        return str(path)

    return write


def leaves(values, key=""):
    """(key, value) of every leaf of nested tables."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{key}{name}.")
        else:
            yield f"{key}{name}", value


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(p.parts[-3:]))
def test_every_file_is_read_as_it_says(path):
    """Shipped configs and recipes: each key reaches the field of its name."""
    values = tomllib.loads(path.read_text())
    del values["kind"]
    training = dict(leaves(asdict(load(path))))
    for key, value in leaves(values):
        wanted = tuple(value) if isinstance(value, list) else value
        assert training[key] == (None if value == "none" else wanted), key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[train.objective.consistency]\nsimilarity = "dise"', "'dise'"),
        ("[net]\ntaca_sizes = [8, 11]", "odd"),
        ("[train.objective]\nrim = 30", "fine is 56 and rim is 30"),
        ("[train.objective]\nfine = 6", "fine is 6"),
        ("templates = []", "templates"),
        ("[train]\nprior_scans = -1", "prior_scans is -1"),
    ],
)
def test_a_value_that_would_fail_after_hours_is_refused(write, text, words):
    with pytest.raises(CadiffError, match=words):
        segmenter.load(write(text))


def test_the_shipped_config_names_every_key_with_its_default():
    values = tomllib.loads((CONFIGS / "cadiff.toml").read_text())
    assert segmenter.load("cadiff") == segmenter.Training()
    named = {key for key, _ in leaves(values)} - {"kind"}
    named |= {"train.prior_scans", "net.n_classes"}  # absent, they follow the data
    named |= {"train.spad"}  # absent, nothing is perturbed; spad.toml names its keys
    assert named == {key for key, _ in leaves(asdict(segmenter.Training()))}


def test_absent_keys_keep_the_default_of_their_place(write):
    """A table changes what is there: the default weight of consistency is the objective's."""
    default = segmenter.Training()
    changed = segmenter.load(write('[train.objective.consistency]\nsimilarity = "dice"\n'))
    was = default.train.objective
    wanted = replace(was, consistency=replace(was.consistency, similarity="dice"))
    assert changed == replace(default, train=replace(default.train, objective=wanted))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepps = 3\n", "'stepps' is unknown|stepps is unknown"),
        ("[train]\nstepps = 3\n", "train.stepps is unknown, the nearest key is 'steps'"),
        ("[train.objective.times]\npure_nois = 1.0\n", "nearest key is 'pure_noise'"),
        ('[train]\nsteps = "3"\n', "train.steps is '3'.*a value of int"),
        ("[train]\nsteps = 3.5\n", "train.steps is 3.5.*a value of int"),
        ("[train]\nsteps = true\n", "train.steps is True.*a value of int"),
        ("[train]\nobjective = 3\n", "train.objective is 3.*a table"),
        ("[train.objective]\nconsistency = 3\n", 'consistency is 3.*a table or "none"'),
        ("[net]\nprior_shape = [1, 2]\n", r"net.prior_shape is \[1, 2\]"),
        ("[net]\nchannels = [8, 8.5]\n", r"net.channels\[1\] is 8.5.*int"),
        ("[train]\nbatch = 0\n", r"config\.toml: train: batch is 0"),
        ("[train]\nsteps = -5\n", r"train: steps is -5"),
        ("[train]\nseed = -1\n", r"train: seed is -1"),
        ("[train]\nseed = 10000000000000\n", r"train: seed is 10000000000000"),
        (
            '[net]\nprocess = "drift"\n',
            "net: the noise process is 'drift', not.*gaussian",
        ),
        ("= 3\n", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(write, text, said):
    with pytest.raises(UsageError) as caught:
        segmenter.load(write(text))
    assert caught.match(said) or pytest.fail(str(caught.value))
    assert caught.value.remedy


def test_the_number_of_classes_follows_the_parcellation(write, tmp_path):
    table = tmp_path / "lobes.tsv"
    table.write_text(LOBES)
    named = f'parcellation = "{table}"\n'
    for training in (
        segmenter.load("cadiff", parcellation=str(table)),
        segmenter.load(write(named)),
    ):
        assert (training.parcellation, training.net.n_classes) == (str(table), 6)
    assert segmenter.load(write(f"{named}[net]\nn_classes = 6\n")) == segmenter.load(write(named))
    for text, numbers in (
        (f"{named}[net]\nn_classes = 41\n", "41.*6"),
        ("[net]\nn_classes = 6", "6.*41"),
    ):
        with pytest.raises(UsageError, match=numbers) as caught:
            segmenter.load(write(text))
        assert "leave n_classes out" in caught.value.remedy


def test_whole_numbers_are_numbers(write):
    rate = segmenter.load(write("[train]\nrate = 1\n")).train.rate
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize(("tenant", "other"), [(segmenter, "brain-mask"), (brain_mask, "cadiff")])
def test_a_command_takes_trainings_of_its_kind(tenant, other):
    for error, name in ((UsageError, other), (MissingInputError, "cadif")):
        with pytest.raises(error, match=name) as caught:
            loaded(tenant, name)
        assert ", ".join(shipped_configs(tenant.Training.kind)) in caught.value.remedy
        assert other not in caught.value.remedy.split()


def test_every_shipped_config_is_of_one_kind():
    names = [name for kind in TENANTS for name in shipped_configs(kind)]
    assert sorted(names) == sorted(path.stem for path in CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("kind", sorted(TENANTS))
def test_help_names_every_shipped_config(kind):
    command = TENANTS[kind].Training.command.split()[1:]
    text = CliRunner().invoke(cadiff, [*command, "--help"]).output
    words = {word.strip(",;.():") for word in text.split()}
    assert set(shipped_configs(kind)) <= words
    assert "None" not in text


def test_options_override_the_file(write):
    path = write('labels = "dlmuse"\n[train]\nsteps = 90\ndecay = 60\nrate = 0.5\n')
    plain = segmenter.load(path)
    assert (plain.labels, plain.train.steps, plain.train.rate) == ("dlmuse", 90, 0.5)
    assert segmenter.load(path, steps=None, seed=None) == plain
    other = segmenter.load(path, labels="cadiff", templates=["x"], synthetic=0.25, seed=3)
    assert (other.labels, other.templates, other.train.seed) == ("cadiff", ("x",), 3)
    assert other.train.augment.synthesis.share == 0.25
    assert other.train.rate == 0.5


@pytest.mark.parametrize(
    ("steps", "decay", "wanted"), [(30, None, 20), (900, None, 60), (30, 5, 5), (1, None, 1)]
)
def test_the_decay_of_a_shorter_run_shrinks_with_it(write, steps, decay, wanted):
    path = write("[train]\nsteps = 90\ndecay = 60\n")
    assert segmenter.load(path, steps=steps, decay=decay).train.decay == wanted
