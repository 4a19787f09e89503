// @ts-check
/* How events reach the page. A browser opens at most six connections to a server, and a stream
   keeps one for ever: with a stream in each tab, the seventh tab would not even load. So the tabs
   of one browser share one stream.

   The file is read twice. As a module of the page it exports connect(), which asks the shared
   worker for events and, where there is none, opens a stream in the tab itself. As the script of
   that worker it runs serve(): one stream in, every event out to every tab.

     openStream   an EventSource that is watched, reopened, and works behind a proxy that
                  holds answers back
     connect      page: the shared worker, else a stream of our own
     alone        page: that stream, let go while hidden if another tab has one
     serve        worker: hands the stream to all tabs, and what came lately to a new one
*/

/** What is told to the page: the events of the server (message, ping, wait, gap) and our own:
 *  down (the stream is lost), login (the server wants a session), unknown and hello (see serve).
 *  @typedef {{type: string, id?: string, text?: string}} Told */

const SELF = import.meta.url;
const STREAM = new URL('../stream', SELF);
const FIRST_WORD = 5_000;   // without an event for so long after opening: the answer is held back
const SILENCE = 38_000;     // without an event for so long: dead (the server pings every 15 s)
const STALE = 20_000;       // the same, when somebody has just come back to the page
const PATIENCE = 5_000;     // the worker answers within this time, or we do without it
const RECENT = 1000;        // events the worker keeps for a new tab

/** Opens the stream behind the event named by `after` ('' is: what a newcomer gets).
 *  @param {string} after @param {(e: Told) => void} tell */
export function openStream(after, tell) {
  let cursor = after;
  let wait = '';            // '' a stream; '0' one answer, to try the way; '25s' long polling
  let heard = 0;            // when the last event came
  let quiet = true;         // no event since the connection was opened
  let errors = 0;           // errors since the last event
  let refusals = 0;         // answers that were none since the last event
  let isDown = false, isClosed = false;
  let timer = 0;
  /** @type {EventSource} */
  let source;

  /** @param {string} mode see wait */
  function open(mode) {
    if (isClosed) return;
    source?.close();
    wait = mode;
    quiet = true;
    heard = Date.now();
    source = new EventSource(STREAM + '?' + new URLSearchParams({
      ...(cursor && { after: cursor }), ...(wait && { wait }) }));
    for (const type of ['message', 'ping', 'wait', 'gap']) source.addEventListener(type, receive);
    source.onerror = fail;
    expect(wait === '25s' ? SILENCE : FIRST_WORD);
  }

  /** Something must come within this time. @param {number} ms */
  function expect(ms, then = silent) {
    clearTimeout(timer);
    timer = setTimeout(then, ms);
  }

  /** @param {MessageEvent} e */
  function receive(e) {
    heard = Date.now();
    quiet = false;
    errors = refusals = 0;
    // A gap that is no entry of the log names the message before it, which is not its id.
    const id = e.type === 'gap' && e.lastEventId === cursor ? '' : e.lastEventId;
    cursor = e.lastEventId || cursor;
    // A ping without an id, before any message: the server itself is still waiting for its room.
    const type = e.type === 'ping' && !e.lastEventId ? 'wait' : e.type;
    if (type !== 'wait') isDown = false;
    tell({ type, id, text: e.data });
    if (wait === '0' && e.type === 'ping') open('25s'); // short answers pass, streams do not
    else expect(SILENCE);
  }

  /** Nothing came: try whether a short answer passes; if not that either, the way is dead. */
  function silent() {
    if (wait === '' && quiet) return open('0');
    down();
    wait === '0' ? later() : open('');
  }

  /** The connection ended. EventSource comes back by itself, unless it was refused. */
  function fail() {
    quiet = true;
    if (source.readyState === EventSource.CLOSED || wait === '0') return refused();
    if (wait === '' || ++errors > 1) down();            // a long poll ends, that is its nature
    expect(wait === '' ? 2 * FIRST_WORD : SILENCE);
  }

  /** EventSource keeps the status to itself: ask for it. */
  async function refused() {
    const gone = source;
    gone.close();
    down();
    expect(FIRST_WORD, later); // if this gets no answer either
    const res = await fetch(STREAM + '?wait=0', { method: 'HEAD' }).catch(() => null);
    if (gone !== source) return;
    if (res?.status === 401) tell({ type: 'login' });
    later(Number(res?.headers.get('Retry-After')));
  }

  /** Opens again after a pause that grows, and that is not the same for a whole class. */
  function later(seconds = 0) {
    source.close();
    const pause = Math.max(seconds || 0, Math.min(10, 2 ** refusals++ / 2));
    expect(pause * 1000 * (1 + Math.random()), () => open(''));
  }

  function down() {
    if (!isDown) tell({ type: 'down' });
    isDown = true;
  }

  open('');
  return {
    /** Somebody looks: is the stream still good? */
    check() {
      if (isDown || Date.now() - heard > (wait ? SILENCE : STALE)) open(wait === '25s' ? wait : '');
    },
    close() {
      isClosed = true;
      clearTimeout(timer);
      source.close();
    },
  };
}

