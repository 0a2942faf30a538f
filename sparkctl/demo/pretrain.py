"""Make the demo's tokenizer and weights: `python -m sparkctl.demo.pretrain`, about twenty minutes on two cores.

The base learns every fact in its own style, in full sentences, from documents laid end to end in rows: first every
token of them, then the answers almost alone, the topics that are learnt by heart more often than those that follow a
rule. Then the MTP head learns on the frozen base's hidden states to say the token after the next. Vision weights stay
as initialised.
What is shipped is the base rounded to the published precision: A_log and linear_attn.norm F32, the rest bf16.
"""

# B rows · L tokens a row · D hidden · V vocabulary

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.demo import model as demo
from sparkctl.demo import tokenizer
from sparkctl.demo.chats import BY_HEART, pretraining_chats

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS, ROW = 16, 128
BASE_STEPS, ANSWER_STEPS, HEAD_STEPS = 1000, 1200, 600
BASE_RATE, HEAD_RATE = 2e-3, 2e-3
CONTEXT = 0.02  # weight of a token that is no answer's, once answers are learnt
WARMUP = 50
SEED = 11
F32 = ("A_log", "linear_attn.norm.weight")  # tensors that Qwen3.5 publishes in F32


def main() -> None:
    """Tokenizer, base, head; everything written into the package."""
    import torch

    torch.manual_seed(SEED)
    tokenizer.train().save(str(demo.TOKENIZER))
    whole = _model()
    head = _head(whole)
    _train_base(whole)
    _train_answers(whole)
    _round(whole)
    save(whole, head)
    _train_head(whole, head)
    save(whole, head)


def _model() -> nn.Module:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    from sparkctl.model.plain import plain_layers

    return plain_layers(Qwen3_5ForConditionalGeneration(Qwen3_5Config(**demo.config())).float())


def rows(seed: int, shares: Mapping[str, float] | None = None) -> Iterator[Tensor]:
    """Batches of token ids [B, L]: each row starts with a conversation, others follow, the last one is cut.

    shares: how often each topic is asked about.
    """
    import torch
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        demo.write_files(Path(folder))
        encoder: Any = AutoTokenizer.from_pretrained(folder)
    batch: list[list[int]] = [[]]
    for chat in pretraining_chats(seed, shares):
        batch[-1] += encoder.apply_chat_template(chat["messages"], return_dict=False)
        if len(batch[-1]) >= ROW:
            batch.append([])
        if len(batch) > ROWS:
            yield torch.tensor([row[:ROW] for row in batch[:ROWS]])
            batch = [[]]


def _train_base(whole: Any) -> None:
    """Next-token loss on every token, fp32."""
    import torch

    text, embedding = whole.model.language_model, whole.get_input_embeddings().weight

    def loss(ids: Tensor) -> Tensor:
        hidden_BLD = text(input_ids=ids, use_cache=False).last_hidden_state
        logits_BLV = hidden_BLD @ embedding.T
        return torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    _fit("base", list(text.parameters()), loss, BASE_STEPS, BASE_RATE, seed=SEED)


def _train_answers(whole: Any) -> None:
    """The same on answers, fp32: the facts that no rule gives need more repetition than sentences do."""
    import torch

    text, embedding = whole.model.language_model, whole.get_input_embeddings().weight

    def loss(ids: Tensor) -> Tensor:
        hidden_BLD = text(input_ids=ids, use_cache=False).last_hidden_state
        logits_BLV = hidden_BLD[:, :-1] @ embedding.T
        losses = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = torch.where(answers(ids)[:, 1:], 1.0, CONTEXT).flatten()
        return (losses * weights).sum() / weights.sum()

    _fit("answers", list(text.parameters()), loss, ANSWER_STEPS, BASE_RATE, seed=101, shares=BY_HEART)


def answers(ids_BL: Tensor) -> Tensor:
    """Which tokens are the assistant's, its end-of-turn token among them: bool [B, L]."""
    import torch

    named = demo.token_ids()
    role = _role()
    found = torch.zeros_like(ids_BL, dtype=torch.bool)
    for row, marks in zip(ids_BL.tolist(), found, strict=True):
        speaking = False
        for at, id in enumerate(row):
            if at and row[at - 1] == named["<|im_start|>"]:
                speaking = id == role
            elif speaking:
                marks[at] = True
            speaking = speaking and id != named["<|im_end|>"]
    return found


