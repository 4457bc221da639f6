// The live page: the map of any word, or mixture of two, is a product of a stored matrix and an embedding.
// DATA comes from data.js, which docs/live.py writes: images, one matrix an image, one embedding a word.
"use strict";

const SIDE = 128; // pixels of a drawn map
const SHOWN = 8; // words listed for a pixel
const COLORS = [[70, 20, 130], [190, 40, 130], [245, 110, 60], [255, 190, 70], [255, 250, 190]]; // low to high
const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }; // rows, columns

const $ = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// A packed matrix as rows of numbers. Halves are read by hand: not every browser knows Float16Array.
function unpack({ float16, columns, scale }) {
  const bytes = Uint8Array.from(atob(float16), (letter) => letter.charCodeAt(0));
  const numbers = Float32Array.from(new Uint16Array(bytes.buffer), (bits) => {
    const [exponent, fraction] = [(bits >> 10) & 31, (bits & 1023) / 1024];
    const size = exponent ? (1 + fraction) * 2 ** (exponent - 15) : fraction * 2 ** -14;
    return (bits >> 15 ? -size : size) * scale;
  });
  return Array.from({ length: numbers.length / columns }, (_, i) => numbers.subarray(i * columns, (i + 1) * columns));
}

// The score of an embedding at a cell: a row of a matrix, whose last number is the bias.
function score(row, vector) {
  let sum = row[vector.length];
  for (let i = 0; i < vector.length; i++) sum += row[i] * vector[i];
  return sum;
}

const vocabulary = Object.values(DATA.words).flat();
const embedding = Object.fromEntries(unpack(DATA.vectors).map((row, i) => [vocabulary[i], row]));
const pictures = DATA.images.map((image) => ({ ...image, matrix: unpack(image.matrix), scores: [] }));
const chosen = { first: "tree", second: "water" };
let field = "first"; // what a clicked word goes to
let point = null; // {picture, row, column}: the cell that words are listed for
let held = false; // by a click: then moving the mouse changes nothing

// Colors of levels 0 to 1 in 255 steps, the more opaque the higher, behind one for what is 0 or less: nothing.
const shades = new Uint32Array(256);
shades.forEach((_, i) => {
  const place = (Math.max(i - 1, 0) / 254) * (COLORS.length - 1);
  const [low, high] = [COLORS[Math.floor(place)], COLORS[Math.ceil(place)]];
  const heat = low.map((value, k) => value + (high[k] - value) * (place % 1));
  new Uint8ClampedArray(shades.buffer, 4 * i, 4).set([...heat, i && 75 + (155 * i) / 255]);
});

function paint(canvas, levels) {
  const heat = new ImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(heat.data.buffer);
  levels.forEach((level, i) => (pixels[i] = shades[clamp(Math.ceil(level * 255), 0, 255)]));
  canvas.getContext("2d").putImageData(heat, 0, 0);
}

// Resize scores bilinearly, cells' centers kept, as `LinearMap.upscaled`.
function upscaled(scores, [height, width]) {
  const places = (cells) => Array.from({ length: SIDE }, (_, i) => {
    const at = clamp(((i + 0.5) * cells) / SIDE - 0.5, 0, cells - 1);
    const low = Math.min(Math.floor(at), cells - 2);
    return [low, at - low];
  });
  const across = places(width);
  return places(height).flatMap(([y, v]) => across.map(([x, u]) => {
    const i = y * width + x;
    const above = scores[i] + (scores[i + 1] - scores[i]) * u;
    return above + (scores[i + width] + (scores[i + width + 1] - scores[i + width]) * u - above) * v;
  }));
}

// Compute and draw everything for the chosen words.
function update() {
  const { first, second } = chosen;
  const percent = second ? Number($("share").value) : 0; // of the second word
  const parts = percent ? [[first, 100 - percent], [second, percent]] : [[first, 100]];
  const vector = embedding[first].map((value, i) => value + (percent / 100) * (embedding[second || first][i] - value));
  const name = (chosen.name = percent ? parts.map(([word, part]) => `${part}% ${word}`).join(" + ") : first);
  for (const picture of pictures) picture.scores = picture.matrix.map((row) => score(row, vector));
  const maxima = pictures.map((picture) => Math.max(...picture.scores));
  const highest = $("own").checked ? Math.max(...maxima, 0.01) : DATA.highest;
  pictures.forEach((picture, k) => {
    paint(picture.canvas, upscaled(picture.scores, picture.size).map((value) => value / highest));
    picture.maximum.textContent = maxima[k].toFixed(2);
    picture.map.ariaLabel = `Map of ${name}: ${picture.prompt}. Maximum ${maxima[k].toFixed(2)}. Arrow keys: words.`;
  });
  $("top").textContent = highest.toFixed(2);
  $("mixture").textContent = percent || !second ? name : `${first}; drag to mix in ${second}`;
  $("share").disabled = !second;
  const sum = parts.map(([word, part]) => `${part / 100} * linear.embed("${word}")`).join(" + ");
  $("code").textContent = `linear = al.linear_daam(recording); linear${percent ? ` @ (${sum})` : `["${first}"]`}`;
  for (const chip of $("words").querySelectorAll("button")) chip.ariaPressed = String(chip.value === chosen[field]);
  for (const each of ["first", "second"]) $(each).classList.toggle("active", each === field);
  list();
}

