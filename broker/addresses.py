"""Which addresses the broker may reach for those who subscribe a URL.

Whoever subscribes makes the broker send requests from where it stands, inside a network that he may not see. So
every address that a host has is looked at, when it is subscribed and again for each connection, and a connection is
made to an address that was looked at, never to a name: between two answers of its DNS a host may have moved.

Public addresses may be reached over https. What is in a network that was allowed (`--webhook-allow`) may be reached
over http as well. Every notation ends at the same check, because it is made on the address that the system is about
to connect to.

Does not promise to know every way into a private network: an IPv6 prefix that a network of its own has chosen for
translation to IPv4 (NAT64) looks like any public one.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from aiohttp import TCPConnector
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from broker.errors import InvalidParams

Network = IPv4Network | IPv6Network
LookUp = Callable[[str], Sequence[str]]

MAX_URL_CHARACTERS = 2048
# What a subscriber waits at most to hear whether its host is there.
CHECK_SECONDS = 5.0
# Threads that look up hosts at one time, while URLs are checked and while messages are pushed. Resolvers hang for up
# to half a minute, and each of so many dead hosts takes one thread.
LOOKUPS_OF_CHECKS = 8
LOOKUPS_OF_PUSHES = 128
# Most servers keep an idle connection for five seconds or more: on one that is just being closed a push would fail.
KEEP_ALIVE_SECONDS = 4.0

# What is not public, whatever the tables of this Python say: they differ between its versions.
NOT_PUBLIC: tuple[Network, ...] = (
    *map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this host
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared, behind a provider's NAT; 100.100.100.200 tells a machine its secrets
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # tells a machine its secrets
            "169.254.0.0/16",  # link-local; 169.254.169.254 tells a machine its secrets
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocols
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # relays from IPv6
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # measuring
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved
        ),
    ),
    *map(
        IPv6Network,
        (
            "2001::/23",  # protocols, among them Teredo, which has an IPv4 address inside
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which has an IPv4 address inside
            "3fff::/20",  # documentation
        ),
    ),
)
# The one part of IPv6 that public addresses are given out from. Outside lie loopback, link-local and private addresses,
# multicast, IPv4 addresses that are mapped (::ffff:0:0/96), and those that are translated (64:ff9b::/96).
PUBLIC_IPV6 = IPv6Network("2000::/3")


class ForbiddenAddress(OSError):
    """The address is not one that may be reached: it is not public, and in no network that --webhook-allow names."""


def parse_network(text: str) -> Network:
    """Read a network such as 10.0.0.0/8, or a single address. Raises ValueError."""
    return ip_network(text.strip())


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one of a single machine in the open internet, and has no other address inside."""
    if isinstance(address, IPv6Address) and address not in PUBLIC_IPV6:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in NOT_PUBLIC)


