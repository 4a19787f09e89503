// @ts-check
/* The lesson: four ways to receive the same room, side by side. How to read it:

     a WebSocket      what a browser does by itself for an EventSource, written out
     the four ways    a Way is an EventSource, or that, and counts. What came is told by its events; what
                      it cost is told by the browser: each ended request leaves a performance
                      entry with its times and its exact bytes. The open one has no entry yet, so
                      its bytes are counted from the events
     drawing          ten times a second what was counted goes into the page
     sending          a POST, or a frame, with a key drawn here: the delay is the time until that
                      key arrives
     the wire         the newest message once more with fetch, whose answer is seen as it is
     the frames       the newest message as the bytes of a WebSocket, down and up
     who looks        while nobody looks, or after Break, there is no connection

   Nothing is estimated. What was not measured is an empty cell. What a browser shows to no page,
   its key and its mask of a WebSocket, is an example, and the page says so. */
import { home, keep, keyOf, logIn, newKey } from './keys.js';

const WINDOW = 40;            // s on the time line, as its axis in lesson.html says
const PLOT = 50;              // delays in the plot
const PLOT_TOP = 2500;        // ms at its upper edge
const NEWEST = 3;             // messages shown in a column
const SILENCE = 40_000;       // ms without an event: dead (a stream is pinged every 15 s)
const WIRE_PAUSE = 1_000;     // ms between two looks at the wire
const WIRE_CALM = 100;        // ms for messages that come together
const WIRE_LINES = 24;        // lines shown of an answer
const WIRE_CHARS = 300;       // characters shown of a line
const FRAME_BYTES = 48;       // bytes shown of a frame's text

/** The key of RFC 6455's example, and what follows from it. */
const KEY = 'dGhlIHNhbXBsZSBub25jZQ==', ACCEPT = 's3pPLMBiTxaQ9kYGzzhZRbK+xOo=';

/** @param {string} id @returns {any} */
const $ = (id) => document.getElementById(id);
const body = document.body;
const status = $('status'), ways = $('ways'), head = $('head');
const say = $('say'), field = $('message'), ten = $('ten'), notice = $('notice');
const freeze = $('freeze'), breaker = $('break');
const request = $('request'), answer = $('answer'), whys = $('whys').content;
const commands = { entry: $('entry'), id: $('id'), line: $('line') };

/** The texts of the page's language. @type {Record<string, string>} */
const T = {};
for (const p of $('strings').content.children) T[p.dataset.key] = p.textContent;

/** A text with its blanks filled in. @param {string} text @param {Record<string, any>} blanks */
const fill = (text, blanks) => text.replace(/{(\w)}/g, (_, name) => blanks[name]);

/** @param {number} n */
const number = (n) => n.toLocaleString(document.documentElement.lang);
/** @param {number} ms */
const duration = (ms) =>
  ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
/** @param {string} text */
const size = (text) => new TextEncoder().encode(text).length;
/** @param {number} ms */
const sleep = (ms) => new Promise((done) => { setTimeout(done, ms); });
const now = () => performance.now();

// ---- a WebSocket ----

/** The server's answer to the handshake. No page can see it; every one is as long as this. */
const GRANT = ['HTTP/1.1 101 Switching Protocols', 'Upgrade: websocket', 'Connection: Upgrade',
  `Sec-WebSocket-Accept: ${ACCEPT}`, ''];

/** A post as the room wants it through a WebSocket. @param {string} text @param {string} key */
const eventOf = (text, key) => `id: ${key}\ndata: ${text.replaceAll('\n', '\ndata: ')}`;

/** The bytes before a text in its frame; a client's has four more, the mask.
 *  @param {string} text */
const headSize = (text) => (size(text) < 126 ? 2 : size(text) < 1 << 16 ? 4 : 10);

/** An EventSource through a WebSocket. A browser knows nothing of events there: to take them apart
 *  and to keep the last id is our work, and so is coming back. */
class Socket extends EventTarget {
  readyState = EventSource.CONNECTING;
  lastEventId = '';
  retry = 0;                          // ms, after which to come back
  onopen = () => {};
  onerror = () => {};
  /** Those who wait for a reply: they come in the order of the posts.
   *  @type {((reply: Answer | null) => void)[]} */
  waiting = [];

