// What the explorers share: a stage to stand on, small parts (tabs, sliders, axes, colours), and the arithmetic of grids.
//
// An explorer's module begins with `import { stage, node } from "./common.js";`. In Python `module("new_explorer.js")` gives
// one text without imports, for anywidget and for pages, and `style("new_explorer.css")` its CSS after common.css. So the
// top-level names of an explorer must differ from the ones exported here.

import { keepers } from "./keep.js";

export const SVG = "http://www.w3.org/2000/svg";
export const SPEAK_AFTER = 400; // milliseconds of rest before a screen reader is told
export const SETTLE_AFTER = 150; // milliseconds of rest after a key before the kernel is asked
export const PATIENCE = 5000; // milliseconds without an answer after which the reader is told so

// ---- the kernel: a notebook keeps pages of explorers, which take the model of a living kernel from here, by its key

export function initialize({ model }) {
  const key = model.get("key");
  (globalThis.lmcModels ??= new Map()).set(key, model);
  globalThis.dispatchEvent(new CustomEvent("lmc-model", { detail: key }));
  return () => globalThis.lmcModels.delete(key);
}

// ---- the stage: an element in the page, redrawn at most once a frame; where the reader stands; a kernel behind it, perhaps

// `draw()` draws everything; `redraw` asks for it, and is first called here. `show(...parts)` fills the stage, and adds the
// buttons that save it: `rows()` gives its numbers as [{ column: value }]. `say(lines)` writes what is here into `reading`,
// and `speak(text)` tells a screen reader, once things are at rest. Return `stage.close` from `render`.
//
// `traits` are what other views and the kernel follow, each with a function that makes a value fit: `place` has their values,
// `go({ alpha: 0.3 })` moves there, a drag or a key, and what is moved elsewhere is heard, unless one is `deaf()` just now.
// `exact` says how the kernel is asked about a place once it is let go of, `rest(delay)`: `at(place)` is its name for the
// place, `without(place)` what the values are without it, written into `note`. `stage.exact` is its answer; null elsewhere.
//
// `ask(content, reply, silence)` sends `content` to the kernel: `reply(answer)` when it answers, `silence(why)` when it does
// not (at once where there is no kernel). `listen(name, act)` hears a trait change that was not made here.
export function stage({ model, el, name, draw, rows, traits = {}, exact, told = () => {}, deaf = () => false }) {
  const spoken = node("div", { class: "lmc-spoken", "aria-live": "polite" });
  const root = node("div", { class: `lmc ${name}` }, spoken);
  el.replaceChildren(root);
  const undo = [];
  let [frame, speaking] = [0, 0];
  const redraw = () => (frame ||= requestAnimationFrame(paint));
  function paint() {
    frame = 0;
    if (root.clientWidth) draw(); // else not in the page yet, or in a hidden tab: its size will change
  }
  const on = (target, event, act) => {
    target.addEventListener(event, act);
    undo.push(() => target.removeEventListener(event, act));
  };
  const hear = (event, act) => {
    model.on(event, act);
    undo.push(() => model.off(event, act));
  };
  on(root, "keydown", (event) => event.stopPropagation()); // Jupyter would take the keys for its own commands

  const resize = new ResizeObserver(redraw);
  resize.observe(root); // draws for the first time, too
  const theme = new MutationObserver(redraw);
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  on(matchMedia("(prefers-color-scheme: dark)"), "change", redraw);

  const waiting = new Map();
  hear("msg:custom", (message) => {
    const reply = waiting.get(message.ticket);
    waiting.delete(message.ticket);
    if (reply) reply(message);
  });
  function ask(content, reply, silence) {
    if (!model.send) return silence("static, no kernel");
    const ticket = String(Math.random()); // another view of the same widget counts for itself
    const late = setTimeout(() => silence("static, the kernel does not answer"), PATIENCE);
    waiting.set(ticket, (answer) => (clearTimeout(late), reply(answer)));
    undo.push(() => clearTimeout(late));
    try {
      model.send({ ...content, ticket });
    } catch {
      clearTimeout(late);
      silence("static, the kernel is gone");
    }
  }

  function speak(text) {
    clearTimeout(speaking);
    speaking = setTimeout(() => (spoken.textContent = text), SPEAK_AFTER);
  }
  const listen = (trait, act) => hear(`change:${trait}`, act);

  const read = () => Object.fromEntries(Object.entries(traits).map(([trait, fitting]) => [trait, fitting(model.get(trait))]));
  const place = read();
  const note = node("span", { class: "lmc-note" });
  const reading = node("div", { class: "lmc-reading" });
  const answered = (answer) => {
    scene.exact = answer;
    told(answer);
    redraw();
  };
  const values = exact && exactly({ ask, note, at: () => exact.at(place), without: () => exact.without(place), show: answered });
  const rest = (delay) => values?.settle(delay);
  function stand(next) {
    const before = values && JSON.stringify(exact.at(place));
    Object.assign(place, next);
    if (values && JSON.stringify(exact.at(place)) !== before) values.moved();
    redraw();
  }
  for (const trait of Object.keys(traits)) {
    listen(trait, () => {
      const next = read();
      if (deaf() || JSON.stringify(next) === JSON.stringify(place)) return; // what was just set here comes back
      stand(next);
      rest(SETTLE_AFTER);
    });
  }
  rest(SETTLE_AFTER);

  const scene = {
    root,
    place,
    reading,
    note,
    exact: null,
    redraw,
    ask,
    rest,
    listen,
    speak,
    show: (...parts) => root.append(...parts, keepers(root, name, rows)),
    go(changes, delay) {
      stand(Object.fromEntries(Object.entries(changes).map(([trait, value]) => [trait, traits[trait](value)])));
      tell(model, place);
      if (delay !== undefined) rest(delay);
    },
    say(lines, of) {
      reading.textContent = lines.join(" · ");
      speak(`${of}: ${lines.join(", ")}`);
    },
    close() {
      values?.stop();
      cancelAnimationFrame(frame);
      clearTimeout(speaking);
      resize.disconnect();
      theme.disconnect();
      for (const act of undo) act();
    },
  };
  return scene;
}