/** Tells the page every event from now on. @param {(e: Told) => void} tell */
export function connect(tell) {
  let cursor = '';
  /** @param {Told} e */
  const hear = (e) => { cursor = e.id || cursor; tell(e); };
  const leave = () => { link = alone(() => cursor, hear); };
  /** @type {{check: () => void, close: () => void}} */
  let link;
  try {
    link = shared(() => cursor, hear, leave);
  } catch {                 // no such thing here, or not allowed
    leave();
  }

  const check = () => document.hidden || link.check();
  document.addEventListener('visibilitychange', check);
  addEventListener('online', check);
  addEventListener('pagehide', () => link.close());
  // From the back/forward cache, in which Safari wakes streams that were closed.
  addEventListener('pageshow', (e) => e.persisted && location.reload());
}

/** Events from the worker. @param {() => string} cursor @param {(e: Told) => void} hear
 *  @param {() => void} giveUp called when the worker does not answer */
function shared(cursor, hear, giveUp) {
  // @ts-ignore: the page takes a script's address from a policy alone
  const policy = globalThis.trustedTypes?.createPolicy('chat', { createScriptURL: (url) => url });
  const url = policy?.createScriptURL(SELF) ?? SELF;
  const worker = new SharedWorker(url, { type: 'module', name: 'chat' });
  let patience = setTimeout(dead, PATIENCE);

  /** @param {object} question */
  const ask = (question) => {
    worker.port.postMessage(question);
    patience = patience || setTimeout(dead, PATIENCE);
  };
  const close = () => {
    worker.port.postMessage({ bye: true });
    worker.port.onmessage = worker.onerror = null;
    clearTimeout(patience);
    clearInterval(pulse);
  };
  function dead() { close(); giveUp(); }

  worker.onerror = dead;
  worker.port.onmessage = ({ data }) => {
    clearTimeout(patience);
    patience = 0;
    const has = (/** @type {string} */ type) => data.some((/** @type {Told} */ e) => e.type === type);
    if (has('unknown')) dead();
    else if (has('hello')) ask({ after: cursor() });
    else data.forEach(hear);
  };
  const check = () => ask({ check: true });
  const pulse = setInterval(check, SILENCE);
  return { check, close };
}

/** A stream of this tab's own. Every 30 s a hidden tab asks whether another one has a stream and
 *  lets its own go if so, else takes one; a tab that is seen always has one.
 *  @param {() => string} cursor @param {(e: Told) => void} hear */
function alone(cursor, hear) {
  const rank = Math.random();
  const others = new BroadcastChannel(SELF);
  /** @type {ReturnType<typeof openStream> | null} */
  let stream = null;
  let answered = false;
  const take = () => { stream = stream ?? openStream(cursor(), hear); };
  const letGo = () => { stream?.close(); stream = null; };

  /** Of two hidden tabs the lower rank keeps its stream. */
  others.onmessage = ({ data }) => {
    if (data.rank === undefined) {
      answered = true;
      if (document.hidden) letGo();
    } else if (stream && (!document.hidden || rank < data.rank)) others.postMessage({});
  };
  const pulse = setInterval(() => {
    if (!document.hidden) return;
    answered = false;
    others.postMessage({ rank });
    setTimeout(() => answered || take(), 1000);
  }, 30_000);

  take();
  return {
    check() { stream ? stream.check() : take(); },
    close() { letGo(); clearInterval(pulse); others.close(); },
  };
}

/** The worker: one stream, every event to every tab. */
function serve() {
  /** @type {Told[]} */
  const recent = [];
  /** @type {Set<MessagePort>} */
  const tabs = new Set();
  /** Tabs that came back with a cursor before the backlog was here. @type {Map<MessagePort, string>} */
  const early = new Map();
  let ready = false, lost = false;

  /** @param {Told} e */
  function tell(e) {
    if (e.type !== 'login' && e.type !== 'wait') lost = e.type === 'down';
    const last = recent[recent.length - 1]; // a ping that is a place of its own: the newest entry is a gap
    if (e.type === 'message' || e.type === 'gap' || e.type === 'ping' && e.id !== last?.id) recent.push(e);
    if (recent.length > RECENT) recent.shift();
    for (const port of tabs) port.postMessage([e]);
    if (lost) for (const port of early.keys()) port.postMessage([e]);
    if (e.type !== 'ping' || ready) return;
    ready = true;
    early.forEach((after, port) => join(port, after));
  }

  /** A new tab gets what came lately, one that comes back what followed its cursor; a cursor we
   *  do not know is "unknown": that tab asks the server itself. @param {MessagePort} port */
  function join(port, after = '') {
    early.delete(port);
    const now = { type: lost ? 'down' : ready ? 'ping' : 'wait' };
    const back = after !== '' && after !== '0';
    const at = recent.map((e) => e.id).lastIndexOf(after);
    if (back && ready && at < 0) return port.postMessage([{ type: 'unknown' }]);
    if (back && !ready) early.set(port, after);
    else tabs.add(port);
    port.postMessage(early.has(port) ? [now] : [...recent.slice(back ? at + 1 : 0), now]);
  }

  const stream = openStream('', tell);
  // @ts-ignore: a name of the worker's world
  self.onconnect = (/** @type {MessageEvent} */ { ports: [port] }) => {
    port.onmessage = ({ data }) => {
      if (data.bye) return tabs.delete(port), early.delete(port);
      if (!data.check) return join(port, data.after);
      stream.check();
      port.postMessage([]);
    };
    // Safari starts a worker that died anew, with the tabs it had: they have to join again.
    port.postMessage([{ type: 'hello' }]);
  };
}

if ('SharedWorkerGlobalScope' in globalThis) serve();
