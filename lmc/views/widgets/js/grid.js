// Values on a rectangular grid: between its points, as an image, as contours. NaN is a gap.

// The cell of an ascending grid that holds a value, and where in it: [i, share], value = (1 - share) g[i] + share g[i + 1].
export function cellOf(grid, value) {
  let [low, high] = [0, grid.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (grid[middle] <= value) low = middle;
    else high = middle;
  }
  return [low, Math.min(Math.max((value - grid[low]) / (grid[low + 1] - grid[low]), 0), 1)];
}

// Bilinear in the cell of (px, py); a corner that has no share in the value does not matter.
export function valueIn({ x, y, values }, px, py) {
  return mixed(values, x.length, cellOf(x, px), cellOf(y, py));
}

function mixed(values, columns, [i, s], [j, t]) {
  const at = j * columns + i;
  let sum = 0;
  if (s < 1 && t < 1) sum += (1 - s) * (1 - t) * values[at];
  if (s > 0 && t < 1) sum += s * (1 - t) * values[at + 1];
  if (s < 1 && t > 0) sum += (1 - s) * t * values[at + columns];
  if (s > 0 && t > 0) sum += s * t * values[at + columns + 1];
  return sum;
}

// Smallest and largest of the values that are known; [0, 1] where none is.
export function rangeOf(...arrays) {
  let [low, high] = [Infinity, -Infinity];
  for (const values of arrays) {
    for (const value of values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : [0, 1];
}

// The grid as an image of `across` x `down` points, y upwards; `colour(value)` gives [r, g, b], or null for a gap.
export function heatMap({ x, y, values }, across, down, colour) {
  const image = new ImageData(across, down);
  const inside = (grid, i, count) => grid[0] + ((grid.at(-1) - grid[0]) * (i + 0.5)) / count;
  const columns = Array.from({ length: across }, (_, i) => cellOf(x, inside(x, i, across)));
  for (let row = 0; row < down; row++) {
    const cell = cellOf(y, inside(y, down - 1 - row, down));
    for (let column = 0; column < across; column++) {
      const shade = colour(mixed(values, x.length, columns[column], cell));
      if (!shade) continue;
      image.data.set(shade, 4 * (row * across + column));
      image.data[4 * (row * across + column) + 3] = 255;
    }
  }
  return image;
}

// Where the values cross a level: segments [x1, y1, x2, y2], found cell by cell (marching squares). Where all four sides
// of a cell are crossed, the mean of its corners decides which of them are joined.
export function contour({ x, y, values }, level) {
  const found = [];
  for (let j = 0; j + 1 < y.length; j++) {
    for (let i = 0; i + 1 < x.length; i++) {
      const at = j * x.length + i;
      const corners = [values[at], values[at + 1], values[at + x.length + 1], values[at + x.length]];
      if (corners.some(Number.isNaN)) continue;
      const places = [[x[i], y[j]], [x[i + 1], y[j]], [x[i + 1], y[j + 1]], [x[i], y[j + 1]]];
      const crossed = [];
      for (let side = 0; side < 4; side++) {
        const [a, b] = [corners[side], corners[(side + 1) % 4]];
        if (a < level === b < level) continue;
        const share = (level - a) / (b - a);
        const [p, q] = [places[side], places[(side + 1) % 4]];
        crossed.push([p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])]);
      }
      if (crossed.length === 4) {
        const middle = 0.25 * (corners[0] + corners[1] + corners[2] + corners[3]);
        if (middle < level !== corners[0] < level) crossed.push(crossed.shift());
      }
      for (let k = 0; k + 1 < crossed.length; k += 2) found.push([...crossed[k], ...crossed[k + 1]]);
    }
  }
  return found;
}
