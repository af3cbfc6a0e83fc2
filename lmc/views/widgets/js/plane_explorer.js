// The plane explorer: a point to be dragged over a plane in weight space, drawn as a map and as a surface. All of the plane
// was computed beforehand; values between its grid points are interpolated, and where the point is let go of, a kernel
// evaluates the network that is there.

import {
  arrows, buttons, clamp, colourScale, drag, fit, floats, format, initialize, logTicks, node, oneOf, sample, SETTLE_AFTER, stage, stepped,
  tabs, theme, ticks,
} from "./common.js";
import { colourBar, spot } from "./charts.js";
import { contour, heatMap, rangeOf, valueIn } from "./grid.js";
import { predictions } from "./pictures.js";
import { hidden, paintSurface, view } from "./surface.js";

const MAP = { left: 50, right: 74, top: 10, bottom: 44 };
const LEVELS = 12; // contours
const DISC = { radius: 6, fill: "#fff", edge: "#222", width: 2 }; // of a model
const AROUND = [[0, 1], [0, -1], [1, 0], [-1, 0], [1, 1], [-1, 1], [1, -1], [-1, -1]]; // a point: to the right, and down
const TURN = 0.1; // radians for a key

function render({ model, el }) {
  const data = unpack(model.get("data"));
  const { x, y } = data;
  let eye = { yaw: 0.5, pitch: 0.62 };
  let painted = {}; // what the two pictures show that do not change while the point moves

  const scene = stage({
    model, el, draw,
    name: "lmc-plane",
    rows: () => planeRows(data),
    traits: {
      point: ([px, py]) => [clamp(px, x[0], x.at(-1)), clamp(py, y[0], y.at(-1))],
      split: oneOf(data.splits),
      measure: oneOf(data.measures),
    },
    exact: {
      at: ({ split, point }) => [split, ...point],
      without: ({ point }) => (known(data, point) ? "evaluated beforehand" : "interpolated between grid points"),
    },
    told: (answer) => answer && shown.tell(answer, `(${scene.place.point.map((value) => format(value, 2)).join(", ")})`),
  });
  const splits = tabs("split", data.splits.map((name) => ({ name })), (split) => scene.go({ split }, SETTLE_AFTER));
  const measures = tabs("measure", data.measures, (measure) => scene.go({ measure }, SETTLE_AFTER));
  const targets = [...data.models, { name: "middle", place: middle(data.models) }];
  const places = buttons(...targets.map(({ name, place }) => [name, `go to ${name}`, () => scene.go({ point: place }, 0)]));
  places.prepend("go to ");
  const map = node("canvas", { class: "lmc-map", tabindex: 0, role: "application", "aria-roledescription": "map" });
  const surface = node("canvas", { class: "lmc-surface", tabindex: 0, role: "img", "aria-label": "surface; arrow keys turn it" });
  const shown = predictions(data.unlike?.name);

  shown.node.hidden = true;
  const head = node("div", { class: "lmc-head" }, splits.node, measures.node, places);
  const pair = node("div", { class: "lmc-pair" }, map, surface);
  scene.show(head, node("div", { class: "lmc-head" }, scene.reading, scene.note), pair, foot(data), shown.node);

  drag(map, {
    move(across, down) {
      const { px, py } = painted.chart.inverse(across * map.clientWidth, down * map.clientHeight);
      scene.go({ point: [px, py] });
    },
    release: scene.rest,
  });
  arrows(map, (dx, dy, event) => {
    const [px, py] = scene.place.point;
    const fine = [px + (dx * (x.at(-1) - x[0])) / 200, py + (dy * (y.at(-1) - y[0])) / 200];
    const point = event.shiftKey ? fine : [dx ? stepped(x, px, dx) : px, dy ? stepped(y, py, dy) : py];
    scene.go({ point }, SETTLE_AFTER);
  });

  function turn(yaw, pitch) {
    eye = { yaw, pitch: clamp(pitch, 0.1, 1.45) };
    scene.redraw();
  }
  let grip = null;
  drag(surface, {
    begin: (across, down) => (grip = { across, down, ...eye }),
    move: (across, down) => turn(grip.yaw - 3.2 * (across - grip.across), grip.pitch + 2.4 * (down - grip.down)),
  });
  arrows(surface, (dx, dy) => turn(eye.yaw + TURN * dx, eye.pitch + TURN * dy));

  function draw() {
    const { point, split, measure } = scene.place;
    const field = data.fields[split][measure];
    level(map, surface, data);
    const look = theme(scene.root, "--fg", "--bg", "--soft", "--rule");
    painted = paint(painted, { map, surface, field, data, split, measure, eye, look });
    const here = (name) => scene.exact?.values[name] ?? valueIn({ x, y, values: data.fields[split][name].raw }, ...point);
    const lines = [`x = ${format(point[0], 2)}, y = ${format(point[1], 2)}`];
    for (const { name, unit } of data.measures) lines.push(`${name} ${format(here(name), name === "accuracy" ? 1 : 3)} ${unit}`.trim());
    scene.say(lines, split);
    splits.update(split);
    measures.update(measure);
    drawMap(map, painted, data, point, look);
    drawSurface(surface, painted, data, field, point, look);
    shown.node.classList.toggle("lmc-faded", !scene.exact);
    map.setAttribute("aria-label", `${split} ${measure} over the plane; arrow keys move the point: ${lines.join(", ")}`);
  }

  return scene.close;
}

