// The path explorer: a slider along the line between two networks. Everything it shows was computed beforehand, so
// it answers within a frame, with a kernel (as an anywidget) or without (in a saved page).

const SVG = "http://www.w3.org/2000/svg";
const CHART = { width: 520, height: 248, left: 58, right: 26, top: 26, bottom: 34 };
const TILES = 24;
const SPEAK_AFTER = 400; // milliseconds of rest before a screen reader is told

function render({ model, el }) {
  const data = model.get("data");
  const paths = data.paths.map(unpack);
  const images = unpackImages(data.images);
  const [low, high] = [paths[0].alphas[0], paths[0].alphas.at(-1)];
  let alpha = clamp(model.get("alpha"), low, high);
  let active = Math.max(0, paths.findIndex((path) => path.name === model.get("active")));
  let frame = 0;
  let timer = 0;

  const root = node("div", { class: "lmc-path" });
  const spoken = node("div", { class: "lmc-spoken", "aria-live": "polite" });
  const reading = node("div", { class: "lmc-reading" });
  const tabs = makeTabs(paths, (index) => choose(alpha, index));
  const slider = makeSlider(low, high, nextPoint, (value) => choose(value, active));
  const charts = data.panels.map((panel) => makeChart(panel, paths, low, high, (value) => choose(value, active)));
  const confusion = paths.some((path) => path.shown) ? makeConfusion() : null;
  const gallery = images && confusion ? makeGallery(images) : null;

  const left = node("div", { class: "lmc-left" }, ...charts.map((chart) => chart.node), slider.node);
  const right = node("div", { class: "lmc-right" }, ...[confusion, gallery].filter(Boolean).map((part) => part.node));
  root.append(node("div", { class: "lmc-head" }, tabs.node, reading), node("div", { class: "lmc-body" }, left, right));
  root.append(spoken);
  if (!confusion) root.classList.add("lmc-narrow");
  el.replaceChildren(root);

  // Jupyter would take the keys for its own commands.
  const keep = (event) => event.stopPropagation();
  root.addEventListener("keydown", keep);

  function nextPoint(step) {
    const grid = paths[active].alphas;
    const beyond = step > 0 ? grid.filter((a) => a > alpha + 1e-9) : grid.filter((a) => a < alpha - 1e-9).reverse();
    return beyond.length ? beyond[Math.min(Math.abs(step), beyond.length) - 1] : alpha;
  }

  function choose(value, index) {
    [alpha, active] = [clamp(value, low, high), index];
    if (!frame) frame = requestAnimationFrame(draw);
    if (model.get("alpha") !== alpha) model.set("alpha", alpha);
    if (model.get("active") !== paths[active].name) model.set("active", paths[active].name);
    model.save_changes();
  }

  function draw() {
    frame = 0;
    const path = paths[active];
    const point = nearest(path.alphas, alpha);
    const lines = describe(path, alpha);
    reading.textContent = lines.join(" · ");
    tabs.update(active);
    slider.update(alpha, lines.join(", "));
    for (const chart of charts) chart.update(alpha, active);
    if (confusion) confusion.update(path, point);
    if (gallery) gallery.update(path, point);
    clearTimeout(timer);
    timer = setTimeout(() => (spoken.textContent = `${path.name}: ${lines.join(", ")}`), SPEAK_AFTER);
  }

  function heard() {
    const index = paths.findIndex((path) => path.name === model.get("active"));
    // The kernel sends back what was just set here: nothing to do then.
    if (model.get("alpha") === alpha && index === active) return;
    [alpha, active] = [clamp(model.get("alpha"), low, high), Math.max(0, index)];
    if (!frame) frame = requestAnimationFrame(draw);
  }

  model.on("change:alpha", heard);
  model.on("change:active", heard);
  const resize = new ResizeObserver(() => (frame ||= requestAnimationFrame(draw)));
  resize.observe(root);
  draw();
  return () => {
    cancelAnimationFrame(frame);
    clearTimeout(timer);
    resize.disconnect();
    model.off("change:alpha", heard);
    model.off("change:active", heard);
  };
}

