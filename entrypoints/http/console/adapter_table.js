// The table of adapters. A row that is pointed at shows its pages in the pool.

import { adapterColor } from "./colors.js";
import { ago, byId, count, make } from "./format.js";

const TIERS = { pages: "in pages", loading: "loading", host: "host memory", disk: "disk",
  memory: "memory" };

export class AdapterTable {
  #body;
  #onContent;
  #rows = new Map(); // by name
  #marked = null;

  // `onContent` is called with the content hash of the row that is pointed at, or null.
  constructor(table, onContent) {
    this.#body = table.tBodies[0];
    this.#onContent = onContent;
    this.#body.addEventListener("pointerover", (event) => this.#point(event.target.closest("tr")));
    this.#body.addEventListener("pointerleave", () => this.#point(null));
    this.#body.addEventListener("focusin", (event) => this.#point(event.target.closest("tr")));
    this.#body.addEventListener("focusout", () => this.#point(null));
  }

  #point(row) {
    this.#onContent(row?.dataset.content || null);
  }

  // Marks the rows of one content.
  mark(content) {
    this.#marked = content;
    for (const { element } of this.#rows.values()) this.#setMark(element);
  }

  #setMark(element) {
    element.classList.toggle("shown", !!this.#marked && element.dataset.content === this.#marked);
  }

  // Rows keep their elements, so that a click or the focus on one is not lost.
  show(adapters, numLeftOut) {
    const tiers = Object.keys(TIERS);
    const sorted = adapters.toSorted((a, b) => {
      return tiers.indexOf(a.tier) - tiers.indexOf(b.tier) || a.name.localeCompare(b.name);
    });
    const names = new Set(sorted.map(({ name }) => name));
    for (const [name, row] of this.#rows) {
      if (names.has(name)) continue;
      row.element.remove();
      this.#rows.delete(name);
    }
    sorted.forEach((adapter, index) => {
      if (!this.#rows.has(adapter.name)) this.#rows.set(adapter.name, new Row());
      const row = this.#rows.get(adapter.name);
      row.show(adapter);
      this.#setMark(row.element);
      if (this.#body.rows[index] !== row.element) this.#body.insertBefore(row.element, this.#body.rows[index] ?? null);
    });
    byId("left-out").textContent = numLeftOut ? `and ${count(numLeftOut)} more that are not shown` : "";
  }
}

class Row {
  element = make("tr");
  #texts = []; // of the cells, to find those that change

  show(adapter) {
    const isInPages = adapter.tier === "pages" || adapter.tier === "loading";
    this.element.dataset.content = isInPages ? adapter.content_hash : "";
    const isRead = !!adapter.content_hash;
    const texts = [
      JSON.stringify([adapter.name, isInPages, adapter.pinned, adapter.error]), adapter.tier,
      count(adapter.num_users), count(adapter.num_running), count(adapter.num_waiting),
      isRead ? count(adapter.max_rank) : "–", isRead ? count(adapter.num_pages) : "–",
      isRead ? (adapter.num_bytes / 1e6).toFixed(1) : "–", count(adapter.num_loads ?? 0), loadTimes(adapter),
      adapter.ttft_p50_ms ? count(adapter.ttft_p50_ms) : "–", ago(adapter.seconds_since_use),
    ];
    texts.forEach((text, index) => {
      if (text === this.#texts[index]) return;
      const cell = index === 0 ? nameCell(adapter, isInPages) : index === 1 ? tierCell(adapter.tier) : make("td", "number", text);
      if (this.element.cells[index]) this.element.cells[index].replaceWith(cell);
      else this.element.append(cell);
    });
    this.#texts = texts;
  }
}

function nameCell(adapter, isInPages) {
  const swatch = make("i", "swatch");
  if (isInPages && adapter.content_hash) swatch.style.background = adapterColor(adapter.content_hash);
  const link = make("a", "", adapter.name);
  link.href = `#chat/${encodeURIComponent(adapter.name)}`;
  link.title = `chat with ${adapter.name}`;
  const cell = make("td", "", swatch, link);
  if (adapter.pinned) cell.append(" ", make("span", "quiet", "pinned"));
  if (adapter.error) {
    const error = make("span", "error", "failed");
    error.title = adapter.error;
    cell.append(" ", error);
  }
  return cell;
}

const tierCell = (tier) => make("td", "", make("span", `tier ${tier}`, TIERS[tier] ?? tier));

function loadTimes({ num_loads: loads, load_mean_ms: mean, load_max_ms: max }) {
  if (!loads) return "–";
  return loads === 1 ? count(max) : `${count(mean)}, at most ${count(max)}`;
}