// ---- data

// Adds to each split and measure a field: the values as they are (`raw`), and as heights from 0 to 1.
function unpack(data) {
  const fields = Object.fromEntries(data.splits.map((split) => [split, {}]));
  for (const { name, reversed } of data.measures) {
    for (const split of data.splits) fields[split][name] = shaded(data, name, reversed, floats(data.values[split][name]));
  }
  return { ...data, fields };
}

function shaded(data, name, reversed, raw) {
  const [low, high] = rangeOf(raw);
  const logarithmic = name === "loss" && low > 0;
  const bend = logarithmic ? Math.log : (value) => value;
  const [from, span] = [bend(low), bend(high) - bend(low) || 1];
  const height = (value) => (bend(value) - from) / span;
  const scale = colourScale(data.scale);
  const colour = (h) => (Number.isNaN(h) ? null : scale(reversed ? 1 - h : h));
  const marks = logarithmic ? logTicks(low, high) : ticks(low, high, 6);
  return { x: data.x, y: data.y, raw, values: raw.map(height), height, colour, marks };
}

function planeRows({ x, y, splits, measures, fields }) {
  const values = (split, i) => Object.fromEntries(measures.map(({ name }) => [name, fields[split][name].raw[i]]));
  return splits.flatMap((split) => y.flatMap((py, j) => x.map((px, i) => ({ split, x: px, y: py, ...values(split, j * x.length + i) }))));
}

// Whether a place is a point of the grid that was evaluated.
function known({ x, y, interpolated }, [px, py]) {
  const [column, row] = [x.indexOf(px), y.indexOf(py)];
  return column >= 0 && row >= 0 && !interpolated.includes(row * x.length + column);
}

function middle(models) {
  return [0, 1].map((i) => models.reduce((sum, { place }) => sum + place[i], 0) / models.length);
}

// What the lines are, and what is missing.
function foot({ x, y, tracks, missing, interpolated, gaps }) {
  const lines = [];
  if (missing) lines.push(`${missing} points were not evaluated`);
  for (const [name, count] of Object.entries(gaps)) if (count) lines.push(`${name} is not a number at ${count} points`);
  const names = tracks.map((track) => node("span", {}, sample(track), track.name));
  const parts = [lines.length ? `Gaps: ${lines.join("; ")}.` : ""];
  if (interpolated.length) parts.push(`Of ${x.length * y.length} grid points ${interpolated.length} were interpolated.`);
  return node("div", { class: "lmc-foot" }, ...names, ...parts.map((text) => node("span", {}, text)));
}

// ---- the two pictures

// Paints what stays while the point moves: map and surface, each on a canvas of its own, again where something changed.
function paint(before, { map, surface, field, data, split, measure, eye, look }) {
  const flat = [split, measure, ...look, map.clientWidth, map.clientHeight, window.devicePixelRatio].join();
  const deep = [flat, eye.yaw, eye.pitch, surface.clientWidth, surface.clientHeight].join();
  const next = { ...before, flat, deep };
  if (before.flat !== flat) {
    next.chart = place(data, map.clientWidth, map.clientHeight);
    next.map = behind(map, (pen, font) => {
      paintMap(pen, next.chart, field, data, measure, look);
      paintTracks(pen, next.chart, data, font);
    });
  }
  if (before.deep !== deep) {
    next.eye = view(field, eye, surface.clientWidth, surface.clientHeight);
    next.surface = behind(surface, (pen) => paintSurface(pen, field, next.eye, field.colour, look[3]));
  }
  return next;
}

// Both pictures as high as the map needs; a flat map may be lower than the surface.
function level(map, surface, { x, y }) {
  const wanted = ((map.clientWidth - MAP.left - MAP.right) * (y.at(-1) - y[0])) / (x.at(-1) - x[0]) + MAP.top + MAP.bottom;
  for (const [canvas, least] of [[map, 160], [surface, 320]]) {
    const height = `${Math.round(clamp(wanted, least, 480))}px`;
    if (canvas.style.height !== height) canvas.style.height = height;
  }
}

