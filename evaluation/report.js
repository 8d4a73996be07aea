// The browser side of report.py: unpacks the data and draws the page. Texts of models enter the page as text
// nodes only, never as HTML. Colours are never alone: marks, numbers, markers and kinds of lines say the same.
const SHOWN = 20; // problems at once
const OUTCOMES = { fixed: "▲ fixed", broken: "▼ broken by training", "both right": "● both right", "both wrong": "○ both wrong" };
const MARKS = { right: ["✓", "checker: right"], wrong: ["✗", "checker: the first error"], after: ["↳", "checker: after the first error"], "": ["", "not checked"] };
const TRAPS = {
  "any problem": () => true,
  "with a trap": (problem) => problem.traps.some(Boolean),
  "without a trap": (problem) => !problem.traps.some(Boolean),
  "base errs at a trap": (problem) => problem.base.trapped,
  "tuned errs at a trap": (problem) => problem.tuned.trapped,
  "tuned errs, at no trap": (problem) => problem.tuned.marks.includes("wrong") && !problem.tuned.trapped,
};
const ORDERS = {
  "as in the file": null,
  "longest first": (problem) => -Math.max(length(problem.base), length(problem.tuned)),
  "lowest score of tuned first": (problem) => Math.min(2, ...(problem.tuned.scores || [])),
};
const length = (answer) => answer.steps.join("\n").length;
const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) key.includes("-") || key === "role" ? made.setAttribute(key, value) : (made[key] = value);
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

function table(columns, rows) {
  const cells = (kind, row) => el("tr", {}, row.map((cell) => el(kind, {}, String(cell))));
  return el("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "table" },
    el("table", {}, el("thead", {}, cells("th", columns)), el("tbody", {}, rows.map((row) => cells("td", row)))));
}

const section = (id, title, ...children) => el("section", { id }, el("h2", {}, title), ...children);

// --- problems ---

function answer(side, problem) {
  const { steps, scores, marks, verdict, disagrees } = problem[side];
  const lines = steps.map((step, k) => {
    const [sign, words] = MARKS[marks[k]], line = el("li", { className: `step ${scores ? "" : "unscored"}` });
    if (scores) line.style.setProperty("--score", scores[k]);
    line.append(el("span", { className: `mark ${marks[k]}`, role: "img", "aria-label": words, title: words }, sign),
      el("span", { className: "text", dir: "auto" }, step),
      el("span", { className: "score", title: "the judge's score of this step" }, scores ? scores[k].toFixed(2) : "–"));
    return line;
  });
  const sign = verdict === "right" ? "✓" : "✗";
  return el("div", { className: `answer ${side}` },
    el("h3", {}, `${side}: ${sign} ${verdict}`, disagrees ? el("span", { className: "disagrees" }, "≠ judge and checker disagree") : null),
    lines.length ? el("ol", {}, lines) : el("p", { className: "quiet" }, "no step"),
    scores ? null : el("p", { className: "quiet" }, "The judge could not score this answer."));
}

function reference(problem) {
  if (!problem.steps.length) return el("p", { className: "quiet" }, `Right answer: ${problem.answer}`);
  const lines = problem.steps.map((step, k) => el("li", { className: "step unscored" },
    el("span", { className: "mark", role: "img", "aria-label": problem.traps[k] ? "a trap" : "" }, problem.traps[k] ? "⚠" : ""), el("span", { className: "text", dir: "auto" }, step)));
  return el("details", {}, el("summary", {}, `Reference solution: ${problem.answer}`), el("ol", {}, lines),
    problem.traps.some(Boolean) ? el("p", { className: "quiet" }, "⚠ a trap: a step at which the base policy often errs") : null);
}

const card = (problem) => el("article", {},
  el("div", { className: "badge" }, `${OUTCOMES[problem.outcome]} · problem ${problem.number}`),
  el("p", { className: "prompt", dir: "auto" }, problem.prompt),
  el("div", { className: "answers" }, answer("base", problem), answer("tuned", problem)), reference(problem));

