"""What config.json alone says of a model, against the model that transformers builds of it on the meta device."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import merging
import pytest
import tiny

from sparkctl.cli import app
from sparkctl.errors import UsageError
from sparkctl.hardware.shape import Shape
from sparkctl.manifest.store import Run
from sparkctl.model import catalog
from sparkctl.model.families import DELTA, USUAL
from sparkctl.model.inspect import ModelInfo, full_parameters, inspect, lora_parameters, read_config

SMALL = dict(
    vocab_size=273, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2,
)  # fmt: skip
TEXT = dict(
    SMALL, num_hidden_layers=5, head_dim=20, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=12,
    linear_value_head_dim=14, linear_conv_kernel_dim=3,
)  # fmt: skip
VISION = dict(
    depth=3, hidden_size=24, intermediate_size=40, num_heads=2, out_hidden_size=48, num_position_embeddings=36,
    patch_size=5, spatial_merge_size=3, temporal_patch_size=2, in_channels=4,
)  # fmt: skip
BOTH = dict(model_type="qwen3_5", text_config=TEXT, vision_config=VISION)
FULL, DELTA_NET = "full_attention", "linear_attention"


def folder(path: Path, config: dict[str, Any]) -> Path:
    """A folder with nothing but this config.json."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def count(model: Any) -> int:
    """Parameters; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def built(path: Path) -> tuple[Any, Any]:
    """(the model that the checkpoint was saved from, its language model), on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5ForConditionalGeneration

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config)
        return (Qwen3_5ForConditionalGeneration(config) if config.model_type == "qwen3_5" else text), text


def agrees(info: ModelInfo, path: Path) -> None:
    """Every number of `info` is that of the model which transformers builds."""
    from torch import nn

    whole, text = built(path)
    linears = [(name.rpartition(".")[2], m) for name, m in text.named_modules() if isinstance(m, nn.Linear)]
    adapted = [m for name, m in linears if name in USUAL + DELTA]
    assert info.parameters == count(whole)
    assert full_parameters(info) == count(text)
    assert info.vocab_size == text.get_input_embeddings().num_embeddings
    assert set(info.targets) == {name for name, _ in linears} & set(USUAL + DELTA)
    assert lora_parameters(info, 5) == 5 * sum(m.in_features + m.out_features for m in adapted)


@pytest.mark.parametrize(
    ("name", "billions", "targets"),
    [
        ("qwen3.5-0.8b", 0.853, 10),
        ("qwen3.5-2b", 2.213, 10),
        ("qwen3.5-4b", 4.539, 10),
        ("qwen3.5-9b", 9.410, 10),
        ("qwen3.5-27b", 27.357, 10),
    ],
)
def test_the_published_sizes(name: str, billions: float, targets: int, tmp_path: Path) -> None:
    info = inspect(folder(tmp_path, catalog.config(name)))
    assert round(info.parameters / 1e9, 3) == billions
    assert len(info.targets) == targets
    agrees(info, tmp_path)


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama"),
    "llama tied": dict(model_type="llama", tie_word_embeddings=True),
    "llama with biases": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama with a bias in the FFN": dict(model_type="llama", mlp_bias=True),
    "llama with a head dim": dict(model_type="llama", head_dim=20),
    "llama without kv heads": dict(model_type="llama", num_key_value_heads=None),
    "mistral": dict(model_type="mistral", sliding_window=8),
    "mistral with a head dim": dict(model_type="mistral", head_dim=10, tie_word_embeddings=True),
    "mistral, head dim null": dict(model_type="mistral", head_dim=None),
    "qwen2": dict(model_type="qwen2", use_sliding_window=True, max_window_layers=1),
    "qwen2, a window that is off": dict(model_type="qwen2", use_sliding_window=False, sliding_window=0),
    "qwen2 tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2, switches that it does not know": dict(model_type="qwen2", attention_bias=False, mlp_bias=True),
    "qwen3": dict(model_type="qwen3"),
    "qwen3 tied, with a bias": dict(model_type="qwen3", attention_bias=True, tie_word_embeddings=True, head_dim=12),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_dense_families(config: dict[str, Any], tmp_path: Path) -> None:
    info = inspect(folder(tmp_path, SMALL | config))
    assert info.targets == USUAL
    agrees(info, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "qwen3_5", "qwen3_5_text"])
