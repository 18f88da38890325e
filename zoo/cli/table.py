"""The commands: where each is defined, what it does, and an example. `zoo --help` is this table."""

from __future__ import annotations

from typing import NamedTuple


class CommandRow(NamedTuple):
    """A command."""

    section: str  # of `zoo --help`
    module: str  # that defines it
    summary: str
    examples: tuple[str, ...]
    answers: bool = False  # exit code 1 is an answer, so that an error is 2


INSPECT, PROVE, CONVERT, TEXT = "Inspect", "Prove and diagnose", "Convert", "Use a model"
TRAIN = "Train"

COMMANDS = {
    "list": CommandRow(
        INSPECT,
        "zoo.cli.checkpoints",
        "list the checkpoints that have a name",
        ("zoo list", "zoo list --verified"),
    ),
    "info": CommandRow(
        INSPECT,
        "zoo.cli.checkpoints",
        "describe a checkpoint without loading it",
        ("zoo info gpt2", "zoo info ./my-model --tree"),
    ),
    "verify": CommandRow(
        PROVE,
        "zoo.cli.proofs",
        "prove that zoo and the reference compute the same function",
        ("zoo verify llama", "zoo verify ./my-model --json"),
    ),
    "diff": CommandRow(
        PROVE,
        "zoo.cli.proofs",
        "find the first module where two models differ",
        ("zoo diff ./my-model", "zoo diff ./my-model ./other --dtype fp32"),
        answers=True,
    ),
    "diagnose": CommandRow(
        PROVE,
        "zoo.cli.proofs",
        "look for mistakes in one checkpoint, with nothing to compare it to",
        ("zoo diagnose ./my-model", "zoo diagnose ./my-model --text notes.txt"),
        answers=True,
    ),
    "convert": CommandRow(
        CONVERT,
        "zoo.cli.convert",
        "write a checkpoint in another layout",
        ("zoo convert gpt2 --to native --out gpt2-native", "zoo convert ./my-model --to gguf"),
    ),
    "convert-optimizer": CommandRow(
        CONVERT,
        "zoo.cli.convert",
        "convert a torch optimizer's state as its checkpoint SRC is converted",
        ("zoo convert-optimizer ./my-model optimizer.pt --out optimizer-native.pt",),
    ),
    "check": CommandRow(
        CONVERT,
        "zoo.cli.convert",
        "check that a directory still is what convert wrote",
        ("zoo check ./gpt2-native --sha256",),
    ),
    "train": CommandRow(
        TRAIN,
        "zoo.cli.training",
        "train a model from scratch, or go on from a checkpoint",
        (
            "zoo train --data shakespeare.txt --tokenizer char --set layers=4 --set dim=128",
            "zoo train --from gpt2 --data mine.txt --lora q_proj,v_proj --out runs/tuned",
            "zoo train --resume runs/tuned --steps 4000",
        ),
    ),
    "tokenize": CommandRow(
        TEXT,
        "zoo.cli.text",
        "print the token ids of a text, and their tokens",
        ('zoo tokenize gpt2 "Hello world"',),
    ),
    "score": CommandRow(
        TEXT,
        "zoo.cli.text",
        "compute a decoder's perplexity on a text",
        ("zoo score gpt2 notes.txt", "cat notes.txt | zoo score gpt2 - --window 512"),
    ),
    "fill": CommandRow(
        TEXT,
        "zoo.cli.text",
        "fill the gaps of a text with a masked language model",
        ('zoo fill bert-base-uncased "The capital of France is [MASK]."',),
    ),
    "embed": CommandRow(
        TEXT,
        "zoo.cli.text",
        "compute a vector for each text",
        ('zoo embed bert-base-uncased "a text" "another" --normalize',),
    ),
    "generate": CommandRow(
        TEXT,
        "zoo.cli.text",
        "continue a text",
        (
            'zoo generate gpt2 "Once upon a time"',
            'zoo generate gpt2 "Once" --temperature 0.8 --top-p 0.9 --seed 1',
        ),
    ),
    "chat": CommandRow(
        TEXT,
        "zoo.cli.text",
        "hold a dialogue with a model; /help there lists its commands",
        ("zoo chat qwen2.5-0.5b-instruct --prepare",),
    ),
}
