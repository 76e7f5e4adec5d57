"""The snippets of a page, pasted one after the other into one shell, as a reader would.

- A block of `sh` is pasted. Where its last command is `wonderq serve` it is left running, as in a terminal of its own,
  and the next block comes when the broker listens; one that was left running before is stopped first.
- A block of `python` or `js` is run, unless the line before it ends in a file's name, as in "write `consumer.py`:" Then
  it is written to that file, as is a block of any other language that is named so.
- A block of `sql` is run on the page's database.
- A block of `text` is what the block before it prints. `…` in it stands for anything in its line; as a whole
  line, for any lines.

Nothing else of a page is touched but addresses, which are exchanged for free ones.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 300  # only catches a hang
FENCED = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
NAMED = re.compile(r"`(?P<name>[\w.-]+\.\w+)`:$")
RUN = {"sh", "python", "js", "sql"}
RUN_SQL = """\
import os, psycopg, re, sys
with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
    for statement in filter(str.strip, re.split(r";\\s*$", open(sys.argv[1]).read(), flags=re.MULTILINE)):
        connection.execute(statement)
"""
# A shell that ends at the first command that fails, and says which block it was in.
HEAD = """\
set -eu
served=
stop_serving() { if [ -n "$served" ]; then kill "$served" && wait "$served" || :; served=; fi; }
trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null || :; wait || :' EXIT
begin() { printf '\\n@@ %s\\n' "$1"; printf '\\n@@ %s\\n' "$1" >&2; }
"""
# What an earlier one has said is removed before: the shell that serves may be later than who looks.
SERVE = """\
stop_serving
rm -f serve.out serve.err
( {text} ) >serve.out 2>serve.err &
served=$!
until grep -qs '^listening on ' serve.out; do kill -0 "$served" || {{ cat serve.err >&2; exit 1; }}; sleep 0.05; done
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    number: int
    language: str
    text: str
    name: str | None  # of the file that the reader is told to write it to

    @property
    def serves(self) -> bool:
        """Whether it ends in a command that runs until it is stopped."""
        return self.language == "sh" and bool(re.match(r"(\w+=\S+ +)*wonderq serve\b", self.lines[-1]))

    @property
    def lines(self) -> list[str]:
        """The commands of a block, as far as they are lines."""
        return self.text.replace("\\\n", " ").strip().split("\n")


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page, which is a path from the root of the tree."""
    text = (ROOT / page).read_text("utf-8")
    found = []
    for number, match in enumerate(FENCED.finditer(text), 1):
        line_before = text[: match.start()].rstrip().rpartition("\n")[2]
        named = NAMED.search(line_before)
        content = textwrap.dedent(match["text"])
        found.append(Block(page, number, match["language"], content, named["name"] if named else None))
    return found


@dataclass(frozen=True)
class Pasted:
    """What came of a page: by the number of a block what it printed."""

    code: int
    printed: dict[int, str]
    complaints: str


class Pasting:
    """One page in one folder, with what stands on it exchanged by `exchanged`."""

    def __init__(self, folder: Path, environ: Mapping[str, str], exchanged: Mapping[str, str]) -> None:
        self._folder, self._exchanged = folder, exchanged
        foreign = ("BROKER_", "DATABASE_URL", "PG", "PYTHON")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environ = kept | {"PATH": path, "HOME": str(folder), **environ}

    def _exchange(self, text: str) -> str:
        for old, new in self._exchanged.items():
            text = text.replace(old, new)
        return text

    def _write(self, name: str, text: str) -> str:
        (self._folder / name).write_text(self._exchange(text), "utf-8")
        return name

    def _commands(self, block: Block) -> str:
        """Return what the shell is to do for a block."""
        text = self._exchange(block.text)
        if block.name is not None:
            self._write(block.name, block.text)
            return ":"
        match block.language:
            case "sh":
                return self._serve(block) if block.serves else text
            case "python":
                return f"python {self._write(f'block-{block.number}.py', block.text)}"
            case "js":
                return f"node {self._write(f'block-{block.number}.js', block.text)}"
            case "sql":
                return f"python run_sql.py {self._write(f'block-{block.number}.sql', block.text)}"
        raise ValueError(block)

    def _serve(self, block: Block) -> str:
        """Return what runs a broker, as the very process that is told to stop."""
        *before, last = block.lines
        return SERVE.format(text=self._exchange("\n".join([*before, f"exec env {last}"])))

    async def run(self, blocks: list[Block]) -> Pasted:
        """Paste these blocks; return what they printed."""
        self._write("run_sql.py", RUN_SQL)
        commands = [f"begin {block.number}\n{self._commands(block)}\n" for block in blocks]
        script = self._folder / "pasted.sh"
        script.write_text(HEAD + "".join(commands) + "begin end\nstop_serving\n", "utf-8")
        # Files, for what is left running may hold a pipe open.
        output, complaints = self._folder / "pasted.out", self._folder / "pasted.err"
        with output.open("wb") as out, complaints.open("wb") as err:
            shell = await asyncio.create_subprocess_exec(
                "bash", script, cwd=self._folder, env=self._environ, stdout=out, stderr=err, start_new_session=True
            )
            try:
                async with asyncio.timeout(DEADLINE):
                    await shell.wait()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)
        parts = re.split(r"\n?@@ (\d+|end)\n", output.read_text("utf-8"))
        printed = {int(n): text for n, text in zip(parts[1::2], parts[2::2], strict=True) if n != "end"}
        assert shell.returncode is not None
        return Pasted(shell.returncode, printed, complaints.read_text("utf-8"))


def is_as_shown(shown: str, printed: str) -> bool:
    """Whether a command has printed what a page shows; `…` is anything in its line, or where it is one, any lines."""
    pattern = ""
    for line in shown.strip().split("\n"):
        anything = "[^\n]*".join(map(re.escape, line.split("…")))
        pattern += r"(?:[^\n]*\n)*" if line == "…" else anything + r"\n"
    return re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in printed.strip().split("\n"))) is not None


def can_run(language: str) -> bool:
    """Whether this machine has what a language needs."""
    return language != "js" or shutil.which("node") is not None
