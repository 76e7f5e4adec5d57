"""Whether a secret that a test run has used can be read where none may be: in a log, or in a table.

Known are the tokens, receipts and webhook secrets that are made in this process, and what tests tell by `remember`:
passwords, and what stands in bodies. Logs are those of brokers in this process, and of those that tests run as
processes. Tables are searched when their database is dropped, if a token or webhook secret was made while it lived.
The one table that must hold secrets is `broker.subscription_secrets`: pushes are signed with them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psycopg
from psycopg import sql

from broker import credentials, model, signatures

T = TypeVar("T")

MUST_HOLD_SECRETS = ("subscription_secrets",)
# What a log says around a secret that it should not have said.
SHOWN = 60
_ALIKE = re.compile(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")


class Secrets:
    """Secrets that are known, and what was searched for them."""

    def __init__(self) -> None:
        # Tokens' secrets and receipts, of which there are many, all of one form; and others, each searched for.
        self.alike: set[str] = set()
        self.others: set[str] = set()
        # What stands in bodies, which are in tables and may be in no log.
        self.bodies: set[str] = set()
        self.lasting = 0
        self.searched_bytes = 0
        self.searched_tables = 0

    def remember(self, *texts: str) -> None:
        """Let texts be secrets from now on."""
        self.others.update(texts)
        self.lasting += 1

    def remember_token(self, text: str) -> None:
        """Let the secret of a token be one."""
        self.alike.add(text.rpartition(".")[2])
        self.lasting += 1

    def found_in(self, text: str, *, is_log: bool = True) -> list[str]:
        """Return what surrounds each secret in a text."""
        self.searched_bytes += len(text)
        places = [found.start() for found in _ALIKE.finditer(text) if found[0] in self.alike]
        places += [text.index(secret) for secret in self.others | (self.bodies if is_log else set()) if secret in text]
        return [text[max(0, place - SHOWN) : place + SHOWN].replace("\n", " ") for place in sorted(places)]

    def found_in_database(self, conninfo: str) -> list[str]:
        """Return what surrounds each secret in the tables of a database, behind the table's name."""
        found = []
        with psycopg.connect(conninfo, autocommit=True) as connection:
            cursor = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'broker'")
            for table in sorted({name for (name,) in cursor} - set(MUST_HOLD_SECRETS)):
                self.searched_tables += 1
                rows = connection.execute(sql.SQL("SELECT t::text FROM broker.{} t").format(sql.Identifier(table)))
                for (row,) in rows:
                    found += [f"{table}: {place}" for place in self.found_in(row, is_log=False)]
        return found


KNOWN = Secrets()


def remembering(make: Callable[..., T], remember: Callable[[T], None]) -> Callable[..., T]:
    """Return a function that makes the same, and has it remembered."""

    def make_and_remember(*given: object) -> T:
        made = make(*given)
        remember(made)
        return made

    return make_and_remember


# Before any module takes these functions by their names: this one is imported first.
credentials.new_token = remembering(credentials.new_token, lambda made: KNOWN.remember_token(made.text))
model.receipt_of = remembering(model.receipt_of, KNOWN.alike.add)
signatures.secret_text = remembering(signatures.secret_text, KNOWN.remember)


class LogKeeper(logging.Handler):
    """Keeps all that is logged in this process in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._file.write(self.format(record) + "\n")

    def close(self) -> None:
        self._file.close()
        super().close()


class Watch:
    """Keeps the logs of a test run in a folder, and searches them at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str] = []
        self._keeper = LogKeeper(folder / "in-process.log")
        logging.getLogger().addHandler(self._keeper)
        # As much as a broker that is a process of its own says.
        logging.getLogger("broker").setLevel(logging.INFO)

    def keep(self, log: Path) -> None:
        """Keep what a process has said, before its file goes away."""
        if log.exists():
            with (self.folder / "processes.log").open("ab") as kept:
                kept.write(log.read_bytes())

    def end(self) -> list[str]:
        """Search what was kept; return what surrounds each secret, behind the file's name."""
        logging.getLogger().removeHandler(self._keeper)
        self._keeper.close()
        for path in sorted(self.folder.iterdir()):
            self.found += [f"{path.name}: {place}" for place in KNOWN.found_in(path.read_text(errors="replace"))]
        return self.found


watching: Watch | None = None


def keep(log: Path) -> None:
    """Keep what a process has said, where somebody watches."""
    if watching is not None:
        watching.keep(log)
