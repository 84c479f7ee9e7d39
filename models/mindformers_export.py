"""``python -m models.mindformers_export``: an installed MindFormers writes its own graphs of a model, for Ascend.

The pair takes what MindFormers' network takes since 1.1: tokens, lengths, block tables and slots. Its operators exist
on Ascend only, but MindSpore can write it on any machine. MindFormers is needed for nothing else here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from models.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from models.network_config import NetworkConfig, RopeScaling
from models.weight_map import mindformers_weight_map

Precision = Literal["float16", "bfloat16"]
GRAPHS = ("prefill", "decode")


def llama_config(config: NetworkConfig, precision: Precision, block_size: int, num_blocks: int) -> dict[str, Any]:
    """The arguments of MindFormers' LlamaConfig for this network.

    Raises:
        CheckpointError: MindFormers' Llama cannot be this network.
    """
    if config.qk_norm or config.head_dim * config.num_heads != config.hidden_size:
        raise CheckpointError(f"a network of {config.architecture}'s shape is not one of MindFormers' Llama")
    return {
        "seq_length": config.context_length,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "theta": config.rope_theta,
        "qkv_has_bias": config.qkv_bias,
        "attn_proj_has_bias": config.output_bias,
        "tie_word_embeddings": config.tied_embeddings,
        **_scaling(config.rope_scaling),
        "compute_dtype": precision,
        "param_init_type": precision,
        "block_size": block_size,
        "num_blocks": num_blocks,
        "use_past": True,
        "is_dynamic": True,
        "use_flash_attention": True,
        "batch_size": 1,
    }


def _scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if scaling.kind == "linear":
        return {"extend_method": "PI", "scaling_factor": scaling.factor}
    return {
        "extend_method": "LLAMA3",
        "scaling_factor": {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        },
    }


def load_weights(network: Any, checkpoint: Checkpoint) -> None:
    """Set the network's parameters to the checkpoint's weights, one at a time."""
    from mindspore import Tensor

    parameters = network.parameters_dict()
    for weight, pieces in mindformers_weight_map(checkpoint.config, (), "stacked").items():
        rows = checkpoint.read(weight)
        for piece in pieces:
            part, rows = rows[: piece.shape[0]], rows[piece.shape[0] :]
            parameter = parameters[piece.tensor]
            parameter.set_data(Tensor(part, parameter.dtype))


def write_pair(checkpoint: Checkpoint, folder: Path, precision: Precision, block_size: int, num_blocks: int) -> None:
    """Write ``prefill.mindir`` and ``decode.mindir`` into ``folder``."""
    import mindspore as ms
    from mindformers import LlamaConfig, LlamaForCausalLM
    from mindspore import Tensor

    from models.graphs import write_graph

    ms.set_context(mode=ms.GRAPH_MODE)
    arguments = llama_config(checkpoint.config, precision, block_size, num_blocks)
    network = LlamaForCausalLM(LlamaConfig(**arguments, run_mode="predict"))
    network.set_train(False)
    load_weights(network, checkpoint)
    lengths, slots = (Tensor(shape=[None], dtype=ms.int32) for _ in range(2))
    tables = Tensor(shape=[None, None], dtype=ms.int32)
    for graph in GRAPHS:
        network.add_flags_custom(is_first_iteration=graph == "prefill")
        network.phase = graph  # what MindSpore has compiled under another name is not taken again
        tokens = Tensor(shape=[None, None if graph == "prefill" else 1], dtype=ms.int32)
        inputs = (tokens, *[None] * 6, lengths, None, None, tables, slots)
        write_graph(network, folder / f"{graph}.mindir", *inputs)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 1 with a reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m models.mindformers_export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="what python -m models.export takes")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be empty or not exist")
    parser.add_argument("--precision", choices=get_args(Precision), default="float16")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a cache block")
    parser.add_argument("--blocks", type=int, default=512, help="blocks of the cache, which is part of the graphs")
    args = parser.parse_args(arguments)
    if min(args.block_size, args.blocks) < 1:
        parser.error("--block-size and --blocks must be at least 1")
    os.environ.setdefault("GLOG_v", "3")
    os.environ["RUN_MODE"] = "predict"  # MindFormers reads it: its network returns logits only
    try:
        if importlib.util.find_spec("mindformers") is None:
            raise CheckpointError("MindFormers is not installed, and its graphs are written by its own network only")
        if args.output.exists() and any(args.output.iterdir()):
            raise CheckpointError(f"{args.output}: is not empty; choose another --output")
        checkpoint = open_checkpoint(args.checkpoint)
        args.output.mkdir(parents=True, exist_ok=True)
        write_pair(checkpoint, args.output, args.precision, args.block_size, args.blocks)
        checkpoint.text.write(args.output)
    except (CheckpointError, OSError) as error:
        print(f"mindformers_export: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"{args.output}: {checkpoint.name}, {', '.join(GRAPHS)}, {args.precision}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