  /** @param {string} query */
  constructor(query) {
    super();
    this.ws = new WebSocket(new URL(`ws?${query}`, location.href).href.replace('http', 'ws'));
    this.ws.onopen = () => { this.readyState = EventSource.OPEN; this.onopen(); };
    this.ws.onmessage = (e) => this.receive(e.data);
    this.ws.onclose = () => { this.close(); this.onerror(); };
  }

  /** Each message is one event. @param {string} text */
  receive(text) {
    const lines = text.split('\n').map((line) => /^(\w+): ?(.*)$/.exec(line) ?? []);
    const all = (/** @type {string} */ name) => lines.filter((l) => l[1] === name).map((l) => l[2]);
    const type = all('event')[0] ?? 'message', [id] = all('id'), data = all('data').join('\n');
    this.retry = Number(all('retry')[0] ?? this.retry);
    this.lastEventId = id ?? this.lastEventId;
    if (type === 'reply') return this.waiting.shift()?.(JSON.parse(data));
    // With the ping of a silence, which has no id, comes a frame of two bytes for the browser.
    const bytes = headSize(text) + size(text) + (type === 'ping' && !id ? 2 : 0);
    this.dispatchEvent(Object.assign(
      new MessageEvent(type, { data, lastEventId: this.lastEventId }), { bytes, text }));
  }

  /** @param {string} event @returns {Promise<Answer | null>} */
  say(event) {
    this.ws.send(event);
    return new Promise((done) => { this.waiting.push(done); });
  }

  close() {
    this.readyState = EventSource.CLOSED;
    this.ws.onopen = this.ws.onmessage = this.ws.onclose = null;
    this.ws.close();
    for (const done of this.waiting.splice(0)) done(null);
  }
}

/** What became of a post. @typedef {{status: number, retryAfter?: number}} Answer */

// ---- the four ways ----

/** Where they begin: the newest message when the page was opened. '' is: not known yet. */
let start = '';
/** Bytes of the header of an answer. Every answer has the same one. */
let headBytes = 0;
/** When the newest messages were sent from here, by their key. @type {Map<string, number>} */
const posted = new Map();

/** A request: times in ms since the page was opened, end is 0 while it is open; the bytes of the
 *  answer's body and header; exact once the browser has told what it measured.
 *  @typedef {{start: number, end: number, bytes: number, head: number, messages: number,
 *             exact: boolean, pinged: boolean, drawn?: boolean, node: HTMLElement}} Asked */

class Way {
  /** @type {Asked[]} those of the time line */
  requests = [];
  past = { requests: 0, bytes: 0 };   // those that have left it
  messages = 0;
  /** @type {string[]} */
  newest = [];
  /** @type {number[]} */
  delays = [];
  cursor = '';                        // the id of the last event
  heard = 0;                          // when it came
  lost = false;
  refusals = 0;                       // since the last event
  timer = 0;
  /** @type {any} an EventSource or a Socket */
  source = null;

  /** @param {string} id @param {string} wait as in ?wait=, '' for a stream
   *  @param {number} retryBytes of the first line of an answer, which no event tells: `retry: 2000`
   *  @param {string} name @param {string} about */
  constructor(id, wait, retryBytes, name, about) {
    this.id = id;
    this.wait = wait;
    this.retryBytes = retryBytes;
    const node = $('way').content.firstElementChild.cloneNode(true);
    /** @param {string} css @returns {any} */
    const part = (css) => node.querySelector(css);
    node.dataset.way = id;
    part('.lane > b').textContent = part('h2 span').textContent = name;
    part('.lane').setAttribute('aria-label', fill(T.lesson_lane, { n: name }));
    part('.about').textContent = about;
    part('code').textContent = `GET ${home}${id === 'ws' ? 'ws' : 'stream'}` + (wait && `?wait=${wait}`);
    this.cells = { requests: part('.requests'), bytes: part('.bytes'), messages: part('.messages'),
      delay: part('.delay'), spread: part('.spread'), delays: part('.delays'), newest: part('.newest') };
    this.strip = part('.strip');
    ways.append(node);
  }

