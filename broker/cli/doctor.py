"""`wonderq doctor`: asks the broker, then the database where it can reach it, and says what to do."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import asdict
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import click
import msgspec

from broker.cli.commands import WithExamples
from broker.cli.connecting import Conversation, json_option, sentence_of, talking_to, url_option
from broker.cli.findings import BrokerFacts, Finding, broker_findings
from broker.cli.output import console, count_of, is_terminal, print_json, printable, say, to_json
from broker.cli.setting_options import with_settings
from broker.client import BrokerError
from broker.settings import Settings

if TYPE_CHECKING:
    from broker.storage.examination import Facts

PAGE_SECONDS = 10.0
# Like the calls: through no proxy.
DIRECTLY = build_opener(ProxyHandler({}))
# More are not looked at: what is wrong with them is wrong with these too, or somebody has to look anyway.
MOST_QUEUES = 10_000
COLOURS = {"ok": "green", "note": "yellow", "needs_action": "bold red"}
WORDS = {"ok": "ok", "note": "note", "needs_action": "needs action"}


@click.command(
    cls=WithExamples,
    examples=(
        "wonderq doctor",
        "DATABASE_URL=postgresql://operator@db1/wonderq wonderq doctor",
        "wonderq doctor --json",
    ),
)
@url_option
@json_option("one object: `findings`, each with `severity` (ok, note, needs_action), `about`, `what` and `to_do`.")
@with_settings("database_url", "data_dir")
def doctor(settings: Settings, url: str, as_json: bool) -> None:
    """Look for what is wrong; say what to do.

    It asks the broker: whether it is ready, how it is set, its queues, dead letters and subscriptions. With tokens that
    needs one with --admin and --manage '*'. Then it asks the database, where it can reach it: --database-url, or the
    embedded one of --data-dir while it runs. It changes nothing.

    The exit code is 1 where a finding needs action, and else 0, whatever notes there are.
    """
    facts = facts_of_broker(url)
    found = broker_findings(facts) + look_into_database(settings, facts)
    if as_json:
        print_json(to_json({"findings": [asdict(each) for each in found]}))
    else:
        show(found)
    if any(each.severity == "needs_action" for each in found):
        raise click.exceptions.Exit(1)


def show(found: list[Finding]) -> None:
    """Print findings for people, and in the end how many need something."""
    from rich.text import Text

    screen = console()
    for each in found:
        line = Text.assemble((f"{WORDS[each.severity]:<14}", COLOURS[each.severity]), f"{each.about:<15}")
        screen.print(line + Text(printable(each.what)), soft_wrap=not is_terminal())
        if each.to_do:
            screen.print(Text(" " * 14 + "→ " + printable(each.to_do), style="dim"), soft_wrap=not is_terminal())
    needed, notes = (sum(each.severity == severity for each in found) for severity in ("needs_action", "note"))
    say(f"{count_of(needed, 'finding')} {'needs' if needed == 1 else 'need'} action; {count_of(notes, 'note')}.")


def facts_of_broker(url: str) -> BrokerFacts:
    """Ask a broker for what it may tell; it need not be there."""
    facts = BrokerFacts(url, has_token=bool(os.environ.get("BROKER_TOKEN")))
    with talking_to(url) as broker:
        try:
            asked_at = time.time()
            page, date = read_page(url, "/livez")
            if date is not None:
                # Sent in whole seconds, of which half are over on average.
                facts.clock_difference = date + 0.5 - (asked_at + time.time()) / 2
            facts.readyz, _ = read_page(url, "/readyz")
            facts.livez = page
        except (OSError, ValueError) as error:
            facts.silence = str(error.reason if isinstance(error, URLError) else error)
            return facts
        ask_everything(broker, facts)
    return facts


def ask_everything(broker: Conversation, facts: BrokerFacts) -> None:
    """Ask what a token may be needed for; what is refused, or not answered, is left out and named."""
    try:
        facts.server = broker.ask("get_server")
        facts.lets_everybody_in = not facts.has_token or lets_everybody_in(facts.url)
    except BrokerError as error:
        facts.refusal = sentence_of(error)
    try:
        facts.queues = listed(broker, "list_queues", "queues", counts=True)
        facts.subscriptions = listed(broker, "list_subscriptions", "subscriptions")
    except BrokerError as error:
        facts.unanswered.append(f"queues and subscriptions: {sentence_of(error)}")


def listed(broker: Conversation, method: str, key: str, **params: Any) -> list[dict[str, Any]]:
    """Return what a method lists."""
    return [msgspec.json.decode(each) for each in broker.pages(method, key, MOST_QUEUES, **params)]


def lets_everybody_in(url: str) -> bool:
    """Whether a broker answers also who shows no token."""
    call = b'{"jsonrpc":"2.0","id":1,"method":"get_server"}'
    request = Request(url.rstrip("/") + "/rpc", call, {"Content-Type": "application/json"})  # noqa: S310 - as given
    try:
        with DIRECTLY.open(request, timeout=PAGE_SECONDS) as answer:
            return b'"result"' in answer.read()
    except OSError:
        return False


def read_page(url: str, path: str) -> tuple[dict[str, Any], float | None]:
    """Return a page of the broker's that is JSON, and the time that its clock shows. Raises OSError and ValueError."""
    try:
        answer = DIRECTLY.open(url.rstrip("/") + path, timeout=PAGE_SECONDS)
    except HTTPError as error:
        answer = error  # not ready: the page says why
    with answer:
        try:
            page: dict[str, Any] = msgspec.json.decode(answer.read())
        except msgspec.DecodeError:
            raise ValueError(f"what answers at {url}{path} is no broker (HTTP {answer.status})") from None
        date = answer.headers.get("Date")
    return page, parsedate_to_datetime(date).timestamp() if date else None


def look_into_database(settings: Settings, broker: BrokerFacts) -> list[Finding]:
    """Return what the database says, or a note where it cannot be reached."""
    import psycopg

    from broker.cli.database_findings import database_findings
    from broker.embedded import conninfo_of_running
    from broker.installation import EmbeddedError

    to_do = "For the rest run doctor where the database can be reached, with --database-url or --data-dir."
    try:
        conninfo = settings.database_url or conninfo_of_running(settings.data_dir)
        if conninfo is None:
            what = "Not looked at: no database was named, and no embedded one runs in the data directory"
            return [Finding("note", "database", what, to_do)]
        facts = asyncio.run(examined(conninfo))
    except (psycopg.Error, EmbeddedError) as error:
        return [Finding("note", "database", f"Not looked at: {str(error).splitlines()[0]}", to_do)]
    version = broker.server["postgresql_version"] if broker.server is not None else None
    return database_findings(facts, version, is_embedded=settings.database_url is None)


async def examined(conninfo: str) -> Facts:
    """Return the facts of a database. Raises psycopg.Error."""
    from broker.storage.examination import examine

    return await examine(conninfo)
