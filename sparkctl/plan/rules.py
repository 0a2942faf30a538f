"""The rules: a value and its reason for every choice that nobody made.

A rule sees the analysis and what was chosen before it, nothing else. What depends on memory and disk is tried out in
`fit`; here stands what is wanted there.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, NamedTuple

from sparkctl.manifest.schema import AnalysisTable
from sparkctl.manifest.table import EngineName, Mode, Schedule

AVAILABLE_ENGINES: tuple[EngineName, ...] = ("native", "reference")  # what runs everywhere, the preferred first
EXTRA_ENGINES: tuple[EngineName, ...] = ("unsloth",)  # where the package of that name is installed, on a GPU

LORA_EXAMPLES = 50_000  # up to here LoRA learns what full fine-tuning does
FULL_EXAMPLES, FULL_TOKENS = 100_000, 200_000_000  # from here on it lacks the room
RANK = 128
BATCH = 16  # mean documents an optimiser step: the published recipe's batch
SHORT_PACK = 4096  # packs of short documents are at least so long, so that a step is not all launches
TILE = 128  # pack lengths are multiples of it
LARGE_MODEL = 13_000_000_000  # parameters above which rates are halved, as QLoRA (arXiv:2305.14314, table 9) did
SAVES = 10  # checkpoints over a run
SAVE_SECONDS = 1800.0  # and never further apart
SAVE_SHARE = 0.1  # of the time may go into saving and evaluating
KEEP = 2


class Chosen(NamedTuple):
    """A value and why."""

    value: Any
    reason: str


def engines() -> tuple[EngineName, ...]:
    """The engines that can be had here."""
    return (*AVAILABLE_ENGINES, *(name for name in EXTRA_ENGINES if find_spec(name)))


def mode(analysis: AnalysisTable) -> Chosen:
    """LoRA or full fine-tuning, by how much there is to learn; whether full fits is not asked here."""
    examples, tokens = analysis.examples, analysis.tokens
    counted = f"{examples:,} examples with {tokens:,} tokens"
    if examples <= LORA_EXAMPLES:
        return Chosen("lora", f"{counted}: up to {LORA_EXAMPLES:,} examples LoRA learns as well, in less memory")
    if examples >= FULL_EXAMPLES and tokens >= FULL_TOKENS:
        return Chosen("full", f"{counted}: more than adapters have room for")
    between = f"between {LORA_EXAMPLES:,} examples and {FULL_EXAMPLES:,} with {FULL_TOKENS // 10**6} M tokens"
    return Chosen("lora", f"{counted} lie {between}: LoRA, and `--mode full` is worth a try")


def engine(rates: dict[EngineName, float], lacking: str | None = None) -> Chosen:
    """The engine that was fastest on this machine; without measurements the preferred one of those there are.

    rates: tokens a second measured here with this model and mode. lacking: what keeps the native one from the model.
    """
    if lacking:
        return Chosen("reference", f"the native engine has nothing for {lacking}")
    known = {name: rate for name, rate in rates.items() if name in engines()}
    if len(known) > 1:
        best = max(known, key=lambda name: known[name])
        listed = ", ".join(f"{name} {rate:,.0f} tok/s" for name, rate in sorted(known.items()))
        return Chosen(best, f"the fastest measured here: {listed}")
    return Chosen(AVAILABLE_ENGINES[0], "the default; no two engines were measured here")


def lora_r() -> Chosen:
    """Rank."""
    return Chosen(RANK, "rank 128 on every projection: below it adapters fall behind full fine-tuning as data grows")


def lora_alpha(r: int) -> Chosen:
    """Alpha."""
    return Chosen(r, "alpha = r: the update is B·A as it stands")


def tokens_per_step(analysis: AnalysisTable) -> Chosen:
    """Tokens an optimiser step: the published recipe's 16 documents of mean length."""
    length = analysis.mean_length_128
    return Chosen(
        BATCH * length, f"{BATCH} × {length:,}, the mean length rounded up to 128: the published recipe's batch"
    )


