// What the page says at its foot for a while.

import { byId, element } from "./dom.js";
import { text } from "./strings.js";

const SHOWN_MILLISECONDS = 10000;
let timer;

/** Say `message`, with a way to take back what it tells of, if there is one. */
export function notify(message, undo) {
  const place = byId("notice");
  const close = () => (place.hidden = true);
  const button = element("button", { type: "button", class: "link" }, text(undo ? "undo" : "dismiss"));
  button.addEventListener("click", () => {
    close();
    undo?.();
  });
  place.replaceChildren(element("span", {}, message), button);
  place.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(close, SHOWN_MILLISECONDS);
}