// ---- data

function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

function unpack(path) {
  if (!path.shown) return path;
  const { classes, count, confusion, predicted, targets, index } = path.shown;
  const unpacked = { classes, count, index, targets: bytes(targets), predicted: bytes(predicted) };
  return { ...path, shown: { ...unpacked, confusion: new Uint32Array(bytes(confusion).buffer) } };
}

function unpackImages(images) {
  if (!images) return null;
  const { height, width, channels, index } = images;
  const pixels = bytes(images.pixels);
  const place = new Map(index.map((example, i) => [example, i]));
  return { height, width, channels, pixels, place, cache: new Map() };
}

function nearest(alphas, alpha) {
  let best = 0;
  for (let i = 1; i < alphas.length; i++) if (Math.abs(alphas[i] - alpha) < Math.abs(alphas[best] - alpha)) best = i;
  return best;
}

// Linear between the points that were evaluated (null: not evaluated).
function valueAt(alphas, values, alpha) {
  let before = -1;
  for (let i = 0; i < alphas.length; i++) {
    if (values[i] === null) continue;
    if (alphas[i] >= alpha) {
      if (before < 0 || alphas[i] === alpha) return values[i];
      const share = (alpha - alphas[before]) / (alphas[i] - alphas[before]);
      return (1 - share) * values[before] + share * values[i];
    }
    before = i;
  }
  return before < 0 ? null : values[before];
}

function describe(path, alpha) {
  const lines = [`α = ${alpha.toFixed(3)}`];
  const measures = path.series[path.split];
  lines.push(`loss ${format(valueAt(path.alphas, measures.loss, alpha))}`);
  if (measures.accuracy) lines.push(`accuracy ${format(valueAt(path.alphas, measures.accuracy, alpha), 1)} %`);
  return lines;
}

function wrongCount({ confusion, classes }, point) {
  let wrong = 0;
  const start = point * classes * classes;
  for (let i = 0; i < classes * classes; i++) if (i % (classes + 1)) wrong += confusion[start + i];
  return wrong;
}

function format(value, digits = 3) {
  if (value === null) return "–";
  return value.toFixed(value >= 1000 ? 0 : value >= 10 ? 1 : digits);
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

// ---- parts

function node(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function makeTabs(paths, pick) {
  const group = node("div", { class: "lmc-tabs", role: "radiogroup", "aria-label": "path shown" });
  const buttons = paths.map((path, i) => {
    const button = node("button", { type: "button", role: "radio", style: `--c: ${path.colour}` }, path.name);
    button.addEventListener("click", () => pick(i));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = (i + step + paths.length) % paths.length;
      pick(next);
      buttons[next].focus();
    });
    return button;
  });
  group.append(...buttons);
  return {
    node: group,
    update(active) {
      buttons.forEach((button, i) => {
        button.setAttribute("aria-checked", i === active);
        button.tabIndex = i === active ? 0 : -1;
      });
    },
  };
}

function makeSlider(low, high, nextPoint, pick) {
  const input = node("input", { type: "range", min: low, max: high, step: "any", "aria-label": "position on the path" });
  input.addEventListener("input", () => pick(input.valueAsNumber));
  input.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 4, PageDown: -4 }[event.key];
    if (!step) return;
    event.preventDefault();
    pick(nextPoint(step));
  });
  const row = node("label", { class: "lmc-slider" }, node("b", {}, "A"), input, node("b", {}, "B"));
  return {
    node: row,
    update(alpha, text) {
      if (input.valueAsNumber !== alpha) input.value = alpha;
      input.setAttribute("aria-valuetext", text);
    },
  };
}

