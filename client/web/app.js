// The page: puts its parts together, and keeps the list of conversations.

import { Chat } from "./chat.js";
import { announce, byId, element, iconButton, setIcon, setLabel } from "./dom.js";
import { Figures } from "./figures.js";
import * as history from "./history.js";
import { KeyDialog, apiKey, forgetKey } from "./key.js";
import { composes } from "./message.js";
import { Monitor } from "./monitor.js";
import { notify } from "./notice.js";
import { Panels } from "./panels.js";
import { models } from "./server.js";
import { Settings } from "./settings.js";
import { device, tab } from "./storage.js";
import { language, localise, switchLanguage, text } from "./strings.js";

const CURRENT = "mindspore-ui/current"; // in this tab: the conversation on view
const THEME = "mindspore-ui/theme";
const THEMES = ["auto", "light", "dark"];

class App {
  constructor() {
    for (const button of document.querySelectorAll("[data-icon]")) setIcon(button, button.dataset.icon);
    this.panels = new Panels();
    this.figures = new Figures();
    this.keyDialog = new KeyDialog(() => this.tryKey());
    this.chat = new Chat({
      changed: (conversation) => this.store(conversation),
      needsKey: () => this.keyDialog.ask(),
      ready: () => this.mayAsk(),
    });
    this.settings = new Settings(() => this.conversation.messages.length && this.store(this.conversation));
    this.monitor = new Monitor(
      () => this.showState(),
      () => this.panels.isOpen("status"),
    );
    this.conversations = history.conversations();
    this.models = [];
    this.listen();
    this.showTheme();
    localise();
    const last = this.conversations.find(({ id }) => id === tab.get(CURRENT));
    this.show(last ?? history.newConversation(this.conversations[0]));
    this.showState();
    if (matchMedia("(pointer: fine)").matches) byId("prompt").focus();
    this.monitor.run();
  }

  listen() {
    const on = (id, action) => byId(id).addEventListener("click", action);
    on("new", () => this.startNew());
    on("delete-all", () => this.removeAll());
    on("export", () => download(history.exported(this.conversation)));
    on("theme", () => this.nextTheme());
    on("language", () => this.changeLanguage());
    on("enter-key", () => this.keyDialog.ask());
    on("forget-key", () => this.dropKey());
    byId("model").addEventListener("change", (event) => {
      this.conversation.model = event.target.value;
      if (this.conversation.messages.length) this.store(this.conversation);
    });
    for (const button of document.querySelectorAll('[data-opens="status"]')) {
      button.addEventListener("click", () => this.monitor.askNow());
    }
    document.addEventListener("keydown", (event) => this.press(event));
    history.whenChangedElsewhere(() => this.reload());
  }

  /** Escape ends what is open or running; a slash goes to the message box, if nothing is being written. */
  press(event) {
    if (this.keyDialog.open) return;
    if (event.key === "Escape" && !composes(event)) {
      if (!this.panels.closeOverlay()) this.chat.stop();
    } else if (event.key === "/" && !event.target.closest("input, textarea, select")) {
      event.preventDefault();
      byId("prompt").focus();
    }
  }

  // ---- Conversations

  show(conversation) {
    this.conversation = conversation;
    tab.set(CURRENT, conversation.id);
    this.settings.show(conversation);
    this.chat.show(conversation);
    this.showModels();
    this.showList();
  }

  startNew() {
    this.show(history.newConversation(this.conversation));
    this.panels.closeOverlay();
    byId("prompt").focus();
  }

  store(conversation) {
    if (this.isGone(conversation)) return this.reload();
    conversation.updated = Date.now();
    const saved = history.save(conversation);
    if (!saved && !this.full) notify(text("chats.full"));
    this.full = !saved; // said once, not at every piece of an answer
    this.conversations = [conversation, ...this.conversations.filter((other) => other.id !== conversation.id)];
    this.showList();
  }

  remove(conversation) {
    history.remove(conversation);
    this.chat.leave(conversation);
    this.conversations = this.conversations.filter((other) => other !== conversation);
    if (conversation === this.conversation) this.show(history.newConversation(conversation));
    else this.showList();
    const title = history.titleOf(conversation);
    notify(text("chats.deleted", title), () => this.restore([conversation]));
    byId("new").focus();
  }

  removeAll() {
    const removed = this.conversations;
    if (!removed.length) return;
    for (const conversation of removed) {
      history.remove(conversation);
      this.chat.leave(conversation);
    }
    this.conversations = [];
    this.show(history.newConversation(this.conversation));
    notify(text("chats.deletedAll"), () => this.restore(removed));
  }

  restore(removed) {
    removed.forEach((conversation) => history.save(conversation));
    this.reload();
    const back = this.conversations.find(({ id }) => id === removed[0].id);
    if (back) this.show(back);
  }

  /** Whether another tab has deleted a conversation, of which this one may not have heard yet. */
  isGone(conversation) {
    return this.conversations.includes(conversation) && !history.isStored(conversation);
  }

