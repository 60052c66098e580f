// The page of a review: shows one frame at a time and tells the server what the reviewer decides.

import { drawTrace, frameAt } from "./trace.js";

const $ = id => document.getElementById(id);

let info;             // the dataset: name, digest, cameras, reviewer
let frames = [];      // all labelled frames in order: {episode, frame, state}
let list = [];        // those that the arrows go through
let current = null;   // of frames, the one on the page
let detail = null;    // what the server says about it; null while it is asked
let facts = null;     // and about its episode
let editing = false, busy = false;
const asked = new Map();  // answers about episodes
const page = sessionStorage.page ??= crypto.getRandomValues(new Uint32Array(4)).join("-");

class Problem extends Error {
  constructor(reasons, status) {
    super(reasons.join("; "));
    Object.assign(this, { reasons, status });
  }
}

async function ask(path, told) {
  const options = told === undefined ? {}
    : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(told) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Problem(["the review does not answer; is dtvla review still running?"]);
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Problem(content.reasons ?? [`the review answers ${answer.status}`], answer.status);
  return content;
}

function once(path) {
  if (!asked.has(path)) {
    const answer = ask(path);
    answer.catch(() => asked.delete(path));
    asked.set(path, answer);
  }
  return asked.get(path);
}

const frameAddress = item => `/api/frames/${item.episode}/${item.frame}`;
const factsAddress = item => `/api/episodes/${item.episode}`;
const pictureAddress = (item, number, camera) =>
  `/pictures/${info.digest}/${item.episode}/${number}/${encodeURIComponent(camera)}.jpg`;

function fillList() {
  list = frames.filter(item => $("all").checked || !item.state || item === current);
}

function include(item) {
  if (!list.includes(item)) list = frames.filter(other => other === item || list.includes(other));
}

function nextOpen() {
  const place = list.indexOf(current);
  return [...list.slice(place + 1), ...list.slice(0, place)].find(item => !item.state)
    ?? frames.find(item => !item.state);
}

async function show(item) {
  include(item);
  current = item;
  detail = null;
  edit(false);
  history.replaceState(null, "", `#${item.episode}/${item.frame}`);
  drawButtons();
  scrollTo(0, 0);
  try {
    const answers = await Promise.all([ask(frameAddress(item)), once(factsAddress(item))]);
    if (current !== item) return;
    [detail, facts] = answers;
    item.state = detail.state;
  } catch (problem) {
    if (current === item) say(problem.reasons);
    return;
  }
  draw();
  const after = nextOpen();
  if (after && after !== item) prepare(after);
}

async function prepare(item) {
  try {
    const coming = await ask(frameAddress(item));
    for (const camera of info.cameras) new Image().src = pictureAddress(item, item.frame, camera);
    for (const near of coming.strip.filter(place => place !== null)) new Image().src = pictureAddress(item, near, info.cameras[0]);
  } catch { /* it will be said when the frame is shown */ }
}

function draw() {
  const seconds = (current.frame / facts.fps).toFixed(1);
  $("place").textContent = `episode ${current.episode} · frame ${current.frame} of ${facts.length}`;
  $("seconds").textContent = `${seconds} s`;
  $("origin").textContent = detail.origin;
  $("instruction").textContent = facts.instruction;
  $("thought").textContent = detail.shown;
  $("before").textContent = detail.shown === detail.thought ? "" : `before: ${detail.thought}`;
  $("failed").replaceChildren(...detail.failed.map(check => element("li", `an answer here was refused: ${check}`)));
  say([]);
  drawPictures();
  drawStates();
}

function drawStates() {
  const state = current.state;
  $("state").className = `badge ${state}`;
  $("state").textContent = { accept: "accepted", edit: "edited", reject: "rejected" }[state] ?? "";
  $("thought").className = state;
  const done = frames.filter(item => item.state).length;
  $("bar").value = done / frames.length;
  $("count").textContent = `${done} of ${frames.length} reviewed`;
  $("message").textContent = done < frames.length ? "" : "Every frame is reviewed. You can close this page.";
  if (facts) drawTrace($("trace"), facts, frames.filter(item => item.episode === current.episode), current.frame);
}

function drawPictures() {
  $("cameras").replaceChildren(...info.cameras.map(camera => {
    const figure = document.createElement("figure");
    const name = camera.replace(/^observation\.images\./, "").replaceAll("_", " ");
    figure.append(picture(current.frame, camera), element("figcaption", name));
    return figure;
  }));
  $("strip").replaceChildren(...detail.strip.map(number => {
    if (number === null) return element("span", "");
    const away = number - current.frame;
    const button = element("button", "");
    button.append(picture(number, info.cameras[0]), element("span", away > 0 ? `+${away}` : away || "here"));
    if (!away) button.setAttribute("aria-current", "true");
    button.onclick = () => look(button, number);
    return button;
  }));
}