  open() {
    this.close();
    this.cursor = this.cursor || start;
    const query = new URLSearchParams({ ...(this.wait && { wait: this.wait }), after: this.cursor });
    this.source = this.id === 'ws' ? new Socket(`${query}`) : new EventSource(`stream?${query}`);
    this.source.onopen = () => this.begin();
    this.source.onerror = () => this.fail();
    for (const type of ['message', 'ping', 'wait', 'gap']) {
      this.source.addEventListener(type, (/** @type {any} */ e) => this.receive(e));
    }
    this.heard = now();
  }

  close() {
    clearTimeout(this.timer);
    this.timer = 0;
    this.source?.close();
    this.source = null;
    this.end();
  }

  /** @returns {Asked | undefined} */
  get last() {
    return this.requests[this.requests.length - 1];
  }

  /** The answer to a request has begun. EventSource makes as many as it needs. */
  begin() {
    this.end();
    this.requests.push({ start: now(), end: 0, bytes: this.retryBytes, messages: 0,
      head: this.id === 'ws' ? size(GRANT.join('\r\n') + '\r\n') : headBytes, exact: false, pinged: false, node: mark(this, 'bar', now()) });
  }

  end() {
    const { last } = this;
    if (last) last.end = last.end || now();
  }

  /** The answer has ended, as those of polling do. EventSource comes back by itself, but gives up
   *  for good when it is refused. */
  fail() {
    this.end();
    const isOver = this.source?.readyState === EventSource.CLOSED;
    this.lost = this.lost || !this.wait || isOver;
    if (isOver) this.later();
  }

  /** Comes back after a pause that grows, and that is not the same for a whole class. EventSource
   *  does not tell why it was refused, so that is asked for. */
  async later() {
    const refused = this.source;
    const res = await fetch('stream?wait=0', { method: 'HEAD' }).catch(() => null);
    if (refused !== this.source) return;
    if (res?.status === 401) return logIn();
    const asked = Number(res?.headers.get('Retry-After') ?? 0);
    const pause = Math.max(asked, (refused?.retry ?? 0) / 1000, Math.min(15, 2 ** this.refusals++)) * (1 + Math.random() / 2);
    this.timer = setTimeout(() => this.open(), pause * 1000);
  }

  /** @param {MessageEvent & {bytes?: number, text?: string}} e */
  receive(e) {
    const { last } = this;
    if (last && !last.exact) last.bytes += e.bytes ?? frameBytes(e, last.pinged, this.cursor);
    if (last && e.type === 'ping') last.pinged = true;
    if (last && e.type === 'gap') last.pinged = false;
    if (e.type === 'message') this.arrive(e, last);
    this.cursor = e.lastEventId || this.cursor;
    this.heard = now();
    this.lost = false;
    this.refusals = 0;
  }

  /** @param {MessageEvent & {text?: string}} e @param {Asked | undefined} by */
  arrive(e, by) {
    this.messages++;
    if (by) by.messages++;
    this.newest = [e.data, ...this.newest].slice(0, NEWEST);
    mark(this, 'dot', now());
    const sent = posted.get(keyOf(e.lastEventId));
    if (sent !== undefined) this.delays = [...this.delays, now() - sent].slice(-PLOT);
    if (this.id === 'sse') look(e, this.cursor);
    frames.down = e.text ?? frames.down;
  }

  /** What the browser measured of an ended request. A request that never got an answer has only
   *  this; one that the page broke off has no bytes here, those of its events stay, and in Firefox
   *  it often ends where it began, so its own end stays too.
   *  @param {PerformanceResourceTiming} e */
  measure(e) {
    const known = this.requests.find((r) =>
      !r.exact && r.start >= e.startTime && r.start < e.responseEnd + 1000);
    const r = known ?? { start: 0, end: 0, bytes: 0, head: 0, messages: 0,
      exact: true, pinged: true, node: mark(this, 'bar', e.startTime) };
    Object.assign(r, { start: e.startTime, end: Math.max(e.responseEnd, r.end), bytes: e.encodedBodySize || r.bytes, exact: true });
    if (!known) this.requests.unshift(r);
  }

  /** Is it silent for too long? Then the connection is dead, though it may look open. */
  check() {
    if (this.source && !this.timer && now() - this.heard > SILENCE) this.open();
  }
}

/** The bytes of an event on the wire, as the server writes it. Messages come with their id, and the
 *  first ping of an answer or after a gap; a gap may have one.
 *  @param {MessageEvent} e @param {boolean} pinged @param {string} cursor the id before it */
