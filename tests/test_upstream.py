"""The scripted upstream over real sockets: every fault, every control, and the life and death of its process."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from meshlib.testing.upstream import Upstream, generated, upstreams
from waiting import until

BOUND = 20.0
EMPTY = hashlib.sha256().hexdigest()
GET = b"GET /x HTTP/1.1\r\nhost: u\r\n\r\n"


@pytest.fixture
def up() -> Iterator[Upstream]:
    with Upstream("u") as upstream:
        yield upstream


@contextlib.contextmanager
def client(upstream: Upstream) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(upstream.host, upstream.port, timeout=BOUND)
    try:
        yield connection
    finally:
        connection.close()


def dial(upstream: Upstream, timeout: float = BOUND) -> socket.socket:
    return socket.create_connection((upstream.host, upstream.port), timeout=timeout)


def ask(
    connection: http.client.HTTPConnection, method: str = "GET", target: str = "/", body: Any = None, **more: Any
) -> tuple[http.client.HTTPResponse, bytes]:
    connection.request(method, target, body, **more)
    response = connection.getresponse()
    return response, response.read()


def fetch(upstream: Upstream) -> tuple[http.client.HTTPResponse, bytes]:
    with client(upstream) as connection:
        return ask(connection)


def drain(sock: socket.socket, data: bytearray | None = None) -> bytes:
    """Read to the end; ``data`` keeps what came before an error."""
    data = bytearray() if data is None else data
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


def receive(sock: socket.socket, least: int) -> bytes:
    data = b""
    while len(data) < least:
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    return data


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=BOUND).close()
    except ConnectionError:
        return True
    return False


def test_a_plain_answer_describes_the_request(up: Upstream) -> None:
    with client(up) as connection:
        response, body = ask(connection, "PUT", "/p?q=1", b"hello")
    assert (response.status, response.getheader("x-upstream")) == (200, "u")
    digest = hashlib.sha256(b"hello").hexdigest()
    assert json.loads(body) == {"upstream": "u", "method": "PUT", "path": "/p?q=1", "digest": digest, "length": 5}


def test_a_head_request_and_a_204_have_no_body(up: Upstream) -> None:
    up.script({"status": 200}, {"status": 204}, {"status": 304, "body": "none"})
    with client(up) as connection:
        for method, status in (("HEAD", 200), ("GET", 204), ("GET", 304), ("GET", 200)):
            response, body = ask(connection, method)
            assert response.status == status
        assert body
    assert up.stats()["connections_total"] == 1


def test_one_connection_carries_many_requests_even_pipelined(up: Upstream) -> None:
    up.script({}, {"delay": 0.05, "status": 201}, {"size": 10, "status": 202})
    with dial(up) as sock:
        sock.sendall(GET * 3 + GET.replace(b"host", b"connection: close\r\nhost"))
        answers = drain(sock)
    assert [answers[at + 9 : at + 12] for at in range(len(answers)) if answers[at:].startswith(b"HTTP/1.1 ")] == [
        b"200",
        b"201",
        b"202",
        b"200",
    ]
    assert {request.connection for request in up.log()} == {1}


def test_an_http_1_0_client_is_closed_on(up: Upstream) -> None:
    with dial(up) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"connection: close" in drain(sock)


def test_expect_100_continue_is_answered(up: Upstream) -> None:
    with dial(up) as sock:
        sock.sendall(b"PUT / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\nconnection: close\r\n\r\n")
        assert receive(sock, 25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"ok")
        assert drain(sock).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n folded: x\r\n\r\n",
        b"GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0x1\r\n",
        b"GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n",
    ],
)
def test_a_malformed_request_is_refused(up: Upstream, request_bytes: bytes) -> None:
    with dial(up) as sock:
        sock.sendall(request_bytes)
        assert drain(sock).startswith(b"HTTP/1.1 400 ")


def test_steps_are_used_up_in_order_and_then_holds(up: Upstream) -> None:
    up.script({"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}, then={"status": 500, "body": "é"})
    answers = [fetch(up) for _ in range(4)]
    assert [response.status for response, _ in answers] == [503, 429, 500, 500]
    assert answers[1][0].getheader("retry-after") == "1"
    assert answers[2][1].decode() == "é"
    assert [request.step for request in up.log()] == [0, 1, None, None]


def test_a_new_script_replaces_the_old_one(up: Upstream) -> None:
    up.script({"status": 503}, {"status": 503}, then={"status": 500})
    fetch(up)
    up.script({"status": 404})
    assert [fetch(up)[0].status for _ in range(2)] == [404, 200]


def test_headers_may_repeat_and_replace_defaults(up: Upstream) -> None:
    up.script({"headers": [["set-cookie", "a=1"], ["set-cookie", "b=2"], ["Content-Type", "x/y"]]})
    response, _ = fetch(up)
    assert response.headers.get_all("set-cookie") == ["a=1", "b=2"]
    assert response.headers.get_all("content-type") == ["x/y"]


def test_a_connection_close_header_is_kept_to(up: Upstream) -> None:
    up.script({"headers": {"connection": "close"}}, {"headers": {"connection": "close"}, "size": 3})
    for _ in range(2):
        with dial(up) as sock:
            sock.sendall(GET)
            assert b"connection: close" in drain(sock)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [0, 1, 250_000])
def test_bodies_of_a_size(up: Upstream, size: int, chunked: bool) -> None:
    up.script({"size": size, "chunked": chunked})
    response, body = fetch(up)
    assert body == generated(size)
    assert response.getheader("content-length") == (None if chunked else str(size))


def test_a_delay_comes_before_the_answer(up: Upstream) -> None:
    up.script({"delay": 0.2})
    began = time.monotonic()
    fetch(up)
    assert time.monotonic() - began >= 0.2


def test_the_handles_delay_holds_for_unscripted_answers() -> None:
    with Upstream(delay=0.2) as upstream:
        upstream.script({"status": 201})
        assert fetch(upstream)[0].status == 201
        began = time.monotonic()
        fetch(upstream)
        assert time.monotonic() - began >= 0.2


def test_hang_reads_and_never_answers(up: Upstream) -> None:
    up.script({"fault": "hang"})
    with dial(up, timeout=0.3) as sock:
        sock.sendall(b"PUT / HTTP/1.1\r\ncontent-length: 2\r\n\r\nok")
        with pytest.raises(TimeoutError):
            sock.recv(1)
        until(lambda: [request.complete for request in up.log()] == [True])
        assert up.stats()["connections_open"] == 1
    until(lambda: up.stats()["connections_open"] == 0)


def test_reset_comes_after_the_request(up: Upstream) -> None:
    up.script({"fault": "reset"})
    with dial(up) as sock:
        sock.sendall(GET)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert [request.complete for request in up.log()] == [True]


@pytest.mark.parametrize(("fault", "answer"), [("close", b""), ("half_status", b"HTTP/1.1 20")])
def test_an_answer_ends_before_it_began(up: Upstream, fault: str, answer: bytes) -> None:
    up.script({"fault": fault})
    with dial(up) as sock:
        sock.sendall(GET)
        assert drain(sock) == answer


def test_garbage_is_not_http(up: Upstream) -> None:
    up.script({"fault": "garbage"})
    with pytest.raises(http.client.BadStatusLine):
        fetch(up)


def test_big_headers_exceed_100_kb_and_the_connection_goes_on(up: Upstream) -> None:
    up.script({"fault": "big_headers", "body": "after"})
    with client(up) as connection:
        response, body = ask(connection)
        assert sum(len(value) for value in response.headers.values()) > 100_000
        assert body == b"after"
        assert ask(connection)[0].status == 200
    assert up.stats()["connections_total"] == 1


def test_endless_1xx_goes_on_until_the_client_leaves(up: Upstream) -> None:
    up.script({"fault": "endless_1xx", "interval": 0})
    with dial(up) as sock:
        sock.sendall(GET)
        data = receive(sock, 100_000)
        assert b"HTTP/1.1 103 " in data
        assert data.startswith(b"HTTP/1.1 100 ")
        assert b"HTTP/1.1 2" not in data
    until(lambda: up.stats()["connections_open"] == 0)


def test_drip_headers_end_in_a_right_answer(up: Upstream) -> None:
    up.script({"fault": "drip_headers", "interval": 0.002, "body": "slow"})
    began = time.monotonic()
    _, body = fetch(up)
    assert body == b"slow"
    assert time.monotonic() - began >= 0.1


def test_drip_sends_the_body_byte_by_byte(up: Upstream) -> None:
    up.script({"fault": "drip", "size": 50, "interval": 0.005})
    with client(up) as connection:
        began = time.monotonic()
        response, body = ask(connection)
        assert (response.getheader("content-length"), body) == ("50", generated(50))
        assert time.monotonic() - began >= 0.2
        assert ask(connection)[0].status == 200


@pytest.mark.parametrize("size", [1000, 300_000])
def test_cut_stops_half_way(up: Upstream, size: int) -> None:
    up.script({"fault": "cut", "size": size})
    with pytest.raises(http.client.IncompleteRead) as caught:
        fetch(up)
    assert caught.value.partial == generated(size)[: size // 2]


def test_cut_may_be_chunked(up: Upstream) -> None:
    up.script({"fault": "cut", "size": 10, "chunked": True})
    with dial(up) as sock:
        sock.sendall(GET)
        assert drain(sock).endswith(b"\r\n\r\n5\r\n" + generated(5) + b"\r\n")


def test_cut_reset_sends_half_and_resets(up: Upstream) -> None:
    up.script({"fault": "cut_reset", "body": "abcdef"})
    with dial(up) as sock:
        sock.sendall(GET)
        data = bytearray()
        with pytest.raises(ConnectionResetError):
            drain(sock, data)
    assert b"content-length: 6\r\n" in data
    assert data.endswith(b"\r\n\r\nabc")


def test_tiny_chunks_hold_one_byte_each(up: Upstream) -> None:
    up.script({"fault": "tiny_chunks", "size": 300}, {"fault": "tiny_chunks", "body": "ab"})
    assert fetch(up)[1] == generated(300)
    with dial(up) as sock:
        sock.sendall(GET)
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            answer += receive(sock, 1)
    assert answer.endswith(b"\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\n\r\n")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_gzip_bomb_unpacks_to_its_size(up: Upstream, chunked: bool) -> None:
    size = 3_000_001
    up.script({"fault": "gzip_bomb", "size": size, "chunked": chunked})
    response, body = fetch(up)
    assert response.getheader("content-encoding") == "gzip"
    assert len(body) < size // 100
    assert gzip.decompress(body) == bytes(size)


def test_close_after_does_not_announce_the_close(up: Upstream) -> None:
    up.script({"fault": "close_after"})
    with dial(up) as sock:
        sock.sendall(GET)
        answer = drain(sock)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert json.loads(body)["path"] == "/x"
    assert b"connection" not in head.lower()


def test_stall_reader_leaves_the_body_unread(up: Upstream) -> None:
    up.script({"fault": "stall_reader"})
    with dial(up, timeout=0.3) as sock:
        sock.sendall(b"PUT / HTTP/1.1\r\ncontent-length: 1000000000\r\n\r\n")
        until(lambda: len(up.log()) == 1)
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(100_000_000))
        with pytest.raises(TimeoutError):
            sock.recv(1)
    (request,) = up.log()
    assert (request.complete, request.body_digest, request.body_length) == (False, "", 0)


def test_accept_reset_and_back(up: Upstream) -> None:
    up.accept_reset()
    for _ in range(3):
        with pytest.raises(ConnectionResetError) as caught:
            fetch(up)
        assert not isinstance(caught.value, http.client.RemoteDisconnected), "that was a FIN"
    assert up.stats() == {"requests": 0, "connections_open": 0, "connections_total": 3}
    up.accept_reset(False)
    assert fetch(up)[0].status == 200


def test_accept_reset_leaves_open_connections_alone(up: Upstream) -> None:
    with client(up) as connection:
        ask(connection)
        up.accept_reset()
        assert ask(connection)[0].status == 200


def test_the_log_tells_what_was_read(up: Upstream) -> None:
    began = time.monotonic()
    with client(up) as connection:
        ask(connection, "POST", "/a?b=c", b"body", headers={"X-Twice": "1", "x-twice": "2"})
        ask(connection)
    fetch(up)
    first, second, third = up.log()
    assert (first.method, first.target, first.body_length, first.complete) == ("POST", "/a?b=c", 4, True)
    assert first.body_digest == hashlib.sha256(b"body").hexdigest()
    assert first.values("X-TWICE") == ["1", "2"]
    assert ("X-Twice", "1") in first.headers
    assert (second.body_digest, second.body_length, second.complete) == (EMPTY, 0, True)
    assert [request.connection for request in (first, second, third)] == [1, 1, 2]
    assert began <= first.at <= second.at <= third.at <= time.monotonic()


@pytest.mark.parametrize("size", [0, 1, 5, 70_000, 2_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_digests_of_both_framings(up: Upstream, size: int, chunked: bool) -> None:
    data = generated(size)
    pieces = (data[at : at + 9973] for at in range(0, size, 9973))
    with client(up) as connection:
        if chunked:
            _, body = ask(
                connection, "POST", "/", pieces, encode_chunked=True, headers={"transfer-encoding": "chunked"}
            )
        else:
            _, body = ask(connection, "POST", "/", data)
        assert ask(connection)[0].status == 200
    digest = hashlib.sha256(data).hexdigest()
    request = up.log()[0]
    assert (request.body_digest, request.body_length) == (digest, size)
    assert (json.loads(body)["digest"], json.loads(body)["length"]) == (digest, size)


def test_chunks_survive_any_cut_of_the_stream(up: Upstream) -> None:
    body = b"3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\ntrailer: t\r\n\r\n"
    sent = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + body
    with dial(up) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in sent:
            sock.sendall(bytes([byte]))
        assert receive(sock, 1)
    assert up.log()[0].body_digest == hashlib.sha256(b"abc0123456789").hexdigest()


def test_a_request_is_logged_before_its_body_is_complete(up: Upstream) -> None:
    with dial(up) as sock:
        sock.sendall(b"PUT / HTTP/1.1\r\ncontent-length: 4\r\n\r\nab")
        until(lambda: [r.body_length for r in up.log()] == [2])
        assert (up.log()[0].complete, up.log()[0].body_digest) == (False, "")
        sock.sendall(b"cd")
        receive(sock, 1)
    assert (up.log()[0].complete, up.log()[0].body_length) == (True, 4)


def test_clear_empties_the_log_and_only_that(up: Upstream) -> None:
    up.script({"status": 503}, {"status": 504})
    fetch(up)
    up.clear()
    assert up.log() == []
    assert fetch(up)[0].status == 504
    assert [request.step for request in up.log()] == [1]


def test_stats_count_requests_and_connections_but_not_control(up: Upstream) -> None:
    assert up.stats() == {"requests": 0, "connections_open": 0, "connections_total": 0}
    with dial(up), client(up) as connection:
        ask(connection)
        ask(connection)
        until(lambda: up.stats() == {"requests": 2, "connections_open": 2, "connections_total": 2})
    until(lambda: up.stats() == {"requests": 2, "connections_open": 0, "connections_total": 2})


def test_control_over_bare_http(up: Upstream) -> None:
    with client(up) as connection:
        put, _ = ask(connection, "PUT", "/_upstream/script", json.dumps({"steps": [{"status": 418}]}))
        assert put.status == 200
        assert json.loads(ask(connection, "GET", "/_upstream/stats")[1])["connections_open"] == 0
        assert ask(connection)[0].status == 418
        assert json.loads(ask(connection, "GET", "/_upstream/stats")[1])["connections_open"] == 1
        (entry,) = json.loads(ask(connection, "GET", "/_upstream/log")[1])
        assert (entry["step"], entry["connection"], entry["complete"]) == (0, 1, True)
        assert ask(connection, "DELETE", "/_upstream/log")[0].status == 200
        assert json.loads(ask(connection, "GET", "/_upstream/log")[1]) == []
        assert ask(connection, "GET", "/_upstream/nothing")[0].status == 404
        assert ask(connection, "PUT", "/_upstream/script", b"{")[0].status == 400
        assert ask(connection, "PUT", "/_upstream/script", json.dumps({"step": []}))[0].status == 400


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({"statuss": 200}, "step 1: unknown key 'statuss'; known keys: status, headers, body"),
        ({"fault": "explode"}, "step 1: unknown fault 'explode'; known faults: hang, reset"),
        ({"fault": "accept_reset"}, "accept_reset happens before any request"),
        ({"status": "200"}, "step 1: status must be an integer from 200 to 999, not '200'"),
        ({"status": 100}, "status must be"),
        ({"headers": {"a": 1}}, "headers must be"),
        ({"delay": -1}, "delay must be"),
        ({"chunked": 1}, "chunked must be"),
        ({"size": 1, "body": ""}, "body and size exclude each other"),
    ],
)
def test_an_unplayable_step_is_named(up: Upstream, step: dict[str, object], told: str) -> None:
    up.script({"status": 503}, {"status": 503})
    with pytest.raises(ValueError, match="upstream u: ") as caught:
        up.script({}, step)
    assert told in str(caught.value)
    assert fetch(up)[0].status == 503, "a refused script must leave the one before in force"


def test_an_unplayable_then_is_named(up: Upstream) -> None:
    with pytest.raises(ValueError, match="then: unknown key 'x'"):
        up.script(then={"x": 1})


def test_kill_refuses_and_restart_takes_the_same_port(up: Upstream) -> None:
    up.script(then={"status": 503})
    with client(up) as connection:
        ask(connection)
        port, pid = up.port, up.pid
        for _ in range(3):
            up.kill()
            assert up.pid is None
            assert refuses(port)
            up.restart()
            assert (up.port, up.address) == (port, f"127.0.0.1:{port}")
            assert fetch(up)[0].status == 200
    assert up.pid not in (None, pid)
    assert len(up.log()) == 1


def test_a_process_killed_by_others_can_be_restarted(up: Upstream) -> None:
    assert up.pid is not None
    os.kill(up.pid, signal.SIGKILL)
    until(lambda: up.pid is None)
    with pytest.raises(RuntimeError, match="upstream u is not running"):
        up.stats()
    up.restart()
    assert fetch(up)[0].status == 200


def test_suspend_and_resume(up: Upstream) -> None:
    for _ in range(2):
        up.suspend()
        with dial(up, timeout=0.3) as sock:
            sock.sendall(GET)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            up.resume()
            sock.settimeout(BOUND)
            assert receive(sock, 1)
    up.resume()


def test_a_suspended_upstream_can_be_closed() -> None:
    upstream = Upstream().start()
    upstream.suspend()
    upstream.close()
    upstream.close()
    assert upstream.pid is None
    assert refuses(upstream.port)


def test_a_handle_before_and_after_its_process(up: Upstream) -> None:
    idle = Upstream("idle")
    with pytest.raises(RuntimeError, match="no port before it is started"):
        _ = idle.address
    for call in (idle.stats, idle.log, idle.suspend):
        with pytest.raises(RuntimeError, match="upstream idle is not running"):
            call()
    idle.kill()
    idle.close()
    with pytest.raises(RuntimeError, match="running already"):
        up.start()
    up.close()
    port = up.port
    assert up.start().port == port


def test_a_given_port_is_taken_or_refused() -> None:
    with Upstream() as first:
        port = first.port
        with pytest.raises(RuntimeError, match="upstream second "):
            Upstream("second", port=port).start()
    with Upstream(port=port) as again:
        assert again.port == port


def test_a_start_that_fails_tells_what_the_process_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="upstream u died at its start") as caught:
        Upstream("u", cert=tmp_path / "none.pem").start()
    assert "FileNotFoundError" in str(caught.value)


def test_upstreams_are_named_and_closed() -> None:
    with upstreams(3, delay=0.0) as started:
        assert [upstream.name for upstream in started] == ["a", "b", "c"]
        assert [fetch(upstream)[0].getheader("x-upstream") for upstream in started] == ["a", "b", "c"]
    assert [upstream.pid for upstream in started] == [None] * 3
    assert all(refuses(upstream.port) for upstream in started)


def test_upstreams_close_on_an_error(tmp_path: Path) -> None:
    kept: list[Upstream] = []

    def fail() -> None:
        with upstreams(2) as started:
            kept.extend(started)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert [upstream.pid for upstream in kept] == [None, None]
    with pytest.raises(RuntimeError, match="died at its start"), upstreams(2, cert=tmp_path / "none.pem"):
        pass


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs a list of open descriptors")
def test_no_descriptor_is_left_open() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        with upstreams(2) as started:
            started[0].stats()
            started[0].restart().log()
            started[1].kill()
        assert count() == before


def test_children_die_with_a_parent_that_was_killed() -> None:
    program = (
        "import time\n"
        "from meshlib.testing.upstream import upstreams\n"
        "with upstreams(2) as started:\n"
        "    print(*(u.port for u in started), flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        ports = [int(port) for port in parent.stdout.readline().split()]
        try:
            assert len(ports) == 2
            assert not any(refuses(port) for port in ports)
        finally:
            parent.kill()
    until(lambda: all(refuses(port) for port in ports))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 as cert.pem, its key as key.pem, and the authority behind it as ca.pem."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    return folder


@contextlib.contextmanager
def secure(upstream: Upstream, context: ssl.SSLContext) -> Iterator[http.client.HTTPSConnection]:
    connection = http.client.HTTPSConnection(upstream.host, upstream.port, timeout=BOUND, context=context)
    try:
        yield connection
    finally:
        connection.close()


def test_tls_answers_faults_and_control(certificate: Path) -> None:
    context = ssl.create_default_context(cafile=str(certificate / "ca.pem"))
    with Upstream("t", cert=certificate / "cert.pem", key=certificate / "key.pem") as upstream:
        upstream.script({"status": 202}, {"fault": "cut", "size": 10}, {"fault": "reset"}, {"size": 200_000})
        with secure(upstream, context) as connection:
            assert ask(connection, "PUT", "/", b"x" * 100_000)[0].status == 202
            with pytest.raises(http.client.IncompleteRead):
                ask(connection)
        with secure(upstream, context) as connection, pytest.raises(ConnectionResetError):
            ask(connection)
        with secure(upstream, context) as connection:
            assert ask(connection)[1] == generated(200_000)
            assert ask(connection, "GET", "/_upstream/stats")[0].status == 200
        assert upstream.log()[0].body_digest == hashlib.sha256(b"x" * 100_000).hexdigest()
        assert upstream.stats()["requests"] == 4
        until(lambda: upstream.stats()["connections_open"] == 0)


def test_a_tls_port_takes_no_plain_request(certificate: Path) -> None:
    with Upstream("t", cert=certificate / "cert.pem", key=certificate / "key.pem") as upstream:
        response, body = fetch(upstream)
        assert (response.status, b"speaks TLS" in body) == (400, True)
        dial(upstream).close()
        assert upstream.log() == []
        until(lambda: upstream.stats()["connections_open"] == 0)


def test_client_certificates_are_required(certificate: Path) -> None:
    cert, key, ca = (certificate / name for name in ("cert.pem", "key.pem", "ca.pem"))
    stranger = ssl.create_default_context(cafile=str(ca))
    known = ssl.create_default_context(cafile=str(ca))
    known.load_cert_chain(cert, key)
    with Upstream("t", cert=cert, key=key, ca=ca) as upstream:
        with secure(upstream, known) as connection:
            assert ask(connection)[0].status == 200
        with secure(upstream, stranger) as connection, pytest.raises((ssl.SSLError, ConnectionError)):
            ask(connection)
        assert upstream.stats()["requests"] == 1
        until(lambda: upstream.stats()["connections_open"] == 0)
