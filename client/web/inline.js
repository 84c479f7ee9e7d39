// Inside a block of Markdown: emphasis, code, links. What markdown.js says of safety and time holds here too.

import { element } from "./dom.js";
import { characterOf } from "./entities.js";

export const MAX_DEPTH = 8; // of what can stand in each other: what lies deeper is shown as it is written

const PLAIN = /[^\\`*_~[!h\n&<]+/y;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const TARGET = /\( *<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?: +"[^"]*")? *\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`|，。；：！？、（）【】《》“”]{1,2000}/y;
const BRACKETED = /<(https?:\/\/[^\s<>]{1,2000})>/iy;
const ENTITY = /&(#\d{1,7}|#[xX][\da-fA-F]{1,6}|[A-Za-z][A-Za-z\d]{1,31});/y;
const EMPHASIS = { "**": "strong", "__": "strong", "~~": "del", "*": "em", "_": "em" };

/** The nodes of a text. `linked`: it is the label of a link, and holds no other. */
export function inline(source, depth = 0, linked = false) {
  return new Inline(source, depth, linked).nodes();
}

class Inline {
  constructor(source, depth, linked) {
    this.source = source;
    this.depth = depth;
    this.linked = linked; // inside a link: no other
    this.at = 0;
    this.found = [];
    this.plain = "";
    this.hopeless = new Set(); // marks that have no partner from here on
    this.brackets = source.includes("]") ? partners(source) : new Map();
  }

  nodes() {
    while (this.at < this.source.length) this.step();
    this.flush();
    return this.found;
  }

  step() {
    const run = this.match(PLAIN);
    if (run) return this.text(run[0], run[0].length);
    const char = this.source[this.at];
    const taken =
      (char === "\\" && this.escape()) ||
      (char === "\n" && this.push(element("br"), 1)) ||
      (char === "`" && this.code()) ||
      ("*_~".includes(char) && this.emphasis()) ||
      ("[!".includes(char) && this.link()) ||
      (char === "h" && this.address()) ||
      (char === "<" && this.bracketed()) ||
      (char === "&" && this.entity());
    return taken || this.text(char, 1);
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    return pattern.exec(this.source);
  }

  text(content, length) {
    this.plain += content;
    this.at += length;
    return true;
  }

  push(node, length) {
    this.flush();
    this.found.push(node);
    this.at += length;
    return true;
  }

  flush() {
    if (this.plain) this.found.push(document.createTextNode(this.plain));
    this.plain = "";
  }

  escape() {
    const next = this.source[this.at + 1];
    if (next === "\n") return this.push(element("br"), 2);
    return next !== undefined && ESCAPABLE.test(next) && this.text(next, 2);
  }

  code() {
    const mark = runAt(this.source, this.at);
    const start = this.at + mark.length;
    const end = this.hopeless.has(mark) ? -1 : findRun(this.source, mark, start);
    if (end < 0) {
      this.hopeless.add(mark);
      return this.text(mark, mark.length);
    }
    const content = this.source.slice(start, end).replaceAll("\n", " ");
    const padded = content.startsWith(" ") && content.endsWith(" ") && content.trim();
    return this.push(element("code", {}, padded ? content.slice(1, -1) : content), end + mark.length - this.at);
  }

  emphasis() {
    const double = this.source.slice(this.at, this.at + 2);
    const mark = double in EMPHASIS ? double : this.source[this.at];
    const start = this.at + mark.length;
    if (!(mark in EMPHASIS) || this.depth >= MAX_DEPTH || this.hopeless.has(mark) || !this.opens(mark, start)) {
      return this.text(mark, mark.length);
    }
    const end = this.closing(mark, start);
    if (end < 0) {
      this.hopeless.add(mark);
      return this.text(mark, mark.length);
    }
    const content = inline(this.source.slice(start, end), this.depth + 1, this.linked);
    return this.push(element(EMPHASIS[mark], {}, content), end + mark.length - this.at);
  }

  opens(mark, start) {
    const next = this.source[start];
    const inWord = mark[0] === "_" && this.at > 0 && WORD.test(this.source[this.at - 1]);
    return next !== undefined && !/\s/.test(next) && !inWord;
  }

  /** Where the partner of an opening mark stands, or -1. Code and escaped characters are passed over. */
  closing(mark, start) {
    const { source } = this;
    for (let i = start; i < source.length;) {
      if (source[i] === "\\") {
        i += 2;
      } else if (source[i] === "`") {
        const run = runAt(source, i);
        const end = this.hopeless.has(run) ? -1 : findRun(source, run, i + run.length);
        if (end < 0) this.hopeless.add(run);
        i = end < 0 ? i + run.length : end + run.length;
      } else if (source[i] === mark[0]) {
        const run = runAt(source, i);
        if (i > start && closesHere(source, i, run, mark)) return i + run.length - mark.length;
        i += run.length;
      } else {
        i += 1;
      }
    }
    return -1;
  }

  /** A link, or an image, which is shown as a link: the page loads nothing from elsewhere. */
  link() {
    const image = this.source[this.at] === "!";
    const open = image ? this.at + 1 : this.at;
    const close = this.source[open] === "[" ? this.brackets.get(open) : undefined;
    if (this.linked || close === undefined || this.source[close + 1] !== "(") return false;
    TARGET.lastIndex = close + 1;
    const target = TARGET.exec(this.source);
    const url = target && webAddress(target[1]);
    if (!url) return false;
    const label = this.source.slice(open + 1, close);
    return this.push(anchor(url, label ? inline(label, this.depth + 1, true) : [url]), TARGET.lastIndex - this.at);
  }

  address() {
    if (this.linked || (this.at > 0 && WORD.test(this.source[this.at - 1]))) return false;
    const written = trimmed(this.match(ADDRESS)?.[0] ?? "");
    const url = webAddress(written);
    return url !== null && this.push(anchor(url, [written]), written.length);
  }

  /** An address between `<` and `>`, which end it wherever it ends. */
  bracketed() {
    const found = this.linked ? null : this.match(BRACKETED);
    const url = found && webAddress(found[1]);
    return Boolean(url) && this.push(anchor(url, [found[1]]), found[0].length);
  }

  entity() {
    const found = this.match(ENTITY);
    const character = found && characterOf(found[1]);
    return Boolean(character) && this.text(character, found[0].length);
  }
}

/** For each `[` of a text, where its `]` is. */
function partners(source) {
  const found = new Map();
  const open = [];
  for (let i = 0; i < source.length; i += 1) {
    if (source[i] === "\\") i += 1;
    else if (source[i] === "[") open.push(i);
    else if (source[i] === "]" && open.length) found.set(open.pop(), i);
  }
  return found;
}

/** The run of one character that begins at `at`. */
function runAt(source, at) {
  let end = at + 1;
  while (source[end] === source[at]) end += 1;
  return source.slice(at, end);
}

/** Where the next run that is exactly `run` begins, or -1. */
function findRun(source, run, from) {
  for (let at = source.indexOf(run, from); at >= 0; at = source.indexOf(run, at)) {
    const found = runAt(source, at);
    if (found === run) return at;
    at += found.length;
  }
  return -1;
}

function closesHere(source, at, run, mark) {
  if (run.length < mark.length || (mark.length === 1 && run.length === 2)) return false;
  const after = source[at + run.length];
  const inWord = mark[0] === "_" && after !== undefined && WORD.test(after);
  return !/\s/.test(source[at - 1]) && !inWord;
}

/** An address without the punctuation of the sentence that it ends. */
function trimmed(address) {
  const closing = address.includes("(") ? ".,;:!?*_~]}" : ".,;:!?*_~]})";
  let end = address.length;
  while (end > 0 && closing.includes(address[end - 1])) end -= 1;
  return address.slice(0, end);
}

/** The address if it may be followed: absolute, http or https; else null. */
function webAddress(written) {
  if (!URL.canParse(written)) return null;
  const url = new URL(written);
  return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
}

function anchor(url, label) {
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, label);
}
