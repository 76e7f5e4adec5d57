// The page: which part of it is shown, what it asks for, and what is said of the broker itself.

import { html, render, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { Overview, callsOfOverview } from "./overview.js";
import { Failure, Heading, isResult } from "./parts.js";
import { Poll } from "./poll.js";
import { QueuePage, callsOfQueue } from "./queue.js";
import { link, readRoute } from "./route.js";
import { Throttled, call, hasToken, setToken } from "./rpc.js";
import { clock } from "./text.js";
import { ThemeButton, applyTheme } from "./theme.js";
import { Topics, callsOfTopics } from "./topics.js";

const PAGES = {
  queues: (route, caller, answers) => (route.name ? callsOfQueue(route) : callsOfOverview(route, caller, answers)),
  topics: callsOfTopics,
};

function App() {
  const [, setTick] = useState(0);
  const [route, setRoute] = useState(readRoute(location.hash));
  const current = useRef(route);
  const [said, setSaid] = useState("");
  const poll = useRef(null);
  poll.current ??= new Poll(() => setTick((tick) => tick + 1));
  const { answers, needsToken } = poll.current;
  const caller = isResult(answers.caller) ? answers.caller : null;

  useEffect(() => {
    const moved = () => {
      if (location.hash !== "" && !location.hash.startsWith("#/")) return;
      Heading.isFollowing = true;
      const from = current.current;
      const to = readRoute(location.hash);
      current.current = to;
      setRoute(to);
      // Another page begins at its top, another part of a list at that list's, and what is typed into the search stays.
      if (link(to.page, to.name) !== link(from.page, from.name)) scrollTo(0, 0);
      else if (to.params.after !== from.params.after) document.querySelector(".list")?.scrollIntoView();
    };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);

  const calls = PAGES[route.page]?.(route, caller, answers) ?? {};
  // Another page of a list, or another search, is the same subject: the old rows stay until the new ones are there.
  useEffect(() => poll.current.watch(link(route.page, route.name), { caller: ["get_caller", {}], ...calls }));

  const refresh = () => poll.current.now();
  const enter = (token) => {
    setToken(token);
    Heading.isFollowing = true;
    poll.current.now();
  };
  const leave = () => {
    setToken(null);
    poll.current.now();
  };
  // The same words twice would be said once.
  const say = (sentence) => setSaid((before) => (before === sentence ? `${sentence}\u00a0` : sentence));
  const shown = { route, answers, caller, refresh, say };
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <${Header} route=${route} caller=${caller} leave=${leave} poll=${poll.current} />
    <main id="main" tabindex="-1" class=${poll.current.away ? "stale" : ""}>
      ${needsToken ? html`<${Login} error=${needsToken} enter=${enter} />` : html`<${Page} ...${shown} />`}
    </main>
    <${Footer} caller=${caller} />
    <div class="said" role="status">${said && html`<p key=${said}>${said}</p>`}</div>
    <${AwayBanner} poll=${poll.current} />
  `;
}

function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

function Page(props) {
  const { page, name } = props.route;
  if (page === "queues") return name ? html`<${QueuePage} key=${name} ...${props} />` : html`<${Overview} ...${props} />`;
  if (page === "topics") return html`<${Topics} ...${props} />`;
  return html`<div class="page">
    <${Heading} at="Nothing here">There is nothing here<//>
    <p><a href="#/">All queues</a> · <a href="#/topics">Topics</a></p>
  </div>`;
}

function Header({ route, caller, leave, poll }) {
  const links = [
    ["queues", "#/", "Queues"],
    ["topics", "#/topics", "Topics"],
  ];
  return html`<header class="top">
    <div class="bar">
      <a class="brand" href="#/"><img src="dashboard/logo.svg" width="26" height="26" alt="" />WonderQ</a>
      <nav aria-label="Pages">
        ${links.map(([page, href, words]) => html`<a key=${page} href=${href} aria-current=${route.page === page ? (route.name ? "true" : "page") : null}>${words}</a>`)}
      </nav>
      <div class="right">
        <${Liveness} poll=${poll} />
        <${ThemeButton} />
        ${hasToken() && caller?.auth_required && html`<span class="who" title="The name of your token">${caller.name}</span>`}
        ${hasToken() && !poll.needsToken && html`<button type="button" onClick=${leave}>Sign out</button>`}
      </div>
    </div>
  </header>`;
}

function Liveness({ poll }) {
  const state = poll.away ? "away" : poll.at ? "live" : "waiting";
  const words = { away: "Not live", live: "Live", waiting: "…" }[state];
  return html`<span class=${`liveness ${state}`} title="Asks the broker every five seconds while this page is seen">
    <span class="word">${words}</span>${poll.at && html`<time class="as-of">${clock(poll.at)}</time>`}
  </span>`;
}

/** Says that what is shown is old, and why; it lies over the page, so nothing moves when it comes and goes. */
function AwayBanner({ poll }) {
  const { away, at } = poll;
  return html`<div class="banner" role="alert">
    ${away &&
    html`<p>
      <strong>Unavailable, trying again.</strong> ${sentenceOf(away.reason)}
      ${at && html` What you see is as of ${clock(at)}.`}
    </p>`}
  </div>`;
}

const sentenceOf = (reason) => (/[.!?]$/.test(reason) ? reason : `${reason}.`);

function Login({ error, enter }) {
  const [text, setText] = useState("");
  const entered = (event) => {
    event.preventDefault();
    if (text.trim()) enter(text.trim());
  };
  const failure =
    error instanceof Throttled
      ? new Error(`${error.message} Try again in ${error.retryAfter || "some"} seconds.`)
      : hasToken()
        ? new Error("This token does not count: it is mistyped, or was revoked.")
        : null;
  return html`<div class="page login">
    <${Heading} at="Sign in">This broker asks for a token<//>
    <form onSubmit=${entered}>
      <label for="token">Token</label>
      <input id="token" type="password" value=${text} onInput=${(event) => setText(event.target.value)} autocomplete="off" spellcheck="false" required aria-describedby="token-help" />
      <button class="primary">Sign in</button>
      <${Failure} error=${failure} />
    </form>
    <p id="token-help" class="note">
      It is sent to this broker and to nobody else, and forgotten when this tab is closed. Whoever runs the broker makes one with${" "}
      <code>wonderq token create NAME --manage '*' --admin</code>.
    </p>
  </div>`;
}

function Footer({ caller }) {
  const [server, setServer] = useState(null);
  useEffect(() => {
    if (caller?.admin) call("get_server", {}).then(setServer, () => {});
    else setServer(null);
  }, [caller?.admin, caller?.name]);
  return html`<footer>
    ${server && html`<span>WonderQ ${server.version}</span><span>PostgreSQL ${server.postgresql_version}</span><span>${durabilityOf(server)}</span>`}
    <a href="openrpc.json">Schema</a>
  </footer>`;
}

const DURABILITY = {
  replicated: "Messages are on disk here and on a standby",
  durable: "Messages are on disk before they are acknowledged",
  at_risk: "A crash can lose acknowledged messages",
};
const durabilityOf = (server) => DURABILITY[server.durability.level] ?? server.durability.level;

applyTheme();
render(html`<${App} />`, document.getElementById("app"));
