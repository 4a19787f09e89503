// @ts-check
/* The chat page. How to read it:

     The page itself is chat.html: every node has its place there, and the pieces that are copied
     are in <template>s. The script moves text between nodes and sets data-state and the like; it
     never makes markup out of text, so nothing that anybody writes can be more than text.
     stream.js brings the events, outbox.js sends, keys.js says which message is which and whose,
     text.js what is code and a link.

     receiving    arrive → inbox.queue → inbox.flush: events wait in a queue, and are put into the
                  page at most ten times a second
     rows         a message becomes a row; rows lie in sections of 50, so that the browser lays
                  out the last 50 and not the last 1000
     text         pieces become nodes; a long text is folded
     scrolling    stays at the end, unless the reader has scrolled up
     connection   connecting → live → reconnecting or offline
     sending      submit → outbox: the message stands under the log until it comes back
     composing    the field: keys, counter, draft

   A part that has to remember something is an object, which holds it. */
import { connect } from './stream.js';
import { forget, home, isOurs, keyOf, logIn } from './keys.js';
import { Outbox } from './outbox.js';
import { cut, pieces } from './text.js';

/** @typedef {import('./stream.js').Told} Told */
/** @typedef {import('./outbox.js').Letter} Letter */
/** @typedef {import('./text.js').Piece} Piece */
/** What waits to be put in: an event, with the key of its message, and whether that is a copy.
 *  @typedef {Told & {key: string, copy: boolean}} Waiting */

const FLUSH = 100;                  // ms between two changes of the page
const SECTION = 50;                 // rows a section
const KEEP = 1000, KEEP_READING = 5000; // rows kept; while the reader is further up
const REMEMBER = 8192;              // keys known, so that a message is shown once
const NEAR = 48;                    // px from the end that count as the end
const GROUP = 300;                  // s in which messages of one author stand together
const SKEW = 600;                   // s by which the clocks of two servers may differ
const CHARS = 800, LINES = 12;      // a longer text is folded
/** @type {[number, number]} */
const SHOWN = [500, 10];            // to as many: what it hides is higher than the button
const SAID = 2_000;                 // ms for which a button says what it did
const MAX = 4000, COUNT_FROM = 3200; // characters of a message
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

/** A text with its blank filled in. @param {string} key @param {any} n */
const say = (key, n) => T[key].replace(/{[ns]}/, () => n);

/** @param {string} tag @param {string} text */
function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

/** @param {any} node @param {string} events @param {(e: any) => void} f */
function on(node, events, f) {
  const passive = /scroll|wheel|touch/.test(events);
  for (const event of events.split(' ')) node.addEventListener(event, f, { passive });
}

/** A copy of a template's node. @param {string} id @returns {any} */
const copy = (id) => $(id).content.firstElementChild.cloneNode(true);

// ---- receiving ----

/** @param {Told} e */
function arrive(e) {
  if (e.type === 'login') return logIn();
  if (e.type === 'down') return connection.lose();
  if (e.type !== 'wait') connection.live();
  if (e.type === 'gap') outbox.gap();
  const key = keyOf(e.id ?? ''), copy = e.type === 'message' && !inbox.remember(key);
  inbox.add({ ...e, key, copy });
  if (e.type === 'message' && !copy) receive(key, e);
  if (e.type === 'ping') {
    inbox.backlog = false;
    outbox.caughtUp();
  }
}

/** A message that is new. @param {string} key @param {Told} e */
function receive(key, e) {
  const letter = outbox.arrived(key);
  if (letter) {
    save();
    inbox.arrived.push(letter.node);
    if (LINE.exec(e.text ?? '')?.[5] !== me) location.reload(); // the session has another name than this page
  }
  if (!document.hidden || inbox.backlog || isOurs(key)) return;
  inbox.firstUnread = inbox.firstUnread || key;
  badge(++inbox.unread);
}

