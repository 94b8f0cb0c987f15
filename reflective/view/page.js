"use strict";
// Candidates of a file: searched, sorted, filtered and compared. Only those on screen are in the document, whatever their number.
//
// The data, from evaluate/shown.py:
//   name; aggregation of the step scores, or null; low and high of all scores; risk: low is good; judge: what called candidates right
//   questions: {t: text, a: right answer or "", none: 1 where the row has no question, and t says where it stands}
//   rows: {q: question's index, i: place in the file, t: text, x: score or null, s: step scores, e: ends of steps in t, a: answer, r: 1 right or
//          0 wrong, k: tokens, n: number, p: parent's number, w: how it ended, c: by what it was chosen, er: error, f: {head: {x, s, e}}}
//
// Text is data: it goes into the document as text nodes and through properties alone, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const { questions, rows } = data;
const ROW = 64; // px, as in page.css
const HIGH = 8e6; // px; browsers know no element of more than some tens of millions, and of more rows a pixel is several
const CHUNK = 20000, STEPS = 150; // characters and steps of a text that are put into the document at a time
const CARDS = 6, DOTS = 2000;
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const app = $("app"), list = $("list"), space = $("space"), detail = $("detail");

// -- What is known of each candidate -----------------------------------------------------------------------------------------------

const byTokens = rows.every((row) => row.k !== undefined || row.er !== undefined);
const members = questions.map(() => []);
rows.forEach((row, index) => {
  row.index = index;
  row.length = byTokens ? row.k ?? 0 : row.t.length;
  members[row.q].push(index);
});
const judged = rows.some((row) => row.r !== undefined);

function fmt(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return value === 0 || Math.abs(value) >= 0.0005 ? value.toFixed(3) : value.toExponential(0);
}

/** How good a score looks, from 0 to 1; 0.5, which has no tint, for none. As view/trajectory.py has it. */
function good(score) {
  if (score === null || score === undefined || Number.isNaN(score)) return 0.5;
  const place = Math.min(Math.max((score - data.low) / (data.high - data.low || 1), 0), 1);
  return data.risk ? 1 - place : place;
}

/** The score after each step, NaN from a step without one on. As view/trajectory.py has it. */
function running(steps) {
  let total = 0, logs = 0, least = Infinity, greatest = -Infinity;
  return steps.map((value, k) => {
    const score = value === null ? NaN : value;
    total += score;
    logs += Math.log(Math.max(score, 1e-10));
    least = Math.min(least, score);
    greatest = Math.max(greatest, score);
    const found = { geometric_mean: Math.exp(logs / (k + 1)), product: Math.exp(logs), min: least, max: greatest, last: score }[data.aggregation];
    return Number.isNaN(total) ? NaN : found === undefined ? total / (k + 1) : found;
  });
}

const better = (a, b) => (data.risk ? a - b : b - a); // of scores, NaN last
function byScore(a, b) {
  const x = a.x, y = b.x;
  if (x === null || y === null) return (x === null) - (y === null);
  return better(x, y);
}

// -- Elements ------------------------------------------------------------------------------------------------------------------------

function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null) continue;
    if (name === "class") element.className = value;
    else if (name === "tint") element.style.setProperty("--score", value.toFixed(3));
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

function s(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "tint") element.style.setProperty("--score", value.toFixed(3));
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// -- Which candidates, in which order --------------------------------------------------------------------------------------------------

let shown = rows.map((_, index) => index);
let selected = 0; // place in `shown`
let onlyQuestion = null;
const value = (id) => ($(id).value.trim() === "" ? null : Number($(id).value));
const verdict = () => document.querySelector("[name=verdict]:checked").value;

const ORDERS = {
  file: (a, b) => a.index - b.index,
  score: byScore,
  verdict: (a, b) => (b.r ?? -1) - (a.r ?? -1) || byScore(a, b),
  answer: (a, b) => (a.a === undefined) - (b.a === undefined) || collate(a.a ?? "", b.a ?? "") || byScore(a, b),
  length: (a, b) => b.length - a.length,
  steps: (a, b) => b.s.length - a.s.length,
  question: (a, b) => a.q - b.q || byScore(a, b),
};
const collate = new Intl.Collator("en", { numeric: true }).compare;