function makeChart(panel, paths, low, high, pick) {
  const { width, height, left, right, top, bottom } = CHART;
  const [from, to] = panel.range;
  const x = (alpha) => left + ((width - left - right) * (alpha - low)) / (high - low);
  const y = (value) => height - bottom - ((height - top - bottom) * (value - from)) / (to - from);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "lmc-chart", role: "img" });
  svg.setAttribute("aria-label", panel.title);
  svg.append(shape("text", { x: 4, y: 15, class: "lmc-title" }, panel.title));
  for (const tick of panel.ticks) {
    svg.append(shape("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "lmc-grid" }));
    svg.append(shape("text", { x: left - 7, y: y(tick) + 4.5, class: "lmc-tick", "text-anchor": "end" }, String(tick)));
  }
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    const at = { x: x(tick), y: height - 12, class: "lmc-tick", "text-anchor": "middle" };
    svg.append(shape("text", at, String(tick)));
  }
  const cursor = shape("line", { y1: top - 4, y2: height - bottom, class: "lmc-cursor" });
  svg.append(cursor);
  const groups = paths.map((path) => drawPath(path, panel, x, y));
  svg.append(...groups.map((group) => group.node));

  const place = (event) => {
    const box = svg.getBoundingClientRect();
    const inside = ((event.clientX - box.left) / box.width) * width;
    pick(low + ((inside - left) / (width - left - right)) * (high - low));
  };
  svg.addEventListener("pointerdown", (event) => {
    svg.setPointerCapture(event.pointerId);
    place(event);
  });
  svg.addEventListener("pointermove", (event) => svg.hasPointerCapture(event.pointerId) && place(event));
  return {
    node: svg,
    update(alpha, active) {
      cursor.setAttribute("x1", x(alpha));
      cursor.setAttribute("x2", x(alpha));
      groups.forEach((group, i) => group.update(alpha, i === active));
    },
  };
}

