"""The command line: options in, one library call, errors as one line and an exit code.

Commands live in modules of their own and are imported when they are asked for, and heavy libraries
when they are run, so that ``--help`` is instant.
"""

import errno
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from cadiff_cli import __version__, machine
from cadiff_cli.errors import (
    TERMINATED,
    CadiffError,
    DataError,
    DiskError,
    OutputError,
    UsageError,
    in_a_line,
)

COMMANDS = (
    "seg",
    "mask",
    "reorient",
    "run",
    "report",
    "export",
    "ranges",
    "fetch",
    "train",
    "crossval",
    "ablate",
    "paint",
    "train-mask",
    "atlas",
    "train-parcels",
    "example",
    "fuse",
    "evaluate",
    "retest",
)
"""In the order in which a newcomer needs them; a module of each name holds its ``command``."""


HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


class Lazy(click.Group):
    """A group that imports a command's module only to run it.

    The module of a command ``NAME`` is ``cli/PREFIX_NAME``, without a ``prefix`` ``cli/NAME``.
    """

    def __init__(self, *args: Any, names: tuple[str, ...], prefix: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.names, self.prefix = names, prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which a newcomer needs them."""
        return list(self.names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in self.names:
            return None
        module = f"{self.prefix}{cmd_name}".replace("-", "_")
        command: click.Command = import_module(f"cadiff_cli.cli.{module}").command
        return command


def family(name: str, *names: str) -> Callable[[Callable[..., Any]], click.Group]:
    """Decorator of the group ``cadiff NAME``, whose commands are the modules ``NAME_...``."""
    return click.group(
        name=name, cls=Lazy, names=names, prefix=f"{name}_", context_settings=HELP_OPTIONS
    )


@click.group(cls=Lazy, names=COMMANDS, context_settings=HELP_OPTIONS)
@click.version_option(__version__, prog_name="cadiff")
def cadiff() -> None:
    """Label brain structures of T1-weighted MRI, and measure their volumes."""


def main() -> None:
    """Entry point of ``cadiff``."""
    sys.exit(guarded(lambda: cadiff.main(prog_name="cadiff", standalone_mode=False)))


def segment_main() -> None:
    """Entry point of ``cadiff-seg``, the same command as ``cadiff seg``."""

    def call() -> object:
        from cadiff_cli.cli.seg import command

        return command.main(prog_name="cadiff-seg", standalone_mode=False)

    sys.exit(guarded(call))


def guarded(call: Callable[[], object]) -> int:
    """Run a command; every error becomes one line on stderr and a documented exit code."""
    # A batch system ends a job with SIGTERM: leave through the clean-up code.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    # Libraries look for a home when they are imported; a container's user may have none.
    os.environ.setdefault("HOME", str(machine.home()))
    machine.share_cores()
    # Names of files need not be UTF-8.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        code = call()
        return code if isinstance(code, int) else 0
    except CadiffError as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return UsageError.exit_code
    except click.UsageError as error:
        hint = f". Try '{error.ctx.command_path} --help'." if error.ctx else ""
        return _fail(f"{error.format_message().rstrip('.')}{hint}", UsageError.exit_code)
    except (click.Abort, KeyboardInterrupt, EOFError) as error:
        # click takes a file that ends early for the end of a dialogue.
        if EOFError in (type(error), type(error.__cause__)):
            return _fail(
                "a file is damaged: it ends before its content does. Copy the input files again",
                DataError.exit_code,
            )
        return _fail("interrupted", 130)
    except SystemExit as error:
        if error.code != TERMINATED:
            raise
        return _fail("ended by SIGTERM. Give the same command again", TERMINATED)
    except MemoryError:
        return _fail("out of memory. Close other programs, or use --tile 96", 1)
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = error.filename or "no file"
        denied = isinstance(error, PermissionError) or error.errno == errno.EROFS
        code = OutputError.exit_code if denied else DiskError.exit_code
        return _fail(f"{error.strerror or error} ({where}). Check this path and its folder", code)
    except Exception as error:
        return _fail(
            f"unexpected {in_a_line(error)}. This is a bug: please report it with {_crash_file()}",
            1,
        )


def _crash_file() -> Path:
    """The traceback that the user is spared, for whoever mends it."""
    handle, name = tempfile.mkstemp(prefix="cadiff-crash-", suffix=".txt")
    with open(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"cadiff {__version__}\n{' '.join(sys.argv)}\n\n{traceback.format_exc()}")
    return Path(name)


def _fail(text: str, code: int) -> int:
    click.echo(f"cadiff: error: {' '.join(text.split())}", err=True)
    return code
