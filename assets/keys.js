// @ts-check
/* Which message is which. Whoever sends a message draws a key for it; the server makes an id of the
   key, a ~ and a tail of its own. The id is a place in the stream, the key is the message: the same
   key again is a second copy.

   And whose: a name anybody can type, but only this browser knows the keys that it draws before it
   has sent them. So it keeps them, for its tabs and its reloads. */

/** The key of a message. A line of another program has an id with a dot, which is its own key.
 *  @param {string} id */
export const keyOf = (id) => (id.includes('.') ? id : id.split('~')[0]);

/** Draws a key: 128 bits, as text. (crypto.randomUUID does not exist on plain http.) */
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, '0')).join('');
}

const KEPT = 'chat-sent';           // their name in the browser's storage
const MOST = 1000;                  // keys kept

/** What was read last, as it stands in the storage and as a set. */
let sent = { text: '', keys: new Set() };

/** Other tabs write there too. Without a storage (forbidden, full) a page knows its own. */
function read() {
  try {
    const text = localStorage.getItem(KEPT) ?? '';
    if (text !== sent.text) sent = { text, keys: new Set(text.split(' ')) };
  } catch { /* forbidden */ }
  return sent.keys;
}

/** @param {string} key */
export const isOurs = (key) => read().has(key);

/** Before it is sent. @param {string} key */
export function keep(key) {
  const keys = [...read(), key].slice(-MOST), text = keys.join(' ');
  try {
    localStorage.setItem(KEPT, text);
  } catch { /* forbidden or full */ }
  sent = { text, keys: new Set(keys) };
}

/** Whoever comes next is somebody else. */
export function forget() {
  try {
    localStorage.removeItem(KEPT);
  } catch { /* forbidden */ }
}

/** The room's path: / or that of a proxy. */
export const home = new URL('..', import.meta.url).pathname;

/** The session has ended: to the login, and from there back to this page. */
export function logIn() {
  const page = '/' + location.pathname.slice(home.length) + location.search;
  document.cookie = `chat_next=${encodeURIComponent(page)}; path=${home}; max-age=600; samesite=lax`;
  location.assign('login');
}
