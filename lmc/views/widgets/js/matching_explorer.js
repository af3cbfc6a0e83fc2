// The matching explorer: a slider that carries out a permutation. B's units find their places beside A's, the matrix of
// similarities gets its diagonal, and the barrier on the way from A to B shrinks; B stays the same function throughout.

import {
  bytes, clamp, colourScale, fit, format, initialize, nearest, node, oneOf, player, shape, slider, stage, stepped, tabs, theme, ticks,
} from "./common.js";
import { frame, track } from "./charts.js";
import { placing, positions } from "./matching_steps.js";

const TILES = 20; // receptive fields side by side, at most
const PLAY = 7000; // milliseconds from naive to aligned

function render({ model, el }) {
  const data = model.get("data");
  const groups = data.groups.map((group) => ({ ...group, values: bytes(group.similarity), pictures: unpackFields(group.fields) }));
  const alike = (step) => Object.fromEntries(groups.map(({ name, agreement }) => [`similarity of ${name}`, agreement[step]]));
  const scene = stage({
    model, el, draw,
    name: "lmc-match",
    rows: () => data.shares.map((share, step) => ({ "share in place": share, barrier: data.barriers[step], ...alike(step) })),
    traits: { placed: (share) => Number(clamp(share, 0, 1).toFixed(6)), group: oneOf(groups) },
    deaf: () => play.running(),
  });
  const move = (changes) => (play.stop(), scene.go(changes));
  const pick = (placed) => move({ placed });
  const names = tabs("group of units", groups, (group) => move({ group }));
  const line = data.paths.length ? wayChart(data) : null;
  const course = courseChart(data, groups, pick);
  const matrix = similarityMatrix(data);
  const fields = fieldRows();
  const at = () => scene.place.placed;
  const play = player({ text: "play", duration: PLAY, steps: data.shares, at, go: (placed) => scene.go({ placed }), rest: scene.redraw });
  const ends = { low: 0, high: 1, ends: ["naive", "aligned"], look: "lmc-match-control", label: "share of B's units in their places" };
  const control = slider({ ...ends, step: (count) => stepped(data.shares, at(), count), pick });
  const row = node("div", { class: "lmc-match-row" }, play.node, control.node);

  const charts = node("div", { class: "lmc-match-charts" }, ...(line ? [line.node] : []), course.node);
  const body = node("div", { class: "lmc-match-body" }, charts, matrix.node);
  scene.show(node("div", { class: "lmc-head" }, names.node, scene.reading), row, body, fields.node);

  function draw() {
    const { placed } = scene.place;
    const active = groups.findIndex(({ name }) => name === scene.place.group);
    const group = groups[active];
    const step = nearest(data.shares, placed);
    const near = Math.abs(data.shares[step] - placed) < 0.006 ? "" : ` (at ${Math.round(100 * data.shares[step])} %)`;
    const barrier = data.paths.length ? [`barrier ${format(data.barriers[step])} ${data.unit}${near}`] : [];
    const lines = [`${Math.round(100 * placed)} % of B's units in place`, ...barrier, `mean similarity ${format(group.agreement[step], 2)}`];
    scene.say(lines, group.name);
    names.update(group.name);
    control.update(placed, lines.join(", "));
    line?.update(step);
    course.update(placed, active);
    matrix.update(group, step, placed);
    fields.update(group, placed);
  }

  return () => {
    play.stop();
    scene.close();
  };
}

function unpackFields(fields) {
  if (!fields) return null;
  const { count, height, width } = fields;
  const [a, b] = [fields.a, fields.b].map((text) => new Int8Array(bytes(text).buffer));
  return { count, height, width, a, b, made: new Map() };
}

// ---- charts

function span(numbers) {
  const found = ticks(Math.min(0, ...numbers), Math.max(1e-3, ...numbers) * 1.04);
  const step = found.length > 1 ? found[1] - found[0] : 1;
  const high = found.at(-1) >= Math.max(1e-3, ...numbers) ? found.at(-1) : Number((found.at(-1) + step).toPrecision(12));
  return { range: [found[0], high], ticks: high === found.at(-1) ? found : [...found, high] };
}

