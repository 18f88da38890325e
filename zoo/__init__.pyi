# Made by tools/stubs.py of the table PUBLIC in zoo/__init__.py. Do not edit.
from zoo import models as models
from zoo.checkpoints.info import info as info
from zoo.checkpoints.info import list_checkpoints as list
from zoo.components.cache import Cache as Cache
from zoo.diagnosis.checkup.diagnose import diagnose as diagnose
from zoo.diagnosis.diff.diff import diff as diff
from zoo.errors import ZooError as ZooError
from zoo.loading import load as load
from zoo.parity import verify as verify
from zoo.prepared.prepare import prepare as prepare
from zoo.saving.convert import convert as convert
from zoo.saving.optimizers import convert_optimizer as convert_optimizer
from zoo.saving.save import save as save
from zoo.text.embed import embed as embed
from zoo.text.fill import fill as fill
from zoo.text.generate import generate_text as generate
from zoo.text.perplexity import perplexity as perplexity
from zoo.tokenizers import tokenizer as tokenizer
from zoo.training.start import train as train

__version__: str
PUBLIC: dict[str, str]
VERBS: dict[str, str]

__all__ = [
    "Cache",
    "ZooError",
    "convert",
    "convert_optimizer",
    "diagnose",
    "diff",
    "embed",
    "fill",
    "generate",
    "info",
    "list",
    "load",
    "models",
    "perplexity",
    "prepare",
    "save",
    "tokenizer",
    "train",
    "verify",
]