const inbox = {
  /** Keys of the messages that have come, oldest first. */
  seen: new Set(),
  /** What has come and is not in the page yet. @type {Waiting[]} */
  queue: [],
  timer: 0, flushedAt: 0,
  /** When the last ten came. @type {number[]} */
  times: [],
  backlog: true,                    // until the backlog is complete
  isCalm: false,                    // few messages come: they may be seen to come
  unread: 0,                        // messages that came while the tab was hidden …
  firstUnread: '',                  // … the first one's key
  /** Rows of letters that have arrived, to go when the message itself is put in. @type {any[]} */
  arrived: [],

  /** False if the message is known already. @param {string} key */
  remember(key) {
    if (this.seen.has(key)) return false;
    this.seen.add(key);
    if (this.seen.size > REMEMBER) this.seen.delete(this.seen.values().next().value);
    return true;
  },

  /** @param {Waiting} e */
  add(e) {
    this.queue.push(e);
    if (this.queue.length > 2 * list.room()) this.queue = this.queue.slice(-list.room());
    this.timer = this.timer || setTimeout(() => this.flush(), this.flushedAt + FLUSH - performance.now());
  },

  /** A screen reader does not read out more than ten messages a second. @param {number} n */
  announce(n) {
    const now = performance.now();
    this.times = [...this.times, ...Array(n).fill(now)].filter((t) => now - t < 1000).slice(-11);
    log.setAttribute('aria-live', this.times.length > 10 ? 'off' : 'polite');
  },

  /** Puts the queue into the page. A hidden tab does nothing, it catches up when it is shown. */
  flush() {
    this.timer = 0;
    if (document.hidden) return;
    this.flushedAt = performance.now();
    view.look();
    const batch = this.queue, fresh = batch.filter((e) => e.type === 'message' && !e.copy);
    this.queue = [];
    if (fresh.length >= list.room()) list.clear(); // more than fits: nothing older can stay
    this.announce(fresh.length);
    this.isCalm = !this.backlog && this.times.length < 4;
    for (const e of batch) history.put(e);
    if (this.firstUnread) list.markNew(this.firstUnread);
    this.firstUnread = '';
    for (const node of this.arrived.splice(0)) node.remove();
    list.trim();
    folds.measure();
    empty.hidden = this.backlog || list.count > 0;
    if (!this.backlog) setTimeout(() => log.setAttribute('aria-busy', 'false'));
    view.grown(fresh.filter((e) => !isOurs(e.key)).length);
  },
};

/** Puts what has come where it belongs: at the end, but after a gap the history comes again, and
 *  what of it is new goes before the next row that is already there. */
const history = {
  /** After a gap: the new rows that no known one has followed yet. @type {HTMLElement[] | null} */
  loose: null,
  joined: false,                    // a row that was there has come again

  /** @param {Waiting} e */
  put(e) {
    if (e.type === 'gap') this.begin();
    if (e.type === 'ping') this.end();
    if (e.type === 'message') e.copy ? this.meet(e.key) : this.take(row(e));
  },

  begin() {
    this.end();
    this.loose = [];
    this.joined = false;
  },

  /** @param {HTMLElement} node */
  take(node) {
    this.loose ? this.loose.push(node) : list.append(node);
    node.classList.toggle('comes', inbox.isCalm && !node.matches('.own')); // an own one was there before
  },

  /** A copy of a row that is there, perhaps. @param {string} key */
  meet(key) {
    const known = this.loose && list.find(key);
    if (!known) return;
    list.insert(this.loose || [], known);
    this.loose = [];
    this.joined = true;
  },

  /** All of it is here. If nothing in it was known, nobody can tell what is missing before it. */
  end() {
    if (!this.loose) return;
    if (!this.joined && list.count) list.append(copy('gap'));
    for (const node of this.loose) list.append(node);
    this.loose = null;
  },
};

/** The count in the title, and another icon. @param {number} unread */
function badge(unread) {
  document.title = unread ? `(${unread}) ${room}` : room;
  icon.href = unread ? 'assets/unread.svg' : 'assets/favicon.svg';
}

on(document, 'visibilitychange', () => {
  if (document.hidden) return;
  badge(inbox.unread = 0);
  inbox.flush();
});

