// The settings of a conversation: a system prompt, and how tokens are chosen. What is empty is not sent.

import { byId } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/** The form of the settings panel. `changed` is called after every change that can be used. */
export class Settings {
  constructor(changed) {
    this.form = byId("settings-form");
    this.changed = changed;
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.read());
    byId("settings-reset").addEventListener("click", () => this.reset());
  }

  /** Show those of a conversation, and write changes there. */
  show(conversation) {
    this.conversation = conversation;
    const { system, sampling } = conversation;
    this.field("system").value = system;
    for (const name of NUMBERS) this.field(name).value = sampling[name] ?? "";
    this.field("stop").value = (sampling.stop ?? []).join("\n");
  }

  field(name) {
    return this.form.elements[name];
  }

  /** Take the fields over; a number out of range stays where it is, marked, and is not taken. */
  read() {
    const sampling = {};
    for (const name of NUMBERS) {
      const field = this.field(name);
      field.setAttribute("aria-invalid", String(!field.checkValidity()));
      if (field.value !== "" && field.checkValidity()) sampling[name] = field.valueAsNumber;
    }
    const stop = this.field("stop")
      .value.split("\n")
      .filter((line) => line !== "");
    if (stop.length) sampling.stop = stop;
    Object.assign(this.conversation, { system: this.field("system").value, sampling });
    this.changed();
  }

  reset() {
    for (const name of ["system", "stop", ...NUMBERS]) this.field(name).value = "";
    this.read();
  }
}
