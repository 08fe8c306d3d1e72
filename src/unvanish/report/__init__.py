"""Findings as people read them: text for a terminal, and runs side by side."""

from __future__ import annotations

from .compare import RunView as RunView
from .compare import compare_document as compare_document
from .compare import compare_text as compare_text
from .ink import Ink as Ink
from .text import report_text as report_text
from .text import verdict_line as verdict_line
