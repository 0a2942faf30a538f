"""The MTP head trained with transformers alone, as a careful user writes it: the rival of `bench mtp`.

The frozen model gets the pack as one row with all that keeps documents apart there: positions that begin anew,
cu_seq_lens, seq_idx, no cache and no mask; without fla, a document at a time. (Where causal-conv1d is not installed,
its convolution reads three tokens across a border all the same, which spares it work.) The head is transformers'
decoder layer and norms, fp32 masters under bf16 autocast; each draft step gets the tokens one place further and the
state of the step before, with ordinary causal attention within documents. The loss is KL in plain torch on label
tokens, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkctl.bench.workload import Workload, model_of
from sparkctl.data.batches import Pack
from sparkctl.model.load import silence
from sparkctl.model.plain import plain_layers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# T tokens · D hidden · N label tokens · V vocabulary

CHUNK = 512  # label tokens whose logits, the teacher's and every step's, are there at a time


class Rival:
    """Builds model and head, the head with `tensors` by their published names. weights: of the draft steps' losses.

    checkpointing: each chunk of the loss is computed again in backward; else its backward runs at once.
    """

    def __init__(
        self, work: Workload, device: torch.device, tensors: dict[str, Tensor], weights: list[float], *,
        checkpointing: bool,
    ) -> None:  # fmt: skip
        import torch

        self.device, self.weights, self.checkpointing = device, weights, checkpointing
        self.packed = device.type == "cuda" and find_spec("fla") is not None  # plain torch lets documents meet
        with silence():
            model = model_of(work, device, torch.bfloat16).eval()
        if device.type == "cpu":
            plain_layers(model)
        self.text, self.lm_head = model.model, model.lm_head
        self.head = _head(model.config, device, tensors)
        self._place(work.pack())

    def step(self) -> Tensor:
        """Loss of the pack, forward and backward."""
        import torch

        hidden_TD = self.hidden()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            states = self.states(hidden_TD)
        students = [state[rows] for state, (rows, _) in zip(states, self.students, strict=True)]
        if not self.checkpointing:
            return self._at_once(hidden_TD[self.teachers], students)
        from torch.utils.checkpoint import checkpoint

        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            chunks = self._chunks(hidden_TD[self.teachers], students)
            loss = torch.stack([checkpoint(self._divergence, *chunk, use_reentrant=False) for chunk in chunks]).sum()
        (loss * self.scale).backward()
        return loss.detach()

    def hidden(self) -> Tensor:
        """The frozen model's states after its final norm: [T, D]."""
        import torch

        with torch.no_grad():
            if self.packed:
                return self._text(self.ids, position_ids=self.positions, **self.borders)
            return torch.cat([self._text(ids) for ids in self.ids.split(self.lengths, dim=1)])

    def states(self, hidden_TD: Tensor) -> list[Tensor]:
        """The head's state of each draft step: [T, D] each."""
        import torch
        from transformers.masking_utils import create_causal_mask

        head, found, last = self.head, [], hidden_TD[None]
        mask = create_causal_mask(
            config=self.text.config, inputs_embeds=last, attention_mask=None, past_key_values=None,
            position_ids=self.positions,
        )  # fmt: skip
        for number, ids in enumerate(self.following):
            places = (self.positions + number)[None].expand(3, 1, -1)
            embedded = head["pre_fc_norm_embedding"](self.text.embed_tokens(ids))
            x = head["fc"](torch.cat([embedded, head["pre_fc_norm_hidden"](last)], dim=-1))
            layer: Any = head["layers"]
            x = layer[0](x, position_embeddings=self.text.rotary_emb(x, places), attention_mask=mask)
            last = head["norm"](x)
            found.append(last[0])
        return found

    def _text(self, ids: Tensor, **places: Any) -> Tensor:
        found: Tensor = self.text(input_ids=ids, use_cache=False, **places).last_hidden_state[0]
        return found

    def _at_once(self, teachers_ND: Tensor, students: list[Tensor]) -> Tensor:
        """A chunk's backward follows its forward; the head's follows when all gradients of its states are there."""
        import torch

        ends = [student.detach().requires_grad_() for student in students]
        total = torch.zeros((), device=self.device)
        for chunk in self._chunks(teachers_ND, ends):
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self._divergence(*chunk)
            (loss * self.scale).backward()
            total += loss.detach()
        torch.autograd.backward(students, [end.grad for end in ends])
        return total

    def _chunks(self, teachers_ND: Tensor, students: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """(teacher, each step's student, each step's `present`) of so many label tokens."""
        present = [there for _, there in self.students]
        yield from zip(*(x.split(CHUNK) for x in (teachers_ND, *students, *present)), strict=True)

    def _divergence(self, teacher_ND: Tensor, *of_steps: Tensor) -> Tensor:
        """Σ over steps and label tokens of weight · KL(teacher ‖ student)."""
        import torch
        import torch.nn.functional as F

        with torch.no_grad():
            log_p = self.lm_head(teacher_ND).float().log_softmax(-1)
        count, total = len(self.weights), torch.zeros((), device=self.device)
        for weight, student_ND, present_N in zip(self.weights, of_steps[:count], of_steps[count:], strict=True):
            log_q = self.lm_head(student_ND).float().log_softmax(-1)
            apart = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            total = total + weight * (apart * present_N).sum()
        return total

    def _place(self, pack: Pack) -> None:
        """The pack on the device."""
        import torch

        from sparkctl.mtp.drafter import following
        from sparkctl.mtp.engine import targets
        from sparkctl.train.engines.native.model import pack_ids

        def there(array: np.ndarray, kind: Any = np.int64) -> Tensor:
            return torch.from_numpy(array.astype(kind)).to(self.device)

        steps, self.lengths = len(self.weights), [len(document.ids) for document in pack.documents]
        places = np.concatenate([np.arange(length) for length in self.lengths])
        ends = there(np.cumsum([0, *self.lengths]), np.int32)
        self.borders = dict(
            cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=max(self.lengths), max_length_k=max(self.lengths),
            seq_idx=there(np.repeat(np.arange(len(self.lengths)), self.lengths)[None], np.int32),
        )  # fmt: skip
        self.ids, self.positions = there(pack_ids(pack)[None]), there(places[None])
        self.following = [there(ids[None]) for ids in following(pack, steps)]
        rows, _, inside = targets(pack)
        self.teachers, self.scale = there(rows), 1 / pack.labels
        self.students = [
            (there(np.where(inside >= step, rows - step, rows)), there(inside >= step, np.float32))
            for step in range(1, steps + 1)
        ]


def _head(config: Any, device: torch.device, tensors: dict[str, Tensor]) -> Any:
    """Qwen3.5's MTP head of transformers' parts, fp32, with these values."""
    from torch import nn
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

    from sparkctl.model.mtp import PREFIX

    width, eps = config.hidden_size, config.rms_norm_eps
    with device:
        head = nn.ModuleDict(
            {
                "fc": nn.Linear(2 * width, width, bias=False),
                "pre_fc_norm_embedding": Qwen3_5RMSNorm(width, eps=eps),
                "pre_fc_norm_hidden": Qwen3_5RMSNorm(width, eps=eps),
                "layers": nn.ModuleList([Qwen3_5DecoderLayer(config, config.layer_types.index("full_attention"))]),
                "norm": Qwen3_5RMSNorm(width, eps=eps),
            }
        )
    head.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    return head
