// Asks the server how it does, again and again while the page is looked at, and remembers the last minutes.

import { ServerError, status } from "./server.js";

export const WINDOW_SECONDS = 300; // that the charts show at most
const WATCHED_MILLISECONDS = 1000; // between two questions while the figures are on view
const UNWATCHED_MILLISECONDS = 5000;
const AWAY_MILLISECONDS = [1000, 1000, 2000, 3000, 5000]; // from one attempt to the next
const PATIENCE_MILLISECONDS = 10000;

/** States: "connecting", "ready", "starting", "draining", "away", "locked" (a key is asked for). */
export class Monitor {
  /** `report(monitor)` is called after every attempt, `watched()` says whether the figures are on view. */
  constructor(report, watched) {
    Object.assign(this, { report, watched, state: "connecting", status: null, samples: new Map(), attempts: 0 });
    document.addEventListener("visibilitychange", () => this.wake?.());
  }

  /** Ask for ever. */
  async run() {
    for (;;) {
      if (!document.hidden) await this.ask();
      await this.pause(document.hidden || this.state === "locked" ? null : this.delay());
    }
  }

  /** Ask now rather than later. */
  askNow() {
    this.wake?.();
  }

  async ask() {
    try {
      this.status = await status(AbortSignal.timeout(PATIENCE_MILLISECONDS));
      this.attempts = 0;
      this.state = stateOf(this.status);
      this.status.models.forEach((model) => this.remember(model));
    } catch (error) {
      this.attempts += 1;
      this.state = error instanceof ServerError && error.kind === "key" ? "locked" : "away";
    }
    this.report(this);
  }

  delay() {
    if (this.state === "away") return AWAY_MILLISECONDS[Math.min(this.attempts, AWAY_MILLISECONDS.length) - 1];
    return this.watched() ? WATCHED_MILLISECONDS : UNWATCHED_MILLISECONDS;
  }

  pause(milliseconds) {
    return new Promise((resolve) => {
      const timer = milliseconds === null ? null : setTimeout(resolve, milliseconds);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  /** Keep what a model does now, with the rates since the sample before. */
  remember(model) {
    const samples = this.samples.get(model.names[0]) ?? [];
    const now = performance.now() / 1000;
    const sample = { time: now, uptime: this.status.uptime_seconds, ...model };
    const before = samples.at(-1);
    const seconds = before ? sample.uptime - before.uptime : 0; // negative: another server, that counts anew
    const rate = (name) => (seconds > 0 && model[name] >= before[name] ? (model[name] - before[name]) / seconds : null);
    sample.generation_rate = rate("generation_tokens");
    sample.prompt_rate = rate("prompt_tokens");
    this.samples.set(model.names[0], [...samples.slice(beginning(samples, now - WINDOW_SECONDS)), sample]);
  }
}

/** The index of the last sample that is not after `time`, or 0: with it, all since then is known. */
function beginning(samples, time) {
  return Math.max(samples.findLastIndex((sample) => sample.time <= time), 0);
}

function stateOf({ draining, models }) {
  if (draining) return "draining";
  return models.every((model) => model.ready) ? "ready" : "starting";
}
