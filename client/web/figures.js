// The status panel: for each model its load, its cache and its agents.

import { Chart } from "./chart.js";
import { byId, element } from "./dom.js";
import { WINDOW_SECONDS } from "./monitor.js";
import { number, text } from "./strings.js";

const LEAST_SECONDS = 60; // that a chart spans: at first there is little to show, later WINDOW_SECONDS

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
    for (const model of status.models) this.models.get(model.names[0]).show(model, samples.get(model.names[0]));
    this.about.textContent = text("status.about", status.version, duration(status.uptime_seconds));
  }

  build(status, names) {
    this.clear();
    this.shown = names;
    for (const model of status.models) this.models.set(model.names[0], new ModelFigures(model));
    this.about = element("p", { class: "fine" });
    const span = element("p", { class: "fine" }, text("status.window", WINDOW_SECONDS / 60));
    this.place.replaceChildren(...[...this.models.values()].map(({ node }) => node), span, this.about);
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

  show(model, samples) {
    const now = performance.now() / 1000;
    const span = Math.min(Math.max(now - samples[0].time, LEAST_SECONDS), WINDOW_SECONDS);
    for (const [chart, value] of this.charts)
      chart.draw(
        samples.map((sample) => [sample.time, value(sample)]),
        now,
        span,
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

/** Days, hours, minutes, as short as it is clear. */
function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  const parts = [
    [Math.floor(minutes / 1440), "d"],
    [Math.floor(minutes / 60) % 24, "h"],
    [minutes % 60, "min"],
  ];
  const told = parts.filter(([value]) => value > 0).map(([value, unit]) => `${value} ${unit}`);
  return told.length ? told.join(" ") : `${Math.floor(seconds)} s`;
}