// ---- rows ----

/** [12:34:56] name: text. A line of another program need not look like this. */
const LINE = /^\[((\d\d):(\d\d)):(\d\d)\] ([^:\n]{1,64}): ([^]*)$/;

/** @param {Waiting} e @returns {HTMLElement} */
function row(e) {
  const node = copy('row');
  const [, time, h, m, s, who, text] = LINE.exec(e.text ?? '') ?? [];
  node.dataset.key = e.key;
  node.classList.toggle('own', !projector && isOurs(e.key)); // on a wall nothing is anybody's own
  if (who === undefined) node.querySelector('.who').remove();
  else sign(node, who, time, Number(h) * 3600 + Number(m) * 60 + Number(s));
  fill(node.lastElementChild, text ?? e.text ?? '');
  return node;
}

/** Name, colour, time. @param {any} node @param {string} who @param {string} time @param {number} at */
function sign(node, who, time, at) {
  node.querySelector('bdi').textContent = who;
  // The first character: a flag is two, a tone of skin belongs to the hand.
  const [first] = /\p{RI}{2}|[^][\p{M}🏻-🏿]*/u.exec(who) ?? '';
  const initial = node.firstElementChild.dataset.initial = first.toUpperCase();
  node.firstElementChild.classList.toggle('odd', initial > '\ufcff');
  node.querySelector('time').textContent = time;
  Object.assign(node.dataset, { who, at });
  paint(node, who);
}

/** One of twelve colours. @param {any} node @param {string} name */
function paint(node, name) {
  const sum = [...name].reduce((n, c) => n + (c.codePointAt(0) ?? 0), 0);
  node.style.setProperty('--author', `var(--a${sum % 12})`);
}

/** The rows of the log, and the lines between them. */
const list = {
  count: 0,

  /** How many may be there. */
  room: () => (view.isFree() ? KEEP : KEEP_READING),

  /** @param {string} key @returns {HTMLElement | null} */
  find: (key) => log.querySelector(`[data-key="${CSS.escape(key)}"]`),

  /** Adds a row at the end. @param {HTMLElement} node */
  append(node) {
    if (!log.lastElementChild || log.lastElementChild.childElementCount >= SECTION) {
      log.append(document.createElement('section'));
    }
    log.lastElementChild.append(node);
    this.count++;
    group(node);
  },

  /** A line above the first message that nobody has seen. @param {string} key */
  markNew(key) {
    const last = log.querySelector('[data-new]'), first = this.find(key);
    if (last) delete last.dataset.new;
    if (first) first.dataset.new = T.new;
  },

  /** Adds rows before one that is there. @param {HTMLElement[]} nodes @param {HTMLElement} next */
  insert(nodes, next) {
    if (!nodes.length) return;
    view.changeAbove(next, () => next.before(...nodes));
    this.count += nodes.length;
    for (const node of [...nodes, next]) group(node);
  },

  /** Drops sections that are too old. */
  trim() {
    const before = this.count;
    while (this.count - (log.firstElementChild?.childElementCount ?? this.count) >= this.room()) {
      const section = log.firstElementChild;
      this.count -= section.childElementCount;
      view.changeAbove(section, () => section.remove());
    }
    if (this.count < before) group(log.querySelector('.row'));
  },

  clear() {
    log.replaceChildren();
    this.count = 0;
  },
};

/** The name is seen once for messages that follow each other. Where the clock runs back it is another
 *  day. @param {HTMLElement | null} node */
function group(node) {
  if (!node) return;
  const { who, at } = node.dataset, last = previous(node);
  const apart = Number(at) - Number(last?.dataset.at);
  const isSame = last && who && last.dataset.who === who && last.matches('.own') === node.matches('.own');
  node.classList.toggle('follows', Boolean(isSame && apart > -SKEW && apart <= GROUP));
  last?.classList.toggle('leads', node.matches('.follows'));
  if (apart < -SKEW) node.dataset.day = T.day;
  else delete node.dataset.day;
}