function problems(all) {
  all.forEach((problem, k) => { problem.number = k + 1; });
  const wanted = { outcome: null, disagree: false, trap: "any problem", order: "as in the file", text: "" };
  const list = el("div", { id: "list" }), status = el("p", { id: "status", role: "status" });
  const more = el("button", { type: "button", id: "more" }, "Show more");
  let found = [], shown = 0;
  const disagrees = (problem) => problem.base.disagrees || problem.tuned.disagrees;
  function show() {
    list.append(...found.slice(shown, shown + SHOWN).map(card));
    shown = Math.min(found.length, shown + SHOWN);
    more.hidden = shown === found.length;
    status.textContent = `${count(found.length, "problem")} of ${all.length.toLocaleString("en")}, ${shown} shown`;
  }
  function find() {
    const words = wanted.text.toLowerCase(), key = ORDERS[wanted.order];
    found = all.filter((problem) => (!wanted.outcome || problem.outcome === wanted.outcome) && (!wanted.disagree || disagrees(problem))
      && TRAPS[wanted.trap](problem) && (!words || [problem.prompt, ...problem.base.steps, ...problem.tuned.steps].join("\n").toLowerCase().includes(words)));
    if (key) found = found.map((problem) => [key(problem), problem]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
    list.replaceChildren();
    shown = 0;
    for (const chip of chips) chip.setAttribute("aria-pressed", chip.value === (wanted.outcome || ""));
    show();
  }
  const set = (name, value) => { wanted[name] = value; find(); };
  const chips = [["", `all ${all.length}`], ...Object.entries(OUTCOMES).map(([name, words]) => [name, `${words} ${all.filter((one) => one.outcome === name).length}`])]
    .map(([value, words]) => el("button", { type: "button", value, onclick: () => set("outcome", value || null) }, words));
  const select = (id, name, choices) => el("label", {}, id, el("select", { id: name, onchange: (event) => set(name, event.target.value) }, Object.keys(choices).map((choice) => el("option", { value: choice }, choice))));
  const controls = [el("div", { className: "chips", role: "group", "aria-label": "outcome" }, chips),
    el("div", { className: "controls" },
      el("label", {}, el("input", { type: "checkbox", id: "disagree", onchange: (event) => set("disagree", event.target.checked) }), `judge and checker disagree (${all.filter(disagrees).length})`),
      all.some((problem) => problem.traps.length) ? select("traps", "trap", TRAPS) : null, select("order", "order", ORDERS),
      el("label", {}, "text", el("input", { type: "search", id: "text", oninput: (event) => set("text", event.target.value) })))];
  more.onclick = show;
  find();
  return [...controls, status, list, more];
}

function comparison(found) {
  const scale = el("span", { className: "scale", role: "img", "aria-label": "colours from 0, wrong, to 1, right" });
  return section("problems", "Problems",
    el("p", { className: "quiet" }, `base ${found.base} · tuned ${found.tuned} · judge ${found.judge}`),
    table(["metric", "base", "tuned", "difference"], found.metrics),
    el("p", { className: "quiet" }, "Judge: 0 (wrong) ", scale, " 1 (right), a bar and a number beside each step. Checker: ✓ right, ✗ the first error, ↳ after it. "
      + `They disagree (≠) if the first step with a score below ${found.threshold} is not the first error.`),
    problems(found.problems));
}

// --- curves ---

const W = 340, H = 220, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 38;
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "1 3", "4 2"];

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function ticks(low, high, log) {
  const found = [];
  if (log) {
    for (let k = Math.floor(Math.log10(low)); k <= Math.log10(high); k++) for (const m of high / low > 30 ? [1] : [1, 2, 5]) found.push(m * 10 ** k);
  } else {
    const rough = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find((m) => m * unit >= rough) * unit;
    for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-9); k++) found.push(k * step);
  }
  return found.filter((value) => value >= low * (1 - 1e-9) - 1e-12 && value <= high * (1 + 1e-9));
}

const words = (value) => (value !== 0 && Math.abs(value) < 1e-3) || Math.abs(value) >= 1e5 ? value.toExponential(0) : String(Number(value.toPrecision(3)));

function marker(look, x, y) {
  const r = 3.5, shapes = [`M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`, `M${x - 3},${y - 3}h6v6h-6z`, `M${x},${y - 4}l4,7h-8z`,
    `M${x},${y - 4.5}l4.5,4.5l-4.5,4.5l-4.5,-4.5z`, `M${x - 3},${y - 3}l6,6m0,-6l-6,6`, `M${x - 4},${y}h8m-4,-4v8`];
  return svg("path", { d: shapes[look % 6], class: `mark${look % 6}` });
}

