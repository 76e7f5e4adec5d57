"""Write docs/cli.md from the commands themselves: what they say of themselves with --help, as a page.

`generate.py` calls it. What is to be said of a command belongs into its docstring and its options.
"""

from __future__ import annotations

import inspect
import re

import click

from broker.cli import main
from broker.cli.commands import EXIT_CODES, SECTIONS, VARIABLES, WithExamples
from broker.settings import settings_table

INTRODUCTION = """\
<!-- Made by {command}; change broker/cli/ instead. -->

# The command line

`wonderq` comes with the package (`pip install 'wonderq[embedded]'`); `python -m broker` is the same. Commands that
talk to a broker are plain clients of it, and need nothing but its address; `serve`, `migrate` and `token` need the
database.

```sh
wonderq serve                                   # a broker; the others in another terminal
wonderq send default '{{"hello": "world"}}'
wonderq receive default
wonderq doctor
```

## What they have in common

**For people and for programs.** Without `--json` people are spoken to: tables, words, colours on a terminal. With
`--json` each line of standard output is one JSON value. A command that lists prints one object a line, just as the
method of [the reference](rpc.md) returns it; bodies keep their bytes. (`call` and `token list` print one JSON value
over several lines.) What is no part of the result goes to standard error: what went wrong, that there was nothing, a
bar where it takes long.

**Nothing hidden.** What is not printable in a name or a body (controls, what turns the direction of text, what is
invisible) reaches a terminal only escaped, as in `\\u001b`. With `--json` into a file or a pipe nothing is changed.

**Tried again.** Where a call can be repeated without harm (`send`, which has a key with each message, and what deletes)
and the broker is away for a moment, it is repeated for half a minute. Where it was never there, that is said at once.

**Strings.** A body is JSON, so a string has double quotes, and in a shell single ones around them: `'"hello"'`; or
`--text hello`. A body that begins with a minus stands behind `--`: `wonderq send mail -- -5`.

### Variables

{variables}
`serve` and what works on the database have one for each of their settings: [settings.md](settings.md).

### Exit codes

{exit_codes}
### Completion

{completion}
"""


def render_cli(command: str) -> str:
    """Return the page; `command` is how it is made anew."""
    context = click.Context(main, info_name="wonderq")
    page = INTRODUCTION.format(
        command=command,
        variables=rows("variable, what it means", [(f"`{name}`", meaning) for name, meaning in VARIABLES]),
        exit_codes=rows("code, meaning", [(str(code), meaning) for code, meaning in EXIT_CODES]),
        completion=completion_of(context),
    )
    for title, names in SECTIONS.items():
        page += f"## {title}\n\n"
        for name in names:
            page += section(found(main, context, name), context, name, "###")
    return page.rstrip() + "\n"


def found(group: click.Group, context: click.Context, name: str) -> click.Command:
    """Return a command of a group, which must be there."""
    command = group.get_command(context, name)
    assert command is not None, name
    return command


def completion_of(context: click.Context) -> str:
    """Say how a shell is taught to complete."""
    command = found(main, context, "completion")
    assert isinstance(command, WithExamples)
    lines = "\n".join(command.examples)
    return (
        "Commands, options and, by asking the broker, the names of queues and topics. Of these lines the one for your\n"
        f"shell belongs into its start-up file (in zsh after `compinit`):\n\n```sh\n{lines}\n```\n"
    )


def section(command: click.Command, above: click.Context, name: str, heading: str) -> str:
    """Show a command, and those below it."""
    context = click.Context(command, info_name=name, parent=above)
    path = context.command_path
    pieces = " ".join(command.collect_usage_pieces(context))
    text = f"{heading} {path}\n\n```\n{path} {pieces}\n```\n\n{prose(command.help or '')}\n\n"
    text += options(command, context, name)
    if isinstance(command, WithExamples):
        text += "```sh\n" + "\n".join(command.examples) + "\n```\n\n"
    if name == "call":
        return text + methods(command, context)
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            text += section(found(command, context, inner), context, inner, heading + "#")
    return text


def prose(text: str) -> str:
    """Return a docstring as paragraphs. Its first line is a sentence of its own."""
    # What is code already is left alone.
    return re.sub(r"`[^`]*`|--[a-z-]+(?: '[^']*')?", lambda found: f"`{found[0].strip('`')}`", inspect.cleandoc(text))


def options(command: click.Command, context: click.Context, name: str) -> str:
    """Show the options of a command; those that are settings of a server have a page of their own."""
    settings = {setting for setting, _, _ in settings_table()}
    cells = []
    for param in command.get_params(context):
        record = param.get_help_record(context)
        is_said = isinstance(param, click.Option) and param.name != "help"
        if record is None or not is_said or (name == "serve" and param.name in settings):
            continue
        cells.append((f"`{record[0]}`", record[1]))
    if name == "serve":
        return "Its options are the [settings](settings.md): each is a flag and a variable.\n\n"
    return rows("option, meaning", cells) + "\n" if cells else ""


def methods(command: click.Command, context: click.Context) -> str:
    """List what can be called."""
    assert isinstance(command, click.Group)
    names = [f"[`{name}`](rpc.md#{name.replace('.', '')})" for name in command.list_commands(context)]
    return f"Each param of a method is an option, with hyphens for underscores. The methods: {', '.join(names)}.\n\n"


def rows(columns: str, cells: list[tuple[str, str]]) -> str:
    """Return a table in Markdown."""
    names = columns.split(", ")
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