function pattern() {
  const sought = $("find").value;
  return sought ? new RegExp(sought.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "iu") : null;
}

function refresh() {
  const sought = pattern(), wanted = verdict(), answer = $("answer").value.trim();
  const [scoreFrom, scoreTo, from, to] = ["score-from", "score-to", "length-from", "length-to"].map(value);
  const code = { right: 1, wrong: 0 }[wanted];
  const asked = sought && questions.map((question) => sought.test(question.t)); // once each, not once a candidate
  const kept = rows.filter((row) =>
    (onlyQuestion === null || row.q === onlyQuestion) &&
    (wanted === "all" || row.r === code) &&
    (scoreFrom === null || (row.x !== null && row.x >= scoreFrom)) &&
    (scoreTo === null || (row.x !== null && row.x <= scoreTo)) &&
    (from === null || row.length >= from) && (to === null || row.length <= to) &&
    (answer === "" || row.a === answer) &&
    (!$("chosen").checked || row.c !== undefined) && (!$("broken").checked || row.x === null) &&
    (!sought || asked[row.q] || sought.test(row.t) || (row.a !== undefined && sought.test(row.a))));
  const order = ORDERS[$("sort").value], turned = $("direction").getAttribute("aria-pressed") === "true" ? -1 : 1;
  kept.sort((a, b) => turned * order(a, b) || a.index - b.index);
  const before = shown[selected];
  shown = kept.map((row) => row.index);
  selected = Math.max(0, shown.indexOf(before));
  const filtered = sought || wanted !== "all" || answer || onlyQuestion !== null || [scoreFrom, scoreTo, from, to].some((v) => v !== null) ||
    $("chosen").checked || $("broken").checked;
  const right = shown.filter((index) => rows[index].r === 1).length, known = shown.filter((index) => rows[index].r !== undefined).length;
  $("count").textContent = (filtered ? `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}` : rows.length.toLocaleString("en")) +
    ` candidate${rows.length === 1 ? "" : "s"}` + (known ? ` · ${right.toLocaleString("en")} right, ${(known - right).toLocaleString("en")} wrong` : "");
  $("clear").hidden = !filtered;
  $("only").hidden = onlyQuestion === null;
  $("only").textContent = onlyQuestion === null ? "" : `Only: ${questions[onlyQuestion].t.slice(0, 80)} ✕`;
  list.scrollTop = 0;
  draw();
  select(selected, false);
}

// -- The list --------------------------------------------------------------------------------------------------------------------------

let drawn = "";

/** What a pixel of scrolling is, of a list as high as it wants to be. */
function stretch() {
  const all = shown.length * ROW;
  return all > HIGH ? (all - list.clientHeight) / (HIGH - list.clientHeight) : 1;
}

function draw() {
  const room = list.clientHeight;
  space.style.height = `${Math.min(shown.length * ROW, HIGH)}px`;
  const top = Math.round(list.scrollTop * stretch()); // px of that list
  const first = Math.max(0, Math.floor(top / ROW) - 5), last = Math.min(shown.length, Math.ceil((top + room) / ROW) + 5);
  const key = [first, last, selected, shown.length, Math.round(top - list.scrollTop)].join();
  if (key === drawn) return;
  drawn = key;
  const parts = [];
  for (let place = first; place < last; place++) parts.push(entry(place, place * ROW - top + list.scrollTop));
  if (!shown.length) parts.push(h("p", { class: "empty" }, "Nothing matches."));
  space.replaceChildren(...parts);
  if (shown.length) list.setAttribute("aria-activedescendant", `row-${selected}`);
  else list.removeAttribute("aria-activedescendant");
}

