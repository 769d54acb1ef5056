// Buttons, fields and keys. Each does what a command of stages/live/stage.py says.

const PAD = { // by the key's place, whatever the keyboard's letters
  ArrowLeft: "left", ArrowRight: "right", KeyA: "A", KeyX: "A", KeyB: "B", KeyZ: "B",
};
const SYMBOLS = { left: "←", right: "→" };
const find = (id) => document.getElementById(id);

// send(command); now: the latest view's numbers
export function wire(send, now) {
  const held = new Map(); // of keys and pointers: the button each holds
  let pointer = false; // whether the last input was one

  const hold = () => send({ do: "hold", value: [...new Set(held.values())] });
  const release = () => { if (held.size) { held.clear(); hold(); } };
  const commands = {
    run: () => send({ do: "run", value: !now().running }),
    step: () => send({ do: "step" }),
    next: () => send({ do: "next" }),
    take: () => { release(); send({ do: "take", value: !now().taken }); if (!now().taken) find("screen").focus({ preventScroll: true }); },
    dream: () => send({ do: "dream", value: now().mode !== "dream" }),
    help: () => find("shortcuts").showModal(),
  };
  for (const [id, command] of Object.entries(commands)) {
    find(id).addEventListener("click", (event) => {
      if (event.detail) event.currentTarget.blur(); // so that Space goes on meaning run and pause
      command();
    });
  }

  const speed = (value) => send({ do: "speed", value });
  const faster = (by) => {
    const speeds = [...document.querySelectorAll("#speeds input")].map((input) => Number(input.value));
    const next = speeds[speeds.indexOf(now().speed) + by];
    if (next !== undefined) speed(next);
  };
  const greedy = (value) => send({ do: "greedy", value });
  const keys = {
    " ": commands.run, n: commands.step, r: commands.next, t: commands.take, d: commands.dream, "?": commands.help,
    g: () => greedy(!now().greedy), "+": () => faster(1), "=": () => faster(1), "-": () => faster(-1),
  };

  document.addEventListener("pointerdown", () => { pointer = true; }, true);
  document.addEventListener("keydown", () => { pointer = false; }, true);
  document.addEventListener("change", ({ target }) => {
    if (target.name === "speed") speed(Number(target.value));
    if (target.name === "mode") greedy(target.value === "greedy");
    if (target.id === "models") send({ do: "pick", value: target.value });
    if (pointer && target.id !== "seed") target.blur();
  });
  find("models").addEventListener("pointerdown", () => send({ do: "models" }));
  find("models").addEventListener("focus", () => send({ do: "models" }));
  find("setup").addEventListener("submit", (event) => {
    event.preventDefault();
    send({ do: "begin", seed: find("seed").valueAsNumber, level: find("level").value });
    if (pointer) document.activeElement.blur();
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || find("shortcuts").open) return;
    if (event.key === "Escape") {
      if (now().mode === "dream") send({ do: "dream", value: false });
      else if (now().taken) { release(); send({ do: "take", value: false }); }
      return;
    }
    if (event.target.closest("input, select, .scroll")) return; // which have a use for keys themselves
    if (now().taken && event.code in PAD) {
      event.preventDefault();
      if (!event.repeat) { held.set(event.code, PAD[event.code]); hold(); }
      return;
    }
    if (event.key === " " && event.target.closest("button")) return;
    const command = keys[event.key.toLowerCase()];
    if (!command || (event.repeat && event.key.toLowerCase() !== "n")) return;
    event.preventDefault();
    command();
  });
  document.addEventListener("keyup", ({ code }) => { if (held.delete(code)) hold(); });
  addEventListener("blur", release);

  return {
    // What the session's first words say there is.
    fill({ buttons, speeds }) {
      find("pad").replaceChildren(...buttons.map((name) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = SYMBOLS[name] ?? name;
        button.setAttribute("aria-label", name);
        const let_go = ({ pointerId }) => { if (held.delete(pointerId)) hold(); };
        button.addEventListener("pointerdown", (event) => { event.preventDefault(); held.set(event.pointerId, name); hold(); });
        button.addEventListener("pointerup", let_go);
        button.addEventListener("pointercancel", let_go);
        button.addEventListener("pointerleave", let_go);
        // Enter or Space on a focused button: a tap.
        button.addEventListener("click", ({ detail }) => { if (!detail) { send({ do: "hold", value: [name] }); hold(); } });
        return button;
      }));
      const labels = speeds.map((value) => {
        const label = document.createElement("label"), input = document.createElement("input"), text = document.createElement("span");
        Object.assign(input, { type: "radio", name: "speed", value });
        text.textContent = value || "max";
        label.append(input, text);
        return label;
      });
      find("speeds").replaceChildren(find("speeds").querySelector("legend"), ...labels);
    },
  };
}
