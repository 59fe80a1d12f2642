// Shows what the slots of the server hold: /slots for the numbers, /kv/positions for the text. What comes from the server goes into
// the page as text, never as HTML.
"use strict";

const CHUNK = 2048; // tokens that are shown at once, fewer where they are long
const STEP = 512; // of the slider
const PERIOD = 1000; // ms between two questions

const $ = (id) => document.getElementById(id);
const state = { slot: 0, isChosen: false, layer: null, head: null, first: 0, key: "", whyNoText: "", isAsking: false };
const shown = { text: "", slots: "", heads: "", turns: "", model: false, end: 0, n_tokens: 0 };

const count = (n) => n.toLocaleString("en");
const percent = (x) => `${x > 0 && x < 0.0995 ? (100 * x).toPrecision(2) : Math.round(100 * x)}\u00a0%`;
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const rate = (n, ms) => (n > 0 && ms > 0 ? ((1000 * n) / ms).toFixed(1) : "–");

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) {
    n /= 1024;
    i += 1;
  }
  return `${i === 0 || n >= 100 ? Math.round(n) : n.toPrecision(3)} ${units[i]}`;
}

// what is shown, and the number that it is
function put(id, text, value) {
  const element = $(id);
  if (element.textContent !== text) element.textContent = text;
  if (value !== undefined) element.dataset.value = value;
}

function make(name, text, className) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

// 0 = held by none, 4 = by most
function shade(share) {
  if (share <= 0) return 0;
  return share < 0.05 ? 1 : share < 0.2 ? 2 : share < 0.6 ? 3 : 4;
}

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path) {
  const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
  const response = await fetch(path, { headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(15000) });
  let body = null;
  try {
    body = await response.json();
  } catch {
    body = null; // no answer of this server
  }
  if (!response.ok || body === null) throw new Refused(response.status, body?.error?.message || `the server answers ${response.status}`);
  return body;
}

//
// what is shown
//

function showSlots(slots) {
  const text = JSON.stringify([slots.map((slot) => [slot.id, slot.is_processing]), state.slot]);
  if (text === shown.slots) return;
  shown.slots = text;
  const old = document.activeElement?.dataset?.slot;
  $("slots").replaceChildren(
    ...slots.map((slot) => {
      const button = make("button", `Slot ${slot.id}${slot.is_processing ? " •" : ""}`);
      button.type = "button";
      button.dataset.slot = slot.id;
      button.setAttribute("aria-pressed", slot.id === state.slot);
      button.addEventListener("click", () => choose({ slot: slot.id, isChosen: true, layer: null, head: null, first: 0 }));
      return button;
    }),
  );
  $("slots").hidden = slots.length < 2;
  if (old !== undefined) $("slots").querySelector(`[data-slot="${CSS.escape(old)}"]`)?.focus();
}

// the slot of the last request, which is shown until another one is chosen
function lastUsed(slots) {
  const time = (slot) => slot.kv_turns?.at(-1)?.id_task ?? -1;
  return slots.reduce((a, b) => (time(b) > time(a) ? b : a), slots[0])?.id;
}

function showMemory(slot, view) {
  const kv = slot.kv;
  const turn = slot.kv_turns?.at(-1);
  const isPast = Boolean(view?.is_past && turn);
  const held = isPast ? turn.bytes : kv.bytes;
  const full = isPast ? turn.bytes_full : kv.bytes_full;
  put("bytes", full > 0 ? bytes(held) : "Nothing", held);
  put("bytes-full", full > 0 ? `of the ${bytes(full)} of a full cache` : "is held", full);
  put("share", full > 0 ? `(${percent(held / full)})` : "");
  $("bar-held").hidden = held === 0;
  $("bar-held").style.width = full > 0 ? `${(100 * held) / full}%` : "0";
  $("bar").setAttribute("aria-label", full > 0 ? `${percent(held / full)} of the full cache` : "nothing is held");

  const tokens = (n, ms) => `${count(n)} tokens${ms > 0 ? ` in ${seconds(ms)}` : ""}`;
  put("n-read", turn ? tokens(turn.n_read, turn.read_ms) : "–", turn?.n_read ?? 0);
  put("n-archived", turn ? tokens(turn.n_archived) : "–", turn?.n_archived ?? 0);
  put("n-continued", turn ? tokens(turn.n_continued) : "–", turn?.n_continued ?? 0);
  const speed = turn && turn.per_second > 0 ? `, ${turn.per_second.toFixed(1)} a second` : "";
  put("n-generated", turn ? tokens(turn.n_generated) + speed : "–", turn?.n_generated ?? 0);

  const cells = (view?.is_past ? view.cells : slot.kv_heads ?? []).flat();
  const n_tokens = view?.is_past ? view.n_tokens : kv.n_tokens;
  const kept = cells.reduce((a, b) => a + b, 0);
  const evicted = Math.max(0, cells.length * n_tokens - kept);
  put("n-kept", count(kept), kept);
  put("n-evicted", count(evicted) + (kept > 0 ? ` (${percent(evicted / (kept + evicted))})` : ""), evicted);
}

