// One message as it is shown: its text, what is known of how it came about, and what can be done with it.

import { element, iconButton } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { measure, number, text } from "./strings.js";

// An answer with less than this has no rate worth telling.
const RATED_TOKENS = 3;
const RATED_SECONDS = 0.02;

export class MessageView {
  /** `actions` has edit(message, content), regenerate(message) and copy(content, button). */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = element("div", { class: "body" });
    this.thought = element("div", { class: "body" });
    this.thinking = element("details", { class: "thinking", hidden: true }, element("summary"), this.thought);
    this.meta = element("p", { class: "meta" });
    this.error = element("div", { class: "error", hidden: true });
    this.buttons = element("div", { class: "buttons" });
    const who = element("h3", { class: "unseen" }, text(message.role === "user" ? "you" : "assistant"));
    const foot = element("div", { class: "foot" }, this.meta, this.buttons);
    const parts = [who, message.role === "user" ? null : this.thinking, this.body, this.error, foot];
    this.node = element("article", { class: `message ${message.role}` }, parts);
    this.update();
  }

  /** Show the message as it is now. */
  update() {
    const { message } = this;
    this.node.dataset.state = message.state ?? "done";
    if (message.role === "user") this.body.textContent = message.content;
    else this.showAnswer();
    this.body.classList.toggle("waiting", message.state === "answering" && !message.content);
    if (message.role === "assistant") this.meta.replaceChildren(...describe(message));
    this.showError();
    this.showButtons();
  }

  showAnswer() {
    const { thought, answer, complete } = partsOf(this.message.content);
    this.thinking.hidden = !thought;
    this.thinking.firstChild.textContent = text(complete ? "thought" : "thinking");
    showMarkdown(this.thought, thought);
    showMarkdown(this.body, answer);
  }

  /** Let the text be changed in place. `drops` says whether later messages go. */
  edit(drops) {
    const leave = () => {
      form.replaceWith(this.body);
      this.buttons.hidden = false;
      this.buttons.querySelector("button")?.focus();
    };
    const save = (event) => {
      event.preventDefault();
      if (box.value.trim()) this.actions.edit(this.message, box.value);
    };
    const press = (event) => {
      if (sends(event)) save(event);
      if (event.key !== "Escape" || composes(event)) return;
      event.stopPropagation(); // it would stop an answer
      leave();
    };
    const box = element("textarea", { rows: "3", "aria-label": text("edit.label"), onkeydown: press });
    box.value = this.message.content;
    const form = element(
      "form",
      { class: "edit", onsubmit: save },
      box,
      element(
        "div",
        { class: "row end" },
        element("span", { class: "fine" }, drops ? text("edit.drop") : ""),
        element("button", { type: "button", class: "quiet", onclick: leave }, text("cancel")),
        element("button", { type: "submit", class: "primary" }, text("edit.save")),
      ),
    );
    this.body.replaceWith(form);
    this.buttons.hidden = true;
    box.focus();
  }

  showError() {
    const { state, error } = this.message;
    this.error.hidden = state !== "failed";
    if (state !== "failed") return;
    const retry = element(
      "button",
      { type: "button", class: "quiet again", onclick: () => this.actions.regenerate(this.message) },
      text("retry"),
    );
    const detail = error.message ? element("span", { class: "detail", lang: "en" }, error.message) : null;
    this.error.replaceChildren(element("p", {}, element("span", {}, text(`error.${error.kind}`)), " ", detail), retry);
  }

  showButtons() {
    const { message, actions } = this;
    const wanted = `${message.role} ${message.state} ${Boolean(message.content)}`;
    if (this.buttons.dataset.shown === wanted) return; // while it streams, the buttons keep the focus
    this.buttons.dataset.shown = wanted;
    if (message.state === "answering") return this.buttons.replaceChildren();
    const buttons = [];
    if (message.content) {
      const copy = iconButton("copy", text("copy"), () => actions.copy(message.content, copy));
      buttons.push(copy);
    }
    if (message.role === "user") {
      buttons.push(iconButton("edit", text("edit"), () => actions.startEdit(message)));
    } else if (message.state !== "failed") {
      const again = () => actions.regenerate(message); // after a failure, the error has a button for it
      buttons.push(iconButton("retry", text("regenerate"), again, { class: "icon-button again" }));
    }
    this.buttons.replaceChildren(...buttons);
  }
}

/** Whether a key press means to send: Enter alone, and not the one that ends the input of a Chinese word. */
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !composes(event);
}

/** Whether a key press belongs to an input method. Safari says so of its last one by a key code only. */
export function composes(event) {
  return event.isComposing || event.keyCode === 229;
}

/** What a reasoning model writes before its answer, in `<think>`, and the answer. */
function partsOf(content) {
  const found = /^\s*<think>([^]*?)(<\/think>|$)/.exec(content);
  if (!found) return { thought: "", answer: content, complete: true };
  return { thought: found[1].trim(), answer: content.slice(found[0].length), complete: found[2] !== "" };
}

/** What is known of how an answer came about. A narrow page leaves out what has a class, which is never the first. */
function describe({ state, stats, model, content }) {
  if (state === "answering" && !content) return [text("answer.waiting")];
  const parts = [];
  const tell = (part, name) => parts.push(element("span", { class: name }, parts.length ? " · " : null, part));
  if (stats?.tokens) tell(text(stats.exact ? "answer.tokens" : "answer.atLeast", number(stats.tokens)));
  if (stats?.tokens >= RATED_TOKENS && stats.seconds >= RATED_SECONDS) {
    tell(text("answer.rate", number((stats.tokens - 1) / stats.seconds, 1)));
  }
  if (stats?.ttft) tell(text("answer.ttft", seconds(stats.ttft)), "ttft");
  if (stats?.finish === "length") tell(text("answer.length"));
  if (state === "stopped") tell(text("answer.stopped"));
  if (state === "done" && !content) tell(text("answer.empty"));
  if (!content) tell(text("answer.leftOut"));
  if (model) tell(model, "model");
  return parts;
}

function seconds(value) {
  return value < 1 ? measure(value * 1000, "millisecond") : measure(value, "second", 1);
}
