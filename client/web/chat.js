// The conversation in the middle of the page: what was said, and the box to say more.

import { copy } from "./clipboard.js";
import { announce, byId, element } from "./dom.js";
import { MessageView, sends } from "./message.js";
import { ServerError, chat } from "./server.js";
import { text } from "./strings.js";

const STICK_PIXELS = 60; // this near to the end, the view follows the text
const SAVE_MILLISECONDS = 2000; // while an answer comes
const ANNOUNCED_CHARACTERS = 2000;

export class Chat {
  /**
   * `changed(conversation)` is called after every change worth keeping, `needsKey()` if the server wants a key, and
   * `ready()` before something is asked: whether it may be.
   */
  constructor({ changed, needsKey, ready }) {
    this.changed = changed;
    this.ready = ready;
    this.needsKey = needsKey;
    this.answers = new Map(); // conversation → what ends the answer that is coming
    this.views = new Map(); // message → how it is shown
    this.stale = new Set(); // messages that say more than is shown
    this.log = byId("log");
    this.prompt = byId("prompt");
    this.follows = true;
    this.actions = {
      copy,
      startEdit: (message) => this.views.get(message).edit(message !== this.lastQuestion()),
      edit: (message, content) => this.editAndSend(message, content),
      regenerate: (message) => this.regenerate(message),
    };
    this.listen();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("latest").addEventListener("click", () => this.toEnd());
    this.prompt.addEventListener("input", () => this.fit());
    this.prompt.addEventListener("keydown", (event) => {
      if (!sends(event)) return;
      event.preventDefault();
      this.send();
    });
    this.log.addEventListener("scroll", () => {
      this.follows = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < STICK_PIXELS;
      byId("latest").hidden = this.follows;
    });
    this.log.addEventListener("click", (event) => {
      const button = event.target.closest("[data-copy]");
      if (button) copy(button.closest("figure").querySelector("code").textContent, button);
    });
    window.addEventListener("pagehide", () => this.interrupt());
  }

  /** Show a conversation from its beginning to its end. */
  show(conversation) {
    this.conversation = conversation;
    this.views.clear();
    this.log.replaceChildren();
    for (const message of conversation.messages) this.append(message);
    if (!conversation.messages.length) this.log.append(this.greeting());
    this.showRunning();
    this.toEnd();
  }

  get answering() {
    return this.answers.has(this.conversation);
  }

  /** Say what stands in the box. */
  send() {
    const content = this.prompt.value;
    if (!content.trim() || this.answering || !this.conversation.model || !this.ready()) return;
    this.prompt.value = "";
    this.fit();
    this.say(content);
  }

  /** End the answer that is coming; what has come stays. */
  stop() {
    this.answers.get(this.conversation)?.abort();
  }

  /** A conversation is gone: nobody wants its answer. */
  leave(conversation) {
    this.answers.get(conversation)?.abort();
    this.answers.delete(conversation);
  }

  /** The page goes, and its answers with it: keep what has come. */
  interrupt() {
    for (const conversation of [...this.answers.keys()]) {
      Object.assign(conversation.messages.at(-1), { state: "failed", error: { kind: "interrupted", message: "" } });
      this.leave(conversation);
      this.changed(conversation);
    }
  }

  say(content) {
    if (!this.conversation.messages.length) this.log.replaceChildren();
    const message = { role: "user", content };
    this.conversation.messages.push(message);
    this.append(message);
    this.toEnd();
    this.answer();
  }

  editAndSend(message, content) {
    if (!this.ready()) return;
    this.cutBefore(message);
    this.say(content);
    this.prompt.focus();
  }

  regenerate(message) {
    if (!this.ready()) return;
    this.cutBefore(message);
    this.answer();
    this.prompt.focus();
  }

  /** Drop a message and all that follow it. */
  cutBefore(message) {
    this.stop();
    const { messages } = this.conversation;
    for (const dropped of messages.splice(messages.indexOf(message))) {
      this.views.get(dropped).node.remove();
      this.views.delete(dropped);
    }
  }

  lastQuestion() {
    return this.conversation.messages.findLast((message) => message.role === "user");
  }

