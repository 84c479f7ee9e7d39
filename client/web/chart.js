// A small chart of one number over the last minutes: a line, the area below it, and the number of now.

import { element, svg } from "./dom.js";
import { number, text } from "./strings.js";

const WIDTH = 300;
const HEIGHT = 48;
const GAP_SECONDS = 12; // between two samples, for which nothing is known: the page was not looked at

export class Chart {
  /** `unit` makes the text after the number; `least` is the lowest top of the scale, `digits` those after the point. */
  constructor(title, unit, { least = 1, digits = 0 } = {}) {
    Object.assign(this, { title, unit, least, digits });
    this.value = element("span", { class: "value" }, "–");
    this.unitText = element("span", { class: "unit" }, unit);
    this.top = element("span", { class: "top" });
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.picture = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      this.area,
      this.line,
    );
    this.node = element(
      "figure",
      { class: "chart" },
      element(
        "figcaption",
        {},
        element("span", { class: "title" }, title),
        element("span", {}, this.value, " ", this.unitText),
      ),
      element("div", { class: "plot" }, this.picture, this.top),
    );
  }

  /** Draw `samples`, pairs of a time and a number (null: unknown), of the `seconds` before `now`. */
  draw(samples, now, seconds) {
    const known = samples.filter(([, value]) => value !== null);
    const highest = Math.max(0, ...known.map(([, value]) => value));
    const top = scaleTop(Math.max(highest, this.least));
    const point = ([time, value]) => [
      (WIDTH * (1 - (now - time) / seconds)).toFixed(1),
      (HEIGHT - 1 - (HEIGHT - 3) * (value / top)).toFixed(1),
    ];
    const pieces = unbroken(known).map((piece) => piece.map(point));
    this.line.setAttribute("d", pieces.map((piece) => `M${piece.join("L")}`).join(""));
    this.area.setAttribute(
      "d",
      pieces.map((piece) => `M${piece[0][0]},${HEIGHT}L${piece.join("L")}L${piece.at(-1)[0]},${HEIGHT}Z`).join(""),
    );
    const current = known.length ? number(known.at(-1)[1], this.digits) : "–";
    this.value.textContent = current;
    this.top.textContent = number(top);
    this.picture.setAttribute(
      "aria-label",
      text("status.chart", this.title, current, this.unit, number(highest, this.digits)),
    );
  }
}

/** The samples in pieces between which nothing is known. */
function unbroken(samples) {
  const pieces = [];
  for (const sample of samples) {
    const piece = pieces.at(-1);
    if (piece && sample[0] - piece.at(-1)[0] <= GAP_SECONDS) piece.push(sample);
    else pieces.push([sample]);
  }
  return pieces;
}

/** A round number that is not below `value`, for the top of the scale. */
function scaleTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((top) => top >= value);
}
