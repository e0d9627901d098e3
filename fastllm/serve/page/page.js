// The page: a conversation over /v1/chat/completions, and four small charts from /metrics. Nothing is loaded from
// elsewhere and nothing is stored; the key stays in its field.

const HISTORY = 120; // points of a chart
const EVERY_MS = 1000;
const find = (id) => document.getElementById(id);
const history = { rate: [], waiting: [], cache: [], first: [] };
let conversation = [];
let running = null; // AbortController of the answer under way
let tokensBefore = null;

function headers() {
  const key = find("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

function say(text, wrong = false) {
  find("state").textContent = text;
  find("state").classList.toggle("wrong", wrong);
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

// ---- models ---------------------------------------------------------------------------------------------------

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) {
    say(await problem(response), true);
    return;
  }
  const select = find("model");
  const chosen = select.value;
  select.replaceChildren(...(await response.json()).data.map((model) => new Option(model.id, model.id)));
  if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
  say("ready");
}

// ---- the conversation -----------------------------------------------------------------------------------------

function show(role, text) {
  const box = document.createElement("div");
  box.className = `message ${role}`;
  const thought = document.createElement("details");
  const summary = document.createElement("summary");
  const thoughtText = document.createElement("div");
  const body = document.createElement("div");
  const note = document.createElement("small");
  summary.textContent = "Reasoning";
  thought.append(summary, thoughtText);
  thought.hidden = note.hidden = true;
  body.textContent = text;
  box.append(thought, body, note);
  find("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return { box, body, note, thought, thoughtText };
}

function parameters() {
  const body = { model: find("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"]) {
    const value = find(name).value;
    if (value !== "") body[name] = Number(value);
  }
  const system = find("system").value.trim();
  body.messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer() {
  const shown = show("assistant", "");
  running = new AbortController();
  find("send").disabled = true;
  find("stop").disabled = false;
  const begin = performance.now();
  let first = 0, last = begin, text = "", pieces = 0, usage = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify(parameters()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const delta = event.choices[0]?.delta ?? {};
      if (delta.reasoning_content) {
        shown.thought.hidden = false;
        shown.thoughtText.textContent += delta.reasoning_content;
      }
      if (delta.content) {
        text += delta.content;
        shown.body.textContent = text;
      }
      if (delta.content || delta.reasoning_content) {
        last = performance.now();
        if (!first) first = last;
        pieces += 1;
        note(shown, first - begin, pieces, last - first);
        shown.box.scrollIntoView({ block: "end" });
      }
    }
    if (usage) note(shown, first - begin, usage.completion_tokens, last - first);
  } catch (error) {
    if (error.name === "AbortError") {
      shown.note.textContent += " · stopped";
    } else {
      shown.box.classList.add("wrong");
      shown.body.textContent = text ? `${text}\n${error.message}` : error.message;
    }
  } finally {
    running = null;
    find("send").disabled = false;
    find("stop").disabled = true;
    if (text) conversation.push({ role: "assistant", content: text });
    else conversation.pop();
  }
}

function note(shown, firstMs, tokens, restMs) {
  const rate = tokens > 1 && restMs > 0 ? ((tokens - 1) / restMs) * 1000 : 0;
  shown.note.hidden = false;
  shown.note.textContent = `${tokens} tokens · ${rate.toFixed(1)} tokens/s · first after ${firstMs.toFixed(0)} ms`;
}

// ---- figures --------------------------------------------------------------------------------------------------

function sum(text, name) {
  let total = 0, found = false;
  for (const line of text.split("\n")) {
    if (line.startsWith(name) && (line[name.length] === "{" || line[name.length] === " ")) {
      total += Number(line.slice(line.lastIndexOf(" ")));
      found = true;
    }
  }
  return found ? total : null;
}

function draw(id, value, shown, most) {
  const points = history[id];
  points.push(value);
  if (points.length > HISTORY) points.shift();
  const top = most ?? Math.max(...points, 1e-9);
  const path = points.map((y, x) => `${x ? "L" : "M"}${(240 * x) / (HISTORY - 1)} ${46 - (44 * y) / top}`).join("");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  find(id).replaceChildren(line);
  find(`${id}-now`).textContent = shown;
}

let firstBefore = null;
async function measure() {
  if (document.hidden) return;
  const response = await fetch("/metrics", { headers: headers() }).catch(() => null);
  if (!response?.ok) return;
  const text = await response.text();
  const now = performance.now();
  const tokens = sum(text, "fastllm:generation_tokens_total");
  const rate = tokensBefore ? ((tokens - tokensBefore.tokens) / (now - tokensBefore.now)) * 1000 : 0;
  tokensBefore = { tokens, now };
  draw("rate", Math.max(rate, 0), rate.toFixed(0));
  const waiting = sum(text, "fastllm:num_requests_waiting") ?? 0;
  const active = sum(text, "fastllm:num_requests_running") ?? 0;
  draw("waiting", waiting, `${waiting} · ${active} running`);
  const cache = sum(text, "fastllm:kv_cache_usage_perc") ?? 0;
  draw("cache", cache, `${(100 * cache).toFixed(1)} %`, 1);
  const seconds = sum(text, "fastllm:time_to_first_token_seconds_sum") ?? 0;
  const count = sum(text, "fastllm:time_to_first_token_seconds_count") ?? 0;
  const fresh = firstBefore && count > firstBefore.count;
  const mean = fresh ? (seconds - firstBefore.seconds) / (count - firstBefore.count) : (history.first.at(-1) ?? 0);
  firstBefore = { seconds, count };
  draw("first", mean, `${(1000 * mean).toFixed(0)} ms`);
}

// ---- the beginning --------------------------------------------------------------------------------------------

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = find("input").value.trim();
  if (!text || running) return;
  find("input").value = "";
  conversation.push({ role: "user", content: text });
  show("user", text);
  answer();
});
find("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("form").requestSubmit();
  }
});
find("stop").addEventListener("click", () => running?.abort());
find("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  find("messages").replaceChildren();
});
find("key").addEventListener("change", loadModels);
loadModels().catch((error) => say(error.message, true));
setInterval(measure, EVERY_MS);
