"""The command `lmc`: what it does is what Python does; what goes wrong is one line and an exit status."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import same
from torch import Tensor

import lmc
from lmc import merge
from lmc.align.weight_matching import on_disk
from lmc.cli import main

REPOSITORY = Path(__file__).parents[2]
SEEDS = [str(REPOSITORY / "data" / "digits-mlp64" / f"seed{seed}.safetensors") for seed in (0, 1)]
MODEL = json.loads((REPOSITORY / "data" / "digits-mlp64" / "manifest.json").read_text())["model"]
FACTORY = f"{MODEL['function']}({', '.join(map(repr, MODEL['arguments']))})"


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(6, 5, generator=generator) for i in range(3)}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """A base and two models, each in a folder with a configuration."""
    found = []
    for seed, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        save_file(state(seed), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"of": name}))
        found.append(str(tmp_path / name))
    return found


def failing(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(argv)
    error = capsys.readouterr().err
    assert error.startswith("lmc: ") and error.count("\n") == 1
    return status, error


def test_merge_is_the_call_in_python(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, *models = folders
    out, recipe = str(tmp_path / "out"), str(tmp_path / "r.json")
    settings = ["--set", "density=0.4", "--set", 'scale={"*": 0.5, "layers.1": 0.25}']
    assert main(["merge", "ties", *models, "--base", base, "--out", out, *settings, "--save-recipe", recipe]) == 0
    printed = capsys.readouterr().out
    assert "ties(density=0.4, scale=" in printed and "copied from" in printed and "Checkpoint(" in printed
    expected = merge.ties([state(1), state(2)], base=state(0), density=0.4, scale={"*": 0.5, "layers.1": 0.25})
    assert same(lmc.open_checkpoint(out), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"of": "base"}
    assert main(["merge", "--recipe", recipe, "--out", str(tmp_path / "again"), "--quiet"]) == 0
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("out", "again")]
    assert files[0] == files[1] and "merge.json" in files[0]


def test_methods_on_top_and_of_one_s_own(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, *models = folders
    top = ["--set", "method=ties", "--set", "density=0.4"]
    assert main(["merge", "lines", *models, "--base", base, "--out", str(tmp_path / "lines"), *top]) == 0
    expected = merge.lines([state(1), state(2)], base=state(0), method=merge.ties, density=0.4)
    assert same(lmc.open_checkpoint(tmp_path / "lines"), expected)
    assert same(merge.replay(tmp_path / "lines", tmp_path / "lines-again", progress=False), expected)
    (tmp_path / "my_methods_for_lmc.py").write_text(
        "import lmc\n@lmc.merge.on_tensors\ndef largest(tensors, *, power=1):\n    return tensors.amax(0) ** power\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "my_methods_for_lmc:largest", *models, "--out", "own", "--set", "power=2"]) == 0
    merged = lmc.open_checkpoint("own")
    assert all(torch.equal(merged[k], torch.maximum(state(1)[k], state(2)[k]) ** 2) for k in merged)
    status, error = failing(capsys, "merge", "--recipe", "own/merge.json", "--out", "own-again")
    assert status == 2 and "'largest' is not a method of lmc.merge" in error
    again = ["merge", "my_methods_for_lmc:largest", "--recipe", "own/merge.json", "--out", "own-again"]
    assert main(again) == 0 and same(lmc.open_checkpoint("own-again"), merged)


def test_a_dry_run_writes_nothing(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "average", *folders, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "average() of 3 models" in printed and "memory" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base"]


def test_align_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Interrupted in the search and in the writing; the search of before is not made again."""
    out, kept, journal = tmp_path / "aligned", tmp_path / "pi.json", tmp_path / ".aligned.matching"
    model = lmc.models.mlp(*MODEL["arguments"])
    spec = lmc.permutation_spec(model, torch.randn(2, 64), progress=False)
    spec.save(tmp_path / "spec.json")
    command = ["align", *SEEDS, "--spec", str(tmp_path / "spec.json"), "--out", str(out), "--quiet"]
    command += ["--save-permutation", str(kept)]
    step, visits = on_disk.DescentOnDisk._step, []

    def interrupted(self, i, only):
        visits.append(i)
        if len(visits) == 3:
            raise KeyboardInterrupt
        return step(self, i, only)

    monkeypatch.setattr(on_disk.DescentOnDisk, "_step", interrupted)
    assert main(command) == 130 and journal.is_file() and not kept.is_file()
    with monkeypatch.context() as patched:
        patched.setattr(merge, "write", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command) == 130 and journal.is_file()
    capsys.readouterr()
    before = len(visits)
    assert main(command) == 0 and not journal.exists() and len(visits) == before
    pi = lmc.weight_matching(spec, *(lmc.open_checkpoint(seed).load() for seed in SEEDS), progress=False)
    assert lmc.Permutation.load(kept) == pi and same(lmc.open_checkpoint(out), pi.apply(lmc.open_checkpoint(SEEDS[1])))
    assert "passes" in capsys.readouterr().out
    assert main(["merge", "--recipe", str(out), "--out", str(tmp_path / "again"), "--quiet"]) == 2
    assert "had its units moved" in capsys.readouterr().err
    assert main(command) == 2 and "exists already" in capsys.readouterr().err


