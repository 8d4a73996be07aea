// The browser side of answer_page.py. The server sends all texts escaped. Gradio calls this script with
// `element` and `server`.
const root = element.querySelector(".work"), form = root.querySelector("form"), button = form.querySelector("button");
const message = root.querySelector(".message"), answers = root.querySelector(".answers");

function say(text, bad = false) {
  message.textContent = text;
  message.classList.toggle("bad", bad);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const request = Object.fromEntries(new FormData(form)), start = Date.now();
  const clock = setInterval(() => say(`answering ... ${Math.round((Date.now() - start) / 1000)} s`), 1000);
  button.disabled = true;
  say("answering ...");
  const reply = await server.reply(request).catch(() => undefined); // undefined if no server answers
  clearInterval(clock);
  button.disabled = false;
  if (!reply?.html) return say(reply?.error || "The server gave no answer: look at its terminal, or start it again and open its new address.", true);
  say(`${((Date.now() - start) / 1000).toFixed(1)} s`);
  answers.innerHTML = reply.html;
});

// Enter sends the problem, Shift+Enter begins a new line.
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), form.requestSubmit();
});
form.elements.prompt.focus();
