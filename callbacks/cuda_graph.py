"""CUDAGraph: steps launched at once instead of one operation after another."""

import warnings

import torch
from torch.nn.parallel import DistributedDataParallel

from ..loop.callback import Callback
from ..loop.checks import whole
from ..loop.graph import Graphs
from ..loop.state import State

FUSED = ("SGD", "Adagrad")  # no capturable setting, but a fused form that reads nothing


class CUDAGraph(Callback):
    """Records forward with backward of a micro-batch, and the optimizer's update, as CUDA graphs, and replays them.

    The first `warmup` micro-batches of each shape, and updates, run as written and count. Hooks run between the two, on
    the gradients as they are, none is recorded. Rates become tensors, filled in place; the settings `capturable` (`fused`
    for SGD) are turned on. `graphs` shapes of micro-batch are kept, the last used, and as many updates, in one pool of
    memory; a changed decay or another setting of a group is recorded anew. The same random numbers are drawn as without,
    and the weights are those of the run without replay whose optimizer has the same settings, to the bit where kernels are
    deterministic. Python code in the model and in loss_fn runs while recording only. Without a GPU: a warning, and steps
    run as written. Raises ValueError at the start for what can't be recorded: a GradScaler, several ranks, an optimizer
    that reads values; later for a batch that holds more than tensors and plain values, whose changes no replay would see;
    RuntimeError, naming the line, for a loss_fn that waits for the device, or where ever new shapes or settings come.
    """

    owns = ("runner",)

    def __init__(self, warmup: int = 3, graphs: int = 8) -> None:
        whole("warmup", warmup, 1, none=False)
        whole("graphs", graphs, 1, none=False)
        self.warmup, self.graphs = warmup, graphs

    def on_setup(self, state: State) -> None:
        """Refuse what can't be recorded, turn rates into tensors, and take over running."""
        if not supported(state.device):
            warnings.warn(f"CUDAGraph does nothing on {state.device}: steps run as written", stacklevel=2)
            return
        if state.scaler is not None:
            raise ValueError("CUDAGraph can't record a GradScaler, which reads a verdict in each update; train in bfloat16 "
                             "(autocast=torch.bfloat16, no scaler=), or leave CUDAGraph out")  # fmt: skip
        if state.world > 1 or isinstance(state.model, DistributedDataParallel):
            raise ValueError("CUDAGraph can't record training on several ranks yet; leave it out there")
        if state.device.type == "cuda" and state.device.index != (here := torch.cuda.current_device()):
            raise ValueError(f"the model is on {state.device}, but CUDAGraph records on the current device, cuda:{here}: call "
                             f"torch.cuda.set_device({state.device.index}) first")  # fmt: skip
        check_optimizer(state.optimizer)
        state.accepts.append(check_optimizer)
        state.runner = Graphs(state, self.warmup, self.graphs)

    def on_fit_end(self, state: State) -> None:
        """Give the memory back."""
        if isinstance(state.runner, Graphs):
            state.runner.forget()


def supported(device: torch.device) -> bool:
    """Tell whether a device can replay what it recorded."""
    return device.type == "cuda"


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for an optimizer whose step reads values on the host."""
    kind = type(optimizer).__name__
    if not all("capturable" in group or (kind in FUSED and group.get("fused")) for group in optimizer.param_groups):
        remedy = (
            f"{kind}(..., fused=True)" if kind in FUSED else "take one that has capturable=, as AdamW has, or SGD(fused=True)"
        )
        raise ValueError(f"CUDAGraph can't record {kind}, whose step reads values on the host; {remedy}")
