// The API key: asked for when the server wants one, kept for this tab or, if so wished, on this device.

import { byId } from "./dom.js";
import { device, tab } from "./storage.js";

const KEY = "mindspore-ui/key";

export const apiKey = () => tab.get(KEY) ?? device.get(KEY) ?? "";

export function forgetKey() {
  tab.remove(KEY);
  device.remove(KEY);
}

/** The dialog that asks for it. `given()` is called when there is a new key. */
export class KeyDialog {
  constructor(given) {
    this.dialog = byId("key-dialog");
    this.dialog.addEventListener("close", () => {
      if (this.dialog.returnValue === "use" && this.keep()) given();
    });
    byId("key-cancel").addEventListener("click", () => this.dialog.close(""));
  }

  get open() {
    return this.dialog.open;
  }

  /** Ask, unless it is asking already. If there is a key, it is the wrong one. */
  ask() {
    if (this.open) return;
    byId("key").value = "";
    byId("key-wrong").hidden = !apiKey();
    this.dialog.returnValue = "";
    this.dialog.showModal();
  }

  keep() {
    const key = byId("key").value.trim();
    byId("key").value = "";
    if (!key) return false;
    forgetKey();
    (byId("key-remember").checked ? device : tab).set(KEY, key);
    return true;
  }
}
