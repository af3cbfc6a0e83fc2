// The training-time explorer: the path between two runs at one epoch, the barrier over all epochs, and the landscape as it
// changes, epoch by epoch. All of it was computed beforehand; where a slider is let go of, a kernel evaluates the network.

import {
  clamp, colourScale, drag, exactly, format, initialize, nearest, node, player, SETTLE_AFTER, shape, slider, stage, stepped,
  tabs, tell, valueAt,
} from "./common.js";
import { CHART, frame, pathChart, pathRows, track } from "./charts.js";
import { heatMap, rangeOf } from "./grid.js";
import { predictions, unpackImages, unpackShown } from "./pictures.js";

const PACE = 700; // milliseconds an epoch stays while playing

function render({ model, el }) {
  const data = model.get("data");
  const { epochs, runs } = data;
  const alphas = runs[0].paths[0].alphas;
  const [low, high] = [alphas[0], alphas.at(-1)];
  let [epoch, alpha, active, exact, drawn] = [0, 0, 0, null, null];

  const rows = () => runs.flatMap(({ paths }) => paths.flatMap((path, i) => pathRows(path).map((row) => ({ epoch: epochs[i], ...row }))));
  const scene = stage({ model, el, name: "lmc-epochs", draw, rows });
  const reading = node("div", { class: "lmc-reading" });
  const note = node("span", { class: "lmc-note" });
  const names = tabs("path shown", runs, (index) => (choose(epoch, alpha, index), values.settle(SETTLE_AFTER)));
  const last = epochs.length - 1;
  const steps = epochs.map((_, i) => (last ? i / last : 1));
  const play = player({
    text: "train",
    duration: PACE * last,
    steps,
    at: () => steps[epoch],
    go(share) {
      const next = Math.floor(share * last + 1e-9);
      if (next !== epoch) choose(next, alpha, active);
    },
    rest: () => values.settle(),
  });
  const values = exactly({
    ask: scene.ask,
    note,
    at: () => [runs[active].name, epochs[epoch], alpha],
    show(answer) {
      exact = answer;
      if (answer) shown.update(answer.shown && unpackShown(answer.shown), 0, unpackImages(answer.images), `epoch ${epochs[epoch]}, α = ${alpha.toFixed(3)}`);
      scene.redraw();
    },
    without: () => (alphas.includes(alpha) ? "evaluated beforehand" : "interpolated between evaluated points"),
  });
  const settle = (delay) => values.settle(delay);
  const walk = (value) => choose(epoch, value, active);
  const wait = (value) => (play.stop(), choose(nearest(epochs, value), alpha, active));
  const now = () => runs.map((run) => run.paths[epoch]);
  const charts = data.panels.map((panel) => pathChart({ panel, paths: now(), low, high, pick: walk, release: settle }));
  const along = slider({ low, high, label: "position on the path", ends: ["A", "B"], step: (n) => stepped(alphas, alpha, n), pick: walk, release: settle });
  const over = barrierChart(data, wait, settle);
  const ends = { low: epochs[0], high: epochs.at(-1), label: "epoch" };
  const time = slider({ ...ends, step: (n) => epochs[clamp(epoch + n, 0, epochs.length - 1)], pick: wait, release: settle });
  const land = landscape(data, (px, py) => (play.stop(), choose(nearest(epochs, py), px, active)), settle);
  const shown = predictions();

  shown.node.hidden = true;
  const left = node("div", {}, ...charts.map((chart) => chart.node), along.node);
  const pair = node("div", { class: "lmc-pair" }, left, node("div", {}, over.node, time.node, land.node));
  const heads = [node("div", { class: "lmc-head" }, names.node, play.node), node("div", { class: "lmc-head" }, reading, note)];
  scene.show(...heads, pair, shown.node);

  function choose(toEpoch, toAlpha, toActive) {
    [epoch, alpha, active] = [toEpoch, clamp(toAlpha, low, high), toActive];
    values.moved();
    tell(model, { epoch: epochs[epoch], alpha, active: runs[active].name });
  }

  function draw() {
    const run = runs[active];
    const path = run.paths[epoch];
    const series = path.series[path.split];
    const here = (name) => exact?.values[name] ?? valueAt(path.alphas, series[name], alpha);
    const lines = [`epoch ${epochs[epoch]}`, `α = ${alpha.toFixed(3)}`, `loss ${format(here("loss"))}`];
    if (series.accuracy) lines.push(`accuracy ${format(here("accuracy"), 1)} %`);
    lines.push(`barrier ${format(run.barriers[epoch], 2)} ${data.unit}`);
    reading.textContent = lines.join(" · ");
    names.update(active);
    along.update(alpha, `α = ${alpha.toFixed(3)}`);
    time.update(epochs[epoch], lines.join(", "));
    for (const chart of charts) {
      if (drawn?.epoch !== epoch) chart.redraw(now());
      if (drawn?.active !== active) chart.trail(run.paths);
      chart.update(alpha, active, exact?.values);
    }
    over.update(epoch, active);
    land.update(epoch, alpha, active);
    shown.node.classList.toggle("lmc-faded", !exact);
    drawn = { epoch, active };
    scene.speak(`${run.name}: ${lines.join(", ")}`);
  }

  function read() {
    const place = Math.max(0, epochs.indexOf(model.get("epoch")));
    return [place, clamp(model.get("alpha"), low, high), Math.max(0, runs.findIndex((run) => run.name === model.get("active")))];
  }
  function heard() {
    const told = read();
    if (told.join() === [epoch, alpha, active].join()) return; // what was just set here comes back
    [epoch, alpha, active] = told;
    values.moved();
    values.settle(SETTLE_AFTER);
  }
  for (const trait of ["epoch", "alpha", "active"]) scene.listen(trait, heard);
  [epoch, alpha, active] = read();
  values.settle(SETTLE_AFTER);
  return () => {
    play.stop();
    values.stop();
    scene.close();
  };
}

