"""Flags of the commands that write text."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..checkpoints.settings import ModelSource, TokenizerSource
from ..errors import UserError
from ..utils.device import check_seed, choose_device
from ..utils.options import DeviceOptions
from .options import Sampling
from .prompt import check_prompt


@dataclass(kw_only=True)
class WriteSettings(DeviceOptions, Sampling, TokenizerSource, ModelSource):
    """Text generation: what all commands that generate text share."""

    compute_budget: float | None = None
    """Find the halt_threshold that spends this share of the layer applications, e.g. 0.6, on the text of calibration_file."""
    calibration_file: str | None = None
    """Text like what the model will write, for compute_budget."""
    show_recursive_steps: bool = False
    """After the text, show for each token what every cycle would have said."""
    seed: int | None = None
    """Makes sampling repeatable."""

    def validate(self) -> None:
        """Check all that can be checked without the model.

        Raises:
            UserError: A value out of range, or two that exclude each other.
        """
        super().validate()
        self._check_budget()
        if self.show_recursive_steps and self.cache_policy != "full":
            raise UserError(
                f"--show_recursive_steps: reads the text as --cache_policy full does, got --cache_policy {self.cache_policy}; "
                "leave out one of the two"
            )
        check_seed(self.seed)
        choose_device(self.device)

    @property
    def sampling(self) -> Sampling:
        """What shapes the text, alone."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

    def _check_budget(self) -> None:
        budget = self.compute_budget
        if budget is None:
            if self.calibration_file is not None:
                raise UserError("--calibration_file: expected --compute_budget with it, e.g. 0.6, got none")
            return
        if not 0 < budget <= 1:
            raise UserError(f"--compute_budget: expected a share above 0 and at most 1, got {budget}")
        if self.halt == "none":
            raise UserError(f"--compute_budget: expected --halt q_head, kl or entropy with it, got {budget} and no --halt")
        if self.halt_threshold is not None:
            raise UserError("--compute_budget: finds the threshold itself, got --halt_threshold with it; leave out one of the two")
        if self.calibration_file is None:
            raise UserError("--compute_budget: expected --calibration_file with it, a text like what the model will write, got none")


@dataclass(kw_only=True)
class GenerateSettings(WriteSettings):
    """Write text with a model: one prompt, one after the other, or a file of them."""

    prompt: str | None = None
    """Text to continue. Without it, and without prompt_file: interactive, one prompt after the other."""
    prompt_file: str | None = None
    """Continue every line of this file: text, or .jsonl with a "prompt" in each line. What is finished is kept: run again to go on."""
    output_file: str | None = None
    """Where the results of prompt_file go, a JSON object per line. Default: its name with .out.jsonl."""
    batch_size: int = 8
    """Prompts of prompt_file that are continued at a time."""

    def validate(self) -> None:
        """As `WriteSettings.validate`."""
        if self.prompt is not None:
            check_prompt(self.prompt)
        if self.batch_size < 1:
            raise UserError(f"--batch_size: expected at least 1, got {self.batch_size}")
        if self.output_file is not None and self.prompt_file is None:
            raise UserError(f"--output_file: expected --prompt_file with it, got {self.output_file} and no --prompt_file")
        for name in ("prompt", "show_recursive_steps") if self.prompt_file is not None else ():
            if getattr(self, name):
                raise UserError(f"--prompt_file: expected no --{name} with it, got both; leave out one of the two")
        super().validate()
