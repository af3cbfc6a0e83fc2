// The merge mixer: a slider for each model and group of layers, and a bar for each task. A kernel merges and evaluates
// while the sliders move, the latest position first; until it answers, and where there is none, bars are interpolated in
// a grid over the coefficients of whole models.

import { buttons, format, initialize, node, stage, tell } from "./common.js";

function render({ model, el }) {
  const data = model.get("data");
  let rows = copy(model.get("coefficients"));
  let [exact, busy, stale, alone] = [null, false, false, false];

  const scene = stage({ model, el, name: "lmc-mixer", draw, rows: () => gridRows(data) });
  const { reading, note } = scene;
  const desk = mixingDesk(data, set);
  const bars = taskBars(data);
  const places = settings(data).map(([text, title, values]) => [text, title, () => move(data.groups.map(() => [...values]))]);
  const body = node("div", { class: "lmc-mixer-body" }, node("div", {}, desk.node, buttons(...places)), bars.node);
  scene.show(node("div", { class: "lmc-head" }, reading, note), body);

  // `group` is null for the slider of the whole model.
  function set(group, index, value) {
    move(rows.map((row, g) => row.map((old, i) => (i === index && (group === null || g === group) ? value : old))));
  }

  function move(next) {
    rows = next;
    exact = null;
    scene.redraw();
    tell(model, { coefficients: rows });
    request();
  }

  function request() {
    if (busy) return void (stale = true);
    [busy, stale] = [true, false];
    const place = copy(rows);
    scene.ask(
      { place },
      (answer) => {
        [busy, alone] = [false, Boolean(answer.error)];
        exact = answer.error ? null : answer.values;
        if (stale) request();
        scene.redraw();
      },
      () => {
        [busy, alone] = [false, true];
        scene.redraw();
      },
    );
  }

  function draw() {
    const whole = data.names.map((_, i) => rows.every((row) => row[i] === rows[0][i]));
    const between = whole.every(Boolean) ? interpolated(data, rows[0]) : null;
    const values = exact ?? between;
    desk.update(rows, whole, alone);
    bars.update(values);
    const said = values ? summary(data, values) : alone ? "not evaluated: needs a kernel" : "evaluating";
    reading.replaceChildren(node("b", {}, said));
    note.dataset.state = exact ? "exact" : alone ? "static" : "between";
    const rough = !values ? "" : alone ? "interpolated; layers need a kernel" : "interpolated";
    note.textContent = exact ? "exact, from the kernel" : rough;
    scene.speak(said.replaceAll("%", "percent"));
  }

  scene.listen("coefficients", () => {
    const told = model.get("coefficients");
    if (JSON.stringify(told) === JSON.stringify(rows)) return;
    rows = copy(told);
    exact = null;
    scene.redraw();
    request();
  });
  draw();
  request();
  return scene.close;
}

function copy(rows) {
  return rows.map((row) => [...row]);
}

// Text of a button, what it says when pointed at, the coefficients it sets.
function settings(data) {
  const count = data.names.length;
  const all = (value) => data.names.map(() => value);
  return [
    ["base", "all coefficients 0", all(0)],
    ["average", `all coefficients 1/${count}`, all(Number((1 / count).toFixed(4)))],
    ["sum", "all coefficients 1", all(1)],
    ["best of the grid", "the best mean among the mixtures evaluated beforehand", data.best],
    ...data.names.map((name, i) => [`${name} alone`, `the fine-tuned model ${name}`, data.names.map((_, j) => Number(i === j))]),
  ];
}

// What was evaluated beforehand: a row for each combination of levels.
function gridRows({ names, levels, tasks, measures, grid }) {
  return Array.from({ length: grid.length / tasks.length }, (_, row) => {
    const level = (i) => levels[Math.floor(row / levels.length ** (names.length - 1 - i)) % levels.length];
    const coefficients = names.map((name, i) => [`coefficient of ${name}`, level(i)]);
    const scores = tasks.map((task, t) => [`${measures[t].name} on ${task}`, grid[row * tasks.length + t]]);
    return Object.fromEntries([...coefficients, ...scores]);
  });
}

// A value with its unit.
function shown(measure, value) {
  return `${format(value, measure.digits)} ${measure.unit}`.trim();
}

// The mean over tasks of one measure; else the value of each task.
function summary(data, values) {
  const [first] = data.measures;
  if (data.measures.every(({ name, unit }) => name === first.name && unit === first.unit))
    return `mean ${first.name} ${shown(first, values.reduce((sum, value) => sum + value, 0) / values.length)}`;
  return data.tasks.map((task, t) => `${task}: ${data.measures[t].name} ${shown(data.measures[t], values[t])}`).join(", ");
}

