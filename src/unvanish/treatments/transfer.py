"""Start from the weights of another training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TreatmentError
from ..layers import clean_name
from ..records import Change
from .treatment import Patient, Steps, Treatment, forgotten, saved_tensors


def transfer(*file: str) -> Treatment:
    """Fill the lowest layers with the weights of another training, by name.

    From the first layer on, each is filled whose parameters and buffers are all in the file, with their names and
    shapes; at the first that is not it ends. So a new head stays as it is, and nothing above a changed layer is taken.

    Args:
        file: ``.safetensors``, or what ``torch.save(model.state_dict(), file)`` wrote. Others are for
            `load_weights`.

    Source: Yosinski et al. 2014.

    Example:
        >>> import tempfile, unvanish
        >>> old = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 9))
        >>> new = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> file = f"{tempfile.mkdtemp()}/old.pt"
        >>> torch.save(old.state_dict(), file)
        >>> with unvanish.treat(new, None, f"transfer={file}") as changes:
        ...     print(next(iter(changes)).what)
        1 of 2 layers filled from old.pt, up to '0'
    """
    path = ",".join(str(part) for part in file)

    def apply(patient: Patient) -> Steps:
        given, layers = _read(path), _tensors_of_layers(patient.model)
        filled: list[tuple[Tensor, Tensor]] = []
        names: list[str] = []
        problem = ""
        for name, wanted in layers:
            problem = next(filter(None, (_problem(key, tensor, given) for key, tensor in wanted.items())), "")
            if problem:
                break
            filled += [(tensor, given[key]) for key, tensor in wanted.items()]
            names.append(name)
        if not filled:
            raise TreatmentError(
                f"treat(): 'transfer': file {path!r}: found {problem or 'no layer to fill'}, expected the weights "
                "of at least the lowest layer, by name. Nothing was changed. For other names or frameworks use "
                "unvanish.load_weights."
            )
        tensors = [tensor for tensor, _ in filled]
        with saved_tensors(tensors), forgotten(patient.optimizers, tensors):
            with torch.no_grad():
                for tensor, source in filled:
                    tensor.copy_(source)
            what = f"{len(names)} of {len(layers)} layers filled from {Path(path).name}, up to {names[-1]!r}"
            yield Change("transfer", what, tuple(names), preserves_function=False)

    code = f"model.load_state_dict(torch.load({path!r}, weights_only=True), strict=False)  # all but the head"
    return Treatment("transfer", apply, path, code=code)


def _tensors_of_layers(model: nn.Module) -> list[tuple[str, dict[str, Tensor]]]:
    """Return each module that has weights or states of its own, with those by the names that a file has."""
    found = []
    for name, module in model.named_modules():
        states = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        own = {**module._parameters, **states}.items()
        tensors = {clean_name(f"{name}.{key}").lstrip("."): tensor for key, tensor in own if tensor is not None}
        if tensors:
            found.append((clean_name(name), tensors))
    return found


def _problem(key: str, tensor: Tensor, given: dict[str, Tensor]) -> str:
    """Say why a tensor cannot be filled; empty if it can."""
    if key not in given:
        return f"no {key!r}"
    if given[key].shape != tensor.shape:
        return f"{key!r} of shape {tuple(given[key].shape)} where {tuple(tensor.shape)} is needed"
    return ""


def _read(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name, without running anything that it names.

    Raises:
        TreatmentError: if it is no such file.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # parsers raise whatever they meet
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        raise TreatmentError(
            f"treat(): 'transfer': file {path!r}: found {reason}, expected a file of weights, .safetensors or .pt. "
            "Nothing was changed. Write transfer=old.pt, saved by torch.save(model.state_dict(), 'old.pt')."
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):  # a checkpoint that holds more than weights
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = found.items() if isinstance(found, dict) else ()
    return {clean_name(str(key)): value for key, value in tensors if isinstance(value, Tensor)}
