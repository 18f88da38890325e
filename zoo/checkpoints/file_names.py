"""The usual names of the files in a checkpoint's directory."""

from __future__ import annotations

import re
from pathlib import Path

from zoo.errors import ConfigError, UnsafePath

CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # as peft names it
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NATIVE_FILE = "zoo.json"  # in a native directory, instead of config.json
RUN_RECIPE = "recipe.yaml"  # in the directory of a training run
RUN_CHECKPOINTS = ("best", "last")  # its folders: the first that is there is loaded
MODULES = "modules.json"  # the layers that turn hidden states into sentence embeddings
MORE_TEMPLATES = "additional_chat_templates"  # a folder with a chat template in each file
# downloaded beside config and weights, where the repository has them
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    *("quantize_config.json", "quant_config.json"),  # quantization configs of early programs
    f"{MORE_TEMPLATES}/tool_use.jinja",  # the only named template that is downloaded
    MODULES,
    ADAPTER,  # weights beside which it lies are not loaded without a decision
)
# settings of sentence embeddings; the weights of the modules lie in folders of their own
SENTENCE_FILES = ("sentence_bert_config.json", "config_sentence_transformers.json")
# (whole file, index of shards), the preferred format first
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
MODULE_WEIGHTS = tuple(whole for whole, _ in WEIGHTS)
PUBLISHED = re.compile(  # files of weights by the names above, whole or a shard
    "|".join(r"{}(-\d+-of-\d+)?\.{}".format(*whole.split(".")) for whole, _ in WEIGHTS)
)


def module_folders(directory: Path) -> list[tuple[str, str]]:
    """List (kind, folder) of each step that modules.json names after the model itself."""
    from converters.paths import confined, is_plain
    from converters.strict_json import read_json_list

    path = confined(directory, MODULES)
    steps: list[tuple[str, str]] = []
    for module in read_json_list(path):
        entry = module if isinstance(module, dict) else {}
        kind, folder = entry.get("type"), entry.get("path")
        if not isinstance(kind, str) or not isinstance(folder, str):
            raise ConfigError(f"{path}: expected a type and a path, found {module!r}")
        if folder and not is_plain(folder):
            raise UnsafePath(f"{path}: {folder!r} is no plain relative path")
        steps.append((kind.rpartition(".")[2], folder))
    if not steps or steps[0] != ("Transformer", ""):
        raise ConfigError(f"{path}: begins with {steps[:1]} and not with a Transformer in its root")
    return steps[1:]
