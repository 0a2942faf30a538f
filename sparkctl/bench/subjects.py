"""What `bench kernels` measures: an operator as the engine runs it, its plain torch, and a library's version of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparkctl.bench.workload import Workload
from sparkctl.hardware.shape import head_dim

if TYPE_CHECKING:
    import torch
    from sparkctl_kernels.documents import Documents

    Tensors = dict[str, torch.Tensor]
    Run = Callable[[], Tensors]  # forward and backward; gives every result by name, the same names in all forms
    Form = Callable[[Tensors], Run]  # of an operator; a run may overwrite its inputs

BF16 = 2  # bytes


@dataclass(frozen=True)
class Library:
    """Another version of an operator. first_time: what it does at its first call that takes minutes."""

    name: str
    form: Form
    first_time: str | None = None


@dataclass(frozen=True)
class Subject:
    """An operator at one size. inputs: fp32, made on the device; ours: as the engine calls it.

    fixed: inputs that stay fp32. bytes and operations: of forward and backward, each tensor read or written once.
    judged_by_library: plain torch computes in fp32 throughout, so the library's error
    is what ours is held against.
    """

    name: str
    kernel: str
    inputs: Callable[[], Tensors]
    ours: Form
    eager: Form
    bytes: float
    operations: float = 0.0
    fixed: frozenset[str] = frozenset()
    library: Library | None = None
    judged_by_library: bool = False


@dataclass(frozen=True)
class Sizes:
    """Widths of the text model, and the pack."""

    device: torch.device
    lengths: tuple[int, ...]
    labels: int
    rank: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    vocabulary: int
    hybrid: bool  # Qwen3.5: gated attention beside GatedDeltaNet, norm weights stored around zero
    normed: bool
    window: int | None
    key_heads: int = 0
    value_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    taps: int = 0

    @classmethod
    def of(cls, work: Workload, device: torch.device) -> Sizes:
        """Those of a workload."""
        text = work.text
        heads, hybrid = int(text["num_attention_heads"]), "linear_key_head_dim" in text
        width = head_dim(text)
        share = (text.get("rope_parameters") or {}).get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
        linear = dict(
            key_heads=text["linear_num_key_heads"], value_heads=text["linear_num_value_heads"],
            key_dim=text["linear_key_head_dim"], value_dim=text["linear_value_head_dim"],
            taps=text["linear_conv_kernel_dim"],
        ) if hybrid else {}  # fmt: skip
        return cls(
            device, work.lengths, sum(work.labels), work.rank, int(text["hidden_size"]), int(text["intermediate_size"]),
            heads, int(text.get("num_key_value_heads") or heads), width, int(width * share),
            int(text["vocab_size"]), hybrid, hybrid or text.get("model_type") == "qwen3",
            text.get("sliding_window") if text.get("model_type") == "mistral" else None, **linear,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Of the pack."""
        return sum(self.lengths)

    @property
    def offset(self) -> float:
        """What is added to norm weights."""
        return 1.0 if self.hybrid else 0.0

    @property
    def packed(self) -> Documents:
        """The pack's boundaries on the device."""
        from sparkctl_kernels.documents import documents

        return documents(list(self.lengths), self.device)

    def random(self, **shapes: tuple[int, ...]) -> Tensors:
        """Normal values by name."""
        import torch

        return {name: torch.randn(shape, device=self.device) for name, shape in shapes.items()}


def graded(
    call: Callable[..., Any], inputs: Tensors, outputs: tuple[str, ...], gradients: tuple[torch.Tensor, ...],
    names: dict[str, str],
) -> Run:  # fmt: skip
    """`call` under autograd: its outputs by name, and gradients of the inputs that `names` renames."""
    import torch

    def run() -> Tensors:
        leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in inputs.items()}
        found = call(**leaves)
        found = found if isinstance(found, tuple) else (found,)
        grads = torch.autograd.grad(found, [leaves[name] for name in names], gradients)
        results = {name: output.detach() for name, output in zip(outputs, found, strict=True)}
        return results | dict(zip(names.values(), grads, strict=True))

    return run
