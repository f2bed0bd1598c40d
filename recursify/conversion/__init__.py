"""Convert a donor to a recursive model: plan, build, check, save.

Imports `network`, `checkpoints` and, for calibration text, `data`. Start with `convert.py`. Its steps: `layer_selection.py` (the donor
layers of prelude, loop and coda; `probe.py` measures them for `auto`), `mapping.py` (the mapping of tensors), `build.py` (the model around
the tensors), `self_check.py` (comparison with the donor's files and transformers' own class). `settings.py` has the flags, `inspection.py`
shows the parts of a model and the cost per token. `probe.py` also measures every block before a conversion; `probe_report.py` and
`probe_page.py` show the result.
"""

from .._moved import names_of_package

__getattr__ = names_of_package("conversion")
