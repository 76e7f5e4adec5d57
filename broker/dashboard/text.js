// How numbers, times and the text of strangers are written.

import { html } from "./vendor/htm-preact.js";

const numbers = new Intl.NumberFormat("en");

export const number = (value) => numbers.format(value);

/** How often. */
export const times = (value) => (value === 1 ? "once" : `${number(value)} times`);

/** A count; an estimate says that it is one. */
export function count(value, isExact = true) {
  if (value === undefined || value === null) return "–";
  if (isExact) return number(value);
  return html`<span title="An estimate: more than 10,000 are not counted one by one"
    ><span aria-hidden="true">≈\u202f</span><span class="unseen">about </span>${number(value)}</span
  >`;
}

/** Messages a second, or a minute where that says more. */
export function rate(perMinute) {
  if (perMinute === null || perMinute === undefined) return ["–", "/s"];
  const perSecond = perMinute / 60;
  if (perSecond >= 10) return [number(Math.round(perSecond)), "/s"];
  if (perSecond >= 1) return [perSecond.toFixed(1), "/s"];
  return [number(Math.round(perMinute)), "/min"];
}

const UNITS = [
  [86_400, "d"],
  [3_600, "h"],
  [60, "min"],
  [1, "s"],
];

/** A duration in the two largest units that it has: 2 h 5 min. */
export function duration(seconds) {
  if (seconds === undefined || seconds === null) return "–";
  if (seconds > 0 && seconds < 1) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 60 && seconds !== Math.floor(seconds)) return `${Number(seconds.toFixed(1))} s`;
  const whole = Math.floor(seconds);
  const n = Math.max(0, UNITS.findIndex(([size]) => whole >= size));
  if (whole < 1) return "0 s";
  const [size, unit] = UNITS[n];
  const rest = UNITS[n + 1] ? Math.floor((whole % size) / UNITS[n + 1][0]) : 0;
  return `${number(Math.floor(whole / size))} ${unit}${rest ? ` ${rest} ${UNITS[n + 1][1]}` : ""}`;
}

/** An age, in whole seconds. */
export const age = (seconds) => (seconds === undefined || seconds === null ? "–" : duration(Math.floor(seconds)));

export function bytes(value) {
  if (value < 1024) return `${value} bytes`;
  const [size, unit] = value < 1024 ** 2 ? [1024, "KiB"] : [1024 ** 2, "MiB"];
  return `${Number((value / size).toFixed(1))} ${unit}`;
}

const two = (value) => String(value).padStart(2, "0");

export const clock = (date) => `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;

/** A moment of the contract, in the time of whoever looks. */
export function Moment({ at }) {
  if (!at) return "–";
  const date = new Date(at);
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return html`<time datetime=${at} title=${at}>${day} ${clock(date)}</time>`;
}

// What is not seen, or changes how other characters are seen: controls, directions, joiners, tags.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb]|[\u{e0000}-\u{e0fff}]/gu;
// Of a text with more of them, not each gets an element of its own.
const MOST_MARKS = 1_000;

const named = (char) => `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;

/** The text of a stranger, as text: what would not be seen is named. */
export function visible(text) {
  const found = text.match(UNSEEN);
  if (found === null) return text;
  if (found.length > MOST_MARKS) return text.replace(UNSEEN, named);
  const pieces = [];
  let from = 0;
  for (const match of text.matchAll(UNSEEN)) {
    pieces.push(text.slice(from, match.index), html`<span class="unseeable">${named(match[0])}</span>`);
    from = match.index + match[0].length;
  }
  pieces.push(text.slice(from));
  return pieces;
}
