// The soup triangle, and its sisters for more models: a polygon of mixtures in which a point is dragged, and a slider for
// each model's share. While it moves, values come from the lattice of evaluated mixtures; at rest a kernel evaluates it.

import {
  arrows, buttons, bytes, clamp, colourScale, drag, fit, floats, format, initialize, logTicks, node, oneOf, SETTLE_AFTER, stage, tabs,
  theme, ticks,
} from "./common.js";
import { colourBar, spot } from "./charts.js";
import { coordinates, corners, inside, interpolator, isolines } from "./simplex_geometry.js";
import { mixturePanel } from "./simplex_sliders.js";

const LEVELS = 13;
const PAD = { side: 38, end: 46 };

function render({ model, el }) {
  const data = unpackMixtures(model.get("data"));
  const scene = stage({
    model, el, draw,
    name: "lmc-mix",
    rows: () => mixtureRows(data),
    traits: {
      shares: (shares) => shares.map((share) => Number(clamp(share, 0, 1).toFixed(6))),
      measure: oneOf(data.measures),
      split: oneOf(data.splits),
    },
    exact: {
      at: ({ shares }) => shares,
      without: ({ shares }) => (onLattice(data, shares) ? "evaluated beforehand" : `interpolated between ${data.points} mixtures`),
    },
  });
  const titles = tabs("what is shown", data.measures.map(({ title }) => ({ name: title })), (chosen) =>
    scene.go({ measure: data.measures.find(({ title }) => title === chosen).name }));
  const splits = tabs("data", data.splits.map((name) => ({ name })), (split) => scene.go({ split }));
  splits.node.hidden = data.splits.length < 2;
  const map = mixtureMap(data, (shares) => scene.go({ shares }), scene.rest);
  const panel = mixturePanel(data, (shares) => scene.go({ shares }), scene.rest);
  const places = landmarks(data).map(([text, title, to]) => [text, title, () => scene.go({ shares: to(scene.place.split) }, 0)]);
  const body = node("div", { class: "lmc-mix-body" }, map.node, node("div", {}, panel.node, buttons(...places)));
  scene.show(node("div", { class: "lmc-head" }, titles.node, splits.node, scene.reading, scene.note), body);

  function draw() {
    const { shares, measure, split } = scene.place;
    const shown = data.measures.find(({ name }) => name === measure);
    const valueOf = (name) => scene.exact?.values[split][name] ?? data.at(data.series[split][name], shares);
    const lines = data.measures.map(({ name, unit, digits }) => `${name} ${format(valueOf(name), digits)}${unit}`);
    scene.reading.replaceChildren(node("b", {}, `${split}: ${lines.join(" · ")}`));
    titles.update(shown.title);
    splits.update(split);
    map.update({ shares, shown, split });
    panel.update({ shares, shown, split, value: valueOf(measure), text: lines.join(", ") });
    scene.speak(`${data.names.map((name, i) => `${Math.round(100 * shares[i])} % ${name}`).join(", ")}: ${lines.join(", ")}`);
  }

  if (data.names.length > 3) scene.note.title = "the polygon shows one surface through all models; the sliders reach every mixture";
  return scene.close;
}

function unpackMixtures(data) {
  const counts = new Uint16Array(bytes(data.counts).buffer);
  const series = {};
  for (const [split, found] of Object.entries(data.series)) {
    series[split] = Object.fromEntries(Object.entries(found).map(([name, text]) => [name, floats(text)]));
  }
  const paint = colourScale(data.scale);
  const measures = data.measures.map((each) => {
    const [low, high] = each.log ? [Math.log(each.low), Math.log(each.high)] : [each.low, each.high];
    const place = (value) => ((each.log ? Math.log(value) : value) - low) / (high - low || 1);
    return { ...each, place, colour: (value) => paint(each.high_is_good ? 1 - place(value) : place(value)) };
  });
  const at = interpolator(counts, data.names.length, data.resolution);
  return { ...data, counts, measures, series, at, splits: Object.keys(series), points: counts.length / data.names.length };
}

function onLattice({ resolution }, shares) {
  return shares.every((share) => Math.abs(share * resolution - Math.round(share * resolution)) < 1e-4);
}

