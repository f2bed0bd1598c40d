"""Model quality at every depth: loss on text, accuracy on questions, tasks of lm-eval, and comparisons of several models.

Imports `inference`, `data`, `checkpoints`, `network` and `reports`. Start with `evaluate.py`, what `recursify evaluate` does;
`compare.py` puts several models side by side; their flags are `settings.py`. They measure with `text_loss.py` (over `windows.py` and
`token_bytes.py`), `cycle_stats.py` (what each cycle changes), `accuracy.py` and `lm_eval_harness.py`; `statistics.py` has standard errors
and tests; `page.py` and `token_view.py` show the result.
"""

from .._moved import names_of_package

__getattr__ = names_of_package("evaluation")