// The line from A to B now, in front of the first and the last.
function wayChart({ alphas, paths, split, unit }) {
  const numbers = paths.flat().filter((value) => value !== null);
  const chart = frame({ panel: { title: `${split === "data" ? "" : `${split} `}loss on the way from A to B (${unit})`, ...span(numbers) }, low: 0, high: 1, marks: [0, 0.25, 0.5, 0.75, 1] });
  const draw = (kind) => {
    const made = shape("polyline", { class: `lmc-line ${kind}` });
    chart.node.append(made);
    return (values) => made.setAttribute("points", track(alphas, values, chart.x, chart.y));
  };
  draw("lmc-match-naive")(paths[0]);
  draw("lmc-match-aligned")(paths.at(-1));
  const now = draw("lmc-match-now");
  const words = [["naive", 0, "lmc-match-naive"], ["aligned", paths.length - 1, "lmc-match-aligned"]];
  for (const [text, i, kind] of words) {
    const middle = Math.floor(alphas.length / 2);
    const at = { x: chart.x(0.5), y: chart.y(paths[i][middle]) - 8, class: `lmc-match-word ${kind}`, "text-anchor": "middle" };
    chart.node.append(shape("text", at, text));
  }
  chart.node.querySelector(".lmc-cursor").remove();
  return { node: chart.node, update: (step) => now(paths[step]) };
}

// The barrier (or how alike the units are, where no line was evaluated) while the places are filled.
function courseChart({ shares, barriers, paths, unit }, groups, pick) {
  const own = paths.length > 0;
  const title = own ? `barrier (${unit}) over the share of units in place` : "mean similarity over the share of units in place";
  const numbers = own ? barriers : groups.flatMap(({ agreement }) => agreement);
  const names = (share) => `${Math.round(100 * share)} %`;
  const chart = frame({ panel: { title, ...span(numbers) }, low: 0, high: 1, marks: [0, 0.25, 0.5, 0.75, 1], names });
  const curve = shape("polyline", { class: "lmc-line lmc-match-now" });
  const dot = shape("circle", { r: 6, class: "lmc-dot lmc-match-dot" });
  chart.node.append(curve, dot);
  chart.dragged(pick, () => {});
  return {
    node: chart.node,
    update(placed, active) {
      const heights = own ? barriers : groups[active].agreement;
      const step = nearest(shares, placed);
      curve.setAttribute("points", track(shares, heights, chart.x, chart.y));
      chart.at(placed);
      dot.setAttribute("cx", chart.x(shares[step]));
      dot.setAttribute("cy", chart.y(heights[step] ?? 0));
    },
  };
}

// ---- the matrix, and above it the way of each unit from its own place to the present one

function similarityMatrix({ scale }) {
  const paint = colourScale(scale);
  const ways = node("canvas", { class: "lmc-match-ways", "aria-hidden": true });
  const canvas = node("canvas", { class: "lmc-match-matrix", role: "img" });
  const caption = node("figcaption", {});
  const picture = node("canvas", {});
  let painted = "";

  function fill(group, step) {
    const m = group.shown;
    if (painted === `${group.name} ${step}`) return;
    painted = `${group.name} ${step}`;
    [picture.width, picture.height] = [m, m];
    const pen = picture.getContext("2d");
    const image = pen.createImageData(m, m);
    const start = step * m * m;
    for (let i = 0; i < m * m; i++) {
      image.data.set([...paint(group.values[start + i] / 255), 255], 4 * i);
    }
    pen.putImageData(image, 0, 0);
  }

  return {
    node: node("figure", { class: "lmc-figure lmc-match-figure" }, caption, ways, canvas),
    update(group, step, placed) {
      fill(group, step);
      const m = group.shown;
      const of = m < group.size ? ` (the first ${m} of ${group.size})` : "";
      caption.textContent = `${group.name}: B's units on their way to their places${of}; below, how alike they are to A's`;
      canvas.setAttribute("aria-label", `similarity of A's units (rows) and B's (columns); mean on the diagonal ${format(group.agreement[step], 2)}`);
      const [ink, right] = theme(canvas, "--fg", "--right");
      const below = fit(canvas);
      below.pen.imageSmoothingEnabled = false;
      below.pen.drawImage(picture, 0, 0, below.width, below.height);
      const { pen, width, height } = fit(ways);
      const cell = width / m;
      const count = Math.round(placed * group.size);
      const settled = new Set(group.order.slice(0, count).map((place) => group.index[place]));
      positions(group.index, group.order, placed).forEach((place, unit) => {
        if (place >= m && unit >= m) return;
        const [from, to] = [(unit + 0.5) * cell, (place + 0.5) * cell];
        pen.beginPath();
        pen.moveTo(from, 2);
        pen.bezierCurveTo(from, 0.5 * height, to, 0.5 * height, to, height - 2);
        [pen.strokeStyle, pen.globalAlpha, pen.lineWidth] = settled.has(unit) ? [right, 0.85, 1.8] : [ink, 0.28, 1];
        pen.stroke();
      });
      pen.globalAlpha = 1;
    },
  };
}