function showHeads(cells, n_tokens) {
  const n_columns = Math.max(0, ...cells.map((row) => row.length));
  const text = JSON.stringify([cells, n_tokens, state.layer, state.head]);
  if (text === shown.heads) return;
  shown.heads = text;
  const table = $("heads");
  const rows = cells.map((row, il) => [row, il]).filter(([row]) => row.length > 0);
  const size = `${rows.length} ${n_columns} ${rows.map(([, il]) => il)}`;
  if (table.dataset.size !== size) {
    table.dataset.size = size;
    const body = make("tbody");
    const top = body.insertRow();
    top.append(...["Layer", ...Array(n_columns).keys()].map((name) => Object.assign(make("th", String(name)), { scope: "col" })));
    for (const [row, il] of rows) {
      const line = body.insertRow();
      const name = make("th", String(il));
      name.scope = "row";
      name.setAttribute("aria-label", `Layer ${il}`);
      line.append(name);
      row.forEach((_, ih) => {
        const button = make("button");
        button.type = "button";
        button.dataset.layer = il;
        button.dataset.head = ih;
        button.tabIndex = -1;
        line.insertCell().append(button);
      });
    }
    table.tBodies[0]?.remove();
    table.append(body);
  }
  const buttons = [...table.querySelectorAll("button")];
  for (const button of buttons) {
    const [il, ih] = [Number(button.dataset.layer), Number(button.dataset.head)];
    const n = cells[il][ih];
    button.className = `t${n_tokens > 0 ? shade(n / n_tokens) : 0}`;
    button.textContent = n_columns <= 6 ? count(n) : "";
    button.dataset.value = n;
    button.setAttribute("aria-label", `Layer ${il}, KV head ${ih}: ${count(n)} cells`);
    button.title = `layer ${il}, KV head ${ih}: ${count(n)} of ${count(n_tokens)} tokens`;
    button.setAttribute("aria-pressed", il === state.layer && ih === state.head);
  }
  const chosen = buttons.find((button) => button.getAttribute("aria-pressed") === "true");
  if (!buttons.some((button) => button.tabIndex === 0) && buttons.length > 0) (chosen ?? buttons[0]).tabIndex = 0;
  $("all-heads").hidden = state.layer === null;
}

function showText(view) {
  const isAtEnd = $("text").scrollTop > 0 && $("text").scrollTop + $("text").clientHeight > $("text").scrollHeight - 4;
  const text = JSON.stringify([view.slot, view.first, view.text, view.held, view.n_heads, view.n_prompt, view.hint]);
  if (text === shown.text) return;
  shown.text = text;
  if (view.hint) {
    $("text").replaceChildren(make("p", view.hint));
    return;
  }
  const runs = document.createDocumentFragment();
  let run = null;
  const close = () => {
    if (!run) return;
    const span = make("span", run.text, `t${run.level}`);
    span.dataset.first = run.first;
    span.dataset.n = run.n;
    span.title = run.most > 0 ? `${run.least === run.most ? run.most : `${run.least} to ${run.most}`} of ${view.n_heads} heads hold it` : "no head holds it";
    runs.append(span);
    run = null;
  };
  view.held.forEach((n, i) => {
    const pos = view.first + i;
    const level = shade(n / view.n_heads);
    const isAnswer = pos === view.n_prompt && pos > 0;
    if (!run || run.level !== level || isAnswer) close();
    if (isAnswer) runs.append(make("hr"), make("b", "behind the prompt"));
    run ??= { first: pos, n: 0, level, text: "", least: n, most: n };
    run.n += 1;
    run.text += view.text[i];
    run.least = Math.min(run.least, n);
    run.most = Math.max(run.most, n);
  });
  close();
  $("text").replaceChildren(runs);
  if (isAtEnd) $("text").scrollTop = $("text").scrollHeight;
}

