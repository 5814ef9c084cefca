"use strict";
// The chat page: one conversation for each pane, all told the same messages. Text is only ever set as text.

const NEAR_END = 60; // pixels from the end of a conversation at which its end is read
const WIDE = "(min-width: 641px)"; // as in page.css

/** A model, and the messages that it has been told and has replied with. */
class Pane {
  constructor(models, model) {
    this.messages = [];
    this.root = element("section", "pane");
    this.choice = element("select");
    this.choice.setAttribute("aria-label", "model");
    for (const name of models) this.choice.append(new Option(name, name, false, name === model));
    this.turns = element("div");
    this.root.append(this.choice, this.turns);
  }

  forget() {
    this.messages = [];
    this.turns.replaceChildren();
  }

  /** Change what is shown, and go on showing its end, unless someone has scrolled up. */
  grow(change) {
    const follows = this.root.scrollHeight - this.root.scrollTop - this.root.clientHeight < NEAR_END;
    change();
    if (follows) this.root.scrollTop = this.root.scrollHeight;
  }

  /** Send a message and show the reply as it comes. A message that gets no reply is taken back: false then. */
  async say(text, options, signal) {
    const turn = element("div", "turn waits");
    const thinking = element("details");
    const thought = element("div", "text");
    const answer = element("div", "text answer");
    const end = element("div", "end");
    thinking.append(element("summary", "", "thinking"), thought);
    thinking.hidden = true;
    turn.append(thinking, answer, end);
    this.turns.append(element("div", "turn user text", text), turn);
    this.root.scrollTop = this.root.scrollHeight;
    const asked = [...this.messages, { role: "user", content: text }];
    const system = options.system ? [{ role: "system", content: options.system }] : [];
    const body = { ...options.body, model: this.choice.value, messages: [...system, ...asked], stream: true };
    const started = performance.now();
    let tokens = 0;
    try {
      for await (const chunk of events("v1/chat/completions", body, signal)) {
        if (chunk.error) throw new Error(chunk.error.message);
        const choice = chunk.choices[0];
        if (chunk.usage) tokens = chunk.usage.completion_tokens;
        if (!choice) continue;
        this.grow(() => {
          if (choice.delta.reasoning_content) {
            thinking.hidden = false;
            thought.textContent += choice.delta.reasoning_content;
          }
          if (choice.delta.content) answer.textContent += choice.delta.content;
          if (choice.finish_reason === "length") end.textContent = "cut at max_tokens, ";
        });
      }
      const seconds = (performance.now() - started) / 1000;
      this.grow(() => { end.textContent += `${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second`; });
    } catch (error) {
      const stopped = error.name === "AbortError";
      this.grow(() => { end.textContent = stopped ? "stopped" : error.message; });
      end.classList.toggle("fault", !stopped);
      if (turn.isConnected && !answer.textContent) return false;
    } finally {
      turn.classList.remove("waits");
    }
    if (!turn.isConnected) return true; // a new chat has begun
    turn.dataset.done = "true";
    this.messages = [...asked, { role: "assistant", content: answer.textContent || " " }];
    return true;
  }
}

/** The objects of a stream of server-sent events. */
async function* events(path, body, signal) {
  const options = { ...body, stream_options: { include_usage: true } };
  const headers = { "Content-Type": "application/json" };
  const response = await answered(path, { method: "POST", signal, headers, body: JSON.stringify(options) });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function parameters() {
  const body = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  return { body, system: $("system").value.trim() };
}

async function main() {
  const panes = [];
  let running = null;
  const answer = await json("v1/models");
  const names = answer.data.map((model) => model.id);

  /** The newest adapter, and before it the base where two are compared. The conversation goes on. */
  function show() {
    if (!panes.length) panes.push(new Pane(names, names.at(-1)));
    if ($("compare").checked) panes.unshift(new Pane(names, names[0]));
    else panes.splice(0, panes.length - 1);
    $("panes").replaceChildren(...panes.map((pane) => pane.root));
    for (const { root } of panes) root.scrollTop = root.scrollHeight;
  }

  function settings(shown) {
    $("parameters").hidden = !shown;
    $("settings").setAttribute("aria-expanded", shown);
  }

  async function send() {
    const text = $("message").value;
    if (!text.trim() || running) return;
    running = new AbortController();
    $("message").value = "";
    $("send").hidden = true;
    $("stop").hidden = false;
    $("compare").disabled = true;
    const replied = await Promise.all(panes.map((pane) => pane.say(text, parameters(), running.signal)));
    running = null;
    $("compare").disabled = false;
    if (!replied.includes(true) && !$("message").value) $("message").value = text;
    $("send").hidden = false;
    $("stop").hidden = true;
    $("message").focus();
  }

  const wide = matchMedia(WIDE).matches;
  $("compare").checked = wide && names.length > 1;
  settings(wide);
  $("settings").addEventListener("click", () => settings($("parameters").hidden));
  $("compare").addEventListener("change", show);
  $("anew").addEventListener("click", () => { running?.abort(); panes.forEach((pane) => pane.forget()); });
  $("stop").addEventListener("click", () => running?.abort());
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  show();
}

main().catch((error) => { $("panes").textContent = `The models cannot be listed: ${error.message}`; });
