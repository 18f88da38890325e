"""Adam's moments go the way that the weights go: one more step on either side is the same step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build
from torch import Tensor, nn
from training_pairs import FIRST, IDS, NEAR, Nano, Pair

import zoo
from converters.plan import target_names
from converters.spec import load_spec
from zoo import registry
from zoo.checkpoints.build import native_of
from zoo.errors import PlanError, UsageError

PROVEN = [*FIRST, "llama/tied", "t5/gated-own-head", "falcon/grouped", "deberta-v2/v2-conv"]
INPUTS = {"input_ids": IDS, "decoder_input_ids": IDS}


def adam(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True)


@pytest.mark.parametrize("back", [False, True], ids=["from-native", "to-native"])
@pytest.mark.parametrize("key", PROVEN)
def test_the_next_step_equals_the_references(key: str, back: bool, tmp_path: Path) -> None:
    before = Pair(key, tmp_path / "before")
    source: nn.Module = before.reference.model if back else before.model
    target: nn.Module = before.model if back else before.reference.model
    optimizer = adam(source)
    for n in range(3):
        before.step(not back, optimizer, IDS.roll(n, 1))
    kept = copy.deepcopy(optimizer.state_dict())
    moved = zoo.convert_optimizer(kept, source, target)
    again = zoo.convert_optimizer(moved, target, source)
    assert again["state"].keys() == kept["state"].keys()
    for n, state in again["state"].items():
        assert all(torch.equal(x, kept["state"][n][key]) for key, x in state.items())

    # from the checkpoint's weights, with what an optimizer kept of a run that left them
    pair = Pair(key, tmp_path / "after")
    ours, theirs = adam(pair.model), adam(pair.reference.model)
    ours.load_state_dict(moved if back else kept)
    theirs.load_state_dict(kept if back else moved)
    ids = IDS.roll(5, 1)
    assert pair.step(True, ours, ids) == pytest.approx(pair.step(False, theirs, ids), rel=NEAR)
    errors = pair.errors()
    assert max(errors.values()) <= NEAR, max(errors.items(), key=lambda item: item[1])


def stepped(model: Any, groups: Any = None) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=0.01)
    model(IDS).pow(2).mean().backward()
    optimizer.step()
    return optimizer.state_dict()


def test_nanogpts_order_of_matrices_first_is_recognized(tmp_path: Path) -> None:
    """As its ckpt.pt holds them: two groups, and a state_dict that names the head's array too."""
    model = build("gpt2", act="gelu", eps=1e-5)
    other = Nano(model.config)
    decay = [p for p in other.parameters() if p.dim() >= 2]
    rest = [p for p in other.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    torch.manual_seed(2)
    for p in other.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save({"model": other.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c")
    saved = torch.load(tmp_path / "c", weights_only=True)

    moved = zoo.convert_optimizer(saved["optimizer"], saved["model"], model)
    named = moved["param_groups"][0]["param_names"]
    assert all(model.get_parameter(n).dim() == 2 for n in named)
    assert [g["weight_decay"] for g in moved["param_groups"]] == [0.1, 0.0]
    block: Any = other.transformer["h"][0]  # type: ignore[index]
    fused = optimizer.state[block["attn"]["c_attn"].weight]["exp_avg"]
    for n, part in zip("qkv", fused.chunk(3), strict=True):
        place = named.index(f"blocks.0.attn.{n}.weight")
        assert moved["state"][place]["exp_avg"].equal(part)
    back = zoo.convert_optimizer(moved, model, saved["model"])
    assert back["param_groups"][0]["params"] == list(range(len(decay)))
    for n, state in back["state"].items():
        assert all(torch.equal(x, saved["optimizer"]["state"][n][k]) for k, x in state.items())


def reference_like(model: Any) -> dict[str, Tensor]:
    """What the reference's files of a model hold."""
    entry = registry.architectures()[model.architecture]
    header = target_names(
        load_spec(entry.spec), "hf", model.config.to_dict(), native_of(model), bare=False
    )
    return {name: torch.empty(info.shape) for name, info in header.items()}


def test_states_that_do_not_convert_are_refused(tmp_path: Path) -> None:
    model = build("gpt2")
    other, state = reference_like(model), stepped(model)
    names = [n for n, _ in model.named_parameters()]
    place = names.index("blocks.0.attn.q.weight")

    def refused(change: Any, message: str, kind: type = PlanError, **more: Any) -> None:
        changed = copy.deepcopy(state)
        change(changed)
        with pytest.raises(kind, match=message):
            zoo.convert_optimizer(changed, model, other, **more)

    refused(lambda s: s["state"][place].update(step=torch.tensor(9.0)), "step: one array there")
    refused(lambda s: s["state"].pop(place), "kept other things")
    refused(lambda s: s["state"][place].update(exp_avg=torch.ones(3)), "several shapes", UsageError)
    few = "state of parameters that no group has: "
    refused(lambda s: s["param_groups"][0]["params"].pop(), few, UsageError)
    without = lambda s: s["state"].pop(s["param_groups"][0]["params"].pop())  # noqa: E731
    refused(without, "Pass names=", UsageError)
    refused(lambda s: s.pop("state"), "not a state_dict of a torch optimizer", UsageError)
    refused(lambda s: None, "of the optimizer's", UsageError, names=names[:3])
    wrong = ["nothing", *names[1:]]
    refused(lambda s: None, "nothing: no parameter", UsageError, names=wrong)
    with pytest.raises(UsageError, match="one of source and target"):
        zoo.convert_optimizer(state, model, model)
    with pytest.raises(UsageError, match="fit no dialect of gpt2"):
        zoo.convert_optimizer(state, model, {"x": torch.ones(2)})
    own = {**other, "lm_head.weight": other["transformer.wte.weight"].clone()}
    with pytest.raises(PlanError, match="tied on one side only"):
        zoo.convert_optimizer(state, model, own)


def test_groups_that_split_one_array_are_refused() -> None:
    model = build("gpt2")
    few = [p for n, p in model.named_parameters() if ".k." in n]
    rest = [p for n, p in model.named_parameters() if ".k." not in n]
    names = [n for n, _ in model.named_parameters() if ".k." in n]
    names += [n for n, _ in model.named_parameters() if ".k." not in n]
    state = stepped(model, [{"params": few, "lr": 0.1}, {"params": rest}])
    with pytest.raises(PlanError, match="not one group"):
        zoo.convert_optimizer(state, model, reference_like(model), names=names)


def test_named_parameters_need_no_order() -> None:
    model = build("llama")
    named = list(model.named_parameters())[::-1]
    state = stepped(model, named)
    moved = zoo.convert_optimizer(state, model, reference_like(model))
    place = moved["param_groups"][0]["param_names"].index("model.norm.weight")
    mine = [n for n, _ in named].index("norm.weight")
    assert moved["state"][place]["exp_avg"].equal(state["state"][mine]["exp_avg"])