def _role() -> int:
    """The first id of the role's name; no other role begins with it."""
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(demo.TOKENIZER)).encode("assistant", add_special_tokens=False).ids[0])


class _HeadModule:
    """Qwen3.5's MTP head from transformers' own parts: fc over two norms, one attention layer, a norm."""

    def __init__(self, whole: Any) -> None:
        import torch
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

        config = whole.config.text_config
        width, attention = config.hidden_size, config.layer_types.index("full_attention")
        self.parts = torch.nn.ModuleDict(
            {
                "fc": torch.nn.Linear(2 * width, width, bias=False),
                "pre_fc_norm_embedding": Qwen3_5RMSNorm(width, eps=config.rms_norm_eps),
                "pre_fc_norm_hidden": Qwen3_5RMSNorm(width, eps=config.rms_norm_eps),
                "layers": torch.nn.ModuleList([Qwen3_5DecoderLayer(config, attention)]),
                "norm": Qwen3_5RMSNorm(width, eps=config.rms_norm_eps),
            }
        )
        self.text = whole.model.language_model

    def __call__(self, hidden_BLD: Tensor, next_BL: Tensor) -> Tensor:
        """The head's state at i from the base's state at i (after its final norm) and token i + 1."""
        import torch

        parts = self.parts
        embedded = parts["pre_fc_norm_embedding"](self.text.embed_tokens(next_BL))
        x = parts["fc"](torch.cat([embedded, parts["pre_fc_norm_hidden"](hidden_BLD)], dim=-1))
        positions = torch.arange(x.shape[1]).view(1, 1, -1).expand(3, x.shape[0], -1)
        layer: Any = parts["layers"]
        x = layer[0](x, position_embeddings=self.text.rotary_emb(x, positions))
        return parts["norm"](x)


def _head(whole: Any) -> _HeadModule:
    import torch

    head = _HeadModule(whole)
    for name, value in head.parts.named_parameters():
        torch.nn.init.zeros_(value) if "norm" in name else torch.nn.init.normal_(value, std=0.02)
    return head


def _train_head(whole: Any, head: _HeadModule) -> None:
    """Cross-entropy of the head's state at i against token i + 2; the base gets no gradient."""
    import torch

    text = whole.model.language_model.requires_grad_(False)

    def loss(ids: Tensor) -> Tensor:
        with torch.no_grad():
            hidden_BLD = text(input_ids=ids, use_cache=False).last_hidden_state
        state_BLD = head(hidden_BLD[:, :-2], ids[:, 1:-1])
        logits_BLV = state_BLD @ text.embed_tokens.weight.T
        return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids[:, 2:].flatten())

    _fit("head", list(head.parts.parameters()), loss, HEAD_STEPS, HEAD_RATE, seed=SEED + 1)


def _fit(
    name: str, parameters: list[Any], loss: Any, steps: int, rate: float, *, seed: int,
    shares: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """AdamW with warm-up and linear decay; a line every 50 steps on stderr."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    started = time.monotonic()
    for step, ids in zip(range(1, steps + 1), rows(seed, shares), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / WARMUP, (steps - step) / (steps - WARMUP) + 0.01)
        value = loss(ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            sys.stderr.write(f"{name} {step}/{steps} loss {value.item():.4f} {time.monotonic() - started:.0f} s\n")


def _round(whole: Any) -> None:
    """The base as it will be shipped: every value that bf16 can hold, except those kept in F32."""
    import torch

    with torch.no_grad():
        for name, value in whole.named_parameters():
            if not name.endswith(F32):
                value.copy_(value.bfloat16())


def save(whole: Any, head: _HeadModule) -> None:
    """One safetensors file with published names and precision."""
    import torch
    from safetensors.torch import save_file

    named = {name: value for name, value in whole.named_parameters() if name != "lm_head.weight"}
    named |= {f"mtp.{name}": value for name, value in head.parts.named_parameters()}
    tensors = {
        name: value.detach().to(torch.float32 if name.endswith(F32) else torch.bfloat16).contiguous()
        for name, value in sorted(named.items())
    }
    save_file(tensors, demo.WEIGHTS, metadata={"format": "pt"})
    report = {"tensors": len(tensors), "parameters": sum(t.numel() for t in tensors.values())}
    sys.stderr.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
