"""Findings as people read them: text for a terminal, runs side by side, the trials of a cure."""

from __future__ import annotations

from .compare import RunView as RunView
from .compare import compare_document as compare_document
from .compare import compare_text as compare_text
from .ink import Ink as Ink
from .text import report_text as report_text
from .text import verdict_line as verdict_line
from .trials import cure_line as cure_line
from .trials import cure_text as cure_text
