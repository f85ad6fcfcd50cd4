// One model, the conversation with it, and the answer that is being streamed.

import { events } from "./api.js";
import { make, milliseconds } from "./format.js";

export class ChatColumn {
  #select = make("select");
  #list = make("div", "messages");
  #history = []; // messages in OpenAI's form
  #abort = null;
  #base = "";

  constructor() {
    this.#select.setAttribute("aria-label", "Model");
    this.#list.setAttribute("aria-live", "polite");
    this.element = make("section", "column", make("div", "column-head", this.#select), this.#list);
    this.clear();
  }

  get model() {
    return this.#select.value;
  }

  set model(name) {
    this.#select.value = name;
  }

  // `index` chooses what is selected first: the base model on the left, an adapter on the right.
  setModels(names, base, index) {
    const former = this.model;
    this.#base = base;
    const options = names.map((name) => {
      const option = make("option", "", name === base ? `${name} (base model)` : name);
      option.value = name;
      return option;
    });
    this.#select.replaceChildren(...options);
    this.model = names.includes(former) ? former : names[Math.min(index, names.length - 1)] ?? "";
  }

  clear() {
    this.stop();
    this.#history = [];
    this.#list.replaceChildren(make("p", "empty", "Choose a model, and write a message below."));
  }

  stop() {
    this.#abort?.abort();
  }

  fail(text) {
    this.#add("failed", "", text);
  }

  // Sends the conversation and shows the answer as it comes. Returns the error that ended it, if any.
  async ask(prompt, system, options) {
    const model = this.model;
    this.#add("user", "", prompt);
    const answer = this.#add("running", model === this.#base ? "base model" : model);
    const question = { role: "user", content: prompt };
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.#history, question];
    const started = performance.now();
    const figures = { first: null, tokens: 0, reason: "" };
    this.#abort = new AbortController();
    let error = null;
    try {
      const body = { ...options, model, messages, stream: true, stream_options: { include_usage: true } };
      for await (const chunk of events("v1/chat/completions", { body, signal: this.#abort.signal })) {
        figures.first ??= performance.now() - started;
        figures.tokens = chunk.usage?.completion_tokens ?? figures.tokens;
        for (const choice of chunk.choices) {
          this.#write(answer, choice.delta.content ?? "");
          figures.reason = choice.finish_reason ?? figures.reason;
        }
      }
    } catch (caught) {
      if (caught.name === "AbortError") figures.reason = "stopped";
      else error = caught;
    }
    this.#abort = null;
    this.#finish(answer, figures, performance.now() - started, error);
    if (!error) this.#history.push(question, { role: "assistant", content: answer.text.textContent });
    return error;
  }

  #add(kind, who, text = "") {
    this.#list.querySelector(".empty")?.remove();
    const message = { text: make("div", "text", text), meta: make("span", "meta") };
    message.element = make("div", `message ${kind}`, message.text);
    if (who) message.element.prepend(make("span", "who", who));
    if (kind === "running") message.element.append(message.meta);
    this.#list.append(message.element);
    this.#list.scrollTop = this.#list.scrollHeight;
    return message;
  }

  #write(answer, text) {
    const list = this.#list;
    const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    answer.text.append(text);
    if (isAtEnd) list.scrollTop = list.scrollHeight;
  }

  #finish(answer, figures, duration, error) {
    answer.element.classList.remove("running");
    if (error) {
      answer.element.classList.add("failed");
      answer.text.append(error.message);
      return;
    }
    const parts = [];
    if (figures.first !== null) parts.push(`first token ${milliseconds(figures.first)}`);
    if (figures.tokens) {
      const seconds = (duration - figures.first) / 1000;
      parts.push(`${figures.tokens} tokens`);
      if (figures.tokens > 1 && seconds > 0) parts.push(`${((figures.tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    if (figures.reason === "length") parts.push("cut off at max tokens");
    if (figures.reason === "stopped") parts.push("stopped");
    answer.meta.textContent = parts.join(" · ");
    this.#list.scrollTop = this.#list.scrollHeight;
  }
}
