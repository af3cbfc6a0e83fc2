"""Merges that are written in mergekit's configuration language, done here: `lmc.merge.replay("config.yml", "merged/")`.

    models:                            one of models and slices
      - model: math/                   a folder; with `folders=` also a name of a model that was downloaded
        parameters:
          weight: [0.0, 0.5, 1.0]      over the depth of the layers
          density:                     by parts of names, the first that fits
            - filter: mlp
              value: 0.3
            - value: 0.5
      - model: base/+adapter/          a LoRA adapter on its base
    merge_method: ties
    base_model: base/
    dtype: bfloat16

Values are looked up for each tensor: in the parameters of the model, of its slice, of all; the first that is set counts.
Gradients are interpolated over the layers of a slice; tensors outside layers take the first value.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmc.core.context import warn
from lmc.core.extras import require
from lmc.errors import DataError, InputError
from lmc.merge.disk.mergekit_methods import Translation, nearest, translation
from lmc.merge.disk.stacking import BEFORE, layer_count, layer_of, layer_prefix, stack
from lmc.merge.disk.vocabulary import by_token
from lmc.merge.disk.write import Plan, plan
from lmc.merge.engine.tensors import weight_sets
from lmc.weights.adapter import Adapter
from lmc.weights.checkpoint import Checkpoint, read_json
from lmc.weights.opening import open_checkpoint

TOP = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "modules", "name",
)  # fmt: skip
GOOD = ("parameters", "sources", "base_model", "residual_weight")
Setting = Any  # a number, a list of numbers over the depth, or a list of {filter, value}


@dataclass(frozen=True)
class Source:
    """A model of a slice: what it is called, its layers (None is all), and its parameters."""

    model: str
    layers: tuple[int, int] | None
    parameters: Mapping[str, Setting]


@dataclass(frozen=True)
class Slice:
    """Models that are merged layer by layer."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Setting]
    base: str | None


@dataclass(frozen=True)
class Configuration:
    """A configuration as it is written, checked.

    Attributes:
        method: mergekit's name of the method.
        slices: from the first layers to the last; one without layers for `models:`.
        base: the base, or None.
        parameters: those of all.
        dtype: of the result.
        vocabulary: how tokenizers are brought together: None, "union", "base", or the name of a model.
        chat_template: None, "auto" or a text.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None
    parameters: Mapping[str, Setting]
    dtype: str | None
    vocabulary: str | None
    chat_template: str | None


def read_configuration(file: Path) -> dict[str, Any]:
    """What a YAML file holds.

    Raises:
        DataError: no YAML, several documents, or no mapping.
    """
    yaml = require("yaml", "recipes")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not one YAML document ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a mapping with merge_method:, found {type(content).__name__}")
    return content


def configuration(content: Mapping[str, Any]) -> Configuration:
    """Check a configuration; nothing is opened.

    Raises:
        InputError: keys that are missing, contradict each other or are not supported, unknown methods; what was meant is
            named.
    """
    for key in content:
        if key not in TOP:
            warn(f"recipe: {key!r} is no key of a configuration{nearest(key, TOP)}; it has no effect")
    how = translation(content.get("merge_method"))
    if content.get("modules"):
        raise InputError(
            "modules: models of several modules are not supported; merge each by a configuration of its own"
        )
    given = [key for key in ("models", "slices") if content.get(key)]
    if len(given) != 1:
        raise InputError(f"expected one of models: and slices:, found {' and '.join(given) or 'none'}")
    parameters = _parameters(content, "parameters", how)
    base = None if content.get("base_model") is None else _called(content["base_model"])
    if given == ["models"]:
        sources = tuple(
            _source(entry, f"models[{i}]", how) for i, entry in enumerate(_list(content["models"], "models"))
        )
        if base is not None and base not in [source.model for source in sources]:
            sources = (*sources, Source(base, None, {}))
        slices = (Slice(sources, {}, None),)
    else:
        slices = tuple(_slice(entry, f"slices[{i}]", how) for i, entry in enumerate(_list(content["slices"], "slices")))
    if content.get("tokenizer") and content.get("tokenizer_source"):
        raise InputError("tokenizer and tokenizer_source: give one of them")
    chat = content.get("chat_template")
    out = content.get("out_dtype") or content.get("dtype")
    return Configuration(
        str(content["merge_method"]),
        slices,
        base,
        parameters,
        out,
        _vocabulary(content),
        None if chat is None else str(chat),
    )


def _vocabulary(content: Mapping[str, Any]) -> str | None:
    tokenizer = content.get("tokenizer")
    if not tokenizer:
        found = content.get("tokenizer_source")
        return None if found is None else _called(found)
    if not isinstance(tokenizer, Mapping):
        raise InputError(f"tokenizer: expected a mapping with source:, got {tokenizer!r}")
    for key in ("tokens", "pad_to_multiple_of"):
        if tokenizer.get(key):
            raise InputError(f"tokenizer.{key} is not supported; leave it out")
    return _called(tokenizer.get("source", "union"))


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise InputError(f"{what}: expected a list of mappings")
    return value


def _slice(entry: Mapping[str, Any], where: str, how: Translation) -> Slice:
    _check_keys(entry, GOOD, where)
    sources = tuple(
        _source(source, f"{where}.sources[{i}]", how)
        for i, source in enumerate(_list(entry.get("sources"), f"{where}.sources"))
    )
    lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
    if len(lengths) != 1 or any(source.layers is None for source in sources):
        raise InputError(
            f"{where}: all sources need a layer_range, of the same length; found {[s.layers for s in sources]}"
        )
    base = entry.get("base_model")
    return Slice(sources, _parameters(entry, f"{where}.parameters", how), None if base is None else _called(base))


def _source(entry: Mapping[str, Any], where: str, how: Translation) -> Source:
    _check_keys(entry, ("model", "layer_range", "parameters"), where)
    if "model" not in entry:
        raise InputError(f"{where}: lacks model:")
    layers = entry.get("layer_range")
    if layers is not None and not (
        isinstance(layers, list) and len(layers) == 2 and all(isinstance(n, int) for n in layers)
    ):
        raise InputError(f"{where}: layer_range: expected [first, after the last], got {layers!r}")
    return Source(
        _called(entry["model"]),
        None if layers is None else (layers[0], layers[1]),
        _parameters(entry, f"{where}.parameters", how),
    )


def _called(reference: Any) -> str:
    """A model's reference as text: `path`, or `path+adapter`."""
    if isinstance(reference, Mapping):
        model, lora = (reference.get(key) for key in ("model", "lora"))
        name = model.get("path") if isinstance(model, Mapping) else model
        added = lora.get("path") if isinstance(lora, Mapping) else lora
        reference = f"{name}+{added}" if added else name
    if not isinstance(reference, str) or not reference:
        raise InputError(f"{reference!r}: expected the path of a model, or path+adapter")
    return reference


