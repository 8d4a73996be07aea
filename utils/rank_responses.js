// The browser side of rank_responses.py, for both pages: a row of items, each with a mark that keys, buttons
// or (for answers) dragging set. The server sends all text escaped (`turn`) and gets marks back in the order
// of the items that it sent. Gradio calls this script with `element` and `server`.
const root = element.querySelector(".work");
const given = root.dataset.name; // --ranker
const items = () => [...root.querySelectorAll(".item")];
const button = (action) => root.querySelector(`[data-do="${action}"]`);
let busy = false;

const name = () => given || sessionStorage.getItem("ranker") || "";

function say(text, bad = false) {
  const line = root.querySelector(".message");
  if (line) line.textContent = text, line.classList.toggle("bad", bad);
}

async function turn(action) {
  if (busy) return;
  busy = true;
  const marks = [];
  items().forEach((item) => { marks[item.dataset.place] = item.dataset.mark; });
  const request = { name: name(), action, marks, key: root.querySelector(".task")?.dataset.key || null, note: root.querySelector(".note")?.value || "" };
  const reply = await server.turn(request).catch(() => undefined); // undefined if no server answers
  busy = false;
  if (!reply?.html) {
    say(reply?.error || "Nothing was saved: the server does not answer. Start it again and open its new address in another tab; this page then works again.", true);
    return;
  }
  if (reply.ask && given === "") sessionStorage.removeItem("ranker");
  root.innerHTML = reply.html;
  show();
  if (action !== "open") root.scrollIntoView({ block: "start" });
  (items()[0] || root.querySelector("input"))?.focus({ preventScroll: true });
}

function show() {
  for (const item of items())
    for (const one of item.querySelectorAll("[data-mark]")) one.setAttribute("aria-pressed", one.dataset.mark === item.dataset.mark);
  const left = items().filter((item) => !item.dataset.mark).length;
  button("save")?.classList.toggle("ready", left === 0);
  if (items().length) say(left && left < items().length ? `${left} to go` : "");
}

// Mark one item, then focus the next item without a mark. If all have one, focus the next item, so that all
// marks can be typed again.
function mark(item, value) {
  item.dataset.mark = value;
  show();
  const all = items(), k = all.indexOf(item);
  ([...all.slice(k + 1), ...all.slice(0, k)].find((other) => !other.dataset.mark) || all[k + 1] || item).focus();
}

function move(by) {
  const all = items(), k = all.indexOf(document.activeElement.closest?.(".item"));
  all[Math.min(all.length - 1, Math.max(0, k + by))]?.focus();
}

function key(event) {
  if (!element.isConnected) return document.removeEventListener("keydown", key); // Gradio rebuilt the page
  if (element.offsetParent === null || event.altKey || event.metaKey || !root.querySelector(".task")) return; // another tab is shown
  if (event.ctrlKey) return;
  const pressed = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const typing = event.target.closest?.("input");
  if (typing && pressed === "Escape") items()[0]?.focus();
  if (typing && pressed !== "Enter") return;
  const current = document.activeElement.closest?.(".item") || items().find((item) => !item.dataset.mark) || items()[0];
  const value = JSON.parse(root.querySelector(".task").dataset.keys)[pressed];
  const actions = { Enter: () => button("save")?.click(), s: () => button("skip")?.click(), b: () => button("back")?.click(),
    n: () => root.querySelector(".note")?.focus(), ArrowDown: () => move(1), ArrowUp: () => move(-1), ArrowRight: () => move(1), ArrowLeft: () => move(-1) };
  if (!typing && value && current) mark(current, value);
  else if (pressed === "Enter" && event.target.closest?.("button")) return; // the focused button handles it
  else if (actions[pressed]) actions[pressed]();
  else return;
  event.preventDefault();
}

function click(event) {
  const pressed = event.target.closest("button, .item");
  if (pressed?.dataset.do) turn(pressed.dataset.do);
  else if (pressed?.matches("button[data-mark]")) mark(pressed.closest(".item"), pressed.dataset.mark);
}

// Dragging an item by its grip moves it to the pointer; after the drop the order is the ranking. Two items
// change places only when the pointer has passed the other's middle, so that a small item does not flicker
// over a large one.
function drag(event) {
  const item = event.target.closest(".grip")?.closest(".item"), ends = new AbortController();
  if (!item) return;
  let moved = false;
  const over = (at) => {
    const other = document.elementFromPoint(at.clientX, at.clientY)?.closest(".item");
    if (!other || other === item || !root.contains(other)) return;
    const box = other.getBoundingClientRect(), beside = box.left !== item.getBoundingClientRect().left;
    const past = beside ? at.clientX - box.left - box.width / 2 : at.clientY - box.top - box.height / 2;
    const forward = items().indexOf(item) < items().indexOf(other);
    if (forward ? past > 0 : past < 0) {
      forward ? other.after(item) : other.before(item);
      moved = true;
    }
  };
  const drop = () => {
    ends.abort();
    item.classList.remove("dragged");
    if (moved) items().forEach((one, k) => { one.dataset.mark = k + 1; });
    show();
    item.focus();
  };
  event.preventDefault();
  item.classList.add("dragged");
  document.addEventListener("pointermove", over, { signal: ends.signal });
  document.addEventListener("pointerup", drop, { signal: ends.signal });
  document.addEventListener("pointercancel", drop, { signal: ends.signal });
}

root.addEventListener("click", click);
root.addEventListener("pointerdown", drag);
root.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("ranker", root.querySelector("input").value);
  window.dispatchEvent(new Event("ranker"));
});
window.addEventListener("ranker", () => turn("open")); // on both pages
document.addEventListener("keydown", key);
turn("open");
