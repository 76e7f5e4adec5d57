"""Write the reference from its sources: methods from `rpc_schema.json`, settings, outcomes and metrics from the code.

It writes docs/rpc.md below the prose that is written there by hand, the table of outcomes within docs/reliability.md,
docs/settings.md, docs/cli.md, docs/metrics.md and the Postman collection; with `--check` it writes nothing and exits 1
where a file is not what would be written. The output depends on the sources, never on the machine. What is to be said
of one method belongs into the schema.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # The sources of this tree, whatever is installed.

from broker.metrics import Metrics  # noqa: E402
from broker.settings import Setting, settings_table  # noqa: E402
from broker.storage.outcomes import ANY_OTHER_SQLSTATE, BY_MOMENT, BY_SQLSTATE, Failure  # noqa: E402
from cli_reference import render_cli  # noqa: E402

Json = dict[str, Any]
DOCUMENT: Json = json.loads((ROOT / "rpc_schema.json").read_text("utf-8"))
TYPES, ERRORS = DOCUMENT["components"]["schemas"], DOCUMENT["components"]["errors"]
COMMAND = "python docs/generate.py"
BROKER_URL = "http://127.0.0.1:8080"
CONTENT_TYPE = {"key": "Content-Type", "value": "application/json"}
pretty = partial(json.dumps, ensure_ascii=False, indent=2)
PAGES = ("/livez", "/readyz", "/healthz", "/metrics", "/openrpc.json")
POSTMAN = "wonderq.postman_collection.json"
POSTMAN_SCHEMA = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
NO_NUL = "^[^\\u0000]*$"  # Said once, in the prose: true of every string but bodies.
SECRET = " May hold a password: prefer the variable, for lists of processes show flags."
RANGES = {"imum": "", "Length": " characters", "Items": " elements", "Properties": " names"}
MARK = f"<!-- From here on {COMMAND} writes; change rpc_schema.json instead. -->\n"
OUTCOMES_MARK = f"<!-- {COMMAND} writes this table; change broker/storage/outcomes.py instead. -->\n"
OUTCOMES_END = "<!-- Until here. -->\n"
SETTINGS_PROSE = f"""\
<!-- Made by {COMMAND}; change broker/settings.py instead. -->

# Settings

Each setting is a flag of `wonderq serve` and an environment variable. The flag wins over the variable, the
variable over the default; there is no file of settings. A repeatable flag may be given several times; its
variable takes a list separated by commas. Sizes may be written as `512KiB`, `8MiB` or `1GiB`.

"""
METRICS_PROSE = f"""\
<!-- Made by {COMMAND}; change broker/metrics.py or broker/gauges.py instead. -->

# Metrics

