// Parts that several pages are made of.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { CallError } from "./rpc.js";

/** The heading of a page. It takes the focus when one comes to the page, so that a screen reader says where one is. */
export function Heading({ children, at }) {
  const element = useRef(null);
  useEffect(() => {
    document.title = `${at} · WonderQ`;
    if (Heading.isFollowing) element.current.focus({ preventScroll: true });
  }, [at]);
  return html`<h1 ref=${element} tabindex="-1">${children}</h1>`;
}
// Not when the page is loaded: then the browser says it.
Heading.isFollowing = false;

/** Numbers in a line. Each: {label, value, unit, note, tone}. */
export function Figures({ figures, label }) {
  return html`<dl class="figures" aria-label=${label}>
    ${figures.map(
      (each) => html`<div key=${each.label} class=${each.tone ?? ""} title=${each.note}>
        <dt>${each.label}</dt>
        <dd>${each.value}${each.unit && html`<span class="unit">${each.unit}</span>`}</dd>
        <dd class="unseen">${each.note}</dd>
        ${each.small && html`<dd class="small">${each.small}</dd>`}
      </div>`,
    )}
  </dl>`;
}

/**
 * A table that becomes a list of cards on a narrow screen. Columns: {name, isNumber, isWide}; the first one names the row.
 * The roles are said because a card's `display` takes them away.
 */
export function Table({ caption, columns, rows, empty, isCaptionSeen = false }) {
  return html`<table role="table" class="cards">
    <caption class=${isCaptionSeen ? "" : "unseen"}>${caption}</caption>
    <thead role="rowgroup">
      <tr role="row">
        ${columns.map(
          (column) => html`<th key=${column.name} role="columnheader" scope="col" class=${column.isNumber ? "number" : ""}>${column.name}</th>`,
        )}
      </tr>
    </thead>
    <tbody role="rowgroup">
      ${rows.map(
        (row) => html`<tr key=${row.key} role="row">
          ${columns.map((column, n) => {
            const cell = row.cells[n];
            const kind = column.isNumber ? "number" : column.isWide ? "wide" : "";
            return n === 0
              ? html`<th key=${column.name} role="rowheader" scope="row">${cell}</th>`
              : html`<td key=${column.name} role="cell" class=${kind} data-label=${column.name}>${cell}</td>`;
          })}
        </tr>`,
      )}
      ${rows.length === 0 && html`<tr role="row"><td role="cell" class="empty" colspan=${columns.length}>${empty}</td></tr>`}
    </tbody>
  </table>`;
}

/** Links to the pages of a list before and behind this one. */
export function Pager({ previous, next, what }) {
  if (!previous && !next) return null;
  return html`<nav class="pager" aria-label=${`Pages of ${what}`}>
    ${previous ? html`<a class="button" href=${previous} rel="prev">← Previous</a>` : html`<span class="button" aria-disabled="true">← Previous</span>`}
    ${next ? html`<a class="button" href=${next} rel="next">Next →</a>` : html`<span class="button" aria-disabled="true">Next →</span>`}
  </nav>`;
}

/** What stands in the place of something that a call would not give. */
export function Refusal({ error }) {
  return html`<p class="refusal" role="note">${error.message}</p>`;
}

/** Whether this is a result: it was asked for, it came, and it is no error. */
export const isResult = (answer) => answer !== undefined && !(answer instanceof CallError);

/** A word about a state. */
export const Chip = ({ tone = "", title, children }) => html`<span class=${`chip ${tone}`} title=${title}>${children}</span>`;

/** A dialog that is open as long as it is shown. Escape closes it; the focus goes back to where it was. */
export function Dialog({ title, close, children }) {
  const element = useRef(null);
  useEffect(() => {
    const dialog = element.current;
    const before = document.activeElement;
    dialog.showModal();
    return () => {
      dialog.close();
      // What had the focus may have gone meanwhile, as a button that was for what is done now.
      if (before?.isConnected) before.focus();
      else document.querySelector("h1")?.focus();
    };
  }, []);
  const cancelled = (event) => {
    event.preventDefault();
    close();
  };
  return html`<dialog ref=${element} aria-labelledby="dialog-title" onCancel=${cancelled}>
    <h2 id="dialog-title">${title}</h2>
    ${children}
  </dialog>`;
}

/** Return [isBusy, error, run]: `run` does one thing at a time, and what it throws becomes `error`. */
export function useAction() {
  const [state, setState] = useState({ isBusy: false, error: null });
  const run = async (action) => {
    setState({ isBusy: true, error: null });
    try {
      await action();
      setState({ isBusy: false, error: null });
    } catch (error) {
      setState({ isBusy: false, error });
    }
  };
  return [state.isBusy, state.error, run];
}

/** What went wrong, said at once to those who do not see it. The place is there before, or some would not hear it. */
export const Failure = ({ error }) => html`<div role="alert">${error && html`<p class="failure">${error.message || "It did not work, and nobody knows why."}</p>`}</div>`;
