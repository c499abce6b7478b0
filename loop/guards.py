"""What goes wrong around a step without an error, or with one that names nothing: modes, what is trained, devices."""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batch import leaves
from .checks import say
from .groups import fold
from .store import Named
from .wrapped import reshard

if TYPE_CHECKING:
    from .dispatch import Dispatch
    from .session import Session
    from .state import State

log = logging.getLogger("hookloop")

DEVICES = re.compile(r"(same|different|expected|MPS) device|two devices|[Oo]n device|device type|[Mm]eta\b.*backend")
TYPES = re.compile(r"weight type .* should be the same")  # what a convolution says for devices as for dtypes


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Return the mode of each module, nothing where the root's own `train()` left it in eval mode."""
    return {module: module.training for module in model.modules()} if model.training else {}


def to_train(model: nn.Module) -> bool:
    """Put a model that is in eval mode into train mode, whole unless a part of it is; return whether it was whole."""
    if whole := not any(module.training for module in model.modules()):
        model.train()
    else:  # whoever left some in train mode meant the others
        model.training = True
    return whole


def back_to_train(loop: Session) -> None:
    """Put a model that someone left in eval mode back into the modes it had, and warn once."""
    if to_train(loop.state.model):
        for module in loop.state.model.modules():
            module.training = loop.modes.get(module, True)
    warn_once(loop, "eval", "the model was left in eval mode: model.training was False after step "
                            f"{loop.state.step}, so its modules were put back into the modes that they had; call model.train() "
                            "after model.eval() in a callback or between steps, and to freeze a layer put that layer into "
                            "eval mode, not the model")  # fmt: skip


def left_in_eval(loop: Session) -> None:
    """Warn, once, of updates of a model that was in train mode before: around a loop of the user's own nothing is changed."""
    if loop.modes and not loop.state.model.training:
        warn_once(loop, "eval", f"the model is in eval mode in the update after step {loop.state.step}, and was in train mode "
                                "before: call model.train() after model.eval()")  # fmt: skip


def back_to_eval(loop: Session, model: nn.Module) -> None:
    """Put a model that someone put into train mode inside an evaluation back, and warn once."""
    model.eval()
    if not model.training:  # else its own train() decides
        warn_once(loop, "train", "the model was put into train mode: model.training was True inside the evaluation after step "
                                 f"{loop.state.step}, so it was put back into eval mode; leave model.train() out of what an "
                                 "evaluation runs, which puts the modes back itself")  # fmt: skip


def warn_once(loop: Dispatch, kind: Any, text: str) -> None:
    """Warn, unless this Loop did so about the same."""
    if kind not in loop.warned:
        loop.warned.add(kind)
        warnings.warn(text, stacklevel=3)


def check_trained(loop: Session) -> None:
    """Refuse, at the start, an optimizer that holds only frozen parameters; warn of trainable ones that none holds, once."""
    state, first = loop.state, "trained" not in loop.warned
    if state.ranks.sharded:
        reshard(state.model)
    loop.warned.add("trained")
    kind, mine = type(state.optimizer).__name__, [p for group in state.optimizer.param_groups for p in group["params"]]
    if first and state.loader is not None and not any(p.requires_grad for p in mine):
        raise ValueError(f"all {len(mine)} parameters in {kind} are frozen (requires_grad=False), so nothing would be trained; "
                         "unfreeze some: model.requires_grad_(True)")  # fmt: skip
    held = {id(p) for other in tuple(loop.alive) for group in other.state.optimizer.param_groups for p in group["params"]}
    lost = {name: p for name, p in state.model.named_parameters() if p.requires_grad and id(p) not in held}
    new = [name for name, p in lost.items() if (name, id(p)) not in loop.warned]
    if not new:
        return
    loop.warned |= {(name, id(lost[name])) for name in new}
    clean = Named(state.model, state.optimizer).clean
    shown = fold([clean(name) for name in new[:5]]) + (", ..." if new[5:] else "")
    warnings.warn(f"{len(new)} parameters require gradients but are in no group of {kind}, so this Loop does not train them: "
                  f"{shown}; "
                  'give them to it (optimizer.add_param_group({"params": [...]}), or build it after the model is complete), or '
                  "freeze them (requires_grad_(False))", stacklevel=2)  # fmt: skip


def check_noise(loop: Session) -> None:
    """Warn, once, of another Loop in the same body that draws the same noise, step by step."""
    alike = [other for other in tuple(loop.alive) if other is not loop and other._entered and other.streams is not None
             and other.state.loader is not None and other.state.seed == loop.state.seed]  # fmt: skip
    if alike and loop.state.loader is not None and "noise" not in loop.warned:
        for one in (loop, *alike):
            one.warned.add("noise")
        log.warning("two Loops that are entered at once train with Seed(%d), so that both draw the same random numbers in each "
                    "step (the noise of a GAN's two updates): give each a number of its own, as Seed(0) and Seed(1)",
                    loop.state.seed)  # fmt: skip


def name_devices(error: BaseException, model: nn.Module, batch: Any) -> None:
    """Add to torch's error about devices what of the model and of the batch lies where."""
    if not isinstance(error, RuntimeError) or not (DEVICES.search(str(error)) or TYPES.search(str(error))):
        return
    held: dict[torch.device, str] = {}
    given: dict[torch.device, str] = {}
    for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
        held.setdefault(x.device, name)
    for path, x in leaves(batch):
        if isinstance(x, Tensor):
            given.setdefault(x.device, path)
    if len(held | given) > 1:
        remedy = "move all of the model to one device before the optimizer is built: model.to(device)"
        if len(held) < 2:
            remedy = "have the batch on the device of the model"
    elif DEVICES.search(str(error)):
        remedy = "a tensor that the loss function or the forward makes must be made there: device=x.device"
    else:
        return
    places = [f"{name} is on {device}" for found in (held, given) for device, name in found.items()]
    say(error, f"devices: {', '.join(places)}; {remedy}")


def name_sparse(error: BaseException, state: State) -> None:
    """Add to an optimizer's error which sparse gradients it was to decay."""
    found = Named(state.model, state.optimizer)
    decayed = {id(p) for g in state.optimizer.param_groups if g.get("weight_decay") for p in g["params"]}
    if names := [n for n, p in found.tensors.items() if p.grad is not None and p.grad.is_sparse and id(p) in decayed]:
        say(error, f"the gradient of {fold(names[:5])} is sparse, and torch's optimizers give no decay to those: set it to 0 "
                       f"there, as with WeightDecay({{{names[0]!r}: 0.0}})")  # fmt: skip
