"""A recording and what a monitor said of it as one HTML file that needs nothing else: no network, no script.

Needs the extra `report` (matplotlib, jinja2); nothing of it is imported before a page is made.
"""

from .page import Section, make_section, need_extra, render
from .timeaxis import TimeAxis

__all__ = ["Section", "TimeAxis", "make_section", "need_extra", "render"]
