// A surface over a rectangular grid, painted from back to front on a plain canvas, that can be turned.

import { clamp, rgb } from "./common.js";
import { valueIn } from "./grid.js";

const CELLS = 56; // most along a side that are painted, so that turning keeps up with the hand
const TALL = 0.8; // height of the surface over half its larger side
const NEAR = 0.16; // how much smaller far things are
const LIGHT = [-0.45, -0.35, 0.82];

// Lines and points in space to the screen. `heights` are 0 to 1 over the grid { x, y, values }; yaw and pitch in radians.
export function view({ x, y }, { yaw, pitch }, width, height) {
  const [middleX, middleY] = [0.5 * (x[0] + x.at(-1)), 0.5 * (y[0] + y.at(-1))];
  const half = 0.5 * Math.max(x.at(-1) - x[0], y.at(-1) - y[0]);
  const [sy, cy, sp, cp] = [Math.sin(yaw), Math.cos(yaw), Math.sin(pitch), Math.cos(pitch)];
  const radius = Math.hypot(x.at(-1) - x[0], y.at(-1) - y[0]) / (2 * half);
  const size = Math.min(width / (2.25 * radius), height / (1.5 * radius + 0.45)); // no corner leaves the picture
  return {
    toViewer: [-sy * half, -cy * half, sp / cp], // one step over the ground, and how much a line of sight rises on it
    place(px, py, h) {
      const [u, v, w] = [(px - middleX) / half, (py - middleY) / half, TALL * (h - 0.42)];
      const far = u * sy + v * cy;
      const scale = size / (1 + NEAR * (far * cp - w * sp));
      return [width / 2 + scale * (u * cy - v * sy), height / 2 - scale * (w * cp + far * sp)];
    },
    // Rows and columns from far to near: a height field painted in this order hides what it should.
    order: (count, alongX) => {
      const backwards = (alongX ? sy : cy) > 0;
      return Array.from({ length: count }, (_, i) => (backwards ? count - 1 - i : i));
    },
  };
}

// Whether the surface stands between a point on it and the eye.
export function hidden(field, { toViewer: [dx, dy, rise] }, px, py, h) {
  for (let step = 1; step <= 40; step++) {
    const t = 0.03 * step;
    const [qx, qy] = [px + t * dx, py + t * dy];
    if (qx < field.x[0] || qx > field.x.at(-1) || qy < field.y[0] || qy > field.y.at(-1)) return false;
    if (valueIn(field, qx, qy) > h + (t * rise) / TALL + 0.012) return true;
  }
  return false;
}

// Paints the heights of `field` (values 0 to 1); `colour(h)` gives [r, g, b]. `ink` is for the floor's outline.
export function paintSurface(pen, field, eye, colour, ink) {
  const { x, y, values } = field;
  floor(pen, field, eye, ink);
  const [columns, rows] = [thinned(x.length), thinned(y.length)];
  const screen = rows.map((j) => columns.map((i) => eye.place(x[i], y[j], values[j * x.length + i])));
  pen.lineWidth = 0.7;
  pen.lineJoin = "round";
  for (const r of eye.order(rows.length - 1, false)) {
    for (const c of eye.order(columns.length - 1, true)) {
      const [i, k, j, l] = [columns[c], columns[c + 1], rows[r], rows[r + 1]];
      const heights = [[i, j], [k, j], [k, l], [i, l]].map(([a, b]) => values[b * x.length + a]);
      const mean = 0.25 * (heights[0] + heights[1] + heights[2] + heights[3]);
      if (Number.isNaN(mean)) continue;
      const slopeX = (heights[1] + heights[2] - heights[0] - heights[3]) / (x[k] - x[i]);
      const slopeY = (heights[2] + heights[3] - heights[0] - heights[1]) / (y[l] - y[j]);
      const shade = lit(slopeX, slopeY, x.at(-1) - x[0]);
      const tint = colour(mean).map((value) => Math.round(clamp(value * shade, 0, 255)));
      pen.beginPath();
      for (const [px, py] of [screen[r][c], screen[r][c + 1], screen[r + 1][c + 1], screen[r + 1][c]]) pen.lineTo(px, py);
      pen.closePath();
      pen.fillStyle = rgb(tint);
      pen.strokeStyle = rgb(tint.map((value) => Math.round(0.86 * value)));
      pen.fill();
      pen.stroke();
    }
  }
}

// How bright a slope is, 1 where it is level.
function lit(slopeX, slopeY, side) {
  const [u, v] = [-0.25 * TALL * side * slopeX, -0.25 * TALL * side * slopeY];
  const bright = (u * LIGHT[0] + v * LIGHT[1] + LIGHT[2]) / Math.hypot(u, v, 1);
  return clamp(0.62 + 0.46 * bright, 0.55, 1.08);
}

function thinned(count) {
  const step = Math.ceil((count - 1) / CELLS);
  const kept = Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
  return kept.at(-1) === count - 1 ? kept : [...kept, count - 1];
}

function floor(pen, { x, y }, eye, ink) {
  pen.strokeStyle = ink;
  pen.lineWidth = 1;
  pen.beginPath();
  for (const [px, py] of [[x[0], y[0]], [x.at(-1), y[0]], [x.at(-1), y.at(-1)], [x[0], y.at(-1)]]) pen.lineTo(...eye.place(px, py, 0));
  pen.closePath();
  pen.stroke();
}
