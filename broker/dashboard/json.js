// JSON in which the bodies of messages stay the text that was sent. JSON.parse would make 1 of 1.0, lose all but the
// last of two equal keys and the digits of a long number: what is shown would not be what consumers get.

const isSpace = (code) => code === 32 || code === 10 || code === 13 || code === 9;

/** Read an answer; the member `body` of each object in a list `messages` becomes its text as it was sent. */
export function readAnswer(text) {
  let at = 0;

  function skipSpaces() {
    while (isSpace(text.charCodeAt(at))) at += 1;
  }

  function skipString() {
    at += 1;
    for (;;) {
      const code = text.charCodeAt(at);
      if (code === 34) break;
      if (Number.isNaN(code)) throw new SyntaxError("the answer ends within a string");
      at += code === 92 ? 2 : 1;
    }
    at += 1;
  }

  // Without recursion: a body may be nested as deeply as the broker permits.
  function skipValue() {
    let depth = 0;
    do {
      const code = text.charCodeAt(at);
      if (Number.isNaN(code)) throw new SyntaxError("the answer ends within a body");
      if (code === 34) {
        skipString();
      } else if (code === 123 || code === 91) {
        depth += 1;
        at += 1;
      } else if (code === 125 || code === 93) {
        depth -= 1;
        at += 1;
      } else if (depth > 0) {
        at += 1;
      } else {
        skipScalar();
      }
    } while (depth > 0);
  }

  function skipScalar() {
    while (at < text.length && !",]} \n\r\t".includes(text[at])) at += 1;
  }

  function readString() {
    const start = at;
    skipString();
    return JSON.parse(text.slice(start, at));
  }

  function readList(key) {
    const list = [];
    at += 1;
    skipSpaces();
    while (text[at] !== "]") {
      list.push(readValue(null, key === "messages"));
      skipSpaces();
      if (text[at] === ",") at += 1;
    }
    at += 1;
    return list;
  }

  function readObject(isMessage) {
    const members = [];
    at += 1;
    skipSpaces();
    while (text[at] !== "}") {
      skipSpaces();
      const key = readString();
      skipSpaces();
      at += 1; // the colon
      skipSpaces();
      if (isMessage && key === "body") {
        const start = at;
        skipValue();
        members.push([key, text.slice(start, at)]);
      } else {
        members.push([key, readValue(key, false)]);
      }
      skipSpaces();
      if (text[at] === ",") at += 1;
    }
    at += 1;
    return Object.fromEntries(members); // which makes members, also of a name like __proto__
  }

  function readValue(key, isMessage) {
    skipSpaces();
    if (text[at] === "{") return readObject(isMessage);
    if (text[at] === "[") return readList(key);
    const start = at;
    if (text[at] === '"') skipString();
    else skipScalar();
    return JSON.parse(text.slice(start, at));
  }

  return readValue(null, false);
}

/** Return JSON on several lines, every token as it was. */
export function indented(json) {
  const pieces = [];
  let depth = 0;
  let at = 0;
  const line = () => pieces.push("\n", "  ".repeat(depth));
  while (at < json.length) {
    const char = json[at];
    if (char === '"') {
      const start = at;
      at += 1;
      while (json[at] !== '"') at += json[at] === "\\" ? 2 : 1;
      pieces.push(json.slice(start, at + 1));
    } else if (char === "{" || char === "[") {
      pieces.push(char);
      let next = at + 1;
      while (isSpace(json.charCodeAt(next))) next += 1;
      if (json[next] === "}" || json[next] === "]") {
        pieces.push(json[next]);
        at = next;
      } else {
        depth += 1;
        line();
      }
    } else if (char === "}" || char === "]") {
      depth -= 1;
      line();
      pieces.push(char);
    } else if (char === ",") {
      pieces.push(char);
      line();
    } else if (char === ":") {
      pieces.push(": ");
    } else if (!isSpace(json.charCodeAt(at))) {
      pieces.push(char);
    }
    at += 1;
  }
  return pieces.join("");
}
