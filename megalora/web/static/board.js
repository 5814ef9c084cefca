"use strict";
// The board: curves, settings, rows and notes of runs. Its data comes from the server, or, in a report, from the page
// itself. Text is only ever set as text.

const COLOURS = ["#2563eb", "#e11d48", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#475569", "#b45309"];
const FIRST = ["loss", "eval/loss", "learning_rate", "grad_norm", "tokens_per_second", "memory"];
const LATER = ["epoch", "tokens", "eval/perplexity"];
const PERIOD = 600; // milliseconds between two looks at the server
const POINTS = 800;
const SPARSE = 20; // values of a curve up to which each is a dot

// ---- where the data comes from ----

const server = {
  live: true,
  runs: () => json("api/runs"),
  series(fields, range) {
    const query = new URLSearchParams(fields.map((field) => ["field", field]));
    if (range) { query.set("from", range[0]); query.set("to", range[1]); }
    query.set("points", Math.round(Math.max(200, Math.min(POINTS, (4 * POINTS) / shown().length)))); // of each curve
    return json(`api/series?${query}`);
  },
  notes: (number) => json(`api/runs/${number}/notes`),
  rows: (number) => json(`api/runs/${number}/rows`),
  replies: (number) => json(`api/runs/${number}/replies`),
};

function embedded(contents) {
  return {
    live: false,
    runs: async () => contents.runs,
    series: async (fields) => Object.fromEntries(fields.map((field) => [field, contents.series[field] ?? {}])),
    notes: async (number) => contents.notes[number],
    rows: async (number) => contents.rows[number],
    replies: async (number) => contents.replies[number],
  };
}

// ---- state ----

const source = $("data") ? embedded(JSON.parse($("data").textContent)) : server;
const state = { runs: [], hidden: new Set(), range: null, tab: "curves", plots: new Map(), drawn: "", turn: 0, asked: new Map() };
const shown = () => state.runs.map((run, number) => number).filter((number) => !state.hidden.has(state.runs[number].folder));
const colour = (number) => COLOURS[number % COLOURS.length];

// ---- runs ----

function stateOf(run) {
  const steps = run.total_steps ? `${run.last_step} of ${run.total_steps}` : `${run.last_step}`;
  const loss = run.latest.loss === undefined ? "" : `, loss ${run.latest.loss.toPrecision(4)}`;
  const done = run.total_steps && run.last_step >= run.total_steps;
  const age = run.seconds_ago;
  const ago = !source.live || done || age === null || age < 90 ? "" : `, no step for ${span(age)}`;
  return `step ${steps}${loss}${done ? ", done" : ago}${run.complete || !source.live ? "" : ", reading on"}`;
}

function span(seconds) {
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

function showRuns() {
  const told = JSON.stringify(state.runs.map((run) => [run.folder, run.name, stateOf(run)]));
  if (told === state.told) return; // else a box would lose the focus
  state.told = told;
  $("runs").replaceChildren(...state.runs.map((run, number) => {
    const line = element("label", "run");
    const box = element("input");
    box.type = "checkbox";
    box.checked = !state.hidden.has(run.folder);
    box.addEventListener("change", () => {
      box.checked ? state.hidden.delete(run.folder) : state.hidden.add(run.folder);
      state.drawn = "";
      redraw();
    });
    const swatch = element("span", "swatch");
    swatch.style.background = colour(number);
    const name = element("span", "name", run.name);
    name.title = run.folder;
    line.append(box, swatch, name, element("span", "state faint", stateOf(run)));
    return line;
  }));
  if (!state.runs.length) $("runs").textContent = "There is no run yet; this page shows it once it has begun.";
}

// ---- curves ----

const widthOf = (card) => Math.max(200, card.clientWidth - 18);
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const chart = state.plots.get(target.dataset.field)?.chart;
    if (chart && target.clientWidth && chart.width !== widthOf(target)) chart.setSize({ width: widthOf(target), height: 220 });
  }
});

