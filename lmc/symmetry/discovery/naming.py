"""Names that a person recognises: after the module that produces the units, `heads`, `experts` or `stream` where that
says more, an index in brackets for groups inside units of other groups."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from lmc.symmetry.group import Table

Tables = Mapping[str, tuple[Table, ...]]

MANY = 6


def module_of(tensor: str) -> str:
    """The module path of a parameter, with what tells the parameters of one module apart (`in_proj`, `cls_token`)."""
    path, _, last = tensor.rpartition(".")
    last = re.sub(r"^(weight|bias|running_mean|running_var|original\d*|weight_[vg])$|[_.]?(weight|bias)$", "", last)
    path = path.replace("parametrizations.", "")
    path = re.sub(r"\.(weight|bias)$", "", path)
    return ".".join(part for part in (path, last) if part)


def base_name(
    tables: Tables, used: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], nested: bool, parent: bool
) -> str:
    """The name of a family, before it is made unique.

    Args:
        tables: of one group of the family.
        used: for each tensor, when it is first used in the network.
        shapes: of the tensors.
        nested: whether the group lives inside units of another group.
        parent: whether other groups live inside its units.
    """
    tensors = sorted(tables, key=lambda name: (used.get(name, len(used)), name))
    first = tensors[0]
    table = tables[first][0]
    modules = [module_of(t) for t in tensors]
    name, many = modules[0], not nested and len(set(modules)) > MANY
    producers = modules[:1] + [module_of(t) for t in tensors if any(0 in table.dims for table in tables[t])]
    stacks = [
        t for t in tensors if len(shapes[t]) == 3 and tables[t][0].dims[0] == 0 and tables[t][0].rows.shape[1] == 1
    ]
    if parent and stacks:
        path = shared_path([module_of(t) for t in stacks])
        return path if path.endswith("experts") else f"{path}.experts".lstrip(".")
    if has_blocks(table) and (parent or not nested):
        path = shared_path(modules) or name
        if sum("att" in m.lower() for m in modules) > len(modules) / 2:
            return f"{path}.heads"
        return f"{path}.stream.blocks" if many else f"{name}.blocks"
    if many:
        return f"{shared_path(producers, share=1)}.stream".lstrip(".")
    if nested and is_fused(first, shapes):
        return f"{name}.v" if len(set(modules)) > 1 else f"{name}.qk"
    return name


def has_blocks(table: Table) -> bool:
    """Whether units are runs of neighbouring positions."""
    return table.rows.shape[1] > 1 and bool((table.rows[0, 1:] - table.rows[0, :-1] == 1).any())


def is_fused(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether one tensor holds queries, keys and values together."""
    return bool(re.search(r"qkv|in_proj|c_attn|query_key_value", tensor)) and len(shapes[tensor]) <= 2


def shared_path(modules: Sequence[str], share: float = 0.9) -> str:
    """The longest module path that at least this share of the modules lie under."""
    paths: Counter[tuple[str, ...]] = Counter()
    for module in modules:
        parts = tuple(module.split("."))
        paths.update(parts[:k] for k in range(len(parts)))
    common = [path for path, times in paths.items() if times >= share * len(modules)]
    return ".".join(max(common, key=len, default=()))


def safe(name: str) -> str:
    """Only letters, digits, `_`, `.` and `-`."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", name) or "units"


def unique(names: Sequence[str]) -> list[str]:
    """Repeated names get a number."""
    taken: set[str] = set()
    result = []
    for name in names:
        chosen, k = name, 2
        while chosen in taken:
            chosen, k = f"{name}.{k}", k + 1
        taken.add(chosen)
        result.append(chosen)
    return result
