"""The methods section states what was run, and cites what it names."""

import re
from importlib.resources import files
from pathlib import Path

from cadiff_cli.io.bids.layout import Finished
from cadiff_cli.io.provenance import Provenance, UsedTemplate
from cadiff_cli.report.methods import Source, describe, sources


def packaged(path):
    return files("cadiff_cli").joinpath(path).read_text(encoding="utf-8")


def test_every_entry_of_the_bibliography_is_read_whole():
    text = packaged("data/references.bib")
    assert "\n".join(source.bibtex for source in sources().values()) == text
    for key, source in sources().items():
        written = [line.split(" = ") for line in source.bibtex.splitlines()[1:-1]]
        assert {name.strip(): value.strip("{},") for name, value in written} == source.fields
        assert source.reference.startswith(source.authors[0]), key
        assert source.reference.endswith(source.fields["url"])


def test_what_is_cited_is_in_the_bibliography():
    cited = re.findall(r"@(\w+)[;\]]", packaged("report/templates/methods.j2"))
    assert len(cited) > 5
    assert {*cited, "MNIColin27", "MNI152"} == set(sources())


def test_two_authors_are_named_and_three_are_not():
    def short(*authors):
        return Source("", {"author": " and ".join(authors), "year": "2020"}).short

    assert short("Le Roy, A.", "Li, B.") == "Le Roy and Li, 2020"
    assert short("Le Roy, A.", "Li, B.", "others") == "Le Roy et al., 2020"


def test_the_text_counts_what_differs():
    def made(steps, *templates, **told):
        return Provenance(
            fingerprint="x",
            settings={"sample": {"flip": True}, "output_spaces": ["MNI152NLin2009cAsym"]},
            version="1",
            packages={"torch": "2", "antspyx": "3"},
            model="m",
            weights_sha256="0" * 64,
            steps=steps,
            templates=templates,
            skull_stripping="none",
            **told,
        )

    def text_of(*several):
        return " ".join(describe([Finished(f"sub-{k}", Path(), x) for k, x in enumerate(several)]))

    def colin(kind, **told):
        return UsedTemplate("MNIColin27", kind, "templateflow", **told)

    def mni(kind, **told):
        return UsedTemplate("MNI152NLin2009aSym", kind, "templateflow", **told)

    kinds = ((5, "fast"), (5, "fast"), (0, "affine"))
    text = text_of(*(made(steps, colin(kind)) for steps, kind in kinds))
    assert "3 T1-weighted scans of 3 participants" in text
    assert "SyN [@syn] registration of 2 mm images, in steps of 8 and 4 mm (n = 2)" in text
    assert "(n = 2), or affine registration (n = 1)" in text
    assert "5 deterministic denoising steps" in text
    assert "without the network (n = 1)" in text
    assert "@templateflow" in text
    assert "resampled to MNI152NLin2009cAsym" in text
    # Only what shares in the field is told, and each kind of registration.
    text = text_of(
        made(5, colin("fast"), mni("fast")),
        made(5, colin("fast"), mni("affine", in_field=False)),
    )
    assert "MNIColin27 and MNI152NLin2009aSym (n = 1), or MNIColin27 (n = 1)" in text
    assert "affine registration" not in text
    assert "The template's, or the mean of several templates', coordinates" in text
    text = text_of(made(5, colin("fine"), mni("affine")))
    assert "iterations at 2 mm (to MNIColin27) and affine registration (to MNI152" in text
    assert "The mean of the templates' coordinates" in text
    text = text_of(made(5, colin("none", in_field=False)))
    assert "The network found the distance field together with the labels" in text
    assert "@templateflow" not in text
    # N4's field is divided out from a ratio of 1.4 on.
    weak, strong = made(5, colin("fast"), bias_ratio=1.2), made(5, colin("fast"), bias_ratio=2.3)
    assert "@n4" not in text_of(weak, made(5, colin("fast")))
    assert "The receive bias of 1 of the brains was corrected with N4 [@n4]." in text_of(
        weak, strong
    )
    assert "The receive bias of their brains was corrected" in text_of(strong, strong)
