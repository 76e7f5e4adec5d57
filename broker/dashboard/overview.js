// The first page: a line of numbers, one graph, the table of queues.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { Graph, inLastMinute } from "./graph.js";
import { Chip, Figures, Heading, Pager, Refusal, Table, isResult } from "./parts.js";
import { link, neighbours, readRoute } from "./route.js";
import { age, count, rate } from "./text.js";

const PAGE = 50;
const MINUTES = 15;
const TYPING_MS = 250;
// Dead letters are added up over so many queues; that they are more is said.
const DEAD_LETTER_QUEUES = 50;

// With many queues, to count the messages of all of them is most of what the page costs PostgreSQL: 30 ms with 10,000.
const SELDOM = 3;

/** What the page asks for. What is for an admin alone is asked for until it is known that the caller is none. */
export function callsOfOverview({ params }, caller, { page }) {
  const areMany = isResult(page) && (page.next !== null || Boolean(params.after));
  const calls = {
    page: [
      "list_queues",
      { counts: true, limit: PAGE, prefix: params.prefix ?? "", after: params.after ?? null, dead_letter_queues: params.only === "dead" },
    ],
    dead: ["list_queues", { counts: true, dead_letter_queues: true, limit: DEAD_LETTER_QUEUES }],
  };
  if (!caller || caller.admin) {
    calls.total = ["count_messages", {}, areMany ? SELDOM : 1];
    calls.stats = ["get_stats", { minutes: MINUTES }];
  }
  return calls;
}

export function Overview({ route, answers, caller }) {
  const { page, dead, total, stats } = answers;
  const minutes = isResult(stats) ? stats.minutes : null;
  const addsUp = isResult(page) && !page.next && !route.params.after && !route.params.prefix && route.params.only !== "dead";
  return html`<div class="page">
    <${Heading} at="Queues">Queues<//>
    <${Figures} label="All queues together" figures=${figuresOf({ page, dead, total, minutes, addsUp })} />
    ${minutes && html`<${Graph} minutes=${minutes} title=${`All queues, the last ${MINUTES} minutes`} />`}
    ${caller && !caller.admin && html`<p class="note">Figures of all queues together need a token with <code>admin</code>.</p>`}
    <section class="list" aria-label="Queues by name">
      <${Search} params=${route.params} />
      ${page && !isResult(page) && html`<${Refusal} error=${page} />`}
      <${Queues} page=${isResult(page) ? page : null} dead=${isResult(dead) ? dead : null} params=${route.params} caller=${caller} />
    </section>
  </div>`;
}

function figuresOf({ page, dead, total, minutes, addsUp }) {
  const sum = addsUp ? sumOf(page.queues) : null;
  const counts = isResult(total) ? total : sum;
  const shown = (key) => (counts ? count(counts[key], counts.exact) : "–");
  const now = new Date();
  const [inRate, inUnit] = rate(minutes && inLastMinute(minutes, "enqueued", now));
  const [outRate, outUnit] = rate(minutes && inLastMinute(minutes, "delivered", now));
  const ages = isResult(page) ? page.queues.map((queue) => queue.oldest_ready_age).filter((each) => each !== null) : [];
  const letters = isResult(dead) ? sumOf(dead.queues) : null;
  const died = minutes ? minutes.reduce((all, minute) => all + minute.dead, 0) : null;
  return [
    { label: "In", value: inRate, unit: inUnit, note: "Messages enqueued, over the last sixty seconds" },
    { label: "Out", value: outRate, unit: outUnit, note: "Messages delivered to consumers, over the last sixty seconds" },
    { label: "Ready", value: shown("ready"), note: "Could be handed out now" },
    { label: "Leased", value: shown("leased"), note: "With a consumer now" },
    { label: "Delayed", value: shown("delayed"), note: "Visible later, held by nobody" },
    {
      label: "Dead",
      value: letters ? html`<a href=${link("queues", "", { only: "dead" })}>${count(letters.total, letters.exact && !dead.next)}</a>` : "–",
      note: "Messages that lie in queues which other queues have as their dead_letter_queue",
      small: died === null ? null : `${count(died)} in ${MINUTES} min`,
      tone: letters?.total > 0 ? "bad" : "",
    },
    {
      label: addsUp ? "Oldest ready" : "Oldest ready here",
      value: age(ages.length ? Math.max(...ages) : null),
      note: addsUp ? "For how long the oldest ready message has been ready" : "Among the queues that are shown below",
    },
  ];
}

