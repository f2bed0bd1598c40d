"""`recursify demo`: two small bundled base models, converted, fine-tuned, measured and reported in minutes, offline.

Uses every subpackage but `hub`, `serving` and `cli`. Start with `run.py`; its halves are `prose.py` (loss and text at every depth) and
`state_tracking.py` (accuracy by length). `report.py` and `report_tracking.py` are the page, `stages.py` the clock.
"""

from .._moved import names_of_package

__getattr__ = names_of_package("demo")
