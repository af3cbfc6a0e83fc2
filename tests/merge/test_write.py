"""Merging on disk gives what merging in memory gives, in little memory, and survives interrupts bit for bit."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lmc.merge as merge
from lmc.core.workers import Processes
from lmc.errors import DataError, InputError, MismatchError, WeightsError, WorkerError
from lmc.merge.disk import shards
from lmc.merge.disk import write as to_disk
from lmc.merge.disk.shards import parse_size
from lmc.merge.engine import chunks as parts
from lmc.merge.engine import quantiles
from lmc.merge.engine.method import MergeFunction
from lmc.weights.checkpoint import Extent
from lmc.weights.opening import open_checkpoint
from lmc.weights.state import natural

# Files list names in natural order, whatever the order in memory was.
same = functools.partial(support.same, ordered=False)

METHODS = {
    "average": {"weights": [1.0, 3.0]},
    "task_arithmetic": {"scale": {"*": 0.5, "block.1": 0.25}},
    "ties": {"density": 0.4},
    "dare": {"density": 0.3, "seed": 5},
    "pcb": {"density": 0.5},
    "slerp": {"t": 0.25},
    "lines": {"method": merge.ties, "density": 0.5},
    "della": {"density": 0.6, "epsilon": 0.3},
    "breadcrumbs": {"density": 0.6, "outliers": 0.2},
    "karcher_mean": {"weights": [1.0, 3.0]},
    "model_stock": {"filter_wise": True},
    "variance_corrected": {},
    "tall_mask": {"method": merge.della, "task": 1},
}


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One layout with integers, statistics, an odd number of half-precision values, and a tie."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "embed.weight": torch.randn(7, 5, generator=generator).to(dtype),
        "norm.weight": torch.randn(5, generator=generator).bfloat16(),
        **{f"block.{i}.weight": torch.randn(5, 5, generator=generator).to(dtype) for i in range(3)},
        "norm.running_var": torch.rand(5, generator=generator),
        "norm.num_batches_tracked": torch.tensor(seed),
    }
    return weights | {"head.weight": weights["embed.weight"]}


def folder(path: Path, weights: dict[str, Tensor]) -> Path:
    """A sharded folder, with the tie as `safetensors.torch.save_model` keeps it."""
    path.mkdir()
    stored = {name: tensor for name, tensor in weights.items() if name != "head.weight"}
    files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(stored)}
    for file in sorted(set(files.values())):
        tie = {"head.weight": "embed.weight"} if files["embed.weight"] == file else {}
        save_file({n: t for n, t in stored.items() if files[n] == file}, path / file, metadata=tie)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [folder(tmp_path / name, state(seed)) for seed, name in enumerate(("base", "a", "b"))]


def run(name: str, paths: list[Path], out: Path, **options):
    options = METHODS[name] | {"base": paths[0], "shard_size": 150, "progress": False} | options
    return merge.write(getattr(merge, name), paths[1:], out, **options)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# Of the narrow dtype by default one of each kind: an average, one with thresholds over all, one with random numbers, and one
# that looks at whole tensors.
NARROW = ("average", "ties", "dare", "slerp")
IN_BOTH = [
    pytest.param(name, dtype, marks=[pytest.mark.thorough] if dtype == torch.bfloat16 and name not in NARROW else [])
    for name in METHODS
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_on_disk_as_in_memory(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    states = [state(seed, dtype) for seed in range(3)]
    paths = [folder(tmp_path / f"{seed}", weights) for seed, weights in enumerate(states)]
    merged = run(name, paths, tmp_path / "out")
    expected = getattr(merge, name)(states[1:], base=states[0], **METHODS[name])
    assert same(merged, expected) and len(merged.files) > 1
    assert set(merged) == set(expected) and list(merged.stored) == sorted(merged.stored, key=natural)
    loaded = merged.load()
    assert merged.ties == {"head.weight": "embed.weight"} and loaded["head.weight"] is loaded["embed.weight"]
    merged.verify()
    by_others = {k: v for file in merged.files for k, v in load_file(file).items()}  # the library's own reader
    assert same(by_others, {k: v for k, v in expected.items() if k != "head.weight"})


def test_models_in_memory_and_one_file(tmp_path: Path) -> None:
    a, b = state(1), state(2)
    merged = merge.write(merge.average, [a, b], tmp_path / "deep" / "out", progress=False)
    assert [file.name for file in merged.files] == ["model.safetensors"]
    assert same(merged, merge.average([a, b])) and merged.ties == {"head.weight": "embed.weight"}
    again = merge.write(merge.average, [merged], tmp_path / "again", progress=False)
    assert same(again, merged) and again.ties == merged.ties


def test_a_tie_that_one_model_broke_is_not_a_tie(tmp_path: Path, paths: list[Path]) -> None:
    broken = state(2) | {"head.weight": torch.ones(7, 5)}
    merged = merge.write(merge.average, [paths[1], broken], tmp_path / "out", progress=False)
    assert not merged.ties and same(merged, merge.average([state(1), broken]))


def test_the_plan_says_what_will_be(tmp_path: Path, paths: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    plan = merge.plan(merge.ties, paths[1:], tmp_path / "out", base=paths[0], shard_size="1kB", density=0.5)
    assert plan.size == open_checkpoint(paths[1]).size and not plan.one_pass
    assert plan.memory >= 35 * 4 * 8 and not (tmp_path / "out").exists()
    text = str(plan)
    assert "ties(density=0.5) of 2 models and their base" in text and "1 files" in text and "1 tied names" in text
    merged = merge.write(merge.ties, paths[1:], tmp_path / "out", base=paths[0], shard_size="1kB", density=0.5)
    assert capsys.readouterr().out.startswith(text)
    assert merged.size == plan.size and len(merged.files) == len(plan.shards)
    assert merge.plan(merge.average, paths[1:], tmp_path / "other").one_pass
    on_top = merge.plan(merge.lines, paths[1:], tmp_path / "other", base=paths[0], method=merge.ties, density=0.5)
    assert "lines(method=ties, density=0.5)" in str(on_top)


class Stop(BaseException):
    """An interrupt."""


@pytest.mark.parametrize("name", ["average", "ties", "dare"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_merge_goes_on(
    name: str, after: int, tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(run(name, paths, tmp_path / "whole").path)
    original, calls = to_disk.write_shard, []

    def interrupted(path, shard, ties, parts, written, start):
        calls.append(shard.file)
        if len(calls) > after:
            path.write_bytes(b"half a file")
            path.with_name(".merge.json.0badcafe").write_text("{")
            raise Stop
        return original(path, shard, ties, parts, written, start)

    monkeypatch.setattr(to_disk, "write_shard", interrupted)
    with pytest.raises(Stop):
        run(name, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(to_disk, "write_shard", original)
    with pytest.raises(InputError, match="an unfinished merge that differs in shard_size"):
        run(name, paths, tmp_path / "out", shard_size=160)
    plan = merge.plan(getattr(merge, name), paths[1:], tmp_path / "out", base=paths[0], shard_size=150, **METHODS[name])
    assert len(plan.done) == after and (f"{after} files are complete" in str(plan)) == (after > 0)
    result = run(name, paths, tmp_path / "out")
    assert contents(result.path) == whole
    assert not list(tmp_path.glob(".*"))


def test_finished_files_are_not_made_again_and_damaged_ones_are(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[str] = []

    @merge.on_tensors
    def mean(tensors: Tensor, *, name: str) -> Tensor:
        merged.append(name)
        if name == "block.2.weight" and merged.count(name) == 1:
            raise Stop
        return tensors.mean(0)

    def go():
        return merge.write(mean, paths[1:], tmp_path / "out", shard_size=150, progress=False)

    with pytest.raises(Stop):
        go()
    partial = tmp_path / ".out.unfinished"
    first = partial / min(json.loads((partial / "merge.json").read_text())["files"])
    first.write_bytes(first.read_bytes()[:-1] + b"?")  # holds block.0.weight alone
    result = go()
    assert merged.count("block.0.weight") == 2 and merged.count("embed.weight") == 1
    assert same(result, mean([state(1), state(2)]))


def test_a_resumed_merge_wants_the_same_inputs(tmp_path: Path, paths: list[Path]) -> None:
    spoiled = {k: v.clone() for k, v in state(2).items()}
    spoiled["block.1.weight"][2, 3] = float("nan")
    broken = folder(tmp_path / "broken", spoiled)
    place = r"block.1.weight of models\[1\] \(.*broken/part-0\.safetensors\): 1 of 25 .* first at \(2, 3\)"
    with pytest.raises(WeightsError, match=place):
        run("average", [*paths[:2], broken], tmp_path / "out")
    with pytest.raises(InputError, match="differs in models"):
        run("average", paths, tmp_path / "out")
    shutil.rmtree(tmp_path / ".out.unfinished")
    assert same(run("average", paths, tmp_path / "out"), merge.average([state(1), state(2)], weights=[1, 3]))


def test_bad_input_is_named(tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: exists already"):
        run("average", paths, tmp_path / "out")
    (tmp_path / "out").rmdir()
    with pytest.raises(InputError, match="'swa' does not merge tensor by tensor"):
        merge.write(merge.swa, paths, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a function, such as lmc.merge.average"):
        merge.write("average", paths, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"write \[model\]"):
        merge.write(merge.average, paths[0], tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="desnity"):
        merge.write(merge.ties, paths[1:], tmp_path / "out", base=paths[0], desnity=0.1)
    with pytest.raises(InputError, match="base"):
        merge.write(merge.ties, paths[1:], tmp_path / "out")
    with pytest.raises(InputError, match="shard_size: .* got '5 apples'"):
        run("average", paths, tmp_path / "out", shard_size="5 apples")
    with pytest.raises(MismatchError, match=r"block.2.weight.*missing in models\[1\]"):
        fewer = {k: v for k, v in state(2).items() if k != "block.2.weight"}
        merge.write(merge.average, [paths[1], fewer], tmp_path / "out")
    (paths[2] / "part-1.safetensors").unlink()
    with pytest.raises(DataError, match=r"part-1\.safetensors: missing"):
        run("average", paths, tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(to_disk.shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(InputError, match="needs .* has 100 B free"):
        run("average", paths[:2], tmp_path / "out", weights=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base"]


def test_tampering_is_found(tmp_path: Path, paths: list[Path]) -> None:
    merged = run("average", paths, tmp_path / "out")
    file = merged.files[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=f"{file.name}: not as it was written"):
        open_checkpoint(tmp_path / "out").verify()


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "1.5 MiB": 3 * 2**19, "200": 200, "2kb": 2000, 7: 7}
    assert {text: parse_size(text) for text in sizes} == sizes
    for wrong in ("0GB", "-1", "GB", "inf"):
        with pytest.raises(InputError, match="shard_size"):
            parse_size(wrong)


MEASURE = """
import re, sys
from pathlib import Path
import lmc.merge as merge

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

