"""``cadiff fetch``: download templates for machines without internet."""

import click


@click.command(name="fetch")
@click.argument("templates", nargs=-1)
@click.option("--check", is_flag=True, help="Only check that they are there and undamaged.")
def command(templates: tuple[str, ...], check: bool) -> None:
    """Download TEMPLATES [default: all] into TemplateFlow's cache, and check them.

    Existing files are kept, damaged ones are replaced.

    The cache is TEMPLATEFLOW_HOME, or ~/.cache/templateflow. On a cluster, fetch once on a node
    with internet, and set TEMPLATEFLOW_HOME for the jobs.

    Exit codes: 0 all are there and undamaged, 64 unknown template, 65 one is damaged (--check), 66
    one is missing and cannot be downloaded.
    """
    from cadiff_cli.errors import DataError
    from cadiff_cli.io.templateflow import templateflow_home
    from cadiff_cli.io.templates import load_template, parse_specs, registry

    every = [name for name, entry in registry().items() if entry["source"] == "templateflow"]
    asked = dict.fromkeys(name for text in templates for name in parse_specs(text))
    names = every if not asked or "auto" in asked else [*asked]
    for name in names:
        try:
            template = load_template(name, offline=check)
        except DataError as error:
            if check:
                raise
            click.echo(f"cadiff: {error.message}: it is downloaded again", err=True)
            template = load_template(name, anew=True)
        click.echo(f"{name}\t{template.brain.grid!r}\t{templateflow_home()}")