`GET /metrics` serves these in the text format of Prometheus. Where tokens are needed it needs any one. Counters,
histograms and most gauges are of the broker that answers, summed over its processes: sum them over brokers. What the
database says (`wonderq_queue…`, `wonderq_subscriptions`, `wonderq_durability`) is the same whichever broker answers:
take the maximum. Which of them to be woken by, and what to do then, is in [alerts.md](alerts.md#alerts).

No label has more than a fixed number of values: queues are the first 100 by name and one for the rest, methods and
outcomes are those of the schema.

"""


def table(columns: str, rows: list[list[str]]) -> str:
    """Return a table in Markdown without its empty columns; `columns` are the words of its head."""
    kept = [i for i in range(len(rows[0])) if any(cells[i] for cells in rows)]
    lines = [columns.split(", "), ["---"] * len(rows[0]), *rows]
    cleaned = [[cells[i].replace("|", "\\|") for i in kept] for cells in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in cleaned)


def name_of(reference: Json) -> str:
    """Return the last part of a `$ref`."""
    return str(reference["$ref"]).rpartition("/")[2]


def behind(schema: Json) -> list[Json]:
    """Return what a schema is made from: the shared type, its alternatives, or what it refines."""
    if "$ref" in schema:
        return [TYPES[name_of(schema)]]
    return [part for word in ("allOf", "anyOf", "oneOf") for part in schema.get(word, ())]


def type_of(schema: Json) -> str:
    """Say of what type a value is; shared types are links."""
    if "$ref" in schema:
        return f"[{name_of(schema)}](#{name_of(schema).lower()})"
    if behind(schema):
        return " or ".join(type_of(part) for part in behind(schema))
    if "items" in schema:
        return f"array of {type_of(schema['items'])}"
    if "properties" in schema:
        return "{" + ", ".join(f"`{name}`: {type_of(one)}" for name, one in schema["properties"].items()) + "}"
    kinds = schema.get("type", "JSON")
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


def range_of(least: float | None, most: float | None) -> str:
    """Say a range, as `1 to 1,000`."""
    if least is not None and most is not None:
        return f"{least:,} to {most:,}" if least < most else f"only {most:,}"
    return f"at most {most:,}" if least is None else f"at least {least:,}"


def limits_of(schema: Json) -> str:
    """Say what a value may be beyond its type, also what the shared types behind it say."""
    found = [" or ".join(f"`{value}`" for value in schema.get("enum", ()))]
    if "exclusiveMinimum" in schema:
        found.append(f"more than {schema['exclusiveMinimum']:,}, at most {schema['maximum']:,}")
    for word, what in RANGES.items():
        least, most = schema.get(f"min{word}"), schema.get(f"max{word}")
        if (least, most) != (None, None) and not (what == "" and "exclusiveMinimum" in schema):
            found.append(range_of(least, most) + what)
    if schema.get("pattern", NO_NUL) != NO_NUL:
        found.append(f"`{schema['pattern']}`")
    return "; ".join(filter(None, found + [limits_of(part) for part in behind(schema)]))


def meaning_of(schema: Json) -> str:
    """Return the description of a value, or that of the shared type behind it."""
    return schema.get("description") or next(filter(None, map(meaning_of, behind(schema))), "")


def fields_table(word: str, schema: Json) -> str:
    """Show params or members, each with its type, its limits, its default where one may miss, its meaning."""
    required, rows = schema.get("required", ()), []
    all_are_there = word == "member" and len(required) == len(schema["properties"])
    for name, field in schema["properties"].items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "optional"
        need = "" if all_are_there else "**required**" if name in required else default
        rows.append([f"`{name}`", type_of(field), limits_of(field), need, meaning_of(field)])
    return table(f"{word}, type, limits, default, meaning", rows)


def params_table(params: list[Json]) -> str:
    """Show the params of a method."""
    fields = {}
    for param in params:
        # What is true of the type comes first, what is true of this param after it.
        meaning = f"{meaning_of(param['schema'])} {param.get('description', '')}".strip()
        fields[param["name"]] = param["schema"] | {"description": meaning}
    as_object = {"properties": fields, "required": [param["name"] for param in params if param["required"]]}
    return fields_table("param", as_object) if params else "No params.\n"


def show_value(schema: Json) -> str:
    """Say what a value is, with a table of its members where it is an object that is not a shared type."""
    if "oneOf" in schema:
        return "\nor\n\n".join(show_value(part) for part in schema["oneOf"])
    if "properties" in schema:
        return f"{meaning_of(schema)}\n\n{fields_table('member', schema)}".lstrip()
    says = ": ".join(filter(None, (type_of(schema), limits_of(schema))))
    return f"{says}. {meaning_of(schema)}".strip() + "\n"


def errors_table(names: list[str]) -> str:
    """Show errors with their codes and causes."""
    rows = [[str(ERRORS[name]["code"]), f"`{name}`", ERRORS[name]["message"]] for name in names]
    return table("code, `data.type`, when", rows)


def request_of(method: Json, example: Json) -> Json:
    """Return the call of an example."""
    params = {param["name"]: param["value"] for param in example["params"]}
    return {"jsonrpc": "2.0", "id": 1, "method": method["name"], "params": params}


def answer_of(example: Json) -> str:
    """Return the answer of an example as JSON, on one line where it fits."""
    answer = {"jsonrpc": "2.0", "id": 1, "result": example["result"]["value"]}
    short = json.dumps(answer, ensure_ascii=False)
    return short if len(short) <= 110 else pretty(answer)


def about(method: Json) -> str:
    """Return the summary and the description of a method."""
    return f"{method['summary']} {method.get('description', '')}".strip()


def method_section(method: Json) -> str:
    """Show one method: its params, its result, every error and its examples."""
    text = f"### {method['name']}\n\n{about(method)}\n\nPermission: `{method['x-permission']}`.\n\n"
    text += f"{params_table(method['params'])}\n**Result.** {show_value(method['result']['schema'])}\n"
    text += f"**Errors.**\n\n{errors_table([name_of(error) for error in method['errors']])}\n"
    for example in method["examples"]:
        body = json.dumps(request_of(method, example), ensure_ascii=False).replace("'", "'\\''")
        curl = f"curl -sS {BROKER_URL}/rpc -H 'Content-Type: application/json' \\\n  -d '{body}'"
        text += f"**Example:** {example['name']}.\n\n```sh\n{curl}\n```\n\n```json\n{answer_of(example)}\n```\n\n"
    return text


def render_rpc(prose: str) -> str:
    """Return the page of the methods below its prose."""
    rows = []
    for method in DOCUMENT["methods"]:
        link = f"[`{method['name']}`](#{method['name'].replace('.', '')})"
        rows.append([link, f"`{method['x-permission']}`", method["summary"]])
    sections = "".join(map(method_section, DOCUMENT["methods"]))
    types = "".join(f"### {name}\n\n{show_value(schema)}\n" for name, schema in TYPES.items())
    text = f"{prose}{MARK}\n## Methods\n\n{table('method, permission, what it does', rows)}\n"
    return f"{text}{sections}## Types\n\n{types}## Errors\n\n{errors_table(list(ERRORS))}"


def default_of(line: Setting, default: Any) -> str:
    """Return how a default is shown: what the table says, never what this machine makes of it."""
    if isinstance(default, str | int | float) and line.shown_default is None:
        return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
    assert line.shown_default, f"{line.flag} needs a shown_default"
    return line.shown_default


def render_settings() -> str:
    """Return the page of the settings."""
    rows = []
    for _, line, default in settings_table():
        choices = " or ".join(f"`{choice}`" for choice in line.choices)
        limits = choices if line.minimum is None else range_of(line.minimum, line.maximum)
        what = line.help + " Repeatable." * line.repeatable + SECRET * line.secret
        named = [f"`{line.flag}`", f"`{line.variable}`", default_of(line, default)]
        rows.append([*named, line.unit, limits, what])
    return SETTINGS_PROSE + table("flag, variable, default, unit, range, what", rows)


def render_metrics() -> str:
    """Return the page of the metrics."""
    metrics = Metrics()
    rows = []
    made: list[Any] = list(metrics.registry._collector_to_names)
    for one in made:
        bounds = [f"{bound:g}" for bound in one._kwargs.get("buckets", ())]
        about = one._documentation + (f" Buckets up to {', '.join(bounds)}." if bounds else "")
        rows.append((one._name + "_total" * (one._type == "counter"), one._type, one._labelnames, about))
    for family in metrics.of_database.describe():
        rows.append((family.name, family.type, getattr(family, "_labelnames", ()), family.documentation))
    cells = [
        [f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), about] for name, kind, labels, about in rows
    ]
    return METRICS_PROSE + table("metric, type, labels, what", sorted(cells))


def outcome_row(sqlstate: str, line: Failure) -> list[str]:
    """Return a line of the table of outcomes."""
    code = f"`{sqlstate}`" if len(sqlstate) == 5 else f"class `{sqlstate}`" if sqlstate else ""
    answer = f"`{line.answer.type}`" + ", after three attempts" * line.lost_race
    return [line.when[0].upper() + line.when[1:], code, f"`{line.outcome}`", answer]


def render_reliability(page: str) -> str:
    """Return the page about reliability with the table of outcomes as it is."""
    before, rest = page.split(OUTCOMES_MARK)  # Fails where a mark was lost.
    _, after = rest.split(OUTCOMES_END)
    rows = [outcome_row("", line) for line in BY_MOMENT.values()]
    rows += [outcome_row(sqlstate, line) for sqlstate, line in BY_SQLSTATE.items()]
    rows.append(outcome_row("", ANY_OTHER_SQLSTATE))
    columns = "what happened to a write, SQLSTATE, outcome, answer"
    return f"{before}{OUTCOMES_MARK}\n{table(columns, rows)}\n{OUTCOMES_END}{after}"


def postman_request(path: str, body: Json | None = None) -> Json:
    """Return a request of a Postman collection: POST with a body, GET without."""
    url = {"raw": "{{broker_url}}" + path, "host": ["{{broker_url}}"], "path": [path[1:]]}
    if body is None:
        return {"method": "GET", "header": [], "url": url}
    raw = {"mode": "raw", "raw": pretty(body), "options": {"raw": {"language": "json"}}}
    return {"method": "POST", "header": [CONTENT_TYPE], "url": url, "body": raw}


def postman_item(method: Json) -> Json:
    """Return a method as an item of a Postman collection, its examples as saved responses."""
    requests = [postman_request("/rpc", request_of(method, example)) for example in method["examples"]]
    ok = {"status": "OK", "code": 200, "_postman_previewlanguage": "json", "header": [CONTENT_TYPE], "cookie": []}
    saved = [
        {"name": example["name"], "originalRequest": request, **ok, "body": answer_of(example)}
        for example, request in zip(method["examples"], requests, strict=True)
    ]
    return {"name": method["name"], "request": requests[0] | {"description": about(method)}, "response": saved}


def render_postman() -> str:
    """Return the Postman collection: one request for each method, and the pages that are read with GET."""
    info = {"name": "WonderQ", "description": DOCUMENT["info"]["description"], "schema": POSTMAN_SCHEMA}
    pages = [{"name": path, "request": postman_request(path), "response": []} for path in PAGES]
    methods = [postman_item(method) for method in DOCUMENT["methods"]]
    folders = [{"name": "Methods", "item": methods}, {"name": "Pages", "item": pages}]
    variable = {"key": "broker_url", "value": BROKER_URL, "type": "string"}
    return pretty({"info": info, "item": folders, "variable": [variable]}) + "\n"


def main(arguments: list[str]) -> int:
    """Write the files, or with `--check` name those that are stale; return the exit status."""
    prose, _ = (ROOT / "docs/rpc.md").read_text("utf-8").split(MARK)  # Fails where the mark was lost.
    reliability = render_reliability((ROOT / "docs/reliability.md").read_text("utf-8"))
    texts = {
        "rpc.md": render_rpc(prose),
        "reliability.md": reliability,
        "settings.md": render_settings(),
        "cli.md": render_cli(COMMAND),
        "metrics.md": render_metrics(),
        POSTMAN: render_postman(),
    }
    files = {ROOT / "docs" / name: text for name, text in texts.items()}
    stale = [path for path, text in files.items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)} is stale; run: {COMMAND}", file=sys.stderr)
        else:
            path.write_text(files[path], "utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
