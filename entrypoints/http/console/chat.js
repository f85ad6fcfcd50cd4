// The chat: one prompt goes to one model, or to two that stand side by side.

import { getJson } from "./api.js";
import { ChatColumn } from "./chat_column.js";
import { byId } from "./format.js";

const MANY_MODELS = 20; // from here on a filter is shown

export class ChatView {
  #columns = [];
  #models = [];
  #askForKey;

  // `askForKey` is called with a reason when the server wants a key.
  constructor(askForKey) {
    this.#askForKey = askForKey;
    for (const _ of [0, 1]) this.#columns.push(new ChatColumn());
    byId("columns").append(...this.#columns.map((column) => column.element));
    this.#setNumber(1);
    byId("one").addEventListener("click", () => this.#setNumber(1));
    byId("two").addEventListener("click", () => this.#setNumber(2));
    byId("clear").addEventListener("click", () => this.#clear());
    byId("stop").addEventListener("click", () => this.#columns.forEach((column) => column.stop()));
    byId("filter").addEventListener("input", () => this.#showModels());
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#send();
      }
    });
    byId("columns").addEventListener("focusin", (event) => {
      if (event.target.matches("select")) this.#refresh();
    });
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !byId("stop").hidden) byId("stop").click();
    });
  }

  // `models` are names, that of the base model first.
  setModels(models, problem = "") {
    this.#models = models;
    byId("filter-label").hidden = models.length < MANY_MODELS;
    this.#showModels();
    if (problem) this.#columns[0].fail(problem);
  }

  choose(model) {
    if (!this.#models.includes(model)) return;
    byId("filter").value = "";
    this.#showModels();
    this.#columns[0].model = model;
    byId("prompt").focus();
  }

  // Adapters come and go while the page is open.
  async #refresh() {
    try {
      const { data } = await getJson("v1/models");
      const names = data.map((model) => model.id);
      if (names.join("\n") !== this.#models.join("\n")) this.setModels(names);
    } catch {
      // The next message tells.
    }
  }

  #showModels() {
    const wanted = byId("filter").value.toLowerCase();
    const names = this.#models.filter((name) => name.toLowerCase().includes(wanted));
    this.#columns.forEach((column, index) => column.setModels(names, this.#models[0], index));
  }

  #setNumber(number) {
    byId("one").setAttribute("aria-pressed", number === 1);
    byId("two").setAttribute("aria-pressed", number === 2);
    this.#columns[1].element.hidden = number === 1;
    if (number === 1) this.#columns[1].stop();
  }

  #clear() {
    for (const column of this.#columns) column.clear();
    byId("prompt").focus();
  }

  async #send() {
    const prompt = byId("prompt").value.trim();
    if (!prompt || !byId("stop").hidden) return;
    byId("prompt").value = "";
    const options = {};
    if (byId("temperature").value !== "") options.temperature = Number(byId("temperature").value);
    if (byId("max-tokens").value !== "") options.max_tokens = Number(byId("max-tokens").value);
    const system = byId("system").value.trim();
    const shown = this.#columns.filter((column) => !column.element.hidden);
    this.#setBusy(true);
    const errors = await Promise.all(shown.map((column) => column.ask(prompt, system, options)));
    this.#setBusy(false);
    const refused = errors.find((error) => error?.status === 401);
    if (refused) this.#askForKey(refused.message);
  }

  #setBusy(isBusy) {
    byId("send").hidden = isBusy;
    byId("stop").hidden = !isBusy;
    if (!isBusy) byId("prompt").focus();
  }
}
