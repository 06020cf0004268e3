// The chat page. What models and users write is only ever inserted as text.

import { ApiError, listModels, renderTemplate, stream } from "./api.js";

const STORE = "jax-it";
const $ = (id) => document.getElementById(id);
const settings = $("settings");
const numbers = [...settings.querySelectorAll("input[type=number]")];

// Everything that survives a reload; the key survives only in this tab.
const saved = { model: "", mode: "chat", system: "", numbers: {}, messages: [], showSettings: innerWidth > 1000 };
try {
  Object.assign(saved, JSON.parse(localStorage.getItem(STORE)));
} catch {
  // What was stored is not ours, or storage is off.
}
let models = [];
let running = null; // the AbortController of the answer that is being generated

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify(saved));
  } catch {
    // Storage is full or off: the conversation lasts as long as the tab.
  }
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const button = (text, onclick, label = text) => {
  const made = element("button", { type: "button", textContent: text, onclick });
  if (label !== text) made.setAttribute("aria-label", label);
  return made;
};

// Models and settings

const model = () => models.find((each) => each.id === saved.model);
const isChat = () => Boolean(model()?.has_chat_template) && saved.mode === "chat";

async function loadModels() {
  try {
    models = await listModels($("key").value);
  } catch (error) {
    fail(error);
    return;
  }
  $("error").textContent = "";
  $("model").replaceChildren(...models.map(({ id }) => element("option", { value: id, textContent: id })));
  if (!model()) saved.model = models[0].id;
  showModel();
}

function showModel() {
  const { has_chat_template: hasTemplate, templates, max_new_tokens: limit } = model();
  const chat = isChat();
  $("model").value = saved.model;
  $("mode").value = chat ? "chat" : "prompt";
  $("mode").disabled = !hasTemplate;
  $("system-field").hidden = !chat;
  const field = settings.elements.max_tokens;
  field.max = limit;
  field.placeholder = limit;
  $("template-field").hidden = chat || templates.length === 0;
  $("template").replaceChildren(
    element("option", { value: "", textContent: "None: the prompt as it is" }),
    ...templates.map((each, value) => element("option", { value, textContent: shorten(each.template) })),
  );
  showTemplate();
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("prompt").placeholder = chat ? "Message" : "Prompt";
  $("new-chat").textContent = chat ? "New chat" : "Clear";
  $("empty").textContent = chat
    ? `Ask ${saved.model} something.`
    : `Write a prompt for ${saved.model}. Each prompt is answered by itself.`;
}

const shorten = (text) => (text.length > 70 ? `${text.slice(0, 69)}…` : text);
const template = () => ($("template").value === "" ? null : model().templates[$("template").value]);

function showTemplate() {
  const chosen = isChat() ? null : template();
  $("prompt-field").hidden = Boolean(chosen);
  $("fields").hidden = !chosen;
  $("fields").replaceChildren(
    ...(chosen?.fields ?? []).map((name) => element("label", {}, name, element("textarea", { name, rows: 2 }))),
  );
}

function fail(error) {
  $("error").textContent = error.message;
  if (error.status === 401) {
    $("key-field").hidden = false;
    showSettings(true);
    $("key").focus();
  }
}

function showSettings(show) {
  settings.hidden = !show;
  $("toggle-settings").setAttribute("aria-expanded", show);
  saved.showSettings = show;
  save();
}

/** Returns the fields of a request that are set, or null after pointing at one that is not valid. */
function readNumbers() {
  const invalid = numbers.find((field) => !field.validity.valid);
  if (invalid) {
    showSettings(true);
    invalid.reportValidity();
    return null;
  }
  const set = numbers.filter((field) => field.value !== "");
  return Object.fromEntries(set.map((field) => [field.name, Number(field.value)]));
}

// The conversation

function showMessages() {
  $("messages").replaceChildren(...saved.messages.map(row));
  $("empty").hidden = saved.messages.length > 0;
  $("messages").scrollTop = $("messages").scrollHeight;
}

function row(message, index) {
  const isUser = message.role === "user";
  const name = isUser ? "You" : message.model;
  const item = element("li", { className: message.role });
  const tools = element("div", { className: "tools" });
  item.append(element("h2", { textContent: name }), element("div", { className: "text", textContent: message.content }));
  if (message.error) item.append(element("p", { className: "failure", textContent: message.error }));
  if (isUser) tools.append(button("Edit", () => edit(item, index), `Edit message ${index + 1}`));
  else tools.append(button("Regenerate", () => answer(index), `Regenerate message ${index + 1}`));
  if (message.content) tools.append(button("Copy", (event) => copy(event.target, message.content), `Copy message ${index + 1}`));
  if (message.note) tools.append(element("small", { textContent: message.note }));
  item.append(tools);
  return item;
}

async function copy(from, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without HTTPS there is no clipboard but this.
    const area = element("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    from.focus();
  }
  from.textContent = "Copied";
  setTimeout(() => (from.textContent = "Copy"), 1500);
}

