// A permutation carried out by swaps: the same as `partial` in lmc/align/study/inspect.py.

// The unit in each place after `count` swaps, each of which fills the next place of `order` rightly.
export function placing(index, order, count) {
  const now = Array.from(index, (_, i) => i);
  const where = now.slice();
  for (let k = 0; k < count; k++) {
    const place = order[k];
    const [unit, other] = [index[place], now[place]];
    const old = where[unit];
    [now[place], now[old]] = [unit, other];
    [where[unit], where[other]] = [place, old];
  }
  return { now, where };
}

// Where each unit stands while the share of filled places grows smoothly: between two swaps it is on its way.
export function positions(index, order, share) {
  const count = share * index.length;
  const before = Math.min(Math.floor(count + 1e-9), index.length);
  const from = placing(index, order, before).where;
  const rest = count - before;
  if (rest < 1e-6 || before === index.length) return from;
  const to = placing(index, order, before + 1).where;
  const ease = rest * rest * (3 - 2 * rest);
  return from.map((place, unit) => place + ease * (to[unit] - place));
}
