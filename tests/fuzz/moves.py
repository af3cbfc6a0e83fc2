"""Random statements that move data or combine it pointwise: nothing here sums over an axis."""

from .program import Draft

UNARY = (
    "torch.tanh({})",
    "torch.relu({})",
    "F.gelu({})",
    "torch.sigmoid({})",
    "F.silu({})",
    "({}).abs()",
    "torch.sin({})",
    "-({})",
    "({}) * 0.7 + 0.1",
    "F.softplus({})",
    "({}).square()",
    "({}).clamp(-1, 1.5)",
    "F.leaky_relu({})",
)


def factors(n: int) -> list[tuple[int, int]]:
    return [(a, n // a) for a in range(2, n) if n % a == 0]


def unary(d: Draft) -> str:
    return d.emit(d.random.choice(UNARY).format(d.pick()))


def binary(d: Draft) -> str:
    """Two values of the same shape, or with one broadcast."""
    a = d.pick(1)
    same = [n for n, v in d.values.items() if v.shape == d.values[a].shape and n != a]
    b = d.random.choice(same) if same else a
    d.used.add(b)
    operator = d.random.choice(
        ["{} + {}", "{} * {}", "{} - 0.5 * {}", "torch.maximum({}, {})", "torch.where({0} > 0, {0}, {1})"]
    )
    return d.emit(operator.format(a, b))


def bias(d: Draft) -> str:
    """Adds or multiplies a parameter along one axis, or along all but the first."""
    a = d.pick()
    shape, k = d.shape(a), d.axis(a)
    if d.random.random() < 0.2 and len(shape) > 1:
        text = d.parameter(*shape[1:])
    else:
        text = d.parameter(shape[k]) + ("" if k == len(shape) - 1 else f".view{(-1, *(1 for _ in shape[k + 1 :]))}")
    return d.emit(d.random.choice(["{} + {}", "{} * {}", "{} - {}"]).format(a, text))


def permute(d: Draft) -> str:
    a = d.pick(2)
    order = list(range(len(d.shape(a))))
    d.random.shuffle(order)
    return d.emit(f"{a}.permute({', '.join(map(str, order))})" + d.random.choice(["", ".contiguous()"]))


def merge(d: Draft) -> str:
    a = d.pick(2)
    k = d.random.randrange(len(d.shape(a)) - 1)
    return d.emit(f"{a}.flatten({k}, {k + 1})")


def divide(d: Draft) -> str:
    """Splits an axis in two by a view."""
    a = d.pick()
    options = [(k, f) for k, n in enumerate(d.shape(a)) for f in factors(n)]
    k, (p, q) = d.random.choice(options)
    return d.emit(f"{a}.unflatten({k}, ({p}, {q}))")


def reshape(d: Draft) -> str:
    a = d.pick(2)
    shape = list(d.shape(a))
    d.random.shuffle(shape)
    return d.emit(f"{a}.reshape({', '.join(map(str, shape))})")


def flip(d: Draft) -> str:
    a = d.pick()
    k = d.axis(a)
    return d.emit(
        d.random.choice([f"{a}.flip({k})", f"{a}.roll({d.random.choice([1, -1, 2])}, {k})", f"{a} + {a}.flip({k})"])
    )


def cut(d: Draft) -> str:
    """A slice, a strided slice, or one index."""
    a = d.pick()
    k = d.axis(a)
    n = d.shape(a)[k]
    if n < 2:
        raise LookupError
    before = ":, " * k
    text = d.random.choice([f"{n // 2}:", f":{n // 2 + 1}", "::2", "1:", f"{n - 1}", "-2:"])
    return d.emit(f"{a}[{before}{text}]")


def take(d: Draft) -> str:
    """Constant indices: a permutation of the axis, or with repetitions."""
    a = d.pick()
    k = d.axis(a)
    n = d.shape(a)[k]
    index = (
        d.random.sample(range(n), n) if d.random.random() < 0.5 else [d.random.randrange(n) for _ in range(d.size())]
    )
    return d.emit(
        f"{a}.index_select({k}, torch.tensor({index}))" if d.random.random() < 0.5 else f"{a}[{':, ' * k}{index}]"
    )


def cat(d: Draft) -> str:
    """With itself, with a changed copy of itself, with another value, or with a parameter."""
    a = d.pick()
    k, shape = d.axis(a), d.shape(a)
    fits = [
        n
        for n, v in d.values.items()
        if v.dim() == len(shape) and v.shape[:k] == shape[:k] and v.shape[k + 1 :] == shape[k + 1 :]
    ]
    b = d.random.choice(fits)
    d.used.add(b)
    learned = (
        f"{d.parameter(d.shape(a)[k])}.view{(shape[k], *(1 for _ in shape[k + 1 :]))}.expand{shape}"
        if d.random.random() < 0.3
        else b
    )
    second = d.random.choice([a, f"torch.tanh({a})", f"{a}.flip({k})", b, b, b, learned])
    return d.emit(f"torch.cat([{a}, {second}], dim={k})")


def stack(d: Draft) -> str:
    a = d.pick(1, 3)
    same = [n for n, v in d.values.items() if v.shape == d.values[a].shape]
    b = d.random.choice(same)
    return d.emit(f"torch.stack([{a}, {b}], dim={d.random.randint(0, len(d.shape(a)))})")


def repeat(d: Draft) -> str:
    a = d.pick(1, 4)
    k, shape = d.axis(a), d.shape(a)
    times = ", ".join("2" if i == k else "1" for i in range(len(shape)))
    return d.emit(
        d.random.choice(
            [
                f"{a}.repeat({times})",
                f"{a}.repeat_interleave(2, dim={k})",
                f"{a}.unsqueeze({k}).expand({', '.join(map(str, (*shape[:k], 2, *shape[k:])))})",
            ]
        )
    )


def chunk(d: Draft) -> str:
    """Two halves: one gates the other, or they change places."""
    a = d.pick()
    k = d.axis(a)
    if d.shape(a)[k] % 2:
        raise LookupError
    n = len(d.lines)
    text = d.random.choice(
        [f"l{n} * torch.sigmoid(r{n})", f"torch.cat([r{n}, l{n}], {k})", f"l{n} + torch.tanh(r{n})", f"l{n}"]
    )
    split = d.random.choice([f"{a}.chunk(2, dim={k})", f"{a}.split({d.shape(a)[k] // 2}, dim={k})"])
    return d.emit(f"l{n}, r{n} = {split}", text)


def outer(d: Draft) -> str:
    """The outer product of the last axes of two values with the same leading axes, flattened."""
    a = d.pick(1, 3)
    fits = [n for n, v in d.values.items() if v.shape[:-1] == d.values[a].shape[:-1]]
    b = d.random.choice([a, d.random.choice(fits)])
    d.used.add(b)
    return d.emit(f"({a}.unsqueeze(-1) * {b}.unsqueeze(-2))" + d.random.choice(["", ".flatten(-2)"]))


def pad(d: Draft) -> str:
    a = d.pick(1, 4)
    k = d.axis(a)
    widths = ", ".join("0, 0" for _ in d.shape(a)[k + 1 :])
    return d.emit(f"F.pad({a}, ({widths + ', ' if widths else ''}{d.random.choice(['1, 1', '0, 2', '1, 0'])}))")


def constant(d: Draft) -> str:
    """Positions along an axis, or a mask."""
    a = d.pick(1)
    k, shape = d.axis(a), d.shape(a)
    view = (shape[k], *(1 for _ in shape[k + 1 :]))
    texts = [
        f"{a} + torch.arange({shape[k]}.).view{view} / {shape[k]}",
        f"{a}.masked_fill(torch.arange({shape[k]}).view{view} == 1, -0.5)",
    ]
    if len(shape) > 1 and shape[-1] == shape[-2]:
        texts += [f"{a}.tril()", f"{a}.masked_fill(torch.ones({shape[-1]}, {shape[-1]}).triu(1) == 1, -9.0)"]
    return d.emit(d.random.choice(texts))


def overwrite(d: Draft) -> str:
    """In-place writes into a copy."""
    a = d.pick()
    k, n = d.axis(a), len(d.lines)
    before = ":, " * k
    text = d.random.choice(
        [f"c{n}[{before}:1] = 0.3", f"c{n}[{before}1:] += 1.0", f"c{n}[{before}:2].mul_(0.5)", f"c{n}.add_({a})"]
    )
    return d.emit(f"c{n} = {a}.clone()", text, f"c{n}")


def diagonal(d: Draft) -> str:
    a = d.pick(2)
    j, k = d.random.sample(range(len(d.shape(a))), 2)
    return d.emit(d.random.choice([f"{a}.diagonal(0, {j}, {k})", f"torch.diag_embed({a})", f"{a}.movedim({j}, {k})"]))


def windows(d: Draft) -> str:
    """Overlapping windows along an axis, or channels into pixels."""
    a = d.pick(1, 4)
    k = d.axis(a)
    texts = [f"{a}.unfold({k}, 2, 1)"]
    if len(d.shape(a)) == 4:
        texts += [f"F.pixel_shuffle({a}, 2)", f"F.channel_shuffle({a}, 2)", f"F.unfold({a}, 2)"]
    return d.emit(d.random.choice(texts))


MOVES = (
    unary,
    unary,
    unary,
    binary,
    binary,
    bias,
    bias,
    permute,
    merge,
    divide,
    reshape,
    flip,
    cut,
    take,
    cat,
    cat,
    stack,
    repeat,
    chunk,
    chunk,
    outer,
    pad,
    constant,
    overwrite,
    diagonal,
    windows,
)
