"""The command line: `meshlib demo`.

Decides which subcommand runs and what its arguments are; each subcommand is a module of its own, imported when it is
called. It never does the work itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import meshlib
from meshlib.cli.endings import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments after the program's name. Default those of the process.

    Returns:
        The exit status of the process.

    Raises:
        SystemExit: with status 2 and a message on stderr, if the arguments are not usable.
    """
    parser = argparse.ArgumentParser(prog="meshlib", description="A service mesh as a library, over httpx.")
    parser.add_argument("--version", action="version", version=f"meshlib {meshlib.__version__}")
    subparsers = parser.add_subparsers(title="subcommands", dest="subcommand", metavar="SUBCOMMAND")
    _add_demo(subparsers)
    options = parser.parse_args(argv)
    if options.subcommand is None:
        parser.print_help(sys.stderr)
        return 2
    return guarded(f"meshlib {options.subcommand}", lambda: options.run(options))


def _add_demo(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = (
        "Start three upstream processes on this machine and call them through a mesh while one is killed, another is "
        "stopped, and both are brought back; then make the same calls through plain httpx. The exit status is 0 only "
        "if no call failed through the mesh."
    )
    demo = subcommands.add_parser("demo", help="kill an endpoint under load; no call fails", description=about)
    calls = _whole(at_least=30)  # fewer leave no room between one fault and the next
    demo.add_argument("--calls", type=calls, default=2000, metavar="N", help="how many GETs; default 2000")
    demo.add_argument(
        "--concurrency", type=_whole(at_least=1), default=16, metavar="N", help="how many at a time; default 16"
    )
    demo.add_argument("--sync", action="store_true", help="threads and httpx.Client instead of httpx.AsyncClient")
    demo.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    demo.set_defaults(run=lambda options: _demo(demo, options))


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.concurrency > options.calls:
        parser.error(f"--concurrency must be at most --calls ({options.calls}), got {options.concurrency}")
    from meshlib.cli import demo

    return demo.run(calls=options.calls, concurrency=options.concurrency, is_sync=options.sync, wants_json=options.json)


def _whole(*, at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = at_least - 1
        if number < at_least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {at_least}, got {text!r}")
        return number

    return parse
