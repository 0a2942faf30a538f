"""Who decides: flag over recipe over the parent's plan over rule, and a note of which won."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparkctl.errors import UsageError
from sparkctl.manifest.schema import Choices, PlanTable
from sparkctl.plan.rules import Chosen

# taken over from the parent's plan however it came by them, so that rounds differ in nothing but data
INHERITED = (
    "mode", "lora_r", "lora_alpha", "tokens_per_step", "epochs", "learning_rate", "schedule", "warmup_fraction",
    "min_lr_fraction", "weight_decay", "max_grad_norm", "seed",
)  # fmt: skip
RULE = "rule"


@dataclass
class Decisions:
    """Values with their reasons and origins, by the names of `Choices`."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def given(self, name: str) -> bool:
        """Whether somebody chose it: then no rule may."""
        return self.origin.get(name, RULE) != RULE

    def asked(self, name: str) -> bool:
        """Whether a flag or a recipe of this very plan chose it."""
        return self.origin.get(name) in ("flag", "recipe")

    def drop(self, *names: str) -> None:
        """Forget what was decided."""
        for table in (self.values, self.reasons, self.origin):
            for name in names:
                table.pop(name, None)

    def decide(self, name: str, rule: Chosen) -> Any:
        """The value that was given, else the rule's."""
        if not self.given(name):
            self.put(name, rule.value, RULE, rule.reason)
        return self.values[name]

    def put(self, name: str, value: Any, origin: str, reason: str) -> None:
        """Note a value."""
        self.values[name], self.origin[name], self.reasons[name] = value, origin, reason


def resolve(
    flags: Choices, recipe: Choices | None, recipe_name: str | None, parent: PlanTable | None, auto: frozenset[str]
) -> Decisions:
    """What was given. auto: names that a flag leaves to the rules, whatever recipe and parent say."""
    if flags.mode == "full" and (flags.lora_r or flags.lora_alpha):
        raise UsageError(
            "full fine-tuning has no adapters, so no rank and no alpha", "leave out `--lora-r`, `--lora-alpha`"
        )
    made = Decisions()
    inherited = parent_choices(parent) if parent else {}
    for name in Choices.model_fields:
        if (value := getattr(flags, name)) is not None:
            made.put(name, value, "flag", f"`--{name.replace('_', '-')}`")
        elif name in auto:
            continue
        elif recipe and (value := getattr(recipe, name)) is not None:
            made.put(name, value, "recipe", f"recipe `{recipe_name}`")
        elif (value := inherited.get(name)) is not None:
            made.put(name, value, "parent", "as in the round before")
    if made.values.get("mode") == "full":
        made.drop("lora_r", "lora_alpha")
    return made


def parent_choices(plan: PlanTable) -> dict[str, Any]:
    """What a round takes from the one before: how it learns, and of the rest what a person chose there."""
    values: dict[str, Any] = {name: getattr(plan, name, None) for name in Choices.model_fields}
    values["warmup_fraction"] = plan.warmup_steps / plan.steps if plan.steps else None
    if plan.lora:
        values["lora_r"], values["lora_alpha"] = plan.lora.r, plan.lora.alpha
    chosen = {name for name, origin in plan.origin.items() if origin != RULE}
    return {name: value for name, value in values.items() if name in INHERITED or name in chosen}