// What was evaluated: a row for each split and mixture.
function mixtureRows({ names, counts, resolution, points, series }) {
  const shares = (row) => Object.fromEntries(names.map((name, i) => [`share of ${name}`, counts[row * names.length + i] / resolution]));
  const values = (found, row) => Object.fromEntries(Object.entries(found).map(([measure, all]) => [measure, all[row]]));
  return Object.entries(series).flatMap(([split, found]) =>
    Array.from({ length: points }, (_, row) => ({ split, ...shares(row), ...values(found, row) })));
}

// Text of a button, what it says when pointed at, the mixture it goes to.
function landmarks(data) {
  const count = data.names.length;
  const only = (i) => data.names.map((_, j) => (i === j ? 1 : 0));
  return [
    ...data.names.map((name, i) => [name, `all ${name}`, () => only(i)]),
    ["◆ uniform soup", "equal shares", () => data.names.map(() => 1 / count)],
    ["★ lowest loss", "the evaluated mixture of lowest loss on the data shown", (split) => data.best[split]],
  ];
}

// ---- the polygon

function mixtureMap(data, move, release) {
  const canvas = node("canvas", {
    class: "lmc-mix-map",
    tabindex: 0,
    role: "img",
    "aria-label": "map of the mixtures; arrow keys move the point, digits go to a model, Home to the uniform soup",
  });
  const caption = node("p", { class: "lmc-mix-caption" });
  const count = data.names.length;
  const centre = data.names.map(() => 1 / count);
  let polygon = [];
  let [cache, here] = [{ key: "" }, centre];
  const placeOf = (shares) => [0, 1].map((axis) => shares.reduce((sum, share, i) => sum + share * polygon[i][axis], 0));
  const go = (x, y) => {
    const [, px, py] = inside(polygon, x, y);
    move([...coordinates(polygon, px, py)]);
  };
  drag(canvas, { move: (x, y) => go(x * canvas.clientWidth, y * canvas.clientHeight), release: () => release() });
  arrows(canvas, (dx, dy, event) => {
    const [x, y] = placeOf(here);
    const step = (event.shiftKey ? 5 : 1) * Math.max(2, canvas.clientWidth / 60);
    go(x + step * dx, y - step * dy);
    release(SETTLE_AFTER);
  });
  canvas.addEventListener("keydown", (event) => {
    const digit = Number(event.key);
    if (event.key === "Home") move(centre);
    else if (digit >= 1 && digit <= count) move(data.names.map((_, i) => (i === digit - 1 ? 1 : 0)));
    else return;
    event.preventDefault();
    release(SETTLE_AFTER);
  });

  function update({ shares, shown, split }) {
    here = shares;
    const { pen, width, height } = fit(canvas);
    if (!width) return;
    const [ink, paper, soft] = theme(canvas, "--fg", "--bg", "--soft");
    const box = { left: PAD.side, top: PAD.end, width: width - 2 * PAD.side - 78, height: height - 2 * PAD.end };
    polygon = corners(count, box);
    const values = data.series[split][shown.name];
    const key = [width, height, shown.name, split].join();
    if (cache.key !== key) cache = { key, ...paintMap(data, values, shown, polygon, width, height) };
    outline(pen, polygon);
    pen.save();
    pen.clip();
    pen.imageSmoothingEnabled = true;
    pen.drawImage(cache.picture, 0, 0, width, height);
    pen.lineWidth = 0.8;
    pen.strokeStyle = "rgba(255, 255, 255, 0.65)";
    pen.stroke(cache.lines);
    pen.restore();
    outline(pen, polygon);
    [pen.lineWidth, pen.strokeStyle, pen.lineJoin] = [2, ink, "round"];
    pen.stroke();
    const at = (share) => (shown.log ? shown.low * (shown.high / shown.low) ** share : shown.low + share * (shown.high - shown.low));
    const named = shown.log ? logTicks(shown.low, shown.high) : ticks(shown.low, shown.high);
    const marks = named.map((tick) => [shown.place(tick), String(Number(tick.toPrecision(3)))]);
    const scale = { colour: (share) => shown.colour(at(share)), marks, title: shown.title };
    pen.font = `13px ${getComputedStyle(canvas).fontFamily}`;
    colourBar(pen, { x: width - 68, y: box.top, height: box.height, ink, soft, ...scale });
    mark(pen, ...placeOf(centre), "◆", ink, paper);
    polygon.forEach(([x, y], i) => corner(pen, x, y, i, { data, shown, split, middle: placeOf(centre), ink, paper, soft }));
    mark(pen, ...placeOf(data.best[split]), "★", ink, paper);
    const [x, y] = placeOf(shares);
    const off = count > 3 ? Math.max(...coordinates(polygon, x, y).map((share, i) => Math.abs(share - shares[i]))) : 0;
    spot(pen, x, y, { hollow: off > 0.02 });
    caption.textContent = off > 0.02 ? "the point lies off the surface drawn here: the sliders reach every mixture" : "";
    caption.hidden = count < 4;
  }
  return { node: node("div", {}, canvas, caption), update };
}