base, a, b = sys.argv[1:4]
names = ["average", "ties", "slerp", "della"]
for i, (size, name) in enumerate((size, name) for size in ("small", "large") for name in names):
    options = {} if name == "average" else {"base": f"{base}-{size}"}
    models, out = [f"{a}-{size}", f"{b}-{size}"], f"{base}-out-{i}"
    plan = merge.plan(getattr(merge, name), models, out, shard_size="8MB", **options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before = memory("VmRSS")
    plan.write(progress=False)
    print(size, memory("VmHWM") - before, plan.memory, plan.size)
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process as Linux tells it")
def test_memory_stays_within_the_plan(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        for size, values in (("small", 20_000), ("large", 8_000_000)):
            (tmp_path / f"{name}-{size}").mkdir()
            generator = torch.Generator().manual_seed(seed)
            weights = {f"w{i}": torch.randn(values // (4 * i + 1) // 500, 500, generator=generator) for i in range(4)}
            save_file(weights, tmp_path / f"{name}-{size}" / "model.safetensors")
    # Freed memory goes back to the system at once, so that the peak is that of what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("base", "a", "b"))]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    measured = [tuple(map(int, line.split()[1:])) for line in lines if line.startswith("large")]
    assert len(measured) == 4
    for grown, planned, size in measured:
        assert 1e6 < grown < planned + 4e6 and grown < 1.2 * size  # of one model; two and a base are read
        assert planned < 3 * 4 * 8_000_000  # copies of the largest tensor


def test_large_tensors_are_worked_on_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the length of a part, results are those of whole tensors."""
    states = [state(seed) for seed in range(3)]
    sources = [folder(tmp_path / f"{seed}", weights) for seed, weights in enumerate(states)]
    whole = {name: getattr(merge, name)(states[1:], base=states[0], **METHODS[name]) for name in METHODS}
    monkeypatch.setattr(parts, "VALUES", 7)
    for name, expected in whole.items():
        assert same(run(name, sources, tmp_path / name), expected)
        assert same(getattr(merge, name)(states[1:], base=states[0], **METHODS[name]), expected)
    turned = [{k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in weights.items()} for weights in states]
    tied = [weights | {"head.weight": weights["embed.weight"]} for weights in turned]
    assert not tied[1]["block.0.weight"].is_contiguous()
    assert same(merge.ties(tied[1:], base=tied[0], density=0.4), whole["ties"])


def test_only_what_a_part_needs_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in memory at any time, counted: a few parts, not copies of the largest tensor."""
    generator = torch.Generator().manual_seed(0)
    size = 3_000_000
    for name in ("a", "b"):
        save_file({"w": torch.randn(size, generator=generator)}, tmp_path / f"{name}.safetensors")
    lengths: list[int] = []
    original = Extent.read

    def read(self: Extent, part: slice | None = None) -> Tensor:
        found = original(self, part)
        lengths.append(found.numel())
        return found

    monkeypatch.setattr(Extent, "read", read)
    sources = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    plan = merge.plan(merge.average, sources, tmp_path / "out")
    plan.write(progress=False)
    assert max(lengths) <= parts.VALUES and sum(lengths) >= 2 * size
    assert plan.memory < 3 * size * 4


def test_the_same_mask_everywhere_is_kept(tmp_path: Path) -> None:
    """Infinities that are meant: an attention mask that all models share. Anywhere else they are a fault."""
    mask = torch.full((40, 40), float("-inf")).triu(1)
    states = [state(seed) | {"attn.bias": mask.clone(), "attn.mask": mask.t().contiguous()} for seed in range(3)]
    for i, weights in enumerate(states):
        save_file({k: v for k, v in weights.items() if k != "head.weight"}, tmp_path / f"{i}.safetensors")
    sources = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for method in (merge.average, merge.ties, merge.slerp):
        merged = merge.write(method, sources[1:], tmp_path / method.__name__, base=sources[0], progress=False)
        assert torch.equal(merged["attn.bias"], mask) and torch.equal(merged["attn.mask"], mask.t())
        expected = method([weights for weights in states[1:]], base=states[0])
        assert all(torch.equal(merged[name], expected[name]) for name in merged)
    states[2]["attn.bias"] = mask.clone().fill_diagonal_(1.0)
    save_file({k: v for k, v in states[2].items() if k != "head.weight"}, sources[2])
    with pytest.raises(WeightsError, match=r"attn.bias of models\[0\].*infinite, first at \(0, 1\)"):
        merge.write(merge.average, sources[1:], tmp_path / "out", progress=False)


def test_nan_deep_in_one_shard_is_named(tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "VALUES", 7)
    spoiled = {k: v.clone() for k, v in state(2).items()}
    spoiled["block.2.weight"][4, 3] = float("nan")
    broken = folder(tmp_path / "broken", spoiled)
    place = r"block.2.weight of models\[1\] \(.*broken/part-1\.safetensors\): .* first at \(4, 3\)"
    for name in ("average", "ties"):
        with pytest.raises(WeightsError, match=place):
            run(name, [*paths[:2], broken], tmp_path / name, **({"weights": None} if name == "average" else {}))


def test_configuration_and_tokenizer_come_along(tmp_path: Path, paths: list[Path]) -> None:
    texts = {"config.json": "{}", "tokenizer.json": '{"a": 1}', "merges.txt": "a b", "chat_template.jinja": "{{ x }}"}
    for path in paths:
        for name, text in texts.items():
            (path / name).write_text(text if path == paths[0] else text + " ")
        (path / "merge.json").write_text("old")
        (path / "trainer_state.json").write_text("{}")
        (path / "code.py").write_text("print()")
    merged = run("average", paths, tmp_path / "out")
    found = {file.name: file.read_text() for file in merged.path.iterdir() if file.suffix != ".safetensors"}
    assert {name: found[name] for name in texts} == texts
    assert set(found) == {*texts, "merge.json", "model.safetensors.index.json"} and found["merge.json"] != "old"
    without = merge.write(merge.average, paths[1:], tmp_path / "other", progress=False)
    assert (without.path / "config.json").read_text() == "{} "


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_replayed(name: str, tmp_path: Path, paths: list[Path]) -> None:
    first = run(name, paths, tmp_path / "out")
    again = merge.replay(first.path, tmp_path / "again", progress=False)
    assert contents(again.path) == contents(first.path)


def test_a_recipe_that_no_longer_holds_is_refused(tmp_path: Path, paths: list[Path]) -> None:
    merged = run("average", paths, tmp_path / "out")
    recipe = json.loads((merged.path / "merge.json").read_text())
    with pytest.raises(InputError, match="'average' is not the function .* its source differs"):
        merge.replay(recipe | {"rule": "0"}, tmp_path / "x")
    with pytest.raises(InputError, match=r"'nothing' is not a method of lmc\.merge"):
        merge.replay(recipe | {"method": "nothing"}, tmp_path / "x")
    with pytest.raises(DataError, match="it lacks rule"):
        merge.replay({k: v for k, v in recipe.items() if k != "rule"}, tmp_path / "x")
    in_memory = merge.write(merge.average, [state(1)], tmp_path / "memory", progress=False)
    with pytest.raises(InputError, match=r"models\[0\] was in memory"):
        merge.replay(in_memory.path, tmp_path / "x")
    weights = state(1)
    weights["block.0.weight"][0, 0] += 1.0
    shutil.rmtree(paths[1])
    folder(paths[1], weights)  # of the same sizes
    with pytest.raises(DataError, match=r"part-\d.safetensors: is not what was merged"):
        merge.replay(merged.path, tmp_path / "y", progress=False)
    with pytest.raises(DataError, match=r"model-0000\d-of-.*: differs from the file of the recipe"):
        merge.replay({k: v for k, v in recipe.items() if k != "inputs"}, tmp_path / "y", progress=False)
    shutil.rmtree(paths[1])
    paths[1].mkdir()
    save_file({"w": torch.zeros(2)}, paths[1] / "model.safetensors")
    with pytest.raises(DataError, match=r"models\[0\] is not what it was"):
        merge.replay(merged.path, tmp_path / "z", progress=False)
    with pytest.raises(InputError, match="align first"):
        merge.write(merge.average, paths[1:], tmp_path / "d", align=lambda w: w)


@pytest.mark.parametrize("size", [pytest.param(150, marks=pytest.mark.thorough), 10_000])
def test_a_killed_process_leaves_what_can_be_gone_on_from(size: int, tmp_path: Path, paths: list[Path]) -> None:
    """A process that is killed in the middle of a write: the same call finishes, with the result of a quiet run."""
    whole = contents(run("ties", paths, tmp_path / "whole", shard_size=size).path)
    script = KILLED.format(paths=[str(p) for p in paths], out=str(tmp_path / "out"), after=5, size=size)
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 9
    assert not (tmp_path / "out").exists() and list((tmp_path / ".out.unfinished").glob("*.safetensors"))
    options = METHODS["ties"] | {"base": paths[0], "shard_size": size}
    plan = merge.plan(merge.ties, paths[1:], tmp_path / "out", **options)
    if size > 150:  # one file, of which four tensors were whole
        assert len(plan.begun["model.safetensors"].tensors) == 4 and "4 tensors of" in str(plan)
    assert contents(run("ties", paths, tmp_path / "out", shard_size=size).path) == whole
    assert not list(tmp_path.glob(".*"))


def stopped(paths: list[Path], out: Path, at: str, **options) -> tuple[MergeFunction, list[str]]:
    """A merge into one file that an interrupt ended at a tensor, and the tensors that its method is asked for."""
    asked: list[str] = []

    @merge.on_tensors
    def mean(tensors: Tensor, *, name: str) -> Tensor:
        asked.append(name)
        if name == at and asked.count(name) == 1:
            raise Stop
        return tensors.mean(0)

    with pytest.raises(Stop):
        merge.write(mean, paths[1:], out, progress=False, **options)
    return mean, asked


def test_one_file_goes_on_behind_its_last_whole_tensor(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "APART", 1)
    mean, asked = stopped(paths, tmp_path / "out", "block.2.weight")
    begun = merge.plan(mean, paths[1:], tmp_path / "out").begun["model.safetensors"]
    assert "block.1.weight" in begun.tensors and "block.2.weight" not in begun.tensors
    before = len(asked)
    result = merge.write(mean, paths[1:], tmp_path / "out", progress=False)
    assert not begun.tensors & set(asked[before:]) and "block.2.weight" in asked[before:]
    quiet = merge.write(mean, paths[1:], tmp_path / "quiet", progress=False)
    assert contents(result.path) == contents(quiet.path)
    result.verify()


@pytest.mark.parametrize("size", [150, 10_000])
def test_workers_go_on_and_are_gone_on_from(
    size: int, tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times interrupted, with workers and without: no tensor that was noted is made again."""
    monkeypatch.setattr(shards, "APART", 1)
    monkeypatch.setattr(shards, "PART", 1)
    whole = contents(run("ties", paths, tmp_path / "whole", shard_size=size).path)
    options = METHODS["ties"] | {"base": paths[0], "shard_size": size}
    follow, fill, write = shards._Growing.follow, to_disk.fill, shards._Growing.write
    left, made = 0, list[str]()

    def counted(original: Any) -> Any:
        def call(self: Any, *args: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop
            original(self, *args)

        return call

    def noted(path: Path, shard: shards.Shard, ties: Any, chunks: Any) -> None:
        found = list(chunks)
        made.extend(name for name, _, _ in found)
        fill(path, shard, ties, found)

    monkeypatch.setattr(shards._Growing, "follow", counted(follow))
    monkeypatch.setattr(to_disk, "fill", noted)
    kept = set[str]()
    with ThreadPoolExecutor(1) as pool:
        for left, executor in ((2, pool), (3, None), (1, pool), (100, pool)):  # noqa: B007 (`counted` counts it down)
            plan = merge.plan(merge.ties, paths[1:], tmp_path / "out", **options)
            done = {name for shard in plan.shards if shard.file in plan.done for name in shard.tensors}
            now = done | {name for start in plan.begun.values() for name in start.tensors}
            assert kept <= now and (executor is not pool or left == 2 or len(now) >= 2)
            kept, made[:] = now, []
            if left == 100:
                assert contents(plan.write(executor=executor, progress=False).path) == whole
                assert not kept & set(made) and made
                break
            if executor is None:
                monkeypatch.setattr(shards._Growing, "write", counted(write))
            with pytest.raises(Stop):
                plan.write(executor=executor, progress=False)
            monkeypatch.setattr(shards._Growing, "write", write)


@pytest.mark.parametrize("damage", ["content", "note", "header", "cut", "no note"])
def test_what_is_left_of_a_file_is_checked(
    damage: str, tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "APART", 1)
    mean, _ = stopped(paths, tmp_path / "out", "block.2.weight")
    partial = tmp_path / ".out.unfinished"
    file, notes = partial / "model.safetensors", partial / ".model.safetensors.progress"
    begun = merge.plan(mean, paths[1:], tmp_path / "out").begun[file.name]
    data = bytearray(file.read_bytes())
    if damage == "content":
        data[begun.size - 1] ^= 1
    elif damage == "header":
        data[9] ^= 1
    elif damage == "cut":
        data = data[: begun.size - 1]
    elif damage == "note":  # half of the last line: the line before counts
        notes.write_text(notes.read_text()[:-10])
    else:
        notes.unlink()
    file.write_bytes(data)
    left = merge.plan(mean, paths[1:], tmp_path / "out").begun.get(file.name)
    assert (left is not None and left.size < begun.size) if damage == "note" else left is None
    result = merge.write(mean, paths[1:], tmp_path / "out", progress=False)
    assert same(result, mean([state(1), state(2)]))
    result.verify()


@pytest.mark.parametrize("name", METHODS)
def test_workers_give_the_same(name: str, tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "VALUES", 7)
    monkeypatch.setattr(shards, "PART", 60)
    before = torch.get_num_threads()
    expected = contents(run(name, paths, tmp_path / "one").path)
    with ThreadPoolExecutor(3) as pool:
        assert contents(run(name, paths, tmp_path / "three", executor=pool).path) == expected
    assert torch.get_num_threads() == before


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_of_a_dask_cluster_give_the_same(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the client or its executor, with files begun by a run that was stopped, and after the death of a worker."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(shards, "APART", 1)
    monkeypatch.setattr(shards, "PART", 60)
    expected = {name: contents(run(name, paths, tmp_path / name).path) for name in NARROW}
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as local,
        distributed.Client(local) as client,
    ):
        for name in NARROW:
            executor = client if name in ("average", "ties") else client.get_executor(pure=False)
            assert contents(run(name, paths, tmp_path / f"{name}-far", executor=executor).path) == expected[name]
        whole = contents(run("ties", paths, tmp_path / "whole", shard_size=10_000).path)
        write = shards._Growing.write

        def stops(self: Any, place: int, values: Any, last: bool = False) -> None:
            if self.noted > 200:
                raise Stop
            write(self, place, values, last)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(shards._Growing, "write", stops)
            run("ties", paths, tmp_path / "out", shard_size=10_000)
        assert merge.plan(merge.ties, paths[1:], tmp_path / "out", base=paths[0], shard_size=10_000, density=0.4).begun
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        assert contents(run("ties", paths, tmp_path / "out", shard_size=10_000, executor=client).path) == whole


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64, torch.int8)])
def test_parts_of_a_file_lie_side_by_side(
    dtypes: tuple[torch.dtype, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of several widths, empty ones too, are not stored in the order of the model."""
    monkeypatch.setattr(shards, "PART", 50)
    weights = {f"w{i}": torch.full((i % 5,), i).to(dtypes[i % len(dtypes)]) for i in range(23)}
    one = merge.write(merge.average, [weights], tmp_path / "one", progress=False)
    with ThreadPoolExecutor(2) as pool:
        two = merge.write(merge.average, [weights], tmp_path / "two", progress=False, executor=pool)
    assert contents(one.path) == contents(two.path) and same(two, weights)
    two.verify()


def deadly(tensors: Tensor, *, name: str, log: str) -> Tensor:
    """The mean; each process that comes to one of the tensors with a file of its name in the folder `log` dies with it."""
    if (note := Path(log) / name).exists():
        if note.read_text() == "once":
            note.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return tensors.mean(0)


lethal = merge.on_tensors(deadly)


@pytest.mark.thorough
@pytest.mark.parametrize("size", [150, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_processes_that_die(size: int, tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that dies once costs nothing; one that always does ends the merge, and the same call goes on from there."""
    monkeypatch.setattr(shards, "APART", 1)
    monkeypatch.setattr(shards, "PART", 1)
    log = tmp_path / "log"
    log.mkdir()
    options: dict[str, Any] = {"log": str(log), "shard_size": size, "progress": False}
    whole = contents(merge.write(lethal, paths[1:], tmp_path / "whole", **options).path)
    (log / "block.0.weight").write_text("once")
    (log / "embed.weight").write_text("always")
    with Processes(1) as pool, pytest.raises(WorkerError, match="the process that ran this died: by SIGKILL"):
        merge.write(lethal, paths[1:], tmp_path / "out", executor=pool, **options)
    assert not (log / "block.0.weight").exists() and not (tmp_path / "out").exists()
    plan = merge.plan(lethal, paths[1:], tmp_path / "out", log=str(log), shard_size=size)
    kept = {name for left in plan.begun.values() for name in left.tensors}
    assert "block.0.weight" in kept | {n for shard in plan.shards if shard.file in plan.done for n in shard.tensors}
    (log / "embed.weight").unlink()
    assert contents(plan.write(progress=False).path) == whole


def test_executors_that_cannot_be_used(tmp_path: Path, paths: list[Path]) -> None:
    with pytest.raises(
        InputError, match=r"executor: expected a concurrent\.futures\.Executor or a dask Client, got int"
    ):
        run("average", paths, tmp_path / "x", executor=2)
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(InputError, match="executor: it takes no more work"):
        run("average", paths, tmp_path / "x", executor=pool)
    spoilt = torch.full((5, 5), torch.nan)
    with ThreadPoolExecutor(2) as threads, pytest.raises(WeightsError, match=r"block\.1\.weight of models\[1\]"):
        merge.write(merge.average, [state(1), state(2) | {"block.1.weight": spoilt}], tmp_path / "y", executor=threads)
    with ThreadPoolExecutor(2) as threads:  # models in memory are sent
        merged = merge.write(merge.average, [state(1), state(2)], tmp_path / "z", executor=threads, progress=False)
    assert same(merged, merge.average([state(1), state(2)]))


def test_a_disk_that_workers_do_not_share_is_noticed(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_disk, "fill", lambda *_: None)
    with ThreadPoolExecutor(1) as pool, pytest.raises(DataError, match="or on a disk that is not seen here"):
        run("average", paths, tmp_path / "out", executor=pool)


KILLED = """
import os
import lmc.merge as merge
from lmc.merge.disk import shards

original, count = shards._Growing.write, 0
shards.APART = 1

def write(self, place, values, last=False):
    global count
    count += 1
    if count > {after}:
        self.file.write(b"half"); self.file.flush()
        os._exit(9)
    original(self, place, values, last)

shards._Growing.write = write
base, *models = {paths}
merge.write(merge.ties, models, {out!r}, base=base, shard_size={size}, density=0.4, progress=False)
"""


def test_quantiles_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sorting, for values that repeat, that lie in layers of different scale, and for a sample that misleads."""
    monkeypatch.setattr(quantiles, "SAMPLE", 1000)
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(2, 5000, generator=generator) * 10.0**i for i in range(-2, 3)]
    whole = torch.cat(normal, 1).sort(1).values
    ranks = [1, 12_500, 20_000, 25_000]
    expected = torch.stack([whole[t % 2, rank - 1] for t, rank in enumerate(ranks)])
    samples = {
        "by strides": None,
        "short slices": lambda: (x[:, i : i + 50] for x in normal for i in range(0, 5000, 500)),
        "misleading": lambda: (x[:, i : i + 50] for x in normal[:2] for i in range(0, 5000, 500)),
    }
    for sample in samples.values():
        assert torch.equal(quantiles.kth_smallest(lambda: iter(normal), ranks, 25_000, sample), expected)
    coarse = [(x / 3).round() for x in normal]
    whole = torch.cat(coarse, 1).sort(1).values
    for rank in (1, 9_000, 12_500, 24_999):
        found = quantiles.kth_smallest(lambda: iter(coarse), [rank, rank], 25_000, lambda: iter(coarse))
        assert torch.equal(found, whole[:, rank - 1])
