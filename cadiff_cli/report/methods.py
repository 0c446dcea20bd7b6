"""The text of a methods section that states the steps really run, read from finished results."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cadiff_cli.data import read
from cadiff_cli.errors import MissingInputError, first_few, in_a_line
from cadiff_cli.io.bids.layout import Finished, finished
from cadiff_cli.io.bids.names import JOURNAL
from cadiff_cli.io.files import locked, write_text
from cadiff_cli.io.provenance import Provenance, UsedTemplate
from cadiff_cli.products import Citation
from cadiff_cli.report.render import render
from cadiff_cli.stages.bias import NATURAL

TITLE = "Methods and citations"
NOTICE = (
    "The text below was written by cadiff from the results in this folder. It may be copied into a"
    " manuscript unchanged; it is released under CC0."
)
SHIPPED = {
    "MNIColin27": "MNIColin27",
    "MNI152NLin2009cAsym": "MNI152",
    "MNI152NLin2009aSym": "MNI152",
}
"""Keys of the shipped templates in ``data/references.bib``."""
CITED = re.compile(r"\[(@[^\]]+)\]")
"""``[@key; @key]`` in a text."""


@dataclass(frozen=True)
class Source:
    """A work that the text may cite: its ``bibtex`` entry, and the entry's fields."""

    bibtex: str
    fields: Mapping[str, str]

    @property
    def authors(self) -> list[str]:
        """``Family, Given`` of each author; ``others`` stands for unnamed ones."""
        return self.fields["author"].split(" and ")

    @property
    def short(self) -> str:
        """As in a sentence: ``Xing et al., 2025``."""
        families = [author.split(",")[0] for author in self.authors if author]
        families = families or [self.fields["title"]]
        names = " and ".join(families) if len(families) < 3 else f"{families[0]} et al."
        return f"{names}, {self.fields['year']}" if "year" in self.fields else names

    @property
    def reference(self) -> str:
        """A line of the list of references."""
        authors = "; ".join("et al." if a == "others" else a for a in self.authors)
        if "year" in self.fields:
            authors = f"{authors} ({self.fields['year']})"
        where = self.fields.get("journal") or self.fields.get("booktitle")
        parts = (authors, self.fields["title"], where, self.fields["url"])
        return ". ".join(part for part in parts if part)


@cache
def sources() -> dict[str, Source]:
    """Every work that the text may cite, by key (``data/references.bib``, a field a line)."""
    text = read("references.bib")
    return {
        entry[1]: Source(entry[0], dict(re.findall(r"^  (\w+) = \{+(.*?)\}+,?$", entry[0], re.M)))
        for entry in re.finditer(r"^@\w+\{(\w+),\n.*?^\}\n", text, re.M | re.S)
    }


def cite(out: Path) -> str:
    """Run ``write_citations``; return its note, or the error's text.  Results are kept."""
    try:
        return write_citations(out)
    except Exception as error:
        return f"no logs/CITATION.md was written ({in_a_line(error)})"


def write_citations(out: Path) -> str:
    """Write ``logs/CITATION.md``, ``.html`` and ``.bib`` from the finished results in ``out``.

    Returns a note if some are left out because their sidecars are damaged, else an empty text.  One
    process at a time writes, so that the last one includes the results of all.
    """
    folder = out / JOURNAL
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "citation.lock", wait=True):
        results = list(finished(out))
        if not results:
            raise MissingInputError(f"{out} holds no finished result", "run the participant level")
        # One damaged sidecar must not cost the others their text.
        damaged = [result.entities for result in results if result.provenance.gaps]
        results = [result for result in results if not result.provenance.gaps] or results
        paragraphs, cited = methods(results)
        values = {"paragraphs": paragraphs, "references": references(cited)}
        for kind in ("md", "html"):
            text = render(f"citation.{kind}.j2", title=TITLE, notice=NOTICE, **values)
            write_text(out / "logs" / f"CITATION.{kind}", f"{text.rstrip()}\n")
        write_text(out / "logs" / "CITATION.bib", "\n".join(source.bibtex for source in cited))
    told = f"logs/CITATION.md leaves out {first_few(damaged)}: sidecars without all values"
    return told if damaged else ""