function fieldsShown() {
  const all = new Set(shown().flatMap((number) => state.runs[number].fields));
  const rank = (field) => {
    const first = FIRST.findIndex((name) => field === name || (name === "memory" && field.startsWith("memory")));
    return first >= 0 ? first : LATER.includes(field) ? 200 : field.includes("/") ? 300 : 100;
  };
  return [...all].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b)).slice(0, 40);
}

/** An exponential mean that starts at the first value, by the share of what came before. */
function smoothed(values, share) {
  let mean = values[0];
  return share === 0 ? values : values.map((value) => (mean = share * mean + (1 - share) * value));
}

/** The curves of several runs over one row of steps. */
function aligned(curves, share) {
  const numbers = Object.keys(curves).map(Number).filter((number) => shown().includes(number));
  const steps = [...new Set(numbers.flatMap((number) => curves[number][0]))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, at) => [step, at]));
  const columns = numbers.map((number) => {
    const column = new Array(steps.length).fill(undefined);
    const values = smoothed(curves[number][1], share);
    curves[number][0].forEach((step, at) => { column[place.get(step)] = values[at]; });
    return column;
  });
  return { numbers, data: [steps, ...columns] };
}

/** Whether a curve has so few values that a line does not show them: of one there is none. */
function isSparse(plot, series) {
  return plot.data[series].filter((value) => value !== undefined).length <= SPARSE;
}

function draw(field, curves) {
  const { numbers, data } = aligned(curves, Number($("smoothing").value));
  const log = $("log").checked && data.slice(1).every((column) => column.every((value) => value === undefined || value > 0));
  const kind = `${numbers} ${log} ${matchMedia("(prefers-color-scheme: dark)").matches}`;
  let plot = state.plots.get(field);
  if (plot && plot.kind === kind) {
    plot.chart.setData(data, true);
    return;
  }
  if (plot) plot.chart.destroy();
  const card = plot?.card ?? element("div", "chart");
  if (!plot) {
    card.dataset.field = field;
    card.append(element("h3", "", field));
    $("charts").append(card);
    sizes.observe(card);
  }
  const style = getComputedStyle(document.documentElement);
  const axis = { stroke: style.getPropertyValue("--faint"), grid: { stroke: style.getPropertyValue("--line"), width: 1 } };
  const number = (u, value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(5)).toString());
  const short = (value) => (value !== null && value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
    ? value.toExponential() : String(value === null ? "" : Number(value.toPrecision(6))));
  const chart = new uPlot({
    width: widthOf(card), height: 220,
    scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
    axes: [axis, { ...axis, size: 62, values: (u, values) => values.map(short) }],
    series: [
      { label: "step" },
      ...numbers.map((run) => ({
        label: state.runs[run].name, stroke: colour(run), width: 1.5, spanGaps: true, value: number,
        points: { show: isSparse, size: 6, fill: colour(run) },
      })),
    ],
    cursor: { sync: { key: "board" }, drag: { x: true, y: false, setScale: false } },
    hooks: { setSelect: [(u) => { if (u.select.width > 3) zoom(u); }] },
  }, data, card);
  state.plots.set(field, { chart, card, kind });
}

function zoom(u) {
  const range = [u.select.left, u.select.left + u.select.width].map((at) => u.posToVal(at, "x"));
  u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  setRange(range);
}

function setRange(range) {
  state.range = range;
  $("whole").hidden = !range;
  state.drawn = "";
  redraw();
}

async function curves() {
  const fields = fieldsShown();
  const all = fields.length ? await source.series(fields, state.range) : {};
  return () => {
    for (const [field, plot] of state.plots) {
      if (!fields.includes(field)) { plot.chart.destroy(); plot.card.remove(); state.plots.delete(field); }
    }
    for (const field of fields) {
      const found = all[field] ?? {};
      draw(field, state.range && !source.live ? within(found, state.range) : found);
    }
    for (const field of fields) $("charts").append(state.plots.get(field).card); // in their order
  };
}

function within(curves, [first, last]) {
  return Object.fromEntries(Object.entries(curves).map(([number, [steps, values]]) => {
    const kept = steps.map((step, at) => at).filter((at) => steps[at] >= first && steps[at] <= last);
    return [number, [kept.map((at) => steps[at]), kept.map((at) => values[at])]];
  }));
}

