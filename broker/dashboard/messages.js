// Messages of a queue: what they say, as text and never as anything else.

import { html, useState } from "./vendor/htm-preact.js";
import { DeleteDialog } from "./actions.js";
import { indented } from "./json.js";
import { Chip, Pager, Refusal, isResult } from "./parts.js";
import { may } from "./permissions.js";
import { isLarge } from "./poll.js";
import { link, neighbours } from "./route.js";
import { Moment, bytes, number, times, visible } from "./text.js";

const PAGE = 20;
// Of a long body, what is shown before somebody asks for all of it.
const CUT = 4096;

const STATUSES = [
  ["", "All"],
  ["ready", "Ready"],
  ["delayed", "Delayed"],
  ["leased", "Leased"],
];
const TONES = { ready: "good", delayed: "", leased: "info" };

/** The call that lists what is shown. */
export function callOfMessages(queue, params) {
  return ["list_messages", { queue, status: params.status || null, limit: PAGE, after: params.after ?? null }];
}

export function MessageList({ route, answer, caller, refresh, say }) {
  const { name, params } = route;
  const [isIndented, setIndented] = useState(false);
  const [deleting, setDeleting] = useState(null);
  const status = params.status ?? "";
  return html`<section class="list" aria-labelledby="messages-title">
    <div class="section-head">
      <h2 id="messages-title">Messages</h2>
      <nav class="tabs" aria-label="Messages by status">
        ${STATUSES.map(
          ([key, words]) => html`<a key=${key} href=${link("queues", name, { status: key })} aria-current=${status === key ? "page" : null}>${words}</a>`,
        )}
      </nav>
      <label class="check"><input type="checkbox" checked=${isIndented} onChange=${(event) => setIndented(event.target.checked)} />Indent JSON</label>
    </div>
    ${isResult(answer) &&
    isLarge(answer) &&
    html`<p class="note">These messages are large, and are not asked for every five seconds. <button type="button" onClick=${refresh}>Refresh</button></p>`}
    ${answer && !isResult(answer) && html`<${Refusal} error=${answer} />`}
    ${answer === undefined && html`<p class="note">Asking the broker …</p>`}
    ${isResult(answer) && answer.messages.length === 0 && html`<p class="empty">${params.after ? "No more messages." : status ? `No message is ${status}.` : "There is no message."}</p>`}
    ${isResult(answer) &&
    html`<ul class="messages">
      ${answer.messages.map(
        (message) => html`<${Message} key=${message.message_id} message=${message} isIndented=${isIndented} remove=${may(caller, "manage", name) && message.status !== "leased" ? () => setDeleting(message) : null} />`,
      )}
    </ul>`}
    <${Pager} ...${neighbours("queues", name, params, isResult(answer) ? answer.next : null)} what="messages" />
    ${deleting && html`<${DeleteDialog} message=${deleting} refresh=${refresh} say=${say} close=${() => setDeleting(null)} />`}
  </section>`;
}

function Message({ message, isIndented, remove }) {
  const headers = Object.entries(message.headers);
  const facts = [
    ["Enqueued", html`<${Moment} at=${message.enqueued_at} />`],
    message.status === "delayed" && ["Visible", html`<${Moment} at=${message.visible_at} />`],
    message.status === "leased" && ["Lease ends", html`<${Moment} at=${message.visible_at} />`],
    ["Received", `${number(message.receive_count)} ×`],
    message.expires_at && ["Expires", html`<${Moment} at=${message.expires_at} />`],
    message.sender !== null && ["Sender", visible(message.sender)],
    message.topic !== undefined && ["Topic", html`<a href=${link("topics", message.topic)}>${message.topic}</a>`],
  ].filter(Boolean);
  return html`<li>
    <article aria-label=${`Message ${message.message_id}`}>
      <header>
        <h3><code>${message.message_id}</code></h3>
        <${Chip} tone=${TONES[message.status]}>${message.status}<//>
        <dl class="facts">${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
        ${remove && html`<button type="button" class="quiet" onClick=${remove} aria-label=${`Delete message ${message.message_id}`}>Delete …</button>`}
      </header>
      ${message.dead_letter && html`<${DeadLetter} letter=${message.dead_letter} />`}
      ${headers.length > 0 &&
      html`<dl class="facts headers" aria-label="Headers">${headers.map(([name, value]) => html`<div key=${name}><dt>${visible(name)}</dt><dd>${visible(value)}</dd></div>`)}</dl>`}
      <${Body} id=${message.message_id} text=${message.body} isIndented=${isIndented} />
    </article>
  </li>`;
}

const REASONS = {
  max_receives: (letter) => `handed out ${times(letter.receive_count)} and never deleted (max_receives)`,
  subscription_ended: () => "the subscription ended, because its endpoint wants no more (subscription_ended)",
};

function DeadLetter({ letter }) {
  const reason = REASONS[letter.reason]?.(letter) ?? letter.reason;
  return html`<p class="letter">
    <${Chip} tone="bad">dead letter<//> from <a href=${link("queues", letter.source_queue)}>${letter.source_queue}</a>: ${reason}, <${Moment} at=${letter.dead_at} />
  </p>`;
}

const encoder = new TextEncoder();

function Body({ id, text, isIndented }) {
  const [isWhole, setWhole] = useState(false);
  const isCut = text.length > CUT && !isWhole;
  // Not between the halves of a character.
  const end = isCut && /[\ud800-\udbff]/.test(text[CUT - 1]) ? CUT - 1 : CUT;
  const shown = isCut ? text.slice(0, end) : text;
  return html`
    <pre class="body" tabindex="0" role="region" aria-label=${`Body of message ${id}`}>${visible(isIndented && !isCut ? indented(shown) : shown)}${isCut && "…"}</pre>
    ${text.length > CUT &&
    html`<button type="button" class="quiet" aria-expanded=${isWhole ? "true" : "false"} onClick=${() => setWhole(!isWhole)}
      >${isWhole ? "Show the beginning only" : `Show all ${bytes(encoder.encode(text).length)}`}</button
    >`}
  `;
}
