"""``cadiff run``: the BIDS app.  A dataset in, derivatives and a group table out."""

import tomllib
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from click.core import ParameterSource

from cadiff_cli import __version__
from cadiff_cli.cli.options import (
    PATH,
    Memory,
    Words,
    check,
    made,
    not_empty,
    options_of,
)
from cadiff_cli.config import Machine, Request
from cadiff_cli.errors import AnalysisLevelError, MissingInputError, UsageError

LEVELS = ("participant", "group")
ONCE = {
    *("overwrite", "dry_run", "reports_only", "boilerplate_only", "config_file"),
    *("verbose", "notrack"),
}
"""Options that a later run must not inherit by ``--config-file``."""


def _configured(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Values of a ``--config-file`` become defaults, so that flags win over them."""
    if path is None:
        return None
    from cadiff_cli.text import read_text

    try:
        values = tomllib.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path} is not readable TOML ({error})") from error
    names = {
        text.lstrip("-").replace("-", "_"): option
        for option in ctx.command.params
        if isinstance(option, click.Option) and option.expose_value
        for text in (*option.opts, option.name or "")
    }
    for key in values:
        if key not in names:
            near = get_close_matches(key, names, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise click.BadParameter(f"{path} has an unknown key {key!r}{hint}")
    ctx.default_map = {
        names[key].name or "": _as_typed(names[key], value, f"{path}: {key}")
        for key, value in values.items()
    }
    return path


def _as_typed(option: click.Option, value: Any, key: str) -> Any:
    """A value of TOML as somebody types it on the command line: it is checked in the same way."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise click.BadParameter(f"{key} is {value!r}: write true or false")
        return value
    words = value if option.multiple and isinstance(value, list) else [value]
    if any(isinstance(x, bool) or not isinstance(x, str | int | float) for x in words):
        allowed = "a text, a number, or a list of them" if option.multiple else "one text or number"
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        raise click.BadParameter(f"{key} is {shown}: write {allowed}")
    return [*map(str, words)] if option.multiple else str(value)


@click.command(name="run")
@click.argument("bids_dir", type=PATH)
@click.argument("output_dir", type=PATH)
@click.argument("levels", metavar="{participant|group}...", nargs=-1, required=True)
@click.option(
    "--participant-label",
    "--participant_label",
    cls=Words,
    metavar="LABEL...",
    help="Participants to run, with or without sub-; or a file with one a line [default: all].",
)
@click.option(
    "--session-label",
    "--session_label",
    cls=Words,
    metavar="LABEL...",
    help="Sessions to run, in the same form [default: all].",
)
@click.option(
    "--bids-filter-file",
    type=PATH,
    help='JSON as for fMRIPrep: {"t1w": {"acquisition": "mprage", "run": null}}; for MP2RAGE'
    ' {"t1w": {"suffix": "UNIT1"}}.',
)
@click.option("--bids-database-dir", type=PATH, help="Keep pybids' index here for other runs.")
@click.option(
    "--skip-bids-validation",
    "--skip_bids_validation",
    is_flag=True,
    help="Do not call bids-validator-deno where it is installed.",
)
@options_of(Request, without=("mask", "threads"))
@click.option(
    "--nprocs",
    "--nthreads",
    "--n-cpus",
    "--n_cpus",
    type=click.IntRange(1),
    help="Threads in all, over all processes [default: all cores].",
)
@click.option("--omp-nthreads", type=click.IntRange(1), help="Threads of each process.")
@click.option(
    "--mem",
    "--mem-mb",
    "--mem_mb",
    type=Memory(),
    help="Memory that may be used, as 16G; a bare number is MB [default: what is free].",
)
@click.option(
    "--executor",
    type=click.Choice(["local", "dask"]),
    default="local",
    show_default=True,
    help="Where scans are segmented.",
)
@click.option(
    "--dask-address",
    callback=not_empty,
    help="Scheduler, as tcp://host:8786 [default: one of our own].",
)
@click.option(
    "--dataset-links",
    cls=Words,
    metavar="raw=URI",
    help="Where BIDS_DIR can be found by others [default: a relative path, or its DOI].",
)
@click.option(
    "--config-file",
    type=PATH,
    is_eager=True,
    callback=_configured,
    help="TOML of an earlier run (OUT/logs/cadiff_*.toml); flags win over it.",
)
@click.option("--dry-run", is_flag=True, help="List what would be done (may fetch templates).")
@click.option("--stop-on-first-crash", is_flag=True, help="Do not go on after a failed scan.")
@click.option("--reports-only", is_flag=True, help="Only write pages again, from finished results.")
@click.option(
    "--boilerplate-only",
    "--boilerplate_only",
    is_flag=True,
    help="Only write logs/CITATION.* from finished results.",
)
@click.option("--notrack", is_flag=True, help="Accepted and ignored: nothing is ever tracked.")
@click.option("-v", "--verbose", count=True, help="More messages.")
@click.version_option(__version__, prog_name="cadiff")
def command(
    bids_dir: Path,
    output_dir: Path,
    levels: tuple[str, ...],
    **options: Any,
) -> int:
    """Segment every T1-weighted scan of a BIDS dataset; a BIDS app.

    participant: segments scans, skips those that are finished, records those that fail and goes
    on. group: collects all finished scans of the dataset, whichever participants are named, in
    OUTPUT_DIR/group_morph.tsv and group.html. Both may be given.

    Exit codes: 0 done (unsuitable scans are named), 1 a scan failed, 16 invalid dataset,
    17 unknown analysis level, 18 no such participant or no scan selected, 64 usage, 65 bad data,
    66 input, template or weights missing, 73 output cannot be created, 74 disk error,
    130 interrupted, 143 terminated.
    """
    for level in levels:
        if level not in LEVELS:
            raise AnalysisLevelError(
                f"unknown analysis level {level!r}", f"use {' or '.join(LEVELS)}, or both"
            )
    source = click.get_current_context().get_parameter_source("dask_address")
    if options["executor"] != "dask" and source is ParameterSource.COMMANDLINE:
        raise UsageError("--dask-address means nothing without Dask", "add --executor dask")
    if options["dry_run"] and (options["reports_only"] or options["boilerplate_only"]):
        raise UsageError(
            "--dry-run lists what would be segmented, --reports-only and --boilerplate-only segment"
            " nothing",
            "leave out one of the two",
        )
    check(made(Request, options).config)
    from cadiff_cli.cli.console import RunConsole, show_log
    from cadiff_cli.io.bids.raw import Dataset
    from cadiff_cli.io.bids.selection import Selection, entity_labels, read_filters
    from cadiff_cli.runner.executor import Executor
    from cadiff_cli.runner.participants import (
        DatasetRequest,
        group_level,
        participant_level,
        rebuild_reports,
    )

    o = SimpleNamespace(**options)
    dataset = Dataset(bids_dir.absolute())
    request = made(
        DatasetRequest,
        options,
        dataset=dataset,
        out=output_dir.absolute(),
        selection=Selection(
            entity_labels(o.participant_label, "sub-", dataset.participants()),
            entity_labels(o.session_label, "ses-", dataset.sessions() if o.session_label else ()),
            read_filters(o.bids_filter_file) if o.bids_filter_file else None,
        ),
        machine=Machine(o.device, o.omp_nthreads),
        executor=Executor(o.executor, o.dask_address, o.nprocs, o.omp_nthreads, o.mem),
        options={name: value for name, value in options.items() if name not in ONCE},
        work_dir=o.work_dir.absolute() if o.work_dir else None,
        database=o.bids_database_dir,
        link=_raw_link(o.dataset_links),
        validate=not o.skip_bids_validation,
        dry_run=o.dry_run,
        stop_on_first_crash=o.stop_on_first_crash,
    )
    console = RunConsole()
    if o.reports_only or o.boilerplate_only:
        return rebuild_reports(request, levels, console, pages=o.reports_only)
    show_log(o.verbose)
    code = participant_level(request, console) if "participant" in levels else 0
    if "group" in levels and not (o.dry_run and "participant" in levels):
        try:
            code = group_level(request, console) or code
        except MissingInputError:
            if not code:
                raise  # else the scans' own failures, which were told, are the reason
    return code


def _raw_link(links: tuple[str, ...]) -> str | None:
    found = dict(link.split("=", 1) for link in links if "=" in link)
    if len(found) < len(links) or set(found) - {"raw"}:
        raise click.BadParameter(
            f"{' '.join(links)!r} is not raw=URI", param_hint="--dataset-links"
        )
    return found.get("raw")