// ---- settings, rows, replies, notes ----

const MOST_COPIES = 8;

/** The processes of a run: a line a pipeline stage, a box a process; those side by side in one frame share each layer. */
function layoutOf(layout) {
  const { tensor, pipeline, context, data, schedule, stages } = layout;
  const sizes = [["tensor", tensor], ["pipeline", pipeline], ["context", context], ["data", data]];
  const processes = tensor * pipeline * context * data;
  const told = sizes.filter(([, size]) => size > 1).map(([name, size]) => `${name} ${size}`).join(" x ");
  const figure = element("div", "layout");
  figure.append(element("div", "faint", `${processes} process${processes > 1 ? `es: ${told}` : ""}${schedule ? `, ${schedule}` : ""}`));
  const table = element("table");
  const copies = Math.min(MOST_COPIES, data * context);
  stages.forEach((stage, p) => {
    const line = element("tr");
    const layers = stage.layers.map(([first, last]) => (first === last ? `${first}` : `${first} to ${last}`)).join(", ");
    const share = element("td");
    const bar = element("div", "share");
    bar.style.width = `${(6 * Math.max(0, Math.min(1, stage.share))).toFixed(2)}rem`;
    share.append(bar, element("span", "faint", `${(100 * stage.share).toFixed(0)}% of the compute`));
    line.append(element("th", "", pipeline > 1 ? `stage ${p}` : "all"), element("td", "", `layers ${layers}`), share);
    for (let copy = 0; copy < copies; copy++) {
      const cell = element("td");
      const frame = element("div", "ranks");
      for (let t = 0; t < tensor; t++) frame.append(element("span", "rank", String((p * data * context + copy) * tensor + t)));
      cell.append(frame);
      line.append(cell);
    }
    if (data * context > copies) line.append(element("td", "faint", `and ${data * context - copies} more such`));
    table.append(line);
  });
  const scroll = element("div", "scroll");
  scroll.append(table);
  figure.append(scroll);
  return figure;
}

function showLayouts(runs) {
  $("layouts").replaceChildren(...runs.filter((run) => run.layout).map((run) => {
    const part = element("div");
    part.append(element("h2", "", run.name), layoutOf(run.layout));
    return part;
  }));
}

async function settings() {
  const runs = shown().map((number) => state.runs[number]);
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const head = element("tr");
  head.append(element("th", "", "flag"), ...runs.map((run) => element("th", "", run.name)));
  const lines = names.map((name) => {
    const values = runs.map((run) => run.settings[name] ?? "");
    const differs = new Set(values).size > 1;
    if ($("differences").checked && !differs) return null;
    const line = element("tr", differs ? "differs" : "");
    line.append(element("td", "", name), ...values.map((value) => element("td", "text", value)));
    return line;
  });
  return () => {
    showLayouts(runs);
    $("flags").replaceChildren(head, ...lines.filter((line) => line));
  };
}

/** What a run says once and for all, or until `version` changes: asked for when it is first seen. */
const keyOf = (what, number, version = "") => `${what} ${state.runs[number].folder} ${version}`;
async function ask(what, number, version) {
  const key = keyOf(what, number, version);
  if (!state.asked.has(key)) state.asked.set(key, source[what](number));
  try {
    return await state.asked.get(key);
  } catch (error) {
    state.asked.delete(key); // the next time it may be there
    throw error;
  }
}

async function rows() {
  if (!$("rows").childElementCount) $("rows").append(element("p", "faint", "The rows are being read …"));
  const parts = await Promise.all(shown().map(async (number) => {
    const part = element("div");
    part.append(element("h2", "", state.runs[number].name));
    const answer = await ask("rows", number);
    if (answer.problem) {
      state.asked.delete(keyOf("rows", number)); // what is in the way may go
      part.append(element("p", "faint", `The rows cannot be shown: ${answer.problem}`));
    }
    for (const document of answer.documents ?? []) {
      const card = element("div", "document");
      card.append(element("div", "faint", `row ${document.row}: ${document.tokens} tokens, ${document.trained} of them trained`));
      const text = element("pre");
      for (const [piece, trained] of document.pieces) text.append(trained ? element("span", "trained", piece) : piece);
      card.append(text);
      part.append(card);
    }
    return part;
  }));
  return () => $("rows").replaceChildren(...parts);
}

