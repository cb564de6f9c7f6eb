/* The page of `fastres serve`: shows a picture to the model and draws the class-activation maps that it returns. */

const CLASSES = 5;
const WAIT = 5; // seconds before another try, if the server names none
const MORPH = 220; // milliseconds from one map to the next

// Inferno (matplotlib, CC0) without its black end: lightness rises evenly.
const RAMP = [
  [66, 10, 104], [106, 23, 110], [147, 38, 103], [188, 55, 84], [221, 81, 58],
  [243, 120, 25], [252, 165, 10], [246, 215, 70], [252, 255, 164],
];

const PALETTE = Array.from({ length: 256 }, (_, index) => colour(index / 255));

const $ = (id) => document.getElementById(id);

let running = new AbortController(); // aborted when another picture comes
let file = null; // what the user chose last
let answer = null; // what the server said about it
let drawn = null; // the map on the canvas, cells as rows
let key = attempt(() => sessionStorage.getItem("fastres-key")) ?? "";

const information = fetch("info")
  .then((response) => (response.ok ? response.json() : null))
  .catch(() => null);

class Refusal extends Error {
  static of = (status, message, wait) => Object.assign(new Refusal(message), { status, wait });
}

async function ask(picture, info, signal) {
  const headers = { "Content-Type": picture.type || "application/octet-stream" };
  if (key) headers["X-API-Key"] = key;
  const count = Math.min(CLASSES, info?.classes ?? CLASSES);
  const response = await fetch(`look?top_k=${count}`, { method: "POST", body: picture, headers, signal })
    .catch(() => { throw Refusal.of(0, ""); });
  if (response.ok) return response.json();
  const body = await response.json().catch(() => null);
  throw Refusal.of(response.status, body?.error?.message ?? "", Number(response.headers.get("Retry-After")));
}

/** What `work` returns; null if the browser forbids it, as it does with storage that is switched off. */
function attempt(work) {
  try {
    return work();
  } catch {
    return null;
  }
}

/** Cancel what runs; return the signal of what starts now. */
function restart() {
  running.abort();
  running = new AbortController();
  return running.signal;
}

async function take(picture) {
  const signal = restart();
  file = picture;
  answer = drawn = null;
  const info = await information;
  if (signal.aborted) return;
  if (picture.type && !picture.type.startsWith("image/")) {
    removePicture();
    setState("empty");
    return complain(`${picture.name} is not a picture.`, `Choose a ${formats(info)} file.`);
  }
  showPicture(picture);
  if (info && picture.size > info.limits.bytes) {
    const advice = `The server takes up to ${bytes(info.limits.bytes)}. Save it smaller, or choose another one.`;
    return complain(`This picture is too large: ${bytes(picture.size)}.`, advice);
  }
  await classify(info, signal);
}

async function classify(info, signal) {
  if (info?.api_key && !key) return askForKey("This server asks for a key.");
  setState("busy");
  say("Looking at the picture.");
  try {
    const received = await ask(file, info, signal);
    if (!signal.aborted) showAnswer(received);
  } catch (error) {
    if (!signal.aborted) explain(error, info, signal);
  }
}

async function again() {
  await classify(await information, restart());
}

function explain(error, info, signal) {
  if (!(error instanceof Refusal)) {
    console.error(error);
    complain("The answer of the server cannot be read.", "Try again.", "retry");
  } else if (error.status === 0) {
    complain("The server does not answer.", "Check your connection and that the server runs. Then try again.", "retry");
  } else if (error.status === 401 || (error.status === 403 && info?.api_key)) {
    askForKey(key ? "The server does not accept this key." : "This server asks for a key.");
  } else if (error.status === 429 || (error.status === 503 && error.wait)) {
    waitAndRetry(error.status === 429 ? "busy" : "not ready", error.wait || WAIT, signal);
  } else if (error.status === 413) {
    complain(error.message || "This picture is too large for the server.", "Save it smaller, or choose another one.");
  } else if (error.status >= 500) {
    complain(error.message || "The server failed.", "Try again in a moment.", "retry");
  } else {
    complain(error.message || "The server does not take this picture.", `Choose another picture: ${formats(info)}.`);
  }
}

