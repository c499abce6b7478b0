"""What each rank's process would import anew: the fork server that starts them imports it once."""

import helpers  # noqa: F401
import torch
import torch._dynamo  # an optimizer imports it when it is built
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.utils.tensorboard
import torchmetrics.classification  # noqa: F401

import hookloop.callbacks
import hookloop.loop  # noqa: F401

torch.set_num_threads(1)  # a thread pool is nothing that a fork takes along
