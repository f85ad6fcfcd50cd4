// A small chart of one rate over the last two minutes, with the value under the pointer.

import { count, rate } from "./format.js";

const SECONDS = 120;
const NAMESPACE = "http://www.w3.org/2000/svg";
const TOP = 14; // room for the label of the largest value
const BOTTOM = 16;

export class RateChart {
  #svg;
  #samples = []; // [time in seconds, value]
  #pointer = null; // x in pixels

  constructor(svg) {
    this.#svg = svg;
    svg.addEventListener("pointermove", (event) => this.#point(event.clientX - svg.getBoundingClientRect().left));
    svg.addEventListener("pointerleave", () => this.#point(null));
  }

  add(time, value) {
    this.#samples.push([time, value]);
    while (this.#samples[0][0] < time - SECONDS) this.#samples.shift();
    this.paint();
  }

  #point(x) {
    this.#pointer = x;
    this.paint();
  }

  paint() {
    const { width, height } = this.#svg.getBoundingClientRect();
    if (!width || !this.#samples.length) return;
    const now = this.#samples.at(-1)[0];
    const largest = Math.max(...this.#samples.map(([, value]) => value));
    const scale = nice(largest);
    const x = (time) => width - 5 - ((now - time) / SECONDS) * (width - 10);
    const y = (value) => TOP + (1 - value / scale) * (height - TOP - BOTTOM);
    const points = this.#samples.map(([time, value]) => `${x(time).toFixed(1)},${y(value).toFixed(1)}`);
    const first = x(this.#samples[0][0]).toFixed(1);
    const last = x(now).toFixed(1);
    const shapes = [
      line(0, y(scale), width), line(0, y(scale / 2), width), line(0, y(0), width),
      text(0, y(scale) - 3, count(scale)),
      text(0, height - 3, "2 min ago"), text(width, height - 3, "now", "end"),
      shape("path", { class: "area", d: `M${first},${y(0)} L${points.join(" L")} L${last},${y(0)} Z` }),
      shape("path", { class: "line", d: `M${points.join(" L")}` }),
    ];
    if (this.#pointer !== null) shapes.push(...this.#mark(x, y, now, width));
    this.#svg.replaceChildren(...shapes);
  }

  #mark(x, y, now, width) {
    const distance = ([time]) => Math.abs(x(time) - this.#pointer);
    const nearest = this.#samples.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const label = `${rate(nearest[1])} tokens/s, ${count(now - nearest[0])} s ago`;
    return [
      shape("circle", { class: "mark", cx: x(nearest[0]), cy: y(nearest[1]), r: 5 }),
      text(width, 11, label, "end"),
    ];
  }
}

// Returns the next of 10, 20, 50, 100, ... that is not smaller.
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 10)));
  return [1, 2, 5, 10].map((digit) => digit * power).find((candidate) => candidate >= value);
}

function shape(tag, attributes) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const line = (from, y, to) => shape("line", { class: "grid", x1: from, x2: to, y1: y, y2: y });

function text(x, y, content, anchor = "start") {
  const element = shape("text", { x, y, "text-anchor": anchor });
  element.textContent = content;
  return element;
}
