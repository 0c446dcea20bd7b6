"""Words for a methods section that state what was really run, read from finished results."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from cadiff_cli.errors import MissingInputError, in_a_line
from cadiff_cli.io.bids.layout import Finished, finished
from cadiff_cli.io.files import locked, write_text
from cadiff_cli.io.provenance import Provenance, UsedTemplate

TITLE = "Methods and citations"
NOTICE = (
    "The text below was written by cadiff from the results in this folder. It may be copied into a"
    " manuscript unchanged; it is released under CC0."
)


def cite(out: Path) -> str:
    """``write_citations``, unless something is wrong: why there are none, for results stand."""
    try:
        write_citations(out)
    except Exception as error:
        return f"no logs/CITATION.md was written ({in_a_line(error)})"
    return ""


def write_citations(out: Path) -> None:
    """``logs/CITATION.md``, ``.html`` and ``.bib`` from the finished results in ``out``.

    One process at a time: the last one to write has seen the results of all.
    """
    folder = out / "logs" / "journal"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "citation.lock", wait=True):
        _write_citations(out)


def _write_citations(out: Path) -> None:
    results = list(finished(out))
    if not results:
        raise MissingInputError(f"{out} holds no finished result", "run the participant level")
    text, references, sources = _cited(results)
    folder = out / "logs"
    write_text(
        folder / "CITATION.md",
        "\n\n".join(
            [
                f"# {TITLE}",
                NOTICE,
                *text,
                "## References",
                "\n".join(f"- {line}" for line in references),
            ]
        )
        + "\n",
    )
    body = [
        f"<h1>{TITLE}</h1>",
        f"<p><em>{NOTICE}</em></p>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in text),
        "<h2>References</h2>",
        "<ul>",
        *(f"<li>{escape(line)}</li>" for line in references),
        "</ul>",
    ]
    write_text(
        folder / "CITATION.html",
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>'
        + "</head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n",
    )
    write_text(
        folder / "CITATION.bib", "\n".join(_bibtex(key, entry) for key, entry in sources.items())
    )


def methods(results: Sequence[Finished]) -> tuple[list[str], list[str]]:
    """Paragraphs of a methods section, and the references they cite."""
    text, references, _ = _cited(results)
    return text, references


def _cited(
    results: Sequence[Finished],
) -> tuple[list[str], list[str], dict[str, dict[str, Any]]]:
    paragraphs = describe(results)
    used = dict.fromkeys(
        key
        for group in re.findall(r"\[(@[^\]]+)\]", " ".join(paragraphs))
        for key in group.replace("@", "").split("; ")
    )
    sources = {key: source for key, source in citations().items() if key in used}

    def cited(text: str) -> str:
        """``[@a; @b]`` -> ``(Author et al., 2020; ...)``."""
        return re.sub(
            r"\[(@[^\]]+)\]",
            lambda m: (
                "("
                + "; ".join(_short(sources[key]) for key in m[1].replace("@", "").split("; "))
                + ")"
            ),
            text,
        )

    references = sorted(_reference(source) for source in sources.values())
    return [cited(paragraph) for paragraph in paragraphs], references, sources


KINDS = {
    "fast": "affine and SyN [@syn] registration at 2 mm",
    "fine": "affine and SyN [@syn] registration with iterations at 2 mm",
    "affine": "affine registration",
    "none": "the network itself, which found the distance field together with the labels",
}


ORIGINS = {
    "templateflow": "TemplateFlow [@templateflow]",
    "nilearn package data": "the nilearn package [@nilearn]",
}
STRIPPING = {
    "none": "taken as skull-stripped",
    "net": "skull-stripped by cadiff's brain-mask network",
    "template": "skull-stripped by the template's brain mask",
    "mask file": "skull-stripped by masks that were given",
}


def _in_field(made: Provenance) -> list[UsedTemplate]:
    """The templates whose registrations share in the field."""
    return [used for used in made.templates if used.in_field]


def _names(made: Provenance) -> str:
    return " and ".join(used.name for used in _in_field(made))


def _kinds(made: Provenance) -> str:
    """How the templates of the field were registered, and which one how if that differs."""
    how = {
        used.name: KINDS.get(used.registration, f"registration '{used.registration}'")
        for used in _in_field(made) or made.templates
    }
    if len(set(how.values())) == 1:
        return next(iter(how.values()))
    return " and ".join(f"{kind} (to {name})" for name, kind in how.items())


def describe(results: Sequence[Finished]) -> list[str]:
    """Paragraphs of a methods section; ``[@key]`` cites."""
    made = [result.provenance for result in results]
    for each in made:
        each.check()
    people = {result.entities.split("_")[0] for result in results}
    spaces = _output_spaces(made)
    return [
        _scans(made, len(people)),
        f"Scans were {_counted(map(_stripping, made))}. {_distance_field(made, spaces)}",
        _labels(made),
        *([f"Results were also resampled to {', '.join(spaces)}."] if spaces else []),
    ]


def _scans(made: Sequence[Provenance], people: int) -> str:
    """How many scans of how many people were segmented, and by which software."""
    versions = _counted(x.version for x in made)
    libraries = _counted(
        f"ANTsPy {x.packages.get('antspyx', 'unknown')} [@ants]"
        f" and PyTorch {x.packages.get('torch', 'unknown')} [@pytorch]"
        for x in made
    )
    dataset = any(x.source.startswith("bids:") for x in made)
    return (
        f"{_number(len(made), 'T1-weighted scan')} of {_number(people, 'participant')}"
        f"{', organised as a BIDS dataset [@bids; @pybids],' if dataset else ''}"
        f" {'was' if len(made) == 1 else 'were'} segmented"
        f" with cadiff {versions}, an implementation of collaborative anatomy diffusion [@cadiff],"
        f" with {libraries}."
    )


def _stripping(made: Provenance) -> str:
    method = made.skull_stripping
    return STRIPPING.get(method, f"skull-stripped by method '{method}'")


def _output_spaces(made: Sequence[Provenance]) -> list[str]:
    return list(dict.fromkeys(space for x in made for space in x.output_spaces))


def _distance_field(made: Sequence[Provenance], spaces: Sequence[str]) -> str:
    """Where the field came from; templates that only lend their ``spaces`` are cited too."""
    registered = [x for x in made if _in_field(x)]
    if not registered:
        return "The network found the distance field together with the labels."
    used = [template for x in registered for template in _in_field(x)]
    names = dict.fromkeys((*(template.name for template in used), *spaces))
    atlases = dict.fromkeys("@MNIColin27" if "Colin" in n else "@MNI152" for n in names)
    several = [len(_in_field(x)) > 1 for x in registered]
    whose = "The mean of the templates'" if all(several) else "The template's"
    if any(several) and not all(several):
        whose = "The template's, or the mean of several templates',"
    return (
        f"Brains were registered to {_counted(map(_names, registered))} [{'; '.join(atlases)}]"
        f"{_origins(used)} by {_counted(map(_kinds, registered))}."
        f" {whose} coordinates, carried to each scan, gave its distance field."
    )


def _origins(used: Iterable[UsedTemplate]) -> str:
    """Which template came from where, in brackets; nothing of those from elsewhere."""
    found = dict[str, list[str]]()
    for name, source in dict.fromkeys((x.name, x.source) for x in used):
        if source in ORIGINS:
            found.setdefault(source, []).append(name)
    said = [f"{' and '.join(names)} from {ORIGINS[source]}" for source, names in found.items()]
    return f" ({', '.join(said)})" if said else ""


def _labels(made: Sequence[Provenance]) -> str:
    """How labels were drawn, with which weights, and what a volume is."""
    model = _counted(f"{x.model}, SHA-256 {x.weights_sha256[:12]}" for x in made)
    return (
        f"Labels on each scan's own grid are {_counted(map(_sampling, made))}"
        f" (weights {model})."
        " Structures follow FreeSurfer's codes where one exists [@freesurfer]; a volume is the"
        " number of voxels of a label times the voxel's volume."
    )


def _sampling(made: Provenance) -> str:
    if not made.steps:
        return "the most probable ones of the registered label prior, without the network"
    first, samples = made.seed, made.samples
    last = first + samples - 1
    seeds = f"seed {first}" if samples == 1 else f"the seeds {first} to {last} (mean of {samples})"
    return (
        "the most probable ones that the network, conditioned on scan and field, gave after"
        f" {made.steps} deterministic denoising step{'s' * (made.steps > 1)} [@ddim] from"
        f" noise of {seeds}"
        f"{', the last step averaged with that of the mirrored brain' if made.flip else ''}"
    )


def citations() -> dict[str, dict[str, Any]]:
    """Every work that the text may cite (``data/citations.json``)."""
    text = files("cadiff_cli").joinpath("data/citations.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _counted(values: Iterable[str]) -> str:
    """The only value, or every value with how many scans it holds for."""
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", or ".join(f"{value} (n = {n})" for value, n in counts.most_common())


def _number(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _short(source: dict[str, Any]) -> str:
    family = [author.split(",")[0] for author in source["authors"]]
    names = " and ".join(family) if len(family) < 3 else f"{family[0]} et al."
    return f"{names}, {source['year']}"


def _reference(source: dict[str, Any]) -> str:
    authors = [a if a != "others" else "et al." for a in source["authors"]]
    return (
        f"{'; '.join(authors)} ({source['year']}). {source['title']}. {source['where']}."
        f" {source['url']}"
    )


def _bibtex(key: str, source: dict[str, Any]) -> str:
    place = {"article": "journal", "inproceedings": "booktitle"}[source["type"]]
    fields = {
        "author": " and ".join(source["authors"]),
        "title": f"{{{source['title']}}}",
        place: source["where"],
        "year": source["year"],
        "url": source["url"],
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@{source['type']}{{{key},\n{lines}\n}}\n"
