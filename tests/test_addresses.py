"""What the broker may reach for others, and that nothing else ever sees a connection.

Each URL is tried twice: as a subscriber names it, and as if it had got past that. A listener on 127.0.0.1 counts
who connects.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import ip_network
from pathlib import Path
from shutil import which
from threading import Event

import aiohttp
import pytest
from aiohttp import web

from broker.addresses import MAX_URL_CHARACTERS, Guard, look_up, parse_network
from broker.errors import InvalidParams

DEADLINE = 20.0
PUBLIC, OTHER_PUBLIC = "1.1.1.1", "2606:4700:4700::1111"

LOOPBACK_HOSTS = (
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "0x7f000001",
    "0x7f.0.0.1",
    "0X7F.1",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "127.0.0.1.",
    "127.0.0.1..",
    "127.255.255.254",
    "0",
    "0.0.0.0",
    "localhost",
    "localhost.",
    "LOCALHOST",
    "ｌｏｃａｌｈｏｓｔ",
    "１２７.0.0.1",
    "①②⑦.0.0.1",
    "127。0。0。1",
    "%31%32%37.0.0.1",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "[fe80::1%lo]",
    "[fe80::1%25lo]",
    "[::1%lo]",
)
OTHER_HOSTS = (
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "[::ffff:10.0.0.1]",
    "[::ffff:1.1.1.1]",
    "[64:ff9b::10.0.0.1]",
    "[64:ff9b::8.8.8.8]",
    "[100::1]",
    "[2001::1]",
    "[2001:20::1]",
    "[2001:db8::1]",
    "[2002:a00:1::1]",
    "[3fff::1]",
    "[5f00::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fe80::a9fe:a9fe]",
    "[fec0::1]",
    "[ff02::1]",
    "[ff0e::1]",
)


class Listener:
    """A server on 127.0.0.1 that counts those who connect."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[str] = []
        self.port = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append(f"{request.url.host} {request.path}")
        return web.Response()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    """A listener that takes plain HTTP."""
    async for started in listening(None):
        yield started