function frameBytes(e, pinged, cursor) {
  const named = e.type === 'message' ? '' : `event: ${e.type}\n`;
  const hasId = e.type === 'message' || (e.type === 'ping' ? !pinged : e.lastEventId !== cursor);
  const id = hasId && e.lastEventId ? `id: ${e.lastEventId}\n` : '';
  const data = e.type === 'message' ? `data: ${e.data.replaceAll('\n', '\ndata: ')}` : 'data:';
  return size(`${named}${id}${data}\n\n`);
}

const all = [
  new Way('polling', '0', 12, T.lesson_polling, T.lesson_polling_about),
  new Way('long', '25s', 11, T.lesson_long, T.lesson_long_about),
  new Way('sse', '', 12, T.lesson_sse, T.lesson_sse_about),
  new Way('ws', '', 0, T.lesson_ws, T.lesson_ws_about),
];

/* The browser's list of entries is full at 250; those that were read are thrown away. */
new PerformanceObserver((list) => {
  for (const e of /** @type {PerformanceResourceTiming[]} */ (list.getEntries())) {
    const url = new URL(e.name);
    if (url.pathname !== `${home}stream` || e.initiatorType === 'fetch') continue;
    all.find((way) => way.wait === (url.searchParams.get('wait') ?? ''))?.measure(e);
  }
  performance.clearResourceTimings();
}).observe({ type: 'resource' });

// ---- drawing ----

let frozen = false;

/** Puts a mark on a way's time line. @param {Way} way @param {string} kind @param {number} at */
function mark(way, kind, at) {
  const node = document.createElement('i');
  node.className = kind;
  node.dataset.at = String(at);
  put(node, '--at', at);
  way.strip.append(node);
  return node;
}

/** Sets a length on the time line, as a part of its width. @param {HTMLElement} node
 *  @param {string} name @param {number} ms */
const put = (node, name, ms) => node.style.setProperty(name, `${(ms / 10 / WINDOW).toFixed(4)}%`);

/** @param {Element} node @param {string} text */
const write = (node, text) => { if (node.textContent !== text) node.textContent = text; };

function draw() {
  for (const way of all) way.check();
  showState();
  if (frozen) return;
  const at = now();
  for (const way of all) {
    drawTime(way, at);
    drawNumbers(way);
    drawDelays(way);
  }
  drawFrames();
}

/** Moves the time line, whose right edge is now. @param {Way} way @param {number} at */
function drawTime(way, at) {
  for (const r of way.requests) {
    if (r.drawn) continue;
    r.drawn = r.exact;                // and so changes no more
    put(r.node, '--at', r.start);
    put(r.node, '--long', (r.end || at) - r.start);
    r.node.dataset.state = r.messages ? 'full' : r.end ? 'empty' : 'open';
  }
  way.strip.style.setProperty('transform', `translateX(${100 - at / 10 / WINDOW}%)`);
  while (way.requests[0]?.end && way.requests[0].end < at - WINDOW * 1000) forget(way);
  for (const node of [...way.strip.children]) { // in the order of time
    if (Number(node.dataset.at) >= at - WINDOW * 1000) break;
    if (node.className !== 'bar') node.remove();
  }
}

/** A request has left the time line; it stays in the sums. @param {Way} way */
function forget(way) {
  const r = /** @type {Asked} */ (way.requests.shift());
  way.past.requests++;
  way.past.bytes += r.bytes + r.head;
  r.node.remove();
}

/** @param {Way} way */
function drawNumbers(way) {
  const { cells, requests, past, delays, newest } = way;
  const count = past.requests + requests.length;
  const bytes = requests.reduce((sum, r) => sum + r.bytes + r.head, past.bytes);
  write(cells.requests, count ? number(count) : '');
  write(cells.bytes, count ? number(bytes) : '');
  write(cells.messages, count ? number(way.messages) : '');
  write(cells.delay, delays.length ? duration(delays[delays.length - 1]) : '');
  while (cells.newest.children.length < newest.length) cells.newest.append(document.createElement('li'));
  newest.forEach((line, i) => write(cells.newest.children[i], line));
}

