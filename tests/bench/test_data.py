"""`lmc.data`: the digits' split, original files found, fetched and checked, stored checkpoints."""

import gzip
import hashlib
import io
import json
import pickle
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from support import same, tool
from torch import nn

import lmc
from lmc.data import cifar, files, images
from lmc.errors import DataError, InputError


@pytest.fixture(autouse=True)
def no_data_around(monkeypatch, tmp_path):
    monkeypatch.delenv(files.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_digits_are_split_evenly_and_always_alike():
    data = lmc.data.digits()
    (x, y), (x_test, y_test) = data.train, data.test
    assert x.shape == (1400, 64) and x_test.shape == (397, 64) and data.image_shape == (1, 8, 8)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert float(x.min()) == 0.0 and float(x.max()) == 1.0
    shares = y.bincount() / (y.bincount() + y_test.bincount())
    assert len(shares) == 10 == len(data.classes) and float(shares.max() - shares.min()) < 0.012
    again, other = lmc.data.digits(), lmc.data.digits(seed=1)
    assert torch.equal(again.test[0], x_test) and not torch.equal(other.test[0], x_test)
    # every digit is in exactly one part
    both = sorted(map(tuple, torch.cat([x, x_test]).tolist()))
    assert both == sorted(map(tuple, torch.cat([other.train[0], other.test[0]]).tolist()))
    # the split itself is part of the stored checkpoints' meaning: it may never move
    assert hashlib.sha256(y_test.numpy().tobytes()).hexdigest()[:16] == "01c693e180bf9cd9"


def test_digits_as_images():
    flat, images = lmc.data.digits(), lmc.data.digits(flat=False)
    assert images.train[0].shape == (1400, 1, 8, 8)
    assert torch.equal(images.train[0].flatten(1), flat.train[0])
    assert "1400 train" in repr(flat) and "(1, 8, 8)" in repr(images)
    assert flat.to("cpu").train[0].device.type == "cpu"


def idx(array: np.ndarray) -> bytes:
    sizes = np.array(array.shape, dtype=">i4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@pytest.fixture
def small_mnist(monkeypatch, tmp_path):
    """Four small idx files, and the loader told to expect their checksums, as if they were the originals."""
    random = np.random.RandomState(0)
    arrays = [random.randint(0, 256, (n, 28, 28) if image else n).astype(np.uint8) for n in (7, 5) for image in (1, 0)]
    arrays[1] %= 10
    arrays[3] %= 10
    folder = tmp_path / "elsewhere" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    checksums = []
    for name, array in zip(images.FILES, arrays, strict=True):
        (folder / name).write_bytes(idx(array))
        checksums.append(hashlib.sha256((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(images, "MNIST_SHA256", tuple(checksums))
    return folder, arrays


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_mnist_is_found_in_each_layout(small_mnist, levels, monkeypatch):
    folder, (images, labels, images_test, labels_test) = small_mnist
    root = [folder, *folder.parents][levels]
    data = lmc.data.mnist(root, download=False)
    assert data.train[0].shape == (7, 784) and data.test[0].shape == (5, 784)
    assert np.array_equal((data.train[0].numpy() * 255).round().reshape(7, 28, 28), images)
    assert np.array_equal((data.test[0].numpy() * 255).round().reshape(5, 28, 28), images_test)
    assert np.array_equal(data.train[1], labels) and np.array_equal(data.test[1], labels_test)
    monkeypatch.setenv(files.VARIABLE, str(root))
    assert lmc.data.mnist(download=False, flat=False).train[0].shape == (7, 1, 28, 28)


def test_a_changed_file_is_refused_before_it_is_read(small_mnist, monkeypatch):
    folder, _ = small_mnist
    path = folder / images.FILES[2]
    original = path.read_bytes()
    path.write_bytes(original[:-9])
    monkeypatch.setattr(images, "read_idx", lambda path: pytest.fail(f"{path} was read") if path == path else None)
    expected, found = (hashlib.sha256(content).hexdigest() for content in (original, original[:-9]))
    with pytest.raises(DataError) as error:
        lmc.data.mnist(folder)
    for part in (str(path), expected, found, "truncated"):
        assert part in str(error.value)


def test_missing_files_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"(?s)train-images-idx3-ubyte.gz is not there.*Fetch https://.*LMC_DATA"):
        lmc.data.mnist(tmp_path, download=False)
    with pytest.raises(DataError, match="root='.*nowhere' is not a folder"):
        lmc.data.fashion_mnist(tmp_path / "nowhere")
    monkeypatch.setenv(files.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="LMC_DATA='.*nowhere' is not a folder"):
        lmc.data.cifar10()


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "lmc").write_text("a file where the cache should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(files.VARIABLE, raising=False)
    with pytest.raises(DataError, match="(?s)could not write into .*Fetch https://.*LMC_DATA"):
        lmc.data.mnist()


@pytest.mark.parametrize("flaw", ["not gzip", "cut gzip", "magic", "size"])
def test_malformed_idx_files(tmp_path, flaw):
    good = idx(np.zeros((2, 3), dtype=np.uint8))
    content = {
        "not gzip": b"hello",
        "cut gzip": good[:-12],
        "magic": gzip.compress(b"\x00\x00\x0d\x01" + bytes(8)),
        "size": gzip.compress(gzip.decompress(good)[:-1]),
    }[flaw]
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="file.gz"):
        images.read_idx(path)


def source_at(path: Path, content: bytes) -> files.Source:
    return files.Source("thing.bin", ("Thing/raw", ""), path.as_uri(), f"md5:{hashlib.md5(content).hexdigest()}")


def test_download_is_checked_and_kept(tmp_path):
    path = tmp_path / "server.bin"
    path.write_bytes(bytes(1000))
    source = source_at(path, bytes(1000))
    got = files.locate(source, None, download=True)
    assert got == tmp_path / "cache" / "lmc" / "Thing" / "raw" / "thing.bin" and got.read_bytes() == bytes(1000)
    path.unlink()
    assert files.locate(source, None, download=True) == got  # from the cache


def test_a_bad_download_leaves_nothing(tmp_path):
    path = tmp_path / "server.bin"
    path.write_bytes(b"an error page")
    with pytest.raises(DataError, match="expected md5"):
        files.locate(source_at(path, bytes(1000)), None, download=True)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    path.unlink()
    with pytest.raises(DataError, match=r"could not download file://.*Fetch .* LMC_DATA"):
        files.locate(source_at(path, bytes(1000)), None, download=True)


def archive(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"


@pytest.fixture
def batches():
    """Six batches of twenty rows, the class before the pixels, classes going round."""
    random = np.random.RandomState(0)
    made = {name: random.randint(0, 256, (20, 3073)).astype(np.uint8) for name in cifar.BATCHES}
    for rows in made.values():
        rows[:, 0] = np.arange(20) % 10
    return made


def pickled(rows: np.ndarray) -> bytes:
    return pickle.dumps({b"data": rows[:, 1:], b"labels": rows[:, 0].tolist()}, 2)


def members(version: cifar.Version, batches: dict[str, np.ndarray]) -> dict[str, bytes]:
    write = np.ndarray.tobytes if version is cifar.BINARY else pickled
    return {version.member.format(name): write(rows) for name, rows in batches.items()}


def unpack(place: Path, version: cifar.Version, batches: dict[str, np.ndarray]) -> Path:
    place.mkdir(parents=True)
    for name, content in members(version, batches).items():
        (place / name).write_bytes(content)
    return place


def draw(place: Path, batches: dict[str, np.ndarray], name: str = "{label}/{i:05d}.png") -> Path:
    """The images as files, numbered over each split."""
    for split, rows in (
        ("train", np.concatenate([batches[name] for name in cifar.BATCHES[:5]])),
        ("test", batches["test_batch"]),
    ):
        for i, row in enumerate(rows):
            path = place / split / name.format(label=cifar.CLASSES[row[0]], i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(path)
    return place


def assert_all_there(data: lmc.data.Dataset, batches: dict[str, np.ndarray]) -> None:
    assert data.train[0].shape == (100, 3, 32, 32) and data.test[0].shape == (20, 3, 32, 32)
    rows = np.concatenate(list(batches.values()))
    for (inputs, targets), part in ((data.train, rows[:100]), (data.test, rows[100:])):
        assert (inputs * 255).round().numpy().astype(np.uint8).tobytes() == part[:, 1:].tobytes()
        assert targets.tolist() == part[:, 0].tolist() and targets.dtype == torch.int64


@pytest.mark.parametrize("version, number", [("BINARY", 0), ("PYTHON", 0), ("PYTHON", 1)])
def test_cifar10_reads_the_archives(tmp_path, monkeypatch, batches, version, number):
    known = getattr(cifar, version)
    source = known.archives[number]
    content = {f"{known.folder}/{name}": content for name, content in members(known, batches).items()}
    told = replace(source, checksum=archive(tmp_path / source.name, content))
    monkeypatch.setattr(cifar, version, replace(known, archives=(told,)))
    data = lmc.data.cifar10(tmp_path, download=False)
    assert_all_there(data, batches)
    assert data.provenance == "the original archive"
    pixel = batches["data_batch_2"][1, 1 + 2 * 1024 + 5 * 32 + 7]  # blue, row 5, column 7 of training image 21
    assert round(float(data.train[0][21, 2, 5, 7]) * 255) == pixel
    assert lmc.data.cifar10(tmp_path, download=False, flat=True).train[0].shape == (100, 3072)


@pytest.mark.parametrize("version", [cifar.BINARY, cifar.PYTHON], ids=["binary", "python"])
@pytest.mark.parametrize("where", ["CIFAR10/{}", "cifar10/{}", "{}", "the folder itself"])
def test_cifar10_reads_what_comes_out_of_an_archive(tmp_path, monkeypatch, batches, version, where):
    place = unpack(tmp_path / where.format(version.folder), version, batches)
    monkeypatch.setenv(files.VARIABLE, str(place if where == "the folder itself" else tmp_path))
    data = lmc.data.cifar10(download=False)
    assert_all_there(data, batches)
    assert f"unpacked {version.name} version" in data.provenance and "no checksum" in data.provenance


@pytest.mark.parametrize("where", ["", "cifar10", "CIFAR10", "cifar10/cifar10", "cifar"])
@pytest.mark.parametrize(
    "name", ["{label}/{i:05d}.png", "{label}/{i}_{label}.png", "{i}_{label}.png", "{label}/{i}.png"]
)
def test_cifar10_reads_image_files_in_the_order_of_their_numbers(tmp_path, batches, where, name):
    draw(tmp_path / where, batches, name)
    (tmp_path / where / "labels.txt").write_text("\n".join(cifar.CLASSES))
    (tmp_path / where / "train" / ".DS_Store").write_bytes(b"")
    data = lmc.data.cifar10(tmp_path, download=False)
    assert_all_there(data, batches)
    assert data.provenance == "PNG files" and data.classes[0] == "airplane"


def test_cifar10_reads_the_same_of_every_layout(tmp_path, batches):
    """Of images that are smooth, JPEG keeps nearly all; the data set says that it is not all."""
    for rows in batches.values():
        rows[:, 1:] = np.repeat(rows[:, 1:4], 1024, axis=1)
    draw(tmp_path / "png", batches), draw(tmp_path / "jpeg", batches, "{label}/{i:05d}.JPG")
    unpack(tmp_path / "py", cifar.PYTHON, batches)
    exact, lossy, python = (lmc.data.cifar10(tmp_path / name, download=False) for name in ("png", "jpeg", "py"))
    assert torch.equal(exact.train[0], python.train[0]) and torch.equal(exact.test[0], python.test[0])
    apart = (exact.train[0] - lossy.train[0]).abs()
    assert 0.0 < float(apart.max()) < 0.02 and torch.equal(exact.train[1], lossy.train[1])
    assert "not hold the original pixels" in lossy.provenance


def test_a_layout_at_hand_comes_before_the_cache(tmp_path, batches):
    unpack(tmp_path / "cache" / "lmc" / cifar.BINARY.folder, cifar.BINARY, batches)
    assert "binary" in lmc.data.cifar10(download=False).provenance
    draw(tmp_path / "own", batches)
    assert lmc.data.cifar10(tmp_path / "own", download=False).provenance == "PNG files"
    with pytest.raises(DataError, match="root='.*nowhere' is not a folder"):
        lmc.data.cifar10(tmp_path / "nowhere", download=False)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_cifar10_refuses_pickles_that_do_more(capsys, tmp_path, monkeypatch, batches):
    with pytest.raises(DataError, match="print"):
        cifar.parse_pickle(pickle.dumps(Evil(), 2))
    place = unpack(tmp_path / "own" / cifar.PYTHON.folder, cifar.PYTHON, batches)
    (place / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil(), b"labels": [1]}, 2))
    with pytest.raises(DataError, match="data_batch_3: .*asks for .*print"):
        lmc.data.cifar10(tmp_path / "own", download=False)
    # and an archive with the wrong checksum is not opened at all
    archive(tmp_path / cifar.PYTHON.archives[0].name, {"cifar-10-batches-py/data_batch_1": pickle.dumps(Evil(), 2)})
    monkeypatch.setattr(cifar.pickle, "Unpickler", None)
    with pytest.raises(DataError, match="expected md5"):
        lmc.data.cifar10(tmp_path, download=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", bytes(3072)])
def test_cifar10_batches_of_the_wrong_size(content):
    with pytest.raises(DataError, match="multiple of 3073"):
        cifar.parse_binary(content)


FLAWS = {
    "a batch is missing": "is incomplete: data_batch_4.bin missing",
    "an empty folder": "is incomplete: .*test_batch missing",
    "a cut batch": r"data_batch_2.bin: .*multiple of 3073",
    "labels of 100 classes": "test_batch: .*labels from 0 to 9",
    "grey pixels": r"test_batch: .*expected bytes \(n, 3072\).*\(20, 1024\)",
    "another dictionary": "data_batch_1: .*not a pickle with b'data' and b'labels': KeyError",
    "no pickle": "data_batch_1: .*not a pickle",
    "no test folder": "is incomplete: there is no folder test",
    "a class is missing": "test is incomplete: .*of horse",
    "other classes": "'wolf' is no class of CIFAR-10 .*_<class>.png",
    "the competition on Kaggle": "'1' is no class of CIFAR-10 .*Kaggle",
    "large images": "00003.png: .*expected 32 x 32 pixels, found 64 x 48",
    "a broken image": "00013.png: not an image",
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_cifar10_layouts_that_are_incomplete_or_foreign(tmp_path, batches, flaw):
    binary, python, drawn = (tmp_path / name for name in ("bin", "py", "png"))
    unpack(binary / cifar.BINARY.folder, cifar.BINARY, batches)
    unpack(python / cifar.PYTHON.folder, cifar.PYTHON, batches)
    draw(drawn, batches)

    def put(name: str, content: object) -> Path:
        (python / cifar.PYTHON.folder / name).write_bytes(
            content if isinstance(content, bytes) else pickle.dumps(content)
        )
        return python

    if flaw == "a batch is missing":
        (binary / cifar.BINARY.folder / "data_batch_4.bin").unlink()
        root = binary
    elif flaw == "an empty folder":
        root = tmp_path / "empty"
        (root / cifar.PYTHON.folder).mkdir(parents=True)
    elif flaw == "a cut batch":
        path = binary / cifar.BINARY.folder / "data_batch_2.bin"
        path.write_bytes(path.read_bytes()[:-100])
        root = binary
    elif flaw == "labels of 100 classes":
        rows = batches["test_batch"]
        root = put("test_batch", {b"data": rows[:, 1:], b"labels": list(range(20))})
    elif flaw == "grey pixels":
        rows = batches["test_batch"]
        root = put("test_batch", {b"data": rows[:, 1:1025], b"labels": rows[:, 0].tolist()})
    elif flaw == "another dictionary":
        root = put("data_batch_1", {b"data": batches["data_batch_1"][:, 1:], b"fine_labels": [1] * 20})
    elif flaw == "no pickle":
        root = put("data_batch_1", b"an error page")
    else:
        root = drawn
        horses = list((drawn / "test" / "horse").iterdir())
        if flaw == "no test folder":
            (drawn / "test").rename(drawn / "validation")
        elif flaw == "a class is missing":
            for path in horses:
                path.unlink()
        elif flaw == "other classes":
            (drawn / "test" / "horse").rename(drawn / "test" / "wolf")
        elif flaw == "the competition on Kaggle":
            (drawn / "test" / "1.png").write_bytes(horses[0].read_bytes())
        elif flaw == "large images":
            Image.new("RGB", (64, 48)).save(drawn / "train" / "cat" / "00003.png")
        else:
            path = drawn / "train" / "cat" / "00013.png"
            path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=FLAWS[flaw]):
        lmc.data.cifar10(root, download=False)


def test_image_files_without_pillow(tmp_path, monkeypatch, batches):
    draw(tmp_path, batches)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(lmc.MissingPackageError, match=r"pip install Pillow, .*'lmc-lab\[images\]'"):
        lmc.data.cifar10(tmp_path, download=False)


@pytest.fixture
def stored(tmp_path):
    """A checkpoint of two seeds, one matrix in half precision."""
    place = tmp_path / "data" / "tiny"
    place.mkdir(parents=True)
    entries = []
    for seed in (3, 4):
        model = lmc.models.mlp(2, [3], 2)
        weights = {k: v.half() if v.ndim == 2 else v for k, v in model.state_dict().items()}
        save_file(weights, place / f"seed{seed}.safetensors")
        digest = hashlib.sha256((place / f"seed{seed}.safetensors").read_bytes()).hexdigest()
        test = {"loss": 0.1, "accuracy": 0.9}
        entries.append({"file": f"seed{seed}.safetensors", "seed": seed, "epoch": 5, "sha256": digest, "test": test})
    manifest = {
        "description": "two tiny networks",
        "model": {"function": "mlp", "arguments": [2, [3], 2], "options": {}},
        "command": "python make.py",
        "files": entries,
    }
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def test_checkpoints_load(stored, monkeypatch, tmp_path):
    pair = lmc.data.checkpoint("tiny", stored.parent)
    a, b = pair
    assert len(pair) == 2 and pair.seeds == (3, 4) and a is pair[0] and pair.at(seed=4, epoch=5) is b
    assert {tensor.dtype for tensor in a.values()} == {torch.float32}
    model = pair.model()
    assert not model.training and torch.equal(model.state_dict()["fc1.weight"], a["fc1.weight"])
    assert "two tiny networks" in repr(pair) and "seed 4" in repr(pair)
    with pytest.raises(InputError, match=r"no seed 4 at epoch 1; stored .*\(4, 5\)"):
        pair.at(seed=4, epoch=1)
    monkeypatch.chdir(stored)  # found from below the folder that holds data/, as from a notebook
    assert lmc.data.checkpoint("tiny").seeds == (3, 4)


def test_bad_checkpoints_are_named(stored, tmp_path):
    with pytest.raises(DataError, match="no stored checkpoint 'huge'; there are tiny"):
        lmc.data.checkpoint("huge", stored.parent)
    with pytest.raises(DataError, match="come with the repository and with the installed package"):
        lmc.data.checkpoint("huge", tmp_path)
    path = stored / "seed4.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="seed4.safetensors: expected sha256"):
        lmc.data.checkpoint("tiny", stored.parent)
    path.unlink()
    with pytest.raises(DataError, match="seed4.safetensors is missing.*python make.py"):
        lmc.data.checkpoint("tiny", stored.parent)
    for content in ("{}", "[]", "{"):
        (stored / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="not a manifest"):
            lmc.data.checkpoint("tiny", stored.parent)


STORED = sorted(path.parent.name for path in (Path(__file__).parents[2] / "data").glob("*/manifest.json"))


BUNDLED = [name for name in STORED if not name.startswith("cifar10")]  # whose data come with the project


@pytest.mark.parametrize("name", BUNDLED)
def test_stored_networks_are_what_their_manifests_say(name):
    pair = lmc.data.checkpoint(name)
    source = pair.manifest["data"]
    inputs, targets = getattr(lmc.data, source["function"])(**source["options"]).test
    model = pair.model()
    for weights, entry in zip(pair, pair.manifest["files"], strict=True):
        model.load_state_dict(weights)
        with torch.no_grad():
            logits = model(inputs).flatten(0, -2)
        targets = targets.flatten()
        assert abs(float(F.cross_entropy(logits, targets)) - entry["test"]["loss"]) < 1e-4
        assert abs(float((logits.argmax(1) == targets).float().mean()) - entry["test"]["accuracy"]) < 0.003
    last = [entry for entry in pair.manifest["files"] if entry["epoch"] == max(pair.epochs)]
    good = 0.9 if source["function"] == "digits" else 0.8  # much of a text is chance
    assert len(last) == 2 and min(entry["test"]["accuracy"] for entry in last) > good


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(set(STORED) - set(BUNDLED)))
def test_networks_of_real_images_are_what_they_say(name):
    try:
        images = lmc.data.cifar10(download=False)
    except DataError:
        pytest.skip("needs CIFAR-10, in the folder that LMC_DATA names")
    pair = lmc.data.checkpoint(name)
    inputs, targets = (part[:1000] for part in images.test)  # on which they were scored
    for weights, entry in zip(pair, pair.manifest["files"], strict=True):
        model = pair.model()
        model.load_state_dict(weights)
        with torch.no_grad():
            accuracy = float((model(inputs).argmax(1) == targets).float().mean())
        assert abs(accuracy - entry["test"]["accuracy"]) < 0.003


def test_stored_networks_stay_small():
    place = Path(__file__).parents[2] / "data"
    sizes = {path.name: path.stat().st_size for path in place.rglob("*.safetensors")}
    assert len(STORED) >= 11 and max(sizes.values()) < 2_300_000  # a ResNet20 of width 2
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) < 17_000_000
    named = {place / name / entry["file"] for name in STORED for entry in lmc.data.checkpoint(name).manifest["files"]}
    assert named == set(place.rglob("*.safetensors"))


def test_the_demonstration_holds():
    """A barrier above 1 nat between the stored pair, and almost none after weight matching."""
    a, b = pair = lmc.data.checkpoint("digits-mlp512")
    data, model = lmc.data.digits(), pair.model()
    spec = lmc.permutation_spec(model, data.train[0][:2])
    moved = lmc.weight_matching(spec, a, b, seed=0).apply(b)
    assert lmc.loss_path(model, a, b, data.test, alphas=5).barrier > 1.0
    assert lmc.loss_path(model, a, moved, data.test, alphas=5).barrier < 0.03


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "orthogonal"])
def test_training_for_a_stored_pair_goes_on_from_its_last_epoch(optimizer, tmp_path, monkeypatch, capsys):
    make, generator = tool("tools/make_checkpoints"), torch.Generator().manual_seed(0)
    images, labels = torch.rand(16, 3, 32, 32, generator=generator), torch.arange(16) % 4
    how = make.Round(optimizer, 0.1, ((2, 12),), batch_size=8)

    def trained(*kept: Path) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
        return make.train_on_crops(model, images, labels, how, 3, *kept)

    expected, kept, seen, crops = trained(), tmp_path / "new" / "state.pt", [], make.crops

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 4:  # in the second step of the second epoch
            raise KeyboardInterrupt
        return crops(*args)

    monkeypatch.setattr(make, "crops", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(kept)
    assert (
        same(trained(kept), expected)
        and len(seen) == 6
        and [path.name for path in kept.parent.iterdir()] == [kept.name]
    )
