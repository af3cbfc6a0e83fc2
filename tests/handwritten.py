"""Specifications written by hand, in the way of Git Re-Basin, for the bench models: what discovery must find again."""

NORM = ("weight", "bias", "running_mean", "running_var")
LAYER_NORM = ("weight", "bias")


def mlp(hidden: int) -> dict[str, str]:
    patterns = {}
    before = "."
    for i in range(1, hidden + 1):
        patterns |= {f"fc{i}.weight": f"h{i} {before}", f"fc{i}.bias": f"h{i}"}
        before = f"h{i}"
    return patterns | {"head.weight": f". {before}"}


def vgg(convolutions: int) -> dict[str, str]:
    """With batch normalisation; the last map is flattened with several pixels per channel."""
    patterns = {}
    before = "."
    for i in range(1, convolutions + 1):
        patterns |= {f"conv{i}.weight": f"c{i} {before} . ."} | {f"norm{i}.{part}": f"c{i}" for part in NORM}
        before = f"c{i}"
    return patterns | {"fc.weight": f"f ({before} .)", "fc.bias": "f", "head.weight": ". f"}


def resnet20(norm: tuple[str, ...] = NORM) -> dict[str, str]:
    """One group per residual stream, one inside each block; projection shortcuts lead from stream to stream."""
    patterns = {"conv1.weight": "s1 . . ."} | {f"norm1.{part}": "s1" for part in norm}
    for stage in (1, 2, 3):
        for block in (1, 2, 3):
            prefix, inner, out = f"stage{stage}.block{block}", f"inner{stage}{block}", f"s{stage}"
            into = f"s{stage - 1}" if stage > 1 and block == 1 else out
            patterns |= {
                f"{prefix}.conv1.weight": f"{inner} {into} . .",
                f"{prefix}.conv2.weight": f"{out} {inner} . .",
            }
            patterns |= {f"{prefix}.norm1.{part}": inner for part in norm}
            patterns |= {f"{prefix}.norm2.{part}": out for part in norm}
            if into != out:
                patterns |= {f"{prefix}.shortcut.conv.weight": f"{out} {into} . ."}
                patterns |= {f"{prefix}.shortcut.norm.{part}": out for part in norm}
    return patterns | {"head.weight": ". s3"}


ATTENTION = {
    "embed.weight": "d .",
    "embed.bias": "d",
    "q.weight": "(head qk) d",
    "q.bias": "(head qk)",
    "k.weight": "(head qk) d",
    "k.bias": "(head qk)",
    "v.weight": "(head v) d",
    "v.bias": "(head v)",
    "o.weight": "d (head v)",
    "o.bias": "d",
    "out.weight": ". d",
}

GROUPED_QUERY = {
    "embed.weight": "d .",
    "q.weight": "(kv rep qk) d",
    "k.weight": "(kv qk) d",
    "v.weight": "(kv v) d",
    "o.weight": "d (kv rep v)",
    "out.weight": ". d",
}

EXPERTS = {
    "embed.weight": "d .",
    "router.weight": "e d",
    "up": "e e/f d",
    "down": "e d e/f",
    "out.weight": ". d",
}


def resnet50(depths: tuple[int, ...] = (3, 4, 6, 3)) -> dict[str, str]:
    """Bottleneck blocks, named as in `transformers`: five streams, and two groups inside each block."""

    def convolution(prefix: str, out: str, into: str) -> dict[str, str]:
        norm = {f"{prefix}.normalization.{part}": out for part in NORM}
        return {f"{prefix}.convolution.weight": f"{out} {into} . ."} | norm

    patterns = convolution("resnet.embedder.embedder", "stem", ".")
    stream = "stem"
    for stage, depth in enumerate(depths):
        out = f"stream{stage}"
        for block in range(depth):
            prefix = f"resnet.encoder.stages.{stage}.layers.{block}"
            first, second = f"a{stage}.{block}", f"b{stage}.{block}"
            patterns |= convolution(f"{prefix}.layer.0", first, stream)
            patterns |= convolution(f"{prefix}.layer.1", second, first)
            patterns |= convolution(f"{prefix}.layer.2", out, second)
            if block == 0:
                patterns |= convolution(f"{prefix}.shortcut", out, stream)
            stream = out
    return patterns | {"classifier.1.weight": f". {stream}"}
