// Asks again every five seconds, in one request for all that is shown, and only while somebody can see it.

import { Away, CallError, Throttled, TokenNeeded, batch } from "./rpc.js";

const EVERY_MS = 5_000;
const LONGEST_PAUSE_MS = 15_000;
// A list of messages with more characters of bodies is asked for when somebody wants it, not every five seconds.
const LARGE = 200_000;

/** Whether a list of messages is too large to be asked for again and again. */
export const isLarge = (answer) => (answer?.messages ?? []).reduce((sum, message) => sum + message.body.length, 0) > LARGE;

const written = ([method, params]) => JSON.stringify([method, params]);

export class Poll {
  /** `changed` is called when something new is known. */
  constructor(changed) {
    this.changed = changed;
    this.calls = {};
    this.key = null;
    // What was answered last, by the names of the calls: results, or CallErrors.
    this.answers = {};
    // What each of them was asked with, and when the last ones came.
    this.askedWith = {};
    this.at = null;
    // Why there is nothing newer, and when it is tried again: {reason, until}.
    this.away = null;
    this.needsToken = null;
    this.failures = 0;
    this.polls = 0;
    this.timer = null;
    this.underWay = null;
    document.addEventListener("visibilitychange", () => this.now());
    addEventListener("online", () => this.now());
  }

  /**
   * Ask for these, `{name: [method, params, every]}`, from now on; by itself a call is made at one poll out of `every`.
   * `key` says what they are about: answers about something else are forgotten.
   */
  watch(key, calls) {
    this.calls = calls;
    const text = Object.values(calls).map(written).join();
    if (this.key === key && text === this.text) return;
    const isNewSubject = this.key !== key;
    Object.assign(this, { key, text });
    if (isNewSubject) this.answers = { caller: this.answers.caller };
    this.now();
  }

  /** Ask now; by itself, not for what is large. */
  now(isByItself = false) {
    clearTimeout(this.timer);
    if (document.hidden || this.key === null) return;
    this.underWay?.abort();
    const mine = new AbortController();
    this.underWay = mine;
    this.ask(mine.signal, isByItself).then((pause) => {
      if (mine.signal.aborted) return;
      this.underWay = null;
      this.changed();
      clearTimeout(this.timer);
      if (pause !== null && !document.hidden) this.timer = setTimeout(() => this.now(true), pause);
    });
  }

  /** Ask; return after how many milliseconds to ask again, null where something has to happen before. */
  async ask(signal, isByItself) {
    this.polls += 1;
    const isDue = (name) => this.polls % (this.calls[name][2] ?? 1) === 0 && !isLarge(this.answers[name]);
    const names = Object.keys(this.calls).filter((name) => !isByItself || this.failures > 0 || isDue(name));
    const calls = names.map((name) => this.calls[name]);
    const asked = calls.map(written);
    try {
      const answers = await batch(calls, signal);
      if (signal.aborted) return null;
      const passing = answers.find((answer) => answer instanceof CallError && answer.isPassing);
      names.forEach((name, n) => {
        // What was known before stays, marked as old, where it cannot be had now.
        const isPassing = answers[n] instanceof CallError && answers[n].isPassing;
        if (isPassing) return;
        this.answers[name] = answers[n];
        this.askedWith[name] = asked[n];
      });
      this.needsToken = null;
      if (passing) return this.pauseFor(passing.message, passing.retryAfter);
      this.answers = { ...this.answers };
      this.at = new Date();
      this.away = null;
      this.failures = 0;
      return EVERY_MS;
    } catch (error) {
      if (signal.aborted) return null;
      if (error instanceof TokenNeeded || error instanceof Throttled) {
        this.needsToken = error;
        this.answers = {};
        this.at = null;
        this.away = null;
        return null;
      }
      if (!(error instanceof Away)) console.error(error);
      return this.pauseFor(error.message, error.retryAfter ?? 0);
    }
  }

  pauseFor(reason, retryAfter) {
    // Old answers stay, but not those to another question than the one that is asked now: another search, another status.
    this.answers = Object.fromEntries(Object.entries(this.answers).filter(([name]) => !(name in this.calls) || this.askedWith[name] === written(this.calls[name])));
    const doubled = Math.min(LONGEST_PAUSE_MS, 1_000 * 2 ** this.failures);
    this.failures += 1;
    const pause = Math.max(retryAfter * 1_000, doubled) * (0.8 + 0.4 * Math.random());
    this.away = { reason, until: Date.now() + pause };
    return pause;
  }
}
