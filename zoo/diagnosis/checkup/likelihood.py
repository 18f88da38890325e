"""The likelihood of a text, token by token: a file that is read wrong makes it worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.components.decoder import Decoder
from zoo.components.encoder import Encoder
from zoo.components.model import Model
from zoo.errors import InputError, UsageError
from zoo.text.inference import check_all_logits, name_of

MOST = 320  # tokens that are looked at
EVERY = 7  # of an encoder's tokens one is hidden at a time
TEXT = """\
One day a little girl named Anna went to the park with her father. The sun was warm and the sky
was blue. She saw a small brown dog under a big tree. The dog looked sad, because it had lost its
ball. "Do not cry," said Anna. "I will help you to find it." They looked behind the tree, and they
looked in the long grass, but the ball was not there. Then Anna saw something red in the water.
"Look, there it is!" she said. Her father took a long stick and pulled the ball out of the water.
The dog was so happy that it jumped up and down. After that day they were good friends, and every
time that Anna came to the park, the dog was there and wanted to play with her.

In the evening they walked home along the river. Her mother had made soup for them, and there was
fresh bread on the table. Anna told her mother about the dog and about the ball. "You were very
kind," her mother said. When it was dark outside, Anna went to bed and closed her eyes. She thought
of the park, of the tall trees, and of her new friend. Soon she was asleep.
"""


def ids_of(model: Model, text: str = TEXT) -> Tensor:
    """(s,), the beginning of a text as the model's own tokenizer has it."""
    tokenizer = model.tokenizer
    ids, inner = tokenizer.encode(text), tokenizer.encode(text, eos=False)
    after = ids[len(inner) :]
    ids = [*inner[: MOST - len(after)], *after]
    vocab = model.config.vocab
    if outside := [id for id in ids if id >= vocab]:
        token = tokenizer.token(outside[0])
        raise InputError(
            f"{tokenizer!r}: id {outside[0]} of {token!r}, and the model has {vocab} rows for "
            "tokens: this is another model's tokenizer"
        )
    return torch.tensor(ids)


def nats(
    model: Model,
    ids: Tensor,
    mask: int | None = None,
    heats: Sequence[float] = (1.0,),
    times: int = EVERY,
) -> Tensor:
    """(heats, n) of a text's (s,) ids: what each token that is foreseen costs, in nats.

    A decoder foresees each but the first; a text that is longer than its positions is cut. A
    masked LM is shown the text with every seventh token hidden, which is `mask`: seven `times`, so
    that each is hidden once, or fewer. Logits are divided by each of `heats`.
    """
    parts = ids.split(model.config.limit or len(ids))
    foresee = _foreseen if mask is None else partial(_filled, mask=mask, times=times)
    return torch.cat([foresee(model, part, heats) for part in parts if len(part) > 1], 1)


def _foreseen(model: Model, ids: Tensor, heats: Sequence[float]) -> Tensor:
    return _costs(model(ids[None, :-1])[0], ids[1:], heats)


def _filled(model: Model, ids: Tensor, heats: Sequence[float], mask: int, times: int) -> Tensor:
    places = torch.arange(len(ids), device=ids.device) % EVERY
    costs = list[Tensor]()
    for n in range(min(times, len(ids))):
        logits = model(torch.where(places == n, mask, ids)[None])[0]
        costs.append(_costs(logits[places == n], ids[places == n], heats))
    return torch.cat(costs, 1)


def _costs(logits: Tensor, wanted: Tensor, heats: Sequence[float]) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = [F.cross_entropy(wide / heat, wanted, reduction="none") for heat in heats]
    return torch.stack(rows).double().cpu()


def hidden_as(model: Model) -> int | None:
    """The id that hides a token; None where a decoder needs none."""
    check_all_logits(model)
    if isinstance(model, Decoder) and model.config.head == "lm":
        return None
    if isinstance(model, Encoder) and model.config.head in ("masked_lm", "lm_predictions"):
        id = None if model.provenance is None else model.tokenizer.mask
        if id is None:
            raise UsageError(f"{name_of(model)}: no tokenizer names the token that hides others")
        return id
    raise UsageError(
        f"{name_of(model)}: gives a text no likelihood; a decoder with head 'lm' does, and an "
        "encoder with head 'masked_lm'"
    )


def chance(model: Model) -> float:
    """What a token costs where each is as likely as the others."""
    return math.log(model.config.vocab)
