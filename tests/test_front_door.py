"""The package as a Python program meets it: few lines, little time."""

import resource
import subprocess
import sys

import pytest
from conftest import ROOT

import cadiff_cli
from cadiff_cli import api
from cadiff_cli.config import Config, RegisterConfig, SampleConfig
from cadiff_cli.io.images import save_volume

CLICK = "import click"
HEAVY = {"ants", "bids", "monai", "nibabel", "numpy", "rich", "scipy", "torch"}
"""Packages that take longer to import than all that ``cadiff-seg --help`` needs."""


def example():
    """The Python example of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```")[0]


def cpu_s(*words):
    """CPU seconds of a Python process: the least of three."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


def test_the_example_has_six_lines_at_most():
    assert len(example().strip().splitlines()) <= 6


@pytest.mark.slow
def test_the_example_prints_volumes(
    phantom, toy_template, tiny_model, parcellation, tmp_path, monkeypatch, capsys
):
    head = phantom("RAS", 2.0, scale=0.72)  # the smallest that is known to be stripped already
    save_volume(tmp_path / "sub-01_T1w.nii.gz", head.t1.data, head.t1.grid)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load_templates", lambda: (toy_template(scale=0.72),))
    monkeypatch.setattr(api, "load_model", lambda: tiny_model)
    quick = Config(register=RegisterConfig("affine"), sample=SampleConfig(steps=1, flip=False))
    monkeypatch.setattr(api, "Config", lambda: quick)
    exec(example(), {})
    lines = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == [s.name for s in parcellation.structures]
    assert sum(float(mm3) for _, mm3 in lines) > 0


def test_every_name_is_there():
    for name in cadiff_cli.__all__:
        assert name in dir(cadiff_cli)
        assert callable(getattr(cadiff_cli, name))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cadiff_cli.nonsense


def test_importing_is_quick():
    assert cpu_s("-c", "import cadiff_cli") < cpu_s("-c", CLICK)


def test_a_scan_is_loaded_without_torch():
    code = "import sys; from cadiff_cli import load_scan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_quick():
    code = (
        "import sys; from cadiff_cli.cli import segment_main\n"
        "try: segment_main()\n"
        f"finally: print('slow:', *{HEAVY} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, "--help"]
    shown = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "Usage" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "slow:"
