"""Handles on scripted HTTP/1.1 servers that run as processes of their own.

This module decides how such a server is started, reached, stopped in its tracks and killed, so that a test can treat
it as a real upstream that lies, stalls, dies and comes back. It never decides what a server answers (that is the
program in `upstream_server`, see its `Step` for the keys of a step), never signals a process it did not start,
and never leaves a process, a port or a file descriptor behind once a handle is closed. It is for POSIX systems.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeAlias

__all__ = ["Request", "Step", "Upstream", "generated", "upstreams"]

Step: TypeAlias = Mapping[str, object]
"""What one request gets back. Keys, all optional:

`status` (200), `headers` (a mapping or a list of pairs; they replace defaults of the same name), `body` (text)
or `size` (bytes of body, see `generated`), `delay` (seconds between the end of the request and the answer,
0), `chunked` (False), `interval` (seconds between the pieces of a slow fault, 0.01) and `fault`, one of:

- no answer: `hang`; `reset` (RST) and `close` (FIN) once the request was read; `stall_reader`, which reads the
  headers and nothing after them;
- no HTTP: `half_status` (half a status line, FIN), `garbage` (other bytes, FIN);
- an odd head, then the answer: `big_headers` (128 KiB), `drip_headers` (a byte per interval); and `endless_1xx`
  (100 and 103 in turn, for ever);
- an odd body: `drip` (a byte per interval, `size` 100), `cut` and `cut_reset` (half of `size` 1000, then FIN
  or RST), `tiny_chunks` (`size` 100 chunks of a byte), `gzip_bomb` (`size` 10 MiB of zeros once decoded);
- `close_after`: the right answer, then a FIN that no header announced.
"""

_PROGRAM = Path(__file__).with_name("upstream_server.py")
_START_BOUND = 20.0
_CONTROL_BOUND = 5.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request as an upstream read it.

    Attributes:
        method: in capitals, as a rule.
        target: the path with its query.
        headers: pairs in order of arrival.
        body_digest: the sha256 of the decoded body in hex, empty until `complete`.
        body_length: bytes of body read so far.
        connection: the serial number from 1 of the connection among those that carried requests.
        at: seconds of `time.monotonic()` when the headers were read.
        step: index of the script's step, None for `then`.
        complete: whether the body was read to its end.
    """

    method: str
    target: str
    headers: list[tuple[str, str]]
    body_digest: str
    body_length: int
    connection: int
    at: float
    step: int | None
    complete: bool

    def values(self, name: str) -> list[str]:
        """The values of all headers called `name` (in any case), in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


def generated(size: int) -> bytes:
    """The body an upstream makes for `size` bytes: the bytes 0 to 250, over and over."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


