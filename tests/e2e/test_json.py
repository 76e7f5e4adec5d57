"""The page's own reader of JSON: what it reads is what JSON.parse reads, but for bodies, which stay text."""

from __future__ import annotations

import json
import random
from typing import Any

from browser import Broker, Dashboard

READ = """async (texts) => {
    const { readAnswer, indented } = await import(new URL("dashboard/json.js", document.baseURI));
    return texts.map((text) => [JSON.stringify(readAnswer(text)), JSON.stringify(JSON.parse(text)), indented(text)]);
}"""
STRINGS = [
    *("", "a", "body", "messages", '"', "\\", '\\"', "]", "}{"),
    *("\n\t", "\u0000", "\u202e", "\U0001f600", "<b>", "__proto__"),
]
NUMBERS = [0, -1, 1.5, 10**15, -1e-7, True, False, None]
SPACES = ["", " ", "\n\t "]


def anything(rng: random.Random, depth: int) -> Any:
    """Return a value that JSON can say. Nothing in it is called `messages`."""
    kind = rng.random() if depth else 0.0
    if kind < 0.4:
        return rng.choice(STRINGS) if rng.random() < 0.5 else rng.choice(NUMBERS)
    if kind < 0.7:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    names = rng.sample([name for name in STRINGS if name != "messages"], rng.randrange(4))
    return {name: anything(rng, depth - 1) for name in names}


def written(rng: random.Random, value: Any) -> str:
    """Write a value with spaces wherever there may be some."""

    def space() -> str:
        return rng.choice(SPACES)

    if isinstance(value, list):
        items = [space() + written(rng, each) + space() for each in value]
        return f"[{','.join(items) or space()}]"
    if isinstance(value, dict):
        items = [
            f"{space()}{json.dumps(name)}{space()}:{space()}{written(rng, each)}{space()}"
            for name, each in value.items()
        ]
        return f"{{{','.join(items) or space()}}}"
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def test_whatever_comes_is_read_as_the_browser_reads_it(broker: Broker, dashboard: Dashboard) -> None:
    page = dashboard.open()
    rng = random.Random(7)
    texts = [rng.choice(SPACES) + written(rng, anything(rng, 5)) + rng.choice(SPACES) for _ in range(1_000)]
    for text, (read, expected, indented) in zip(texts, page.evaluate(READ, texts), strict=True):
        assert read == expected, text
        assert json.loads(indented) == json.loads(text), text


def test_bodies_of_messages_stay_the_text_that_they_were(broker: Broker, dashboard: Dashboard) -> None:
    page = dashboard.open()
    rng = random.Random(8)
    bodies = [written(rng, anything(rng, 5)) for _ in range(500)]
    message = '{"headers":{"body":"a"},"body" : @ ,"status":"ready"}'
    answer = f'[{{"id":0,"result":{{"messages":[{message}],"next":null}}}}]'
    answers = [answer.replace("@", body) for body in bodies]
    for body, (read, _, _) in zip(bodies, page.evaluate(READ, answers), strict=True):
        (found,) = json.loads(read)[0]["result"]["messages"]
        assert found == {"headers": {"body": "a"}, "body": body, "status": "ready"}
