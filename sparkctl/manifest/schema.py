"""`run.toml`, table by table. One field is one key, one flag and one line of help.

A step writes its own table and reads the others: analyze [model] [data] [analysis], recommend [plan], train [train]
and [[checkpoints]], merge [merge]. `made_from` in a table is the fingerprint of everything it was made from.
Sizes are bytes, times seconds, instants ISO 8601 in UTC. A `RunPath` is relative to the run's folder where it can be,
and counted anew where that was moved.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from sparkctl.manifest.evidence import Acceptance, Lossless
from sparkctl.manifest.table import CheckpointKind, EngineName, HeadLoss, MaybeRunPath, Mode, RunPath, Schedule, Table

SCHEMA = 1
MOST_EPOCHS = 1000  # each is packed to count its steps


class RunTable(Table):
    id: str
    name: str
    created: str
    sparkctl: str = Field(description="version that wrote this manifest last")
    folder: str = Field(description="absolute folder at the last write: where relative paths led before a move")
    parent: MaybeRunPath = Field(None, description="the run of the round before")
    continues: bool = Field(False, description="training goes on from the parent's best checkpoint")


class ChatTemplate(Table):
    file: str = Field(description="the run's own copy")
    sha256: str
    given: bool = Field(False, description="from `--chat-template` or the parent, not read from the model")


class ModelTable(Table):
    source: RunPath = Field(description="a folder, or a hub id where `revision` is set")
    revision: str | None = Field(None, description="the hub commit that every file comes from")
    config_sha256: str
    model_type: str
    parameters: int = Field(description="without the MTP head")
    vocab_size: int = Field(description="rows of the embedding")
    tokenizer_sha256: str = Field(description="of all that ids depend on beside the template")
    tokenizer_files: str | None = Field(None, description="digest of the files that it is read from")
    chat_template: ChatTemplate
    allow_unknown: bool = Field(False, description="accept a model type that is not in the catalogue")


class DataFile(Table):
    path: RunPath
    sha256: str
    size: int
    mtime_ns: int
    examples: int


class Dropped(Table):
    empty_assistant: int = 0
    no_trained_token: int = 0
    too_long: int = 0
    bad_lines: int = 0


class DataTable(Table):
    files: list[DataFile]
    max_seq_length: int | None = Field(None, ge=1, description="longer examples are dropped; none is cut")
    eval_fraction: float = Field(0.02, ge=0, le=0.9, description="share of the examples that is held out")
    seed: int = Field(0, description="of the hash that chooses what is held out")
    skip_bad: bool = Field(False, description="drop bad lines, count them and show the first five")
    recipe: MaybeRunPath = Field(None, description="recipe that `recommend` takes where no other is named")
    dropped: Dropped = Field(default_factory=Dropped)
    bad: list[str] = Field(default_factory=list, description="file:line of the first five bad lines, and what is wrong")


class Histogram(Table):
    edges: list[int] = Field(description="tokens; one more than counts")
    counts: list[int]


class AnalysisTable(Table):
    examples: int
    train_examples: int
    eval_examples: int
    tokens: int
    assistant_tokens: int = Field(description="tokens with a label: what the model has to say")
    train_tokens: int
    train_assistant_tokens: int
    mean: float
    p50: int
    p90: int
    p95: int
    p99: int
    max: int
    mean_length_128: int = Field(description="the mean rounded up to 128: 5354 gives 5376")
    histogram: Histogram
    duplicates: int = Field(description="examples that equal an earlier one in every token")
    turns: float = Field(description="assistant turns an example, mean")
    marker_examples: int = Field(0, description="examples whose text holds the template's own markers")
    marker_places: list[str] = Field(default_factory=list, description="file:line of the first 20 of them")
    digest: str | None = Field(None, description="content digest of the token store")
    reused: int = Field(0, description="examples taken over from the parent's store without tokenising")
    seconds: float
    made_from: str


class Lora(Table):
    r: int = Field(128, ge=1, description="rank of the adapters")
    alpha: int = Field(128, ge=1, description="the update is alpha / r times B·A")


class Choices(Table):
    """What a recipe may set and a flag may override; None leaves it to the rules."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    mode: Mode | None = Field(None, description="lora or full fine-tuning")
    engine: EngineName | None = Field(None, description="which engine computes the step")
    lora_r: int | None = Field(None, ge=1, description="rank of the adapters")
    lora_alpha: int | None = Field(None, ge=1, description="scale of the adapters: alpha / r")
    tokens_per_step: int | None = Field(None, ge=1, description="tokens an optimiser step sees")
    pack_length: int | None = Field(None, ge=1, description="tokens in a pack of whole documents")
    epochs: int | None = Field(None, ge=1, le=MOST_EPOCHS, description="times that training sees every example")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimiser steps")
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate of AdamW")
    schedule: Schedule | None = Field(None, description="decay after the warm-up")
    warmup_fraction: float | None = Field(None, ge=0, lt=1, description="share of the steps that warm up")
    min_lr_fraction: float | None = Field(None, ge=0, le=1, description="share of the peak rate left at the end")
    weight_decay: float | None = Field(None, ge=0, description="decoupled weight decay")
    max_grad_norm: float | None = Field(None, gt=0, description="gradients are clipped to this norm")
    checkpointing: bool | None = Field(None, description="recompute activations layer by layer")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints")
    keep: int | None = Field(None, ge=1, description="checkpoints kept beside the best")
    seed: int | None = Field(None, ge=0, lt=2**32, description="seed of adapters, packs and order")


