"""Random statements that sum, sort, normalise, convolve or look up: where units meet."""

import string

from .program import Draft


def linear(d: Draft) -> str:
    a = d.pick()
    n, m = d.shape(a)[-1], d.size()
    second = f", {d.parameter(m)}" if d.random.random() < 0.5 else ""
    return d.emit(f"F.linear({a}, {d.parameter(m, n)}{second})")


def contract_axis(d: Draft) -> str:
    """A matrix on any axis."""
    a = d.pick(2)
    k = d.axis(a)
    return d.emit(
        f"torch.tensordot({a}, {d.parameter(d.shape(a)[k], d.size())}, dims=([{k}], [0]))"
        + d.random.choice(["", f".movedim(-1, {k})"])
    )


def einsum(d: Draft) -> str:
    """A value with a parameter that shares one or two axes, some of them kept."""
    a = d.pick(1, 4)
    shape = d.shape(a)
    letters = string.ascii_lowercase[: len(shape)]
    shared = d.random.sample(range(len(shape)), min(len(shape), d.random.choice([1, 1, 2])))
    p_letters, p_shape = [letters[k] for k in shared], [shape[k] for k in shared]
    if d.random.random() < 0.7:
        p_letters.append("z")
        p_shape.append(d.size())
    kept = [c for k, c in enumerate(letters) if k not in shared or d.random.random() < 0.3]
    out = kept + [c for c in p_letters if c == "z"]
    d.random.shuffle(out)
    return d.emit(f'torch.einsum("{letters},{"".join(p_letters)}->{"".join(out)}", {a}, {d.parameter(*p_shape)})')


def einsum_values(d: Draft) -> str:
    """Two values; axes of equal size are shared at random, shared ones summed at random."""
    a, b = d.pick(1, 3), d.pick(1, 3)
    letters = list(string.ascii_lowercase[: len(d.shape(a))])
    others, free = [], set(range(len(letters)))
    for j, n in enumerate(d.shape(b)):
        fits = [k for k in free if d.shape(a)[k] == n]
        if fits and d.random.random() < 0.7:
            k = d.random.choice(fits)
            free.remove(k)
            others.append(letters[k])
        else:
            others.append("uvw"[j])
    out = [
        c for c in dict.fromkeys(letters + others) if d.random.random() < (0.4 if c in letters and c in others else 0.9)
    ]
    return d.emit(f'torch.einsum("{"".join(letters)},{"".join(others)}->{"".join(out)}", {a}, {b}) * 0.5')


def reduction(d: Draft) -> str:
    a = d.pick(2)
    k = d.axis(a)
    keep = d.random.random() < 0.4
    name = d.random.choice(["sum", "mean", "amax", "amin", "logsumexp", "prod", "var", "norm"])
    text = f"torch.norm({a}, dim={k}, keepdim={keep})" if name == "norm" else f"{a}.{name}(dim={k}, keepdim={keep})"
    return d.emit(f"{a} - {text}" if keep and d.random.random() < 0.6 else text)


def normalise(d: Draft) -> str:
    a = d.pick(2, 4)
    shape = d.shape(a)
    c, last = shape[1], shape[-1]
    texts = [f"{a}.softmax({d.axis(a)})", f"F.normalize({a}, dim={d.axis(a)})"]
    texts.append(f"F.layer_norm({a}, ({last},), {d.parameter(last)}, {d.parameter(last)})")
    texts.append(f"{a} * torch.rsqrt({a}.square().mean(-1, keepdim=True) + 1e-3) * {d.parameter(last)}")
    texts.append(f"F.layer_norm({a}, {shape[1:]})")
    groups = d.random.choice([g for g in (1, 2, 3, c) if c % g == 0])
    if len(shape) > 2 or c > groups:
        texts.append(f"F.group_norm({a}, {groups}, {d.parameter(c)}, {d.parameter(c)})")
    if len(shape) > 2 and shape[2] > 1:
        texts.append(f"F.instance_norm({a}, weight={d.parameter(c)}, bias={d.parameter(c)})")
    texts.append(f"F.batch_norm({a}, {d.buffer(c)}, {d.buffer(c, positive=True)}, {d.parameter(c)}, {d.parameter(c)})")
    return d.emit(d.random.choice(texts))