def methods(results: Sequence[Finished]) -> tuple[list[str], list[Source]]:
    """Paragraphs of a methods section, and the sources they cite."""
    paragraphs = describe(results)
    cited = _cited(paragraphs, results)

    def in_words(match: re.Match[str]) -> str:
        """``[@a; @b]`` -> ``(Author et al., 2020; ...)``."""
        return f"({'; '.join(cited[key].short for key in _keys(match[1]))})"

    return [CITED.sub(in_words, paragraph) for paragraph in paragraphs], list(cited.values())


def references(cited: Sequence[Source]) -> list[str]:
    """The lines of a list of references, in the order of the alphabet."""
    return sorted(source.reference for source in cited)


def describe(results: Sequence[Finished]) -> list[str]:
    """Paragraphs of a methods section (``templates/methods.j2``); ``[@key]`` cites."""
    scans = [result.provenance for result in results]
    for scan in scans:
        scan.check()
    spaces = list(dict.fromkeys(space for scan in scans for space in scan.output_spaces))
    text = render(
        "methods.j2",
        scans=scans,
        people=len({result.entities.split("_")[0] for result in results}),
        dataset=any(scan.source.startswith("bids:") for scan in scans),
        evened=sum((scan.bias_ratio or 1.0) >= NATURAL for scan in scans),
        spaces=spaces,
        template_keys=_template_keys(scans, spaces),
        personal=len({t.name for scan in scans for t in scan.in_field if t.condition}) > 1,
    )
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def _template_keys(scans: Sequence[Provenance], spaces: Sequence[str]) -> list[str]:
    """Keys of the templates of the field, and of those used only as output ``spaces``."""
    used = {template.name: template for scan in scans for template in scan.in_field}
    names = (*used, *(re.sub(r":res-\d+$", "", space) for space in spaces))
    keys = (_key(used[name]) if name in used else SHIPPED.get(name) for name in names)
    return list(dict.fromkeys(f"@{key}" for key in keys if key))


def _key(template: UsedTemplate) -> str | None:
    """The key to cite a template by; None if no citation is known."""
    if template.citation:
        return _own_key(template)
    # A user's folder may have the name of a shipped template.
    return None if template.source.startswith(("/", "~")) else SHIPPED.get(template.name)


def _own_key(template: UsedTemplate) -> str:
    """The key of a template with its own citation; atlases of one network share it."""
    name = template.name.partition(":")[0] if template.condition else template.name
    return f"template-{name}"


def _own_source(key: str, citation: Citation) -> Source:
    """The source of a template, from the citation in its ``template_description.json``."""

    def plain(text: str) -> str:
        """One line without BibTeX's special characters."""
        return " ".join(re.sub(r"[{}\\]", "", text).split())

    # TemplateFlow writes "Fonov V".
    authors = (re.sub(r" ([A-Z]+)$", r", \1", plain(author)) for author in citation.authors)
    fields = {
        "author": " and ".join(authors),
        "title": plain(citation.title),
        "url": plain(next(iter(citation.links), "")),
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return Source(f"@misc{{{key},\n{lines}\n}}\n", fields)


def _cited(paragraphs: Sequence[str], results: Sequence[Finished]) -> dict[str, Source]:
    """The sources that the paragraphs cite: ``references.bib`` in its order, then templates."""
    used = {key for group in CITED.findall(" ".join(paragraphs)) for key in _keys(group)}
    own = {
        _own_key(template): _own_source(_own_key(template), template.citation)
        for result in results
        for template in result.provenance.templates
        if template.citation
    }
    return {key: source for key, source in (sources() | own).items() if key in used}


def _keys(group: str) -> list[str]:
    return group.replace("@", "").split("; ")
