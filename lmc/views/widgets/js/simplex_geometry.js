// The arithmetic of mixtures: values between the points of a lattice of shares, and a polygon with a model in each corner.

// A function (values, shares) -> value, linear between lattice points, exact at them; NaN where a needed one is unknown.
// `counts` holds P x K whole numbers that sum to `resolution`. The same triangulation as in lmc/landscape/simplices/simplex_result.py.
export function interpolator(counts, models, resolution) {
  const rows = new Map();
  const powers = Array.from({ length: models }, (_, i) => (resolution + 1) ** i);
  for (let row = 0; row * models < counts.length; row++) {
    let code = 0;
    for (let i = 0; i < models; i++) code += counts[row * models + i] * powers[i];
    rows.set(code, row);
  }
  const base = new Float64Array(models + 1); // partial sums of counts, from the last model on
  const part = new Float64Array(models);
  const order = new Int32Array(models);
  base[0] = resolution;
  return (values, shares) => {
    let sum = 0;
    for (let j = models - 1; j > 0; j--) {
      sum += shares[j] * resolution;
      const near = Math.round(sum);
      const whole = Math.min(Math.abs(sum - near) < 1e-7 ? near : Math.floor(sum), resolution);
      base[j] = whole;
      part[j] = Math.max(0, Math.abs(sum - near) < 1e-7 ? 0 : sum - whole);
    }
    for (let j = 1; j < models; j++) {
      let k = j - 1;
      while (k > 0 && part[order[k]] < part[j]) ((order[k + 1] = order[k]), k--);
      order[k + 1] = j;
    }
    let total = 0;
    for (let k = 0; k < models; k++) {
      if (k) base[order[k]] += 1;
      const weight = (k ? part[order[k]] : 1) - (k + 1 < models ? part[order[k + 1]] : 0);
      if (weight <= 0) continue;
      let code = 0;
      for (let i = 0; i < models; i++) code += (base[i] - (i + 1 < models ? base[i + 1] : 0)) * powers[i];
      const row = rows.get(code);
      total += weight * (row === undefined ? NaN : values[row]);
    }
    return total;
  };
}

// Corners of a regular polygon, in a box of the given size; two models lie on a line across it.
export function corners(models, { left, top, width, height }) {
  const turn = models === 3 ? -1 : 1; // three: A on top, B left, C right; more: clockwise from the upper left
  const start = models % 2 ? -Math.PI / 2 : -Math.PI / 2 - Math.PI / models;
  const raw = Array.from({ length: models }, (_, i) => start + (turn * 2 * Math.PI * i) / models);
  const points = models === 2 ? [[-1, 0], [1, 0]] : raw.map((angle) => [Math.cos(angle), Math.sin(angle)]);
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [across, down] = [Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys)];
  const scale = Math.min(width / across, height / (down || 1));
  const x0 = left + width / 2 - (scale * (Math.max(...xs) + Math.min(...xs))) / 2;
  const y0 = top + height / 2 - (scale * (Math.max(...ys) + Math.min(...ys))) / 2;
  return points.map(([x, y]) => [x0 + scale * x, y0 + scale * y]);
}

// Wachspress (1975): coordinates of a point in a convex polygon; smooth, linear on the edges, barycentric in a triangle.
export function coordinates(polygon, x, y, out = new Float64Array(polygon.length)) {
  const count = polygon.length;
  if (count === 2) {
    const [[ax, ay], [bx, by]] = polygon;
    out[1] = Math.min(Math.max(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0), 1);
    out[0] = 1 - out[1];
    return out;
  }
  let total = 0;
  for (let i = 0; i < count; i++) {
    out[i] = 1;
    for (let j = 0; j < count; j++) {
      if (j === i || (j + 1) % count === i) continue;
      const [[ax, ay], [bx, by]] = [polygon[j], polygon[(j + 1) % count]];
      out[i] *= Math.abs((bx - ax) * (y - ay) - (by - ay) * (x - ax));
    }
    total += out[i];
  }
  for (let i = 0; i < count; i++) out[i] /= total;
  return out;
}

// The point of a polygon nearest to (x, y), and how far that is; the point itself inside.
export function inside(polygon, x, y) {
  let sign = 0;
  let within = polygon.length > 2;
  let best = [Infinity, x, y];
  for (let i = 0; i < polygon.length; i++) {
    const [[ax, ay], [bx, by]] = [polygon[i], polygon[(i + 1) % polygon.length]];
    const [dx, dy] = [bx - ax, by - ay];
    const side = Math.sign(dx * (y - ay) - dy * (x - ax));
    if (sign && side && side !== sign) within = false;
    sign = sign || side;
    const t = Math.min(Math.max(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0), 1);
    const [px, py] = [ax + t * dx, ay + t * dy];
    const far = Math.hypot(px - x, py - y);
    if (far < best[0]) best = [far, px, py];
  }
  return within ? [0, x, y] : best;
}

// One model's share set, the others in proportion (evenly, where they had nothing).
export function withShare(shares, model, value) {
  const share = Math.min(Math.max(value, 0), 1);
  const rest = shares.reduce((sum, other, i) => sum + (i === model ? 0 : other), 0);
  const even = (1 - share) / (shares.length - 1);
  return shares.map((other, i) => (i === model ? share : rest > 1e-9 ? (other * (1 - share)) / rest : even));
}

// Lines of equal value in a grid of values (NaN: none), as a path of straight pieces: one for each cell and level.
export function isolines(grid, columns, rows, levels, line) {
  const corner = new Float64Array(4);
  for (let r = 0; r + 1 < rows; r++) {
    for (let c = 0; c + 1 < columns; c++) {
      const at = r * columns + c;
      [corner[0], corner[1], corner[2], corner[3]] = [grid[at], grid[at + 1], grid[at + columns + 1], grid[at + columns]];
      const [low, high] = [Math.min(...corner), Math.max(...corner)];
      if (!(high > low)) continue;
      for (const level of levels) {
        if (level <= low || level > high) continue;
        const cut = [];
        for (let k = 0; k < 4; k++) {
          const [p, q] = [corner[k], corner[(k + 1) % 4]];
          if (p < level === q < level) continue;
          const t = (level - p) / (q - p);
          cut.push([[c + t, r], [c + 1, r + t], [c + 1 - t, r + 1], [c, r + 1 - t]][k]);
        }
        for (let k = 0; k + 1 < cut.length; k += 2) line(cut[k], cut[k + 1]);
      }
    }
  }
}