  /**
   * Take over what another tab has changed, but for conversations that are being answered here. What was deleted there
   * is closed here: nothing that is said from now on brings it back.
   */
  reload() {
    const gone = this.conversations.filter((one) => this.isGone(one));
    for (const conversation of gone) this.chat.leave(conversation);
    const ours = new Map(this.conversations.map((one) => [one.id, one]));
    this.conversations = history.conversations().map((stored) => {
      const own = ours.get(stored.id);
      return own && (own.updated === stored.updated || this.chat.answers.has(own)) ? own : stored;
    });
    const shown = this.conversations.find(({ id }) => id === this.conversation.id);
    if (gone.includes(this.conversation)) {
      this.show(history.newConversation(this.conversation));
      notify(text("chats.deletedElsewhere"));
    } else if (shown && shown !== this.conversation) {
      this.show(shown);
    } else {
      this.showList();
    }
  }

  /** Whether the next question can be asked as things are; if a setting is wrong, say so and lead there. */
  mayAsk() {
    if (this.isGone(this.conversation)) {
      this.reload(); // it is closed, and said so: who asks once more begins a new one
      return false;
    }
    const { wrong } = this.settings;
    if (!wrong) return true;
    if (!this.panels.isOpen("settings")) this.panels.open("settings");
    wrong.field.focus();
    notify(text("settings.notSent", wrong.label));
    return false;
  }

  showList() {
    byId("delete-all").disabled = !this.conversations.length;
    byId("export").disabled = !this.conversation.messages.length;
    const entries = this.conversations.map((conversation) => ({
      conversation,
      title: history.titleOf(conversation) || text("chats.untitled"),
      current: conversation.id === this.conversation.id,
      answering: this.chat.answers.has(conversation),
    }));
    const shown = JSON.stringify([language(), entries.map(({ conversation, ...rest }) => [conversation.id, rest])]);
    if (shown === this.shownList) return; // the list keeps the focus while an answer comes
    this.shownList = shown;
    const items = entries.map(({ conversation, title, current, answering }) => {
      const open = () => {
        this.show(conversation);
        this.panels.closeOverlay();
        byId("prompt").focus();
      };
      return element(
        "li",
        { class: current && "current" },
        element(
          "button",
          { type: "button", class: "open", onclick: open, "aria-current": current && "true", title },
          answering ? element("span", { class: "dot busy" }) : null,
          title,
        ),
        iconButton("trash", text("chats.delete", title), () => this.remove(conversation)),
      );
    });
    byId("conversations").replaceChildren(...items);
  }

  // ---- The server

  showState() {
    const { state } = this.monitor;
    this.figures.show(this.monitor);
    byId("forget-key").hidden = !apiKey();
    if (state === this.state) return;
    this.state = state;
    this.sayState(state);
    if (state === "locked") this.keyDialog.ask();
    if (state === "ready") this.loadModels();
    if (state === "ready" && this.missed) announce(text("banner.back"));
    this.missed = state === "away" || (this.missed && state !== "ready");
  }

  sayState(state) {
    byId("state").dataset.state = state;
    byId("state").title = text(`server.${state}`);
    byId("state").querySelector(".pill-text").textContent = text(`server.${state}`);
    const told = ["away", "starting", "draining", "locked"].includes(state);
    byId("banner").hidden = !told;
    if (told) byId("banner").querySelector(".banner-text").textContent = text(`banner.${state}`);
    byId("enter-key").hidden = state !== "locked";
  }

  async loadModels() {
    try {
      this.models = await models();
    } catch {
      this.models = [];
      this.state = "connecting"; // again after the monitor's next report, which says what is wrong
    }
    this.showModels();
  }

  showModels() {
    const select = byId("model");
    if (this.models.length && !this.models.includes(this.conversation.model)) [this.conversation.model] = this.models;
    const options = this.models.map((name) => element("option", { value: name }, name));
    select.replaceChildren(...(options.length ? options : [element("option", { value: "" }, text("model.none"))]));
    select.value = this.models.length ? this.conversation.model : "";
    select.disabled = !this.models.length;
    byId("send").disabled = !this.models.length;
  }

  /** There is a new key: see what the server says to it, as if nothing had been asked before. */
  tryKey() {
    this.state = "connecting";
    this.monitor.askNow();
  }

  dropKey() {
    forgetKey();
    this.tryKey();
  }

  // ---- How it looks

  changeLanguage() {
    switchLanguage();
    localise();
    this.showTheme();
    this.figures.clear();
    this.state = undefined;
    this.showState();
    this.show(this.conversation);
  }

  nextTheme() {
    const theme = THEMES[(THEMES.indexOf(this.theme) + 1) % THEMES.length];
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    device.set(THEME, theme);
    this.showTheme();
  }

  get theme() {
    return document.documentElement.dataset.theme ?? "auto";
  }

  showTheme() {
    setIcon(byId("theme"), this.theme);
    setLabel(byId("theme"), text(`theme.${this.theme}`));
  }
}

function download(file) {
  const url = URL.createObjectURL(file);
  element("a", { href: url, download: file.name }).click();
  setTimeout(() => URL.revokeObjectURL(url));
}

new App();
