// The API key: asked for when the server wants one, kept for this tab or, if so wished, on this device.

import { byId } from "./dom.js";

const KEY = "mindspore-ui/key";

export const apiKey = () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";

export function forgetKey() {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
}

/** Ask for the key; true once one was given, false if the dialog was closed. */
export function askForKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return Promise.resolve(false);
  const [key, remember] = [byId("key"), byId("key-remember")];
  key.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use" && key.value.trim();
      if (given) {
        forgetKey();
        (remember.checked ? localStorage : sessionStorage).setItem(KEY, key.value.trim());
      }
      key.value = "";
      resolve(Boolean(given));
    }, { once: true });
  });
}