function entry(place, y) {
  const row = rows[shown[place]], question = questions[row.q];
  const mark = row.r === 1 ? ["right", "✓ right"] : row.r === 0 ? ["wrong", "✗ wrong"] : ["none", ""];
  const facts = [row.er ? "no score" : null, row.c ? "chosen" : null, row.p !== undefined && row.p !== null ? `fork of ${row.p}` : null,
    /^(stopped|interrupted|cut)/.exec(row.w)?.[0], `${row.s.length} step${row.s.length === 1 ? "" : "s"}`, question.t.slice(0, 160)];
  const element = h("div", { class: "row", role: "option", id: `row-${place}`, "aria-selected": String(place === selected), "aria-setsize": shown.length, "aria-posinset": place + 1,
    onclick: () => { select(place); read(); } },
    h("span", { class: "value step", tint: good(row.x) }, fmt(row.x)),
    h("span", { class: "line-1" }, row.a !== undefined ? row.a.slice(0, 160) : row.t.trim().slice(0, 160)),
    h("span", { class: `verdict ${mark[0]}` }, mark[1]),
    h("span", { class: "line-2" }, facts.filter(Boolean).join(" · ")));
  element.style.transform = `translateY(${y}px)`;
  return element;
}

function select(place, scroll = true) {
  selected = Math.max(0, Math.min(place, shown.length - 1));
  if (scroll) {
    const top = list.scrollTop * stretch(), least = selected * ROW + ROW - list.clientHeight, most = selected * ROW;
    if (top > most) list.scrollTop = most / stretch();
    else if (top < least) list.scrollTop = least / stretch();
  }
  draw();
  present();
}

function read() {
  app.classList.add("reading");
  if (matchMedia("(max-width: 760px)").matches) detail.focus({ preventScroll: true });
}

// -- One candidate, or several -----------------------------------------------------------------------------------------------------------

let mode = "one", presented = "", places = { right: 0, wrong: 0, all: 0 };
let observer = null;

function present() {
  const row = rows[shown[selected]];
  const key = row ? [row.index, mode, places.right, places.wrong, places.all, $("find").value].join() : "";
  if (key === presented) return;
  presented = key;
  observer?.disconnect();
  observer = new IntersectionObserver((entries) => entries.forEach((e) => e.isIntersecting && e.target.more()), { rootMargin: "600px" });
  detail.scrollTop = 0;
  if (!row) return detail.replaceChildren(h("p", { class: "empty" }, "No candidate."));
  const question = questions[row.q], all = members[row.q];
  const sides = (question.sides ??= { right: all.filter((i) => rows[i].r === 1), wrong: all.filter((i) => rows[i].r === 0) });
  const compare = sides.right.length > 0 && sides.wrong.length > 0;
  const now = mode === "compare" && !compare ? "one" : mode;
  const button = (name, label, enabled, title) =>
    h("button", { type: "button", "aria-pressed": String(now === name), disabled: !enabled, title, onclick: () => choose(name) }, label);
  detail.replaceChildren(
    h("button", { type: "button", class: "back", onclick: back }, "← List"),
    h("p", { class: "question" }, question.t),
    h("p", { class: "note known" }, [question.a ? `right answer ${question.a}` : "", all.length > 1 ? `${all.length.toLocaleString("en")} candidates` : "", row.i].filter(Boolean).join(" · ")),
    all.length > 1 ? dots(all, row) : "",
    h("div", { class: "modes" },
      button("one", "Text", true), button("compare", "Right and wrong", compare, compare ? "" : "This question has not both"),
      button("all", "All of this question", all.length > 1),
      all.length > 1 && onlyQuestion === null
        ? h("button", { type: "button", class: "plain", onclick: () => { onlyQuestion = row.q; refresh(); } }, "List only these") : ""),
    now === "one" ? h("div", { class: "panels" }, panel(row)) : now === "compare" ? compared(sides) : several(all),
  );
  highlight();
}

function choose(name) {
  mode = name;
  places = { right: 0, wrong: 0, all: 0 };
  present();
  detail.querySelector('.modes [aria-pressed="true"]')?.focus({ preventScroll: true });
}

function back() {
  app.classList.remove("reading");
  list.focus();
}