function chart({ title, x: name, y: fixed, log, series }) {
  const points = series.flatMap((line) => line.points), figure = el("figure", {}, el("figcaption", {}, title));
  if (!points.length) return el("figure", {}, el("figcaption", {}, title), el("p", { className: "quiet" }, "no finite number"));
  const xs = points.map((point) => point[0]).filter((x) => !log || x > 0), ys = points.flatMap((point) => point.slice(1));
  const range = (values) => {
    let low = Infinity, high = -Infinity;
    for (const value of values) low = Math.min(low, value), high = Math.max(high, value);
    return low === high ? [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : [low, high];
  };
  const [left, right] = xs.length ? range(xs) : [1, 2], [bottom, top] = fixed || range(ys);
  const at = log ? (x) => Math.log(Math.max(x, left)) : (x) => x;
  const px = (x) => LEFT + (at(x) - at(left)) / (at(right) - at(left)) * (W - LEFT - RIGHT);
  const py = (y) => H - BOTTOM - (Math.min(top, Math.max(bottom, y)) - bottom) / (top - bottom) * (H - TOP - BOTTOM);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${series.map((line) => line.label).join(", ")}` });
  for (const y of ticks(bottom, top)) picture.append(svg("line", { x1: LEFT, x2: W - RIGHT, y1: py(y), y2: py(y), class: "grid" }), svg("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, words(y)));
  for (const x of ticks(left, right, log)) picture.append(svg("text", { x: px(x), y: H - BOTTOM + 15, "text-anchor": "middle" }, words(x)));
  picture.append(svg("text", { x: (LEFT + W - RIGHT) / 2, y: H - 6, "text-anchor": "middle" }, name));
  for (const { label, look, points: all, level } of series) {
    if (!all.length) continue;
    const k = look % 6, path = all.map((point, i) => `${i ? "L" : "M"}${px(point[0]).toFixed(1)},${py(point[1]).toFixed(1)}`).join("");
    const ends = all.filter((point) => point.length > 2);
    if (ends.length > 1) picture.append(svg("path", { class: `band${k}`, d: `M${[...ends.map((p) => [p[0], p[3]]), ...ends.reverse().map((p) => [p[0], p[2]])].map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join("L")}z` }));
    if (level) picture.append(svg("path", { class: `line${k}`, "stroke-dasharray": "1 3", d: `M${LEFT},${py(all[0][1])}H${W - RIGHT}` }));
    picture.append(svg("path", { class: `line${k}`, "stroke-dasharray": DASHES[k], d: path }));
    if (all.length < 40) for (const [x, y, low, high] of all) {
      const dot = marker(k, px(x), py(y));
      dot.append(svg("title", {}, `${label}: ${words(x)}, ${words(y)}${low === undefined ? "" : ` [${words(low)}, ${words(high)}]`}`));
      picture.append(dot);
    }
  }
  const legend = series.map(({ label, look }) => el("li", {}, svg("svg", { viewBox: "0 0 28 12", "aria-hidden": "true" },
    svg("path", { class: `line${look % 6}`, "stroke-dasharray": DASHES[look % 6], d: "M1,6H27" }), marker(look % 6, 14, 6)), label));
  figure.append(picture, el("ul", { className: "legend" }, legend));
  return figure;
}

function judge({ name, metrics, panels }) {
  const columns = ["metric", "value", "n"], isDetail = ([metric]) => metric.includes("/"), details = metrics.filter(isDetail);
  return [el("h3", {}, name), table(columns, metrics.filter((row) => !isDetail(row))), charts(panels),
    details.length ? el("details", {}, el("summary", {}, "by position, aggregate and rival"), table(columns, details)) : null];
}

const charts = (panels) => el("div", { className: "charts" }, panels.map(chart));

// --- the page ---

async function draw() {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (sign) => sign.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = JSON.parse(await new Response(unpacked).text()), sections = [];
  if (data.comparison) sections.push(comparison(data.comparison));
  if (data.trainings.length) sections.push(section("trainings", "Training", data.trainings.map(({ name, about, panels, of_tuned }, k) =>
    el("details", { open: of_tuned || k === 0 }, el("summary", {}, `${name} · ${about}${of_tuned ? " · the tuned model above" : ""}`), charts(panels)))));
  if (data.searches.length) sections.push(section("searches", "Search", el("p", { className: "quiet" }, "Exact accuracy over sampled tokens, with 95 % intervals; one panel a strategy."),
    data.searches.map(({ split, panels }) => [el("h3", {}, split), charts(panels)]).flat()));
  if (data.judges.length) sections.push(section("judges", "Judges", data.judges.map(judge).flat()));
  const links = sections.map((made) => el("a", { href: `#${made.id}` }, made.querySelector("h2").textContent));
  document.getElementById("message").replaceWith(el("nav", {}, links), ...sections);
}

draw().catch((error) => { document.getElementById("message").textContent = `The page cannot be drawn (${error}): it needs a browser of 2023 or later.`; });
