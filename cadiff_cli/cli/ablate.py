"""``cadiff ablate``: the tables of the paper, and ours, with equal budgets for every row."""

from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import PATH, show_times, without_prefix
from cadiff_cli.cli.train import (
    FOLDS_OPTION,
    also_options,
    also_settings,
    prepared_in,
    training_options,
)


@click.command(name="ablate")
@click.argument("dataset", type=PATH)
@click.option(
    "--tables",
    default="II,III,IV,V,VI,4",
    show_default=True,
    help="Tables of the paper; 4 is its Fig. 4. Ours: SPAD, states.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Trainings of each row."
)
@click.option(
    "--hold-out",
    callback=without_prefix,
    multiple=True,
    help="Subject label that is scored, of any dataset (repeatable), instead of --folds.",
)
@FOLDS_OPTION
@also_options
@click.option(
    "--common",
    metavar="CONFIG",
    help="A TOML file (or small, which ships) of settings that all rows share, over their own.",
)
@training_options
def command(
    dataset: Path,
    tables: str,
    seeds: int,
    hold_out: tuple[str, ...],
    folds: int,
    also: tuple[tuple[Path, str], ...],
    also_share: float | None,
    init: str | None,
    common: str | None,
    run: Path,
    cache: Path | None,
    seed: int | None,
    templates: tuple[str, ...],
    device: str,
    workers: int,
    max_minutes: float,
    **settings: Any,
) -> None:
    """Train and score each row of the ablation's tables on DATASET, with equal budgets.

    RUN gets a folder for each network, and for each table a Markdown file with our figures beside
    the paper's, rewritten whenever a network is done. Seeds are --seed (or the seed of --common)
    and those after it. The same command continues after a kill, or after --max-minutes, which end
    it with exit code 1.
    """
    from functools import lru_cache

    from cadiff_cli.device import pick_device
    from cadiff_cli.io import models
    from cadiff_cli.labels.parcellation import load_parcellation
    from cadiff_cli.nets.models import Model
    from cadiff_cli.report.ablation import write_tables
    from cadiff_cli.training.ablation import Plan, ablate, tables_of
    from cadiff_cli.training.crossval import joint_folds
    from cadiff_cli.training.segmenter.config import Training, load, templates_of
    from cadiff_cli.training.segmenter.data import Sample, labelled_datasets, prepare_datasets
    from cadiff_cli.training.segmenter.run import check_people
    from cadiff_cli.training.templates import load_training_template

    show_times()
    settings |= also_settings(also, also_share)

    def loaded(config: str, seed: int | None) -> Training:
        return load(config, common=common, seed=seed, **settings)

    # Whatever is wrong with a name is said before hours of preparation, not after.
    chosen = tables_of(tables)
    model = models.load(Model, init) if init else None
    pick_device(device)
    first = loaded("cadiff", seed)
    parcellation = load_parcellation(first.parcellation)
    datasets = labelled_datasets(dataset, first.labels, also, parcellation)
    subjects, *others = ({scan.subject for scan in scans} for scans, _ in datasets)
    known = set().union(*others)
    splits = [list(hold_out)] if hold_out else joint_folds((subjects, known), folds)
    start = first.train.seed  # --seed, or that of --common
    named = templates or (templates_of(common) if common else ()) or Plan.templates
    plan = Plan(chosen, range(start, start + seeds), splits, named)
    people = {scan.subject: str(scan.t1) for scan in datasets[0][0]}
    for network in plan.networks():
        net = loaded(network.config, network.seed).net
        check_people(subjects, known, splits[network.fold], model, net, parcellation)
        for name in plan.templates_of(network, people):
            load_training_template(name)
    folder = prepared_in(run, cache)

    @lru_cache(maxsize=2)
    def prepare(names: tuple[str, ...]) -> tuple[list[Sample], list[Sample]]:
        return prepare_datasets(datasets, names, parcellation, folder)

    results = []
    for result in ablate(
        plan,
        run,
        loaded,
        prepare,
        people,
        parcellation,
        init=model,
        device=device,
        workers=workers,
        max_minutes=max_minutes,
    ):
        results.append(result)
        written = write_tables(run, plan, results, first.train.steps)
    for path in written:
        click.echo(path)
