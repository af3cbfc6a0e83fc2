"""Random statements for the rules that no other statement needs, and copies of units that lie in each other's way."""

from .program import Draft


def one_of(d: Draft, *texts: str) -> str:
    return d.emit(d.random.choice(texts))


def stretch(d: Draft) -> str:
    """A part of an axis by start and length, or the rest of it written over."""
    a = d.pick()
    k, n = d.axis(a), d.shape(a)[d.axis(a)]
    n = d.shape(a)[k]
    start = d.random.randrange(n)
    length = d.random.randint(1, n - start)
    part = f"{a}.narrow({k}, {start}, {length})"
    return one_of(
        d,
        part,
        f"{a}.narrow({k}, {start - n}, {length})",
        f"{a}.slice_scatter(torch.tanh({part}), {k}, {start}, {start + length})",
        f"{a}.select_scatter(torch.tanh({a}.select({k}, 0)), {k}, {start})",
        f"torch.sigmoid({a}.unbind({k})[{start}])",
        f"{a}.split([{start}, {n - start}], {k})[1]",
        f"torch.zeros_like({a}).copy_({a}.select({k}, {start}).unsqueeze({k}))",
    )


def image(d: Draft) -> str:
    """Patches and back, samples between pixels, resizing, borders, pools along one axis."""
    a = d.pick(rank=4)
    n, c, h, w = d.shape(a)
    grid = f"torch.rand({n}, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype={a}.dtype) * 2 - 1"
    return one_of(
        d,
        f"F.fold(torch.tanh(F.unfold({a}, 2, padding=1)), ({h}, {w}), 2, padding=1)",
        f"F.grid_sample({a}, {grid}, align_corners=False)",
        f"F.interpolate({a}, ({h + 1}, {w}), mode='bilinear', antialias=True)",
        f"F.interpolate({a}, ({h}, {w + 2}), mode='bicubic')",
        f"F.pad({a}, (1, 1, 1, 0), mode='reflect')",
        f"F.pad({a}, (1, -1, 0, 0, {d.random.choice(['0, 0', '1, -1'])}))",
        f"F.avg_pool2d({a}, (1, 2), 1)",
        f"F.max_pool2d({a}, 2, 1, return_indices=True)[0]",
        f"F.conv2d({a}, {d.parameter(3, c, 1, 1)}, {d.parameter(3)})",
        f"F.pixel_unshuffle({a}, 2)",
        f"F.dropout2d({a}, 0.5, False)",
    )


def activation(d: Draft) -> str:
    a = d.pick()
    last = d.shape(a)[-1]
    return one_of(
        d,
        f"F.rrelu({a}, training=False)",
        f"F.dropout({a}, 0.3, False)",
        f"F.prelu({a}, {d.parameter(1)})",
        f"torch.where({a} > 0, {a}, {a}.new_full({d.shape(a)}, 0.2))",
        f"torch.lerp({a}, torch.tanh({a}), 0.3)",
        f"F.rms_norm({a}, ({last},), {d.parameter(last)})",
        f"{a} * torch.ones_like({a}).cumsum(-1)",
        f"{a} * ({a} == {a}.amax(-1, keepdim=True))",
    )


def products(d: Draft) -> str:
    """Matrix products in their other spellings."""
    a = d.pick(1, 3)
    shape, m = d.shape(a), d.size()
    n = shape[-1]
    texts = [f"{a} @ {d.parameter(n)}"] if len(shape) > 1 else [f"torch.outer({a}, {d.parameter(m)})"]
    if len(shape) == 2:
        texts += [f"torch.addmm({d.parameter(m)}, {a}, {d.parameter(n, m)})", f"torch.outer({a}[0], {a}[-1])"]
        texts.append(f"F.bilinear({a}, {a}, {d.parameter(m, n, n)}, {d.parameter(m)})")
    if len(shape) == 3:
        weight = d.parameter(shape[0], n, m)
        texts += [f"torch.bmm({a}, {weight})", f"torch.baddbmm({d.parameter(m)}, {a}, {weight})"]
        texts.append(f"torch.addbmm({d.parameter(m)}, {a}, {weight})")
    return one_of(d, *texts)