/** What stands before it in the log. @param {HTMLElement} node @returns {any} */
function previous(node) {
  return node.previousElementSibling ?? node.parentElement?.previousElementSibling?.lastElementChild;
}

// ---- text ----

/** Puts a message's text into its node; a long one is folded, and only its beginning is looked at:
 *  a few hundred characters, whatever they are, are laid out in no time.
 *  @param {HTMLElement} node @param {string} text */
function fill(node, text) {
  const lines = text.split('\n').length, isLong = length(text) > CHARS || lines > LINES;
  const all = pieces(isLong ? text.slice(0, CHARS) : text);
  const { classList } = /** @type {any} */ (node.parentNode);
  classList.toggle('emoji', /^[\p{So}🏻-🏿\u200d\ufe0f ]{1,8}$/u.test(text));
  classList.toggle('broad', text.length > CHARS / 2 || all.some((p) => p.kind === 'block'));
  classList.toggle('marked', /\p{M}{3}/u.test(text));
  node.append(render(isLong ? cut(all, ...SHOWN)[0] : all));
  if (isLong) folds.fold(node, text, lines > LINES ? say('show_all', lines) : T.show_rest);
  else if (text.length > CHARS / 6 || lines > LINES / 3) folds.unsure.push(node);
}

/** @param {Piece[]} list */
function render(list) {
  const out = document.createDocumentFragment();
  list.forEach(({ kind, text, language }) => {
    if (kind === 'block') out.append(block(text, language ?? ''));
    else if (kind === 'text') out.append(text);
    else out.append(kind === 'code' ? element('code', text) : link(text));
  });
  return out;
}

/** @param {string} text @param {string} language */
function block(text, language) {
  const node = copy('block'), pre = node.querySelector('pre');
  pre.textContent = text;
  pre.dataset.language = language;
  if (projector) node.querySelector('button').remove();
  return node;
}

/** @param {string} url */
function link(url) {
  const rel = 'noopener noreferrer nofollow';
  return Object.assign(element('a', url), { href: url, target: '_blank', rel });
}

/** Long texts, until somebody wants to see all of one. */
const folds = {
  /** Texts that may be too high, to be measured when they are in the page. @type {HTMLElement[]} */
  unsure: [],
  /** Of one that is not all in the page: its node, and the text. @type {WeakMap<Node, string>} */
  texts: new WeakMap(),

  /** Folds those that are too high. */
  measure() {
    const tall = this.unsure.splice(0).filter((node) =>
      node.offsetHeight > (LINES + .5) * parseFloat(getComputedStyle(node).lineHeight));
    for (const node of tall) this.fold(node, '', T.show_rest);
  },

  /** @param {HTMLElement} node @param {string} text '' if all of it is in the page @param {string} label */
  fold(node, text, label) {
    node.classList.add('folded');
    if (text) this.texts.set(node, text);
    if (projector) return;          // nobody is there to unfold it
    const more = copy('more');
    more.textContent = label;
    more.onclick = () => {
      more.remove();
      node.classList.remove('folded');
      if (text) node.replaceChildren(render(pieces(text)));
      view.stuck = view.atEnd();    // who unfolds a text wants to read it
    };
    node.after(more);
  },

  /** Who copies a folded text copies all of it: the rest is there for a moment. */
  copied() {
    for (const node of document.querySelectorAll('.folded')) {
      const text = this.texts.get(node);
      if (!text || !getSelection()?.containsNode(/** @type {Node} */ (node.lastChild))) continue;
      const rest = element('span', '');
      rest.append(render(cut(pieces(text), ...SHOWN)[1]));
      node.append(rest);
      setTimeout(() => rest.remove());
    }
  },
};

on(document, 'copy', () => folds.copied());

// ---- copying code ----

on(body, 'click', ({ target }) => {
  if (!target.matches('.copy')) return;
  const text = target.parentElement.querySelector('pre').textContent;
  if (navigator.clipboard) navigator.clipboard.writeText(text);
  else copyByHand(text);
  target.textContent = T.copied;
  setTimeout(() => { target.textContent = T.copy; }, SAID);
});

