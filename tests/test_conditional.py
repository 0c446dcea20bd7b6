"""``--template conditional``: each person's own atlas, in runs and for single scans."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from atlas_model import make_base
from bids_dataset import write_dataset
from test_atlas import write_base

from cadiff_cli import atlas as atlas_room
from cadiff_cli.config import (
    Config,
    OutputConfig,
    RegisterConfig,
    Request,
    SampleConfig,
    StripConfig,
)
from cadiff_cli.errors import OutputError, UsageError
from cadiff_cli.io.bids.layout import finished
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.bids.selection import Selection
from cadiff_cli.io.files import read_json
from cadiff_cli.io.templates import EMBEDDED, load_template, own_contents
from cadiff_cli.notes import NoteCode
from cadiff_cli.products import Person
from cadiff_cli.report.case import read_views
from cadiff_cli.report.methods import describe, methods
from cadiff_cli.runner import personal
from cadiff_cli.runner.execute import _templates_of, execute, segment_file
from cadiff_cli.runner.job import job_of
from cadiff_cli.runner.personal import Conditional
from cadiff_cli.runner.plan import make_plan

NAME = "growinglaw:cohort-age72F"
PEOPLE = (
    "participant_id\tage\tsex\nsub-01\t72.4\tF\nsub-02\t71.5\tF\nsub-03\tn/a\tM\nsub-04\t99\tM\n"
)
QUICK = Config(
    strip=StripConfig("none"),
    register=RegisterConfig("affine"),
    sample=SampleConfig(steps=0),
    output=OutputConfig(report=False),
)


class Watcher:
    """Sees nothing."""

    screen = logging.NullHandler()

    def stage(self, name):
        pass


@pytest.fixture(scope="module")
def model(phantom, toy_template, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tpl-toybase"
    return make_base(phantom, toy_template, folder, write_base)[1]


@pytest.fixture(scope="module", autouse=True)
def known(model):
    """The law's network in place of a released one, and no TemplateFlow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(personal, "_network", lambda _: model)
        patch.setenv("TEMPLATEFLOW_HOME", "/nonexistent")
        yield


@pytest.fixture(scope="module")
def request_for(tiny_weights):
    def make(template="conditional", **more):
        return Request(
            config=QUICK, template=template, model=str(tiny_weights), offline=True, **more
        )

    return make


@pytest.fixture(scope="module")
def batch(small_head, request_for, tmp_path_factory):
    """Four people, of whom two are segmented: (dataset, out, plan, outcomes)."""
    folder = tmp_path_factory.mktemp("batch")
    names = [f"sub-0{k}_T1w" for k in (1, 2, 3, 4)]
    bids = write_dataset(folder / "bids", small_head, names)
    (bids / "participants.tsv").write_text(PEOPLE)
    dataset, out = Dataset(bids), folder / "out"
    job, _ = job_of(request_for(), out, "run")
    plan = make_plan(dataset, Selection(), job)
    return dataset, out, plan, [execute(plan.jobs[k]) for k in (0, 2)]


def test_people_of_one_age_and_sex_share_an_atlas(batch):
    _, out, plan, outcomes = batch
    assert [outcome.status for outcome in outcomes] == ["done"] * 2, outcomes
    first, second, third, fourth = plan.jobs
    assert first.atlas == second.atlas
    assert first.atlas.condition.age_years == 72
    assert third.atlas is fourth.atlas is None
    folders = [path.parent for path in (out / "templates").rglob("template_description.json")]
    assert folders == [out / "templates" / "tpl-growinglaw" / "cohort-age72F"]


def test_the_sidecar_tells_which_atlas_and_by_what_it_was_made(batch):
    _, out, plan, _ = batch
    made = next(finished(out)).provenance
    folder = out / "templates" / "tpl-growinglaw" / "cohort-age72F"
    (used,) = made.templates
    assert used.name == made.settings["template"] == NAME
    assert used.sha256 == load_template(str(folder)).sha256
    assert used.citation.title.startswith("Diff-Def")
    assert used.condition == plan.jobs[0].atlas.condition
    cause = read_json(folder / "template_description.json")["Cause"]
    assert made.settings["template_sha256"] == {NAME: cause}
    assert not [note for note in made.notes if note.code == NoteCode.NO_ATLAS]


def test_who_has_no_known_age_gets_the_default_and_a_note(batch):
    _, out, plan, _ = batch
    made = {result.entities: result for result in finished(out)}["sub-03"].provenance
    assert [used.name for used in made.templates] == [EMBEDDED]
    assert "template_sha256" not in made.settings
    (text,) = [note.text for note in made.notes if note.code == NoteCode.NO_ATLAS]
    assert "age is unknown" in text
    (text,) = [x.text for x in plan.jobs[3].notes if x.code == NoteCode.NO_ATLAS]
    assert "outside 20 to 90" in text
    (line,) = [note for note in plan.notes if "atlas" in note]
    assert "sub-03, sub-04" in line


