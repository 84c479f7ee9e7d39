// Copying, also where the browser has no clipboard for a page: one by plain http from another machine.

import { announce, element, setLabel } from "./dom.js";
import { text } from "./strings.js";

const SAID_MILLISECONDS = 2000;

/** Copy, and say for a moment on the button that it is done. */
export async function copy(content, button) {
  const done = text((await write(content)) ? "copied" : "copy.failed");
  const label = button.getAttribute("aria-label");
  const say = (words) => (label === null ? (button.lastChild.textContent = words) : setLabel(button, words));
  announce(done);
  say(done);
  button.classList.add("done");
  setTimeout(() => {
    say(label ?? text("copy.code"));
    button.classList.remove("done");
  }, SAID_MILLISECONDS);
}

async function write(content) {
  try {
    await navigator.clipboard.writeText(content);
    return true;
  } catch {
    const box = element("textarea", { class: "unseen", readonly: true });
    box.value = content;
    document.body.append(box);
    box.select();
    const copied = document.execCommand("copy");
    box.remove();
    return copied;
  }
}
