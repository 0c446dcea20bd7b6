"""``cadiff fetch``: templates for machines that have no network."""

import click


@click.command(name="fetch", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("templates", nargs=-1)
@click.option("--check", is_flag=True, help="Only look whether they are there and whole.")
def command(templates: tuple[str, ...], check: bool) -> None:
    """Download TEMPLATES [all that cadiff knows] into TemplateFlow's cache, and check them.

    The cache is TEMPLATEFLOW_HOME, or ~/.cache/templateflow. On a cluster, fetch once where there
    is a network, and set TEMPLATEFLOW_HOME for the jobs.

    Exit codes: 0 all are there, 64 unknown template, 66 one cannot be had.
    """
    from cadiff_cli.io.templates import load_template, registry, templateflow_home

    known = [name for name, entry in registry().items() if entry["source"] == "templateflow"]
    for name in templates or known:
        template = load_template(name, offline=check)
        click.echo(f"{name}\t{template.brain.grid!r}\t{templateflow_home()}")
