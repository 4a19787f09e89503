// @ts-check
/* The chat page. How to read it:

     The page itself is chat.html: every node has its place there, and the pieces that are copied
     are in <template>s. Its looks are chat.css. The script moves text between nodes and sets
     data-state and the like; it never makes markup out of text, so nothing that anybody writes
     can be more than text.

     receiving    arrive → queue → flush: events come from stream.js, wait in a queue, and are
                  put into the page at most ten times a second
     rows         a message becomes a row; rows lie in sections of 50, so that the browser lays
                  out the last 50 and not the last 1000
     text         line breaks, ``` code ```, `code`, links
     scrolling    stays at the end, unless the reader has scrolled up
     connection   connecting → live → reconnecting or offline
     sending      submit → outbox → pump: one POST at a time, with an id drawn here; the same id
                  again until it is in, so that nothing is lost and nothing is there twice. The
                  message stands in the outbox until the event with its id comes back.
     composing    the field: keys, counter, draft
*/
import { connect } from './stream.js';

/** @typedef {import('./stream.js').Told} Told */
/** A message on its way: waiting, sent (the server has it), or failed (goes only by Retry).
 *  @typedef {{id: string, text: string, at: number, state: string, tried?: number, node?: any}} Letter */

const FLUSH = 100;                  // ms between two changes of the page
const SECTION = 50;                 // rows a section
const KEEP = 1000, KEEP_READING = 5000; // rows kept; while the reader is further up
const REMEMBER = 8192;              // ids known, so that a message is shown once
const NEAR = 48;                    // px from the end that count as the end
const GROUP = 300;                  // s in which messages of one author stand together
const LINES = 12;                   // lines shown of a long text
const MAX = 4000, COUNT_FROM = 3200; // characters of a message
const ANSWER = 10_000;              // ms a POST may take
const TRY_FOR = 60_000;             // ms of a live connection before a message counts as not sent
const TOO_OLD = 600_000;            // ms after which a message no longer goes by itself
const GRACE = 2_000;                // ms a connection may be lost unnoticed

/** @param {string} id @returns {any} */
const $ = (id) => document.getElementById(id);
const body = document.body;
const log = $('log'), empty = $('empty'), unsent = $('unsent'), pill = $('pill');
const status = $('status'), icon = $('icon');
const form = $('form'), box = $('text'), send = $('send'), notice = $('notice'); // none on a projector
const me = body.dataset.name ?? '';
const projector = body.dataset.view === 'projector';
const room = document.title;

/** The texts of the page's language. @type {Record<string, string>} */
const T = {};
for (const p of $('strings').content.children) T[p.dataset.key] = p.textContent;

/** A text with its number filled in. @param {string} key @param {number} n */
const say = (key, n) => T[key].replace(/{[ns]}/, String(n));

/** @param {string} tag @param {string} text */
function element(tag, text) {
  const node = document.createElement(tag);
  node.append(text);
  return node;
}

/** A copy of a template's node. @param {string} id @returns {any} */
const copy = (id) => $(id).content.firstElementChild.cloneNode(true);

// ---- receiving ----

/** Ids of the messages that have come, oldest first. */
const seen = new Set();
/** What has come and is not in the page yet. @type {Told[]} */
let queue = [];
let flushTimer = 0, flushedAt = 0;
let backlog = true;                 // until the backlog is complete
let unread = 0;                     // messages that came while the tab was hidden

/** @param {Told} e */
function arrive(e) {
  if (e.type === 'login') return toLogin();
  if (e.type === 'down') return setDown();
  if (e.type !== 'wait') setLive();
  if (e.type === 'ping') backlog = false;
  if (e.type === 'message' && !remember(e.id)) return;
  if (e.type === 'gap') lose();
  if (e.type === 'message') deliver(e);
  if (e.type === 'message' && document.hidden) countUnread(e);
  if (e.type === 'message' || e.type === 'gap') queue.push(e);
  flushTimer ||= setTimeout(flush, Math.max(0, flushedAt + FLUSH - performance.now()));
}

/** False if the message is known already. @param {string | undefined} id */
function remember(id) {
  if (seen.has(id)) return false;
  seen.add(id);
  if (seen.size > REMEMBER) seen.delete(seen.values().next().value);
  return true;
}

