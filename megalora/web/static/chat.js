"use strict";
// The chat page: one conversation for each pane, all told the same messages. Text is only ever set as text.

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

  /** Send a message and show the reply as it comes. A message that gets no reply is taken back. */
  async say(text, options, signal) {
    this.turns.append(element("div", "turn user text", text));
    const turn = element("div", "turn");
    const thinking = element("details");
    const thought = element("div", "text");
    const answer = element("div", "text answer");
    const end = element("div", "end");
    thinking.append(element("summary", "", "thinking"), thought);
    thinking.hidden = true;
    turn.append(thinking, answer, end);
    this.turns.append(turn);
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
        if (choice.delta.reasoning_content) {
          thinking.hidden = false;
          thought.textContent += choice.delta.reasoning_content;
        }
        if (choice.delta.content) answer.textContent += choice.delta.content;
        if (choice.finish_reason === "length") end.textContent = "cut at max_tokens";
        this.root.scrollTop = this.root.scrollHeight;
      }
      const seconds = (performance.now() - started) / 1000;
      end.textContent += ` ${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second`;
    } catch (error) {
      const stopped = error.name === "AbortError";
      end.textContent = stopped ? "stopped" : error.message;
      end.classList.toggle("fault", !stopped);
      if (!answer.textContent) return;
    }
    turn.dataset.done = "true";
    this.messages = [...asked, { role: "assistant", content: answer.textContent || " " }];
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

  function show() {
    const wanted = $("compare").checked ? 2 : 1;
    // Alone, the newest adapter; of two, the base and it.
    const models = wanted === 2 ? [names[0], names.at(-1)] : [names.at(-1)];
    panes.splice(0, panes.length, ...models.map((model) => new Pane(names, model)));
    $("panes").replaceChildren(...panes.map((pane) => pane.root));
  }

  async function send() {
    const text = $("message").value;
    if (!text.trim() || running) return;
    running = new AbortController();
    $("message").value = "";
    $("send").hidden = true;
    $("stop").hidden = false;
    await Promise.all(panes.map((pane) => pane.say(text, parameters(), running.signal)));
    running = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    $("message").focus();
  }

  $("compare").checked = names.length > 1;
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
