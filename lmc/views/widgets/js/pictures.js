// What a network confuses, and the inputs that it gets wrong.

import { bytes, inkOn, node, theme } from "./common.js";

export const TILES = 24;

// Predictions as Python sends them, at one or several points.
export function unpackShown(shown) {
  const { classes, count, confusion, predicted, targets, index } = shown;
  const unpacked = { classes, count, index, targets: bytes(targets), predicted: bytes(predicted) };
  return { ...unpacked, confusion: new Uint32Array(bytes(confusion).buffer) };
}

export function unpackImages(images) {
  if (!images) return null;
  const { height, width, channels, index } = images;
  const place = new Map(index.map((example, i) => [example, i]));
  return { height, width, channels, pixels: bytes(images.pixels), place };
}

export function wrongCount({ confusion, classes }, point) {
  let wrong = 0;
  const start = point * classes * classes;
  for (let i = 0; i < classes * classes; i++) if (i % (classes + 1)) wrong += confusion[start + i];
  return wrong;
}

// The examples decided otherwise than they should be or, given another point, than they are there.
export function differing({ index, targets, predicted }, point, images, other = null) {
  const found = [];
  for (let i = 0; i < index.length; i++) {
    const guess = predicted[point * index.length + i];
    const wanted = other === null ? targets[i] : predicted[other * index.length + i];
    if (guess === wanted || guess === 255 || wanted === 255 || !images.place.has(index[i])) continue;
    found.push({ example: index[i], wanted, guess, target: targets[i] });
  }
  return found;
}

// The confusion matrix and, where inputs are pictures, the wrong ones or, with the name of another network, those decided
// otherwise than by it; `update(shown, point, images, where, other, total)`, shown null: hidden. `other`: its point in `shown`. `tell(answer, where)` shows what the kernel says.
export function predictions(name) {
  const matrix = confusionFigure();
  const tiles = galleryFigure(name);
  const whole = node("div", { class: "lmc-right" }, matrix.node, tiles.node);
  function update(shown, point, images, where, other, total) {
    whole.hidden = !shown;
    if (!shown) return;
    matrix.update(shown, point, where);
    tiles.node.hidden = !images;
    if (images) tiles.update(shown, point, images, name ? other : null, total);
  }
  return {
    node: whole,
    update,
    // Where decisions are compared, the kernel sends those of the other network first.
    tell: ({ shown, images, differing }, where) => update(shown && unpackShown(shown), name ? 1 : 0, unpackImages(images), where, 0, differing),
  };
}

function confusionFigure() {
  const canvas = node("canvas", { class: "lmc-confusion", role: "img" });
  const caption = node("figcaption", {});
  return {
    node: node("figure", { class: "lmc-figure" }, caption, canvas),
    update(shown, point, where) {
      caption.textContent = `confusion at ${where}: true ↓, predicted →`;
      paintConfusion(canvas, shown, point);
      canvas.setAttribute("aria-label", `confusion matrix, ${wrongCount(shown, point)} examples off the diagonal`);
    },
  };
}

function paintConfusion(canvas, { confusion, classes }, point) {
  const side = canvas.clientWidth || 280;
  const ratio = window.devicePixelRatio || 1;
  const dots = Math.round(side * ratio);
  if (canvas.width !== dots || canvas.height !== dots) canvas.width = canvas.height = dots;
  const [ink, paper, right, wrong] = theme(canvas, "--fg", "--bg", "--right", "--wrong");
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, side, side);
  const margin = classes <= 20 ? 20 : 4;
  const cell = (side - margin) / classes;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = `${Math.min(13, 0.52 * cell)}px ${getComputedStyle(canvas).fontFamily}`;
  for (let row = 0; row < classes; row++) {
    const start = (point * classes + row) * classes;
    let total = 0;
    for (let column = 0; column < classes; column++) total += confusion[start + column];
    for (let column = 0; column < classes; column++) {
      const count = confusion[start + column];
      const [px, py] = [margin + column * cell, margin + row * cell];
      // The square root keeps a single mistake visible beside a full row.
      pen.globalAlpha = total ? 0.06 + 0.84 * Math.sqrt(count / total) : 0.06;
      pen.fillStyle = count === 0 ? ink : row === column ? right : wrong;
      if (count === 0) pen.globalAlpha = 0.05;
      pen.fillRect(px + 0.5, py + 0.5, cell - 1, cell - 1);
      pen.globalAlpha = 1;
      if (count === 0 || classes > 12) continue;
      pen.fillStyle = inkOn(blended(pen, row === column ? right : wrong, paper, 0.06 + 0.84 * Math.sqrt(count / total)));
      pen.fillText(count, px + cell / 2, py + cell / 2 + 0.5);
    }
    if (classes > 20) continue;
    pen.fillStyle = ink;
    pen.fillText(row, margin / 2, margin + (row + 0.5) * cell);
    pen.fillText(row, margin + (row + 0.5) * cell, margin / 2);
  }
}

// The colour that is seen where one lies over another, as [r, g, b]; the pen knows every way to write a colour.
function blended(pen, over, under, share) {
  const [top, low] = [over, under].map((colour) => {
    pen.fillStyle = colour;
    return [1, 3, 5].map((i) => parseInt(pen.fillStyle.slice(i, i + 2), 16));
  });
  return top.map((value, i) => share * value + (1 - share) * low[i]);
}

function galleryFigure(name) {
  const caption = node("figcaption", {});
  const grid = node("div", { class: "lmc-tiles" });
  const slots = Array.from({ length: TILES }, () => {
    const canvas = node("canvas", {});
    const label = node("span", {});
    const tile = node("div", { class: "lmc-tile" }, canvas, label);
    grid.append(tile);
    return { tile, label, canvas, example: -1 };
  });
  let known = null; // whose pictures the slots hold
  return {
    node: node("figure", { class: "lmc-figure" }, caption, grid),
    update(shown, point, images, other, counted) {
      const all = differing(shown, point, images, other);
      const wrong = all.slice(0, TILES);
      const total = name ? (counted ?? all.length) : wrongCount(shown, point);
      const part = wrong.length < total ? ` (${wrong.length} shown)` : "";
      const whole = name && counted === undefined ? shown.index.length : shown.count;
      caption.textContent = name
        ? `${total} of ${whole} decided otherwise than by ${name}${part}: ${name} → here, ✓ right`
        : `${total} of ${shown.count} wrong${part}: true → predicted`;
      slots.forEach((slot, i) => {
        slot.tile.hidden = i >= wrong.length;
        if (i >= wrong.length) return;
        const { example, wanted, guess, target } = wrong[i];
        slot.label.textContent = name ? `${wanted}→${guess}${guess === target ? " ✓" : ""}` : `${wanted} → ${guess}`;
        if (known === images && slot.example === example) return;
        slot.example = example;
        [slot.canvas.width, slot.canvas.height] = [images.width, images.height];
        slot.canvas.getContext("2d").putImageData(picture(images, example), 0, 0);
      });
      known = images;
    },
  };
}

function picture({ height, width, channels, pixels, place }, example) {
  const made = new ImageData(width, height);
  const start = place.get(example) * height * width * channels;
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) made.data[4 * i + c] = pixels[start + i * channels + (channels === 3 ? c : 0)];
    made.data[4 * i + 3] = 255;
  }
  return made;
}