def test_what_config_json_leaves_out(kind: str, tmp_path: Path) -> None:
    """Its defaults are transformers', also those that the memory model reads."""
    info = inspect(folder(tmp_path, dict(model_type=kind)))
    agrees(info, tmp_path)
    text = built(tmp_path)[1].config
    shape = Shape.from_config(info.config, full_parameters(info))
    assert (shape.hidden, shape.ffn, shape.layers) == (
        text.hidden_size, text.intermediate_size, text.num_hidden_layers,
    )  # fmt: skip
    assert (shape.queries, shape.keys) == (
        text.num_attention_heads * text.head_dim if hasattr(text, "head_dim") else text.hidden_size,
        text.num_key_value_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads),
    )


HYBRIDS: dict[str, dict[str, Any]] = {
    "multimodal": BOTH,
    "no vision config": dict(model_type="qwen3_5", text_config=TEXT),
    "text alone": dict(TEXT, model_type="qwen3_5_text"),
    "text alone, tied": dict(TEXT, model_type="qwen3_5_text", tie_word_embeddings=True),
    "another interval": dict(BOTH, text_config=dict(TEXT, full_attention_interval=2)),
    "types layer by layer": dict(BOTH, text_config=dict(TEXT, layer_types=[FULL, DELTA_NET, FULL, FULL, DELTA_NET])),
    "no attention": dict(TEXT, model_type="qwen3_5_text", layer_types=[DELTA_NET] * 5),
    "no GatedDeltaNet": dict(TEXT, model_type="qwen3_5_text", layer_types=[FULL] * 5),
    "a bias": dict(BOTH, text_config=dict(TEXT, attention_bias=True)),
    "tied in both": dict(BOTH, text_config=dict(TEXT, tie_word_embeddings=True), tie_word_embeddings=True),
    "tied in the text": dict(BOTH, text_config=dict(TEXT, tie_word_embeddings=True), tie_word_embeddings=False),
    "tied in the whole": dict(BOTH, text_config=dict(TEXT, tie_word_embeddings=False), tie_word_embeddings=True),
    "an MTP head": dict(BOTH, text_config=dict(TEXT, mtp_num_hidden_layers=1)),
}


@pytest.mark.parametrize("config", HYBRIDS.values(), ids=HYBRIDS.keys())
def test_hybrids(config: dict[str, Any], tmp_path: Path) -> None:
    agrees(inspect(folder(tmp_path, config)), tmp_path)


def test_a_head_that_only_the_whole_model_ties_is_the_texts_own(tmp_path: Path) -> None:
    """transformers' text class, which is trained, reads the text part alone."""
    untied = inspect(folder(tmp_path, dict(BOTH, tie_word_embeddings=False)))
    info = inspect(folder(tmp_path, dict(BOTH, tie_word_embeddings=True)))
    assert untied.text_parameters == info.text_parameters
    assert untied.parameters - info.parameters == 273 * 48
    assert not Shape.from_config(info.config, 0).tied
    agrees(info, tmp_path)


def test_a_size_that_is_one_off_would_be_seen(tmp_path: Path) -> None:
    """The comparison above can fail."""
    info = inspect(folder(tmp_path, BOTH))
    folder(tmp_path, dict(BOTH, vision_config=dict(VISION, num_position_embeddings=37)))
    with pytest.raises(AssertionError):
        agrees(info, tmp_path)


def test_a_checkpoint_holds_as_much_and_the_mtp_head(qwen35_folder: Path) -> None:
    sizes = {name: tensor.numel() for name, tensor in merging.tensors(qwen35_folder).items()}
    info = inspect(qwen35_folder)
    assert info.parameters == sum(size for name, size in sizes.items() if not name.startswith("mtp."))
    assert info.model_type == "qwen3_5"


