// The server, as the page speaks to it: its models, its status, and answers as they come.

import { apiKey } from "./key.js";

// Beside the page, wherever a proxy has put both.
const BASE = new URL(".", document.baseURI);

/**
 * What went wrong with a request.
 *
 * `kind` is what a person can do about it: "away" (no answer), "key" (a key is missing or wrong), "busy" (the queue is
 * full), "late" (it took too long), "unavailable" (no agents), "stopping", "long" (no room in the context), "refused" (the
 * request itself), "failed" (the server's own fault), "cut" (a stream without its end). `message` has the server's words.
 */
export class ServerError extends Error {
  constructor(kind, message = "") {
    super(message);
    this.kind = kind;
  }
}

const KINDS = new Map([
  ["agents_unavailable", "unavailable"],
  ["context_length_exceeded", "long"],
  ["invalid_api_key", "key"],
  ["queue_full", "busy"],
  ["queue_timeout", "late"],
  ["shutting_down", "stopping"],
]); // by code
const STATUS_KINDS = new Map([
  [401, "key"],
  [403, "key"],
  [408, "late"],
  [429, "busy"],
  [502, "away"], // a proxy whose server is away
  [503, "unavailable"],
  [504, "late"],
]);

/** The names that can be asked. */
export async function models() {
  const answer = await (await request("v1/models")).json();
  return answer.data.map((model) => model.id);
}

/** What the server does at this moment. */
export async function status(signal) {
  return (await request("serving/status", { signal })).json();
}

/**
 * The answer to a chat, piece by piece: `{text}`, and towards the end `{finish}` and `{usage}`.
 *
 * To leave the loop, or to abort by `signal`, ends the request at the server too.
 */
export async function* chat(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, ...options }),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw problemOf(chunk);
    const [choice] = chunk.choices;
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
  }
  throw new ServerError("cut");
}

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey()) headers.set("Authorization", `Bearer ${apiKey()}`);
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw options.signal?.aborted ? error : new ServerError("away");
  }
  if (response.ok) return response;
  throw problemOf(await bodyOf(response), response.status);
}

/** What an error's body says, as OpenAI writes it or as our other routes do; in a stream there is no status with it. */
function problemOf(body, status = 500) {
  const error = typeof body?.error === "string" ? { message: body.error } : (body?.error ?? {});
  const kind = KINDS.get(error.code) ?? STATUS_KINDS.get(status) ?? (status >= 500 ? "failed" : "refused");
  return new ServerError(kind, error.message || `HTTP ${status}`);
}

async function bodyOf(response) {
  try {
    return await response.json();
  } catch {
    return null; // not from our server, or cut
  }
}

/** The data of each server-sent event of a stream. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await read(reader, signal);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((line) => line.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it has ended already, or nobody wants the rest
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    throw signal?.aborted ? error : new ServerError("cut");
  }
}