function complain(trouble, advice, ...shown) {
  if (document.body.dataset.state !== "empty") setState("trouble");
  for (const id of ["retry", "stop", "key-form", "countdown"]) $(id).hidden = !shown.includes(id);
  $("trouble").textContent = trouble;
  $("advice").textContent = advice;
  $("message").hidden = false;
  say("");
}

function askForKey(trouble) {
  complain(trouble, "Ask the person who runs it. Then type the key here.", "key-form");
  $("key").value = "";
  $("key").focus();
}

/** The alert is read out once; the numbers that count down are only to be seen. */
function waitAndRetry(condition, seconds, signal) {
  complain(`The server is ${condition}.`, `This page tries again in ${seconds} s.`, "countdown", "stop");
  const end = performance.now() + 1000 * seconds;
  const timer = setInterval(tick, 250);
  signal.addEventListener("abort", () => clearInterval(timer));
  tick();

  function tick() {
    const left = Math.ceil((end - performance.now()) / 1000);
    $("countdown").textContent = `${plural(Math.max(left, 0), "second")} left`;
    if (left <= 0) again();
  }
}

function stopWaiting() {
  running.abort();
  complain("The page no longer waits.", "Try again later.", "retry");
}

function setState(state) {
  const leaving = [$("zone"), $("message")].some((part) => part.contains(document.activeElement));
  document.body.dataset.state = state;
  $("message").hidden = true;
  $("zone").hidden = state !== "empty";
  $("figure").hidden = state === "empty";
  $("heat").hidden = state !== "result";
  $("frame").classList.remove("mapped");
  $("side").setAttribute("aria-busy", String(state === "busy"));
  if (leaving) $(state === "empty" ? "choose" : "another").focus({ preventScroll: true });
}

function removePicture() {
  URL.revokeObjectURL($("picture").src);
  $("picture").removeAttribute("src");
}

function showPicture(picture) {
  removePicture();
  const image = $("picture");
  image.alt = `Your picture, ${picture.name}`;
  image.hidden = false;
  image.onload = () => answer ?? place([0, 0, image.naturalWidth, image.naturalHeight]);
  image.onerror = () => { // the server may still be able to read it
    image.hidden = true;
    if (image.src) $("name").textContent = "This browser cannot show this kind of picture.";
  };
  $("name").textContent = picture.name;
  image.src = URL.createObjectURL(picture);
  setState("busy");
}

/** Shape the frame like the view (in pixels of the picture) and put the picture in its place. */
function place([left, top, right, bottom], width = right, height = bottom) {
  const [across, down] = [right - left, bottom - top];
  $("frame").style.setProperty("--ratio", across / down);
  const { style } = $("picture");
  style.left = `${(-100 * left) / across}%`;
  style.top = `${(-100 * top) / down}%`;
  style.width = `${(100 * width) / across}%`;
  style.height = `${(100 * height) / down}%`;
}

function showAnswer(received) {
  answer = { ...received, view: view(received), range: range(received.predictions.map(({ map }) => map)) };
  place(answer.view, answer.width, answer.height);
  showModel(answer.model);
  $("classes").replaceChildren(...answer.predictions.map(classRow));
  const [left, top, right, bottom] = answer.box;
  $("outside").hidden = Math.max(left, top, answer.width - right, answer.height - bottom) < 0.5;
  const { decode, model } = answer.milliseconds;
  $("times").textContent = `Decoding took ${milliseconds(decode)}, the model ${milliseconds(model)}.`;
  setState("result");
  select(answer.predictions[0]);
  say(`Most likely: ${answer.predictions.map(({ label, score }) => `${label}, ${percent(score)}`).join("; ")}.`);
}

/** The picture, and the box where it extends beyond the picture. */
function view({ width, height, box: [left, top, right, bottom] }) {
  return [Math.min(0, left), Math.min(0, top), Math.max(width, right), Math.max(height, bottom)];
}