// List the words that are strongest at the point.
function list() {
  for (const each of pictures) for (const mark of each.marks) mark.hidden = point?.picture !== each;
  if (!point) return;
  const { picture, row, column } = point;
  const [height, width] = picture.size;
  const cell = row * width + column;
  const place = { top: `${(100 * row) / height}%`, left: `${(100 * column) / width}%` };
  for (const mark of picture.marks) Object.assign(mark.style, place);
  const ranked = vocabulary.map((word) => [word, score(picture.matrix[cell], embedding[word])]);
  const here = `Row ${row + 1}, column ${column + 1} of ${height} x ${width}${held ? " (click again to let go)" : ""}`;
  $("where").textContent = `${here}: ${chosen.name} ${picture.scores[cell].toFixed(2)}. Strongest words:`;
  $("strongest").replaceChildren(...ranked.sort((a, b) => b[1] - a[1]).slice(0, SHOWN).map(([word, value]) => {
    const chip = make("button", { type: "button", value: word }, make("span", {}, word), value.toFixed(2));
    chip.style.setProperty("--part", `${100 * clamp(value / DATA.highest, 0, 1)}%`);
    return make("li", {}, chip);
  }));
}

// Take what is typed into a field, as soon as it begins a word.
function type(name, text) {
  const typed = text.trim().toLowerCase();
  const found = vocabulary.includes(typed) ? typed : vocabulary.find((word) => typed && word.startsWith(typed));
  $(name).ariaInvalid = String(Boolean(typed) && !found);
  $("message").textContent = typed && !found ? `No word of the captions begins with "${typed}": choose one below.` : "";
  if (found || (!typed && name === "second")) chosen[name] = found ?? "";
  update();
}

// Up and down go through the words of a field.
function step(name, event) {
  const by = MOVES[event.key]?.[0];
  if (!by) return;
  type(name, ($(name).value = vocabulary.at((vocabulary.indexOf(chosen[name]) + by) % vocabulary.length)));
  event.preventDefault();
}

function moveTo(picture, ...place) {
  const [row, column] = place.map((at, k) => clamp(at, 0, picture.size[k] - 1));
  point = { picture, row, column };
  list();
}

// The point follows the mouse, until a click holds it; a click on the same cell lets it go.
function pointAt(picture, event) {
  const clicked = event.type === "click";
  if (held && !clicked) return;
  const [box, before] = [event.currentTarget.getBoundingClientRect(), held && point];
  const at = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
  const [row, column] = at.map((part, k) => Math.floor(part * picture.size[k]));
  held = clicked && !(before.picture === picture && before.row === row && before.column === column);
  moveTo(picture, row, column);
}

function movePoint(picture, event) {
  const move = MOVES[event.key];
  if (!move) return;
  const [row, column] = point?.picture === picture ? [point.row, point.column] : picture.size.map((n) => n >> 1);
  held = true;
  moveTo(picture, row + move[0], column + move[1]);
  event.preventDefault();
}

// Build the page's figure of an image: the image, and beside it the map over its gray.
function show(picture) {
  const src = `data:image/png;base64,${picture.png}`;
  const parts = [picture.prompt, ""].map((alt) => { // what the second shows, its label says
    const part = make("div", { className: "picture" }, make("img", { src, alt, draggable: false }));
    for (const kind of ["pointermove", "click"]) part.addEventListener(kind, (event) => pointAt(picture, event));
    return part;
  });
  picture.canvas = make("canvas", { width: SIDE, height: SIDE });
  picture.map = Object.assign(parts[1], { tabIndex: 0, role: "img" });
  picture.map.append(picture.canvas);
  picture.map.addEventListener("keydown", (event) => movePoint(picture, event));
  picture.marks = parts.map((part) => part.appendChild(make("i", { className: "mark", hidden: true })));
  picture.maximum = make("output", {});
  const caption = make("figcaption", {}, make("q", {}, picture.prompt), make("span", {}, "maximum ", picture.maximum));
  $("pictures").append(make("figure", {}, make("div", { className: "pair" }, ...parts), caption));
}

for (const [title, words] of Object.entries(DATA.words)) {
  const chips = words.map((word) => make("button", { type: "button", value: word }, word));
  $("words").append(make("h2", {}, title), make("div", { className: "chips" }, ...chips));
}
for (const name of ["first", "second"]) {
  $(name).value = chosen[name];
  $(name).addEventListener("input", (event) => type(name, event.target.value));
  $(name).addEventListener("focus", () => type((field = name), $(name).value));
  $(name).addEventListener("keydown", (event) => step(name, event));
}
for (const name of ["words", "strongest"])
  $(name).addEventListener("click", ({ target }) => {
    const word = target.closest("button")?.value;
    if (word) type(field, ($(field).value = word));
  });
for (const name of ["share", "own"]) $(name).addEventListener("input", update);
pictures.forEach(show);
paint($("bar"), Float32Array.from({ length: 128 }, (_, i) => i / 127));
update();
