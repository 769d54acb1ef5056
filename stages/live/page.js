// Shows what the session shows. All state that matters lives in the session; a page can come and go.

import { Chart } from "./charts.js";
import { connect } from "./connection.js";
import { wire } from "./controls.js";
import { draw, unpack } from "./picture.js";

const find = (id) => document.getElementById(id);
const set = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const signed = (number, digits = 1) => { const text = Math.abs(number).toFixed(digits); return (number < 0 && Number(text) ? "−" : "") + text; };
const percent = (share) => `${(100 * share).toFixed(share > 0.9945 && share < 0.9995 ? 1 : 0)}%`;
const short = (action) => action.replace("right", "→").replace("left", "←").replaceAll("+", " ");

let hello = null; // what there is to know about the session
let now = { running: false, taken: false, mode: "game", speed: 15, greedy: false }; // the latest view's numbers
let film = null; // the latest one's numbers
let history = [], drawnAt = [], state = "lost", pending = null;

const charts = {
  value: new Chart(find("chart-value"), { line: "value" }),
  reward: new Chart(find("chart-reward"), { line: "reward", dots: "real_reward" }),
  goes_on: new Chart(find("chart-goes_on"), { line: "goes_on", range: [0, 1, 0.5] }),
};

const connection = connect({
  state(next) {
    state = next;
    if (state === "lost") banner("The connection is lost; trying again. The session waits, nothing is lost.");
    if (state === "moved") banner("Another page has taken over the session.", true);
    showState();
  },
  note({ hello: first, episode, models, error }) {
    if (first) begin(first);
    if (episode) showEpisodes([episode]);
    if (models) showModels(models);
    if (error) { banner(error); showModels(); } // the model that was picked may be what is not there
  },
  binary(buffer) {
    const message = unpack(buffer), isView = !("film" in message.numbers);
    if (!isView) showFilm(message);
    else {
      if (!pending) requestAnimationFrame(show);
      pending = message;
    }
    return isView;
  },
});
let errorShown = false;
const controls = wire((command) => {
  if (errorShown && command.do !== "hold") banner(null);
  connection.send(command);
}, () => now);
find("banner-button").addEventListener("click", () => connection.open());
setInterval(showState, 500);

function banner(text, moved = false) {
  errorShown = Boolean(text) && state === "open";
  find("banner").hidden = !text;
  set(find("banner-text"), text ?? "");
  find("banner-button").hidden = !moved;
}

function begin(first) {
  hello = first;
  history = hello.history;
  drawnAt = [];
  banner(null);
  controls.fill(hello);
  find("bars").replaceChildren(...hello.actions.map((name) => {
    const row = element("li"), track = element("span", "track"), share = element("span", "percent");
    track.append(element("i"));
    row.append(element("span", "", name), track, share);
    return row;
  }));
  find("film").replaceChildren(...Array.from({ length: hello.ahead }, (_, k) => {
    const item = element("li"), canvas = element("canvas"), goes = element("div", "goes");
    Object.assign(canvas, { width: 64, height: 64 });
    canvas.setAttribute("role", "img");
    goes.append(element("i"));
    item.append(canvas, goes, element("b", "", `+${k + 1}`), element("span", "what"), element("span", "gain"));
    return item;
  }));
  find("level").replaceChildren(...[1, 2, 3, 4, 5, 6, 7, 8].flatMap((world) => [1, 2, 3, 4].map((stage) => new Option(`${world}-${stage}`))));
  find("episodes").replaceChildren();
  showEpisodes(hello.episodes);
  connection.send({ do: "models" });
}

