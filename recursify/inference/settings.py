"""Flags of the commands that generate text."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..checkpoints.settings import ModelSource, TokenizerSource
from ..errors import UserError
from ..utils.device import check_seed, choose_device
from ..utils.options import DeviceOptions, ModelDtype
from .options import Sampling
from .prompt import check_prompt


@dataclass(kw_only=True)
class WriteSettings(DeviceOptions, ModelDtype, Sampling, TokenizerSource, ModelSource):
    """Text generation: what all commands that generate text share."""

    compute_budget: float | None = None
    """Target compute as a share of the layer applications at full depth, e.g. 0.6; calibrates halt_threshold on calibration_file. Default:
    off."""
    calibration_file: str | None = None
    """Text for compute_budget, similar to what the model will generate."""
    show_recursive_steps: bool = False
    """After the text, print for each token the prediction of every cycle."""
    verbose: bool = False
    """After each text, print tokens per second and the time to the first token."""
    seed: int | None = None
    """Random seed of sampling. Default: none."""

    def validate(self) -> None:
        """Check everything that needs no model.

        Raises:
            UserError: A value out of range, or mutually exclusive ones.
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
        """The sampling and decoding options."""
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
            raise UserError("--compute_budget: expected --calibration_file with it, text similar to what the model will generate, got none")


@dataclass(kw_only=True)
class GenerateSettings(WriteSettings):
    """Generate text from --prompt, from each line of --prompt_file, or interactively."""

    prompt: str | None = None
    """Prompt to continue. Default: interactive, unless prompt_file is given."""
    prompt_file: str | None = None
    """Continue every line of this text file, or every "prompt" of a .jsonl file, in batches; run again to resume."""
    chat: bool = False
    """Give the prompt to the model as a user's message, by the tokenizer's chat template; for models that are tuned to answer."""
    system: str | None = None
    """System message of --chat. Default: none."""
    output_file: str | None = None
    """JSON lines with the results of prompt_file. Default: its name with .out.jsonl."""
    batch_size: int = 8
    """Prompts of prompt_file per batch."""

    def validate(self) -> None:
        """As `WriteSettings.validate`."""
        if self.prompt is not None:
            check_prompt(self.prompt)
        if self.batch_size < 1:
            raise UserError(f"--batch_size: expected at least 1, got {self.batch_size}")
        if self.system is not None and not self.chat:
            raise UserError(f"--system: expected --chat with it, got {self.system!r} and no --chat")
        if self.output_file is not None and self.prompt_file is None:
            raise UserError(f"--output_file: expected --prompt_file with it, got {self.output_file} and no --prompt_file")
        for name in ("prompt", "show_recursive_steps", "verbose") if self.prompt_file is not None else ():
            if getattr(self, name):
                raise UserError(f"--prompt_file: expected no --{name} with it, got both; leave out one of the two")
        super().validate()


@dataclass(kw_only=True)
class ChatSettings(WriteSettings):
    """Chat with a model at the terminal."""

    system: str | None = None
    """System message. Default: none."""
    forget_oldest: bool = False
    """When the conversation exceeds the context length, drop its oldest turns instead of stopping."""

    def validate(self) -> None:
        """As `WriteSettings.validate`."""
        if self.static_cache:
            raise UserError("--static_cache: a conversation goes on with its cache, which a static one cannot; leave it out")
        super().validate()