async def listening(tls: ssl.SSLContext | None) -> AsyncIterator[Listener]:
    found = Listener()
    application = web.Application()
    application.router.add_post("/{path:.*}", found.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    loop = asyncio.get_running_loop()
    assert runner.server is not None
    make = runner.server

    def counted() -> asyncio.BaseProtocol:
        found.connections += 1
        return make()

    server = await loop.create_server(counted, "127.0.0.1", 0, ssl=tls)
    found.port = server.sockets[0].getsockname()[1]
    yield found
    server.close()
    await runner.cleanup()


def answers(*answers: Sequence[str]) -> Callable[[str], Sequence[str]]:
    """Return a DNS that gives these answers one after the other, and the last one for ever."""
    left = list(answers)
    return lambda host: left.pop(0) if len(left) > 1 else left[0]


async def post(guard: Guard, url: str, tls: ssl.SSLContext | None = None) -> int:
    """Push to a URL as if it had been checked; return the status of the answer."""
    scheme = url.split(":")[0]
    timeout = aiohttp.ClientTimeout(DEADLINE)
    async with (
        aiohttp.ClientSession(connector=guard.connector(scheme, tls=tls)) as session,
        session.post(url, timeout=timeout) as response,
    ):
        return response.status


async def refusal(guard: Guard, url: str) -> str:
    """Return why a URL is refused when it is subscribed."""
    with pytest.raises(InvalidParams) as caught:
        await guard.check_url(url)
    assert caught.value.data["param"] == "url"
    return caught.value.message


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", [*LOOPBACK_HOSTS, *OTHER_HOSTS])
async def test_no_private_address_is_reached_in_any_notation(listener: Listener, host: str, scheme: str) -> None:
    guard = Guard()
    url = f"{scheme}://{host}:{listener.port}/"
    assert "`url`" in await refusal(guard, url)
    with pytest.raises((aiohttp.ClientError, ValueError)):
        await post(guard, url)
    assert listener.connections == 0


@pytest.mark.parametrize("host", ["[::ffff:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "127.1", "0x7f.1"])
async def test_an_address_inside_another_one_is_not_allowed_with_it(listener: Listener, host: str) -> None:
    guard = Guard([parse_network("127.0.0.0/8")])
    url = f"http://{host}:{listener.port}/"
    await refusal(guard, url)
    if host != "0x7f.1":  # for the system that is 127.0.0.1, and nothing else
        with pytest.raises(aiohttp.ClientError):
            await post(guard, url)
        assert listener.connections == 0


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "172.15.255.255", "172.32.0.1", OTHER_PUBLIC, "2a00:1450::1"])
async def test_a_public_address_is_reached_by_https_alone(address: str) -> None:
    guard = Guard(look_up=answers([address]))
    await guard.check_url("https://receiver.test/hook?key=1")
    host = f"[{address}]" if ":" in address else address
    await guard.check_url(f"https://{host}:8443/")
    assert "may not be reached" in await refusal(guard, "http://receiver.test/hook")
    assert "may not be reached" in await refusal(guard, f"http://{host}/hook")


async def test_an_allowed_network_is_reached_by_http_too_and_no_other_is(listener: Listener) -> None:
    guard = Guard([parse_network("127.0.0.0/8"), parse_network("fd00::/8")])
    for url in (f"http://127.0.0.1:{listener.port}/a", f"http://localhost:{listener.port}/b"):
        await Guard([parse_network("127.0.0.0/8"), parse_network("::1")]).check_url(url)
        assert await post(Guard([parse_network("127.0.0.0/8"), parse_network("::1")]), url) == 200
    assert listener.requests == ["127.0.0.1 /a", "localhost /b"]
    await guard.check_url("https://127.0.0.1/")
    await guard.check_url("http://[fd00::1]/")
    for url in ("http://10.0.0.1/", "http://1.1.1.1/", "http://[::1]/", "https://[fe80::1]/"):
        await refusal(guard, url)


@pytest.mark.parametrize("others", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::1", PUBLIC], [OTHER_PUBLIC, "fe80::1"]])
async def test_one_forbidden_address_among_many_is_enough(listener: Listener, others: list[str]) -> None:
    guard = Guard(look_up=answers(others))
    await refusal(guard, f"https://receiver.test:{listener.port}/")
    with pytest.raises(aiohttp.ClientConnectorDNSError):
        await post(guard, f"https://receiver.test:{listener.port}/")
    assert listener.connections == 0


async def test_a_host_that_moves_to_a_private_address_once_it_was_checked_is_not_followed(listener: Listener) -> None:
    guard = Guard(look_up=answers([PUBLIC], ["127.0.0.1"]))
    url = f"https://receiver.test:{listener.port}/"
    await guard.check_url(url)
    with pytest.raises(aiohttp.ClientConnectorDNSError):
        await post(guard, url)
    assert listener.connections == 0


async def test_a_connection_is_made_to_the_address_that_was_checked(listener: Listener) -> None:
    """Nobody is asked a second time, where the answer might be another."""
    asked: Counter[str] = Counter()

    def once(host: str) -> list[str]:
        asked[host] += 1
        return ["127.0.0.1"] if asked[host] == 1 else ["10.0.0.1"]

    guard = Guard([parse_network("127.0.0.1")], look_up=once)
    async with aiohttp.ClientSession(connector=guard.connector("http")) as session:
        for _ in range(3):
            async with session.post(f"http://receiver.test:{listener.port}/") as response:
                assert response.status == 200
                await response.read()
    assert (asked["receiver.test"], listener.connections, len(listener.requests)) == (1, 1, 3)


async def test_each_connection_asks_anew(listener: Listener) -> None:
    guard = Guard([parse_network("127.0.0.1")], look_up=answers(["127.0.0.1"], ["10.0.0.1"]))
    async with aiohttp.ClientSession(connector=guard.connector("http")) as session:
        url = f"http://receiver.test:{listener.port}/"
        async with session.post(url, headers={"Connection": "close"}) as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientConnectorDNSError):
            await session.post(url)
    assert listener.connections == 1


async def test_hosts_whose_dns_hangs_hold_up_nobody_else(listener: Listener) -> None:
    release = Event()
    asked: Counter[str] = Counter()

    def hanging(host: str) -> list[str]:
        asked[host] += 1
        if host.startswith("dead"):
            release.wait(DEADLINE)
        return ["127.0.0.1"]

    guard = Guard([parse_network("127.0.0.1")], look_up=hanging)
    connector = guard.connector("http")
    async with aiohttp.ClientSession(connector=connector) as session:
        hung = [
            asyncio.create_task(session.post(f"http://dead{number % 4}.test:{listener.port}/")) for number in range(100)
        ]
        timeout = aiohttp.ClientTimeout(DEADLINE)
        async with session.post(f"http://receiver.test:{listener.port}/", timeout=timeout) as one:
            assert one.status == 200
        assert asked == Counter([f"dead{number}.test" for number in range(4)] + ["receiver.test"]), "once each"
        await asyncio.wait_for(asyncio.to_thread(lambda: None), DEADLINE)  # the loop's own threads are free
        release.set()
        for response in await asyncio.wait_for(asyncio.gather(*hung), DEADLINE):
            response.close()


def test_a_lookup_that_hangs_does_not_keep_the_process_from_ending() -> None:
    program = (
        "import asyncio, time; from broker.addresses import Guard; from broker import addresses;"
        "addresses.CHECK_SECONDS = 0.05;"
        "asyncio.run(Guard(look_up=lambda host: time.sleep(60)).check_url('https://dead.test/'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert "cannot be found" in done.stderr


async def test_a_proxy_of_the_environment_is_not_used(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.port}")
    guard = Guard(look_up=answers(["127.0.0.2"]))
    with pytest.raises(aiohttp.ClientConnectorError):
        await post(guard, "http://receiver.test/")
    assert listener.connections == 0


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "must begin with https://"),
        ("receiver.test/hook", "must begin with https://"),
        ("//receiver.test/hook", "must begin with https://"),
        ("ftp://receiver.test/", "must begin with https://"),
        ("file:///etc/passwd", "must begin with https://"),
        ("gopher://receiver.test/", "must begin with https://"),
        ("unix:///run/socket", "must begin with https://"),
        ("https:///hook", "must begin with https://"),
        ("https://", "must begin with https://"),
        ("https://user:password@receiver.test/", "user or a password"),
        ("https://@receiver.test/", "user or a password"),
        ("https://receiver.test/#fragment", "fragment"),
        ("https://receiver.test#", "fragment"),
        ("https://receiver.test:0/", "port 0"),
        ("https://receiver.test:65536/", "cannot be read"),
        ("https://receiver.test:80:80/", "cannot be read"),
        ("https://receiver.test:http/", "cannot be read"),
        ("https://[::1/", "cannot be read"),
        ("https://xn--/", "cannot be found"),
        ("https://local\u00adhost/", "control characters"),
        ("https://receiver.test/a b", "spaces"),
        (" https://receiver.test/", "spaces"),
        ("https://receiver.test/\n", "control characters"),
        ("https://rec\teiver.test/", "control characters"),
        ("https://receiver.test\\@127.0.0.1/", "backslashes"),
        ("https://127.1/", "unusual notation"),
        ("https://" + "a" * 64 + ".test/", "cannot be found"),
        ("https://a..test/", "cannot be found"),
        ("https://receiver.invalid/", "cannot be found"),
        ("https://receiver.test/" + "a" * MAX_URL_CHARACTERS, "2,048 are taken"),
    ],
)
async def test_a_url_that_is_refused_is_told_why(url: str, why: str) -> None:
    assert why in await refusal(Guard(), url)


