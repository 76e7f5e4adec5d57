// The page of one queue: its counts and settings, what may be done with it, its messages.

import { html, useState } from "./vendor/htm-preact.js";
import { PurgeDialog, RedriveDialog, SendDialog } from "./actions.js";
import { Graph, inLastMinute } from "./graph.js";
import { MessageList, callOfMessages } from "./messages.js";
import { Chip, Failure, Figures, Heading, Refusal, isResult, useAction } from "./parts.js";
import { may } from "./permissions.js";
import { link } from "./route.js";
import { call } from "./rpc.js";
import { Moment, age, bytes, count, duration, number, rate } from "./text.js";

const MINUTES = 15;

/** What the page asks for. */
export function callsOfQueue({ name, params }) {
  return {
    queue: ["get_queue", { queue: name }],
    stats: ["get_stats", { queue: name, minutes: MINUTES }],
    targets: ["list_queues", { prefix: name, dead_letter_queues: true, limit: 1 }],
    messages: callOfMessages(name, params),
  };
}

export function QueuePage({ route, answers, caller, refresh, say }) {
  const { name } = route;
  const { queue, stats, targets, messages } = answers;
  const minutes = isResult(stats) ? stats.minutes : null;
  const isTarget = isResult(targets) && targets.queues.some((each) => each.queue === name);
  const hasDeadLetters = isResult(messages) && messages.messages.some((each) => each.dead_letter !== null);
  return html`<div class="page">
    <p class="crumbs"><a href="#/">Queues</a></p>
    <div class="title">
      <${Heading} at=${name}>${name}<//>
      ${isResult(queue) && queue.paused && html`<${Chip} tone="warn" title="Hands out nothing">paused<//>`}
      ${isTarget && html`<${Chip} title="Other queues have it as their dead_letter_queue">dead letters<//>`}
    </div>
    ${queue === undefined && html`<p class="note">Asking the broker …</p>`}
    ${queue !== undefined && !isResult(queue) && html`<${Refusal} error=${queue} />`}
    ${isResult(queue) &&
    html`
      <${Actions} queue=${queue} caller=${caller} canRedrive=${isTarget || hasDeadLetters} refresh=${refresh} say=${say} />
      <${Figures} label=${`Messages of ${name}`} figures=${figuresOf(queue, minutes)} />
      ${minutes && html`<${Graph} minutes=${minutes} title=${`The last ${MINUTES} minutes`} />`}
      <${MessageList} route=${route} answer=${messages} caller=${caller} refresh=${refresh} say=${say} />
      <${Settings} queue=${queue} />
    `}
  </div>`;
}

function figuresOf(queue, minutes) {
  const { counts } = queue;
  const now = new Date();
  const [inRate, inUnit] = rate(minutes && inLastMinute(minutes, "enqueued", now));
  const [outRate, outUnit] = rate(minutes && inLastMinute(minutes, "delivered", now));
  const shown = (key) => count(counts[key], counts.exact || counts[key] <= 50);
  return [
    { label: "In", value: inRate, unit: inUnit, note: "Messages enqueued, over the last sixty seconds" },
    { label: "Out", value: outRate, unit: outUnit, note: "Messages delivered to consumers, over the last sixty seconds" },
    { label: "Ready", value: shown("ready"), note: "Could be handed out now" },
    { label: "Leased", value: shown("leased"), note: "With a consumer now" },
    { label: "Delayed", value: shown("delayed"), note: "Visible later, held by nobody" },
    { label: "Total", value: shown("total"), note: "Ready, leased and delayed" },
    { label: "Oldest ready", value: age(queue.oldest_ready_age), note: "For how long the oldest ready message has been ready" },
  ];
}

function Actions({ queue, caller, canRedrive, refresh, say }) {
  const [open, setOpen] = useState(null);
  const [isBusy, error, run] = useAction();
  const name = queue.queue;
  const mayManage = may(caller, "manage", name);
  const setPaused = (paused) =>
    run(async () => {
      await call("update_queue", { queue: name, paused });
      say(paused ? `${name} is paused: it hands out nothing.` : `${name} hands out messages again.`);
      refresh();
    });
  const shared = { queue, caller, refresh, say, close: () => setOpen(null) };
  return html`<div>
    <div class="actions" role="group" aria-label="What can be done with this queue">
      ${mayManage &&
      html`
        <button type="button" disabled=${isBusy} onClick=${() => setPaused(!queue.paused)}>${queue.paused ? "Resume" : "Pause"}</button>
        ${canRedrive && html`<button type="button" onClick=${() => setOpen("redrive")}>Redrive …</button>`}
        <button type="button" class="danger" onClick=${() => setOpen("purge")}>Purge …</button>
      `}
      ${may(caller, "send", name) && html`<button type="button" onClick=${() => setOpen("send")}>Send a message …</button>`}
    </div>
    ${caller && !mayManage && html`<p class="note">Read-only: your token may not manage ${name}, which pausing, redriving and purging need.</p>`}
    <${Failure} error=${error} />
    ${open === "purge" && html`<${PurgeDialog} ...${shared} />`}
    ${open === "redrive" && html`<${RedriveDialog} ...${shared} />`}
    ${open === "send" && html`<${SendDialog} ...${shared} />`}
  </div>`;
}

function Settings({ queue }) {
  const target = queue.dead_letter_queue;
  const rows = [
    ["visibility_timeout", duration(queue.visibility_timeout), "How long a consumer has a message for itself"],
    ["message_ttl", queue.message_ttl === null ? "for ever" : duration(queue.message_ttl), "How long a message is kept"],
    ["delay", duration(queue.delay), "How long a new message waits"],
    ["max_receives", queue.max_receives === null ? "no limit" : number(queue.max_receives), "How often a message is handed out at most"],
    ["dead_letter_queue", target ? html`<a href=${link("queues", target)}>${target}</a>` : "none", "Where messages go then"],
    ["max_messages", queue.max_messages === null ? "no limit" : number(queue.max_messages), "About so many are taken"],
    ["max_message_bytes", bytes(queue.max_message_bytes), "How long a body may be"],
    ["idempotency_window", duration(queue.idempotency_window), "For how long a key is remembered"],
    ["paused", queue.paused ? "yes" : "no", "Whether it hands out nothing"],
    ["created_at", html`<${Moment} at=${queue.created_at} />`, ""],
    ["updated_at", html`<${Moment} at=${queue.updated_at} />`, "When a setting was changed last"],
  ];
  return html`<section aria-labelledby="settings-title">
    <h2 id="settings-title">Settings</h2>
    <dl class="settings">
      ${rows.map(
        ([key, value, meaning]) => html`<div key=${key}>
          <dt><code>${key}</code><span class="meaning">${meaning}</span></dt>
          <dd>${value}</dd>
        </div>`,
      )}
    </dl>
  </section>`;
}
