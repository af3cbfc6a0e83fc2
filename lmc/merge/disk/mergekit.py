"""Merges that are written in mergekit's configuration language, done here: `lmc.merge.replay("config.yml", "merged/")`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmc.errors import InputError
from lmc.merge.disk.mergekit_language import Configuration, Setting, Slice, Source, configuration, evaluate
from lmc.merge.disk.mergekit_methods import Translation, translation
from lmc.merge.disk.stacking import BEFORE, layer_count, layer_of, layer_prefix, stack
from lmc.merge.disk.vocabulary import by_token
from lmc.merge.disk.write import Plan, plan
from lmc.merge.engine.tensors import weight_sets
from lmc.merge.rules.averaging import average
from lmc.weights.adapter import Adapter
from lmc.weights.checkpoint import Checkpoint, read_json
from lmc.weights.opening import open_checkpoint


@dataclass(frozen=True)
class Here:
    """The parameters that hold for one tensor (`mergekit_methods.Parameters`)."""

    size: int
    name: str
    t: float
    inputs: Sequence[tuple[str, Source]]
    slice: Slice
    top: Mapping[str, Setting]

    def one(self, name: str, default: Any) -> Any:
        return self._found(name, self.name, [self.slice.parameters, self.top], default)

    def each(self, name: str, default: Any = ...) -> list[Any]:
        return [
            self._found(name, own, [source.parameters, self.slice.parameters, self.top], default, source.model)
            for own, source in self.inputs
        ]

    def _found(
        self, name: str, tensor: str, scopes: Sequence[Mapping[str, Setting]], default: Any, model: str = ""
    ) -> Any:
        for scope in scopes:
            if name in scope and (value := evaluate(scope[name], tensor, self.t)) is not None:
                return value
        if default is ...:
            whose = f" of {model}" if model else ""
            raise InputError(f"parameters: {name}{whose} is not set for {tensor}; the method needs it")
        return default


def plan_configuration(
    content: Mapping[str, Any], out: str | Path, *, folders: Mapping[str, str | Path], near: Path, seed: int = 0
) -> Plan:
    """The merge of a configuration: opened models, one rule, its options for every tensor.

    Args:
        content: what the YAML file holds.
        out: the folder to make.
        folders: names of models in the configuration -> where they are.
        near: a folder that relative paths may be in, besides the working directory.
        seed: of random masks.
    """
    config = configuration(content)
    how = translation(config.method)
    models = _opened(config, folders, near)
    prefixes = {name: layer_prefix(model) if _layered(config) else None for name, model in models.items()}
    order = [_sorted(part, config, how) for part in config.slices]
    counts = {len(sources) for _, sources in order}
    if len(counts) > 1:
        raise InputError(f"slices: {sorted(counts)} models besides the base: all slices need as many")
    least, most = how.models
    if not least <= (count := counts.pop()) <= most:
        several = f"{least}" if least == most else f"at least {least}"
        raise InputError(f"{config.method} takes {several} models besides the base, got {count}")
    based = order[0][0] is not None
    views = [_view([sources[j] for _, sources in order], models) for j in range(count)]
    base = _view([source for source, _ in order if source is not None], models) if based else None
    if how.base == "first" and base is not None:
        views, base = [base, *views], None
    vocabulary = None
    if config.vocabulary is not None:
        places = {source.model: j for j, source in enumerate(order[0][1])}
        if order[0][0] is not None:
            first = how.base == "first"
            places = {order[0][0].model: 0 if first else "base"} | {name: j + first for name, j in places.items()}
        wanted = dict(config.vocabulary)
        if wanted["source"] == "base" and config.base is not None and places.get(config.base) not in (0, "base"):
            wanted["source"] = config.base  # one of the models that are averaged, and not the first
        vocabulary = _by_places(wanted, places, lambda name: _place(name, folders, near))
        joined, origin, _ = by_token(views, base, vocabulary)
        names = weight_sets(joined, origin).names
    else:
        names = weight_sets(views, base).names
    options = _options(config, how, order, views[0], names, models, prefixes)
    function = how.function
    if "seed" in function.method.signature.parameters:
        options["seed"] = seed
    if config.method == "passthrough" and options == {"weights": [1.0]}:
        function, options = average, {}  # of one model, which is copied as it is stored
    merged = plan(function, views, out, base=base, dtype=config.dtype, vocabulary=vocabulary, **options)
    return replace(merged, texts=dict(merged.texts) | _texts(config, content, models))


def _by_places(
    vocabulary: Mapping[str, Any], places: Mapping[str, int | str], folder: Callable[[str], Path]
) -> dict[str, Any]:
    """The vocabulary with models by their places; the result has a row for each token and none more, as there."""
    source, tokens = vocabulary["source"], {}
    if source not in ("union", "base"):
        source = str(folder(source).resolve())
    for token, row in vocabulary.get("tokens", {}).items():
        if not row:
            continue
        if "model" in row and row["model"] not in places:
            raise InputError(f"tokenizer.tokens.{token}: {row['model']} is none of the models that are merged")
        tokens[token] = {**row, "model": places[row["model"]]} if "model" in row else row
    return {"source": source, "tokens": tokens, "pad": vocabulary.get("pad", 1)}


def _layered(config: Configuration) -> bool:
    return any(isinstance(source.layers, tuple) for part in config.slices for source in part.sources)


def _sorted(part: Slice, config: Configuration, how: Translation) -> tuple[Source | None, list[Source]]:
    """The base among the sources of a slice, where the method treats it in its own way, and the other models."""
    name = part.base or config.base
    unique = list({source.model: source for source in reversed(part.sources)}.values())[::-1]
    if how.base == "input":
        return None, unique
    base = next((source for source in unique if source.model == name), None)
    if base is None and how.base in ("task vectors", "first"):
        raise InputError(
            f"base_model: {config.method} needs one" + (f", and {name} is no source of a slice" if name else "")
        )
    return base, [source for source in unique if source is not base]


def _opened(config: Configuration, folders: Mapping[str, str | Path], near: Path) -> dict[str, Checkpoint]:
    names = [source.model for part in config.slices for source in part.sources]
    return {name: _open(name, folders, near) for name in dict.fromkeys(names)}


def _open(name: str, folders: Mapping[str, str | Path], near: Path) -> Checkpoint:
    if name in folders:
        return open_checkpoint(folders[name])
    path, plus, lora = name.partition("+")
    found = [_place(part, folders, near) for part in (path, lora) if part]
    opened = open_checkpoint(found[0])
    if not plus:
        return opened
    adapter = open_checkpoint(found[1])
    if not isinstance(adapter, Adapter):
        raise InputError(f"{name}: {found[1]} is no adapter")
    return adapter.on(opened)


def _place(name: str, folders: Mapping[str, str | Path], near: Path) -> Path:
    if name in folders:
        return Path(folders[name])
    plain = name.partition("@")[0] if not Path(name).exists() else name
    for path in (Path(plain).expanduser(), near / plain):
        if path.exists():
            return path
    raise InputError(
        f"{name}: no folder of that name, and nothing is downloaded here: download it (huggingface-cli download {plain} "
        f"--local-dir DIR) and say where it is, folders={{{name!r}: DIR}}, or --folder {name}=DIR"
    )


def _view(sources: Sequence[Source], models: Mapping[str, Checkpoint]) -> Checkpoint:
    """One model of all slices."""
    if len(sources) == 1 and sources[0].layers is None:
        return models[sources[0].model]
    return stack([(models[s.model], *s.layers) for s in sources if s.layers is not None])


def _options(
    config: Configuration,
    how: Translation,
    order: Sequence[tuple[Source | None, list[Source]]],
    view: Checkpoint,
    names: Sequence[str],
    models: Mapping[str, Checkpoint],
    prefixes: Mapping[str, str | None],
) -> dict[str, Any]:
    """The options of the rule, by name where they differ."""
    found: dict[str, dict[str, Any]] = {}
    for here in _places(config, order, view, names, models, prefixes):
        found[here.name] = how.options(here)
    options: dict[str, Any] = {}
    for key in next(iter(found.values()), {}):
        values = {name: chosen[key] for name, chosen in found.items()}
        first = next(iter(values.values()))
        options[key] = first if all(value == first for value in values.values()) else values
    return options


def _places(
    config: Configuration,
    order: Sequence[tuple[Source | None, list[Source]]],
    view: Checkpoint,
    names: Sequence[str],
    models: Mapping[str, Checkpoint],
    prefixes: Mapping[str, str | None],
) -> Iterator[Here]:
    """Every tensor that is merged, with the slice that it belongs to."""
    first = next(iter(models))
    prefix = prefixes[first] or _prefix_or_none(view)
    lengths = [s.layers[1] - s.layers[0] if s.layers else None for s in (sources[0] for _, sources in order)]
    whole = layer_count(view, prefix) if prefix is not None else 0
    for name in names:
        layer = None if prefix is None else layer_of(name, prefix)
        part, offset, length = 0, layer, whole
        if layer is None and len(lengths) > 1 and not BEFORE.search(name):
            part = len(lengths) - 1
        elif layer is not None and lengths[0] is not None:
            offset = layer
            for part, own in enumerate(lengths):  # noqa: B007
                if offset < (length := own or 0):
                    break
                offset -= length
        t = 0.0 if offset is None or layer is None else 1.0 if length <= 1 else offset / (length - 1)
        inputs = [(_own_name(name, source, offset, prefix, prefixes), source) for source in order[part][1]]
        yield Here(view.entry(name).size, name, t, inputs, config.slices[part], config.parameters)


def _own_name(
    name: str, source: Source, offset: int | None, prefix: str | None, prefixes: Mapping[str, str | None]
) -> str:
    """The name of the tensor in its model, by which filters choose."""
    if source.layers is None or offset is None or prefix is None:
        return name
    rest = name.removeprefix(prefix).partition(".")[2]
    return f"{prefixes[source.model]}{source.layers[0] + offset}.{rest}"


def _prefix_or_none(view: Checkpoint) -> str | None:
    try:
        return layer_prefix(view)
    except InputError:
        return None


def _texts(config: Configuration, content: Mapping[str, Any], models: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Files beside the weights that are not copied: the configuration itself, and the chat template."""
    found = {"mergekit_config.yml": json.dumps(content, indent=2) + "\n"}  # JSON is YAML
    if config.chat_template is None:
        return found
    template = config.chat_template
    if template == "auto":
        templates = [text for model in models.values() if (text := _template(model.path))]
        if not templates:
            return found
        template = max(templates, key=templates.count)
    elif len(template) < 20 or "{" not in template:
        raise InputError(f"chat_template: {template!r}: named templates are not held here; give its text, or auto")
    return found | {"chat_template.jinja": template}


def _template(folder: Path) -> str:
    """The chat template of a model's tokenizer; empty where it has none."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8").strip()
    if (file := folder / "tokenizer_config.json").is_file():
        found = read_json(file).get("chat_template")
        return found.strip() if isinstance(found, str) else ""
    return ""