/** On plain http there is no clipboard, but what is selected can be copied. @param {string} text */
function copyByHand(text) {
  const field = Object.assign(document.createElement('textarea'), { value: text, className: 'unseen' });
  body.append(field);
  field.select();
  document.execCommand('copy');
  field.remove();
}

// ---- scrolling ----

const view = {
  stuck: true,                      // the end stays in sight
  below: 0,                         // messages the reader has not seen
  isHeld: false,                    // a finger or a mouse button is down in the log
  top: 0,                           // where it was when we last looked
  /** Its size then. In the moment of a change (keyboard, rotation, a growing field) a scroll event
   *  can come first; that is not the reader who scrolls. */
  size: '',

  atEnd: () => log.scrollHeight - log.scrollTop - log.clientHeight <= NEAR,

  /** Whether new rows may move the page. Not under a finger, not away from a selected text. */
  isFree() {
    return this.stuck && (projector || !this.isHeld && !isSelecting());
  },

  toEnd() {
    log.scrollTop = log.scrollHeight;
    this.top = log.scrollTop;
  },

  /** Follows the end again. */
  follow() {
    this.stuck = true;
    this.below = 0;
    showPill();
    this.toEnd();
  },

  /** Lets go of the end: the reader wants to see what is above. */
  letGo() {
    if (projector || log.scrollTop <= 0) return;
    this.stuck = false;
    showPill();
  },

  /** Upward, by whatever means and however little, is away from the end. Only down to it is back. */
  look() {
    const moved = Math.min(log.scrollTop, log.scrollHeight - log.clientHeight) - this.top; // it may bounce
    if (projector || this.size !== sizeNow() || Math.abs(moved) < 1) return;
    this.top += moved;
    this.stuck = moved > 0 && (this.stuck || this.atEnd());
    if (this.stuck) this.below = 0;
    showPill();
  },

  /** Rows are in, so many of them new to the reader. @param {number} n */
  grown(n) {
    if (this.isFree()) return this.toEnd();
    this.top = log.scrollTop;       // what was dropped above has moved it
    this.below += n;
    showPill();
  },

  /** The pointer is up, the selection gone. */
  release() {
    this.isHeld = false;
    if (this.below && this.isFree()) this.follow();
  },

  /** Changes what stands above or before a node. Safari does not keep the reader's place by itself.
   *  @param {HTMLElement} node @param {() => void} change */
  changeAbove(node, change) {
    const isMoved = !this.isFree() && !CSS.supports('overflow-anchor', 'auto')
      && node.getBoundingClientRect().top < log.getBoundingClientRect().bottom;
    const rest = isMoved ? log.scrollHeight - log.scrollTop : 0;
    change();
    if (isMoved) log.scrollTop = log.scrollHeight - rest;
  },
};

const sizeNow = () => `${log.clientWidth} ${log.clientHeight}`;

function isSelecting() {
  const selection = getSelection();
  return Boolean(selection && !selection.isCollapsed && log.contains(selection.anchorNode));
}

/** "3 new messages", or that a projector is paused. */
function showPill() {
  const { stuck, below } = view, paused = projector && !stuck;
  const count = below === 1 ? T.new_message : say('new_messages', below);
  pill.hidden = !below && !paused;
  pill.textContent = !paused ? count : below ? `${T.paused} ${count}` : T.paused;
}

new ResizeObserver(() => {
  view.size = sizeNow();
  view.top = log.scrollTop;
  if (view.isFree()) view.toEnd();
}).observe(log);

on(log, 'scroll', () => view.look());
on(log, 'wheel', (e) => e.deltaY < 0 && view.letGo());
on(log, 'pointerdown touchstart', (e) => { // the end of a drag on the scroll bar is not told
  view.isHeld = e.target !== log || !(e.offsetX >= log.clientWidth);
});
on(window, 'touchend touchcancel', (e) => e.touches.length || view.release());
on(window, 'pointerup pointercancel', (e) => e.pointerType === 'touch' || view.release());
on(window, 'pointermove', (e) => view.isHeld && e.pointerType === 'mouse' && !e.buttons && view.release());
on(document, 'selectionchange', () => view.isHeld || view.release());
on(pill, 'click', () => view.follow());

