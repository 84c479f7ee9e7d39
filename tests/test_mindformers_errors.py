"""What of MindFormers cannot be served is refused, with the name of what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import pytest
import torch
import yaml
from mindspore.train.checkpoint_pb2 import Checkpoint
from tiny_checkpoints import tiny_model
from tiny_mindformers import edit_yaml, mindformers_tensors, save, write_mindformers

from models.checkpoint import CheckpointError, open_checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "Qwen3Config"}, r"'LlamaForCausalLM' with 'Qwen3Config'; supported: LlamaForCausalLM, Parallel"),
        ({"type": None}, r"with None.*names a Hugging Face folder, give that folder"),
        ({"moe_config": {"expert_num": 8}}, r"predict_llama\.yaml: moe_config = .*may change the result"),
        ({"pet_config": {"pet_type": "lora"}}, r"pet_config = \{'pet_type': 'lora'\}"),
        ({"quantization_config": {"quant_method": "rtn"}}, "quantization_config"),
        ({"quant": "w8a16"}, "quant = 'w8a16'"),
        ({"parallel_decoding_params": {"parallel_decoding": "la"}}, "parallel_decoding_params"),
        ({"use_moe": True}, "use_moe = True.*supported: False"),
        ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon = 1e-06"),
        ({"something_new": False}, "something_new = False"),
        ({"has_bias": True}, "has_bias = True"),
        ({"extend_method": "YARN"}, "extend_method = 'YARN'.*supported: None, PI, NTK, linear, LLAMA3"),
        ({"extend_method": "PI", "scaling_factor": "much"}, "scaling_factor = 'much' is not a positive number"),
        (
            {"extend_method": "LLAMA3", "scaling_factor": 8.0},
            r"scaling_factor = 8\.0.*original_max_position_embeddings",
        ),
        ({"extend_method": "linear", "scaling_factor": {"factor": 0}}, r"scaling_factor\.factor = 0 is not a positive"),
        ({"num_layers": None}, "lacks num_layers"),
        ({"num_layers": 3}, r"lacks model\.layers\.2\.attention_norm\.weight"),
        ({"num_layers": 1}, r"holds model\.layers\.1\.\S+, .*does not use"),
        ({"n_kv_heads": 3}, "4 heads of 16 for 3 keys and values"),
        ({"n_kv_heads": 4}, r"attention\.wk\.weight has shape \[32, 64\], its configuration says \[64, 64\]"),
        ({"intermediate_size": None}, r"feed_forward\.w1\.weight has shape \[96, 64\].*\[256, 64\]"),
        ({"qkv_has_bias": True}, r"lacks model\.layers\.0\.attention\.wq\.bias"),
    ],
)
def test_a_model_config_that_cannot_be_served(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_mindformers("llama", tmp_path)
    edit_yaml(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def of_another_network(folder: Path) -> None:
    edit_file(folder, lambda content: content["model"]["arch"].update(type="Baichuan7BV2ForCausalLM"))


def with_experts(folder: Path) -> None:
    edit_file(folder, lambda content: content["moe_config"].update(expert_num=8))


def edit_file(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    (path,) = folder.glob("*.yaml")
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


def describe_twice(folder: Path) -> None:
    (folder / "finetune.yaml").write_text((folder / "predict_llama.yaml").read_text())


def break_yaml(folder: Path) -> None:
    (folder / "predict_llama.yaml").write_text("model: [")


def remove_yaml(folder: Path) -> None:
    (folder / "predict_llama.yaml").unlink()


def mistype_section(folder: Path) -> None:
    edit_file(folder, lambda content: content.update(moe_config="none"))


def store_as_integers(folder: Path) -> None:
    save(tensors(), folder / "llama.ckpt", ms.int8)


def two_checkpoints(folder: Path) -> None:
    save(tensors(), folder / "llama-2.ckpt")


def both_forms(folder: Path) -> None:
    save(tensors(), folder / "llama.safetensors")


def remove_weights(folder: Path) -> None:
    (folder / "llama.ckpt").unlink()


def only_slices(folder: Path) -> None:
    remove_weights(folder)
    for rank in range(2):
        (folder / f"rank_{rank}").mkdir()
        save(tensors(), folder / f"rank_{rank}" / f"llama_rank_{rank}.ckpt")


def low_rank_adapter(folder: Path) -> None:
    adapter = {"model.layers.0.attention.wq.mindpet_delta_lora_a": torch.zeros(4, 64)}
    save(tensors() | adapter, folder / "llama.ckpt")


def encrypt(folder: Path) -> None:
    save(tensors(), folder / "llama.ckpt", enc_key=b"0123456789abcdef", enc_mode="AES-GCM")


def empty(folder: Path) -> None:
    rewrite(folder, b"")


def pickle_instead(folder: Path) -> None:
    rewrite(folder, b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.")


def lose_a_value(folder: Path) -> None:
    """The second half of a tensor that is stored in two."""
    message = Checkpoint()
    message.value.add(tag="model.norm_out.weight").tensor.CopyFrom(norm(b"\0" * 128))
    append(folder, message)


def hash_table(folder: Path) -> None:
    message = Checkpoint()
    message.value.add(tag="table").maptensor.tensor.add().CopyFrom(norm(b"\0" * 256))
    append(folder, message)


def norm(content: bytes) -> Any:
    tensor = Checkpoint().value.add(tag="x").tensor
    tensor.dims.append(64)
    tensor.tensor_type, tensor.tensor_content = "Float32", content
    return tensor


def append(folder: Path, message: Any) -> None:
    path = folder / "llama.ckpt"
    rewrite(folder, path.read_bytes() + message.SerializeToString())


def rewrite(folder: Path, content: bytes) -> None:
    """Replace the checkpoint, which MindSpore has made read-only."""
    path = folder / "llama.ckpt"
    path.unlink()
    path.write_bytes(content)


def tensors() -> dict[str, torch.Tensor]:
    return mindformers_tensors(tiny_model("llama"))


DAMAGED = r"llama\.ckpt: is no MindSpore checkpoint, or is encrypted, cut short or damaged"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_another_network, "has architecture 'Baichuan7BV2ForCausalLM' with 'LlamaConfig'"),
        (with_experts, r"moe_config\.expert_num = 8"),
        (describe_twice, r"holds 2 descriptions of a model \(finetune\.yaml, predict_llama\.yaml\)"),
        (break_yaml, r"predict_llama\.yaml: cannot be read"),
        (mistype_section, "file in it is damaged: AttributeError"),
        (remove_yaml, r"no config\.json and no GGUF file; .*MindFormers folder \(its YAML file"),
        (store_as_integers, r"embedding_weight is stored as Int8; supported: Float64, Float32, Float16, BFloat16"),
        (two_checkpoints, r"holds 2 checkpoints \(llama-2\.ckpt, llama\.ckpt\)"),
        (both_forms, r"holds both safetensors and \.ckpt files"),
        (remove_weights, r"has no \.ckpt and no safetensors files"),
        (only_slices, "holds the slices of 2 ranks; make whole tensors of them first"),
        (low_rank_adapter, r"holds model\.layers\.0\.attention\.wq\.mindpet_delta_lora_a"),
        (encrypt, DAMAGED),
        (empty, DAMAGED),
        (pickle_instead, DAMAGED),
        (lose_a_value, r"model\.norm_out\.weight has 384 bytes, which is not \[64\] of Float32"),
        (hash_table, DAMAGED),
    ],
)
def test_a_folder_that_cannot_be_served(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write_mindformers("llama", tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [1, 30, 20000, -1, -100])
def test_a_checkpoint_that_is_cut_short(size: int, tmp_path: Path) -> None:
    write_mindformers("llama", tmp_path)
    rewrite(tmp_path, (tmp_path / "llama.ckpt").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=DAMAGED):
        open_checkpoint(tmp_path)


def test_a_checkpoint_alone(tmp_path: Path) -> None:
    write_mindformers("llama", tmp_path)
    with pytest.raises(CheckpointError, match="says nothing of its network; give a folder with it and its YAML file"):
        open_checkpoint(tmp_path / "llama.ckpt")
