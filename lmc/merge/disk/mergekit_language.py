"""mergekit's configuration language: what a file says, checked, and what its values mean.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc.core.context import warn
from lmc.core.extras import require
from lmc.errors import DataError, InputError, nearest
from lmc.merge.disk.mergekit_methods import Translation, translation

TOP = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "modules", "name",
)  # fmt: skip
OTHERS = {"experts": "mergekit-moe", "genome": "mergekit-evolve"}  # other programs, by a key that their files have
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
        vocabulary: how tokenizers are brought together: None, or source (union, base, the name of a model), tokens and pad.
        chat_template: None, "auto" or a text.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None
    parameters: Mapping[str, Setting]
    dtype: str | None
    vocabulary: Mapping[str, Any] | None
    chat_template: str | None


def read_configuration(file: Path) -> dict[str, Any]:
    """The contents of a YAML file.

    Raises:
        DataError: no YAML, several documents, no mapping, or a key that a mapping has twice.
    """
    yaml = require("yaml", "recipes")
    try:
        text = file.read_text(encoding="utf-8")
        _check_once(yaml.compose(text, yaml.SafeLoader), file)
        content = yaml.safe_load(text)
    except yaml.composer.ComposerError as error:
        raise DataError(
            f"{file}: not one YAML document, as it has several merges; give each a file of its own"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not one YAML document ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a mapping with merge_method:, found {type(content).__name__}")
    return content


def _check_once(root: Any, file: Path) -> None:
    """Raise `DataError` for a key that a mapping has twice: YAML readers take the last one without a word."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))  # anchors are met again
        lines: dict[str, int] = {}
        for child in node.value:
            key, value = child if isinstance(child, tuple) else (None, child)
            waiting.append(value)
            if key is None or not isinstance(key.value, str):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise DataError(
                    f"{file}: {key.value!r} stands twice in one mapping, in lines {lines[key.value]} and {line}"
                )
            lines[key.value] = line


def configuration(content: Mapping[str, Any]) -> Configuration:
    """Check a configuration; nothing is opened.

    Raises:
        InputError: keys that are missing, contradict each other or are not supported, unknown methods; what was meant is
            named.
    """
    for key in content:
        if key not in TOP:
            warn(f"recipe: {key!r} is no key of a configuration{nearest(key, TOP)}; it has no effect")
    if "merge_method" not in content:
        other = next((tool for key, tool in OTHERS.items() if key in content), "")
        raise InputError(
            "merge_method: is missing" + (f"; this is a configuration of {other}, not of a merge" if other else "")
        )
    how = translation(content["merge_method"])
    if content.get("modules"):
        content = _only_module(content)
    given = [key for key in ("models", "slices") if content.get(key)]
    if len(given) != 1:
        raise InputError(f"expected one of models: and slices:, found {' and '.join(given) or 'none'}")
    parameters = _parameters(content, "parameters", how)
    base = None if content.get("base_model") is None else _called(content["base_model"])
    if given == ["models"]:
        sources = tuple(
            _source(entry, f"models[{i}]", how, layers=False)
            for i, entry in enumerate(_list(content["models"], "models"))
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
        None if out is None else str(out).removeprefix("torch."),
        _vocabulary(content),
        None if chat is None else str(chat),
    )


def _only_module(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model of one module, whose parameters stand before the general ones."""
    modules = content["modules"]
    if not isinstance(modules, Mapping) or not all(isinstance(module, Mapping) for module in modules.values()):
        raise InputError(f"modules: expected a mapping of names to models: or slices:, got {modules!r}")
    if len(modules) > 1:
        raise InputError(
            f"modules: models of several modules ({', '.join(map(str, modules))}) are not supported; merge each by a "
            "configuration of its own"
        )
    if both := [key for key in ("models", "slices") if content.get(key)]:
        raise InputError(f"expected one of models:, slices: and modules:, found {' and '.join(both)} and modules")
    ((name, module),) = modules.items()
    _check_keys(module, ("models", "slices", "parameters"), f"modules.{name}")
    general, own = dict(content.get("parameters") or {}), dict(module.get("parameters") or {})
    if twice := sorted(general.keys() & own.keys()):
        raise InputError(f"modules.{name}.parameters and parameters both set {', '.join(twice)}; give it once")
    rest = {key: value for key, value in content.items() if key != "modules"}
    return rest | {key: module[key] for key in ("models", "slices") if key in module} | {"parameters": general | own}


def _vocabulary(content: Mapping[str, Any]) -> dict[str, Any] | None:
    tokenizer = content.get("tokenizer")
    if not tokenizer:
        found = content.get("tokenizer_source")
        return None if found is None else {"source": _called(found)}
    if not isinstance(tokenizer, Mapping):
        raise InputError(f"tokenizer: expected a mapping with source:, got {tokenizer!r}")
    _check_keys(tokenizer, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
    found = {"source": _called(tokenizer.get("source", "union"))}
    if tokenizer.get("pad_to_multiple_of") is not None:
        found["pad"] = tokenizer["pad_to_multiple_of"]
    tokens = tokenizer.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise InputError(f"tokenizer.tokens: expected a mapping of tokens, got {tokens!r}")
    return found | {"tokens": {str(token): _token(row, f"tokenizer.tokens.{token}") for token, row in tokens.items()}}


def _token(row: Any, where: str) -> dict[str, Any]:
    """The origin of the embedding of a token, in the words of `vocabulary`; models by their names."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected a mapping of source and force, got {row!r}")
    _check_keys(row, ("source", "force"), where)
    force, source = {"force": bool(row.get("force"))}, row.get("source")
    if source is None:
        if force["force"]:
            raise InputError(f"{where}: force without source: nothing to take the embedding from")
        return {}
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind == "zero":
        return force | {"zero": True}
    if kind != "model_token":
        return force | {"model": _called(source)}
    given = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
    if len(given) != 1:
        raise InputError(f"{where}: expected one of token: and token_id:, found {len(given)}")
    return force | {"model": _called(source.get("model")), "token": given[0]}


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


def _source(entry: Mapping[str, Any], where: str, how: Translation, layers: bool = True) -> Source:
    _check_keys(entry, ("model", "layer_range", "parameters") if layers else ("model", "parameters"), where)
    if "model" not in entry:
        raise InputError(f"{where}: lacks model:")
    given = entry.get("layer_range") if layers else None
    if given is not None and not (
        isinstance(given, list) and len(given) == 2 and all(isinstance(n, int) for n in given)
    ):
        raise InputError(f"{where}: layer_range: expected [first, after the last], got {given!r}")
    return Source(
        _called(entry["model"]),
        None if given is None else (given[0], given[1]),
        _parameters(entry, f"{where}.parameters", how, model=True),
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


def _parameters(entry: Mapping[str, Any], where: str, how: Translation, model: bool = False) -> dict[str, Setting]:
    """The parameters of an entry, checked; of a `model` only some are looked up."""
    found = entry.get("parameters") or {}
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: expected a mapping of parameters, got {found!r}")
    for name, setting in found.items():
        if name not in how.known:
            warn(f"{where}: {name!r} is no parameter of the method{nearest(name, how.known)}; it has no effect")
        elif model and name not in how.each:
            warn(f"{where}: {name!r} is one number for all models, which is not looked up here; it has no effect")
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
        place = t * (len(values) - 1)
        low = int(place)
        share = place - low
        return (1 - share) * values[low] + share * values[min(low + 1, len(values) - 1)]
    for entry in setting:
        wanted = entry.get("filter")
        if wanted is None or wanted == "*" or str(wanted) in name:
            return evaluate(entry["value"], name, t)
    return None
