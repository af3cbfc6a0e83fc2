// The training-time explorer: the path between two runs at one epoch, the barrier over all epochs, and the landscape as it
// changes, epoch by epoch. All of it was computed beforehand; where a slider is let go of, a kernel evaluates the network.

import {
  clamp, colourScale, drag, format, initialize, nearest, node, oneOf, origin, player, SETTLE_AFTER, shape, slider, stage, stepped, tabs,
} from "./common.js";
import { CHART, frame, lineChart, pathChart, pathLines, pathRows } from "./charts.js";
import { heatMap, rangeOf } from "./grid.js";
import { predictions } from "./pictures.js";

const PACE = 700; // milliseconds an epoch stays while playing

function render({ model, el }) {
  const data = model.get("data");
  const { epochs, runs } = data;
  const alphas = runs[0].paths[0].alphas;
  const [low, high] = [alphas[0], alphas.at(-1)];
  const now = () => epochs.indexOf(scene.place.epoch);
  let drawn = {};

  const scene = stage({
    model, el, draw,
    name: "lmc-epochs",
    rows: () => runs.flatMap(({ paths }) => paths.flatMap((path, i) => pathRows(path).map((row) => ({ epoch: epochs[i], ...row })))),
    traits: { epoch: oneOf(epochs), alpha: (value) => clamp(value, low, high), active: oneOf(runs) },
    exact: { at: ({ active, epoch, alpha }) => [active, epoch, alpha], without: ({ alpha }) => origin(alphas, alpha) },
    told: (answer) => answer && shown.tell(answer, `epoch ${scene.place.epoch}, α = ${scene.place.alpha.toFixed(3)}`),
  });
  const names = tabs("path shown", runs, (active) => scene.go({ active }, SETTLE_AFTER));
  const last = epochs.length - 1;
  const steps = epochs.map((_, i) => (last ? i / last : 1));
  const show = (epoch) => epoch !== scene.place.epoch && scene.go({ epoch });
  const go = (share) => show(epochs[Math.floor(share * last + 1e-9)]);
  const play = player({ text: "train", duration: PACE * last, steps, at: () => steps[now()], go, rest: scene.rest });
  const wait = (value, more) => (play.stop(), scene.go({ epoch: epochs[nearest(epochs, value)], ...more }));
  const walk = { low, high, pick: (alpha) => scene.go({ alpha }), release: scene.rest };
  const paths = () => runs.map((run) => run.paths[now()]);
  const charts = data.panels.map((panel) => pathChart({ ...walk, panel, paths: paths() }));
  const along = slider({ ...walk, label: "position on the path", ends: ["A", "B"], step: (n) => stepped(alphas, scene.place.alpha, n) });
  const lines = runs.map(({ name, colour, dash, barriers }) => ({ name, colour, dash, values: barriers }));
  const [first, end] = ends(epochs);
  const choose = { pick: (epoch) => wait(epoch), release: scene.rest };
  const over = lineChart({ ...choose, panel: data.barrier, grid: epochs, lines, low: first, high: end, marks: marksOf(epochs, 0.045) });
  const time = slider({ ...choose, low: epochs[0], high: epochs.at(-1), label: "epoch", step: (n) => epochs[clamp(now() + n, 0, last)] });
  const land = landscape(data, (alpha, epoch) => wait(epoch, { alpha }), scene.rest);
  const shown = predictions();

  shown.node.hidden = true;
  const left = node("div", {}, ...charts.map((chart) => chart.node), along.node);
  const pair = node("div", { class: "lmc-pair" }, left, node("div", {}, over.node, time.node, land.node));
  const heads = [[names.node, play.node], [scene.reading, scene.note]].map((parts) => node("div", { class: "lmc-head" }, ...parts));
  scene.show(...heads, pair, shown.node);

  function draw() {
    const { epoch, alpha, active } = scene.place;
    const index = runs.findIndex((run) => run.name === active);
    const run = runs[index];
    const barrier = `barrier ${format(run.barriers[now()], 2)} ${data.unit}`;
    const lines = [`epoch ${epoch}`, ...pathLines(run.paths[now()], alpha, scene.exact), barrier];
    scene.say(lines, active);
    names.update(active);
    along.update(alpha, `α = ${alpha.toFixed(3)}`);
    time.update(epoch, lines.join(", "));
    for (const chart of charts) {
      if (drawn.epoch !== epoch) chart.redraw(paths());
      if (drawn.active !== active) chart.trail(run.paths);
      chart.update(alpha, index, scene.exact?.values);
    }
    over.update(epoch, active);
    land.update(now(), alpha, index);
    shown.node.classList.toggle("lmc-faded", !scene.exact);
    drawn = { epoch, active };
  }

  return () => {
    play.stop();
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