// Sets traits that differ, and tells the kernel: `tell(model, { alpha })`.
export function tell(model, traits) {
  let changed = false;
  for (const [name, value] of Object.entries(traits)) {
    if (JSON.stringify(model.get(name)) === JSON.stringify(value)) continue;
    model.set(name, value);
    changed = true;
  }
  if (changed) model.save_changes();
}

// Values of a place, exact on release: `show(answer)` is given the kernel's answer, and null as soon as the place is left.
function exactly({ ask, note, at, show, without }) {
  let timer = 0;
  let reason = ""; // why the kernel is not heard
  const here = () => JSON.stringify(at());
  const say = (state, text) => {
    note.dataset.state = state;
    note.textContent = note.title = text;
  };
  const estimate = () => (reason ? say("static", `${reason}: ${without()}`) : say("between", without()));
  function request() {
    const place = here();
    const hear = (why, answer) => {
      if (place !== here()) return;
      reason = why;
      if (!answer) return estimate();
      say("exact", "exact, from the kernel");
      show(answer);
    };
    const reply = (answer) => (answer.error ? hear(answer.error) : hear("", answer));
    ask({ place: at() }, reply, (why) => hear(why));
  }
  return {
    moved() {
      clearTimeout(timer);
      estimate();
      show(null);
    },
    settle(delay = 0) {
      clearTimeout(timer);
      timer = setTimeout(request, delay);
    },
    stop: () => clearTimeout(timer),
  };
}

// ---- elements

