"""The outputs of frozen layers, computed once and read from then on."""

from .features import Features as Features
from .fill import cache_features as cache_features
