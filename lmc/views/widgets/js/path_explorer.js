// The path explorer: a slider along the line between two networks. Everything it shows was computed beforehand, so
// it answers within a frame, with a kernel (as an anywidget) or without (in a saved page). Where the slider is let go
// of, a kernel evaluates the network that is there.

import { clamp, initialize, nearest, node, oneOf, origin, SETTLE_AFTER, slider, stage, stepped, tabs } from "./common.js";
import { pathChart, pathLines, pathRows } from "./charts.js";
import { predictions, unpackImages, unpackShown } from "./pictures.js";

function render({ model, el }) {
  const data = model.get("data");
  const paths = data.paths.map((path) => ({ ...path, shown: path.shown && unpackShown(path.shown) }));
  const images = unpackImages(data.images);
  const [low, high] = [paths[0].alphas[0], paths[0].alphas.at(-1)];
  const alphasOf = (name) => paths.find((path) => path.name === name).alphas;
  const scene = stage({
    model, el, draw,
    name: "lmc-path",
    rows: () => paths.flatMap(pathRows),
    traits: { alpha: (value) => clamp(value, low, high), active: oneOf(paths) },
    exact: { at: ({ active, alpha }) => [active, alpha], without: ({ active, alpha }) => origin(alphasOf(active), alpha) },
  });
  const names = tabs("path shown", paths, (active) => scene.go({ active }, SETTLE_AFTER));
  const along = { low, high, pick: (alpha) => scene.go({ alpha }), release: scene.rest };
  const step = (count) => stepped(alphasOf(scene.place.active), scene.place.alpha, count);
  const handle = slider({ ...along, label: "position on the path", ends: ["A", "B"], step });
  const charts = data.panels.map((panel) => pathChart({ ...along, panel, paths }));
  const shown = paths.some((path) => path.shown) ? predictions(data.unlike?.name) : null;

  const left = node("div", { class: "lmc-left" }, ...charts.map((chart) => chart.node), handle.node);
  const body = node("div", { class: "lmc-body" }, left, ...(shown ? [shown.node] : []));
  scene.show(node("div", { class: "lmc-head" }, names.node, scene.reading, scene.note), body);
  if (!shown) scene.root.classList.add("lmc-narrow");

  function draw() {
    const { alpha, active } = scene.place;
    const index = paths.findIndex((path) => path.name === active);
    const path = paths[index];
    const lines = pathLines(path, alpha, scene.exact);
    scene.say(lines, active);
    names.update(active);
    handle.update(alpha, lines.join(", "));
    for (const chart of charts) chart.update(alpha, index, scene.exact?.values);
    const point = nearest(path.alphas, alpha);
    const other = path.alphas.indexOf(data.unlike?.alpha);
    if (scene.exact?.shown) shown?.tell(scene.exact, `α = ${alpha.toFixed(3)}`);
    else shown?.update(path.shown, point, images, `α = ${path.alphas[point].toFixed(3)}`, other);
  }

  return scene.close;
}

export default { initialize, render };
