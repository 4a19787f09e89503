// @ts-check
/* Which message is which. Whoever sends a message draws a key for it; the server makes an id of the
   key, a ~ and a tail of its own. The id is a place in the stream, the key is the message: the same
   key again is a second copy. */

/** The key of a message. A line of another program has an id with a dot, which is its own key.
 *  @param {string} id */
export const keyOf = (id) => (id.includes('.') ? id : id.split('~')[0]);

/** Draws a key: 128 bits, as text. (crypto.randomUUID does not exist on plain http.) */
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, '0')).join('');
}