async def test_a_url_may_have_2048_characters_and_letters_of_any_language() -> None:
    guard = Guard(look_up=answers([PUBLIC]))
    url = "https://bücher.test/straße?q=é&a[]=1#"[:-1]
    await guard.check_url(url + "a" * (MAX_URL_CHARACTERS - len(url)))


async def test_a_host_whose_dns_hangs_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.addresses.CHECK_SECONDS", 0.05)
    release = Event()
    guard = Guard(look_up=lambda host: [PUBLIC] if release.wait(DEADLINE) else [])
    assert "cannot be found" in await refusal(guard, "https://dead.test/")
    release.set()


async def test_a_refusal_does_not_tell_where_a_name_leads() -> None:
    assert "10.1.2.3" not in await refusal(Guard(look_up=answers(["10.1.2.3"])), "https://internal.test/")


async def test_a_lookup_that_fails_in_an_unknown_way_is_a_host_that_cannot_be_found() -> None:
    def broken(host: str) -> list[str]:
        raise RuntimeError(host)

    assert "cannot be found" in await refusal(Guard(look_up=broken), "https://receiver.test/")


def test_the_system_s_answer_has_each_address_once() -> None:
    assert look_up("127.0.0.1") == ["127.0.0.1"]
    assert look_up("::1") == ["::1"]
    assert set(look_up("localhost")) <= {"127.0.0.1", "::1"}


def test_networks_are_read_as_they_are_written() -> None:
    assert parse_network(" 127.0.0.0/8") == ip_network("127.0.0.0/8")
    assert parse_network("::1") == ip_network("::1/128")
    for text in ("127.0.0.1/8", "127.0.0.0/33", "example.com", ""):
        with pytest.raises(ValueError):
            parse_network(text)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for receiver.test that signed itself, and its key, in one file."""
    if which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    path = tmp_path / "receiver.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=receiver.test"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=DNS:receiver.test", "-keyout", path, "-out", tmp_path / "crt"],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + (tmp_path / "crt").read_text())
    return path


async def test_over_https_the_certificate_must_be_that_of_the_name(certificate: Path) -> None:
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate))
    guard = Guard([parse_network("127.0.0.1")], look_up=answers(["127.0.0.1"]))
    async for receiver in listening(serving):
        assert await post(guard, f"https://receiver.test:{receiver.port}/", trusting) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await post(guard, f"https://other.test:{receiver.port}/", trusting)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await post(guard, f"https://receiver.test:{receiver.port}/")
        assert len(receiver.requests) == 1