/** Of each prompt what was said at each evaluation, and when each stage computed what. */
async function replies() {
  const parts = await Promise.all(shown().map(async (number) => {
    const part = element("div");
    part.append(element("h2", "", state.runs[number].name));
    const { evaluations, timeline } = await ask("replies", number, state.runs[number].version);
    if (!evaluations.length) part.append(element("p", "faint", "No replies: a run with --sample_prompts FILE writes some."));
    (evaluations[0]?.replies ?? []).forEach(({ prompt, image }, at) => {
      const card = element("div", "document prompt");
      if (image) card.append(element("div", "faint", image));
      card.append(element("pre", "faint", prompt));
      const table = element("table");
      for (const { step, replies } of evaluations) {
        const reply = replies[at];
        if (!reply || reply.prompt !== prompt || reply.image !== image) continue;
        const line = element("tr");
        line.append(element("th", "", step === 0 ? "before" : `step ${step}`));
        line.append(element("td", "text", reply.response + (reply.finish_reason === "length" ? " ..." : "")));
        table.append(line);
      }
      card.append(table);
      part.append(card);
    });
    if (timeline) {
      const picture = element("img", "timeline"); // as a picture nothing in it can run
      picture.src = `data:image/svg+xml,${encodeURIComponent(timeline)}`;
      picture.alt = "when each pipeline stage computed what: recorded, simulated and planned";
      part.append(element("h3", "", "Pipeline timeline"), picture);
    }
    return part;
  }));
  return () => $("replies").replaceChildren(...parts);
}

async function notes() {
  const parts = await Promise.all(shown().map(async (number) => {
    const part = element("div");
    part.append(element("h2", "", state.runs[number].name));
    const notes = await ask("notes", number, state.runs[number].version);
    if (!notes.length) part.append(element("p", "faint", "Its logs have no notes."));
    for (const note of notes) {
      const rank = note.rank ? `rank ${note.rank}  ` : "";
      part.append(element("pre", note.fault ? "fault" : "", `${note.time}  ${rank}${note.text}`));
    }
    return part;
  }));
  return () => $("notes").replaceChildren(...parts);
}

// ---- the page ----

/** Draw what is asked for where it is not what is there. A tab gets its data first, and returns what puts it there. */
async function refresh() {
  const drawn = JSON.stringify([state.tab, shown(), state.range, $("smoothing").value, $("log").checked,
    $("differences").checked, state.runs.map((run) => run.version)]);
  if (drawn === state.drawn) return;
  state.drawn = drawn;
  const turn = ++state.turn;
  try {
    const put = await { curves, settings, rows, replies, notes }[state.tab]();
    if (turn === state.turn) put(); // else something else has been asked for since, and may be there already
  } catch (error) {
    state.drawn = "";
    throw error;
  }
}

const redraw = () => refresh().catch(lost);

function lost(error) {
  $("live").textContent = `not live: ${error.message}`;
}

function open(tab) {
  state.tab = tab;
  for (const button of $("tabs").children) button.setAttribute("aria-selected", button.dataset.tab === tab);
  for (const name of ["curves", "settings", "rows", "replies", "notes"]) $(name).hidden = name !== tab;
  $("tools").hidden = tab !== "curves";
  redraw();
}

async function look() {
  try {
    state.runs = await source.runs();
    showRuns();
    await refresh();
    $("live").textContent = source.live ? "live" : "";
  } catch (error) {
    lost(error);
  }
  if (source.live) setTimeout(look, document.hidden ? 10 * PERIOD : PERIOD);
}

$("tabs").addEventListener("click", (event) => { if (event.target.dataset.tab) open(event.target.dataset.tab); });
for (const name of ["smoothing", "log", "differences"]) $(name).addEventListener("input", redraw);
$("whole").addEventListener("click", () => setRange(null));
$("charts").addEventListener("dblclick", () => setRange(null));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { state.drawn = ""; redraw(); });
look();
