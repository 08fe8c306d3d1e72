"""Layers that learn one after the other, without labels, before the whole network is trained."""

from .greedy import pretrain as pretrain
from .rbm import Rbm as Rbm
from .result import Learnt as Learnt
from .result import Pretraining as Pretraining