/** @param {Way} way */
function drawDelays({ cells, delays }) {
  while (cells.delays.children.length < delays.length) cells.delays.append(document.createElement('i'));
  delays.forEach((ms, i) => {
    cells.delays.children[i].style.setProperty('--high', `${Math.min(100, ms / PLOT_TOP * 100).toFixed(1)}%`);
    cells.delays.children[i].classList.toggle('over', ms > PLOT_TOP);
  });
  const sorted = [...delays].sort((a, b) => a - b);
  const spread = { n: sorted.length, m: duration((sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2), l: duration(sorted[sorted.length - 1]) };
  write(cells.spread, !sorted.length ? T.lesson_no_delay : fill(sorted.length > 1 ? T.lesson_spread : T.lesson_spread_one, spread));
}

function showState() {
  const state = broken ? 'broken' : all.some((way) => way.lost) ? 'reconnecting'
    : all.every((way) => way.requests.length) ? 'live' : 'connecting';
  if (body.dataset.state === state) return;
  body.dataset.state = state;
  body.classList.toggle('lost', state === 'reconnecting');
  status.textContent = broken ? T.lesson_broken : T[state];
}

freeze.addEventListener('click', () => {
  frozen = !frozen;
  freeze.setAttribute('aria-pressed', String(frozen));
  showWire();
});

// ---- sending ----

/** The text in the field and its key, which stays the same until it is in the room. */
let letter = { text: '', key: '' };

/** Sends a text, and tells whether it is in the room. @param {string} text @param {string} key */
async function post(text, key) {
  if (!posted.has(key)) keep(key);
  if (!posted.has(key)) posted.set(key, now());
  if (posted.size > PLOT) posted.delete(posted.keys().next().value ?? '');
  const marks = all.map((way) => mark(way, 'post', now()));
  Object.assign(frames, { up: eventOf(text, key), sent: { text, key } });
  const got = await ($('by-socket').checked ? bySocket(text, key) : byPost(text, key));
  if (got?.status === 401) logIn();
  if (got && got.status >= 400 && got.status < 500) { // refused: it was not sent
    posted.delete(key);
    for (const node of marks) node.remove();
  }
  notice.textContent = got?.status === 204 ? '' : refusal(got);
  return got?.status === 204;
}

/** @param {string} text @param {string} key @returns {Promise<Answer | null>} */
async function byPost(text, key) {
  const res = await fetch('post', { method: 'POST', headers: { 'Idempotency-Key': key },
    body: new URLSearchParams({ message: text }) }).catch(() => null);
  return res && { status: res.status, retryAfter: Number(res.headers.get('Retry-After')) };
}

/** @param {string} text @param {string} key @returns {Promise<Answer | null>} */
async function bySocket(text, key) {
  const { source } = all[3];
  return source?.readyState === EventSource.OPEN ? source.say(eventOf(text, key)) : null;
}

/** @param {Answer | null} got */
function refusal(got) {
  if (got?.status === 429) return fill(T.too_fast, { s: got.retryAfter });
  return got && got.status < 500 ? T.refused : T.lesson_not_sent;
}

say.addEventListener('submit', async (/** @type {Event} */ e) => {
  e.preventDefault();
  const text = field.value;
  if (!text.trim()) return field.focus();
  if (letter.text !== text) letter = { text, key: newKey() };
  const { key } = letter;
  if (!await post(text, key) || letter.key !== key) return;
  letter = { text: '', key: '' };
  if (field.value === text) field.value = '';
});

/* At times that have nothing to do with the two seconds of polling. */
ten.addEventListener('click', async () => {
  ten.disabled = true;
  for (let i = 1; i <= 10 && await post(`${i}/10`, newKey()); i++) await sleep(700 + Math.random() * 800);
  ten.disabled = false;
});

// ---- the wire ----

/** The newest message, and the id before the first that the wire has not shown yet.
 *  @type {{newest: MessageEvent, after: string} | null} */
let unseen = null;
let looking = false;

/** A message came on the stream. @param {MessageEvent} newest @param {string} before it: an id */
function look(newest, before) {
  unseen = { newest, after: unseen?.after ?? before };
  showWire();
}

/** The message as commands to Redis. @param {MessageEvent} e */
function showCommands({ lastEventId: id, data }) {
  if (id.includes('.')) return;       // published by another program, which had commands of its own
  write(commands.id, id);
  write(commands.line, quote(data));
  write(commands.entry, quote(`${id} ${data}`));
}

/** A long text must not push the page away. @param {string} text */
const short = (text) => (text.length > WIRE_CHARS ? `${text.slice(0, WIRE_CHARS)}…` : text);

/** As redis-cli wants it. A line break is U+2028 in Redis. @param {string} text */
const quote = (text) => `"${short(text.replace(/["\\]/g, '\\$&').replace(/\n/g, '\\xe2\\x80\\xa8'))}"`;

/** At most one look a second. */
async function showWire() {
  if (looking) return;
  looking = true;
  while (unseen && !frozen && !document.hidden) {
    await sleep(WIRE_CALM);           // what was missed in a break comes in one go
    const { newest, after } = unseen;
    unseen = null;
    showCommands(newest);
    await readWire(after).catch(() => null); // the room is away: the next message tries again
    await sleep(WIRE_PAUSE);
  }
  looking = false;
}

/** Asks as polling does, shows request and answer, and returns the id of the newest message.
 *  @param {string} after */
async function readWire(after) {
  const headers = { Accept: 'text/event-stream', ...(after && { 'Last-Event-ID': after }) };
  const res = await fetch('stream?wait=0', { headers, cache: 'no-store' });
  if (res.status === 401) logIn();
  if (!res.ok) throw res;
  const text = await res.text();
  const lines = headLines(res);
  headBytes = size(lines.join('\r\n') + '\r\n');
  head.textContent = number(headBytes);
  list(request, [`GET ${home}stream?wait=0 HTTP/1.1`, `Host: ${location.host}`,
    ...Object.entries(headers).map(([name, value]) => `${name}: ${value}`), T.lesson_more_request, '']
    .map((line) => `request ${line}`));
  list(answer, [...shortHead(lines).map((line) => `head ${line}`),
    ...shortBody(text.split('\n').slice(0, -1)).map((line) => `body ${line}`)]);
  return text.match(/^id: (.+)$/gm)?.pop()?.slice(4) ?? after;
}

/** The header as it came; fetch gives names in small letters. @param {Response} res */
function headLines(res) {
  const lines = [...res.headers].map(([name, value]) =>
    `${name.replace(/\b[a-z]/g, (c) => c.toUpperCase())}: ${value}`);
  return [`HTTP/1.1 ${res.status} ${res.statusText}`, ...lines, ''];
}

/** Without the lines that every answer of this server has. @param {string[]} lines */
function shortHead(lines) {
  const own = lines.filter((line) => /^(HTTP|Content-Type|Cache|X-Accel|Connection|$)/.test(line));
  const more = fill(T.lesson_more_head, { n: lines.length - own.length });
  return [...own.slice(0, -1), more, ''];
}

/** Its first event and its last ones. @param {string[]} lines */
function shortBody(lines) {
  const cut = lines.map(short);
  if (cut.length <= WIRE_LINES) return cut;
  const more = fill(T.lesson_more_body, { n: cut.length - WIRE_LINES });
  return [...cut.slice(0, 2), more, ...cut.slice(2 - WIRE_LINES)];
}

/** Writes lines, "part text" each, into a list. Its nodes stay, and so does the focus.
 *  @param {HTMLElement} node @param {string[]} lines */
function list(node, lines) {
  while (node.children.length > lines.length) node.lastElementChild?.remove();
  while (node.children.length < lines.length) {
    const item = document.createElement('li');
    item.tabIndex = 0;
    item.setAttribute('aria-describedby', panel(node).id);
    node.append(item);
  }
  lines.forEach((line, i) => {
    const item = /** @type {HTMLElement} */ (node.children[i]);
    item.dataset.line = line;
    write(item, line.replace(/^\w+ /, ''));
    if (item === explained) explain({ target: item });
  });
}

/** Where the lines and bytes of a list are explained. @param {Element} node @returns {any} */
const panel = (node) => node.closest('.split')?.querySelector('.why');

/** What is explained. @type {Element | null} */
let explained = null;

/** Explains the line or byte that is pointed at, or that has the focus. @param {any} e */
function explain(e) {
  const item = e.target.closest('.raw > li, .octets > li');
  if (!item) return;
  explained?.removeAttribute('data-state');
  explained = item;
  item.dataset.state = 'explained';
  const { line, why } = item.dataset;
  const found = [...whys.children].find((p) => line?.startsWith(p.dataset.line));
  write(panel(item), why ?? found?.textContent ?? '');
}

for (const event of ['mouseover', 'focusin', 'click']) document.addEventListener(event, explain);

// ---- the frames ----

/** The newest texts through the WebSocket, down and up; what was sent, and whether that is drawn.
 *  @type {{down: string, up: string, sent: {text: string, key: string} | null, drawn: string}} */
const frames = { down: '', up: '', sent: null, drawn: '' };

function drawFrames() {
  const { down, up, sent } = frames;
  if (frames.drawn === down + up) return;
  frames.drawn = down + up;
  if (down) drawFrame('down', down, null);
  if (!sent) return;
  drawFrame('up', up, crypto.getRandomValues(new Uint8Array(4)));
  const lines = postLines(sent.text, sent.key);
  write($('post-size'), fill(T.lesson_at_least, { n: number(size(lines.join('\r\n'))) }));
  list($('posted'), [...lines.slice(0, -2), T.lesson_more_request, ...lines.slice(-2)]
    .map((line, i, { length }) => `${i === length - 1 ? 'form' : 'post'} ${short(line)}`));
}

/** A POST, with the lines of its header that a page can know. @param {string} text @param {string} key */
function postLines(text, key) {
  const form = `${new URLSearchParams({ message: text })}`;
  return [`POST ${home}post HTTP/1.1`, `Host: ${location.host}`, `Content-Length: ${form.length}`,
    'Content-Type: application/x-www-form-urlencoded;charset=UTF-8', `Idempotency-Key: ${key}`,
    `Origin: ${location.origin}`, `Referer: ${location.href.split('#')[0]}`, `User-Agent: ${navigator.userAgent}`, '', form];
}

/** @param {'down' | 'up'} id @param {string} text @param {Uint8Array | null} mask */
function drawFrame(id, text, mask) {
  const bytes = frameOf(text, mask);
  write($(`${id}-size`), fill(T.lesson_n_bytes, { n: number(bytes.length) }));
  const head = headSize(text) + (mask ? 4 : 0), left = bytes.length - head - FRAME_BYTES;
  const more = { part: 'more', hex: '…', sign: '', why: fill(T.lesson_byte_cut, { n: left }) };
  cells($(id), left > 0 ? [...bytes.slice(0, head + FRAME_BYTES), more] : bytes);
}

/** A byte of a frame: which part it belongs to, how it is written, what it says.
 *  @typedef {{part: string, hex: string, sign: string, why: string}} Byte */

/** @param {number} b */
const hex = (b) => b.toString(16).padStart(2, '0');
/** @param {number} b */
const bits = (b) => b.toString(2).padStart(8, '0').replace(/^(.)(...)(....)$/, '$1 $2 $3');

/** The frame of a text. A client's has a mask. @param {string} text @param {Uint8Array | null} mask
 *  @returns {Byte[]} */
function frameOf(text, mask) {
  const n = size(text), wide = n < 126 ? 0 : n < 1 << 16 ? 2 : 8;
  const length = (mask ? 0x80 : 0) | [n, 0, 126, 0, 0, 0, 0, 0, 127][wide];
  const said = fill(mask ? T.lesson_byte_up : T.lesson_byte_down, { h: hex(length), b: bits(length).replace(/^(.) (...) /, '$1 $2') });
  const counts = wide ? T.lesson_byte_long : T.lesson_byte_short;
  return [
    { part: 'head', hex: '81', sign: 'FIN 1', why: fill(T.lesson_byte_first, { h: '81', b: bits(0x81) }) },
    { part: 'head', hex: hex(length), sign: String(length & 127), why: said + fill(counts, { n: wide || n, l: length & 127 }) },
    ...Array.from({ length: wide }, (_, i) => lengthByte(n, wide, i)),
    ...Array.from(mask ?? [], (b, i) => ({ part: 'mask', hex: hex(b), sign: '',
      why: fill(T.lesson_byte_mask, { h: hex(b), i: i + 1 }) })),
    ...textBytes(text, mask),
  ];
}

/** @param {number} n @param {number} wide @param {number} i @returns {Byte} */
function lengthByte(n, wide, i) {
  const b = Math.floor(n / 256 ** (wide - 1 - i)) % 256;
  return { part: 'head', hex: hex(b), sign: String(b), why: fill(T.lesson_byte_length, { h: hex(b), i: i + 1, w: wide, n: number(n) }) };
}

/** @param {string} text @param {Uint8Array | null} mask @returns {Byte[]} */
function textBytes(text, mask) {
  /** @type {Byte[]} */
  const all = [];
  for (const c of text) {
    const plain = new TextEncoder().encode(c), sign = c === '\n' ? '↵' : c === ' ' ? 'SP' : c;
    plain.forEach((b, i) => {
      const k = mask ? mask[all.length % 4] : 0;
      const place = plain.length > 1 ? fill(T.lesson_byte_part, { c: sign, i: i + 1, n: plain.length }) : sign;
      const said = mask ? T.lesson_byte_masked : T.lesson_byte_text;
      all.push({ part: 'text', hex: hex(b ^ k), sign: i ? '·' : sign, why: fill(said, { h: hex(b ^ k), k: hex(k), t: hex(b), c: place }) });
    });
  }
  return all;
}

/** Writes bytes into a list. One of them is reached by Tab, the others by arrow keys.
 *  @param {HTMLElement} node @param {Byte[]} bytes */
function cells(node, bytes) {
  while (node.children.length > bytes.length) node.lastElementChild?.remove();
  while (node.children.length < bytes.length) {
    const item = document.createElement('li');
    item.tabIndex = node.children.length ? -1 : 0;
    item.setAttribute('aria-describedby', panel(node).id);
    item.append(document.createElement('b'), document.createElement('i'));
    node.append(item);
  }
  bytes.forEach((byte, i) => {
    const item = /** @type {HTMLElement} */ (node.children[i]);
    Object.assign(item.dataset, { part: byte.part, why: byte.why });
    write(item.children[0], byte.hex);
    write(item.children[1], byte.sign);
    if (item === explained) explain({ target: item });
  });
}

/** @param {any} e */
function walk(e) {
  const item = e.target.closest('.octets > li'), list = item?.parentElement;
  const to = { ArrowRight: item?.nextElementSibling, ArrowLeft: item?.previousElementSibling,
    Home: list?.firstElementChild, End: list?.lastElementChild }[/** @type {string} */ (e.key)];
  if (!to) return;
  e.preventDefault();
  item.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}
document.addEventListener('keydown', walk);

list($('ask'), [`GET ${home}ws?after=… HTTP/1.1`, `Host: ${location.host}`, 'Upgrade: websocket', 'Connection: Upgrade',
  `Origin: ${location.origin}`, 'Sec-WebSocket-Version: 13', `Sec-WebSocket-Key: ${KEY}`, T.lesson_more_request, '']
  .map((line) => `ask ${line}`));
list($('grant'), GRANT.map((line) => `grant ${line}`));

// ---- who looks ----

let broken = false;
let drawing = 0;
let opening = 0;

/** Opens the four ways where they were, or, the first time, at the newest message. */
async function open() {
  const mine = ++opening;
  for (let tries = 0; !start && mine === opening; tries++) {
    if (tries) await sleep(1000 * Math.min(15, 2 ** tries) * (0.5 + Math.random() / 2));
    start = await readWire('').catch(() => '');
  }
  if (mine === opening) for (const way of all) way.open();
}

function close() {
  opening++;
  for (const way of all) way.close();
}

/** A tab that is not seen lets go of everything, and comes back where it was. */
function see() {
  clearInterval(drawing);
  close();
  if (document.hidden) return;
  drawing = setInterval(draw, matchMedia('(prefers-reduced-motion: reduce)').matches ? 1000 : 100);
  if (!broken) open();
}

breaker.addEventListener('click', () => {
  broken = !broken;
  breaker.textContent = broken ? T.lesson_mend : T.lesson_break;
  breaker.classList.toggle('primary', broken);
  broken ? close() : open();
});

$('join')?.append(home.slice(0, -1));
document.addEventListener('visibilitychange', see);
addEventListener('pagehide', close);
addEventListener('pageshow', (e) => e.persisted && location.reload()); // Safari wakes what was closed
see();