function showMap(view) {
  const canvas = $("map");
  const parts = view?.overview ?? [];
  $("map-box").hidden = parts.length === 0;
  if (parts.length === 0) return;
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [Math.max(1, Math.round(canvas.clientWidth * scale)), Math.round(36 * scale)];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const paint = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  paint.clearRect(0, 0, width, height);
  parts.forEach((share, i) => {
    const from = Math.round((i * width) / parts.length);
    const tall = Math.round(height * Math.sqrt(share)); // else the many small shares cannot be told from none
    paint.fillStyle = style.getPropertyValue(`--a${Math.max(2, shade(share))}`);
    paint.fillRect(from, height - tall, Math.round(((i + 1) * width) / parts.length) - from, tall);
  });
  if (view.held.length < view.n_tokens) {
    paint.strokeStyle = style.getPropertyValue("--ink");
    paint.lineWidth = 2 * scale;
    paint.strokeRect((view.first / view.n_tokens) * width, scale, (view.held.length / view.n_tokens) * width, height - 2 * scale);
  }
  canvas.dataset.parts = parts.length;

  shown.end = view.first + view.held.length;
  shown.n_tokens = view.n_tokens;
  $("pager").hidden = view.held.length === view.n_tokens;
  $("place").max = Math.max(0, STEP * Math.floor((view.n_tokens - 1) / STEP));
  $("place").step = STEP;
  $("place").value = view.first;
  $("place").setAttribute("aria-valuetext", `tokens ${view.first} to ${view.first + view.held.length} of ${view.n_tokens}`);
  $("back").disabled = view.first === 0;
  $("on").disabled = view.first + view.held.length >= view.n_tokens;
  put("place-text", `${count(view.first)}–${count(view.first + view.held.length)} of ${count(view.n_tokens)} tokens`);
}

function showHeadline(slot, view) {
  const turn = slot.kv_turns?.at(-1);
  const live = slot.is_processing && turn ? turn.state : "";
  $("state").textContent = live === "done" ? "" : live;
  $("state").className = live === "reading" || live === "answering" ? "pill live" : "pill";
  const isHead = state.layer !== null;
  if (live === "reading") {
    put("headline", `Reading ${count(turn.n_read + turn.n_archived + turn.n_continued)} of ${count(turn.n_prompt)} tokens`);
    put("lead", "The whole prompt is looked at. When it ends, each KV head keeps what its last tokens attend to, and gives the rest back.");
  } else if (view && view.state === "compressed") {
    const who = isHead ? `Layer ${state.layer}, KV head ${state.head}` : "The model";
    put("headline", `${who} ${view.is_past ? "saw" : "still sees"} ${count(view.n_seen)} of ${count(view.n_tokens)} tokens`, view.n_seen);
    const cells = view.cells.flat();
    const mean = cells.reduce((a, b) => a + b, 0) / Math.max(1, cells.length);
    const all = `Each of ${cells.length} KV heads held ${view.is_past ? "" : "now "}${count(Math.round(mean))} on average, ${percent(mean / Math.max(1, view.n_tokens))} of a full cache.`;
    const past = view.is_past ? " The answer has ended and the cells were given back; with --kv-reuse they stay." : "";
    put("lead", isHead ? `Amber text is what this head holds, grey text is gone for it.${past}` : `Amber text is held, the stronger the more heads; grey text is gone. ${all.replace("held now", "holds")}${past}`);
  } else if (state.whyNoText) {
    put("headline", `Each KV head holds ${count(slot.kv.cells?.median ?? 0)} of ${count(slot.kv.n_tokens)} tokens`);
    put("lead", `The text is not told: ${state.whyNoText}`);
  } else {
    put("headline", "This slot is empty");
    put("lead", "Ask something in the chat: what the KV heads keep of it is shown here while it is answered.");
  }
}

function showTurns(turns) {
  const text = JSON.stringify(turns);
  if (text === shown.turns) return;
  shown.turns = text;
  const body = $("turns").tBodies[0];
  body.replaceChildren();
  for (const turn of [...turns].reverse()) {
    const line = body.insertRow();
    const values = [
      turn.id_task, count(turn.n_prompt), count(turn.n_read), count(turn.n_archived), count(turn.n_continued), rate(turn.n_read, turn.read_ms),
      count(turn.n_generated), turn.per_second > 0 ? turn.per_second.toFixed(1) : "–",
      turn.bytes_full > 0 ? `${bytes(turn.bytes)} of ${bytes(turn.bytes_full)}` : "–", turn.state,
    ];
    for (const value of values) line.insertCell().textContent = value;
  }
  if (turns.length === 0) {
    const cell = body.insertRow().insertCell();
    cell.colSpan = 10;
    cell.textContent = "None yet.";
  }
}