/** Best of the right beside the best of the wrong: what the scores should tell apart. */
function compared(sides) {
  const side = (name, label) => {
    const order = sides[name].map((i) => rows[i]).sort(byScore), at = Math.min(places[name], order.length - 1);
    return panel(order[at], pager(label, at, order.length, (to) => { places[name] = to; present(); }));
  };
  return h("div", { class: "panels two" }, side("right", "✓ Right"), side("wrong", "✗ Wrong"));
}

function several(all) {
  const order = all.map((i) => rows[i]).sort((a, b) => (b.c !== undefined) - (a.c !== undefined) || byScore(a, b));
  const pages = Math.ceil(order.length / CARDS), at = Math.min(places.all, pages - 1);
  const cards = order.slice(at * CARDS, (at + 1) * CARDS).map((row) => panel(row));
  return h("div", {}, forks(all), pages > 1 ? pager("By score", at, pages, (to) => { places.all = to; present(); }) : "", h("div", { class: "panels several" }, ...cards));
}

function pager(label, at, of, go) {
  const turn = (by, sign, name) => h("button", { type: "button", disabled: at + by < 0 || at + by >= of, "aria-label": `${label}: ${name}`, onclick: (event) => {
    const top = detail.scrollTop, same = event.currentTarget.ariaLabel;
    go(at + by);
    detail.scrollTop = top; // the panel changes where it stands, and who turns by key stays on the button
    for (const button of detail.querySelectorAll(".pager button")) if (button.ariaLabel === same) button.focus({ preventScroll: true });
  } }, sign);
  return h("div", { class: "pager" }, h("h2", {}, label), `${at + 1} of ${of}`, turn(-1, "‹", "before"), turn(1, "›", "after"));
}

function panel(row, above = "") {
  const marks = [row.r === 1 ? h("span", { class: "mark right" }, "✓ right") : row.r === 0 ? h("span", { class: "mark wrong" }, "✗ wrong") : "",
    row.c ? h("span", { class: "mark picked" }, "chosen") : ""];
  const notes = [row.c ? `chosen ${row.c}` : "", `${row.s.length.toLocaleString("en")} step${row.s.length === 1 ? "" : "s"}`,
    row.k !== undefined ? `${row.k.toLocaleString("en")} tokens` : `${row.t.length.toLocaleString("en")} characters`,
    row.n !== undefined ? `candidate ${row.n}` : "", row.p !== undefined && row.p !== null ? `forked from ${row.p}` : "", row.w];
  return h("article", { class: "panel" }, above,
    h("div", { class: "head" }, h("span", { class: "score", title: String(row.x) }, fmt(row.x)), row.a !== undefined ? h("span", {}, h("span", { class: "note" }, "answer "), h("span", { class: "answer" }, row.a)) : "", ...marks),
    h("div", { class: "note" }, notes.filter(Boolean).join(" · ")),
    row.er ? h("p", { class: "error" }, `No score: ${row.er}`) : "",
    curve(row.s), text(row.t, row), ...Object.entries(row.f ?? {}).map(([name, other]) =>
      h("details", { ontoggle: (event) => event.target.open && event.target.children.length === 1 && event.target.append(curve(other.s), text(row.t, other)) },
        h("summary", {}, `by ${name}: ${fmt(other.x)}`))));
}

