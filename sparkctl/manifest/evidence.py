"""Tables of what was proved or measured: the certificate of losslessness, the acceptance of drafts."""

from __future__ import annotations

from pydantic import Field

from sparkctl.manifest.table import EngineName, Mode, Table


class Lossless(Table):
    """The certificate of `verify lossless`. Distances are relative, from the reference computed in fp32."""

    passed: bool
    problems: list[str] = Field(default_factory=list, description="what was over a limit")
    engine: EngineName
    mode: Mode
    device: str
    dtype: str = Field(description="of the engine's products")
    packs: str = Field(description="the data of step 0")
    tensors: int = Field(description="trained tensors; small ones of all layers count as one")
    worst_gradient_ratio: float = Field(description="of distances, the engine's over the reference's in that dtype")
    worst_tensor: str
    median_gradient_ratio: float
    worst_fp32_distance: float | None = Field(None, description="of a gradient, the engine computed in fp32")
    worst_fp32_tensor: str | None = None
    fp32_skipped: str | None = Field(None, description="why the engine was not computed in fp32")
    document_loss_ratio: float = Field(description="of distances, of the losses of single documents")
    steps: int = Field(description="optimiser steps side by side")
    course_loss: float = Field(description="distance of the loss over those steps")
    course_loss_reference: float
    course_norm: float = Field(description="distance of the gradient norm over those steps")
    course_norm_reference: float
    versions: dict[str, str]
    seconds: float
    created: str
    made_from: str


class Acceptance(Table):
    """How much of what an MTP head drafts a server accepts, counted as vLLM counts it (sparkctl/mtp/accept.py)."""

    name: str = Field(description="whose head, on which model")
    prompts: int = Field(description="held-out prompts that the model answered greedily")
    tokens: int = Field(description="of the answers")
    drafts: int = Field(description="drafts that the model checked")
    conditional: list[float] = Field(description="share accepted at 1, 2, … of the drafts accepted up to there")
    cumulative: list[float] = Field(description="share accepted at 1, 2, … of all drafts: vLLM's rate per position")
    mean_accepted: float = Field(description="tokens accepted a draft, without the one that the model adds itself")
    shorter: list[list[float]] = Field(description="`cumulative` of servers that draft 1, 2, … tokens, less than here")
    created: str | None = None
    made_from: str

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a step of the server gives, the model's own one included: what vLLM logs under this name."""
        return 1 + self.mean_accepted

    @property
    def by_length(self) -> list[float]:
        """Tokens accepted a draft where a server drafts 1, 2, … tokens: the last is `mean_accepted`."""
        return [*(sum(rates) for rates in self.shorter), self.mean_accepted]