def test_a_page_shows_the_registration_to_the_atlas(batch):
    _, out, _, _ = batch
    views = read_views(out, next(finished(out)))
    assert views.registered.template.name == NAME
    assert not any("registration" in note for note in views.notes)


def test_the_methods_text_names_the_atlas_or_that_each_has_its_own(batch):
    _, out, _, _ = batch
    first, other = finished(out)
    assert f"registered to {NAME} [@template-growinglaw]" in " ".join(describe([first]))
    (used,) = first.provenance.templates
    older = replace(used, name="growinglaw:cohort-age80M")
    second = replace(other, provenance=replace(other.provenance, templates=(older,)))
    paragraphs, cited = methods([first, second])
    text = " ".join(paragraphs)
    assert "registered to an atlas of the participant's age and sex (Starck et al.)" in text
    assert "cohort-" not in text
    assert sum("Diff-Def" in source.bibtex for source in cited) == 1


def test_atlases_of_two_ages_are_one_way_to_make_a_dataset(batch):
    _, out, _, _ = batch
    made = next(finished(out)).provenance
    (used,) = made.templates
    content = {"growinglaw:cohort-age80M": "0" * 64}
    settings = {**made.settings, "template": "growinglaw:cohort-age80M", "template_sha256": content}
    older = replace(used, name="growinglaw:cohort-age80M")
    other = replace(made, fingerprint="0" * 12, templates=(older,), settings=settings)
    assert other.way == made.way != made.fingerprint
    sample = {**made.settings["sample"], "steps": 3}
    assert replace(other, settings={**settings, "sample": sample}).way != made.way
    plain = [*finished(out)][1].provenance
    assert plain.way == plain.fingerprint


def test_results_are_finished_until_an_age_changes(batch, request_for):
    dataset, out, _, _ = batch
    job, _ = job_of(request_for(), out, "again")
    plan = make_plan(Dataset(dataset.root), Selection(), job)
    assert [*plan.status.values()] == ["done", "todo", "done", "todo"]
    table = dataset.root / "participants.tsv"
    table.write_text(PEOPLE.replace("72.4", "61.5"))
    try:
        with pytest.raises(OutputError, match=f"sub-01, made otherwise .template {NAME} -> "):
            make_plan(Dataset(dataset.root), Selection(), job)
        # And with another choice of templates.
        other, _ = job_of(request_for(EMBEDDED), out, "again")
        with pytest.raises(OutputError, match="sub-01, made otherwise"):
            make_plan(Dataset(dataset.root), Selection(), other)
    finally:
        table.write_text(PEOPLE)


def test_a_later_run_repeats_the_wish(request_for, tmp_path):
    for spec in ("conditional", f"{EMBEDDED}+conditional", EMBEDDED):
        assert job_of(request_for(spec), tmp_path)[0].specs == spec


def test_workers_make_an_atlas_once(model, tmp_path, monkeypatch):
    calls = []
    make = atlas_room.make_atlas
    monkeypatch.setattr(atlas_room, "make_atlas", lambda *args: calls.append(1) or make(*args))
    wanted = Conditional("law", alone=True).of(Person(40, "M"))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: wanted.provide(tmp_path), range(3)))
    assert len(calls) == 1
    assert wanted.mark(load_template(str(wanted.folder(tmp_path)))).cause == wanted.cause
    # One of other weights is made again.
    folder = wanted.folder(tmp_path)
    told = (folder / "template_description.json").read_text()
    (folder / "template_description.json").write_text(told.replace(wanted.cause, "0" * 64))
    wanted.provide(tmp_path)
    assert len(calls) == 2


def test_an_atlas_beside_another_template(request_for, tmp_path):
    job = job_of(request_for(f"{EMBEDDED}+conditional"), tmp_path)[0].personal(Person(72, "F"))
    assert job.recipe.template == f"{EMBEDDED}+{NAME}"
    templates = _templates_of(job)
    assert [template.name for template in templates] == [EMBEDDED, NAME]
    assert own_contents(templates) == job.recipe.template_sha256 == ((NAME, job.atlas.cause),)


def test_one_scan_without_a_usable_age(small_head, scan_of, request_for, tmp_path):
    scan, out = scan_of(small_head), tmp_path / "out"
    with pytest.raises(UsageError, match="needs the person's age"):
        segment_file(scan.path, out, request_for(), Watcher())
    with pytest.raises(UsageError, match="outside 20 to 90"):
        segment_file(scan.path, out, request_for(), Watcher(), Person(99))
    assert not [*finished(out)]
