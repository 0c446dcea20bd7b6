"""``cadiff ranges train``: what is normal at an age, from one's own people."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import PATH


@click.command(name="train")
@click.argument("tables", metavar="TABLE_OR_DERIVATIVES...", nargs=-1, required=True, type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="File to write (JSON).")
@click.option(
    "--participants",
    type=PATH,
    help="participants.tsv with ages and sexes of people whose TABLE tells none [default: that of"
    " the dataset, or of DERIVATIVES].",
)
@click.option(
    "--people", help="Who they are, in words, for tables and pages [default: names and numbers]."
)
@click.option(
    "--parcellation",
    help="Label set of the tables: cadiff40, nmm138, or a TSV [default: that of DERIVATIVES, else"
    " cadiff40].",
)
@click.option("--no-check", is_flag=True, help="Do not predict people who are left out.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
def command(
    tables: tuple[Path, ...],
    out: Path,
    participants: Path | None,
    people: str | None,
    parcellation: str | None,
    no_check: bool,
    overwrite: bool,
) -> None:
    """Fit percentiles by age and sex to volumes of people, and check them on people left out.

    DERIVATIVES are folders of cadiff run with a group table (cadiff run BIDS_DIR OUT group); TABLE
    is a TSV or CSV with a line a scan: participant_id, age, sex, and the mm3 of every structure
    (columns as in group_morph.tsv, or codes). A column source tells scanners or studies apart;
    without it each TABLE or folder is one. Scan the people as you scan those whom you compare with
    them. The file holds curves, no person's values.
    """
    from cadiff_cli.errors import OutputError
    from cadiff_cli.io.cohorts import parcellation_in, read_cohort
    from cadiff_cli.io.files import check_writable, is_among, refuse_existing
    from cadiff_cli.quality.age_fit import check, fit
    from cadiff_cli.quality.age_ranges import write_age_ranges
    from cadiff_cli.runner.logs import warning

    if is_among(out, (*tables, participants)):
        raise OutputError(f"{out} is an input", "choose another name for --out")
    if out.is_dir():
        raise OutputError(f"{out} is a folder", "name a file with -o")
    refuse_existing(out, overwrite=overwrite)
    structures = parcellation_in(tables, parcellation)
    cohort = read_cohort(tables, structures, participants)
    check_writable(out.parent)
    for note in cohort.notes:
        click.echo(warning(note), err=True)
    ranges = fit(cohort, structures, people or cohort.described)
    click.echo(f"{len(ranges.curves)} curves of {ranges.of_ages}: {ranges.people}")
    if not no_check:
        ranges = replace(ranges, check=check(cohort, structures))
        click.echo(shown(ranges.check))
    write_age_ranges(out, ranges)
    click.echo(out)


def shown(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """How well people who were left out were predicted, as lines of text."""
    from cadiff_cli.quality.age_fit import PERCENTILES

    head = "".join(f"{p:>7.0f}" for p in PERCENTILES)
    lines = [
        "Left-out people below each percentile, in %; pinball loss, in log (lower is better);",
        "people who have an implausible size, in %:",
        f"{'':32}{'people':>8}{head}{'loss':>9}{'implausible':>13}",
    ]
    for form, groups in scores.items():
        for group, found in groups.items():
            below = "".join(f"{x:>7.1f}" for x in found["coverage"])
            numbers = f"{found['pinball']:>9.4f}{found['implausible']:>13.1f}"
            lines.append(f"{form + ', ' + group:32}{found['people']:>8}{below}{numbers}")
    return "\n".join(lines)