function showStock() {
  put("headline", "The model sees everything");
  put("lead", "This server keeps the full cache. Start it with --kv-size 128, and each KV head keeps what the prompt's end attends to.");
}

//
// when it is asked
//

async function askView() {
  if (state.whyNoText) return null;
  const head = state.layer === null ? "" : `&layer=${state.layer}&head=${state.head}`;
  try {
    return await ask(`kv/positions?slot=${state.slot}&first=${state.first}&n=${CHUNK}${head}`);
  } catch (error) {
    if (!(error instanceof Refused) || ![400, 403, 404].includes(error.status)) throw error;
    if (error.status === 400) Object.assign(state, { layer: null, head: null, first: 0 }); // another model
    else state.whyNoText = error.message;
    return null;
  }
}

async function look() {
  if (state.isAsking) return;
  state.isAsking = true;
  try {
    if (!shown.model) {
      const props = await ask("props");
      shown.model = true;
      put("model", [(props.model_alias || props.model_path)?.split("/").at(-1), props.kv?.policy].filter(Boolean).join(" · "));
    }
    const slots = await ask("slots");
    $("key-form").hidden = true;
    const slot = slots.find((one) => one.id === (state.isChosen ? state.slot : lastUsed(slots))) ?? slots[0];
    if (slot && slot.id !== state.slot) Object.assign(state, { slot: slot.id, layer: null, head: null, first: 0 });
    showSlots(slots);
    if (!slot?.kv) {
      showStock();
    } else {
      const view = await askView();
      if (view && view.first > 0 && view.first >= view.n_tokens) state.first = 0; // it is another prompt
      showHeadline(slot, view);
      showMemory(slot, view);
      const isText = view && view.state === "compressed";
      showHeads(view?.is_past ? view.cells : slot.kv_heads ?? [], view?.is_past ? view.n_tokens : slot.kv.n_tokens);
      showMap(isText ? view : null);
      showText(isText ? view : { hint: state.whyNoText ? "It is not told." : slot.is_processing ? "It is shown when the prompt has been read." : "None yet." });
      showTurns(slot.kv_turns ?? []);
    }
    put("notice", "");
    document.body.dataset.looks = 1 + Number(document.body.dataset.looks ?? 0);
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      $("key-form").hidden = false;
      put("lead", "The server wants its API key. It stays on this page until it is closed.");
    } else if (!(error instanceof Refused && error.status === 429)) {
      put("notice", `No answer: ${error.message}. Asking again.`);
    }
  } finally {
    state.isAsking = false;
  }
}

function choose(change) {
  Object.assign(state, change);
  look();
}

$("heads").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const [layer, head] = [Number(button.dataset.layer), Number(button.dataset.head)];
  for (const other of $("heads").querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  button.tabIndex = 0;
  choose(layer === state.layer && head === state.head ? { layer: null, head: null } : { layer, head });
});
$("heads").addEventListener("keydown", (event) => {
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const cell = event.target.closest("td");
  if (!move || !cell) return;
  event.preventDefault();
  const rows = $("heads").rows;
  const row = rows[cell.parentNode.rowIndex + move[0]];
  const next = row?.cells[Math.min(row.cells.length - 1, cell.cellIndex + move[1])]?.querySelector("button");
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
$("all-heads").addEventListener("click", () => choose({ layer: null, head: null }));
$("back").addEventListener("click", () => choose({ first: Math.max(0, state.first - CHUNK) }));
$("on").addEventListener("click", () => choose({ first: shown.end }));
$("place").addEventListener("input", () => choose({ first: Number($("place").value) }));
$("map").addEventListener("click", (event) => {
  if ($("pager").hidden) return;
  const share = event.offsetX / event.target.clientWidth;
  choose({ first: STEP * Math.floor((share * shown.n_tokens) / STEP) });
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  choose({ key: $("key").value });
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) look();
});
setInterval(() => {
  if (!document.hidden) look(); // a page that nobody sees asks nothing
}, PERIOD);
look();