function sumOf(queues) {
  const sum = { ready: 0, leased: 0, delayed: 0, total: 0, exact: true };
  for (const { counts } of queues) {
    for (const key of ["ready", "leased", "delayed", "total"]) sum[key] += counts[key];
    sum.exact &&= counts.exact;
  }
  return sum;
}

function Search({ params }) {
  const [text, setText] = useState(params.prefix ?? "");
  const typing = useRef(null);
  // The address may change without a key being pressed: by the back button.
  useEffect(() => {
    if (typing.current === null) setText(params.prefix ?? "");
  }, [params.prefix]);
  useEffect(() => () => clearTimeout(typing.current), []);
  const go = (prefix) => {
    clearTimeout(typing.current);
    typing.current = null;
    location.replace(link("queues", "", { ...params, prefix, after: "" }));
  };
  const typed = (event) => {
    const prefix = event.target.value.trim();
    setText(event.target.value);
    clearTimeout(typing.current);
    typing.current = setTimeout(() => {
      // Whoever has just gone elsewhere is not called back: the address knows it a moment before this page does.
      const { page, name } = readRoute(location.hash);
      if (page === "queues" && !name) go(prefix);
    }, TYPING_MS);
  };
  const entered = (event) => {
    event.preventDefault();
    go(text.trim());
  };
  const isDead = params.only === "dead";
  return html`<form class="search" role="search" onSubmit=${entered}>
    <label for="prefix">Find queues</label>
    <input id="prefix" type="search" value=${text} onInput=${typed} maxlength="128" placeholder="Name begins with …" autocomplete="off" spellcheck="false" />
    <a class="button" aria-current=${isDead ? "true" : null} href=${link("queues", "", { ...params, after: "", only: isDead ? "" : "dead" })}
      >${isDead ? "Show all queues" : "Dead-letter queues only"}</a
    >
  </form>`;
}

const COLUMNS = [
  { name: "Queue" },
  { name: "Ready", isNumber: true },
  { name: "Leased", isNumber: true },
  { name: "Delayed", isNumber: true },
  { name: "Total", isNumber: true },
  { name: "Oldest ready", isNumber: true },
  { name: "State" },
];

function Queues({ page, dead, params, caller }) {
  const targets = new Set(dead?.queues.map((queue) => queue.queue));
  const rows = (page?.queues ?? []).map((queue) => ({
    key: queue.queue,
    cells: [
      html`<a href=${link("queues", queue.queue)}>${queue.queue}</a>`,
      ...["ready", "leased", "delayed", "total"].map((key) => figure(queue.counts, key)),
      age(queue.oldest_ready_age),
      html`${queue.paused && html`<${Chip} tone="warn" title="Hands out nothing">paused<//>`}
      ${(targets.has(queue.queue) || params.only === "dead") && html`<${Chip} title="Other queues have it as their dead_letter_queue">dead letters<//>`}
      ${!queue.paused && !targets.has(queue.queue) && params.only !== "dead" && html`<${Chip} tone="good">open<//>`}`,
    ],
  }));
  return html`
    <${Table} caption="Queues by name, and how many messages they have" columns=${COLUMNS} rows=${rows} empty=${page ? nothing(params, caller) : "Asking the broker …"} />
    <${Pager} ...${neighbours("queues", "", params, page?.next)} what="queues" />
  `;
}

const figure = (counts, key) => html`<span class=${counts[key] === 0 ? "zero" : ""}>${count(counts[key], counts.exact || counts[key] < 50)}</span>`;

function nothing(params, caller) {
  if (params.prefix) return `No queue that you may see has a name that begins with ${params.prefix}.`;
  if (params.only === "dead") return "No queue is the dead_letter_queue of another one.";
  if (caller && caller.manage.length === 0) {
    return "This token manages no queue, and only queues that a token manages can be seen. Use one that was made with --manage.";
  }
  return "There is no queue that you may see.";
}
