"""`wonderq call METHOD`: a command for each method of the schema, with an option for each of its params."""

from __future__ import annotations

import json
import shlex

import click
import msgspec

from broker.cli.commands import GroupWithExamples, WithExamples
from broker.cli.completion import queue_names, topic_names
from broker.cli.connecting import talking_to, url_option
from broker.cli.output import is_terminal, printable
from broker.schema import Schema, describe, load_document

# What a param names, so that it can be completed by asking the broker.
COMPLETED = {"queue": queue_names, "dead_letter_queue": queue_names, "to": queue_names, "topic": topic_names}


class CallGroup(GroupWithExamples):
    """`call METHOD`: a command for each method of the schema, an option for each of its params."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [method["name"] for method in load_document()["methods"]]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        document = load_document()
        for method in document["methods"]:
            if method["name"] == cmd_name:
                return call_command(method, document["components"]["schemas"])
        return None


@click.group(
    cls=CallGroup,
    examples=(
        "wonderq call create_queue --queue mail.in --visibility-timeout 60",
        """wonderq call enqueue --queue mail.in --body '{"to": "ada"}' --delay 5""",
        "wonderq call get_queue --queue mail.in",
    ),
)
@url_option
@click.pass_context
def call(context: click.Context, url: str) -> None:
    """Call any method of a broker, and print its result.

    The result is JSON. Params are options. A param that is a string is given as it is, any other as JSON.
    """
    context.obj = url


def call_command(method: Schema, components: dict[str, Schema]) -> click.Command:
    """Build the command of one method."""
    params = []
    for param in method["params"]:
        text = param.get("description") or param["schema"].get("description") or ""
        limits = describe(param["schema"], components)
        params.append(
            click.Option(
                ["--" + param["name"].replace("_", "-"), param["name"]],
                required=param.get("required", False),
                metavar="TEXT" if takes_text(limits) else "JSON",
                help=f"{text} [{limits}]".strip(),
                shell_complete=COMPLETED.get(param["name"]),
            )
        )

    @click.pass_obj
    def run(url: str, /, **given: str | None) -> None:
        named = {name: value for name, value in given.items() if value is not None}
        kinds = {param["name"]: describe(param["schema"], components) for param in method["params"]}
        call_and_print(url, method["name"], {name: read_param(name, kinds[name], text) for name, text in named.items()})

    help_text = "\n\n".join(filter(None, [method["summary"], method.get("description")]))
    examples = tuple(typed(method, example, components) for example in method["examples"])
    return WithExamples(method["name"], params=list(params), callback=run, help=help_text, examples=examples)


def typed(method: Schema, example: Schema, components: dict[str, Schema]) -> str:
    """Return an example of the schema as it would be typed."""
    kinds = {param["name"]: describe(param["schema"], components) for param in method["params"]}
    words = ["wonderq", "call", method["name"]]
    for param in example["params"]:
        name, value = param["name"], param["value"]
        is_text = isinstance(value, str) and takes_text(kinds[name])
        words += ["--" + name.replace("_", "-"), value if is_text else json.dumps(value, ensure_ascii=False)]
    return shlex.join(words)


def takes_text(limits: str) -> bool:
    """Whether a param is given as it is: a string, or one of a few words."""
    return limits.startswith(("a string", "one of"))


def read_param(name: str, limits: str, text: str) -> str:
    """Return a param's value as JSON; what is JSON already keeps its bytes. Raises click.BadParameter."""
    name = name.replace("_", "-")
    try:
        text.encode()
        if takes_text(limits) and not (text == "null" and limits.endswith("or null")):
            return json.dumps(text)
        msgspec.json.decode(text, type=msgspec.Raw)
    except UnicodeEncodeError:
        raise click.BadParameter(f"--{name} is not UTF-8.") from None
    except msgspec.DecodeError as error:
        raise click.BadParameter(f"--{name} takes JSON, as {limits}: {error}") from None
    return text


def call_and_print(url: str, method: str, params: dict[str, str]) -> None:
    """Call a method and print its result; exit with 1 where it failed."""
    with talking_to(url) as broker:
        result = msgspec.json.format(broker.ask_json(method, params), indent=2)
    # Line by line: line breaks are the only controls that stand there for people.
    click.echo("\n".join(map(printable, result.split("\n"))) if is_terminal() else result)