def pack_length(longest: int, tokens: int, measured: dict[int, float]) -> Chosen:
    """The pack length to aim for: the fastest measured, else long enough to fill the machine.

    At least the longest document, since none is cut, and at most an optimiser step.
    """
    least = round_up(longest)
    most = max(least, tokens)
    fitting = {length: rate for length, rate in measured.items() if least <= length <= most}
    if len(fitting) > 1:
        best = max(fitting, key=lambda length: fitting[length])
        return Chosen(best, f"the fastest of {len(fitting)} lengths measured here: {fitting[best]:,.0f} tok/s")
    if least >= min(SHORT_PACK, tokens):
        return Chosen(least, f"the longest document, {longest:,} tokens; cost follows documents, not pack length")
    if tokens <= SHORT_PACK:
        return Chosen(most, "a whole optimiser step: documents are short")
    return Chosen(SHORT_PACK, f"documents are short: packs of {SHORT_PACK:,} keep a step from being all launches")


def even(longest_pack: int, least: int, tokens: int) -> int:
    """A pack length up to `longest_pack` of which whole packs make up an optimiser step, near enough."""
    return min(longest_pack, max(least, round_up(-(-tokens // -(-tokens // longest_pack)))))


def accumulation(tokens: int, length: int) -> int:
    """Packs an optimiser step."""
    return max(1, round(tokens / length))


def epochs(examples: int) -> Chosen:
    """Times that training sees every example: fewer the more there are."""
    bounds = ((1_000, 5), (10_000, 3), (100_000, 2))
    for bound, times in bounds:
        if examples < bound:
            return Chosen(
                times, f"{examples:,} examples, fewer than {bound:,}; the checkpoint with the best loss is kept"
            )
    return Chosen(1, f"{examples:,} examples: what one pass has not taught, a second one seldom does")


def learning_rate(mode: Mode, parameters: int) -> Chosen:
    """Peak rate. LoRA 2e-4 (arXiv:2106.09685, 2305.14314), full 2e-5 (Alpaca; Llama 2, arXiv:2307.09288)."""
    rate, known = (2e-4, "LoRA's usual rate") if mode == "lora" else (2e-5, "the usual rate of full fine-tuning")
    if parameters > LARGE_MODEL:
        return Chosen(rate / 2, f"{known}, halved above {LARGE_MODEL // 10**9} B parameters")
    return Chosen(rate, f"{known}, {rate:g}; LoRA wants ten times that of full fine-tuning")


def schedule() -> Chosen:
    """Decay."""
    value: Schedule = "cosine"
    return Chosen(value, "keeps the rate high for the first half, then ends softly")


def min_lr_fraction() -> Chosen:
    """Rate at the end."""
    return Chosen(0.0, "down to zero: the last steps average out the noise of the batches")


def warmup_fraction(steps: int) -> Chosen:
    """Share of the steps that warm up: 3 % (Alpaca, QLoRA), at least ten steps where that is no more than a tenth."""
    share = max(0.03, min(0.1, 10 / steps))
    return Chosen(share, "3 % of the steps" if share == 0.03 else f"{share:.0%} of the steps, since they are few")


def warmup_steps(share: float, steps: int) -> int:
    """The share in steps, rounded up, and never all of them."""
    return min(math.ceil(share * steps), steps - 1)


def weight_decay() -> Chosen:
    """Decay of weights."""
    return Chosen(0.0, "none: it would pull towards zero what the base had learnt, or the adapters' update")


def max_grad_norm() -> Chosen:
    """Clipping."""
    return Chosen(1.0, "cuts the rare step that would undo others")


def save_every(steps: int, step_seconds: float, save_seconds: float) -> Chosen:
    """Steps between checkpoints: ten a run, not more than a tenth of the time, at most 30 minutes apart."""
    tenth = math.ceil(steps / SAVES)
    cheap = math.ceil(save_seconds / SAVE_SHARE / step_seconds)
    latest = int(SAVE_SECONDS // step_seconds)
    if latest < max(tenth, cheap):
        return Chosen(max(1, latest), f"at most {SAVE_SECONDS / 60:.0f} minutes apart at {step_seconds:.1f} s a step")
    if cheap > tenth:
        return Chosen(min(cheap, steps), f"saving and evaluating take no more than {SAVE_SHARE:.0%} of the time")
    return Chosen(tenth, f"{SAVES} checkpoints over the run")


def keep() -> Chosen:
    """Checkpoints that stay."""
    return Chosen(KEEP, "the newest and the one before, should it be damaged, beside the best")


def seed() -> Chosen:
    """Seed."""
    return Chosen(0, "any will do; the same one repeats the run")


def round_up(length: int) -> int:
    """To a multiple of 128."""
    return -(-length // TILE) * TILE