/** Puts the queue into the page. A hidden tab does nothing, it catches up when it is shown. */
function flush() {
  flushTimer = 0;
  const keep = stuck ? KEEP : KEEP_READING;
  if (queue.length > 2 * keep) queue = queue.slice(-keep);
  if (document.hidden) return;
  flushedAt = performance.now();
  const batch = queue;
  queue = [];
  if (batch.length >= keep) clear(); // more than fits: nothing older can stay
  announce(batch.length);
  for (const e of batch) place(e.type === 'gap' ? gapLine() : row(e));
  for (const node of delivered.splice(0)) node.remove();
  trim(keep);
  settle(batch);
}

/** After the rows are in. @param {Told[]} batch */
function settle(batch) {
  if (!backlog) {
    empty.hidden = rows > 0;
    setTimeout(() => log.setAttribute('aria-busy', 'false'));
  }
  if (stuck) return toEnd();
  below += batch.filter((e) => e.type === 'message' && !isMine(e)).length;
  showPill();
}

let windowStart = 0, inWindow = 0, inLast = 0;

/** A screen reader does not read out more than ten messages a second. @param {number} n */
function announce(n) {
  const now = performance.now();
  if (now - windowStart > 1000) {
    inLast = now - windowStart > 2000 ? 0 : inWindow;
    [windowStart, inWindow] = [now, 0];
  }
  inWindow += n;
  log.setAttribute('aria-live', inWindow > 10 || inLast > 10 ? 'off' : 'polite');
}

/** @param {Told} e */
function countUnread(e) {
  if (backlog || isMine(e)) return;
  unread++;
  badge();
}

/** The count in the title, and an icon that can be told from the usual one. */
function badge() {
  document.title = unread ? `(${unread}) ${room}` : room;
  icon.href = unread ? '/assets/unread.svg' : '/assets/favicon.svg';
}

document.addEventListener('visibilitychange', () => {
  if (document.hidden) return;
  unread = 0;
  badge();
  flush();
});

// ---- rows ----

/** [12:34:56] name: text. A line of another program need not look like this. */
const LINE = /^\[((\d\d):(\d\d)):(\d\d)\] ([^:\n]{1,64}): ([^]*)$/;

let rows = 0;
/** The author of the last row, and when it was, in seconds of the day. */
let lastWho = '', lastAt = 0;

/** @param {Told} e @returns {HTMLElement} */
function row(e) {
  const node = copy('row');
  const [, time, h, m, s, who, text] = LINE.exec(e.text ?? '') ?? [];
  if (who === undefined) node.querySelector('.who').remove();
  else sign(node, who, time, Number(h) * 3600 + Number(m) * 60 + Number(s));
  lastWho = who ?? '';
  fill(node.lastElementChild, text ?? e.text ?? '');
  return node;
}

/** Name, colour, time; the name is seen once for messages that follow each other.
 *  @param {any} node @param {string} who @param {string} time @param {number} at */
function sign(node, who, time, at) {
  node.querySelector('bdi').textContent = who;
  node.querySelector('time').textContent = time;
  node.dataset.colour = colour(who);
  node.classList.toggle('own', who === me);
  node.classList.toggle('follows', who === lastWho && (at - lastAt + 86400) % 86400 <= GROUP);
  lastAt = at;
}

/** One of twelve. @param {string} name */
const colour = (name) => [...name].reduce((sum, c) => sum + (c.codePointAt(0) ?? 0), 0) % 12;

function gapLine() {
  lastWho = '';
  return copy('gap');
}

/** @param {Told} e */
const isMine = (e) => LINE.exec(e.text ?? '')?.[5] === me;

/** Adds a row at the end. @param {HTMLElement} node */
function place(node) {
  if (!log.lastElementChild || log.lastElementChild.childElementCount >= SECTION) {
    log.append(document.createElement('section'));
  }
  log.lastElementChild.append(node);
  rows++;
}

/** Drops sections that are too old. @param {number} keep */
function trim(keep) {
  const before = rows;
  while (rows - (log.firstElementChild?.childElementCount ?? rows) >= keep) {
    const section = log.firstElementChild;
    const higher = stuck || CSS.supports('overflow-anchor', 'auto') ? 0 : section.offsetHeight;
    rows -= section.childElementCount;
    section.remove();
    if (higher) log.scrollTop -= higher; // in Safari, which does not keep the reader's place
  }
  if (rows < before) log.querySelector('.row')?.classList.remove('follows');
}

function clear() {
  log.replaceChildren();
  rows = 0;
  lastWho = '';
}

// ---- text ----

/** Puts a message's text into its node, a long one folded. @param {HTMLElement} node
 *  @param {string} text */