function classRow(prediction, place) {
  const row = element("label", "class");
  const input = Object.assign(element("input"), { type: "radio", name: "class", checked: place === 0 });
  input.addEventListener("change", () => select(prediction));
  const track = element("span", "track");
  track.append(element("span", "bar"));
  track.firstChild.style.width = `${100 * prediction.score}%`;
  const label = element("span", "label", prediction.label);
  row.append(input, label, element("span", "share", percent(prediction.score)), track);
  return row;
}

function element(name, className = "", text = "") {
  return Object.assign(document.createElement(name), { className, textContent: text });
}

function select({ label, map }) {
  $("selected").textContent = label;
  $("heat").setAttribute("aria-label", `Heat map of the evidence for ${label}`);
  const from = drawn ?? map.map((row) => row.map(() => answer.range[0]));
  const [start, shown] = [performance.now(), answer];
  answer.target = map;
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return draw(map);
  requestAnimationFrame(function step(now) {
    if (answer !== shown || answer.target !== map) return;
    const share = Math.min(Math.max((now - start) / MORPH, 0), 1);
    draw(share === 1 ? map : map.map((row, y) => row.map((value, x) => from[y][x] + share * (value - from[y][x]))));
    if (share < 1) requestAnimationFrame(step);
  });
}

/** Lowest and highest evidence on the common scale of all maps: from none, unless there is none at all. */
function range(maps) {
  const values = maps.flat(2);
  const highest = Math.max(...values);
  return [highest > 0 ? 0 : Math.min(...values), highest];
}

function draw(map = drawn) {
  if (!answer || !map) return;
  drawn = map;
  const canvas = $("heat");
  const [left, top, right, bottom] = answer.view;
  const size = canvas.getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(size.width * devicePixelRatio));
  canvas.height = Math.max(1, Math.round(size.height * devicePixelRatio));
  const pen = canvas.getContext("2d");
  $("frame").classList.toggle("mapped", $("shown").checked);
  $("strength").disabled = !$("shown").checked;
  if (!$("shown").checked) return;
  pen.scale(canvas.width / (right - left), canvas.height / (bottom - top));
  pen.translate(-left, -top);
  const [x, y, boxRight, boxBottom] = answer.box;
  const box = [x, y, boxRight - x, boxBottom - y];
  dim(pen, answer.view, box);
  pen.drawImage(heat(map), ...box);
  pen.lineWidth = (right - left) / size.width; // one pixel of the page
  pen.strokeStyle = "rgb(255 255 255 / .6)";
  pen.strokeRect(...box);
}

/** Dim what lies outside the box. */
function dim(pen, [left, top, right, bottom], box) {
  pen.beginPath();
  pen.rect(left, top, right - left, bottom - top);
  pen.rect(...box);
  pen.fillStyle = "rgb(8 12 16 / .68)";
  pen.fill("evenodd");
}

/** The map at every pixel of the crop, in colour; more evidence is more opaque. */
function heat(map) {
  const { crop, stride, range: [low, high] } = answer;
  const opacity = 2.55 * $("strength").value;
  const columns = pixels(crop, stride, map[0].length);
  const canvas = Object.assign(element("canvas"), { width: crop, height: crop });
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(crop, crop);
  let at = 0;
  for (const row of pixels(crop, stride, map.length)) {
    const cells = map[row.low].map((value, x) => value + row.share * (map[row.high][x] - value));
    for (const column of columns) {
      const value = cells[column.low] + column.share * (cells[column.high] - cells[column.low]);
      const level = Math.min(Math.max((value - low) / (high - low || 1), 0), 1);
      image.data.set(PALETTE[Math.round(255 * level)], at);
      image.data[at + 3] = opacity * level ** 0.8;
      at += 4;
    }
  }
  pen.putImageData(image, 0, 0);
  return canvas;
}

/**
 * For each pixel along a side of the crop, the two cells that it lies between. The geometry is that of `at_pixels` in
 * fastres/look/cam.py: cell i is centred on pixel stride · i, because every strided convolution of a ResNet pads by
 * half its width and starts at the first pixel. The outermost cells go on to the border.
 */