def convolution(d: Draft) -> str:
    a = d.pick(3, 4)
    c, dims = d.shape(a)[1], len(d.shape(a)) - 2
    groups = d.random.choice([g for g in (1, 1, 2, 3, c) if c % g == 0])
    if d.random.random() < 0.2:
        out = d.size()
        weight = d.parameter(c, out, *(2 for _ in range(dims)))
        rest = f", {d.parameter(out * groups)}, groups={groups}" if groups > 1 else ""
        return d.emit(f"F.conv_transpose{dims}d({a}, {weight}{rest})")
    out, kernel = groups * d.random.choice([1, 2, 3]), d.random.choice([1, 2, 3])
    weight = d.parameter(out, c // groups, *(kernel for _ in range(dims)))
    return d.emit(f"F.conv{dims}d({a}, {weight}, {d.parameter(out)}, padding={kernel // 2}, groups={groups})")


def pool(d: Draft) -> str:
    a = d.pick(3, 4)
    dims = len(d.shape(a)) - 2
    return d.emit(
        d.random.choice(
            [
                f"F.max_pool{dims}d({a}, 2)",
                f"F.avg_pool{dims}d({a}, 2, stride=1)",
                f"F.adaptive_avg_pool{dims}d({a}, 2)",
                f"F.interpolate({a}, scale_factor=2)",
            ]
        )
    )


def order(d: Draft) -> str:
    """Statements that depend on the order of an axis, or sort it."""
    a = d.pick()
    k = d.axis(a)
    n = d.shape(a)[k]
    texts = [
        f"{a}.cumsum({k})",
        f"{a}.sort(dim={k}).values",
        f"{a}.topk({max(1, n // 2)}, dim={k}).values",
        f"{a}.diff(dim={k})",
        f"torch.fft.rfft({a}, dim={k}).real",
    ]
    return d.emit(d.random.choice(texts))


def lookup(d: Draft) -> str:
    """Rows of a parameter chosen by constant or computed indices."""
    a = d.pick(2, 3)
    k, n = d.axis(a), d.size()
    table = d.parameter(d.shape(a)[k], n)
    index = f"{a}.argmax({k})"
    return d.emit(
        d.random.choice(
            [
                f"{table}[{index}]",
                f"F.embedding({index}, {table})",
                f"F.one_hot({index}, {d.shape(a)[k]}).to({a}.dtype) @ {table}",
                f"{a}.gather({k}, {a}.argsort({k}))",
                f"torch.zeros_like({a}).scatter({k}, {a}.topk(2, dim={k}).indices, {a}.topk(2, dim={k}).values)",
                f"{table}[torch.tensor({[d.random.randrange(d.shape(a)[k]) for _ in range(3)]})]",
            ]
        )
    )


def attention(d: Draft) -> str:
    """Self-attention over the middle axis of (b, n, d), with h heads of u units, queries perhaps grouped."""
    a = d.pick(rank=3)
    n = len(d.lines)
    dim, h, u = d.shape(a)[2], d.random.choice([1, 2, 3]), d.random.choice([2, 3])
    kv = h if h < 3 else d.random.choice([1, 3])
    lines = [f"q{n} = F.linear({a}, {d.parameter(h * u, dim)}).unflatten(-1, ({h}, {u})).transpose(1, 2)"]
    for name in "kv":
        spread = f".repeat_interleave({h // kv}, dim=1)" if kv < h else ""
        lines.append(
            f"{name}{n} = F.linear({a}, {d.parameter(kv * u, dim)}).unflatten(-1, ({kv}, {u})).transpose(1, 2){spread}"
        )
    mixed = d.random.choice(
        [
            f"F.scaled_dot_product_attention(q{n}, k{n}, v{n})",
            f"(q{n} @ k{n}.mT).softmax(-1) @ v{n}",
            f"torch.tanh(q{n} @ k{n}.mT) @ v{n}",
        ]
    )
    lines.append(f"o{n} = {mixed}.transpose(1, 2).flatten(-2)")
    result = f"F.linear(o{n}, {d.parameter(dim, h * u)})"
    return d.emit(*lines, d.random.choice([result, f"{a} + {result}", f"o{n}"]))


def module(d: Draft) -> str:
    """Recurrent nets, attention and gated layers of torch.nn."""
    a = d.pick(rank=3)
    dim = d.shape(a)[2]
    choices = [
        f"{{}}({a})[0]|nn.LSTM({dim}, 3, batch_first=True)",
        f"{{}}({a})[0]|nn.GRU({dim}, 2, batch_first=True, bidirectional=True)",
        f"{{}}({a})[0]|nn.RNN({dim}, 4, batch_first=True)",
        f"F.glu({{}}({a}))|nn.Linear({dim}, 6)",
        f"{{}}({a}, {a})|nn.Bilinear({dim}, {dim}, 3)",
        f"{{}}({a})|nn.PReLU({d.shape(a)[1]})",
    ]
    if dim % 2 == 0:
        choices.append(f"{{0}}({a}, {a}, {a})[0]|nn.MultiheadAttention({dim}, 2, batch_first=True)")
        choices.append(f"{{}}({a})|nn.TransformerEncoderLayer({dim}, 2, 3, batch_first=True)")
    call, constructor = d.random.choice(choices).split("|")
    return d.emit(call.format(d.submodule(constructor)))


COMPUTATIONS = (
    linear,
    linear,
    linear,
    contract_axis,
    contract_axis,
    einsum,
    einsum,
    einsum,
    einsum_values,
    einsum_values,
    reduction,
    reduction,
    normalise,
    normalise,
    convolution,
    convolution,
    pool,
    order,
    lookup,
    attention,
    module,
)
