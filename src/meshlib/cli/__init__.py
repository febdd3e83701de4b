"""The command line: `meshlib demo`, `meshlib resolve`, `meshlib check`, `meshlib top`.

Decides which subcommand runs and what its arguments are; each subcommand is a module of its own, imported when it is
called. It never does the work itself.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

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
    _add_resolve(subparsers)
    _add_check(subparsers)
    _add_top(subparsers)
    options = parser.parse_args(argv)
    if options.subcommand is None:
        parser.print_help(sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what is shown may not be of its encoding
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


def _add_resolve(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = (
        "Ask a resolver once and print the endpoints that it sees, as it sees them: names are not looked up. The exit "
        "status is 0 if it answered, 1 if it did not, 2 if the URL is not usable."
    )
    resolve = subcommands.add_parser("resolve", help="print what a resolver sees", description=about)
    url_help = "static:, file:, dns://, dns+srv://, consul://, ... ; of several the first are preferred"
    resolve.add_argument("urls", nargs="+", metavar="URL", help=url_help)
    resolve.add_argument("--watch", action="store_true", help="go on, and print what changes, until Ctrl-C")
    resolve.add_argument("--json", action="store_true", help="one JSON document; with --watch one line per change")
    service_help = "the service that asks, for a resolver that goes by it; default orders"
    resolve.add_argument("--service", default="orders", metavar="NAME", help=service_help)
    resolve.set_defaults(run=_resolve)


def _resolve(options: argparse.Namespace) -> int:
    from meshlib.cli import resolve

    return resolve.run(options.urls, service=options.service, is_watching=options.watch, wants_json=options.json)


def _add_check(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = (
        "Print every fault of a configuration, one a line. The exit status is 0 if there is none, 1 if there is, 2 if "
        "the file cannot be read."
    )
    check = subcommands.add_parser("check", help="print what is wrong with a configuration", description=about)
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help="such as mesh.toml")
    live_help = "find the endpoints as well, and connect to each; the status is 1 for a service that has none to call"
    check.add_argument("--live", action="store_true", help=live_help)
    timeout_help = "for finding the endpoints; default 5"
    check.add_argument("--timeout", type=_seconds, default=5.0, metavar="SECONDS", help=timeout_help)
    check.add_argument("--schema", action="store_true", help="print a JSON Schema for editors, and nothing else")
    check.set_defaults(run=lambda options: _check(check, options))


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if (options.file is None) != options.schema:
        parser.error("give a FILE, or --schema")
    from meshlib.cli import check

    if options.schema:
        return check.print_schema()
    return check.run(options.file, is_live=options.live, timeout=options.timeout)


def _add_top(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = (
        "Show what the status page of a running mesh tells, live, until Ctrl-C. The exit status is 1 if there was no "
        "answer at first, 2 if the URL is not usable."
    )
    top = subcommands.add_parser("top", help="show the endpoints of a running mesh, live", description=about)
    url_help = "where its status page is mounted; a user and a password in it are never shown"
    top.add_argument("url", metavar="URL", help=url_help)
    interval_help = "from one answer to the next question; default 1"
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="SECONDS", help=interval_help)
    top.add_argument("--once", action="store_true", help="print one answer, whole, and end")
    top.set_defaults(run=_top)


def _top(options: argparse.Namespace) -> int:
    from meshlib.cli import top

    return top.run(options.url, interval=options.interval, is_once=options.once)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600.0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0.1 to 3600, got {text!r}")
    return seconds


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
