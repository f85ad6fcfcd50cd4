// Numbers and elements. Texts from the server become text nodes only, never HTML.

export const count = (value) => Math.round(value).toLocaleString("en");

export const rate = (value) => (value > 0 && value < 10 ? value.toFixed(1) : count(value));

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return `${(value / 1000).toFixed(value < 10000 ? 2 : 1)} s`;
  return value >= 100 ? `${count(value)} ms` : `${value.toFixed(1)} ms`;
}

export function ago(seconds) {
  if (seconds === null || seconds === undefined) return "never";
  if (seconds < 1) return "now";
  if (seconds < 120) return `${Math.floor(seconds)} s ago`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min ago`;
  return `${Math.floor(seconds / 3600)} h ago`;
}

export const byId = (id) => document.getElementById(id);

// Returns an element with a class and children, which are elements or texts.
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// Fills a <dl> with pairs of a term and a value.
export function describe(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([term, value]) => [make("dt", "", term), make("dd", "", value)]));
}