def written(d: Draft) -> str:
    """Values put at, added to, or looked up from places chosen by data, by constants or by masks."""
    a = d.pick(2, 3)
    k, n = d.axis(a), d.shape(a)[d.axis(a)]
    n = d.shape(a)[k]
    index = f"torch.tensor({[d.random.randrange(n) for _ in range(n)]})"
    texts = [f"{a}.{name}({k}, {index}, torch.tanh({a}))" for name in ("index_add", "index_copy")]
    texts += [
        f"{a}.index_fill({k}, {index}, 0.3)",
        f"{a}.scatter_add({k}, {a}.argsort({k}), torch.tanh({a}))",
        f"{a}.index_put(({a}[..., 0].argsort(0).flatten()[:1],), {a}[:1])",
        f"{a}.index_put(({a}.sum(-1) > 0,), torch.tensor(0.1, dtype={a}.dtype))",
        f"{a}.max({k}).values - {a}.min({k}, keepdim=True).values.squeeze({k})",
        f"{a}.cummax({k}).values",
        f"F.embedding_bag({a}.flatten(1).argsort(1), {d.parameter(a_size(d, a), 3)}, mode='mean')",
        f"{a}.square().sum({k}).log1p()",
        f"({a}.argmax({k}, keepdim=True) == torch.arange({n}).view({', '.join('-1' if i == k else '1' for i in range(len(d.shape(a))))})) * {a}",
    ]
    return one_of(d, *texts)


def a_size(d: Draft, a: str) -> int:
    """Entries of one example."""
    size = 1
    for n in d.shape(a)[1:]:
        size *= n
    return size


def complex_numbers(d: Draft) -> str:
    a = d.pick()
    last = d.shape(a)[-1]
    texts = [f"torch.fft.fft({a}, dim={d.axis(a)}).abs()", f"torch.complex({a}, torch.tanh({a})).conj().imag"]
    if last % 2 == 0:
        pairs = f"torch.view_as_complex({a}.unflatten(-1, (-1, 2)).contiguous())"
        texts.append(
            f"torch.view_as_real({pairs} * torch.polar(torch.ones({last // 2}), torch.arange({last // 2}.))).flatten(-2)"
        )
    return one_of(d, *texts)


def copies(d: Draft) -> str:
    """Units twice over: mirrored, tiled, interleaved, one for each pair."""
    a = d.pick(1, 3)
    k, shape = d.axis(a), d.shape(a)
    tiled = f"torch.cat([{a}, {a}], {k})"
    between = f"{a}.repeat_interleave(2, {k})"
    pairs = f"({a}.unsqueeze(-1) + torch.tanh({a}.unsqueeze(-2))).flatten(-2)"
    chosen = d.random.choice([tiled, between, pairs, f"torch.cat([{a}, {a}.flip({k})], {k})"])
    n, at = len(d.lines), len(shape) - 1 if chosen == pairs else k
    mixed = d.random.choice(
        [
            f"c{n} + 0.5 * c{n}.flip({at})",
            f"c{n}.roll(1, {at}) * c{n}",
            f"torch.tanh(c{n})",
            f"c{n} - c{n}.mean({at}, keepdim=True)",
        ]
    )
    return d.emit(f"c{n} = {chosen}", mixed)


def results(d: Draft) -> str:
    """Two results of one operator side by side, and parts that hold nothing."""
    a = d.pick(2, 3)
    k = d.axis(a)
    pair = d.random.choice(
        [
            f"torch.var_mean({a}, {k}, correction=0, keepdim=True)",
            f"torch.aminmax({a}, dim={k}, keepdim=True)",
            f"torch.sort({a}, {k})[:1] * 2",
        ]
    )
    return one_of(
        d, f"torch.cat({pair}, {d.axis(a)})", f"torch.stack({pair}, -1).tanh()", f"torch.cat([{a}, {a}.exp()[:0]])"
    )


RARE = (
    stretch,
    stretch,
    image,
    image,
    activation,
    products,
    products,
    written,
    written,
    complex_numbers,
    copies,
    copies,
    results,
)
