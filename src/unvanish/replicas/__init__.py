"""Many copies of one network, trained side by side, and what pulls them together."""

from __future__ import annotations

from .binary import BinaryConv2d as BinaryConv2d
from .binary import BinaryLinear as BinaryLinear
from .binary import clip_latent_ as clip_latent_
from .committee import Patterns as Patterns
from .committee import flip_energy as flip_energy
from .committee import random_patterns as random_patterns
from .committee import train_committee as train_committee
from .compare import compare as compare
from .comparison import Comparison as Comparison
from .controls import STANDARD_METHODS as STANDARD_METHODS
from .controls import Method as Method
from .controls import coupled as coupled
from .coupling import Coupling as Coupling
from .kicks import additive as additive
from .kicks import kick as kick
from .loader import ReplicaLoader as ReplicaLoader
from .replicas import Replicas as Replicas
from .schedules import Automatic as Automatic
from .schedules import exponential as exponential
from .speed import LearningSpeed as LearningSpeed

__all__ = [
    "STANDARD_METHODS",
    "Automatic",
    "BinaryConv2d",
    "BinaryLinear",
    "Comparison",
    "Coupling",
    "LearningSpeed",
    "Method",
    "Patterns",
    "ReplicaLoader",
    "Replicas",
    "additive",
    "clip_latent_",
    "compare",
    "coupled",
    "exponential",
    "flip_energy",
    "kick",
    "random_patterns",
    "train_committee",
]
