// The part of Markdown that models write, as DOM nodes.
//
// A model's text is not to be trusted. It only ever becomes text nodes and attributes of elements that are named here:
// HTML in it is shown as it is written, images become links, and only links to http and https can be followed. The time
// is linear in the length of the text: what is searched for in vain once is not searched for again, and nesting ends at
// MAX_DEPTH.

import { parse } from "./blocks.js";
import { element, icon } from "./dom.js";
import { inline } from "./inline.js";
import { text as string } from "./strings.js";

/** Show `source` in `container`. Called again with more text, it leaves alone what has not changed. */
export function showMarkdown(container, source) {
  const blocks = parse(source.replace(/\r\n?/g, "\n").split("\n"));
  const shown = container.shownBlocks ?? [];
  blocks.forEach((block, i) => {
    const before = shown[i];
    if (before && before.source === block.source) {
      block.node = before.node;
    } else if (before && before.kind === "code" && block.kind === "code" && before.language === block.language) {
      block.node = before.node; // it grows in place, so that it keeps its scroll position
      block.node.querySelector("code").textContent = block.code;
    } else {
      block.node = render(block);
      if (before) before.node.replaceWith(block.node);
      else container.append(block.node);
    }
  });
  for (const gone of shown.slice(blocks.length)) gone.node.remove();
  container.shownBlocks = blocks;
}

function render(block) {
  switch (block.kind) {
    case "code":
      return renderCode(block);
    case "heading": // under the page's own headings
      return element(
        "div",
        { role: "heading", "aria-level": block.level + 2, class: `h${block.level}` },
        inline(block.content),
      );
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, block.blocks.map(render));
    case "list":
      return renderList(block);
    case "table":
      return renderTable(block);
    default:
      return element("p", {}, inline(block.content));
  }
}

function renderCode({ language, code }) {
  const copy = element(
    "button",
    { type: "button", class: "quiet", "data-copy": "code" },
    icon("copy"),
    string("copy.code"),
  );
  return element(
    "figure",
    { class: "code" },
    element("figcaption", {}, element("span", {}, language), copy),
    element("pre", { tabindex: "0" }, element("code", {}, code)),
  );
}

function renderList({ start, items }) {
  const contents = items.map(renderItem);
  return start === null ? element("ul", {}, contents) : element("ol", { start: start === 1 ? null : start }, contents);
}

function renderItem({ done, blocks }) {
  const [first, ...rest] = blocks;
  const children = first?.kind === "paragraph" ? inline(first.content).concat(rest.map(render)) : blocks.map(render);
  if (done === null) return element("li", {}, children);
  const label = string(done ? "task.done" : "task.open");
  const box = element("input", { type: "checkbox", disabled: true, checked: done, "aria-label": label });
  return element("li", { class: "task" }, box, children);
}

function renderTable({ head, align, rows }) {
  const row = (tag, contents) =>
    element(
      "tr",
      {},
      contents.map((cell, i) => element(tag, { class: align[i] && `align-${align[i]}` }, inline(cell))),
    );
  const table = element(
    "table",
    {},
    element("thead", {}, row("th", head)),
    element(
      "tbody",
      {},
      rows.map((cells) => row("td", cells)),
    ),
  );
  return element("div", { class: "table", tabindex: "0" }, table);
}