class Asked(Table):
    """What the command line of `recommend` said."""

    flags: Choices = Field(default_factory=Choices)
    auto: list[str] = Field(default_factory=list, description="choices that a flag leaves to the rules")
    recipe: MaybeRunPath = Field(None, description="`--recipe`: a name, or a file relative to the run")


class Machine(Table):
    name: str = Field(description="GPU name, or the processor's where there is no GPU")
    device: Literal["cuda", "cpu"]
    capability: str | None = Field(None, description="compute capability, 12.1")
    memory: int = Field(
        description="bytes training may use: GPU memory, or system memory where it is unified or the CPU trains"
    )
    unified_memory: bool = False
    cores: int


class MemoryTerms(Table):
    """Peak bytes by cause; the memory model in sparkctl/hardware writes it."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int = Field(description="interpreter, libraries, allocator slack")

    @property
    def total(self) -> int:
        return sum(dict(self).values())


class Estimates(Table):
    steps: int
    seconds: float = Field(description="of `train`, from its start")
    start_seconds: float = Field(0.0, description="of them, loading and rehearsal, before the first step")
    tokens_per_second: float
    throughput_from: str = Field(description="the measurement or the table that the rate comes from")
    peak_memory: int
    memory: MemoryTerms
    disk: int = Field(description="store, checkpoints, merged model; mtp/ and served/ where it has a head")
    trainable_parameters: int
    head_seconds: float | None = Field(None, description="of `mtp train`, where the model has an MTP head")


class Method(Table):
    mode: Mode
    engine: EngineName
    lora: Lora | None = Field(None, description="absent in full fine-tuning")


class Course(Table):
    """Packs, steps, learning and saving: what the training loop needs of a plan, whatever is trained."""

    tokens_per_step: int = Field(ge=1)
    pack_length: int = Field(ge=1)
    gradient_accumulation: int = Field(ge=1, description="packs an optimiser step")
    epochs: int = Field(ge=1)
    max_steps: int | None = Field(None, ge=1)
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Schedule
    warmup_steps: int = Field(ge=0)
    min_lr_fraction: float = Field(ge=0, le=1)
    weight_decay: float = Field(ge=0)
    beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW, as the next two")
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(gt=0)
    save_every: int = Field(ge=1)
    keep: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**32)
    machine: Machine


class PlanTable(Course, Method):
    checkpointing: bool
    recipe: MaybeRunPath = None
    asked: Asked = Field(default_factory=Asked)
    reasons: dict[str, str] = Field(default_factory=dict, description="why each choice is as it is")
    origin: dict[str, str] = Field(default_factory=dict, description="flag, recipe, parent or rule: which won")
    estimates: Estimates
    created: str | None = None
    made_from: str


class Gate(Table):
    limit: float = Field(description="largest share by which the new loss may be worse")
    parent_loss: float
    loss: float
    passed: bool


class BaseFile(Table):
    name: str
    size: int
    mtime_ns: int
    sha256: str


class BaseTable(Table):
    """The weights that a training began with."""

    source: RunPath = Field(description="as [model] named it")
    config_sha256: str
    files: list[BaseFile]


class TrainTable(Table):
    status: Literal["running", "interrupted", "failed", "done"]
    stopped: str | None = Field(None, description="why it was interrupted")
    started: str
    engine: EngineName
    versions: dict[str, str]
    choices: dict[str, str] = Field(default_factory=dict, description="tiles and kernels this run is pinned to")
    processes: int = Field(1, description="that share each step's packs")
    made_from: str = Field(description="fingerprint of plan and token store")
    step: int = Field(0, description="optimiser steps done and saved")
    steps: int
    trainable_parameters: int
    first_loss: float | None = None
    final_loss: float | None = Field(None, description="mean of the last ten steps")
    first_eval_loss: float | None = None
    final_eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_checkpoint: str | None = None
    last_checkpoint: str | None = None
    tokens: int = 0
    tokens_per_second: float | None = None
    seconds: float = Field(0.0, description="of steps, evaluations and saves, over all starts; not of loading")
    estimated_seconds: float = Field(description="of the same, for all steps")
    peak_memory: int | None = None
    estimated_peak_memory: int
    gate_limit: float | None = Field(None, description="the gate that `train --gate` asked for; a resume keeps to it")
    gate: Gate | None = None
    base: BaseTable | None = Field(None, description="the weights it began with, which `resume` and `merge` want again")

    @property
    def ended_by(self) -> str:
        """Why it is not done: a status of `running` that nobody holds is a kill."""
        return "killed" if self.status == "running" else self.stopped or self.status


class Resume(Table):
    step: int
    checkpoint: str | None = Field(None, description="absent: from the beginning, nothing had been saved")
    reason: str
    when: str


class MergedFolder(Table):
    """A folder that a merge wrote, and what from."""

    checkpoint: str
    asked: str = Field("best", description="`--checkpoint` as it was given: best, last or an id")
    digest: str | None = Field(None, description="of that checkpoint as it was merged")
    folder: RunPath
    tensors: int
    changed_tensors: int
    bytes: int
    seconds: float
    created: str
    made_from: str


class MergeTable(MergedFolder):
    """The folder that was asked for last."""

    others: list[MergedFolder] | None = Field(None, description="folders that were asked for before")


class HeadPlan(Course):
    """How the MTP head is trained."""

    draft_steps: int = Field(3, ge=1, le=8, description="tokens drafted one after the other in training")
    decay: float = Field(0.6, gt=0, le=1, description="weight of a draft step's loss beside the step before")
    loss: HeadLoss = Field("kl", description="kl: to the model's own distribution; ce: to the text")
    fresh: bool = Field(False, description="begin with random weights, not with the base's head")
    estimated_seconds: float = Field(description="of `mtp train`, from its start, without its measurement at the end")
    estimated_start_seconds: float = Field(0.0, description="of them, loading and rehearsal, before the first step")
    estimated_peak_memory: int


class MtpTable(Table):
    mode: Literal["training", "trained", "shipped", "skipped"] = Field(
        description="shipped: training did not help, and the base's head was kept; skipped: there is none"
    )
    skipped: str | None = Field(None, description="why there is no head")
    plan: HeadPlan | None = None
    train: TrainTable | None = None
    resumes: list[Resume] = Field(default_factory=list)
    head: str | None = Field(None, description="file of the 15 tensors that `mtp inject --mode trained` takes")
    digest: str | None = Field(None, description="sha256 of that file")
    merged: str | None = Field(None, description="digest of the merged model that it was trained for")
    acceptance: list[Acceptance] = Field(default_factory=list)
    made_from: str


class ServedTable(Table):
    """The model with an MTP head in it, as vLLM serves it."""

    mode: Literal["trained", "default"]
    shipped: bool = Field(False, description="under `trained` the base's head, since training did not help")
    source: RunPath = Field(description="where the head is from: a file, a folder, or a hub id")
    model: RunPath = Field(description="the folder that got it")
    merged: str | None = Field(None, description="digest of the merged model, where that is the folder")
    folder: RunPath
    link: bool = Field(False, description="by `--link`: the merged model's files are not copied")
    head_digest: str
    tensors: int
    bytes: int
    draft_length: int = Field(description="tokens that a server should draft; 0: drafting does not pay")
    draft_reason: str
    seconds: float
    created: str
    made_from: str


class Checkpoint(Table):
    id: str
    kind: CheckpointKind
    parent: str | None = None
    path: RunPath
    step: int | None = None
    created: str
    digest: str
    eval_loss: float | None = None


class Manifest(Table):
    schema_: int = Field(SCHEMA, alias="schema")
    run: RunTable
    model: ModelTable | None = None
    data: DataTable | None = None
    analysis: AnalysisTable | None = None
    plan: PlanTable | None = None
    train: TrainTable | None = None
    resumes: list[Resume] = Field(default_factory=list)
    lossless: Lossless | None = None
    merge: MergeTable | None = None
    adapter: MergeTable | None = Field(None, description="for the multimodal class")
    adapter_text: MergeTable | None = Field(None, description="for the text-only class")
    mtp: MtpTable | None = None
    served: ServedTable | None = None
    checkpoints: list[Checkpoint] = Field(default_factory=list)

    model_config = ConfigDict(extra="forbid", validate_assignment=True, populate_by_name=True)

    def checkpoint(self, id: str) -> Checkpoint | None:
        """The checkpoint of that id, or None."""
        return next((c for c in self.checkpoints if c.id == id), None)