function element(tag, className = "", text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

// Draws the latest view and lets the session go on. In a tab that nobody sees this waits, and so does the session.
function show() {
  const { numbers, pictures } = pending;
  pending = null;
  const before = now;
  now = numbers;
  draw(find("screen"), pictures.screen.bytes);
  draw(find("sees"), pictures.sees.bytes);
  draw(find("model"), pictures.model.bytes);
  if (now.row.step !== history.at(-1)?.step) {
    history.push(now.row);
    if (history.length > 2 * 240) history.splice(0, 240);
    drawnAt.push(performance.now());
  }
  for (const chart of Object.values(charts)) chart.draw(history);
  showMind();
  ageFilm();
  showTitles();
  showSettings(before);
  showState();
  connection.seen();
}

function showMind() {
  set(find("value"), signed(now.value, Math.abs(now.value) < 100 ? 1 : 0));
  set(find("reward"), signed(now.reward));
  set(find("goes_on"), percent(now.goes_on));
  [...find("bars").children].forEach((row, i) => {
    row.querySelector("i").style.width = `${100 * now.probs[i]}%`;
    set(row.lastElementChild, percent(now.probs[i]));
    row.className = i === now.action ? "chosen" : "";
  });
}

function showFilm({ numbers, pictures }) {
  film = numbers;
  [...find("film").children].forEach((item, k) => {
    const [canvas, goes, , what, gain] = item.children;
    draw(canvas, pictures.film.bytes.subarray(k * 64 * 64 * 3, (k + 1) * 64 * 64 * 3));
    const action = hello.actions[film.actions[k]];
    canvas.setAttribute("aria-label", `Dreamt ${k + 1} ahead, after ${action}`);
    goes.firstChild.style.width = `${100 * film.goes_on[k]}%`;
    goes.title = `goes on: ${percent(film.goes_on[k])}`;
    set(what, short(action));
    set(gain, (film.reward[k] > 0 ? "+" : "") + signed(film.reward[k]));
  });
}

// Marks which of its pictures is of now, and which are of the past.
function ageFilm() {
  const age = film ? now.row.step - film.film : 0;
  [...find("film").children].forEach((item, k) => { item.className = k + 1 < age ? "past" : k + 1 === age ? "now" : ""; });
  const note = age ? `dreamt ${age} decision${age > 1 ? "s" : ""} ago` : "from here";
  set(find("ahead-note"), `${hello.ahead} decisions, ${note}; below each: whether it goes on, the action, the reward`);
}

function showTitles() {
  const { dream } = now;
  document.body.dataset.mode = now.mode;
  document.body.toggleAttribute("data-taken", now.taken);
  const over = (outcome) => (outcome ? ` · ${outcome}` : "");
  const you = now.taken ? `you: ${now.by_hand === null ? "–" : hello.actions[now.by_hand]} · ` : "";
  if (dream) {
    set(find("game-title"), "The real game");
    set(find("game-note"), `${you}x ${now.x} · return ${signed(dream.real_total, 0)} to the same actions${over(now.outcome)}`);
    set(find("mind-title"), "The dream");
    set(find("mind-note"), `decision ${dream.decisions} · return ${signed(dream.total_reward, 0)} · off by ${dream.error.toFixed(1)} of 255${now.goes_on < 0.5 ? " · ends here" : ""}`);
  } else {
    set(find("game-title"), "The game");
    set(find("game-note"), `${you}x ${now.x} · return ${signed(now.return, 0)} · clock ${now.clock}${over(now.outcome)}`);
    set(find("mind-title"), "What the model sees");
    set(find("mind-note"), "its state, drawn by the decoder");
  }
}

function showSettings(before) {
  const press = (id, on) => find(id).setAttribute("aria-pressed", String(on));
  press("run", now.running);
  set(find("run").lastElementChild, now.running ? "Pause" : "Run");
  press("take", now.taken);
  set(find("take"), now.taken ? "Give back" : "Take over");
  press("dream", now.mode === "dream");
  set(find("dream"), now.mode === "dream" ? "Leave the dream" : "Step into the dream");
  find("pad").hidden = !now.taken;
  for (const input of document.querySelectorAll("#speeds input")) input.checked = Number(input.value) === now.speed;
  for (const input of document.querySelectorAll("#modes input")) input.checked = (input.value === "greedy") === now.greedy;
  if (before.level !== now.level) find("level").value = now.level;
  if (before.seed !== now.seed) find("seed").value = now.seed;
  if (before.model !== now.model || find("models").value !== now.model) showModels();
}

function showModels(models = null) {
  const select = find("models");
  if (models) {
    select.replaceChildren(...models.map(({ name, about }) => {
      const option = new Option(name ? `${name} (${about})` : about, name);
      option.disabled = !name;
      return option;
    }));
  }
  if (now.model && ![...select.options].some(({ value }) => value === now.model)) select.add(new Option(now.model, now.model), 0);
  if (document.activeElement !== select || !models) select.value = now.model ?? "";
}

function showEpisodes(rows) {
  for (const row of rows) {
    const line = element("tr"), badge = element("span", `badge ${row.outcome.split(" ")[0]}`, row.outcome), outcome = element("td");
    outcome.append(badge);
    const number = (value) => element("td", "n", value);
    line.append(element("td", "", row.number), outcome, number(signed(row.return, 0)), number(row.best_x), number(row.decisions));
    line.append(number(row.seed), element("td", "", row.level), element("td", "", row.by), element("td", "", row.model));
    find("episodes").prepend(line);
    if (rows !== hello.episodes) set(find("said"), `Episode ${row.number}: ${row.outcome}, return ${Math.round(row.return)}`);
  }
  const played = [...find("episodes").rows].map((line) => line.cells[1].textContent).filter((outcome) => outcome !== "stopped");
  set(find("cleared"), played.length ? `${played.filter((outcome) => outcome === "flag").length} of ${played.length} cleared` : "");
  const none = !find("episodes").rows.length;
  find("none").hidden = !none;
  find("list").hidden = none;
}

function showState() {
  const running = state === "open" && now.running;
  document.body.dataset.state = state === "open" ? (running ? "running" : "paused") : state;
  const since = performance.now() - 2000;
  drawnAt = drawnAt.filter((time) => time > since);
  const first = drawnAt[0] ?? 0, rate = drawnAt.length > 1 ? (1000 * (drawnAt.length - 1)) / (drawnAt.at(-1) - first) : 0;
  const words = { open: running ? `${rate.toFixed(1)} decisions/s` : "paused", lost: "not connected", moved: "on another page" };
  set(find("state"), words[state]);
  if (hello && now.model) set(find("facts"), `${now.model} · level ${now.level} · seed ${now.seed} · decision ${now.decisions} · best x ${now.best_x} · ${hello.device}`);
}
