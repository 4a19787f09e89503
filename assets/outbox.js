// @ts-check
/* The messages on their way. One POST at a time, so that their order holds, and the same key again
   until the server has said yes or no: nothing is lost, and nothing is in the room twice. A letter
   leaves the outbox when its message comes back on the stream.

     waiting   goes when it is its turn
     sent      the server has it; its message has not come back yet
     failed    goes only by Retry; later ones may pass it
     deleted   goes away in a moment, if nobody wants it back */
import { keep, newKey } from './keys.js';

/** A message on its way, perhaps written as somebody else.
 *  @typedef {{key: string, text: string, at: number, state: string, tried?: number, as?: string,
 *            node?: any, timer?: number}} Letter */
/** What the outbox tells the page: a letter is new or has changed (and how long a server that finds
 *  us too fast wants us to wait), is gone, was refused for good, is in the room though its message
 *  was lost on the way here; and there is no session.
 *  @typedef {{draw: (letter: Letter, seconds?: number) => void, erase: (letter: Letter) => void,
 *             refuse: (letter: Letter) => void, miss: (letter: Letter) => void, login: () => void}} Page */

const ANSWER = 10_000;              // ms a POST may take
const TRY_FOR = 60_000;             // ms of a live connection before a letter counts as not sent
const TOO_OLD = 600_000;            // ms after which a letter no longer goes by itself
const UNDO = 5_000;                 // ms in which a letter that was deleted can be had back

export class Outbox {
  /** In the order in which they were written. @type {Letter[]} */
  letters = [];
  posting = false;
  tries = 0;                        // since the last answer that was one
  pauseTimer = 0;
  liveSince = 0;                    // 0 while there is no connection
  gapAt = 0;                        // when a gap was told …
  missedAt = 0;                     // … the same, once all that follows it is here

  /** @param {Page} page */
  constructor(page) {
    this.page = page;
  }

  // ---- the page: what somebody does ----

  /** @param {string} text */
  write(text) {
    const key = newKey();
    keep(key);
    this.take({ key, text, at: Date.now(), state: 'waiting' });
    this.pump();
  }

  /** Takes a letter in, a new one or one from before a reload. @param {Letter} letter */
  take(letter) {
    this.letters.push(letter);
    this.page.draw(letter);
  }

  /** @param {Letter} letter */
  retry(letter) {
    Object.assign(letter, { at: Date.now(), tried: undefined, as: undefined });
    this.mark(letter, 'waiting');
    this.pump();
  }

  /** @param {Letter} letter */
  delete(letter) {
    this.mark(letter, 'deleted');
    letter.timer = setTimeout(() => {
      this.remove(letter);
      this.page.erase(letter);
    }, UNDO);
  }

  /** @param {Letter} letter */
  undelete(letter) {
    clearTimeout(letter.timer);
    this.mark(letter, 'failed');
  }

  /** @param {Letter} letter */
  remove(letter) {
    this.letters.splice(this.letters.indexOf(letter), 1);
  }

  /** What a reload must not lose. */
  unsent() {
    return this.letters.filter((m) => m.state === 'waiting' || m.state === 'failed')
      .map(({ key, text, at, state, as }) => ({ key, text, at, state, as }));
  }

  // ---- the stream: what is heard ----

  /** @param {boolean} isLive */
  connected(isLive) {
    this.liveSince = isLive ? Date.now() : 0;
    if (isLive) this.unpause();     // what waits for a connection goes now
  }

  /** The message with this key is here: its letter, if it has one, has arrived. @param {string} key */
  arrived(key) {
    const letter = this.letters.find((m) => m.key === key);
    if (letter) this.remove(letter);
    return letter;
  }

  /** Messages were lost on the way here, perhaps those of letters. The history comes again. */
  gap() {
    this.gapAt = Date.now();
  }

  /** And now it has come. */
  caughtUp() {
    this.missedAt = this.gapAt;
    this.showMissed();
  }

  /** Letters that are in the room and were tried before the gap: their messages will not come. */
  showMissed() {
    for (const letter of this.letters.filter((m) => m.state === 'sent')) {
      if ((letter.tried || Infinity) <= this.missedAt) this.page.miss(letter);
    }
  }

  // ---- the server: posting ----

  /** Posts what waits, one at a time and in order. */
  async pump() {
    const letter = this.letters.find((m) => m.state === 'waiting');
    if (this.posting || this.pauseTimer || !letter) return;
    letter.tried = letter.tried || Date.now();
    this.posting = true;
    const tooOld = Date.now() - letter.at > TOO_OLD;
    const pause = tooOld ? this.fail(letter) : this.judge(letter, ...await this.post(letter));
    this.posting = false;
    this.pauseTimer = setTimeout(() => this.unpause(), pause);
  }

  unpause() {
    clearTimeout(this.pauseTimer);
    this.pauseTimer = 0;
    this.pump();
  }

  /** The status, 0 without an answer, and the seconds of Retry-After.
   *  @param {Letter} letter @returns {Promise<[number, number]>} */
  async post(letter) {
    const stop = new AbortController();
    const timer = setTimeout(() => stop.abort(), ANSWER);
    try {
      const res = await fetch('post', { method: 'POST', keepalive: true, redirect: 'manual',
        headers: { 'Idempotency-Key': letter.key }, signal: stop.signal,
        body: new URLSearchParams({ message: letter.text }) });
      return [res.status, Number(res.headers.get('Retry-After')) || 0];
    } catch {
      return [0, 0];
    } finally {
      clearTimeout(timer);
    }
  }

  /** What an answer means for a letter; returns the ms to wait before the next POST.
   *  @param {Letter} letter @param {number} code @param {number} seconds */
  judge(letter, code, seconds) {
    if (code === 204 || !this.letters.includes(letter)) return this.accept(letter);
    if (code === 401) return this.logIn();
    if (code === 413 || code === 422) return this.giveBack(letter);
    if (code >= 400 && code < 500 && code !== 429) return this.fail(letter);
    const live = this.liveSince && Date.now() - Math.max(this.liveSince, letter.tried || 0);
    if (live > TRY_FOR) return this.fail(letter);
    const pause = Math.max(seconds, 2 ** Math.min(this.tries++, 3)) * (1 + Math.random() / 4);
    if (code === 429) this.page.draw(letter, Math.ceil(pause));
    return pause * 1000;
  }

  /** It is in the room; its row stays until its message is here too. @param {Letter} letter */
  accept(letter) {
    this.tries = 0;
    if (this.letters.includes(letter)) this.mark(letter, 'sent');
    this.showMissed();
    return 0;
  }

  /** @param {Letter} letter */
  fail(letter) {
    this.tries = 0;
    this.mark(letter, 'failed');
    return 0;
  }

  /** The page goes away, the letter stays. */
  logIn() {
    this.page.login();
    return TRY_FOR;
  }

  /** The server will never take it. @param {Letter} letter */
  giveBack(letter) {
    this.remove(letter);
    this.page.erase(letter);
    this.page.refuse(letter);
    return 0;
  }

  /** @param {Letter} letter @param {string} state */
  mark(letter, state) {
    letter.state = state;
    this.page.draw(letter);
  }
}