function picture(number, camera) {
  const image = new Image();
  image.className = "loading";
  image.alt = `${camera}, frame ${number}`;
  image.onload = () => image.classList.remove("loading");
  image.onerror = () => say([`the picture of frame ${number} can't be read; the terminal of dtvla review says why`]);
  image.src = pictureAddress(current, number, camera);
  return image;
}

// Show a neighbour in the large picture, or the frame itself again.
function look(button, number) {
  const pressed = button.getAttribute("aria-pressed") === "true";
  for (const other of $("strip").children) other.removeAttribute("aria-pressed");
  if (!pressed && number !== current.frame) button.setAttribute("aria-pressed", "true");
  const seen = pressed ? current.frame : number;
  const figure = $("cameras").firstChild;
  figure.firstChild.replaceWith(picture(seen, info.cameras[0]));
  figure.lastChild.textContent = seen === current.frame ? "this frame" : `frame ${seen}, a neighbour`;
}

function element(kind, text) {
  const made = document.createElement(kind);
  made.textContent = text;
  return made;
}

function say(reasons) {
  $("reasons").replaceChildren(...reasons.map(reason => element("li", reason)));
}

function edit(on) {
  editing = on;
  $("thought").hidden = on;
  $("editor").hidden = !on;
  $("deciding").hidden = on;
  $("editing").hidden = !on;
  if (!on) return;
  $("editor").value = detail.shown;
  $("editor").focus();
}

function drawButtons() {
  const place = list.indexOf(current);
  $("previous").disabled = place <= 0;
  $("next").disabled = place >= list.length - 1;
}

async function attempt(action) {
  if (busy || !current) return;
  busy = true;
  try {
    await action();
  } catch (problem) {
    if (!problem.reasons) throw problem;
    say(problem.reasons);
  } finally {
    busy = false;
  }
}

const decide = (decision, thought) => attempt(async () => {
  if (!detail) return;
  const item = current;
  const { episode, frame } = item;
  const told = { episode, frame, decision, thought, before: detail.thought, decided: detail.decided, page };
  let answer;
  try {
    answer = await ask("/api/decisions", told);
  } catch (problem) {
    if (problem.status !== 409 || editing) throw problem;  // a text under way stays
    await show(item);
    return say(problem.reasons);
  }
  item.state = answer.state;
  await show(nextOpen() ?? item);
});

const undo = () => attempt(async () => {
  const told = await ask("/api/undo", { page });
  const item = frames.find(other => other.episode === told.episode && other.frame === told.frame);
  item.state = told.state;
  await show(item);
});

function step(by) {
  const item = list[list.indexOf(current) + by];
  if (item && !busy) show(item);
}

const accept = () => detail && decide("accept", detail.shown);
const reject = () => decide("reject", "");
const save = () => decide("edit", $("editor").value);
const begin = () => detail && !busy && edit(true);

function leaveEditor() {
  edit(false);
  say([]);
}

function onKey(event) {
  if (editing) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    else if (event.key === "Escape") leaveEditor();
    else return;
    event.preventDefault();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = { ArrowLeft: () => step(-1), ArrowRight: () => step(1) };
  const decisions = { a: accept, e: begin, r: reject, u: undo };
  const action = steps[event.key] ?? (event.repeat ? undefined : decisions[event.key.toLowerCase()]);
  if (!action) return;
  event.preventDefault();
  action();
}

function listen() {
  const clicks = { previous: () => step(-1), next: () => step(1), undo, reject, edit: begin, accept, save };
  for (const [id, action] of Object.entries(clicks)) $(id).onclick = action;
  $("cancel").onclick = leaveEditor;
  $("original").onclick = () => { $("editor").value = detail.thought; };
  $("all").onchange = () => { fillList(); drawButtons(); $("all").blur(); };
  $("trace").onclick = event => {
    if (!facts || editing || busy) return;
    const wanted = frameAt($("trace"), facts, event);
    const near = frames.filter(item => item.episode === current.episode);
    show(near.reduce((a, b) => Math.abs(b.frame - wanted) < Math.abs(a.frame - wanted) ? b : a));
  };
  document.onkeydown = onKey;
  window.onbeforeunload = event => {
    if (editing && $("editor").value !== detail.shown) event.preventDefault();
  };
}

async function start() {
  info = await ask("/api/frames");
  frames = info.frames.map(([episode, frame, state]) => ({ episode, frame, state }));
  document.title = `${info.name} – review`;
  $("all").checked = info.show === "all";
  const wanted = location.hash.slice(1);
  const linked = frames.find(item => `${item.episode}/${item.frame}` === wanted);
  fillList();
  listen();
  await show(linked ?? list[0] ?? frames[0]);
}

start().catch(problem => say(problem.reasons ?? [String(problem)]));