// Epochs named on an axis: the last, and before it those that stand apart by a share of its length.
function marksOf(epochs, apart) {
  const least = apart * (epochs.at(-1) - epochs[0]);
  const kept = [epochs.at(-1)];
  for (const epoch of epochs.slice(0, -1).reverse()) if (kept[0] - epoch >= least) kept.unshift(epoch);
  return kept;
}

function ends(epochs) {
  return epochs.length > 1 ? [epochs[0], epochs.at(-1)] : [epochs[0] - 0.5, epochs[0] + 0.5];
}

// The barrier of each path over the epochs.
function barrierChart({ epochs, runs, barrier }, pick, release) {
  const [low, high] = ends(epochs);
  const chart = frame({ panel: barrier, low, high, marks: marksOf(epochs, 0.045) });
  const groups = runs.map((run) => {
    const group = shape("g", { style: `--c: ${run.colour}; --dash: ${run.dash}` });
    group.append(shape("polyline", { class: "lmc-line", points: track(epochs, run.barriers, chart.x, chart.y) }));
    const dots = run.barriers.map((value, i) => {
      const dot = shape("circle", { class: "lmc-dot", cx: chart.x(epochs[i]), cy: value === null ? 0 : chart.y(value) });
      if (value === null) dot.setAttribute("visibility", "hidden");
      return dot;
    });
    group.append(...dots);
    chart.node.append(group);
    return { group, dots };
  });
  chart.dragged(pick, release);
  return {
    node: chart.node,
    update(epoch, active) {
      chart.at(epochs[epoch]);
      groups.forEach(({ group, dots }, k) => {
        group.classList.toggle("lmc-faded", k !== active);
        dots.forEach((dot, i) => dot.setAttribute("r", i === epoch ? 6.5 : 3.5));
      });
    },
  };
}

// Losses over alpha (across) and epochs (up) of one path, as a map.
function landscape({ epochs, runs, scale }, pick, release) {
  const [low, high] = [runs[0].paths[0].alphas[0], runs[0].paths[0].alphas.at(-1)];
  const panel = { title: "loss at α (across) and epoch (up)", range: ends(epochs), ticks: marksOf(epochs, 0.075) };
  const chart = frame({ panel, low, high, marks: [0, 0.25, 0.5, 0.75, 1] });
  const [across, down] = [CHART.width - CHART.left - CHART.right, CHART.height - CHART.top - CHART.bottom];
  const size = { x: CHART.left, y: CHART.top, width: across, height: down, preserveAspectRatio: "none" };
  const losses = runs.map((run) => run.paths.flatMap((path) => path.series[path.split].loss.map((value) => value ?? NaN)));
  const [least, most] = rangeOf(...losses);
  const bend = least > 0 ? Math.log : (value) => value;
  const tint = colourScale(scale);
  const colour = (value) => tint(value === value ? (value - bend(least)) / (bend(most) - bend(least) || 1) : NaN);
  const images = runs.map((run, k) => {
    const image = shape("image", size);
    if (epochs.length > 1) {
      const field = { x: run.paths[0].alphas, y: epochs, values: losses[k].map(bend) };
      const sheet = node("canvas", { width: across, height: down });
      sheet.getContext("2d").putImageData(heatMap(field, across, down, colour), 0, 0);
      image.setAttribute("href", sheet.toDataURL());
    }
    chart.node.insertBefore(image, chart.cursor);
    return image;
  });
  const row = shape("line", { x1: CHART.left, x2: CHART.width - CHART.right, class: "lmc-cursor lmc-across" });
  const dot = shape("circle", { r: 7, class: "lmc-spot" });
  chart.node.append(row, dot);
  chart.node.classList.add("lmc-land");
  drag(chart.node, {
    move: (u, v) => {
      const share = (v * CHART.height - CHART.top) / down;
      const [first, last] = panel.range;
      pick(low + ((u * CHART.width - CHART.left) / across) * (high - low), last - share * (last - first));
    },
    release,
  });
  return {
    node: chart.node,
    update(epoch, alpha, active) {
      images.forEach((image, k) => image.setAttribute("visibility", k === active ? "visible" : "hidden"));
      chart.at(alpha);
      const y = chart.y(epochs[epoch]);
      row.setAttribute("y1", y);
      row.setAttribute("y2", y);
      dot.setAttribute("cx", chart.x(alpha));
      dot.setAttribute("cy", y);
    },
  };
}

export default { initialize, render };
