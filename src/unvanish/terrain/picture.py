"""A landscape as a picture: overlaps, layers, paths, noise, curvature and volume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError

if TYPE_CHECKING:
    from .record import Landscape

_RAW, _ALIGNED = "tab:blue", "tab:orange"
_CENTRE = "black"
_FAR = 100.0  # nats


def draw(found: Landscape, file: Path) -> Path:
    """Draw a landscape into an image file; see `Landscape.draw`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "Landscape.draw(): found no matplotlib, expected it for pictures. Run: pip install 'unvanish[plot]'"
        ) from error
    figure = Figure(figsize=(13, 7.5), layout="constrained")  # pyplot would keep it, and choose a screen
    canvas = FigureCanvasAgg(figure)
    if file.suffix.removeprefix(".") not in canvas.get_supported_filetypes() or not file.parent.is_dir():
        raise OptionError(
            f"Landscape.draw(): file: found {str(file)!r}, expected a file in a folder that exists, ending in .png, "
            ".svg or .pdf. Write landscape.draw('landscape.png')."
        )
    axes = figure.subplot_mosaic([["a", "b", "c"], ["a", "b", "c"], ["d", "e", "f"], ["d", "e", "g"]])
    _overlaps(figure, axes["a"], found)
    _layers(axes["b"], found)
    _paths(axes["c"], found, to_centre=False)
    _paths(axes["d"], found, to_centre=True)
    _noise(axes["e"], found)
    _curvature(axes["f"], found)
    _entropy(axes["g"], found)
    try:
        figure.savefig(file, dpi=90)
    except OSError as error:
        raise OptionError(
            f"Landscape.draw(): file: found {error.strerror!r} for {str(file)!r}, expected a file that can be written. "
            "Write landscape.draw('landscape.png')."
        ) from error
    return file


def _overlaps(figure: Any, axis: Any, found: Landscape) -> None:
    """Draw the matrix of overlaps: below the diagonal as they are, above it with units aligned."""
    count = found.replicas
    shown = [list(row) for row in found.overlaps]
    if found.aligned_overlaps:
        for i in range(count):
            shown[i][i + 1 :] = found.aligned_overlaps[i][i + 1 :]
    image = axis.imshow(shown, vmin=-1, vmax=1, cmap="RdBu_r")
    if count <= 8:
        for i, row in enumerate(shown):
            for j, value in enumerate(row):
                text = f"{value:.2f}".replace("-0.00", "0.00")
                color = "white" if abs(value) > 0.6 else "black"
                axis.text(j, i, text, ha="center", va="center", color=color)
    axis.set_xticks(range(count))
    axis.set_yticks(range(count))
    figure.colorbar(image, ax=axis, shrink=0.8)
    axis.set_title("overlap; above the diagonal: units aligned" if found.aligned_overlaps else "overlap")
    axis.set_xlabel("replica")


def _layers(axis: Any, found: Landscape) -> None:
    places = range(len(found.layers))
    axis.plot(places, [row.overlap for row in found.layers], "o-", color=_RAW, label="overlap")
    if found.aligned_overlaps:
        aligned = [row.aligned_overlap for row in found.layers]
        axis.plot(places, aligned, "s--", color=_ALIGNED, label="overlap, aligned")
    spreads = [row.relative_spread for row in found.layers]
    axis.plot(places, spreads, "^:", color="tab:green", label="spread / centre")
    every = max(len(found.layers) // 12, 1)
    shown = list(places)[::every]
    axis.set_xticks(shown, [found.layers[i].name for i in shown], rotation=45, ha="right")
    axis.set_ylim(bottom=min(0.0, *(row.overlap for row in found.layers if math.isfinite(row.overlap)), 0.0))
    axis.set_title("layers, from input to output")
    axis.legend(fontsize="small")


def _paths(axis: Any, found: Landscape, *, to_centre: bool) -> None:
    """Draw what the loss does on the way; mistakes, where there are classes."""
    for is_aligned, color, style in ((False, _RAW, "-"), (True, _ALIGNED, "--")):
        for number, path in enumerate(found.walks(is_aligned=is_aligned, to_centre=to_centre)):
            heights = [100 * share for share in path.mistakes] if found.is_classified else path.losses
            label = ("units aligned" if is_aligned else "as they are") if number == 0 else None
            axis.plot(path.t, heights, style, color=color, alpha=0.7, label=label)
    axis.set_title("from a replica to the centre" if to_centre else "from replica to replica")
    axis.set_ylabel("mistakes, %" if found.is_classified else "loss")
    axis.set_xlabel("share of the way")
    if axis.lines:
        axis.set_ylim(bottom=0.0 if found.is_classified else None)
        axis.legend(fontsize="small")


def _noise(axis: Any, found: Landscape) -> None:
    for place in found.places:
        sigmas = [energy.sigma for energy in place.energies]
        if found.is_classified:
            rises = [100 * energy.mistakes for energy in place.energies]
            bars = [100 * energy.mistakes_uncertainty for energy in place.energies]
        else:
            rises = [energy.loss for energy in place.energies]
            bars = [energy.loss_uncertainty for energy in place.energies]
        color = {"color": _CENTRE, "linestyle": "--"} if place.name == "centre" else {}
        axis.errorbar(sigmas, rises, bars, marker="o", capsize=2, label=place.name, **color)
    axis.set_title("rise under multiplicative noise")
    axis.set_xlabel("sigma")
    axis.set_ylabel("mistakes, %" if found.is_classified else "loss")
    axis.legend(fontsize="small")


def _curvature(axis: Any, found: Landscape) -> None:
    tops = [0.0 if place.curvature is None else place.curvature.scaled for place in found.places]
    axis.bar(_names(found), tops, color="tab:purple")
    axis.set_title("top eigenvalue x squared norm")


def _entropy(axis: Any, found: Landscape) -> None:
    values = [0.0 if place.entropy is None else place.entropy.value for place in found.places]
    bars = [0.0 if place.entropy is None else place.entropy.uncertainty for place in found.places]
    axis.bar(_names(found), values, yerr=bars, color="tab:olive", capsize=2)
    if max(map(abs, values)) > _FAR:
        axis.set_yscale("symlog", linthresh=10)  # the centre of networks that are far apart is no minimum
    axis.set_title("local entropy, nats")
    axis.set_xlabel("replica")


def _names(found: Landscape) -> list[str]:
    return [place.name.removeprefix("replica ") for place in found.places]
