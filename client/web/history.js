// Conversations, in this browser's storage and nowhere else. Each has an entry of its own, so that two tabs that write
// different ones do not undo each other's work.

import { device } from "./storage.js";

const PREFIX = "mindspore-ui/conversation/";
const TITLE_CHARACTERS = 60;

/** A new conversation, with the model and settings of another. It is stored once it is saved. */
export function newConversation(like) {
  return {
    id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, // a page by plain http has no randomUUID
    updated: Date.now(),
    model: like?.model ?? "",
    system: like?.system ?? "",
    sampling: { ...like?.sampling },
    messages: [],
  };
}

/** All that are stored, the latest first. What cannot be read is left alone. */
export function conversations() {
  const keys = device.keys().filter((key) => key.startsWith(PREFIX));
  const found = keys.map((key) => decode(device.get(key)));
  return found.filter(Boolean).sort((one, other) => other.updated - one.updated);
}

/** A message whose answer nobody waits for any more. */
function interrupted(message) {
  if (message.state !== "answering") return message;
  return { ...message, state: "failed", error: { kind: "interrupted", message: "" } };
}

/** Store a conversation; false if the browser has no room for it. */
export function save(conversation) {
  return device.set(PREFIX + conversation.id, JSON.stringify(conversation));
}

/** Whether it is still there: another tab may have removed it. */
export function isStored(conversation) {
  return device.get(PREFIX + conversation.id) !== null;
}

export function remove(conversation) {
  device.remove(PREFIX + conversation.id);
}

/** Call `changed` when another tab stores or removes a conversation. */
export function whenChangedElsewhere(changed) {
  window.addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed();
  });
}

/** The beginning of its first message, or "". */
export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  const line = (first?.content ?? "").trim().split("\n", 1)[0];
  return line.length > TITLE_CHARACTERS ? `${line.slice(0, TITLE_CHARACTERS)}…` : line;
}

/** A file with one conversation, in the words of the OpenAI protocol. */
export function exported(conversation) {
  const { model, system, sampling, messages, updated } = conversation;
  const spoken = messages.map(({ role, content }) => ({ role, content }));
  const content = {
    model,
    updated: new Date(updated).toISOString(),
    ...sampling,
    messages: system ? [{ role: "system", content: system }, ...spoken] : spoken,
  };
  return new File([JSON.stringify(content, null, 2), "\n"], "conversation.json", { type: "application/json" });
}

function decode(stored) {
  try {
    const found = JSON.parse(stored);
    const usable = typeof found.id === "string" && found.messages.every(({ content }) => typeof content === "string");
    return usable ? { ...found, messages: found.messages.map(interrupted) } : null;
  } catch {
    return null;
  }
}