function edit(item, index) {
  const area = element("textarea", { value: saved.messages[index].content, rows: 4 });
  area.setAttribute("aria-label", `Message ${index + 1}`);
  const resend = () => area.value.trim() && send(area.value, index);
  area.onkeydown = (event) => {
    if (isSendKey(event)) resend();
    if (event.key === "Escape") showMessages();
  };
  const tools = element("div", { className: "tools" }, button("Resend", resend), button("Cancel", showMessages));
  item.replaceChildren(item.firstChild, area, tools);
  area.focus();
}

/** Puts a user's message at a place of the conversation, drops what came after it, and answers it. */
function send(content, index = saved.messages.length) {
  if (running) return;
  saved.messages.splice(index, Infinity, { role: "user", content });
  answer(index + 1);
}

/** Generates the message at a place of the conversation, and drops what came after it. */
async function answer(index) {
  const fields = readNumbers();
  if (running || !fields || !model()) return;
  running = new AbortController();
  const message = { role: "assistant", content: "", model: saved.model };
  saved.messages.splice(index, Infinity, message);
  showMessages();
  setRunning(true);
  const item = $("messages").lastChild;
  item.classList.add("running");
  const text = document.createTextNode("");
  item.querySelector(".text").append(text);
  let first = 0;
  let usage = null;
  let reason = "";
  try {
    for await (const chunk of stream(...requestFor(index, fields), running.signal)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const added = choice.delta?.content ?? choice.text ?? "";
      if (!added) continue;
      first ||= performance.now();
      message.content += added;
      const log = $("messages");
      const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      text.appendData(added);
      if (isAtEnd) log.scrollTop = log.scrollHeight;
    }
    message.note = describe(usage, reason, (performance.now() - first) / 1000);
  } catch (error) {
    if (error.name === "AbortError") message.note = "Stopped";
    else if (error instanceof ApiError) message.error = error.message;
    else throw error;
    if (error.status === 401) fail(error);
  } finally {
    running = null;
    setRunning(false);
    showMessages();
    save();
    $("live").textContent = message.error ?? (message.note === "Stopped" ? "Stopped" : message.content);
  }
}

function requestFor(index, fields) {
  const key = $("key").value;
  const before = saved.messages.slice(0, index);
  if (isChat()) {
    // A question without an answer is left out with it: users and assistants take turns.
    const isAnswered = (at) => at === index - 1 || before[at | 1].content !== "";
    const messages = before.filter((_, at) => isAnswered(at)).map(({ role, content }) => ({ role, content }));
    if (saved.system.trim()) messages.unshift({ role: "system", content: saved.system });
    return ["v1/chat/completions", key, { model: saved.model, messages, ...fields }];
  }
  const limits = { max_tokens: model().max_new_tokens, ...fields };
  return ["v1/completions", key, { model: saved.model, prompt: before.at(-1).content, ...limits }];
}

/** Says how many tokens were read and written, and how fast after the first part. */
function describe(usage, reason, seconds) {
  const { prompt_tokens: read, completion_tokens: written } = usage;
  const rate = written > 1 && seconds > 0 ? `, ${((written - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `${read} → ${written} tokens${rate}${reason === "length" ? ", cut at max new tokens" : ""}`;
}

function setRunning(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  for (const each of $("messages").querySelectorAll("button")) each.disabled = on;
  $("new-chat").disabled = on;
  if (on) $("live").textContent = "Generating";
}

// Events

const isSendKey = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

async function submit() {
  if (running || !model() || !readNumbers()) return;
  $("error").textContent = "";
  const chosen = isChat() ? null : template();
  if (!chosen) {
    if (!$("prompt").value.trim()) return;
    send($("prompt").value);
    $("prompt").value = "";
    return;
  }
  const fields = Object.fromEntries([...$("fields").querySelectorAll("textarea")].map((each) => [each.name, each.value]));
  try {
    send(await renderTemplate($("key").value, saved.model, chosen.template, fields));
  } catch (error) {
    fail(error);
  }
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
$("ask").onkeydown = (event) => {
  if (event.target.tagName !== "TEXTAREA" || !isSendKey(event)) return;
  event.preventDefault();
  submit();
};
const stop = () => {
  running?.abort();
  $("prompt").focus();
};
$("stop").onclick = stop;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
});
$("new-chat").onclick = () => {
  saved.messages = [];
  save();
  showMessages();
  $("prompt").focus();
};
$("toggle-settings").onclick = () => showSettings(settings.hidden);
$("template").onchange = showTemplate;
settings.onsubmit = (event) => event.preventDefault();
settings.onchange = () => {
  saved.system = $("system").value;
  if (!$("mode").disabled) saved.mode = $("mode").value;
  saved.numbers = Object.fromEntries(numbers.map((field) => [field.name, field.value]));
  save();
  if (model()) showModel();
};
$("model").onchange = () => {
  saved.model = $("model").value;
  save();
  showModel();
};
$("key").onchange = () => {
  sessionStorage.setItem(STORE, $("key").value);
  loadModels();
};
$("reset").onclick = () => {
  for (const field of numbers) field.value = "";
  $("system").value = "";
  settings.onchange();
};

$("key").value = sessionStorage.getItem(STORE) ?? "";
$("key-field").hidden = !$("key").value;
$("system").value = saved.system;
for (const field of numbers) field.value = saved.numbers[field.name] ?? "";
showSettings(saved.showSettings);
showMessages();
loadModels();
