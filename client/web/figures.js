// The status panel: for each model its load, its cache and its agents.

import { Chart } from "./chart.js";
import { byId, element } from "./dom.js";
import { WINDOW_SECONDS } from "./monitor.js";
import { measure, number, text } from "./strings.js";

const MINUTE = 60; // seconds

export class Figures {
  constructor() {
    this.place = byId("figures");
    this.clear();
  }

  /** Begin anew: other models, or another language. */
  clear() {
    this.models = new Map();
    this.shown = "";
  }

  /** Show what the monitor knows. */
  show({ status, samples, state }) {
    if (!status) return;
    const names = status.models.map((model) => model.names.join(", ")).join("; ");
    if (names !== this.shown) this.build(status, names);
    this.place.classList.toggle("old", state === "away" || state === "locked");
    const now = performance.now() / 1000;
    const span = spanOf(samples, now);
    for (const model of status.models) {
      const [name] = model.names;
      this.models.get(name).show(model, samples.get(name), now, span);
    }
    this.span.textContent = text("status.window", measure(span / MINUTE, "minute"));
    this.about.textContent = text("status.about", status.version, duration(status.uptime_seconds));
  }

  build(status, names) {
    this.clear();
    this.shown = names;
    for (const model of status.models) this.models.set(model.names[0], new ModelFigures(model));
    this.about = element("p", { class: "fine" });
    this.span = element("p", { class: "fine" });
    this.place.replaceChildren(...[...this.models.values()].map(({ node }) => node), this.span, this.about);
  }
}

class ModelFigures {
  constructor(model) {
    const chart = (key, unit, scale) => new Chart(text(`status.${key}`), unit, scale);
    this.charts = [
      [chart("generation", text("status.rate"), { least: 10 }), (sample) => sample.generation_rate],
      [chart("prompt", text("status.rate"), { least: 10 }), (sample) => sample.prompt_rate],
      [chart("running", text("status.of", number(model.max_running)), {}), (sample) => sample.running],
      [chart("waiting", text("status.requests"), {}), (sample) => sample.waiting],
      [chart("cache", text("status.percent"), { least: 1, digits: 1 }), (sample) => 100 * sample.cache_usage],
    ];
    this.facts = element("dl", { class: "facts" });
    this.agents = element("ul", { class: "agents" });
    this.node = element(
      "section",
      {},
      element("h3", {}, model.names.join(", ")),
      ...this.charts.map(([{ node }]) => node),
      this.facts,
      element("h4", {}, text("status.agents")),
      this.agents,
    );
  }

  /** Show what a model does, and the `seconds` before `now`. */
  show(model, samples, now, seconds) {
    const shown = samples.filter(({ time }) => now - time <= seconds);
    for (const [chart, value] of this.charts)
      chart.draw(
        shown.map((sample) => [sample.time, value(sample)]),
        now,
        seconds,
      );
    this.facts.replaceChildren(
      ...fact("status.context", number(model.context_length)),
      ...fact("status.preemptions", number(model.preemptions)),
    );
    this.agents.replaceChildren(...model.agents.map((agent) => agentLine(agent, model.groups[agent.group].ready)));
  }
}

function fact(key, value) {
  return [element("dt", {}, text(key)), element("dd", {}, value)];
}

function agentLine({ address, connected }, ready) {
  const state = connected ? (ready ? "ready" : "silent") : "away";
  return element(
    "li",
    { "data-state": state },
    element("span", { class: "dot" }),
    element("code", {}, address),
    element("span", { class: "fine" }, text(`agent.${state}`)),
  );
}

/** The seconds that charts span: the whole minutes of which all is known, one at least and WINDOW_SECONDS at most. */
function spanOf(samples, now) {
  const first = Math.min(...[...samples.values()].map(([sample]) => sample.time));
  return Math.min(Math.max(Math.floor((now - first) / MINUTE), 1) * MINUTE, WINDOW_SECONDS);
}

/** Days, hours, minutes, as short as it is clear. */
function duration(seconds) {
  const minutes = Math.floor(seconds / MINUTE);
  const parts = [
    [Math.floor(minutes / 1440), "day"],
    [Math.floor(minutes / 60) % 24, "hour"],
    [minutes % 60, "minute"],
  ];
  const told = parts.filter(([value]) => value > 0).map(([value, unit]) => measure(value, unit));
  return told.length ? told.join(" ") : measure(Math.floor(seconds), "second");
}