export function node(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// A short piece of a line, as it is drawn.
export function sample({ colour, dash = "none" }) {
  const svg = shape("svg", { viewBox: "0 0 28 10", class: "lmc-sample", "aria-hidden": true });
  svg.append(shape("line", { x1: 1, x2: 27, y1: 5, y2: 5, style: `--c: ${colour}; --dash: ${dash}` }));
  return svg;
}

// Buttons of which one is chosen; items are { name, colour?, dash? }. `pick(name)` chooses, `update(name)` shows which.
export function tabs(label, items, pick) {
  const group = node("div", { class: "lmc-tabs", role: "radiogroup", "aria-label": label });
  const buttons = items.map((item, i) => {
    const look = item.colour ? { style: `--c: ${item.colour}` } : {};
    const button = node("button", { type: "button", role: "radio", ...look }, ...(item.colour ? [sample(item)] : []), item.name);
    button.addEventListener("click", () => pick(item.name));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = (i + step + items.length) % items.length;
      pick(items[next].name);
      buttons[next].focus();
    });
    return button;
  });
  group.append(...buttons);
  return {
    node: group,
    update(active) {
      buttons.forEach((button, i) => {
        button.setAttribute("aria-checked", items[i].name === active);
        button.tabIndex = items[i].name === active ? 0 : -1;
      });
    },
  };
}

// A trait that names one of several things, the first of them where it names none.
export function oneOf(items) {
  const names = items.map((item) => item.name ?? item);
  return (value) => (names.includes(value) ? value : names[0]);
}

// A slider under a chart, whose margins it shares unless `look` is another class. `step(n)` gives the value n places on, for keys.
export function slider({ low, high, label, ends = ["", ""], step, pick, release = () => {}, look = "lmc-slider" }) {
  const input = node("input", { type: "range", min: low, max: high, step: "any", "aria-label": label });
  input.addEventListener("input", () => pick(input.valueAsNumber));
  input.addEventListener("change", () => release());
  input.addEventListener("keydown", (event) => {
    const home = { Home: low, End: high }[event.key];
    const count = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 4, PageDown: -4 }[event.key];
    if (home === undefined && !count) return;
    event.preventDefault();
    pick(home ?? step(count));
    release(SETTLE_AFTER);
  });
  return {
    node: node("label", { class: look }, node("b", {}, ends[0]), input, node("b", {}, ends[1])),
    update(value, text) {
      if (input.valueAsNumber !== value) input.value = value;
      input.setAttribute("aria-valuetext", text);
    },
  };
}

// Buttons that go somewhere: [text, what it says when pointed at, act].
export function buttons(...items) {
  const bar = node("div", { class: "lmc-buttons" });
  for (const [text, title, act] of items) {
    const button = node("button", { type: "button", title }, text);
    button.addEventListener("click", act);
    bar.append(button);
  }
  return bar;
}

// A button that carries a share from where it is, `at()`, to 1 in so many milliseconds, and from 1 over again: `go(share)`
// all the way, `rest()` when it stops. Who wants no motion is shown `steps` alone.
export function player({ text, duration, steps, at, go, rest = () => {} }) {
  let frame = 0;
  const button = node("button", { type: "button", class: "lmc-play" }, `▶ ${text}`);
  const start = () => {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const began = performance.now() - (at() >= 1 ? 0 : at()) * duration;
    const tick = (now) => {
      const share = clamp((now - began) / duration, 0, 1);
      go(still ? steps[nearest(steps, share)] : share);
      if (share < 1) frame = requestAnimationFrame(tick);
      else stop();
    };
    button.textContent = "❚❚ pause";
    frame = requestAnimationFrame(tick);
  };
  const stop = () => {
    if (!frame) return;
    cancelAnimationFrame(frame);
    frame = 0;
    button.textContent = `▶ ${text}`;
    rest();
  };
  button.addEventListener("click", () => (frame ? stop() : start()));
  return { node: button, stop, running: () => frame !== 0 };
}

// Calls `move(dx, dy, event)` for arrow keys: 1 to the right, 1 upwards.
export function arrows(element, move) {
  element.addEventListener("keydown", (event) => {
    const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way) return;
    event.preventDefault();
    move(...way, event);
  });
}

// Calls `move(x, y)` with positions from 0 to 1 over the element while a pointer is down, and `release()` at the end.
export function drag(element, { move, release = () => {}, begin = () => {} }) {
  const place = (event, act) => {
    const box = element.getBoundingClientRect();
    act((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  };
  element.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    element.setPointerCapture(event.pointerId);
    place(event, begin);
    place(event, move);
  });
  element.addEventListener("pointermove", (event) => element.hasPointerCapture(event.pointerId) && place(event, move));
  element.addEventListener("lostpointercapture", () => release());
}

