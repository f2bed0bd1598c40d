"""PEFT without target_modules works on every family, whichever of the two packages is imported first."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from recursify.network.configuration_recursive_llm import CONFIGS, PREFIX
from recursify.network.modeling_recursive_llm import FAMILIES
from tests.support.tiny import tiny_config

peft: Any = pytest.importorskip("peft")


@pytest.mark.parametrize("family", [name.removeprefix(PREFIX) for name in CONFIGS])
@pytest.mark.parametrize("method", ["LoraConfig", "LoHaConfig"])
def test_methods_have_default_target_modules(family: str, method: str) -> None:
    from recursify.network.configuration_recursive_llm import from_donor

    config = from_donor(tiny_config(family, num_hidden_layers=2), [0, 1], L_layers=2, H_cycles=1, L_cycles=1)
    adapted = peft.get_peft_model(FAMILIES[config.model_type](config), getattr(peft, method)(task_type="CAUSAL_LM"))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("proj" in name for name in trained)


@pytest.mark.parametrize(
    "order",
    [
        "import peft, recursify",
        "import recursify; from peft import LoraConfig",
        "import recursify; from importlib.util import find_spec; find_spec('peft'); import peft",
    ],
)
def test_order_of_imports(order: str) -> None:
    look = "from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as m; print(m['recursive_llama'])"
    done = subprocess.run([sys.executable, "-c", f"{order}; {look}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['q_proj', 'v_proj']"