/** The running score as a line, over the step scores as dots. */
function curve(steps) {
  if (steps.every((score) => score === null)) return "";
  const width = 460, height = 88, left = 34, top = 6, right = 8, line = running(steps), { low, high } = data;
  const x = (k) => (left + ((width - left - right) * (steps.length > 1 ? k / (steps.length - 1) : 0.5))).toFixed(1);
  const y = (v) => (top + (height - 2 * top) * (1 - (v - low) / (high - low || 1))).toFixed(1);
  const parts = [];
  for (const v of [low, (low + high) / 2, high]) {
    parts.push(s("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
    parts.push(s("text", { x: left - 6, y: Number(y(v)) + 3.5, "text-anchor": "end" }, String(Number(v.toPrecision(3)))));
  }
  const each = Math.max(1, Math.ceil(steps.length / 240)); // more points than that a screen cannot show
  const some = steps.map((_, k) => k).filter((k) => k % each === 0 || k === steps.length - 1);
  for (const k of some) if (steps[k] !== null) parts.push(s("circle", { class: "cell", tint: good(steps[k]), cx: x(k), cy: y(steps[k]), r: 2.4 }));
  const points = some.filter((k) => !Number.isNaN(line[k]));
  const said = `Score after each of ${steps.length} steps: ` + (points.length ? `${fmt(line[points[0]])} after the first, ${fmt(line[points.at(-1)])} after the last` : "none");
  if (points.length) {
    parts.push(s("polyline", { points: points.map((k) => `${x(k)},${y(line[k])}`).join(" ") }));
    parts.push(s("circle", { class: "end", cx: x(points.at(-1)), cy: y(line[points.at(-1)]), r: 2.8 }));
  }
  return s("svg", { class: "line", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": said }, s("title", {}, said), ...parts);
}

/** The text, its steps tinted, as much of it at a time as is looked at. */
function text(whole, { s: steps, e: ends }) {
  const box = h("div", { class: "text" }), so = running(steps), parts = [];
  const cut = (begin, end, k) => {
    for (let at = begin; at < end; ) {
      let to = Math.min(end, at + CHUNK);
      if (to < end && whole.charCodeAt(to) >= 0xdc00 && whole.charCodeAt(to) < 0xe000) to++; // not within a pair of surrogates
      parts.push([at, to, k, to === end]);
      at = to;
    }
  };
  let at = 0;
  (ends ?? []).forEach((end, k) => { cut(at, end, k); at = end; });
  cut(at, whole.length, null);
  let next = 0;
  const end = h("span", {});
  end.more = () => {
    const made = [];
    for (let size = 0, n = 0; next < parts.length && size < CHUNK && n < STEPS; next++, n++) {
      const [from, to, k, last] = parts[next], piece = whole.slice(from, to);
      size += piece.length;
      if (k === null) { made.push(ends ? h("span", { class: "rest" }, piece) : piece); continue; }
      const body = last ? piece.trimEnd() : piece; // with the line ends the number would stand on the next line
      made.push(h("span", { class: "step", tint: good(steps[k]), title: `step ${k + 1} of ${steps.length}: ${fmt(steps[k])}, ${fmt(so[k])} so far` },
        body, last ? h("small", {}, fmt(steps[k])) : ""), piece.slice(body.length));
    }
    end.before(...made);
    observer.unobserve(end);
    if (next === parts.length) end.remove();
    else observer.observe(end); // asked again, for what was put in may leave it on screen
    if (next > STEPS) highlight();
  };
  box.append(end);
  end.more();
  return box;
}

/** All candidates of a question on a line of scores: right above, wrong below, those without a verdict between. */
function dots(all, row) {
  const canvas = h("canvas", { role: "img", "aria-label": `Scores of the ${all.length} candidates of this question: right above, wrong below. Click one to read it.` });
  const where = [];
  const paint = () => {
    const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio, pen = canvas.getContext("2d");
    if (!width) return;
    canvas.width = width * scale; canvas.height = height * scale;
    pen.scale(scale, scale);
    const style = getComputedStyle(app), colour = (name) => resolve(style.getPropertyValue(name));
    const x = (v) => 8 + (width - 16) * ((v - data.low) / (data.high - data.low || 1));
    pen.strokeStyle = colour("--line"); pen.beginPath(); pen.moveTo(8, height / 2); pen.lineTo(width - 8, height / 2); pen.stroke();
    where.length = 0;
    const stacked = new Map();
    const each = Math.ceil(all.length / DOTS); // of very many some
    for (const i of [...all.filter((i, k) => k % each === 0 && i !== row.index), row.index]) {
      const other = rows[i];
      if (other.x === null) continue;
      const px = x(other.x), side = other.r === 1 ? -1 : 1, key = `${Math.round(px / 6)} ${other.r}`, below = Math.min(stacked.get(key) ?? 0, 3);
      stacked.set(key, below + 1); // those of nearly one score beside each other
      const py = height / 2 + side * ((other.r === undefined ? 0 : 8) + 2.5 * below);
      where.push([px, py, i]);
      pen.globalAlpha = 0.65; pen.fillStyle = colour(other.r === 1 ? "--good" : other.r === 0 ? "--poor" : "--faint");
      pen.beginPath(); pen.arc(px, py, 4, 0, 7); pen.fill();
      if (i === row.index) { pen.globalAlpha = 1; pen.strokeStyle = colour("--ink"); pen.lineWidth = 2; pen.beginPath(); pen.arc(px, py, 7, 0, 7); pen.stroke(); }
    }
    pen.globalAlpha = 1;
  };
  canvas.addEventListener("click", (event) => {
    const near = ([px, py]) => (px - event.offsetX) ** 2 + (py - event.offsetY) ** 2;
    const found = where.reduce((best, dot) => (best === null || near(dot) < near(best) ? dot : best), null);
    if (found) go(found[2]);
  });
  requestAnimationFrame(paint);
  canvas.paint = paint;
  return canvas;
}

/** light-dark() and the like as a colour that a canvas knows. */
function resolve(colour) {
  const probe = $("count"), before = probe.style.color;
  probe.style.color = colour;
  const found = getComputedStyle(probe).color;
  probe.style.color = before;
  return found;
}

/** To a candidate, wherever it is in the list; where filters hide it they are cleared. */
function go(index) {
  if (!shown.includes(index)) clear();
  select(shown.indexOf(index));
}

/** The tree of forks: a row each candidate, a cell each step, a fork's row where it left its parent's. */
function forks(all) {
  const some = all.map((i) => rows[i]).filter((row) => row.n !== undefined).slice(0, 400);
  const parent = new Map(some.map((row) => [row.n, row]));
  if (!some.some((row) => parent.has(row.p))) return "";
  const children = new Map();
  for (const row of some) {
    const above = parent.has(row.p) && row.p < row.n ? row.p : null;
    children.set(above, [...(children.get(above) ?? []), row]);
  }
  const order = [], stack = [...(children.get(null) ?? [])].reverse();
  while (stack.length) {
    const row = stack.pop();
    order.push(row);
    stack.push(...[...(children.get(row.n) ?? [])].reverse());
  }
  const longest = Math.max(...order.map((row) => row.s.length)), each = Math.max(1, Math.ceil(longest / 240));
  const high = 20, left = 34, cell = Math.max(2, Math.min(14, (560 * each) / Math.max(1, longest)));
  const place = new Map(order.map((row, r) => [row.n, r]));
  const width = Math.round(left + cell * Math.ceil(longest / each) + 130), height = high * order.length + 4, parts = [];
  order.forEach((row, r) => {
    const middle = r * high + high / 2 + 2, from = parent.get(row.p), bold = row.c ? { class: "chosen" } : {};
    let begins = 0;
    if (from && row.p < row.n) {
      let same = 0;
      while (same < row.t.length && row.t[same] === from.t[same]) same++;
      begins = (row.e ?? []).filter((end) => end <= same).length;
      const x = left + (begins / each) * cell;
      parts.push(s("path", { class: "fork", d: `M${x} ${place.get(row.p) * high + high / 2 + 2}V${middle}h4` }));
    }
    parts.push(s("text", { x: left - 8, y: middle + 4, "text-anchor": "end", ...bold }, String(row.n)));
    for (let k = begins; k < row.s.length; k += each) {
      const known = row.s.slice(k, k + each).filter((v) => v !== null);
      const tint = known.length ? good(known.reduce((a, b) => a + b) / known.length) : 0.5;
      parts.push(s("rect", { class: "cell", tint, x: left + (k / each) * cell + 1, y: middle - 6, width: Math.max(1, cell - 2), height: 12, rx: 2 }));
    }
    const cut = /^(stopped|interrupted)/.test(row.w) ? "✕" : "●";
    parts.push(s("text", { x: left + Math.ceil(row.s.length / each) * cell + 6, y: middle + 4, ...bold }, `${cut} ${fmt(row.x)}${row.c ? " chosen" : ""}`));
  });
  const said = `Tree of ${order.length} candidates and their forks`;
  return h("div", { class: "scroll", tabIndex: 0, role: "group", "aria-label": said }, s("svg", { class: "tree", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": said }, ...parts), h("p", { class: "note" }, "● ended by itself · ✕ stopped before"));
}

/** What is sought, marked where it is read. Ranges, not elements: the text stays as it is. */
function highlight() {
  if (!globalThis.CSS?.highlights) return;
  CSS.highlights.clear();
  const sought = pattern();
  if (!sought) return;
  const every = new RegExp(sought.source, "giu"), ranges = [];
  for (const box of detail.querySelectorAll(".text, .question, .answer")) {
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node && ranges.length < 2000; node = walker.nextNode()) {
      for (const match of node.data.matchAll(every)) {
        const range = new Range();
        range.setStart(node, match.index);
        range.setEnd(node, match.index + match[0].length);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// -- What people do ------------------------------------------------------------------------------------------------------------------------

function clear() {
  $("tools").reset();
  $("direction").setAttribute("aria-pressed", "false");
  onlyQuestion = null;
  refresh();
}

let waiting = 0;
$("tools").addEventListener("input", (event) => {
  clearTimeout(waiting);
  if (event.target.id === "find") waiting = setTimeout(refresh, 120);
  else refresh();
});
$("tools").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(waiting); refresh(); list.focus(); });
$("direction").addEventListener("click", () => {
  $("direction").setAttribute("aria-pressed", String($("direction").getAttribute("aria-pressed") !== "true"));
  refresh();
});
$("clear").addEventListener("click", () => { clear(); list.focus(); });
$("only").addEventListener("click", () => { onlyQuestion = null; refresh(); list.focus(); });
$("help").addEventListener("click", () => $("keys").showModal());
$("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches, now = root.dataset.theme ?? (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  detail.querySelector("canvas")?.paint();
});

let frame = 0;
list.addEventListener("scroll", () => { frame ||= requestAnimationFrame(() => { frame = 0; draw(); }); });
new ResizeObserver(() => { drawn = ""; draw(); detail.querySelector("canvas")?.paint(); }).observe(list);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const typing = event.target.matches("input:not([type=radio]):not([type=checkbox]), select, textarea");
  if (event.key === "Escape") {
    if (event.target.id === "find" && event.target.value) return; // which the browser empties
    event.preventDefault();
    return back();
  }
  if (typing) return;
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1), inList = event.target === list || event.target === document.body;
  const moves = { j: 1, k: -1 };
  if (inList) Object.assign(moves, { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -shown.length, End: shown.length });
  if (event.key in moves) {
    event.preventDefault();
    return select(selected + moves[event.key]);
  }
  const does = {
    "/": () => { app.classList.remove("reading"); $("find").focus(); $("find").select(); },
    "?": () => $("keys").showModal(), t: () => choose("one"), c: () => choose("compare"), a: () => choose("all"),
  };
  if (inList) does.Enter = () => { read(); detail.focus(); };
  if (does[event.key]) { event.preventDefault(); does[event.key](); }
});

// -- Begin ---------------------------------------------------------------------------------------------------------------------------------

const asked = questions.filter((question) => !question.none).length;
$("summary").textContent = [asked ? `${asked.toLocaleString("en")} question${asked === 1 ? "" : "s"}` : "", data.judge ? `judged by ${data.judge}` : "no right answers known",
  data.aggregation ? `score: ${data.aggregation.replace("_", " ")} of the steps` : "", data.risk ? "of risk: low is good" : ""].filter(Boolean).join(" · ");
$("length-name").textContent = byTokens ? "Tokens from" : "Characters from";
if (!judged) for (const input of document.querySelectorAll("[name=verdict]")) input.disabled = input.value !== "all";
if (!judged) $("sort").querySelector("[value=verdict]").disabled = true;
refresh();
list.focus();