  /** Ask for the next answer and show it as it comes, also if another conversation is looked at meanwhile. */
  async answer() {
    const { conversation } = this;
    const body = requestOf(conversation);
    const message = { role: "assistant", content: "", state: "answering", model: conversation.model };
    const ending = new AbortController();
    conversation.messages.push(message);
    this.answers.set(conversation, ending);
    this.append(message);
    this.showRunning();
    this.changed(conversation);
    announce(text("answering"));
    try {
      await this.receive(conversation, message, chat(body, ending.signal));
      message.state = "done";
    } catch (error) {
      message.state = ending.signal.aborted ? "stopped" : "failed";
      if (message.state === "failed") message.error = this.explain(error);
    }
    if (this.answers.get(conversation) !== ending) return; // deleted meanwhile, or asked anew
    this.answers.delete(conversation);
    this.finish(conversation, message);
  }

  async receive(conversation, message, pieces) {
    const asked = performance.now();
    const stats = (message.stats = { tokens: 0, exact: false });
    let first = 0;
    let saved = asked;
    for await (const piece of pieces) {
      const now = performance.now();
      if (piece.text) {
        first ||= now;
        message.content += piece.text;
        stats.ttft = (first - asked) / 1000;
        stats.seconds = (now - first) / 1000;
        stats.tokens += 1; // at least: a piece can hold several
      }
      if (piece.finish) stats.finish = piece.finish;
      if (piece.usage) Object.assign(stats, { tokens: piece.usage.completion_tokens, exact: true });
      if (now - saved > SAVE_MILLISECONDS && this.answers.has(conversation)) {
        saved = now;
        this.changed(conversation);
      }
      this.refresh(message);
    }
  }

  explain(error) {
    if (!(error instanceof ServerError)) console.error(error);
    const { kind, message } = error instanceof ServerError ? error : { kind: "failed", message: String(error) };
    if (kind === "key") this.needsKey();
    return { kind, message };
  }

  finish(conversation, message) {
    this.stale.add(message);
    this.draw();
    this.changed(conversation);
    if (conversation !== this.conversation) return;
    this.showRunning();
    if (message.state === "done") announce(text("answer.done", message.content.slice(0, ANNOUNCED_CHARACTERS)));
    else if (message.state === "failed") announce(this.views.get(message)?.error.textContent ?? "");
    else announce(text("answer.stopped"));
  }

  /** Show a message of the conversation on view. */
  append(message) {
    const view = new MessageView(message, this.actions);
    this.views.set(message, view);
    this.log.append(view.node);
    if (this.follows) this.toEnd();
  }

  /** Show what is new in a message, at most once for each picture on the screen. */
  refresh(message) {
    if (!this.stale.size) requestAnimationFrame(() => this.draw());
    this.stale.add(message);
  }

  draw() {
    for (const message of this.stale) this.views.get(message)?.update();
    this.stale.clear();
    if (this.follows) this.toEnd();
  }

  showRunning() {
    const { answering } = this;
    const pressed = answering ? byId("send") : byId("stop");
    const focused = document.activeElement === pressed;
    byId("send").hidden = answering;
    byId("stop").hidden = !answering;
    if (focused) (answering ? byId("stop") : this.prompt).focus(); // a button that is hidden loses it to nothing
    byId("hint").dataset.text = answering ? "prompt.stopHint" : "prompt.hint";
    byId("hint").textContent = text(byId("hint").dataset.text);
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
    this.follows = true;
    byId("latest").hidden = true;
  }

  /** Let the box be as high as its text; the style sheet says how high at most. */
  fit() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
  }

  greeting() {
    const examples = text("empty.examples")
      .split("|")
      .map((example) => {
        const use = () => {
          this.prompt.value = example;
          this.fit();
          this.prompt.focus();
        };
        return element("button", { type: "button", onclick: use }, example);
      });
    return element(
      "div",
      { class: "greeting" },
      element("h2", {}, text("empty.title")),
      element("p", {}, text("empty.text")),
      element("div", { class: "examples" }, ...examples),
    );
  }
}

/**
 * The body of the request for the next answer. A question that got no text for an answer is left out: what made it fail
 * would make the next one fail too, and many chat templates want question and answer in turn.
 */
function requestOf({ model, system, sampling, messages }) {
  const told = messages.filter(({ role, content }, i) => {
    if (role === "assistant") return content;
    return i === messages.length - 1 || messages[i + 1].content;
  });
  const spoken = told.map(({ role, content }) => ({ role, content }));
  if (system.trim()) spoken.unshift({ role: "system", content: system });
  return { model, ...sampling, messages: spoken };
}
