"""``cadiff fetch``: templates for machines that have no network."""

import click


@click.command(name="fetch", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("templates", nargs=-1)
@click.option("--check", is_flag=True, help="Only look whether they are there and whole.")
def command(templates: tuple[str, ...], check: bool) -> None:
    """Download TEMPLATES [all that cadiff knows] into TemplateFlow's cache, and check them.

    A file that is there is kept if it is whole, and replaced if it is damaged.

    The cache is TEMPLATEFLOW_HOME, or ~/.cache/templateflow. On a cluster, fetch once where there
    is a network, and set TEMPLATEFLOW_HOME for the jobs.

    Exit codes: 0 all are there and whole, 64 unknown template, 65 one is damaged (--check), 66 one
    cannot be had.
    """
    from cadiff_cli.errors import DataError
    from cadiff_cli.io.templateflow import templateflow_home
    from cadiff_cli.io.templates import load_template, registry

    known = [name for name, entry in registry().items() if entry["source"] == "templateflow"]
    for name in templates or known:
        try:
            template = load_template(name, offline=check)
        except DataError as error:
            if check:
                raise
            click.echo(f"cadiff: {error.message}: it is downloaded again", err=True)
            template = load_template(name, anew=True)
        click.echo(f"{name}\t{template.brain.grid!r}\t{templateflow_home()}")
