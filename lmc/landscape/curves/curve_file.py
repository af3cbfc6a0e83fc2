"""Curves as safetensors files: the tensors of every control, and in the header what else there is to know."""

import json
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import nn

from lmc.core.files import write_bytes
from lmc.errors import DataError
from lmc.landscape.curves.curve import Curve
from lmc.network.copies import copy_module
from lmc.network.network import Network
from lmc.weights import Weights

FORMAT = "lmc curve 1"


def save(curve: Curve, file: str | FilePath) -> None:
    """Write all that `curve` holds but its architecture; the weights bit by bit."""
    tensors = {
        f"{i}/{name}": tensor.detach().cpu().clone().contiguous()  # tied tensors are written as equal ones
        for i, control in enumerate(curve.controls)
        for name, tensor in control.items()
    }
    about = {"kind": curve.kind, "losses": curve.losses.tolist(), "interrupted": curve.interrupted}
    header = {"format": FORMAT, "names": json.dumps(list(curve.controls[0])), "curve": json.dumps(about)}
    write_bytes(file, serialise(tensors, header))


def load(file: str | FilePath, model: nn.Module) -> Curve:
    """Read what `save` wrote, for the architecture `model`; weights are on the CPU.

    Raises:
        DataError: any other file, or one that is cut short. MismatchError: a curve of another architecture.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata() or {}
            if header.get("format") != FORMAT:
                raise DataError(f"{file}: format {header.get('format')!r}, expected {FORMAT!r}")
            about: dict[str, Any] = json.loads(header["curve"])
            names = json.loads(header["names"])
            count = len(stored.keys()) // max(len(names), 1)
            controls = tuple({name: stored.get_tensor(f"{i}/{name}") for name in names} for i in range(count))
        losses = np.array(about["losses"], dtype=np.float64)
        found = Curve(controls, about["kind"], losses, about["interrupted"], copy_module(model))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} holds no curve: {error!r}") from error
    _check(found.controls, model)
    return found


def _check(controls: tuple[Weights, ...], model: nn.Module) -> None:
    network = Network(model, next(iter(controls[0].values())).device)
    for i, control in enumerate(controls):
        network.check(control, f"control {i} of the file")