def look_up(host: str) -> list[str]:
    """Return every address that the system knows of a host, in the order in which to try them. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a part of the name is empty or too long
        raise OSError("not a name of a host") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Lookups:
    """Looks up hosts in threads of their own, of which there are at most `most`, and one for each host.

    A lookup cannot be cut short, and those of the event loop share a few threads with everything else: a single host
    whose DNS hangs would soon have them all. The threads do not keep the process from ending.
    """

    def __init__(self, look_up: LookUp, most: int) -> None:
        self._look_up = look_up
        self._places = asyncio.Semaphore(most)
        self._under_way: dict[str, asyncio.Task[Sequence[str]]] = {}

    async def addresses(self, host: str) -> Sequence[str]:
        """Return the addresses of a host. Who asks while somebody else does gets the same answer. Raises OSError."""
        task = self._under_way.get(host)
        if task is None:
            task = self._under_way[host] = asyncio.create_task(self._ask(host))
            task.add_done_callback(lambda _: self._under_way.pop(host))
        return await asyncio.shield(task)

    async def _ask(self, host: str) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        async with self._places:
            answer: asyncio.Future[Sequence[str]] = loop.create_future()
            Thread(target=self._in_thread, args=(host, loop, answer), name="lookup", daemon=True).start()
            return await answer

    def _in_thread(self, host: str, loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Sequence[str]]) -> None:
        try:
            give = partial(answer.set_result, self._look_up(host))
        except OSError as error:
            give = partial(answer.set_exception, error)
        except Exception as error:
            give = partial(answer.set_exception, OSError(f"the lookup failed: {type(error).__name__}"))
        with suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(lambda: None if answer.done() else give())


class Guard:
    """Decides what may be reached: public addresses, and the `allowed` networks."""

    def __init__(self, allowed: Sequence[Network] = (), *, look_up: LookUp = look_up) -> None:
        self._allowed = tuple(allowed)
        self._look_up = look_up
        self._lookups = Lookups(look_up, LOOKUPS_OF_CHECKS)

    def check_address(self, address: str, scheme: str) -> None:
        """Raise ForbiddenAddress where this address may not be reached by `http` or `https`."""
        try:
            parsed = ip_address(address)
        except ValueError:
            raise ForbiddenAddress("not an address") from None
        if any(parsed in network for network in self._allowed):
            return
        if scheme != "https" or not is_public(parsed):
            raise ForbiddenAddress(f"{address} may not be reached by {scheme}")

    async def check_url(self, url: str) -> None:
        """Raise InvalidParams, for the param `url`, where nothing may be pushed to this URL."""
        parsed = parse_url(url)
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                addresses = await self._lookups.addresses(str(parsed.raw_host))
        except OSError:
            raise _refusal("has a host that cannot be found; see that its name is right and in the DNS") from None
        try:
            for address in addresses:
                self.check_address(address, parsed.scheme)
        except ForbiddenAddress:
            raise _refusal(
                "leads to an address that may not be reached; name a public one by https, or let the broker reach"
                " the network by --webhook-allow, as 10.0.0.0/8, then by http too"
            ) from None

    def connector(self, scheme: str, *, tls: ssl.SSLContext | None = None) -> TCPConnector:
        """Return what makes connections for URLs of one scheme, and none to an address that may not be reached.

        It opens as many as are asked for. `tls` says whose certificates are trusted, instead of the system.
        """
        return TCPConnector(
            resolver=_Resolver(self, scheme, Lookups(self._look_up, LOOKUPS_OF_PUSHES)),
            socket_factory=partial(self._socket, scheme),
            # What was looked at for one connection says nothing of the next.
            use_dns_cache=False,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            limit=0,
            ssl=(tls or ssl.create_default_context()) if scheme == "https" else True,
        )

    def _socket(self, scheme: str, address_info: Any) -> socket.socket:
        """Return a socket for a connection to this very address; aiohttp asks no resolver where a host is one."""
        family, kind, protocol, _, address = address_info
        self.check_address(str(address[0]), scheme)
        return socket.socket(family, kind, protocol)


class _Resolver(AbstractResolver):
    """Gives the connections of aiohttp the addresses of hosts all of whose addresses may be reached."""

    def __init__(self, guard: Guard, scheme: str, lookups: Lookups) -> None:
        self._guard = guard
        self._scheme = scheme
        self._lookups = lookups

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of a host. Raises ForbiddenAddress where one is forbidden, and OSError."""
        addresses = await self._lookups.addresses(host)
        for address in addresses:
            self._guard.check_address(address, self._scheme)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Leave lookups to themselves: nobody can end them."""


def parse_url(url: str) -> URL:
    """Read a URL as it will be read when a message is pushed. Raises InvalidParams, for the param `url`."""
    if len(url) > MAX_URL_CHARACTERS:
        raise _refusal(f"has {len(url):,} characters; {MAX_URL_CHARACTERS:,} are taken")
    if " " in url or "\\" in url or not url.isprintable():
        raise _refusal("has spaces, backslashes or control characters; write them as %20 and the like")
    try:
        parsed = URL(url)
        host, authority = parsed.raw_host, urlsplit(url).netloc
    except ValueError:
        raise _refusal("cannot be read; write it as https://example.com/hook") from None
    if parsed.scheme not in ("http", "https") or not host:
        raise _refusal("must begin with https:// and name a host; http:// is for networks of --webhook-allow")
    if "@" in authority:
        raise _refusal("must not hold a user or a password; receivers know the broker by its signatures")
    if "#" in url:
        raise _refusal("must not have a fragment; leave away what follows #")
    if parsed.port == 0:
        raise _refusal("has port 0; name one from 1 to 65535")
    if _is_unusual(host):
        raise _refusal("names its host by a number in an unusual notation; write it as 192.0.2.1")
    return parsed


def _is_unusual(host: str) -> bool:
    """Whether some programs take a host for an address and others for a name, such as 127.1 or 0x7f000001."""
    with suppress(ValueError):
        ip_address(host)
        return False
    with suppress(OSError):
        socket.inet_aton(host)
        return True
    return False


def _refusal(what: str) -> InvalidParams:
    return InvalidParams(reason=f"`url` {what}.", param="url")