// ---- receptive fields

function fieldRows() {
  const caption = node("figcaption", {});
  const canvas = node("canvas", { class: "lmc-match-fields", role: "img", "aria-label": "receptive fields of the first units" });
  const whole = node("figure", { class: "lmc-figure" }, caption, canvas);
  return {
    node: whole,
    update(group, placed) {
      whole.hidden = !group.pictures;
      if (!group.pictures) return;
      const { pen, width, height } = fit(canvas);
      if (!width) return;
      const [ink, soft] = theme(canvas, "--fg", "--soft");
      const left = 92;
      const shown = Math.min(TILES, group.size, Math.max(4, Math.floor((width - left) / 40)));
      const cell = Math.min((width - left) / shown, 56);
      const side = cell - 5;
      const gap = (height - 3 * side) / 3;
      const rows = [0, side + 0.55 * gap, 2 * side + 2.9 * gap];
      caption.textContent = `what feeds the first ${shown} units: blue weights are positive, orange negative`;
      pen.font = `600 14px ${getComputedStyle(canvas).fontFamily}`;
      [pen.fillStyle, pen.textBaseline] = [ink, "middle"];
      ["A", "B, moved", "B, as it is"].forEach((text, row) => pen.fillText(text, 0, rows[row] + side / 2));
      pen.imageSmoothingEnabled = false;
      pen.save();
      pen.beginPath();
      pen.rect(left - 2, 0, shown * cell + 2, height);
      pen.clip();
      const x = (place) => left + place * cell;
      const { where, now } = placing(group.index, group.order, Math.round(placed * group.size));
      const at = positions(group.index, group.order, placed);
      for (let place = 0; place < shown; place++) pen.drawImage(tile(group.pictures, "a", place), x(place), rows[0], side, side);
      for (let unit = 0; unit < shown; unit++) pen.drawImage(tile(group.pictures, "b", unit), x(unit), rows[2], side, side);
      const order = at.map((_, unit) => unit).sort((p, q) => Math.abs(at[p] - where[p]) - Math.abs(at[q] - where[q]));
      for (const unit of order) {
        if (at[unit] < shown) pen.drawImage(tile(group.pictures, "b", unit), x(at[unit]), rows[1], side, side);
      }
      pen.lineWidth = 1.3;
      at.forEach((place, unit) => {
        if (place >= shown && unit >= shown) return;
        pen.beginPath();
        const [from, to] = [rows[2] - 2, rows[1] + side + 2];
        const half = side / 2;
        pen.moveTo(x(unit) + half, from);
        pen.bezierCurveTo(x(unit) + half, (from + to) / 2, x(place) + half, (from + to) / 2, x(place) + half, to);
        [pen.strokeStyle, pen.globalAlpha] = [soft, group.index[now.indexOf(unit)] === unit ? 0.9 : 0.35];
        pen.stroke();
      });
      pen.globalAlpha = 1;
      pen.lineWidth = 2.5;
      for (let place = 0; place < shown; place++) {
        if (group.index[place] !== now[place] || Math.abs(at[now[place]] - place) > 0.01) continue;
        pen.strokeStyle = "#009e73";
        pen.strokeRect(x(place) - 1, rows[0] - 1 + 2, side + 2, rows[1] + side - rows[0] - 1);
      }
      pen.restore();
    },
  };
}

// One field as a small picture: orange below zero, blue above, white at zero; each as strong as its largest weight.
function tile(pictures, which, unit) {
  const key = which + unit;
  if (pictures.made.has(key)) return pictures.made.get(key);
  const { height, width } = pictures;
  const made = node("canvas", { width, height });
  const pen = made.getContext("2d");
  const image = pen.createImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    const value = pictures[which][unit * height * width + i] / 127;
    const end = value < 0 ? [213, 94, 0] : [0, 114, 178];
    image.data.set([...end.map((c) => Math.round(255 + (c - 255) * Math.abs(value))), 255], 4 * i);
  }
  pen.putImageData(image, 0, 0);
  pictures.made.set(key, made);
  return made;
}

export default { initialize, render };
