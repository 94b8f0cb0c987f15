// Asks the server as any client does, and shows what it tells of each candidate. Whatever comes from it becomes text, never markup.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const WORDS = { waiting: "waiting", writing: "writing", held: "on hold", stop: "finished", length: "cut off", stopped: "stopped", ended: "ended" };
  const form = $("ask");
  let offers = null; // what the server can be asked for
  let run = null; // the question that is shown

  // -- small things -----------------------------------------------------------------------------------------------------

  function make(name, className, text) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function draw(parent, name, attributes, text) {
    const node = parent.appendChild(document.createElementNS(SVG, name));
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  const score = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));
  const count = (n, one, many = one + "s") => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
  const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
  const seconds = (s) => `${s < 9.95 ? s.toFixed(1) : Math.round(s)} s`;

  // What is kept for this tab: the key, and what stands in the form. Where storage is off the page works without.
  const kept = {
    get(name) { try { return sessionStorage.getItem(`reflective.${name}`); } catch { return null; } },
    set(name, value) { try { sessionStorage.setItem(`reflective.${name}`, value); } catch { /* as said */ } },
    drop(name) { try { sessionStorage.removeItem(`reflective.${name}`); } catch { /* as said */ } },
  };
  let key = kept.get("key") || "";

  // The server counts characters, JavaScript counts those beyond 0xFFFF twice.
  function place(text, characters) {
    let at = 0;
    for (; characters > 0 && at < text.length; characters--) at += text.codePointAt(at) > 0xffff ? 2 : 1;
    return at;
  }

  // -- the server -------------------------------------------------------------------------------------------------------

  function call(path, options = {}) {
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    return fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin", referrerPolicy: "no-referrer" });
  }

  async function refused(answer) {
    let said = "";
    try { said = (await answer.json()).error.message; } catch { /* not ours: a proxy's page, perhaps */ }
    const titles = {
      400: "The server does not take this", 404: "There is no such thing on this server", 408: "The question did not arrive in time",
      413: "The question is too long for this server", 422: "The server does not take this", 429: "Too many requests",
      500: "Something failed in the server", 502: "The server cannot be reached", 503: "The server is busy", 504: "It took too long",
    };
    const wait = answer.headers.get("Retry-After");
    const patience = wait ? ` It asks to wait ${/^\d+$/.test(wait) ? count(Number(wait), "second") : `until ${wait}`}.` : "";
    return { status: answer.status, title: titles[answer.status] || `The server answered with status ${answer.status}`,
      text: `${sentence(said || "It gave no reason")}${patience}`, again: [408, 429, 502, 503, 504].includes(answer.status) };
  }

  function notice(problem) {
    const box = $("notice");
    box.hidden = !problem;
    if (!problem) return;
    box.querySelector("strong").textContent = problem.title;
    box.querySelector("p").textContent = problem.text;
    $("again").hidden = !problem.again;
  }

  function askForKey(wrong) {
    $("key-hint").textContent = wrong
      ? "That is not this server's key. Try another."
      : "This server asks for its key. It is kept in this tab until you close it, and nowhere else.";
    $("key").hidden = false;
    $("secret").value = "";
    $("secret").focus();
  }

  function keyRefused() {
    const wrong = Boolean(key);
    key = "";
    kept.drop("key");
    $("forget").hidden = true;
    askForKey(wrong);
  }

  async function meet() {
    let answer;
    try {
      answer = await call("v1/strategies");
    } catch {
      notice({ title: "The server cannot be reached", text: "Is it still running, and is this still its address?", again: true });
      return false;
    }
    if (answer.status === 401) { keyRefused(); return false; }
    if (!answer.ok) { notice(await refused(answer)); return false; }
    offers = await answer.json();
    if (key) kept.set("key", key);
    $("forget").hidden = !key;
    $("key").hidden = true;
    notice(null);
    const room = offers.max_model_len ? `, ${offers.max_model_len.toLocaleString("en")} tokens` : "";
    $("model").textContent = `${offers.model}${room}`;
    document.title = `${offers.model}: watch it live`;
    offer();
    return true;
  }

  function offer() {
    const efforts = offers.efforts.map((e) => [e.effort, e.effort === "auto" ? `up to ${e.candidates}` : String(e.candidates)]);
    $("efforts").parentNode.hidden = !efforts.length;
    $("efforts").replaceChildren(...efforts.map(([value, small]) => {
      const label = make("label"), input = make("input");
      Object.assign(input, { type: "radio", name: "effort", value });
      label.append(input, make("span", "", value), make("small", "", small));
      return label;
    }));
    $("strategy").replaceChildren(...[{ id: "" }, ...offers.data].map((s) => {
      const option = make("option", "", s.id || "as the effort has it");
      option.value = s.id;
      return option;
    }));
    form.elements.best_of.max = offers.max_candidates;
    form.elements.temperature.placeholder = offers.sampling.temperature;
    if (offers.max_model_len) {
      form.elements.max_tokens.placeholder = offers.max_model_len;
      if (Number(form.elements.max_tokens.value) > offers.max_model_len) form.elements.max_tokens.value = "";
    }
    restore();
    explain();
  }

  // -- the form ---------------------------------------------------------------------------------------------------------

  function restore() {
    let values = {};
    try { values = JSON.parse(kept.get("form") || "{}"); } catch { /* not what was written */ }
    for (const [name, value] of Object.entries(values)) {
      const field = form.elements.namedItem(name);
      if (field) field.value = value;
    }
    if (!$("efforts").childElementCount) return;
    if (![...$("efforts").querySelectorAll("input")].some((input) => input.checked)) {
      const usual = $("efforts").querySelector("[value=medium]") || $("efforts").querySelector("input");
      usual.checked = true;
    }
  }

  function keep() {
    kept.set("form", JSON.stringify(Object.fromEntries(new FormData(form))));
  }

  // What the choice made comes to, in words.
  function explain() {
    if (!offers) return;
    const chosen = $("efforts").querySelector(":checked"), effort = chosen && offers.efforts.find((e) => e.effort === chosen.value);
    const auto = effort && effort.effort === "auto";
    $("strategy").disabled = Boolean(auto); // which is a strategy of its own
    const name = (!auto && $("strategy").value) || (effort && effort.strategy) || "best_of_n";
    const found = offers.data.find((s) => s.id === name);
    $("about").textContent = found ? found.about : "";
    form.elements.best_of.placeholder = effort ? effort.candidates : found ? found.candidates : "";
  }

  function asked() {
    const body = {
      messages: [{ role: "user", content: form.elements.question.value }],
      stream: true, stream_options: { include_usage: true }, reflective: { watch: true },
    };
    const data = new FormData(form);
    if (data.get("effort")) body.effort = data.get("effort");
    if (data.get("strategy")) body.strategy = data.get("strategy");
    for (const name of ["best_of", "temperature", "max_tokens", "seed"]) if (data.get(name)) body[name] = Number(data.get(name));
    if (!body.effort && !body.strategy) body.strategy = "best_of_n";
    return body;
  }

  // -- asking -----------------------------------------------------------------------------------------------------------

  async function ask() {
    if (run && run.going) return;
    keep();
    notice(null);
    if (!offers && !(await meet())) return;
    run = { going: true, hangUp: new AbortController(), began: performance.now(), candidates: new Map(), chosen: null, usage: null, told: false };
    const mine = run;
    working(true);
    clear();
    if (matchMedia("(max-width: 999px)").matches) $("run").scrollIntoView({ block: "start" }); // it lies below the form
    say("Asked.");
    let problem = null;
    try {
      const answer = await call("v1/chat/completions", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked()), signal: mine.hangUp.signal,
      });
      if (answer.status === 401) keyRefused();
      else if (!answer.ok) problem = await refused(answer);
      else problem = await read(answer, mine);
    } catch (error) {
      if (error.name !== "AbortError") {
        problem = mine.told
          ? { title: "The connection broke off", text: "The server went away before the answer was complete. What it had told until then is below.", again: true }
          : { title: "The server cannot be reached", text: "Is it still running, and is this still its address?", again: true };
      }
    }
    mine.going = false;
    mine.took = (performance.now() - mine.began) / 1000;
    for (const c of mine.candidates.values()) if (["waiting", "writing", "held"].includes(c.state)) state(c, "ended");
    working(false);
    notice(problem);
    if (!mine.told) { $("shown").hidden = true; $("empty").hidden = false; }
    render();
    say(mine.chosen ? `Done. Candidate ${mine.chosen.candidate + 1} was chosen.` : mine.hangUp.signal.aborted ? "Stopped." : "");
  }

  function working(busy) {
    $("go").disabled = busy;
    $("stop").disabled = !busy;
    document.body.classList.toggle("busy", busy);
    if (!busy && document.activeElement === $("stop")) $("go").focus();
  }

  function say(text) { $("told").textContent = text; }

  // The stream, event by event. What is wrong with it, or null.
  async function read(answer, mine) {
    const reader = answer.body.getReader(), decoder = new TextDecoder();
    let buffer = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      buffer += decoder.decode(value, { stream: true });
      const lines = buffer.split("\n");
      buffer = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const text = line.slice(6);
        if (text === "[DONE]") return mine.problem || null;
        const chunk = JSON.parse(text);
        if (chunk.error) {
          const title = { 503: "The server is shutting down", 504: "It took too long" }[chunk.error.code] || "The server gave up";
          mine.problem = { title, text: sentence(chunk.error.message), again: chunk.error.code !== 500 };
        }
        if (chunk.usage) mine.usage = chunk.usage;
        for (const event of (chunk.reflective && chunk.reflective.events) || []) take(event, mine);
      }
      later();
    }
    return { title: "The connection broke off", text: "The server went away before the answer was complete. What it had told until then is below.", again: true };
  }

  // -- what is told -----------------------------------------------------------------------------------------------------

  function take(event, mine) {
    if (event.type === "chosen") { mine.chosen = event; choose(mine); return; }
    const c = event.type === "started" ? begin(event, mine) : mine.candidates.get(event.candidate);
    if (!c) return;
    mine.told = true;
    if (event.type === "text") {
      c.tokens = event.tokens;
      if (c.state === "waiting") state(c, "writing");
      write(c, event.text);
    } else if (event.type === "step") {
      step(c, event.score, place(c.text, event.end));
      c.running.push(event.running);
      c.score = event.running;
    } else if (event.type === "steps") {
      rewrite(c, event.step_scores, event.ends);
      c.running = running(event.step_scores, event.running);
      c.score = event.running;
    } else if (event.type === "held") {
      state(c, event.held ? "held" : c.text ? "writing" : "waiting");
    } else if (event.type === "ended") {
      rewrite(c, event.step_scores, event.step_spans.map((span) => span[1]));
      if (event.step_scores.length !== c.running.length) c.running = running(event.step_scores, event.score);
      Object.assign(c, { score: event.step_scores.length ? event.score : null, answer: event.answer, why: event.error || event.why, tokens: event.tokens });
      state(c, event.status === "interrupted" ? "ended" : event.status);
    }
    c.stale = true;
  }

  // Where the scores are known all at once: their geometric mean up to each step, and at the last what the server says.
  function running(scores, last) {
    let sum = 0;
    const found = scores.map((s, i) => Math.exp((sum += Math.log(Math.max(s || 0, 1e-10))) / (i + 1)));
    if (found.length) found[found.length - 1] = last;
    return found;
  }

  function begin(event, mine) {
    const c = { number: event.candidate, parent: event.parent, text: "", shown: 0, ends: [], scores: [], running: [], score: null, state: "waiting",
      tokens: 0, why: "", answer: null, firstStep: event.steps };
    c.tail = document.createTextNode("");
    build(c);
    mine.candidates.set(c.number, c);
    const parent = mine.candidates.get(event.parent);
    if (parent) { // a fork has its parent's beginning
      const at = place(parent.text, event.at);
      c.text = parent.text.slice(0, at);
      c.given = at;
      c.tail.data = c.text;
      for (let i = 0; i < event.steps; i++) step(c, parent.scores[i], Math.min(parent.ends[i], at));
      c.running = parent.running.slice(0, event.steps);
      c.score = c.running.length ? c.running[c.running.length - 1] : null;
    }
    return c;
  }

  function write(c, text) {
    const follow = c.box.scrollHeight - c.box.scrollTop - c.box.clientHeight < 40;
    c.text += text;
    c.tail.appendData(text);
    if (follow) c.box.scrollTop = c.box.scrollHeight;
  }

  // A step is what stands between the one before it and ``end``; the blank lines behind it have no tint.
  function step(c, value, end) {
    const whole = c.text.slice(c.shown, end), words = whole.trimEnd();
    const span = make("span", c.given !== undefined && end <= c.given ? "step given" : "step", words);
    span.style.setProperty("--score", value === null ? 0.5 : value);
    span.dataset.score = score(value);
    span.title = `step ${c.scores.length + 1}: ${value === null ? "no score" : value.toFixed(3)}`;
    c.box.insertBefore(span, c.tail);
    c.box.insertBefore(document.createTextNode(whole.slice(words.length)), c.tail);
    c.shown = Math.min(end, c.text.length);
    c.tail.data = c.text.slice(c.shown);
    c.scores.push(value);
    c.ends.push(end);
  }

  function rewrite(c, scores, ends) {
    const at = c.box.scrollTop;
    c.box.replaceChildren(c.tail);
    Object.assign(c, { shown: 0, scores: [], ends: [] });
    c.tail.data = c.text;
    scores.forEach((value, i) => step(c, value, place(c.text, ends[i])));
    c.box.scrollTop = at;
  }

  // -- candidates on the page -------------------------------------------------------------------------------------------

  function build(c) {
    const name = String(c.number + 1);
    c.box = make("div", "text");
    c.box.tabIndex = 0; // it scrolls
    c.box.setAttribute("role", "group");
    c.box.setAttribute("aria-label", `Text of candidate ${name}`);
    c.box.append(c.tail);
    c.card = make("article", "card");
    c.card.dataset.candidate = c.number;
    const head = make("div", "head"), bar = make("div", "bar");
    c.word = make("span", "state");
    c.big = make("span", "score", "–");
    c.fill = bar.appendChild(make("i"));
    head.append(make("h3", "", name));
    if (c.parent !== null) head.append(make("span", "from", from(c)));
    head.append(c.word, c.big);
    c.foot = make("p", "foot");
    c.card.append(head, bar, c.box, c.foot);
    near(c, c.card);
    $("grid").append(c.card);
    state(c, "waiting");
    c.line = draw($("race"), "g", {});
    c.way = draw(c.line, "path", { class: "way" });
    c.tip = draw(c.line, "g", {});
    c.lane = draw($("tree"), "g", {});
  }

  const from = (c) => `↳ ${c.parent + 1}${c.firstStep ? `, step ${c.firstStep}` : ""}`;

  // Whoever looks at a candidate sees its way, from the beginning of the first of its parents.
  function near(c, node) {
    for (const [event, is] of [["pointerenter", true], ["pointerleave", false], ["focusin", true], ["focusout", false]]) {
      node.addEventListener(event, () => {
        node.classList.toggle("near", is);
        for (let one = c; one; one = run && run.candidates.get(one.parent)) for (const part of [one.line, one.lane]) part.classList.toggle("near", is);
      });
    }
  }

  function state(c, now) {
    c.state = now;
    c.stale = true;
    c.card.dataset.state = now;
    c.word.textContent = WORDS[now];
    if (now !== "stopped" || c.row) return;
    shelve(c);
  }

  // A stopped candidate leaves the grid for the list below it.
  function shelve(c) {
    c.row = make("details", "row");
    c.row.dataset.candidate = c.number;
    const summary = make("summary");
    summary.append(make("h3", "", String(c.number + 1)));
    if (c.parent !== null) summary.append(make("span", "from", from(c)));
    summary.append(c.big, make("span", "why"));
    c.row.append(summary, c.box);
    near(c, c.row);
    c.card.remove();
    $("rows").append(c.row);
  }

  function clear() {
    $("grid").replaceChildren();
    $("rows").replaceChildren();
    $("race").replaceChildren($("race-title"));
    $("tree").replaceChildren($("tree-title"));
    $("shown").hidden = true;
    $("empty").hidden = true;
    $("answer").classList.remove("final");
    later();
  }

  function choose(mine) {
    const c = mine.candidates.get(mine.chosen.candidate);
    if (!c) return;
    c.card.classList.add("chosen");
    c.word.textContent = "chosen";
    if (c.row) { $("grid").append(c.card); c.card.insertBefore(c.box, c.foot); c.card.querySelector(".head").append(c.big); c.row.remove(); }
    c.line.parentNode.append(c.line); // above the others
  }

  // -- drawing ----------------------------------------------------------------------------------------------------------

  let pending = false;
  function later() {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => { pending = false; render(); });
  }

  function render() {
    const mine = run, all = mine ? [...mine.candidates.values()] : [];
    if (!mine || (!mine.going && !mine.told)) return;
    $("shown").hidden = false;
    totals(mine, all);
    for (const c of all) {
      if (!c.stale) continue;
      c.stale = false;
      c.big.textContent = score(c.score);
      c.fill.style.width = `${100 * Math.max(0, Math.min(1, c.score || 0))}%`;
      const parts = [count(c.scores.length, "step"), count(c.tokens, "token")];
      if (c.answer !== null) parts.push(`answers ${c.answer}`);
      if (c.why && c.state !== "stop") parts.push(c.why);
      c.foot.textContent = parts.join(" · ");
      if (c.row) c.row.querySelector(".why").textContent = `after ${count(c.scores.length, "step")}: ${c.why}${against(c, all)}`;
    }
    $("stopped").hidden = !$("rows").childElementCount;
    $("stopped").firstElementChild.textContent = `Stopped: ${$("rows").childElementCount}`;
    const most = Math.max(4, ...all.map((c) => c.running.length));
    race(mine, all, most);
    tree(mine, all, most);
    answer(mine, all);
  }

  // What the best of the others had come to after as many steps, where it was more.
  function against(c, all) {
    const steps = c.running.length, rivals = all.filter((other) => other !== c && other.running.length && (other.running.length >= steps || other.state === "stop"));
    const best = Math.max(...rivals.map((other) => other.running[Math.min(steps, other.running.length) - 1]));
    return steps && best > c.score + 0.005 ? `; the best had ${score(best)}` : "";
  }

  function totals(mine, all) {
    const number = (...states) => all.filter((c) => states.includes(c.state)).length;
    const took = mine.going ? (performance.now() - mine.began) / 1000 : mine.took;
    const parts = [];
    const add = (n, word) => { if (n) parts.push([String(n), ` ${word}`]); };
    if (!all.length) parts.push(["", mine.going ? "Waiting for a place" : ""]);
    add(number("writing"), "writing");
    add(number("waiting"), "waiting");
    add(number("held"), "on hold");
    add(number("stop", "length"), "finished");
    add(number("stopped"), "stopped");
    add(number("ended"), "ended here");
    const tokens = mine.chosen ? mine.chosen.tokens : all.reduce((sum, c) => sum + c.tokens, 0);
    if (tokens) parts.push([tokens.toLocaleString("en"), tokens === 1 ? " token" : " tokens"]);
    parts.push([took.toFixed(1), " s"]);
    $("totals").replaceChildren(...parts.flatMap(([bold, rest], i) => [...(i ? [" · "] : []), make("b", "", bold), rest]));
  }

  function answer(mine, all) {
    const scored = all.filter((c) => c.state !== "stopped" && c.score !== null);
    const best = mine.chosen ? mine.candidates.get(mine.chosen.candidate) : scored.reduce((a, c) => (a && a.score >= c.score ? a : c), null);
    $("answer").classList.toggle("final", Boolean(mine.chosen));
    $("answer-title").textContent = mine.chosen ? "Answer" : "Ahead so far";
    const text = !best ? "" : mine.chosen ? (best.answer !== null ? best.answer : best.text.trim()) : `Candidate ${best.number + 1}`;
    $("answer-big").textContent = text;
    $("answer-big").classList.toggle("long", text.length > 40);
    const facts = [];
    if (mine.chosen && best) {
      const why = mine.chosen.chosen_by === "only" ? "It is the only candidate." : `Chosen of ${all.length}: ${mine.chosen.why}.`;
      $("answer-why").textContent = `Candidate ${best.number + 1}, score ${score(best.score)}. ${why}`;
      facts.push(["chosen by", mine.chosen.chosen_by], ["strategy", mine.chosen.strategy], ["seed", mine.chosen.seed],
        ["tokens", `${mine.chosen.tokens.toLocaleString("en")} decoded${mine.usage ? `, ${mine.usage.prompt_tokens.toLocaleString("en")} in the prompt` : ""}`],
        ["time", seconds(mine.chosen.seconds)]);
    } else {
      $("answer-why").textContent = best ? `with a score of ${score(best.score)} after ${count(best.scores.length, "step")}` : "No step has ended yet.";
      if (!mine.going && mine.hangUp.signal.aborted) facts.push(["stopped", `by you, after ${seconds(mine.took)}; the server decodes no further`]);
    }
    $("facts").replaceChildren(...facts.flatMap(([term, value]) => [make("dt", "", term), make("dd", "", String(value))]));
  }

  const LEFT = 28, RIGHT = 12; // of both drawings, whose steps stand below each other

  function race(mine, all, most) {
    const svg = $("race"), width = svg.clientWidth || 300, height = 190, left = LEFT, right = RIGHT, top = 8, bottom = 22;
    const x = (i) => left + ((width - left - right) * i) / most, y = (s) => top + (height - top - bottom) * (1 - Math.max(0, Math.min(1, s || 0)));
    let rules = svg.querySelector(".rules");
    const shape = `${width} ${most}`;
    if (!rules || rules.dataset.shape !== shape) {
      if (rules) rules.remove();
      rules = draw(svg, "g", { class: "rules", "aria-hidden": "true" });
      svg.insertBefore(rules, svg.children[1] || null);
      rules.dataset.shape = shape;
      for (const s of [0, 0.5, 1]) {
        draw(rules, "line", { class: "rule", x1: left, x2: width - right, y1: y(s), y2: y(s) });
        draw(rules, "text", { x: left - 6, y: y(s) + 4, "text-anchor": "end" }, s === 0.5 ? "0.5" : String(s));
      }
      const every = Math.ceil(most / 10);
      for (let i = every; i <= most; i += every) draw(rules, "text", { x: x(i), y: height - 6, "text-anchor": "middle" }, String(i));
      for (const c of all) c.drawn = "";
    }
    for (const c of all) {
      const drawn = `${c.running.length} ${c.state} ${c.score} ${mine.chosen && mine.chosen.candidate === c.number}`;
      if (c.drawn === drawn) continue;
      c.drawn = drawn;
      // A fork's line leaves its parent's where the last step is that they share.
      const first = Math.max(0, c.parent === null ? 0 : c.firstStep - 1);
      const points = c.running.map((s, i) => [x(i + 1), y(s)]).slice(first);
      const near = c.line.classList.contains("near") ? " near" : "";
      c.line.setAttribute("class", (mine.chosen && mine.chosen.candidate === c.number ? "chosen" : c.state) + near);
      c.way.setAttribute("d", points.length ? `M${points.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join("L")}` : "");
      c.tip.replaceChildren();
      if (!points.length) continue;
      const [a, b] = points[points.length - 1];
      if (c.state === "stopped") draw(c.tip, "path", { class: "tip", d: `M${a - 4},${b - 4}l8,8m0,-8l-8,8` });
      else draw(c.tip, "circle", { class: "tip", cx: a, cy: b, r: c.state === "writing" ? 2 : 3.5 });
    }
  }

  // Who was forked from whom: a lane a candidate, its steps in the tints of their scores.
  function tree(mine, all, most) {
    const svg = $("tree"), forked = all.some((c) => c.parent !== null);
    $("family").hidden = !forked;
    if (!forked) return;
    const children = new Map();
    for (const c of all) children.set(c.parent, [...(children.get(c.parent) || []), c]);
    const order = [], stack = [...(children.get(null) || [])].reverse();
    while (stack.length) { // parents before their forks, and those forked last nearest: no two connections cross
      const c = stack.pop();
      order.push(c);
      stack.push(...(children.get(c.number) || []).sort((a, b) => a.firstStep - b.firstStep || b.number - a.number));
    }
    const pitch = order.length > 40 ? 9 : 13, width = svg.clientWidth || 300;
    const x = (i) => LEFT + ((width - LEFT - RIGHT) * i) / most, y = (c) => c.place * pitch + pitch / 2 + 2;
    order.forEach((c, i) => { c.place = i; });
    svg.style.height = `${order.length * pitch + 4}px`;
    for (const c of order) {
      const parent = mine.candidates.get(c.parent), chosen = Boolean(mine.chosen && mine.chosen.candidate === c.number);
      const laid = `${c.place} ${parent ? parent.place : ""} ${c.scores.length} ${c.state} ${chosen} ${most} ${width}`;
      if (c.laid === laid) continue;
      c.laid = laid;
      c.lane.setAttribute("class", (chosen ? "chosen" : c.state) + (c.lane.classList.contains("near") ? " near" : ""));
      c.lane.replaceChildren();
      const own = parent ? c.firstStep : 0, here = y(c), last = Math.max(c.scores.length, own + (c.state === "writing" ? 0.5 : 0.3));
      const begin = parent ? `M${x(own)},${y(parent)}V${here - 4}q0,4 4,4` : `M${x(0)},${here}`;
      draw(c.lane, "path", { class: "way", d: `${begin}H${x(last)}` });
      draw(c.lane, "text", { x: (parent ? x(own) : x(0)) - 5, y: here + 3.5, "text-anchor": "end" }, String(c.number + 1));
      for (let i = own; i < c.scores.length; i++) {
        const dot = draw(c.lane, "circle", { class: "dot cell", cx: x(i + 1), cy: here, r: pitch / 3.2 });
        dot.style.setProperty("--score", c.scores[i] === null ? 0.5 : c.scores[i]);
      }
      if (c.state === "stopped") draw(c.lane, "path", { class: "tip", d: `M${x(last) + pitch / 2},${here - 3}l6,6m0,-6l-6,6` });
    }
  }

  // -- from the beginning -----------------------------------------------------------------------------------------------

  form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  form.addEventListener("input", () => { keep(); explain(); });
  $("stop").addEventListener("click", () => run && run.hangUp.abort());
  $("again").addEventListener("click", async () => { if (offers || (await meet())) form.requestSubmit(); });
  $("key").addEventListener("submit", async (event) => {
    event.preventDefault();
    key = $("secret").value.trim();
    if (await meet()) form.elements.question.focus();
  });
  $("forget").addEventListener("click", () => { key = ""; kept.drop("key"); $("forget").hidden = true; offers = null; askForKey(false); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && run && run.going) run.hangUp.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form.contains(event.target)) { event.preventDefault(); form.requestSubmit(); }
  });
  window.addEventListener("resize", later);
  setInterval(() => { if (run && run.going && !document.hidden) totals(run, [...run.candidates.values()]); }, 100);
  for (let i = 0; i <= 20; i++) {
    const part = make("span", "step");
    part.style.setProperty("--score", i / 20);
    $("scale").append(part);
  }
  restore();
  meet();
})();
