// The path explorer: a slider along the line between two networks. Everything it shows was computed beforehand, so
// it answers within a frame, with a kernel (as an anywidget) or without (in a saved page). Where the slider is let go
// of, a kernel evaluates the network that is there.

import { clamp, exactly, format, initialize, nearest, node, SETTLE_AFTER, slider, stage, stepped, tabs, tell, valueAt } from "./common.js";
import { pathChart, pathRows } from "./charts.js";
import { predictions, unpackImages, unpackShown } from "./pictures.js";

function render({ model, el }) {
  const data = model.get("data");
  const paths = data.paths.map((path) => ({ ...path, shown: path.shown && unpackShown(path.shown) }));
  const images = unpackImages(data.images);
  const [low, high] = [paths[0].alphas[0], paths[0].alphas.at(-1)];
  let [alpha, active, exact] = [0, 0, null];

  const scene = stage({ model, el, name: "lmc-path", draw, rows: () => paths.flatMap(pathRows) });
  const reading = node("div", { class: "lmc-reading" });
  const note = node("span", { class: "lmc-note" });
  const pick = (value) => choose(value, active);
  const names = tabs("path shown", paths, (index) => (choose(alpha, index), values.settle(SETTLE_AFTER)));
  const values = exactly({
    ask: scene.ask,
    note,
    at: () => [paths[active].name, alpha],
    show(answer) {
      exact = answer && { ...answer, shown: answer.shown && unpackShown(answer.shown), images: unpackImages(answer.images) };
      scene.redraw();
    },
    without: () => (paths[active].alphas.includes(alpha) ? "evaluated beforehand" : "interpolated between evaluated points"),
  });
  const step = (count) => stepped(paths[active].alphas, alpha, count);
  const handle = slider({ low, high, label: "position on the path", ends: ["A", "B"], step, pick, release: values.settle });
  const charts = data.panels.map((panel) => pathChart({ panel, paths, low, high, pick, release: values.settle }));
  const shown = paths.some((path) => path.shown) ? predictions(data.unlike?.name) : null;

  const left = node("div", { class: "lmc-left" }, ...charts.map((chart) => chart.node), handle.node);
  const body = node("div", { class: "lmc-body" }, left, ...(shown ? [shown.node] : []));
  scene.show(node("div", { class: "lmc-head" }, names.node, reading, note), body);
  if (!shown) scene.root.classList.add("lmc-narrow");

  function choose(value, index) {
    [alpha, active] = [clamp(value, low, high), index];
    values.moved();
    tell(model, { alpha, active: paths[active].name });
  }

  function draw() {
    const path = paths[active];
    const point = nearest(path.alphas, alpha);
    const lines = describe(path, alpha, exact);
    reading.textContent = lines.join(" · ");
    names.update(active);
    handle.update(alpha, lines.join(", "));
    for (const chart of charts) chart.update(alpha, active, exact?.values);
    // Where decisions are compared, the kernel sends those of the other network first.
    if (exact?.shown) shown?.update(exact.shown, data.unlike ? 1 : 0, exact.images, `α = ${alpha.toFixed(3)}`, 0, exact.differing);
    else shown?.update(path.shown, point, images, `α = ${path.alphas[point].toFixed(3)}`, path.alphas.indexOf(data.unlike?.alpha));
    scene.speak(`${path.name}: ${lines.join(", ")}`);
  }

  function heard() {
    const index = Math.max(0, paths.findIndex((path) => path.name === model.get("active")));
    const told = clamp(model.get("alpha"), low, high);
    if (told === alpha && index === active) return; // the kernel sends back what was just set here
    [alpha, active] = [told, index];
    values.moved();
    values.settle(SETTLE_AFTER);
  }

  scene.listen("alpha", heard);
  scene.listen("active", heard);
  alpha = clamp(model.get("alpha"), low, high);
  active = Math.max(0, paths.findIndex((path) => path.name === model.get("active")));
  values.settle(SETTLE_AFTER);
  return () => {
    values.stop();
    scene.close();
  };
}

function describe(path, alpha, exact) {
  const measures = path.series[path.split];
  const value = (name) => exact?.values[name] ?? valueAt(path.alphas, measures[name], alpha);
  const lines = [`α = ${alpha.toFixed(3)}`, `loss ${format(value("loss"))}`];
  if (measures.accuracy) lines.push(`accuracy ${format(value("accuracy"), 1)} %`);
  return lines;
}

export default { initialize, render };