function drawPath(path, panel, x, y) {
  const group = shape("g", { style: `--c: ${path.colour}` });
  for (const [split, measures] of Object.entries(path.series)) {
    const points = path.alphas.map((a, i) => [a, measures[panel.measure][i]]).filter(([, value]) => value !== null);
    const line = points.map(([a, value]) => `${x(a).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    group.append(shape("polyline", { points: line, class: split === path.split ? "lmc-line" : "lmc-line lmc-other" }));
  }
  const barrier = path.barriers[panel.measure];
  const arrow = shape("g", { class: "lmc-barrier" });
  if (Math.abs(y(barrier.top) - y(barrier.base)) > 8) {
    const at = x(barrier.alpha);
    arrow.append(shape("line", { x1: at, x2: at, y1: y(barrier.base), y2: y(barrier.top) }));
    const middle = 0.5 * (y(barrier.base) + y(barrier.top)) + 5;
    arrow.append(shape("text", { x: at + 7, y: middle }, barrier.text));
  }
  const dot = shape("circle", { r: 5.5, class: "lmc-dot" });
  group.append(arrow, dot);
  const values = path.series[path.split][panel.measure];
  return {
    node: group,
    update(alpha, chosen) {
      group.classList.toggle("lmc-faded", !chosen);
      const value = valueAt(path.alphas, values, alpha);
      dot.setAttribute("cx", x(alpha));
      dot.setAttribute("cy", y(value));
    },
  };
}

function makeConfusion() {
  const canvas = node("canvas", { class: "lmc-confusion", role: "img" });
  const caption = node("figcaption", {});
  const whole = node("figure", { class: "lmc-figure" }, caption, canvas);
  return {
    node: whole,
    update(path, point) {
      whole.hidden = !path.shown;
      if (!path.shown) return;
      caption.textContent = `confusion at α = ${path.alphas[point].toFixed(3)}: true class ↓, predicted →`;
      paintConfusion(canvas, path.shown, point);
      canvas.setAttribute("aria-label", `confusion matrix, ${wrongCount(path.shown, point)} examples off the diagonal`);
    },
  };
}

function paintConfusion(canvas, { confusion, classes }, point) {
  const side = canvas.clientWidth || 280;
  const ratio = window.devicePixelRatio || 1;
  const dots = Math.round(side * ratio);
  if (canvas.width !== dots || canvas.height !== dots) canvas.width = canvas.height = dots;
  const style = getComputedStyle(canvas);
  const [ink, right, wrong] = ["--fg", "--right", "--wrong"].map((name) => style.getPropertyValue(name).trim());
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, side, side);
  const margin = classes <= 20 ? 20 : 4;
  const cell = (side - margin) / classes;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = `${Math.min(13, 0.52 * cell)}px ${style.fontFamily}`;
  for (let row = 0; row < classes; row++) {
    const start = (point * classes + row) * classes;
    let total = 0;
    for (let column = 0; column < classes; column++) total += confusion[start + column];
    for (let column = 0; column < classes; column++) {
      const count = confusion[start + column];
      const [px, py] = [margin + column * cell, margin + row * cell];
      // The square root keeps a single mistake visible beside a full row.
      pen.globalAlpha = total ? 0.06 + 0.84 * Math.sqrt(count / total) : 0.06;
      pen.fillStyle = count === 0 ? ink : row === column ? right : wrong;
      if (count === 0) pen.globalAlpha = 0.05;
      pen.fillRect(px + 0.5, py + 0.5, cell - 1, cell - 1);
      pen.globalAlpha = 1;
      if (count === 0 || classes > 12) continue;
      pen.fillStyle = Math.sqrt(count / total) > 0.55 ? "#fff" : ink;
      pen.fillText(count, px + cell / 2, py + cell / 2 + 0.5);
    }
    if (classes > 20) continue;
    pen.fillStyle = ink;
    pen.fillText(row, margin / 2, margin + (row + 0.5) * cell);
    pen.fillText(row, margin + (row + 0.5) * cell, margin / 2);
  }
}

function makeGallery(images) {
  const caption = node("figcaption", {});
  const grid = node("div", { class: "lmc-tiles" });
  const tiles = Array.from({ length: TILES }, () => {
    const canvas = node("canvas", { width: images.width, height: images.height });
    const label = node("span", {});
    const tile = node("div", { class: "lmc-tile" }, canvas, label);
    tile.hidden = true;
    grid.append(tile);
    return { tile, label, pen: canvas.getContext("2d"), example: -1 };
  });
  return {
    node: node("figure", { class: "lmc-figure" }, caption, grid),
    update(path, point) {
      const wrong = path.shown ? wrongExamples(path.shown, point, images) : [];
      const total = path.shown ? wrongCount(path.shown, point) : 0;
      const count = Math.min(wrong.length, TILES);
      const part = count < total ? ` (${count} shown)` : "";
      caption.textContent = `${total} of ${path.shown?.count ?? 0} wrong${part}: true → predicted`;
      tiles.forEach((slot, i) => {
        slot.tile.hidden = i >= count;
        if (i >= count) return;
        const { example, target, guess } = wrong[i];
        slot.label.textContent = `${target} → ${guess}`;
        if (slot.example === example) return;
        slot.example = example;
        slot.pen.putImageData(picture(images, example), 0, 0);
      });
    },
  };
}

function wrongExamples({ index, targets, predicted }, point, images) {
  const found = [];
  const start = point * index.length;
  for (let i = 0; i < index.length && found.length < TILES; i++) {
    const guess = predicted[start + i];
    if (guess === targets[i] || guess === 255 || !images.place.has(index[i])) continue;
    found.push({ example: index[i], target: targets[i], guess });
  }
  return found;
}

function picture(images, example) {
  if (images.cache.has(example)) return images.cache.get(example);
  const { height, width, channels, pixels, place } = images;
  const made = new ImageData(width, height);
  const start = place.get(example) * height * width * channels;
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) made.data[4 * i + c] = pixels[start + i * channels + (channels === 3 ? c : 0)];
    made.data[4 * i + 3] = 255;
  }
  images.cache.set(example, made);
  return made;
}

export { nearest, valueAt, wrongExamples };
export default { render };
