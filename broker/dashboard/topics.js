// Topics, who subscribes to them, and how the endpoints fare.

import { html } from "./vendor/htm-preact.js";
import { Chip, Heading, Pager, Refusal, Table, isResult } from "./parts.js";
import { link, neighbours } from "./route.js";
import { Moment, count, visible } from "./text.js";

const PAGE = 50;

/** What the page of all topics, or of one, asks for. */
export function callsOfTopics({ name, params }) {
  const subscriptions = ["list_subscriptions", { topic: name || null, limit: PAGE, after: params.after ?? null }];
  if (name) return { topics: ["list_topics", { prefix: name, counts: true, limit: 1 }], subscriptions };
  return {
    topics: ["list_topics", { counts: true, limit: PAGE, after: params.topics_after ?? null }],
    subscriptions,
  };
}

const TOPIC_COLUMNS = [
  { name: "Topic" },
  { name: "Delivery" },
  { name: "Subscriptions", isNumber: true },
  { name: "Stored messages", isNumber: true },
  { name: "Created", isWide: true },
];

export function Topics({ route, answers }) {
  const { topics, subscriptions } = answers;
  const page = isResult(topics) ? topics : null;
  const { name, params } = route;
  const shown = name ? page?.topics.filter((topic) => topic.topic === name) : page?.topics;
  const rows = (shown ?? []).map((topic) => ({
    key: topic.topic,
    cells: [
      name ? topic.topic : html`<a href=${link("topics", topic.topic)}>${topic.topic}</a>`,
      topic.delivery === "immediate" ? "immediate" : html`<${Chip} title="Stored until broadcast is called">on broadcast<//>`,
      count(topic.subscriptions),
      count(topic.messages, topic.messages < 10_000),
      html`<${Moment} at=${topic.created_at} />`,
    ],
  }));
  return html`<div class="page">
    ${name && html`<p class="crumbs"><a href=${link("topics")}>Topics</a></p>`}
    <${Heading} at=${name ? `Topic ${name}` : "Topics"}>${name || "Topics"}<//>
    ${topics && !page && html`<${Refusal} error=${topics} />`}
    <${Table} caption="Topics by name" columns=${TOPIC_COLUMNS} rows=${rows} empty=${page ? "There is no topic that you may see." : "Asking the broker …"} />
    ${!name && html`<${TopicPager} params=${params} next=${page?.next} />`}
    <section class="list" aria-labelledby="subscriptions-title">
      <h2 id="subscriptions-title">${name ? "Its subscriptions" : "Subscriptions"}</h2>
      <${Subscriptions} answer=${subscriptions} route=${route} />
    </section>
  </div>`;
}

// Both lists have pages, so the cursor of one of them has another name.
function TopicPager({ params, next }) {
  if (!next && !params.topics_after) return null;
  const at = (after) => link("topics", "", { ...params, topics_after: after });
  return html`<${Pager} previous=${params.topics_after ? at("") : null} next=${next ? at(next) : null} what="topics" />`;
}

const COLUMNS = [{ name: "Subscription" }, { name: "Topic" }, { name: "State" }, { name: "Goes to", isWide: true }, { name: "Filter", isWide: true }];

const STATES = {
  active: ["good", "Gets what is published"],
  failing: ["warn", "The endpoint failed five times in a row, and is tried with one message every five seconds"],
  ended: ["bad", "The endpoint answered 410, and gets no more"],
};

function Subscriptions({ answer, route }) {
  if (answer && !isResult(answer)) return html`<${Refusal} error=${answer} />`;
  const rows = (answer?.subscriptions ?? []).map((each) => {
    const [tone, meaning] = STATES[each.state] ?? ["", ""];
    return {
      key: each.subscription_id,
      cells: [
        each.name,
        html`<a href=${link("topics", each.topic)}>${each.topic}</a>`,
        html`<${Chip} tone=${tone} title=${meaning}>${each.state}<//>`,
        html`${each.url && html`<span class="url">${visible(each.url)}</span> by way of `}<a href=${link("queues", each.queue)}>${each.queue}</a>`,
        html`<${Filter} filter=${each.filter} />`,
      ],
    };
  });
  return html`
    <${Table} caption="Subscriptions, the oldest first" columns=${COLUMNS} rows=${rows} empty=${answer ? "Nobody subscribes." : "Asking the broker …"} />
    <${Pager} ...${neighbours("topics", route.name, route.params, answer?.next)} what="subscriptions" />
  `;
}

function Filter({ filter }) {
  if (filter === null) return html`<span class="zero">everything</span>`;
  return Object.entries(filter).map(
    ([header, values]) => html`<span class="filter" key=${header}>${visible(header)} = ${visible(values.join(" or "))}</span>`,
  );
}
