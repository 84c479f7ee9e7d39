// The sides of the page: the conversations, the settings and the status. On a narrow screen one of them lies over the
// rest, which cannot be reached meanwhile.

import { byId } from "./dom.js";
import { device } from "./storage.js";

const KEY = "mindspore-ui/panel";
const PANELS = ["settings", "status"];
const wide = matchMedia("(min-width: 1180px)");
const medium = matchMedia("(min-width: 800px)");

export class Panels {
  constructor() {
    for (const button of document.querySelectorAll("[data-opens]")) {
      button.addEventListener("click", () => this.toggle(button.dataset.opens));
    }
    for (const button of document.querySelectorAll("[data-closes]")) {
      button.addEventListener("click", () => this.close(button.dataset.closes));
    }
    byId("backdrop").addEventListener("click", () => this.closeOverlay());
    for (const query of [wide, medium]) query.addEventListener("change", () => this.restore());
    this.restore();
  }

  isOpen(id) {
    return id === "sidebar" ? byId(id).classList.contains("open") : !byId(id).hidden;
  }

  toggle(id) {
    if (this.isOpen(id)) this.close(id);
    else this.open(id);
  }

  open(id) {
    for (const other of PANELS) if (other !== id) byId(other).hidden = true;
    if (id === "sidebar") byId(id).classList.add("open");
    else byId(id).hidden = false;
    this.remember();
    this.arrange();
    if (this.overlay) byId(id).querySelector("button:not([hidden]), input, textarea").focus();
  }

  close(id) {
    if (id === "sidebar") byId(id).classList.remove("open");
    else byId(id).hidden = true;
    this.remember();
    this.arrange();
    document.querySelector(`[data-opens="${id}"]`).focus();
  }

  /** Close what lies over the rest; whether something did. */
  closeOverlay() {
    const { overlay } = this;
    if (overlay) this.close(overlay);
    return Boolean(overlay);
  }

  /** The side that lies over the rest, if one does. */
  get overlay() {
    if (!medium.matches && this.isOpen("sidebar")) return "sidebar";
    return wide.matches ? undefined : PANELS.find((id) => this.isOpen(id));
  }

  /** What is open when the page, or its width, is new: on a wide one what was open there last, else nothing. */
  restore() {
    const last = device.get(KEY) ?? "status";
    for (const id of PANELS) byId(id).hidden = !wide.matches || id !== last;
    byId("sidebar").classList.remove("open");
    this.arrange();
  }

  arrange() {
    const { overlay } = this;
    byId("backdrop").hidden = !overlay;
    document.querySelector("main").inert = Boolean(overlay);
    byId("sidebar").inert = medium.matches ? Boolean(overlay) : overlay !== "sidebar";
    for (const button of document.querySelectorAll("[data-opens]")) {
      button.setAttribute("aria-expanded", String(this.isOpen(button.dataset.opens)));
    }
  }

  remember() {
    if (wide.matches) device.set(KEY, PANELS.find((id) => this.isOpen(id)) ?? "none");
  }
}
