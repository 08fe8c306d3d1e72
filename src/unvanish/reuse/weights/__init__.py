"""Weights that other frameworks wrote, loaded into a model of torch: planned, all or nothing, proven."""

from .load import load_weights as load_weights
from .plan import Plan as Plan
from .readers import read_weights as read_weights
