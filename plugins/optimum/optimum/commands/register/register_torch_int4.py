"""Read by ``optimum-cli``: the commands of torch_int4."""

from torch_int4.hf.optimum_cli import TorchInt4Command

REGISTER_COMMANDS = [TorchInt4Command]
