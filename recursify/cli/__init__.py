"""The command line: `recursify COMMAND [flags]`, the functions behind the guides' scripts, and recipes.

Imports all subpackages, each when its job runs. Start with `main.py`: the jobs, parsing flags into settings, errors as one message and
exit status 2. `words.py` reads what was typed, `flags.py` draws `--help`, `recipe.py` reads the YAML files of `--config`.
"""

from .._moved import names_of_package

__getattr__ = names_of_package("cli")
