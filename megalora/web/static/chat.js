"use strict";
// The chat page: one conversation for each pane, all told the same messages. Text is only ever set as text.

const NEAR_END = 60; // pixels from the end of a conversation at which its end is read
const IMAGES = ["image/gif", "image/jpeg", "image/png", "image/webp"]; // that the server reads
const MOST_BYTES = 6e6; // of an image: its request, in base64, may have 8 MiB
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

  /**
   * Send a message and show the reply as it comes. A message that gets no reply is taken back: false then.
   * image: a data URL, for a model that reads one with each text, and does not chat; else null.
   */
  async say(text, image, options, signal) {
    const turn = element("div", "turn waits");
    const thinking = element("details");
    const thought = element("div", "text");
    const answer = element("div", "text answer");
    const end = element("div", "end");
    thinking.append(element("summary", "", "thinking"), thought);
    thinking.hidden = true;
    turn.append(thinking, answer, end);
    const said = element("div", "turn user text", text);
    if (image) {
      const shown = element("img");
      shown.src = image;
      shown.alt = "the image of this message";
      shown.addEventListener("load", () => { this.root.scrollTop = this.root.scrollHeight; }); // it has a height now
      said.prepend(shown);
    }
    this.turns.append(said, turn);
    this.root.scrollTop = this.root.scrollHeight;
    const parts = [{ type: "image_url", image_url: { url: image } }, { type: "text", text }];
    const asked = image ? [{ role: "user", content: parts }] : [...this.messages, { role: "user", content: text }];
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
    if (!image) this.messages = [...asked, { role: "assistant", content: answer.textContent || " " }];
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

/** The image beside the next messages, of a model that reads one: chosen or pasted, and kept until it is removed. */
class Attachment {
  constructor() {
    $("attached").hidden = $("attach").hidden = false;
    $("attach").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => { this.take($("file").files[0]); $("file").value = ""; });
    $("detach").addEventListener("click", () => this.remove());
    document.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
      if (!file || event.clipboardData.types.includes("text/plain")) return; // a cell or a word has its picture too
      event.preventDefault();
      this.take(file);
    });
    this.remove();
  }

  remove() {
    this.show(null, "This model reads an image with each message: attach or paste one.");
  }

  /** Keep a file as a data URL, or say why it cannot be sent. */
  take(file) {
    if (!file) return;
    if (!IMAGES.includes(file.type)) return this.fail(`${file.name} is no GIF, JPEG, PNG or WEBP image`);
    if (file.size > MOST_BYTES) return this.fail(`${file.name} has more than ${MOST_BYTES / 1e6} MB: scale it down`);
    const reader = new FileReader();
    reader.addEventListener("load", () => this.show(reader.result, `${file.name}: stays until it is removed`));
    reader.addEventListener("error", () => this.fail(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  }

  fail(why) {
    this.show(this.url, why);
    $("about").classList.add("fault");
  }

  show(url, about) {
    this.url = url;
    $("thumbnail").hidden = $("detach").hidden = !url;
    if (url) $("thumbnail").src = url;
    else $("thumbnail").removeAttribute("src");
    $("about").textContent = about;
    $("about").classList.remove("fault");
  }
}

async function main() {
  const panes = [];
  let running = null;
  const answer = await json("v1/models");
  const names = answer.data.map((model) => model.id);
  const attachment = answer.data[0].input_modalities.includes("image") ? new Attachment() : null;

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
    const text = $("message").value, image = attachment ? attachment.url : null;
    if (running || !(text.trim() || image)) return;
    if (attachment && !image) return attachment.fail("Attach an image first: this model reads one with each message.");
    running = new AbortController();
    $("message").value = "";
    $("send").hidden = true;
    $("stop").hidden = false;
    $("compare").disabled = true;
    const replied = await Promise.all(panes.map((pane) => pane.say(text, image, parameters(), running.signal)));
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
  if (attachment) { // its requests have one message
    $("system").value = "";
    $("system").parentElement.hidden = true;
  }
  $("settings").addEventListener("click", () => settings($("parameters").hidden));
  $("compare").addEventListener("change", show);
  $("anew").addEventListener("click", () => {
    running?.abort();
    panes.forEach((pane) => pane.forget());
    attachment?.remove();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  show();
}

main().catch((error) => { $("panes").textContent = `The models cannot be listed: ${error.message}`; });
