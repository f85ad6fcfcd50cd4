// Shows the view that the address names, and keeps the key and the theme.

import { apiKey, getJson, setApiKey } from "./api.js";
import { ChatView } from "./chat.js";
import { byId } from "./format.js";
import { LiveView } from "./live.js";

const THEME = "loraplex-theme";
const chat = new ChatView(askForKey);
const live = new LiveView(askForKey);

// The address's part after "#": the view, and for a chat the model that is chosen.
function show() {
  const [view, ...rest] = location.hash.slice(1).split("/");
  const isLive = view === "live";
  byId("chat").hidden = isLive;
  byId("live").hidden = !isLive;
  for (const name of ["chat", "live"]) {
    if ((name === "live") === isLive) byId(`to-${name}`).setAttribute("aria-current", "page");
    else byId(`to-${name}`).removeAttribute("aria-current");
  }
  if (!isLive && rest.length) chat.choose(decodeURIComponent(rest.join("/")));
  follow();
}

// The server makes live views only for those who look.
function follow() {
  if (!byId("live").hidden && !document.hidden) live.start();
  else live.stop();
}

function askForKey(reason = "") {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  if (reason) byId("key-text").textContent = `${reason[0].toUpperCase()}${reason.slice(1)}.`;
  byId("key-input").value = apiKey();
  dialog.showModal();
}

byId("key").addEventListener("click", () => askForKey());
byId("key-dialog").addEventListener("close", () => {
  if (byId("key-dialog").returnValue !== "use") return;
  setApiKey(byId("key-input").value.trim());
  start();
});
byId("key-input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  byId("key-use").click();
});
byId("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark";
  const isDarkNow = isDark || (!localStorage.getItem(THEME) && matchMedia("(prefers-color-scheme: dark)").matches);
  setTheme(isDarkNow ? "light" : "dark");
});
addEventListener("hashchange", show);
document.addEventListener("visibilitychange", follow);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => live.repaint());

function setTheme(theme) {
  localStorage.setItem(THEME, theme);
  document.documentElement.style.colorScheme = theme;
  live.repaint();
}

async function start() {
  live.stop();
  try {
    const { data } = await getJson("v1/models");
    byId("model").textContent = data[0].id;
    chat.setModels(data.map((model) => model.id));
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else chat.setModels([], error.message);
  }
  show();
}

const theme = localStorage.getItem(THEME);
if (theme) document.documentElement.style.colorScheme = theme;
start();