// A canvas as large as the one shown, to be copied onto it.
function behind(canvas, act) {
  const ratio = window.devicePixelRatio || 1;
  const made = node("canvas", { width: Math.round(canvas.clientWidth * ratio), height: Math.round(canvas.clientHeight * ratio) });
  const [pen, font] = [made.getContext("2d"), getComputedStyle(canvas).fontFamily];
  pen.scale(ratio, ratio);
  pen.font = `13px ${font}`;
  act(pen, font);
  return made;
}

// Where the plane lies on the map: one scale for both axes, so that distances are what they look like.
function place({ x, y }, width, height) {
  const [wide, tall] = [x.at(-1) - x[0], y.at(-1) - y[0]];
  const scale = Math.min((width - MAP.left - MAP.right) / wide, (height - MAP.top - MAP.bottom) / tall);
  const left = MAP.left + Math.max(0, (width - MAP.left - MAP.right - scale * wide) / 2);
  const top = MAP.top;
  return {
    left,
    top,
    width: scale * wide,
    height: scale * tall,
    at: (px, py) => [left + scale * (px - x[0]), top + scale * (y.at(-1) - py)],
    inverse: (across, down) => ({ px: x[0] + (across - left) / scale, py: y.at(-1) - (down - top) / scale }),
  };
}

function paintMap(pen, chart, field, data, measure, [ink, paper, soft, rule]) {
  const { left, top, width, height } = chart;
  pen.fillStyle = rule;
  pen.fillRect(left, top, width, height);
  const image = heatMap(field, Math.round(width), Math.round(height), field.colour);
  const sheet = node("canvas", { width: image.width, height: image.height });
  sheet.getContext("2d").putImageData(image, 0, 0);
  pen.drawImage(sheet, left, top, width, height);
  pen.lineWidth = 0.9;
  for (let step = 1; step < LEVELS; step++) {
    const dark = field.colour(step / LEVELS)[0] < 128;
    pen.strokeStyle = dark ? "rgba(255, 255, 255, 0.5)" : "rgba(8, 48, 107, 0.3)";
    pen.beginPath();
    for (const [x1, y1, x2, y2] of contour(field, step / LEVELS)) {
      pen.moveTo(...chart.at(x1, y1));
      pen.lineTo(...chart.at(x2, y2));
    }
    pen.stroke();
  }
  axes(pen, chart, data, [ink, soft]);
  bar(pen, chart, field, data, measure, [ink, soft]);
}