// A canvas made as sharp as the screen: its pen in CSS pixels, and its size in them.
export function fit(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height, ratio };
}

// Values of CSS variables at an element: `const [ink, paper] = theme(root, "--fg", "--bg")`.
export function theme(element, ...names) {
  const style = getComputedStyle(element);
  return names.map((name) => style.getPropertyValue(name).trim());
}

// ---- numbers

export function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

// Base64 of little-endian 32-bit floats; NaN is a gap.
export function floats(text) {
  return new Float32Array(bytes(text).buffer);
}

export function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

export function format(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && Math.abs(value) < 5 * 10 ** -(digits + 1)) return value.toExponential(1);
  return value.toFixed(Math.abs(value) >= 1000 ? 0 : Math.abs(value) >= 10 ? 1 : digits);
}

export function nearest(grid, value) {
  let best = 0;
  for (let i = 1; i < grid.length; i++) if (Math.abs(grid[i] - value) < Math.abs(grid[best] - value)) best = i;
  return best;
}

// The value n grid points on from `at`, which may lie between them.
export function stepped(grid, at, count) {
  const beyond = count > 0 ? grid.filter((a) => a > at + 1e-9) : grid.filter((a) => a < at - 1e-9).reverse();
  return beyond.length ? beyond[Math.min(Math.abs(count), beyond.length) - 1] : at;
}

// Whether a value stands on a grid, for the note beside values that no kernel gave.
export function origin(grid, value) {
  return grid.includes(value) ? "evaluated beforehand" : "interpolated between evaluated points";
}

// Linear between the points that were evaluated (null: not evaluated).
export function valueAt(grid, values, at) {
  let before = -1;
  for (let i = 0; i < grid.length; i++) {
    if (values[i] === null) continue;
    if (grid[i] >= at) {
      if (before < 0 || grid[i] === at) return values[i];
      const share = (at - grid[before]) / (grid[i] - grid[before]);
      return (1 - share) * values[before] + share * values[i];
    }
    before = i;
  }
  return before < 0 ? null : values[before];
}

// Round numbers from low to high, about `most` of them.
export function ticks(low, high, most = 5) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * (1 - 1e-9)) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// 1, 2 and 5 times powers of ten from low to high (the powers alone where those are many; the ends of a narrow range).
export function logTicks(low, high, most = 7) {
  const found = [];
  for (let d = Math.floor(Math.log10(low)); d <= Math.ceil(Math.log10(high)); d++) {
    for (const factor of [1, 2, 5]) found.push(Number((factor * 10 ** d).toPrecision(3)));
  }
  let inside = found.filter((value) => value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9));
  if (inside.length > most) inside = inside.filter((value) => String(value.toExponential())[0] === "1");
  return inside.length < 2 ? ticks(low, high, 4) : inside;
}

// ---- colours

// `stops` are [share, "#rrggbb"] from 0 to 1, as in lmc/views/legend.py; gives t -> [r, g, b], NaN -> null.
export function colourScale(stops) {
  const known = stops.map(([at, text]) => [at, [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16))]);
  const table = Array.from({ length: 256 }, (_, i) => {
    const t = i / 255;
    const k = Math.max(1, known.findIndex(([at]) => at >= t));
    const [[from, a], [to, b]] = [known[k - 1], known[k]];
    return a.map((value, c) => Math.round(value + ((b[c] - value) * (t - from)) / (to - from)));
  });
  return (t) => (Number.isNaN(t) ? null : table[Math.round(255 * clamp(t, 0, 1))]);
}

// Black or white, whichever is read more easily on a colour (contrast at least 4.5, as WCAG 2.2 wants it).
export function inkOn(colour) {
  const [r, g, b] = colour.map((value) => (value / 255 <= 0.04045 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

export function rgb([r, g, b], alpha = 1) {
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
}
