// The blocks of Markdown: from lines to what they are. Each has its source, by which an unchanged one is known.
// What markdown.js says of time holds here too.

import { MAX_DEPTH } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const UNDERLINE = /^ {0,3}(={2,}|-{2,})[ \t]*$/; // one mark alone may be a list that is still being written
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^[ \t]*([-*+]|\d{1,9}[.)])(?: +|$)/;
const TASK = /^\[([ xX])\][ \t]+(?=\S)/;
const TABLE_LINE = /^[ :|-]+$/;

/** The blocks that `lines` are, at so much `depth` inside others. */
export function parse(lines, depth = 0) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

/** The block that begins at line `at`, and the line after it. */
function blockAt(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return codeAt(lines, at);
  if (HEADING.test(line)) return [headingOf(line), at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quoteAt(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return listAt(lines, at, depth);
  if (isTable(lines, at)) return tableAt(lines, at);
  return paragraphAt(lines, at);
}

function codeAt(lines, at) {
  const [, fence, info] = FENCE.exec(lines[at]);
  const indent = indentOf(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], fence)) end += 1;
  const code = lines
    .slice(at + 1, end)
    .map((line) => dedent(line, indent))
    .join("\n");
  return [{ kind: "code", language: info.trim().split(" ")[0], code }, Math.min(end + 1, lines.length)];
}

function closes(line, fence) {
  const ending = line.trim();
  return ending.length >= fence.length && indentOf(line) < 4 && ending === fence[0].repeat(ending.length);
}

function headingOf(line) {
  const [start, marks] = HEADING.exec(line);
  let content = line.slice(start.length).trimEnd();
  let end = content.length;
  while (content[end - 1] === "#") end -= 1;
  if (end === 0 || content[end - 1] === " ") content = content.slice(0, end);
  return { kind: "heading", level: marks.length, content: content.trim() };
}

function quoteAt(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return [
    {
      kind: "quote",
      blocks: parse(
        lines.slice(at, end).map((line) => line.replace(QUOTE, "")),
        depth + 1,
      ),
    },
    end,
  ];
}

function listAt(lines, at, depth) {
  const outer = indentOf(lines[at]);
  const marker = ITEM.exec(lines[at])[1];
  const ordered = /\d/.test(marker);
  const items = [];
  let end = at;
  while (end < lines.length && isItem(lines[end], outer, ordered)) {
    const [item, next] = itemAt(lines, end, outer);
    items.push(itemOf(item, depth));
    end = next;
  }
  return [{ kind: "list", start: ordered ? Number.parseInt(marker, 10) : null, items }, end];
}

/** Whether a line begins an item of the list whose items begin at `outer`. Two more spaces are a list inside. */
function isItem(line, outer, ordered) {
  const found = ITEM.exec(line);
  return found !== null && indentOf(line) < outer + 2 && /\d/.test(found[1]) === ordered && !RULE.test(line);
}

/** The lines of one item without their indent, and the line after it. */
function itemAt(lines, at, outer) {
  const start = ITEM.exec(lines[at])[0];
  const width = outer + start.trimStart().length;
  const item = [lines[at].slice(start.length)];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const indent = indentOf(line);
    const continues = lines[end - 1].trim() && !beginsBlock(line) && !ITEM.test(line);
    if (line.trim() && indent < outer + 2 && !continues) break;
    item.push(dedent(line, width));
  }
  return [item, end];
}

/** What an item holds. `done` is null unless it is a task. */
function itemOf([first, ...rest], depth) {
  const task = TASK.exec(first);
  const lines = [task ? first.slice(task[0].length) : first, ...rest];
  return { done: task ? task[1] !== " " : null, blocks: parse(lines, depth + 1) };
}

function isTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !TABLE_LINE.test(lines[at + 1])) return false;
  return (
    lines[at + 1].includes("-") &&
    lines[at + 1].includes("|") &&
    cells(lines[at]).length === cells(lines[at + 1]).length
  );
}

function tableAt(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => {
    const right = cell.endsWith(":");
    return right ? (cell.startsWith(":") ? "center" : "right") : null;
  });
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const rows = lines.slice(at + 2, end).map((line) => {
    const row = cells(line);
    return head.map((_, column) => row[column] ?? "");
  });
  return [{ kind: "table", head, align, rows }, end];
}

/** The cells of a table's line; `\|` is no border. */
function cells(line) {
  const found = [];
  let cell = "";
  for (let i = 0; i < line.length; i += 1) {
    if (line[i] === "\\" && line[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (line[i] === "|") {
      found.push(cell.trim());
      cell = "";
    } else {
      cell += line[i];
    }
  }
  found.push(cell.trim());
  if (line.trimStart().startsWith("|")) found.shift();
  if (found.length > 1 && line.trimEnd().endsWith("|")) found.pop();
  return found;
}

/** A paragraph; if its last line is underlined, a heading. */
function paragraphAt(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines[end]) && !isTable(lines, end)) end += 1;
  const content = lines
    .slice(at, end)
    .map((line) => line.trimStart())
    .join("\n")
    .trimEnd();
  const underline = end < lines.length ? UNDERLINE.exec(lines[end]) : null;
  if (underline) return [{ kind: "heading", level: underline[1][0] === "=" ? 1 : 2, content }, end + 1];
  return [{ kind: "paragraph", content }, end];
}

/** Whether a line ends a paragraph before it. A number does only if it is 1: it may be a year. */
function beginsBlock(line) {
  const item = ITEM.exec(line);
  if (item && item[0].length < line.length && (!/\d/.test(item[1]) || Number.parseInt(item[1], 10) === 1)) return true;
  return [FENCE, HEADING, RULE, UNDERLINE, QUOTE].some((start) => start.test(line));
}

/** The columns of white space before a line's text; a tab is four. */
function indentOf(line) {
  const space = line.slice(0, line.length - line.trimStart().length);
  return space.length + 3 * (space.split("\t").length - 1);
}

/** The line without its first `columns` columns, as far as they are white space. */
function dedent(line, columns) {
  let at = 0;
  for (let left = columns; left > 0 && (line[at] === " " || line[at] === "\t"); at += 1)
    left -= line[at] === " " ? 1 : 4;
  return line.slice(at);
}
