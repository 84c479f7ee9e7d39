// The settings of a conversation: a system prompt, and how tokens are chosen. What is empty is not sent.

import { byId } from "./dom.js";
import { stopTexts, stopsAsWritten } from "./stops.js";
import { number, text } from "./strings.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const CHECKED = [...NUMBERS, "stop"];
const MAX_STOP_CHARACTERS = 1024;

/** The form of the settings panel. `changed` is called after every change. */
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
    if (conversation !== this.conversation) {
      this.conversation = conversation;
      const { system, sampling } = conversation;
      this.field("system").value = system;
      for (const name of NUMBERS) this.field(name).value = sampling[name] ?? "";
      this.field("stop").value = stopsAsWritten(sampling.stop ?? []);
    }
    this.mark(); // the language can be another one
  }

  field(name) {
    return this.form.elements[name];
  }

  /** The label of the first field whose value the server would refuse, and that field; or undefined. */
  get wrong() {
    const field = CHECKED.map((name) => this.field(name)).find((one) => complaint(one));
    return field && { label: field.labels[0].textContent, field };
  }

  /** Take the fields over; one that the server would refuse stays as it is, marked, and is not taken. */
  read() {
    this.mark();
    const sampling = {};
    for (const name of NUMBERS) {
      const field = this.field(name);
      if (field.value !== "" && !complaint(field)) sampling[name] = field.valueAsNumber;
    }
    const stop = stopTexts(this.field("stop").value);
    if (stop.length && !complaint(this.field("stop"))) sampling.stop = stop;
    Object.assign(this.conversation, { system: this.field("system").value, sampling });
    this.changed();
  }

  /** Say beside each wrong field what it may be. */
  mark() {
    for (const name of CHECKED) {
      const field = this.field(name);
      const said = complaint(field);
      const place = byId(`${field.id}-wrong`);
      field.setAttribute("aria-invalid", String(said !== null));
      place.textContent = said ?? "";
      place.hidden = said === null;
    }
  }

  reset() {
    for (const name of ["system", ...CHECKED]) this.field(name).value = "";
    this.read();
  }
}

/** What a field may hold, if what it holds is something else; null if all is well. */
function complaint(field) {
  if (field.name === "stop") {
    const short = stopTexts(field.value).every((stop) => [...stop].length <= MAX_STOP_CHARACTERS);
    return short ? null : text("settings.allowed.stop", number(MAX_STOP_CHARACTERS));
  }
  const above = "above" in field.dataset; // its least value is not allowed itself
  if (field.checkValidity() && !(above && field.value !== "" && field.valueAsNumber <= field.min)) return null;
  const kind = above ? "above" : field.step === "any" ? "number" : "whole";
  return text(`settings.allowed.${kind}`, number(Number(field.min)), number(Number(field.max)));
}