function pixels(crop, stride, cells) {
  return Array.from({ length: crop }, (_, pixel) => {
    const position = Math.min(pixel / stride, cells - 1);
    return { low: Math.floor(position), high: Math.ceil(position), share: position % 1 };
  });
}

function colour(level) {
  const position = level * (RAMP.length - 1);
  const [from, to] = [RAMP[Math.floor(position)], RAMP[Math.ceil(position)]];
  return from.map((value, channel) => value + (position % 1) * (to[channel] - value));
}

function drawRamp() {
  const pen = $("ramp").getContext("2d");
  const image = pen.createImageData(PALETTE.length, 1);
  image.data.set(PALETTE.flatMap((rgb) => [...rgb, 255]));
  pen.putImageData(image, 0, 0);
}

const percent = (share) => (share < 0.0005 ? "<0.1%" : `${(100 * share).toFixed(1)}%`);
const milliseconds = (time) => `${time < 10 ? time.toFixed(1) : Math.round(time)} ms`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const bytes = (count) => `${(count / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;
const formats = (info) => (info?.formats ?? ["JPEG", "PNG", "WebP"]).join(", ").replace(/, ([^,]*)$/, " or $1");
const say = (words) => { $("status").textContent = words; };

function showModel({ name, weights, dtype, device, sha256, fastres }) {
  const network = weights.startsWith(name) ? [weights] : [name, weights];
  $("model").textContent = [...network, dtype, device].join(" · ");
  $("origin").textContent = `fastres ${fastres}, weights ${sha256?.slice(0, 12) ?? ""}.`;
  $("origin").title = sha256 ? `SHA-256 of the weights: ${sha256}` : "";
  document.title = `${name} · fastres`;
}

function showCommand(info) {
  const { href } = new URL("classify", document.baseURI);
  const address = /^[\w:/.~%-]+$/.test(href) ? href : `'${href.replaceAll("'", "%27")}'`;
  $("curl").textContent = `curl ${info?.api_key ? '-H "X-API-Key: $KEY" ' : ""}--data-binary @photo.jpg ${address}`;
}

async function copyCommand() {
  getSelection().selectAllChildren($("curl"));
  const clipboard = navigator.clipboard; // only on https and localhost
  const copied = await clipboard?.writeText($("curl").textContent).then(() => true, () => false);
  $("copy").textContent = copied || document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
  say($("copy").textContent);
  setTimeout(() => { $("copy").textContent = "Copy"; }, 2000);
}

function receive(data) {
  const files = [...(data?.files ?? [])];
  const picture = files.find(({ type }) => type.startsWith("image/")) ?? files[0];
  if (picture) take(picture);
  return picture;
}

function listen() {
  const open = (event) => { event.stopPropagation(); $("file").click(); };
  for (const id of ["choose", "another", "zone"]) $(id).addEventListener("click", open);
  $("file").addEventListener("change", ({ target }) => { receive(target); target.value = ""; });
  addEventListener("paste", (event) => { if (receive(event.clipboardData)) event.preventDefault(); });
  addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dragging"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    if (receive(event.dataTransfer) || document.body.dataset.state !== "empty") return;
    complain("That is not a file.", "Save the picture first. Then drop the file here.");
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = $("key").value.trim();
    attempt(() => sessionStorage.setItem("fastres-key", key));
    again();
  });
  $("retry").addEventListener("click", again);
  $("stop").addEventListener("click", stopWaiting);
  $("copy").addEventListener("click", copyCommand);
  $("strength").addEventListener("input", () => draw());
  $("shown").addEventListener("change", () => draw());
  new ResizeObserver(() => draw()).observe($("frame"));
}

listen();
drawRamp();
showCommand(null);
information.then((info) => {
  showCommand(info);
  $("accepted").textContent = `${formats(info)}${info ? `, up to ${bytes(info.limits.bytes)}` : ""}`;
  if (info) showModel(info.model);
  else $("model").textContent = "The server does not say which model answers.";
});