on(document, 'keydown', (e) => {
  if (e.key === 'End' && e.target !== box) view.follow();
  if (log.contains(e.target) && isUpward(e)) view.letGo();
  if (e.key === ' ' && projector) pause(e);
  if (box && isForField(e)) box.focus(); // and the key goes there
});

/** A projector holds still, or goes on. @param {Event} e */
function pause(e) {
  e.preventDefault();
  view.stuck = !view.stuck;
  view.stuck ? view.follow() : showPill();
}

/** @param {KeyboardEvent} e */
const isUpward = (e) => /^(ArrowUp|PageUp|Home)$/.test(e.key) || e.key === ' ' && e.shiftKey;

/** Whoever reads and begins to type wants to write. @param {any} e */
function isForField(e) {
  if (e.ctrlKey || e.metaKey || e.altKey || [...e.key].length !== 1) return false;
  return !e.target.matches(e.key === ' ' ? 'input, textarea, button, a, #log' : 'input, textarea');
}

// ---- connection ----

const connection = {
  isLive: false,
  timer: 0,                         // until a loss is worth telling

  live() {
    if (this.isLive) return;
    this.isLive = true;
    clearTimeout(this.timer);
    this.timer = 0;
    this.show('live');
    outbox.connected(true);
  },

  lose() {
    this.isLive = false;
    outbox.connected(false);
    this.timer = this.timer || setTimeout(() => this.show(), GRACE);
  },

  /** Nobody writes at a projector, it only waits. @param {string} state */
  show(state = navigator.onLine ? 'reconnecting' : 'offline') {
    body.dataset.state = state;
    body.classList.toggle('lost', state !== 'live');
    status.textContent = T[projector && state !== 'live' ? 'connecting' : state];
  },
};

on(window, 'online offline', () => body.matches('.lost') && connection.show());

// ---- sending ----

const outbox = new Outbox({ draw, erase, refuse, miss, login: logIn });

function submit() {
  const text = box.value;
  if (composer.isComposing) return composer.finish();
  if (!text.trim() || length(text) > MAX) return;
  outbox.write(text);
  composer.last = text;
  composer.write('');
  box.focus();
  view.follow();
}

/** Shows a letter and what has become of it. @param {Letter} letter @param {number} [seconds] */
function draw(letter, seconds) {
  if (!letter.node) place(letter);
  const { node, state } = letter;
  node.dataset.state = state;
  node.querySelector('.fate span').textContent = state === 'deleted' ? T.deleted
    : state === 'failed' ? letter.as ? say('not_sent_as', letter.as) : T.not_sent
    : seconds ? say('too_fast', seconds) : T.sending;
  save();
}

/** @param {Letter} letter */
function erase(letter) {
  letter.node.remove();
  save();
}

/** A new letter goes under the log. @param {Letter} letter */
function place(letter) {
  const last = log.lastElementChild?.lastElementChild;
  const node = letter.node = copy('unsent-row');
  fill(node.querySelector('.text'), letter.text);
  node.classList.toggle('follows', outbox.letters.length > 1 || last?.matches('.own') && last.dataset.who === me);
  unsent.append(node);
  folds.measure();
}

/** The server will never take it: back to the field with it. @param {Letter} letter */
function refuse(letter) {
  const end = box.value.length;     // the cursor stays with who is writing
  box.setRangeText((end ? '\n' : '') + letter.text, end, end, end ? 'preserve' : 'end');
  composer.typed();
  if (!send.disabled) notice.textContent = T.refused;
}

/** Its message was lost on the way here. @param {Letter} letter */
function miss({ key, text }) {
  const time = new Date().toTimeString().slice(0, 8);
  arrive({ type: 'message', id: key, text: `[${time}] ${me}: ${text}` });
}