def test_align_by_an_architecture_without_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a module on the meta device, of which the files hold a tied tensor under its first name only."""
    (tmp_path / "tied_architecture.py").write_text(
        "import torch\n"
        "from torch.nn import Linear, ReLU, Sequential\n"
        "def net():\n"
        "    with torch.device('meta'):\n"
        "        first, again = Linear(4, 4, bias=False), Linear(4, 4, bias=False)\n"
        "        again.weight = first.weight\n"
        "        return Sequential(Linear(3, 7), ReLU(), Linear(7, 4), ReLU(), first, ReLU(), again)\n"
    )
    monkeypatch.chdir(tmp_path)
    shapes = {"0.weight": (7, 3), "0.bias": (7,), "2.weight": (4, 7), "2.bias": (4,), "4.weight": (4, 4)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    moved = {"0.weight": weights["0.weight"][order], "0.bias": weights["0.bias"][order]}
    save_file(weights, "a.safetensors")
    save_file(weights | moved | {"2.weight": weights["2.weight"][:, order].contiguous()}, "b.safetensors")
    command = ["align", "a.safetensors", "b.safetensors", "--model", "tied_architecture:net", "--example", "2,3"]
    assert main([*command, "--out", "out", "--quiet"]) == 0
    result = lmc.open_checkpoint("out")
    assert result.ties == {"6.weight": "4.weight"}
    assert same(result.load(), weights | {"6.weight": weights["4.weight"]}, ordered=False)


def test_inspect(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, *models = folders
    assert main(["inspect", *models, "--base", base, "--layers"]) == 0
    printed = capsys.readouterr().out
    found = merge.inspect(models, base=base, progress=False)
    assert str(found) in printed and "layers.2" in printed
    save_file(state(1) | {"head.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    assert main(["inspect", models[0], str(tmp_path / "other.safetensors")]) == 0
    assert "head.weight: missing" in capsys.readouterr().out


def test_align_and_barrier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kept = str(tmp_path / "aligned"), str(tmp_path / "pi.json")
    common = ["--model", FACTORY, "--data", "digits", "--quiet"]
    assert main(["align", *SEEDS, "--out", out, *common, "--save-permutation", kept]) == 0
    a, b = (lmc.open_checkpoint(seed).load() for seed in SEEDS)
    digits = lmc.data.digits()
    spec = lmc.permutation_spec(lmc.models.mlp(*MODEL["arguments"]), digits.train[0][:2])
    pi = lmc.weight_matching(spec, a, b, progress=False)
    aligned = lmc.open_checkpoint(out)
    assert same(aligned, pi.apply(b)) and same(lmc.Permutation.load(kept).apply(b), pi.apply(b))
    capsys.readouterr()
    assert main(["barrier", SEEDS[0], out, *common, "--alphas", "5", "--html", str(tmp_path / "path.html")]) == 0
    printed = capsys.readouterr().out
    ends = [{name: t.float() for name, t in weights.items()} for weights in (a, pi.apply(b))]  # stored in half
    path = lmc.loss_path(lmc.models.mlp(*MODEL["arguments"]), *ends, digits, alphas=5, progress=False)
    line = next(line for line in printed.splitlines() if line.split()[:2] == ["test", "loss"])
    assert float(line.split()[-1]) == pytest.approx(path.barrier, abs=1e-3)
    assert "<html" in (tmp_path / "path.html").read_text().lower()
    spec.save(tmp_path / "spec.json")
    assert main(["align", *SEEDS, "--out", str(tmp_path / "by-spec"), "--spec", str(tmp_path / "spec.json")]) == 0
    assert same(lmc.open_checkpoint(tmp_path / "by-spec"), aligned)
    by_activations = ["--method", "activation_matching", "--out", str(tmp_path / "by-activations")]
    assert main(["align", *SEEDS, *by_activations, *common]) == 0
    assert not same(lmc.open_checkpoint(tmp_path / "by-activations"), b)


def test_connect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "connected", tmp_path / "path.html"
    common = ["--model", FACTORY, "--data", "digits", "--quiet"]
    assert main(["connect", *SEEDS, *common, "--budget", "2", "--out", str(out), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "Connection by" in printed and "of 2 allowed" in printed and "<html" in page.read_text().lower()
    model, digits = lmc.models.mlp(*MODEL["arguments"]), lmc.data.digits()
    a, moved = ({name: t.float() for name, t in lmc.open_checkpoint(p).load().items()} for p in (SEEDS[0], out))
    chosen = re.search(r"Connection by (.*)", printed)[1]  # others that were tried may be repaired ones
    repair = "repair" if "statistics repaired" in chosen else "auto"
    barrier = lmc.loss_path(model, a, moved, digits, repair=repair, progress=False).barrier
    assert barrier == pytest.approx(float(re.search(r"([\d.]+) nats after", printed)[1]), abs=5e-3)


def test_data_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, targets = lmc.data.digits().test
    np.savez(tmp_path / "one.npz", inputs=inputs.numpy(), targets=targets.numpy())
    both = {"train_inputs": inputs, "train_targets": targets, "test_inputs": inputs[:50], "test_targets": targets[:50]}
    save_file({name: tensor.clone() for name, tensor in both.items()}, tmp_path / "two.safetensors")
    for file, splits in (("one.npz", {"data"}), ("two.safetensors", {"train", "test"})):
        arguments = ["barrier", *SEEDS, "--model", FACTORY, "--data", str(tmp_path / file), "--alphas", "3"]
        assert main(arguments) == 0
        assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == splits
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    np.savez(tmp_path / "texts.npz", inputs=np.array(["a"]), targets=np.array([1]))
    for name in ("torn", "texts"):
        status, error = failing(capsys, "barrier", *SEEDS, "--model", FACTORY, "--data", str(tmp_path / f"{name}.npz"))
        assert status == 1 and "not an .npz file of plain arrays" in error
    np.savez(tmp_path / "wrong.npz", pictures=inputs.numpy())
    wrong = ["barrier", *SEEDS, "--model", FACTORY, "--data", str(tmp_path / "wrong.npz")]
    status, error = failing(capsys, *wrong)
    assert status == 1 and "found pictures" in error


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["merge", "ties", "A", "B", "--out", "OUT"], 2, "ties needs .* --base"),
        (
            ["merge", "ties", "A", "--base", "BASE", "--out", "OUT", "--set", "desnity=1"],
            2,
            "no option 'desnity' .did you mean 'density'",
        ),
        (["merge", "ties", "A", "--base", "BASE", "--out", "OUT", "--set", "density"], 2, "KEY=VALUE"),
        (["merge", "ties", "A", "--base", "BASE", "--out", "OUT", "--set", "density=2"], 2, "density"),
        (["merge", "ties", "A", "--base", "BASE", "--out", "OUT", "--set", "density=null"], 2, "expected a number"),
        (["merge", "lines", "A", "--base", "BASE", "--out", "OUT", "--set", "dtype=bfloat16"], 2, "no option 'dtype'"),
        (["merge", "lines", "A", "--base", "BASE", "--out", "OUT", "--set", "blocks=3"], 2, "list of at least two"),
        (["merge", "tall_mask", "A", "--base", "BASE", "--out", "OUT", "--set", "task=0.5"], 2, "place of a model"),
        (["merge", "average", "A", "--out", "OUT", "--folder", "a=b"], 2, "--recipe"),
        (["merge", "--recipe", "A/config.json", "--out", "OUT", "--vocabulary", "union"], 2, "holds everything"),
        (
            ["extract", "A", "--base", "BASE", "--out", "OUT", "--method", "lines", "--set", "method=ties"],
            2,
            "'method'",
        ),
        (["inspect", "A", "B", "--task", "regression"], 2, "--data"),
        (["merge", "fisher", "A", "B", "--out", "OUT"], 2, "call it in Python"),
        (
            ["merge", "avrage", "A", "B", "--out", "OUT"],
            2,
            "did you mean 'average'.*; choose from arcee_fusion, average",
        ),
        (["merge", "average", "A", "B"], 2, "--out FOLDER"),
        (["merge", "average", "A", "B", "--out", "BASE"], 2, "exists already"),
        (["merge", "average", "A", "NOWHERE", "--out", "OUT"], 1, "no such file or folder"),
        (["merge", "nowhere:method", "A", "--out", "OUT"], 2, "cannot import"),
        (["merge", "--recipe", "A/config.json", "--out", "OUT"], 1, "it lacks method"),
        (["align", "A", "B", "--out", "OUT"], 2, "--model"),
        (["align", "A", "B", "--out", "OUT", "--model", "mlp(5, [6], 6)"], 2, "--data"),
        (["align", "A", "B", "--out", "OUT", "--model", "mlp(__import__('os'))"], 2, "expected module:name"),
        (["align", "A", "B", "--out", "OUT", "--spec", "x", "--set", "restarts=two"], 2, "whole number"),
        (["align", "A", "B", "--out", "OUT", "--model", "mlp(5, [6], 6)", "--example", "2,-5"], 2, "expected sizes"),
        (["connect", "A", "B", "--model", "mlp(5, [6], 6)", "--data", "digits", "--out", "BASE"], 2, "exists already"),
        (["barrier", "A", "B", "--model", "mlp(5, [6], 6)", "--data", "digits", "--html", "OUT/x"], 2, "no folder"),
        (["barrier", "A", "B", "--model", "mlp(64, [3], 10)", "--data", "digits", "--alphas", "4"], 2, "odd"),
        (["barrier", "A", "B", "--model", "mlp(64, [3], 10)", "--data", "digits"], 1, "different architectures"),
    ],
)
def test_what_goes_wrong_is_one_line(
    argv: list[str], status: int, message: str, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BASE": folders[0], "A": folders[1], "B": folders[2], "OUT": str(tmp_path / "out"), "NOWHERE": "nowhere"}
    places["A/config.json"] = folders[1] + "/config.json"
    found, error = failing(capsys, *[places.get(word, word).replace("OUT/", f"{tmp_path}/out/") for word in argv])
    assert found == status and not list(tmp_path.glob(".out*"))

    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_an_interrupt_is_told_and_gone_on_from(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmc.merge.disk import write as to_disk

    argv = ["merge", "average", *folders, "--out", str(tmp_path / "out"), "--shard-size", "130"]
    original, calls = to_disk.write_shard, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(to_disk, "write_shard", interrupted)
    status, error = failing(capsys, *argv)
    assert status == 130 and "the same command goes on" in error
    assert main(argv) == 0 and "1 files are complete already" in capsys.readouterr().out
    assert same(lmc.open_checkpoint(tmp_path / "out"), merge.average([state(0), state(1), state(2)]))


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "merge", "align", "connect", "barrier"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert left.value.code == 0 and "examples:" in printed and "In Python:" in printed
    assert main(["merge", "--explain", "ties"]) == 0
    assert "Yadav" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["merge", "--nonsense"])
    assert left.value.code == 2
    module = subprocess.run(
        [sys.executable, "-m", "lmc", "merge", "--help"], capture_output=True, text=True, check=True
    )
    assert "density=0.2, weights=None, scope='model'" in module.stdout


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"lmc {lmc.__version__}\n"


def test_dtypes_and_wrapped_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / f"{i}.{ending}") for i, ending in enumerate(("safetensors", "th"))]
    save_file(state(0), paths[0])
    torch.save({"model": {f"module.{n}": t.bfloat16() for n, t in state(1).items()}}, paths[1])
    out = str(tmp_path / "out")
    assert main(["merge", "average", *paths, "--out", out, "--dtype", "float16"]) == 0
    printed = capsys.readouterr().out
    assert "the entry 'model'" in printed and "prefix 'module.'" in printed
    expected = merge.average([state(0), {n: t.bfloat16().float() for n, t in state(1).items()}])
    merged = lmc.open_checkpoint(out)
    assert all(torch.equal(merged[n], t.half()) for n, t in expected.items())
    status, error = failing(capsys, "merge", "average", *paths, "--out", out + "2", "--dtype", "int8")
    assert status == 2 and "dtype='int8'" in error
    quantised = str(tmp_path / "q.safetensors")
    save_file({"l.weight": torch.ones(2, 2, dtype=torch.int8), "l.scale": torch.ones(2)}, quantised)
    status, error = failing(capsys, "merge", "average", quantised, quantised, "--out", out + "3")
    assert status == 1 and "dequantise it first" in error
    assert main(["inspect", quantised, quantised]) == 0 and "dequantise" in capsys.readouterr().out


def test_a_barrier_of_wrapped_and_half_precision_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["barrier", *SEEDS, "--model", FACTORY, "--data", "digits", "--alphas", "3"]
    assert main(plain) == 0
    expected = capsys.readouterr().out
    wrapped = str(tmp_path / "b.pth")
    torch.save({"state_dict": {f"_orig_mod.{n}": t for n, t in lmc.open_checkpoint(SEEDS[1]).load().items()}}, wrapped)
    assert main([*plain[:2], wrapped, *plain[3:]]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == expected.splitlines()


def test_tasks_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kinds_of_tasks.py").write_text(
        "import torch, lmc\nfrom torch import nn\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "def numbers(outputs=2):\n    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))\n"
        "def words():\n    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 7))\n"
        "def loader(size):\n    draw = torch.Generator().manual_seed(0)\n"
        "    x, y = torch.randn(20, 6, generator=draw), torch.randn(20, 2, generator=draw)\n"
        "    return DataLoader(TensorDataset(x, y), batch_size=size)\n"
        "def absolute(outputs, targets):\n    return (outputs - targets).abs().mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import kinds_of_tasks as kinds  # pyright: ignore[reportMissingImports]

    def stored(make: object, name: str) -> list[str]:
        files = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            files.append(str(tmp_path / f"{name}{seed}.safetensors"))
            save_file(make().state_dict(), files[-1])  # pyright: ignore[reportCallIssue]
        return files

    numbers, words = stored(kinds.numbers, "numbers"), stored(kinds.words, "words")
    of_numbers = ["--model", "kinds_of_tasks:numbers", "--data", "kinds_of_tasks:loader(7)"]
    (x, y), ends = kinds.loader(20).dataset.tensors, [kinds.numbers() for _ in numbers]
    for end, file in zip(ends, numbers, strict=True):
        end.load_state_dict(lmc.open_checkpoint(file).load())
    for task, measure, unit in (
        ("regression", torch.nn.functional.mse_loss, "squared error"),
        ("kinds_of_tasks:absolute", torch.nn.functional.l1_loss, ""),
    ):
        assert main(["barrier", *numbers, *of_numbers, "--task", task, "--alphas", "3", "--quiet"]) == 0
        line = capsys.readouterr().out.splitlines()[0]
        assert float(line.split()[3]) == pytest.approx(measure(ends[0](x), y).item(), abs=1e-4) and unit in line
    out = str(tmp_path / "aligned")
    for method in ("weight_matching", "activation_matching", "straight_through_matching"):
        settings = ["--set", "epochs=1"] if method.startswith("straight") else []
        made = ["--out", f"{out}-{method}", "--method", method, "--task", "regression", *settings, "--quiet"]
        assert main(["align", *numbers, *of_numbers, *made]) == 0
    found = ["connect", *numbers, *of_numbers, "--task", "regression", "--budget", "3", "--out", f"{out}-connected"]
    assert main([*found, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["inspect", *numbers, *of_numbers, "--task", "regression", "--quiet"]) == 0
    assert "barriers, squared error" in capsys.readouterr().out
    tokens = torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(0))
    save_file({"train_inputs": tokens, "test_inputs": tokens[:4].clone()}, tmp_path / "tokens.safetensors")
    said = ["barrier", *words, "--model", "kinds_of_tasks:words", "--data", "tokens.safetensors", "--alphas", "3"]
    assert main([*said, "--task", "language('bits')", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "bits per token" in printed and "perplexity" in printed
    status, error = failing(capsys, *said, "--task", "lines")
    assert status == 2 and "expected classes, segmentation" in error