function axes(pen, chart, { x, y, axes: [across, up] }, [ink, soft]) {
  const { left, top, width, height } = chart;
  pen.fillStyle = soft;
  pen.textAlign = "center";
  for (const tick of ticks(x[0], x.at(-1), 6)) pen.fillText(String(tick), chart.at(tick, 0)[0], top + height + 16);
  pen.textAlign = "right";
  for (const tick of ticks(y[0], y.at(-1), 6)) pen.fillText(String(tick), left - 6, chart.at(0, tick)[1] + 4.5);
  pen.fillStyle = ink;
  pen.textAlign = "center";
  pen.fillText(across, left + width / 2, top + height + 36, width + MAP.right);
  pen.save();
  pen.translate(left - 36, top + height / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText(up, 0, 0, height + 30);
  pen.restore();
}

function bar(pen, { left, top, width, height }, field, { measures }, measure, [ink, soft]) {
  const { name, unit } = measures.find((each) => each.name === measure);
  const marks = field.marks.map((mark) => [field.height(mark), String(mark)]);
  colourBar(pen, { x: left + width + 14, y: top, height, colour: field.colour, marks, title: unit ? `${name} (${unit})` : name, ink, soft });
}

function drawMap(canvas, { map, chart }, data, point, [ink, paper]) {
  const { pen, width, height } = fit(canvas);
  pen.drawImage(map, 0, 0, width, height);
  spot(pen, ...chart.at(...point));
}

// The tracks and the models, and their names: each on the map, and on no other name, model or track. A model's name that finds no
// such place stands above it, a track's is left out.
function paintTracks(pen, chart, { tracks, models }, font) {
  const lines = tracks.map((track) => ({ ...track, places: track.points.map((at) => chart.at(...at)) }));
  for (const { places, colour, dash } of lines) line(pen, places, colour, dash);
  const discs = models.map(({ name, place: at }) => ({ name, at: chart.at(...at) }));
  const taken = discs.map(({ at }) => [...at, 8, 8]); // middles, and how far from them: across, down
  const curves = lines.flatMap(({ places }) => fine(places)).map((at) => [...at, 2, 2]);
  const clear = ([x, y, w, h], things) => things.every(([u, v, a, b]) => Math.abs(x - u) >= w + a || Math.abs(y - v) >= h + b);
  const inside = ([x, y, w, h]) => x - w >= chart.left && x + w <= chart.left + chart.width && y - h >= chart.top && y + h <= chart.top + chart.height;
  const put = (text, [px, py], size, weight, colour, ways) => {
    pen.font = `${weight} ${size}px ${font}`;
    const [w, h] = [pen.measureText(text).width / 2 + 2, size / 2];
    const spots = [9, 20].flatMap((far) => ways.map(([right, down]) => [px + right * (w + far), py + down * (h + far), w, h]));
    const found = spots.find((spot) => inside(spot) && clear(spot, taken) && clear(spot, curves)) ?? (weight === "bold" ? spots[0] : null);
    if (!found) return;
    taken.push(found);
    write(pen, text, found[0], found[1] + 0.36 * size, colour);
  };
  for (const { at } of discs) spot(pen, ...at, DISC);
  for (const { name, at } of discs) put(name, at, 15, "bold", "#222", [[0, -1], [0, 1], [1, 0], [-1, 0]]);
  const ends = ({ labels }) => Object.entries(labels).sort(([i], [k]) => inner(i, labels) - inner(k, labels));
  for (const track of lines) for (const [i, text] of ends(track)) put(text, track.places[i], 12, 600, track.colour, AROUND);
}

// Whether a point is neither the first nor the last that has a name; those say whose it is.
function inner(i, labels) {
  return ![Object.keys(labels)[0], Object.keys(labels).at(-1)].includes(i);
}

// A text with a white edge.
function write(pen, text, x, y, colour) {
  pen.textAlign = "center";
  pen.lineWidth = 4;
  pen.lineJoin = "round";
  pen.strokeStyle = "rgba(255, 255, 255, 0.9)";
  pen.strokeText(text, x, y);
  pen.fillStyle = colour;
  pen.fillText(text, x, y);
}

function drawSurface(canvas, { surface, eye }, data, field, point, [ink]) {
  const { pen, width, height } = fit(canvas);
  pen.drawImage(surface, 0, 0, width, height);
  const font = getComputedStyle(canvas).fontFamily;
  const up = ([px, py]) => {
    const h = valueIn(field, px, py);
    return { h, at: eye.place(px, py, Number.isNaN(h) ? 0 : h), seen: !Number.isNaN(h) && !hidden(field, eye, px, py, h) };
  };
  for (const { points, colour, dash } of data.tracks) {
    const lifted = fine(points).map(up);
    for (const { seen, points: run } of runs(lifted)) {
      pen.globalAlpha = seen ? 1 : 0.25;
      line(pen, run, colour, dash);
    }
  }
  for (const { name, place: at } of data.models) {
    const lifted = up(at);
    pen.globalAlpha = lifted.seen ? 1 : 0.35;
    spot(pen, ...lifted.at, DISC);
    pen.font = `bold 15px ${font}`;
    write(pen, name, lifted.at[0], lifted.at[1] - 12, "#222");
  }
  const lifted = up(point);
  pen.globalAlpha = lifted.seen ? 1 : 0.5;
  pen.strokeStyle = ink;
  pen.lineWidth = 1.2;
  pen.beginPath();
  pen.moveTo(...lifted.at);
  pen.lineTo(...eye.place(...point, 1.08)); // seen from anywhere, even where the point lies behind a hill
  pen.stroke();
  spot(pen, ...lifted.at);
  pen.globalAlpha = 1;
}

// A curve in steps so short that they follow the surface.
function fine(points) {
  const steps = Math.ceil(80 / (points.length - 1));
  const between = points.slice(1).flatMap((to, i) =>
    Array.from({ length: steps }, (_, k) => [0, 1].map((c) => points[i][c] + ((to[c] - points[i][c]) * (k + 1)) / steps)),
  );
  return [points[0], ...between];
}

// The stretches of a curve on the surface that are seen, or that are not; gaps in the surface part them.
function runs(lifted) {
  const found = [];
  lifted.forEach(({ h, at, seen }, i) => {
    if (Number.isNaN(h)) return;
    const last = i && !Number.isNaN(lifted[i - 1].h) ? found.at(-1) : null;
    if (last) last.points.push(at);
    if (last?.seen !== seen) found.push({ seen, points: [at] });
  });
  return found;
}

function line(pen, points, colour, dash) {
  for (const [width, tint, pattern] of [[5, "rgba(255, 255, 255, 0.75)", "none"], [3, colour, dash]]) {
    pen.setLineDash(pattern === "none" ? [] : pattern.split(" ").map(Number));
    pen.lineWidth = width;
    pen.strokeStyle = tint;
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    for (const at of points) pen.lineTo(...at);
    pen.stroke();
  }
  pen.setLineDash([]);
}

export default { initialize, render };
