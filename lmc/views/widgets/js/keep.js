// What an explorer shows, to keep: a picture of it (SVG, PNG), and its numbers as a table (CSV).

const SKIPPED = ".lmc-spoken, .lmc-keep";
const DRAWN = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "visibility", "display",
  "font-family", "font-size", "font-weight", "text-anchor", "paint-order"];
const SHARP = 2; // pixels of a PNG for each of the screen

// Three buttons. `rows()` gives the numbers, a list of { column: value }; files are called `name`.
export function keepers(root, name, rows) {
  const bar = document.createElement("div");
  bar.className = "lmc-keep";
  bar.append("save ");
  const kinds = {
    PNG: async () => download(`${name}.png`, await rasterised(drawing(root))),
    SVG: () => download(`${name}.svg`, new Blob([serialised(drawing(root))], { type: "image/svg+xml" })),
    CSV: () => download(`${name}.csv`, new Blob([table(rows())], { type: "text/csv" })),
  };
  for (const [kind, act] of Object.entries(kinds)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kind;
    button.title = kind === "CSV" ? "save the numbers as a table" : `save what is shown as ${kind}`;
    button.addEventListener("click", act);
    bar.append(button);
  }
  return bar;
}

function download(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

export function table(rows) {
  const columns = [...new Set(rows.flatMap(Object.keys))];
  const cell = (value) => {
    const text = value === null || value === undefined || Number.isNaN(value) ? "" : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows.map((row) => columns.map((column) => row[column]))].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

async function rasterised(svg) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(serialised(svg))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = ["width", "height"].map((side) => Math.round(SHARP * svg.getAttribute(side)));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

function serialised(svg) {
  return new XMLSerializer().serializeToString(svg);
}

// ---- everything that is seen in an element, as one SVG: boxes, texts, charts, and canvases as pictures

export function drawing(root) {
  const whole = root.getBoundingClientRect();
  const [width, height] = [Math.ceil(whole.width), Math.ceil(whole.height)];
  const svg = part("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  const place = ({ left, top, width, height }) => ({ x: left - whole.left, y: top - whole.top, width, height });
  const walk = (element, opacity) => {
    const look = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    if (element.matches(SKIPPED) || look.visibility === "hidden" || !box.width || !box.height) return;
    const shown = opacity * look.opacity;
    if (element instanceof SVGSVGElement) svg.append(chart(element, { ...place(box), opacity: shown }));
    else if (element instanceof HTMLCanvasElement) svg.append(part("image", { ...place(box), opacity: shown, href: element.toDataURL() }));
    else if (element instanceof HTMLInputElement) svg.append(...slide(element, look, { ...place(box), opacity: shown }));
    else {
      svg.append(...ground(look, { ...place(box), opacity: shown }), ...dot(element, { ...place(box), opacity: shown }));
      for (const child of element.childNodes) {
        if (child instanceof Element) walk(child, shown);
        else if (child instanceof Text) svg.append(...lines(child, look, place, shown));
      }
    }
  };
  walk(root, 1);
  return svg;
}

function part(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Mixed colours are computed as color(srgb r g b / a), which few programs read outside of browsers.
function plain(value) {
  return value.replace(/color\(srgb ([\d.e-]+) ([\d.e-]+) ([\d.e-]+)(?: \/ ([\d.e-]+))?\)/g, (_, r, g, b, alpha = "1") =>
    `rgba(${[r, g, b].map((share) => Math.round(255 * share)).join(", ")}, ${alpha})`);
}

// A chart with the look that style sheets give it.
function chart(element, { x, y, width, height, opacity }) {
  const copy = element.cloneNode(true);
  const originals = [element, ...element.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((each, i) => {
    const look = getComputedStyle(originals[i]);
    each.removeAttribute("class");
    each.setAttribute("style", DRAWN.map((name) => `${name}: ${plain(look.getPropertyValue(name))}`).join("; "));
  });
  for (const [name, value] of Object.entries({ x, y, width, height, opacity })) copy.setAttribute(name, value);
  return copy;
}

// The background and the border of a box; or its left edge alone, where it has no other.
function ground(look, box) {
  const [top, left] = [look.borderTopWidth, look.borderLeftWidth].map(parseFloat);
  if (left && !top) return [part("rect", { ...box, width: left, fill: plain(look.borderLeftColor) })];
  const fill = plain(look.backgroundColor);
  if (!top && /^rgba\(.*, 0\)$/.test(fill)) return [];
  const [, radius, unit] = /^([\d.]+)(px|%)/.exec(look.borderTopLeftRadius) ?? [0, 0, "px"];
  const rx = Math.min(unit === "%" ? (radius * box.height) / 100 : radius, box.height / 2);
  return [part("rect", { ...box, rx, fill, stroke: top ? plain(look.borderTopColor) : "none" })];
}

// The coloured dot before a name.
function dot(element, { x, y, height, opacity }) {
  const look = getComputedStyle(element, "::before");
  const [wide, tall] = [look.width, look.height].map(parseFloat);
  if (look.content === "none" || !(wide > 0)) return [];
  return ground(look, { x, y: y + (height - tall) / 2, width: wide, height: tall, opacity });
}

// A slider: its track and its thumb.
function slide(input, look, { x, y, width, height, opacity }) {
  if (input.type !== "range") return [];
  const [colour, middle] = [plain(look.accentColor), y + height / 2];
  const at = x + 8 + ((width - 16) * (input.value - input.min)) / (input.max - input.min);
  return [
    part("line", { x1: x + 2, x2: x + width - 2, y1: middle, y2: middle, stroke: "#888", "stroke-width": 4, opacity }),
    part("circle", { cx: at, cy: middle, r: 8, fill: colour === "auto" ? "#0072b2" : colour, opacity }),
  ];
}

// A text, line by line as it is broken.
function lines(node, look, place, opacity) {
  const range = document.createRange();
  const found = [];
  for (const { 0: word, index } of node.data.matchAll(/\S+\s*/g)) {
    range.setStart(node, index);
    range.setEnd(node, index + word.trimEnd().length);
    const box = range.getBoundingClientRect();
    if (!box.width) continue;
    const last = found.at(-1);
    if (last && Math.abs(last.box.top - box.top) < 2) last.text += word;
    else found.push({ text: word, box });
  }
  return found.map(({ text, box }) => {
    const { x, y, height } = place(box);
    const look_ = { fill: plain(look.color), "font-family": look.fontFamily, "font-size": look.fontSize, "font-weight": look.fontWeight };
    return part("text", { x, y: y + 0.78 * height, opacity, ...look_ }, text.trimEnd());
  });
}
