// @ts-check
/* What a text is made of: plain text, `code`, blocks of code between ``` fences, links. Fences and
   backticks are those of CommonMark where it matters in a chat. A text has at most forty pieces of
   its own, the rest stays plain: thousands of them would stop every page of the room.

     pieces     a text as a list of pieces
     cut        the pieces that a folded text shows, and the rest */

/** @typedef {{kind: 'text' | 'code' | 'block' | 'link', text: string, language?: string}} Piece */

const MOST = 40;                    // pieces of its own in a text
const LANGUAGE = 20;                // characters of a block's language
const FRAME = 2;                    // lines that a block takes beside its own

/** @param {string} text @returns {Piece[]} */
export function pieces(text) {
  const out = new Collector();
  const lines = text.split('\n');
  /** Lines of no block, until there is one. @type {string[]} */
  let plain = [];
  for (let i = 0; i < lines.length; i++) {
    const block = out.isFull() ? null : readBlock(lines, i);
    if (!block) {
      plain.push(lines[i]);
      continue;
    }
    if (block.before) plain.push(block.before);
    if (plain.length) inline(plain.join('\n'), out);
    out.add({ kind: 'block', text: block.code, language: block.language });
    plain = [];
    i = block.end;
  }
  if (plain.length) inline(plain.join('\n'), out);
  return out.list;
}

class Collector {
  /** @type {Piece[]} */
  list = [];
  own = 0;                          // pieces that are not plain

  isFull() { return this.own >= MOST; }

  /** @param {Piece} piece */
  add(piece) {
    this.list.push(piece);
    this.own++;
  }

  /** Plain text; no piece is empty, and no two plain ones follow each other. @param {string} text */
  plain(text) {
    const last = this.list[this.list.length - 1];
    if (last && last.kind === 'text') last.text += text;
    else if (text) this.list.push({ kind: 'text', text });
  }
}

/** A fence: up to three spaces, three or more backticks, a language. */
const FENCE = /^( {0,3})(`{3,})([^`]*)$/;
/** One at the end of a line of text. Then at most one word follows it. */
const LATE_FENCE = /^(.*[^`])(`{3,})([\w+#.-]*) *$/;

/** The block of code that begins in this line: what stands before it, and its last line. An unclosed
 *  one ends with the message. @param {string[]} lines @param {number} i */
function readBlock(lines, i) {
  const [, indent, run, language] = FENCE.exec(lines[i]) ?? [];
  const fence = run ? { before: '', indent, run, language } : lateFence(lines[i]);
  if (!fence) return null;
  let end = i + 1;
  while (end < lines.length && !closes(lines[end], fence.run)) end++;
  const code = lines.slice(i + 1, end).map((line) => unindent(line, fence.indent.length)).join('\n');
  if (!code.trim()) return null;
  return { before: fence.before, code, end, language: fence.language.trim().split(/\s/)[0].slice(0, LANGUAGE) };
}

/** @param {string} line */
function lateFence(line) {
  const [, before, run, language] = LATE_FENCE.exec(line) ?? [];
  const runs = before?.match(/`+/g)?.filter((r) => r === run).length ?? 0;
  return run && runs % 2 === 0 ? { before, indent: '', run, language } : null; // else it ends `code`
}

/** @param {string} line @param {string} run */
const closes = (line, run) => (/^ {0,3}(`{3,}) *$/.exec(line)?.[1].length ?? 0) >= run.length;

/** @param {string} line @param {number} n */
const unindent = (line, n) => line.replace(/^ */, (spaces) => spaces.slice(n));

/** Text of no block: code within a line, and links. @param {string} text @param {Collector} out */
function inline(text, out) {
  text.split('\n').forEach((line, i) => {
    if (i) out.plain('\n');
    spans(line, out);
  });
}

/** Code stands between two runs of as many backticks. @param {string} line @param {Collector} out */
function spans(line, out) {
  /** @type {string[]} */
  const parts = line.match(/`+|[^`]+/g) ?? [];
  for (let i = 0; i < parts.length; i++) {
    const end = parts[i][0] === '`' && !out.isFull() ? parts.indexOf(parts[i], i + 1) : -1;
    if (end < 0) {
      links(parts[i], out);
    } else {
      const text = parts.slice(i + 1, end).join('');
      out.add({ kind: 'code', text: text.trim() ? text.replace(/^ (.*) $/, '$1') : text });
      i = end;
    }
  }
}

/** Letters of any script belong to an address, else it would be cut to another one. */
const ADDRESS = /https?:\/\/[\p{L}\p{N}[][\p{L}\p{M}\p{N}._~:/?#[\]@!$&'()*+,;=%-]*/giu;

/** @param {string} text @param {Collector} out */
function links(text, out) {
  let at = 0;
  for (const m of text.matchAll(ADDRESS)) {
    const url = withoutEnd(m[0]);
    if (out.isFull() || !isLink(url)) continue;
    out.plain(text.slice(at, m.index));
    out.add({ kind: 'link', text: url });
    at = (m.index ?? 0) + url.length;
  }
  out.plain(text.slice(at));
}

/** An address without what only ends the sentence. @param {string} url */
function withoutEnd(url) {
  /** Closing brackets that nothing opens. @type {Record<string, number>} */
  const extra = { ')': url.split(')').length - url.split('(').length,
    ']': url.split(']').length - url.split('[').length };
  let end = url.length;
  while (/[.,;:!?'*]/.test(url[end - 1]) || extra[url[end - 1]]-- > 0) end--;
  return url.slice(0, end);
}

/** Not if it names a user: http://this-site@evil.example/ goes to the other one. @param {string} url */
function isLink(url) {
  try {
    const { username, password } = new URL(url);
    return !username && !password;
  } catch {
    return false;
  }
}

/** Cuts a list of pieces behind so many characters and lines. Half a link would be another one.
 *  @param {Piece[]} list @param {number} chars @param {number} lines */
export function cut(list, chars, lines) {
  /** @type {[Piece[], Piece[]]} */
  const [head, rest] = [[], []];
  for (const piece of list) {
    const { text, kind } = piece;
    const fits = rest.length ? 0 : fitting(text, chars, lines);
    const n = kind === 'link' && fits < text.length ? 0 : fits;
    if (n > 0) head.push({ ...piece, text: text.slice(0, n) });
    if (n < text.length) rest.push({ ...piece, text: text.slice(n) });
    chars -= n;
    lines -= text.slice(0, n).split('\n').length + (kind === 'block' ? FRAME : -1);
  }
  return [head, rest];
}

/** How much of a text fits. @param {string} text @param {number} chars @param {number} lines */
function fitting(text, chars, lines) {
  let n = -1;
  for (let line = 0; line < lines; line++) {
    n = text.indexOf('\n', n + 1);
    if (n < 0) break;
  }
  n = Math.max(0, Math.min(lines < 1 ? 0 : n < 0 ? text.length : n, chars));
  return n < text.length && /[\ud800-\udbff]/.test(text[n - 1]) ? n - 1 : n; // not half a character
}
