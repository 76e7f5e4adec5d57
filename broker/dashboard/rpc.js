// A client of POST /rpc: everything that this page knows and does goes through here.

import { readAnswer } from "./json.js";

const TOKEN = "wonderq.token";
// Longer than the broker takes to say that its database does not answer.
const PATIENCE_MS = 20_000;

/** An error that a method answered with: `code`, `type`, and a sentence in `message`. */
export class CallError extends Error {
  constructor({ code, message, data }) {
    super(message);
    this.code = code;
    this.type = data?.type ?? "";
    this.retryAfter = data?.retry_after ?? 0;
  }

  /** Whether it goes away by itself: the database is away, or there is too much to do. */
  get isPassing() {
    return this.type === "unavailable" || this.type === "overloaded";
  }
}

/** The broker did not answer, or not with what was asked for. */
export class Away extends Error {
  constructor(message, retryAfter = 0) {
    super(message);
    this.retryAfter = retryAfter;
  }
}

/** A token is needed, and this one does not count. */
export class TokenNeeded extends Error {
  constructor() {
    super("Your token does not count any more: sign in again.");
  }
}

/** There were too many tokens that do not count. */
export class Throttled extends Error {
  constructor(retryAfter) {
    super("Too many failed logins from this address.");
    this.retryAfter = retryAfter;
  }
}

/** A param that is JSON already, and is sent as it is. */
export class Verbatim {
  constructor(json) {
    this.json = json;
  }
}

const written = (params) =>
  `{${Object.entries(params)
    .map(([key, value]) => `${JSON.stringify(key)}:${value instanceof Verbatim ? value.json : JSON.stringify(value)}`)
    .join(",")}}`;

// Where a browser keeps nothing, the token lasts as long as the page.
let token = null;
try {
  token = sessionStorage.getItem(TOKEN);
} catch {
  // It stays null.
}

export const hasToken = () => token !== null;

export function setToken(value) {
  token = value;
  try {
    if (value === null) sessionStorage.removeItem(TOKEN);
    else sessionStorage.setItem(TOKEN, value);
  } catch {
    // Then it is not kept.
  }
}

/**
 * Send calls, `[method, params]`, as one batch; return for each its result or a CallError, in order.
 * Throws Away, TokenNeeded and Throttled.
 */
export async function batch(calls, signal) {
  const requests = calls.map(([method, params], id) => `{"jsonrpc":"2.0","id":${id},"method":"${method}","params":${written(params)}}`);
  const headers = { "Content-Type": "application/json" };
  if (token !== null) headers.Authorization = `Bearer ${token}`;
  const signals = [AbortSignal.timeout(PATIENCE_MS)];
  if (signal) signals.push(signal);
  let response, text;
  try {
    response = await fetch("rpc", {
      method: "POST",
      headers,
      body: `[${requests.join(",")}]`,
      cache: "no-store",
      credentials: "same-origin",
      signal: AbortSignal.any(signals),
    });
    text = await response.text();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Away("The broker does not answer");
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  if (response.status === 401) throw new TokenNeeded();
  if (response.status === 429) throw new Throttled(retryAfter);
  const answers = response.status === 200 ? read(text) : null;
  if (!Array.isArray(answers)) throw new Away(await sentence(response.status, text), retryAfter);
  return calls.map((_, id) => {
    const answer = answers.find((each) => each.id === id);
    return answer && "result" in answer ? answer.result : new CallError(answer?.error ?? { message: "No answer came." });
  });
}

function read(text) {
  try {
    return readAnswer(text);
  } catch {
    return null;
  }
}

async function sentence(status, text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The broker answered with HTTP ${status}`;
  }
}

/** Call one method; return its result. Throws CallError, and what `batch` throws. */
export async function call(method, params) {
  let answer;
  try {
    [answer] = await batch([[method, params]]);
  } catch (error) {
    if (error instanceof Away) error.message = `${error.message.replace(/[.]$/, "")}. It may have been done all the same: look before you repeat it.`;
    throw error;
  }
  if (answer instanceof CallError) throw answer;
  return answer;
}
