"""What fits: variants of a plan that take less memory, from the nearest to the farthest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sparkctl.hardware.load import Load
from sparkctl.hardware.memory import peak
from sparkctl.manifest.schema import MemoryTerms
from sparkctl.manifest.table import EngineName, Mode
from sparkctl.plan import rules
from sparkctl.plan.estimates import TO_COME, Documents, Model

RANKS = (64, 32, 16, 8)


@dataclass(frozen=True)
class Variant:
    """The choices that memory depends on."""

    mode: Mode
    lora_r: int
    pack_length: int
    checkpointing: bool

    def differences(self, other: Variant) -> dict[str, str | int | bool]:
        """What of `other` differs from this, by the names of `Choices`."""
        mine, theirs = vars(self), vars(other)
        return {name: theirs[name] for name in mine if mine[name] != theirs[name]}


@dataclass(frozen=True)
class Memory:
    """What there is, and the model of what a variant takes."""

    available: int
    device: str
    fla: bool
    model: Model
    documents: Documents
    seed: int
    engine: EngineName
    multiprocessors: int = 0

    def load(self, variant: Variant) -> Load:
        """What a variant puts into memory."""
        documents, length = self.documents, variant.pack_length
        return Load(
            mode=variant.mode,
            trainable=self.model.trainable(variant.mode, variant.lora_r),
            rank=variant.lora_r if variant.mode == "lora" else 0,
            area=length,
            longest=documents.longest,
            labels=documents.most_labels(length, self.seed),
            checkpointing=variant.checkpointing,
            device=self.device,
            fla=self.fla,
            engine=self.engine,
            multiprocessors=self.multiprocessors,
            chunks=documents.most_chunks(length, self.seed),
        )

    def terms(self, variant: Variant) -> MemoryTerms:
        """Peak bytes of a variant, by cause."""
        return peak(self.model.shape, self.load(variant))

    def fits(self, variant: Variant) -> bool:
        """Whether it does."""
        return self.terms(variant).total <= self.available

    def longest_that_fits(self, variant: Variant) -> int:
        """Tokens of the longest document that this variant has memory for, in a pack of its own; 0 where none."""
        asked = self.load(replace(variant, pack_length=rules.round_up(self.documents.longest)))

        def takes(tiles: int) -> bool:
            area = tiles * rules.TILE
            labels = area * asked.labels // asked.area
            chunks = self.documents.up_to(area).most_chunks(area, self.seed)
            load = replace(asked, area=area, longest=area, labels=labels, chunks=int(TO_COME * chunks))  # other packs
            return peak(self.model.shape, load).total <= self.available

        return rules.TILE * largest(takes, asked.area // rules.TILE)


def nearest(memory: Memory, wanted: Variant, free: set[str], least: int) -> Variant | None:
    """The first variant that fits, changing only what is `free`, in this order: shorter packs, checkpointing with the
    packs that were wanted, both; then LoRA for full fine-tuning; then smaller ranks. None where nothing fits.

    least: the shortest pack there can be, the longest document's.
    """
    for base in _bases(wanted, free):
        for checkpointing in sorted({base.checkpointing, "checkpointing" in free or base.checkpointing}):
            variant = replace(base, checkpointing=checkpointing)
            if memory.fits(variant):
                return variant
            if "pack_length" in free and least < variant.pack_length:
                shorter = _shorter(memory, variant, least)
                if shorter:
                    return shorter
    return None


def _bases(wanted: Variant, free: set[str]) -> Iterator[Variant]:
    yield wanted
    lora = replace(wanted, mode="lora")
    if "mode" in free and wanted.mode == "full":
        yield lora
    if "lora_r" in free and (wanted.mode == "lora" or "mode" in free):
        yield from (replace(lora, lora_r=r) for r in RANKS if r < wanted.lora_r)


def _shorter(memory: Memory, variant: Variant, least: int) -> Variant | None:
    """The longest pack below the variant's that fits."""
    tiles = (variant.pack_length - 1 - least) // rules.TILE

    def takes(extra: int) -> bool:
        return memory.fits(replace(variant, pack_length=least + extra * rules.TILE))

    if not takes(0):
        return None
    return replace(variant, pack_length=least + largest(takes, tiles) * rules.TILE)


def largest(takes: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that is taken, where those below a taken one are; 0 where none is."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if takes(middle) else (low, middle - 1)
    return low