// Measures of the tasks, linear in each coefficient between the levels of the grid; null beyond it.
function interpolated(data, coefficients) {
  const { levels, tasks } = data;
  if (levels.length < 2 || coefficients.some((c) => c < levels[0] || c > levels.at(-1))) return null;
  let corners = [[0, 1]]; // flat place in the grid, share
  for (const c of coefficients) {
    const low = Math.max(0, Math.min(levels.length - 2, levels.findLastIndex((level) => level <= c)));
    const share = (c - levels[low]) / (levels[low + 1] - levels[low]);
    corners = corners.flatMap(([place, weight]) => [
      [place * levels.length + low, weight * (1 - share)],
      [place * levels.length + low + 1, weight * share],
    ]);
  }
  const used = corners.filter(([, weight]) => weight > 0);
  return tasks.map((_, t) => used.reduce((sum, [place, weight]) => sum + weight * data.grid[place * tasks.length + t], 0));
}

// ---- the desk: a column of sliders for each model, a row for the whole model and one for each group of layers

function mixingDesk(data, set) {
  const desk = node("div", {
    class: "lmc-mixer-desk",
    style: `--models: ${data.names.length}`,
  });
  const cells = [];
  desk.append(node("span", { class: "lmc-mixer-corner" }));
  data.names.forEach((name, i) => desk.append(node("b", { class: "lmc-mixer-name", style: `--c: ${data.colours[i]}` }, name)));
  for (const group of [null, ...data.groups.keys()]) {
    const label = group === null ? "all layers" : data.groups[group];
    desk.append(node(group === null ? "b" : "span", { class: "lmc-mixer-label" }, label));
    data.names.forEach((name, i) => {
      const input = node("input", {
        type: "range", min: 0, max: data.top, step: 0.05, "aria-label": `coefficient of ${name}, ${label}`,
      });
      const output = node("output", {});
      input.addEventListener("input", () => set(group, i, input.valueAsNumber));
      desk.append(node("div", { class: "lmc-mixer-cell", style: `--c: ${data.colours[i]}` }, input, output));
      cells.push({ group, index: i, input, output });
    });
  }
  return {
    node: desk,
    update(rows, whole, alone) {
      for (const { group, index, input, output } of cells) {
        const value = group === null ? rows.reduce((sum, row) => sum + row[index], 0) / rows.length : rows[group][index];
        if (input.valueAsNumber !== value) input.value = value;
        output.textContent = group === null && !whole[index] ? "mixed" : format(value, 2);
        input.disabled = alone && group !== null;
      }
    },
  };
}

// ---- a bar for each task, with marks for the base and for the best single model

function taskBars(data) {
  const grid = node("div", { class: "lmc-mixer-bars" });
  const own = data.own.slice(0, -1);
  const rows = data.tasks.map((task, t) => {
    const colour = data.names.indexOf(task) < 0 ? "#0072B2" : data.colours[data.names.indexOf(task)];
    const fill = node("span", {});
    const measure = data.measures[t];
    const [best, base] = [(measure.higher ? Math.max : Math.min)(...own.map((scores) => scores[t])), data.own.at(-1)[t]];
    const width = (value) => Math.max(0, Math.min(100, (100 * value) / measure.full));
    const marks = [
      node("i", { style: `left: ${width(best)}%`, title: `best single model: ${shown(measure, best)}` }),
      node("i", { class: "lmc-mixer-base", style: `left: ${width(base)}%`, title: `base: ${shown(measure, base)}` }),
    ];
    const output = node("output", {});
    grid.append(node("span", {}, task), node("div", { class: "lmc-mixer-bar", style: `--c: ${colour}` }, fill, ...marks), output);
    return { fill, output, measure, width };
  });
  const named = [...new Set(data.measures.map(({ name, higher }) => (higher ? name : `${name} (lower is better)`)))].join(", ");
  const key = node("p", { class: "lmc-mixer-key" }, `${named} on each task; solid mark: best single model, dotted: base`);
  return {
    node: node("div", {}, grid, key),
    update(values) {
      rows.forEach(({ fill, output, measure, width }, t) => {
        fill.style.width = `${values ? width(values[t]) : 0}%`;
        output.textContent = values ? shown(measure, values[t]) : "–";
      });
    },
  };
}

export default { initialize, render };