function paintMap(data, values, shown, polygon, width, height) {
  const grain = 1.5;
  const [columns, rows] = [Math.ceil(width / grain), Math.ceil(height / grain)];
  const picture = node("canvas", { width: columns, height: rows });
  const pen = picture.getContext("2d");
  const image = pen.createImageData(columns, rows);
  const grid = new Float64Array(columns * rows).fill(NaN);
  const shares = new Float64Array(polygon.length);
  const [left, right] = [Math.min(...polygon.map(([x]) => x)) - 4, Math.max(...polygon.map(([x]) => x)) + 4];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const [x, y] = [(column + 0.5) * grain, (row + 0.5) * grain];
      if (x < left || x > right) continue;
      const [far, px, py] = inside(polygon, x, y);
      if (far > 3) continue;
      const value = data.at(values, coordinates(polygon, px, py, shares));
      if (Number.isNaN(value)) continue;
      const at = row * columns + column;
      grid[at] = shown.place(value);
      const [r, g, b] = shown.colour(value);
      image.data.set([r, g, b, 255], 4 * at);
    }
  }
  pen.putImageData(image, 0, 0);
  const lines = new Path2D();
  const levels = Array.from({ length: LEVELS - 1 }, (_, i) => (i + 1) / LEVELS);
  isolines(grid, columns, rows, levels, ([ax, ay], [bx, by]) => {
    lines.moveTo((ax + 0.5) * grain, (ay + 0.5) * grain);
    lines.lineTo((bx + 0.5) * grain, (by + 0.5) * grain);
  });
  return { picture, lines };
}

function outline(pen, polygon) {
  pen.beginPath();
  if (polygon.length > 2) polygon.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  else pen.rect(polygon[0][0], polygon[0][1] - 12, polygon[1][0] - polygon[0][0], 24);
  pen.closePath();
}

// A model's corner: its name and its own value outside of it.
function corner(pen, x, y, i, { data, shown, split, middle, ink, paper, soft }) {
  [pen.fillStyle, pen.strokeStyle, pen.lineWidth] = [paper, data.colours[i], 4];
  pen.beginPath();
  pen.arc(x, y, 7, 0, 2 * Math.PI);
  pen.fill();
  pen.stroke();
  const above = y <= middle[1];
  const value = `${format(data.own[split][shown.name][i], shown.digits)}${shown.unit}`;
  const family = getComputedStyle(pen.canvas).fontFamily;
  pen.textAlign = "center";
  pen.textBaseline = "alphabetic";
  const [top, bottom] = above ? [y - 30, y - 14] : [y + 24, y + 40];
  [pen.font, pen.fillStyle] = [`600 16px ${family}`, ink];
  const half = pen.measureText(data.names[i]).width / 2;
  const at = clamp(x, half + 2, pen.canvas.clientWidth - half - 2);
  pen.fillText(data.names[i], at, top);
  [pen.font, pen.fillStyle] = [`13.5px ${family}`, soft];
  pen.fillText(value, at, bottom);
}

function mark(pen, x, y, sign, ink, paper) {
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = "19px system-ui, sans-serif";
  [pen.strokeStyle, pen.lineWidth, pen.fillStyle] = [paper, 4, ink];
  pen.strokeText(sign, x, y + 1);
  pen.fillText(sign, x, y + 1);
}

export default { initialize, render };
