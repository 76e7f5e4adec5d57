// What happened in the last minutes: a few bars for each, and the same as a table.

import { html } from "./vendor/htm-preact.js";
import { clock, number } from "./text.js";

const SERIES = [
  { key: "enqueued", name: "Enqueued" },
  { key: "delivered", name: "Delivered" },
  { key: "deleted", name: "Deleted" },
];
const OTHERS = [
  { key: "returned", name: "Returned" },
  { key: "dead", name: "Dead" },
  { key: "expired", name: "Expired" },
];
const WIDTH = 600;
const HEIGHT = 120;
const MINUTE_MS = 60_000;

/** The least round number that is no less, and has a half: 4, 6, 8, 10, 20, 40, … */
export function roundUp(value) {
  if (value <= 4) return 4;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((each) => each * power).find((each) => each >= value);
}

const time = (minute) => clock(new Date(minute.started_at)).slice(0, 5);
const total = (minutes, key) => minutes.reduce((sum, minute) => sum + minute[key], 0);

export function Graph({ minutes, title }) {
  if (minutes.length === 0) return null;
  const top = roundUp(Math.max(...minutes.flatMap((minute) => SERIES.map((each) => minute[each.key]))));
  const step = WIDTH / minutes.length;
  const bar = (step * 0.78) / SERIES.length;
  return html`<section class="graph" aria-labelledby="graph-title">
    <div class="graph-head">
      <h2 id="graph-title">${title}</h2>
      <ul class="legend">
        ${SERIES.map((each) => html`<li key=${each.key} class=${each.key}>${each.name} <b>${number(total(minutes, each.key))}</b></li>`)}
      </ul>
    </div>
    <div class="plot" aria-hidden="true">
      <div class="scale"><span>${number(top)}</span><span>${number(top / 2)}</span><span>0</span></div>
      <svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none">
        ${[0, 0.5, 1].map((part) => html`<line key=${part} class="grid" x1="0" x2=${WIDTH} y1=${HEIGHT * part} y2=${HEIGHT * part} />`)}
        ${minutes.map(
          (minute, n) => html`<g key=${minute.started_at}>
            <title>${time(minute)}: ${SERIES.map((each) => `${number(minute[each.key])} ${each.name.toLowerCase()}`).join(", ")}</title>
            <rect class="hover" x=${n * step} y="0" width=${step} height=${HEIGHT} />
            ${SERIES.map((each, place) => {
              const value = minute[each.key];
              const height = value === 0 ? 0 : Math.max(1.5, (value / top) * HEIGHT);
              return html`<rect key=${each.key} class=${each.key} x=${n * step + step * 0.11 + place * bar} y=${HEIGHT - height} width=${bar} height=${height} />`;
            })}
          </g>`,
        )}
      </svg>
      <div class="times"><span>${time(minutes[0])}</span><span>${time(minutes[Math.floor(minutes.length / 2)])}</span><span>now</span></div>
    </div>
    <details>
      <summary>The same as a table</summary>
      <div class="scroll" tabindex="0" role="region" aria-label="Messages by minute">
        <table class="plain">
          <caption class="unseen">Messages by minute</caption>
          <thead><tr><th scope="col">Minute</th>${[...SERIES, ...OTHERS].map((each) => html`<th key=${each.key} scope="col" class="number">${each.name}</th>`)}</tr></thead>
          <tbody>
            ${[...minutes].reverse().map(
              (minute) => html`<tr key=${minute.started_at}>
                <th scope="row">${time(minute)}</th>
                ${[...SERIES, ...OTHERS].map((each) => html`<td key=${each.key} class="number">${number(minute[each.key])}</td>`)}
              </tr>`,
            )}
          </tbody>
        </table>
      </div>
    </details>
  </section>`;
}

/** How many in the last sixty seconds: the minute that is under way, and what is missing of the one before. */
export function inLastMinute(minutes, key, now) {
  const [before, current] = [minutes.at(-2), minutes.at(-1)];
  if (!current) return null;
  const elapsed = Math.min(1, Math.max(0, (now - new Date(current.started_at)) / MINUTE_MS));
  return current[key] + (before ? before[key] * (1 - elapsed) : 0);
}
