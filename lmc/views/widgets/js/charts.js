// Curves of a measure between two networks, with a cursor that can be dragged.

import { drag, format, node, rgb, shape, valueAt } from "./common.js";

export const CHART = { width: 520, height: 262, left: 66, right: 26, top: 34, bottom: 40 }; // room for the letters of a phone

// An empty chart: a title, ticks and grid lines, and the places of values. `panel` has title, range and ticks.
export function frame({ panel, low, high, marks, names = (value) => String(value) }) {
  const { width, height, left, right, top, bottom } = CHART;
  const [from, to] = panel.range;
  const x = (value) => left + ((width - left - right) * (value - low)) / (high - low);
  const y = (value) => height - bottom - ((height - top - bottom) * (value - from)) / (to - from);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "lmc-chart", role: "img", "aria-label": panel.title });
  svg.append(shape("text", { x: 4, y: 17, class: "lmc-title" }, panel.title));
  for (const tick of panel.ticks) {
    svg.append(shape("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "lmc-grid" }));
    svg.append(shape("text", { x: left - 7, y: y(tick) + 4.5, class: "lmc-tick", "text-anchor": "end" }, String(tick)));
  }
  for (const mark of marks) {
    const at = { x: x(mark), y: height - 12, class: "lmc-tick", "text-anchor": "middle" };
    svg.append(shape("text", at, names(mark)));
  }
  const cursor = shape("line", { y1: top - 4, y2: height - bottom, class: "lmc-cursor" });
  svg.append(cursor);
  return {
    node: svg,
    cursor,
    x,
    y,
    at(value) {
      cursor.setAttribute("x1", x(value));
      cursor.setAttribute("x2", x(value));
    },
    dragged(pick, release) {
      const move = (share) => pick(low + ((share * width - left) / (width - left - right)) * (high - low));
      drag(svg, { move, release });
    },
  };
}

// The numbers of a path, a row for each split and point.
export function pathRows({ name, alphas, series }) {
  const values = (measures, i) => Object.fromEntries(Object.entries(measures).map(([measure, found]) => [measure, found[i]]));
  return Object.entries(series).flatMap(([split, measures]) => alphas.map((alpha, i) => ({ path: name, split, alpha, ...values(measures, i) })));
}

// What is said of a place on a path; `exact` is the kernel's answer there, if it gave one.
export function pathLines({ alphas, series, split }, alpha, exact) {
  const value = (name) => exact?.values[name] ?? valueAt(alphas, series[split][name], alpha);
  const accuracy = series[split].accuracy ? [`accuracy ${format(value("accuracy"), 1)} %`] : [];
  return [`α = ${alpha.toFixed(3)}`, `loss ${format(value("loss"))}`, ...accuracy];
}

// Lines over a grid, { name, colour, dash, values }, with dots where they were evaluated; `update` moves the cursor.
export function lineChart({ panel, grid, lines, low, high, marks, pick, release }) {
  const chart = frame({ panel, low, high, marks });
  const groups = lines.map(({ colour, dash, values }) => {
    const group = shape("g", { style: `--c: ${colour}; --dash: ${dash}` });
    group.append(shape("polyline", { class: "lmc-line", points: track(grid, values, chart.x, chart.y) }));
    const dots = values.map((value, i) => {
      const dot = shape("circle", { class: "lmc-dot", cx: chart.x(grid[i]), cy: value === null ? 0 : chart.y(value) });
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
    update(at, active) {
      chart.at(at);
      groups.forEach(({ group, dots }, k) => {
        group.classList.toggle("lmc-faded", lines[k].name !== active);
        dots.forEach((dot, i) => dot.setAttribute("r", grid[i] === at ? 6.5 : 3.5));
      });
    },
  };
}

// The paths of one measure over alpha; `update` moves the cursor, `redraw` takes other paths of the same names.
export function pathChart({ panel, paths, low, high, pick, release }) {
  const chart = frame({ panel, low, high, marks: [0, 0.25, 0.5, 0.75, 1] });
  const groups = paths.map((path) => drawPath(path, panel, chart));
  const behind = shape("g", {});
  chart.node.append(behind, ...groups.map((group) => group.node));
  chart.dragged(pick, release);
  const label = () => groups.forEach((group) => group.label(groups.flatMap((each) => each.tracks())));
  label();
  return {
    node: chart.node,
    redraw(others) {
      others.forEach((path, i) => groups[i].redraw(path));
      label();
    },
    // Further paths, thin and behind the others.
    trail(others) {
      const points = ({ alphas, series, split }) => track(alphas, series[split][panel.measure], chart.x, chart.y);
      const look = (path) => ({ class: "lmc-trail", style: `--c: ${path.colour}`, points: points(path) });
      behind.replaceChildren(...others.map((path) => shape("polyline", look(path))));
    },
    update(alpha, active, exact) {
      chart.at(alpha);
      groups.forEach((group, i) => group.update(alpha, i === active, i === active ? exact?.[panel.measure] : undefined));
    },
  };
}

function drawPath(first, panel, { x, y }) {
  let path = first;
  const group = shape("g", { style: `--c: ${path.colour}; --dash: ${path.dash}` });
  const lines = Object.keys(path.series).map((split) => {
    const line = shape("polyline", { class: split === path.split ? "lmc-line" : "lmc-line lmc-other" });
    group.append(line);
    return [split, line];
  });
  const arrow = shape("g", { class: "lmc-barrier" });
  const dot = shape("circle", { r: 5.5, class: "lmc-dot" });
  group.append(arrow, dot);

  function redraw(next) {
    path = next;
    for (const [split, line] of lines) line.setAttribute("points", track(path.alphas, path.series[split][panel.measure], x, y));
    arrow.replaceChildren(...barrierArrow(path.barriers[panel.measure], x, y));
  }
  const tracks = () => lines.map(([, line]) => line.getAttribute("points").split(" ").map((point) => point.split(",").map(Number)));
  function label(others) {
    if (!arrow.firstChild) return;
    const { text } = path.barriers[panel.measure];
    const place = clear(arrow.firstChild, 9.4 * text.length, others); // as wide as on a phone
    if (place) arrow.append(shape("text", place, text));
  }
  redraw(first);
  return {
    node: group,
    redraw,
    tracks,
    label,
    update(alpha, chosen, exact) {
      group.classList.toggle("lmc-faded", !chosen);
      const value = exact ?? valueAt(path.alphas, path.series[path.split][panel.measure], alpha);
      dot.setAttribute("visibility", value === null ? "hidden" : "visible");
      if (value === null) return;
      dot.setAttribute("cx", x(alpha));
      dot.setAttribute("cy", y(value));
    },
  };
}

// Points of a polyline; what was not evaluated (null) is left out.
export function track(grid, values, x, y) {
  const points = grid.map((at, i) => [at, values[i]]).filter(([, value]) => value !== null);
  return points.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
}

function barrierArrow(barrier, x, y) {
  if (!barrier || Math.abs(y(barrier.top) - y(barrier.base)) <= 8) return [];
  const at = x(barrier.alpha);
  return [shape("line", { x1: at, x2: at, y1: y(barrier.base), y2: y(barrier.top) })];
}

// Where a text at an arrow stands on no line: right or left of it, or across where it ends; null if nowhere near.
function clear(arrow, width, tracks) {
  const [at, from, to] = ["x1", "y1", "y2"].map((name) => Number(arrow.getAttribute(name)));
  const middle = 0.5 * (from + to);
  const heights = Array.from({ length: 60 }, (_, i) => middle + (i % 2 ? -1 : 1) * 3 * Math.ceil(i / 2));
  for (const y of heights.filter((height) => height > CHART.top + 10 && height < CHART.height - CHART.bottom - 10)) {
    const beyond = y < Math.min(from, to) - 12 || y > Math.max(from, to) + 12;
    for (const x of [at + 9, at - 9 - width, ...(beyond ? [at - width / 2] : [])]) {
      const inside = x > CHART.left && x + width < CHART.width - CHART.right;
      if (inside && !tracks.some((points) => crosses(points, [x - 3, x + width + 3], [y - 9, y + 9]))) return { x, y: y + 5 };
    }
  }
  return null;
}

// Whether a polyline enters a box; steps are shorter than the box is high.
function crosses(points, [left, right], [top, bottom]) {
  for (let i = 1; i < points.length; i++) {
    const [[x, y], [u, v]] = [points[i - 1], points[i]];
    const steps = Math.ceil(Math.hypot(u - x, v - y) / 6) || 1;
    for (let k = 0; k <= steps; k++) {
      const [px, py] = [x + ((u - x) * k) / steps, y + ((v - y) * k) / steps];
      if (px >= left && px <= right && py >= top && py <= bottom) return true;
    }
  }
  return false;
}

// ---- on canvases: a bar of colours, and a point

// `colour(share)` from 0 below to 1 above; marks are [share, text].
export function colourBar(pen, { x, y, height, colour, marks, title, ink, soft }) {
  for (let i = 0; i < height; i++) {
    pen.fillStyle = rgb(colour(1 - (i + 0.5) / height));
    pen.fillRect(x, y + i, 13, 1.5);
  }
  [pen.textAlign, pen.textBaseline, pen.fillStyle] = ["left", "alphabetic", soft];
  for (const [share, text] of marks) {
    pen.fillRect(x + 13, y + (1 - share) * height - 0.5, 4, 1);
    pen.fillText(text, x + 20, y + (1 - share) * height + 4.5);
  }
  pen.save();
  pen.translate(x + 60, y + height / 2);
  pen.rotate(-Math.PI / 2);
  [pen.textAlign, pen.fillStyle] = ["center", ink];
  pen.fillText(title, 0, 0);
  pen.restore();
}

// The point that is dragged; `hollow` where it is not quite there. Or another disc.
export function spot(pen, x, y, { hollow = false, radius = 9, fill = hollow ? "rgba(213, 94, 0, 0.25)" : "rgba(213, 94, 0, 0.9)", edge = hollow ? "#d55e00" : "#fff", width = 3 } = {}) {
  const ring = (size, tint, stroke, line) => {
    pen.beginPath();
    pen.arc(x, y, size, 0, 2 * Math.PI);
    [pen.fillStyle, pen.strokeStyle, pen.lineWidth] = [tint, stroke, line];
    pen.fill();
    pen.stroke();
  };
  ring(radius, fill, edge, width);
  if (edge === "#fff") ring(radius + 1.5, "transparent", "#222", 1);
}
