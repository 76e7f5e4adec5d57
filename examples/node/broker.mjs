// A producer and a consumer in plain Node (18 or later), with its built-in fetch and nothing else:
//
//     node examples/node/broker.mjs produce letters '{"hello":"world"}' '[1, 2]'
//     node examples/node/broker.mjs consume letters [MAX]        until MAX messages, Ctrl-C or SIGTERM
//
// BROKER_URL and BROKER_TOKEN say where the broker is.
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";

const url = process.env.BROKER_URL ?? "http://127.0.0.1:8080";
const token = process.env.BROKER_TOKEN;
const headers = { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
const DEADLINE_MS = Number(process.env.DEADLINE_MS ?? 30_000);
// For so many seconds a delivery is this consumer's; work that takes longer calls extend_visibility.
const LEASE = 30;

const failure = (message, data) => Object.assign(new Error(`${message} (${data.type})`), { data });

// One attempt. Where no answer comes nothing was done if there was no connection, else nobody knows.
async function attempt(method, params, signal) {
  const signals = [AbortSignal.timeout(15_000 + 1000 * (params.wait ?? 0)), signal].filter(Boolean);
  const body = JSON.stringify({ jsonrpc: "2.0", id: 1, method, params });
  let answer;
  try {
    const options = { method: "POST", headers, body, signal: AbortSignal.any?.(signals) ?? signals.at(-1) };
    answer = await (await fetch(`${url}/rpc`, options)).json();
  } catch (error) {
    const code = error.cause?.code ?? error.name;
    const outcome = ["ECONNREFUSED", "ENOTFOUND"].includes(code) ? "none" : "unknown";
    throw failure(`No answer from ${url}: ${code}`, { type: "unavailable", retryable: true, outcome });
  }
  if (answer.error) throw failure(answer.error.message, answer.error.data);
  return answer.result;
}

// Repeats what was certainly not done, and what is harmless twice (`isSafe`), until the deadline.
async function call(method, params, { isSafe = false, signal } = {}) {
  const until = Date.now() + DEADLINE_MS;
  for (let longest = 100; ; longest = Math.min(2 * longest, 5000)) {
    try {
      return await attempt(method, params, signal);
    } catch (error) {
      const pause = 1000 * (error.data.retry_after ?? 0) + Math.random() * longest;
      const mayBeSent = error.data.retryable && (isSafe || error.data.outcome === "none");
      if (!mayBeSent || signal?.aborted || Date.now() + pause > until) throw error;
      await sleep(pause);
    }
  }
}

async function produce(queue, bodies) {
  for (const text of bodies) {
    // With a key of its own a message is stored once, however often it is sent.
    const params = { queue, body: JSON.parse(text), idempotency_key: randomUUID() };
    console.log((await call("enqueue", params, { isSafe: true })).message_id);
  }
}

async function consume(queue, max, handle) {
  const stop = new AbortController();
  for (const name of ["SIGINT", "SIGTERM"]) process.once(name, () => stop.abort());
  const { signal } = stop;
  while (max > 0 && !signal.aborted) {
    const params = { queue, max_messages: Math.min(max, 10), visibility_timeout: LEASE, wait: 20 };
    // A signal hangs up, and the broker takes back what it had leased meanwhile.
    const { messages } = await call("dequeue", params, { isSafe: true, signal }).catch((error) => {
      if (signal.aborted) return { messages: [] };
      throw error;
    });
    for (const { body, receipt, receive_count } of messages) {
      handle(body, receive_count);
      await call("delete", { receipt }, { isSafe: true }); // Only now that the work is done.
      max -= 1;
    }
  }
}

const [what, queue, ...rest] = process.argv.slice(2);
if (what === "produce") await produce(queue, rest);
else await consume(queue, Number(rest[0] ?? Infinity), (body, count) => console.log(JSON.stringify(body), count));