@pytest.mark.parametrize("fixture", ["qwen35_folder", "llama_folder"])
def test_peft_makes_as_many_adapter_parameters(fixture: str, request: pytest.FixtureRequest) -> None:
    from peft import LoraConfig, get_peft_model

    path = request.getfixturevalue(fixture)
    info = inspect(path)
    model = get_peft_model(built(path)[1], LoraConfig(r=3, target_modules=list(info.targets)))
    assert lora_parameters(info, 3) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_neither_torch_nor_transformers_is_loaded(qwen35_folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sparkctl.model.inspect import inspect; "
        "print(inspect(Path(sys.argv[1])).parameters, {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(qwen35_folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split(" ", 1) == [str(inspect(qwen35_folder).parameters), "set()\n"]


def refused(path: Path, **options: Any) -> UsageError:
    """The error that inspecting ends in."""
    with pytest.raises(UsageError) as raised:
        inspect(path, **options)
    assert raised.value.hint
    return raised.value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no config.json"),
        (b"", "config.json` is broken"),
        (b'{"model_type": "llama",', "config.json` is broken"),
        (b'{"model_type": "\xff\xfe"}', "config.json` is broken"),
        (b'["llama"]', "no JSON object"),
        (b"{}", "names no model_type"),
        (b'{"model_type": 3}', "names no model_type"),
        (b'{"model_type": "llama", "hidden_size": "many"}', "hidden_size = 'many'"),
        (b'{"model_type": "llama", "hidden_size": 0}', "hidden_size = 0"),
        (b'{"model_type": "llama", "num_hidden_layers": -1}', "num_hidden_layers = -1"),
        (b'{"model_type": "llama", "vocab_size": 1.5}', "vocab_size = 1.5"),
        (b'{"model_type": "llama", "vocab_size": true}', "vocab_size = True"),
        (b'{"model_type": "llama", "vocab_size": null}', "vocab_size = None"),
        (
            b'{"model_type": "llama", "num_key_value_heads": 5}',
            "= 32, which is no multiple of its num_key_value_heads = 5",
        ),
        (
            b'{"model_type": "mistral", "num_attention_heads": 36}',
            "= 36, which is no multiple of its num_key_value_heads",
        ),
        (
            b'{"model_type": "llama", "hidden_size": 34, "head_dim": 8}',
            "hidden_size = 34, which is no multiple of its num",
        ),
        (
            b'{"model_type": "qwen3_5_text", "num_key_value_heads": 3}',
            "num_attention_heads = 16, which is no multiple of",
        ),
        (
            b'{"model_type": "qwen3_5_text", "linear_num_key_heads": 5}',
            "linear_num_value_heads = 32, which is no multiple",
        ),
        (b'{"model_type": "mistral", "sliding_window": 0}', "sliding_window = 0"),
        (b'{"model_type": "qwen2", "use_sliding_window": true, "sliding_window": -4}', "sliding_window = -4"),
        (b'{"model_type": "qwen3_5", "text_config": [1]}', "text_config = [1]"),
        (b'{"model_type": "qwen3_5", "vision_config": "v"}', "vision_config = 'v'"),
        (b'{"model_type": "qwen3_5_text", "layer_types": ["full_attention"]}', "layer_types"),
        (b'{"model_type": "qwen3_5_text", "layer_types": 7}', "layer_types"),
        (b'{"model_type": "qwen3_5_text", "mtp_num_hidden_layers": "one"}', "mtp_num_hidden_layers = 'one'"),
        (b'{"model_type": "qwen3_5_text", "mtp_num_hidden_layers": true}', "mtp_num_hidden_layers = True"),
        (b'{"model_type": "qwen3_5_text", "mtp_num_hidden_layers": -1}', "mtp_num_hidden_layers = -1"),
        (b'{"model_type": "qwen3_5", "text_config": {"mtp_num_hidden_layers": [1]}}', "mtp_num_hidden_layers = [1]"),
        (b'{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', "is quantised (awq)"),
        (b'{"model_type": "qwen3_5", "text_config": {"quantization_config": {"bits": 4}}}', "is quantised"),
        (b'{"model_type": "mamba", "quantization_config": {"quant_method": "fp8"}}', "is quantised (fp8)"),
    ],
)
def test_what_is_no_model(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    error = refused(tmp_path)
    assert said in error.message
    assert str(tmp_path) in error.message


def test_no_folder_and_a_file_and_an_adapter(tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path / "none").message
    (tmp_path / "model.gguf").touch()
    assert "no folder" in refused(tmp_path / "model.gguf").message
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refused(tmp_path).message
    with pytest.raises(UsageError, match="is an adapter"):
        read_config(tmp_path)


def test_an_adapter_beside_a_model_is_not_loaded_on_top_of_it(llama_folder: Path, tmp_path: Path) -> None:
    """transformers would add it to the base, and a merge would leave it out again."""
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    assert inspect(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    error = refused(tmp_path)
    assert "holds an adapter beside a model" in error.message
    assert f"mv {tmp_path}/adapter_config.json ELSEWHERE" in (error.hint or "")


def test_read_config_gives_the_file_as_it_stands(qwen35_folder: Path) -> None:
    assert read_config(qwen35_folder) == json.loads((qwen35_folder / "config.json").read_text())


PHI = dict(
    SMALL, model_type="phi3", pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MOE = dict(SMALL, model_type="gpt_oss", head_dim=8, num_local_experts=4, num_experts_per_tok=2)


def test_another_type_with_the_usual_projections_is_taken(tmp_path: Path) -> None:
    config = dict(SMALL, model_type="gemma2", head_dim=8)
    info = inspect(folder(tmp_path, config))
    assert (info.model_type, info.targets) == ("gemma2", USUAL)
    agrees(info, tmp_path)
    assert Shape.from_config(info.config, full_parameters(info)).queries == 6 * 8


@pytest.mark.parametrize("allow_unknown", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        dict(SMALL, model_type="qwen3_moe", **EXPERTS),
        dict(SMALL, model_type="qwen2_moe", shared_expert_intermediate_size=16, **EXPERTS),
        dict(SMALL, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
        dict(TEXT, model_type="qwen3_5_moe_text", shared_expert_intermediate_size=16, **EXPERTS),
    ],
    ids=lambda config: config["model_type"],
)
def test_experts_that_are_fused_as_they_are_loaded_are_refused(
    config: dict[str, Any], allow_unknown: bool, tmp_path: Path
) -> None:
    """Their training would be refused as one on a base that is not whole, which it is; qwen2_moe, whose shared expert
    has the usual projections, came as far as that unasked."""
    error = refused(folder(tmp_path, config), allow_unknown=allow_unknown)
    assert f"`{config['model_type']}`, whose experts transformers fuses" in error.message
    assert "--allow-unknown" not in (error.hint or "")


@pytest.mark.parametrize(
    ("config", "lacking", "targets"),
    [
        (PHI, "q_proj, k_proj, v_proj, gate_proj, up_proj", ("o_proj", "down_proj")),  # fused: qkv_proj, gate_up_proj
        (
            MOE,
            "gate_proj, up_proj, down_proj",
            ("q_proj", "k_proj", "v_proj", "o_proj"),
        ),  # experts are no linear layers
    ],
)
def test_one_that_lacks_some_needs_allow_unknown(
    config: dict[str, Any], lacking: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    error = refused(folder(tmp_path, config))
    assert f"`{config['model_type']}`, which has no {lacking}" in error.message
    assert "--allow-unknown" in (error.hint or "")
    info = inspect(tmp_path, allow_unknown=True)
    assert info.targets == targets
    agrees(info, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        dict(model_type="nonesuch"),  # no class
        dict(model_type="gpt2"),  # names of its own for everything
        dict(model_type="whisper"),  # no language model
        dict(SMALL, model_type="gemma2", num_hidden_layers="three"),
        dict(model_type="gemma3", text_config=dict(SMALL, head_dim=8)),  # no class for the language model alone
    ],
    ids=lambda config: config["model_type"],
)
def test_what_cannot_be_trained_is_refused_all_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    for allow_unknown in (False, True):
        error = refused(folder(tmp_path, config), allow_unknown=allow_unknown)
        assert f"`{config['model_type']}`" in error.message
        assert "qwen3_5" in (error.hint or "")


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig as Config\n"
    (tmp_path / "code.py").write_text(code)
    config = dict(SMALL, model_type="homemade", auto_map=dict(AutoConfig="code.Config", AutoModelForCausalLM="code.M"))
    refused(folder(tmp_path, config), allow_unknown=True)
    assert not (tmp_path / "ran").exists()


def test_analyze_refuses_and_allows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder(tmp_path / "moe", MOE)
    tiny.tokenizer(model)
    data = tiny.chats(tmp_path / "chats.jsonl")
    command = ["analyze", str(data), "--run", str(tmp_path / "r1"), "--model", str(model), "--json"]
    assert app.run(command) == 2
    captured = capsys.readouterr()
    assert "--allow-unknown" in json.loads(captured.out)["hint"]
    assert "error:" in captured.err
    assert not (tmp_path / "r1").exists()
    assert app.run([*command, "--allow-unknown"]) == 0, capsys.readouterr().err
    table = Run.open(tmp_path / "r1").manifest.model
    assert table
    assert (table.model_type, table.allow_unknown) == ("gpt_oss", True)
    assert table.parameters == inspect(model, allow_unknown=True).parameters
