// The live view: receives what the server measures twice a second, and shows it.

import { AdapterTable } from "./adapter_table.js";
import { events } from "./api.js";
import { RateChart } from "./chart.js";
import { byId, count, describe, make, milliseconds, rate } from "./format.js";
import { PoolView } from "./pool.js";

const RETRY_MS = 2000;
const SILENT_MS = 3000; // after this long without a view the page says so

export class LiveView {
  #abort = null;
  #askForKey;
  #heardAt = null; // time of the last view of this connection
  #chart = new RateChart(byId("tokens-chart"));
  #pool = new PoolView(byId("pools"), byId("cell"), (content) => this.#table.mark(content));
  #table = new AdapterTable(byId("adapters"), (content) => this.#pool.highlight(content));

  // `askForKey` is called with a reason when the server wants a key.
  constructor(askForKey) {
    this.#askForKey = askForKey;
    setInterval(() => this.#checkSilence(), 1000);
    let width = 0;
    new ResizeObserver(() => {
      if (byId("pools").clientWidth === width) return; // the height is of our own making
      width = byId("pools").clientWidth;
      this.repaint();
    }).observe(byId("pools"));
  }

  // Follows the server until stop(). Does nothing if it does so already.
  async start() {
    if (this.#abort) return;
    const abort = (this.#abort = new AbortController());
    while (!abort.signal.aborted) {
      try {
        for await (const view of events("loraplex/live", { signal: abort.signal })) this.#show(view);
        this.#heardAt = null;
        this.#say("The server has closed the connection. Trying again.", true);
      } catch (error) {
        if (abort.signal.aborted) return;
        this.#heardAt = null;
        this.#say(`${error.message}. Trying again.`, true);
        if (error.status === 401 || error.status === 403) {
          this.#say(error.message, true);
          this.#abort = null;
          this.#askForKey(error.message);
          return;
        }
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  stop() {
    this.#abort?.abort();
    this.#abort = null;
    this.#heardAt = null;
  }

  #checkSilence() {
    const silence = performance.now() - (this.#heardAt ?? performance.now());
    if (silence > SILENT_MS) this.#say(`The engine has not answered for ${count(silence / 1000)} s.`, true);
  }

  repaint() {
    this.#pool.paint();
    this.#chart.paint();
  }

  #say(text, isProblem = false) {
    if (byId("live-state").textContent !== text) byId("live-state").textContent = text;
    byId("live-state").classList.toggle("failed", isProblem);
  }

  #show(view) {
    const { load, rates, first_token: first, pages, totals, adapter_counts: adapters } = view;
    this.#heardAt = performance.now();
    this.#say("Live, twice a second.");
    byId("tokens-rate").textContent = rate(rates.generated_tokens);
    this.#chart.add(view.time, rates.generated_tokens);
    byId("running").replaceChildren(count(load.running), make("small", "", " running"));
    describe(byId("queue"), [
      ["waiting", count(load.waiting)],
      ["… for their adapter", count(load.waiting_for_adapter)],
      ["computed tokens/s", rate(rates.computed_tokens)],
      ["prompts from cache", share(totals.prefix_hit_tokens, totals.prefix_query_tokens)],
    ]);
    byId("first-token").replaceChildren(milliseconds(first.p50_ms), make("small", "", " median"));
    describe(byId("percentiles"), [
      ["90 %", milliseconds(first.p90_ms)],
      ["99 %", milliseconds(first.p99_ms)],
      ["requests", count(first.count)],
      ["over", first.window_s === null ? "all time" : `the last ${count(first.window_s)} s`],
    ]);
    byId("resident").replaceChildren(
      count(adapters.num_resident_adapters), make("small", "", ` of ${count(adapters.registered_adapters)}`),
    );
    describe(byId("tiers"), [
      ["in host memory", count(adapters.host_adapters)],
      ["pinned", count(adapters.pinned_adapters)],
      ["loads so far", count(adapters.num_adapter_loads)],
      ["evictions so far", count(adapters.num_adapter_unloads)],
    ]);
    for (const kind of ["kv", "prefix", "adapter", "free"]) {
      byId(`pages-${kind}`).textContent = count(pages[`pages_${kind}`]);
    }
    this.#pool.show(view.pools);
    this.#table.show(view.adapters, view.num_adapters_left_out);
  }
}

const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(0)} %` : "–");