def _check_keys(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in known:
            warn(f"{where}: {key!r} is no key there{nearest(key, known)}; it has no effect")


def _parameters(entry: Mapping[str, Any], where: str, how: Translation) -> dict[str, Setting]:
    found = entry.get("parameters") or {}
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: expected a mapping of parameters, got {found!r}")
    for name, setting in found.items():
        if name not in how.known:
            warn(f"{where}: {name!r} is no parameter of the method{nearest(name, how.known)}; it has no effect")
        _check_setting(setting, f"{where}.{name}")
    return dict(found)


def _check_setting(setting: Setting, where: str) -> None:
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, list) and any(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            if not isinstance(entry, Mapping) or not {"value"} <= set(entry) <= {"value", "filter"}:
                raise InputError(f"{where}: expected entries {{filter, value}}, got {entry!r}")
            _check_setting(entry["value"], where)
        return
    for value in setting if isinstance(setting, list) else [setting]:
        _number(value, where)


def _number(value: Any, where: str) -> float | bool:
    if isinstance(value, bool | int | float):
        return value
    try:
        return float(value)  # YAML takes 1e-5 for a text
    except (TypeError, ValueError):
        raise InputError(
            f"{where}: expected a number, a list of numbers or of {{filter, value}}, got {value!r}"
        ) from None


def evaluate(setting: Setting, name: str, t: float) -> float | bool | None:
    """The value of a setting for the tensor `name` at depth `t` from 0 to 1; None where no filter fits."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _number(setting, name)
    if not setting:
        return None
    if not isinstance(setting[0], Mapping):
        values = [_number(value, name) for value in setting]
        if all(isinstance(value, bool) for value in values):
            return values[int(t * (len(values) - 1))]
        place = t * (len(values) - 1)
        low = int(place)
        share = place - low
        return (1 - share) * values[low] + share * values[min(low + 1, len(values) - 1)]
    for entry in setting:
        wanted = entry.get("filter")
        if wanted is None or wanted == "*" or str(wanted) in name:
            return evaluate(entry["value"], name, t)
    return None


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
    vocabulary = "base" if config.base is not None and config.vocabulary == config.base else config.vocabulary
    if vocabulary not in (None, "union", "base"):
        raise InputError(f"tokenizer_source: {vocabulary!r} is not supported; give union, base, or the base_model")
    if vocabulary is not None:
        joined, origin, _ = by_token(views, base, vocabulary)
        names = weight_sets(joined, origin).names
    else:
        names = weight_sets(views, base).names
    options = _options(config, how, order, views[0], names, models, prefixes)
    if "seed" in how.function.method.signature.parameters:
        options["seed"] = seed
    merged = plan(how.function, views, out, base=base, dtype=config.dtype, vocabulary=vocabulary, **options)
    return replace(merged, texts=dict(merged.texts) | _texts(config, content, models))


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


def _values(option: Any) -> Iterable[Any]:
    """The values of an option, which is one for all tensors or one for each name."""
    return option.values() if isinstance(option, Mapping) else [option]


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
