// The sliders of a mixture: one for the share of each model, under the curve that the measure follows as it moves.

import { clamp, fit, format, node, SETTLE_AFTER, theme } from "./common.js";
import { withShare } from "./simplex_geometry.js";

const PROFILE = 41; // points of the curve above a slider

export function mixturePanel(data, move, release) {
  const bar = node("div", { class: "lmc-mix-bar", "aria-hidden": true });
  const pieces = data.names.map((_, i) => node("span", { style: `background: ${data.colours[i]}` }));
  bar.append(...pieces);
  const excess = node("p", { class: "lmc-mix-excess" });
  let now = data.names.map(() => 0);
  const rows = data.names.map((name, i) => {
    const canvas = node("canvas", { class: "lmc-mix-profile", "aria-hidden": true });
    const input = node("input", { type: "range", min: 0, max: 1, step: "any", "aria-label": `share of ${name}` });
    const share = node("output", {});
    input.addEventListener("input", () => move(withShare(now, i, input.valueAsNumber)));
    input.addEventListener("change", () => release());
    input.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5 }[event.key];
      const end = { Home: 0, End: 1 }[event.key];
      if (!step && end === undefined) return;
      event.preventDefault();
      move(withShare(now, i, end ?? now[i] + 0.02 * step));
      release(SETTLE_AFTER);
    });
    const label = node("span", { class: "lmc-mix-name" }, name);
    return { canvas, input, share, node: node("label", { class: "lmc-mix-row", style: `--c: ${data.colours[i]}` }, label, node("div", {}, canvas, input), share) };
  });
  return {
    node: node("div", { style: `--longest: ${Math.max(...data.names.map((name) => name.length)) + 3}ch` }, bar, excess, ...rows.map((row) => row.node)),
    update({ shares, shown, split, value, text }) {
      now = shares;
      const own = data.own[split][shown.name];
      const mean = shares.reduce((sum, share, i) => sum + share * own[i], 0);
      const gap = value - mean;
      const digits = shown.digits;
      excess.textContent =
        `the models' mean is ${format(mean, digits)}${shown.unit}, ` +
        `this soup ${format(Math.abs(gap), digits)} ${gap >= 0 ? "above" : "below"}`;
      rows.forEach((row, i) => {
        pieces[i].style.flexGrow = shares[i];
        row.share.textContent = shares[i].toFixed(2);
        if (row.input.valueAsNumber !== shares[i]) row.input.value = shares[i];
        row.input.setAttribute("aria-valuetext", `${Math.round(100 * shares[i])} percent; ${text}`);
        drawProfile(row.canvas, data, shown, split, shares, i);
      });
    },
  };
}

// What the measure does as this share goes from 0 to 1, the others in proportion.
function drawProfile(canvas, data, shown, split, shares, model) {
  const { pen, width, height } = fit(canvas);
  if (!width) return;
  const [rule] = theme(canvas, "--rule");
  const values = data.series[split][shown.name];
  const x = (share) => 8 + (width - 16) * share;
  const y = (value) => height - 4 - (height - 9) * clamp(shown.place(value), 0, 1);
  pen.fillStyle = rule;
  pen.fillRect(8, height - 1, width - 16, 1);
  pen.beginPath();
  for (let i = 0; i < PROFILE; i++) {
    const share = i / (PROFILE - 1);
    const value = data.at(values, withShare(shares, model, share));
    if (Number.isFinite(value)) pen.lineTo(x(share), y(value));
  }
  [pen.strokeStyle, pen.lineWidth, pen.lineJoin] = [data.colours[model], 2.5, "round"];
  pen.stroke();
  const here = data.at(values, shares);
  if (!Number.isFinite(here)) return;
  pen.beginPath();
  pen.arc(x(shares[model]), y(here), 4.5, 0, 2 * Math.PI);
  pen.fillStyle = "#d55e00";
  pen.fill();
}
