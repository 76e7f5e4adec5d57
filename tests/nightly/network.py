"""A network of its own: hosts that reach each other through this process, and can be cut off from each other.

Each host is a network namespace with a cable to another one, the hub, in which the caller's thread is while the block
lasts, with all processes that it starts meanwhile. What hosts send each other the hub forwards; what the hub and a host
say to each other goes no further. So to forward nothing more of a host cuts it off from all others, without a word to
anybody, and the hub still reaches it. Needs root, and `ip` and `nft` of the system; goes away with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
# For benchmarks of network devices (RFC 2544), so for nobody's own network.
PREFIX = "198.18"
NETWORKS = f"{PREFIX}.0.0/16"
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
PROGRAMS = ("ip", "nft", "nsenter")
CUT = """
add table inet cut
add chain inet cut forwarded {{ type filter hook forward priority 0; }}
add rule inet cut forwarded iifname {cable} drop
add rule inet cut forwarded oifname {cable} drop
"""

_libc = ctypes.CDLL(None, use_errno=True)


class CannotBeMade(Exception):
    """Says what is missing."""


@dataclass(frozen=True)
class Host:
    """A place in the network: the words that start a command there, its address, and the hub's end of its cable."""

    words: tuple[str, ...]
    address: str
    cable: str


class Network:
    """What the hub has: cables to hosts."""

    def __init__(self) -> None:
        self._hub = _here()
        self._opened = [self._hub]

    def add_host(self) -> Host:
        """Lay a cable to a new host."""
        _move_to_a_new_one()
        self._opened.append(there := _here())
        _move(self._hub)
        number = len(self._opened)
        hub, address = f"{PREFIX}.{number}.1", f"{PREFIX}.{number}.2"
        host = Host(("nsenter", f"--net=/proc/{os.getpid()}/fd/{there}"), address, f"cable{number}")
        pair = ("type", "veth", "peer", "name", host.cable, "netns", os.getpid())
        _run(*host.words, "ip", "link", "add", "cable", *pair)
        _run("ip", "address", "add", f"{hub}/24", "dev", host.cable)
        _run("ip", "link", "set", host.cable, "up")
        _run(*host.words, "ip", "address", "add", f"{address}/24", "dev", "cable")
        for device in ("cable", "lo"):
            _run(*host.words, "ip", "link", "set", device, "up")
        _run(*host.words, "ip", "route", "add", "default", "via", hub)
        return host

    def cut_off(self, host: Host) -> None:
        """Let nothing pass any more between this host and the others."""
        _run("nft", "-f", "-", text=CUT.format(cable=host.cable))

    def heal(self) -> None:
        """Let everything pass again."""
        _run("nft", "delete", "table", "inet", "cut")

    def close(self) -> None:
        """Let the network go as soon as nobody is in it any more."""
        for namespace in self._opened:
            os.close(namespace)


@contextlib.contextmanager
def private_network() -> Iterator[Network]:
    """Be in the hub of a new network until the block ends. Raises CannotBeMade."""
    if os.geteuid() != 0:
        raise CannotBeMade("only root may make a network")
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        raise CannotBeMade(f"this system has no {' and no '.join(missing)}")
    outside = _here()
    try:
        _move_to_a_new_one()
        with contextlib.closing(Network()) as network:
            _run("ip", "link", "set", "lo", "up")
            FORWARDING.write_text("1")
            yield network
    finally:
        _move(outside)
        os.close(outside)


def _here() -> int:
    """Open the namespace in which this thread is."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _move_to_a_new_one() -> None:
    if _libc.unshare(CLONE_NEWNET):
        raise CannotBeMade(f"the system refuses a network namespace: {os.strerror(ctypes.get_errno())}")


def _move(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot go back to a network namespace")


def _run(*words: object, text: str = "") -> None:
    try:
        subprocess.run([str(word) for word in words], check=True, input=text, text=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise CannotBeMade(f"{error}: {error.stderr.strip()}") from error
