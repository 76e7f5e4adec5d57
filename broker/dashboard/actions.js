// What is done with queues and messages, each in a dialog that names what it is about.

import { html, useRef, useState } from "./vendor/htm-preact.js";
import { Dialog, Failure, useAction } from "./parts.js";
import { Verbatim, call } from "./rpc.js";
import { bytes, count, number } from "./text.js";

/** Repeat a call until it says that it is complete, or `isStopped`, or it does nothing more; return how many it did. */
async function repeat(method, params, key, { isStopped, progress }) {
  let done = 0;
  for (;;) {
    const answer = await call(method, params);
    done += answer[key];
    progress(done);
    if (answer.complete || isStopped() || (answer[key] === 0 && method === "redrive")) return { done, isComplete: answer.complete };
  }
}

/** State of something that goes on until it is complete or stopped. */
function useRepeated(close) {
  const [done, setDone] = useState(null);
  const [isBusy, error, run] = useAction();
  const stopped = useRef(false);
  const cancel = () => {
    stopped.current = true;
    close();
  };
  return { done, isBusy, error, run, cancel, hooks: { isStopped: () => stopped.current, progress: setDone } };
}

const Buttons = ({ isBusy, canGo, words, tone, cancel }) => html`<div class="buttons">
  <button type="button" onClick=${cancel}>${isBusy ? "Stop" : "Cancel"}</button>
  <button class=${tone} disabled=${isBusy || !canGo}>${words}</button>
</div>`;

export function PurgeDialog({ queue, refresh, say, close }) {
  const name = queue.queue;
  const [typed, setTyped] = useState("");
  const { done, isBusy, error, run, cancel, hooks } = useRepeated(close);
  const isNamed = typed.trim() === name;
  const purge = (event) => {
    event.preventDefault();
    if (!isNamed || isBusy) return;
    run(async () => {
      const result = await repeat("purge_queue", { queue: name }, "purged", hooks);
      say(result.isComplete ? `${name} was purged: ${number(result.done)} messages were deleted.` : `Purging ${name} was stopped: ${number(result.done)} messages were deleted.`);
      refresh();
      close();
    });
  };
  return html`<${Dialog} title=${`Purge ${name}?`} close=${cancel}>
    <form onSubmit=${purge}>
      <p>
        All messages of <strong>${name}</strong> will be deleted, <b>${count(queue.counts.total, queue.counts.exact)}</b> at the moment, also those that are leased or
        delayed. They cannot be brought back.
      </p>
      <label for="purge-name">Type the name of the queue to confirm</label>
      <input id="purge-name" value=${typed} onInput=${(event) => setTyped(event.target.value)} autocomplete="off" autocapitalize="off" spellcheck="false" placeholder=${name} />
      <p class="progress" role="status">${done !== null && `${number(done)} deleted …`}</p>
      <${Failure} error=${error} />
      <${Buttons} isBusy=${isBusy} canGo=${isNamed} words=${`Purge ${name}`} tone="danger" cancel=${cancel} />
    </form>
  <//>`;
}

export function RedriveDialog({ queue, refresh, say, close }) {
  const name = queue.queue;
  const [to, setTo] = useState("");
  const { done, isBusy, error, run, cancel, hooks } = useRepeated(close);
  const redrive = (event) => {
    event.preventDefault();
    if (isBusy) return;
    run(async () => {
      const result = await repeat("redrive", { queue: name, to: to.trim() || null }, "moved", hooks);
      say(`${number(result.done)} dead letters of ${name} were moved${to.trim() ? ` to ${to.trim()}` : " back to where they came from"}.`);
      refresh();
      close();
    });
  };
  return html`<${Dialog} title=${`Redrive ${name}?`} close=${cancel}>
    <form onSubmit=${redrive}>
      <p>
        The dead letters of <strong>${name}</strong> go back to the queues that they came from, to be handed out anew. What a consumer holds stays, and what came from a queue that is
        no more.
      </p>
      <label for="redrive-to">To another queue instead (may stay empty)</label>
      <input id="redrive-to" value=${to} onInput=${(event) => setTo(event.target.value)} autocomplete="off" autocapitalize="off" spellcheck="false" />
      <p class="progress" role="status">${done !== null && `${number(done)} moved …`}</p>
      <${Failure} error=${error} />
      <${Buttons} isBusy=${isBusy} canGo=${true} words=${`Redrive ${name}`} tone="primary" cancel=${cancel} />
    </form>
  <//>`;
}

export function DeleteDialog({ message, refresh, say, close }) {
  const [isBusy, error, run] = useAction();
  const remove = (event) => {
    event.preventDefault();
    run(async () => {
      const { deleted } = await call("delete_message", { queue: message.queue, message_id: message.message_id });
      say(deleted ? `Message ${message.message_id} was deleted.` : `Message ${message.message_id} was gone already.`);
      refresh();
      close();
    });
  };
  return html`<${Dialog} title="Delete this message?" close=${close}>
    <form onSubmit=${remove}>
      <p>Message <code>${message.message_id}</code> of <strong>${message.queue}</strong>, ${bytes(message.body.length)} of body. It cannot be brought back.</p>
      <${Failure} error=${error} />
      <${Buttons} isBusy=${false} canGo=${!isBusy} words="Delete" tone="danger" cancel=${close} />
    </form>
  <//>`;
}

export function SendDialog({ queue, refresh, say, close }) {
  const name = queue.queue;
  const [text, setText] = useState('{"hello": "world"}');
  const [isBusy, error, run] = useAction();
  const send = (event) => {
    event.preventDefault();
    run(async () => {
      try {
        JSON.parse(text);
      } catch (problem) {
        throw new Error(`This is not JSON: ${problem.message}.`);
      }
      const { message_id: id } = await call("enqueue", { queue: name, body: new Verbatim(text) });
      say(`Message ${id} was sent to ${name}.`);
      refresh();
      close();
    });
  };
  return html`<${Dialog} title=${`Send a message to ${name}`} close=${close}>
    <form onSubmit=${send}>
      <label for="send-body">Body, as JSON</label>
      <textarea id="send-body" rows="6" value=${text} onInput=${(event) => setText(event.target.value)} spellcheck="false"></textarea>
      <${Failure} error=${error} />
      <${Buttons} isBusy=${false} canGo=${!isBusy} words="Send" tone="primary" cancel=${close} />
    </form>
  <//>`;
}
