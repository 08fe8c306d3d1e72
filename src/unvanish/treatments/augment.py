"""Vary the images of each training batch, so that a network cannot learn them by heart. Needs kornia."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TreatmentError
from ..records import Change
from .gradients import _positive
from .treatment import Patient, Steps, Treatment

Vary = Callable[[Tensor], Tensor]  # (batch, channels, height, width) -> the same shape


def augment_rotate(degrees: float = 15.0) -> Treatment:
    """Turn each image by its own angle, uniform in [-degrees, degrees]; corners that come free are 0.

    Args:
        degrees: Largest angle. In (0, 180]

    Raises:
        TreatmentError: if ``degrees`` is out of range.

    Source: Shorten & Khoshgoftaar 2019, "Rotation".
    """
    degrees = _angle(degrees, "augment-rotate")

    def make(kornia: Any) -> Vary:
        vary: Vary = kornia.augmentation.RandomRotation(degrees, p=1.0)
        return vary

    what = f"training images are turned by up to {degrees:g} degrees"
    return _augmentation("augment-rotate", f"{degrees:g}", make, what, f"RandomRotation({degrees:g}, p=1.0)")


def augment_rotate_crop(degrees: float = 15.0) -> Treatment:
    """Turn each image by its own angle and enlarge it until no free corner is left.

    An image of half height h and half width w, turned by a, fills the frame when it is enlarged by
    |cos a| + max(h/w, w/h) |sin a|. Pixels are read by linear interpolation.

    Args:
        degrees: Largest angle; the angles are uniform in [-degrees, degrees]. In (0, 180]

    Raises:
        TreatmentError: if ``degrees`` is out of range.

    Source: Shorten & Khoshgoftaar 2019, "Rotation", "Cropping". Ours: the least enlargement, for each angle.
    """
    degrees = _angle(degrees, "augment-rotate-crop")

    def make(kornia: Any) -> Vary:
        def vary(images: Tensor) -> Tensor:
            count, _, height, width = images.shape
            angles = torch.empty(count).uniform_(-degrees, degrees)
            half = torch.tensor([(width - 1) / 2, (height - 1) / 2])  # from the middle of a corner's pixel
            radians = angles.deg2rad()
            zoom = radians.cos().abs() + half.max() / half.min() * radians.sin().abs()
            centre, both = half.expand(count, 2), zoom[:, None].expand(count, 2)
            turn = kornia.geometry.transform.get_rotation_matrix2d(centre, angles, both).to(images)
            turned: Tensor = kornia.geometry.transform.warp_affine(
                images, turn, (height, width), padding_mode="border", align_corners=True
            )
            return turned

        return vary

    what = f"training images are turned by up to {degrees:g} degrees and fill the frame"
    return _augmentation("augment-rotate-crop", f"{degrees:g}", make, what)


def augment_noise(share: float = 0.1) -> Treatment:
    """Add normal noise to each pixel, with ``share`` of the spread of the batch as standard deviation.

    Args:
        share: Standard deviation of the noise over that of the pixels of the batch. Dimensionless, > 0

    Raises:
        TreatmentError: if ``share`` is not a number > 0.

    Source: Bishop 1995 (noise on inputs acts as a penalty on slopes). Ours: the scale.
    """
    _positive(share, "augment-noise")

    def make(kornia: Any) -> Vary:
        noise: Vary = kornia.augmentation.RandomGaussianNoise(std=share, p=1.0)

        def vary(images: Tensor) -> Tensor:
            spread = images.detach().std()
            return images + spread * noise(torch.zeros_like(images))

        return vary

    what = f"training images get noise of {share:g} of their spread"
    return _augmentation("augment-noise", f"{share:g}", make, what, f"RandomGaussianNoise(std={share:g}, p=1.0)")


def augment_smooth(pixels: float = 1.0) -> Treatment:
    """Smooth half of the images by a normal curve of up to ``pixels`` standard deviation.

    Args:
        pixels: Largest standard deviation; each image has its own, uniform from 0.1. In pixels, > 0

    Raises:
        TreatmentError: if ``pixels`` is not a number > 0.

    Source: Chen et al. 2020, appendix A (half of the images, 0.1 to 2 pixels at 224 pixels a side). Ours: 1 pixel
    by default, for smaller images.
    """
    _positive(pixels, "augment-smooth")
    side, least = 2 * math.ceil(3 * pixels) + 1, min(0.1, pixels)

    def make(kornia: Any) -> Vary:
        vary: Vary = kornia.augmentation.RandomGaussianBlur(
            (side, side), (least, pixels), border_type="replicate", p=0.5
        )
        return vary

    what = f"half of the training images are smoothed by up to {pixels:g} pixels"
    code = f"RandomGaussianBlur(({side}, {side}), ({least:g}, {pixels:g}), p=0.5)"
    return _augmentation("augment-smooth", f"{pixels:g}", make, what, code)


def augment_mirror(share: float = 0.5) -> Treatment:
    """Swap left and right in a share of the images.

    Args:
        share: Probability for each image. In (0, 1]

    Raises:
        TreatmentError: if ``share`` is out of range.

    Source: Krizhevsky, Sutskever & Hinton 2012, section 4.1.
    """
    if not (isinstance(share, (int, float)) and 0 < share <= 1):
        raise TreatmentError(
            f"treat(): 'augment-mirror': found {share!r}, expected a share in (0, 1]. Nothing was changed."
        )

    def make(kornia: Any) -> Vary:
        vary: Vary = kornia.augmentation.RandomHorizontalFlip(p=share)
        return vary

    what = f"{share:.0%} of the training images are mirrored"
    return _augmentation("augment-mirror", f"{share:g}", make, what, f"RandomHorizontalFlip(p={share:g})")


def _angle(degrees: float, identifier: str) -> float:
    if not (isinstance(degrees, (int, float)) and 0 < degrees <= 180):
        raise TreatmentError(
            f"treat(): {identifier!r}: found {degrees!r}, expected an angle in (0, 180] degrees. Nothing was changed."
        )
    return float(degrees)


def _augmentation(identifier: str, value: str, make: Callable[[Any], Vary], what: str, call: str = "") -> Treatment:
    """Vary the first argument of the model while it trains: in training mode, with gradients on."""

    def apply(patient: Patient) -> Steps:
        _check_images(identifier, patient.inputs)
        vary = make(_load_kornia(identifier))
        # Other draws for each treatment, the same for the same seed of the script.
        draws = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(identifier.encode())) % 2**63)

        def before(module: nn.Module, args: Any) -> Any:
            if not (module.training and torch.is_grad_enabled()) or not _is_image_batch(args):
                return None
            with _own_random_state(args[0], draws):
                return (vary(args[0]).to(args[0].dtype), *args[1:])

        handle = patient.model.register_forward_pre_hook(before)
        try:
            yield Change(identifier, what)
        finally:
            handle.remove()

    code = f"x = kornia.augmentation.{call}(x)  # on training batches only" if call else ""
    code = code or f"changes = unvanish.treat(model, optimizer, '{identifier}={value}', inputs=(x,)); changes.keep()"
    return Treatment(identifier, apply, value, code=code)


@contextmanager
def _own_random_state(images: Tensor, draws: torch.Generator) -> Iterator[None]:
    """Draw from a sequence of our own: the script's order of data and its dropout stay what they are."""
    seed = int(torch.randint(2**62, (), generator=draws))
    with torch.random.fork_rng(devices=[images.device.index] if images.is_cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device, also those not kept
        if images.is_cuda:
            torch.cuda.default_generators[images.device.index].manual_seed(seed)
        yield


def _is_image_batch(args: tuple[Any, ...]) -> bool:
    """Say whether the first argument is a batch of images: floating point, (batch, channels, height, width)."""
    is_tensor = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()
    return is_tensor and args[0].dim() == 4 and min(args[0].shape[2:]) > 1


def _check_images(identifier: str, inputs: tuple[Any, ...]) -> None:
    if _is_image_batch(inputs):
        return
    found = "no batch"
    if inputs:
        found = f"an input of type {type(inputs[0]).__name__}"
        if isinstance(inputs[0], Tensor):
            found = f"an input of shape {tuple(inputs[0].shape)} and dtype {inputs[0].dtype}"
    raise TreatmentError(
        f"treat(): {identifier!r} varies images: found {found}, expected floating-point images of shape (batch, "
        "channels, height, width), more than one pixel a side. Nothing was changed. Call treat(model, optimizer, "
        f"{identifier!r}, inputs=(images,)); let a model that takes rows of pixels reshape them itself."
    )


def _load_kornia(identifier: str) -> Any:
    """Import kornia: an extra, and a second of work."""
    try:
        import kornia.augmentation
        import kornia.geometry
    except ImportError as error:
        raise TreatmentError(
            f"treat(): {identifier!r} needs kornia: found none, expected it to be installed. Nothing was changed. "
            "Run: pip install 'unvanish[augment]'"
        ) from error
    return kornia