class Upstream:
    """One scripted server process on 127.0.0.1.

    Usable as a context manager, which starts and closes it. Safe to share between threads only for control calls:
    `script`, `log`, `stats`, `clear`, `accept_reset`; they raise RuntimeError if no process runs.

    From the first start to `close` the handle keeps the port reserved: while the process is dead, connections are
    refused, and nobody else is given the port.

    Args:
        name: told in every answer's `x-upstream`. Default "a".
        port: where it listens. Default 0, a free one.
        delay: seconds before every answer no script covers. Default 0.
        cert, key: paths of PEM files that turn TLS on. Default none.
        ca: path of the authorities whose client certificates are then required. Default none.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        name: str = "a",
        *,
        port: int = 0,
        delay: float = 0.0,
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
    ) -> None:
        self.name = name
        self._port = port
        self._options = ["--name", name, "--delay", str(float(delay))]
        for option, value in (("--cert", cert), ("--key", key), ("--ca", ca)):
            if value is not None:
                self._options += [option, os.fspath(value)]
        self._reserved: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()
        self._suspended = False

    @property
    def port(self) -> int:
        """Where it listens.

        Raises:
            RuntimeError: before the first start, if it was left to be chosen.
        """
        if not self._port:
            raise RuntimeError(f"upstream {self.name} has no port before it is started")
        return self._port

    @property
    def address(self) -> str:
        """Host and port as `127.0.0.1:port`."""
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process id, or None while no process runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> Self:
        """Start the process and wait, at most 20 s, until it listens; returns the handle itself.

        Raises:
            RuntimeError: if it runs already, its port is taken, or it died or did not come up in time; then with what
                it wrote to its stderr.
        """
        if self.pid is not None:
            raise RuntimeError(f"upstream {self.name} is running already")
        try:
            self._launch()
            self._await_listening()
        except BaseException:
            self.close()
            raise
        return self

    def _launch(self) -> None:
        self.kill()  # what is left of a process that died by itself
        self._reserve()
        # -I and -S: the program needs the standard library only, and starts in half the time. A process group of
        # its own: an interrupt from the terminal is for the parent, which then closes its upstreams in order.
        command = [sys.executable, "-I", "-S", os.fspath(_PROGRAM), "--port", str(self._port), *self._options]
        pipe, merged = subprocess.PIPE, subprocess.STDOUT
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=merged, bufsize=0, process_group=0)

    def _reserve(self) -> None:
        """Bind the port without listening, which Linux lets the program's own socket share."""
        if sys.platform != "linux" or self._reserved is not None:
            return
        reserved = socket.socket()
        try:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind((self.host, self._port))
        except OSError as error:
            reserved.close()
            raise RuntimeError(f"upstream {self.name} cannot have port {self._port}: {error}") from error
        self._reserved, self._port = reserved, reserved.getsockname()[1]

    def _await_listening(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        with process.stdout as output:
            told = self._read_until_listening(process, output)
        self._port = int(json.loads(told.splitlines()[-1])["port"])

    def _read_until_listening(self, process: subprocess.Popen[bytes], output: IO[bytes]) -> bytes:
        told, deadline = b"", time.monotonic() + _START_BOUND
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while not (told.endswith(b"\n") and told.splitlines()[-1].startswith(b'{"name"')):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"upstream {self.name} did not listen within {_START_BOUND:g} s: {_text(told)}")
                data = os.read(output.fileno(), 4096)
                if not data:
                    raise RuntimeError(f"upstream {self.name} died at its start ({process.wait()}): {_text(told)}")
                told += data
        return told

    def kill(self) -> None:
        """Kill the process (SIGKILL) and wait until it is gone; nothing if none runs."""
        self._suspended = False
        with self._lock:
            self._hang_up()
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process = None  # not sooner: an interrupt amid this leaves the rest to `close`

    def suspend(self) -> None:
        """Stop the process (SIGSTOP) and wait until it stands still: its port still takes connections, in silence.

        Raises:
            RuntimeError: if none runs.
        """
        pid = self._running()
        os.kill(pid, signal.SIGSTOP)
        self._suspended = True
        if sys.platform == "linux":
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a suspended process go on (SIGCONT); nothing if it is not suspended."""
        if self._suspended:
            os.kill(self._running(), signal.SIGCONT)
            self._suspended = False

    def restart(self) -> Self:
        """Start again on the same port, killing the process first if it runs; script and log start out empty."""
        self.kill()
        return self.start()

    def close(self) -> None:
        """Kill the process and give up the port; closing twice is allowed, and so is a later start."""
        self.kill()
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    def __enter__(self) -> Self:
        return self if self.pid is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def script(self, *steps: Step, then: Step | None = None) -> None:
        """Replace the script.

        Args:
            steps: one for each request to come.
            then: for all after those. Default a plain 200 after the handle's `delay`; one that is given has the delay
                it names itself.

        Raises:
            ValueError: if the upstream finds a step unplayable: an unknown key, a wrong value.
        """
        last = None if then is None else dict(then)
        self._call("PUT", "script", {"steps": [dict(step) for step in steps], "then": last})

    def accept_reset(self, on: bool = True) -> None:
        """Answer every new connection with a RST at once, or stop doing so; open connections stay as they are."""
        self._call("PUT", "accept_reset", on)

    def log(self) -> list[Request]:
        """The requests so far whose headers were read, in that order."""
        return [
            Request(**{**entry, "headers": [(name, value) for name, value in entry["headers"]]})
            for entry in self._call("GET", "log")
        ]

    def clear(self) -> None:
        """Empty the log; the script and the counts of `stats` go on."""
        self._call("DELETE", "log")

    def stats(self) -> dict[str, int]:
        """Counts since the start: `requests`, `connections_total` and, now, `connections_open`.

        Connections that carried only control requests do not count. One under `stall_reader` counts as open
        until the upstream ends, since an upstream that reads nothing does not see its client leave.
        """
        return {str(key): int(value) for key, value in self._call("GET", "stats").items()}

    def _running(self) -> int:
        pid = self.pid
        if pid is None:
            raise RuntimeError(f"upstream {self.name} is not running")
        return pid

    def _call(self, method: str, path: str, value: object = None) -> Any:
        self._running()
        with self._lock:
            try:
                status, answer = self._exchange(method, f"/_upstream/{path}", json.dumps(value).encode())
            except BaseException:
                self._hang_up()  # a late answer to this call must not be read as the answer to the next one
                raise
        if status != 200:
            raise ValueError(f"upstream {self.name}: {answer['error']}")
        return answer

    def _exchange(self, method: str, target: str, body: bytes) -> tuple[int, Any]:
        # The connection is kept, since no new one gets through while accept_reset is on. It is plain even where the
        # requests under test use TLS: the program takes control requests either way.
        if self._control is None:
            self._control = http.client.HTTPConnection(self.host, self.port, timeout=_CONTROL_BOUND)
        self._control.request(method, target, body)
        response = self._control.getresponse()
        return response.status, json.loads(response.read())

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None


def _text(told: bytes) -> str:
    return told.decode(errors="replace").strip()


@contextlib.contextmanager
def upstreams(
    count: int,
    *,
    delay: float = 0.0,
    cert: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    ca: str | os.PathLike[str] | None = None,
) -> Iterator[list[Upstream]]:
    """Yield started upstreams named a, b, c, ...; they start side by side, and all are closed at the end.

    Args:
        count: how many.
        delay, cert, key, ca: see `Upstream`.

    Raises:
        RuntimeError: see `Upstream.start`.
    """
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(count):
            name = chr(ord("a") + index % 26) + (str(index // 26) if index >= 26 else "")
            upstream = Upstream(name, delay=delay, cert=cert, key=key, ca=ca)
            stack.callback(upstream.close)
            upstream._launch()
            started.append(upstream)
        for upstream in started:
            upstream._await_listening()
        yield started
