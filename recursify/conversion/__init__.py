"""From a donor to a recursive model: decide, build, check, save.

Imports `network`, `checkpoints` and, for text to calibrate on, `data`. Start with `convert.py`, which reads as that sentence. Its steps:
`layer_selection.py` (which donor layers go where; `probe.py` measures it for `auto`), `mapping.py` (which tensor becomes which, and that
none is lost), `build.py` (the model around the tensors), `self_check.py` (the result against the donor's files and transformers' own
class). `settings.py` has the flags, `inspection.py` what a model is made of and what a token costs.
"""

from .._moved import names_of_room

__getattr__ = names_of_room("conversion")
