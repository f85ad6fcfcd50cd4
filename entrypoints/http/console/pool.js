// Draws the page pool of each engine, one cell a page, and says what the cell under the pointer is.

import { adapterColor } from "./colors.js";
import { count, make } from "./format.js";

const FREE = 0, KV = 1, PREFIX = 2, FIRST_SLOT = 3; // codes of the cells
const NAMES = { [FREE]: "free", [KV]: "KV cache in use", [PREFIX]: "prefix cache, idle" };
const HEIGHT = 300; // that the cells aim at, in pixels
const MIN_SIZE = 4, MAX_SIZE = 16; // of a cell with its gap

export class PoolView {
  #box;
  #label;
  #onContent;
  #canvases = [];
  #highlighted = null;

  // `onContent` is called with the content hash of the adapter that is pointed at, or null.
  constructor(box, label, onContent) {
    this.#box = box;
    this.#label = label;
    this.#onContent = onContent;
  }

  show(pools) {
    while (this.#canvases.length > pools.length) this.#canvases.pop().element.remove();
    while (this.#canvases.length < pools.length) {
      const canvas = new PoolCanvas((text, content) => this.#say(text, content));
      this.#canvases.push(canvas);
      this.#box.append(canvas.element);
    }
    pools.forEach((pool, index) => this.#canvases[index].show(pool));
    this.paint();
  }

  // Dims all cells but those of one adapter; null ends it.
  highlight(content) {
    if (content === this.#highlighted) return;
    this.#highlighted = content;
    this.paint();
  }

  paint() {
    const fixed = ["free", "kv", "prefix"].map((kind) => {
      return getComputedStyle(document.querySelector(`.swatch.${kind}`)).backgroundColor;
    });
    for (const canvas of this.#canvases) canvas.paint(fixed, this.#highlighted);
  }

  #say(text, content) {
    this.#label.textContent = text;
    this.#onContent(content);
    this.#highlighted = content;
    this.paint();
  }
}

class PoolCanvas {
  #canvas = make("canvas");
  #caption = make("figcaption");
  #pool = null;
  #codes = []; // of each cell
  #size = MAX_SIZE;
  #columns = 1;
  #cursor = null; // cell that is pointed at
  #say;

  constructor(say) {
    this.#say = say;
    this.element = make("figure", "pool", this.#caption, this.#canvas);
    this.#canvas.tabIndex = 0;
    this.#canvas.setAttribute("role", "img");
    this.#canvas.addEventListener("pointermove", (event) => this.#moveTo(this.#cellAt(event)));
    this.#canvas.addEventListener("pointerleave", () => this.#moveTo(null));
    this.#canvas.addEventListener("blur", () => this.#moveTo(null));
    this.#canvas.addEventListener("keydown", (event) => this.#onKey(event));
  }

  show(pool) {
    this.#pool = pool;
    const codes = [];
    for (let i = 0; i < pool.runs.length; i += 2) {
      for (let n = 0; n < pool.runs[i + 1]; n++) codes.push(pool.runs[i]);
    }
    this.#codes = codes;
    const sample = pool.pages_per_cell > 1 ? `; each cell shows the first of ${pool.pages_per_cell} pages` : "";
    const engine = pool.engine ? `${pool.engine}: ` : "";
    this.#caption.textContent = `${engine}${count(pool.num_pages)} pages${sample}`;
    this.#canvas.setAttribute("aria-label", `Map of the page pool. ${this.#caption.textContent}`);
  }

  paint([free, kv, prefix], highlighted) {
    const width = this.#canvas.clientWidth;
    if (!width || !this.#pool) return;
    this.#layOut(width);
    const context = this.#canvas.getContext("2d");
    const colors = { [FREE]: free, [KV]: kv, [PREFIX]: prefix };
    const edge = this.#size - (this.#size >= 6 ? 2 : 1);
    this.#codes.forEach((code, cell) => {
      const content = this.#contentOf(code);
      context.fillStyle = colors[code] ??= content ? adapterColor(content) : "gray";
      context.globalAlpha = highlighted && content !== highlighted ? 0.25 : 1;
      const [x, y] = this.#placeOf(cell);
      context.fillRect(x, y, edge, edge);
    });
    context.globalAlpha = 1;
    if (this.#cursor !== null) this.#drawCursor(context);
  }

  #layOut(width) {
    const fitting = Math.floor(Math.sqrt((width * HEIGHT) / Math.max(1, this.#codes.length)));
    this.#size = Math.min(MAX_SIZE, Math.max(MIN_SIZE, fitting));
    this.#columns = Math.floor(width / this.#size);
    const height = Math.ceil(this.#codes.length / this.#columns) * this.#size;
    this.#canvas.style.height = `${height}px`;
    this.#canvas.width = width * devicePixelRatio;
    this.#canvas.height = height * devicePixelRatio;
    this.#canvas.getContext("2d").scale(devicePixelRatio, devicePixelRatio);
  }

  #placeOf(cell) {
    return [(cell % this.#columns) * this.#size, Math.floor(cell / this.#columns) * this.#size];
  }

  #drawCursor(context) {
    const [x, y] = this.#placeOf(this.#cursor);
    context.strokeStyle = getComputedStyle(document.body).color;
    context.lineWidth = 2;
    context.strokeRect(x, y, this.#size - 1, this.#size - 1);
  }

  #contentOf(code) {
    return code < FIRST_SLOT ? null : (this.#pool.slots[code - FIRST_SLOT]?.content_hash ?? null);
  }

  #cellAt({ offsetX, offsetY }) {
    const column = Math.floor(offsetX / this.#size);
    const cell = Math.floor(offsetY / this.#size) * this.#columns + column;
    return column < this.#columns && cell < this.#codes.length ? cell : null;
  }

  #onKey(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.#columns, ArrowDown: this.#columns };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = this.#cursor === null ? 0 : this.#cursor + steps[event.key];
    if (next >= 0 && next < this.#codes.length) this.#moveTo(next);
  }

  #moveTo(cell) {
    if (cell === this.#cursor) return;
    this.#cursor = cell;
    if (cell === null) this.#say("Point at a page, or move with the arrow keys, to see what it holds.", null);
    else this.#say(this.#describe(cell), this.#contentOf(this.#codes[cell]));
  }

  #describe(cell) {
    const { pages_per_cell: step, num_pages: total, slots } = this.#pool;
    const first = 1 + cell * step;
    const last = Math.min(total, first + step - 1);
    const page = step === 1 ? `Page ${count(first)}` : `Pages ${count(first)} to ${count(last)}`;
    const code = this.#codes[cell];
    if (code < FIRST_SLOT) return `${page}: ${NAMES[code]}`;
    const slot = slots[code - FIRST_SLOT];
    if (!slot) return `${page}: an adapter`;
    const state = slot.residency === "loading" ? ", loading" : "";
    const users = slot.num_users === 1 ? "1 user" : `${count(slot.num_users)} users`;
    const pinned = slot.pinned ? ", pinned" : "";
    return `${page}: adapter ${slot.names.join(", ") || "without a name"} (${count(slot.num_pages)} pages, ${users}${pinned}${state})`;
  }
}