function fill(node, text) {
  const lines = text.split('\n');
  if (lines.length <= LINES) return node.append(pretty(text));
  const more = copy('more');
  more.textContent = say('show_all', lines.length);
  more.onclick = () => {
    node.replaceChildren(pretty(text));
    stuck = projector || atEnd();   // who unfolds a text wants to read it
  };
  node.append(pretty(lines.slice(0, LINES).join('\n')), more);
}

/** A fence, alone on its line: ```python */
const FENCE = /^```([\w+#.-]*) *$\n?/m;

/** @param {string} text with ``` fences */
function pretty(text) {
  const out = document.createDocumentFragment();
  const parts = text.split(FENCE);  // text, language, code, (nothing), text, language…
  for (let i = 0; i < parts.length; i += 2) {
    const isCode = i % 4 === 2;
    const last = i + 1 === parts.length && !isCode;
    const part = last ? parts[i] : parts[i].replace(/\n$/, '');
    if (!part) continue;
    out.append(isCode ? code(part, parts[i - 1]) : inline(part));
  }
  if (!out.textContent) out.append(text);
  return out;
}

/** @param {string} text @param {string} language */
function code(text, language = '') {
  const node = element('pre', text);
  if (language) node.dataset.language = language;
  return node;
}

const TOKEN = /`([^`\n]+)`|https?:\/\/[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+/g;

/** Text with `code` and links. @param {string} text */
function inline(text) {
  const out = document.createDocumentFragment();
  let at = 0;
  for (const m of text.matchAll(TOKEN)) {
    const node = m[1] ? element('code', m[1]) : link(m[0]);
    out.append(text.slice(at, m.index), node);
    at = m.index + (m[1] ? m[0].length : (node.textContent ?? '').length);
  }
  out.append(text.slice(at));
  return out;
}

/** A link, without what only ends the sentence. @param {string} url @returns {Node} */
function link(url) {
  let extra = url.split(')').length - url.split('(').length;
  let end = url.length;
  while (/[.,;:!?'*]/.test(url[end - 1]) || url[end - 1] === ')' && extra-- > 0) end--;
  url = url.slice(0, end);
  try {
    new URL(url);
  } catch {
    return document.createTextNode(url);
  }
  const rel = 'noopener noreferrer nofollow';
  return Object.assign(element('a', url), { href: url, target: '_blank', rel });
}

// ---- scrolling ----

let stuck = true;                   // the end stays in sight
let below = 0;                      // messages the reader has not scrolled down to

const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight <= NEAR;
const toEnd = () => { log.scrollTop = log.scrollHeight; };

/** Follows the end again. */
function follow() {
  stuck = true;
  below = 0;
  showPill();
  toEnd();
}

/** "3 new messages", or that a projector is paused. */
function showPill() {
  const count = below === 1 ? T.new_message : say('new_messages', below);
  pill.hidden = stuck || !(below || projector);
  pill.textContent = !projector ? count : below ? `${T.paused} ${count}` : T.paused;
}

/** Its size when we last looked. In the moment of a change (keyboard, rotation, a growing field) a
 *  scroll event can come first; that is not the reader who scrolls. */
let size = '';
const sizeNow = () => `${log.clientWidth} ${log.clientHeight}`;
new ResizeObserver(() => {
  size = sizeNow();
  if (stuck) toEnd();
}).observe(log);

log.addEventListener('scroll', () => {
  if (projector || size !== sizeNow() || stuck === atEnd()) return;
  stuck = !stuck;
  if (stuck) below = 0;
  showPill();
}, { passive: true });
pill.addEventListener('click', follow);
document.addEventListener('keydown', (e) => {
  if (e.key === 'End' && e.target !== box) follow();
  if (e.key !== ' ' || !projector) return;
  e.preventDefault();
  stuck = !stuck;
  stuck ? follow() : showPill();
});

// ---- connection ----

let liveSince = 0;                  // 0 while there is no connection
let graceTimer = 0;

function setLive() {
  if (liveSince) return;
  liveSince = Date.now();
  clearTimeout(graceTimer);
  graceTimer = 0;
  showState('live');
  unpause();                        // what waits for a connection goes now
}

function setDown() {
  liveSince = 0;
  graceTimer ||= setTimeout(showLoss, GRACE);
}

const showLoss = () => showState(navigator.onLine ? 'reconnecting' : 'offline');

/** Nobody writes at a projector, it only waits. @param {string} state */
function showState(state) {
  body.dataset.state = state;
  status.textContent = T[projector && state !== 'live' ? 'connecting' : state];
}

for (const event of ['online', 'offline']) {
  addEventListener(event, () => /reconnecting|offline/.test(body.dataset.state ?? '') && showLoss());
}

// ---- sending ----

/** Messages on their way, in the order in which they were written. @type {Letter[]} */
const outbox = [];
/** Rows of those that have come back, to go when the message itself is put in. @type {any[]} */
const delivered = [];
let posting = false;
let pauseTimer = 0, tries = 0;      // after an answer that was none
let lostAt = 0;                     // when a gap came: the events of letters tried before it may be lost

/** Draft and outbox live in this tab's storage, under the name they were written with. */
function save() {
  const letters = outbox.filter((m) => m.state !== 'sent')
    .map(({ id, text, at, state }) => ({ id, text, at, state }));
  try {
    sessionStorage.setItem('chat', JSON.stringify({ name: me, draft: box.value, letters }));
  } catch { /* full or forbidden: the page works without */ }
}

function restore() {
  let kept = { name: '', draft: '', letters: [] };
  try {
    kept = JSON.parse(sessionStorage.getItem('chat') ?? '') ?? kept;
  } catch { /* nothing there */ }
  if (kept.name !== me) kept = { name: me, draft: '', letters: [] };
  const early = box.value;          // typed before this script was here
  write(early === kept.draft ? early : kept.draft + early); // before the letters: it saves
  for (const letter of kept.letters) queueLetter(letter);
}

/** 128 bits, as text. (crypto.randomUUID does not exist on plain http.) */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, '0')).join('');
}

function submit() {
  const text = box.value;
  if (!text.trim() || length(text) > MAX) return;
  queueLetter({ id: newId(), text, at: Date.now(), state: 'waiting' });
  lastText = text;
  write('');
  follow();
  pump();
}

/** @param {Letter} letter */
function queueLetter(letter) {
  outbox.push(letter);
  letter.node = copy('unsent-row');
  fill(letter.node.querySelector('.text'), letter.text);
  letter.node.dataset.colour = colour(me);
  letter.node.classList.toggle('follows', lastWho === me || outbox.length > 1);
  unsent.append(letter.node);
  mark(letter, letter.state);
}

/** Sets a letter's state and says it. @param {Letter} letter @param {string} state */
function mark(letter, state, fate = state === 'failed' ? T.not_sent : T.sending) {
  letter.state = state;
  letter.node.dataset.state = state;
  letter.node.querySelector('.fate span').textContent = fate;
  save();
}

/** Posts what waits, one at a time and in order. */
async function pump() {
  const letter = outbox.find((m) => m.state === 'waiting');
  if (posting || pauseTimer || !letter) return;
  letter.tried ??= Date.now();
  posting = true;
  const tooOld = Date.now() - letter.at > TOO_OLD;
  const pause = tooOld ? fail(letter) : judge(letter, ...await post(letter));
  posting = false;
  pauseTimer = setTimeout(unpause, pause);
}

function unpause() {
  clearTimeout(pauseTimer);
  pauseTimer = 0;
  pump();
}

/** The status, 0 without an answer, and the seconds of Retry-After.
 *  @param {Letter} letter @returns {Promise<[number, number]>} */
async function post(letter) {
  const stop = new AbortController();
  const timer = setTimeout(() => stop.abort(), ANSWER);
  try {
    const res = await fetch('/post', { method: 'POST', keepalive: true, redirect: 'manual',
      headers: { 'Idempotency-Key': letter.id }, signal: stop.signal,
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
function judge(letter, code, seconds) {
  if (code === 204 || !outbox.includes(letter)) return sent(letter);
  if (code === 401) return toLogin();
  if (code === 413 || code === 422) return giveBack(letter);
  if (code >= 400 && code < 500 && code !== 429) return fail(letter);
  const live = liveSince && Date.now() - Math.max(liveSince, letter.tried ?? 0);
  if (live > TRY_FOR) return fail(letter);
  const pause = Math.max(seconds, 2 ** Math.min(tries++, 3)) * (1 + Math.random() / 4);
  if (code === 429) mark(letter, 'waiting', say('too_fast', Math.ceil(pause)));
  return pause * 1000;
}

/** It is in the room; its row stays until the event is here too. @param {Letter} letter */
function sent(letter) {
  tries = 0;
  if (outbox.includes(letter)) mark(letter, 'sent');
  deliverSent();
  return 0;
}

/** Later ones may pass it now. @param {Letter} letter */
function fail(letter) {
  tries = 0;
  mark(letter, 'failed');
  return 0;
}

/** The server will never take it: back to the field with it. @param {Letter} letter */
function giveBack(letter) {
  remove(letter);
  letter.node.remove();
  const end = box.value.length;     // the cursor stays with who is writing
  box.setRangeText((end ? '\n' : '') + letter.text, end, end, end ? 'preserve' : 'end');
  typed();
  if (!send.disabled) notice.textContent = T.refused;
  return 0;
}

/** @param {Letter} letter */
function remove(letter) {
  outbox.splice(outbox.indexOf(letter), 1);
  save();
}

/** The event with a letter's id is here. @param {Told} e */
function deliver(e) {
  const letter = outbox.find((m) => m.id === e.id);
  if (!letter) return;
  remove(letter);
  delivered.push(letter.node);
  if (!isMine(e)) location.reload(); // the session has another name than this page
}

/** Events were lost, perhaps those of letters. */
function lose() {
  lostAt = Date.now();
  deliverSent();
}

/** Shows the letters that are in the room and were tried before the gap, as if their events had come. */
function deliverSent() {
  const time = new Date().toTimeString().slice(0, 8);
  for (const { id, text } of outbox.filter((m) => m.state === 'sent' && (m.tried ?? Infinity) <= lostAt)) {
    arrive({ type: 'message', id, text: `[${time}] ${me}: ${text}` });
  }
}

/** The session has ended. Draft and outbox stay, for the same name. */
function toLogin() {
  location.assign('/login');
  return TRY_FOR;
}

unsent.addEventListener('click', (/** @type {any} */ { target }) => {
  const letter = outbox.find((m) => m.state === 'failed' && m.node.contains(target));
  if (!letter || !target.value) return;
  if (target.value === 'retry') {
    Object.assign(letter, { at: Date.now(), tried: undefined });
    mark(letter, 'waiting');
    pump();
  } else {
    remove(letter);
    letter.node.remove();
  }
  box.focus();
});

// ---- composing ----

let lastText = '';

/** Characters as the server counts them. @param {string} text */
const length = (text) => [...text].length;

/** @param {string} text */
function write(text) {
  box.value = text;
  typed();
}

/** After every change of the field. */
function typed() {
  const left = MAX - length(box.value);
  send.disabled = left < 0;
  notice.textContent = left < 0 ? say('too_long', -left)
    : left <= MAX - COUNT_FROM ? say('chars_left', left) : '';
  notice.dataset.state = left < 0 ? 'error' : '';
  if (!CSS.supports('field-sizing', 'content')) grow();
  save();
}

/** As high as its text; CSS knows the limit. */
function grow() {
  const top = log.scrollTop;
  box.style.height = 'auto';
  box.style.height = `${box.scrollHeight + 2}px`;
  log.scrollTop = top;        // the log was higher for a moment, which may have moved it
}

/** @param {KeyboardEvent} e */
function key(e) {
  if (e.isComposing || e.keyCode === 229) return; // this Enter only confirms a word
  if (e.key === 'Enter' && (e.ctrlKey || e.metaKey || !(e.shiftKey || e.altKey))) {
    e.preventDefault();
    submit();
  } else if (e.key === 'ArrowUp' && !box.value && lastText) {
    e.preventDefault();
    write(lastText);
  }
}

function startComposing() {
  restore();
  box.addEventListener('keydown', key);
  box.addEventListener('input', typed);
  send.addEventListener('mousedown', (/** @type {Event} */ e) => e.preventDefault()); // keyboard stays
  form.addEventListener('submit', (/** @type {Event} */ e) => { e.preventDefault(); submit(); });
  $('logout').addEventListener('submit', logout);
  if (matchMedia('(pointer: fine)').matches) box.focus();
}

/** @param {Event} e */
async function logout(e) {
  e.preventDefault();
  await fetch('/logout', { method: 'POST', redirect: 'manual' }); // fails: nobody is logged out
  sessionStorage.removeItem('chat');
  tabs?.postMessage('');
  location.assign('/login');
}

// ---- start ----

/** Another tab has logged out, or in with another name: this one follows. */
const tabs = typeof BroadcastChannel === 'undefined' ? null : new BroadcastChannel('chat-name');
if (tabs) tabs.onmessage = ({ data }) => {
  if (data === '') sessionStorage.removeItem('chat');
  if (data !== me) location.reload();
};
tabs?.postMessage(me);

if (form) startComposing();
connect(arrive);
