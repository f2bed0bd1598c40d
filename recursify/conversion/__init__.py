"""Convert a donor to a recursive model: plan, build, check, save.

Imports `network`, `checkpoints` and, for calibration text, `data`. Start with `convert.py`. Its steps: `layer_selection.py` (the donor
layers of prelude, loop and coda; `probe.py` measures them for `auto`), `mapping.py` (the mapping of tensors), `build.py` (the model around
the tensors), `self_check.py` (comparison with the donor's files and transformers' own class). `settings.py` has the flags, `inspection.py`
shows the parts of a model and the cost per token.
"""

from .._moved import names_of_package

__getattr__ = names_of_package("conversion")