on(unsent, 'click', ({ target }) => {
  const letter = outbox.letters.find((m) => m.node.contains(target));
  if (!letter || !target.value) return;
  if (target.value === 'retry') outbox.retry(letter);
  if (target.value === 'delete') outbox.delete(letter);
  if (target.value === 'undo') outbox.undelete(letter);
  box.focus();
});

// ---- composing ----

/** Characters as the server counts them. @param {string} text */
const length = (text) => [...text].length;

const composer = {
  last: '',                         // the text sent last
  isComposing: false,               // letters are becoming a word

  /** Sends what the letters become, never the letters: the field loses the focus, the word is there. */
  finish() {
    box.addEventListener('compositionend', () => setTimeout(submit), { once: true });
    box.blur();
  },

  /** @param {string} text */
  write(text) {
    box.value = text;
    this.typed();
  },

  /** After every change of the field. */
  typed() {
    const left = MAX - length(box.value);
    send.disabled = left < 0;
    notice.textContent = left < 0 ? say('too_long', -left)
      : left <= MAX - COUNT_FROM ? say('chars_left', left) : '';
    notice.dataset.state = left < 0 ? 'error' : '';
    if (!CSS.supports('field-sizing', 'content')) grow();
    save();
  },

  /** @param {KeyboardEvent} e */
  key(e) {
    if (e.isComposing || e.keyCode === 229) return; // this Enter only confirms a word
    if (e.key === 'Enter' && (e.ctrlKey || e.metaKey || !(e.shiftKey || e.altKey))) {
      e.preventDefault();
      submit();
    } else if (e.key === 'ArrowUp' && !box.value && this.last) {
      e.preventDefault();
      this.write(this.last);
    }
  },

  start() {
    restore();
    on(box, 'keydown', (e) => this.key(e));
    on(box, 'input', () => this.typed());
    on(box, 'compositionstart', () => { this.isComposing = true; });
    on(box, 'compositionend', () => { this.isComposing = false; });
    on(send, 'mousedown', (e) => e.preventDefault()); // the keyboard stays
    on(form, 'submit', (e) => { e.preventDefault(); submit(); });
    on($('logout'), 'submit', logout);
    if (matchMedia('(pointer: fine)').matches) box.focus();
  },
};

/** As high as its text; CSS knows the limit. */
function grow() {
  const top = log.scrollTop;
  box.style.height = 'auto';
  box.style.height = `${box.scrollHeight + 2}px`;
  log.scrollTop = top;        // the log was higher for a moment, which may have moved it
}

/** Draft and outbox live in this tab's storage, with the name they were written under. */
function save() {
  try {
    sessionStorage.setItem(home, JSON.stringify({ name: me, draft: box.value, letters: outbox.unsent() }));
  } catch { /* full or forbidden: the page works without */ }
}

/** A name is easily typed otherwise: under another one nothing is dropped, nor sent without asking. */
function restore() {
  let kept = { name: me, draft: '', letters: [] };
  try {
    kept = JSON.parse(sessionStorage.getItem(home) ?? '') ?? kept;
  } catch { /* nothing there */ }
  const early = box.value;          // typed before this script was here
  composer.write(early === kept.draft ? early : kept.draft + early); // before the letters: it saves
  const others = kept.name === me ? {} : { state: 'failed', as: kept.name };
  for (const letter of /** @type {Letter[]} */ (kept.letters)) outbox.take(Object.assign(letter, others));
}

/** @param {Event} e */
async function logout(e) {
  e.preventDefault();
  try {
    await fetch('logout', { method: 'POST', redirect: 'manual' });
  } catch {
    notice.textContent = T.logout_failed;
    return;
  }
  sessionStorage.removeItem(home);
  forget();
  tabs.postMessage('');
  location.assign('login');
}

// ---- start ----

/** Another tab has logged out, or in with another name: this one follows. */
const tabs = new BroadcastChannel(home);
tabs.onmessage = ({ data }) => {
  if (data === '') sessionStorage.removeItem(home);
  if (data !== me) location.reload();
};
tabs.postMessage(me);

if (form) composer.start();
$('join')?.append(home.slice(0, -1));
connect(arrive);
